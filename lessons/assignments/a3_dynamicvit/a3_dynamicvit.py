# %% [markdown]
# # Assignment 3: DynamicViT
# You draw decisions that pass a gradient on, score tokens, write the losses that teach the scoring, remove
# tokens at inference, and count what that saves. 25 points.
#
# Write your code where `raise NotImplementedError` stands. Keep names and arguments. You may write more
# functions. All is plain NumPy; in the exercises only numpy and math may be imported. `python -m tinytoken
# grade a3 --submission .` says at any time what you have.
#
# Letters: B pictures, N patches, D numbers per token, S stages at which tokens are dropped, K classes. A
# decision is 1 for a token that stays and 0 for one that is dropped. In arrays with two columns for each
# token, column 0 is "keep", column 1 "drop".

# %%
import math

import numpy as np

# %% [markdown]
# ### Exercise 3.1 (3 points)
# A Gumbel number is -log(-log(u)) of a uniform u. Added to log-probabilities (or any logits), the largest sum
# is a draw from the softmax of them. The draw is **one-hot**: 1 for the column that won, 0 for the others.


# %%
def gumbel(u):
    """Gumbel numbers from uniform ones. u in (0, 1), any shape -> the same shape."""
    ### BEGIN SOLUTION
    return -np.log(-np.log(u))
    ### END SOLUTION


def draw(logits, noise):
    """One-hot draws. logits and noise (..., C) -> (..., C) of 0.0 and 1.0."""
    ### BEGIN SOLUTION
    winner = (logits + noise).argmax(axis=-1)
    return np.eye(logits.shape[-1])[winner]
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.2 (4 points)
# Forward: the one-hot draw. Backward: as if it had been the soft one, softmax((logits + noise) / tau). Return
# the value and a function that turns the upstream gradient into the gradient of the logits. (What is the
# derivative of the division by tau?)


# %%
def straight_through(logits, noise, tau):
    """logits and noise (..., C) -> (one-hot draw (..., C), vjp: upstream (..., C) -> gradient of the logits
    (..., C))."""
    ### BEGIN SOLUTION
    z = (logits + noise) / tau
    soft = np.exp(z - z.max(axis=-1, keepdims=True))
    soft /= soft.sum(axis=-1, keepdims=True)
    return draw(logits, noise), lambda g: soft * (g - (soft * g).sum(axis=-1, keepdims=True)) / tau
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.3 (4 points)
# The predictor looks at a token and at the picture. From the tokens x (B, N, D):
#
#     z      = gelu(layer_norm(x) @ w["in"].T + w["in_bias"])              (B, N, D), cut into halves of D / 2
#     local  = first half;  shared = mean of the second half over the kept tokens, the same for all tokens of the picture
#     z      = gelu([local, shared] @ w["out1"].T + w["out1_bias"])        D -> D / 2
#     z      = gelu(z @ w["out2"].T + w["out2_bias"])                      D / 2 -> D / 4
#     result = log_softmax(z @ w["out3"].T + w["out3_bias"])               D / 4 -> 2
#
# A dropped token has no part in the mean: so the scores of the kept ones are the same as if it were gone. At
# least one is kept.


# %%
def layer_norm(x, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def predictor(x, keep, w):
    """x (B, N, D), keep (B, N) of 0 and 1 -> log-probabilities (B, N, 2) of keep and drop."""
    ### BEGIN SOLUTION
    local, shared = np.split(gelu(layer_norm(x) @ w["in"].T + w["in_bias"]), 2, axis=2)
    shared = (shared * keep[:, :, None]).sum(axis=1, keepdims=True) / keep.sum(axis=1)[:, None, None]
    z = np.concatenate([local, np.broadcast_to(shared, local.shape)], axis=2)
    for layer in ("out1", "out2"):
        z = gelu(z @ w[layer].T + w[f"{layer}_bias"])
    return log_softmax(z @ w["out3"].T + w["out3_bias"])
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.4 (3 points)
# Given the draws of each stage, "keep" or "drop" for **every** token, what is left after each? What an
# earlier stage dropped stays dropped. Then the ratio loss: for each stage and picture the share of tokens
# that is left, its distance from the stage's target squared, the mean over pictures, the sum over stages.


# %%
def stages(draws):
    """draws (S, B, N) of 0 and 1, each stage by itself -> decisions (S, B, N): what is left after each
    stage."""
    ### BEGIN SOLUTION
    return np.cumprod(draws, axis=0)
    ### END SOLUTION


def ratio_loss(decisions, targets):
    """decisions (S, B, N), targets: S shares -> a number."""
    ### BEGIN SOLUTION
    shares = decisions.mean(axis=2)
    return float(((shares - np.asarray(targets)[:, None]) ** 2).mean(axis=1).sum())
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.5 (4 points)
# The teacher is the ViT that training started from. KL: the mean over pictures of sum_k p'_k (log p'_k - log
# p_k), p' the teacher's probabilities, p the student's. Tokens: the squared difference of the patch tokens,
# mean over the D numbers, then the mean over the **kept** tokens of each picture, then over pictures. A
# picture that kept none counts 0.


# %%
def distillation(logits, teacher_logits, tokens, teacher_tokens, keep):
    """logits (B, K), tokens (B, N, D), the teacher's likewise, keep (B, N) -> (KL, token loss), two
    numbers."""
    ### BEGIN SOLUTION
    ours, theirs = log_softmax(logits), log_softmax(teacher_logits)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()
    gaps = ((tokens - teacher_tokens) ** 2).mean(axis=2)
    of_picture = (gaps * keep).sum(axis=1) / np.maximum(keep.sum(axis=1), 1)
    return float(kl), float(of_picture.mean())
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.6 (4 points)
# At inference nothing is drawn. Of the N patches of each picture the `count` with the highest scores stay,
# **in the order in which they stood**, behind the class token, which always stays. Of equal scores the
# earlier one wins. Return which they were, too.


# %%
def keep_best(x, scores, count):
    """x (B, 1 + N, D), class token first; scores (B, N) -> (x (B, 1 + count, D), places (B, count): numbers 0
    to N - 1, ascending)."""
    ### BEGIN SOLUTION
    places = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count], axis=1)
    patches = np.take_along_axis(x[:, 1:], places[:, :, None], axis=1)
    return np.concatenate([x[:, :1], patches], axis=1), places
    ### END SOLUTION


# %% [markdown]
# ### Exercise 3.7 (3 points)
# A block of T tokens costs 12 T D^2 + 2 T^2 D multiply-adds, a predictor on n patches 1.625 n D^2 + n D / 2.
# The patch embedding costs N P D for P numbers per patch, the head D K. At stage s the predictor scores the
# patches that are left, and int(N rho^(s + 1)) go on: round the product to 9 digits before int, since 0.1 +
# 0.2 is not 0.3. Do not forget the class token.


# %%
def multiply_adds(N, P, D, K, depth, prune_before, rho):
    """Of one picture, for a DynamicViT that drops tokens before the blocks `prune_before`, with base ratio
    rho -> int."""
    ### BEGIN SOLUTION
    total, left, stage = N * P * D + D * K, N, 0
    for number in range(depth):
        if number in prune_before:
            total += 1.625 * left * D**2 + left * D / 2
            stage += 1
            left = int(round(N * rho**stage, 9))
        tokens = left + 1
        total += 12 * tokens * D**2 + 2 * tokens**2 * D
    return int(total)
    ### END SOLUTION


# %% [markdown]
# ## All together
# Your draw, decisions and removal take the place of the package's in a DynamicViT. A ViT is trained on
# scenes, then learns to do with half of its tokens at each of two stages. If all is right, it keeps what
# shows the object.


# %%
if __name__ == "__main__":
    import sys

    import training  # beside this file; for Gradescope's leaderboard the grader runs it too
    training.run(sys.modules[__name__])
