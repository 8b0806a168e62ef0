"""Attention: between tokens, under a keep mask, and LookupViT's two directions of one score matrix.

Arrays are (B, H, T, d): batch, heads, tokens, head_dim. Scores are scaled by 1 / sqrt(d): Vaswani et al.
2017, eq. 1.
"""
import math
from typing import Any

import numpy as np

from ..backend import array_module, vecdot
from ..errors import expect, shape_of
from ..tensor import op
from .norm import row_maximum, softmax_of, softmax_vjp

OFFICIAL_EPS = 1e-6


@op
def split_heads(x, *, heads, parts=1):
    """x (B, T, parts H d) -> `parts` arrays (B, H, T, d), views of x; a bare array for one part.

    A packed qkv has three parts: q, k and v.
    """
    expect(x.ndim == 3 and x.shape[2] % (parts * heads) == 0, "split_heads",
           lambda: f"{shape_of('x', x)}: the last size must be a multiple of {parts} parts x {heads} heads")
    batch, tokens, width = x.shape
    size, xp, dtype = width // (parts * heads), array_module(x), x.dtype
    packed = x.reshape(batch, tokens, parts, heads, size).transpose(2, 0, 3, 1, 4)

    def vjp(*gs):
        out = xp.empty((batch, tokens, parts, heads, size), dtype)
        for part, g in enumerate(gs):
            out[:, :, part] = 0 if g is None else g.transpose(0, 2, 1, 3)
        return out.reshape(batch, tokens, width)
    return (tuple(packed) if parts > 1 else packed[0]), vjp


@op
def merge_heads(x):
    """x (B, H, T, d) -> (B, T, H d): each token's heads side by side again."""
    expect(x.ndim == 4, "merge_heads", lambda: f"{shape_of('x', x)}, expected (B, H, T, d)")
    batch, heads, tokens, size = x.shape
    merged = x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * size)
    return merged, lambda g: g.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3)


@op
def attention(q, k, v, keep=None, *, sees_itself=True, official=False, weights=False):
    """softmax(q k^T / sqrt d) v. q (B, H, Tq, d), k and v (B, H, Tk, d) -> (B, H, Tq, d).

    keep (B, Tk): 1 keeps a key, 0 drops it; a value between is soft, and above 1 the key counts more than
        once. A_ij = K_ij e^{a_ij} / sum_j K_ij e^{a_ij} with K_ij = keep_j. For hard masks this equals
        attention over the gathered keys. A row that sees no key gives zeros, and a key whose score is -inf
        is not seen. None: plain softmax. InputError for a mask that is added to scores (0 and -inf).
    sees_itself: a token always sees itself (K_ii = 1), kept or not (DynamicViT, Rao et al. 2021, eq. 10 and
        11); then Tq = Tk.
    official: the form of the official code, with the maximum over all keys and an eps in the quotient.
    weights: return (out, A).
    """
    check_attention("attention", q, k, v, keep, sees_itself)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if keep is None:
        A = softmax_of(scores)
        of_scores = lambda u: (softmax_vjp(A, u), None)
    else:
        seen = _seen(keep, scores.shape[2:], sees_itself)
        A, of_scores = (_official_softmax if official else _masked_softmax)(scores, seen)

    def vjp(g, g_weights=None):
        u = 0 if g is None else g @ v.swapaxes(-1, -2)
        d_scores, d_seen = of_scores(u if g_weights is None else u + g_weights)
        d_scores *= scale
        return (lambda: d_scores @ k,
                lambda: d_scores.swapaxes(-1, -2) @ q,
                None if g is None else lambda: A.swapaxes(-1, -2) @ g,
                None if keep is None else lambda: _keep_gradient(d_seen, sees_itself))
    out = A @ v
    return ((out, A) if weights else out), vjp


@attention.macs
def _(q, k, v, keep=None):
    return 2 * math.prod(q) * k[2]


def check_attention(name: str, q: Any, k: Any, v: Any, keep: Any, sees_itself: bool) -> None:
    """InputError in the name of op `name` unless the shapes of q, k, v and keep fit together."""
    shapes = lambda: f"{shape_of('q', q)}, {shape_of('k', k)}, {shape_of('v', v)}"
    expect(q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
           and k.shape[:3] == v.shape[:3] and q.shape[3], name,
           lambda: f"{shapes()}: expected (B, H, Tq, d), (B, H, Tk, d), (B, H, Tk, d)")
    if keep is not None:
        expect(keep.shape == (k.shape[0], k.shape[2]), name,
               lambda: f"{shape_of('keep', keep)} for {shape_of('k', k)}: expected (B, Tk)")
        expect(not sees_itself or q.shape[2] == k.shape[2], name,
               lambda: f"{shapes()}: with keep and sees_itself Tq must equal Tk",
               "sees_itself=False for cross-attention", "05")
        # Not read on a GPU, which the host would have to wait for. Finite differences go a little below 0.
        in_range = array_module(keep) is not np or not keep.size or -0.5 < keep.min() <= keep.max() < math.inf
        expect(in_range, name,
               lambda: f"keep from {keep.min()} to {keep.max()}, expected 1 to keep a key and 0 to drop it",
               "keep=mask == 0, if the mask is one that is added to scores", "05")


def _seen(keep, shape, sees_itself):
    """K (B, 1, Tq, Tk): what each query sees of each key."""
    seen = keep[:, None, None, :]
    if sees_itself:
        itself = array_module(keep).eye(shape[0], dtype=keep.dtype)
        seen = seen + (1 - seen) * itself
    return seen


def _keep_gradient(d_seen, sees_itself):
    """From K back to keep: summed over heads and queries, without the diagonal, where K is always 1."""
    total = d_seen.sum(axis=(1, 2))
    return total - d_seen.diagonal(axis1=2, axis2=3).sum(axis=1) if sees_itself else total


def _masked_softmax(scores, seen):
    """A = K e^a / sum K e^a -> (A, u -> gradients of (a, K)).

    The maximum taken off is that of the keys with K > 0: a dropped key that towers over the kept ones would
    push them all to zero. The slope toward a key's K is e^a / sum, which could overflow: min(a - max, 0)
    limits that of a dropped key to that of the strongest kept one, and a sum so small that its reciprocal
    leaves no room to add up counts as 1e8 times the smallest normal number.
    """
    xp = array_module(scores)
    highest = row_maximum(xp.where(seen > 0, scores, -math.inf))
    slope = xp.minimum(scores, highest)  # before the difference, which could overflow
    slope -= highest
    xp.exp(slope, out=slope)
    A = slope * seen
    total = A.sum(axis=-1, keepdims=True)
    total += total == 0
    A /= total
    slope /= xp.maximum(total, xp.finfo(total.dtype).tiny * 1e8)

    def gradients(u):
        centred = u - vecdot(u, A)[..., None]
        return centred * A, centred * slope
    return A, gradients


def _official_softmax(scores, seen):
    """A = (K e^{a - max a} + eps / n) / (sum K e^{a - max a} + eps) -> (A, u -> gradients of (a, K)).

    The maximum runs over all keys, and through eps the result depends on it: so the score that is the
    maximum gets a gradient for that too.
    """
    xp, keys = array_module(scores), scores.shape[-1]
    exps = scores - row_maximum(scores)
    xp.exp(exps, out=exps)
    total = (exps * seen).sum(axis=-1, keepdims=True) + OFFICIAL_EPS
    A = (exps * seen + OFFICIAL_EPS / keys) / total

    def gradients(u):
        d_exps = (u - vecdot(u, A)[..., None]) / total
        d_scores = d_exps * exps * seen
        first = xp.arange(keys) == scores.argmax(axis=-1)[..., None]
        d_scores -= first * d_scores.sum(axis=-1, keepdims=True)
        return d_scores, d_exps * exps
    return A, gradients


@op
def lookup_gather(q, k, v):
    """LookupViT's information gathering: the compressed tokens read the lookup tokens.

    q (B, H, M, d), k and v (B, H, N, d) -> out (B, H, M, d), A (B, H, M, N) with rows that sum to 1, and the
    scaled logits that A is the softmax of. `lookup_infuse` uses A and the logits again; the gradients that
    come back through them are added up here. Koner et al. 2024, arXiv 2407.12753.
    """
    check_attention("lookup_gather", q, k, v, None, False)
    scale = 1 / math.sqrt(q.shape[-1])
    logits = (q * scale) @ k.swapaxes(-1, -2)
    A = softmax_of(logits)

    def vjp(g, g_A, g_logits):
        d_A = [part for part in (None if g is None else g @ v.swapaxes(-1, -2), g_A) if part is not None]
        d_logits = softmax_vjp(A, sum(d_A[1:], d_A[0])) if d_A else 0
        d_logits = (d_logits if g_logits is None else d_logits + g_logits) * scale
        return (lambda: d_logits @ k,
                lambda: d_logits.swapaxes(-1, -2) @ q,
                None if g is None else lambda: A.swapaxes(-1, -2) @ g)
    return (A @ v, A, logits), vjp


@lookup_gather.macs
def _(q, k, v):
    return 2 * math.prod(q) * k[2]


REUSE = ("probs", "renorm", "resoftmax")


@op
def lookup_infuse(A, logits, v, *, reuse):
    """LookupViT's global context infusion: the compressed tokens write back to the lookup tokens.

    The attention of the gather is read in the other direction: A and logits (B, H, M, N) from
    `lookup_gather`, v (B, H, M, d) -> R^T v (B, H, N, d). The paper leaves R open; `reuse` chooses a reading:

    probs: R = A. Token n receives sum_m A_mn of mass, M / N on average.
    renorm: R = A / sum_m A, so every token receives 1.
    resoftmax: R = softmax over m of the logits. Only this one reads the logits; they may else be None.

    (The fourth reading, separate queries and keys, is `attention`.)
    """
    expect(reuse in REUSE, "lookup_infuse",
           lambda: f"reuse {reuse!r}, expected {', '.join(REUSE)} "
                   "(separate: ops.attention with its own q and k)")
    expect(logits is not None or reuse != "resoftmax", "lookup_infuse",
           "no logits, which reuse='resoftmax' reads")
    expect(A.ndim == v.ndim == 4 and A.shape == (A if logits is None else logits).shape
           and A.shape[:3] == v.shape[:3], "lookup_infuse",
           lambda: f"{shape_of('A', A)}, {'' if logits is None else shape_of('logits', logits) + ', '}"
                   f"{shape_of('v', v)}: expected (B, H, M, N), logits of the same shape, and (B, H, M, d)")
    if reuse == "renorm":
        mass = A.sum(axis=2, keepdims=True)
        mass = mass + (mass == 0)  # a token whose column underflowed receives nothing
    R = A if reuse == "probs" else A / mass if reuse == "renorm" else softmax_of(logits, axis=2)

    def vjp(g):
        def of_R():
            return v @ g.swapaxes(-1, -2)

        def of_A():
            u = of_R()
            return u if reuse == "probs" else (u - (u * R).sum(axis=2, keepdims=True)) / mass
        return (of_A if reuse != "resoftmax" else None,
                (lambda: softmax_vjp(R, of_R(), axis=2)) if reuse == "resoftmax" else None,
                lambda: R @ g)
    return R.swapaxes(-1, -2) @ v, vjp


@lookup_infuse.macs
def _(A, logits, v):
    return A[3] * v[0] * v[1] * v[2] * v[3]
