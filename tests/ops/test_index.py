"""x[key]: every form of a key that NumPy takes, with the gradients of what is taken more than once added up."""
import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, refusal
from tinytoken import InputError, Tensor, ops

UPSTREAM = np.array([[1.0, 1], [10, 10], [100, 100]])


@pytest.mark.parametrize("key", [
    ((0, 0, 1), slice(None)), ([0, 0, 1], slice(None)), [0, 0, 1], (np.array([0, 0, 1]),), range(0, 1),
    ((0, 0, 1),), ([0, 0, 1], ...), (Tensor([0, 0, 1]), slice(None)), ([Tensor(0), 0, 1],),
    ([np.int64(0), np.uint8(0), 1],), np.array([0, 0, 1], "uint8")], ids=str)
def test_a_row_that_is_taken_twice_gets_both_gradients(key, xp):
    x = leaf(np.arange(6.0).reshape(3, 2), xp=xp)
    out = x[key]
    rows = len(out)
    out.backward(xp.asarray(UPSTREAM[:rows]))
    equal(x.grad, [[11, 11], [100, 100], [0, 0]] if rows == 3 else [[1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("key", [((0, 1), (1, 1)), ([[0, 0], [0, 2]],), (((0, 0), (0, 2)),), ([0, 0], 1),
                                 (slice(None), [1, 1, 0]), (None, [2, 2]), ([True, False, True],), ([],), [],
                                 ([[True, False], [False, False], [True, True]],), (1, 1), (np.int64(1),),
                                 (np.array(2), np.array([1, 1])), (True,), (np.True_, [0, 0]), ((), 0)], ids=str)
def test_a_key_means_what_it_means_to_numpy(key, xp):
    array = np.arange(6.0).reshape(3, 2)
    taken = np.arange(6).reshape(3, 2)[tuple(key) if isinstance(key, tuple) else key]
    x = leaf(array, xp=xp)
    out = x[key]
    equal(out, array.reshape(-1)[taken])
    g = np.random.default_rng(0).standard_normal(taken.shape)
    out.backward(xp.asarray(g))
    expected = np.bincount(taken.reshape(-1), g.reshape(-1), minlength=6).reshape(3, 2)
    np.testing.assert_allclose(tt.backend.to_numpy(x.grad), expected, rtol=1e-13)
    whole = Tensor(xp.asarray(np.arange(6).reshape(3, 2)))[key]
    equal(whole, taken)
    assert whole.dtype == "int64"


def random_part(rng, length):
    """Something that may stand in a key for an axis of this length."""
    kind, size = rng.integers(8), int(rng.integers(1, 5))
    many = rng.integers(-length, length, size)
    if kind == 0:
        return int(rng.integers(-length, length))
    if kind == 1:
        return slice(*sorted(rng.integers(-length, length + 1, 2).tolist()), int(rng.integers(1, 3)))
    return [many, many.tolist(), tuple(many.tolist()), Tensor(many), many.astype("int8"),
            slice(None, None, -1)][kind - 2]


def as_numpy_takes_it(part):
    return part.data if isinstance(part, Tensor) else part


@pytest.mark.parametrize("seed", range(4))
def test_random_keys_against_numpy(seed):
    rng, done = np.random.default_rng(seed), 0
    for _ in range(200):
        shape = tuple(rng.integers(1, 5, int(rng.integers(1, 4))).tolist())
        key = tuple(random_part(rng, n) for n in shape[:int(rng.integers(1, len(shape) + 1))])
        array, places = rng.standard_normal(shape), np.arange(np.prod(shape)).reshape(shape)
        x = leaf(array)
        try:
            taken = places[tuple(map(as_numpy_takes_it, key))]
        except IndexError:  # index arrays whose lengths do not fit together
            refusal(InputError, lambda: x[key])
            continue
        out = x[key]
        equal(out, array.reshape(-1)[taken])
        g = rng.standard_normal(taken.shape)
        out.backward(g)
        expected = np.bincount(taken.reshape(-1), g.reshape(-1), minlength=x.size).reshape(shape)
        np.testing.assert_allclose(x.grad, expected, rtol=1e-12, atol=1e-14)
        done += 1
    assert done > 100


@pytest.mark.parametrize("key, message", [
    ([0.0], "index: an index of float64, expected integers or truth values"),
    ("a", "index: an index of <U1, expected integers or truth values"),
    (1.0, "index: an index of float64, expected integers or truth values"),
    ([[0], [0, 1]], "index: (3, 2): setting an array element with a sequence"),
    (5, "index: (3, 2): index 5 is out of bounds"),
])
def test_what_is_no_key_is_refused(key, message):
    assert refusal(InputError, lambda: leaf(np.ones((3, 2)))[key]).startswith(message)
    assert ops.index(np.ones((3, 2)), key=[1]).shape == (1, 2)
