"""Nonlinearities, elementwise."""
import math

from ..backend import array_module, normal_cdf
from ..tensor import op

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@op
def gelu(x):
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt 2)), the exact form (Hendrycks & Gimpel 2016, eq. 2), not tanh's."""
    xp = array_module(x)
    cdf = normal_cdf(x)

    def vjp(g):
        slope = xp.multiply(x, x, out=xp.empty_like(x))
        slope *= -0.5
        slope -= LOG_SQRT_2PI
        xp.exp(slope, out=slope)  # the normal density: Phi'(x)
        slope *= x
        slope += cdf
        slope *= g
        return slope
    return x * cdf, vjp


@op
def relu(x):
    """max(x, 0). The gradient at 0 is 0."""
    return array_module(x).maximum(x, 0), lambda g: g * (x > 0)


@op
def sigmoid(x):
    """1 / (1 + exp(-x)), as a tanh, which does not overflow."""
    out = 0.5 * (1 + array_module(x).tanh(0.5 * x))
    return out, lambda g: g * out * (1 - out)


@op
def tanh(x):
    """Hyperbolic tangent."""
    out = array_module(x).tanh(x)
    return out, lambda g: g * (1 - out * out)
