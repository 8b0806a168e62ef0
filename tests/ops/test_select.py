"""Choosing tokens: ties, order, repeats and wrong places; the Gumbel-softmax and its straight-through
gradient."""
import math

import numpy as np
import pytest

from tinytoken import InputError, Tensor, ops
from tinytoken import random as tt_random
from tinytoken.backend import to_numpy

rng = np.random.default_rng(3)


def equal(a, b):
    np.testing.assert_array_equal(to_numpy(a.data if isinstance(a, Tensor) else a), b)


# top_k

def test_top_k_is_ascending_and_the_first_of_equals_win(xp):
    scores = xp.asarray([[1.0, 3, 2, 3, 0], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5], [0, 7, 7, 7, 1]])
    equal(ops.top_k(scores, 2), [[1, 3], [0, 1], [3, 4], [1, 2]])
    equal(ops.top_k(scores, 3), [[1, 2, 3], [0, 1, 2], [2, 3, 4], [1, 2, 3]])
    equal(ops.top_k(scores, 5), [list(range(5))] * 4)
    assert ops.top_k(scores, 0).shape == (4, 0)
    out = ops.top_k(Tensor(scores, requires_grad=True), 2)
    assert isinstance(out, xp.ndarray) and out.dtype == "int64"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_top_k_against_a_sort(dtype, xp):
    scores = rng.integers(6, size=(20, 17)).astype(dtype) / 3  # many ties
    for k in (1, 8, 16):
        expected = [sorted(sorted(range(17), key=lambda i: (-row[i], i))[:k]) for row in scores]
        equal(ops.top_k(xp.asarray(scores), k), expected)


@pytest.mark.parametrize("dtype", ["bool", *"bBhHiIlL", "float16", "float32", "float64"])
def test_top_k_of_every_dtype(dtype, xp):
    """With the extremes of the dtype, which have no negative, and many ties."""
    dtype = np.dtype(dtype)
    whole = np.iinfo(dtype) if dtype.kind in "iu" else None
    ends = [whole.min, whole.max] if whole else [0, 1] if dtype == bool else [-np.inf, np.inf]
    for _ in range(20):
        scores = rng.integers(0, 9, (3, 8)).astype(dtype)
        scores[rng.random((3, 8)) < 0.3], scores[0, 5] = ends[0], ends[1]
        k = int(rng.integers(9))
        expected = [sorted(sorted(range(8), key=lambda i: (row[i] * -1, i))[:k]) for row in scores.tolist()]
        equal(ops.top_k(xp.asarray(scores), k), np.array(expected, int).reshape(3, k))
    assert ops.top_k(xp.asarray(np.array([[0, 5, 255, 7]], "uint8")), 2).tolist() == [[2, 3]]


def test_top_k_takes_nan_last(xp):
    equal(ops.top_k(xp.asarray([[np.nan, -np.inf, 0.0, np.nan]]), 2), [[1, 2]])


@pytest.mark.parametrize("scores, k, message", [
    (np.zeros((2, 3)), 4, "top_k: k 4 of scores (2, 3): expected (B, N) and 0 <= k <= N"),
    (np.zeros((2, 3)), -1, "top_k: k -1 of scores (2, 3): expected (B, N) and 0 <= k <= N"),
    (np.zeros(3), 1, "top_k: k 1 of scores (3,): expected (B, N) and 0 <= k <= N"),
    ([[1.0]], 1, "top_k: k 1 of scores list: expected (B, N) and 0 <= k <= N"),
    (np.ones((1, 2), complex), 1, "top_k: scores of complex128, expected numbers"),
])
def test_top_k_refuses(scores, k, message):
    with pytest.raises(InputError) as error:
        ops.top_k(scores, k)
    assert str(error.value) == message


# take_tokens and put_tokens

def test_take_tokens(xp):
    x, index = rng.standard_normal((2, 5, 3)), np.array([[4, 0, 4], [1, 2, 3]])
    expected = [[x[b, i] for i in row] for b, row in enumerate(index)]
    equal(ops.take_tokens(xp.asarray(x), xp.asarray(index)), expected)
    equal(ops.take_tokens(xp.asarray(x), xp.asarray(index.astype("int32"))), expected)


def test_put_tokens_adds_duplicates(xp):
    x, index = rng.standard_normal((2, 3, 4)), np.array([[4, 0, 4], [1, 1, 1]])
    expected = np.zeros((2, 5, 4))
    for b in range(2):
        for row, place in enumerate(index[b]):
            expected[b, place] += x[b, row]
    np.testing.assert_allclose(to_numpy(ops.put_tokens(xp.asarray(x), xp.asarray(index), length=5).data),
                               expected, rtol=1e-15)


def test_put_is_the_reverse_of_take(xp):
    x = xp.asarray(rng.standard_normal((3, 6, 2)))
    every = xp.asarray(np.stack([rng.permutation(6) for _ in range(3)]))
    equal(ops.put_tokens(ops.take_tokens(x, every), every, length=6), to_numpy(x))
    some = every[:, :4]
    kept = to_numpy(ops.put_tokens(xp.ones((3, 4, 1)), some, length=6).data)
    assert (np.sort(kept, axis=1)[..., 0] == [0, 0, 1, 1, 1, 1]).all()
    equal(ops.put_tokens(ops.take_tokens(x, some), some, length=6), to_numpy(x) * kept)
    equal(ops.take_tokens(ops.put_tokens(x[:, :4], some, length=6), some), to_numpy(x[:, :4]))


def test_put_and_take_are_adjoint(xp):
    """<take(x), y> = <x, put(y)>, repeats included: each is the other's gradient."""
    x, y = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 4, 3))
    index = xp.asarray(np.array([[4, 0, 4, 1], [2, 2, 2, 2]]))
    taken = to_numpy(ops.take_tokens(xp.asarray(x), index).data)
    put = to_numpy(ops.put_tokens(xp.asarray(y), index, length=5).data)
    assert (taken * y).sum() == pytest.approx((x * put).sum(), rel=1e-14)
    leaf = Tensor(xp.asarray(x), requires_grad=True)
    ops.take_tokens(leaf, index).backward(xp.asarray(y))
    equal(leaf.grad, put)


def test_no_tokens_at_all(xp):
    x = Tensor(xp.ones((2, 3, 4)), requires_grad=True)
    out = ops.take_tokens(x, xp.zeros((2, 0), "int64"))
    assert out.shape == (2, 0, 4)
    ops.put_tokens(out, xp.zeros((2, 0), "int64"), length=3).sum().backward()
    equal(x.grad, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("call, message", [
    (lambda x: ops.take_tokens(x, np.array([[0, 5], [0, 1]])),
     "take_tokens: index from 0 to 5, expected 0 to 4"),
    (lambda x: ops.take_tokens(x, np.array([[0, 1], [-1, 1]])),
     "take_tokens: index from -1 to 1, expected 0 to 4"),
    (lambda x: ops.put_tokens(x, np.array([[0, 1, 2, 3, 7]] * 2), length=7),
     "put_tokens: index from 0 to 7, expected 0 to 6"),
    (lambda x: ops.put_tokens(x, np.array([[0, 1, 2, 3, -2]] * 2), length=7),
     "put_tokens: index from -2 to 3, expected 0 to 6"),
    (lambda x: ops.put_tokens(x, np.array([[0, 1]] * 2), length=7),
     "put_tokens: index (2, 2) for x (2, 5, 3): one place per row expected"),
    (lambda x: ops.take_tokens(x, np.array([0, 1])),
     "take_tokens: x (2, 5, 3), index (2,) int64: expected (B, N, D) and integers (B, k)"),
    (lambda x: ops.take_tokens(x, np.array([[0, 1]])),
     "take_tokens: x (2, 5, 3), index (1, 2) int64: expected (B, N, D) and integers (B, k)"),
    (lambda x: ops.take_tokens(x, np.ones((2, 2))),
     "take_tokens: x (2, 5, 3), index (2, 2) float64: expected (B, N, D) and integers (B, k)"),
    (lambda x: ops.take_tokens(x[0], np.array([[0]])),
     "take_tokens: x (5, 3), index (1, 1) int64: expected (B, N, D) and integers (B, k)"),
])
def test_wrong_places_are_refused(call, message):
    with pytest.raises(InputError) as error:
        call(rng.standard_normal((2, 5, 3)))
    assert str(error.value) == message


# Gumbel-softmax

@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_soft_sample_is_its_formula(tau, xp):
    log_probs, noise = rng.standard_normal((2, 3, 4)), rng.gumbel(size=(2, 3, 4))
    exps = np.array([math.exp(a / tau) for a in (log_probs + noise).ravel().tolist()]).reshape(2, 3, 4)
    expected = exps / exps.sum(axis=-1, keepdims=True)
    out = to_numpy(ops.gumbel_softmax(xp.asarray(log_probs), xp.asarray(noise), tau=tau).data)
    np.testing.assert_allclose(out, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tau", [0.1, 1.0, 2.5])
def test_hard_sample_is_exactly_one_hot_at_the_soft_maximum(tau, dtype, xp):
    log_probs, noise = (xp.asarray(rng.standard_normal((50, 7, 3)).astype(dtype)) for _ in range(2))
    soft, hard = (to_numpy(ops.gumbel_softmax(log_probs, noise, tau=tau, hard=h).data) for h in (False, True))
    assert hard.dtype == soft.dtype == dtype
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(axis=-1) == 1).all()
    np.testing.assert_array_equal(hard.argmax(axis=-1), soft.argmax(axis=-1))
    np.testing.assert_array_equal(hard.argmax(axis=-1), to_numpy(log_probs + noise).argmax(axis=-1))


def test_of_equal_maxima_the_first_is_sampled(xp):
    equal(ops.gumbel_softmax(xp.zeros((2, 3)), xp.zeros((2, 3)), hard=True), [[1, 0, 0]] * 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_straight_through_gradient_is_the_soft_one_exactly(tau, dtype, xp):
    log_probs, noise, g = (xp.asarray(rng.standard_normal((2, 5, 2)).astype(dtype)) for _ in range(3))
    gradients = []
    for hard in (False, True):
        leaves = [Tensor(log_probs, requires_grad=True), Tensor(noise, requires_grad=True)]
        ops.gumbel_softmax(*leaves, tau=tau, hard=hard).backward(g)
        gradients.append([to_numpy(t.grad) for t in leaves])
    np.testing.assert_array_equal(*gradients)
    assert np.abs(gradients[0]).min() > 0


def test_hard_samples_are_distributed_as_the_softmax(xp):
    log_probs = np.log([0.5, 0.3, 0.15, 0.05]) + 2  # a shift changes nothing
    draws = 40_000
    for tau in (0.5, 1.0):  # nor does the temperature
        noise = tt_random.gumbel((draws, 4), site="test", step=0, seed=1, xp=xp)
        hard = ops.gumbel_softmax(xp.broadcast_to(xp.asarray(log_probs, "float32"), (draws, 4)), noise,
                                  tau=tau, hard=True)
        shares = to_numpy(hard.data).mean(axis=0)
        deviation = np.sqrt(np.exp(log_probs - 2) * (1 - np.exp(log_probs - 2)) / draws)
        assert (np.abs(shares - np.exp(log_probs - 2)) < 4 * deviation).all()


@pytest.mark.parametrize("call, message", [
    (lambda x: ops.gumbel_softmax(x, x[:1]),
     "gumbel_softmax: log_probs (2, 3), noise (1, 3): equal shapes expected"),
    (lambda x: ops.gumbel_softmax(x, x, tau=0), "gumbel_softmax: tau 0, expected a positive temperature"),
    (lambda x: ops.gumbel_softmax(x, x, tau=-1.0),
     "gumbel_softmax: tau -1.0, expected a positive temperature"),
])
def test_gumbel_softmax_refuses(call, message):
    with pytest.raises(InputError) as error:
        call(np.zeros((2, 3)))
    assert str(error.value) == message


def test_unsigned_indices_are_indices():
    x = np.arange(12.0).reshape(1, 4, 3)
    assert np.array_equal(ops.take_tokens(x, np.array([[3, 1]], "uint64")), x[:, [3, 1]])
