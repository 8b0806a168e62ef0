"""Kernels as implementations of ops: each has the contract of the op it stands in for, from arrays to the
output and its vjp. What they do not cover (small arrays, the official mask) runs as the plain op."""
import math

import numpy as np

from .. import ops
from ..backend import CDF_POLYNOMIAL, blas_threads, implementation
from ..ops.attend import check_attention
from ..ops.conv import Taps, both_axes, check_sizes
from ..ops.dense import column_sums, rows_of
from ..train.optim import AdamW
from .launcher import contiguous, launch, worth

registry: dict = {}  # op name -> the op


def kernels_of(op, covers=lambda *arrays, **settings: True):
    """Decorator: an implementation of `op` for arrays that are worth it, and for which `covers` says yes."""
    registry[op.name] = op
    return op.implementation("numpy", lambda *arrays, **settings: worth(*arrays)
                             and covers(*arrays, **settings))


def polynomial_of(x):
    """The polynomial of Phi, in x's dtype."""
    return tuple(map(x.dtype.type, CDF_POLYNOMIAL))


@kernels_of(ops.gelu)
def gelu(x):
    x, polynomial = contiguous(x), polynomial_of(x)
    out = np.empty_like(x)
    launch("gelu", x.reshape(-1), polynomial, out.reshape(-1))

    def vjp(g):
        dx = np.empty_like(x)
        launch("gelu_vjp", x.reshape(-1), contiguous(g).reshape(-1), polynomial, dx.reshape(-1))
        return dx
    return out, vjp


@kernels_of(ops.layer_norm, lambda x, weight=None, bias=None, *, eps=1e-6: x.ndim and x.shape[-1]
            and all(p is None or p.shape == x.shape[-1:] for p in (weight, bias)))
def layer_norm(x, weight=None, bias=None, *, eps=1e-6):
    rows, shape, dtype = rows_of(contiguous(x)), x.shape, x.dtype
    width, blocks = rows.shape[1], -(-len(rows) // 256)  # rows of a partial sum
    weight = np.ones(width, dtype) if weight is None else contiguous(weight)
    bias = np.zeros(width, dtype) if bias is None else contiguous(bias)
    out, mean, scale = np.empty_like(rows), np.empty(len(rows), dtype), np.empty(len(rows), dtype)
    launch("layer_norm", rows, weight, bias, dtype.type(eps), out, mean, scale)

    def vjp(g):
        dx, parts = np.empty_like(rows), np.zeros((2, blocks, width), dtype)
        launch("layer_norm_vjp", rows, weight, mean, scale, rows_of(contiguous(g)), dx, *parts)
        return dx.reshape(shape), *parts.sum(axis=1)
    return out.reshape(shape), vjp


@kernels_of(ops.softmax, lambda x, *, axis=-1: x.ndim and axis in (-1, x.ndim - 1))
def softmax(x, *, axis=-1):
    out, one = np.array(x, order="C"), x.dtype.type(1)
    launch("softmax", rows_of(out), one)

    def vjp(g):
        u = np.array(g, order="C")
        launch("softmax_vjp", rows_of(out), rows_of(u), one)
        return u
    return out, vjp


@kernels_of(ops.attention, lambda q, k, v, keep=None, *, sees_itself=True, official=False, weights=False:
            not official)
def attention(q, k, v, keep=None, *, sees_itself=True, official=False, weights=False):
    check_attention("attention", q, k, v, keep, sees_itself)
    A, of_scores = attention_weights(q, k, keep, sees_itself)

    def vjp(g, g_weights=None):
        u = np.array(g_weights, order="C") if g is None else contiguous(g @ v.swapaxes(-1, -2))
        if g is not None and g_weights is not None:
            u += g_weights
        d_keep = of_scores(u)
        return (lambda: u @ k, lambda: u.swapaxes(-1, -2) @ q,
                None if g is None else lambda: A.swapaxes(-1, -2) @ g, d_keep)
    out = A @ v
    return ((out, A) if weights else out), vjp


def attention_weights(q, k, keep, sees_itself):
    """-> A (B, H, Tq, Tk), and a function of A's gradient u (contiguous), which becomes that of q k^T; it
    returns that of keep, or None."""
    scale = q.dtype.type(1 / math.sqrt(q.shape[-1]))
    scores = contiguous(q @ k.swapaxes(-1, -2))
    if keep is None:
        launch("softmax", rows_of(scores), scale)
        return scores, lambda u: launch("softmax_vjp", rows_of(scores), rows_of(u), scale)
    keep, A = contiguous(keep), np.empty_like(scores)
    launch("masked_softmax", scores, keep, sees_itself, scale, A)  # scores: the slopes from here on

    def of_scores(u):
        d_keep = np.zeros_like(keep)
        launch("masked_softmax_vjp", A, scores, u, sees_itself, scale, d_keep)
        return d_keep
    return A, of_scores


@kernels_of(ops.lookup_gather)
def lookup_gather(q, k, v):
    check_attention("lookup_gather", q, k, v, None, False)
    one, scale = q.dtype.type(1), 1 / math.sqrt(q.shape[-1])
    logits = (q * scale) @ k.swapaxes(-1, -2)
    A = np.array(logits, order="C")
    launch("softmax", rows_of(A), one)

    def vjp(g, g_A, g_logits):
        u = None if g is None else contiguous(g @ v.swapaxes(-1, -2))
        if g_A is not None:
            u = np.array(g_A, order="C") if u is None else np.add(u, g_A, out=u)
        if u is None:
            u = np.zeros_like(A)
        else:
            launch("softmax_vjp", rows_of(A), rows_of(u), one)
        if g_logits is not None:
            u += g_logits
        u *= scale
        return (lambda: u @ k, lambda: u.swapaxes(-1, -2) @ q,
                None if g is None else lambda: A.swapaxes(-1, -2) @ g)
    return (A @ v, A, logits), vjp


@kernels_of(ops.lookup_infuse, lambda A, logits, v, *, reuse: reuse == "resoftmax" and logits is not None
            and A.ndim == v.ndim == 4 and A.shape == logits.shape and A.shape[:3] == v.shape[:3])
def lookup_infuse(A, logits, v, *, reuse):
    """Of reuse="resoftmax" alone: the other readings have no exp."""
    R = np.array(logits, order="C")
    launch("softmax_columns", R.reshape(-1, *R.shape[2:]))

    def vjp(g):
        def of_logits():
            u = contiguous(v @ g.swapaxes(-1, -2))
            launch("softmax_columns_vjp", R.reshape(-1, *R.shape[2:]), u.reshape(-1, *R.shape[2:]))
            return u
        return None, of_logits, lambda: R @ g
    return R.swapaxes(-1, -2) @ v, vjp


# A depthwise convolution. Maps come from tokens and go back to them, so their channels mostly lie side by
# side in memory already; others are turned.

def padded(x, down, across):
    """x (B, H, W, C) with zeros around it."""
    out = np.zeros((len(x), x.shape[1] + 2 * down, x.shape[2] + 2 * across, x.shape[3]), x.dtype)
    out[:, down:down + x.shape[1], across:across + x.shape[2]] = x
    return out


@kernels_of(ops.conv2d, lambda x, weight, bias=None, *, stride=1, padding=0, groups=1:
            x.ndim == weight.ndim == 4 and groups == x.shape[1] == len(weight) and weight.shape[1] == 1
            and stride in (1, (1, 1), [1, 1])
            and all(isinstance(zeros, int) and zeros < taps
                    for zeros, taps in zip(both_axes(padding), weight.shape[2:])))
def conv2d(x, weight, bias=None, *, stride=1, padding=0, groups=1):
    """Of stride 1, with one filter per channel."""
    check_sizes(x, weight, bias, stride, padding, groups)
    taps, (down, across) = Taps(x, weight.shape[2:], stride, padding), both_axes(padding)
    (kh, kw), (B, C, H, W), dtype = taps.kernel, x.shape, x.dtype
    columns, none = (0,) * kw, np.zeros(C, dtype)
    filters = np.array(weight[:, 0].transpose(1, 2, 0), order="C")
    lines, out = padded(x.transpose(0, 2, 3, 1), down, across), np.empty((B, *taps.size, C), dtype)
    launch("depthwise", lines, filters, none if bias is None else contiguous(bias), columns, out)

    def vjp(g):
        g = g.transpose(0, 2, 3, 1)

        def of_x():  # again a convolution: of the gradient, with the filters turned by half a circle
            dx, turned = np.empty((B, H, W, C), dtype), np.array(filters[::-1, ::-1], order="C")
            launch("depthwise", padded(g, kh - 1 - down, kw - 1 - across), turned, none, columns, dx)
            return dx.transpose(0, 3, 1, 2)

        def of_weight():
            parts = np.zeros((min(B, -(-g[..., 0].size // 256)), kh, kw, C), dtype)
            launch("depthwise_weight", lines, contiguous(g), columns, parts)
            return parts.sum(axis=0).transpose(2, 0, 1)[:, None]
        return of_x, of_weight, lambda: column_sums(rows_of(contiguous(g)))
    return out.transpose(0, 3, 1, 2), vjp


@implementation(AdamW.step, "numpy", covers=lambda optimizer, lr: worth(optimizer.flat.data))
def adamw(optimizer, lr):
    """AdamW.step's work -> the gradient's norm before clipping."""
    optimizer.steps += 1
    flat, (first, second) = optimizer.flat, optimizer.corrections(optimizer.steps)
    of = flat.data.dtype.type
    with blas_threads(1):  # more threads would sum in another order
        norm = np.sqrt(flat.grad @ flat.grad)
    clip = of(1) if optimizer.clip is None else np.minimum(optimizer.clip / (norm + 1e-12), of(1))
    betas = of(optimizer.betas[0]), of(optimizer.betas[1])
    for start, stop, scale, decay, frozen in flat.segments:
        cut, rate = slice(start, stop), lr * scale if optimizer.steps > frozen else 0.0
        launch("adamw", flat.data[cut], flat.grad[cut], optimizer.m[cut], optimizer.v[cut], clip, betas,
               of(optimizer.eps), of(rate / first), of(second),
               of(1 - rate * optimizer.weight_decay if decay else 1))
    if optimizer.mean is not None:
        launch("follow", optimizer.mean, flat.data, of(optimizer.mean_share(optimizer.steps)))
    return norm
