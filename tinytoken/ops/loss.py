"""Losses: means over the images of a batch."""
from typing import Any

import numpy as np

from ..backend import array_module
from ..errors import expect, shape_of
from ..tensor import Index, op
from .norm import log_softmax_of


@op
def cross_entropy(logits, targets: Index, *, smoothing=0.0):
    """Mean over the batch of -sum_k t_k log softmax(logits)_k.

    logits (B, K); targets (B,) labels or (B, K) probabilities. smoothing s replaces t by (1 - s) t + s / K
    (Szegedy et al. 2016, section 7).
    """
    xp = array_module(logits)
    expect(logits.ndim == 2 and logits.size, "cross_entropy",
           lambda: f"{shape_of('logits', logits)}, expected (B, K)")
    expect(0 <= smoothing < 1, "cross_entropy", lambda: f"smoothing {smoothing}, expected 0 <= smoothing < 1")
    batch, classes = logits.shape
    soft = targets.shape == logits.shape
    if soft:
        probabilities = targets.astype(logits.dtype, copy=False)  # integer one-hot rows, too
        wanted = probabilities * (1 - smoothing) + smoothing / classes
    else:
        check_labels("cross_entropy", targets, batch, classes)
        wanted = xp.full(logits.shape, smoothing / classes, logits.dtype)
        wanted[xp.arange(batch), targets] += 1 - smoothing
    log_probs = log_softmax_of(logits)

    def vjp(g):
        return (lambda: (xp.exp(log_probs) * wanted.sum(axis=1, keepdims=True) - wanted) * (g / batch),
                (lambda: log_probs * (g * ((smoothing - 1) / batch))) if soft else None)
    return -(wanted * log_probs).sum() / batch, vjp


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
def kl_divergence(logits, teacher_logits):
    """Mean over the batch of KL(p || q) = sum_k p_k (log p_k - log q_k).

    q is the softmax of the logits (B, K), p that of the teacher's (B, K).
    """
    expect(logits.shape == teacher_logits.shape and logits.ndim == 2, "kl_divergence",
           lambda: f"{shape_of('logits', logits)}, {shape_of('teacher_logits', teacher_logits)}: "
                   "two of one shape (B, K) expected")
    xp, batch = array_module(logits), len(logits)
    student, teacher = log_softmax_of(logits), log_softmax_of(teacher_logits)
    probs, gap = xp.exp(teacher), teacher - student
    per_image = (probs * gap).sum(axis=1, keepdims=True)

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
    out = (gap * gap).mean(axis=axis)

    def vjp(g):
        g = g if axis is None else array_module(g).expand_dims(g, axis)
        slope = gap * (g * (2 * out.size / x.size))
        return slope, lambda: -slope
    return out, vjp
