# %% [markdown]
# # Lesson 05: Masking is removing
# After this lesson you can hide tokens so that nothing of them is left, and give the decision to hide one a
# gradient.

# %%
import math

import numpy as np
import tqdm

import tinytoken as tt
from tinytoken import plot
from tinytoken.experiments import lesson
from tinytoken.train import Classify, accuracy, fit, infer

here = lesson.begin("05_masking_is_removing")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## Two ways to do without a token
#
# Most patches of a picture show nothing that its class depends on. DynamicViT (lesson 07) drops such tokens
# between the blocks. There are two ways to do that, and it needs both:
#
# - **Gather.** Copy the kept rows into a shorter array and go on with that. The work that is saved is saved
#   here: this is inference.
# - **Mask.** Leave all rows where they are, and see to it that no kept token looks at a dropped one. Nothing
#   is saved. But in training every picture drops another number of tokens, and rows of different lengths do
#   not fit into one array; and the network that decides what to drop must learn from a gradient, which a
#   gather does not give it.
#
# So the network is trained by masking and used by gathering. If the two do not compute the same, we train one
# network and use another. The rule in this package is that they are equal, to rounding. This lesson builds
# the mask that does it, then looks at masks that do not.
#
# Symbols, for one head: $T$ tokens; queries, keys, values $q, k, v$ of shape $(T, d)$; logits $a_{ij} = q_i
# \cdot k_j / \sqrt d$, row $i$ is the token that looks, column $j$ the one that is looked at; decisions $D_j
# \in \{0, 1\}$, 1 keeps token $j$. The mask is $K_{ij} = D_j$, but $K_{ii} = 1$: a token always sees itself.
# Then
#
# $$A_{ij} = \frac{K_{ij}\, e^{a_{ij}}}{\sum_l K_{il}\, e^{a_{il}}}, \qquad \text{out}_i = \sum_j A_{ij} v_j
# .$$
#
# Why this is removing: take a row $i$ that is kept. All $K_{ij}$ of kept columns are 1, all of dropped ones
# 0. So the sum below runs over the kept columns alone, and what is left is the softmax of the gathered
# logits, with zeros put in between. A row that is dropped has some output too, but no kept row ever looks at
# it. Its $K_{ii} = 1$ only sees to it that the row is not $0 / 0$.

# %%
T, d = 6, 4
q, k, v = rng.standard_normal((3, T, d))
keep = np.array([1, 0, 1, 1, 0, 1.0])


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gathered(q, k, v, keep):
    """Attention among the kept rows alone. (T, d) -> (kept, d)."""
    q, k, v = (x[keep > 0] for x in (q, k, v))
    return softmax(q @ k.T / math.sqrt(q.shape[1])) @ v


def visible(keep):
    """K (T, T): how much of token j does row i see?"""
    K = np.tile(keep, (len(keep), 1))
    np.fill_diagonal(K, 1)
    return K


def masked_weights(a, K):
    """A (T, T). The largest VISIBLE logit of the row is taken off: it cancels in the quotient, and exp cannot
    overflow."""
    a = np.where(K > 0, a, -np.inf)
    w = K * np.exp(a - a.max(axis=1, keepdims=True))
    return w / w.sum(axis=1, keepdims=True)


A = masked_weights(q @ k.T / math.sqrt(d), visible(keep))
print("A, rows and columns 1 and 4 dropped:\n", A.round(2))
difference = np.abs((A @ v)[keep > 0] - gathered(q, k, v, keep)).max()
print(f"masked, read at the kept rows, against gathered: {difference:.1e}")
assert difference < 1e-12

# %% [markdown]
# ## Ways that are not removing
#
# Each of these looks right at first.
#
# - **Multiply the dropped tokens by 0.** A token of zeros still has a key: $k_j = W 0 + b = b$. Even without
#   a bias its logit is 0, and $e^0 = 1$ is as good as any other key's. Zero is not "nothing", it is a point
#   like another, and attention goes there.
# - **Multiply the weights by $D_j$ after the softmax.** The dropped tokens took part in the sum below. Their
#   share is taken away and given to nobody: rows no longer sum to 1, and the output shrinks by as much as the
#   dropped tokens had drawn.
# - **Subtract 10 from the logits of dropped tokens.** Then they weigh $e^{-10}$ times as much. That is
#   little, until a dropped logit stands 10 above the kept ones.
# - **Subtract 1000.** Now $e^{-1000}$ is 0 in floating point, and this is removing. It is a common way to
#   mask, and fine where the mask is given. But we shall see that it leaves the decision without a gradient.
# - **The official code's formula.** Close to ours, with an $\varepsilon$. It gets a part of its own below.
#
# Whether a way fails depends on how far the logits lie apart. We call their standard deviation the
# **spread**, and look at two.

# %%
# Each from a0, the logits of tokens times 0; a, the logits; and K, the mask.
WAYS = {
    "tokens times 0": lambda a0, a, K: softmax(a0),
    "times D after softmax": lambda a0, a, K: softmax(a) * K,
    "logits minus 10": lambda a0, a, K: softmax(a - 10 * (1 - K)),
    "logits minus 1000": lambda a0, a, K: softmax(a - 1000 * (1 - K)),
    "K in the quotient": lambda a0, a, K: masked_weights(a, K),
}


def try_ways(spread, tokens=16, width=8):
    """{way: (largest error at the kept rows, weight that they give to dropped tokens, sum of their weights)},
    for one drawing."""
    x, keep = rng.standard_normal((tokens, width)), (rng.permutation(tokens) < tokens // 2).astype(float)
    weights, biases = rng.standard_normal((3, width, width)), rng.standard_normal((3, 1, width))
    project = lambda x: x @ weights + biases  # (3, T, width): queries, keys, values
    q, k, v = project(x)
    q0, k0, v0 = project(x * keep[:, None])  # of tokens times 0
    scale = spread / (q @ k.T).std()
    found = {}
    for name, way in WAYS.items():
        A = way(q0 @ k0.T * scale, q @ k.T * scale, visible(keep))[keep > 0]
        out = A @ (v0 if name == "tokens times 0" else v)
        exact = softmax((q @ k.T * scale)[keep > 0][:, keep > 0]) @ v[keep > 0]
        found[name] = np.abs(out - exact).max(), A[:, keep == 0].sum(axis=1).mean(), A.sum(axis=1).mean()
    return found


tries = here.pick(3, 100, 1000)
shortcuts = {}
for spread in (1, 10):
    drawn = [try_ways(spread) for _ in range(tries)]
    print(f"\nspread {spread}: half of 16 tokens dropped, {tries} drawings; values of standard deviation 3\n"
          f"{'':24}{'largest error':>14}{'weight on dropped':>20}{'sum of weights':>16}")
    for name in WAYS:
        errors, dropped, total = np.array([found[name] for found in drawn]).T
        print(f"{name:24}{errors.max():14.1e}{dropped.mean():20.1e}{total.mean():16.3f}")
        shortcuts[f"{name}, spread {spread}"] = float(errors.max())
for spread in (1, 10):
    for name in ("logits minus 1000", "K in the quotient"):
        assert shortcuts[f"{name}, spread {spread}"] < 1e-12

# %% [markdown]
# ## The op, values and gradients
#
# `tt.ops.attention(q, k, v, keep)` is this mask for batches and heads: q, k, v are (B, H, T, d), `keep` is
# (B, T). Equal values are half of the claim. The weights of the network must get the same gradients too, or
# masking trains something else. Below, a random upstream gradient arrives at the kept rows (nobody reads the
# dropped ones), and the gradients of q, k, v must be those of the gathered rows, and exactly 0 at dropped
# rows.

# %%
def kept_rows(x, keep):
    """The kept tokens of x (B, H, T, d); every picture keeps equally many."""
    rows = np.stack([np.flatnonzero(row) for row in keep])
    return np.take_along_axis(x, rows[:, None, :, None], axis=2)


def run(q, k, v, g, keep=None):
    """[out, dq, dk, dv] of the op, for the upstream gradient g."""
    leaves = [tt.Tensor(x, requires_grad=True) for x in (q, k, v)]
    out = tt.ops.attention(*leaves, keep)
    out.backward(g)
    return [out.data, *(leaf.grad for leaf in leaves)]


def draw(spread, shape):
    """q, k, v and an upstream gradient whose logits have that standard deviation."""
    q, k, v, g = rng.standard_normal((4, *shape))
    return q * (spread / (q @ k.swapaxes(-1, -2) / math.sqrt(shape[-1])).std()), k, v, g


def masks(batch, tokens, count):
    """(B, T) with `count` ones in each row, elsewhere in each."""
    return np.array([rng.permutation(tokens) < count for _ in range(batch)], dtype=float)


def off(a, b):
    """The largest difference, relative to b's largest value where that is above 1."""
    return float(np.abs(a - b).max() / max(1, np.abs(b).max()))


worst_op = 0.0
for spread in (1, 5, 20):
    for count in range(1, 10):
        keep, (q, k, v, g) = masks(3, 9, count), draw(spread, (3, 2, 9, 4))
        g = g * keep[:, None, :, None]
        by_mask, by_gather = run(q, k, v, g, keep), run(*(kept_rows(x, keep) for x in (q, k, v, g)))
        worst_op = max(worst_op, *(off(kept_rows(a, keep), b) for a, b in zip(by_mask, by_gather)))
        assert count == 9 or not any(kept_rows(gradient, 1 - keep).any() for gradient in by_mask[1:])
print(f"op, out and gradients of q, k, v, spreads 1 to 20, every count: largest difference {worst_op:.1e}")
assert worst_op < 1e-12

# %% [markdown]
# ## A whole network
#
# Attention is the only place of a ViT where tokens meet. Layer norm, the MLP and the residual sums work on
# each token by itself. So if attention hides the dropped tokens, the whole network does, and the class token,
# which is never dropped, comes out the same.
#
# `DynamicViT` takes forced decisions: `keep=[...]` has one mask (B, N) for each place where it drops tokens.
# In train mode they hold by masking, in eval mode by gathering. A token that one stage dropped stays dropped:
# each decision counts times the earlier ones. A new network has small logits. To test with large ones, we set
# the query and key weights by hand: a row after a layer norm has squared length $D$ (the width), so weights
# of variance spread$/D$ give queries and keys of variance spread, and logits of that spread.

# %%
def network(spread, official=False):
    """A DynamicViT in float64 with 64 patches and 4 blocks, which drops tokens before blocks 1, 2 and 3;
    random weights."""
    model = tt.models.DynamicViT(image_size=16, patch_size=2, dim=32, depth=4, heads=2,
                                 prune_before=(1, 2, 3),
                                 keep_ratios=(0.7, 0.49, 0.343), official=official).astype("float64")
    chance = np.random.default_rng(here.seed)
    for _, p in model.named_parameters():
        p.data += 0.1 * chance.standard_normal(p.shape)  # no bias stays 0: zeros hide mistakes
    for block in model.blocks:
        weight = block.attn.qkv.weight.data  # (3 D, D): the rows of queries, keys, values
        width = weight.shape[1]
        weight[:2 * width] = chance.standard_normal((2 * width, width)) * math.sqrt(spread / width)
    return model


def nested(batch, counts, tokens=64):
    """Decisions of several stages: counts[s] tokens are left after stage s."""
    order = np.array([rng.permutation(tokens) for _ in range(batch)])
    return [(order < count).astype(float) for count in counts]


worst_model, batch = 0.0, here.pick(2, 8, 32)
images = rng.standard_normal((batch, 3, 16, 16))
for spread in (1, 5, 20):
    for counts in ((44, 31, 21), (20, 3, 1), (64, 64, 64)):
        model, keep, upstream = network(spread), nested(batch, counts), rng.standard_normal((batch, 10))
        by_mask, by_gather = model.train()(images, keep=keep).logits, model.eval()(images, keep=keep).logits
        gradients = [tt.grad((logits * upstream).sum(), model.parameters())
                     for logits in (by_mask, by_gather)]
        worst_model = max(worst_model, off(by_mask.data, by_gather.data),
                          *(off(a, b) for a, b in zip(*gradients)))
print(f"DynamicViT, class logits and the gradient of every weight, spreads 1 to 20: largest difference "
      f"{worst_model:.1e}")
assert worst_model < 1e-12

# %% [markdown]
# ## The official formula
#
# The official code of DynamicViT masks with
#
# $$A^{\text{off}}_{ij} = \frac{K_{ij}\, e^{a_{ij} - m'_i} + \varepsilon / n}{\sum_l K_{il}\, e^{a_{il} -
# m'_i} + \varepsilon}, \qquad m'_i = \max_l a_{il}, \quad \varepsilon = 10^{-6},$$
#
# with $n$ the number of keys. The maximum runs over **all** keys, also the dropped ones. What does that do?
# Call $m_i$ the maximum over the visible keys, $\Delta_i = m'_i - m_i \ge 0$ the gap, and $S_i = \sum_l
# K_{il} e^{a_{il} - m_i}$ ($S_i \ge 1$: the largest visible key adds 1). For every $l$, $e^{a_{il} - m'_i} =
# e^{-\Delta_i} e^{a_{il} - m_i}$. So, leaving out the index $i$,
#
# $$A^{\text{off}}_j = \frac{e^{-\Delta} K_j e^{a_j - m} + \varepsilon/n}{e^{-\Delta} S + \varepsilon}
#  = \underbrace{\frac{e^{-\Delta} S}{e^{-\Delta} S + \varepsilon}}_{1 - \lambda} \cdot
#  \underbrace{\frac{K_j e^{a_j - m}}{S}}_{A_j}
#  + \underbrace{\frac{\varepsilon}{e^{-\Delta} S + \varepsilon}}_{\lambda} \cdot \frac 1 n .$$
#
# The official weights are a mixture of the exact ones and of **looking everywhere alike, dropped tokens
# included**. The share $\lambda$ of the latter is about $\varepsilon$ while no dropped key stands out, and
# passes one half at $\Delta = \ln(S / \varepsilon)$, which is 13.8 for $S = 1$. From there on the row looks
# mostly at nothing in particular. We check this against the op with `official=True`, and then plot what it
# means.

# %%
EPS = 1e-6


def mixture_share(q, k, keep):
    """(gap, lambda), each (B, H, T): how far the largest key stands above the largest visible one, and what
    that does."""
    a = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    seen = np.maximum(keep[:, None, None, :], np.eye(a.shape[-1])) > 0
    m = a.max(axis=-1, where=seen, initial=-np.inf)
    gap, S = a.max(axis=-1) - m, np.exp(np.where(seen, a - m[..., None], -np.inf)).sum(axis=-1)
    return gap, EPS / (np.exp(-gap) * S + EPS)


def official_against_exact(spread, batch, tokens=64, count=20):
    """Per kept row: gap, lambda, and half the sum of |A_official - A|, the share of weight that is in the
    wrong place."""
    keep, (q, k, v, _) = masks(batch, tokens, count), draw(spread, (batch, 2, tokens, 8))
    exact, official = (tt.ops.attention(q, k, v, keep, official=form, weights=True)[1].data
                       for form in (False, True))
    gap, share = mixture_share(q, k, keep)
    assert np.abs(official - ((1 - share[..., None]) * exact + share[..., None] / tokens)).max() < 1e-12
    rows = np.broadcast_to(keep[:, None] > 0, gap.shape)
    return gap[rows], share[rows], 0.5 * np.abs(official - exact).sum(axis=-1)[rows]


def logits_off(spread, batch):
    """Per picture, the whole network in train mode against gathering: largest difference of a class logit,
    for the exact and the official mask, in units of the logits' standard deviation; and whether the official
    mask names another class."""
    images, keep = rng.standard_normal((batch, 3, 16, 16)), nested(batch, (44, 31, 21))
    with tt.no_grad():
        true = network(spread).eval()(images, keep=keep).logits.data
        exact, official = (network(spread, official=form).train()(images, keep=keep).logits.data
                           for form in (False, True))
    exact_off, official_off = (np.abs(logits - true).max(axis=1) / true.std() for logits in (exact, official))
    return exact_off, official_off, official.argmax(axis=1) != true.argmax(axis=1)


MANY_SPREADS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 14.0, 20.0)
spreads = here.pick((1.0, 20.0), MANY_SPREADS, MANY_SPREADS)
rows = [official_against_exact(s, here.pick(4, 32, 128)) for s in spreads]
pictures = [logits_off(s, here.pick(2, 50, 200)) for s in spreads]
print("spread   weight in the wrong place, kept rows      class logits of the network, per picture      "
      "another class")
print("          median    99 %    largest               exact: largest    official: median, largest")
official_table = []
for s, (gap, share, wrong), (exact_off, official_off, changed) in zip(spreads, rows, pictures):
    print(f"{s:6} {np.median(wrong):10.1e} {np.quantile(wrong, 0.99):8.1e} {wrong.max():8.1e} "
          f"{exact_off.max():22.1e} "
          f"{np.median(official_off):18.1e} {official_off.max():8.1e} {changed.mean():19.0%}")
    official_table.append({
        "spread": s, "weight_off_median": float(np.median(wrong)), "weight_off_largest": float(wrong.max()),
        "logits_off_exact": float(exact_off.max()),
        "logits_off_official_median": float(np.median(official_off)),
        "logits_off_official_largest": float(official_off.max()), "another_class": float(changed.mean())})
    assert exact_off.max() < 1e-12

# %%
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by colour-blind readers too


def draw_official(figure):
    left, right = figure.subplots(1, 2)
    gap, share, _ = (np.concatenate(part) for part in zip(*rows))
    left.plot(gap[::7], share[::7], ".", ms=3, color=ORANGE, label="kept rows of all spreads")
    line = np.linspace(0, gap.max(), 300)
    left.plot(line, EPS / (np.exp(-line) + EPS), color=BLUE,
              label=r"$\varepsilon\,/\,(e^{-\Delta} + \varepsilon)$, one visible key ($S = 1$)")
    left.axvline(math.log(1 / EPS), color=GREY, ls=":", label=r"$\Delta = \ln(1 / \varepsilon) = 13.8$")
    left.set(yscale="log", xlim=(-1, 40), ylim=(1e-8, 2), xlabel=r"gap $\Delta$: largest key above the "
                                                                 r"largest visible one",
             ylabel=r"share $\lambda$ of looking everywhere alike", title="A dropped key that stands out "
                                                                          "spoils its rows")
    left.legend(fontsize=8, loc="lower right")
    right.plot(spreads, [np.median(p[1]) for p in pictures], "o-", color=ORANGE, label="official mask, "
                                                                                       "median picture")
    right.plot(spreads, [p[1].max() for p in pictures], "^--", color=ORANGE, label="official mask, worst "
                                                                                   "picture")
    right.plot(spreads, [p[0].max() for p in pictures], "s-", color=BLUE, label="exact mask, worst picture")
    right.set(xscale="log", yscale="log", xlabel="spread (standard deviation) of the attention logits",
              ylabel="class logits: |masked - gathered| / their spread", title="Training by masking against "
                                                                               "removing")
    right.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    right.minorticks_off()
    right.legend(fontsize=8, loc="center right")


here.picture("official", draw_official, width=11, height=4.3)

# %% [markdown]
# Left: the points are measured rows. They lie on or below the line: $S$ is 1 or more, and a larger $S$ makes
# the share smaller. Right: the exact mask stays at rounding whatever the spread. The official one does no
# harm while logits are small. With the spread its error grows by orders of magnitude: first in single
# pictures, in which a row that matters has lost its keys, in the end in most. There it trains another network
# than the one that is used later. Which spread does a trained network have? That is measured at the end of
# part "What the slopes know".
#
# ## The slope of a decision
#
# So far the mask was given. In DynamicViT a small network decides, and must learn which decisions were good.
# It learns from $\partial L / \partial D_j$: how would the loss $L$ change if a little more of token $j$ were
# let in? A gather cannot say: rows are there or not, there is no number to vary. Nor can a boolean mask. But
# $K_{ij}$ above is a number, and $A$ is smooth in it. Write $Z_i = \sum_l K_{il} e^{a_{il}}$, so $A_{ij} =
# K_{ij} e^{a_{ij}} / Z_i$. Differentiate with respect to one $K_{ij}$ (it stands above in column $j$, and in
# $Z_i$ in every column $l$):
#
# $$\frac{\partial A_{il}}{\partial K_{ij}} = \frac{[l = j]\, e^{a_{il}}}{Z_i} - \frac{K_{il}
#  e^{a_{il}}}{Z_i^2}\, e^{a_{ij}} = \frac{e^{a_{ij}}}{Z_i} \big([l = j] - A_{il}\big),$$
#
# where $[l = j]$ is 1 if true, else 0. With $u_{il} = \partial L / \partial A_{il}$, which is $g_i \cdot v_l$
# for an upstream gradient $g$ of the output,
#
# $$\frac{\partial L}{\partial K_{ij}} = \frac{e^{a_{ij}}}{Z_i} \Big(u_{ij} - \sum_l u_{il} A_{il}\Big),
#  \qquad \frac{\partial L}{\partial D_j} = \sum_{i \ne j} \frac{\partial L}{\partial K_{ij}}$$
#
# (without $i = j$, because $K_{jj} = 1$ whatever $D_j$ is; with several heads, summed over them too). Read
# it: what would token $j$ bring, compared with what the row gets on average now, times how much weight it
# would draw.
#
# **Which tokens receive it? All of them.** Nothing in it asks for $K_{ij} = 1$. A dropped token $j$ has
# weight $A_{ij} = 0$, but its factor $e^{a_{ij}} / Z_i$ is not 0. Without that, a token that was dropped once
# would never learn that it should have been kept. Compare the other masks: where logits are lowered by 1000,
# $D_j$ acts only through $A_{ij}$, and its slope is $1000\, A_{ij} (u_{ij} - \dots)$, which is $e^{-1000}$,
# so 0, for a dropped token. Adding $\ln K_{ij}$ to the logits gives the same $A$ as ours, but its slope is
# $A_{ij} (u_{ij} - \dots) / K_{ij} = 0 / 0$.

# %%
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
# One thing is special about the kept ones. Multiply all $K_{ij}$ of a row by the same number: $A$ does not
# change. So the slope in that direction is 0, $\sum_j K_{ij}\, \partial L / \partial K_{ij} = 0$: within a
# row the slopes of the kept tokens sum to zero. They compare kept tokens with one another, and cannot all say
# "more of us". Toward a dropped token there is no such bound. (The diagonal, which $D$ does not move, breaks
# the rule for the sum over all rows, so we check it with `sees_itself=False`, which leaves out $K_{ii} = 1$.)

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
# Now $e^{a_{ij}} / Z_i$ for a dropped key that stands $\Delta$ above the strongest kept one: it is $e^\Delta$
# or so, without bound. The smallest case shows it: one row, a kept key with logit 0, a dropped one with logit
# $\Delta$. Letting the dropped key in with $K$ gives it the weight $K e^\Delta / (1 + K e^\Delta)$. At $K =
# 0$ the slope of that is $e^\Delta$, but the whole way from $K = 0$ to $K = 1$ changes it by less than 1. A
# decision goes the whole way, so a slope of $e^\Delta$ promises what the step cannot hold. And it is not only
# wrong but dangerous: AdamW squares gradients, and in float32 $e^{2 \Delta}$ is infinite from $\Delta = 44.4$
# on.
#
# The op therefore uses $e^{\min(a_{ij} - m_i, 0)}$ in place of $e^{a_{ij} - m_i}$ there: **a dropped key
# counts at most as much as the strongest kept one.** For soft keeps nothing changes (all keys are visible,
# none is above the maximum), nor for hard ones where no dropped key is above it. The official formula divides
# by $e^{-\Delta} S + \varepsilon$, so its slope grows to the order of $1 / \varepsilon$, a million.

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
# A slope is a statement about a small step, a decision is a whole one. Does $\partial L / \partial D_j$ say
# anything about what flipping $D_j$ does? We train a small ViT on scenes, let it see 16 of the 64 patches of
# each test picture, drawn by chance, and compare two things for every patch: what the slope predicts (minus
# the slope if the patch is dropped by the flip, plus the slope if it is let in), and the true change of the
# loss when that one decision is flipped. All slopes of a picture come from one backward pass. The true
# changes need 64 more forward passes.

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
# And how large are the logits of this trained network, and does the official mask harm it?

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
# Left: a perfect prediction would lie on the line. Signs mostly agree. Sizes agree less, and for kept patches
# the slope says too little. Why: as a function of its own $K$, a token of strength $e$ beside others of total
# strength $R$ has the weight $K e / (R + K e)$. The slope of that is $e / R$ at $K = 0$ and $e R / (R + e)^2$
# at $K = 1$, while the whole way from 0 to 1 brings $e / (R + e)$, which lies between the two. The first bit
# of a token brings more than the last.
#
# By the same reasoning the slope toward a dropped patch says too much, and without the cap it does: a few
# patches stand far above the kept ones, and the line "no cap" shows what they do to the size of the
# predictions and to their correlation with the truth. The cap repairs most of that, and leaves the sign
# nearly as it is.
#
# Right: where is the dark purple? Mostly on dropped patches of the objects. Only a quarter of the patches was
# seen, and the gradient points at what was missed. This is what lesson 07 learns from.
#
# ## What was measured

# %%
worst = max(official_table, key=lambda row: row["spread"])
here.says(f"Masked and gathered networks differ by at most {worst_model:.0e}, gradients included. With the "
          f"official mask, at logits of standard deviation {worst['spread']:.0f}, "
          f"{100 * worst['another_class']:.0f} % of pictures get another class.")
here.measured(largest_difference_op=worst_op, largest_difference_model=worst_model, shortcuts=shortcuts,
              official=official_table,
              vit_accuracy=vit_accuracy, slopes=found, let_in=let_in, let_in_error=error,
              squares_at_dropped=squares,
              trained_spreads=trained_spreads, trained_difference=trained, pictures=count)
print(f"masked against gathered, float64: op {worst_op:.1e}, DynamicViT {worst_model:.1e} (values and "
      f"gradients)")
for row in [row for row in official_table if row["spread"] in (1, 5, 10, 20)]:
    print(f"official mask at spread {row['spread']:4}: class logits off by "
          f"{row['logits_off_official_median']:.1e} of "
          f"their spread in the median picture, another class in {row['another_class']:.0%}")
for name, numbers in found.items():
    print(f"{name}: slope and true change have the same sign in {numbers['same sign']:.0%}, "
          f"correlation {numbers['correlation']:.2f}")

# %% [markdown]
# The official formula is harmless as long as logits stay small, as they do in a small network after a short
# training; nothing keeps them small, though, and nothing tells when they no longer are. Whether training
# comes out differently is measured in lesson 07.
#
# ## Exercises
#
# 1. In `masked_weights`, take the maximum over all keys instead of the visible ones. Let a dropped key stand
#    out by 10, 100 and
#    1000. From where on does a row become NaN, and why? Then do it in float32.
# 2. Masking after the softmax can be repaired: divide each row by its sum. Show on paper that this is the
#    exact mask. Then find a gap at which it fails in float32, and say what the official $\varepsilon$ was
#    meant to prevent.
# 3. Drop every token: `keep = np.zeros(T)`. What do `masked_weights`, the op, and the op with
#    `sees_itself=False` give? What should they give?
# 4. A ViT may average all tokens instead of reading a class token. Write the average so that masking is
#    removing, check it against gathering to 1e-12, and decide what it should return for a picture that lost
#    every token.
# 5. Measure the share of pictures that the official mask classifies otherwise in `logits_off` when eps is
#    1e-12, 1e-9 and 1e-3 (set `tt.ops.attend.OFFICIAL_EPS`, and `EPS` above to match). Use $\Delta = \ln(S /
#    \varepsilon)$ to predict the spread at which each begins to fail.
# 6. Flip the two decisions with the most negative predictions at once. Is the change the sum of both? Find a
#    pair of patches for which it is far from it, look at the picture, and explain.
#
# ## The paper
#
# DynamicViT (Rao et al. 2021, arXiv 2106.02034), section 3.3, attention masking, equations 10 and 11, beside
# our lines in `tinytoken/ops/attend.py`; $P$ are the paper's logits, $\hat D$ its decisions:
#
# | paper | ours |
# |---|---|
# | $G_{ij} = 1$ if $i = j$, else $\hat D_j$ (eq. 10) | `seen = seen + (1 - seen) * itself` |
# | $\tilde A_{ij} = e^{P_{ij}} G_{ij} / \sum_k e^{P_{ik}} G_{ik}$ (eq. 11) | `A = slope * seen`, `slope` being $e^{a - m} / Z$ |
# | the slope toward $G$ (not written out there) | `centred * slope`, with `centred` $= u - \sum u A$ |
#
# The paper's equation has no $\varepsilon$: ours is the paper's. The $\varepsilon$ and the maximum over all
# keys are the official code's (`official=True`, kept for its weights).

# %%
here.end()
