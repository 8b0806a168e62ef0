"""The diagnosis of a wrong gradient (the kinds on real mistakes are in test_planted)."""
import math

import numpy as np
import pytest

from mistakes import normal, refuses
from tinytoken import op
from tinytoken.checking.diagnosis import Evidence, read


def evidence(analytic, numeric, contributions=None, **changes):
    values = dict(shape=numeric.shape, analytic=analytic.reshape(-1), numeric=numeric.reshape(-1),
                  at_zero=np.zeros(numeric.size), allowed=1e-7, full=True, sizes={8: "axis 3 of q"},
                  others={}, contributions=lambda: contributions)
    return Evidence(**values | changes)


@pytest.mark.parametrize("factor, name", [
    (1 / math.sqrt(8), "0.353553 x numeric, perhaps 1/sqrt(8) (axis 3 of q)"),
    (math.sqrt(8), "perhaps sqrt(8) (axis 3 of q)"),
    (8, "perhaps 8 (axis 3 of q)"), (0.125, "perhaps 1/8 (axis 3 of q)"), (2, "perhaps 2"),
    (0.5, "perhaps 1/2"),
    (-8, "analytic is -8 x numeric, perhaps 8 (axis 3 of q)")])
def test_factors_that_have_a_name(factor, name):
    n = normal(2, 3)
    kind, text = read(evidence(factor * n, n))
    assert kind == "factor" and name in text


def test_a_factor_without_a_name():
    n = normal(2, 3)
    assert read(evidence(1.01 * n, n)) == ("factor", "a constant factor: analytic is 1.01 x numeric")
    # one number is always a multiple of another
    assert read(evidence(np.array([1.01]), np.ones(1)))[0] is None
    assert read(evidence(np.array([8.0]), np.ones(1)))[0] == "factor"
    kind, text = read(evidence(n / 2, n, sizes={2: "axis 0 of a", 4: "axis 1 of a"}))
    assert text.endswith("perhaps 1/2 (axis 0 of a) or 1/sqrt(4) (axis 1 of a)")


def test_readings_of_a_sample_do_not_look_at_places():
    n = normal(3, 3)
    assert read(evidence(n.T.copy(), n))[0] == "transposed"
    assert read(evidence(n.T.reshape(-1)[:6], n.reshape(-1)[:6], shape=(3, 3), full=False))[0] is None
    assert read(evidence(-n.reshape(-1)[:6], n.reshape(-1)[:6], shape=(3, 3), full=False))[0] == "sign"


def test_a_cycle_of_three_axes_is_a_transpose():
    n = normal(2, 3, 4)
    kind, text = read(evidence(n.transpose(1, 2, 0), n))
    assert kind == "transposed" and "in the order (1, 2, 0)" in text


def test_rows_are_compared_as_a_set():
    n = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 3.0]])  # their sums are equal
    kind, text = read(evidence(n[[2, 0, 1]], n))
    assert kind == "permuted"
    assert text == "rows permuted: along axis 0 the slices are right but in another order"


def test_no_reading_fits():
    kind, text = read(evidence(normal(2, 3), normal(2, 3, seed=1)))
    assert kind is None and "no simple kind of mistake fits" in text


def test_a_term_without_upstream():
    @op
    def f(x):
        return x * x, lambda g: 2 * g * x + x
    error = refuses(f, normal(3))
    assert error.kind == "upstream not used" and "in one term" in str(error)


def test_a_large_jacobian_is_not_built(monkeypatch):
    @op
    def repeat(x):
        return np.repeat(x[None], 5, axis=0), lambda g: g[2]
    assert refuses(repeat, normal(4)).kind == "not summed"
    monkeypatch.setattr("tinytoken.checking.compare.JACOBIAN", 10)
    assert refuses(repeat, normal(4)).kind is None
