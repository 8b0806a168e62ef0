"""Attention in windows against loops over positions."""
import numpy as np
import pytest

from small import refuses, same, softmax
from tinytoken import ops

CASES = [((4, 6), (2, 3), (0, 0)), ((4, 6), (2, 3), (1, 2)), ((4, 6), (4, 2), (0, 1)), ((5, 7), (2, 3), (1, 1)),
         ((3, 3), (3, 3), (0, 0))]
each_case = pytest.mark.parametrize("grid, window, shift", CASES, ids=str)


def places(grid, window, shift):
    """For each window, row by row, the places (r, c) of the map that it holds, row by row; None where the map
    was filled up."""
    (H, W), (h, w) = grid, window
    return [[((top + i + shift[0]) % H, (left + j + shift[1]) % W) if top + i < H and left + j < W else None
             for i in range(h) for j in range(w)] for top in range(0, H, h) for left in range(0, W, w)]


def unequal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@each_case
def test_windows_hold_the_right_positions_and_come_back(grid, window, shift, xp):
    x, cut = unequal(2, grid[0] * grid[1], 3), dict(grid=grid, window=window, shift=shift)
    out = ops.cut_windows(xp.asarray(x), **cut)
    table = places(grid, window, shift)
    assert out.shape == (2 * len(table), window[0] * window[1], 3)
    for b in range(2):
        for n, held in enumerate(table):
            for t, place in enumerate(held):
                expected = 0 if place is None else x[b, place[0] * grid[1] + place[1]]
                assert (out.numpy()[b * len(table) + n, t] == expected).all()
    assert np.array_equal(ops.join_windows(out, **cut).numpy(), x)


@pytest.mark.parametrize("grid, window, count", [((14, 14), (10, 10), (2, 2)), ((5, 9), (3, 2), (2, 4)),
                                                 ((3, 4), (2, 4), (1, 1)), ((7, 3), (2, 1), (3, 3))], ids=str)
def test_windows_that_overlap_are_spread_evenly(grid, window, count, xp):
    x = unequal(2, grid[0] * grid[1], 3)
    out = ops.cut_overlapping(xp.asarray(x), grid=grid, window=window, count=count).numpy()
    starts = [[i * (side - w) // max(n - 1, 1) for i in range(n)] for side, w, n in zip(grid, window, count)]
    assert grid != (14, 14) or starts == [[0, 4], [0, 4]]  # a stride of 4, as in the official STViT-R
    picture, out = x.reshape(2, *grid, 3), out.reshape(2, *count, *window, 3)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            assert np.array_equal(out[:, i, j], picture[:, top:top + window[0], left:left + window[1]])


@pytest.mark.parametrize("window, parts", [((7, 7), (3, 3)), ((5, 4), (3, 2)), ((4, 6), (4, 1))], ids=str)
def test_the_largest_values_of_a_windows_parts(window, parts, xp):
    x = unequal(3, window[0] * window[1], 2)
    out = ops.max_in_windows(xp.asarray(x), window=window, parts=parts).numpy().reshape(3, *parts, 2)
    rows, columns = ([range(int(i * side / n), int(np.ceil((i + 1) * side / n))) for i in range(n)]
                     for side, n in zip(window, parts))
    assert window != (7, 7) or [(r[0], r[-1]) for r in rows] == [(0, 2), (2, 4), (4, 6)]
    for i, j in np.ndindex(*parts):
        cells = [x[:, r * window[1] + c] for r in rows[i] for c in columns[j]]
        assert np.array_equal(out[:, i, j], np.max(cells, axis=0))
    whole = ops.max_in_windows(np.ones((1, 4, 1)), window=(2, 2), parts=(1, 1))
    assert whole.shape == (1, 1, 1)


def test_relative_bias_is_by_distance(xp):
    table = unequal(15, 2)
    bias = ops.relative_bias(xp.asarray(table), window=(2, 3)).numpy()
    cells = list(np.ndindex(2, 3))
    for q, (r, c) in enumerate(cells):
        for k, (s, d) in enumerate(cells):
            assert np.array_equal(bias[:, q, k], table[(r - s + 1) * 5 + (c - d + 2)])


@each_case
def test_attention_sees_its_side_of_the_seam(grid, window, shift, xp):
    """Two positions see each other if they are in one window and have not come together by the circle."""
    T, table = window[0] * window[1], places(grid, window, shift)
    q, k, v = (unequal(2 * len(table), 2, T, 4, seed=i) for i in range(3))
    bias = unequal(2, T, T, seed=3)
    arrays = [xp.asarray(a) for a in (q, k, v, bias)]
    out = ops.window_attention(*arrays, grid=grid, window=window, shift=shift).numpy()
    sides = [-(-side // one) * one for side, one in zip(grid, window)]  # with what is filled up
    corner = [(top, left) for top in range(0, grid[0], window[0]) for left in range(0, grid[1], window[1])]
    for n in range(2 * len(table)):
        top, left = corner[n % len(table)]
        part = [(top + i >= sides[0] - shift[0], left + j >= sides[1] - shift[1])
                for i, j in np.ndindex(*window)]
        seen = np.array([[a == b for b in part] for a in part])
        for h in range(2):
            scores = np.where(seen, q[n, h] @ k[n, h].T / 2 + bias[h], -np.inf)
            same(out[n, h], softmax(scores) @ v[n, h])
    if any(shift):
        others = ops.window_attention(*arrays, grid=grid, window=window).numpy()
        assert np.abs(out - others).max() > 0.1
        far = ops.window_attention(*(arrays[:3]), 60 * arrays[3], grid=grid, window=window, shift=shift)
        assert np.isfinite(far.numpy()).all()


@pytest.mark.parametrize("call, text", [
    (lambda: ops.cut_overlapping(unequal(2, 5, 3), grid=(2, 3), window=(2, 3), count=(1, 1)),
     "cut_overlapping: x (2, 5, 3), (1, 1) windows: expected (B, 6, C) for the grid (2, 3), and at least 1 x 1 "
     "windows"),
    (lambda: ops.cut_overlapping(unequal(2, 6, 3), grid=(2, 3), window=(2, 3), count=(0, 1)),
     "cut_overlapping: x (2, 6, 3), (0, 1) windows: expected (B, 6, C) for the grid (2, 3), and at least 1 x 1 "
     "windows"),
    (lambda: ops.cut_overlapping(unequal(2, 6, 3), grid=(2, 3), window=(3, 3), count=(1, 1)),
     "cut_overlapping: windows (3, 3), shift (0, 0), grid (2, 3): expected windows no larger than the grid, "
     "shifts smaller than the window"),
    (lambda: ops.max_in_windows(unequal(2, 6, 3), window=(2, 3), parts=(3, 3)),
     "max_in_windows: x (2, 6, 3), parts (3, 3): expected (B, 6, C), and from 1 x 1 to 2 x 3 parts for the window "
     "(2, 3)"),
    (lambda: ops.max_in_windows(unequal(2, 5, 3), window=(2, 3), parts=(1, 1)),
     "max_in_windows: x (2, 5, 3), parts (1, 1): expected (B, 6, C), and from 1 x 1 to 2 x 3 parts for the window "
     "(2, 3)"),
    (lambda: ops.cut_windows(unequal(2, 5, 3), grid=(2, 3), window=(2, 3)),
     "cut_windows: x (2, 5, 3), expected (B, 6, C) for the grid (2, 3)"),
    (lambda: ops.cut_windows(unequal(2, 6, 3), grid=(2, 3), window=(3, 3)),
     "cut_windows: windows (3, 3), shift (0, 0), grid (2, 3): expected windows no larger than the grid, shifts "
     "smaller than the window"),
    (lambda: ops.cut_windows(unequal(2, 6, 3), grid=(2, 3), window=(2, 3), shift=(2, 0)),
     "cut_windows: windows (2, 3), shift (2, 0), grid (2, 3): expected windows no larger than the grid, shifts "
     "smaller than the window"),
    (lambda: ops.join_windows(unequal(3, 2, 3), grid=(2, 4), window=(1, 2)),
     "join_windows: x (3, 2, 3), expected (B n, 2, C) with n = 4 windows (1, 2) of the grid (2, 4)"),
    (lambda: ops.relative_bias(unequal(14, 2), window=(2, 3)),
     "relative_bias: table (14, 2), expected (15, heads) for windows (2, 3)"),
    (lambda: ops.window_attention(*[unequal(4, 2, 6, 3)] * 3, unequal(2, 6, 5), grid=(2, 6), window=(2, 3)),
     "window_attention: q (4, 2, 6, 3), k (4, 2, 6, 3), v (4, 2, 6, 3), bias (2, 6, 5): expected three (B n, H, "
     "6, d) with n = 2, and (H, 6, 6)")])
def test_refused(call, text):
    with refuses(text):
        call()
