"""Choosing tokens: Gumbel-softmax for training, top-k and gathering for inference."""
import numpy as np

from ..backend import Array, array_module, faster, is_array, scatter_add
from ..errors import expect, shape_of
from ..tensor import Index, Tensor, op
from .dense import rows_of
from .norm import softmax_of, softmax_vjp


@op
def gumbel_softmax(log_probs, noise, *, tau=1.0, hard=False):
    """softmax((log_probs + noise) / tau) over the last axis (Jang, Gu & Poole 2017, eq. 2).

    noise: standard Gumbel draws of the same shape. hard: forward the one-hot of the maximum (of equal maxima
    the first), exactly 0 or 1, with the gradient of the soft value (straight-through).
    """
    expect(log_probs.shape == noise.shape, "gumbel_softmax",
           lambda: f"{shape_of('log_probs', log_probs)}, {shape_of('noise', noise)}: equal shapes expected")
    expect(tau > 0, "gumbel_softmax", lambda: f"tau {tau}, expected a positive temperature")
    xp = array_module(log_probs)
    soft = softmax_of((log_probs + noise) / tau)
    # The argmax is that of the soft values, so the 1 stands where the gradient's softmax has its maximum.
    out = (xp.arange(soft.shape[-1]) == soft.argmax(axis=-1)[..., None]).astype(soft.dtype) if hard else soft

    def vjp(g):
        grad = softmax_vjp(soft, g) / tau
        return grad, grad
    return out, vjp


@op
def take_tokens(x, index: Index):
    """Rows of each image. x (B, N, D), index (B, k) integers -> (B, k, D).

    The gradients of a row that is taken more than once add up.
    """
    rows = _flat_rows("take_tokens", x, index, x.shape[1])
    (batch, length, width), shape = x.shape, x.shape

    def vjp(g):
        out = array_module(g).zeros((batch * length, width), g.dtype)
        scatter_add(out, rows, rows_of(g))
        return out.reshape(shape), None
    return rows_of(x)[rows].reshape(batch, index.shape[1], width), vjp


@op
def put_tokens(x, index: Index, *, length):
    """The reverse of take_tokens: zeros (B, length, D) with the rows of x (B, k, D) added at index (B, k)."""
    rows = _flat_rows("put_tokens", x, index, length)
    expect(index.shape == x.shape[:2], "put_tokens",
           lambda: f"{shape_of('index', index)} for {shape_of('x', x)}: one place per row expected")
    (batch, _, width), shape = x.shape, x.shape
    out = array_module(x).zeros((batch * length, width), x.dtype)
    scatter_add(out, rows, rows_of(x))
    return out.reshape(batch, length, width), lambda g: (rows_of(g)[rows].reshape(shape), None)


def _flat_rows(where, x, index, length):
    """index as rows of the batch laid end to end (B length, D).

    Checked, since an index out of range would be a row of another image.
    """
    expect(x.ndim == 3 and index.ndim == 2 and len(x) == len(index) and index.dtype.kind in "iu", where,
           lambda: f"{shape_of('x', x)}, {shape_of('index', index)} {index.dtype}: "
                   "expected (B, N, D) and integers (B, k)")
    xp = array_module(x)
    # not checked on a GPU, which the host would have to wait for
    in_range = xp is not np or not index.size or 0 <= index.min() and index.max() < length
    expect(in_range, where, lambda: f"index from {index.min()} to {index.max()}, expected 0 to {length - 1}")
    return (index.astype("int64", copy=False) + xp.arange(len(index))[:, None] * length).reshape(-1)


def top_k(scores: Array | Tensor, k: int) -> Array:
    """The indices of the k highest scores of each row, in ascending order. scores (B, N) -> (B, k) int64.

    Of equal scores the first ones are taken. Not differentiable: takes an array or Tensor, returns an array.
    """
    scores = scores.data if isinstance(scores, Tensor) else scores
    whole = isinstance(k, (int, np.integer))
    expect(whole and is_array(scores) and scores.ndim == 2 and 0 <= k <= scores.shape[1], "top_k",
           lambda: f"k {k!r} of scores {getattr(scores, 'shape', type(scores).__name__)}: "
                   "expected (B, N) and 0 <= k <= N")
    expect(scores.dtype.kind in "biuf", "top_k", lambda: f"scores of {scores.dtype}, expected numbers")
    xp = array_module(scores)
    fast = faster(top_k, xp, scores, k)
    if fast:
        return fast(scores, k)
    falling = -scores if scores.dtype.kind == "f" else ~scores  # -0 and -(-128) are no lower than 0 and -128
    return xp.sort(xp.argsort(falling, axis=1, kind="stable")[:, :k], axis=1)
