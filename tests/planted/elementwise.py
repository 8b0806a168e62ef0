"""Mistakes in arithmetic, reductions and activations."""
import math

import numpy as np

from tinytoken import ops
from tinytoken.backend import normal_cdf

from .catalogue import normal, plant, positive

PAIR = normal((2, 3), (2, 3))


def density(x):
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# Arithmetic

@plant(ops.add, PAIR, "upstream not used")
def add_returns_ones(out, a, b):
    return lambda g: (np.ones_like(a), np.ones_like(b))


@plant(ops.add, normal((2, 3), (3,)), "zeros")
def add_forgets_second(out, a, b):
    return lambda g: (g, None)


@plant(ops.subtract, PAIR, "sign")
def subtract_two_positive(out, a, b):
    return lambda g: (g, g)


@plant(ops.multiply, PAIR, "swapped")
def multiply_own_factor(out, a, b):
    return lambda g: (g * a, g * b)


@plant(ops.multiply, normal((4, 3), (3,)), "not summed")
def multiply_takes_first_row(out, a, b):
    return lambda g: (g * b, (g * a)[0])


@plant(ops.multiply, normal((4, 3), (3,)), "factor")
def multiply_averages_broadcast(out, a, b):
    return lambda g: (g * b, (g * a).mean(axis=0))


@plant(ops.multiply, PAIR, "writes")
def multiply_writes_into_upstream(out, a, b):
    def vjp(g):
        of_b = g * a
        g *= b
        return g, of_b
    return vjp


@plant(ops.divide, positive((2, 3), (2, 3)))
def divide_forgets_square(out, a, b):
    return lambda g: (g / b, -g * a / b)


@plant(ops.divide, positive((2, 3), (2, 3)), "sign")
def divide_forgets_minus(out, a, b):
    return lambda g: (g / b, g * out / b)


@plant(ops.negative, normal((2, 3)), "writes")
def negative_writes_into_input(out, x):
    def vjp(g):
        np.negative(g, out=x)  # "x is not needed any more"
        return x.copy()
    return vjp


@plant(ops.power, positive((2, 3)), "factor", exponent=3)
def power_forgets_exponent(out, x, exponent):
    return lambda g: g * x ** (exponent - 1)


@plant(ops.power, positive((2, 3)), exponent=3)
def power_keeps_exponent(out, x, exponent):
    return lambda g: g * exponent * out


@plant(ops.exp, normal((2, 3)), "upstream not used")
def exp_forgets_upstream(out, x):
    return lambda g: out


@plant(ops.log, positive((2, 3)))
def log_multiplies(out, x):
    return lambda g: g * x


@plant(ops.sqrt, positive((2, 3)), "factor")
def sqrt_forgets_half(out, x):
    return lambda g: g / out


# Reductions

@plant(ops.sum, normal((2, 3)), "factor", axis=1)
def sum_divides(out, x, axis):
    return lambda g: np.broadcast_to(g[:, None] / x.shape[1], x.shape)


@plant(ops.sum, normal((3, 3)), "transposed", axis=0)
def sum_spreads_along_other_axis(out, x, axis):
    return lambda g: np.broadcast_to(g[:, None], x.shape)


@plant(ops.sum, normal((2, 3)), "upstream not used")
def sum_returns_ones(out, x):
    return lambda g: np.ones_like(x)


@plant(ops.sum, normal((2, 3)), "shape", axis=1)
def sum_forgets_keepdims(out, x, axis):
    return lambda g: g


@plant(ops.mean, normal((2, 5)), "factor", axis=1)
def mean_forgets_count(out, x, axis):
    return lambda g: np.broadcast_to(g[:, None], x.shape)


@plant(ops.mean, normal((2, 5)), "factor", axis=1)
def mean_divides_by_everything(out, x, axis):
    return lambda g: np.broadcast_to(g[:, None] / x.size, x.shape)


@plant(ops.max, normal((2, 4)), axis=1)
def max_spreads_evenly(out, x, axis):
    return lambda g: np.broadcast_to(g[:, None] / x.shape[1], x.shape)


@plant(ops.max, normal((2, 4)), "permuted", axis=1)
def max_rewards_smallest(out, x, axis):
    return lambda g: g[:, None] * (x == x.min(axis=1, keepdims=True))


# Activations

@plant(ops.gelu, normal((2, 4)))
def gelu_tanh_slope(out, x):
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(c * (x + a * x ** 3))
    return lambda g: g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * a * x * x))


@plant(ops.gelu, normal((2, 4)))
def gelu_forgets_density_term(out, x):
    return lambda g: g * normal_cdf(x)


@plant(ops.gelu, normal((2, 4)))
def gelu_forgets_x(out, x):
    return lambda g: g * (normal_cdf(x) + density(x))


@plant(ops.relu, normal((2, 4)))
def relu_gates_by_upstream(out, x):
    return lambda g: g * (g > 0)


@plant(ops.relu, normal((2, 4)), "upstream not used")
def relu_returns_gate(out, x):
    return lambda g: (x > 0).astype(x.dtype)


@plant(ops.relu, normal((2, 4)), "dtype")
def relu_returns_bool(out, x):
    return lambda g: x > 0


@plant(ops.sigmoid, normal((2, 4)))
def sigmoid_forgets_out(out, x):
    return lambda g: g * (1 - out)


@plant(ops.tanh, normal((2, 4)))
def tanh_forgets_square(out, x):
    return lambda g: g * (1 - out)


@plant(ops.tanh, normal((2, 4)), "writes")
def tanh_writes_into_output(out, x):
    def vjp(g):
        np.square(out, out=out)
        return g * (1 - out)
    return vjp
