# %% [markdown]
# # Assignment 2: Attention, heads, and masks that are exact
# You write attention and its gradient, cut it into heads, hide tokens so that nothing of them is left, let
# one set of tokens read another, and put a block of a ViT together. 25 points.
#
# Write your code where `raise NotImplementedError` stands. Keep names and arguments. You may write more
# functions. All is plain NumPy; in the exercises only numpy and math may be imported. `python -m tinytoken
# grade a2 --submission .` says at any time what you have.
#
# Letters: B pictures, H heads, T tokens (Tq that ask, Tk that are asked), D numbers per token, d = D / H
# numbers per head.

# %%
import math

import numpy as np

# %% [markdown]
# ### Exercise 2.1 (3 points)
# Shares over the last axis, for scores of any size, of any number of axes. `exp(1000)` is infinite; the
# scores may be 1000.


# %%
def softmax(x):
    """exp(x) over its sum along the last axis. x (..., n) -> (..., n)."""
    ### BEGIN SOLUTION
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.2 (4 points)
# The answers, and the weights beside them. Divide the scores by the square root of d, the last axis of q.


# %%
def attention(q, k, v):
    """q (..., Tq, d), k and v (..., Tk, d) -> answers (..., Tq, d), weights (..., Tq, Tk)."""
    ### BEGIN SOLUTION
    weights = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    return weights @ v, weights
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.3 (4 points)
# The three gradients, from the upstream gradient g of the answers. Go back line by line: answers = weights v;
# weights = softmax(scores); scores = q k^T / sqrt(d).


# %%
def attention_vjp(q, k, v, weights, g):
    """(dL/dq, dL/dk, dL/dv) for the weights of attention(q, k, v) and g = dL/d(answers)."""
    ### BEGIN SOLUTION
    d_weights = g @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.4 (3 points)
# The D numbers of a token are H runs of d. Bring the heads in front of the tokens, and back. Mind the order
# of what lies in memory.


# %%
def split_heads(x, heads):
    """(B, T, D) -> (B, H, T, d)"""
    ### BEGIN SOLUTION
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3)
    ### END SOLUTION


def merge_heads(x):
    """(B, H, T, d) -> (B, T, D)"""
    ### BEGIN SOLUTION
    batch, heads, tokens, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width)
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.5 (4 points)
# keep[j] is 1 for a token that stays and 0 for one that is dropped. Row i sees column j with K_ij = keep_j,
# but every token sees itself, K_ii = 1. The weights are K_ij exp(s_ij) over their row's sum. For kept rows
# this must be **exactly** what attention among the kept tokens alone gives: also if a dropped key has a score
# of 1000 more than the others, and also if only one token is left. So choose well what you take off before
# exp.


# %%
def masked_weights(scores, keep):
    """scores (B, H, T, T), keep (B, T) of 0 and 1 -> weights (B, H, T, T), rows with sum 1."""
    ### BEGIN SOLUTION
    tokens = scores.shape[-1]
    seen = np.maximum(keep[:, None, None, :], np.eye(tokens)) > 0
    top = np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)
    return weights / weights.sum(axis=-1, keepdims=True)
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.6 (3 points)
# Some tokens, x, read others, `memory`: queries from x, keys and values from the memory, H heads, answers
# side by side, then the output matrix. keep says which tokens of the memory are there; there is no "itself"
# here, and at least one is kept. `w` has the matrices: `q`, `k`, `v`, `out`, each (D, D), used as x @
# w["q"].T; no biases.


# %%
def cross_attention(x, memory, keep, w, heads):
    """x (B, Tq, D), memory (B, Tk, D), keep (B, Tk) of 0 and 1 -> (B, Tq, D)."""
    ### BEGIN SOLUTION
    q, k, v = split_heads(x @ w["q"].T, heads), split_heads(memory @ w["k"].T,
                                                            heads), split_heads(memory @ w["v"].T, heads)
    scores = np.where(keep[:, None, None, :] > 0, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    return merge_heads(softmax(scores) @ v) @ w["out"].T
    ### END SOLUTION


# %% [markdown]
# ### Exercise 2.7 (4 points)
# A block of a ViT, without biases: x + attention(norm(x)), and to that again + mlp(norm(...)). `w` has `qkv`
# (3 D, D), rows of the queries first, then of the keys, then of the values; `proj` (D, D); `fc1` (4 D, D);
# `fc2` (D, 4 D). The norms have no weights.


# %%
def layer_norm(x, eps=1e-6):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(x, w, heads):
    """x (B, T, D) -> (B, T, D)"""
    ### BEGIN SOLUTION
    q, k, v = (split_heads(part, heads) for part in np.split(layer_norm(x) @ w["qkv"].T, 3, axis=2))
    x = x + merge_heads(attention(q, k, v)[0]) @ w["proj"].T
    return x + gelu(layer_norm(x) @ w["fc1"].T) @ w["fc2"].T
    ### END SOLUTION


# %% [markdown]
# ## All together
# Your attention takes the place of the package's in a small ViT, which is trained on scenes: pictures with a
# shape among clutter, ten classes. By chance a tenth is right. It works only if the answers, the gradients
# and the heads are right.


# %%
if __name__ == "__main__":
    import tinytoken as tt
    from tinytoken.data import Batches, make_scenes, normalise
    from tinytoken.train import Classify, accuracy, fit, infer

    @tt.op
    def yours(q, k, v):
        answers, weights = attention(q, k, v)
        return answers, lambda g: attention_vjp(q, k, v, weights, g)

    def your_forward(layer, x, **options):
        q, k, v = np_heads(layer.qkv(x), layer.heads)
        return layer.proj(np_merge(yours(q, k, v)))

    @tt.op
    def np_split(x, *, heads):
        return split_heads(x, heads), merge_heads

    @tt.op
    def np_merge(x):
        heads = x.shape[1]
        return merge_heads(x), lambda g: split_heads(g, heads)

    def np_heads(x, heads):
        width = x.shape[2] // 3
        return (np_split(x[:, :, i * width:(i + 1) * width], heads=heads) for i in range(3))

    tt.nn.Attention.forward = your_forward
    tt.manual_seed(0)
    vit = tt.models.ViT(image_size=32, patch_size=4, dim=48, depth=3, heads=3)
    train, test = make_scenes(6000), make_scenes(1000, split="test")
    batches = Batches(train.images, train.labels, 64)
    fit(vit, Classify(vit), batches, steps=200, lr=2e-3)
    right = accuracy(infer(vit, normalise(test.images, batches.mean, batches.std)), test.labels)
    print(f"right on new pictures: {100 * right:.1f} % (by chance 10 %)")
