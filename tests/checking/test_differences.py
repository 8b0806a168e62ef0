"""Finite differences: the tolerance, digits where there are few, and places where no slope is."""
import numpy as np
import pytest

from mistakes import normal, refuses
from tinytoken import op, ops
from tinytoken.checking import gradcheck
from tinytoken.checking.differences import Slopes, element_line, random_line


# The tolerance

def test_the_tolerance_is_relative_to_each_slope():
    @op
    def scaled(x, factor, *, error):
        return x * factor, lambda g: (g * (factor + error), None)
    small, large = np.full(4, 1e-3), np.array([1e-3, 1, 1, 1])
    for factor, error, caught in ((small, 5e-8, True), (small, 1e-9, False), (large, 5e-8, True),
                                  (large, 1e-9, False), (large, 5e-6, True)):
        call = lambda x: scaled(x, factor, error=error)
        refuses(call, normal(4)) if caught else gradcheck(call, normal(4))
    gradcheck(lambda x: scaled(x, large, error=5e-6 * large), normal(4), rtol=1e-4)
    refuses(lambda x: scaled(x, large, error=5e-6 * large), normal(4))
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
    for seed in range(8):  # steps of eps reach far beyond the pole
        tiny = 10 ** np.random.default_rng(seed).uniform(-12, -8, 3)
        gradcheck(ops.divide, normal(3), tiny, seed=seed)
        doubled = op(lambda x: (1 / x, lambda g: -2 * g / (x * x)))
        assert "the gradient of x (3,) is wrong" in str(refuses(doubled, tiny, seed=seed))
    shifted = lambda x: ops.divide(1.0, x - 1)  # it bends as sharply, and no small x says so
    assert "or take a smaller eps" in str(refuses(shifted, 1 + x / 10))
    gradcheck(lambda x: ops.mean(x + 1e4), normal(40))


def test_extrapolation_is_exact_where_the_central_difference_is_not():
    x = np.array([0.01])
    slopes = Slopes(lambda: [1 / x], [np.ones(1)])
    line = element_line(x, 0, 1e-6)
    value, error = slopes.extrapolated(line, [0])
    assert abs(value + 1e4) < 1e-5 and error < 1e-4 and x[0] == 0.01
    assert abs(slopes.central(line, 1000)[0] + 1e4) > 50
    x[0] = 1
    assert slopes.settle(-1.0, -1.0 + 1e-9, 1e-8, 1e-8, line, [0])[0] == -1.0 + 1e-9  # not measured again


def test_lines_come_back():
    x, y = np.array([-0.0, 1e9, 3.0]), np.array([[1.0]])
    before = x.tobytes() + y.tobytes()
    for go, h, _ in (*(element_line(x, k, 1e-6) for k in range(3)),
                  random_line([x, y], [normal(3), normal(1, 1)], 1e-6)):
        assert go(h) > 0 and x.tobytes() + y.tobytes() != before
        go(0)
        assert x.tobytes() + y.tobytes() == before
    assert element_line(x, 1, 1e-6)[1] == 1e3
    third = np.array([1 / 3])
    # the step that rounding left of it
    assert element_line(third, 0, 1e-6)[0](1e-12) == third[0] - 1 / 3 != 1e-12


# Not differentiable here

def relu_at_1(x):
    return ops.relu(x - 1)


@pytest.mark.parametrize("function, x", [(ops.relu, 0.0), (relu_at_1, 1.0), (relu_at_1, 1 + 1e-9),
                                         (relu_at_1, 1 - 1e-9), (relu_at_1, 1 + 3e-7), (relu_at_1, 1 - 9e-7)])
def test_relu_at_its_kink(function, x):
    error = refuses(function, np.array([2.0, x, -1.0]))
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
    assert refuses(step, np.array([0.0, 1.0])).kind == "not differentiable"


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
    x = np.array([1 + 5e-7, 2.0])
    refuses(relu_at_1, x)
    gradcheck(relu_at_1, x, eps=1e-8)


# Small inputs

@pytest.mark.parametrize("function", (ops.sqrt, ops.log, lambda x: ops.divide(1.0, x),
                                      lambda x: ops.power(x, exponent=-1.5)))
@pytest.mark.parametrize("max_elements", (512, 2))
def test_close_to_the_edge_of_a_domain(function, max_elements):
    """eps is longer than some of these inputs, and a step of that length leaves the domain."""
    for seed in range(25):
        x = 10 ** np.random.default_rng(seed).uniform(-7, 0, 4)
        with np.errstate(all="ignore"):
            gradcheck(function, x, seed=seed, max_elements=max_elements)


def test_a_wrong_gradient_close_to_the_edge_is_wrong_and_not_uncheckable():
    @op
    def root(x):
        return np.sqrt(x), lambda g: g * 0.505 / np.sqrt(x)
    for x in (1e-7, 2e-6, 1e-5, 1e-3):
        error = refuses(root, np.array([x, 1.0, x]))
        assert "of x (3,) is wrong" in str(error) and error.kind == "factor"


@pytest.mark.parametrize("x", (1e-9, -1e-9, 3e-7, -9e-7))
def test_beside_a_kink_at_0_the_steps_are_as_small_as_the_input(x):
    gradcheck(ops.relu, np.array([1.0, x, -1.0]))

    @op
    def without_gate(x):
        return np.maximum(x, 0), lambda g: g
    if x < 0:
        assert "[1]" in str(refuses(without_gate, np.array([1.0, x])))


def test_poles_are_not_stepped_over():
    """Beyond the pole of 1 / x long steps agree with each other on a slope near 0."""
    array = np.array([1e-5])
    slopes = Slopes(lambda: [1 / array], [np.ones(1)])
    _, error = slopes.extrapolated(element_line(array, 0, 1e-6)._replace(fine=0.0), [0])
    assert error > 1e6
    value, error = slopes.extrapolated(element_line(array, 0, 1e-6), [0], 1e-5 / 8192)
    assert abs(value + 1e10) <= 10 * error <= 1e5


# Small elements beside large ones

def scaled_by(factors, wrong):
    @op
    def scaled(x):
        return x * factors, lambda g: g * factors * np.where(wrong, 1.5, 1)
    return scaled


@pytest.mark.parametrize("large", (1.0, 1e3, 1e6))
@pytest.mark.parametrize("small", (1e-3, 1e-5))
def test_a_small_element_is_judged_by_its_own_size(large, small):
    factors = np.array([large, small, 1.0])
    for seed in range(5):
        error = refuses(scaled_by(factors, factors == small), normal(3, seed=seed), seed=seed)
        assert "worst at [1]" in str(error)
    gradcheck(scaled_by(factors, factors < 0), normal(3))


def test_small_elements_of_a_sum_beside_a_large_one():
    factors = np.array([1e4, *np.full(400, 1e-2)])
    wrong = np.arange(401) == 77
    total = lambda bad: lambda x: ops.sum(scaled_by(factors, bad)(x))
    error = refuses(total(wrong), normal(401))
    assert error.kind == "small elements" and "worst at [77]" in str(error)
    gradcheck(total(wrong & False), normal(401))


def test_a_direction_sees_a_small_element_that_the_sample_missed():
    factors = np.array([1e5] * 10 + [1e-1] * 200)
    wrong = np.arange(210) == 99
    error = refuses(scaled_by(factors, wrong), normal(210), max_elements=8)
    assert "along a random direction" in str(error)
    for seed in range(10):
        gradcheck(scaled_by(factors, wrong & False), normal(210, seed=seed), max_elements=8, seed=seed)
