"""Softmax and layer norm: each value depends on its whole row, so the gradients do too."""
from ..backend import Array, array_module, vecdot
from ..errors import expect, shape_of
from ..tensor import op
from .dense import column_sums


def softmax_of(x: Array, axis: int = -1) -> Array:
    """softmax of a raw array. The maximum is subtracted first, so that exp cannot overflow."""
    xp = array_module(x)
    out = x - x.max(axis=axis, keepdims=True)
    xp.exp(out, out=out)
    out /= out.sum(axis=axis, keepdims=True)
    return out


def softmax_vjp(out: Array, g: Array, axis: int = -1) -> Array:
    """out * (g - sum(g * out)): the softmax's vjp, from its output."""
    dot = vecdot(g, out)[..., None] if axis == -1 else (g * out).sum(axis=axis, keepdims=True)
    grad = g - dot
    grad *= out
    return grad


@op
def softmax(x, *, axis=-1):
    """exp(x) / sum(exp(x)) over `axis`."""
    out = softmax_of(x, axis)
    return out, lambda g: softmax_vjp(out, g, axis)


@op
def log_softmax(x, *, axis=-1):
    """x - log(sum(exp(x))) over `axis`."""
    out = log_softmax_of(x, axis)
    return out, lambda g: g - array_module(x).exp(out) * g.sum(axis=axis, keepdims=True)


def log_softmax_of(x: Array, axis: int = -1) -> Array:
    """log softmax of a raw array."""
    xp = array_module(x)
    shifted = x - x.max(axis=axis, keepdims=True)
    shifted -= xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))
    return shifted


@op
def layer_norm(x, weight=None, bias=None, *, eps=1e-6):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba, Kiros & Hinton 2016).

    x (..., D), weight and bias (D,) or None. eps is 1e-6 in timm's ViT, 1e-5 in DynamicViT's predictor.
    """
    size = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        expect(p is None or p.shape == (size,), "layer_norm",
               lambda: f"{shape_of(name, p)} for {shape_of('x', x)}: expected ({size},)")
    xp = array_module(x)
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
            return u.reshape(x.shape)
        return of_x, lambda: column_sums(g * normed), lambda: column_sums(g)
    return out.reshape(x.shape), vjp
