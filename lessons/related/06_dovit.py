# %% [markdown]
# # Lesson 06: DoViT
# After this lesson you can let the patches of a picture leave a ViT at different depths, count what that
# saves for each picture, and test whether the rule that chooses them is better than chance.
#
# ## The idea
# Segmentation needs an answer for every patch, so a patch cannot be dropped. But most patches are easy: an
# early layer knows their class. In DoViT (Liu et al. 2023, arXiv 2308.01944, "Dynamic Token-Pass
# Transformers") a small head between the blocks answers, too. A patch of which the head is **sure** stops.
# It keeps its features, no other token reads it any more, and at the end it stands in its place for the
# decoder.
#
# Nothing fixes how many stop. So the cost depends on the picture: one with much to see is to cost more.
# DynamicViT (lesson 07 of the course) keeps the same number in every picture.

# %%
import dataclasses
import functools
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import no_grad
from tinytoken.backend import to_device, to_numpy
from tinytoken.experiments import Arm, Recipe, lesson, spread_text
from tinytoken.models import DoViT
from tinytoken.models.mask_losses import edge_patches
from tinytoken.tasks.segment import Segment

here = lesson.begin("related_dovit")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The mechanism by hand
# Before some of the blocks, the exits, with the tokens x (B, 1 + N, C), the first being the class token:
#
#     p      = softmax(head(x))                      for each pixel of each patch, (B, N, P^2, K)
#     sure   = mean over pixels of max over classes of p          (B, N), no gradient
#     going  = going and sure <= tau                 what has stopped stays so
#     class token = (class token + mean of what waits) / 2        where more than a tenth of the tokens waits
#
# The last line is the aggregation: what waits is not read, so its mean is left to the others. Then the
# blocks run on the class token and what is going. In a batch each picture has another number of them. In
# training what waits is hidden by a mask, at inference it is not computed. Both are this:


# %%
def pass_by_hand(model, images, tau):
    """The tokens (B, N, C) at the end, and for each exit what goes on (B, N)."""
    c, x, kept = model.config, model.start(images).x.data.copy(), []
    (B, T, _), going = x.shape, np.ones((len(x), x.shape[1] - 1), bool)
    for i, block in enumerate(model.blocks):
        if i in c.exits:
            head = model.auxiliary_head[c.exits.index(i)]
            z = (x[:, 1:] @ head.weight.data.T + head.bias.data).reshape(B, T - 1, c.patch_size**2, -1)
            p = np.exp(z - z.max(axis=3, keepdims=True))
            p = p / p.sum(axis=3, keepdims=True)
            going = going & (p.max(axis=3).mean(axis=2) <= tau)
            kept.append(going)
            for b in range(B):
                if (~going[b]).sum() / T > c.aggregate:
                    x[b, 0] = (x[b, 0] + x[b, 1:][~going[b]].mean(axis=0)) / 2
        for b in range(B):
            rows = [0, *1 + np.flatnonzero(going[b])]
            x[b, rows] = block(tt.Tensor(x[b:b + 1, rows])).data[0]
    return model.norm(tt.Tensor(x)).data[:, 1:], kept


model = DoViT((16, 24), 4, 12, 5, 3, num_classes=3, exits=(1, 3), width=8).astype("float64")
for p in model.parameters():  # zeros hide mistakes
    p.data += 0.4 * rng.standard_normal(p.shape)
images = rng.standard_normal((4, 3, 16, 24)) * 2
tau = float(np.quantile(model(images, tau=2.0).confidence[0], 0.6))
tokens, kept = pass_by_hand(model, images, tau)
masked, gathered = model.train()(images, tau=tau), model.eval()(images, tau=tau)
print("patches that go on, of 24:", *([int(n) for n in each.sum(axis=1)] for each in kept))
for name, out in (("masked", masked), ("gathered", gathered)):
    gap = np.abs(out.tokens.data - tokens).max()
    print(f"{name}, against by hand: at most {gap:.0e} apart")
    assert gap < 1e-12 and all(np.array_equal(a, b) for a, b in zip(out.kept, kept))
upstream = rng.standard_normal(masked.logits.shape)
slopes = [tt.grad((out.logits * upstream).sum(), model.blocks[0].parameters()) for out in (masked, gathered)]
gap = max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*slopes))
print(f"gradients of the first block, masked and gathered: at most {gap:.0e} of the largest apart")
assert gap < 1e-11

# %% [markdown]
# What it costs: with n_e patches that go on after exit e, a block after it has 12 (n_e + 1) C^2 + 2 (n_e +
# 1)^2 C multiply-adds. Each head costs N C P^2 K, and the two means N C. The model with no exits has
# neither.


# %%
def closed_form(counts, config, classes=11):
    """Multiply-adds of pictures, of which `counts` = (B,) for each exit go on; None: no exits."""
    c, cell = config, config.patch_size**2 * classes
    rows, columns = (side // c.patch_size for side in np.broadcast_to(c.image_size, 2))
    N, C = rows * columns, c.dim
    block = lambda n: 12 * (n + 1) * C**2 + 2 * (n + 1)**2 * C
    fixed = 3 * N * c.patch_size**2 * C + N * C * c.width + N * c.width * cell
    if counts is None:
        return fixed + c.depth * block(N)
    spans = np.diff((*c.exits, c.depth))
    passed = sum(span * block(np.asarray(n, float)) for span, n in zip(spans, counts))
    return fixed + len(c.exits) * (N * C * cell + N * C) + c.exits[0] * block(N) + passed


found = tt.macs(model, images, tau=tau, bucket=1).total
expected = closed_form([each.sum(axis=1) for each in kept], model.config, 3).mean()
print(f"multiply-adds for a picture: counted {found:,.0f}, by the closed form {expected:,.0f}, without exits "
      f"{closed_form(None, model.config, 3):,.0f}")
assert abs(found - expected) < 1e-9 * expected

# %% [markdown]
# ## The experiment
# The pictures are `pixel_scenes`: ten shapes and the background, a class for each pixel. First a model is
# trained in which all patches go on. From it go on, for as many steps, **dense** (all go on), **DoViT**
# (they stop above 0.95), and **no aggregation** (DoViT whose class token takes in nothing). Then tau is
# changed at inference: a curve of mIoU over the mean of the multiply-adds counted for each picture.
#
# Half of the test pictures chooses tau: the cheapest at which at most one point is lost to dense. All
# figures are of the other half. There, with the same weights, other rules choose what goes on:
#
# - **random**: as many in each picture at each exit, drawn at random;
# - **inverted**: as many in each picture, but those of which the head is most sure;
# - **static**: those of which it is least sure, the mean number in every picture.
#
# The bounds, set before the run: more than 40 % of the multiply-adds of dense are saved, and at most one
# point is lost; the rule is more than five points above inverted, more than one above random, and not
# below static; and Spearman's rank correlation of the share that goes on with the number of objects is
# above 0.1.

# %%
STEPS, FURTHER, DEPTH, EXITS = here.pick((3, 1, 3, (1, 2)), (900, 150, 6, (1, 3)), (1500, 400, 8, (1, 4)))
TAUS = (0.15, 0.2, 1.0) if here.size == "smoke" else (0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.985, 0.995, 1.0)
RECIPE = Recipe(data="pixel_scenes", smoothing=0.0, dim=here.pick(12, 48, 64), depth=DEPTH, heads=2,
                batch=here.pick(8, 32, 32), lr=2e-3, further_lr=1e-3,
                train_pictures=here.pick(64, 8000, 16000), test_pictures=here.pick(24, 600, 4000))
DENSE, DOVIT, ALONE, START = "dense", "DoViT", "no aggregation", "start"


def arm(start=START, **config):
    steps, lr = (FURTHER, RECIPE.further_lr) if start else (STEPS, RECIPE.lr)
    return Arm("dovit", dict(exits=EXITS) | config, steps=steps, lr=lr, start=start)


ARMS = {START: arm(None, tau=2.0), DENSE: arm(tau=2.0), DOVIT: arm(), ALONE: arm(aggregate=1.0)}
ARMS = {name: dataclasses.replace(one, phase=f"dovit {name}") for name, one in ARMS.items()}
SETTINGS = dataclasses.asdict(RECIPE) | dict(steps=STEPS, further=FURTHER, exits=EXITS)
trial_of = functools.cache(lambda seed: here.trial(RECIPE, seed, ARMS))


def asked(model, seed, keep=None, **call):
    """(classes of pixels (B, H, W), confidence and what goes on, each (exits, B, N)) of all test pictures."""
    trial, found = trial_of(seed), []
    for a in range(0, len(trial.test.images), 100):
        rows = slice(a, a + 100)
        forced = keep and [to_device(each[rows].astype("float32"), here.device) for each in keep]
        with no_grad():
            out = model.eval()(trial.prepare(trial.test.images[rows]), keep=forced, **call)
        found.append([out.logits.numpy().argmax(axis=3)]
                     + [np.stack([to_numpy(each) for each in part]) for part in (out.confidence, out.kept)])
    return [np.concatenate(part, axis=axis) for part, axis in zip(zip(*found), (0, 1, 1))]


def chosen_by(model, seed, counts, scores):
    """What goes on at each exit: of a picture the `counts` (exits, B) of highest scores(confidence)."""
    kept, going = [], np.ones((len(trial_of(seed).test.images), model.num_patches), bool)
    for e, count in enumerate(counts):
        confidence = asked(model, seed, [*kept, *[going] * (len(counts) - e)])[1][e]
        order = np.argsort(np.where(going, -scores(confidence), np.inf), axis=1, kind="stable")
        going = np.argsort(order, axis=1) < count[:, None]
        kept.append(going)
    return kept


def noted(seed, rows, answers, kept=None):
    """Points of mIoU and boundary F1, and millions of multiply-adds, of these test pictures."""
    labels = trial_of(seed).test.labels[rows]
    scores = Segment.metrics(np.eye(11, dtype="float32")[answers[rows]], labels)
    counts = None if kept is None else [each[rows].sum(axis=1) for each in kept]
    cost = float(np.mean(closed_form(counts, trial_of(seed).train(DOVIT)[0].config)))
    return {"mIoU": 100 * scores["mIoU"], "boundary_f1": 100 * scores["boundary_f1"], "M macs": cost / 1e6}


def ranks(x):
    """Ranks, of equal values the mean."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def spearman(x, y):
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def measured(seed):
    """All that is noted of a seed."""
    trial = trial_of(seed)
    test, models = trial.test, {name: trial.train(name)[0] for name in (DENSE, DOVIT, ALONE)}
    model, count = models[DOVIT], len(test.images)
    first, second = slice(count // 2), slice(count // 2, count)
    dense = asked(models[DENSE], seed, tau=2.0)[0]
    runs = {tau: asked(model, seed, tau=tau) for tau in TAUS}
    curve = {tau: [noted(seed, rows, answers, kept) for rows in (first, second)]
             for tau, (answers, _, kept) in runs.items()}
    lowest = noted(seed, first, dense)["mIoU"] - 1
    tau = min((tau for tau in TAUS if curve[tau][0]["mIoU"] >= lowest or tau == TAUS[-1]),
              key=lambda tau: curve[tau][0]["M macs"])
    answers, _, kept = runs[tau]
    counts = kept.sum(axis=2)
    same = np.repeat(np.rint(counts[:, second].mean(axis=1)).astype(int)[:, None], count, axis=1)
    draw = np.random.default_rng(seed).random(kept.shape[1:])
    again = chosen_by(model, seed, counts, lambda sure: -sure)
    assert np.array_equal(again, kept)  # the rule itself, by masks that are forced
    rows = {DENSE: noted(seed, second, dense), DOVIT: noted(seed, second, answers, kept)}
    rules = {"random": (counts, lambda sure: draw), "inverted": (counts, lambda sure: sure),
             "static": (same, lambda sure: -sure)}
    for name, (numbers, scores) in rules.items():
        forced = chosen_by(model, seed, numbers, scores)
        rows[name] = noted(seed, second, asked(model, seed, forced)[0], forced)
    other = asked(models[ALONE], seed, tau=tau)
    rows[ALONE] = noted(seed, second, other[0], other[2])
    share, objects = kept.mean(axis=(0, 2)), test.instances.max(axis=(1, 2))
    edges = edge_patches(test.labels, model.patch_embed.grid)
    return {"tau": tau, "rows": rows, "curve": [[tau, both[1]] for tau, both in curve.items()],
            "going": kept[:, second].mean(axis=(1, 2)).tolist(),
            "by objects": {int(n): float(share[second][objects[second] == n].mean())
                           for n in np.unique(objects[second])},
            "spearman": spearman(share[second], objects[second]),
            "edges": float((kept[-1] & edges)[second].sum() / max(1, kept[-1][second].sum())),
            "edges in all": float(edges[second].mean())}


# %% [markdown]
# ## What came out

# %%
done = here.each({f"seed{seed}": functools.partial(measured, seed) for seed in here.seeds}, SETTINGS)
seeds, names = list(done.values()), [DENSE, DOVIT, "random", "inverted", "static", ALONE]
points = lambda name, key="mIoU": [seed["rows"][name][key] for seed in seeds]
mean = lambda name, key="mIoU": statistics.mean(points(name, key))
print(f"{'':<16}{'mIoU, %':>14}{'boundary F1, %':>16}{'M MACs':>14}")
for name in names:
    print(f"{name:<16}{spread_text(points(name)):>14}{spread_text(points(name, 'boundary_f1')):>16}"
          f"{spread_text(points(name, 'M macs'), '.2f'):>14}")
saved = 100 * (1 - mean(DOVIT, "M macs") / mean(DENSE, "M macs"))
correlation = statistics.mean(seed["spearman"] for seed in seeds)
for seed in seeds:
    print(f"tau {seed['tau']:g}: " + ", ".join(f"{100 * share:.0f} %" for share in seed["going"])
          + " go on at the exits; by the number of objects "
          + ", ".join(f"{n}: {100 * share:.0f} %" for n, share in seed["by objects"].items())
          + f"; edges among the last {100 * seed['edges']:.0f} %, in all {100 * seed['edges in all']:.0f} %")
here.claim("% of the multiply-adds of dense that are saved", saved, low=40)
here.claim("points of mIoU lost to dense", mean(DENSE) - mean(DOVIT), high=1)
here.claim("points of mIoU of the rule above the inverted one", mean(DOVIT) - mean("inverted"), low=5)
here.claim("points of mIoU of the rule above random", mean(DOVIT) - mean("random"), low=1)
here.claim("points of mIoU of the rule above static numbers", mean(DOVIT) - mean("static"), low=0)
here.claim("rank correlation of what goes on with the number of objects", correlation, low=0.1)
here.says(f"DoViT saves {saved:.0f} % of the multiply-adds at {mean(DOVIT) - mean(DENSE):+.1f} points of "
          f"mIoU (dense: {mean(DENSE):.1f} %); as many patches at random are "
          f"{mean('random') - mean(DOVIT):+.1f} from it, the surest {mean('inverted') - mean(DOVIT):+.1f}, "
          f"the same number in every picture {mean('static') - mean(DOVIT):+.1f}; what goes on and the "
          f"number of objects correlate by {correlation:.2f} ({STEPS:,} + {FURTHER:,} "
          f"steps, seeds {here.seeds}).")
here.measured(by_seed=done, recipe=SETTINGS)


def draw(figure, count=5):
    """The curve, and pictures with what goes on into the last blocks."""
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axis, (seed, *_) = left.subplots(), seeds
    cost, value = (np.array([row[key] for _, row in seed["curve"]]) for key in ("M macs", "mIoU"))
    axis.plot(cost, value, "o-", label="DoViT, by tau", color="#0072b2")
    for name, mark in zip((DENSE, "random", "inverted", "static", ALONE), "s^vD*"):
        axis.plot(seed["rows"][name]["M macs"], seed["rows"][name]["mIoU"], mark, label=name, markersize=8)
    axis.set(xlabel="M multiply-adds for a picture", ylabel="mIoU, %", title="One model, tau changed")
    axis.grid(alpha=0.3)
    axis.legend()
    trial = trial_of(here.seed)
    with no_grad():
        out = trial.train(DOVIT)[0].eval()(trial.prepare(trial.test.images[:count]), tau=seed["tau"])
    shown = [trial.test.images[:count].transpose(0, 2, 3, 1)]
    side = 32 // RECIPE.patch
    for each in out.kept:
        going = to_numpy(each).reshape(count, side, side, 1).repeat(RECIPE.patch, 1).repeat(RECIPE.patch, 2)
        shown.append(np.where(going, shown[0], shown[0] // 5))
    for i, axes in enumerate(right.subplots(count, len(shown))):
        titles = ["picture", *(f"into block {block}" for block in EXITS)]
        for ax, title, each in zip(axes, titles, shown):
            ax.imshow(each[i])
            ax.set_axis_off()
            ax.set_title(title if i == 0 else "", fontsize=9)


here.picture("curve", draw, 11, 5)

# %% [markdown]
# In the default run (one seed, a model that has half of the way to go) all six bounds held. Four patches
# of ten go on, most of them at the objects' edges. As many at random cost more than half of the accuracy,
# so which ones stop matters far more than how many. The aggregation changed next to nothing, and that
# each picture has its own number less than a point. The full run (three seeds, 1,500 and 400 steps, eight
# blocks of width 64; `lessons/results/related_dovit_full.json`) says the same of a better model: of 77.6
# ± 0.9 % mIoU 0.7 points are lost with 54 % of the multiply-adds, and all six bounds hold. There the same
# number in every picture costs 1.2 points, and 7.5 of the boundary F1.
#
# ## What this does not show
# - Time. Multiply-adds are counted. `lessons/full/passing_speed.py` has the clock: where half and then a
#   third of the patches go on, 128 pictures take 0.84 of the time of a ViT with the same decoder, at 0.62
#   of its multiply-adds (groups of up to 16 patches' difference; 1.55 of the time in groups of equal
#   numbers, which are many and small). One picture takes 1.15 of the time. What the rest goes to: two heads
#   and two softmaxes over the classes of all pixels, taking patches out and putting them back, and small
#   products.
# - Why more goes on with more objects. With more objects there are also more pixels of objects and more
#   edges, and the correlation does not tell them apart.
# - The paper's figures: 40 to 60 % saved on pictures of 512 pixels and more, of which far more is easy.
# - A head for 16 pixels and 11 classes costs a quarter of a block here; with larger ViTs it is next to
#   nothing.
#
# The code: `tinytoken/models/dovit.py` and `passing.py`; that they agree with the official code, for one
# picture and for batches (`official`), is tested in `tests/models/test_dovit.py`.

# %%
here.end()
