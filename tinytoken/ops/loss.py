"""Losses: means over the images of a batch, or over all elements (binary_cross_entropy, mse).

A logit of minus infinity masks a class: the loss and its gradients are those without the class. Where its
target is positive it cannot be left out, and the loss is infinite, as -log 0 is.
"""
import math
from typing import Any

import numpy as np

from ..backend import Array, array_module, vecdot
from ..errors import expect, shape_of
from ..tensor import Index, op
from .activation import decay_of
from .arithmetic import mean_of
from .norm import log_softmax_of


def where_weighted(weights: Array, x: Array) -> Array:
    """x of a raw array, and 0 where its weight is 0, so that 0 times infinity counts as 0."""
    return array_module(x).where(weights == 0, 0, x)


@op
def cross_entropy(logits, targets: Index, *, smoothing=0.0):
    """Mean over the batch of -sum_k t_k log softmax(logits)_k.

    logits (B, K); targets (B,) labels or (B, K) probabilities. smoothing s replaces t by (1 - s) t + s / K
    (Szegedy et al. 2016, section 7); K counts the classes that are not masked.
    """
    xp = array_module(logits)
    expect(logits.ndim == 2 and logits.size, "cross_entropy",
           lambda: f"{shape_of('logits', logits)}, expected (B, K)")
    expect(0 <= smoothing < 1, "cross_entropy", lambda: f"smoothing {smoothing}, expected 0 <= smoothing < 1")
    batch, classes = logits.shape
    soft = targets.shape == logits.shape
    if soft:
        wanted = targets.astype(logits.dtype, copy=False)  # integer one-hot rows, too
    else:
        check_labels("cross_entropy", targets, batch, classes)
        wanted = xp.zeros(logits.shape, logits.dtype)
        wanted[xp.arange(batch), targets] = 1
    log_probs = log_softmax_of(logits)
    if smoothing:
        there = (log_probs > -math.inf).astype(logits.dtype)
        there *= smoothing / xp.maximum(there.sum(axis=1, keepdims=True), 1)
        wanted = wanted * (1 - smoothing) + there

    def of_logits(g):
        grad = xp.exp(log_probs)
        grad *= wanted.sum(axis=1, keepdims=True)
        grad -= wanted
        grad *= g / batch
        return grad

    def of_targets(g):
        return where_weighted(log_probs > -math.inf, log_probs) * (g * ((smoothing - 1) / batch))

    def vjp(g):
        return lambda: of_logits(g), (lambda: of_targets(g)) if soft else None
    return -vecdot(wanted, where_weighted(wanted, log_probs)).sum() / batch, vjp


def check_labels(where: str, labels: Any, batch: int, classes: int) -> None:
    """InputError unless the labels are integers (batch,) from 0 to classes - 1.

    On a GPU the range is not checked: reading it would wait for the device.
    """
    expect(labels.dtype.kind in "iu" and labels.shape == (batch,), where,
           lambda: f"{shape_of('targets', labels)} {labels.dtype}, "
                   f"expected ({batch},) integer labels or ({batch}, {classes}) probabilities")
    in_range = array_module(labels) is not np or 0 <= labels.min() and labels.max() < classes
    expect(in_range, where,
           lambda: f"labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")


@op
def binary_cross_entropy(logits, targets):
    """Mean over all elements of -t log p - (1 - t) log(1 - p) with p = sigmoid(logit), from the logits.

    logits (...); targets of the same shape: labels (bool or 0 and 1) or probabilities. Where both p and t are
    0 or both are 1, the loss is 0, even at an infinite logit.
    """
    expect(logits.shape == targets.shape and logits.size, "binary_cross_entropy",
           lambda: f"{shape_of('logits', logits)}, {shape_of('targets', targets)}: "
                   "two of one shape expected, with elements")
    # as with labels, not checked on a GPU; a resized mask may leave the range by its rounding
    in_range = array_module(targets) is not np or -1e-5 <= targets.min() and targets.max() <= 1 + 1e-5
    expect(in_range, "binary_cross_entropy",
           lambda: f"targets from {targets.min()} to {targets.max()}, expected 0 to 1")
    xp, positive, decay = array_module(logits), logits > 0, decay_of(logits)
    unlikely = decay / (1 + decay)  # probability of the label that the logit speaks against
    wanted = abs(positive - targets)  # and its share of the target

    def vjp(g):
        g = g / logits.size
        return (lambda: xp.where(positive, wanted - unlikely, unlikely - wanted) * g,
                lambda: -where_weighted(abs(logits) < math.inf, logits) * g)
    return (wanted * where_weighted(wanted, abs(logits)) + xp.log1p(decay)).mean(), vjp


@op
def kl_divergence(logits, teacher_logits):
    """Mean over the batch of KL(p || q) = sum_k p_k (log p_k - log q_k).

    q is the softmax of the logits (B, K), p that of the teacher's (B, K). Infinite where the student masks a
    class that the teacher does not; the teacher's gradient is then not defined.
    """
    expect(logits.shape == teacher_logits.shape and logits.ndim == 2 and logits.size, "kl_divergence",
           lambda: f"{shape_of('logits', logits)}, {shape_of('teacher_logits', teacher_logits)}: "
                   "two of one shape (B, K) expected")
    xp, batch = array_module(logits), len(logits)
    student, teacher = log_softmax_of(logits), log_softmax_of(teacher_logits)
    probs = xp.exp(teacher)
    gap = where_weighted(probs, teacher) - where_weighted(probs, student)
    per_image = vecdot(probs, gap)[:, None]

    def vjp(g):
        return (lambda: (xp.exp(student) - probs) * (g / batch),
                lambda: probs * (gap - per_image) * (g / batch))
    return per_image.sum() / batch, vjp


@op
def mse(x, target, *, axis=None):
    """Mean of (x - target)^2 over `axis` (int, tuple, or None for all). Equal shapes."""
    expect(x.shape == target.shape, "mse",
           lambda: f"{shape_of('x', x)}, {shape_of('target', target)}: equal shapes expected")
    gap = x - target
    out, count = mean_of("mse", gap * gap, axis)

    def vjp(g):
        g = g if axis is None else array_module(g).expand_dims(g, axis)
        slope = gap * (g * 2 / count)
        return slope, lambda: -slope
    return out, vjp
