"""Convolution, windows as tokens, and batch norm of pictures (B, C, H, W), the layout of PyTorch."""
import itertools
import math
import numbers
from typing import Any

from ..backend import Array, array_module, vecdot
from ..errors import expect, shape_of
from ..tensor import op
from .dense import column_sums


@op
def conv2d(x, weight, bias=None, *, stride=1, padding=0, groups=1):
    """The cross-correlation that is called convolution: out[b, o, r, s] = bias[o] + the sum over c, i, j of
    weight[o, c, i, j] x[b, c, r stride + i - padding, s stride + j - padding], x being 0 outside.

    x (B, C, H, W); weight (O, C / groups, kh, kw), as in PyTorch; bias (O,) or None -> (B, O, H', W') with
    H' = (H + 2 padding - kh) // stride + 1, and W' likewise. stride, padding: one number, or one for each of
    the two axes. groups: the channels are cut into so many parts, and output part g reads input part g alone;
    groups = C = O is a depthwise convolution. InputError for sizes that do not fit.

    All windows are copied side by side for one product with the weights (im2col), again in the backward pass
    rather than held until then: they are kh kw times as large as x. A depthwise convolution is a sum over the
    places of its kernel instead.
    """
    check_sizes(x, weight, bias, stride, padding, groups)
    taps = Taps(x, weight.shape[2:], stride, padding)
    part = depthwise if weight.shape[:2] == (groups, 1) and groups == x.shape[1] else products
    out, of_x, of_weight = part(taps, x, weight, groups)
    if bias is not None:
        out += bias[:, None, None]

    def vjp(g):
        return (lambda: of_x(g), lambda: of_weight(g),
                lambda: column_sums(g.reshape(len(g), g.shape[1], -1).sum(axis=2)))
    return out, vjp


@conv2d.macs
def _(x, weight, bias=None, *, stride=1, padding=0, groups=1):
    height, width = output_size(x, weight[2:], stride, padding)
    return x[0] * height * width * math.prod(weight)


@op
def unfold(x, *, kernel, stride=1, padding=0):
    """Soft split (Yuan et al. 2021, arXiv 2101.11986, section 3.1): the windows that a convolution reads,
    each as a token. They may overlap; a pixel's gradient is the sum of those of its windows.

    x (B, C, H, W) -> (B, H' W', C kh kw), the windows row by row, x being 0 outside; within a token channel
    by channel, each row by row, as in PyTorch. kernel, stride, padding: one number, or one for each of the
    two axes; H' and W' as of conv2d. InputError for sizes that do not fit."""
    expect(x.ndim == 4 and x.size, "unfold", lambda: f"{shape_of('x', x)}, expected (B, C, H, W)")
    check_places("unfold", x, kernel, stride, padding)
    taps = Taps(x, both_axes(kernel), stride, padding)
    tokens = taps.windows(x).transpose(3, 4, 5, 0, 1, 2).reshape(len(x), math.prod(taps.size), -1)

    def vjp(g):
        return taps.put_back(g.reshape(-1, g.shape[2]).T)
    return tokens, vjp


def products(taps: "Taps", x: Array, weight: Array, groups: int) -> tuple[Array, Any, Any]:
    """conv2d without a bias by one product per group -> (out, gradient of x, gradient of weight), the two as
    functions of g."""
    xp, rows = array_module(x), weight.reshape(groups, len(weight) // groups, -1)
    B, O = len(x), len(weight)

    def columns():  # (groups, kh kw C / groups, B H' W')
        return taps.windows(x).reshape(groups, rows.shape[2], -1)

    def in_rows(g):  # (groups, O / groups, B H' W')
        return g.swapaxes(0, 1).reshape(groups, rows.shape[1], -1)
    out = (rows @ columns()).reshape(O, B, *taps.size).swapaxes(0, 1)
    return (xp.ascontiguousarray(out),
            lambda g: taps.put_back(rows.swapaxes(1, 2) @ in_rows(g)),
            lambda g: (in_rows(g) @ columns().swapaxes(1, 2)).reshape(weight.shape))


def depthwise(taps: "Taps", x: Array, weight: Array, groups: int) -> tuple[Array, Any, Any]:
    """The same for one filter per channel, place by place of the kernel.

    A padded picture is one line of rows, along which a place of the kernel is a shift: so each sum is over
    long stretches of memory. Between two rows it also makes values that no output has, as a stride does."""
    xp, weights = array_module(x), weight.reshape(groups, -1, 1)
    (_, _, H, W), (kh, kw) = taps.padded, taps.kernel
    length = (H - kh) * W + W - kw + 1
    shifts = [slice(i * W + j, i * W + j + length) for i in range(kh) for j in range(kw)]

    def line(pictures):
        return pictures.reshape(*pictures.shape[:2], -1)

    def spread(g):  # to where the outputs stand in the line
        out = xp.zeros((*g.shape[:2], H - kh + 1, W), g.dtype)
        out[taps.outputs] = g
        return line(out)[:, :, :length]

    def of_x(g):
        back, g = xp.zeros(taps.padded, g.dtype), spread(g)
        for i, shift in enumerate(shifts):
            line(back)[:, :, shift] += g * weights[:, i]
        return taps.inside(back)

    def of_weight(g):
        padded, g = line(taps.pad(x)), spread(g)
        sums = [vecdot(padded[:, :, shift], g).sum(axis=0) for shift in shifts]
        return xp.stack(sums, axis=1).reshape(weight.shape)
    padded, out = line(taps.pad(x)), xp.zeros((len(x), groups, H - kh + 1, W), x.dtype)
    for i, shift in enumerate(shifts):
        line(out)[:, :, :length] += padded[:, :, shift] * weights[:, i]
    return xp.ascontiguousarray(out[taps.outputs]), of_x, of_weight


class Taps:
    """Where a kernel's places read a padded picture. size: (H', W') of the output. padded: the shape of the
    padded x. Indices: picture, of x in it; places, of what each place of the kernel, row by row, reads there;
    outputs, of the outputs among those of stride 1."""

    def __init__(self, x: Array, kernel: tuple[int, int], stride: Any, padding: Any) -> None:
        self.stride, (down, across) = both_axes(stride), both_axes(padding)
        B, C, H, W = self.shape = x.shape
        self.kernel, self.size = kernel, output_size(x.shape, kernel, stride, padding)
        self.padded = (B, C, H + 2 * down, W + 2 * across)
        self.picture: Any = (..., slice(down, down + H), slice(across, across + W))
        self.outputs: Any = (..., *(slice(0, step * (count - 1) + 1, step)
                                    for step, count in zip(self.stride, self.size)))
        self.places: list[Any] = [(..., *(slice(at, at + step * (count - 1) + 1, step) for at, step, count
                                          in zip(place, self.stride, self.size)))
                                  for place in itertools.product(*map(range, self.kernel))]

    def pad(self, x: Array) -> Array:
        """x with zeros around it; x itself where there are none."""
        if self.padded == self.shape:
            return x
        out = array_module(x).zeros(self.padded, x.dtype)
        out[self.picture] = x
        return out

    def inside(self, padded: Array) -> Array:
        """The part of a padded array that is the picture."""
        return padded[self.picture]

    def windows(self, x: Array) -> Array:
        """A view (C, kh, kw, B, H', W') of the padded x: what each place of the kernel reads."""
        x = self.pad(x)
        batch, channel, down, across = x.strides
        strides = (channel, down, across, batch, down * self.stride[0], across * self.stride[1])
        shape = (self.shape[1], *self.kernel, self.shape[0], *self.size)
        return array_module(x).lib.stride_tricks.as_strided(x, shape, strides)

    def put_back(self, columns: Array) -> Array:
        """What stands in the windows, added up where it came from -> (B, C, H, W)."""
        columns = columns.reshape(self.shape[1], len(self.places), self.shape[0], *self.size)
        out = array_module(columns).zeros(self.padded, columns.dtype)
        for i, place in enumerate(self.places):
            out[place] += columns[:, i].swapaxes(0, 1)
        return self.inside(out)


def both_axes(value: Any) -> tuple[int, int]:
    """A setting for both axes as (down, across)."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def output_size(x: Any, kernel: Any, stride: Any, padding: Any) -> tuple[int, ...]:
    """(H', W') of a convolution, from the shape of x (..., H, W)."""
    return tuple((side + 2 * zeros - taps) // step + 1
                 for side, taps, step, zeros in zip(x[-2:], *map(both_axes, (kernel, stride, padding))))


def check_places(where: str, x: Array, kernel: Any, stride: Any, padding: Any) -> None:
    """InputError, in the name of op `where`, unless windows of this size and stride fit into x."""
    for name, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        expect(len(both_axes(value)) == 2 and all(_whole(n) and n >= least for n in both_axes(value)), where,
               lambda: f"{name} {value!r}, expected a whole number from {least}, or two")
    expect(all(n >= 1 for n in output_size(x.shape, kernel, stride, padding)), where,
           lambda: f"{shape_of('x', x)}, kernel {kernel}, padding {padding}: the kernel does not fit into "
                   "the picture")


def check_sizes(x: Array, weight: Array, bias: Array | None, stride: Any, padding: Any, groups: int) -> None:
    """InputError for what conv2d cannot take."""
    expect(_whole(groups) and groups >= 1, "conv2d",
           lambda: f"groups {groups!r}, expected a whole number from 1")
    shapes = lambda: f"{shape_of('x', x)}, {shape_of('weight', weight)}"
    expect(x.ndim == 4 and weight.ndim == 4, "conv2d",
           lambda: f"{shapes()}, expected (B, C, H, W) and (O, C / groups, kh, kw)")
    expect(x.shape[1] == groups * weight.shape[1] and len(weight) % groups == 0, "conv2d",
           lambda: f"{shapes()}, {groups} groups: the weight's second size must be C / groups, and groups "
                   f"must divide its first")
    expect(weight.size and x.size, "conv2d", lambda: f"{shapes()}, expected no size of 0")
    check_places("conv2d", x, weight.shape[2:], stride, padding)
    expect(bias is None or bias.shape == weight.shape[:1], "conv2d",
           lambda: f"{shape_of('bias', bias)} for {shape_of('weight', weight)}: expected ({len(weight)},)")


def _whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@op
def batch_norm(x, weight, bias, *, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias with the mean and variance of each channel over the batch
    and all places (Ioffe & Szegedy 2015, algorithm 1) -> (out, mean, var).

    x (B, C, H, W), weight and bias (C,) -> (B, C, H, W), (C,), (C,). var is the mean square of the distances
    from the mean: n / (n - 1) times it is the estimate without bias, n = B H W."""
    expect(x.ndim == 4 and x.size, "batch_norm", lambda: f"{shape_of('x', x)}, expected (B, C, H, W)")
    for name, p in (("weight", weight), ("bias", bias)):
        expect(p.shape == x.shape[1:2], "batch_norm",
               lambda: f"{shape_of(name, p)} for {shape_of('x', x)}: expected ({x.shape[1]},)")
    xp, rows = array_module(x), x.reshape(*x.shape[:2], -1)
    count = len(x) * rows.shape[2]
    average = xp.full(rows.shape[2], 1 / count, x.dtype)
    mean = (rows @ average).sum(axis=0)
    normed = rows - mean[:, None]
    var = vecdot(normed, normed).sum(axis=0) / count
    scale = 1 / xp.sqrt(var + eps)
    normed *= scale[:, None]
    out = normed * weight[:, None]
    out += bias[:, None]

    def vjp(g, of_mean, of_var):
        g = xp.zeros_like(normed) if g is None else g.reshape(rows.shape)
        along, level = vecdot(g, normed).sum(axis=0), (g @ average).sum(axis=0)

        def of_x():
            factor = weight * scale
            slope, shift = factor * along / count, factor * level
            slope = slope if of_var is None else slope - 2 / count * of_var / scale
            shift = shift if of_mean is None else shift - of_mean / count
            u = g * factor[:, None]
            u -= normed * slope[:, None]
            u -= shift[:, None]
            return u.reshape(x.shape)
        return of_x, along, lambda: level * count
    return (out.reshape(x.shape), mean, var), vjp
