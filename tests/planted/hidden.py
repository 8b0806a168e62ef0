"""Mistakes that a usual draw does not show: at large, zero or strided upstream gradients, at small elements
beside large ones, and in state that a later call meets."""
import numpy as np

from tinytoken import ops

from .catalogue import normal, plant, positive

SPREAD = lambda rng: (rng.standard_normal((2, 4)), np.array([1e3, 1.0, 1e-2, 1e-4]))
FAR = lambda rng: (np.array([[-7.0, -4.0, 0.5, 6.0]]) + 0.1 * rng.random((2, 1)),)


# The upstream gradient: large, with zeros, not contiguous

@plant(ops.exp, normal((2, 3)), "not linear")
def exp_clips_upstream(out, x):
    return lambda g: out * (g if np.abs(g).max() < 4 else np.clip(g, -2.5, 2.5))


@plant(ops.sum, normal((2, 3)), "not linear")
def sum_clips_upstream(out, x):
    return lambda g: np.full(x.shape, np.clip(g, -100, 100))


@plant(ops.matmul, normal((2, 3), (3, 4)), "not linear")
def matmul_clips_norm(out, a, b):
    return lambda g: (g * min(1, 100 / np.sqrt((g * g).sum() + 1)) @ b.T, a.T @ g)


@plant(ops.linear, normal((3, 4), (2, 4), (2,)), "not linear")
def linear_stops_at_a_zero(out, x, weight, bias):
    return lambda g: (g @ weight, g.T @ x, g.sum(axis=0) if g.all() else None)


@plant(ops.tanh, normal((2, 4)), "not linear")
def tanh_drops_small_upstream(out, x):
    return lambda g: np.where(np.abs(g) < 1e-3, 0, g) * (1 - out * out)


@plant(ops.exp, normal((2, 3)), "strides")
def exp_reads_upstream_in_memory_order(out, x):
    return lambda g: g.ravel("K").reshape(g.shape) * out


@plant(ops.multiply, normal((2, 3), (2, 3)), "strides")
def multiply_reads_input_in_memory_order(out, a, b):
    return lambda g: (g * b.ravel("K").reshape(b.shape), g * a)


@plant(ops.log, positive((2, 3)), "strides")
def log_reads_input_by_columns_if_it_lies_so(out, x):
    return lambda g: g / x.ravel("A").reshape(x.shape)


@plant(ops.negative, normal((2, 3)), "strides")
def negative_is_wrong_for_transposed_upstream(out, x):
    return lambda g: -np.frombuffer(g.tobytes("A")).reshape(g.shape)


@plant(ops.sigmoid, normal((2, 3)), "strides")
def sigmoid_writes_into_a_copy(out, x):
    def vjp(g):
        of_x = np.zeros_like(x)  # laid out as x is, so that reshape may copy
        of_x.reshape(-1)[:] = (g * out * (1 - out)).reshape(-1)
        return of_x
    return vjp


# Small elements beside large ones

@plant(ops.multiply, SPREAD, "small elements")
def multiply_drops_small_factors(out, a, b):
    return lambda g: (g * np.where(np.abs(b) < 1e-3, 0, b), (g * a).sum(axis=0))


@plant(ops.exp, FAR, "small elements")
def exp_drops_small_outputs(out, x):
    return lambda g: g * np.where(out < 1e-2, 0.9 * out, out)


@plant(ops.softmax, FAR)
def softmax_drops_small_outputs(out, x):
    kept = np.where(out < 1e-4, 0, out)
    return lambda g: kept * (g - (g * kept).sum(axis=-1, keepdims=True))


# State that goes wrong later

@plant(ops.exp, normal((2, 3)), "state")
def exp_keeps_its_first_output(out, x, state):
    first = state.setdefault("out", out.copy())
    return lambda g: g * first


@plant(ops.layer_norm, normal((2, 4), (4,), (4,)), "state")
def layer_norm_keeps_its_first_weight(out, x, weight, bias, state):
    first = state.setdefault("weight", weight.copy())
    _, vjp = ops.layer_norm.function(x, first, bias)
    return vjp


@plant(ops.tanh, normal((2, 3)), "not deterministic")
def tanh_doubles_from_the_fourth_call(out, x, state):
    def vjp(g):
        state["calls"] = state.get("calls", 0) + 1
        return g * (1 - out * out) * (2 if state["calls"] > 3 else 1)
    return vjp


@plant(ops.tanh, normal((2, 3)), "not deterministic")
def tanh_drifts_from_the_seventh_call(out, x, state):
    def vjp(g):  # the check calls it once more, after all else
        state["calls"] = state.get("calls", 0) + 1
        return g * (1 - out * out) * (1 if state["calls"] < 7 else 1.001)
    return vjp


@plant(ops.gelu, positive((2, 3)), "not deterministic")
def gelu_tires_after_fourteen_forward_passes(out, x, state):
    state["calls"] = state.get("calls", 0) + 1
    _, vjp = ops.gelu.function(x)
    scale = 1 if state["calls"] <= 14 else 0.99
    return lambda g: scale * vjp(g)
