"""The smallest arrays: without axes, without elements, with one; against NumPy."""
import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, refusal
from tinytoken import InputError, Tensor, ops

rng = np.random.default_rng(5)


@pytest.mark.parametrize("name", ["sum", "mean", "max"])
@pytest.mark.parametrize("axis", [None, 0, -1, ()])
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions_of_one_number(name, axis, keepdims, xp):
    x = leaf(2.5, xp=xp)
    out = getattr(x, name)(axis=axis, keepdims=keepdims)
    assert out.shape == () and out.item() == 2.5
    equal(tt.grad(out, x), 1)


@pytest.mark.parametrize("seed", range(3))
def test_reductions_against_numpy(seed):
    """Over every axis of random shapes, many of them empty: values, shapes, and the gradient's shape."""
    rng, refused = np.random.default_rng(seed), 0
    for _ in range(150):
        shape = tuple(rng.integers(0, 4, int(rng.integers(0, 4))).tolist())
        axes = rng.permutation(len(shape))[:int(rng.integers(0, len(shape) + 1))].tolist()
        axis = [None, tuple(axes), *axes[:1]][int(rng.integers(2 + bool(axes)))]
        name, keepdims = ["sum", "mean", "max"][int(rng.integers(3))], bool(rng.integers(2))
        array = rng.standard_normal(shape)
        over = range(len(shape)) if axis is None else np.atleast_1d(np.array(axis, int)).tolist()
        of_none = 0 in [shape[a] for a in over]
        if name == "mean":  # unless there is no mean at all
            of_none = of_none and 0 not in [n for a, n in enumerate(shape) if a not in over]
        x = leaf(array)
        if name != "sum" and of_none:
            refusal(InputError, getattr(x, name), axis=axis, keepdims=keepdims)
            refused += 1
            continue
        out = getattr(x, name)(axis=axis, keepdims=keepdims)
        np.testing.assert_allclose(out.data, getattr(array, name)(axis=axis, keepdims=keepdims), rtol=1e-13)
        g = rng.standard_normal(out.shape)
        found = tt.grad(out, x, gradient=g)
        wide = g if keepdims or axis is None and not keepdims else np.expand_dims(g, tuple(over))
        share = {"sum": 1.0, "mean": out.size / max(array.size, 1),
                 "max": array == array.max(axis=axis, keepdims=True) if array.size else 1.0}[name]
        np.testing.assert_allclose(found, np.broadcast_to(wide, shape) * share, rtol=1e-13)
    assert refused > 3


def test_the_mean_of_nothing_is_refused():
    for call, text in ((lambda: leaf(np.ones((0, 3))).mean(), "mean: x (0, 3): no values along axis None"),
                       (lambda: leaf(np.ones((0, 3))).mean(0), "mean: x (0, 3): no values along axis 0"),
                       (lambda: ops.mse(np.ones((2, 0)), np.ones((2, 0)), axis=1),
                        "mse: x (2, 0): no values along axis 1")):
        assert refusal(InputError, call) == text
    equal(leaf(np.ones((0, 3))).mean(axis=1), np.ones(0))
    equal(ops.mse(np.ones((0, 3)), np.ones((0, 3)), axis=1), np.ones(0))


SIZES = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 4), (2, 0, 0), (0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize("rows, inner, columns", SIZES)
def test_products_without_elements(rows, inner, columns, xp):
    a, b = rng.standard_normal((rows, inner)), rng.standard_normal((inner, columns))
    bias = rng.standard_normal(columns)
    for call, arrays, expected in (
            (ops.matmul, (a, b), a @ b), (ops.matmul, (a[None], b), (a @ b)[None]),
            (ops.matmul, (a[None], b[None]), (a @ b)[None]),
            (ops.linear, (a, b.T.copy(), bias), a @ b + bias),
            (ops.linear, (a[None], b.T.copy()), (a @ b)[None])):
        leaves = [leaf(array, xp=xp) for array in arrays]
        out = call(*leaves)
        np.testing.assert_allclose(tt.backend.to_numpy(out.data), expected, rtol=1e-13)
        found = tt.grad(out.sum(), leaves)
        assert [g.shape for g in found] == [array.shape for array in arrays]
        if call is ops.matmul:
            np.testing.assert_allclose(tt.backend.to_numpy(found[1]).reshape(b.shape),
                                       np.broadcast_to(a.sum(axis=0)[:, None], b.shape), rtol=1e-13)


@pytest.mark.parametrize("batch, length, width, k", [(0, 3, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (0, 0, 0, 0),
                                                     (2, 0, 4, 0)])
def test_tokens_that_are_not_there(batch, length, width, k, xp):
    x, index = leaf(rng.standard_normal((batch, length, width)), xp=xp), xp.zeros((batch, k), "int64")
    taken = ops.take_tokens(x, index)
    assert taken.shape == (batch, k, width) and tt.grad(taken.sum(), x).shape == x.shape
    put = ops.put_tokens(ops.take_tokens(x, index), index, length=length)
    assert put.shape == x.shape and tt.grad(put.sum(), x).shape == x.shape
    table = leaf(np.ones((3, width)), xp=xp)
    rows = ops.embedding(table, index)
    assert rows.shape == (batch, k, width) and tt.grad(rows.sum(), table).shape == (3, width)


@pytest.mark.parametrize("axis", [0, -1])
def test_softmax_of_one_number(axis, xp):
    x = leaf(3.5, xp=xp)
    for op, value in ((ops.softmax, 1.0), (ops.log_softmax, 0.0)):
        out = op(x, axis=axis)
        assert out.shape == () and out.item() == value
        equal(tt.grad(out, x), 0)
        assert refusal(InputError, op, x, axis=1).startswith(op.name + ": ():")


def test_softmax_without_elements(xp):
    for shape, axis in (((2, 0), -1), ((0, 3), 1), ((0, 3), 0), ((0,), 0)):
        x = leaf(np.ones(shape), xp=xp)
        for op in (ops.softmax, ops.log_softmax):
            out = op(x, axis=axis)
            assert out.shape == shape == tt.grad(out.sum(), x).shape


def test_attention_to_no_key_gives_zeros(xp):
    q, k, v = (leaf(rng.standard_normal((2, 1, n, 4)), xp=xp) for n in (3, 0, 0))
    out = ops.attention(q, k, v)
    equal(out, np.zeros((2, 1, 3, 4)))
    assert [g.shape for g in tt.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]
    equal(tt.grad(ops.attention(q, k, v).sum(), q), np.zeros(q.shape))
    keep = leaf(np.ones((2, 0)), xp=xp)
    for tokens, itself in ((q, False), (k, True)):
        out = ops.attention(tokens, k, v, keep, sees_itself=itself)
        equal(out, np.zeros(tokens.shape))
        assert [g.shape for g in tt.grad(out.sum(), [k, v, keep])] == [k.shape, v.shape, keep.shape]


@pytest.mark.parametrize("call, text", [
    (lambda: ops.layer_norm(Tensor(1.0)), "layer_norm: x (), expected (..., D)"),
    (lambda: ops.layer_norm(np.ones((2, 0))), "layer_norm: x (2, 0), expected (..., D)"),
    (lambda: ops.attention(*[np.ones((1, 1, 2, 0))] * 3), "attention: q (1, 1, 2, 0), k (1, 1, 2, 0), "
     "v (1, 1, 2, 0): expected (B, H, Tq, d), (B, H, Tk, d), (B, H, Tk, d)"),
    (lambda: ops.concat(Tensor(1.0), Tensor(2.0)), "concat: a 0-d array, expected at least one axis"),
    (lambda: ops.transpose(Tensor(1.0), axes=(0,)), "transpose: axes (0,) for x ()")])
def test_what_needs_an_axis_says_so(call, text):
    assert refusal(InputError, call) == text
