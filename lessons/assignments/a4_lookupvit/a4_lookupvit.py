# %% [markdown]
# # Assignment 4: LookupViT
# You make few tokens from many, let the few read the many and write back by the same scores, put the block
# together, count what it costs, and run one set of weights at several costs. 25 points.
#
# Write your code where `raise NotImplementedError` stands. Keep names and arguments. You may write more
# functions. All is plain NumPy; in the exercises only numpy and math may be imported. `python -m tinytoken
# grade a4 --submission .` says at any time what you have.
#
# Letters: B pictures, N lookup tokens (all patches), M compressed tokens (few), D numbers per token, H heads,
# d = D / H.

# %%
import math

import numpy as np

# %% [markdown]
# ### Exercise 4.1 (4 points)
# On one axis, a inputs become b outputs. With s = a / b, output o has its centre at c = (o + 1/2) s - 1/2,
# and input i weighs max(0, 1 - |i - c| / max(s, 1)): a triangle that is made wider where the axis shrinks, so
# that every input is read. Each output's weights are then divided by their sum. On a grid both axes are
# resized by themselves; with tokens row by row that is **one** matrix.


# %%
def axis_weights(a, b):
    """The matrix (b, a) of one axis; rows sum to 1."""
    ### BEGIN SOLUTION
    s = a / b
    centres = (np.arange(b) + 0.5) * s - 0.5
    triangle = np.maximum(0, 1 - np.abs(np.arange(a) - centres[:, None]) / max(s, 1))
    return triangle / triangle.sum(axis=1, keepdims=True)
    ### END SOLUTION


def resize_matrix(grid, size):
    """The matrix (m n, h w) that resizes tokens on a grid (h, w), row by row, to a grid size (m, n)."""
    ### BEGIN SOLUTION
    return np.kron(axis_weights(grid[0], size[0]), axis_weights(grid[1], size[1]))
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.2 (3 points)
# The compressed tokens ask, the lookup tokens answer: attention, with the softmax over the N lookup tokens.
# Return the weights and the (divided) scores too; both are wanted again.


# %%
def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def gather(q, k, v):
    """q (B, H, M, d), k and v (B, H, N, d) -> answers (B, H, M, d), A (B, H, M, N), scores (B, H, M, N)."""
    ### BEGIN SOLUTION
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    A = softmax(scores)
    return A @ v, A, scores
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.3 (4 points)
# Backward, each lookup token n gets a mixture of the compressed values: sum over m of R_mn values_m. `reuse`
# says what R is: "probs": A as it is; "renorm": A, each column divided by its sum, so that every lookup token
# gets 1 in all; "resoftmax": the softmax of the scores over the M compressed tokens. A column that nobody
# looks at (sum 0) gives zeros with "renorm".


# %%
def infuse(A, scores, values, reuse):
    """A and scores (B, H, M, N), values (B, H, M, d) -> (B, H, N, d)."""
    ### BEGIN SOLUTION
    R = A
    if reuse == "renorm":
        mass = A.sum(axis=2, keepdims=True)
        R = A / np.where(mass > 0, mass, 1)
    elif reuse == "resoftmax":
        R = softmax(scores, axis=2)
    return R.swapaxes(-1, -2) @ values
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.4 (4 points)
# With "probs" A is used twice: answers = A v, and written = A^T values. What arrives at `answers` is
# g_answers, what arrives at `written` is g_written. A gets the sum of what comes back through both. Then it
# goes on through the softmax. (`values` are made from the answers; what comes back on that way is in
# g_answers already.)


# %%
def scores_gradient(A, v, values, g_answers, g_written):
    """dL/d(scores) (B, H, M, N). A (B, H, M, N), v (B, H, N, d), values and g_answers (B, H, M, d), g_written
    (B, H, N, d)."""
    ### BEGIN SOLUTION
    d_A = g_answers @ v.swapaxes(-1, -2) + values @ g_written.swapaxes(-1, -2)
    return A * (d_A - (A * d_A).sum(axis=-1, keepdims=True))
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.5 (5 points)
# The block, with "probs". `w` holds arrays by name; `linear(x, w, name)` and `norm(x, w, name)` use them:
#
#     (a) q = norm(linear(F_p, gather_q), gather_norm_q)     k = norm(linear(F_l, gather_k), gather_norm_k)     v = linear(F_l, gather_v)
#         F_p <- F_p + linear(answers of the gather, heads side by side, gather_proj)
#     (b) F_p <- refine(F_p)                                  an ordinary block, given as a function
#     (c) values = linear(norm(F_p, infuse_norm), infuse_v)
#         F_l <- F_l + linear(what is written, heads side by side, infuse_proj)
#     (d) F_l <- F_l + linear(gelu(linear(norm(F_l, lookup_norm), lookup_mlp.fc1)), lookup_mlp.fc2)


# %%
def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name, eps=1e-6):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True)
                             + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def split_heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def lookup_block(F_l, F_p, w, heads, refine):
    """F_l (B, N, D), F_p (B, M, D), refine: (B, M, D) -> (B, M, D) -> the new F_l and F_p."""
    ### BEGIN SOLUTION
    q = norm(linear(F_p, w, "gather_q"), w, "gather_norm_q")
    k = norm(linear(F_l, w, "gather_k"), w, "gather_norm_k")
    answers, A, scores = gather(*(split_heads(x, heads) for x in (q, k, linear(F_l, w, "gather_v"))))
    F_p = refine(F_p + linear(merge_heads(answers), w, "gather_proj"))
    values = split_heads(linear(norm(F_p, w, "infuse_norm"), w, "infuse_v"), heads)
    F_l = F_l + linear(merge_heads(infuse(A, scores, values, "probs")), w, "infuse_proj")
    return F_l + linear(gelu(linear(norm(F_l, w, "lookup_norm"), w, "lookup_mlp.fc1")), w,
                        "lookup_mlp.fc2"), F_p
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.6 (3 points)
# Multiply-adds of the block above, with (b) a block of a ViT whose MLP is 4 D wide and the light MLP of (d) D
# / 2 wide. Then of a model: the patch embedding (N P D for P numbers per patch), `depth` blocks, and the
# compressed head (D K). With `both_heads` False only the compressed head is asked for, and (c) and (d) of the
# last block are left out; with True the lookup head costs D K too.


# %%
def block_cost(N, M, D):
    """Multiply-adds of one block -> int."""
    ### BEGIN SOLUTION
    return (4 * N + 15 * M) * D**2 + (3 * N * M + 2 * M**2) * D
    ### END SOLUTION


def model_cost(N, M, D, P, K, depth, both_heads):
    """Multiply-adds of a picture -> int."""
    ### BEGIN SOLUTION
    total = N * P * D + depth * block_cost(N, M, D) + 2 * D * K
    return total if both_heads else total - D * K - (2 * N + M) * D**2 - N * M * D
    ### END SOLUTION


# %% [markdown]
# ### Exercise 4.7 (2 points)
# The compressed tokens at any grid: the patches X, which lie on `grid`, resized to `size`, plus the table of
# positions, which was made for `table_grid`, resized to `size` as well.


# %%
def compressed_tokens(X, grid, table, table_grid, size):
    """X (B, h w, D), table (T, D) for table_grid -> (B, m n, D) for size (m, n)."""
    ### BEGIN SOLUTION
    return resize_matrix(grid, size) @ X + resize_matrix(table_grid, size) @ table
    ### END SOLUTION


# %% [markdown]
# ## All together
# Your gather and infusion take the place of the package's in a LookupViT, which is trained on scenes at a
# random grid for each step. Then one set of weights is run at four costs; your formula says what each is.


# %%
if __name__ == "__main__":
    import sys

    import training  # beside this file; for Gradescope's leaderboard the grader runs it too
    training.run(sys.modules[__name__])
