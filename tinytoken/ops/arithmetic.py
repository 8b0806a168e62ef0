"""Elementwise arithmetic and reductions.

Shapes broadcast by NumPy's rules; the engine sums the gradients back over the axes that were broadcast.
"""
from typing import Any

from ..backend import Array, array_module
from ..errors import expect, shape_of
from ..tensor import op


@op
def add(a, b):
    """a + b, broadcast."""
    return a + b, lambda g: (g, g)


@op
def subtract(a, b):
    """a - b, broadcast."""
    return a - b, lambda g: (g, lambda: -g)


@op
def multiply(a, b):
    """a * b, broadcast."""
    return a * b, lambda g: (lambda: g * b, lambda: g * a)


@op
def divide(a, b):
    """a / b, broadcast."""
    out = a / b
    return out, lambda g: (lambda: g / b, lambda: -g * out / b)


@op
def negative(x):
    """-x."""
    return -x, lambda g: -g


@op
def power(x, *, exponent):
    """x ** exponent for a number `exponent`, elementwise."""
    expect(isinstance(exponent, (int, float)), "power", lambda: f"exponent {exponent!r}, expected a number")
    return _power(x, exponent), lambda g: g * exponent * _power(x, exponent - 1) if exponent else g * 0.0


def _power(x, exponent):
    # Small whole powers are products: NumPy's float32 x**3 takes as long as 400 multiplications.
    if exponent in (1, 2, 3):
        return x if exponent == 1 else x * x if exponent == 2 else x * x * x
    return x ** exponent


@op
def exp(x):
    """e ** x, elementwise."""
    out = array_module(x).exp(x)
    return out, lambda g: g * out


@op
def log(x):
    """Natural logarithm, elementwise."""
    return array_module(x).log(x), lambda g: g / x


@op
def sqrt(x):
    """Square root, elementwise."""
    out = array_module(x).sqrt(x)
    return out, lambda g: g / (2 * out)


@op
def sum(x, *, axis=None, keepdims=False):
    """Sum over `axis` (int, tuple, or None for all)."""
    shape = x.shape
    return x.sum(axis=axis, keepdims=keepdims), lambda g: _spread(g, shape, axis, keepdims)


@op
def mean(x, *, axis=None, keepdims=False):
    """Mean over `axis` (int, tuple, or None for all)."""
    (out, count), shape = mean_of("mean", x, axis, keepdims), x.shape
    return out, lambda g: _spread(g / count, shape, axis, keepdims)


def mean_of(where: str, x: Array, axis: Any, keepdims: bool = False) -> tuple[Array, int]:
    """(mean of a raw array over `axis`, how many values each mean is of). InputError if it is of none."""
    total = x.sum(axis=axis, keepdims=keepdims)
    count = x.size // (total.size or 1)
    expect(count or not total.size, where, lambda: f"{shape_of('x', x)}: no values along axis {axis}")
    return total / count, count


@op
def max(x, *, axis=None, keepdims=False):
    """Largest value over `axis`. Where several are equal the gradient is shared equally among them."""
    out = x.max(axis=axis, keepdims=keepdims)

    def vjp(g):
        winners = (x == _spread(out, x.shape, axis, keepdims)).astype(x.dtype)
        return _spread(g, x.shape, axis, keepdims) * winners / winners.sum(axis=axis, keepdims=True)
    return out, vjp


def _spread(g, shape, axis, keepdims):
    """g, shaped like the output of a reduction over `axis`, repeated back to `shape` (a read-only view)."""
    xp = array_module(g)
    if axis is not None and not keepdims and shape:
        g = xp.expand_dims(g, axis)
    return xp.broadcast_to(g, shape)
