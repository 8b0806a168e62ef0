"""Right ops at inputs that are hard for finite differences: small beside large, close to where a domain ends.

A check that calls one of these wrong raises a false alarm.
"""
import numpy as np

from tinytoken import ops


def sizes(low, high, *shape):
    """Makes positive numbers from 10^low to 10^high, evenly in the exponent."""
    return lambda rng: 10 ** rng.uniform(low, high, shape)


def signed(low, high, *shape):
    return lambda rng: rng.choice([-1.0, 1.0], shape) * sizes(low, high, *shape)(rng)


HARD = {  # what: (function, a maker per input)
    "sqrt close to 0": (ops.sqrt, sizes(-7, 0, 4)),
    "sqrt of all sizes": (ops.sqrt, sizes(-7, 6, 2, 3)),
    "log close to 0": (ops.log, sizes(-7, 0, 4)),
    "divide by small numbers": (ops.divide, signed(-1, 1, 4), signed(-5, 1, 4)),
    "power 1.5 at its end": (lambda x: ops.power(x, exponent=1.5), sizes(-14, 0, 6)),
    "x log x": (lambda x: x * ops.log(x), sizes(-14, 0, 6)),
    "power -1.5": (lambda x: ops.power(x, exponent=-1.5), sizes(-4, 2, 4)),
    "power 0.5": (lambda x: ops.power(x, exponent=0.5), sizes(-6, 2, 4)),
    "multiply": (ops.multiply, signed(-6, 6, 3, 3), signed(-6, 6, 3, 3)),
    "matmul": (ops.matmul, signed(-3, 3, 3, 4), signed(-3, 3, 4, 2)),
    "linear": (ops.linear, signed(-3, 3, 3, 4), signed(-3, 3, 5, 4), signed(-3, 3, 5)),
    "softmax": (ops.softmax, signed(-3, 1.5, 3, 4)),
    "softmax, saturated": (ops.softmax, signed(1.3, 1.6, 3, 4)),
    "log_softmax": (ops.log_softmax, signed(-3, 2, 3, 4)),
    "layer_norm": (ops.layer_norm, signed(-3, 3, 3, 4), signed(-3, 3, 4), signed(-3, 3, 4)),
    "layer_norm of small rows": (ops.layer_norm, signed(-4, -2, 3, 4), signed(-1, 0, 4), signed(-1, 0, 4)),
    "exp": (ops.exp, signed(-3, 1, 6)),
    "gelu": (ops.gelu, signed(-4, 1, 6)),
    "sigmoid": (ops.sigmoid, signed(-4, 1.5, 6)),
    "tanh": (ops.tanh, signed(-4, 1, 6)),
    "relu close to its kink": (ops.relu, signed(-9, 0, 6)),
    "sum": (ops.sum, signed(-6, 6, 10)),
    "a mean of large numbers": (ops.mean, lambda rng: 1e4 + rng.standard_normal(40)),
    "attention": (ops.attention, *[signed(-2, 1, 1, 2, 4, 3)] * 3),
    "mse": (ops.mse, signed(-4, 4, 2, 3), signed(-4, 4, 2, 3)),
    "cross_entropy": (ops.cross_entropy, signed(-3, 1.5, 3, 5), lambda rng: rng.integers(5, size=3)),
    "kl_divergence": (ops.kl_divergence, signed(-3, 1, 3, 5), signed(-3, 1, 3, 5)),
    "a norm": (lambda x: ops.sqrt((x * x).sum()), signed(-4, 0, 5)),
    "the log of a sum": (lambda x: ops.log((x * x).sum(axis=-1)), signed(-3, 0, 3, 2)),
}
