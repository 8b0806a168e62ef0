"""Ops that move values and change none: their gradients move back."""
import math
from typing import Any

import numpy as np

from ..backend import array_module, is_array
from ..errors import expect, shape_of
from ..tensor import UNFORESEEN, Tensor, op, refuse


@op
def reshape(x, *, shape):
    """The values of x in another shape; one entry may be -1."""
    known = math.prod(n for n in shape if n != -1)
    fits = x.size == known if -1 not in shape else known and x.size % known == 0
    expect(fits, "reshape",
           lambda: f"{shape_of('x', x)} has {x.size} values, which do not fit {tuple(shape)}")
    before = x.shape
    return x.reshape(shape), lambda g: g.reshape(before)


@op
def transpose(x, *, axes=None):
    """Axes in another order (None: reversed)."""
    axes = tuple(range(x.ndim))[::-1] if axes is None else tuple(axes)
    expect(len(axes) == x.ndim and sorted(a % x.ndim for a in axes) == list(range(x.ndim)), "transpose",
           lambda: f"axes {axes} for {shape_of('x', x)}")
    back = sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim)
    return x.transpose(axes), lambda g: g.transpose(back)


def swapaxes(x: Tensor, a: int, b: int) -> Tensor:
    """x with axes a and b exchanged."""
    axes = list(range(x.ndim))
    expect(all(isinstance(i, (int, np.integer)) and -x.ndim <= i < x.ndim for i in (a, b)), "swapaxes",
           lambda: f"axes {a!r} and {b!r} of {shape_of('x', x)}")
    axes[a], axes[b] = axes[b], axes[a]
    return transpose(x, axes=axes)


@op
def concat(*xs, axis=0):
    """Arrays joined along `axis`; their other sizes must agree."""
    xp = array_module(*xs)
    expect(all(x.ndim for x in xs), "concat", "a 0-d array, expected at least one axis")
    others = {x.shape[:axis % x.ndim] + x.shape[axis % x.ndim + 1:] for x in xs}
    expect(len(others) == 1, "concat",
           lambda: f"shapes {', '.join(str(x.shape) for x in xs)} differ outside axis {axis}")
    cuts = [sum(x.shape[axis] for x in xs[:i]) for i in range(len(xs) + 1)]

    def vjp(g):
        before = (slice(None),) * (axis % g.ndim)
        return tuple(g[(*before, slice(start, stop))] for start, stop in zip(cuts, cuts[1:]))
    return xp.concatenate(xs, axis=axis), vjp


PLAIN = (slice, int, type(None), type(Ellipsis), np.integer, np.bool_)  # in a key: what takes nothing twice


@op
def index(x, *, key):
    """x[key]; the key may hold numbers, slices, None, ... and integer or boolean arrays, lists or tuples.

    The gradients of a row that is taken more than once add up.
    """
    key, before = _plain_key(key, array_module(x)), x.shape
    repeats = any(is_array(part) and part.dtype.kind in "iu" for part in key)

    def vjp(g):
        xp = array_module(g)
        out = xp.zeros(before, g.dtype)
        if repeats:
            xp.add.at(out, key, g)
        else:
            out[key] = g
        return out
    return x[key], vjp


def _plain_key(key, xp):
    """The key as a tuple of numbers, slices, None, ... and arrays: what else NumPy takes for an array becomes
    one, so that it is seen whether it can name an element twice."""
    parts = key if isinstance(key, tuple) else (key,)
    return tuple([part if isinstance(part, PLAIN) or is_array(part) else _index_array(part, xp)
                  for part in parts])


def _index_array(part, xp):
    if isinstance(part, Tensor):
        return part.data
    array = np.asarray(part)
    array = array if array.size else array.astype("int64")
    expect(array.dtype.kind in "biu", "index",
           lambda: f"an index of {array.dtype}, expected integers or truth values")
    return xp.asarray(array)


def getitem(x: Tensor, key: Any) -> Tensor:
    """Tensor.__getitem__: x[key], where Tensors in the key become their arrays."""
    if x.dtype.kind == "f":
        return index(x, key=key)
    # integers are not indexed by the op, which would cast them to floats
    try:
        return Tensor(x.data[_plain_key(key, array_module(x.data))])
    except UNFORESEEN as error:
        refuse("index", [x.data], {"key": key}, error)


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
