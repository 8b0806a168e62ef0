"""Pictures to tokens, and token grids to other sizes."""
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array, array_module
from ..errors import expect, shape_of
from ..tensor import op


@op
def patchify(images, *, patch):
    """images (B, C, H, W) -> (B, N, C p p): N = (H / p)(W / p) patches, row by row.

    The values of a patch are in the order (C, p, p), so that a convolution's weight (D, C, p, p) flattened to
    (D, C p p) is the weight of the patch embedding's linear layer.
    """
    expect(images.ndim == 4, "patchify", lambda: f"{shape_of('images', images)}, expected (B, C, H, W)")
    batch, channels, height, width = images.shape
    expect(height % patch == 0 and width % patch == 0, "patchify",
           lambda: f"{shape_of('images', images)}: "
                   f"height and width must be multiples of the patch size {patch}")
    rows, columns = height // patch, width // patch
    grid = images.reshape(batch, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)

    def vjp(g):
        back = g.reshape(batch, rows, columns, channels, patch, patch).transpose(0, 3, 1, 4, 2, 5)
        return back.reshape(batch, channels, height, width)
    return grid.reshape(batch, rows * columns, channels * patch * patch), vjp


@op
def resize(x, *, grid, size, antialias=True):
    """Tokens on a grid (h, w), row by row, resized to `size` (m, n) bilinearly. x (B, h w, D) -> (B, m n, D).

    A grid may have any number of sides: tokens of a clip have three, (t, h, w), and are resized in time, too.
    A product with a constant, `resize_matrix`. With antialias every token is read, also where the grid
    shrinks (as in jax.image.resize).
    """
    expect(x.ndim == 3 and x.shape[1] == math.prod(grid), "resize",
           lambda: f"{shape_of('x', x)}, expected (B, {math.prod(grid)}, D) for the grid {tuple(grid)}")
    matrix = resize_matrix_on(array_module(x), tuple(grid), tuple(size), antialias, x.dtype.name)
    return matrix @ x, lambda g: matrix.T @ g


def resize_matrix(grid: Sequence[int], size: Sequence[int], antialias: bool = True,
                  cubic: bool = False) -> np.ndarray:
    """The (m n, h w) float64 matrix of `resize`; each row sums to 1. It is separable: the Kronecker product
    of a matrix for each axis.

    Along one axis, with s = h / m, output o has its centre at c = (o + 1/2) s - 1/2, and input i weighs
    max(0, 1 - |i - c| / max(s, 1)); without antialias the divisor is 1. cubic: Keys's kernel of the same
    distance, with antialias alone: torch's "bicubic", with which timm resizes position tables.
    """
    expect(all(map(_are_sides, (grid, size))) and len(grid) == len(size), "resize",
           lambda: f"grid {grid!r} to {size!r}: whole numbers, at least 1 x 1, expected")
    expect(antialias or not cubic, "resize", "cubic without antialias, expected antialias=True")

    def axis(inputs, outputs):
        step = inputs / outputs
        centres = (np.arange(outputs) + 0.5) * step - 0.5
        half_width = max(step, 1) if antialias else 1
        distance = np.abs(np.arange(inputs) - centres[:, None]) / half_width
        weight = _cubic(distance) if cubic else np.maximum(0, 1 - distance)
        return weight / weight.sum(axis=1, keepdims=True)
    return functools.reduce(np.kron, map(axis, grid, size))


def _are_sides(sides):
    """Whether it is two or more whole numbers from 1."""
    return (isinstance(sides, Sequence) or isinstance(sides, np.ndarray) and sides.ndim) and (
            len(sides) > 1 and all(isinstance(n, numbers.Real) and n >= 1 and n % 1 == 0 for n in sides))


def _cubic(x):
    """The cubic convolution kernel at distances x >= 0, a = -1/2 (Keys 1981)."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@functools.lru_cache(maxsize=64)
def resize_matrix_on(xp: Any, grid: tuple[int, ...], size: tuple[int, ...], antialias: bool = True,
                     dtype: str = "float32") -> Array:
    """`resize_matrix` as an array of the module xp, made once."""
    return xp.asarray(resize_matrix(grid, size, antialias).astype(dtype))
