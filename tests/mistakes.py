"""Small mistakes for the tests of gradcheck, and what it must refuse."""
import numpy as np
import pytest

from tinytoken import GradientError, op, ops
from tinytoken.checking import gradcheck


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def refuses(fn, *inputs, **settings):
    with pytest.raises(GradientError) as caught:
        gradcheck(fn, *inputs, **settings)
    return caught.value


@op
def zero_softmax(x):
    return ops.softmax.function(x)[0], lambda g: 0 * g


@op
def double(x):
    """Twice x, with the vjp of three times x."""
    return 2 * x, lambda g: 3 * g


@op
def two(x, y):
    """(x y, x + y); a gradient of the second output never reaches y."""
    def vjp(g, h):
        of_x = [part for part in (None if g is None else g * y, h) if part is not None]
        return sum(of_x), None if g is None else g * x
    return (x * y, x + y), vjp
