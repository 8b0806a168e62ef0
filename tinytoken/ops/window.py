"""Attention in windows of a map (Liu et al. 2021, arXiv 2103.14030, "Swin Transformer"): the map cut into
windows, each attending by itself, with a learned bias for each distance between two tokens.

A map is (B, N, C), its N = H W tokens row by row; `grid` is (H, W), `window` (h, w). With a `shift` (rows,
columns) the map is first moved up and left, in a circle: so windows of one block lie across the borders of
those of the block before. A map that the window does not divide gets zeros below and at the right, after the
shift, as in timm; their tokens are seen like others.
"""
import functools
import math
from typing import Any

import numpy as np

from ..backend import Array, array_module, scatter_add
from ..errors import expect, shape_of
from ..tensor import op
from .norm import softmax_of, softmax_vjp

Pair = tuple[int, int]


def windows_in(grid: Pair, window: Pair) -> Pair:
    """How many windows there are down and across, the last ones filled up."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def _cut(x, grid, window, shift):
    """A map as windows, row by row: (B, H W, C) -> (B n, h w, C)."""
    xp, (down, across), (h, w) = array_module(x), windows_in(grid, window), window
    x = x.reshape(len(x), *grid, -1)
    x = xp.roll(x, (-shift[0], -shift[1]), axis=(1, 2)) if any(shift) else x
    rest = (down * h - grid[0], across * w - grid[1])
    x = xp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0))) if any(rest) else x
    x = x.reshape(len(x), down, h, across, w, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h * w, x.shape[-1])


def _join(x, grid, window, shift):
    """The reverse, without what was filled up: (B n, h w, C) -> (B, H W, C)."""
    (down, across), (h, w), C = windows_in(grid, window), window, x.shape[-1]
    x = x.reshape(-1, down, across, h, w, C).transpose(0, 1, 3, 2, 4, 5).reshape(-1, down * h, across * w, C)
    x = x[:, :grid[0], :grid[1]]
    x = array_module(x).roll(x, shift, axis=(1, 2)) if any(shift) else x
    return x.reshape(-1, grid[0] * grid[1], C)


@op
def cut_windows(x, *, grid, window, shift=(0, 0)):
    """A map x (B, H W, C) as its windows (B n, h w, C): all n of a picture, row by row, then the next's."""
    expect(x.ndim == 3 and x.shape[1] == grid[0] * grid[1], "cut_windows",
           lambda: f"{shape_of('x', x)}, expected (B, {grid[0] * grid[1]}, C) for the grid {tuple(grid)}")
    _check("cut_windows", grid, window, shift)
    return _cut(x, grid, window, shift), lambda g: _join(g, grid, window, shift)


@op
def join_windows(x, *, grid, window, shift=(0, 0)):
    """Windows x (B n, h w, C) put together to the map (B, H W, C) that `cut_windows` has cut."""
    _check("join_windows", grid, window, shift)
    count = math.prod(windows_in(grid, window))
    expect(x.ndim == 3 and len(x) % count == 0 and x.shape[1] == window[0] * window[1], "join_windows",
           lambda: f"{shape_of('x', x)}, expected (B n, {window[0] * window[1]}, C) with n = {count} windows "
                   f"{tuple(window)} of the grid {tuple(grid)}")
    return _join(x, grid, window, shift), lambda g: _cut(g, grid, window, shift)


@op
def cut_overlapping(x, *, grid, window, count):
    """A map x (B, H W, C) as count = (down, across) windows (h, w), spread evenly: (B n, h w, C), all n of a
    picture, row by row, then the next's. They overlap, or leave rows out, as it comes: window i down of c
    begins in row i (H - h) // (c - 1). Gradients of a token that is in several add up."""
    _check("cut_overlapping", grid, window, (0, 0))
    expect(x.ndim == 3 and x.shape[1] == grid[0] * grid[1] and all(n >= 1 for n in count), "cut_overlapping",
           lambda: f"{shape_of('x', x)}, {tuple(count)} windows: expected (B, {grid[0] * grid[1]}, C) for "
                   f"the grid {tuple(grid)}, and at least 1 x 1 windows")
    (B, N, C), xp = x.shape, array_module(x)
    down, across = ([slice(start := i * (side - w) // max(n - 1, 1), start + w) for i in range(n)]
                    for side, w, n in zip(grid, window, count))
    places: list[Any] = [(slice(None), rows, columns) for rows in down for columns in across]
    picture = x.reshape(B, *grid, C)

    def vjp(g):
        back, g = xp.zeros((B, *grid, C), g.dtype), g.reshape(B, len(places), *window, C)
        for i, place in enumerate(places):
            back[place] += g[:, i]
        return back.reshape(B, N, C)
    return xp.stack([picture[place] for place in places], axis=1).reshape(-1, math.prod(window), C), vjp


@op
def max_in_windows(x, *, window, parts):
    """Each window of x (B, h w, C) cut into parts = (a, b), and the largest value of each channel in each
    part -> (B, a b, C): "adaptive max pooling". Part i of a has the rows from i h // a up to (i + 1) h / a,
    rounded up: where a does not divide h, neighbours share a row. Equal values share the gradient."""
    (h, w), xp = window, array_module(x)
    expect(x.ndim == 3 and x.shape[1] == h * w and 1 <= parts[0] <= h and 1 <= parts[1] <= w,
           "max_in_windows",
           lambda: f"{shape_of('x', x)}, parts {tuple(parts)}: expected (B, {h * w}, C), and from 1 x 1 to "
                   f"{h} x {w} parts for the window {tuple(window)}")
    down, across = ([slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
                    for side, n in zip(window, parts))
    places: list[Any] = [(slice(None), rows, columns) for rows in down for columns in across]
    picture = x.reshape(len(x), h, w, -1)
    out = xp.stack([picture[place].max(axis=(1, 2)) for place in places], axis=1)

    def vjp(g):
        back = xp.zeros(picture.shape, g.dtype)
        for i, place in enumerate(places):
            winners = (picture[place] == out[:, i, None, None]).astype(g.dtype)
            back[place] += winners * (g[:, i] / winners.sum(axis=(1, 2)))[:, None, None]
        return back.reshape(x.shape)
    return out, vjp


@op
def relative_bias(table, *, window):
    """The bias of each pair of tokens of a window by the distance between them (section 3.2, "relative
    position bias").

    table ((2 h - 1)(2 w - 1), H): a row for each distance, (down + h - 1)(2 w - 1) + across + w - 1, query
    less key -> (H, T, T) with T = h w."""
    h, w = window
    expect(table.ndim == 2 and len(table) == (2 * h - 1) * (2 * w - 1), "relative_bias",
           lambda: f"{shape_of('table', table)}, expected ({(2 * h - 1) * (2 * w - 1)}, heads) for windows "
                   f"{tuple(window)}")
    xp, T, shape = array_module(table), h * w, table.shape
    rows = _distances(xp, tuple(window))

    def vjp(g):
        out = xp.zeros(shape, g.dtype)
        scatter_add(out, rows, xp.ascontiguousarray(g.reshape(len(g), -1).T))
        return out
    return table[rows].T.reshape(shape[1], T, T), vjp


@functools.lru_cache(maxsize=64)
def _distances(xp, window):
    """(T T,) int64: for each query and key of a window, the row of their distance in the table."""
    places = np.stack([axis.reshape(-1) for axis in np.mgrid[:window[0], :window[1]]])
    down, across = places[:, :, None] - places[:, None] + np.array(window).reshape(2, 1, 1) - 1
    return xp.asarray((down * (2 * window[1] - 1) + across).reshape(-1))


@functools.lru_cache(maxsize=64)
def seen_in_windows(xp: Any, grid: Pair, window: Pair, shift: Pair) -> Array:
    """(n, 1, T, T) bool: which tokens of a window see each other where the map has been shifted: those that
    were neighbours before it was moved in a circle (section 3.2, figure 4).

    As in timm, the seam is `shift` before the end of the map with what was filled up."""
    sides = [count * side for count, side in zip(windows_in(grid, window), window)]
    down, across = (np.arange(side) >= side - by for side, by in zip(sides, shift))
    part = (2 * down[:, None] + across).reshape(1, -1, 1)
    part = _cut(part, tuple(sides), window, (0, 0))
    return xp.asarray((part == part.swapaxes(1, 2))[:, None])


@op
def window_attention(q, k, v, bias, *, grid, window, shift=(0, 0)):
    """softmax(q k^T / sqrt d + bias) v in each window. q, k, v (B n, H, T, d) from windows as `cut_windows`
    makes them, bias (H, T, T) -> (B n, H, T, d). With a shift, tokens see those alone that were on their side
    of the picture (`seen_in_windows`); the official code adds -100 to the others' scores, which is the same
    to 1e-40 unless scores differ by tens."""
    count, T = math.prod(windows_in(grid, window)), window[0] * window[1]
    expect(q.ndim == 4 and q.shape == k.shape == v.shape and q.shape[2] == T and len(q) % count == 0
           and bias.shape == (q.shape[1], T, T), "window_attention",
           lambda: f"{shape_of('q', q)}, {shape_of('k', k)}, {shape_of('v', v)}, {shape_of('bias', bias)}: "
                   f"expected three (B n, H, {T}, d) with n = {count}, and (H, {T}, {T})")
    _check("window_attention", grid, window, shift)
    xp, scale = array_module(q), 1 / math.sqrt(q.shape[-1])
    scores = (q * scale) @ k.swapaxes(-1, -2)
    scores += bias
    if any(shift):
        seen = seen_in_windows(xp, tuple(grid), tuple(window), tuple(shift))
        scores = xp.where(seen, scores.reshape(-1, count, *bias.shape), -math.inf).reshape(scores.shape)
    A = softmax_of(scores)

    def vjp(g):
        d_scores = softmax_vjp(A, g @ v.swapaxes(-1, -2))
        scaled = d_scores * scale
        return (lambda: scaled @ k, lambda: scaled.swapaxes(-1, -2) @ q, lambda: A.swapaxes(-1, -2) @ g,
                lambda: d_scores.sum(axis=0))
    return A @ v, vjp


@window_attention.macs
def _(q, k, v, bias):
    return 2 * math.prod(q) * k[2]


def _check(name, grid, window, shift):
    """InputError unless windows fit into the grid, and the shift into them."""
    sizes = [value for pair in (grid, window, shift) for value in pair]
    expect(all(isinstance(n, (int, np.integer)) for n in sizes)
           and all(1 <= w <= side and 0 <= by < w for side, w, by in zip(grid, window, shift)), name,
           lambda: f"windows {tuple(window)}, shift {tuple(shift)}, grid {tuple(grid)}: expected windows no "
                   f"larger than the grid, shifts smaller than the window")
