"""The engine: how ops take their arguments, what is recorded and freed, how gradients flow, and what is refused in which words."""
import contextlib
import gc
import inspect
import operator
import threading
import weakref

import numpy as np
import pytest

import tinytoken as tt
from tinytoken import GradientError, GraphError, InputError, Tensor, ops, tensor
from tinytoken.backend import to_numpy
from tinytoken.cost import graph_text
from tinytoken.tensor import Index


def leaf(values, dtype="float64", xp=np):
    return Tensor(xp.asarray(values, dtype), requires_grad=True)


def equal(a, b):
    np.testing.assert_array_equal(to_numpy(a.data if isinstance(a, Tensor) else a), b)


def refusal(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Ops to test with

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


# Tensor

def test_tensor_holds_the_array_itself(xp):
    array = xp.ones((2, 3))
    t = Tensor(array)
    assert t.data is array and t.grad is None and not t.requires_grad
    assert (t.shape, t.ndim, t.size, t.dtype, len(t)) == ((2, 3), 2, 6, "float64", 2)
    assert t.device == ("cpu" if xp is np else "cuda")
    assert Tensor(t).data is array and t.detach().data is array
    equal(t.numpy(), np.ones((2, 3)))


def test_tensor_of_numbers_and_lists():
    assert Tensor(2.5).item() == 2.5 and Tensor(2.5).shape == ()
    assert isinstance(Tensor(2.5).item(), float)
    equal(Tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]])
    assert Tensor([True]).dtype == bool
    assert float(Tensor(2.5)) == 2.5


def test_numpy_reads_a_tensor():
    t = Tensor([1.0, 2.0])
    assert np.shares_memory(np.asarray(t), t.data) and not np.shares_memory(np.array(t), t.data)
    assert np.asarray(t, "float32").dtype == "float32"
    np.testing.assert_allclose(t, [1, 2])


@pytest.mark.parametrize("array, requires_grad, message", [
    (np.zeros(2, "float16"), False, "Tensor: dtype float16, expected float32, float64, int or bool"),
    (np.zeros(2, complex), False, "Tensor: dtype complex128, expected float32, float64, int or bool"),
    (["a"], False, "Tensor: dtype <U1, expected float32, float64, int or bool"),
    (None, False, "Tensor: dtype object, expected float32, float64, int or bool"),
    ([1, 2], True, "Tensor: requires_grad with dtype int64, expected float32 or float64"),
])
def test_tensor_refuses(array, requires_grad, message):
    assert refusal(InputError, Tensor, array, requires_grad) == message


def test_repr_says_where_it_is_from():
    x = leaf([1.0])
    assert repr(Tensor([1.0])) == "Tensor([1.], shape (1,), float64)"
    assert repr(x) == "Tensor([1.], shape (1,), float64, requires_grad)"
    assert repr(x * 2) == "Tensor([2.], shape (1,), float64, made by multiply)"


def test_detach_cuts_the_graph(xp):
    x = leaf([1.0, 2.0], xp=xp)
    (x * (x * 3).detach()).sum().backward()
    equal(x.grad, [3.0, 6.0])


BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul]


@pytest.mark.parametrize("operate", BINARY, ids=lambda f: f.__name__)
def test_operators_with_tensors_arrays_and_numbers_on_either_side(operate, xp):
    a, b = np.arange(1.0, 5).reshape(2, 2), np.arange(5.0, 9).reshape(2, 2)
    xa, xb = xp.asarray(a), xp.asarray(b)
    for left, right in ((Tensor(xa), Tensor(xb)), (Tensor(xa), xb), (xa, Tensor(xb))):
        out = operate(left, right)
        assert isinstance(out, Tensor)
        equal(out, operate(a, b))
    if operate is not operator.matmul:
        for out, expected in ((operate(Tensor(xa), 3), operate(a, 3)), (operate(3, Tensor(xa)), operate(3, a)),
                              (operate(np.float32(3), Tensor(xa)), operate(3, a))):
            assert isinstance(out, Tensor) and out.dtype == "float64"
            equal(out, expected)


def test_a_numpy_function_of_a_tensor_is_refused():
    """It would make an array of objects, without a gradient."""
    for call in (lambda: np.multiply(np.ones(2), Tensor([1.0, 2.0])), lambda: np.exp(Tensor([1.0, 2.0]))):
        assert "does not support ufuncs" in refusal(TypeError, call)


def test_operators_keep_the_gradient_on_either_side(xp):
    x = leaf([[1.0, 2.0], [4.0, 8.0]], xp=xp)
    array = xp.asarray([[1.0, 3.0], [5.0, 7.0]])
    for build, expected in ((lambda: array * x, to_numpy(array)), (lambda: array - x, -np.ones((2, 2))),
                            (lambda: array / x, -to_numpy(array) / to_numpy(x.data) ** 2),
                            (lambda: array @ x, to_numpy(array).T @ np.ones((2, 2))), (lambda: -x, -np.ones((2, 2))),
                            (lambda: x ** 2, 2 * to_numpy(x.data))):
        equal(tt.grad(build().sum(), [x])[0], expected)


def test_methods(xp):
    a = np.arange(24.0).reshape(2, 3, 4)
    t = Tensor(xp.asarray(a))
    for found, expected in ((t.sum(), a.sum()), (t.sum(1), a.sum(1)), (t.sum(axis=(0, 2), keepdims=True), a.sum((0, 2), keepdims=True)),
                            (t.mean(-1), a.mean(-1)), (t.max(axis=0), a.max(0)), (t.reshape(4, 6), a.reshape(4, 6)),
                            (t.reshape((6, -1)), a.reshape(6, -1)), (t.transpose(), a.T), (t.transpose(0, 2, 1), a.transpose(0, 2, 1)),
                            (t.transpose((2, 0, 1)), a.transpose(2, 0, 1)), (t.swapaxes(0, -1), a.swapaxes(0, -1)), (t[1], a[1]),
                            (t[:, None, ..., 1:3], a[:, None, ..., 1:3]), (t[a[:, 0, 0] > 3], a[1:])):
        assert isinstance(found, Tensor) and found.shape == np.shape(expected)
        equal(found, expected)
    equal(t[Tensor(xp.asarray([1, 0, 1]))], a[[1, 0, 1]])
    equal(t[0, Tensor(xp.asarray([2]))], a[0, [2]])


# How an op takes its arguments

def test_arguments_by_position_and_by_name(xp):
    x, y = xp.asarray([1.0, 2.0]), xp.asarray([10.0, 20.0])
    for out in (axpy(x, y), axpy(x, y=y), axpy(y=y, x=x), axpy(x, y, 0.5), axpy(x, y, shift=0.5), axpy(Tensor(x), Tensor(y), a=2.0)):
        equal(out, [12.5, 24.5])
    equal(axpy(x, y, shift=0, scale=2), [24, 48])
    equal(axpy(x, y, a=0, scale=3), [31.5, 61.5])


def test_gradients_reach_arguments_given_by_name():
    x, y, shift = leaf([1.0, 2.0]), leaf([3.0, 4.0]), leaf(0.0)
    axpy(shift=shift, y=y, x=x, a=5.0).sum().backward()
    equal(x.grad, [5, 5])
    equal(y.grad, [1, 1])
    equal(shift.grad, 2)


@pytest.mark.parametrize("args, kwargs, message", [
    ((1.0,), {}, "axpy: missing a required argument: 'y'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((), {}, "axpy: missing a required argument: 'x'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((1.0, 2.0, 3.0, 4.0), {}, "axpy: too many positional arguments; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((1.0, 2.0), {"b": 3, "c": 4}, "axpy: got an unexpected keyword argument 'b'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((1.0, 2.0), {"x": 3}, "axpy: multiple values for argument 'x'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    (([1.0], 2.0), {}, "axpy: argument 0 is a list, expected a Tensor, an array or a number"),
    ((1.0, "2"), {}, "axpy: argument 1 is a str, expected a Tensor, an array or a number"),
])
def test_wrong_calls_are_refused(args, kwargs, message):
    assert refusal(InputError, axpy, *args, **kwargs) == message


def test_unknown_setting_of_a_variadic_op():
    assert refusal(InputError, ops.concat, np.ones(2), x=1) == "concat: got an unexpected keyword argument 'x'; it takes (*xs, axis=0)"


def test_none_is_passed_as_it_is():
    assert ops.linear(np.ones((2, 3)), np.ones((4, 3)), None).shape == (2, 4)
    assert ops.linear(np.ones((2, 3)), np.ones((4, 3)), bias=None).shape == (2, 4)


def test_an_op_is_described_by_its_own_function():
    assert list(inspect.signature(axpy).parameters) == ["x", "y", "shift", "a", "scale"]
    assert axpy.__doc__ == "a x + y + shift, times scale." and axpy.name == "axpy"
    assert repr(ops.gelu) == "<op tinytoken.ops.activation.gelu>"


# dtypes

@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_are_kept(dtype, xp):
    x = leaf([1.0, 2.0], dtype, xp)
    out = axpy(x, x * 2, 3.0) * 0.1 / 7 - 1
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.dtype == dtype


def test_two_float_dtypes_are_refused():
    x, y = leaf([1.0], "float32"), leaf([1.0], "float64")
    assert refusal(InputError, axpy, x, y) == "axpy: tensors of one float dtype expected, given x float32, y float64: cast one of them"
    assert refusal(InputError, axpy, x, np.ones(1), y).endswith("given x float32, shift float64: cast one of them")
    assert refusal(InputError, ops.concat, x, y) == (
        "concat: tensors of one float dtype expected, given input 0 float32, input 1 float64: cast one of them")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_arrays_are_cast_to_the_tensors_dtype(dtype, xp):
    x = leaf([1.0, 2.0], dtype, xp)
    for mask in (xp.asarray([True, False]), xp.asarray([1, 0]), xp.asarray([1, 0], "uint8"), xp.asarray([1, 0], "float32"),
                 xp.asarray([1, 0], "float64"), xp.asarray([1, 0], "float16")):
        out = x * mask
        assert out.dtype == dtype and mask.dtype != "object"
        equal(out, [1, 0])
        (gradient,) = tt.grad(out.sum(), [x])
        assert gradient.dtype == dtype


def test_integer_tensors_count_as_plain_arrays():
    x = leaf([1.0, 2.0], "float32")
    assert (x * Tensor([1, 0])).dtype == "float32"
    assert (Tensor([1, 0]) * x).dtype == "float32"
    assert (Tensor([True, False]) * x).dtype == "float32"


@pytest.mark.parametrize("scalar", [np.float64(2), np.float32(2), np.int64(2), np.float64(2) * np.ones(()), 2, 2.0, True + 1])
def test_numpy_scalars_do_not_spread_their_dtype(scalar):
    for dtype in ("float32", "float64"):
        x = leaf([1.0, 2.0], dtype)
        for out in (x * scalar, scalar * x, x / scalar, scalar - x):
            assert isinstance(out, Tensor) and out.dtype == dtype
            out.sum().backward()
            assert x.grad.dtype == dtype


def test_without_tensors_the_widest_array_decides():
    single, double = np.ones(2, "float32"), np.ones(2, "float64")
    assert axpy(single, single).dtype == "float32"
    assert axpy(single, double).dtype == "float64"
    assert axpy(single, 1.0).dtype == "float32"
    assert axpy(np.array([1, 2]), np.array([True, False])).dtype == "float32"
    assert refusal(InputError, axpy, np.ones(2, "float16"), 1.0) == "axpy: dtype float16, expected float32 or float64"


def test_index_arrays_are_passed_as_they_are():
    x = leaf([1.0, 2.0, 3.0], "float32")
    seen.clear()
    for rows in (np.array([2, 0]), np.array([2, 0], "int32"), np.array([2, 0], "uint8"), Tensor(np.array([2, 0]))):
        equal(pick(x, rows, np.array([1, 2])), [3, 1])
    assert seen == [("int64", "float32"), ("int32", "float32"), ("uint8", "float32"), ("int64", "float32")]


def test_an_op_that_changes_the_dtype_is_named():
    @tt.op
    def leaky(x):
        return x * np.sqrt(np.float64(2)), lambda g: g
    assert leaky(leaf([1.0])).dtype == "float64"
    assert refusal(GradientError, leaky, leaf([1.0], "float32")) == (
        "leaky: float64 output for float32 inputs: is one of its constants a NumPy scalar?")


# What a vjp may return

@pytest.mark.parametrize("entries, message", [
    (lambda g: g, "student: its vjp returned 1 entries for 2 array arguments"),
    (lambda g: (g, g, g), "student: its vjp returned 3 entries for 2 array arguments"),
    (lambda g: (g.astype("float32"), g), "student: its vjp returned float32 for x, which is float64: is a constant a NumPy scalar?"),
    (lambda g: (g, g[:, :2]), "student: its vjp returned shape (2, 2) for y, which is (2, 3)"),
    (lambda g: (g.sum(axis=0), g), "student: its vjp returned shape (3,) for x, which is (2, 3)"),
    (lambda g: (g.T, g), "student: its vjp returned shape (3, 2) for x, which is (2, 3)"),
    (lambda g: (g, [1.0]), "student: its vjp returned a list for y, expected an array"),
    (lambda g: (g, Tensor(g)), "student: its vjp returned a Tensor for y, expected an array"),
    (lambda g: (g, lambda: 2.0), "student: its vjp returned a float for y, expected an array"),
])
def test_wrong_entries_are_named(entries, message):
    x, y = leaf(np.ones((2, 3))), leaf(np.ones((2, 3)))
    assert refusal(GradientError, op_returning(entries)(x, y).sum().backward) == message


def test_wrong_entry_of_a_variadic_op_is_named_by_its_place():
    @tt.op
    def joined(*xs):
        return np.concatenate(xs), lambda g: (g[:2], g)
    message = "joined: its vjp returned shape (5,) for input 1, which is (3,)"
    assert refusal(GradientError, joined(leaf([1.0] * 2), leaf([2.0] * 3)).sum().backward) == message


def test_none_is_no_gradient():
    x, y = leaf([1.0]), leaf([1.0])
    op_returning(lambda g: (None, g))(x, y).sum().backward()
    assert x.grad is None
    equal(y.grad, [1])


def test_an_entry_is_called_only_if_its_input_needs_it():
    calls = []

    def entries(g):
        def of(name):
            calls.append(name)
            return g
        return lambda: of("x"), lambda: of("y")
    student = op_returning(entries)
    x, y = leaf([1.0]), leaf([2.0])
    for inputs, expected in (((x, Tensor([2.0])), ["x"]), ((np.ones(1), y), ["y"]), ((x, 3.0), ["x"]), ((x, y), ["x", "y"])):
        calls.clear()
        student(*inputs).sum().backward()
        assert calls == expected
    calls.clear()
    tt.grad(student(x, y).sum(), [y])  # x needs one in general, but not here
    assert calls == ["y"]


def test_nothing_is_recorded_without_a_tensor_that_needs_it():
    assert axpy(np.ones(1), 2.0).node is None
    out = axpy(Tensor([1.0]), 2.0)
    assert out.node is None and not out.requires_grad
    assert refusal(InputError, out.backward) == "backward: this tensor does not depend on anything that requires a gradient"


def test_an_op_without_a_vjp_ends_the_graph():
    @tt.op
    def rounded(x):
        return np.round(x), None
    assert not rounded(leaf([1.2])).requires_grad


# Several outputs

def test_unused_outputs_give_none():
    x = leaf([1.0, 2.0])
    for use, expected in ((lambda a, b: a.sum(), [2, 2]), (lambda a, b: b.sum(), [3, 3]), (lambda a, b: (a * b).sum(), [12, 24])):
        arrived.clear()
        (gradient,) = tt.grad(use(*pair(x)), [x])
        equal(gradient, expected)
        assert len(arrived) == 1
    arrived.clear()
    a, b = pair(x)
    b.sum().backward()
    assert arrived[0][0] is None
    equal(arrived[0][1], [1, 1])


def test_a_node_runs_once_after_all_consumers_of_all_its_outputs():
    x = leaf([1.0])
    arrived.clear()
    a, b = pair(x)
    late = a
    for _ in range(5):  # a long way and a short one
        late = late * 2
    (late + a * 10 + b * 100 + b * a).sum().backward()
    assert len(arrived) == 1
    equal(arrived[0][0], [32 + 10 + 3])
    equal(arrived[0][1], [100 + 2])
    equal(x.grad, [2 * 45 + 3 * 102])


def test_each_output_can_be_the_root():
    for place, factor in enumerate((2, 3)):
        x = leaf([1.0, 5.0])
        pair(x)[place].backward(np.array([1.0, 10.0]))
        equal(x.grad, [factor, 10 * factor])


# Broadcasting

@pytest.mark.parametrize("shape, other", [((), (2, 3)), ((3,), (2, 3)), ((1, 3), (2, 3)), ((2, 1), (2, 3)), ((1, 1), (2, 3)), ((1,), (4, 2, 3)),
                                          ((2, 1, 4), (3, 1)), ((1, 2, 1), (5, 1, 3)), ((2, 3), ()), ((1, 3), (1, 2, 3))])
def test_broadcasting_is_undone(shape, other, xp):
    x, y, g = leaf(np.full(shape, 2.0), xp=xp), leaf(np.full(other, 3.0), xp=xp), np.random.default_rng(0)
    out = x * y
    g = g.standard_normal(out.shape)
    out.backward(xp.asarray(g))
    for t, factor in ((x, 3), (y, 2)):
        expected = np.zeros(t.shape)
        for place in np.ndindex(g.shape):  # each element of g belongs to one of t
            own = place[g.ndim - t.ndim:]
            expected[tuple(p if n > 1 else 0 for p, n in zip(own, t.shape))] += factor * g[place]
        assert t.grad.shape == t.shape
        np.testing.assert_allclose(to_numpy(t.grad), expected, rtol=1e-13)


def test_an_op_may_return_the_broadcast_shape_or_the_right_one():
    x, y = leaf(np.ones((1, 3))), leaf(np.ones((2, 3)))
    op_returning(lambda g: (g.sum(axis=0, keepdims=True), g))(x, y).sum().backward()
    equal(x.grad, [[2, 2, 2]])


# Accumulation

def test_gradients_of_all_uses_add_up(xp):
    x = leaf([3.0], xp=xp)
    y = x * 2
    (y * 1 + y * 10 + y * 100 + x * 1000 + y).sum().backward()
    equal(x.grad, [1224])


def test_gradients_of_all_uses_of_a_scalar_add_up(xp):
    """Arrays without axes become NumPy scalars when added, which are not changed in place."""
    x = leaf(3.0, xp=xp)
    y = x * 2
    (y * 1 + y * 10 + y * 100 + y * 1000).backward()
    equal(x.grad, 2222)
    assert isinstance(x.grad, xp.ndarray) and x.grad.shape == ()


def test_backward_adds_to_the_gradient_of_the_leaves():
    x = leaf([1.0, 2.0])
    (x * 2).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    assert x.grad is first
    equal(x.grad, [5, 5])
    x.grad = None
    (x * 3).sum().backward()
    equal(x.grad, [3, 3])


def test_no_gradient_is_written_into():
    """An op that hands its upstream gradient on to both inputs, which hold it by reference while more arrive."""
    received = []

    def note(g):
        received.append((g, g.copy()))
        return g, g
    student = op_returning(note)
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    a = student(x, y)
    b = student(a, x)
    c = student(b, a)
    d = student(a, a)
    upstream = np.array([1.0, 10.0])
    (c + student(d, b) + a).backward(upstream)
    equal(upstream, [1.0, 10.0])
    for g, at_that_time in received:
        equal(g, at_that_time)
    equal(x.grad, np.array([8, 80]))  # a: 1 by b in c, 1 by c, 2 by d, 1 by b in the last, 1 itself; x: those 6 and twice by b
    equal(y.grad, np.array([6, 60]))


def test_every_grad_is_an_array_of_its_own(xp):
    x, y = leaf([1.0, 2.0], xp=xp), leaf([3.0, 4.0], xp=xp)
    upstream = xp.asarray([1.0, 1.0])
    twice_the_same(x, y).backward(upstream)
    arrays = [x.grad, y.grad, upstream, x.data, y.data]
    assert not any(xp.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    x.grad += 1
    equal(y.grad, [1, 1])
    z = leaf(np.ones((2, 3)), xp=xp)
    z.sum().backward()  # the vjp of sum gives a read-only view
    z.grad += 1
    equal(z.grad, np.full((2, 3), 2))


def test_grad_has_shape_dtype_and_device_of_its_tensor(xp):
    for dtype in ("float32", "float64"):
        for shape in ((), (3,), (2, 1, 3)):
            x = leaf(np.ones(shape), dtype, xp)
            ((x * np.ones((2, 2, 3))).sum() * 2).backward()
            assert isinstance(x.grad, xp.ndarray)
            assert (x.grad.shape, x.grad.dtype) == (shape, dtype)


def test_a_leaf_is_a_root_too():
    x = leaf(3.0)
    x.backward()
    equal(x.grad, 1)
    equal(tt.grad(x, [x])[0], 1)
    equal(tt.grad(leaf(2.0), [x])[0], 0)


def test_upstream_gradients(xp):
    x = leaf([1.0, 2.0], xp=xp)
    (x * 2).backward(xp.asarray([1.0, 10.0]))
    equal(x.grad, [2, 20])
    (x * 2).backward(Tensor(xp.asarray([1.0, 10.0])))
    equal(x.grad, [4, 40])
    x = leaf([[3.0]], xp=xp)
    (x * 2).backward()  # one element
    equal(x.grad, [[2]])


@pytest.mark.parametrize("gradient, message", [
    (None, "backward: a tensor of shape (2,) needs an upstream gradient; only a scalar does without"),
    (np.ones(3), "backward: upstream gradient (3,) float64 for a tensor (2,) float64"),
    (np.ones(2, "float32"), "backward: upstream gradient (2,) float32 for a tensor (2,) float64"),
    (1.0, "backward: upstream gradient 1.0  for a tensor (2,) float64"),
])
def test_wrong_upstream_gradients_are_refused(gradient, message):
    x = leaf([1.0, 2.0])
    assert refusal(InputError, (x * 2).backward, gradient) == message
    assert x.grad is None


# grad()

def test_grad_returns_arrays_and_touches_nothing_else():
    x, y, z = leaf([1.0, 2.0]), leaf([3.0, 4.0]), leaf([5.0, 6.0])
    found = tt.grad((x * y).sum() + (y * y).sum(), [x, y])
    equal(found[0], [3, 4])
    equal(found[1], [1 + 6, 2 + 8])
    assert x.grad is y.grad is None
    unreached = tt.grad((x * y).sum(), [z, x])
    equal(unreached[0], [0, 0])
    assert unreached[0].dtype == "float64"


def test_grad_into_given_arrays():
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    into = [np.full(2, 100.0), np.full(2, 100.0)]
    found = tt.grad((x * x).sum(), [x, y], into=into)
    assert found is into
    equal(into[0], [2, 4])
    equal(into[1], [0, 0])
    tt.grad((x * y).sum(), [x, y], into=into, add=True)
    equal(into[0], [5, 8])
    equal(into[1], [1, 2])


def test_grad_into_views_of_one_buffer():
    x, y = leaf([[1.0, 2.0]]), leaf([3.0])
    flat = np.full(3, np.nan)
    tt.grad((x * x).sum() * y.sum(), [x, y], into=[flat[:2].reshape(1, 2), flat[2:]])
    equal(flat, [6, 12, 5])


def test_grad_of_intermediate_tensors():
    x = leaf([1.0, 2.0])
    y = x * 3
    z = y * y
    equal(tt.grad(z.sum() + y.sum(), [y])[0], [7, 13])
    y = x * 3
    loss = (y * y).sum()
    in_the_middle, at_the_end = tt.grad(loss, [y, x])
    equal(in_the_middle, [6, 12])
    equal(at_the_end, [18, 36])
    loss = (x * 2).sum()
    equal(tt.grad(loss, [loss])[0], 1)
    a, b = pair(x)
    for_a, for_b = tt.grad((a * b).sum() + b.sum(), [a, b])
    equal(for_a, [3, 6])
    equal(for_b, [3, 5])


def test_grad_with_an_upstream_gradient():
    x = leaf([1.0, 2.0])
    equal(tt.grad(x * 3, [x], gradient=np.array([1.0, 10.0]))[0], [3, 30])


def test_grad_runs_only_what_leads_to_what_is_wanted():
    ran = []

    def note(name):
        def entries(g):
            ran.append(name)
            return g, g
        return op_returning(entries)
    x, y, z = leaf([1.0]), leaf([1.0]), leaf([1.0])
    loss = note("top")(note("left")(x, y), note("right")(z, z)).sum()
    tt.grad(loss, [x])
    assert ran == ["top", "left"]
    ran.clear()
    middle = note("below")(x, y)
    tt.grad(note("above")(middle, z).sum(), [middle])
    assert ran == ["above"]


def test_grad_refuses():
    x = leaf([1.0])
    assert refusal(InputError, tt.grad, x.sum(), [x], into=[]) == "grad: 0 arrays in `into` for 1 tensors in `wrt`"
    assert refusal(InputError, tt.grad, x.sum(), [Tensor([1.0])]) == "grad: a tensor in `wrt` does not require a gradient"
    assert refusal(InputError, tt.grad, x * np.ones(2), [x]) == (
        "backward: a tensor of shape (2,) needs an upstream gradient; only a scalar does without")


# Lifetimes

FREED = "backward: this graph is already freed: backward() or grad() ran through it before. Run the forward pass again."


def test_a_second_backward_says_so_and_changes_nothing():
    x = leaf([1.0, 2.0])
    y = x * x
    loss = y.sum()
    loss.backward()
    equal(x.grad, [2, 4])
    assert refusal(GraphError, loss.backward) == FREED
    assert refusal(GraphError, tt.grad, loss, [x]) == FREED
    other = (y * 3).sum() + x.sum()  # a part of this graph is freed: none of it may run
    assert refusal(GraphError, other.backward) == FREED
    equal(x.grad, [2, 4])
    equal(loss, 5)


def test_grad_frees_the_graph_too():
    x = leaf([1.0])
    loss = (x * x).sum()
    tt.grad(loss, [x])
    assert refusal(GraphError, loss.backward) == FREED
    assert x.grad is None


@pytest.fixture
def no_collector():
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def network(x, w):
    q, k = ops.split_heads(ops.linear(ops.layer_norm(x), w), heads=2, parts=2)
    out, A = ops.attention(q, k, k, np.array([[1, 0, 1]]), weights=True)
    return ops.gelu(ops.merge_heads(out)).mean() + (A * A).sum()


def test_everything_dies_at_once_without_the_collector(no_collector):
    x, w = leaf(np.ones((1, 3, 4))), leaf(np.arange(32.0).reshape(8, 4))
    network(x, w).backward()
    x.grad = w.grad = None
    gc.collect()
    loss = network(x, w)
    held = [weakref.ref(loss), weakref.ref(loss.data), weakref.ref(loss.node.vjp)]
    del loss  # never used
    assert [ref() for ref in held] == [None] * 3
    loss = network(x, w)
    held = [weakref.ref(loss), weakref.ref(loss.data)]
    loss.backward()
    del loss
    assert [ref() for ref in held] == [None] * 2
    loss = network(x, w)
    tt.grad(loss, [w])
    del loss
    assert gc.collect() == 0


def test_a_graph_is_not_kept_by_its_leaves_nor_by_its_freed_root(no_collector):
    kept = {}

    @tt.op
    def keeper(x, *, name):
        saved = np.ones(3)
        kept[name] = weakref.ref(saved)

        def vjp(g):
            upstream.append(weakref.ref(g))
            alive.append(([n for n, ref in kept.items() if ref() is not None], sum(ref() is not None for ref in upstream)))
            return g * saved
        return x * saved, vjp

    alive, upstream = [], []
    x = leaf(np.ones(3))
    y = x
    for name in range(5):
        y = keeper(y, name=name)
    loss = y.sum()
    del y
    loss.backward()
    assert [ref() for ref in kept.values()] == [None] * 5
    # And it goes step by step: when a vjp runs, what later nodes had saved is gone, and so are the gradients they were given.
    assert alive == [(list(range(n + 1)), 1) for n in reversed(range(5))]


def test_a_graph_10_000_deep():
    x = leaf([1.0])
    y = x
    for _ in range(10_000):
        y = y + 0.001
    equal_to = y.item()
    assert equal_to == pytest.approx(11)
    y.sum().backward()
    equal(x.grad, [1])
    y = x
    for _ in range(10_000):
        y = ops.multiply(y, 1.0)
    assert graph_text(y).count("\n") == 10_000
    del y  # unused: the chain of nodes must not be taken down recursively


def test_a_graph_that_branches_at_every_step_is_sorted_in_time():
    x = leaf([1.0])
    y = x
    for _ in range(60):  # 2 ** 60 paths
        y = (y + y) * 0.5
    y.sum().backward()
    equal(x.grad, [1])


def test_the_order_holds_where_a_node_is_met_before_it_can_run():
    """A consumer far down must have run before its producer, in whatever order the edges name them."""
    for flip in (False, True):
        x = leaf([1.0])
        a = x * 2
        b = a * 3
        c = ops.add(*((a, b) if flip else (b, a)))
        d = ops.add(*((b, c) if flip else (c, b)))
        e = ops.add(*((a, d) if flip else (d, a)))
        e.sum().backward()
        equal(x.grad, [2 * (3 + 1 + 3 + 1)])


# Modes and threads

def test_no_grad_records_nothing(xp):
    x = leaf([1.0], xp=xp)
    with tt.no_grad():
        y = x * 2
        with tt.no_grad():
            pass
        assert not (y * 3).requires_grad and y.node is None
    assert (x * 2).requires_grad

    @tt.no_grad()
    def decorated():
        return x * 2
    assert not decorated().requires_grad and not decorated().requires_grad
    with pytest.raises(ZeroDivisionError), tt.no_grad():
        1 / 0
    assert (x * 2).requires_grad


def in_threads(*functions):
    """Run the functions at the same time; what they return, in order. The first error is raised here."""
    results = [None] * len(functions)

    def work(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def test_modes_hold_for_one_thread():
    x, barrier = leaf([1.0]), threading.Barrier(3, timeout=10)

    @tt.op
    def which(x):
        return x * 1, lambda g: g

    @which.implementation("numpy")
    def fast(x):
        return x * 100, lambda g: g * 100

    def with_mode(mode):
        with mode():
            barrier.wait()  # all three are inside
            result = which(x)
            barrier.wait()
        return result.requires_grad, result.item()
    assert in_threads(lambda: with_mode(tt.no_grad), lambda: with_mode(tt.plain), lambda: with_mode(contextlib.nullcontext)) == [
        (False, 100), (True, 1), (True, 100)]


def test_threads_have_tapes_of_their_own():
    rng = np.random.default_rng(0)
    w = leaf(rng.standard_normal((4, 4)))
    inputs = rng.standard_normal((4, 3, 4))

    def work(x):
        def run():
            total = np.zeros((4, 4))
            for _ in range(20):
                h = Tensor(x)
                for _ in range(10):
                    h = ops.tanh(ops.linear(h, w))
                tt.grad(h.sum(), [w], into=[total], add=True)
            return total
        return run
    expected = [work(x)() for x in inputs]
    for found, alone in zip(in_threads(*map(work, inputs)), expected):
        equal(found, alone)
    assert w.grad is None


# The registry, implementations, fused compositions

@pytest.fixture
def clean_registry():
    before = dict(tensor.registry)
    yield
    tensor.registry.clear()
    tensor.registry.update(before)


def test_a_later_definition_replaces_an_earlier(clean_registry):
    def define(factor):
        @tt.op
        def redefined(x):
            return x * factor, lambda g: g * factor
        return redefined
    first = define(2)
    assert tensor.registry[__name__, "redefined"] is first
    second = define(3)
    assert tensor.registry[__name__, "redefined"] is second
    assert [key for key in tensor.registry if key[1] == "redefined"] == [(__name__, "redefined")]
    equal(first(np.ones(1)), [2])  # who holds it still can use it


def test_implementations_by_array_module(clean_registry):
    @tt.op
    def double(x, *, extra=0):
        """Twice."""
        return x * 2 + extra, lambda g: g * 2

    calls = []

    @double.implementation("numpy")
    def fast(x, *, extra=0):
        calls.append(type(x))
        return x + x + extra, lambda g: g + g

    assert callable(fast) and double.implementations == {"numpy": fast}
    x = leaf([1.0, 2.0])
    double(x, extra=1).sum().backward()
    equal(x.grad, [2, 2])
    assert calls == [np.ndarray]
    with tt.plain():
        equal(double(x), [2, 4])
        assert len(calls) == 1
    double(x)
    assert len(calls) == 2
    double.implementations = {"cupy": None}  # of another module: the plain definition runs
    equal(double(x), [2, 4])


def test_the_engine_checks_implementations_as_it_checks_ops(clean_registry):
    @tt.op
    def good(x):
        return x * 2, lambda g: g * 2

    @good.implementation("numpy")
    def bad(x):
        return x * 2, lambda g: g[:1]
    assert refusal(GradientError, good(leaf([1.0, 2.0])).sum().backward) == "good: its vjp returned shape (1,) for x, which is (2,)"


def test_fused_records_its_parts_until_it_is_implemented(clean_registry):
    @tt.fused
    def add_then_gelu(x, y, *, times=1.0):
        """gelu(x + y) times a number."""
        return ops.gelu(x + y) * times

    x, y = leaf([1.0, 2.0]), leaf([[0.5], [1.5]])
    rows = graph_text(add_then_gelu(x, y, times=3.0).sum())
    assert [line.split()[1] for line in rows.splitlines()[:-1]] == ["add", "gelu", "multiply", "sum"]
    expected = tt.grad(add_then_gelu(x, y=y, times=3.0).sum(), [x, y])

    @add_then_gelu.implementation("numpy")
    def whole(x, y, *, times=1.0):
        inner = ops.gelu.function(x + y)
        return inner[0] * times, lambda g: (inner[1](g * times),) * 2

    loss = add_then_gelu(x, y, times=3.0).sum()
    assert [line.split()[1] for line in graph_text(loss).splitlines()[:-1]] == ["add_then_gelu", "sum"]
    for a, b in zip(tt.grad(loss, [x, y]), expected):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    with tt.plain():
        assert "add_then_gelu" not in graph_text(add_then_gelu(x, y).sum())


def test_observers_see_every_op_of_their_thread():
    noted = []
    with tensor.observe(lambda op, shapes: noted.append((op.name, shapes))):
        axpy(np.ones((2, 3)), Tensor(np.ones(3)), 1.0)
        with tt.no_grad():
            ops.linear(np.ones((2, 3)), np.ones((4, 3)), None)
        in_threads(lambda: axpy(1.0, np.ones(1)))
    axpy(1.0, np.ones(1))
    assert noted == [("axpy", [(2, 3), (3,), None]), ("linear", [(2, 3), (4, 3), None])]


# explain

def test_explain_prints_the_graph(capsys):
    x, w = leaf(np.ones((2, 3))), leaf(np.ones((4, 3)))
    hidden = ops.linear(x, w)
    loss = (hidden * hidden).sum()
    rows = ["%0    linear           leaf(2, 3) leaf(4, 3) -> (2, 4)  24 MACs",
            "%1    multiply         %0(2, 4) %0(2, 4) -> (2, 4)",
            "%2    sum              %1(2, 4) -> ()"]
    assert graph_text(loss).splitlines() == [*rows, "3 ops, 24 multiply-adds (MACs)"]
    tt.explain(loss)
    assert capsys.readouterr().out == graph_text(loss) + "\n"
    loss.backward()
    assert graph_text(loss).splitlines() == ["%0    sum              (2, 4) -> ()  (freed)", "1 ops, 0 multiply-adds (MACs)"]


def test_explain_shows_plain_inputs_and_several_outputs():
    a, _ = pair(leaf([1.0, 2.0]))
    out = a * np.ones((3, 1)) + 2.0
    assert graph_text(out).splitlines() == ["%0    pair             leaf(2,) -> (2,), (2,)",
                                            "%1    multiply         %0(2,) (3, 1) -> (3, 2)",
                                            "%2    add              %1(3, 2) -> (3, 2)",
                                            "3 ops, 0 multiply-adds (MACs)"]
    assert graph_text(leaf([1.0])) == "a leaf: shape (1,)"
    assert graph_text(Tensor([1.0, 2.0])) == "no graph: shape (2,)"


@pytest.mark.parametrize("make, macs", [
    (lambda x: ops.matmul(x(5, 2, 3), x(3, 4)), 5 * 2 * 3 * 4),
    (lambda x: ops.matmul(x(5, 1, 2, 3), x(7, 3, 4)), 5 * 7 * 2 * 3 * 4),
    (lambda x: ops.linear(x(2, 5, 3), x(4, 3), x(4)), 2 * 5 * 3 * 4),
    (lambda x: ops.attention(x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 5)), 2 * (2 * 3 * 4 * 6 * 5)),
    (lambda x: ops.attention(x(2, 3, 4, 5), x(2, 3, 4, 5), x(2, 3, 4, 5), np.ones((2, 4))), 2 * (2 * 3 * 4 * 4 * 5)),
    (lambda x: ops.lookup_gather(x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 5))[0], 2 * (2 * 3 * 4 * 6 * 5)),
    (lambda x: ops.lookup_infuse(x(2, 3, 4, 6), x(2, 3, 4, 6), x(2, 3, 4, 5), reuse="probs"), 2 * 3 * 4 * 6 * 5),
    (lambda x: ops.gelu(ops.softmax(x(2, 3))), 0),
])
def test_multiply_adds_are_counted_from_shapes(make, macs):
    text = graph_text(make(lambda *shape: leaf(np.ones(shape))))
    assert text.endswith(f" ops, {macs:,} multiply-adds (MACs)")
