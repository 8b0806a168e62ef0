# %% [markdown]
# # Lesson 05b: What a decision's gradient knows
# After this lesson you can give the decision to hide a token a gradient, and you know how far to trust it.
#
# Lesson 05 built a mask which is the same as removing tokens. There the decisions were given. In DynamicViT
# (lesson 07) a small network, the *predictor*, makes them, and it must learn which decisions were good. This
# lesson derives the gradient that it learns from, finds a case in which that gradient is dangerous, and then
# asks, with a trained network, what the gradient can tell. You need lessons 03, 04 and 05.

# %%
import math

import numpy as np
import tqdm

import tinytoken as tt
from tinytoken import plot
from tinytoken.experiments import lesson
from tinytoken.train import Classify, accuracy, fit, infer

here = lesson.begin("05b_what_a_decision_knows")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The slope of a decision
#
# The symbols are those of lesson 05, for one head: logits a_ij (token i looks at token j); decisions D_j, 1
# keeps token j; the mask K_ij = D_j, but K_ii = 1; and the attention weights
#
# $$A_{ij} = \frac{K_{ij} \, e^{a_{ij}}}{Z_i}, \qquad Z_i = \sum_l K_{il} \, e^{a_{il}}$$
#
# The predictor learns from dL/dD_j: how would the loss L change if a little more of token j were let in? A
# gather cannot answer that: a row is there or it is not, and there is no number to vary. A boolean mask
# cannot answer it either. But K_ij in the formula is a number, and A is smooth in it. Differentiate with
# respect to one K_ij. It appears in the numerator of column j, and through Z_i in every column l:
#
# $$\frac{dA_{il}}{dK_{ij}} = [l = j] \frac{e^{a_{il}}}{Z_i} - \frac{K_{il} \, e^{a_{il}} \, e^{a_{ij}}}{Z_i^2}
#                           = \frac{e^{a_{ij}}}{Z_i} \, ([l = j] - A_{il})$$
#
# where [l = j] is 1 if l = j, and 0 otherwise. Let u_il = dL/dA_il. For an upstream gradient g of the output,
# u_il = g_i . v_l. Then
#
# $$\frac{dL}{dK_{ij}} = \frac{e^{a_{ij}}}{Z_i} \left( u_{ij} - \sum_l u_{il} A_{il} \right), \qquad
#   \frac{dL}{dD_j} = \sum_{i \neq j} \frac{dL}{dK_{ij}}$$
#
# The second sum leaves out i = j, because K_jj = 1 whatever D_j is. With several heads, we sum over them,
# too. In words: what token j would bring, compared with what the row gets on average now, times the weight
# that the token would draw.
#
# **Which tokens receive this gradient? All of them.** Nothing in the formula asks for K_ij = 1. A dropped
# token j has the weight A_ij = 0, but its factor e^(a_ij) / Z_i is not 0. Without that, a token that was
# dropped once would never learn that it should have been kept. Compare the other masks:
#
# - Where the logits are lowered by 1000, D_j acts through A_ij alone. Its slope is 1000 A_ij (u_ij - ...),
#   and that is e^-1000, so 0, for a dropped token.
# - Adding ln K_ij to the logits gives the same A as ours, but its slope is A_ij (u_ij - ...) / K_ij = 0 / 0.

# %%
def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def visible(keep):
    """K (T, T): how much of token j does row i see?"""
    K = np.tile(keep, (len(keep), 1))
    np.fill_diagonal(K, 1)
    return K


def masks(batch, tokens, count):
    """(B, T) with `count` ones in each row, at places drawn for each row."""
    return np.array([rng.permutation(tokens) < count for _ in range(batch)], dtype=float)


def slope_of_keep(q, k, v, g, keep):
    """dL/dkeep (T,) of one head, for the upstream gradient g (T, d)."""
    K, a = visible(keep), q @ k.T / math.sqrt(q.shape[1])
    top = np.where(K > 0, a, -np.inf).max(axis=1, keepdims=True)
    e = np.exp(np.minimum(a - top, 0))  # the minimum matters for dropped keys above the maximum: see below
    Z = (K * e).sum(axis=1, keepdims=True)
    A, u = K * e / Z, g @ v.T
    slope = e / Z * (u - (u * A).sum(axis=1, keepdims=True))
    np.fill_diagonal(slope, 0)
    return slope.sum(axis=0)


def op_slope(q, k, v, g, keep, **settings):
    """The same from the op, for (T, d) arrays."""
    leaf = tt.Tensor(keep[None], requires_grad=True)
    tt.ops.attention(*(x[None, None] for x in (q, k, v)), leaf, **settings).backward(g[None, None])
    return leaf.grad[0]


q, k, v, g = rng.standard_normal((4, 9, 4))
soft, hard = rng.uniform(size=9), masks(1, 9, 4)[0]
for name, keep in (("soft", soft), ("hard", hard)):
    difference = np.abs(slope_of_keep(q, k, v, g, keep) - op_slope(q, k, v, g, keep)).max()
    print(f"{name} keep: our slope against the op's: {difference:.1e}")
    assert difference < 1e-12
print(tt.gradcheck(lambda keep: tt.ops.attention(*(x[None, None] for x in (q, k, v)), keep), soft[None],
                   names=["keep"]))
slopes = op_slope(q, k, v, g, hard)
print("decision:                     ", hard.astype(int), "\nslope:                        ", slopes.round(2))
assert np.all(slopes != 0)


def slope_when_lowered(q, k, v, g, keep, by=1000):
    """dL/dkeep (T,) if the mask is softmax(a - by (1 - K)): only through A, so nothing for a token with no
    weight."""
    A, u = softmax(q @ k.T / math.sqrt(q.shape[1]) - by * (1 - visible(keep))), g @ v.T
    slope = by * A * (u - (u * A).sum(axis=1, keepdims=True))
    np.fill_diagonal(slope, 0)
    return slope.sum(axis=0)


lowered = slope_when_lowered(q, k, v, g, hard)
print("slope if logits are lowered:  ", lowered.round())
assert np.all(lowered[hard == 0] == 0)

# %% [markdown]
# The slopes of the kept tokens have a special property. Multiply all K_ij of a row by the same number: A does
# not change. So the slope in that direction is 0:
#
#     sum_j K_ij dL/dK_ij = 0
#
# Within a row, the slopes of the kept tokens sum to zero. They compare the kept tokens with one another, and
# they cannot all say "more of us". Toward a dropped token there is no such limit. (The diagonal, which D does
# not move, breaks this rule for the sum over all rows. So we check it with `sees_itself=False`, which leaves
# out K_ii = 1.)

# %%
balance = 0.0
for _ in range(20):
    q, k, v, g = rng.standard_normal((4, 9, 4))
    balance = max(balance, abs((hard * op_slope(q, k, v, g, hard, sees_itself=False)).sum()))
print(f"sum of the slopes of kept tokens, the largest of 20 drawings: {balance:.1e}")
assert balance < 1e-12

# %% [markdown]
# ## A dropped key that stands out
#
# How large can the factor e^(a_ij) / Z_i of a dropped key be? If its logit is larger than that of the
# strongest kept key by a gap, the factor is about e^gap, and nothing bounds it. The smallest case shows it:
# one row, a kept key with logit 0, and a dropped key whose logit is the gap. Letting the dropped key in with
# K gives it the weight K e^gap / (1 + K e^gap). At K = 0 the slope of that is e^gap. But the whole way from
# K = 0 to K = 1 changes the weight by less than 1. A decision goes the whole way, so a slope of e^gap
# promises what the step cannot give. It is not only wrong, it is dangerous: AdamW squares gradients, and in
# float32 the square e^(2 gap) is infinite from gap = 44.4 on.
#
# So for dropped keys the op uses e^(min(a_ij - m_i, 0)) instead of e^(a_ij - m_i), where m_i is the largest
# logit of a visible key: **a dropped key counts at most as much as the strongest kept one.** We call this the
# *cap*. For soft decisions (between 0 and 1) it changes nothing, since then all keys are visible and none is
# above the maximum. For hard decisions it changes nothing where no dropped key is above the maximum. The
# official formula of lesson 05 divides by e^-gap S + eps, so its slope grows to about 1 / eps, a million.

# %%
def factor(gap, dtype=np.float64, **settings):
    """The slope toward a dropped key `gap` above the one kept key; values 0 and 1 and an upstream gradient of
    1 leave the bare factor e^a / Z."""
    one = np.ones((1, 1, 1, 1), dtype)
    k, v = np.array([[[[0], [gap]]]], dtype), np.array([[[[0], [1]]]], dtype)
    keep = tt.Tensor(np.array([[1, 0]], dtype), requires_grad=True)
    tt.ops.attention(one, k, v, keep, sees_itself=False, **settings).backward(one)
    return float(keep.grad[0, 1])


print(f"{'gap':>5} {'true slope':>12} {'ours':>8} {'official':>12} {'change of weight, K from 0 to 1':>34}")
for gap in (-5, 0, 2, 5, 10, 20, 50):
    true, change = math.exp(gap), 1 / (1 + math.exp(-gap))
    print(f"{gap:5} {true:12.4g} {factor(gap):8.4g} {factor(gap, official=True):12.4g} {change:34.4f}")
    assert abs(factor(gap) - min(true, 1)) < 1e-12
assert math.isfinite(factor(200, np.float32)) and factor(200, np.float32) == 1

# %% [markdown]
# ## What the slopes know
#
# A slope is a statement about a small step, but a decision is a whole one. Does dL/dD_j tell us anything
# about what happens when D_j is flipped? We train a small ViT on scenes, and then let it see only 16 of the
# 64 patches of each test picture, drawn at random. For every patch we compare two things:
#
# - what the slope predicts: minus the slope if the flip drops the patch, plus the slope if it lets the patch
#   in;
# - the true change of the loss when this one decision is flipped.
#
# One backward pass gives all slopes of a picture. The true changes need 64 more forward passes.
#
# Training is as in lesson 04: `Classify` is the loss of a classifier, `fit` takes the steps, `infer` runs a
# model over many pictures, and `accuracy` compares its answers with the labels. The weights of the trained
# ViT then go into a `DynamicViT` that drops tokens before block 1. It has a predictor of its own, but we do
# not use it: we pass our decisions as `keep`.

# %%
train, test = here.pictures(here.pick(200, 4000, 6000), here.pick(40, 500, 2000))
batches = tt.data.Batches(train.images, train.labels, 64, seed=here.seed)
sizes = dict(image_size=32, patch_size=4, dim=48, depth=3, heads=3)
vit = tt.models.ViT(**sizes)
fit(vit, Classify(vit), batches, steps=here.pick(3, 200, 1000), lr=2e-3, seed=here.seed)
test_images = tt.data.normalise(test.images, batches.mean, batches.std)
vit_accuracy = accuracy(infer(vit, test_images), test.labels)
print(f"accuracy with all patches: {vit_accuracy:.1%} of {len(test.images)} test pictures")

model = tt.models.DynamicViT(**sizes, prune_before=(1,), keep_ratios=(0.25,))
# the predictor stays as it is: decisions are forced here
model.load_state_dict(vit.state_dict(), strict=False)
count = here.pick(8, 128, 500)
images, labels = test_images[:count], test.labels[:count]
keep = masks(count, 64, 16).astype("float32")


def losses(keep, index):
    """Cross-entropy (B,) of the pictures `index` (B,), patches dropped before block 1 by masking, keep (B,
    64)."""
    log_probs = tt.ops.log_softmax(model.train()(images[index], keep=[keep]).logits)
    return -log_probs[np.arange(len(index)), labels[index]]


leaf = tt.Tensor(keep, requires_grad=True)
losses(leaf, np.arange(count)).sum().backward()  # no picture's loss depends on another's decisions
slope = leaf.grad
predicted = np.where(keep > 0, -slope, slope)


def changes(b, share):
    """(64,): how the loss of picture b changes when decision j is moved by `share` of the way to its
    opposite, for each j."""
    moved = keep[b] + share * np.eye(64, dtype="float32") * (1 - 2 * keep[b])
    with tt.no_grad():
        return losses(moved, np.full(64, b)).data - before[b]


before = losses(keep, np.arange(count)).data
change = np.array([changes(b, 1.0) for b in tqdm.trange(count, desc="flipping every decision")])

# %%
def agreement(p, c):
    """How predicted changes p go with the true ones c."""
    large = np.abs(c) >= np.median(np.abs(c))
    return {"correlation": float(np.corrcoef(p, c)[0, 1]), "same sign": float((p * c > 0).mean()),
            "same sign, larger half of the changes": float((p * c > 0)[large].mean()),
            "rms predicted": float(np.sqrt((p * p).mean())), "rms true": float(np.sqrt((c * c).mean()))}


dropped = keep == 0
found = {"dropped, let in": agreement(predicted[dropped], change[dropped]),
         "kept, dropped": agreement(predicted[~dropped], change[~dropped])}
few = here.pick(2, 64, 200)  # what would be predicted without the cap: the first bit that is let in, measured
uncapped = np.array([changes(b, 0.001) / 0.001 for b in range(few)])
found["dropped, let in, no cap"] = agreement(uncapped[dropped[:few]], change[:few][dropped[:few]])
for name, numbers in found.items():
    print(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in numbers.items()))

dropped_slope, dropped_change = np.where(keep > 0, np.inf, slope), np.where(keep > 0, np.inf, change)
wanted, each = dropped_slope.argmin(axis=1), np.arange(count)
let_in = {"most wanted": float(change[each, wanted].mean()),
          "best one": float(dropped_change.min(axis=1).mean()),
          "by chance": float(change[keep == 0].mean())}
error = {"most wanted": float(change[each, wanted].std() / math.sqrt(count))}
print(f"loss before {before.mean():.2f}; change by letting in ONE dropped patch: the one with the lowest "
      f"slope "
      f"{let_in['most wanted']:.3f} ± {error['most wanted']:.3f}, the best one by trying all 48 "
      f"{let_in['best one']:.3f}, "
      f"by chance {let_in['by chance']:.3f}")

if here.data == "scenes":
    object_share = test.object_share(4)[:count]
    on_object = {"most wanted": float(object_share[each, wanted].mean()),
                 "all dropped": float(object_share[keep == 0].mean())}
    print(f"share of object in the most wanted dropped patch {on_object['most wanted']:.0%}, "
          f"in all dropped patches {on_object['all dropped']:.0%}")
    here.measured(on_object=on_object)

squares = float((slope[keep == 0] ** 2).sum() / (slope ** 2).sum())
print(f"of the sum of all squared slopes, dropped patches hold {squares:.0%} (they are "
      f"{(keep == 0).mean():.0%} of the patches)")

# %% [markdown]
# How large are the logits of this trained network, and does the official mask of lesson 05 harm it?

# %%
def logit_spreads(vit, images):
    """Per block: the standard deviation of the attention logits around each row's mean (softmax does not see
    the mean)."""
    x, found = vit.embed(images), []
    for block in vit.blocks:
        q, k, _ = block.attn.project(block.norm1(x))
        a = q.data @ k.data.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        found.append(float((a - a.mean(axis=-1, keepdims=True)).std()))
        x = block(x)
    return found


official = tt.models.DynamicViT(**sizes, prune_before=(1,), keep_ratios=(0.25,), official=True)
official.load_state_dict(vit.state_dict(), strict=False)
with tt.no_grad():
    trained_spreads = logit_spreads(vit, images)
    true = model.eval()(images, keep=[keep]).logits.data
    exact, other = (m.train()(images, keep=[keep]).logits.data for m in (model, official))
trained = {form: float(np.abs(logits - true).max() / true.std()) for form,
           logits in (("exact", exact), ("official", other))}
print("spread by block:", ", ".join(f"{s:.2f}" for s in trained_spreads))
print(f"largest difference of a class logit from gathering, over their spread (float32): "
      f"exact {trained['exact']:.1e}, official {trained['official']:.1e}")

# %%
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by colour-blind readers too


def draw_slopes(figure):
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    axis = left.subplots()
    some = rng.permutation(count)[:60]
    for name, which, colour, mark in (("dropped, let in", keep == 0, BLUE, "o"),
                                      ("kept, dropped", keep > 0, ORANGE, "^")):
        pick = np.zeros_like(which)
        pick[some] = which[some]
        axis.plot(predicted[pick], change[pick], mark, ms=3, color=colour, alpha=0.5, label=name)
    low, high = np.quantile(change, [0.001, 0.999])
    axis.plot([low, high], [low, high], color=GREY, lw=1, label="prediction = truth")
    axis.set(xlim=(1.6 * low, 1.6 * high), ylim=(1.2 * low, 1.2 * high), xlabel="change of the loss that the "
                                                                                "slope predicts",
             ylabel="true change of the loss by the flip", title="One decision flipped")
    axis.legend(fontsize=8)
    axes = right.subplots(3, 3, squeeze=False)
    limit = np.abs(slope[:3]).max(axis=1) + 1e-12
    for b, (picture, kept, heat) in enumerate(axes):
        pixels = test.images[b].transpose(1, 2, 0)
        picture.imshow(pixels)
        kept.imshow(plot.hide(pixels, np.flatnonzero(keep[b]), 4))
        heat.imshow(np.kron(slope[b].reshape(8, 8), np.ones((4, 4))), cmap="PuOr_r", vmin=-limit[b],
                    vmax=limit[b])
        for place in np.flatnonzero(keep[b]):
            heat.plot(place % 8 * 4 + 1.5, place // 8 * 4 + 1.5, ".", ms=4, color="black")
        for axis, title in zip((picture, kept, heat),
                               (f"{test.names[labels[b]]}", "16 kept patches", "slope toward each patch")):
            axis.set(xticks=[], yticks=[])
            if b == 0 or axis is picture:
                axis.set_title(title, fontsize=9)
    right.supxlabel("purple: more of it would lower the loss; orange: raise it; dots: kept", fontsize=9)


here.picture("slopes", draw_slopes, width=12, height=5)

# %% [markdown]
# Left: a perfect prediction would lie on the line. The signs mostly agree. The sizes agree less, and for kept
# patches the slope says too little. Here is why. Take a token of strength e beside others of total strength
# R. As a function of its own K, it has the weight K e / (R + K e). The slope of that is e / R at K = 0, and e
# R / (R + e)^2 at K = 1. The whole way from 0 to 1 brings e / (R + e), which lies between the two. The first
# bit of a token brings more than the last.
#
# For the same reason, the slope toward a dropped patch says too much, and without the cap it does: a few
# patches stand far above the kept ones. The line "no cap" shows what they do to the size of the predictions
# and to their correlation with the truth. The cap repairs most of that, and leaves the sign nearly as it is.
#
# Right: where is the darkest purple of each picture? Mostly on a dropped patch of an object (the figures are
# printed above). Only a quarter of the patches was seen, and the gradient points at what was missed. This is
# what DynamicViT learns from in lesson 07.
#
# ## What was measured

# %%
here.says(f"A decision's slope and the true change of the loss by flipping it have the same sign for "
          f"{100 * found['dropped, let in']['same sign']:.0f} % of the dropped patches and "
          f"{100 * found['kept, dropped']['same sign']:.0f} % of the kept ones (correlation "
          f"{found['dropped, let in']['correlation']:.2f} and {found['kept, dropped']['correlation']:.2f}).")
here.measured(vit_accuracy=vit_accuracy, slopes=found, let_in=let_in, let_in_error=error,
              squares_at_dropped=squares, trained_spreads=trained_spreads, trained_difference=trained,
              pictures=count)
for name, numbers in found.items():
    print(f"{name}: slope and true change have the same sign in {numbers['same sign']:.0%}, "
          f"correlation {numbers['correlation']:.2f}")

# %% [markdown]
# ## Exercises
#
# 1. Remove the cap in `slope_of_keep` (leave out the minimum), and compare with `op_slope` at hard decisions.
#    In how many of 100 drawings do they differ? Raise the spread of the logits, and count again.
# 2. Flip the two decisions with the most negative predictions at once. Is the change the sum of both? Find a
#    pair of patches for which it is far from the sum, look at the picture, and explain.
# 3. Let the network see 4, 8, 32 or 48 patches instead of 16. When does the slope predict best, and why?
#
# ## The paper
#
# DynamicViT (Rao et al. 2021, arXiv 2106.02034), section 3.3, equation 11, beside our lines in
# `tinytoken/ops/attend.py`:
#
# | paper | ours |
# |---|---|
# | the slope toward the mask G (the paper does not write it out) | `centred * slope`, with `centred` = u - sum u A and, by then, `slope` = e^(a - m) / Z |
# | a cap for dropped keys (not in the paper, nor in the official code) | `slope = xp.minimum(scores, highest)`, from which `highest` is subtracted |

# %%
here.end()
