"""Which LookupViT, and how to train it: the readings of the paper, starts, losses and learning rates, beside
a ViT that gets the same care.

    python lessons/full/lookupvit_recipe.py --full                         # scenes, 800 steps
    python lessons/full/lookupvit_recipe.py --full --data cifar10          # 5 epochs of 45,000 photographs

Every choice is made by pictures that are held out of the training pictures; the test pictures are not read.
One seed: a difference of less than half a point says nothing. The command goes on where it was stopped, and
the same command in several terminals shares the arms. Writes lookupvit_recipe_full.json (for photographs
lookupvit_recipe_full_cifar10.json).

It also notes whether the compressed tokens do different things: the mean cosine between the rows of the
gather's attention, by block, in the course of training (1: all compressed tokens read the same patches).
"""
import dataclasses
import functools

import numpy as np

import tinytoken as tt
from tinytoken import backend
from tinytoken.experiments import Arm, Recipe, lesson
from tinytoken.models import LookupViT, ViT
from tinytoken.tasks import Classify

here = lesson.begin("lookupvit_recipe")
on_scenes = here.data == "scenes"
STEPS = here.pick(4, 150, 800 if on_scenes else 5 * 703)
RECIPE = Recipe(data=here.data, train_pictures=here.pick(64, 16000, 16000), test_pictures=16, choosing=True,
                held_out=here.pick(32, 1000, 6000 if on_scenes else 5000),
                **here.pick(dict(batch=8, dim=16, depth=2, heads=2, patch=8, compressed=(2, 2)), {}, {}))
WATCHED = [STEPS * share // 16 for share in (0, 1, 2, 4, 8, 16)]  # steps after which tokens are compared


class AlikeLookupViT(LookupViT):
    """A LookupViT whose keys start as its queries do: a compressed token then first reads what is like it."""

    def build(self, config):
        super().build(config)
        for block in self.blocks:
            block.gather_k.weight.data[...] = block.gather_q.weight.data


class AlikeViT(ViT):
    """The same for a ViT: the thirds of qkv."""

    def build(self, config):
        super().build(config)
        for block in self.blocks:
            weight = block.attn.qkv.weight.data
            weight[config.dim:2 * config.dim] = weight[:config.dim]


class Weighed(Classify):
    """Classify with `second`, the weight of the classifier on the lookup tokens; fades: it falls evenly to 0
    over the first half of training. Notes in `cosines` how alike the compressed tokens read."""

    def __init__(self, model, second=1.0, fades=False, **more):
        super().__init__(model, **more)
        self.second, self.fades, self.cosines = second, fades, {}
        self.settings |= {"second": second, "fades": fades}

    def noise(self, size, step, seed, xp=np):
        if step in WATCHED:
            self.cosines[step] = cosines(self.model)
            self.model.train()
        weight = self.second * (max(0, 1 - 2 * step / STEPS) if self.fades else 1)
        return super().noise(size, step, seed, xp) | {"second": xp.full(size, weight, "float32")}

    def __call__(self, images, labels, second, **draws):
        loss, parts = super().__call__(images, labels, **draws)
        return parts["class"] + parts["lookup"] * float(second[0]) if "lookup" in parts else loss, parts


@functools.cache
def the_trial():
    return here.trial(RECIPE, here.seed, ARMS)


def cosines(model):
    """By block, the mean cosine between the attention rows of two compressed tokens, over 64 held-out
    pictures and all heads; None for a ViT."""
    if not isinstance(model, LookupViT):
        return None
    with tt.no_grad():
        out = model.eval()(the_trial().prepare(the_trial().test.images[:64]), trace=True)
    found = []
    for rows in (backend.to_numpy(A.data) for A in out.attention):  # (B, H, M, N)
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        alike, m = rows @ rows.swapaxes(-1, -2), rows.shape[2]
        found.append(float((alike.sum(axis=(-1, -2)) - m).mean() / (m * (m - 1))))
    return found


def arm(model=LookupViT, lr=RECIPE.lr, settings=None, **config):
    grid = dict(compressed=RECIPE.compressed) if issubclass(model, LookupViT) else {}
    return Arm(model, grid | config, task=Weighed, steps=STEPS, lr=lr, settings=settings or {})


BEST = dict(classifiers="compressed", reuse="resoftmax", norm="pre")
TWO = BEST | dict(classifiers="both")
LOOKUP, alike = functools.partial(arm, **BEST), "keys as queries"
READINGS = {f"{classifiers}, {reuse}, {norm}": arm(classifiers=classifiers, reuse=reuse, norm=norm)
            for classifiers in ("compressed", "both") for reuse in ("probs", "renorm", "resoftmax")
            for norm in ("qk", "pre")}
VITS = {"ViT": arm(ViT), f"ViT, {alike}": arm(AlikeViT)}
VITS |= {f"ViT, lr {lr}": arm(ViT, lr=lr) for lr in (5e-4, 2e-3)}
VITS |= {"ViT, drop path .1": arm(ViT, settings=dict(drop_path=0.1)),
         "ViT, smoothing .1": arm(ViT, settings=dict(smoothing=0.1))}
LOOKUPS = {f"{alike}": arm(AlikeLookupViT, **BEST),
           f"{alike}, probs, qk": arm(AlikeLookupViT, classifiers="compressed"),
           f"{alike}, no way back": arm(AlikeLookupViT, **BEST | dict(reuse="none")),
           "no way back": LOOKUP(reuse="none"),
           **{f"second classifier x {w}": arm(settings=dict(second=w), **TWO) for w in (0.1, 0.3)},
           "second classifier fades": arm(settings=dict(fades=True), **TWO),
           **{f"{alike}, lr {lr}": arm(AlikeLookupViT, lr=lr, **BEST) for lr in (5e-4, 2e-3)},
           f"{alike}, drop path .1": arm(AlikeLookupViT, settings=dict(drop_path=0.1), **BEST),
           f"{alike}, smoothing .1": arm(AlikeLookupViT, settings=dict(smoothing=0.1), **BEST)}
ARMS = VITS | READINGS | LOOKUPS
FIRST = ["ViT", "compressed, resoftmax, pre", *LOOKUPS]
chosen = here.pick(list(ARMS), ["ViT", "both, probs, qk", alike],
                   [*FIRST, *(name for name in ARMS if name not in FIRST)])


def train(name):
    trial = the_trial()
    arm = trial.arms[name]
    model = trial.new(arm.model, **arm.config)
    task = trial.task_of(arm, model)
    row = trial.measure(model, trial.fit(f"recipe {name}", task, arm.steps, arm.lr))
    return row | {"cosines": [*task.cosines.values(), cosines(model)], "lr": arm.lr}


SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS}
rows = here.each({name: functools.partial(train, name) for name in chosen}, SETTINGS)
print(f"{'arm':<34}{'held-out accuracy, %':>22}{'M MACs':>9}   mean cosine of the last block, in training")
for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
    course = " ".join(f"{step[-1]:.2f}" for step in row["cosines"] if step)
    print(f"{name:<34}{100 * row['accuracy']:>22.2f}{row['macs'] / 1e6:>9.2f}   {course}")
here.measured(rows=rows, watched=WATCHED, seed=here.seed, recipe=SETTINGS)
here.end()
