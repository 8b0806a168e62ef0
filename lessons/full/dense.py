"""Two paths in a pyramid, for classes of pictures and for classes of pixels: what does the fast path cost?

    python lessons/full/dense.py --full        # scenes, both tasks, 3 seeds: about 3 hours of one CPU core

A ConvNeXt is trained, and as a Segmenter's backbone once more, for the pixels. From each, two sorts of arms
go on for as many steps: itself, and DynamicConvNeXt at three keep ratios, whose teacher it is, at the same
resolution. Two controls have its places and its counts: a slow path that goes to random positions, and none.
All of these train as they infer (stale=False); the official code's two streams do not, which would be to the
disadvantage of random sets, as these change at each decision. One arm has them, to see what they cost.
The map on which it is decided has 8 x 8 positions, of 4 x 4 pixels. Every arm sees the same pictures in the
same order. The bounds were set before the first run. The command goes on where it was stopped, and the same
command in several terminals shares the arms. Writes dense_full.json, and a picture of masks.

That the two paths serve dense prediction is a claim of the paper (Rao et al. 2022, arXiv 2207.01580), whose
code has no such model: pictures, decoder, recipe and bounds are ours. mIoU and boundary F1 are those of
tinytoken/tasks/segment.py, the background being a class.
"""
import dataclasses
import functools

import numpy as np

from tinytoken import no_grad
from tinytoken.backend import to_numpy
from tinytoken.errors import expect
from tinytoken.experiments import (Arm, Recipe, difference, interval_text, kept_in_training, kept_on_object,
                                   lesson, spread_text)

here = lesson.begin("dense")
expect(here.data == "scenes", "dense", f"--data {here.data}, expected scenes, whose pixels have labels")
STEPS, FURTHER = here.pick((2, 1), (200, 50), (1100, 275))
RECIPE = Recipe(train_pictures=here.pick(16, 2000, 16000), test_pictures=here.pick(16, 300, 2000), patch=2,
                batch=here.pick(4, 32, 32), lr=4e-3, further_lr=1e-3, predictor_lr_scale=3.0)
# so small a model learns faster where its branches do not start at 1e-6
SIZES = dict(dims=here.pick((4, 8, 12), (24, 48, 96), (24, 48, 96)),
             depths=here.pick((1, 4, 1), (1, 6, 1), (1, 6, 1)), layer_scale=1.0)
PLACES = (1, 2, 3)  # in the second of three stages
SQUARE = 2 * RECIPE.patch  # pixels of a side of its positions
DENSE, FAST, START = "dense", "fast path alone", "dense, start"
DYNAMIC = {ratio: f"keep {ratio}" for ratio in (0.9, 0.7, 0.5)}
RANDOM, OFFICIAL = {0.7: "random 0.7"}, "keep 0.7, official streams"
NAMES = [DENSE, *DYNAMIC.values(), OFFICIAL, *RANDOM.values(), FAST]
# task: (its data, what bounds are about)
TASKS = {"classes": ("scenes", "accuracy"), "pixels": ("pixel_scenes", "mIoU")}


def arms(task):
    """{name: Arm} of a task, "classes" or "pixels"."""
    def arm(kind, ratio=None, start=START, stale=False, **more):
        options = SIZES
        if ratio is not None:  # the official steps from one decision to the next
            options = SIZES | dict(prune_before=PLACES, keep_ratios=(ratio, ratio - 0.2, ratio - 0.4),
                                   stale=stale)
        more |= (dict(steps=FURTHER, lr=RECIPE.further_lr, start=start) if start
                 else dict(steps=STEPS, lr=RECIPE.lr))
        return (Arm(kind, options, **more) if task == "classes"
                else Arm("segmenter", dict(backbone=kind, options=options), **more))
    learned = dict(new_lr_scale=RECIPE.predictor_lr_scale)
    control = learned | dict(settings=dict(weights=(1, 0, 0.5, 0.5)))  # counts are exact, no ratio is learned
    found = {START: arm("convnext", start=None), DENSE: arm("convnext")}
    found |= {name: arm("dynamicconvnext", ratio, **learned) for ratio, name in DYNAMIC.items()}
    found |= {OFFICIAL: arm("dynamicconvnext", 0.7, stale=True, **learned)}
    found |= {name: arm("randompaths", ratio, **control) for ratio, name in RANDOM.items()}
    found |= {FAST: arm("fastpath", 0.5, **control)}
    return {name: dataclasses.replace(one, phase=f"dense {task} {name}") for name, one in found.items()}


@functools.cache
def trial_of(task, seed):
    recipe = dataclasses.replace(RECIPE, data=TASKS[task][0])
    return here.trial(recipe, seed, arms(task))


def train(task, name, seed):
    """Train an arm -> what is noted of it. Of DynamicConvNeXt, by decision: "slow_on_object", the share of
    object in the positions on the slow path, and in all; "slow_in_training", how many these are there."""
    trial = trial_of(task, seed)
    model, report = trial.train(name)
    row = trial.measure(model, report)
    if name in DYNAMIC.values():
        decides = getattr(model, "backbone", model)
        row["slow_on_object"] = kept_on_object(decides, trial.test, trial.prepare, SQUARE)
        row["slow_in_training"] = kept_in_training(trial, decides, batches=here.pick(1, 8, 20))
    return row


SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS, "further": FURTHER} | SIZES
done = here.each({f"{task} seed{seed} {name}": functools.partial(train, task, name, seed)
                  for seed in here.seeds for task in TASKS for name in NAMES}, SETTINGS)
rows = {task: {name: [done[f"{task} seed{seed} {name}"] for seed in here.seeds] for name in NAMES}
        for task in TASKS}


def above(task, name, than):
    """Points of the task's metric that an arm is above another: (mean, low, high), see `difference`."""
    values = [[np.array([row[TASKS[task][1]]]) for row in rows[task][arm]] for arm in (name, than)]
    return difference(*values)


for task, (_, metric) in TASKS.items():
    print(f"\n{task:<28}{metric + ', %':>14}{'above dense':>22}{'boundary F1, %':>16}{'M MACs':>9}"
          f"{'of dense':>10}   object in the slow set, % (in all)")
    for name, by_seed in rows[task].items():
        first, dense = by_seed[0], rows[task][DENSE][0]
        gap = above(task, name, DENSE)
        text = interval_text(*gap) if len(here.seeds) > 1 else f"{gap[0]:+.1f}"
        edges = spread_text([100 * row["boundary_f1"] for row in by_seed]) if task == "pixels" else ""
        slow = first.get("slow_on_object")
        shares = slow and ", ".join(f"{100 * share:.0f}" for share in slow["stages"])
        shares = f"{shares} ({100 * slow['all']:.0f})" if slow else ""
        print(f"{name:<28}{spread_text([100 * row[metric] for row in by_seed]):>14}{text:>22}{edges:>16}"
              f"{first['macs'] / 1e6:>9.2f}{first['macs'] / dense['macs']:>10.3f}   {shares}")

print()
for task, (_, metric) in TASKS.items():
    here.claim(f"{task}: points of {metric} of keep 0.7 above the dense model",
               above(task, DYNAMIC[0.7], DENSE)[0], low=-1.0)
    for ratio, name in RANDOM.items():
        here.claim(f"{task}: points of keep {ratio} above random positions",
                   above(task, DYNAMIC[ratio], name)[0], low=0)
    here.claim(f"{task}: points of keep 0.7 above the fast path alone",
               above(task, DYNAMIC[0.7], FAST)[0], low=0)
    slow = [row["slow_on_object"] for row in rows[task][DYNAMIC[0.7]]]
    here.claim(f"{task}: object in the last slow set of keep 0.7, times its share in all positions",
               float(np.mean([share["stages"][-1] / share["all"] for share in slow])), low=1)


def draw_masks(figure, count=6):
    """A row per picture: it, its labels, the answers of two models, and what took the slow path last."""
    trial = trial_of("pixels", here.seeds[0])
    test, columns = trial.test, ["picture", "labels", DENSE, DYNAMIC[0.7], "slow path of it, last"]
    shown = [test.images[:count].transpose(0, 2, 3, 1), test.labels[:count]]
    for name in (DENSE, DYNAMIC[0.7]):
        with no_grad():
            out = trial.train(name)[0].eval()(trial.prepare(test.images[:count]))
        shown.append(out.logits.numpy().argmax(axis=-1))
    side = test.images.shape[2] // SQUARE
    slow = (to_numpy(out.features.kept[-1])[:, :, None] == np.arange(side * side)).any(axis=1)
    slow = slow.reshape(count, side, side, 1).repeat(SQUARE, axis=1).repeat(SQUARE, axis=2)
    shown.append(np.where(slow, shown[0], shown[0] // 4))
    for line, axes in enumerate(figure.subplots(count, len(columns))):
        for axis, title, pictures in zip(axes, columns, shown):
            colours = dict(vmin=0, vmax=len(test.names) - 1, cmap="tab20", interpolation="nearest")
            axis.imshow(pictures[line], **colours if pictures.ndim == 3 else {})
            axis.set_axis_off()
            if line == 0:
                axis.set_title(title, fontsize=9)


here.picture("masks", draw_masks, 7.5, 9)
here.measured(rows=rows, seeds=here.seeds, recipe=SETTINGS)
here.end()
