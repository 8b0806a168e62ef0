# %% [markdown]
# # Lesson 05: Masking is removing
# After this lesson you can hide tokens so that nothing of them is left, and you can test whether a mask that
# somebody gives you does that. Lesson 05b goes on from here: how does the decision to hide a token get a
# gradient?

# %%
import math

import numpy as np

import tinytoken as tt
from tinytoken.experiments import lesson

here = lesson.begin("05_masking_is_removing")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## Two ways to do without a token
#
# Most patches of a picture show nothing that its class depends on. DynamicViT (lesson 07) drops such tokens
# between the blocks. There are two ways to do that, and DynamicViT needs both:
#
# - **Gather.** Copy the rows of the kept tokens into a shorter array, and continue with that array. This
#   saves work, so it is what we do at inference.
# - **Mask.** Leave all rows where they are, and make sure that no kept token looks at a dropped one. This
#   saves nothing. But in training it is needed, for two reasons. Every picture drops a different number of
#   tokens, and rows of different lengths do not fit into one array. And the network that decides what to drop
#   must learn from a gradient, which a gather does not give it.
#
# So the network is trained by masking and used by gathering. If the two do not compute the same, we train one
# network and use another. The rule in this package is that they are equal, up to rounding. This lesson builds
# the mask that does it, and then looks at masks that do not.
#
# The symbols, for one head:
#
# - T tokens, with queries q, keys k and values v of shape (T, d);
# - the logits a_ij = q_i . k_j / sqrt(d): token i looks at token j;
# - the decisions D_j, 0 or 1: 1 keeps token j;
# - the mask K_ij = D_j, but K_ii = 1, since a token always sees itself.
#
# Then the attention weights A and the output are
#
# $$A_{ij} = \frac{K_{ij} \, e^{a_{ij}}}{\sum_l K_{il} \, e^{a_{il}}},
#   \qquad \mathrm{out}_i = \sum_j A_{ij} v_j$$
#
# Why is this the same as removing? Take a row i that is kept. In this row, K_ij is 1 for all kept columns and
# 0 for all dropped ones. So the sum in the denominator runs over the kept columns only, and what is left is
# the softmax of the gathered logits, with zeros put in between. A dropped row has some output, too, but no
# kept row ever looks at it. Its K_ii = 1 only makes sure that the row is not 0 / 0.

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
# - **Multiply the dropped tokens by 0.** A token of zeros still has a key: k_j = W 0 + b = b. Even without a
#   bias its logit is 0, and e^0 = 1 counts as much as any other key. Zero is not "nothing". It is a point
#   like any other, and attention can go there.
# - **Multiply the weights by D_j after the softmax.** The dropped tokens were part of the sum in the
#   denominator. Their share is taken away and given to nobody. The rows no longer sum to 1, and the output
#   shrinks by the share that the dropped tokens had.
# - **Subtract 10 from the logits of dropped tokens.** Now they weigh e^-10 times as much. That is little,
#   until the logit of a dropped token is 10 larger than the kept ones.
# - **Subtract 1000.** Now e^-1000 is 0 in floating point, and this is removing. It is a common way to mask,
#   and it is fine where the mask is given. But lesson 05b shows that it leaves the decision without a
#   gradient.
# - **The formula of the official code.** It is close to ours, but has a small constant eps in it. It gets a
#   part of its own below.
#
# Whether a way fails depends on how far the logits lie apart. We call their standard deviation the
# **spread**, and try two values of it.

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
# ## The op, its values and its gradients
#
# `tt.ops.attention(q, k, v, keep)` is this mask for batches and heads: q, k, v are (B, H, T, d), `keep` is
# (B, T). Equal values are only half of the claim. The weights of the network must get the same gradients,
# too, or masking trains something else. Below, a random upstream gradient arrives at the kept rows (nobody
# reads the dropped ones). The gradients of q, k, v must be those of the gathered rows, and exactly 0 at the
# dropped rows.

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
# each token separately. So if attention hides the dropped tokens, the whole network does, and the class
# token, which is never dropped, comes out the same.
#
# `DynamicViT` is the model of lesson 07. All that we need of it here: it drops tokens before some of its
# blocks, and it takes the decisions from us. `keep=[...]` has one mask (B, N) for each place where it drops
# tokens. In train mode the model masks, in eval mode it gathers. A token that one stage has dropped stays
# dropped: each decision is multiplied by the earlier ones.
#
# A new network has small logits. To test with large ones, we set the weights of queries and keys by hand. A
# row after a layer norm has the squared length D (the width), so weights of variance spread / D give queries
# and keys of variance spread, and logits of that spread.

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
# The official code of DynamicViT masks with another formula. With n keys and eps = 10^-6,
#
# $$A^{\mathrm{off}}_{ij} = \frac{K_{ij} \, e^{a_{ij} - m'_i} + \mathrm{eps} / n}
#                                {\sum_l K_{il} \, e^{a_{il} - m'_i} + \mathrm{eps}},
#   \qquad m'_i = \max_l a_{il}$$
#
# The maximum runs over **all** keys, also the dropped ones. What does that do? We need three names:
#
#     m_i, the maximum over the visible keys
#     gap_i = m'_i - m_i >= 0
#     S_i = sum_l K_il e^(a_il - m_i) >= 1, since the largest visible key adds 1
#
# For every l we have e^(a_il - m'_i) = e^-gap_i e^(a_il - m_i). So, if we leave out the index i,
#
# $$\begin{aligned}
# A^{\mathrm{off}}_j &= \frac{e^{-\mathrm{gap}} K_j \, e^{a_j - m} + \mathrm{eps} / n}
#                            {e^{-\mathrm{gap}} S + \mathrm{eps}}
#                     = (1 - \mathrm{share}) \, A_j + \frac{\mathrm{share}}{n} \\
# \mathrm{share} &= \frac{\mathrm{eps}}{e^{-\mathrm{gap}} S + \mathrm{eps}}
# \end{aligned}$$
#
# The official weights are a mixture of the exact weights A_j and of **looking everywhere alike, dropped
# tokens included**. The share of the second part is about eps as long as no dropped key has a large logit. It
# is one half at gap = ln(S / eps), which is 13.8 for S = 1. From there on, the row looks mostly at nothing in
# particular. We check this formula against the op with `official=True`, and then plot what it means.

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
    left.plot(line, EPS / (np.exp(-line) + EPS), color=BLUE, label="one visible key (S = 1)")
    left.axvline(math.log(1 / EPS), color=GREY, ls=":", label="gap = ln(1 / eps) = 13.8")
    left.set(yscale="log", xlim=(-1, 40), ylim=(1e-8, 2),
             xlabel="gap: largest key above the largest visible one",
             ylabel="share of looking everywhere alike",
             title="A dropped key that stands out spoils its rows")
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
# Left: the points are measured rows. They lie on the line or below it, since S is 1 or more, and a larger S
# makes the share smaller. Right: the exact mask stays at rounding error, whatever the spread. The official
# mask does no harm while the logits are small. Its error grows by orders of magnitude with the spread: first
# in single pictures, where a row that matters has lost its keys, and in the end in most pictures. There it
# trains another network than the one that is used later. What spread does a trained network have? Lesson 05b
# measures it.
#
# ## What was measured

# %%
worst = max(official_table, key=lambda row: row["spread"])
here.says(f"Masked and gathered networks differ by at most {worst_model:.0e}, gradients included. With the "
          f"official mask, at logits of standard deviation {worst['spread']:.0f}, "
          f"{100 * worst['another_class']:.0f} % of pictures get another class.")
here.measured(largest_difference_op=worst_op, largest_difference_model=worst_model, shortcuts=shortcuts,
              official=official_table)
print(f"masked against gathered, float64: op {worst_op:.1e}, DynamicViT {worst_model:.1e} (values and "
      f"gradients)")
for row in [row for row in official_table if row["spread"] in (1, 5, 10, 20)]:
    print(f"official mask at spread {row['spread']:4}: class logits off by "
          f"{row['logits_off_official_median']:.1e} of "
          f"their spread in the median picture, another class in {row['another_class']:.0%}")


# %% [markdown]
# The official formula is harmless as long as the logits are small. But nothing keeps them small, and nothing
# tells you when they no longer are. Lesson 07 measures whether training with it comes out differently.
#
# ## Exercises
#
# 1. In `masked_weights`, take the maximum over all keys instead of the visible ones. Raise the logit of a
#    dropped key by 10, 100 and 1000. From where on does a row become NaN, and why? Then do it in float32.
# 2. Masking after the softmax can be repaired: divide each row by its sum. Show on paper that this is the
#    exact mask. Then find a gap at which it fails in float32, and say what the official eps was meant to
#    prevent.
# 3. Drop every token: `keep = np.zeros(T)`. What do `masked_weights`, the op, and the op with
#    `sees_itself=False` give? What should they give?
# 4. A ViT may average all tokens instead of reading a class token. Write the average so that masking is
#    removing, check it against gathering to 1e-12, and decide what it should return for a picture that lost
#    every token.
# 5. In `logits_off`, measure the share of pictures that the official mask classifies differently when eps is
#    1e-12, 1e-9 and 1e-3 (set `tt.ops.attend.OFFICIAL_EPS`, and `EPS` above to match). Use gap = ln(S / eps)
#    to predict the spread at which each of them begins to fail.
#
# ## The paper
#
# DynamicViT (Rao et al. 2021, arXiv 2106.02034), section 3.3, attention masking, equations 10 and 11, beside
# our lines in `tinytoken/ops/attend.py`. P are the paper's logits, D its decisions:
#
# | paper | ours |
# |---|---|
# | G_ij = 1 if i = j, else D_j (eq. 10) | `seen = seen + (1 - seen) * itself` |
# | A_ij = e^(P_ij) G_ij / sum_k e^(P_ik) G_ik (eq. 11) | `A = slope * seen`, `A /= total`, with `slope` = e^(a - m) |
#
# The paper's equation has no eps, and ours has none either. The eps and the maximum over all keys are those
# of the official code (`official=True`, kept for its weights).

# %%
here.end()
