"""Tensor; how an op takes its arguments; dtypes."""
import importlib
import inspect
import operator

import numpy as np
import pytest

import tinytoken as tt
from engine import axpy, equal, leaf, pick, refusal, seen
from tinytoken import GradientError, InputError, Tensor, ops
from tinytoken.backend import to_numpy
from tinytoken.tensor import Index

rng = np.random.default_rng(7)


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
    assert f"{Tensor(2.5):.2f} {Tensor([7]):3d} {Tensor(True)}" == "2.50   7 Tensor(True, shape (), bool)"


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
        for out, expected in ((operate(Tensor(xa), 3), operate(a, 3)),
                              (operate(3, Tensor(xa)), operate(3, a)),
                              (operate(np.float32(3), Tensor(xa)), operate(3, a))):
            assert isinstance(out, Tensor) and out.dtype == "float64"
            equal(out, expected)


def test_operators_keep_the_gradient_on_either_side(xp):
    x = leaf([[1.0, 2.0], [4.0, 8.0]], xp=xp)
    array = xp.asarray([[1.0, 3.0], [5.0, 7.0]])
    for build, expected in ((lambda: array * x, to_numpy(array)), (lambda: array - x, -np.ones((2, 2))),
                            (lambda: array / x, -to_numpy(array) / to_numpy(x.data) ** 2),
                            (lambda: array @ x, to_numpy(array).T @ np.ones((2, 2))),
                            (lambda: -x, -np.ones((2, 2))),
                            (lambda: x ** 2, 2 * to_numpy(x.data))):
        equal(tt.grad(build().sum(), [x])[0], expected)


def test_methods(xp):
    a = np.arange(24.0).reshape(2, 3, 4)
    t = Tensor(xp.asarray(a))
    for found, expected in ((t.sum(), a.sum()), (t.sum(1), a.sum(1)),
                            (t.sum(axis=(0, 2), keepdims=True), a.sum((0, 2), keepdims=True)),
                            (t.mean(-1), a.mean(-1)), (t.max(axis=0), a.max(0)),
                            (t.reshape(4, 6), a.reshape(4, 6)),
                            (t.reshape((6, -1)), a.reshape(6, -1)), (t.transpose(), a.T),
                            (t.transpose(0, 2, 1), a.transpose(0, 2, 1)),
                            (t.transpose((2, 0, 1)), a.transpose(2, 0, 1)),
                            (t.swapaxes(0, -1), a.swapaxes(0, -1)), (t[1], a[1]),
                            (t[:, None, ..., 1:3], a[:, None, ..., 1:3]), (t[a[:, 0, 0] > 3], a[1:])):
        assert isinstance(found, Tensor) and found.shape == np.shape(expected)
        equal(found, expected)
    equal(t[Tensor(xp.asarray([1, 0, 1]))], a[[1, 0, 1]])
    equal(t[0, Tensor(xp.asarray([2]))], a[0, [2]])


def test_a_tensor_is_gone_through_row_by_row(xp):
    qkv = leaf(np.arange(12.0).reshape(3, 4), xp=xp)
    q, k, v = qkv
    assert all(isinstance(part, Tensor) and part.shape == (4,) for part in (q, k, v))
    equal(tt.grad((q * 2 + k * v).sum(), qkv), [[2] * 4, to_numpy(v.data), to_numpy(k.data)])
    assert [row.item() for row in Tensor(xp.asarray([3, 5]))] == [3, 5] and list(Tensor(np.ones((0, 2)))) == []
    (a, b), (c, d) = Tensor(np.arange(4.0).reshape(2, 2))
    assert sum(Tensor([1.0, 2.0, 4.0])).item() == 7 and (a.item(), d.item()) == (0, 3)
    text = "Tensor: a 0-d tensor has no rows to go through; .item() is its value"
    assert refusal(InputError, iter, Tensor(1.0)) == text
    with pytest.raises(ValueError, match="too many values"):
        q, k = qkv
    with pytest.raises(TypeError, match="not a container"):
        2.0 in qkv


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, float("nan"), 0, 7, True, False])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_element_is_a_python_number(value, shape, xp):
    t = Tensor(xp.full(shape, value))
    assert bool(t) is bool(value) and repr(float(t)) == repr(float(value)) and repr(t.item()) == repr(value)
    assert value != value or int(t) == int(value)


@pytest.mark.parametrize("kind", [bool, float, int, Tensor.item])
@pytest.mark.parametrize("shape", [(2,), (0,), (2, 3)])
def test_more_elements_have_no_one_value(kind, shape, xp):
    text = f"Tensor: shape {shape}, expected one value for item(), float(), int() or bool()"
    assert refusal(InputError, kind, Tensor(xp.zeros(shape))) == text


# How an op takes its arguments

def test_arguments_by_position_and_by_name(xp):
    x, y = xp.asarray([1.0, 2.0]), xp.asarray([10.0, 20.0])
    for out in (axpy(x, y), axpy(x, y=y), axpy(y=y, x=x), axpy(x, y, 0.5), axpy(x, y, shift=0.5),
                axpy(Tensor(x), Tensor(y), a=2.0)):
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
    ((1.0, 2.0, 3.0, 4.0), {},
     "axpy: too many positional arguments; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((1.0, 2.0), {"b": 3, "c": 4},
     "axpy: got an unexpected keyword argument 'b'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    ((1.0, 2.0), {"x": 3},
     "axpy: multiple values for argument 'x'; it takes (x, y, shift=0.5, *, a=2.0, scale=1.0)"),
    (({1.0}, 2.0), {}, "axpy: argument 0 is a set, expected a Tensor, an array or a number"),
    ((1.0, "2"), {}, "axpy: argument 1 is a str, expected a Tensor, an array or a number"),
    ((["1"], 2.0), {}, "axpy: argument 0 has dtype <U1, expected float, int or bool"),
    ((np.array([1j]), 2.0), {}, "axpy: argument 0 has dtype complex128, expected float, int or bool"),
])
def test_wrong_calls_are_refused(args, kwargs, message):
    assert refusal(InputError, axpy, *args, **kwargs) == message


def test_lists_are_arrays():
    x = leaf([1.0, 2.0], "float32")
    for values in ([10, 20], (10.0, 20.0), [np.float64(10), np.int8(20)], [Tensor(10), 20.0]):
        out = axpy(x, values)
        assert out.dtype == "float32"
        equal(out, [12.5, 24.5])
    equal(axpy([True, False], [[1, 2], [3, 4]]), [[3.5, 2.5], [5.5, 4.5]])
    for rows in ([2, 0], (2, 0), [[2, 0]]):
        equal(pick(leaf([1.0, 2.0, 3.0]), rows), np.array([3.0, 1.0]).reshape(np.shape(rows)))
    assert pick(leaf([1.0]), []).shape == (0,)
    text = "axpy: setting an array element with a sequence."
    assert refusal(InputError, axpy, x, [[1.0], [1.0, 2.0]]).startswith(text)
    text = "concat: argument 0 is a list, expected a Tensor, an array or a number"
    assert refusal(InputError, ops.concat, [np.ones(2), np.ones(2)]) == text


def test_lists_as_labels_and_keep_masks():
    logits = rng.standard_normal((3, 4))
    for targets in ([1, 0, 3], (1, 0, 3), np.eye(4)[[1, 0, 3]].tolist()):
        expected = ops.cross_entropy(logits, np.array(targets))
        equal(ops.cross_entropy(leaf(logits), targets), expected.data)
    q, keep = rng.standard_normal((2, 1, 3, 4)), [[1, 0, 1], [True, True, False]]
    equal(ops.attention(q, q, q, keep), ops.attention(q, q, q, np.array(keep)).data)
    model = tt.models.DynamicViT(image_size=8, patch_size=4, dim=8, depth=2, heads=2, prune_before=(1,),
                                 keep_ratios=(0.5,))
    images, keep = rng.standard_normal((2, 3, 8, 8)), [[0, 1, 0, 1], [1, 0, 0, 1]]
    for dtype, training in (("float32", True), ("float32", False), ("float64", True)):
        model.astype(dtype).train(training)
        for values in (keep, np.array(keep, float).tolist()):
            equal(model(images, keep=[values]).logits, model(images, keep=[np.array(keep)]).logits.data)


@pytest.mark.parametrize("kind", [np.float64, np.float32, lambda n: np.array(n, "float64"), Tensor])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_numbers_are_settings(kind, dtype):
    """Whatever their dtype is, they do not spread it."""
    x, g = leaf([[0.5, 2.0], [1.5, 1.0]], dtype), np.ones((2, 2), dtype)
    for call in (lambda n: x ** n(1.5), lambda n: x ** n(2), lambda n: ops.power(x, exponent=n(-1)),
                 lambda n: ops.gumbel_softmax(x, g, tau=n(0.5)), lambda n: ops.layer_norm(x, eps=n(0.25)),
                 lambda n: ops.cross_entropy(x, np.array([0, 1]), smoothing=n(0.25)),
                 lambda n: axpy(x, g, a=n(0.5))):
        out, expected = call(kind), call(float)
        assert out.dtype == dtype
        equal(out, expected.data)
        equal(tt.grad(out.sum(), x), tt.grad(expected.sum(), x))


def test_numpy_integers_and_truth_values_are_settings():
    x = leaf(rng.standard_normal((2, 4, 6)))
    equal(ops.softmax(x, axis=np.int8(1)), ops.softmax(x, axis=1).data)
    equal(x.sum(np.int64(1), keepdims=np.True_), x.sum(1, keepdims=True).data)
    assert ops.split_heads(x, heads=np.int32(2), parts=np.array(3))[0].shape == (2, 2, 4, 1)
    assert ops.put_tokens(x, np.zeros((2, 4), int), length=np.int64(5)).shape == (2, 5, 6)


def test_a_setting_has_no_gradient():
    text = "power: exponent is a setting and gets no gradient: give a number, or a Tensor's .data"
    assert refusal(InputError, ops.power, leaf([2.0]), exponent=leaf(2.0)) == text


def test_unknown_setting_of_a_variadic_op():
    message = refusal(InputError, ops.concat, np.ones(2), x=1)
    assert message == "concat: got an unexpected keyword argument 'x'; it takes (*xs, axis=0)"


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
    assert refusal(InputError, axpy, x, y) == (
        "axpy: tensors of one float dtype expected, given x float32, y float64: cast one of them")
    text = refusal(InputError, axpy, x, np.ones(1), y)
    assert text.endswith("given x float32, shift float64: cast one of them")
    assert refusal(InputError, ops.concat, x, y) == (
        "concat: tensors of one float dtype expected, given input 0 float32, input 1 float64: cast one of "
        "them")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_arrays_are_cast_to_the_tensors_dtype(dtype, xp):
    x = leaf([1.0, 2.0], dtype, xp)
    for mask in (xp.asarray([True, False]), xp.asarray([1, 0]), xp.asarray([1, 0], "uint8"),
                 xp.asarray([1, 0], "float32"),
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


@pytest.mark.parametrize("scalar", [np.float64(2), np.float32(2), np.int64(2), np.float64(2) * np.ones(()), 2,
                                    2.0, True + 1])
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
    text = "axpy: dtype float16, expected float32 or float64"
    assert refusal(InputError, axpy, np.ones(2, "float16"), 1.0) == text


def test_index_arrays_are_passed_as_they_are():
    x = leaf([1.0, 2.0, 3.0], "float32")
    seen.clear()
    for rows in (np.array([2, 0]), np.array([2, 0], "int32"), np.array([2, 0], "uint8"),
                 Tensor(np.array([2, 0]))):
        equal(pick(x, rows, np.array([1, 2])), [3, 1])
    assert seen == [("int64", "float32"), ("int32", "float32"), ("uint8", "float32"), ("int64", "float32")]


@pytest.mark.parametrize("annotation", ["Index", "'Index'", "tensor.Index", "Index | None", "Alias", Index,
                                        Index | None, "tt.tensor.Index | None"])
def test_an_index_may_be_annotated_as_text(annotation):
    """As under `from __future__ import annotations`."""
    def rows_of(x, rows):
        return x[rows], lambda g: (None, None)
    rows_of.__globals__["Alias"] = Index
    rows_of.__annotations__ = {"x": "Array", "rows": annotation}
    equal(tt.op(rows_of)(leaf([1.0, 2.0, 3.0]), np.array([2, 0])), [3, 1])


def test_what_is_annotated_otherwise_is_cast():
    for annotation in ("Array", "np.ndarray", "Indexed", np.ndarray, "int | None", inspect.Parameter.empty):
        def dtype_of(x, rows):
            kinds.append(rows.dtype)
            return x * 1, None
        dtype_of.__annotations__ = {"rows": annotation}
        kinds = []
        tt.op(dtype_of)(leaf([1.0]), np.array([0]))
        assert kinds == ["float64"], annotation


def test_an_op_in_a_file_with_postponed_annotations(tmp_path, monkeypatch):
    (tmp_path / "postponed.py").write_text(
        "from __future__ import annotations\nimport tinytoken as tt\nfrom tinytoken.tensor import Index\n\n"
        "@tt.op\ndef rows_of(x, rows: Index, *, k: int = 1):\n    return x[rows], lambda g: (None, None)\n")
    monkeypatch.syspath_prepend(tmp_path)
    equal(importlib.import_module("postponed").rows_of(leaf([1.0, 2.0]), np.array([1, 1, 0])), [2, 2, 1])


def test_an_op_that_changes_the_dtype_is_named():
    @tt.op
    def leaky(x):
        return x * np.sqrt(np.float64(2)), lambda g: g
    assert leaky(leaf([1.0])).dtype == "float64"
    assert refusal(GradientError, leaky, leaf([1.0], "float32")) == (
        "leaky: float64 output for float32 inputs: is one of its constants a NumPy scalar?")
