"""Mistakes in softmax, layer norm and the losses."""
import numpy as np

from tinytoken import ops
from tinytoken.ops.norm import log_softmax_of, softmax_of, softmax_vjp

from .catalogue import normal, plant

ROWS = normal((2, 4))
NORM = normal((2, 4), (4,), (4,))
LABELS = normal((3, 4), np.array([2, 0, 2]))
LOGITS = normal((3, 4), (3, 4))


@plant(ops.softmax, ROWS, "zeros")
def softmax_zeros(out, x):
    return lambda g: 0 * g  # what the gradient of the sum of a softmax is


@plant(ops.softmax, ROWS)
def softmax_forgets_sum(out, x):
    return lambda g: g * out


@plant(ops.softmax, ROWS)
def softmax_diagonal_only(out, x):
    return lambda g: g * out * (1 - out)


@plant(ops.softmax, ROWS)
def softmax_over_wrong_axis(out, x):
    return lambda g: softmax_vjp(out, g, axis=0)


@plant(ops.softmax, ROWS)
def softmax_sums_everything(out, x):
    return lambda g: out * (g - (g * out).sum())


@plant(ops.log_softmax, ROWS)
def log_softmax_forgets_sum(out, x):
    return lambda g: g


@plant(ops.log_softmax, ROWS)
def log_softmax_forgets_exp(out, x):
    return lambda g: g - out * g.sum(axis=-1, keepdims=True)


@plant(ops.log_softmax, ROWS)
def log_softmax_has_softmax_vjp(out, x):
    return lambda g: softmax_vjp(np.exp(out), g)


def norm_parts(x, g, weight):
    """normed, 1 / sqrt(var + eps), upstream of normed, and the mean of its product with normed."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    u, normed = g * weight, centred * scale
    return normed, scale, u, (u * normed).mean(axis=-1, keepdims=True)


def norm_with(of_x):
    """A layer norm whose gradient of x is of_x(normed, scale, u, along)."""
    def wrong(out, x, weight, bias):
        def vjp(g):
            parts = norm_parts(x, g, weight)
            return of_x(*parts), (g * parts[0]).sum(axis=0), g.sum(axis=0)
        return vjp
    return wrong


@plant(ops.layer_norm, NORM, "offset")
def layer_norm_forgets_mean(*arrays):
    return norm_with(lambda normed, scale, u, along: scale * (u - normed * along))(*arrays)


@plant(ops.layer_norm, NORM)
def layer_norm_forgets_variance(*arrays):
    return norm_with(lambda normed, scale, u, along: scale * (u - u.mean(axis=-1, keepdims=True)))(*arrays)


@plant(ops.layer_norm, NORM)
def layer_norm_statistics_constant(*arrays):
    return norm_with(lambda normed, scale, u, along: scale * u)(*arrays)


@plant(ops.layer_norm, NORM)
def layer_norm_forgets_scale(*arrays):
    vjp_of = norm_with(lambda normed, scale, u, along: u - u.mean(axis=-1, keepdims=True) - normed * along)
    return vjp_of(*arrays)


@plant(ops.layer_norm, NORM)
def layer_norm_forgets_weight(out, x, weight, bias):
    of_x = norm_with(lambda normed, scale, u, along: scale
                     * (u - u.mean(axis=-1, keepdims=True) - normed * along))
    return of_x(out, x, 1, bias)


@plant(ops.layer_norm, NORM)
def layer_norm_weight_sees_raw_x(out, x, weight, bias):
    right = ops.layer_norm.function(x, weight, bias)[1]
    return lambda g: (right(g)[0](), (g * x).sum(axis=0), g.sum(axis=0))


@plant(ops.layer_norm, NORM, "zeros")
def layer_norm_forgets_bias(out, x, weight, bias):
    right = ops.layer_norm.function(x, weight, bias)[1]
    return lambda g: (*right(g)[:2], None)


@plant(ops.layer_norm, NORM, "not summed")
def layer_norm_bias_of_first_row(out, x, weight, bias):
    right = ops.layer_norm.function(x, weight, bias)[1]
    return lambda g: (*right(g)[:2], g[0])


# Losses

@plant(ops.cross_entropy, LABELS, "factor")
def cross_entropy_forgets_batch(out, logits, targets):
    return lambda g: (g * (softmax_of(logits) - np.eye(4)[targets]), None)


@plant(ops.cross_entropy, LABELS, "sign")
def cross_entropy_target_minus_probs(out, logits, targets):
    return lambda g: (g * (np.eye(4)[targets] - softmax_of(logits)) / 3, None)


@plant(ops.cross_entropy, LABELS, "upstream not used")
def cross_entropy_forgets_upstream(out, logits, targets):
    return lambda g: ((softmax_of(logits) - np.eye(4)[targets]) / 3, None)


@plant(ops.cross_entropy, LABELS)
def cross_entropy_only_true_class(out, logits, targets):
    return lambda g: (g * np.eye(4)[targets] * (softmax_of(logits) - 1) / 3, None)


@plant(ops.cross_entropy, LABELS, smoothing=0.1)
def cross_entropy_forgets_smoothing(out, logits, targets, smoothing):
    return lambda g: (g * (softmax_of(logits) - np.eye(4)[targets]) / 3, None)


@plant(ops.cross_entropy, LOGITS, "sign")
def cross_entropy_sign_of_soft_targets(out, logits, targets):
    of_logits = ops.cross_entropy.function(logits, targets)[1]
    return lambda g: (of_logits(g)[0], g * log_softmax_of(logits) / 3)


@plant(ops.kl_divergence, LOGITS)
def kl_reversed(out, logits, teacher_logits):
    reverse = ops.kl_divergence.function(teacher_logits, logits)[1]
    return lambda g: reverse(g)[::-1]


@plant(ops.kl_divergence, LOGITS, "zeros")
def kl_teacher_held_constant(out, logits, teacher_logits):
    return lambda g: (g * (softmax_of(logits) - softmax_of(teacher_logits)) / 3, None)


@plant(ops.kl_divergence, LOGITS, "factor")
def kl_averages_over_classes(out, logits, teacher_logits):
    return lambda g: (g * (softmax_of(logits) - softmax_of(teacher_logits)) / 12, None)


@plant(ops.mse, LOGITS, "factor")
def mse_forgets_two(out, x, target):
    slope = (x - target) / x.size
    return lambda g: (g * slope, -g * slope)


@plant(ops.mse, LOGITS, "sign")
def mse_target_same_sign(out, x, target):
    slope = 2 * (x - target) / x.size
    return lambda g: (g * slope, g * slope)


@plant(ops.mse, LOGITS, "factor")
def mse_forgets_mean(out, x, target):
    slope = 2 * (x - target)
    return lambda g: (g * slope, -g * slope)
