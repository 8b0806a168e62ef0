# %% [markdown]
# # Lesson 14: Why a pyramid cannot drop tokens
# After this lesson you can save work in a network whose tokens must stay where they are. You can say how its
# training differs from its use, and you can test whether its choice of positions is worth anything.
#
# A ViT has one column of tokens, and attention does not ask where a token stands. So tokens can be removed
# (lesson 05). ConvNeXt and Swin are **pyramids**: their tokens are the positions of a map, and the map halves
# its sides from stage to stage. Rao et al. (2022) keep every position, and split the work instead. Important
# positions take the **slow path**, the MLP of the block. The others take the **fast path**, one linear layer.
# This lesson shows first why nothing can be removed. Then it builds both paths, trains them, and compares the
# learned choice with a random one and with none.

# %%
import dataclasses
import functools
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import backend, ops, plot
from tinytoken.experiments import (Arm, Recipe, difference, interval_text, kept_in_training, kept_on_object,
                                   lesson, over_chance, packed, spread_text, unpacked)
from tinytoken.models import ConvNeXt, DynamicConvNeXt, DynamicSwin
from tinytoken.models.adaptive import chosen
from tinytoken.models.convnext import AdaptiveConvNeXtBlock
from tinytoken.models.pruning import mask_at

here = lesson.begin("14_slow_and_fast_path")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## What goes wrong when positions are removed
# A block of ConvNeXt begins with a 7 x 7 **depthwise convolution**: each channel has a filter of its own. A
# position reads its 49 neighbours, each with the weight of its place:
#
#     y[r, c] = sum over i, j of K[i, j] x[r + i - 3, c + j - 3]          x is 0 outside of the map
#
# The weights belong to places. So what does it mean to remove a position? There are two ways to try it. We
# can **pack** the positions that are left into a smaller map, or we can leave **holes**, zeros, where
# positions are gone.


# %%
def depthwise(x, w):
    """The 7 x 7 depthwise convolution. x (B, rows, columns, C); w: the block's weights by name."""
    rows, columns = x.shape[1:3]
    padded = ops.pad(x, widths=((0, 0), (3, 3), (3, 3), (0, 0)))
    kernel, out = w["conv_dw.weight"], w["conv_dw.bias"]  # (C, 1, 7, 7), (C,)
    for i in range(7):
        for j in range(7):
            out = out + kernel[:, 0, i, j] * padded[:, i:i + rows, j:j + columns]
    return out


def alike(a, b):
    """The correlation of two arrays: 1 means equal but for a factor and a shift."""
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1])


# 8 x 8 positions, of which 49 are kept: these can be packed into 7 x 7
x, keep = rng.standard_normal((1, 8, 8, 16)), rng.permutation(64) < 49
w = {"conv_dw.weight": rng.standard_normal((16, 1, 7, 7)) / 7, "conv_dw.bias": np.zeros(16)}
whole = depthwise(x, w).data.reshape(64, 16)
in_7x7 = depthwise(x.reshape(64, 16)[keep].reshape(1, 7, 7, 16), w).data.reshape(49, 16)
holes = depthwise(x * keep.reshape(8, 8, 1), w).data.reshape(64, 16)
removed = {"packed": alike(in_7x7, whole[keep]), "holes": alike(holes[keep], whole[keep]),
           "in_the_holes": float(holes[~keep].std() / holes[keep].std())}
print(f"a convolution of the 49 kept positions, correlated with that of the whole map: packed "
      f"{removed['packed']:.2f}, with holes {removed['holes']:.2f}")
print(f"after it the holes are filled: their values are {removed['in_the_holes']:.2f} times as large as the "
      f"others'")

# %% [markdown]
# Packed, a position reads wrong neighbours: what stood to its left may now stand above it. The result has
# little to do with the right one. With holes, the neighbours are right, but some are missing, and a sum of
# fewer terms is another sum. (Softmax divides by a sum that misses the same terms. A convolution does not.)
# And nothing was removed: after one convolution the holes have values again, so the next block computes them,
# too.
#
# The other two ways to mix positions fail as well. **Down-sampling** with stride 2 makes one position from a
# square of 2 x 2. If a share r of the positions is kept at random, about r^4 of the squares are complete. And
# Swin's **windows**, shifted by half a window in every second block, must all hold equally many positions, or
# they do not fit into one array.

# %%
for share in (0.7, 0.5, 0.3):
    kept = np.array([rng.permutation(64) < round(64 * share) for _ in range(2000)])  # 2,000 masks
    squares = kept.reshape(-1, 4, 2, 4, 2).sum(axis=(2, 4))
    windows = np.roll(kept.reshape(-1, 8, 8), (-2, -2), axis=(1, 2)).reshape(-1, 2, 4, 2, 4).sum(axis=(2, 4))
    removed[f"at {share}"] = {"complete": float((squares == 4).mean()), "empty": float((squares == 0).mean()),
                              "windows": [int(windows.min()), int(windows.max())]}
    print(f"{share:.0%} kept: {(squares == 4).mean():.1%} of the squares are complete (r^4 = "
          f"{share**4:.1%}), {(squares == 0).mean():.1%} empty; a window of 16 holds {windows.min()} to "
          f"{windows.max()}")

# %% [markdown]
# So the positions stay. But look at what a block costs for N positions of C channels: the convolution 49 N C
# multiply-adds, the MLP 8 N C^2. With C = 96 the MLP is 94 % of the sum, and it works on **each position
# alone**. There we can choose.
#
# ## Slow and fast path by hand
# y is the map after the convolution. gamma and gamma' scale each channel:
#
#     slow(y) = gamma MLP(norm(y))             norm, C -> 4 C, GELU, 4 C -> C          8 C^2 for a position
#     fast(y) = gamma' (W norm(y) + b)         a norm of its own, C -> C                 C^2
#     out     = x + slow(y) where the position is important, x + fast(y) elsewhere
#
# At inference each row goes through one of the two: gather, compute, put back.


# %%
def norm(x, w, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True)
                             + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].swapaxes(0, 1) + w[f"{name}.bias"]


def slow(x, w):
    return w["gamma"] * linear(ops.gelu(linear(norm(x, w, "norm"), w, "mlp.fc1")), w, "mlp.fc2")


def fast(x, w):
    return w["fast_path_gamma"] * linear(norm(x, w, "fast_path.0"), w, "fast_path.1")


def at_inference(x, places, w):
    """A block with two paths. x (B, rows, columns, C); places (B, k): the important positions."""
    y = depthwise(x, w).data.reshape(len(x), -1, x.shape[3])
    out = np.zeros_like(y)
    for b, at in enumerate(places):
        others = np.setdiff1d(np.arange(y.shape[1]), at)
        out[b, at] = slow(tt.Tensor(y[b, at]), w).data
        out[b, others] = fast(tt.Tensor(y[b, others]), w).data
    return x + out.reshape(x.shape)


def shaken(model):
    """The model in float64, each weight moved by a random amount: zeros hide mistakes."""
    for p in model.astype("float64").parameters():
        p.data += 0.3 * rng.standard_normal(p.shape)
    return model


def by_name(module):
    """{name: parameter}."""
    return dict(module.named_parameters())


def off(ours, theirs):
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


block = shaken(AdaptiveConvNeXtBlock(8, mlp_ratio=4, layer_scale=1.0))
x, scores = rng.standard_normal((3, 6, 4, 8)), rng.standard_normal((3, 24))
places = ops.top_k(scores, 10)
others = ops.top_k(-scores, 14)
ours = at_inference(x, places, by_name(block))
theirs = block.gathered(tt.Tensor(x.reshape(3, 24, 8)), places, others, (6, 4)).data.reshape(x.shape)
by_hand = {"gathered": off(ours, theirs)}
print(f"block by hand and the package's: {by_hand['gathered']:.0e} apart")
assert by_hand["gathered"] < 1e-12

# %% [markdown]
# ## Training: two streams by hand
# Who decides? The predictor of lesson 07, before the blocks 1, 2 and 3 of one stage. It sees the whole map,
# since nothing is ever removed, and each decision is about **all** positions anew: a position can be fast now
# and slow later. At inference the int(N r) positions with the highest scores take the slow path.
#
# In training the decision m (B, N, 1) is a Gumbel draw of exactly 0 or 1 with the gradient of the soft value
# (lesson 06). For that gradient, both results must be known at every position. So training runs **two
# streams**: in x1 every position takes the slow path, in x2 every position takes the fast one, and m chooses
# which of the two is the map:
#
#     y   = depthwise(m x1 + (1 - m) x2)                   positions are mixed in the map alone
#     x1 <- x1 + slow(m y + (1 - m) x1)
#     x2 <- x2 + fast((1 - m) y + m x2)
#
# Where m = 1, x1 + slow(y) is what inference computes, and where m = 0, x2 + fast(y) is. The other stream
# goes on with what it had there.


# %%
def decided(log_probs, noise, hard=True):
    """m (B, N, 1): a draw, with the gradient of the soft value."""
    soft = ops.softmax(log_probs + noise)
    one_hot = soft.data == soft.data.max(axis=2, keepdims=True)
    return (soft + (one_hot - soft.data) if hard else soft)[:, :, :1]


def in_training(x, blocks, predictors, noise, grid, hard=True):
    """The blocks with two paths; a decision before each that has a predictor. x (B, N, C) -> the same."""
    x1 = x2 = x
    for block, predictor, draw in zip(blocks, predictors, noise):
        w = by_name(block)
        if predictor:
            m = decided(predictor(x if x1 is x else m * x1 + (1 - m) * x2), draw, hard)
        mixed = m * x1 + (1 - m) * x2
        y = depthwise(mixed.reshape(len(x), *grid, x.shape[2]), w).reshape(x.shape)
        x1, x2 = x1 + slow(m * y + (1 - m) * x1, w), x2 + fast((1 - m) * y + m * x2, w)
    return m * x1 + (1 - m) * x2


SMALL = dict(image_size=16, patch_size=2, dims=(4, 8, 12), depths=(1, 5, 1), layer_scale=1.0)
# it decides about 4 x 4 positions, before the blocks 1, 2 and 3 of five
model = shaken(DynamicConvNeXt(**SMALL)).train()
stage, grid = model.stages[1], model.grids[1]
blocks, predictors = stage.blocks[1:], [*model.score_predictor, None]
pictures, noise = rng.standard_normal((3, 3, 16, 16)), list(rng.gumbel(size=(3, 3, 16, 2)))


def stage_by_hand(hard=True):
    """The map at the end of the stage."""
    before = model.stages[0].blocks[0](model.embed(pictures), model.grids[0])
    before = stage.blocks[0](model.halve(stage, before, model.grids[0]), grid)
    return in_training(before, blocks, predictors, [*noise, None], grid, hard)


upstream = rng.standard_normal((3, 16, 8))
weights = [p for name, p in model.named_parameters() if name.startswith(("stem", "stages.1", "score"))]
ours, theirs = stage_by_hand(), model(pictures, noise=noise).maps[1]
gradients = [tt.grad((end * upstream).sum(), weights) for end in (ours, theirs)]
by_hand |= {"streams": off(ours.data, theirs.data),
            "gradients": max(off(a, b) for a, b in zip(*gradients) if np.abs(b).max() > 0)}
print(f"two streams by hand and the package's: {by_hand['streams']:.0e} apart; the gradient of every weight, "
      f"predictors included: {by_hand['gradients']:.0e}")
assert max(by_hand["streams"], by_hand["gradients"]) < 1e-12

# %% [markdown]
# ## Gradients against finite differences
# A drawn decision is a step: its finite differences are 0 or infinite, and the straight-through gradient is
# neither. What can be checked is what the decision's gradient is made of. With soft decisions the whole stage
# is smooth. And the mask may be given as an argument with any value, also between 0 and 1.

# %%
checked = [p for p in weights if p.data.any()]
tt.gradcheck(lambda *_: stage_by_hand(hard=False), *checked, max_elements=here.pick(10, 20, 200),
             seed=here.seed)
x, m = rng.standard_normal((2, 16, 8)), rng.random((2, 16, 1))
tt.gradcheck(lambda x1, x2, m: tuple(blocks[0].streams(x1, x2, m, grid, None)), x, x + 1, m)

mask = mask_at(ops.top_k(rng.random((2, 16)), 8), tt.Tensor(x), 16).data[:, :, None]
mask = tt.Tensor(mask, requires_grad=True)
x1, x2 = blocks[0].streams(tt.Tensor(x), tt.Tensor(x), mask, grid, None)
(chosen(mask, x1, x2) * rng.standard_normal(x.shape)).sum().backward()
print(f"positions with a gradient of their decision: {np.count_nonzero(mask.grad)} of {mask.data.size}, "
      f"16 of them slow")
assert np.count_nonzero(mask.grad) == 32

# %% [markdown]
# ## Where training and inference differ
# As long as no decision changes, both compute the same. But take a position p that is slow in one block and
# fast in the next one. At inference there is one map, and block 2 goes on from x + slow(y). In training, the
# map is now x2. There, block 1 has added fast(x), computed from the map **before** the convolution, since y
# was hidden from this stream. What the slow path added at p has gone from the map. The other direction is the
# same with the streams exchanged.

# %%
start = rng.standard_normal((1, 16, 8))
first = mask_at(ops.top_k(rng.random((1, 16)), 8), tt.Tensor(start), 16).data
p, q = int(np.flatnonzero(first[0])[0]), int(np.flatnonzero(first[0] == 0)[0])


def both(*masks):
    """Blocks with these masks (1, N), in training and at inference -> the two maps (N, C)."""
    x = tt.Tensor(start)
    x1, x2 = x, x
    for block, mask in zip(blocks, masks):
        m = mask[:, :, None]
        x1, x2 = block.streams(x1, x2, m, grid, None)
        x = block.gathered(x, np.flatnonzero(mask[0])[None], np.flatnonzero(mask[0] == 0)[None], grid)
    return chosen(m, x1, x2).data[0], x.data[0]


flips = {}
print("largest difference between training and inference, relative to the largest value")
for name, place in (("no decision changes", None), ("slow, then fast", p), ("fast, then slow", q)):
    second = first.copy()
    if place is not None:
        second[0, place] = 1 - second[0, place]
    trained, used = both(first, second)
    at = [place] if place is not None else []
    rest = np.delete(np.abs(trained - used), at, axis=0).max() / np.abs(used).max()
    there = float(np.abs(trained - used)[at].max() / np.abs(used).max()) if at else None
    flips[name] = {"there": there, "elsewhere": float(rest)}
    print(f"{name:<22}at the position: {'' if there is None else f'{there:.2f}':<6} elsewhere: {rest:.1e}")
assert flips["no decision changes"]["elsewhere"] < 1e-12 < flips["slow, then fast"]["there"]

x1, x2 = blocks[0].streams(tt.Tensor(start), tt.Tensor(start), first[:, :, None], grid, None)
stale = start[:, p] + fast(tt.Tensor(start[:, p]), by_name(blocks[0])).data  # neither convolution nor MLP
print(f"what the fast stream has at a slow position is x + fast(x): {off(stale, x2.data[:, p]):.0e} apart")
assert off(stale, x2.data[:, p]) < 1e-12

# %% [markdown]
# The ratios fall from decision to decision, so many positions go from slow to fast. For each of them training
# computes with a **stale** value. The official code does the same, and the paper's models were trained so. A
# small change repairs it: let both streams begin anew from the map at each decision. It costs nothing more,
# and then training is inference for any decisions. The package has it as an option, `stale=False`. Below we
# train with and without stale values. Here is the whole model with masks that change at every decision:

# %%
masks = [rng.permuted(np.tile(np.arange(16) < n, (3, 1)), axis=1).astype("float64") for n in model.counts]
for stale in (True, False):
    other = DynamicConvNeXt(**SMALL, stale=stale).astype("float64")
    other.load_state_dict(model.state_dict())
    trained, used = (other.train(mode)(pictures, keep=masks).logits.data for mode in (True, False))
    flips[f"whole model, stale={stale}"] = off(trained, used)
    print(f"stale={stale}: the logits of training and inference, with equal masks, are "
          f"{off(trained, used):.0e} apart")
assert flips["whole model, stale=False"] < 1e-12 < flips["whole model, stale=True"]

# %% [markdown]
# ## What it costs
# N_s positions of C_s channels in stage s, N and C in the stage that decides; k positions are slow:
#
# | part | multiply-adds |
# |---|---|
# | patches of p x p pixels | 3 p^2 N_1 C_1 |
# | a plain block | 49 N_s C_s + 8 N_s C_s^2 |
# | halving | 4 N_s C_(s-1) C_s |
# | a block with two paths | 49 N C + 8 k C^2 + (N - k) C^2 |
# | a predictor | 1.625 N C^2 + N C / 2 |
# | classifier of K classes | C_S K |
#
# A block with two paths saves 7 (N - k) C^2. A predictor costs 1.625 N C^2, the work of a fifth of a block.
# If it served one block only, it would pay only below a keep ratio of 0.77. So the later blocks of the stage,
# which use the last and smallest ratio without a predictor of their own, save most.

# %%
DIMS, DEPTHS, PATCH = here.pick(((8, 16, 24), (1, 4, 1), 4), ((24, 48, 96), (1, 6, 1), 2),
                                ((32, 64, 128), (1, 6, 1), 2))
SHAPE = dict(dims=DIMS, depths=DEPTHS, layer_scale=1.0)


def ratios(rho):
    """The official ones."""
    return (rho, rho - 0.2, rho - 0.4)


def macs_by_hand(size, patch, counts=None, classes=10, places=(1, 2, 3)):
    """The table, added up. counts: the slow positions after each decision; None: the plain model."""
    total, N = classes * DIMS[-1], (size // patch) ** 2
    total += 3 * patch ** 2 * N * DIMS[0]
    for s, (C, depth) in enumerate(zip(DIMS, DEPTHS)):
        total += 4 * (N >> 2 * s) * DIMS[s - 1] * C if s else 0
        for i in range(depth):
            n = k = N >> 2 * s
            if counts and s == len(DIMS) - 2 and i >= places[0]:
                k = counts[sum(place <= i for place in places) - 1]
                total += 1.625 * n * C ** 2 + n * C / 2 if i in places else 0
            total += 49 * n * C + 8 * k * C ** 2 + (n - k) * C ** 2
    return total


picture = np.zeros((1, 3, 32, 32), "float32")
plain = tt.macs(ConvNeXt(patch_size=PATCH, **SHAPE), picture).total
assert plain == macs_by_hand(32, PATCH)
print(f"{'model':<22}{'slow positions':>18}{'M MACs':>9}{'of the plain':>14}")
print(f"{'ConvNeXt':<22}{'':>18}{plain / 1e6:>9.2f}{1:>14.2f}")
for rho in (0.9, 0.7, 0.5):
    dynamic = DynamicConvNeXt(patch_size=PATCH, keep_ratios=ratios(rho), **SHAPE)
    found = tt.macs(dynamic, picture).total
    assert found == macs_by_hand(32, PATCH, dynamic.counts)
    print(f"{f'DynamicConvNeXt .{10 * rho:.0f}':<22}{str(dynamic.counts):>18}{found / 1e6:>9.2f}"
          f"{found / plain:>14.2f}")

# %% [markdown]
# Swin's blocks are split in the same way: attention in windows stays dense, and the MLP has two paths. The
# package has `DynamicSwin`, for every batch size.

# %%
swin = shaken(DynamicSwin(image_size=16, patch_size=2, embed_dim=4, depths=(1, 4, 1), heads=(1, 2, 4))).eval()
assert swin(pictures).kept[0].shape == (3, int(16 * 0.7)) and len(swin(pictures[:2]).logits) == 2

# %% [markdown]
# ## The arms of the experiment
# All arms of a seed start from the same small ConvNeXt that was trained on scenes, and get the same number of
# further steps with the same pictures in the same order (as in lesson 07).
#
# - **ConvNeXt, further**: the dense model. The others are compared with it.
# - **DynamicConvNeXt .7**: ratios 0.7, 0.5, 0.3. Losses as in lesson 07, with the start as the teacher:
#   L_class + 10 L_ratio / 3 + 0.5 L_KL + 0.5 L_token. L_token compares the whole last map, for no position is
#   missing.
# - **no stale values .7**: the same, but both streams begin anew at each decision.
# - **random slow set .7**: as many slow positions after each decision, drawn at random. If this is as good,
#   nobody needs a predictor. Random sets change at every decision, so stale values would harm this arm more
#   than a learned one. It is trained without them, and must be compared with "no stale values".
# - **fast path alone**: no position is slow. If this is as good, nobody needs a slow set. No position ever
#   changes its path, so this arm has no stale values.
# - **random, stale values .7** (full run): the random arm in the official streams.
# - **no fast path .7** (full run): positions that are not slow get nothing but the next convolution. If this
#   is as good, nobody needs a fast path.
#
# The random and the fast arm are the models `randompaths` and `fastpath` of the package
# (`models/map_controls.py`).
#
# The rates have the official proportions: the new parameters (fast paths and predictors) learn at the rate of
# the first steps, and what the start has at a fifth of it. One thing differs. Published ConvNeXts start with
# gamma = 10^-6, so that a new block does almost nothing, which helps deep models. AdamW moves a weight by
# about the learning rate in each step, so gamma would need hundreds of steps to reach 1, and until then a
# block gets small gradients. This model has eight blocks and few steps: **gamma starts at 1**.
#
# Where the maps of a pyramid are the answer, as in segmentation, it matters even more that they stay whole;
# `lessons/full/dense.py` has that experiment.


# %%
class OnePathBlock(AdaptiveConvNeXtBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.fast_path, self.fast_path_gamma = [], None

    def fast(self, x):
        return x * 0


class OnePathConvNeXt(DynamicConvNeXt):
    def block(self, s, i):
        return OnePathBlock if self.is_adaptive(s, i) else super().block(s, i)


FIRST, FURTHER = here.pick((4, 2), (600, 200), (1050, 350) if here.data == "scenes" else (15620, 2343))
RECIPE = Recipe(data=here.data, smoothing=0.0, patch=PATCH, batch=here.pick(8, 32, 64), lr=4e-3,
                further_lr=8e-4, predictor_lr_scale=5.0,
                train_pictures=here.pick(64, 8000, 16000), test_pictures=here.pick(64, 2000, 10000))
START, DENSE, D7 = f"ConvNeXt {FIRST}", "ConvNeXt, further", "DynamicConvNeXt .7"
FRESH, RANDOM, FAST, ONE = "no stale values .7", "random slow set .7", "fast path alone", "no fast path .7"
EXACT = (1, 0, 0.5, 0.5)  # the weights of L_class, L_ratio, L_KL, L_token where counts are exact


def arm(model, rho=None, weights=None, **more):
    """An arm that goes on from START."""
    return Arm(model, SHAPE | (dict(keep_ratios=ratios(rho)) if rho else {}) | more,
               settings=dict(weights=weights) if weights else {}, lr=RECIPE.further_lr, steps=FURTHER,
               start=START, new_lr_scale=RECIPE.predictor_lr_scale)


HEADLINE = {DENSE: arm("convnext"), D7: arm("dynamicconvnext", 0.7),
            FRESH: arm("dynamicconvnext", 0.7, stale=False),
            RANDOM: arm("randompaths", 0.7, EXACT, stale=False), FAST: arm("fastpath", 0.7, EXACT)}
ARMS = HEADLINE | {"random, stale values .7": arm("randompaths", 0.7, EXACT),
                   ONE: arm(OnePathConvNeXt, 0.7, stale=False),
                   "no stale values .9": arm("dynamicconvnext", 0.9, stale=False),
                   "no stale values .5": arm("dynamicconvnext", 0.5, stale=False),
                   "random slow set .5": arm("randompaths", 0.5, EXACT, stale=False)}
STARTS = {START: Arm("convnext", SHAPE, lr=RECIPE.lr, steps=FIRST)}

# %% [markdown]
# These bounds were set before the first run, for both forms of DynamicConvNeXt .7: at most one point below
# the dense model; above the random slow set; above the fast path alone; and at least 1.5 times as much object
# in the last slow set as in all positions. And the form without stale values is above the official one. With
# 2,000 test pictures and one seed, a gap of less than about a point can be chance: see the intervals.

# %%
MOST_LOST, LEAST_OBJECT = 1, 1.5

# %% [markdown]
# ## Training
# Beside the accuracy we note, for scenes, the share of object in the slow sets; which ratios the decisions
# reach; and what the stale values do: the same test pictures with the **same masks**, once computed as in
# training and once as at inference.


# %%
def stale_values(trial, model):
    """Of the first 500 test pictures: the positions that change their path, and what that does to the
    answers."""
    images, labels = trial.prepare(trial.test.images[:500]), trial.test.labels[:500]
    with tt.no_grad():
        used = model.eval()(images)
        masks = [mask_at(kept, used.logits, model.num_patches).data for kept in used.kept]
        forced = model.train()(images, keep=masks)
    model.eval()
    answers = [backend.to_numpy(out.logits.data) for out in (used, forced)]
    changed = [[float(((a == before) & (b != before)).mean()) for a, b in zip(masks, masks[1:])]
               for before in (1, 0)]
    return {"slow_then_fast": changed[0], "fast_then_slow": changed[1],
            "another_class": float((answers[0].argmax(axis=1) != answers[1].argmax(axis=1)).mean()),
            "accuracy": [float((z.argmax(axis=1) == labels).mean()) for z in answers]}


@functools.cache
def trial_of(seed):
    return here.trial(RECIPE, seed, STARTS | ARMS)


def train(name, seed):
    """Train an arm -> what is noted of it; of the one without stale values also its slow sets in six
    pictures."""
    trial = trial_of(seed)
    model, report = trial.train(name)
    answers = trial.answers(model)
    row = trial.measure(model, report, answers)
    row["right"] = packed(answers.argmax(axis=1) == trial.test.labels)
    if ARMS.get(name) and ARMS[name].model in ("dynamicconvnext", "randompaths", OnePathConvNeXt):
        # a position of the stage that decides is as large as 2 x 2 patches
        row |= {"counts": model.counts,
                "on_object": kept_on_object(model, trial.test, trial.prepare, 2 * RECIPE.patch)}
    if getattr(model, "score_predictor", None):
        row |= {"stale": stale_values(trial, model), "targets": model.keep_ratios,
                "ratios": kept_in_training(trial, model, batches=5)}
    if (name, seed) == (FRESH, seeds[0]):
        with tt.no_grad():
            out = model.eval()(trial.prepare(trial.test.images[:6]))
        row |= {"slow": [backend.to_numpy(kept).tolist() for kept in out.kept],
                "called": out.logits.numpy().argmax(axis=1).tolist()}
    return row


chosen_arms = here.pick(list(ARMS), list(HEADLINE), list(ARMS if here.data == "scenes" else HEADLINE))
seeds = here.seeds
SETTINGS = dataclasses.asdict(RECIPE) | {"first_steps": FIRST, "further_steps": FURTHER} | SHAPE
wanted = [(name, seed) for seed in seeds
          for name in (START, *(chosen_arms if seed == seeds[0] else HEADLINE))]
done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed) for name, seed in wanted},
                 SETTINGS)
rows = {name: [done[f"seed{seed} {name}"] for seed in seeds if (name, seed) in wanted]
        for name in (START, *chosen_arms)}
starts, looks = rows.pop(START), {what: rows[FRESH][0].pop(what) for what in ("slow", "called")}

# %% [markdown]
# ## What was measured
# "- dense" is the accuracy minus that of "ConvNeXt, further" with the same seed, in percentage points, with a
# 95 % interval: of several seeds Student's; of one seed the normal one over the test pictures, which does not
# know how another seed would do. "object" is, for each decision, the share of object in the slow positions,
# divided by the share in all: 1 is chance.


# %%
def points(name):
    """100 x accuracy by seed."""
    return [100 * row["accuracy"] for row in rows[name]]


def above(name, than):
    """Points that an arm is above another: (mean, low, high)."""
    return difference(*([unpacked(row["right"], len(trial_of(seeds[0]).test.labels)) for row in rows[arm]]
                        for arm in (name, than)))


for seed, begun in zip(seeds, starts):
    print(f"seed {seed}: all start from {100 * begun['accuracy']:.1f} %, a ConvNeXt after {FIRST:,} steps of "
          f"{RECIPE.batch} pictures")
print(f"{'arm':<24}{'accuracy, %':>12}{'- dense [95 %]':>20}{'M MACs':>8}{'object':>16}   drawn in training "
      f"(target)")
for name in chosen_arms:
    row, shares = rows[name][0], " ".join(f"{share:.2f}" for share in over_chance(rows[name]))
    reached = ", ".join(f"{a:.3f} ({b:.3f})" for a, b in zip(row.get("ratios", []), row.get("targets", [])))
    gap = "" if name == DENSE else interval_text(*above(name, DENSE))
    print(f"{name:<24}{spread_text(points(name)):>12}{gap:>20}{row['macs'] / 1e6:>8.2f}{shares:>16}   "
          f"{reached}")
stale = rows[D7][0]["stale"]
print(f"\n{D7}, computed as in training with the masks of inference: {100 * stale['accuracy'][1]:.1f} % "
      f"right, at inference {100 * stale['accuracy'][0]:.1f} % of the same {min(500, RECIPE.test_pictures)} "
      f"pictures; {100 * stale['another_class']:.1f} % get another class")
print("positions that go from slow to fast at the next decision: "
      f"{', '.join(f'{100 * share:.0f} %' for share in stale['slow_then_fast'])}; from fast to slow: "
      f"{', '.join(f'{100 * share:.0f} %' for share in stale['fast_then_slow'])}")

# %% [markdown]
# This is what to look for. The figures are those of the default run (seed 0, 600 and 200 steps;
# `lessons/results/14_slow_and_fast_path.json`). The full run with three seeds has not been made.
#
# **Stale values cost most.** DynamicConvNeXt .7 loses 4.0 points to the dense model, without stale values 1.8
# (the difference is 2.2 [1.1, 3.4]). The official form has hardly learned less. If its own masks of inference
# are computed in two streams, as in training, it is right for 88.2 % of the first 500 pictures; with one map
# for 86.2 %. It has learned for values that inference does not have. At the second and third decision, 28 %
# and 22 % of the positions go from slow to fast, 8 % and 3 % back. A long training at a small rate may get
# used to this; these 200 steps did not.
#
# **The slow path is needed:** with the fast path alone 4.8 points are lost, 3.0 [1.6, 4.4] more than without
# stale values. **That the learned choice is needed was not shown.** Without stale values it is 0.6 points
# [-0.5, 1.6] above a random one, which costs 0.7 M multiply-adds less, since it has no predictors. And yet
# the predictors found the object: in the last slow set its share is 2.2 times that of all positions (after
# the first two decisions 1.2 and 1.1). One reason may be that every position still gets the convolution and
# the fast path of each block, so that little is lost where the slow path is missing. Another may be that a
# random set is new at each decision, so that most positions are slow in some block. We have not tested
# either.
#
# None of the forms keeps within one point of the dense model here.

# %% [markdown]
# Multiply-adds are not time. Gathering and putting back take time, too, and small products are slower for
# each multiply-add than large ones. Time is **not measured here**. On an idle machine, `tinytoken bench`
# measures training steps and inference (`--model convnext`, `--model dynamicconvnext`). In training both
# paths run everywhere, so nothing is saved there.

# %% [markdown]
# Here are the claims. Small models in a short run with one seed decide nothing.

# %%
saved = 1 - rows[D7][0]["macs"] / rows[DENSE][0]["macs"]
assert abs(saved - 1 + macs_by_hand(32, PATCH, rows[D7][0]["counts"]) / macs_by_hand(32, PATCH)) < 1e-12
for name in (D7, FRESH):
    here.claim(f"{name}: points lost to the dense model with as many further steps",
               -above(name, DENSE)[0], high=MOST_LOST)
    here.claim(f"{name}: points above {RANDOM}", above(name, RANDOM)[0], low=0)
    here.claim(f"{name}: points above {FAST}", above(name, FAST)[0], low=0)
    if on_object := over_chance(rows[name]):
        here.claim(f"{name}: object share of the last slow set, over chance", on_object[-1], low=LEAST_OBJECT)
here.claim(f"{FRESH}: points above {D7}", above(FRESH, D7)[0], low=0)
gaps = {name: f"{above(name, DENSE)[0]:+.1f}" for name in HEADLINE}
for name, than in ((D7, RANDOM), (FRESH, RANDOM), (D7, FAST), (FRESH, FAST), (FRESH, D7)):
    print(f"{name}, points above {than}: {interval_text(*above(name, than))}")
here.says(f"DynamicConvNeXt .7 saves {100 * saved:.0f} % of the multiply-adds and lies {gaps[D7]} points "
          f"from a ConvNeXt of as many steps ({FIRST:,} and {FURTHER}), without stale values {gaps[FRESH]}, "
          f"with random slow sets {gaps[RANDOM]}, with the fast path alone {gaps[FAST]} ({len(seeds)} "
          f"seed{'s' * (len(seeds) > 1)}; no time was measured).")


def draw_slow(figure):
    plot.stages(figure, trial_of(seeds[0]).test, looks["called"], looks["slow"], 2 * RECIPE.patch,
                ["", *(f"{count} slow" for count in rows[D7][0]["counts"])])
    figure.suptitle(f"The slow set after each decision, {FRESH} (hatched: the fast path)")


def draw_arms(figure):
    axis = figure.subplots()
    for i, name in enumerate(chosen_arms[::-1]):
        axis.plot(points(name), [i] * len(rows[name]), "o", alpha=0.7,
                  color="#0072b2" if ARMS[name].model in ("convnext", "dynamicconvnext") else "#d55e00")
    axis.axvline(statistics.mean(points(DENSE)), color="#999999", linestyle="--", zorder=0)
    labels = [f"{name} ({rows[name][0]['macs'] / 1e6:.1f} M)" for name in chosen_arms[::-1]]
    axis.set(yticks=range(len(chosen_arms)), yticklabels=labels, ylim=(-0.6, len(chosen_arms) - 0.4),
             title="Accuracy and MACs", xlabel=f"test accuracy, %, a dot per seed (dashed: {DENSE})")


here.picture("slow", draw_slow, 9, 6.3)
here.picture("arms", draw_arms, 9, 1.5 + 0.27 * len(chosen_arms))
here.measured(rows=rows, starts=starts, removed=removed, by_hand=by_hand, flips=flips, seeds=seeds,
              recipe=SETTINGS)

# %% [markdown]
# ## Exercises
# 1. For which keep ratios does a stage of nine blocks (ConvNeXt-T: C = 384, N = 196, decisions before the
#    blocks 1, 2, 3) cost less with two paths than without? Take ratios r, r - 0.2, r - 0.4, use the table of
#    costs, and check with `tt.macs`.
# 2. Give the fast path the GELU and the hidden width of a smaller MLP, C -> C / 2 -> C. It costs the same.
#    Is it better?
# 3. `stale=False` begins anew at each decision, not in each block. Write streams that begin anew in every
#    block: x1 = x + slow(y), x2 = x + fast(y), x <- m x1 + (1 - m) x2. Show that training is inference for
#    any masks here, too. What does the gradient of the last decision, which holds for several blocks, lose?
# 4. Multiply each decision by the one before, as DynamicViT does, so that a fast position stays fast. Which
#    of the two kinds of stale values is gone? Does the object share change?
# 5. Let the slow set be the positions with the largest difference from the mean of their neighbours: no
#    predictor, no learning. Write it as a subclass of `RandomPaths` with a `choose` and a `decide` of its
#    own, and train it as an arm.
# 6. Measure the inference of both models on an idle machine, with 1 picture and with 128 at a time
#    (`tinytoken.experiments.timing.interleaved`). Which part of the saved multiply-adds shows? Where is the
#    rest? (`tinytoken.bench.timed_ops`.)
#
# ## The paper
# Rao et al. 2022, "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural
# Networks" (arXiv 2207.01580), and the official code, where the paper leaves things open.
#
# | paper and official code | our line |
# |---|---|
# | slow path: the block's MLP; fast path: norm, linear layer | `AdaptiveConvNeXtBlock.fast`; by hand `slow` |
# | at inference: gather, two paths, put back | `AdaptiveBlock.gathered`; by hand `at_inference` |
# | in training: two streams and a mask | `AdaptiveBlock.streams`; by hand `in_training` |
# | a predictor over the whole map, a plain mean in its global half | `self.predictors[stage](state.x)` |
# | decisions of all positions anew | `DynamicStages.decide`; by hand `decided` |
# | ratios rho, rho - 0.2, rho - 0.4 | `keep_ratios: tuple[float, ...] = (0.7, 0.7 - 0.2, 0.7 - 0.4)` |
# | losses with weights 1, 10, 0.5, 0.5 | `loss_weights = (1, 10, 0.5, 0.5)` |
#
# We differ on purpose in three points. Our predictors start near their ratios (lesson 07). gamma starts at 1
# in the small models of this lesson. And the backbone learns from the first of the further steps, while the
# official recipe keeps it still for the first 5 of 120 epochs.

# %%
here.end()
