"""What the engine refuses, inputs that an op changes, and gradients that are not the same twice."""
import numpy as np
import pytest

from mistakes import normal, refuses
from tinytoken import GradientError, op, ops
from tinytoken.checking import upstream
from tinytoken.checking.diagnosis import read_crash, read_refusal


def test_the_engine_refuses_a_shape_and_gradcheck_reads_it():
    @op
    def spread(x, s):
        return x * s[:, None, None], lambda g: (g * s[:, None, None], g * x)
    error = refuses(spread, normal(2, 3, 4), normal(2))
    assert error.kind == "not summed" and isinstance(error.__cause__, GradientError)
    assert str(error) == ("spread: its vjp returned shape (2, 3, 4) for s, which is (2,)\n"
                          "  reading: not summed over a broadcast axis: the extra axes are those along which "
                          "this input was "
                          "repeated\n  seed 0")


@pytest.mark.parametrize("message, kind", [
    ("f: its vjp returned shape (3, 2) for x, which is (2, 3)", "transposed"),
    # does not broadcast by chance
    ("f: its vjp returned shape (4, 2, 3) for x, which is (2, 3)", "not summed"),
    ("f: its vjp returned shape (6,) for x, which is (2, 3)", "shape"),
    ("f: its vjp returned shape () for x, which is (2, 3)", "shape"),
    ("f: its vjp returned float32 for x, which is float64: is a constant a NumPy scalar?", "dtype"),
    ("f: its vjp returned bool for x, which is float64: is a constant a NumPy scalar?", "dtype"),
    ("f: its vjp returned 1 entries for 2 array arguments", "entries"),
    ("f: its vjp returned a float for x, expected an array", "type"),
])
def test_what_the_engine_refuses_has_a_reading(message, kind):
    assert read_refusal(message)[0] == kind


def test_the_refusals_are_those_of_the_engine():
    def with_vjp(vjp):
        @op
        def f(x, y):
            return x @ y, vjp
        return f
    x, y = normal(2, 3), normal(3, 2)
    returned = {"transposed": lambda g: ((g @ y.T).T, None), "shape": lambda g: (g.reshape(4)[:3], None),
                "type": lambda g: (1.5, None), "dtype": lambda g: ((g @ y.T).astype("float32"), None),
                "entries": lambda g: g @ y.T}
    for kind, vjp in returned.items():
        error = refuses(with_vjp(vjp), x, y)
        assert error.kind == kind and str(error).startswith("f: its vjp returned")


def test_a_crash_inside_a_vjp():
    assert "transpose" in read_crash(ValueError("mismatch")) and "by itself" in read_crash(KeyError("x"))
    assert "is None" in read_crash(AttributeError("'NoneType' object has no attribute 'shape'"))


def test_an_op_that_changes_its_input_is_named():
    @op
    def shift(x, y):
        y += 1
        return x + y, lambda g: (g, g)
    error = refuses(shift, normal(3), normal(3))
    assert error.kind == "writes" and "shift: the forward pass writes into y (3,)" in str(error)


def test_an_integer_input_that_is_changed_is_seen():
    @op
    def take(x, rows: "rows"):
        return x[rows], lambda g: (g, None)

    def fn(x, rows):
        rows.data[0] = 1
        return ops.embedding(x, rows)
    assert "writes into rows (2,)" in str(refuses(fn, normal(4, 2), np.array([0, 1])))


def test_a_vjp_that_writes():
    @op
    def upstream(x):
        def vjp(g):
            g *= 2
            return g
        return 2 * x, vjp

    @op
    def output(x):
        out = np.exp(x)

        def vjp(g):
            out[...] *= g
            return out.copy()
        return out, vjp

    @op
    def inside(x):
        def vjp(g):
            x[...] *= g
            return x.copy()
        return x * x / 2, vjp
    places = {upstream: "into the upstream gradient", output: "into the output",
              inside: "backward pass writes into x (3,)"}
    for function, what in places.items():
        error = refuses(function, normal(3))
        assert error.kind == "writes" and what in str(error)


def test_noise_is_named():
    rng = np.random.default_rng(0)
    error = refuses(lambda x: ops.multiply(x, rng.standard_normal(3)), normal(3))
    assert error.kind == "not deterministic" and "Noise must be an argument" in str(error)


def test_a_gradient_that_changes_is_named():
    calls = []

    @op
    def moody(x):
        def vjp(g):
            calls.append(1)
            return 2 * g * len(calls)
        return 2 * x, vjp
    error = refuses(moody, normal(3))
    assert error.kind == "not deterministic" and "the same output and another gradient" in str(error)


def test_not_finite():
    with np.errstate(all="ignore"):
        error = refuses(ops.log, np.array([1.0, -1.0]))
        assert error.kind == "not finite" and "output 0 (2,) has NaN" in str(error)
        error = refuses(ops.sqrt, np.array([1.0, 0.0]))
        assert error.kind == "not finite" and "the analytic gradient has NaN or infinite values" in str(error)
    error = refuses(lambda x: ops.log(x - 1), np.array([2.0, 1 + 1e-6]), eps=2e-6)
    assert error.kind == "not finite" and "cannot be checked: 1 of 2 elements differ" in str(error)
    assert "a small step leads to NaN or infinite outputs" in str(error)

    @op
    def broken(x):
        return 2 * x, lambda g: np.where(x > 0, 2 * g, np.nan)
    error = refuses(broken, np.array([1.0, -1.0, 2.0]))
    assert error.kind == "not finite" and "1 of 3 elements differ\n  worst at [1]: analytic nan" in str(error)


def test_sums_of_gradients_agree_within_atol():
    """Where a softmax is saturated, its gradients are the rounding of upstream gradients of 10^4."""
    nothing, rounding = [np.zeros(2)], [np.array([0, 1e-9])]
    assert upstream._not_the_sum(1e-8, nothing, rounding, nothing) is None
    assert upstream._not_the_sum(0.0, nothing, rounding, nothing) == (0, [1])
