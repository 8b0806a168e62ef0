"""A logit of minus infinity masks a class: values and gradients are those without the class."""
import math

import numpy as np
import pytest

from tinytoken import Tensor, checking, ops
from tinytoken.backend import to_numpy

INF = math.inf
rng = np.random.default_rng(3)
SEEN = np.array([1, 0, 1, 1, 0, 1], bool)  # of six classes; the others are masked
LOGITS, OTHERS = 3 * rng.standard_normal((2, 4, 6))
SHARES = rng.dirichlet(np.ones(4), 4)      # of the four that are seen
LABELS = np.array([2, 0, 3, 1])            # among the four


def masked(logits, seen=SEEN):
    return np.where(seen, logits, -INF)


def widened(array, fill=0.0):
    """(B, 4) -> (B, 6): `fill` for the masked classes."""
    out = np.full((len(array), len(SEEN)), fill, "float64")
    out[:, SEEN] = array
    return out


def run(op, *arrays, xp=np, **settings):
    """[value, gradients of the float arrays]"""
    leaves = [Tensor(xp.asarray(a), requires_grad=a.dtype.kind == "f") for a in arrays]
    out = op(*leaves, **settings)
    out.backward(xp.asarray(np.arange(1, out.size + 1, dtype=out.dtype).reshape(out.shape)))
    return [to_numpy(a) for a in (out.data, *(leaf.grad for leaf in leaves if leaf.requires_grad))]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_cross_entropy_is_that_of_the_classes_that_are_left(smoothing, xp):
    labels = np.flatnonzero(SEEN)[LABELS]
    value, slope = run(ops.cross_entropy, LOGITS[:, SEEN], LABELS, xp=xp, smoothing=smoothing)
    same(run(ops.cross_entropy, masked(LOGITS), labels, xp=xp, smoothing=smoothing), [value, widened(slope)])
    value, slope, of_targets = run(ops.cross_entropy, LOGITS[:, SEEN], SHARES, xp=xp, smoothing=smoothing)
    same(run(ops.cross_entropy, masked(LOGITS), widened(SHARES), xp=xp, smoothing=smoothing),
         [value, widened(slope), widened(of_targets)])


def test_cross_entropy_of_the_report():
    value, slope = run(ops.cross_entropy, np.array([[1, 2, -INF], [0.5, 0, -INF]]), np.array([1, 0]))
    same([value, slope], [0.39366933584916475, [[0.13447071068499755, -0.13447071068499755, 0],
                                                [-0.18877033439907276, 0.18877033439907276, 0]]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_a_target_on_a_masked_class_costs_infinitely_much(dtype, smoothing, xp):
    """-log 0. The gradient stays finite: p - t."""
    logits = np.array([[1, 2, -INF], [0.5, 0, -INF]], dtype)
    for targets in (np.array([1, 2]), np.array([[0, 1, 0], [0, 0.5, 0.5]], dtype)):
        value, slope, *_ = run(ops.cross_entropy, logits, targets, xp=xp, smoothing=smoothing)
        assert value == INF and np.isfinite(slope).all() and slope[1, 2] < 0


def test_a_row_without_a_class(xp):
    """Nothing is left to be normalised: zeros, as for a row of attention that sees no key."""
    x = np.array([[-INF, -INF, -INF], [0, -INF, 0]])
    g = np.array([[1, 2, 3], [4, 5, 6]])
    same(run(ops.softmax, x, xp=xp), [[[0, 0, 0], [0.5, 0, 0.5]], [[0, 0, 0], [-0.5, 0, 0.5]]])
    same(run(ops.log_softmax, x, xp=xp), [[[-INF] * 3, [-math.log(2), -INF, -math.log(2)]],
                                          [g[0], g[1] - 15 * np.array([0.5, 0, 0.5])]])
    same(run(ops.softmax, x.T.copy(), axis=0, xp=xp)[:1], [[[0, 0.5], [0, 0], [0, 0.5]]])
    same(run(ops.cross_entropy, x, np.array([[0, 0, 0], [1, 0, 0]]), xp=xp),
         [math.log(2) / 2, [[0, 0, 0], [-0.25, 0, 0.25]]])
    value, slope = run(ops.cross_entropy, x, np.array([0, 0]), xp=xp, smoothing=0.1)
    assert value == INF and np.isfinite(slope).all()


def test_softmax_is_that_of_the_classes_that_are_left(xp):
    for op, fill in ((ops.softmax, 0), (ops.log_softmax, -INF)):
        found = to_numpy(op(xp.asarray(masked(LOGITS))).data)
        same([found], [widened(to_numpy(op(xp.asarray(LOGITS[:, SEEN])).data), fill)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_below_what_was_taken_for_infinite(dtype, xp):
    """-1e30 is a number like others, and so is the lowest one."""
    lowest = np.finfo(dtype).min
    for x in ([-3e30, -3e30], [lowest, lowest], [-2e38, -2e38]):
        x = xp.asarray([x], dtype)
        same([to_numpy(ops.softmax(x).data), to_numpy(ops.log_softmax(x).data)],
             [[[0.5, 0.5]], np.full((1, 2), np.log(np.array(0.5, dtype)))])


def test_kl_divergence_is_that_of_the_classes_that_are_left(xp):
    value, of_student, of_teacher = run(ops.kl_divergence, LOGITS[:, SEEN], OTHERS[:, SEEN], xp=xp)
    same(run(ops.kl_divergence, masked(LOGITS), masked(OTHERS), xp=xp),
         [value, widened(of_student), widened(of_teacher)])
    same(run(ops.kl_divergence, masked(LOGITS), masked(LOGITS), xp=xp), [0, 0 * LOGITS, 0 * LOGITS])


def test_kl_divergence_where_one_of_the_two_masks(xp):
    """A class that only the teacher masks has p = 0 and adds nothing; one that only the student masks has
    p log(p / 0)."""
    p, q = to_numpy(ops.softmax(masked(OTHERS)).data), to_numpy(ops.softmax(LOGITS).data)
    right = np.sum(p[:, SEEN] * np.log(p[:, SEEN] / q[:, SEEN])) / 4
    value, of_student, of_teacher = run(ops.kl_divergence, LOGITS, masked(OTHERS), xp=xp)
    same([value, of_student], [right, (q - p) / 4])
    assert np.isfinite(of_teacher).all() and not of_teacher[:, ~SEEN].any()
    student = Tensor(xp.asarray(masked(LOGITS)), requires_grad=True)
    loss = ops.kl_divergence(student, xp.asarray(OTHERS))
    loss.backward()
    assert loss.item() == INF and np.isfinite(to_numpy(student.grad)).all()


def test_kl_divergence_of_the_report():
    student, teacher = np.array([[1, 2, -INF], [0.5, 0, -INF]]), np.array([[2, 1, -INF], [0.5, 0, -INF]])
    for op in (ops.kl_divergence, lambda s, t: ops.kl_divergence(s[:, :2], t[:, :2])):
        same([op(Tensor(student), Tensor(teacher)).data], [0.5 * math.tanh(0.5)])


@pytest.mark.parametrize("op", [
    lambda x: ops.cross_entropy(x, np.array([2, 0, 5, 3]), smoothing=0.1), lambda x: ops.softmax(x),
    lambda x: ops.cross_entropy(x, widened(SHARES)), lambda x: ops.kl_divergence(x, masked(OTHERS)),
    lambda x: ops.kl_divergence(masked(OTHERS), x)],
    ids=["labels, smoothing", "softmax", "soft targets", "student", "teacher"])
def test_gradients_beside_a_mask(op):
    checking.gradcheck(lambda x: op(ops.concat(x[:, :1], np.full((4, 1), -INF), x[:, 1:3],
                                               np.full((4, 1), -INF), x[:, 3:], axis=1)), LOGITS[:, SEEN])


def test_targets_made_by_a_masked_softmax_get_a_gradient():
    """0 times the infinite logarithm of a masked class would be NaN in the vjp of the softmax."""
    teacher = Tensor(masked(OTHERS), requires_grad=True)
    ops.cross_entropy(masked(LOGITS), ops.softmax(teacher)).backward()
    assert np.isfinite(teacher.grad).all() and not teacher.grad[:, ~SEEN].any()
    assert teacher.grad[:, SEEN].all()


def test_one_nan_is_not_taken_for_a_mask(xp):
    x = xp.asarray([[1.0, math.nan, 0.0], [1.0, 2.0, 3.0]])
    for op in (ops.softmax, ops.log_softmax):
        assert np.array_equal(np.isnan(to_numpy(op(x).data)).all(axis=1), [True, False])
    labels = xp.asarray([0, 0])
    for loss in (ops.cross_entropy(x, labels), ops.cross_entropy(x, labels, smoothing=0.1),
                 ops.kl_divergence(x, x[::-1]), ops.kl_divergence(x[::-1], x),
                 ops.binary_cross_entropy(x, xp.zeros_like(x))):
        assert math.isnan(loss.item())


@pytest.mark.parametrize("target, right, slope", [(0, [0, INF], [0, 1]), (1, [INF, 0], [-1, 0])])
def test_binary_cross_entropy_at_infinite_logits(target, right, slope, xp):
    for x, loss, grad in zip((-INF, INF), right, slope):
        same(run(ops.binary_cross_entropy, np.array([x]), np.array([target]), xp=xp), [loss, [grad]])
    targets = Tensor(xp.asarray([0.0, 1.0]), requires_grad=True)
    ops.binary_cross_entropy(xp.asarray([-INF, INF]), targets).backward()
    assert not to_numpy(targets.grad).any()
