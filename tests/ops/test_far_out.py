"""Every activation and every loss from -100 to 100: float32 beside float64, and that beside 120 digits. There
a number that rounds to 0 or 1 on the way would lose all that follows from it."""
import decimal
import math

import numpy as np
import pytest

from cases import REGISTERED
from tinytoken import Tensor, ops
from tinytoken.backend import to_numpy

X = np.unique(np.concatenate([np.linspace(-100, 100, 801), np.linspace(-1, 1, 41), [-20, -15, 0]])).astype(
    "float32")
SUBNORMAL = 1e-44  # a few of the smallest float32: below 1e-38 they have no relative precision
EXACT = decimal.Context(prec=120)


def family(name):
    """The names of the ops in tinytoken.ops.<name>."""
    return {op.name for op in REGISTERED.values() if op.module == f"tinytoken.ops.{name}"}


def value_and_slope(op, x):
    x = Tensor(x, requires_grad=True)
    out = op(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == x.dtype
    return out.data, x.grad


# name: (f, f') of one Decimal or number
def logistic(x):
    return EXACT.divide(1, EXACT.add(1, EXACT.exp(-x)))


def tanh(x):
    return EXACT.subtract(EXACT.multiply(2, logistic(2 * x)), 1)


def one_minus(x):
    return EXACT.subtract(1, x)


ACTIVATIONS = {
    "sigmoid": (logistic, lambda x: EXACT.multiply(logistic(x), one_minus(logistic(x)))),
    "log_sigmoid": (lambda x: EXACT.ln(logistic(x)), lambda x: one_minus(logistic(x))),
    "tanh": (tanh, lambda x: one_minus(EXACT.multiply(tanh(x), tanh(x)))),
    "relu": (lambda x: max(x, 0), lambda x: int(x > 0)),
    "gelu": (lambda x: float(x) * math.erfc(-float(x) / math.sqrt(2)) / 2,
             lambda x: math.erfc(-float(x) / math.sqrt(2)) / 2
             + float(x) * math.exp(-float(x) ** 2 / 2) / math.sqrt(2 * math.pi)),
}
# gelu in float32 is a fitted polynomial, right to so much at values of any size (backend.normal_cdf)
FITTED = {"gelu": (4e-6, 1e-5)}


def test_no_activation_and_no_loss_is_left_out():
    assert family("activation") == ACTIVATIONS.keys()
    assert family("loss") == LOSSES.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes(name):
    double = value_and_slope(REGISTERED[name], X.astype("float64"))
    single = value_and_slope(REGISTERED[name], X)
    fitted = FITTED.get(name, (SUBNORMAL, SUBNORMAL))
    for formula, wide, narrow, least in zip(ACTIVATIONS[name], double, single, fitted):
        exact = np.array([float(formula(decimal.Decimal(float(x)))) for x in X])
        np.testing.assert_allclose(wide, exact, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(narrow, exact, rtol=1e-6, atol=least)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_of_a_single_number(name, xp):
    for dtype in ("float32", "float64"):
        x = Tensor(xp.asarray(-0.75, dtype), requires_grad=True)
        out = REGISTERED[name](x)
        out.backward()
        assert out.shape == x.grad.shape == () and out.dtype == x.grad.dtype == dtype
        for found, formula in zip((out.item(), x.grad.item()), ACTIVATIONS[name]):
            assert found == pytest.approx(float(formula(decimal.Decimal(-0.75))), abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_logarithm_of_a_sigmoid(dtype, xp):
    """What was -inf with a NaN for a gradient from -20 on."""
    x = np.array([-80, -20, -15, 3], dtype)
    exact = [float(EXACT.ln(logistic(decimal.Decimal(float(a))))) for a in x]
    for op in (ops.log_sigmoid, lambda x: ops.log(ops.sigmoid(x))):
        leaf = Tensor(xp.asarray(x), requires_grad=True)
        out = op(leaf)
        out.sum().backward()
        np.testing.assert_allclose(out.numpy(), exact, rtol=2e-6)
        slopes = 1 / (1 + np.exp(x.astype("float64")))
        np.testing.assert_allclose(to_numpy(leaf.grad), slopes, rtol=2e-6)


def test_infinities_of_the_activations():
    x = np.array([-np.inf, np.inf])
    for name, values, slopes in (("sigmoid", [0, 1], [0, 0]), ("log_sigmoid", [-np.inf, 0], [1, 0]),
                                 ("tanh", [-1, 1], [0, 0]), ("relu", [0, np.inf], [0, 1])):
        for found, right in zip(value_and_slope(REGISTERED[name], x), (values, slopes)):
            np.testing.assert_array_equal(found, right)


# The losses, one row at a time: a mean would hide the small ones behind the large.

ROWS = np.random.default_rng(0).uniform(-100, 100, (300, 3)).astype("float32")
ROWS[:40] = [[20 - i, i / 3, -i] for i in range(40)]
OTHERS = np.random.default_rng(1).uniform(-100, 100, (300, 3)).astype("float32")
SHARES = np.random.default_rng(2).dirichlet(np.ones(3), 300).astype("float32")
LABELS = np.arange(300) % 3
HARD = np.eye(3, dtype="float32")[LABELS]

# name: [(op, second arguments, absolute error)]. A softmax has an error of float32's own rounding, 6e-8; a
# difference of two logarithms that of numbers of size 200.
LOSSES = {
    "cross_entropy": [(ops.cross_entropy, LABELS[:, None], 2e-7), (ops.cross_entropy, SHARES[:, None], 2e-5),
                      (lambda x, y: ops.cross_entropy(x, y, smoothing=0.1), LABELS[:, None], 2e-5)],
    "binary_cross_entropy": [(ops.binary_cross_entropy, HARD[:, None], SUBNORMAL),
                             (ops.binary_cross_entropy, SHARES[:, None], 1e-7)],
    "kl_divergence": [(ops.kl_divergence, OTHERS[:, None], 5e-5)],
    "mse": [(ops.mse, OTHERS[:, None], 1e-6)],
}


def loss_and_gradients(loss, x, y, dtype):
    leaves = [Tensor(a.astype(dtype), requires_grad=True) if a.dtype.kind == "f" else a for a in (x, y)]
    out = loss(*leaves)
    out.backward()
    return [out.data, *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor))]


@pytest.mark.parametrize("name, number",
                         [(name, i) for name, tried in LOSSES.items() for i in range(len(tried))])
def test_losses_and_their_gradients(name, number):
    loss, others, least = LOSSES[name][number]
    for x, y in zip(ROWS[:, None], others):
        single, double = (loss_and_gradients(loss, x, y, dtype) for dtype in ("float32", "float64"))
        for narrow, wide in zip(single, double, strict=True):
            assert np.asarray(narrow).dtype == "float32"
            np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=least)


def test_binary_cross_entropy_to_the_last_digit():
    for x in X[::7].tolist():
        p = logistic(decimal.Decimal(x))
        for target in (0, 1):
            right = -float(EXACT.ln(p if target else one_minus(p)))
            slope = -float(one_minus(p)) if target else float(p)
            for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-6)):
                found, grad = loss_and_gradients(ops.binary_cross_entropy, np.array([x], dtype),
                                                 np.array([target]), dtype)
                np.testing.assert_allclose([found, grad.item()], [right, slope], rtol=tolerance,
                                           atol=SUBNORMAL)
