"""LookupViT's two ops: one score matrix, read in two directions."""
import math

import numpy as np
import pytest

from small import refuses, same
from tinytoken import Tensor, checking, ops
from tinytoken.backend import to_numpy

B, H, T, D = 2, 3, 7, 4


def lookup(seed=0, std=2.0):
    """q (B, H, M, d), k and v (B, H, N, d), and compressed values (B, H, M, e)."""
    rng = np.random.default_rng(seed)
    return (std * rng.standard_normal((B, H, 3, D)), rng.standard_normal((B, H, T, D)),
            rng.standard_normal((B, H, T, D)), rng.standard_normal((B, H, 3, 5)))


def test_gather_is_attention_with_its_logits(xp):
    q, k, v, _ = (xp.asarray(a) for a in lookup())
    out, A, logits = ops.lookup_gather(q, k, v)
    plain_out, plain_A = ops.attention(q, k, v, weights=True)
    same(to_numpy(out.data), to_numpy(plain_out.data))
    same(to_numpy(A.data), to_numpy(plain_A.data))
    same(to_numpy(logits.data), to_numpy(q) @ to_numpy(k).swapaxes(-1, -2) / 2)  # sqrt(4)
    same(to_numpy(A.data).sum(axis=-1), np.ones((B, H, 3)))


def test_masses_of_the_reverse_map(xp):
    """Values of ones show the mass that each lookup token receives."""
    q, k, v, _ = (xp.asarray(a) for a in lookup())
    _, A, logits = ops.lookup_gather(q, k, v)
    ones = xp.ones((B, H, 3, 1))
    mass = {reuse: to_numpy(ops.lookup_infuse(A, logits, ones, reuse=reuse).data)[..., 0]
            for reuse in ("probs", "renorm", "resoftmax")}
    same(mass["probs"], to_numpy(A.data).sum(axis=2))
    same(mass["probs"].sum(axis=-1), np.full((B, H), 3.0))  # M, shared by N tokens
    same(mass["renorm"], np.ones((B, H, T)))
    same(mass["resoftmax"], np.ones((B, H, T)))


def reverse_map(A, logits, reuse):
    """R^T of the infusion, from ops that are checked elsewhere. Tensors in, Tensor out."""
    if reuse == "resoftmax":
        return ops.softmax(logits.swapaxes(-1, -2))
    turned = A.swapaxes(-1, -2)
    return turned if reuse == "probs" else turned / turned.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax"])
def test_the_gradient_of_the_scores_is_the_sum_of_both_uses(reuse, xp):
    """Gather, change the compressed values by what was read, infuse: against the same written with plain
    ops."""
    q, k, v, w = lookup()
    rng = np.random.default_rng(5)
    g_out, g_back = (xp.asarray(rng.standard_normal((B, H, *size))) for size in ((3, D), (T, 5 + D)))

    def loss(leaves, coarse):
        q, k, v, w = leaves
        if coarse:
            out, A, logits = ops.lookup_gather(q, k, v)
        else:
            logits = q @ k.swapaxes(-1, -2) / math.sqrt(D)
            A = ops.softmax(logits)
            out = A @ v
        values = ops.concat(w, out * out, axis=-1)
        back = (ops.lookup_infuse(A, logits, values, reuse=reuse) if coarse
                else reverse_map(A, logits, reuse) @ values)
        return (out * g_out).sum() + (back * g_back).sum(), back
    results = []
    for coarse in (True, False):
        leaves = [Tensor(xp.asarray(a), requires_grad=True) for a in (q, k, v, w)]
        total, back = loss(leaves, coarse)
        total.backward()
        results.append([to_numpy(a) for a in (back.data, *(t.grad for t in leaves))])
    for a, b in zip(*results):
        same(a, b)


@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax"])
def test_both_uses_by_finite_differences(reuse):
    def both(q, k, v, w):
        out, A, logits = ops.lookup_gather(q, k, v)
        return out, ops.lookup_infuse(A, logits, ops.concat(w, out * out, axis=-1), reuse=reuse)
    checking.gradcheck(both, *(a[:1, :2] for a in lookup(std=1.0)), rtol=1e-6)


def test_renorm_of_a_column_that_nobody_looks_at_gives_zeros():
    A = np.zeros((1, 1, 2, 3), "float32")
    A[..., 0] = 1
    A, v = Tensor(A, requires_grad=True), Tensor(np.ones((1, 1, 2, 4), "float32"), requires_grad=True)
    out = ops.lookup_infuse(A, np.zeros((1, 1, 2, 3)), v, reuse="renorm")
    out.sum().backward()
    np.testing.assert_array_equal(out.data[0, 0], [[1] * 4, [0] * 4, [0] * 4])
    assert np.isfinite(A.grad).all() and np.isfinite(v.grad).all()


@pytest.mark.parametrize("reuse", ["probs", "renorm"])
def test_what_does_not_read_the_logits_does_without(reuse, xp):
    """To the bit, the gradients included: a gather that keeps no logits serves the infusion as well."""
    q, k, v, w = (xp.asarray(a) for a in lookup())
    _, A, logits = ops.lookup_gather(q, k, v)
    results = []
    for scores in (logits, None):
        a, b = Tensor(A.data, requires_grad=True), Tensor(w, requires_grad=True)
        out = ops.lookup_infuse(a, scores, b, reuse=reuse)
        out.sum().backward()
        results.append([to_numpy(array) for array in (out.data, a.grad, b.grad)])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)


# What is refused

def z(*shape):
    return np.zeros(shape)


@pytest.mark.parametrize("call, message", [
    (lambda: ops.lookup_gather(z(1, 2, 3, 4), z(1, 3, 3, 4), z(1, 3, 3, 4)),
     "lookup_gather: q (1, 2, 3, 4), k (1, 3, 3, 4), v (1, 3, 3, 4): expected (B, H, Tq, d), (B, H, Tk, d), "
     "(B, H, Tk, d)"),
    (lambda: ops.lookup_infuse(z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 5), reuse="logits"),
     "lookup_infuse: reuse 'logits', expected probs, renorm, resoftmax (separate: ops.attention with its own "
     "q and k)"),
    (lambda: ops.lookup_infuse(z(1, 2, 3, 4), z(1, 2, 4, 3), z(1, 2, 3, 5), reuse="probs"),
     "lookup_infuse: A (1, 2, 3, 4), logits (1, 2, 4, 3), v (1, 2, 3, 5): expected (B, H, M, N), logits of "
     "the same shape, and (B, H, M, d)"),
    (lambda: ops.lookup_infuse(z(1, 2, 3, 4), None, z(1, 2, 4, 5), reuse="probs"),
     "lookup_infuse: A (1, 2, 3, 4), v (1, 2, 4, 5): expected (B, H, M, N), logits of the same shape, and "
     "(B, H, M, d)"),
    (lambda: ops.lookup_infuse(z(1, 2, 3, 4), None, z(1, 2, 3, 5), reuse="resoftmax"),
     "lookup_infuse: no logits, which reuse='resoftmax' reads"),
])
def test_wrong_arguments_are_named(call, message):
    with refuses(message):
        call()
