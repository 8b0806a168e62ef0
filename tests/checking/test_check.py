"""gradcheck itself: what it looks at, what it says, and that it leaves everything as it was."""
import functools
import math
import re

import numpy as np
import pytest

from mistakes import double, normal, refuses, two, zero_softmax
from tinytoken import GradientError, InputError, Tensor, backend, grad, no_grad, op, ops
from tinytoken.checking import gradcheck


# What is checked

def test_float32_is_refused_before_work_starts_and_says_how_to_cast():
    error = refuses(lambda x: pytest.fail("it ran"), normal(2, 3).astype("float32"))
    assert error.kind == "dtype" and "x (2, 3) is float32, expected float64" in str(error)
    assert "x.astype('float64')" in str(error)


def test_a_float32_input_that_is_not_checked_is_refused_too():
    assert "weight (3, 3) is float32" in str(refuses(ops.linear, normal(2, 3),
                                                     Tensor(normal(3, 3).astype("float32")), wrt=["x"]))


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
    for one, name in ((1, "weight"), ("bias", "bias")):
        assert [c.name for c in gradcheck(ops.linear, *inputs, wrt=one).inputs] == [name]
    with pytest.raises(InputError, match="wrt 0.5, expected a list of positions or names"):
        gradcheck(ops.linear, *inputs, wrt=0.5)
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


# The upstream gradient

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
    assert error.kind == "upstream not used"
    assert "x (3,) is not zero with zeros upstream, at 3 of 3 elements" in str(error)


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
    assert error.kind == "raised" and "with only output 0 used raised TypeError" in str(error)
    assert "is None" in str(error)


# Samples and directions

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
    assert "the gradient of x is wrong along a random direction" in str(error)
    assert "raise max_elements" in str(error)
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
            recorded.append((len(places), out.requires_grad))
            return out
        gradcheck(fn, np.zeros(1000), max_elements=4, seed=seed)
        seen.append(moved)
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 4 and max(seen[0]) > 100
    assert any(requires for count, requires in recorded) and not any(requires for count, requires in recorded
                                                                     if count)


# What it says

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
    with pytest.raises(InputError, match="0.5 names for 2 inputs"):
        gradcheck(ops.add, normal(3), normal(3), names=0.5)


@pytest.mark.parametrize("option", ["eps", "rtol", "atol", "max_elements", "seed"])
@pytest.mark.parametrize("value", [None, "a", [1], 1j, -1, float("nan")])
def test_options_that_are_no_numbers(option, value):
    if option == "seed" and value == [1]:  # NumPy's generators take lists
        return
    with pytest.raises(InputError, match=f"gradcheck: .*{option} "):
        gradcheck(ops.exp, normal(2), **{option: value})
    gradcheck(ops.exp, normal(2), max_elements=1e6, seed=[1, 2], wrt=np.array([0]), names=np.array(["x"]))
    assert gradcheck(ops.exp, normal(600), max_elements=float("inf"), wrt={0}).inputs[0].elements == 600


def test_what_is_no_function_or_no_array():
    with pytest.raises(InputError, match="gradcheck: fn is a float, expected a function"):
        gradcheck(0.5, normal(2))
    with pytest.raises(InputError, match="Tensor: setting an array element with a sequence"):
        gradcheck(ops.exp, [[1.0], [1.0, 2.0]])


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
        assert 0 <= c.error <= 0.1 * c.allowed
        assert math.isclose(c.allowed, 1e-8 + 1e-6 * c.slope, rel_tol=1e-9)
    lines = str(report).split("\n")
    assert lines[0] == "matmul: gradients agree with finite differences (output (2, 4); seed 3)"
    assert re.fullmatch(r"  a \(2, 3\): 6 of 6 elements, largest error \S+, allowed \S+", lines[1])
    assert len(lines) == 3
    report = str(gradcheck(ops.exp, normal(30), max_elements=3))
    assert report.endswith("  2 random directions over all inputs")


def test_the_report_says_what_has_no_effect():
    report = gradcheck(lambda x, unused: ops.exp(x), normal(2), normal(2))
    line = ("unused (2,): 2 of 2 elements, largest error 0.0e+00, allowed 1.0e-08; the outputs do not change "
            "with it")
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
