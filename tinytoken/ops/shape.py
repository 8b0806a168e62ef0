"""Ops that move values and change none: their gradients move back."""
import math
from typing import Any

from ..backend import array_module, is_array
from ..errors import expect, shape_of
from ..tensor import Tensor, op


@op
def reshape(x, *, shape):
    """The values of x in another shape; one entry may be -1."""
    known = math.prod(n for n in shape if n != -1)
    fits = x.size == known if -1 not in shape else known and x.size % known == 0
    expect(fits, "reshape",
           lambda: f"{shape_of('x', x)} has {x.size} values, which do not fit {tuple(shape)}")
    return x.reshape(shape), lambda g: g.reshape(x.shape)


@op
def transpose(x, *, axes=None):
    """Axes in another order (None: reversed)."""
    axes = tuple(range(x.ndim))[::-1] if axes is None else tuple(axes)
    expect(sorted(a % x.ndim for a in axes) == list(range(x.ndim)), "transpose",
           lambda: f"axes {axes} for {shape_of('x', x)}")
    back = sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim)
    return x.transpose(axes), lambda g: g.transpose(back)


def swapaxes(x: Tensor, a: int, b: int) -> Tensor:
    """x with axes a and b exchanged."""
    axes = list(range(x.ndim))
    expect(-x.ndim <= min(a, b) and max(a, b) < x.ndim, "swapaxes",
           lambda: f"axes {a} and {b} of {shape_of('x', x)}")
    axes[a], axes[b] = axes[b], axes[a]
    return transpose(x, axes=axes)


@op
def concat(*xs, axis=0):
    """Arrays joined along `axis`; their other sizes must agree."""
    xp = array_module(*xs)
    others = {x.shape[:axis % x.ndim] + x.shape[axis % x.ndim + 1:] for x in xs}
    expect(len(others) == 1, "concat",
           lambda: f"shapes {', '.join(str(x.shape) for x in xs)} differ outside axis {axis}")
    cuts = [sum(x.shape[axis] for x in xs[:i]) for i in range(len(xs) + 1)]

    def vjp(g):
        before = (slice(None),) * (axis % g.ndim)
        return tuple(g[(*before, slice(start, stop))] for start, stop in zip(cuts, cuts[1:]))
    return xp.concatenate(xs, axis=axis), vjp


@op
def index(x, *, key):
    """x[key]; the key may hold numbers, slices, None, ... and integer or boolean arrays.

    The gradients of a row that is taken more than once add up.
    """
    parts = key if isinstance(key, tuple) else (key,)
    expect(not any(isinstance(part, list) for part in parts), "index", "a list as index: give an array")
    repeats = any(is_array(part) and part.dtype.kind in "iu" for part in parts)

    def vjp(g):
        xp = array_module(g)
        out = xp.zeros(x.shape, g.dtype)
        if repeats:
            xp.add.at(out, key, g)
        else:
            out[key] = g
        return out
    return x[key], vjp


def getitem(x: Tensor, key: Any) -> Tensor:
    """Tensor.__getitem__: x[key], where Tensors in the key become their arrays."""
    raw = tuple(part.data if isinstance(part, Tensor) else part
                for part in (key if isinstance(key, tuple) else (key,)))
    # integers are not indexed by the op, which would cast them to floats
    return index(x, key=raw) if x.dtype.kind == "f" else Tensor(x.data[raw])


@op
def pad(x, *, widths):
    """Zeros around x: widths is ((before, after), ...), one pair per axis."""
    expect(len(widths) == x.ndim and all(len(w) == 2 and min(w) >= 0 for w in widths), "pad",
           lambda: f"widths {widths} for {shape_of('x', x)}: a pair of counts per axis expected")
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape))
    return array_module(x).pad(x, widths), lambda g: g[inside]


@op
def broadcast_to(x, *, shape):
    """x repeated to `shape` by NumPy's rules (a view)."""
    return array_module(x).broadcast_to(x, shape), lambda g: g
