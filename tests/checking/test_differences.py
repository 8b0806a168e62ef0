"""Finite differences: the tolerance, digits where there are few, and places where no slope is."""
import numpy as np
import pytest

from mistakes import normal, refuses
from tinytoken import op, ops
from tinytoken.checking import gradcheck
from tinytoken.checking.differences import Slopes, element_line, random_line


# The tolerance

def test_the_tolerance_is_relative_to_the_largest_slope():
    @op
    def scaled(x, factor, *, error):
        return x * factor, lambda g: (g * (factor + error), None)
    small, large = np.full(4, 1e-3), np.array([1e-3, 1, 1, 1])
    for factor, error, caught in ((small, 5e-8, True), (small, 1e-9, False), (large, 5e-8, False),
                                  (large, 5e-6, True)):
        call = lambda x: scaled(x, factor, error=error)
        refuses(call, normal(4)) if caught else gradcheck(call, normal(4))
    gradcheck(lambda x: scaled(x, large, error=5e-6), normal(4), rtol=1e-4)
    gradcheck(lambda x: scaled(x, large, error=5e-6), normal(4), atol=1e-4)


def test_the_small_gradients_of_a_mean_are_compared():
    @op
    def mean(x):
        return x.mean(), lambda g: np.full(x.shape, g / x.size) * 1.001
    refuses(mean, normal(100, 50))


def test_measured_again_where_a_plain_difference_has_no_digits():
    x = np.array([1e-4, 2e-4, 0.3])  # there a central difference of 1 / x with eps is right to 1e-4 only
    report = gradcheck(lambda x: ops.divide(1.0, x), x)
    assert report.inputs[0].error < 1e-7 * report.inputs[0].slope
    error = refuses(lambda x: x + 1e12, normal(3))
    assert error.kind == "rounding" and "cannot be checked" in str(error)
    assert "Take a larger eps" in str(error)
    assert "or take a smaller eps" in str(refuses(lambda x: ops.divide(1.0, x), x / 10))
    gradcheck(lambda x: ops.mean(x + 1e4), normal(40))


def test_extrapolation_is_exact_where_the_central_difference_is_not():
    x = np.array([0.01])
    slopes = Slopes(lambda: [1 / x], [np.ones(1)])
    line = element_line(x, 0, 1e-6)
    value, error = slopes.extrapolated(line, [0])
    assert abs(value + 1e4) < 1e-5 and error < 1e-4 and x[0] == 0.01
    assert abs(slopes.central(line, 1000)[0] + 1e4) > 50
    x[0] = 1
    assert slopes.settle(-1.0, -1.0 + 1e-9, 1e-8, line, [0]) == -1.0 + 1e-9  # not measured again


def test_lines_come_back():
    x, y = np.array([-0.0, 1e9, 3.0]), np.array([[1.0]])
    before = x.tobytes() + y.tobytes()
    for go, h in (*(element_line(x, k, 1e-6) for k in range(3)),
                  random_line([x, y], [normal(3), normal(1, 1)], 1e-6)):
        assert go(h) > 0 and x.tobytes() + y.tobytes() != before
        go(0)
        assert x.tobytes() + y.tobytes() == before
    assert element_line(x, 1, 1e-6)[1] == 1e3
    third = np.array([1 / 3])
    # the step that rounding left of it
    assert element_line(third, 0, 1e-6)[0](1e-12) == third[0] - 1 / 3 != 1e-12


# Not differentiable here

@pytest.mark.parametrize("x", (0.0, 1e-9, -1e-9, 3e-7, -9e-7))
def test_relu_at_its_kink(x):
    error = refuses(ops.relu, np.array([1.0, x, -1.0]))
    assert error.kind == "not differentiable"
    assert "cannot be checked: 1 of 3 elements differ\n  worst at [1]" in str(error)
    assert "not differentiable here: steps of eps/2, eps and 2 eps give" in str(error)


def test_max_near_a_tie_and_away_from_it():
    top = lambda x: ops.max(x, axis=1)
    assert refuses(top, np.array([[1.0, 1.0 + 2e-7, 0.0]])).kind == "not differentiable"
    gradcheck(top, np.array([[1.0, 1.0 + 1e-5, 0.0]]))


def test_a_jump():
    @op
    def step(x):
        return (x > 0) * 1.0, lambda g: g
    assert refuses(step, np.array([1e-8, 1.0])).kind == "not differentiable"


def test_wrong_is_not_called_a_kink():
    @op
    def steep(x):
        return np.exp(20 * x), lambda g: 20 * g * np.exp(20 * x) * 1.001
    assert refuses(steep, np.array([0.9, 1.0])).kind == "factor"

    @op
    def bent(x):  # the slopes to the left and right differ by as much as the mistake
        return np.exp(100 * x), lambda g: 100 * g * np.exp(100 * x) * 1.0001
    assert refuses(bent, np.array([0.010, 0.011])).kind == "factor"

    @op
    def relu(x):
        return np.maximum(x, 0), lambda g: g * (x < 0)
    assert refuses(relu, normal(6)).kind is None


def test_a_smaller_eps_comes_closer_to_a_kink():
    x = np.array([5e-7, 1.0])
    refuses(ops.relu, x)
    gradcheck(ops.relu, x, eps=1e-8)
