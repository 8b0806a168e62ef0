"""Nonlinearities, elementwise."""
import math

from ..backend import Array, array_module, normal_cdf
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


# Functions that level off are computed from e^-|x|, which is small where they are flat: 1 minus a number that
# rounds to 1 would lose the rest. It cannot overflow, either.

def decay_of(x: Array) -> Array:
    """e^-|x| of a raw array."""
    xp = array_module(x)
    return xp.exp(-xp.abs(x))


@op
def sigmoid(x):
    """1 / (1 + exp(-x)), to full relative precision in both tails."""
    xp, decay = array_module(x), decay_of(x)
    return xp.exp(xp.minimum(x, 0)) / (1 + decay), lambda g: g * (decay / (1 + decay) ** 2)


@op
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)), where log(sigmoid(x)) would be log 0."""
    xp, decay = array_module(x), decay_of(x)
    return xp.minimum(x, 0) - xp.log1p(decay), lambda g: g * (xp.exp(xp.minimum(-x, 0)) / (1 + decay))


@op
def tanh(x):
    """Hyperbolic tangent."""
    def vjp(g):
        decay = decay_of(2 * x)
        return g * (4 * decay / (1 + decay) ** 2)  # 1 - tanh^2
    return array_module(x).tanh(x), vjp
