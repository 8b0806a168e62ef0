# %% [markdown]
# # Lesson 08: Lookup attention
# After this lesson you can pass what many tokens know through a few tokens and back, with one matrix of
# scores. You know four ways to read this matrix backward, and what each of them costs.
#
# LookupViT (Koner et al. 2024) has two sets of tokens. The N **lookup tokens**, one for each patch, are many,
# and little work is done for each. The M **compressed tokens** are far fewer, and do the heavy work. In each
# block the compressed tokens read from the lookup tokens (the **gather**) and are processed. Then their
# result is written to the lookup tokens (the **infusion**), with the same scores that the gather has
# computed. This lesson builds the start of the compressed tokens, the gather, and the infusion. Lesson 09
# builds the block around them.
#
# **What is the paper's and what is ours.** We had only the abstract of the paper, not its equations. Three
# public programs show how others have understood it, and they differ. Where they differ, we had to choose,
# and the text says so. The last part names the three programs.

# %%
import numpy as np
import tqdm

import tinytoken as tt
from tinytoken.experiments import lesson, range_text

here, ops = lesson.begin("08_lookup_attention"), tt.ops
rng = np.random.default_rng(here.seed)
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"

# %% [markdown]
# ## Few tokens from many: the resize
#
# The patches lie on a grid. The compressed tokens start as a smaller version of this grid, in the same way as
# a picture is made smaller. Take one axis with a inputs and b outputs, b < a, so that each output stands for
# s = a / b inputs. Input i lies at position i. The centre of output o is at c_o = (o + 1/2) s - 1/2, so the
# outputs are spread evenly over the inputs. There are three usual weights for input i:
#
# - plain bilinear: $\max(0, 1 - \lvert i - c_o \rvert)$, the line between the two inputs around the centre;
# - antialiased: $\max(0, 1 - \lvert i - c_o \rvert / s)$, the same triangle, s times as wide;
# - area: how much of [i - 1/2, i + 1/2] lies in [c_o - s/2, c_o + s/2].
#
# The weights of each output are divided by their sum. They are row o of a matrix (b, a). A grid of h x w
# tokens is resized to m x n one axis after the other, with F_h (m, h) and F_w (n, w):
#
# $$\mathrm{out}[o, p] = \sum_{ij} F_h[o, i] \, F_w[p, j] \, x[i, j]$$
#
# Number the tokens row by row: x[i, j] is number i w + j, and out[o, p] is number o n + p. Then the resize is
# one product with a matrix F (m n, h w), which has F_h[o, i] F_w[p, j] in row o n + p and column i w + j.
# This is the definition of kron(F_h, F_w). F is a constant: nothing in it is learned. The gradient goes back
# through F^T.

# %%
def axis_weights(a, b, kernel):
    """(b, a), rows sum to 1."""
    s = a / b
    centres, inputs = ((np.arange(b) + 0.5) * s - 0.5)[:, None], np.arange(a)
    if kernel == "area":
        weights = np.minimum(inputs + 0.5, centres + s / 2) - np.maximum(inputs - 0.5, centres - s / 2)
    else:
        weights = 1 - np.abs(inputs - centres) / (s if kernel == "antialiased" else 1)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def resize_by_hand(grid, size, kernel):
    """F (m n, h w)."""
    return np.kron(axis_weights(grid[0], size[0], kernel), axis_weights(grid[1], size[1], kernel))


KERNELS = ("plain bilinear", "antialiased", "area")
x, W, bias = rng.standard_normal((48, 5)), rng.standard_normal((5, 7)), rng.standard_normal(7)  # 6 x 8 tokens
for kernel in KERNELS:
    F = resize_by_hand((6, 8), (2, 3), kernel)
    assert np.allclose(F @ (x @ W + bias), (F @ x) @ W + bias, rtol=0, atol=1e-13)
    if kernel != "area":
        theirs = ops.resize(x[None], grid=(6, 8), size=(2, 3), antialias=kernel == "antialiased").data[0]
        print(f"{kernel}: largest difference from tt.ops.resize {np.abs(F @ x - theirs).max():.0e}")
        assert np.abs(F @ x - theirs).max() < 1e-13
tt.gradcheck(lambda x: ops.resize(x, grid=(6, 8), size=(2, 3)), x[None])

# %% [markdown]
# The first assertion says that the projection and the resize can be exchanged: the rows of F sum to 1, so a
# bias passes unchanged. Now: **which tokens are read at all?** Plain bilinear gives weight to two inputs per
# output, no matter how far apart the outputs are. If s > 2, some inputs lie between two outputs and get no
# weight. The column of F for such a token is zero, and so is its gradient through F^T, for every loss.

# %%
CASES = [(8, 2), (8, 3), (8, 4), (8, 5), (14, 3), (14, 5)]
never_read = {kernel: [int((resize_by_hand((a, a), (b, b), kernel).sum(axis=0) == 0).sum()) for a, b in CASES]
              for kernel in KERNELS}
for kernel, counts in never_read.items():
    print(f"never read, {kernel:<15}"
          + ", ".join(f"{a} to {b}: {n} of {a * a}" for (a, b), n in zip(CASES, counts)))
    for (a, b), count in zip(CASES, counts if kernel != "area" else ()):
        x = tt.Tensor(rng.standard_normal((1, a * a, 3)), requires_grad=True)
        ops.resize(x, grid=(a, a), size=(b, b),
                   antialias=kernel == "antialiased").backward(rng.standard_normal((1, b * b, 3)))
        assert (x.grad == 0).all(axis=(0, 2)).sum() == count
assert not any(never_read["antialiased"])


def draw_resize(figure):
    axes = figure.subplots(3, 4, width_ratios=(1.3, 1, 1, 1))
    for number, (row, kernel) in enumerate(zip(axes, KERNELS)):
        for weights, color, marker in zip(axis_weights(8, 3, kernel), (BLUE, ORANGE, GREEN), "os^"):
            row[0].plot(weights, color=color, marker=marker)
        row[0].set(ylim=(-0.04, 0.94), xticks=range(8), ylabel=f"{kernel}\nweight", xlabel="input"
                   if number == 2 else "")
        for axis, (a, b) in zip(row[1:], [(8, 2), (8, 3), (14, 5)]):
            total = resize_by_hand((a, a), (b, b), kernel).sum(axis=0).reshape(a, a) * (a / b) ** 2
            image = axis.imshow(total, cmap="viridis", vmin=0, vmax=2)
            axis.plot(*np.nonzero(total == 0)[::-1], "x", color="white", markersize=5)
            axis.set(xticks=[], yticks=[], title="" if number else f"{a} x {a} to {b} x {b}")
    axes[0, 0].set_title("one axis, 8 to 3: a colour per output")
    figure.colorbar(image, ax=axes[:, 1:], shrink=0.9,
                    label="weight of a patch in all outputs over an equal share (2 and more: yellow)")
    figure.suptitle("x: patches that are never read")


here.picture("resize", draw_resize, width=11, height=7)

# %% [markdown]
# From 8 to 2, plain bilinear starts the compressed tokens from only a quarter of the patches. The other
# patches do not count at the start, but the gather, which comes next, can still read them. Two of the three
# programs resize like that, since it is the default of PyTorch's `interpolate`. The third takes averages over
# areas. The resize of JAX antialiases by default. We antialias, too.
#
# ## The gather
#
# The gather is attention (lesson 03). For one head with d channels, the queries come from the compressed
# tokens, and the keys and values from the lookup tokens:
#
# $$\begin{aligned}
# S &= \frac{Q K^T}{\sqrt{d}} && (M, d)(d, N) \to (M, N) \\
# A_{mn} &= \frac{\exp(S_{mn})}{\sum_{n'} \exp(S_{mn'})} && (M, N) \\
# O &= A V && (M, N)(N, d) \to (M, d)
# \end{aligned}$$
#
# S are the scores, A is their softmax over the N lookup tokens, row by row, and O is what each compressed
# token has read. The op also returns A and S, since both are needed a second time.

# %%
def softmax(s, axis):
    e = np.exp(s - s.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def flip(x):
    """The transpose of the last two axes."""
    return x.swapaxes(-1, -2)


def gather_by_hand(q, k, v):
    """-> O (..., M, d), A (..., M, N), S (..., M, N)"""
    S = q @ flip(k) / q.shape[-1] ** 0.5
    A = softmax(S, axis=-1)
    return A @ v, A, S


# M 4, N 7
q, k, v = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 7, 5)), rng.standard_normal((2, 3, 7, 5))
O, A, S = gather_by_hand(q, k, v)
assert all(np.abs(mine - theirs.data).max() < 1e-13 for mine,
           theirs in zip((O, A, S), ops.lookup_gather(q, k, v)))
assert np.abs(O - ops.attention(q, k, v).data).max() < 1e-13

# %% [markdown]
# ## The same scores, read backward
#
# Row m of A says where compressed token m reads. Column n says which compressed tokens read lookup token n,
# and how much. For the way back, each lookup token needs weights for the M compressed tokens. Call them a
# matrix R (M, N), with
#
# $$Y = R^T V' \qquad (N, M)(M, d) \to (N, d)$$
#
# Y is what is written to each lookup token. V' (M, d) are values computed from the compressed tokens after
# they were processed. All three programs make R from the scores of the gather: a compressed token that reads
# a lookup token also writes to it. But they do this in two different ways. A third way is close to these, and
# a fourth, which reuses nothing, is here for comparison:
#
# $$\begin{aligned}
# \text{probs:} && R_{mn} &= A_{mn} && \text{the probabilities as they are} \\
# \text{renorm:} && R_{mn} &= \frac{A_{mn}}{c_n}, \quad c_n = \sum_m A_{mn}
#     && \text{each lookup token gets 1 in all} \\
# \text{resoftmax:} && R_{mn} &= \frac{\exp(S_{mn})}{\sum_{m'} \exp(S_{m'n})} && \text{a softmax over the } M
# \end{aligned}$$
#
# and `separate` takes R from queries of the lookup tokens and keys of the compressed ones: attention as usual.
#
# Two of the programs use `probs`. The third did so at first and later changed to `resoftmax`. Our default is
# `probs`, which is our choice.

# %%
def reverse(A, S, reuse):
    """R (..., M, N)."""
    if reuse == "resoftmax":
        return softmax(S, axis=-2)
    return A / A.sum(axis=-2, keepdims=True) if reuse == "renorm" else A


REUSE = ("probs", "renorm", "resoftmax")
values = rng.standard_normal(O.shape)  # V'
R = {reuse: reverse(A, S, reuse) for reuse in REUSE}
Y = {reuse: flip(R[reuse]) @ values for reuse in REUSE}
assert all(np.abs(Y[kind] - ops.lookup_infuse(A, S, values, reuse=kind).data).max() < 1e-13 for kind in REUSE)

# %% [markdown]
# Let Z_m = sum_n exp(S_mn). Then A_mn = exp(S_mn - log Z_m), so **`renorm` is a softmax over m, too**, but of
# S_mn - log Z_m instead of S_mn. Now add a number to a whole row of S: all scores of compressed token m
# become larger. Dividing by Z_m removes the number again, so `probs` and `renorm` do not change. With
# `resoftmax`, all lookup tokens now receive more from m. Next, add a number to a whole column: all scores of
# lookup token n become larger. A changes, and this time `resoftmax` is the only one that does not. So with
# `resoftmax`, the scores can contain something for the gather that the infusion does not see, and the other
# way round.

# %%
log_Z = np.log(np.exp(S).sum(axis=-1, keepdims=True))
assert np.allclose(R["renorm"], softmax(S - log_Z, axis=-2), rtol=0, atol=1e-14)
row, column = np.zeros(S.shape), np.zeros(S.shape)
row[..., 1, :], column[..., :, 2] = 3, 3
for what, shift, unmoved in (("row", row, ("probs", "renorm")), ("column", column, ("resoftmax",))):
    moved = {reuse: float(np.abs(reverse(softmax(S + shift, -1), S + shift, reuse) - R[reuse]).max())
             for reuse in REUSE}
    print(f"3 added to a {what} of S moves R by at most: "
          + ", ".join(f"{reuse} {by:.1e}" for reuse, by in moved.items()))
    assert all((moved[reuse] < 1e-13) == (reuse in unmoved) for reuse in REUSE)

# %% [markdown]
# ## Masses
#
# The **mass** of lookup token n is the sum of its weights, sum_m R_mn. Each of the M rows of A sums to 1. So
# with `probs` the sum of all masses is M, and **the mean mass is M / N**, which is small. A single mass c_n
# lies between 0 (nobody reads the token) and M. With `renorm` and `resoftmax` every mass is 1. And since A_mn
# is c_n times the R_mn of `renorm`,
#
#     Y_n of probs = c_n (Y_n of renorm)
#
# So `probs` is `renorm` with a gate: nothing is written to a token that nobody reads.

# %%
mass = A.sum(axis=-2)  # (B, H, N)
assert np.allclose(A.sum(axis=-1), 1, rtol=0, atol=1e-14) and np.allclose(mass.sum(axis=-1), 4, rtol=0,
                                                                          atol=1e-13)
assert np.allclose(Y["probs"], mass[..., None] * Y["renorm"], rtol=0, atol=1e-13)
assert all(np.allclose(R[reuse].sum(axis=-2), 1, rtol=0, atol=1e-14) for reuse in ("renorm", "resoftmax"))
print("mean mass of 64 lookup tokens:", ", ".join(f"{M / 64:.2f} with {M} compressed" for M in (4, 9, 25)))

# %% [markdown]
# Here are the masses on pictures, without any learning. The keys are the colours of the 64 patches, minus
# their mean over all pictures. The queries are these colours, resized to 3 x 3 and multiplied by 2.

# %%
_, test = here.pictures(8, here.pick(40, 200, 1000))
colours = ops.patchify(test.images / 255.0, patch=4).data
colours = (colours - colours.mean(axis=(0, 1))) / colours.std(axis=(0, 1))
_, A_pictures, _ = gather_by_hand(2 * resize_by_hand((8, 8), (3, 3), "antialiased") @ colours, colours,
                                  colours)
mass = A_pictures.sum(axis=1)  # (B, 64)
found = {"mean": mass.mean(), "largest": mass.max(),
         "share below a tenth of the mean": (mass < 0.9 / 64).mean()}
if here.data == "scenes":
    share = test.object_share(4)  # of each patch, how much is object
    found["mass on objects over chance"] = (mass * share).sum() / mass.sum() / share.mean()
print("masses: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


def draw_masses(figure):
    axes = figure.subplots(2, 4, subplot_kw={"xticks": [], "yticks": []})
    for b in range(4):
        axes[0, b].imshow(test.images[b].transpose(1, 2, 0))
        image = axes[1, b].imshow(mass[b].reshape(8, 8), cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="mass of a patch (1 and more: yellow)", shrink=0.8)
    figure.suptitle(f"Mass of each patch with probs, before any learning; the mean is {9 / 64:.2f}")


here.picture("masses", draw_masses, width=10, height=4.6)

# %% [markdown]
# The gate is open where the compressed tokens look. Without learning, they look at what stands out. Objects
# get more weight than the rest, but some patches of objects get almost nothing (with seed 0, the violet cross
# of the first picture).
#
# ## There and back: who hears whom
#
# Leave out the processing in between for a moment: V' = O. Then the gather and the infusion together are one
# linear map from lookup tokens to lookup tokens:
#
# $$Y = R^T A V = T V, \quad T = R^T A \qquad (N, M)(M, N) \to (N, N)$$
#
# T_nn' is how much token n receives from token n'. T is an attention among all N tokens through a bottleneck:
# its rank is at most M, and no N x N scores had to be computed. The rows of A sum to 1, so row n of T sums to
# the mass of n. And
#
# **with `probs`, T = A^T A is symmetric**: n receives from n' as much as n' receives from n. With the other
# ways it is not symmetric. So one head of `probs` cannot read in one place and write in another. A task below
# shows what that costs.

# %%
for reuse in REUSE:
    T = flip(R[reuse]) @ A
    assert np.linalg.matrix_rank(T).max() <= 4 and np.allclose(T.sum(axis=-1), R[reuse].sum(axis=-2), rtol=0,
                                                               atol=1e-13)
    assert np.allclose(T, flip(T), rtol=0, atol=1e-14) == (reuse == "probs")

# %% [markdown]
# ## The gradient: two uses add up
#
# The scores are used twice, and the loss L depends on them through both uses. Imagine two copies, A_1 for the
# gather and A_2 for the infusion. The loss is L(A_1, A_2) at A_1 = A_2 = A, and the chain rule says dL/dA =
# dL/dA_1 + dL/dA_2. The tape adds the gradients of several uses (lesson 01). What are the two parts? Let G
# (N, d) be dL/dY. First the infusion, line by line as in lesson 03:
#
# $$\begin{aligned}
# \frac{dL}{dV'} &= R G && (M, N)(N, d) \to (M, d) && (1) \\
# U = \frac{dL}{dR} &= V' G^T && (M, d)(d, N) \to (M, N) && (2) \\
# \frac{dL}{dA_2} &= U && \text{probs} && (3a) \\
# \frac{dL}{dA_2} &= \frac{1}{c_n} \left( U_{mn} - \sum_{m'} U_{m'n} R_{m'n} \right)
#     && \text{renorm} && (3b) \\
# \frac{dL}{dS_2} &= R_{mn} \left( U_{mn} - \sum_{m'} U_{m'n} R_{m'n} \right)
#     && \text{resoftmax: the softmax's, over } m && (3c)
# \end{aligned}$$
#
# For (3b): R is the softmax over m of log A, so dL/dlog A has the form of (3c). Divide it by A_mn, and the
# factor R_mn / A_mn = 1 / c_n is left in front. The gradient (1) goes back through the processing of the
# compressed tokens until it arrives at O. Only then can the backward pass of the gather begin. Let G_O (M, d)
# be the gradient that arrives at O:
#
# $$\begin{aligned}
# \frac{dL}{dV} &= A^T G_O && (N, M)(M, d) \to (N, d) && (4) \\
# \frac{dL}{dA_1} &= G_O V^T && (M, d)(d, N) \to (M, N) && (5) \\
# \frac{dL}{dA} &= \frac{dL}{dA_1} + \frac{dL}{dA_2} && && (6) \\
# E_{mn} &= A_{mn} \left( \frac{dL}{dA_{mn}} - \sum_{n'} \frac{dL}{dA_{mn'}} A_{mn'} \right)
#     && \text{the softmax's, over } n && (7) \\
# \frac{dL}{dS} &= E && \text{with resoftmax } E + \frac{dL}{dS_2} && (8) \\
# \frac{dL}{dQ} &= \frac{1}{\sqrt{d}} \frac{dL}{dS} K,
#     \quad \frac{dL}{dK} = \frac{1}{\sqrt{d}} \left( \frac{dL}{dS} \right)^T Q && && (9)
# \end{aligned}$$

# %%
def softmax_vjp(p, g, axis):
    return p * (g - (g * p).sum(axis=axis, keepdims=True))


def infuse_vjp(A, S, values, g, reuse):
    """-> the infusion's part of the gradients: of V', of A (0 with resoftmax), of S (0 with the others)."""
    # (2)
    R, U = reverse(A, S, reuse), values @ flip(g)
    if reuse == "resoftmax":
        # (1), (3c)
        return R @ g, 0, softmax_vjp(R, U, axis=-2)
    d_A = U if reuse == "probs" else (U - (U * R).sum(axis=-2, keepdims=True)) / A.sum(axis=-2, keepdims=True)
    # (1), (3a), (3b)
    return R @ g, d_A, 0


def gather_vjp(q, k, v, A, g, d_A, d_S):
    """The gradients of q, k and v, from that of O and those of A and S by the infusion."""
    # (5), (6)
    d_A = g @ flip(v) + d_A
    # (7), (8)
    d_S = (softmax_vjp(A, d_A, axis=-1) + d_S) / q.shape[-1] ** 0.5
    # (9), (4)
    return d_S @ k, flip(d_S) @ q, flip(A) @ g


def there_and_back(reuse, write=True):
    """An op q, k, v -> Y, with V' = tanh(O) for the work in between. write=False loses the infusion's part of
    (6) and (8)."""
    @tt.op
    def both_ways(q, k, v):
        O, A, S = gather_by_hand(q, k, v)
        values = np.tanh(O)

        def vjp(g):
            d_values, d_A, d_S = infuse_vjp(A, S, values, g, reuse)
            return gather_vjp(q, k, v, A, d_values * (1 - values**2), d_A * write, d_S * write)
        return flip(reverse(A, S, reuse)) @ values, vjp
    return both_ways


for reuse in REUSE:
    tt.gradcheck(there_and_back(reuse), q, k, v)
    try:
        tt.gradcheck(there_and_back(reuse, write=False), q, k, v)
        raise SystemExit(f"{reuse}: a gradient without the second use was accepted")
    except tt.GradientError as error:
        print(f"{reuse}, second use left out: {str(error).splitlines()[0]}")

# %% [markdown]
# The ops of the package do the same on the tape. `lookup_gather` has three outputs, and its vjp gets three
# gradients, those of O, A and S. `detach()` cuts one use off: the value is the same, but no gradient passes.
# If we cut at the infusion, the gradient of reading is left. If we cut at the gather, the gradient of writing
# is left. Their sum is the whole gradient.

# %%
def gradient_of_q(reuse, g, cut=None):
    """dL/dQ through the package's ops, with one use of the scores cut off: "write" or "read"."""
    Q = tt.Tensor(q, requires_grad=True)
    O, A, S = ops.lookup_gather(Q, k, v)
    if cut == "write":
        A, S = A.detach(), S.detach()
    if cut == "read":
        O = O.detach()
    ops.lookup_infuse(A, S, ops.tanh(O), reuse=reuse).backward(g)
    return Q.grad


g, parts = rng.standard_normal(k.shape), {}
for reuse in REUSE:
    Q = tt.Tensor(q, requires_grad=True)
    there_and_back(reuse)(Q, k, v).backward(g)
    whole, reading, writing = (gradient_of_q(reuse, g, cut) for cut in (None, "write", "read"))
    assert np.abs(whole - Q.grad).max() < 1e-12 and np.abs(whole - reading - writing).max() < 1e-12
    parts[reuse] = {name: float(np.linalg.norm(part)) for name, part in
                    (("whole", whole), ("reading", reading), ("writing", writing))}
    print(f"{reuse:<10} norm of dL/dQ: "
          + ", ".join(f"{name} {norm:.2f}" for name, norm in parts[reuse].items()))

# %% [markdown]
# ## What it costs
#
# In multiply-adds, with D channels, H heads of d = D / H channels, and a D x D matrix for every projection:
#
# | part | what | multiply-adds |
# |---|---|---|
# | gather | queries of M tokens, keys and values of N, output projection of M | $(2 M + 2 N) D^2$ |
# | | S and A V | $2 N M D$ |
# | infusion | V' of M, output projection of N | $(M + N) D^2$ |
# | | R^T V' | $N M D$ |
# | separate | also queries of N and keys of M, and their scores | $(M + N) D^2 + N M D$ |
#
# The first three ways cost the same, since softmax and division are not multiply-adds. (Both output
# projections are our choice: one program has both, one has only that of the gather, one has none.) Here is
# the layer, for counting and for the task below. That task has no grid that could be resized, so the
# compressed tokens start as learned vectors.

# %%
class ThereAndBack(tt.nn.Module):
    """Lookup tokens x (B, N, D) -> what is written to them (B, N, D). cut: the use of the scores without a
    gradient."""

    def __init__(self, dim, heads, compressed, reuse, cut=None):
        self.heads, self.reuse, self.cut = heads, reuse, cut
        self.compressed = tt.nn.Parameter(np.zeros((1, compressed, dim), "float32"))
        self.q, self.k, self.v, self.proj = (tt.nn.Linear(dim, dim) for _ in range(4))
        self.back_v, self.back_proj = tt.nn.Linear(dim, dim), tt.nn.Linear(dim, dim)
        if reuse == "separate":
            self.back_q, self.back_k = tt.nn.Linear(dim, dim), tt.nn.Linear(dim, dim)

    def split(self, x):
        return ops.split_heads(x, heads=self.heads)

    def project(self, x):
        z = ops.broadcast_to(self.compressed, shape=(len(x), *self.compressed.shape[1:]))
        return z, self.split(self.q(z)), self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x):
        z, q, k, v = self.project(x)
        O, A, S = ops.lookup_gather(q, k, v)
        if self.cut == "read":
            O, _, _ = ops.lookup_gather(q.detach(), k.detach(), v)
        if self.cut == "write":
            A, S = A.detach(), S.detach()
        return self.infuse(x, z, O, A, S)

    def infuse(self, x, z, O, A, S):
        z = z + self.proj(ops.merge_heads(O))
        values = self.split(self.back_v(z))
        if self.reuse == "separate":
            Y = ops.attention(self.split(self.back_q(x)), self.split(self.back_k(z)), values)
        else:
            Y = ops.lookup_infuse(A, S, values, reuse=self.reuse)
        return self.back_proj(ops.merge_heads(Y))


print(f"{'N':>5}{'M':>4}{'D':>5}{'probs and such':>16}{'separate':>16}{'N attend to N':>16}   (multiply-adds)")
for N, M, D in ((64, 9, 96), (196, 25, 384), (1024, 25, 384)):
    tokens, cost = np.zeros((1, N, D), "float32"), {}
    for reuse in (*REUSE, "separate"):
        counted, ways = tt.macs(ThereAndBack(D, 3, M, reuse), tokens), 4 if reuse == "separate" else 3
        assert counted.by_op["linear"] == ways * (M + N) * D**2 and counted.total == ways * ((M + N) * D**2
                                                                                             + N * M * D)
        cost[reuse] = counted.total
    direct = tt.macs(tt.nn.Attention(D, 3), tokens).total
    assert direct == 4 * N * D**2 + 2 * N**2 * D
    print(f"{N:>5}{M:>4}{D:>5}{cost['probs']:>16,}{cost['separate']:>16,}{direct:>16,}")

# %% [markdown]
# The last column is self-attention among the lookup tokens, which gather and infusion replace. The other
# columns have no term with N^2.
#
# ## A task: read here, write there
#
# There are 16 lookup tokens in 4 groups of 4, in random order. A token knows its group (one-hot), whether it
# is the leader of its group (each group has one), and 4 random numbers x. There are two tasks. Each token
# must tell,
#
# - in the task **mean**: the mean of x over its group. All members should receive equally from each other.
# - in the task **leader**: the x of the leader of its group. It must be read in one place and written in
#   four.
#
# The model embeds the tokens (D = 32), adds what `ThereAndBack` writes to them, and has a linear layer for
# the answer. There are 8 compressed tokens, and one head, or two where the name says so. We measure the mean
# squared error as a share of the mean square of the right answers. What can we expect?
#
# - **No way back.** The best guess is c times the token's own x. In the task mean, c = 1/4 leaves an error of
#   3/4. In the task leader, the error is (1 - c)^2 for a quarter of the tokens, the leaders, and 1 + c^2 for
#   the others. The best result is 15/16, again with c = 1/4.
# - **One head of `probs`.** T is symmetric. Let all compressed tokens of a group take 1 part from its leader
#   and t parts from each other member. The processing in between and the last layer scale what comes back by
#   a factor alpha, and add c times the token's own x. Then a member receives its leader with the factor alpha
#   t, the other members with alpha t^2, and itself with alpha t^2 + c. The leader receives itself with
#   alpha + c and the members with alpha t. The best t, alpha and c are 1/3, 5/4 and -1/6. Then A has the
#   weights 1/2 and 1/6, and **5/12 = 41.7 %** of the error is left (exercise 3; the cell below tries all t).
#   Here we assume that the weights do not depend on x. The keys do see x, so this is what we expect, not a
#   bound.
# - **Two heads of `probs`** can share the task: one reads, the other writes.
# - **The other ways** can do it with one head. If all scores of a leader become larger, a softmax over m does
#   not change, so the leader can be read more without being written to more.
#
# Two more arms use `probs` with the gradient of one of its two uses cut off.

# %%
def compromise(t):
    """% left with the best alpha and c."""
    # What is heard, rows: by a leader of itself, of others; by another of the leader, of itself, of the
    # others.
    design = np.array([[1, 1], [t, 0], [t, 0], [t * t, 1], [t * t, 0]])
    often = np.sqrt(np.array([1, 3, 3, 3, 6]) / 4)  # of each pair, per token
    return 100 * np.linalg.lstsq(design * often[:, None], np.array([1, 0, 1, 0, 0]) * often, rcond=None)[1][0]


best_t = min(np.arange(301) / 300, key=compromise)
print(f"one head of probs, the best compromise: t = {best_t:.3f}, {compromise(best_t):.2f} % left")
assert abs(best_t - 1 / 3) < 1e-9 and abs(compromise(best_t) - 500 / 12) < 1e-9

MODELS = {"no way back": dict(reuse="none"), "probs": dict(reuse="probs"), "renorm": dict(reuse="renorm"),
          "resoftmax": dict(reuse="resoftmax"), "separate": dict(reuse="separate"),
          "probs, two heads": dict(reuse="probs", heads=2),
          "probs, writing cut": dict(reuse="probs", cut="write"),
          "probs, reading cut": dict(reuse="probs", cut="read")}
GROUPS, MEMBERS, NUMBERS = 4, 4, 4
N = GROUPS * MEMBERS


def make_groups(rng, count, shuffled=True):
    """-> tokens (count, N, 9) float32 and {task: answers (count, N, 4)}. Not shuffled: group by group, the
    leader first."""
    order = np.tile(np.arange(N), (count, 1))
    order = rng.permuted(order, axis=1) if shuffled else order
    group, leads = np.eye(GROUPS)[order // MEMBERS], (order % MEMBERS == 0)[..., None]
    x = rng.standard_normal((count, N, NUMBERS))
    answers = {"mean": group @ (flip(group) @ x) / MEMBERS, "leader": group @ (flip(group) @ (x * leads))}
    return np.concatenate([group, leads, x], axis=2).astype("float32"), answers


class Errand(tt.nn.Module):
    """tokens (B, N, 9) -> answers (B, N, 4)."""

    def __init__(self, reuse, heads=1, cut=None):
        self.embed, self.head = tt.nn.Linear(GROUPS + 1 + NUMBERS, 32), tt.nn.Linear(32, NUMBERS)
        self.layer = None if reuse == "none" else ThereAndBack(32, heads, 8, reuse, cut)
        tt.nn.initialise(self)
        if self.layer:
            tt.nn.normal(self.layer.compressed, "compressed", std=1.0)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.layer(x) if self.layer else x)


steps, seeds = here.pick(10, 200, 1000), [here.seed + i for i in range(here.pick(1, 5, 8))]
tests = make_groups(np.random.default_rng([here.seed, 1]), here.pick(100, 1000, 1000), shuffled=False)


def train(name, task, seed, bar):
    tt.manual_seed(seed)
    model, rng = Errand(**MODELS[name]), np.random.default_rng([seed, 0])
    optimizer = tt.optim.AdamW(model.parameters(), weight_decay=0)
    for step in range(steps):
        tokens, answers = make_groups(rng, 64)
        tt.train.loss_and_grads(lambda x, y: ops.mse(model(x), y).mean(), optimizer.params,
                                (tokens, answers[task].astype("float32")), micro=64, threads=1)
        optimizer.step(1e-2 * tt.optim.warmup_cosine(step, steps))
        bar.update()
    return model


left, trained, by_group = {task: {name: [] for name in MODELS} for task in ("mean", "leader")}, {}, {}
with tqdm.tqdm(total=2 * len(MODELS) * len(seeds) * steps, desc="steps of all runs") as bar:
    for task, name, seed in ((task, name, seed) for task in left for name in MODELS for seed in seeds):
        model = train(name, task, seed, bar)
        with tt.no_grad():
            squared = (model(tests[0]).data - tests[1][task]) ** 2  # (count, N, 4)
        of_token = 100 * squared.mean(axis=(0, 2)) / (tests[1][task] ** 2).mean()
        by_group.setdefault((task, name), []).append(of_token.reshape(GROUPS, MEMBERS).mean(axis=1).tolist())
        left[task][name].append(float(of_token.mean()))
        trained.setdefault((task, name), model)  # of the first seed

print(f"% of the answers' mean square left after {steps} steps, each seed\n{'':<20}"
      + "".join(f"{task:>34}" for task in left))
for name in MODELS:
    print(f"{name:<20}" + "".join(f"{', '.join(f'{share:.1f}' for share in left[task][name]):>34}"
                                  for task in left))

# %% [markdown]
# All ways can do the task "mean", even if one of the uses is cut off: reading and writing need the same
# weights there. In the task "leader", one head of `probs` reaches about the 41.7 % that we computed, and two
# heads come near 0. If one run is much worse than the others, its training got stuck: two groups share their
# compressed tokens, or one group has none. (For the task leader, the last part prints the errors by group.)
#
# Where do the trained models look? In the test data the tokens are sorted, group by group and the leader
# first, so we can average the maps.

# %%
leader, maps, masses_learned = np.arange(N) % MEMBERS == 0, {}, {}
for name in list(MODELS)[1:]:
    model = trained["leader", name]
    with tt.no_grad():
        _, A, S = (output.data for output in ops.lookup_gather(*model.layer.project(model.embed(tests[0]))[1:]))
    masses_learned[name] = [[float(m[leader].mean()), float(m[~leader].mean())]
                            for m in A.sum(axis=2).mean(axis=0)]
    print(f"{name:<20} mass of a leader, of another token: "
          + "; ".join(f"head {h} {a:.2f}, {b:.2f}" for h, (a, b) in enumerate(masses_learned[name])))
    if name in REUSE:
        maps[name] = (flip(reverse(A, S, name)) @ A)[:, 0].mean(axis=0)


def draw_maps(figure):
    wanted = np.equal.outer(np.arange(N) // MEMBERS, np.arange(N) // MEMBERS) * leader
    axes = figure.subplots(1, 4)
    for axis, (name, T) in zip(axes, [("wanted", wanted), *maps.items()]):
        image = axis.imshow(T / T.max(), cmap="Greys", vmin=0, vmax=1)
        for edge in range(MEMBERS, N, MEMBERS):
            axis.axhline(edge - 0.5, color=SKY, linewidth=0.8)
            axis.axvline(edge - 0.5, color=SKY, linewidth=0.8)
        axis.set(title=name, xlabel="token heard", xticks=range(0, N, 4), yticks=range(0, N, 4))
    axes[0].set_ylabel("token that hears")
    figure.colorbar(image, ax=axes, label="T over its largest", shrink=0.7)
    figure.suptitle("Task leader, one head, trained: who hears whom (the first of each group leads)")


here.picture("maps", draw_maps, width=12, height=3.5)

# %% [markdown]
# The map of `probs` is symmetric: members receive from their leader, so the leader receives from the members,
# and the members receive from each other. With two heads, one reads the leaders and the other writes to the
# other tokens (seed 0). `renorm` and `resoftmax` read mostly the leaders. The columns of the other tokens are
# small, but they still tell which compressed token belongs to them.
#
# The two arms with a cut fail in opposite ways. Without the gradient of writing, A learns what is good to
# read. Nearly all mass goes to the leaders, and nothing is written to the other tokens, which are 3/4 of all.
# Without the gradient of reading, A learns where something should be written, and reads there, too. Without a
# cut, the two gradients pull in opposite directions. To see that, give each use its own copy of S:

# %%
def by_use(model, tokens, answers):
    """dL/dS (B, M, N) of a one-head model with probs, by reading and by writing."""
    layer, x = model.layer, model.embed(tokens)
    z, q, k, v = layer.project(x)
    S = ops.lookup_gather(q, k, v)[2].data
    read, write = tt.Tensor(S, requires_grad=True), tt.Tensor(S, requires_grad=True)
    out = model.head(x + layer.infuse(x, z, ops.softmax(read) @ v, ops.softmax(write), write))
    ops.mse(out, answers.astype("float32")).mean().backward()
    return read.grad[:, 0], write.grad[:, 0]


reading, writing = (part.sum(axis=0)
                    for part in by_use(trained["leader", "probs"], tests[0], tests[1]["leader"]))
uses = {"reading": reading, "writing": writing, "both uses, added": reading + writing}
pull = {name: float(part[:, leader].sum()) for name, part in uses.items()}
print("probs, trained: gradient of the leaders' scores: "
      + ", ".join(f"{name} {g:+.3f}" for name, g in pull.items()))


def draw_uses(figure):
    axes, limit = figure.subplots(3, 1), np.abs([reading, writing]).max()
    # compressed tokens in the order of the groups they serve
    rows = np.abs(reading).argmax(axis=1).argsort(kind="stable")
    for axis, (name, part) in zip(axes, uses.items()):
        image = axis.imshow(part[rows], cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(title=name, ylabel="compressed", yticks=[], xticks=range(0, N, 4))
    axes[2].set_xlabel("lookup token (0, 4, 8, 12 lead their groups)")
    figure.colorbar(image, ax=axes, label="dL/dS; orange: gradient descent raises the score")
    figure.suptitle("probs, trained on the task leader: what each use wants of the scores")


here.picture("uses", draw_uses, width=9, height=5.2)

# %% [markdown]
# The gradient of reading asks for more weight on the leaders, that of writing asks for more on the others.
# Training has ended where the two nearly cancel.
#
# **How general is this?** The task was made to show this difference. It shows what one layer of each way can
# express, not which way is best on pictures. In a LookupViT block, the compressed tokens also attend to each
# other between the gather and the infusion, so one token can write what another has read. There are several
# heads. And with the small masses of `probs`, training starts gently. Lesson 09 compares the four ways on
# pictures.
#
# ## What was measured
# These are exact, and asserted in every run: both ops and all gradients against our own, which tokens are
# never read, the sums of rows and columns, what changes if a number is added to a row or column of S, the
# symmetry of T, that the two uses add up, and the multiply-adds. The masses on pictures and the results of
# the task are measured.

# %%
share = {name: range_text([np.median(shares), min(shares), max(shares)], ".1f")
         for name, shares in left["leader"].items()}
here.says(f"From 8 x 8 to 3 x 3 a plain bilinear resize never reads {never_read['plain bilinear'][1]} of 64 "
          "patches. On an errand that reads in one place and writes in others, one head of `probs` leaves "
          f"{share['probs']} % of the error, `renorm` {share['renorm']}, `resoftmax` {share['resoftmax']}, "
          f"two heads of `probs` {share['probs, two heads']}: medians (lowest to highest) of {len(seeds)} "
          "seeds.")
here.measured(never_read={kernel: dict(zip((f"{a} to {b}" for a, b in CASES), n)) for kernel,
                          n in never_read.items()},
              masses_on_pictures={name: float(value) for name, value in found.items()}, gradient_norms=parts,
              steps=steps, seeds=seeds, percent_left=left, compromise_percent_left=compromise(best_t),
              percent_left_by_group={f"{task}, {name}": groups for (task, name), groups in by_group.items()},
              masses_learned=masses_learned, pull_on_leaders=pull)
print(f"task leader, % left: mean over {len(seeds)} seeds, and the worst of them by group")
for name, shares in left["leader"].items():
    print(f"{name:<20}{np.mean(shares):5.1f}   "
          + ", ".join(f"{g:.1f}" for g in by_group["leader", name][np.argmax(shares)]))

# %% [markdown]
# ## Exercises
# 1. Let M = 2, N = 3, d = 1 and S = [[0, 0, log 2], [0, log 3, 0]]. Compute A, the three R and all masses by
#    hand. Check them with `reverse`.
# 2. PyTorch's adaptive average pooling averages the inputs floor(o s) to ceil((o + 1) s) - 1 with equal
#    weights. Add it to `axis_weights`. For which of CASES is it the same as "area"? Does every token count
#    the same?
# 3. Derive t = 1/3, alpha = 5/4, c = -1/6 and 5/12. (Write the error per token with the five kinds of pairs
#    in `compromise`.) How much is left in groups of 8? Change MEMBERS and see.
# 4. Cut the two uses of `resoftmax` as well, in the task leader, and print its masses. Which cut makes the
#    result worse? Explain it with what each softmax sees of S.
# 5. Let the compressed tokens attend to each other in between: in `infuse`, z = z + attention(z) with a
#    `tt.nn.Attention(32, 1)`. Show that T becomes A^T P A with some P (M, M), and that it need not be
#    symmetric. Does one head of `probs` now learn the task leader? Try 200 and 1,000 steps.
#
# ## The paper
# Koner et al. 2024, "LookupViT: Compressing visual information to a limited number of tokens" (arXiv
# 2407.12753), of which we had the abstract. The programs: (1) `pjjajal/EfficientTTMs`, (2)
# `lokiwizard/LookupViT_Reproduction`, (3) `look_vit.py` in `lucidrains/vit-pytorch`. Norms belong to the
# block, lesson 09.
#
# | step | the programs | our line |
# |---|---|---|
# | compressed tokens: patches resized | (2), (3) plain bilinear; (1) adaptive average pooling | `ops.resize`, antialiased |
# | O = A V, A = softmax over n of Q K^T / sqrt(d) | all | `A = softmax_of(logits)`, `A @ v` in `lookup_gather` |
# | Y = R^T V' from the gather's scores | all; (2) takes the mean of A over heads | `R.swapaxes(-1, -2) @ v` in `lookup_infuse` |
# | R = A | (1), (2), and (3) at first | `reuse="probs"`, the default |
# | R = softmax over m of S | (3) in the end | `reuse="resoftmax"` |
# | R = A / c; or a second attention | none | `reuse="renorm"`; `reuse="separate"` |
# | V' has a projection of its own; another after Y | (3) both; (1), (2) neither | both |

# %%
here.end()
