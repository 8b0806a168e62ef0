# %% [markdown]
# # Lesson 03: Attention
# After this lesson you can write multi-head attention and its gradient in plain NumPy, and show that both are
# right.
#
# You need the tape of lesson 01 and the gradient checks of lesson 02. A *token* is a vector of numbers that
# stands for one piece of the input: a word, or (from lesson 04 on) a patch of a picture. With attention,
# tokens exchange information.

# %%
import numpy as np
import tqdm

import tinytoken as tt
from tinytoken.experiments import lesson, spread_text

here = lesson.begin("03_attention")
rng = np.random.default_rng(here.seed)
np.set_printoptions(precision=3, suppress=True)
BLUE, SKY, ORANGE, GREEN, RED, GREY = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#777777"

# %% [markdown]
# ## Softmax: scores become shares
#
# Attention gives every token a *score*, which says how much the token matters. A score can be any real
# number. The softmax turns the n scores x of one row into shares p, which are positive and sum to 1:
#
# $$p_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}$$
#
# Written like this, it fails for large scores: exp(1000) is larger than any float, and infinity / infinity is
# not a number. But adding a constant c to all scores changes nothing, since exp(x_i + c) = exp(c) exp(x_i),
# and exp(c) cancels. So we can choose c, and we choose minus the largest score. Then the largest exponent is
# 0, nothing overflows, and the sum is at least 1.

# %%
def softmax(x):
    """Shares over the last axis. The largest score is taken off first, so that exp cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


large = np.array([1000.0, 1001.0, 1002.0])
with np.errstate(over="ignore", invalid="ignore"):  # NumPy would warn: that is what we want to see
    naive = np.exp(large) / np.exp(large).sum()
print("scores", large, " as written:", naive, " with the maximum taken off:", softmax(large))
assert np.isnan(naive).all() and np.allclose(softmax(large), softmax(large - 1000), rtol=0, atol=1e-14)

# %% [markdown]
# **Its gradient.** By the quotient rule, with [i = j] for 1 if i = j and 0 otherwise,
#
# $$\frac{dp_i}{dx_j} = p_i \, ([i = j] - p_j)$$
#
# Let L be the loss and g_i = dL / dp_i the upstream gradient. The chain rule sums over all p_i, since each of
# them depends on x_j:
#
# $$\frac{dL}{dx_j} = \sum_i g_i p_i \, ([i = j] - p_j) = p_j \, \left( g_j - \sum_i g_i p_i \right)$$
#
# The last form needs no n x n matrix. What does it say? sum_i g_i p_i is the mean of g with the shares as
# weights. A score gets a gradient only if its g differs from that mean. The entries of the result sum to 0,
# because adding a constant to all scores changes nothing.

# %%
def softmax_vjp(p, g):
    """The gradient of the scores, from the shares p and the upstream gradient g. Rows are on the last
    axis."""
    return p * (g - (g * p).sum(axis=-1, keepdims=True))


x, g = rng.standard_normal((2, 5))
p = softmax(x)
jacobian = np.diag(p) - np.outer(p, p)  # entry (i, j) is dp_i / dx_j
assert np.allclose(g @ jacobian, softmax_vjp(p, g), rtol=0, atol=1e-14)
assert abs(softmax_vjp(p, g).sum()) < 1e-14
print("with the full matrix", g @ jacobian, " without", softmax_vjp(p, g))

# %% [markdown]
# ## Looking something up, softly
#
# A dictionary returns, for a query, the value whose key is equal to the query. Attention does the same with
# vectors, but in a soft way. The query q is compared with every key k_j by the dot product q . k_j. The
# softmax turns these scores into shares a_j, and the answer is the mean of the values v_j with these shares.
# Because it is soft, it has a gradient, and the model can learn what to look for.
#
# With Tq queries, Tk keys and Tk values, all with d numbers, this is two matrix products with a softmax
# between them:
#
# $$\begin{aligned}
# S &= \frac{Q K^T}{\sqrt{d}} && (T_q, d)(d, T_k) \to (T_q, T_k) && \text{the scores} \\
# A &= \mathrm{softmax}(S) && (T_q, T_k) && \text{the weights} \\
# O &= A V && (T_q, T_k)(T_k, d) \to (T_q, d) && \text{the answers}
# \end{aligned}$$
#
# The softmax takes each row, that is each query, by itself. Why the scores are divided is the next part.

# %%
def attention_by_hand(q, k, v):
    """q (..., Tq, d), k and v (..., Tk, d) -> the answers (..., Tq, d) and the weights (..., Tq, Tk)."""
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    weights = softmax(scores)
    return weights @ v, weights


keys = np.eye(3, 4)  # three keys, each in a direction of its own
values = np.array([[10.0, 0, 0, 0], [0, 20, 0, 0], [0, 0, 30, 0]])
for strength in (0, 2, 20):
    answer, weights = attention_by_hand(strength * keys[1:2], keys, values)
    print(f"a query of {strength:2} x key 1: weights {weights[0]}, answer {answer[0]}")

# %% [markdown]
# A query of length zero gets the plain mean of all values. The longer the query is, the closer the answer is
# to a single value.
#
# Attention knows nothing about order. If the keys and values are put in another order, the answers do not
# change. If the queries are put in another order, the answers are put in the same order. A model that needs
# the order must write it into the tokens (lesson 04).

# %%
q, k, v = rng.standard_normal((3, 6, 4))  # Tq = Tk = 6, d = 4
out, _ = attention_by_hand(q, k, v)
order = rng.permutation(6)
assert np.allclose(attention_by_hand(q, k[order], v[order])[0], out, rtol=0, atol=1e-13)
assert np.allclose(attention_by_hand(q[order], k, v)[0], out[order], rtol=0, atol=1e-13)

# %% [markdown]
# ## Why 1 / sqrt(d)
#
# Let the entries of q and k be independent, with mean 0 and variance 1. Then each product q_i k_i has mean 0
# and variance E[q_i^2] E[k_i^2] = 1, and q . k is a sum of d of them. Variances of independent terms add up,
# so q . k has variance d and standard deviation sqrt(d). For d = 64, scores of +-8 are normal. A softmax of
# such scores puts nearly all weight on one key before anything is learned. And if p is nearly 1 for one key
# and nearly 0 for all others, each entry p_i ([i = j] - p_j) of the softmax's Jacobian is nearly 0, and no
# gradient comes through. The trace of the Jacobian, sum_i p_i (1 - p_i) = 1 - sum_i p_i^2, measures how much
# gradient comes through.
#
# Dividing by sqrt(d) makes the variance 1 for every d. Dividing by d would be too much: for large d, all keys
# would get nearly the same share, whatever the query is.

# %%
SCALES = {"not divided": 0.0, "divided by sqrt(d)": 0.5, "divided by d": 1.0}  # the power of d
widths, keys_each = [4, 16, 64, 256, 1024], 64
queries = here.pick(50, 1000, 4000)
spread, largest, slope = [], {name: [] for name in SCALES}, {name: [] for name in SCALES}
for d in widths:
    dots = rng.standard_normal((queries, d)) @ rng.standard_normal((d, keys_each))
    spread.append(float(dots.std()))
    for name, power in SCALES.items():
        shares = softmax(dots / d ** power)
        largest[name].append(float(shares.max(axis=1).mean()))
        slope[name].append(float((1 - (shares ** 2).sum(axis=1)).mean()))

print(f"{queries} queries, {keys_each} keys\n{'d':>6}{'sqrt(d)':>10}{'std of q.k':>12}   largest share / "
      f"trace of the Jacobian")
for i, d in enumerate(widths):
    cells = [f"{name} {largest[name][i]:.2f} / {slope[name][i]:.2f}" for name in SCALES]
    print(f"{d:>6}{d ** 0.5:>10.1f}{spread[i]:>12.2f}   {'   '.join(cells)}")
here.measured(scale={"d": widths, "std_of_scores": spread, "largest_share": largest,
                     "trace_of_jacobian": slope})


# %%
def draw_scale(figure):
    left, middle, right = figure.subplots(1, 3)
    left.loglog(widths, np.sqrt(widths), color=GREY, linestyle="--", label="sqrt(d)")
    left.loglog(widths, spread, "o", color=BLUE, label="measured")
    left.set(title="scores spread as sqrt(d)", ylabel="standard deviation of q . k", yticks=[2, 4, 8, 16, 32],
             yticklabels=[2, 4, 8, 16, 32])
    for (name, color), marker in zip(zip(SCALES, (RED, BLUE, GREEN)), "s^o"):
        middle.semilogx(widths, largest[name], color=color, marker=marker, label=name)
        right.semilogx(widths, slope[name], color=color, marker=marker, label=name)
    middle.set(title=f"largest of {keys_each} shares", ylabel="mean over queries", ylim=(0, 1))
    right.set(title="what comes through backward", ylabel="trace of the softmax's Jacobian", ylim=(0, 1.05))
    for axis in (left, middle, right):
        axis.set(xlabel="d, numbers in a query", xticks=widths, xticklabels=widths)
        axis.minorticks_off()
    left.legend()
    right.legend(loc="lower left")


here.picture("scale", draw_scale, width=11)

# %% [markdown]
# Look at d = 64, the usual size of a head. Without the division, one key takes most of the weight and most of
# the slope is lost, before any training. After dividing by sqrt(d), both are about the same for every d.
#
# ## The gradient, line by line
#
# The forward pass again, for one head of one example, with c = 1 / sqrt(d):
#
#     S = c Q K^T      A = softmax(S)      O = A V
#
# We know G = dL/dO (Tq, d). We want dL/dQ (Tq, d), dL/dK (Tk, d) and dL/dV (Tk, d). Write <X, Y> = sum_ij
# X_ij Y_ij for two matrices with the same shape, and δX for a small change of X. The gradient of L with
# respect to X is the matrix M with δL = <M, δX>. So we take the change of each line, and move everything
# except the δ to the left side. One rule is enough for that:
#
#     <X, Y Z> = <Y^T X, Z> = <X Z^T, Y>         (each is sum_ijk X_ik Y_ij Z_jk)
#
# **O = A V**, so δO = A δV + δA V.
#
# $$\begin{aligned}
# \langle G, A \, \delta V \rangle &= \langle A^T G, \delta V \rangle
#     && \frac{dL}{dV} = A^T G && (T_k, T_q)(T_q, d) \to (T_k, d) && (1) \\
# \langle G, \delta A \, V \rangle &= \langle G V^T, \delta A \rangle
#     && U = \frac{dL}{dA} = G V^T && (T_q, d)(d, T_k) \to (T_q, T_k) && (2)
# \end{aligned}$$
#
# **A = softmax(S)**, row by row, from the part on the softmax:
#
# $$E_{ij} = \frac{dL}{dS_{ij}} = A_{ij} (U_{ij} - r_i), \quad r_i = \sum_j U_{ij} A_{ij} \qquad (3)$$
#
# **S = c Q K^T**, so δS = c δQ K^T + c Q δK^T.
#
# $$\begin{aligned}
# \langle E, c \, \delta Q \, K^T \rangle &= \langle c E K, \delta Q \rangle
#     && \frac{dL}{dQ} = c E K && (T_q, T_k)(T_k, d) \to (T_q, d) && (4) \\
# \langle E, c \, Q \, \delta K^T \rangle &= \langle c E^T Q, \delta K \rangle
#     && \frac{dL}{dK} = c E^T Q && (T_k, T_q)(T_q, d) \to (T_k, d) && (5)
# \end{aligned}$$
#
# U_ij = G_i . V_j says how fast the loss grows if token i takes more of value j. r_i is the mean of this with
# the present weights. So (3) says: gradient descent raises the scores of those values that are better than
# the present mean, in proportion to their present weights, and lowers the others.

# %%
def attention_vjp(q, k, v, weights, g):
    """The gradients of q, k and v, from the weights and the upstream gradient g of the answers. Axes before
    (T, d) go along."""
    c = 1 / q.shape[-1] ** 0.5
    d_v = weights.swapaxes(-1, -2) @ g                     # (1)
    d_weights = g @ v.swapaxes(-1, -2)                     # (2)
    d_scores = softmax_vjp(weights, d_weights)             # (3)
    d_q = c * d_scores @ k                                 # (4)
    d_k = c * d_scores.swapaxes(-1, -2) @ q                # (5)
    return d_q, d_k, d_v


@tt.op
def our_attention(q, k, v):
    out, weights = attention_by_hand(q, k, v)
    return out, lambda g: attention_vjp(q, k, v, weights, g)


# Tq, Tk and d all differ: a product in the wrong order could not even be formed.
q, k, v = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 6, 5)), rng.standard_normal((2, 3, 6, 5))
print(tt.gradcheck(our_attention, q, k, v))

# %% [markdown]
# The axes in front are a batch of 2 and 3 heads: `@` multiplies the last two axes for each of them. Finite
# differences say that our five lines are the gradient of our forward pass. The package's op is the same
# function with the same gradient:

# %%
Q, K, V = (tt.Tensor(x, requires_grad=True) for x in (q, k, v))
out, weights = attention_by_hand(q, k, v)
g = rng.standard_normal(out.shape)
theirs = tt.ops.attention(Q, K, V)
theirs.backward(g)
gaps = {"answers": np.abs(theirs.data - out).max()}
for name, tensor, ours in zip("QKV", (Q, K, V), attention_vjp(q, k, v, weights, g)):
    gaps[f"gradient of {name}"] = np.abs(tensor.grad - ours).max()
print("largest difference from tt.ops.attention:",
      ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items()))
assert max(gaps.values()) < 1e-12

# %% [markdown]
# ## Heads
#
# One softmax per token gives one mixture. A token that needs two things at once, for example the object to
# its left and the colour of the sky, would have to mix them into one mean. So the D numbers of a token are
# split into H *heads* of d = D / H numbers. Each head does its own attention, and the answers are put side by
# side again. Here are all steps for tokens X (T, D), without the biases:
#
#     [Q | K | V] = X W^T         (T, D)(D, 3 D) -> (T, 3 D)     what each token asks, offers and tells; W is (3 D, D)
#     split                       (T, D) -> (H, T, d)            each of Q, K and V
#     O = attention(Q, K, V)      (H, T, d)                      for each head
#     merge                       (H, T, d) -> (T, D)            a token's H answers side by side
#     Y = O P^T                   (T, D)(D, D) -> (T, D)         the heads' answers are mixed; P is (D, D)
#
# Splitting is a reshape and then a transpose. The D numbers of a token lie side by side in memory, so the
# reshape may only split that axis: (T, D) -> (T, H, d). Then the transpose moves the heads to the front.
# Merging undoes both steps in the opposite order.

# %%
def split(x, heads):
    """(B, T, D) -> (B, H, T, d)"""
    B, T, D = x.shape
    return x.reshape(B, T, heads, D // heads).transpose(0, 2, 1, 3)


def merge(x):
    """(B, H, T, d) -> (B, T, D)"""
    B, H, T, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * d)


x = rng.standard_normal((2, 5, 12))
assert np.array_equal(merge(split(x, 3)), x)
assert np.array_equal(split(x, 3), tt.ops.split_heads(x, heads=3).data)
assert np.array_equal(merge(split(x, 3)), tt.ops.merge_heads(split(x, 3)).data)

layer = tt.nn.Attention(dim=12, heads=3).astype("float64")
for p in layer.parameters():
    p.data += 0.3 * rng.standard_normal(p.shape)  # biases start at 0, and a zero would hide a mistake
x = rng.standard_normal((2, 5, 12))
q, k, v = (split(part, 3) for part in np.split(x @ layer.qkv.weight.data.T + layer.qkv.bias.data, 3, axis=2))
by_hand = merge(attention_by_hand(q, k, v)[0]) @ layer.proj.weight.data.T + layer.proj.bias.data
print(f"largest difference from tt.nn.Attention: {np.abs(by_hand - layer(x).data).max():.0e}")
assert np.abs(by_hand - layer(x).data).max() < 1e-12
names, parameters = zip(*layer.named_parameters())
print(tt.gradcheck(lambda x, *_: layer(x), x, *parameters, names=["x", *names], max_elements=200,
                   seed=here.seed))

# %% [markdown]
# Heads cost no extra multiply-adds. For each head, the two products cost T T d multiply-adds each, so all
# heads together cost 2 T^2 H d = 2 T^2 D, for any number of heads. (There is another price: each head
# compares vectors with a smaller d.) The package counts what really ran:

# %%
T, D = 65, 96
for heads in (1, 3, 12):
    counted = tt.macs(tt.nn.Attention(D, heads), np.zeros((1, T, D), "float32"))
    print(f"{heads:>2} heads: {counted.by_op['attention']:,} multiply-adds in attention, "
          f"{counted.by_op['linear']:,} around it")
    assert counted.by_op["attention"] == 2 * T**2 * D and counted.by_op["linear"] == 4 * T * D**2

# %% [markdown]
# ## A wrong merge
#
# It is tempting to merge (H, T, d) into (T, D) with only a reshape: the sizes fit, and there is no error.
# Where do the numbers go? Label each number with the place that it comes from, and merge in both ways. We
# take H = 2, T = 8 and d = 1, so the answer of each head is one number.

# %%
def wrong_merge(x):
    """(B, H, T, d) -> (B, T, D): the transpose is missing."""
    B, H, T, d = x.shape
    return x.reshape(B, T, H * d)


H, T = 2, 8
token_of = np.broadcast_to(np.arange(T)[:, None], (1, H, T, 1))
head_of = np.broadcast_to(np.arange(H)[:, None, None], (1, H, T, 1))


def draw_merges(figure):
    for axis, function, title in zip(figure.subplots(1, 2), (merge, wrong_merge),
                                     ("right", "wrong: reshape without transpose")):
        token, head = function(token_of)[0], function(head_of)[0]  # (T, H): whose answer lies in this place
        axis.imshow(token, cmap="viridis", vmin=-1, vmax=T, aspect="auto")
        for place in np.ndindex(T, H):
            axis.text(place[1], place[0], f"head {head[place]} of token {token[place]}", ha="center",
                      va="center",
                      color="black" if token[place] > T / 2 else "white")
        axis.set(title=title, xlabel="slot of the output token", ylabel="output token", xticks=range(H),
                 yticks=range(T))


here.picture("merge", draw_merges, height=4.5)

# %% [markdown]
# On the left, each output token has its own two answers. On the right, it has answers of only one head, to
# the questions of other tokens: output token 3 gets what tokens 6 and 7 have found.
#
# What do the checks say? Take three layers: the right one; one with the wrong merge; and one whose merge is
# right, but whose vjp has the reshape without the transpose. And take three checks: finite differences; each
# head computed separately and written into its columns; and tokens in another order, which must give the same
# answers in that order.

# %%
@tt.op
def merge_with_wrong_vjp(x):
    return merge(x), lambda g: g.reshape(x.shape)


def attend_and_merge(x, merging):
    """x (B, T, 3 D): packed queries, keys and values, two heads -> (B, T, D)."""
    return merging(tt.ops.attention(*tt.ops.split_heads(x, heads=2, parts=3)))


def passes_differences(function, x):
    try:
        tt.gradcheck(function, x, names=["x"])
    except tt.GradientError as error:
        print(f"{error}\n")
        return False
    return True


x = rng.standard_normal((1, 4, 12))  # T = 4, D = 4, two heads of d = 2
# In order: queries of head 0 and of head 1, then their keys, then their values. Every second piece belongs to
# one head.
alone = np.concatenate([attention_by_hand(*np.split(x, 6, axis=2)[head::2])[0] for head in range(2)], axis=2)
mergings = {"right": tt.ops.merge_heads,
            "wrong merge": lambda out: out.reshape(out.shape[0], out.shape[2], -1),
            "wrong vjp": merge_with_wrong_vjp}
checks, moved = {}, [2, 0, 3, 1]
for name, merging in mergings.items():
    out = attend_and_merge(x, merging).data
    checks[name] = {"finite differences": passes_differences(lambda x: attend_and_merge(x, merging), x),
                    "heads alone": bool(np.allclose(out, alone)),
                    "tokens moved": bool(np.allclose(attend_and_merge(x[:, moved], merging).data,
                                                     out[:, moved]))}

print(f"{'':<12}" + "".join(f"{check:>20}" for check in checks["right"]))
for name, row in checks.items():
    print(f"{name:<12}" + "".join(f"{'passes' if passed else 'FAILS':>20}" for passed in row.values()))
assert all(checks["right"].values())
assert checks["wrong merge"] == {"finite differences": True, "heads alone": False, "tokens moved": False}
assert checks["wrong vjp"] == {"finite differences": False, "heads alone": True, "tokens moved": True}
here.measured(checks_passed=checks)

# %% [markdown]
# The message above could not say what kind of mistake it is, because the mistake of the merge went through
# attention and the split before it reached x. If you check the small piece alone, the message names the
# mistake:

# %%
assert not passes_differences(merge_with_wrong_vjp, rng.standard_normal((1, 2, 4, 3)))

# %% [markdown]
# Neither kind of check replaces the other. **A gradient check says that the gradient belongs to the function,
# not that the function is the one you wanted**: the wrong merge has a correct gradient of a wrong function.
# So you also need a check of the values: against a slower way to compute them, or against a property that
# they must have. The third check needs no reference at all: attention does not know the order, so tokens in
# another order must give the same answers in that order.
#
# ## A task that attention can learn
#
# Each sequence has 8 tokens. A token has a *key* (every key 0 to 7 occurs once, in random order), a *value*
# (any of 0 to 7), and two keys that it *wants*. Its two answers are the values of the tokens with those keys.
# All of this is written as one-hot vectors side by side, 4 x 8 numbers. There are no positions, and none are
# needed.

# %%
SYMBOLS = 8  # tokens in a sequence, keys, and values


def sequences(rng, count):
    """-> tokens (count, T, 32) float32, answers (count, T, 2), and the places (count, T, 2) where they
    stand."""
    keys = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)  # (count, T)
    values = rng.integers(SYMBOLS, size=(count, SYMBOLS))
    wanted = rng.integers(SYMBOLS, size=(count, SYMBOLS, 2))
    rows = np.arange(count)[:, None, None]
    places = keys.argsort(axis=1)[rows, wanted]  # argsort of a permutation: at which place each key stands
    one_hot = np.eye(SYMBOLS, dtype="float32")
    tokens = np.concatenate([one_hot[s] for s in (keys, values, wanted[..., 0], wanted[..., 1])], axis=2)
    return tokens, values[rows, places], places


class Recall(tt.nn.Module):
    """One layer of attention, then a linear layer. tokens (B, T, 32) -> logits (B T 2, 8), and the weights
    (B, H, T, T)."""

    def __init__(self, heads, merging=tt.ops.merge_heads, looks=True):
        self.heads, self.merging, self.looks = heads, merging, looks
        self.qkv = tt.nn.Linear(4 * SYMBOLS, 3 * 32, parts=3)  # D = 32
        self.head = tt.nn.Linear(32, 2 * SYMBOLS)
        tt.nn.initialise(self)

    def forward(self, tokens):
        q, k, v = tt.ops.split_heads(self.qkv(tokens), heads=self.heads, parts=3)
        if not self.looks:
            q = q * 0.0  # all scores are 0: every token gets the plain mean of all values
        out, weights = tt.ops.attention(q, k, v, weights=True)
        return self.head(self.merging(out)).reshape(-1, SYMBOLS), weights


# %% [markdown]
# What can a model reach? Try to answer before you read on:
#
# - Without attention to other tokens, the best guess is the value that occurs most often in the sequence.
# - One head can look at one of the two wanted tokens. For the other answer it can only repeat that value,
#   which is right if both wanted keys are the same (1 in 8), or else by chance (1 in 8 again): 15 in 64. Or
#   it can look at both with half of its weight each, and not know which value belongs to which. Both come to
#   79 of 128 answers, 61.7 %.
# - Two heads can find both.
# - With the wrong merge, it does not matter what the heads find: it is delivered to other tokens.
#
# The training loop: `loss_and_grads` runs the model forward and backward on a batch and leaves the gradients
# with the parameters, `AdamW` is gradient descent with a step size of its own for each number, and
# `warmup_cosine` lets the learning rate rise for the first tenth of the steps and then fall to 0.

# %%
ARMS = {"no looking": dict(heads=2, looks=False), "one head": dict(heads=1), "two heads": dict(heads=2),
        "two heads, wrong merge": dict(heads=2, merging=mergings["wrong merge"])}
COLORS = dict(zip(ARMS, (GREY, ORANGE, BLUE, RED)))
steps, seeds = here.pick(25, 300, 1000), [here.seed + i for i in range(here.pick(1, 3, 5))]
tests = sequences(np.random.default_rng([here.seed, 1]), here.pick(200, 2000, 2000))


def train(arm, seed):
    """-> the trained model, and its loss at every step."""
    tt.manual_seed(seed)
    model, rng, losses = Recall(**ARMS[arm]), np.random.default_rng([seed, 0]), []
    optimizer = tt.optim.AdamW(model.parameters(), weight_decay=0)

    def loss_of(tokens, answers):
        return tt.ops.cross_entropy(model(tokens)[0], answers.reshape(-1))

    for step in tqdm.trange(steps, desc=f"{arm}, seed {seed}"):
        tokens, answers, _ = sequences(rng, 64)
        loss, _ = tt.train.loss_and_grads(loss_of, optimizer.params, (tokens, answers), micro=64, threads=1)
        optimizer.step(1e-2 * tt.optim.warmup_cosine(step, steps))
        losses.append(loss)
    return model, losses


models, curves, right = {}, {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
for arm in ARMS:
    for seed in seeds:
        model, losses = train(arm, seed)
        with tt.no_grad():
            logits, _ = model(tests[0])
        # (T, 2)
        right[arm].append((logits.data.argmax(axis=1).reshape(tests[1].shape) == tests[1]).mean(axis=0))
        curves[arm].append(losses)
        models.setdefault(arm, model)

# %%
values = tests[1].reshape(-1)
# of each value
counts = np.random.default_rng(here.seed).multinomial(SYMBOLS, [1 / SYMBOLS] * SYMBOLS, size=100_000)
best = {"no looking": counts.max(axis=1).mean() / SYMBOLS, "one head": 79 / 128, "two heads": 1.0}
summary, reached = {}, {arm: 100 * np.mean(right[arm], axis=(1, 2)) for arm in ARMS}  # by each seed
for arm, each in reached.items():
    both = 100 * np.mean(right[arm], axis=1)  # (seeds, 2): first and second answer
    summary[arm] = {"right_percent": float(each.mean()), "std_over_seeds": float(each.std(ddof=1))
                    if len(each) > 1 else None,
                    "expected_percent": 100 * best[arm] if arm in best else None,
                    "first_loss": curves[arm][0][0],
                    "last_loss": float(np.mean([losses[-10:] for losses in curves[arm]])),
                    "each_answer_of_seed": both.tolist()}
    expected = f"expected {100 * best[arm]:.1f} %" if arm in best else ""
    print(f"{arm:<24} right {spread_text(each):>11} %  {expected:<18} loss {summary[arm]['first_loss']:.2f} "
          f"-> {summary[arm]['last_loss']:.2f}   first / second answer by seed: "
          + ", ".join(f"{a:.0f} / {b:.0f}" for a, b in both))
here.measured(steps=steps, seeds=seeds, test_answers=values.size, recall=summary,
              wrong_merge_right_by_token=np.mean(right["two heads, wrong merge"], axis=(0, 2)).tolist())

# %% [markdown]
# Two heads find both. One head reaches what we expected, in one way or the other: compare the first and the
# second answer for each seed. The wrong merge **trains**: there is no error, the gradient passes the check,
# and the loss falls. But it ends about where a model ends that looks at nothing, and nothing in the run tells
# you so.
#
# The picture of the merge even predicts where it is a little better. Output token 0 has the answers of head 0
# to tokens 0 and 1, and output token 7 has the answers of head 1 to tokens 6 and 7. Only these two tokens get
# something that they have asked for themselves.

# %%
def draw_recall(figure):
    left, right_axis = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for arm, runs in curves.items():
        for losses in runs:
            left.plot(losses, color=COLORS[arm], linewidth=0.5, alpha=0.5)
        left.plot(np.mean(runs, axis=0), color=COLORS[arm])
    left.axhline(np.log(SYMBOLS), color="black", linestyle=":", linewidth=1, label="all answers alike: log 8")
    left.set(title="all four train", xlabel="step", ylabel="loss (thin: each seed)")
    left.legend(loc="center right")
    for (arm, found), marker in zip(right.items(), "vso^"):
        right_axis.plot(100 * np.mean(found, axis=(0, 2)), color=COLORS[arm], marker=marker, label=arm)
    right_axis.set(title="right answers, by output token", xlabel="output token", ylabel="% of test answers",
                   ylim=(0, 103))
    right_axis.legend(loc="center", bbox_to_anchor=(0.5, 0.8))


here.picture("recall", draw_recall)

# %% [markdown]
# **What the heads look at.** The weights of the two-head model for one test sequence. Each row is a token
# that asks; the marks show where its first and its second wanted key stand.

# %%
tokens, _, places = tests
tt.manual_seed(seeds[0])  # the same start as the trained one had
with tt.no_grad():
    _, maps = models["two heads"](tokens)
    _, maps_before = Recall(heads=2)(tokens)


def share_on_wanted(weights):
    """(heads, 2): the mean weight that each head puts on the first and on the second wanted token."""
    each = np.take_along_axis(weights, np.repeat(places[:, None], weights.shape[1], axis=1), axis=3)
    return each.mean(axis=(0, 2))


for name, weights in (("before training", maps_before.data), ("trained", maps.data)):
    print(f"{name}: weight on the first, second wanted token: "
          + ", ".join(f"head {h} {a:.2f}, {b:.2f}" for h, (a, b) in enumerate(share_on_wanted(weights))))
here.measured(weight_on_wanted={"before": share_on_wanted(maps_before.data).tolist(),
                                "trained": share_on_wanted(maps.data).tolist()})


def draw_maps(figure):
    panels = [("head 0, before", maps_before.data[0, 0]),
              ("head 0, trained", maps.data[0, 0]), ("head 1, trained", maps.data[0, 1])]
    axes = figure.subplots(1, 3)
    for axis, (title, weights) in zip(axes, panels):
        image = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1)
        for answer, (marker, color) in enumerate((("o", SKY), ("s", ORANGE))):
            axis.scatter(places[0, :, answer], np.arange(SYMBOLS), marker=marker, s=90 + 110 * answer,
                         facecolors="none",
                         edgecolors=color, linewidths=2, label=("first", "second")[answer] + " wanted")
        axis.set(title=title, xlabel="token looked at", ylabel="token that asks", xticks=range(SYMBOLS),
                 yticks=range(SYMBOLS))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)


here.picture("maps", draw_maps, width=11, height=4.4)

# %% [markdown]
# ## What was measured
#
# These are exact, and asserted above in every run: the softmax and its gradient, attention and its gradient
# against the package's op and finite differences, splitting and merging, multiply-adds that do not depend on
# the number of heads, and the results of the checks for the three merges. The table of the four models is
# statistical, with the spread over seeds.

# %%
share = {arm: f"{spread_text(each)} %" for arm, each in reached.items()}
here.says(f"Where two things must be looked up, two heads find {share['two heads']}, one head "
          f"{share['one head']} ({100 * best['one head']:.1f} expected). Heads merged wrongly pass every "
          f"gradient check and find {share['two heads, wrong merge']}; without looking it is "
          f"{share['no looking']} ({len(seeds)} seeds).")

# %% [markdown]
# ## Exercises
#
# 1. By hand: d = 1, one query q = 2, keys 0 and 1, values 5 and 15. What are the weights and the answer?
#    Check with `attention_by_hand`.
# 2. Show that r_i = sum_j U_ij A_ij in (3) equals G_i . O_i, the dot product of row i of G with row i of the
#    answers. Write `attention_vjp` with it and let `tt.gradcheck` decide. (Fast kernels do this: they never
#    hold a whole row of A.)
# 3. Take the scale out of (4) and (5) and run the gradient check. Does its reading name the mistake? Then
#    take it out of the forward pass as well. What does the check say now, and why?
# 4. Let each token want three keys: three answers, and 24 logits from `Recall.head`. By the reasoning above,
#    what share of right answers can two heads reach? Train them for 1,000 steps: they find far more. Print
#    the weights that each head puts on the three wanted tokens, and read off how they do it. (What do both
#    look at?)
# 5. Put a second layer of attention behind the first: copy `attend` of `tt.nn.Attention` into a subclass with
#    the wrong merge, and compute `x = x + layer(x)` with two of them. How many answers are right after 300
#    steps, and after 2,000? Which questions can be answered on this detour? Use the picture of the merge.
#
# ## The paper
#
# Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), beside our lines in
# `tinytoken/ops/attend.py` and `tinytoken/nn/layers.py`:
#
# | paper | our line |
# |---|---|
# | eq. 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V | `scores = (q * scale) @ k.swapaxes(-1, -2)`, `A = softmax_of(scores)`, `out = A @ v` |
# | footnote 4: q . k has mean 0 and variance d_k | `scale = 1 / math.sqrt(q.shape[-1])` |
# | section 3.2.2: head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V) | `ops.split_heads(self.qkv(x), heads=self.heads, parts=3)` |
# | section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O | `self.proj(ops.merge_heads(out))` |
#
# The paper gives each head its own W_i^Q, W_i^K, W_i^V. Ours are the same matrices stacked: rows i d to (i +
# 1) d of the first third of `qkv.weight` are W_i^Q, transposed. The op scales q before the product and not
# the scores after it: T d multiplications instead of T^2.

# %%
here.end()
