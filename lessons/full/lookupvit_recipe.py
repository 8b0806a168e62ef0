"""Which LookupViT, and how to train it: the readings of the paper, starts, losses and learning rates, beside
a ViT that gets the same care.

    python lessons/full/lookupvit_recipe.py --full                         # scenes, 800 steps
    python lessons/full/lookupvit_recipe.py --full --data cifar10          # 5 epochs of 45,000 photographs

Every choice is made by pictures that are held out of the training pictures; the test pictures are not read.
One seed: a difference of less than half a point says nothing. The command goes on where it was stopped, and
the same command in several terminals shares the arms. Writes lookupvit_recipe_full.json (for photographs
lookupvit_recipe_full_cifar10.json).

On photographs LookupViT fits less than the ViT. What it is short of is asked by arms that give it more
compressed tokens, a wider light path, more blocks, or a mixing of neighbours by convolutions.

It also notes whether the compressed tokens do different things: the mean cosine between the rows of the
gather's attention, by block, in the course of training (1: all compressed tokens read the same patches).
"""
import dataclasses
import functools

import numpy as np

from tinytoken import nn
from tinytoken.experiments import Arm, Recipe, lesson, read_alike
from tinytoken.models import LookupViT, ViT
from tinytoken.models.maps import LocalConv
from tinytoken.tasks import Classify

here = lesson.begin("lookupvit_recipe")
on_scenes = here.data == "scenes"
MOVED, LONGER, EPOCHS = ", moved", here.pick(6, 300, 3000), 20
STEPS = here.pick(4, 150, 800 if on_scenes else 5 * 703)
RECIPE = Recipe(data=here.data, train_pictures=here.pick(64, 16000, 16000), test_pictures=16, choosing=True,
                held_out=here.pick(32, 1000, 6000 if on_scenes else 5000), smoothing=0.0,
                keys_as_queries=False,
                **here.pick(dict(batch=8, dim=16, depth=2, heads=2, patch=8, compressed=(2, 2)), {}, {}))
WATCHED = [STEPS * share // 16 for share in (0, 1, 2, 4, 8, 16)]  # steps after which tokens are compared


class GatherLookupViT(LookupViT):
    """Only the keys of the gather start as its queries; those of the self-attention do not."""

    def build(self, config):
        super().build(config)
        for block in self.blocks:
            block.tie_keys()


def start_against(attention, share=0.4):
    """Let what a token gives to itself start as `share` of it with the opposite sign, as in trained ViTs
    (Trockman & Kolter 2023, arXiv 2305.09828, section 3): W_proj W_v is near -share times one."""
    dim = len(attention.proj.weight)
    attention.proj.weight.data[...] = -share * attention.qkv.weight.data[2 * dim:].T


class MimeticViT(ViT):
    def build(self, config):
        super().build(config)
        for block in self.blocks:
            start_against(block.attn)


class MimeticLookupViT(LookupViT):
    def build(self, config):
        super().build(config)
        for block in self.blocks:
            start_against(block.refine.attn)


def no_mixing_yet(dim):
    """A convolution 3 x 3 of each channel that is zero at first: the start is the model without it."""
    conv = LocalConv(dim)
    conv.weight.data[...] = 0
    return conv


class MixedBlock(nn.Module):
    """A LookupBlock; before it, a weighted sum of its neighbours is added to each lookup token."""

    def __init__(self, block, dim, grid):
        self.block, self.local, self.grid = block, no_mixing_yet(dim), grid

    def forward(self, lookup, compressed, *more):
        return self.block(lookup + self.local(lookup, self.grid), compressed, *more)


class MixedLookupViT(LookupViT):
    def build(self, config):
        super().build(config)
        self.blocks = [MixedBlock(block, config.dim, self.patch_embed.grid) for block in self.blocks]


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
def the_trial(**changes):
    return here.trial(RECIPE, here.seed, ARMS, **changes)


def cosines(model):
    """read_alike, of 64 held-out pictures; None for a ViT."""
    images = the_trial().test.images[:64]
    return read_alike(model, the_trial().prepare(images)) if isinstance(model, LookupViT) else None


def arm(model=LookupViT, lr=RECIPE.lr, settings=None, steps=STEPS, **config):
    config = (dict(compressed=RECIPE.compressed) if issubclass(model, LookupViT) else {}) | config
    return Arm(model, config, task=Weighed, steps=steps, lr=lr, settings=settings or {})


SPREAD, SOFT, DROP = dict(keys_as_queries=True), dict(smoothing=0.1), dict(drop_path=0.1)
ONE = dict(classifiers="compressed", reuse="resoftmax", norm="pre")
BEST, TWO = ONE | SPREAD, ONE | dict(classifiers="both")
alike = "keys as queries"
FIRST = {
    "ViT": arm(ViT), f"ViT, {alike}": arm(ViT, **SPREAD),
    alike: arm(**BEST), f"{alike}, smoothing .1": arm(settings=SOFT, **BEST),
    f"ViT, {alike}, smoothing .1": arm(ViT, settings=SOFT, **SPREAD),
    f"{alike}, no way back": arm(**BEST | dict(reuse="none")),
    f"{alike}, lr 0.002": arm(lr=2e-3, **BEST), f"ViT, {alike}, lr 0.002": arm(ViT, lr=2e-3, **SPREAD),
    f"{alike}, probs": arm(**BEST | dict(reuse="probs")), f"{alike}, qk": arm(**BEST | dict(norm="qk")),
    f"{alike}, probs, qk": arm(**BEST | dict(reuse="probs", norm="qk")),
    f"{alike}, drop path .1": arm(settings=DROP, **BEST),
    f"ViT, {alike}, drop path .1": arm(ViT, settings=DROP, **SPREAD),
    f"{alike}, two classifiers": arm(**TWO | SPREAD),
    "compressed, resoftmax, pre": arm(**ONE),
    f"{alike} in the gather alone": arm(GatherLookupViT, **ONE),
    f"ViT, {alike}, mimetic values": arm(MimeticViT, **SPREAD),
    f"{alike}, mimetic values": arm(MimeticLookupViT, **BEST),
}
GRID = {f"{classifiers}, {reuse}, {norm}": arm(classifiers=classifiers, reuse=reuse, norm=norm)
        for classifiers in ("compressed", "both") for reuse in ("probs", "renorm", "resoftmax")
        for norm in ("qk", "pre")}
LAST = {
    "no way back": arm(**ONE | dict(reuse="none")),
    **{f"second classifier x {w}": arm(settings=dict(second=w), **TWO) for w in (0.1, 0.3)},
    "second classifier fades": arm(settings=dict(fades=True), **TWO),
    f"{alike}, lr 0.0005": arm(lr=5e-4, **BEST), f"ViT, {alike}, lr 0.0005": arm(ViT, lr=5e-4, **SPREAD),
}
KINDS = ((alike, LookupViT, BEST), (f"ViT, {alike}", ViT, SPREAD), ("own keys", LookupViT, ONE),
         ("ViT", ViT, {}))
SOFTER = {f"{name}, smoothing .1": arm(kind, settings=SOFT, **config) for name, kind, config in KINDS[2:]}
# as long as the final runs. Scenes are shown many times then, and moving them may help
LONG = ({f"{name}, {LONGER:,} steps{moved}": arm(kind, settings=SOFT, steps=LONGER, **config)
         for name, kind, config in KINDS for moved in (MOVED, "")} if on_scenes else
        {f"{name}, {EPOCHS} epochs{drop}": arm(kind, settings=settings, steps=EPOCHS * STEPS // 5, **config)
         for name, kind, config in KINDS
         for drop, settings in (("", SOFT), (", drop path .1", SOFT | DROP))})
# what LookupViT is short of where it fits less: tokens, width of the light path, depth, mixing of neighbours
SHORT_OF = {f"{alike}, {change}": arm(kind, **BEST | config) for change, kind, config in (
    ("grid 8x8", LookupViT, dict(compressed=here.pick((3, 3), (8, 8), (8, 8)))),
    ("neighbours", MixedLookupViT, {}), ("light MLP x 4", LookupViT, dict(lookup_mlp_ratio=4)),
    ("depth 12", LookupViT, dict(depth=here.pick(3, 12, 12))),
    ("grid 5x5", LookupViT, dict(compressed=here.pick((2, 3), (5, 5), (5, 5)))))
}
ARMS = FIRST | SOFTER | GRID | LAST | LONG | SHORT_OF
# of what takes longest, only what decides
DECISIVE = ([f"{name}, {LONGER:,} steps{MOVED}" for name, *_ in KINDS] if on_scenes else
            [f"{name}, smoothing .1" for name in ("ViT", f"ViT, {alike}", "own keys", alike)])
chosen = here.pick(list(ARMS), ["ViT", "both, probs, qk", alike],
                   [*DECISIVE, *FIRST, *SOFTER, *GRID, *LAST] if on_scenes else
                   [*DECISIVE, f"ViT, {alike}", alike, f"{alike}, probs, qk", f"{alike}, no way back",
                    f"{alike}, two classifiers", "compressed, probs, qk", "compressed, resoftmax, pre",
                    *SHORT_OF])


def train(name):
    trial = the_trial(**dict(pad=4) if name.endswith(MOVED) else {})
    arm = trial.arms[name]
    model = trial.new(arm.model, **arm.config)
    task = trial.task_of(arm, model)
    row = trial.measure(model, trial.fit(f"recipe {name}", task, arm.steps, arm.lr))
    return row | {"cosines": [*task.cosines.values(), cosines(model)], "lr": arm.lr}


SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS}
del SETTINGS["keys_as_queries"]  # each arm says it for itself
rows = here.each({name: functools.partial(train, name) for name in chosen}, SETTINGS)
print(f"{'arm':<52}{'held-out accuracy, %':>22}{'M MACs':>9}   mean cosine of the last block, in training")
for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
    course = " ".join(f"{step[-1]:.2f}" for step in row["cosines"] if step)
    print(f"{name:<52}{100 * row['accuracy']:>22.2f}{row['macs'] / 1e6:>9.2f}   {course}")
here.measured(rows=rows, watched=WATCHED, seed=here.seed, recipe=SETTINGS)
here.end()
