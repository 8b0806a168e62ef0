"""gradcheck itself: what it looks at, what it refuses, what it says, and that it leaves everything as it was."""
import functools
import math
import re

import numpy as np
import pytest

from tinytoken import GradientError, InputError, Tensor, backend, grad, no_grad, op, ops
from tinytoken.checking import gradcheck
from tinytoken.diagnosis import Evidence, read, read_crash, read_refusal
from tinytoken.differences import Slopes, element_line, random_line


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


# 1. What is checked

def test_float32_is_refused_before_work_starts_and_says_how_to_cast():
    error = refuses(lambda x: pytest.fail("it ran"), normal(2, 3).astype("float32"))
    assert error.kind == "dtype" and "x (2, 3) is float32, expected float64" in str(error) and "x.astype('float64')" in str(error)


def test_a_float32_input_that_is_not_checked_is_refused_too():
    assert "weight (3, 3) is float32" in str(refuses(ops.linear, normal(2, 3), Tensor(normal(3, 3).astype("float32")), wrt=["x"]))


def test_float32_output_is_refused():
    error = refuses(lambda x: (ops.exp(x), Tensor(x.data.astype("float32"))), normal(3))
    assert error.kind == "dtype" and "output 1 is float32, expected float64" in str(error)


def test_an_op_that_makes_float32_is_named():
    @op
    def narrow(x):
        return x.astype("float32"), lambda g: g
    assert "narrow: float32 output for float64 inputs" in str(refuses(narrow, normal(3)))


def test_what_is_not_a_tensor_is_refused():
    error = refuses(lambda x: x.data * 2, normal(3))
    assert error.kind == "type" and "output 0 is a ndarray, expected a Tensor" in str(error)


def test_integer_inputs_none_and_numbers():
    report = gradcheck(ops.embedding, normal(4, 2), np.array([1, 1, 3]))
    assert [c.name for c in report.inputs] == ["weight"]
    assert [c.name for c in gradcheck(ops.linear, normal(2, 3), normal(4, 3), None).inputs] == ["x", "weight"]
    assert [c.shape for c in gradcheck(ops.multiply, normal(2), 1.5).inputs] == [(2,), ()]
    with pytest.raises(InputError, match="no float input to check"):
        gradcheck(ops.embedding, np.array([1, 2]))
    with pytest.raises(InputError, match="no inputs"):
        gradcheck(ops.exp)


def test_wrt_takes_positions_and_names():
    inputs = normal(2, 3), normal(4, 3), normal(4)
    assert [c.name for c in gradcheck(ops.linear, *inputs, wrt=[1]).inputs] == ["weight"]
    assert [c.name for c in gradcheck(ops.linear, *inputs, wrt=["bias", 0]).inputs] == ["bias", "x"]
    with pytest.raises(InputError, match=r"wrt 'b', expected positions 0 to 2 or names \(x, weight, bias\)"):
        gradcheck(ops.linear, *inputs, wrt=["b"])
    with pytest.raises(InputError, match="wrt 3"):
        gradcheck(ops.linear, *inputs, wrt=[3])


def test_bad_settings():
    for bad in ({"eps": 0}, {"rtol": -1}, {"atol": -1}, {"max_elements": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            gradcheck(ops.exp, normal(2), **bad)
    x = Tensor(normal(2))
    with pytest.raises(InputError, match="one Tensor is given twice"):
        gradcheck(ops.multiply, x, x)


def test_only_wrt_is_blamed():
    bad = lambda a, b: ops.add(double(a), b)
    gradcheck(bad, normal(2), normal(2), wrt=["b"])
    assert "the gradient of a (2,)" in str(refuses(bad, normal(2), normal(2), wrt=["a"]))


def test_parameters_in_place_and_restored_bit_for_bit():
    flat = normal(15)  # parameters that are views of one buffer, as the optimiser lays them
    weight, bias = Tensor(flat[:12].reshape(4, 3), requires_grad=True), Tensor(flat[12:], requires_grad=True)
    x, arrays = normal(5, 3), (weight.data, bias.data)
    bias.grad = np.ones(3)
    before = flat.copy()
    loss = lambda: (ops.linear(x, weight[:3], bias) ** 2).mean()
    report = gradcheck(lambda *parameters: loss(), weight, bias, names=["weight", "bias"])
    assert [(c.elements, c.size) for c in report.inputs] == [(12, 12), (3, 3)] and report.inputs[0].slope > 0
    assert flat.tobytes() == before.tobytes() and weight.data is arrays[0] and bias.data is arrays[1]
    assert weight.requires_grad and weight.grad is None and (bias.grad == 1).all()


@pytest.mark.parametrize("fail", ("wrong", "raises", "writes"))
def test_restored_after_a_failure(fail):
    x, y = Tensor(normal(3)), Tensor(normal(3))
    before = x.data.copy()
    calls = []

    def fn(x, y):
        calls.append(1)
        if fail == "writes":
            x.data += 1
        if fail == "raises" and len(calls) > 5:
            raise KeyboardInterrupt
        return double(x)
    with pytest.raises(KeyboardInterrupt if fail == "raises" else GradientError):
        gradcheck(fn, x, y)
    assert x.data.tobytes() == before.tobytes() and not x.requires_grad and not y.requires_grad


def test_arrays_are_copied():
    x = normal(3)
    x.flags.writeable = False
    gradcheck(ops.exp, x)
    gradcheck(ops.exp, np.broadcast_to(normal(3), (2, 3)))
    gradcheck(ops.exp, normal(3, 2).T)


def test_tensors_inside_a_graph():
    y = Tensor(normal(3), requires_grad=True) * 2
    gradcheck(ops.exp, y)


# 2. The upstream gradient

def test_all_ones_are_blind_to_a_softmax_of_zeros_and_gradcheck_is_not():
    x = Tensor(normal(2, 5), requires_grad=True)
    by_ones = grad(zero_softmax(x), [x], gradient=np.ones((2, 5)))[0]
    moved = [(ops.softmax(x.data + h * np.eye(10)[3].reshape(2, 5)).data.sum()) for h in (1e-6, -1e-6)]
    assert abs(by_ones[0, 3] - (moved[0] - moved[1]) / 2e-6) < 1e-8  # the check of sums passes
    assert refuses(zero_softmax, x.data).kind == "zeros"


def test_the_upstream_gradient_is_not_the_input_drawn_from_the_same_seed():
    @op
    def gate(x):  # wrong wherever the signs of x and g differ
        return np.maximum(x, 0), lambda g: g * (g > 0)
    for seed in range(5):
        refuses(gate, normal(3, 4, seed=seed), seed=seed)


def test_seeds_give_other_upstream_gradients():
    errors = [str(refuses(double, np.array([1.0, 2.0]), seed=seed)) for seed in (0, 1, 0)]
    numbers = {re.search("numeric (.*) \\(", error).group(1) for error in errors}
    assert len(numbers) == 2


def test_zeros_upstream():
    @op
    def constant_term(x):  # too small for the tolerance, and still there with zeros upstream
        return 2 * x, lambda g: 2 * g + 1e-12
    error = refuses(constant_term, normal(3))
    assert error.kind == "upstream not used" and "x (3,) is not zero with zeros upstream, at 3 of 3 elements" in str(error)


def test_nan_with_zeros_upstream():
    @op
    def quotient(x):
        return 2 * x, lambda g: 2 * g * (g / g)
    with np.errstate(invalid="ignore"):
        assert "not zero with zeros upstream" in str(refuses(quotient, normal(3)))


def test_each_output_alone():
    error = refuses(two, normal(3), normal(3, seed=1))
    assert error.kind == "zeros" and "the gradient of y (3,) is wrong with only output 1 used" in str(error)


def test_the_outputs_together():
    @op
    def overwritten(x):
        def vjp(g, h):
            return g if h is None else 3 * h  # each alone is right
        return (x * 1, x * 3), vjp
    error = refuses(overwritten, normal(3))
    assert "alone" not in str(error) and "of x (3,) is wrong: 3 of 3" in str(error)


def test_one_tensor_as_two_outputs_and_an_input_as_output():
    def fn(x):
        y = ops.exp(x)
        return y, y, x
    assert gradcheck(fn, normal(3)).outputs == [(3,), (3,), (3,)]


def test_an_output_outside_the_graph_is_a_lost_gradient():
    assert refuses(lambda x: ops.exp(x).detach(), normal(3)).kind == "zeros"
    assert refuses(lambda x: (ops.exp(x), ops.exp(x).detach()), normal(3)).kind == "zeros"


def test_the_vjp_must_allow_for_an_unused_output():
    @op
    def careless(x):
        return (x * 1, x * 2), lambda g, h: g + 2 * h
    error = refuses(careless, normal(3))
    assert error.kind == "raised" and "with only output 0 used raised TypeError" in str(error) and "is None" in str(error)


# 3. Samples and directions

def test_past_max_elements_a_sample_and_two_directions():
    report = gradcheck(ops.linear, normal(8, 10), normal(9, 10), normal(9), max_elements=30)
    assert [c.elements for c in report.inputs] == [10, 11, 9] and report.directions == 2
    assert gradcheck(ops.linear, normal(8, 10), normal(9, 10), normal(9)).directions == 0
    few = gradcheck(lambda *xs: functools.reduce(ops.add, xs), *(normal(4) for _ in range(6)), max_elements=3)
    assert [c.elements for c in few.inputs] == [1] * 6


def test_a_direction_sees_what_the_sample_missed():
    @op
    def one_wrong(x, y):
        def vjp(g):
            of_x = g * y
            of_x[7] *= 1.01
            return of_x, g * x
        return x * y, vjp
    error = refuses(one_wrong, normal(500), normal(500, seed=1), max_elements=10)
    assert "the gradient of x is wrong along a random direction" in str(error) and "raise max_elements" in str(error)
    error = refuses(one_wrong, normal(500), normal(500, seed=1), max_elements=1000)
    assert "1 of 500 elements differ\n  worst at [7]" in str(error)


def test_a_kink_along_a_direction():
    x = normal(400)
    x[33] = 0
    error = refuses(ops.relu, x, max_elements=10)
    assert error.kind == "not differentiable" and "cannot be checked along a random direction" in str(error)


def test_a_direction_blames_the_input_and_is_relative_to_the_slopes():
    @op
    def one_wrong(x, y):
        def vjp(g):
            of_y = g * x
            of_y[abs(of_y).argmax()] *= 1.0005
            return g * y, of_y
        return x * y, vjp
    small = 1e-4 * normal(500)
    error = refuses(one_wrong, small, 1e-4 * normal(500, seed=1), max_elements=10)
    assert "the gradient of y is wrong along a random direction" in str(error) and error.kind is None


def test_the_sample_is_seeded_and_differences_record_nothing():
    seen, recorded = [], []
    for seed in (0, 0, 1):
        moved = set()

        def fn(x):
            places = np.flatnonzero(x.data)
            moved.update(places if len(places) == 1 else ())  # not a direction, which moves all
            out = ops.multiply(x, 2.0)
            recorded.append(out.requires_grad == (len(places) == 0))
            return out
        gradcheck(fn, np.zeros(1000), max_elements=4, seed=seed)
        seen.append(moved)
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 4 and max(seen[0]) > 100 and all(recorded)


# 4. The tolerance

def test_the_tolerance_is_relative_to_the_largest_slope():
    @op
    def scaled(x, factor, *, error):
        return x * factor, lambda g: (g * (factor + error), None)
    small, large = np.full(4, 1e-3), np.array([1e-3, 1, 1, 1])
    for factor, error, caught in ((small, 5e-8, True), (small, 1e-9, False), (large, 5e-8, False), (large, 5e-6, True)):
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
    assert error.kind == "rounding" and "cannot be checked" in str(error) and "Take a larger eps" in str(error)
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
    for go, h in (*(element_line(x, k, 1e-6) for k in range(3)), random_line([x, y], [normal(3), normal(1, 1)], 1e-6)):
        assert go(h) > 0 and x.tobytes() + y.tobytes() != before
        go(0)
        assert x.tobytes() + y.tobytes() == before
    assert element_line(x, 1, 1e-6)[1] == 1e3
    third = np.array([1 / 3])
    assert element_line(third, 0, 1e-6)[0](1e-12) == third[0] - 1 / 3 != 1e-12  # the step that rounding left of it


# 5. Shapes, dtypes, inputs unchanged, the same twice

def test_the_engine_refuses_a_shape_and_gradcheck_reads_it():
    @op
    def spread(x, s):
        return x * s[:, None, None], lambda g: (g * s[:, None, None], g * x)
    error = refuses(spread, normal(2, 3, 4), normal(2))
    assert error.kind == "not summed" and isinstance(error.__cause__, GradientError)
    assert str(error) == ("spread: its vjp returned shape (2, 3, 4) for s, which is (2,)\n"
                          "  reading: not summed over a broadcast axis: the extra axes are those along which this input was "
                          "repeated\n  seed 0")


@pytest.mark.parametrize("message, kind", [
    ("f: its vjp returned shape (3, 2) for x, which is (2, 3)", "transposed"),
    ("f: its vjp returned shape (4, 2, 3) for x, which is (2, 3)", "not summed"),  # does not broadcast by chance
    ("f: its vjp returned shape (6,) for x, which is (2, 3)", "shape"),
    ("f: its vjp returned shape () for x, which is (2, 3)", "shape"),
    ("f: its vjp returned float32 for x, which is float64: is a constant a NumPy scalar?", "dtype"),
    ("f: its vjp returned bool for x, which is float64: is a constant a NumPy scalar?", "dtype"),
    ("f: its vjp returned 1 entries for 2 array arguments", "entries"),
    ("f: its vjp returned a float for x, expected an array", "type"),
])
def test_what_the_engine_refuses_has_a_reading(message, kind):
    assert read_refusal(message)[0] == kind


def test_the_refusals_are_those_of_the_engine():
    def with_vjp(vjp):
        @op
        def f(x, y):
            return x @ y, vjp
        return f
    x, y = normal(2, 3), normal(3, 2)
    returned = {"transposed": lambda g: ((g @ y.T).T, None), "shape": lambda g: (g.reshape(4)[:3], None),
                "type": lambda g: (1.5, None), "dtype": lambda g: ((g @ y.T).astype("float32"), None),
                "entries": lambda g: g @ y.T}
    for kind, vjp in returned.items():
        error = refuses(with_vjp(vjp), x, y)
        assert error.kind == kind and str(error).startswith("f: its vjp returned")


def test_a_crash_inside_a_vjp():
    assert "transpose" in read_crash(ValueError("mismatch")) and "by itself" in read_crash(KeyError("x"))
    assert "is None" in read_crash(AttributeError("'NoneType' object has no attribute 'shape'"))


def test_an_op_that_changes_its_input_is_named():
    @op
    def shift(x, y):
        y += 1
        return x + y, lambda g: (g, g)
    error = refuses(shift, normal(3), normal(3))
    assert error.kind == "writes" and "shift: the forward pass writes into y (3,)" in str(error)


def test_an_integer_input_that_is_changed_is_seen():
    @op
    def take(x, rows: "rows"):
        return x[rows], lambda g: (g, None)

    def fn(x, rows):
        rows.data[0] = 1
        return ops.embedding(x, rows)
    assert "writes into rows (2,)" in str(refuses(fn, normal(4, 2), np.array([0, 1])))


def test_a_vjp_that_writes():
    @op
    def upstream(x):
        def vjp(g):
            g *= 2
            return g
        return 2 * x, vjp

    @op
    def output(x):
        out = np.exp(x)

        def vjp(g):
            out[...] *= g
            return out.copy()
        return out, vjp

    @op
    def inside(x):
        def vjp(g):
            x[...] *= g
            return x.copy()
        return x * x / 2, vjp
    places = {upstream: "into the upstream gradient", output: "into the output", inside: "backward pass writes into x (3,)"}
    for function, what in places.items():
        error = refuses(function, normal(3))
        assert error.kind == "writes" and what in str(error)


def test_noise_is_named():
    rng = np.random.default_rng(0)
    error = refuses(lambda x: ops.multiply(x, rng.standard_normal(3)), normal(3))
    assert error.kind == "not deterministic" and "Noise must be an argument" in str(error)


def test_a_gradient_that_changes_is_named():
    calls = []

    @op
    def moody(x):
        def vjp(g):
            calls.append(1)
            return 2 * g * len(calls)
        return 2 * x, vjp
    error = refuses(moody, normal(3))
    assert error.kind == "not deterministic" and "the same output and another gradient" in str(error)


def test_not_finite():
    with np.errstate(all="ignore"):
        error = refuses(ops.log, np.array([1.0, -1.0]))
        assert error.kind == "not finite" and "output 0 (2,) has NaN" in str(error)
        error = refuses(ops.sqrt, np.array([1.0, 0.0]))
        assert error.kind == "not finite" and "the analytic gradient has NaN or infinite values" in str(error)
    error = refuses(ops.log, np.array([1.0, 1e-6]), eps=2e-6)
    assert error.kind == "not finite" and "1 of 2 elements differ" in str(error)
    assert "a small step leads to NaN or infinite outputs" in str(error)

    @op
    def broken(x):
        return 2 * x, lambda g: np.where(x > 0, 2 * g, np.nan)
    error = refuses(broken, np.array([1.0, -1.0, 2.0]))
    assert error.kind == "not finite" and "1 of 3 elements differ\n  worst at [1]: analytic nan" in str(error)


# 6. Not differentiable here

@pytest.mark.parametrize("x", (0.0, 1e-9, -1e-9, 3e-7, -9e-7))
def test_relu_at_its_kink(x):
    error = refuses(ops.relu, np.array([1.0, x, -1.0]))
    assert error.kind == "not differentiable" and "cannot be checked: 1 of 3 elements differ\n  worst at [1]" in str(error)
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


# 7. The diagnosis (the kinds on real mistakes are in test_planted)

def evidence(analytic, numeric, contributions=None, **changes):
    values = dict(shape=numeric.shape, analytic=analytic.reshape(-1), numeric=numeric.reshape(-1), at_zero=np.zeros(numeric.size),
                  allowed=1e-7, full=True, sizes={8: "axis 3 of q"}, others={}, contributions=lambda: contributions)
    return Evidence(**values | changes)


@pytest.mark.parametrize("factor, name", [
    (1 / math.sqrt(8), "0.353553 x numeric, perhaps 1/sqrt(8) (axis 3 of q)"), (math.sqrt(8), "perhaps sqrt(8) (axis 3 of q)"),
    (8, "perhaps 8 (axis 3 of q)"), (0.125, "perhaps 1/8 (axis 3 of q)"), (2, "perhaps 2"), (0.5, "perhaps 1/2"),
    (-8, "analytic is -8 x numeric, perhaps 8 (axis 3 of q)")])
def test_factors_that_have_a_name(factor, name):
    n = normal(2, 3)
    kind, text = read(evidence(factor * n, n))
    assert kind == "factor" and name in text


def test_a_factor_without_a_name():
    n = normal(2, 3)
    assert read(evidence(1.01 * n, n)) == ("factor", "a constant factor: analytic is 1.01 x numeric")
    assert read(evidence(np.array([1.01]), np.ones(1)))[0] is None  # one number is always a multiple of another
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
    assert kind == "permuted" and text == "rows permuted: along axis 0 the slices are right but in another order"


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
    monkeypatch.setattr("tinytoken.checking.JACOBIAN", 10)
    assert refuses(repeat, normal(4)).kind is None


# 8. What it says

def test_the_message():
    error = refuses(double, np.array([[1.0, 2.0], [3.0, 4.0]]), seed=7)
    lines = str(error).split("\n")
    assert lines[0] == "double: the gradient of x (2, 2) is wrong: 4 of 4 elements differ"
    form = r"  worst at \[(\d), (\d)\]: analytic (\S+), numeric (\S+) \(allowed difference (\S+)\)"
    row, column, analytic, numeric, allowed = map(float, re.fullmatch(form, lines[1]).groups())
    assert 0 <= row < 2 and 0 <= column < 2 and math.isclose(analytic, 1.5 * numeric, rel_tol=1e-6)
    assert math.isclose(allowed, 1e-6 * abs(numeric), rel_tol=0.1)
    assert lines[2:] == ["  reading: a constant factor: analytic is 1.5 x numeric", "  seed 7"]


def test_the_message_names_the_other_inputs_that_are_wrong():
    bad = lambda a, b, c: ops.add(double(ops.multiply(a, b)), c)
    error = refuses(bad, normal(2), normal(2, seed=1), normal(2, seed=2))
    assert "the gradient of a (2,)" in str(error) and "\n  also wrong: b\n" in str(error)


def test_names():
    bad = lambda *xs: double(xs[1])
    assert "gradient of input 1 (3,)" in str(refuses(bad, normal(3), normal(3)))
    assert "gradient of weight (3,)" in str(refuses(bad, normal(3), normal(3), names=["x", "weight"]))
    assert [c.name for c in gradcheck(ops.concat, normal(3), normal(3)).inputs] == ["input 0", "input 1"]
    with pytest.raises(InputError, match="1 names for 2 inputs"):
        gradcheck(ops.add, normal(3), normal(3), names=["x"])


def test_the_function_is_named():
    def my_function(x):
        return double(x)

    class Layer:
        def __call__(self, x):
            return double(x)
    scaled = op(lambda x, *, by: (x * by, lambda g: g))
    scaled.name = "scaled"
    named = {my_function: "my_function", Layer(): "Layer", functools.partial(scaled, by=2): "scaled",
             lambda x: double(x): "double", lambda x: double(ops.exp(x)): "a lambda that ends in double",
             lambda x: x.detach(): "<lambda>"}
    for fn, name in named.items():
        assert str(refuses(fn, normal(3))).startswith(f"{name}: the gradient of")


def test_a_callable_without_a_signature():
    class Odd:
        __signature__ = "none"

        def __call__(self, x):
            return ops.exp(x)
    assert gradcheck(Odd(), normal(2)).inputs[0].name == "input 0"


def test_the_report():
    report = gradcheck(ops.matmul, normal(2, 3), normal(3, 4), seed=3)
    assert (report.name, report.outputs, report.seed, report.directions) == ("matmul", [(2, 4)], 3, 0)
    for c, name, shape in zip(report.inputs, "ab", ((2, 3), (3, 4))):
        assert (c.name, c.shape, c.elements, c.size) == (name, shape, math.prod(shape), math.prod(shape))
        assert 0 <= c.error <= 0.1 * c.allowed and math.isclose(c.allowed, 1e-8 + 1e-6 * c.slope, rel_tol=1e-9)
    lines = str(report).split("\n")
    assert lines[0] == "matmul: gradients agree with finite differences (output (2, 4); seed 3)"
    assert re.fullmatch(r"  a \(2, 3\): 6 of 6 elements, largest error \S+, allowed \S+", lines[1]) and len(lines) == 3
    assert str(gradcheck(ops.exp, normal(30), max_elements=3)).endswith("  2 random directions over all inputs")


def test_the_report_says_what_has_no_effect():
    report = gradcheck(lambda x, unused: ops.exp(x), normal(2), normal(2))
    line = "unused (2,): 2 of 2 elements, largest error 0.0e+00, allowed 1.0e-08; the outputs do not change with it"
    assert line in str(report)
    assert "do not change" not in str(report.inputs[0])


def test_inside_no_grad_every_gradient_is_lost():
    with no_grad():
        assert refuses(ops.exp, normal(2)).kind == "zeros"


def test_on_both_array_modules(xp):
    x, rows = xp.asarray(normal(4, 3)), xp.asarray(np.array([1, 1, 3]))
    gradcheck(lambda x, rows: ops.softmax(ops.embedding(x, rows)), x, rows)
    gradcheck(ops.layer_norm, x, max_elements=5)
    error = refuses(zero_softmax, x)
    assert error.kind == "zeros" and "numeric" in str(error)
    assert backend.array_module(x) is xp
