"""NumPy's own functions of Tensors: an op of ours, the values, or a refusal that names what to use."""
import collections
import operator

import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, refusal
from tinytoken import InputError, Tensor

A = np.array([[0.5, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("call", [
    lambda x: np.exp(x), lambda x: np.log(x), lambda x: np.sqrt(x), lambda x: np.tanh(x),
    lambda x: np.negative(x), lambda x: np.add(x, A), lambda x: np.subtract(A, x),
    lambda x: np.multiply(x, x), lambda x: np.divide(A, x), lambda x: np.matmul(A, x),
    lambda x: np.transpose(x), lambda x: np.transpose(x, (1, 0)), lambda x: np.transpose(x, axes=(0, 1)),
    lambda x: np.swapaxes(x, 0, 1), lambda x: np.swapaxes(a=x, axis1=0, axis2=1),
    lambda x: np.transpose(a=x), lambda x: A * x, lambda x: A @ x, lambda x: A / x, lambda x: A - x,
    lambda x: np.float64(3) * x, lambda x: np.float32(3) - x, lambda x: np.int64(3) / x])
def test_what_is_an_op_of_ours_stays_in_the_graph(call):
    x = leaf(A)
    out = call(x)
    assert isinstance(out, Tensor) and out.requires_grad and out.dtype == "float64"
    np.testing.assert_allclose(out.data, call(A), rtol=1e-15)
    tt.gradcheck(call, A)


@pytest.mark.parametrize("name, call, instead", [
    ("concatenate", lambda x: np.concatenate([x, A]), "ops.concat(*tensors, axis=0)"),
    ("stack", lambda x: np.stack((A, x)), "ops.concat(*[x[None] for x in tensors])"),
    ("where", lambda x: np.where(A > 1, x, A), "a * mask + b * (1 - mask)"),
    ("sum", lambda x: np.sum(x), "x.sum(axis)"),
    ("mean", lambda x: np.mean(x, axis=0), "x.mean(axis)"),
    ("einsum", lambda x: np.einsum("ij,jk->ik", A, x), "a @ b"),
    ("power", lambda x: A ** x, "x ** exponent"),
    ("sin", lambda x: np.sin(x), "an op of your own (@tt.op)"),
    ("add", lambda x: np.add.reduce(x), "an op of your own (@tt.op)"),
    ("split", lambda x: np.split(x, 2), "x[start:stop]"),
    ("<lambda> (vectorized)", lambda x: np.frompyfunc(lambda value: value, 1, 1)(x),
     "an op of your own (@tt.op)"),
    ("max", lambda x: np.max(x), "x.max(axis)")])
def test_what_would_cut_the_graph_is_refused_by_name(name, call, instead):
    assert refusal(InputError, call, leaf(A)) == (
        f"np.{name}: a Tensor that requires a gradient would lose its graph\n"
        f"  likely: {instead}, or x.data for the values alone")
    with tt.no_grad():
        found = call(leaf(A))
    np.testing.assert_array_equal(found, call(A))
    assert not isinstance(found, Tensor)
    np.testing.assert_array_equal(call(Tensor(A)), call(A))


@pytest.mark.parametrize("call", [
    lambda x: np.argmax(x, axis=1), lambda x: np.argsort(x), lambda x: np.shape(x), lambda x: np.ndim(x),
    lambda x: np.size(x), lambda x: np.allclose(x, A), lambda x: np.array_equal(x, A),
    lambda x: np.isfinite(x), lambda x: A == x, lambda x: x == A, lambda x: A > x, lambda x: np.zeros_like(x),
    lambda x: np.ones_like(x, dtype=int), lambda x: np.full_like(x, 2.0), lambda x: np.array2string(x),
    lambda x: np.result_type(x), lambda x: np.asarray(x), lambda x: np.asarray(x, "float32"),
    lambda x: np.array(x)], ids=range(19))
def test_what_has_no_gradient_to_lose_is_computed(call):
    np.testing.assert_array_equal(call(leaf(A)), call(A))
    assert type(call(leaf(A))) is type(call(A))


def test_values_are_written_and_saved(tmp_path):
    x, array = leaf(A), np.zeros((2, 2))
    np.copyto(array, x)
    equal(array, A)
    np.savez(tmp_path / "x.npz", x=x)
    with np.load(tmp_path / "x.npz") as file:
        equal(file["x"], A)


def test_tensors_in_other_containers():
    """NumPy finds them, and would ask for each what is to be done with all, without end."""
    Pair = collections.namedtuple("Pair", "a b")
    x = Tensor(A)
    equal(np.concatenate(Pair(x, A)), np.concatenate([A, A]))
    assert "ops.concat" in refusal(InputError, np.concatenate, Pair(leaf(A), A))
    objects = np.empty(2, object)
    objects[:] = x, x
    for several in (collections.deque([x, x]), objects):
        assert refusal(InputError, np.concatenate, several) == (
            "np.concatenate: Tensors in a container of another class, expected a list or tuple of them")


def test_a_tensor_is_not_added_to_an_array_in_place():
    x, array = leaf(A), A.copy()
    for write in (lambda: operator.iadd(array, x), lambda: np.multiply(A, x, out=array),
                  lambda: np.add.at(array, slice(None), x)):
        assert refusal(InputError, write).endswith(
            "writes a Tensor that requires a gradient into an array, which has no graph\n"
            "  likely: a = a + x, not a += x")
    equal(array, A)
    array += Tensor(A)
    equal(array, 2 * A)


@pytest.mark.parametrize("make", [lambda x, y: Tensor([x, y]), lambda x, y: Tensor([[1.0], (x[0], y)]),
                                  lambda x, y: tt.ops.exp([x, y])])
def test_a_list_of_tensors_of_a_graph_is_refused(make):
    text = refusal(InputError, make, leaf([1.0]), leaf([2.0]))
    assert text.partition(": ")[2] == ("a list of Tensors would cut their graph\n"
                                       "  likely: ops.concat(*tensors), or their .data")
    equal(Tensor([Tensor(1.0), Tensor(2.0)]), [1, 2])
    with tt.no_grad():
        equal(Tensor([leaf(1.0), leaf(2.0)]), [1, 2])


def test_arrays_of_the_device_times_a_tensor(xp):
    x, array = leaf(A, xp=xp), xp.asarray(A)
    for operate in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        out = operate(array, x)
        assert isinstance(out, Tensor) and isinstance(out.data, xp.ndarray) and out.requires_grad
        equal(out, operate(A, A))
