"""The loops, compiled by Numba: over flat arrays and over rows (R, D), contiguous and of one float dtype.
They check nothing: registered.py does, and calls them. And they take nothing from other files of this
package: Numba would not see it change, and go on with what it has kept on disk.

Such a loop takes as long as the memory it moves, so each reads its inputs once and writes its outputs once.
Numba makes vector instructions of a plain loop as long as all its numbers have one width. A constant 0.5 is a
float64 and would widen a loop of float32: constants are made by `of`, the arrays' own type.
"""
import math
import sys

import numpy as np
from numba import njit, types
from numba.core.event import Listener, register, unregister
from numba.extending import overload

# What the compiler may do: add up sums in another order, round a * b + c once. NaN and infinities stay.
ALLOWED = {"reassoc", "nsz", "contract"}


def compiled(function, allowed=ALLOWED):
    """Decorator: compiled at the first call with a dtype, run without the interpreter's lock, kept on
    disk."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": allowed}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that could be written
        return njit(**options)(function)


# exp and Phi of one number, by dtype: for float64 as exact as Python's math, for float32 without branches, so
# that the loops around them become vector instructions

def exp(x):
    """e^x."""


def normal_cdf(x, q):
    """Phi(x), as backend.normal_cdf computes it; q is its polynomial."""


def _exp64(x):
    return math.exp(x)


def _exp32(x):
    """e^x = 2^n e^r with n = round(x / log 2). |r| is at most 0.35, where the series of e^r to r^7 is right
    to 1e-7. A float32 has n + 127 in its bits from 23 on if it is 2^n. Results below 1.2e-38 are 0, those
    above 2.3e38 infinite."""
    f = np.float32
    shifted = x * f(1 / math.log(2)) + f(1.5 * 2 ** 23)  # so large that its last bit is a one: rounded to n
    power = np.int32(f(shifted).view(np.int32) + 127 << 23).view(f)
    n = shifted - f(1.5 * 2 ** 23)
    r = x - n * f(0.693359375) + n * f(2.12194440e-4)  # log 2 in two parts; n times the first is exact
    series = f(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * r + f(c)
    out = (series * r * r + r + f(1)) * power
    out = f(0) if x < f(-87.33) else out
    return f(math.inf) if x > f(88.37) else out


def _cdf64(x, q):
    return 0.5 * math.erfc(x * -math.sqrt(0.5))


def _cdf32(x, q):
    """1 / (1 + exp(x q(x^2)))."""
    f = np.float32
    square, total = x * x, q[4]
    for i in range(3, -1, -1):
        total = total * square + q[i]
    return f(1) / (f(1) + exp(x * total))


# In another order `shifted - 1.5 * 2^23` would be x, and no whole number.
@overload(exp, jit_options={"fastmath": {"contract"}})
def _(x):
    return _exp32 if x == types.float32 else _exp64


@overload(normal_cdf, jit_options={"fastmath": {"contract"}})
def _(x, q):
    return _cdf32 if x == types.float32 else _cdf64


# GELU

@compiled
def gelu(x, q, out):
    """out = x Phi(x). Flat."""
    for i in range(x.size):
        out[i] = x[i] * normal_cdf(x[i], q)


@compiled
def gelu_vjp(x, g, q, dx):
    """dx = g (Phi(x) + x Phi'(x)). Phi is computed again: to keep it would cost more time than that."""
    of = x.dtype.type
    for i in range(x.size):
        density = exp(x[i] * x[i] * of(-0.5) - of(0.5 * math.log(2 * math.pi)))
        dx[i] = g[i] * (normal_cdf(x[i], q) + x[i] * density)


# The same of rows to which a bias is added first, in one pass instead of two. The product before them leaves
# the sum out.

@compiled
def bias_gelu(x, bias, q, out):
    """out = z Phi(z) of z = x + bias. x, out (R, D), bias (D,)."""
    rows, width = x.shape
    for i in range(rows):
        for j in range(width):
            z = x[i, j] + bias[j]
            out[i, j] = z * normal_cdf(z, q)


@compiled
def bias_gelu_vjp(x, bias, q, g):
    """g (R, D), the gradient of bias_gelu's `out`, <- that of its x."""
    of, (rows, width) = x.dtype.type, x.shape
    for i in range(rows):
        for j in range(width):
            z = x[i, j] + bias[j]
            density = exp(z * z * of(-0.5) - of(0.5 * math.log(2 * math.pi)))
            g[i, j] *= normal_cdf(z, q) + z * density


@compiled
def add_bias_and_rows(out, bias, rows):
    """out += bias + rows, the end of a residual branch. out, rows (R, D), bias (D,)."""
    for i in range(len(out)):
        for j in range(out.shape[1]):
            out[i, j] += bias[j] + rows[i, j]


# Layer norm

@compiled
def layer_norm(x, weight, bias, eps, out, mean, scale):
    """Rows of x -> out, and of each row its mean and 1 / sqrt(var + eps)."""
    of, (rows, width) = x.dtype.type, x.shape
    for i in range(rows):
        total, squares = of(0), of(0)
        for j in range(width):
            total += x[i, j]
        average = total / of(width)
        for j in range(width):
            distance = x[i, j] - average
            squares += distance * distance
        factor = of(1) / math.sqrt(squares / of(width) + eps)
        for j in range(width):
            out[i, j] = (x[i, j] - average) * factor * weight[j] + bias[j]
        mean[i], scale[i] = average, factor


@compiled
def layer_norm_vjp(x, weight, mean, scale, g, dx, dweight, dbias):
    """dx (R, D) of rows. dweight, dbias (P, D): zeros, to which sums over so many parts of the rows are
    added; one long sum of float32 loses digits."""
    of, (rows, width) = x.dtype.type, x.shape
    for i in range(rows):
        average, factor, part = mean[i], scale[i], i * len(dweight) // rows
        along, level = of(0), of(0)
        for j in range(width):
            u = g[i, j] * weight[j]
            along += u * ((x[i, j] - average) * factor)
            level += u
        along, level = along / of(width), level / of(width)
        for j in range(width):
            normed = (x[i, j] - average) * factor
            dx[i, j] = (g[i, j] * weight[j] - level - normed * along) * factor
            dweight[part, j] += g[i, j] * normed
            dbias[part, j] += g[i, j]


# Softmax of rows. Scores and their gradients are changed in place: attention made both arrays, and as two
# arguments that are one array they would be taken for two that overlap, and run without vector instructions.

@njit(nogil=True, error_model="numpy", fastmath=ALLOWED | {"nnan"})
def highest(row):
    """The largest value, at least the lowest finite number. A NaN may be passed over: its own exp brings it
    back."""
    largest = row.dtype.type(np.finfo(row.dtype).min)
    for j in range(row.size):
        largest = max(largest, row[j])
    return largest


@njit(nogil=True, error_model="numpy", fastmath=ALLOWED | {"nnan"})
def highest_seen(row, seen):
    """That of the values whose `seen` is above 0."""
    largest = row.dtype.type(np.finfo(row.dtype).min)
    for j in range(row.size):
        largest = max(largest, row[j] if seen[j] > 0 else largest)
    return largest


@compiled
def softmax(x, scale):
    """Rows x <- softmax(scale x)."""
    of, (rows, width) = x.dtype.type, x.shape
    for i in range(rows):
        row, total, most = x[i], of(0), highest(x[i])
        for j in range(width):
            row[j] = exp((row[j] - most) * scale)
            total += row[j]
        share = of(1) if total < of(1) else of(1) / total  # less than 1 is only the sum of nothing, 0
        for j in range(width):
            row[j] *= share


@compiled
def softmax_vjp(out, u, scale):
    """Rows u, the gradient of a softmax `out`, <- that of its x: scale out (u - sum(u out))."""
    of, (rows, width) = u.dtype.type, u.shape
    for i in range(rows):
        row, weights, along = u[i], out[i], of(0)
        for j in range(width):
            along += row[j] * weights[j]
        for j in range(width):
            row[j] = (row[j] - along) * weights[j] * scale


@compiled
def masked_softmax(x, keep, itself, scale, out):
    """As ops.attend._masked_softmax, of scores x (B, H, T, K) under keep (B, K). out: the weights. x <- the
    slopes toward keep. itself: query i sees key i in any case."""
    of, (batch, heads, queries, keys) = x.dtype.type, x.shape
    least = of(np.finfo(x.dtype).tiny * 1e8)
    for b in range(batch):
        seen = keep[b].copy()
        for n in range(heads * queries):
            h, i = n // queries, n % queries
            row, to, total = x[b, h, i], out[b, h, i], of(0)
            if itself:
                seen[i] = of(1)
            most = highest_seen(row, seen)
            for j in range(keys):
                row[j] = exp(((most if row[j] > most else row[j]) - most) * scale)
                to[j] = row[j] * seen[j]
                total += to[j]
            total = of(1) if total == of(0) else total
            slope = of(1) / (least if total < least else total)
            for j in range(keys):
                to[j] /= total  # which may be too small for a reciprocal
                row[j] *= slope
            if itself:
                seen[i] = keep[b, i]


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def centred(value, mean, rest):
    """value - mean - rest, in this order: value - mean may be so small that rest matters."""
    return (value - mean) - rest


@compiled
def masked_softmax_vjp(out, slope, u, itself, scale, dkeep):
    """u (B, H, T, K), the gradient of the weights `out`, <- that of the scores. dkeep (B, K): zeros, to which
    that of keep is added."""
    of, (batch, heads, queries, keys) = u.dtype.type, u.shape
    for n in range(batch * heads * queries):
        b, h, i = n // (heads * queries), n // queries % heads, n % queries
        row, weights, slopes, to, along = u[b, h, i], out[b, h, i], slope[b, h, i], dkeep[b], of(0)
        before, rest = to[i] if itself else of(0), of(0)
        for j in range(keys):
            along += row[j] * weights[j]
        for j in range(keys):  # what rounding left of the mean
            rest += centred(row[j], along, of(0)) * weights[j]
        for j in range(keys):
            distance = centred(row[j], along, rest)
            to[j] += distance * slopes[j]
            row[j] = distance * weights[j] * scale
        if itself:
            to[i] = before  # there it is 1, whatever keep is


@compiled
def softmax_columns(x):
    """x (B, M, N) <- softmax over M."""
    of, (batch, rows, width) = x.dtype.type, x.shape
    for b in range(batch):
        most, total = np.full(width, np.finfo(x.dtype).min, x.dtype), np.zeros(width, x.dtype)
        for i in range(rows):
            for j in range(width):
                most[j] = x[b, i, j] if x[b, i, j] > most[j] else most[j]
        for i in range(rows):
            for j in range(width):
                x[b, i, j] = exp(x[b, i, j] - most[j])
                total[j] += x[b, i, j]
        for j in range(width):
            total[j] = of(1) if total[j] < of(1) else of(1) / total[j]
        for i in range(rows):
            for j in range(width):
                x[b, i, j] *= total[j]


@compiled
def softmax_columns_vjp(out, u):
    """u (B, M, N), the gradient of a softmax `out` over M, <- that of its x."""
    batch, rows, width = u.shape
    for b in range(batch):
        along = np.zeros(width, u.dtype)
        for i in range(rows):
            for j in range(width):
                along[j] += u[b, i, j] * out[b, i, j]
        for i in range(rows):
            for j in range(width):
                u[b, i, j] = (u[b, i, j] - along[j]) * out[b, i, j]


# Depthwise convolution of maps (B, H, W, C): channels lie side by side, so the innermost loops run over them.
# `across` is a tuple of as many numbers as the kernel has columns: its length is known when it is compiled,
# and the loop over it is written out.

@compiled
def depthwise(x, weight, bias, across, out):
    """x (B, H + kh - 1, W + kw - 1, C), weight (kh, kw, C), bias (C,) -> out (B, H, W, C)."""
    batch, height, width, channels = out.shape
    for n in range(batch * height):
        b, y = n // height, n % height
        for z in range(width):
            to = out[b, y, z]
            to[:] = bias
            for i in range(len(weight)):
                for c in range(channels):
                    total = to[c]
                    for j in range(len(across)):
                        total += weight[i, j, c] * x[b, y + i, z + j, c]
                    to[c] = total


@compiled
def depthwise_weight(x, g, across, dweight):
    """dweight (P, kh, kw, C): zeros, to which sums over so many parts of the images are added; g is the
    gradient of `out`."""
    (batch, height, width, channels), (parts, rows, _, _) = g.shape, dweight.shape
    for n in range(batch * height):
        b, y = n // height, n % height
        for i in range(rows):
            line, up, to = x[b, y + i], g[b, y], dweight[b * parts // batch, i]
            for z in range(width):
                for c in range(channels):
                    for j in range(len(across)):
                        to[j, c] += up[z, c] * line[z + j, c]


# AdamW

@compiled
def adamw(w, g, m, v, clip, betas, eps, rate, correction, shrink):
    """One step on flat arrays (train.optim.AdamW). g <- clip g. rate: the learning rate by the first
    moment's correction; correction: the second's; shrink: what the weight decay leaves of w."""
    of, (b1, b2) = w.dtype.type, betas
    for i in range(w.size):
        g[i] *= clip
        m[i] += (g[i] - m[i]) * (of(1) - b1)
        v[i] += (g[i] * g[i] - v[i]) * (of(1) - b2)
        w[i] = w[i] * shrink - m[i] / (math.sqrt(v[i] / correction) + eps) * rate


@compiled
def follow(mean, w, share):
    """mean moves by `share` of the way to w. Flat."""
    for i in range(w.size):
        mean[i] += (w[i] - mean[i]) * share


class _Announcement(Listener):
    """A line, once, where something is compiled, which takes seconds."""

    def on_start(self, event):
        if event.data["dispatcher"].py_func.__module__ == __name__:
            unregister("numba:compile", self)
            print("tinytoken: compiling ops for this CPU; they are kept for the next time", file=sys.stderr)

    def on_end(self, event):
        pass


register("numba:compile", _Announcement())
