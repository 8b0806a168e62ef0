# %% [markdown]
# # Lesson 10: One model, many budgets
# After this lesson you can train one LookupViT that runs at several costs, and say how much accuracy this
# loses.
#
# A phone and a server need different models, and so does the same phone when its battery is low. With most
# networks this means several sets of weights. In a LookupViT (lesson 09) one number sets the cost: the number
# M of compressed tokens. The shapes of its weights do not depend on M. So we can train one set of weights
# with several grids, and choose the grid when we use the model.

# %%
import dataclasses
import functools
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import models, ops, random
from tinytoken.experiments import Arm, Recipe, lesson, spread_text
from tinytoken.models import LookupViT
from tinytoken.models.lookupvit import PAPER
from tinytoken.tasks import Classify, accuracy

here = lesson.begin("10_one_model_many_budgets")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## Where the grid enters
# The grid enters in two places, both at the start of the model. The compressed tokens are the patches X (B,
# N, D) resized to the grid. Their positions are a learned table for one grid, which is resized to the grid
# that we ask for. Let R_{a -> b} be the matrix that resizes grid a to grid b (lesson 08), g the grid of the
# patches, t the grid of the table P, and m the grid that we ask for:
#
# $$F_p = R_{g \to m} X + R_{t \to m} P \qquad (B, M, D) = (M, N)(B, N, D) + (M, T)(T, D)$$
#
# Every block then works on M rows. M appears in none of the shapes of its matrices, which are (D, D) or
# similar, and its softmax runs over the N lookup tokens.

# %%
SMALL = PAPER | dict(image_size=16, patch_size=4, dim=12, depth=2, heads=3, compressed=(3, 3))
model = LookupViT(**SMALL).astype("float64")
for p in model.parameters():
    p.data += 0.1 * rng.standard_normal(p.shape)
images, w = rng.standard_normal((2, 3, 16, 16)), model.state_dict()
X = model.patch_embed(images).data
for m in ((1, 1), (2, 2), (2, 3), (3, 3), (4, 4)):
    by_hand = ops.resize_matrix((4, 4), m) @ X + ops.resize_matrix((3, 3), m) @ w["pos_embed_compressed"]
    gap = np.abs(by_hand - model.embed(images, m)[1].data).max()
    print(f"grid {m}: compressed tokens {by_hand.shape}, by hand and the package's {gap:.0e} apart; "
          f"logits {model.eval()(images, compressed=m).logits.shape}")
    assert gap < 1e-12
assert np.array_equal(model(images).logits.data, model(images, compressed=(3, 3)).logits.data)

# %% [markdown]
# The gradient goes back through the same matrices: the gradient of P is R^T times the gradient that arrives
# at the resized table. So a step at one grid also moves the positions of all other grids.

# %%
labels = np.array([2, 7])
loss_at = lambda m: models.lookupvit_loss(model.train()(images, compressed=m), labels)[0]
for m in ((2, 2), (4, 4)):
    tt.gradcheck(lambda *_: loss_at(m), *model.parameters(), max_elements=here.pick(20, 100, 1000),
                 seed=here.seed)
    resized = model.embed(images, m)[1]
    upstream = rng.standard_normal(resized.shape)
    gradient = tt.grad((resized * upstream).sum(), [model.pos_embed_compressed])[0]
    assert np.allclose(gradient[0], ops.resize_matrix((3, 3), m).T @ upstream.sum(axis=0), rtol=0, atol=1e-12)

# %% [markdown]
# ## What a grid costs
# Here are the multiply-adds of a picture for D = 96 and N = 64, counted as in lesson 09:

# %%
WIDE = LookupViT(compressed=(5, 5))
picture = np.zeros((1, 3, 32, 32), "float32")
vit_macs = tt.macs(models.ViT(), picture).total
for m in range(1, 9):
    macs = tt.macs(WIDE, picture, compressed=(m, m)).total
    print(f"{m} x {m}: {macs / 1e6:6.2f} M, {macs / vit_macs:.2f} of the ViT's")

# %% [markdown]
# ## Training at a random grid
# We want the mean of the losses over the grids of a set G to be small. If we computed all of them, each step
# would cost as much as all grids together. A **random grid per step** has the right gradient on average,
#
# $$E_m \left[ \frac{dL_m}{dw} \right] = \frac{1}{\lvert G \rvert} \sum_{m \in G} \frac{dL_m}{dw},$$
#
# and costs only one grid. The whole batch gets the same grid, so that it stays one array. (We do not know the
# details of the paper. The set, the probabilities, and one draw per batch instead of one per picture are our
# choice.) The draw depends only on the seed and the step, like all randomness here, so an interrupted run
# continues with the same grids.


# %%
class ClassifyGrids(Classify):
    """Cross-entropy of both heads, at a grid of `grids` that is drawn for each step, all equally likely."""

    def __init__(self, model, grids, smoothing=0.0):
        super().__init__(model, smoothing)
        self.grids, self.settings = grids, self.settings | {"grids": grids}

    def noise(self, size, step, seed, xp=np):
        """The number of the step's grid, once for each picture: a batch is cut into slices before it is
        used."""
        number = random.integers((1,), len(self.grids), site="lesson.grid", step=step, seed=seed)
        return {"number": xp.full(size, int(number[0]))}

    def __call__(self, images, labels, number):
        out = self.model(images, compressed=self.grids[int(number[0])])
        return self.model.loss(out, labels, smoothing=self.smoothing)


GRIDS = here.pick(((1, 1), (2, 2)), ((2, 2), (3, 3), (4, 4), (5, 5)), ((2, 2), (3, 3), (4, 4), (5, 5)))
drawn = np.array([ClassifyGrids(model, GRIDS).noise(1, step, here.seed)["number"][0] for step in range(2000)])
counts = np.bincount(drawn, minlength=len(GRIDS))
print(f"grids drawn in 2000 steps: {dict(zip(GRIDS, counts.tolist()))}")
assert np.abs(counts / 2000 - 1 / len(GRIDS)).max() < 0.05

# %% [markdown]
# ## The arms of the experiment
# - **One model**: a random grid of G per step.
# - **Single-size models**: for each grid of G, a model that is trained with this grid only. Each gets as many
#   steps as the one model gets for all grids together. So the one model has had only a quarter of these steps
#   at each grid.
# - **Trained at 3x3 only**, then run at the other grids. This shows whether random grids are needed to make
#   one model work at all grids, or whether any LookupViT can do it.
#
# All are trained from scratch, with the same pictures in the same order.

# %%
STEPS = here.pick(4, 250, 3000 if here.data == "scenes" else 15620)  # CIFAR: 20 epochs
MIDDLE = GRIDS[len(GRIDS) // 2 - 1]  # 3 x 3
# those and unseen ones
SHOWN = here.pick(GRIDS, *[((1, 1), *GRIDS[:2], (3, 4), *GRIDS[2:], (6, 6), (8, 8))] * 2)
singles = here.pick(GRIDS, (MIDDLE,), GRIDS)
RECIPE = Recipe(data=here.data, smoothing=0.0,
                train_pictures=here.pick(64, 16000, 16000),
                test_pictures=here.pick(128, 2000, 10000),
                **here.pick(dict(batch=8, dim=16, depth=2, heads=2, patch=8), {}, {}))
seeds = here.seeds
name_of = lambda m: f"{m[0]}x{m[1]}"
SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS}


ARMS = {f"LookupViT {name_of(m)}": Arm("lookupvit", PAPER | dict(compressed=m), steps=STEPS, lr=RECIPE.lr,
                                       phase=f"LookupViT {name_of(m)} {STEPS}") for m in singles}
ARMS["LookupViT, many grids"] = Arm("lookupvit", PAPER | dict(compressed=GRIDS[-1]), task=ClassifyGrids,
                                    settings=dict(grids=GRIDS), steps=STEPS, lr=RECIPE.lr,
                                    phase=f"LookupViT, many grids {STEPS}")


@functools.cache
def trial_of(seed):
    return here.trial(RECIPE, seed, ARMS)


def train(name, grids, seed):
    """Train an arm -> accuracy and multiply-adds at the grids, by name, and seconds."""
    trial = trial_of(seed)
    model, report = trial.train(name)
    sample = trial.prepare(trial.test.images[:1])
    return {"at": {name_of(m): {"accuracy": accuracy(trial.answers(model, compressed=m), trial.test.labels),
                                "macs": tt.macs(model, sample, compressed=m).total} for m in grids},
            "seconds": report["seconds"]}


jobs = {"one model": functools.partial(train, "LookupViT, many grids",
                                       SHOWN)} | {f"single {name_of(m)}": functools.partial(
    train, f"LookupViT {name_of(m)}", SHOWN if m == MIDDLE else [m]) for m in singles}
done = here.each({f"seed{seed} {name}": functools.partial(job, seed) for seed in seeds for name,
                  job in jobs.items()}, SETTINGS)
rows = {name: [done[f"seed{seed} {name}"]["at"] for seed in seeds] for name in jobs}
rows["trained at 3x3 only"] = rows[f"single {name_of(MIDDLE)}"]
seconds = {name: [done[f"seed{seed} {name}"]["seconds"] for seed in seeds] for name in jobs}

# %% [markdown]
# ## What was measured
# ± is the standard deviation over seeds. "Less single" is the accuracy of the one model minus that of the
# model that was trained with this grid only, paired by seed. Grids outside the set were not used in training.


# %%
def points(name, m):
    """100 x accuracy of `name` at the grid m, by seed."""
    return [100 * row[m]["accuracy"] for row in rows[name] if m in row]


print(f"{'grid':<7}{'M MACs':>8}{'one model':>14}{'single-size':>14}{'less single':>14}{'trained at 3x3 only':>22}")
for m in map(name_of, SHOWN):
    single = points(f"single {m}", m) if f"single {m}" in rows else []
    less = [a - b for a, b in zip(points("one model", m), single)]
    print(f"{m:<7}{rows['one model'][0][m]['macs'] / 1e6:>8.2f}{spread_text(points('one model', m)):>14}"
          f"{spread_text(single) if single else '':>14}{spread_text(less, '+.1f') if less else '':>14}"
          f"{spread_text(points('trained at 3x3 only', m)):>22}"
          f"{'' if m in map(name_of, GRIDS) else '   not in the set'}")
print("seconds of training:",
      ", ".join(f"{name} {spread_text(values, '.0f')}" for name, values in seconds.items()))

# %% [markdown]
# The claim, with a bound that was set before the first full run: at each of the four grids, the one model
# loses at most one point against the model that was trained with this grid only. A smaller run decides
# nothing.

# %%
for m in map(name_of, singles):
    lost = statistics.mean(b - a for a, b in zip(points("one model", m), points(f"single {m}", m)))
    here.claim(f"one model at {m}: points lost to the single-size model", lost, high=1)
worst = max(statistics.mean(b - a for a, b in zip(points("one model", m), points(f"single {m}", m)))
            for m in map(name_of, singles))
here.says(f"One LookupViT that draws its grid anew for each step loses at most {worst:.1f} points to the "
          f"models that know one grid "
          f"alone, at {len(singles)} grid{'s' * (len(singles) > 1)} ({STEPS:,} steps each, {len(seeds)} "
          f"seed{'s' * (len(seeds) > 1)}).")


def draw_budgets(figure):
    axis = figure.subplots()
    order = sorted(map(name_of, SHOWN), key=lambda m: rows["one model"][0][m]["macs"])
    macs = [rows["one model"][0][m]["macs"] / 1e6 for m in order]
    for name, colour, mark in (("one model", "#0072b2", "o-"), ("trained at 3x3 only", "#d55e00", "v--")):
        reached = [points(name, m) for m in order]
        axis.plot(macs, [statistics.mean(values) for values in reached], mark, color=colour, label=name)
        for x, values in zip(macs, reached):
            axis.plot([x] * len(values), values, ".", color=colour, alpha=0.4)
    for m in map(name_of, singles):
        values = points(f"single {m}", m)
        axis.plot([rows["one model"][0][m]["macs"] / 1e6] * len(values), values, "s", color="#009e73",
                  alpha=0.7,
                  label="single-size models" if m == name_of(singles[0]) else None)
    axis.set_xticks(macs, [f"{m}\n{x:.0f} M" for m, x in zip(order, macs)], fontsize=8)
    axis.set(xlabel="grid of compressed tokens, multiply-adds of a picture", ylabel="test accuracy, %",
             title="One set of weights at many costs (a dot per seed)")
    axis.legend()


here.picture("budgets", draw_budgets, 10, 4.5)
here.measured(rows=rows, seconds=seconds, seeds=seeds, grids=[name_of(m) for m in GRIDS], recipe=SETTINGS)

# %% [markdown]
# This is what to look for. The figures are those of the full run (3 seeds, 3,000 steps;
# `lessons/results/10_one_model_many_budgets_full.json`). At 3x3 and 4x4, the one model is as good as the
# models that were trained with one grid only. At 5x5 it loses 0.3 points, and at the smallest grid, 2x2,
# 0.65. Other grids work, too: 3x4, and even 1x1, lose little. For grids larger than those of the set, the
# accuracy falls slowly at first (6x6: 96.5 %) and then faster (8x8: 91.9 %), although more is computed: the
# model has never seen so many tokens. The model that was trained at 3x3 only also runs with any grid, but it
# loses 1.5 points at 2x2, 6 points at 5x5, and fails for half of the pictures at 8x8. So it is the random
# grids that let one model replace many.

# %% [markdown]
# ## Exercises
# 1. The table P has 5 x 5 positions. Write R_{5x5 -> 2x2} for one axis by hand. Which entries of P does a
#    step at the grid 2 x 2 move, and which does it not move? Check with `ops.resize_matrix`.
# 2. Change `ClassifyGrids.noise` so that small grids are drawn more often than large ones. What does training
#    cost now, on average? At which grids does the accuracy change?
# 3. For one batch, compute the gradients at all grids, and the cosine between each two of them. Do the grids
#    pull in the same direction? Do this at the start and at the end of training.
# 4. Spend more only where it is needed: run each test picture at 2 x 2, and run those whose largest
#    probability is below a threshold again at 5 x 5. Plot the accuracy over the mean multiply-adds for many
#    thresholds (count both runs), together with the curve above.
# 5. Let the model at 5 x 5 be the teacher of the same model at 2 x 2: in each step, add the KL divergence
#    between the two answers to the loss. What does a step cost now, and what do you gain?
#
# ## The paper
# Koner et al. 2024 (arXiv 2407.12753) train one LookupViT for several compressed grids. We know this from the
# abstract, and we do not know the details.
#
# | step | our line |
# |---|---|
# | compressed tokens at the grid that is asked for | `ops.resize(x, grid=self.patch_embed.grid, size=grid)` |
# | one table of positions for all | `ops.resize(self.pos_embed_compressed, grid=self.compressed, size=grid)` |
# | a grid per training step | `ClassifyGrids` above |
#
# FlexiViT (Beyer et al. 2023, arXiv 2212.08013) does the same with the patch size, which it draws at random
# in each step.

# %%
here.end()
