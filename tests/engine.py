"""Small ops and short words for the tests of the engine."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken import Tensor
from tinytoken.backend import to_numpy
from tinytoken.tensor import Index



def leaf(values, dtype="float64", xp=np):
    return Tensor(xp.asarray(values, dtype), requires_grad=True)


def equal(a, b):
    np.testing.assert_array_equal(to_numpy(a.data if isinstance(a, Tensor) else a), b)


def refusal(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@tt.op
def axpy(x, y, shift=0.5, *, a=2.0, scale=1.0):
    """a x + y + shift, times scale."""
    return (a * x + y + shift) * scale, lambda g: (g * (a * scale), g * scale, lambda: g * scale)


@tt.op
def pair(x):
    """(2x, 3x), and a note of the upstream gradients that arrive."""
    def vjp(*gs):
        arrived.append([None if g is None else np.array(g) for g in gs])
        total = np.zeros_like(x)
        for factor, g in zip((2, 3), gs):
            total = total if g is None else total + factor * g
        return total
    return (2 * x, 3 * x), vjp


arrived = []


@tt.op
def twice_the_same(a, b):
    """a + b. Hands the very gradient it was given to both inputs."""
    return a + b, lambda g: (g, g)


@tt.op
def pick(x, rows: Index, weight=None):
    """x[rows], with an index argument that must stay as it is, and one that is cast."""
    seen.append((rows.dtype, None if weight is None else weight.dtype))

    def vjp(g):
        out = np.zeros_like(x)
        np.add.at(out, rows, g)
        return out, None, None
    return x[rows], vjp


seen = []


def op_returning(make_entries, forward=lambda x, y: x + y):
    """An op of two arrays whose vjp returns what make_entries(g) returns."""
    @tt.op
    def student(x, y):
        return forward(x, y), make_entries
    return student
