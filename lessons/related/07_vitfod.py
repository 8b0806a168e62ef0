# %% [markdown]
# # Lesson 07: ViT-FOD
# After this lesson you can roll attention out over all blocks, use it to find the patches that matter, and
# test whether three modules that are built on it help where classes differ in four pixels.
#
# ## The idea
# Two birds may differ in the colour of one spot, before a busy ground. The last class token of a ViT may
# miss that spot. Zhang et al. (2022, arXiv 2203.12816) add three modules to a ViT. All three are cheap at
# inference:
#
# - **complementary tokens** (CTI): the class tokens of the last three blocks answer, not only the last
#   one;
# - **critical regions** (CRF): an extra block reads the class token and the few patches that matter most,
#   once more;
# - **patch combination** (APC): in training, half of a picture gives way to the best cells of another
#   picture, and the label is mixed accordingly.
#
# The method thins the **input** of one block only. It is about accuracy, not about cost.

# %%
import dataclasses
import functools
import math

import numpy as np

import tinytoken as tt
from tinytoken.data import mix
from tinytoken.experiments import (Arm, Recipe, difference, interval_text, lesson, packed, spread_text,
                                   unpacked)
from tinytoken.models import ViTFOD
from tinytoken.tasks.combine import Combine, cell_weights

here = lesson.begin("related_vitfod")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The mechanism by hand
# **Rollout.** In block l, row i of A_l says how much token i reads of each token (mean of the heads). The
# residual branch keeps the token itself, so (A_l + I) / 2 is what token i consists of after the block. The
# product over all blocks, latest first, says what it consists of in terms of the patches. The row of the
# class token, without itself, is the rollout r:
#
# $$R = \frac{A_L + I}{2} \cdots \frac{A_2 + I}{2} \, \frac{A_1 + I}{2}, \qquad r = R[0, 1:]$$
#
# It has no gradient. **Critical regions**: the floor(eta N) patches of the largest r, from the input of
# the last block, are read by an extra block, whose class token has a head of its own.

# %%
SMALL = dict(image_size=16, patch_size=4, dim=12, depth=4, heads=3, num_classes=3)
model = ViTFOD(**SMALL).astype("float64").eval()
for p in model.parameters():  # zeros hide mistakes
    p.data += 0.2 * rng.standard_normal(p.shape)
pictures = rng.standard_normal((3, 3, 16, 16))
out = model(pictures, trace=True)
R = np.eye(17)
for A in out.attention:
    R = (A.data.mean(axis=1) + np.eye(17)) / 2 @ R
r = R[:, 0, 1:]
print(f"rollout by hand and the package's: at most {np.abs(r - out.rollout).max():.0e} apart")
assert np.abs(r - out.rollout).max() < 1e-12
critical = np.sort(np.argsort(-r, axis=1)[:, :math.floor(0.2 * 16)], axis=1)
assert np.array_equal(critical, out.critical)
tt.gradcheck(lambda *_: ViTFOD.class_loss(model, model(pictures), np.array([0, 2, 1]))[0],
             *model.aof.parameters(), seed=here.seed, max_elements=here.pick(4, 10, 100))

# %% [markdown]
# **Patch combination.** r is averaged over 4 x 4 cells and divided by its sum. Of picture a, the half of
# the cells with the lowest weights is overwritten: the best cell of b goes to the best of these places,
# and so on. The label counts for a by the weight of what is left of it, and for b by the weight that the
# pasted cells have **in b**. Both are at least 1/2, so their sum is at least 1, and the paper does not
# divide by it.


# %%
def combine(a, b, weights_a, weights_b, cells):
    """One picture (C, H, W), by loops -> (the mixed one, the label's share of a, that of b)."""
    side = a.shape[1] // cells
    rank_a, rank_b, mixed = np.argsort(-weights_a), np.argsort(-weights_b), a.copy()
    half = cells * cells // 2
    for place, source in zip(rank_a[half:], rank_b[:half]):
        (row, column), (from_row, from_column) = divmod(place, cells), divmod(source, cells)
        mixed[:, row * side:(row + 1) * side, column * side:(column + 1) * side] = (
            b[:, from_row * side:(from_row + 1) * side, from_column * side:(from_column + 1) * side])
    return mixed, weights_a[rank_a[:half]].sum(), weights_b[rank_b[:half]].sum()


weights, partner = cell_weights(out.rollout, (4, 4), 4), np.array([1, 2, 0])
mixed, own, other = mix.exchange(pictures, weights, partner, weights)
for i, j in enumerate(partner):
    by_hand = combine(pictures[i], pictures[j], weights[i], weights[j], 4)
    assert np.array_equal(by_hand[0], mixed[i]) and np.allclose(by_hand[1:], (own[i], other[i]))
print(f"the labels' shares of the first picture: {own[0]:.2f} and {other[0]:.2f}")

# %% [markdown]
# What it costs at inference: the extra block reads 1 + floor(eta N) tokens, so it adds little. In
# training, APC is a second pass of the whole model.

# %%
picture = np.zeros((1, 3, 32, 32), "float32")
vit, fod = (tt.macs(kind(dim=48, heads=3, num_classes=6), picture).total
            for kind in (tt.models.ViT, ViTFOD))
n, C = 1 + math.floor(0.2 * 64), 48
assert fod == vit + 12 * n * C**2 + 2 * n**2 * C + 3 * 6 * C
print(f"a ViT {vit / 1e6:.2f} M multiply-adds, ViT-FOD {fod / 1e6:.2f} M")

# %% [markdown]
# ## The experiment
# The data are `fine_scenes`: one object, and on it a mark of four pixels, two light and two dark. How they
# stand is the class, one of six. Three more marks stand beside the object and mean nothing. The place of
# the mark is known, so we can ask whether the critical patches hold it. Chance is eta = 0.2.
#
# Fine-grained sets have few pictures of each class, and here the arms learn from 1,000. (With 8,000, tried
# before, the ViT learns the task by itself, and nothing is left to gain.)
#
# Rollout means nothing before the model has learned something. So all arms start from one ViT, and get the
# same further steps: the ViT itself, each module alone, and all three. The controls:
#
# - **CRF, random**: the extra block reads random patches, as many.
# - **APC, random cells** and **CutMix**: the same two passes, without rollout. CutMix pastes a rectangle,
#   and its label counts by area.
# - **ViT, twice the pictures**: APC computes two passes a step. So this arm gets batches of twice the
#   size.
#
# The bounds, set before the run: each module is more than one standard deviation (of the seeds) above the
# ViT, or in a run with one seed above the 95 % interval's zero; the critical patches hold the mark in more
# than half of the pictures; APC is above CutMix.

# %%
DIM, FIRST, FURTHER = here.pick((16, 3, 2), (48, 400, 150), (48, 1500, 500))
DATA = "fine_scenes" if here.data == "scenes" else here.data
RECIPE = Recipe(data=DATA, smoothing=0.0, dim=DIM, depth=here.pick(3, 6, 6), heads=here.pick(2, 3, 3),
                lr=2e-3, further_lr=1e-3, batch=here.pick(4, 64, 64),
                train_pictures=here.pick(16, 1000, 1000), test_pictures=here.pick(16, 2000, 10000))
START, VIT, CTI, CRF, APC, ALL = "start", "ViT", "CTI", "CRF", "APC", "all three"
RANDOM, CELLS, CUTMIX, TWICE = "CRF, random", "APC, random cells", "CutMix", "ViT, twice the pictures"
NONE = dict(complementary=False, critical="none")


def arm(task=None, mix=None, model="vitfod", **config):
    """An arm that goes on from START. What it lacks of ViT-FOD is switched off."""
    settings = {} if mix is None else dict(mix=mix)
    config = (NONE | config) if model == "vitfod" else config
    return Arm(model, config, task=task, settings=settings, start=START, steps=FURTHER, lr=RECIPE.further_lr)


ARMS = {VIT: arm(model="vit"), CTI: arm(complementary=True), CRF: arm(critical="rollout"),
        APC: arm(Combine, "attention"),
        ALL: arm(Combine, "attention", complementary=True, critical="rollout"),
        RANDOM: arm(critical="random"), CELLS: arm(Combine, "random"), CUTMIX: arm(Combine, "cutmix"),
        TWICE: arm(model="vit")}
ARMS = {name: dataclasses.replace(each, phase=f"vitfod {name} {FURTHER}") for name, each in ARMS.items()}
ARMS[START] = Arm("vit", steps=FIRST, lr=RECIPE.lr, phase=f"vitfod start {FIRST}")


@functools.cache
def trial_of(seed):
    return here.trial(RECIPE, seed, ARMS)


@functools.cache
def trial_of_twice(seed):
    """The trial with larger batches."""
    return here.trial(dataclasses.replace(RECIPE, batch=2 * RECIPE.batch), seed, ARMS)


def done(name, seed):
    """Train an arm -> what is noted of it."""
    trial = (trial_of_twice if name == TWICE else trial_of)(seed)
    trial.done[START] = trial_of(seed).train(START)  # of the other trial's ViT, with larger batches too
    model, report = trial.train(name)
    logits = trial.answers(model)
    row = trial.measure(model, report, logits)
    row["right"] = packed(logits.argmax(axis=1) == trial.test.labels)
    if getattr(model, "aof", None) is not None:
        row["recall"], row["heads"] = recall(trial, model)
    return row


def recall(trial, model, batch=200):
    """How often the mark's patch is among the critical ones, and the accuracy of each head."""
    cue, labels, held, right = trial.test.cue_patch(RECIPE.patch), trial.test.labels, [], []
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        with tt.no_grad():
            out = model.eval()(trial.prepare(trial.test.images[part]))
        held.append((tt.backend.to_numpy(out.critical) == cue[part, None]).any(axis=1))
        right.append([answers.numpy().argmax(axis=1) == labels[part] for answers in out.answers.values()])
    by_head = np.concatenate(right, axis=1).mean(axis=1)
    return float(np.concatenate(held).mean()), dict(zip(out.answers, by_head.tolist()))


# %% [markdown]
# ## What came out

# %%
chosen = [name for name in ARMS if name != START]
jobs = {f"{name}, seed {seed}": functools.partial(done, name, seed) for seed in here.seeds for name in chosen}
found = here.each(jobs, dataclasses.asdict(RECIPE) | dict(first=FIRST, further=FURTHER))
rows = {name: [found[f"{name}, seed {seed}"] for seed in here.seeds] for name in chosen}
tests = len(trial_of(here.seed).test.labels)


def above(name, other):
    """How many points an arm is above another: mean and 95 % interval."""
    return difference(*([unpacked(row["right"], tests) for row in rows[arm]] for arm in (name, other)))


print(f"{'':<26}{'accuracy, %':>14}{'M MACs':>8}{'mark among the critical':>26}   points above the ViT")
for name in chosen:
    held = [f"{100 * row['recall']:.0f} %" for row in rows[name] if "recall" in row]
    print(f"{name:<26}{spread_text([100 * row['accuracy'] for row in rows[name]]):>14}"
          f"{rows[name][0]['macs'] / 1e6:>8.2f}{', '.join(held):>26}   "
          f"{interval_text(*above(name, VIT)) if name != VIT else ''}")
for head, share in rows[ALL][0]["heads"].items():
    print(f"all three: the head {head!r} alone {100 * share:.1f} %")
gaps = {name: above(name, VIT) for name in chosen if name != VIT}
for name in (CTI, CRF, APC, ALL):
    low = gaps[name][1] if len(here.seeds) == 1 else gaps[name][0] - float(
        np.std([100 * row["accuracy"] for row in rows[VIT]], ddof=1))
    here.claim(f"{name}: points above the ViT, less its spread", low, low=0)
here.claim("mark among the critical patches, share of the pictures", rows[CRF][0]["recall"], low=0.5)
here.claim("points of APC above CutMix", above(APC, CUTMIX)[0], low=0)
here.claim("points of APC above random cells", above(APC, CELLS)[0], low=0)
here.claim("points of CRF above random patches", above(CRF, RANDOM)[0], low=0)
here.says(f"After {FIRST} + {FURTHER} steps, points above the ViT: CTI {gaps[CTI][0]:+.1f}, CRF "
          f"{gaps[CRF][0]:+.1f} (random patches {gaps[RANDOM][0]:+.1f}), APC {gaps[APC][0]:+.1f} (random "
          f"cells {gaps[CELLS][0]:+.1f}, CutMix {gaps[CUTMIX][0]:+.1f}, twice the pictures without it "
          f"{gaps[TWICE][0]:+.1f}), all three {gaps[ALL][0]:+.1f}. The mark is among the critical fifth of "
          f"the patches in {100 * rows[CRF][0]['recall']:.0f} % of the pictures (seeds {here.seeds}).")
here.measured(rows=rows, gaps=gaps, recipe=dataclasses.asdict(RECIPE) | dict(first=FIRST, further=FURTHER))


def draw(figure, count=6):
    """Pictures, their rollout, the critical patches, and what APC makes of them."""
    trial = trial_of(here.seed)
    model, images = trial.train(ALL)[0].eval(), trial.test.images[:count]
    with tt.no_grad():
        out = model(trial.prepare(images))
    rolled = tt.backend.to_numpy(out.rollout)
    side, patch = images.shape[2] // RECIPE.patch, RECIPE.patch
    chosen_patches = (tt.backend.to_numpy(out.critical)[:, :, None] == np.arange(side * side)).any(axis=1)
    weights = cell_weights(rolled, (side, side), 4)
    made = mix.exchange(images.astype("float64"), weights, np.roll(np.arange(count), 1), weights)[0]
    large = lambda a: a.reshape(count, side, side).repeat(patch, axis=1).repeat(patch, axis=2)
    shown = images.transpose(0, 2, 3, 1)
    rows_of = {"picture": shown, "rollout": large(rolled),
               "critical": np.where(large(chosen_patches)[..., None], shown, shown // 4),
               "combined": made.transpose(0, 2, 3, 1).astype("uint8")}
    for line, (title, panels) in zip(figure.subplots(len(rows_of), count), rows_of.items()):
        for axis, panel in zip(line, panels):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)


here.picture("rollout", draw, 8, 5.6)

# %% [markdown]
# The picture shows six test pictures, their rollout by the model with all three modules, the patches that
# its extra block reads, and what APC would make of each and its neighbour.
#
# In the full run (`--full`, three seeds, half an hour on one core) rollout found the mark in 99 % of the
# pictures. The extra block, which reads it there, gained nothing: a ViT that has learned to look there has
# read it already. Neither did the tokens of two blocks for the classifier (CTI). APC gained 1.9 points and
# all three modules 2.1, and each of the three seeds has the two above the ViT. But the bound asked for more
# than the spread of the ViT between seeds, which is 2.2 points: so the four bounds of the paper's claim
# fail, two of them by less than half a point. APC was 1.2 points above CutMix and 1.6 above random cells
# (the bounds hold, but the intervals over seeds reach below 0). In the default run, one seed of few steps,
# random cells and CutMix gained as much as APC, 4 points: what mixing gives at first is not what rollout
# gives.
#
# ## What this does not show
# - The paper fine-tunes a ViT that has seen millions of pictures. Ours has seen a few thousand scenes, and
#   its rollout is what they taught it.
# - Fine-grained classes of photographs differ in more than one way; here exactly four pixels count, and a
#   ViT that has found them needs no module. Where the ViT is near 100 %, no arm can be above it.
# - In the official code 0.1 of the values are dropped in training. Here nothing is dropped.
#
# The code: `tinytoken/models/vitfod.py`, `tinytoken/tasks/combine.py`; that the package agrees with the
# official code is tested in `tests/models/test_vitfod.py`.

# %%
here.end()
