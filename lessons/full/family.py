"""The family in one table: what each method thins, what it costs, how fast it is, and what it reaches.

    python lessons/full/family.py --full                        # 10 methods, 3 seeds: over an hour, two CPUs
    python lessons/full/family.py --full --data pixel_scenes    # 8 methods that answer for every pixel

Every method has 64 tokens of a picture (or starts with as many), the width of the ViT and its six blocks:
also the pyramids, which have one stage here. They get the same steps of the same optimiser on the same
scenes, in two parts as in `compare`: three quarters of the steps, then a quarter at a smaller learning rate.
A method that wants a teacher has no first part of its own. It starts from the ViT's, which also teaches it.

The recipe is short, and one for all: the table says what a method costs and whether it learns, not what it
could reach with a recipe of its own, at another size. That is what the lessons are about.

Speeds are of inference with the first seed's weights, in rounds in which every method has its turn; the
ratio to the ViT is taken inside a round. They are measured last, by one process, so several terminals may
share the arms; but the machine has to be idle otherwise. Memory: the most that the arrays of a call take on
one thread. Writes family_full.json, for pixels family_full_pixel_scenes.json, from which lessons/report.py
makes the tables.
"""
import dataclasses
import functools

from tinytoken.backend import array_module
from tinytoken.errors import expect
from tinytoken.experiments import Arm, Recipe, lesson, timing
from tinytoken.experiments.tables import family_text
from tinytoken.models import model as models
from tinytoken.tasks import task as tasks
from tinytoken.train import infer, loss_and_grads

here = lesson.begin("family")
RECIPE = Recipe(data=here.data, steps=here.pick(4, 100, 500), batch=here.pick(8, 64, 64),
                dim=here.pick(24, 96, 96), train_pictures=here.pick(32, 8000, 16000),
                test_pictures=here.pick(128, 500, 2000))
D, L = RECIPE.dim, RECIPE.depth
# name: (what it thins, the model, its options beside the recipe's sizes). Another method is another line.
PICTURES = {
    "ViT": ("nothing", "vit", {}),
    "DynamicViT .7": ("rows: tokens are removed", "dynamicvit", dict(prune_before=RECIPE.prune_before,
                                                                     keep_ratios=RECIPE.keep_ratios)),
    "LookupViT 3x3": ("rows: few tokens do the work", "lookupvit", dict(compressed=RECIPE.compressed)),
    "ToMe": ("rows: tokens are merged", "tome", dict(r=8)),
    "T2T-ViT": ("input: windows become tokens in steps", "t2tvit", dict(token_dim=D // 6)),
    "Shunted": ("keys: merged at two rates", "shuntedtransformer", dict(dims=(D,), depths=(L,), heads=4,
                                                                        rates=((4, 2),))),
    "LeMeViT": ("keys: meta tokens", "lemevit", dict(dims=(D, D), depths=(1, L - 1), attn_type=("C", "D"))),
    "STViT 3x3": ("rows: semantic tokens", "stvit", dict(semantic=(3, 3))),
    "STViT-R": ("rows in four blocks; the map is recovered", "stvitr", dict(embed_dim=D, depths=(L,))),
    "ViT-FOD": ("nothing; one more block on critical tokens", "vitfod", {}),
}
PIXELS = {
    "ViT": ("nothing", "segmenter", {}),
    "ViT, linear decoder": ("nothing", "segvit", dict(decoder="linear")),
    "SegViT": ("nothing; masks by queries", "segvit", {}),
    "SegViT, shrunk": ("rows: every second one goes on, both ways", "segvit", dict(shrink="strided")),
    "SegViT, shrunk++": ("rows: the same, and those at edges", "segvit", dict(shrink="edges", extra=8)),
    "LookupViT 3x3": ("rows: few tokens do the work", "segmenter",
                      dict(backbone="lookupvit", options=dict(compressed=RECIPE.compressed))),
    "DoViT": ("rows: sure tokens leave early", "dovit", {}),
    "STViT-R": ("rows in four blocks; the map is recovered", "segmenter",
                dict(backbone="stvitr", options=dict(embed_dim=D, depths=(1, L, 1)))),
}
FAMILIES = {"scenes": (PICTURES, "accuracy"), "pixel_scenes": (PIXELS, "mIoU")}  # by data, with the metric
expect(here.data in FAMILIES, "family", f"--data {here.data}, expected {' or '.join(FAMILIES)}")
FAMILY, METRIC = FAMILIES[here.data]
SPEEDS = {"1": here.pick(2, 9, 31), "128": here.pick(2, 5, 9)}  # rounds, by pictures at a time
first, further = (dict(steps=RECIPE.steps - RECIPE.further, lr=RECIPE.lr),
                  dict(steps=RECIPE.further, lr=RECIPE.further_lr, new_lr_scale=RECIPE.predictor_lr_scale))
ARMS = {}
for name, (_, kind, config) in FAMILY.items():
    taught = tasks.pick(models.pick(kind).task).taught
    start = f"{next(iter(FAMILY)) if taught else name}, start"
    ARMS.setdefault(start, Arm(kind, config, phase=f"family {start}", **first))
    ARMS[name] = Arm(kind, config, start=start, phase=f"family {name}", **further)
trial_of = functools.cache(lambda seed: here.trial(RECIPE, seed, ARMS))


def train(name, seed):
    """Train an arm -> what is noted of it."""
    trial = trial_of(seed)
    return trial.measure(*trial.train(name))


def measure():
    """Seconds of each method by round, {pictures at a time: {method: seconds}}, and megabytes, {method:
    {call: MB}}; no megabytes on a GPU."""
    trial = trial_of(here.seed)
    made = {name: trial.train(name)[0] for name in FAMILY}
    pictures = trial.prepare(trial.test.images[:128])
    seconds = {size: timing.interleaved({name: functools.partial(infer, model, pictures[:int(size)])
                                         for name, model in made.items()}, rounds)
               for size, rounds in SPEEDS.items()}
    if here.device != "cpu":
        return {"seconds": seconds, "megabytes": {}}
    return {"seconds": seconds, "megabytes": {name: memory_of(trial, name, made) for name in made}}


def memory_of(trial, name, made):
    """Of inference with up to 128 pictures, and of a training step, in MB."""
    model, batch = made[name], trial.batches(0)
    task = trial.task_of(ARMS[name], model, made[next(iter(FAMILY))])
    draws = task.noise(len(batch[0]), 0, here.seed, array_module(batch[0]))
    step = functools.partial(loss_and_grads, task, model.parameters(), batch, threads=1, draws=draws)
    model.train()
    step()  # flat storage is made
    pictures = trial.prepare(trial.test.images[:128])
    return {"step": timing.peak_of_arrays(step),
            "inference": timing.peak_of_arrays(functools.partial(infer, model, pictures, threads=1))}


SETTINGS = dataclasses.asdict(RECIPE) | {"family": FAMILY}
done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed)
                  for seed in here.seeds for name in FAMILY}, SETTINGS)
rows = {name: [done[f"seed{seed} {name}"] for seed in here.seeds] for name in FAMILY}
# when all arms are done: another terminal that shares them waits for this one
measured = here.each({"speeds": measure}, SETTINGS | {"rounds": SPEEDS})["speeds"]
here.measured(rows=rows, thins={name: thins for name, (thins, *_) in FAMILY.items()}, seeds=here.seeds,
              metric=METRIC, recipe=SETTINGS, **measured)
print(family_text(here.results))
here.end()
