"""Mistakes in attention, in its keep mask, and in LookupViT's two directions."""
import math

import numpy as np

from tinytoken import ops
from tinytoken.ops.attend import _keep_gradient, _masked_softmax, _seen
from tinytoken.ops.norm import softmax_of, softmax_vjp

from .catalogue import normal, plant

QKV = normal((1, 1, 2, 5), (1, 1, 3, 5), (1, 1, 3, 5))
SQUARE = normal((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2))


def kept(rng):
    """q, k, v for two heads, and a soft keep mask."""
    return (*(rng.standard_normal((1, 2, 3, 2)) for _ in range(3)), rng.uniform(0.2, 0.9, (1, 3)))


def T(x):
    return x.swapaxes(-1, -2)


def attention_of(q, k):
    return softmax_of(q @ T(k) / math.sqrt(q.shape[-1]))


@plant(ops.attention, QKV, "factor")
def attention_forgets_scale(out, q, k, v, keep):
    A = attention_of(q, k)

    def vjp(g):
        d = softmax_vjp(A, g @ T(v))
        return d @ k, T(d) @ q, T(A) @ g, None
    return vjp


@plant(ops.attention, SQUARE, "swapped")
def attention_queries_and_keys_swapped(out, q, k, v, keep):
    right = ops.attention.function(q, k, v)[1]
    return lambda g: (right(g)[1], right(g)[0], *right(g)[2:])


@plant(ops.attention, SQUARE)
def attention_scores_not_transposed(out, q, k, v, keep):
    A = attention_of(q, k)

    def vjp(g):
        d = softmax_vjp(A, g @ T(v)) / math.sqrt(2)
        return d @ k, d @ q, T(A) @ g, None
    return vjp


@plant(ops.attention, SQUARE)
def attention_values_not_transposed(out, q, k, v, keep):
    right = ops.attention.function(q, k, v)[1]
    return lambda g: (*right(g)[:2], attention_of(q, k) @ g, None)


@plant(ops.attention, QKV)
def attention_softmax_forgets_sum(out, q, k, v, keep):
    A = attention_of(q, k)

    def vjp(g):
        d = A * (g @ T(v)) / math.sqrt(5)
        return d @ k, T(d) @ q, T(A) @ g, None
    return vjp


@plant(ops.attention, QKV, "zeros", weights=True)
def attention_weights_upstream_lost(out, q, k, v, keep, weights):
    right = ops.attention.function(q, k, v)[1]
    return lambda g, g_weights: right(g) if g is not None else (None, None, None, None)


@plant(ops.attention, QKV, "raised", weights=True)
def attention_unused_output_forgotten(out, q, k, v, keep, weights):
    A = out[1]

    def vjp(g, g_weights):
        d = softmax_vjp(A, g @ T(v) + g_weights) / math.sqrt(5)
        return d @ k, T(d) @ q, T(A) @ g, None
    return vjp


# The keep mask

def masked(q, k, v, keep, g):
    """(A, gradient of the scores, gradient of K) of attention under a keep mask."""
    A, of_scores = _masked_softmax(q @ T(k) / math.sqrt(q.shape[-1]),
                                   _seen(keep, (q.shape[2], k.shape[2]), True))
    return A, *of_scores(g @ T(v))


@plant(ops.attention, kept, "zeros")
def attention_policy_gradient_lost(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], None)


@plant(ops.attention, kept)
def attention_diagonal_not_excluded(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], _keep_gradient(masked(q, k, v, keep, g)[2], False))


@plant(ops.attention, kept)
def attention_only_diagonal(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], masked(q, k, v, keep, g)[2].diagonal(axis1=2, axis2=3).sum(axis=1))


@plant(ops.attention, kept)
def attention_keep_weighs_its_own_gradient(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], keep * right(g)[3]())


@plant(ops.attention, kept, "factor")
def attention_keep_averaged_over_heads(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], right(g)[3]() / q.shape[1])


@plant(ops.attention, kept, "shape")
def attention_keep_per_head(out, q, k, v, keep):
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*right(g)[:3], masked(q, k, v, keep, g)[2].sum(axis=(2, 3)))


@plant(ops.attention, kept)
def attention_mask_after_softmax(out, q, k, v, keep):
    plain = attention_of(q, k)

    def vjp(g):
        A, _, d_seen = masked(q, k, v, keep, g)
        d = softmax_vjp(plain, (g @ T(v)) * _seen(keep, (3, 3), True)) / math.sqrt(2)
        return d @ k, T(d) @ q, T(A) @ g, _keep_gradient(d_seen, True)
    return vjp


@plant(ops.attention, kept)
def attention_mask_forgotten(out, q, k, v, keep):
    plain = ops.attention.function(q, k, v)[1]
    right = ops.attention.function(q, k, v, keep)[1]
    return lambda g: (*plain(g)[:3], right(g)[3])


# Heads

@plant(ops.merge_heads, normal((1, 2, 3, 2)), "transposed")
def merge_heads_by_reshape(out, x):
    return lambda g: g.reshape(x.shape)


@plant(ops.split_heads, normal((1, 3, 4)), "permuted", heads=2)
def split_heads_by_reshape(out, x, heads):
    return lambda g: g.reshape(x.shape)


@plant(ops.split_heads, normal((1, 2, 6)), "permuted", heads=1, parts=3)
def split_heads_values_first(out, x, heads, parts):
    right = ops.split_heads.function(x, heads=heads, parts=parts)[1]
    return lambda *gs: right(*gs[::-1])


@plant(ops.split_heads, normal((1, 2, 6)), "upstream not used", heads=1, parts=3)
def split_heads_garbage_for_unused(out, x, heads, parts):
    right = ops.split_heads.function(x, heads=heads, parts=parts)[1]
    return lambda *gs: right(*(np.ones((1, 1, 2, 2)) if g is None else g for g in gs))


# LookupViT

@plant(ops.lookup_gather, QKV, "zeros")
def gather_attention_upstream_lost(out, q, k, v):
    right = ops.lookup_gather.function(q, k, v)[1]
    return lambda g, g_A, g_logits: right(g, None,
                                          g_logits if g_logits is not None else np.zeros_like(out[2]))


@plant(ops.lookup_gather, QKV, "zeros")
def gather_logits_upstream_lost(out, q, k, v):
    right = ops.lookup_gather.function(q, k, v)[1]
    return lambda g, g_A, g_logits: right(g, g_A if g_A is not None else np.zeros_like(out[1]), None)


@plant(ops.lookup_gather, QKV)
def gather_second_use_overwrites_first(out, q, k, v):
    right = ops.lookup_gather.function(q, k, v)[1]

    def vjp(g, g_A, g_logits):
        of_v = None if g is None else T(out[1]) @ g
        entries = right(None if g_A is not None else g, g_A, g_logits)
        return *entries[:2], of_v
    return vjp


@plant(ops.lookup_gather, QKV, "factor")
def gather_scales_logits_upstream_twice(out, q, k, v):
    right = ops.lookup_gather.function(q, k, v)[1]
    return lambda g, g_A, g_logits: right(g, g_A, None if g_logits is None else g_logits / math.sqrt(5))


INFUSE = normal((1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 3))


def infuse(rng):
    """A with rows that sum to 1, logits, v."""
    logits = rng.standard_normal((1, 1, 2, 3))
    return softmax_of(logits), logits, rng.standard_normal((1, 1, 2, 2))


@plant(ops.lookup_infuse, INFUSE, "transposed", reuse="probs")
def infuse_directions_swapped(out, A, logits, v, reuse):
    return lambda g: (g @ T(v), None, T(A) @ g)


@plant(ops.lookup_infuse, infuse, "zeros", reuse="probs")
def infuse_attention_detached(out, A, logits, v, reuse):
    return lambda g: (None, None, A @ g)


@plant(ops.lookup_infuse, infuse, "offset", reuse="renorm")
def infuse_mass_held_constant(out, A, logits, v, reuse):
    mass = A.sum(axis=2, keepdims=True)
    return lambda g: (v @ T(g) / mass, None, A / mass @ g)


@plant(ops.lookup_infuse, infuse, reuse="renorm")
def infuse_values_not_renormalised(out, A, logits, v, reuse):
    right = ops.lookup_infuse.function(A, logits, v, reuse=reuse)[1]
    return lambda g: (*right(g)[:2], A @ g)


@plant(ops.lookup_infuse, infuse, reuse="resoftmax")
def infuse_softmax_over_keys(out, A, logits, v, reuse):
    R = softmax_of(logits, axis=2)
    return lambda g: (None, softmax_vjp(R, v @ T(g), axis=3), R @ g)


@plant(ops.lookup_infuse, infuse, "swapped", reuse="resoftmax")
def infuse_credits_the_wrong_input(out, A, logits, v, reuse):
    R = softmax_of(logits, axis=2)
    return lambda g: (softmax_vjp(R, v @ T(g), axis=2), None, R @ g)
