"""Softmax and layer norm: each value depends on its whole row, so the gradients do too.

Minus infinity in a row masks the value: the others come out as if it were not there.
"""
from ..backend import Array, array_module, vecdot
from ..errors import expect, shape_of
from ..tensor import op
from .dense import column_sums


def row_maximum(x: Array, axis: int = -1) -> Array:
    """The largest value over `axis`, which stays as an axis of length 1. Of nothing but minus infinity it is
    the lowest finite number, since -inf - -inf would be NaN. Of no values at all it is 0."""
    xp = array_module(x)
    highest = x.max(axis=axis, keepdims=True) if x.size else x.sum(axis=axis, keepdims=True)
    return xp.maximum(highest, xp.finfo(x.dtype).min)


def softmax_of(x: Array, axis: int = -1) -> Array:
    """softmax of a raw array. The maximum is subtracted first, so that exp cannot overflow."""
    if not x.size:
        return x
    xp = array_module(x)
    out = x - row_maximum(x, axis)
    xp.exp(out, out=out)
    out /= xp.maximum(out.sum(axis=axis, keepdims=True), 1)  # less than 1 is only the sum of nothing, 0
    return out


def softmax_vjp(out: Array, g: Array, axis: int = -1) -> Array:
    """out * (g - sum(g * out)): the softmax's vjp, from its output."""
    dot = vecdot(g, out)[..., None] if axis == -1 else (g * out).sum(axis=axis, keepdims=True)
    grad = g - dot
    grad *= out
    return grad


@op
def softmax(x, *, axis=-1):
    """exp(x) / sum(exp(x)) over `axis`. Zeros where all of x is -inf."""
    out, shape = softmax_of(_with_axis(x), axis), x.shape
    return out.reshape(shape), lambda g: softmax_vjp(out, g.reshape(out.shape), axis).reshape(shape)


@op
def log_softmax(x, *, axis=-1):
    """x - log(sum(exp(x))) over `axis`. -inf where all of x is."""
    out, shape = log_softmax_of(_with_axis(x), axis), x.shape

    def vjp(g):
        g = g.reshape(out.shape)
        return (g - array_module(g).exp(out) * g.sum(axis=axis, keepdims=True)).reshape(shape)
    return out.reshape(shape), vjp


def _with_axis(x):
    """x, but a 0-d array as a row of one."""
    return x if x.ndim else x.reshape(1)


def log_softmax_of(x: Array, axis: int = -1) -> Array:
    """log softmax of a raw array."""
    if not x.size:
        return x
    xp = array_module(x)
    shifted = x - row_maximum(x, axis)
    shifted -= xp.log(xp.maximum(xp.exp(shifted).sum(axis=axis, keepdims=True), 1))
    return shifted


@op
def layer_norm(x, weight=None, bias=None, *, eps=1e-6):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba, Kiros & Hinton 2016).

    x (..., D), weight and bias (D,) or None. eps is 1e-6 in timm's ViT, 1e-5 in DynamicViT's predictor.
    """
    expect(x.ndim and x.shape[-1], "layer_norm", lambda: f"{shape_of('x', x)}, expected (..., D)")
    size = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        expect(p is None or p.shape == (size,), "layer_norm",
               lambda: f"{shape_of(name, p)} for {shape_of('x', x)}: expected ({size},)")
    xp, shape = array_module(x), x.shape
    rows = x.reshape(-1, size)
    average = xp.full(size, 1 / size, x.dtype)  # row means as a product: faster than .mean(-1)
    normed = rows - (rows @ average)[:, None]
    scale = 1 / xp.sqrt(vecdot(normed, normed) / size + eps)[:, None]
    normed *= scale
    out = normed.copy() if weight is None else normed * weight
    if bias is not None:
        out += bias

    def vjp(g):
        g = g.reshape(-1, size)

        def of_x():
            u = g.copy() if weight is None else g * weight
            along = vecdot(u, normed)[:, None] / size
            u -= (u @ average)[:, None]
            u -= normed * along
            u *= scale
            return u.reshape(shape)
        return of_x, lambda: column_sums(g * normed), lambda: column_sums(g)
    return out.reshape(shape), vjp
