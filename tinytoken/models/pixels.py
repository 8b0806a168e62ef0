"""Parts of dense prediction: a decoder of maps, and targets with a class for each pixel."""
import numpy as np

from .. import nn, ops
from ..backend import Array, array_module
from ..data.batches import IGNORE
from ..data.mix import one_hot
from ..errors import expect, shape_of
from ..tensor import Tensor


class Same(nn.Module):
    """x -> x: stands where a classifier of whole pictures was."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Decoder(nn.Module):
    """Maps (B, N, C), each of its grid, the finest first -> (B, N of the finest, outputs).

    Each through a linear layer of its own, all resized to the finest and added, norm, GELU, a linear layer.
    All but the last are normed before."""

    def __init__(self, widths: list[int], width: int, outputs: int) -> None:
        self.norms = [nn.LayerNorm(each) for each in widths[:-1]]
        self.lateral = [nn.Linear(each, width) for each in widths]
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, maps: list[Tensor], grids: list[tuple[int, int]]) -> Tensor:
        maps = [norm(x) for norm, x in zip(self.norms, maps)] + maps[-1:]
        added, *others = [linear(x) for linear, x in zip(self.lateral, maps)]
        for x, grid in zip(others, grids[1:]):
            added = added + ops.resize(x, grid=grid, size=grids[0])
        return self.head(ops.gelu(self.norm(added)))


def squares(x: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """What each position of a grid says of the pixels of its own square, `cell` = (height, width) of them:
    (B, N, height width K) -> (B, H, W, K)."""
    (rows, columns), (high, wide) = grid, cell
    x = x.reshape(len(x), rows, columns, high, wide, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), rows * high, columns * wide, -1)


def pixel_targets(labels: Array, logits: Tensor, smoothing: float = 0.0) -> Array:
    """Targets (B H W, K) of ops.cross_entropy for logits (B, H, W, K) of pixels with these labels (B, H, W).

    Rows are zero where the label is IGNORE; the others of a picture weigh as much as all its pixels, so that
    the cross-entropy is the mean over pictures of that over each one's pixels with a class. smoothing: as of
    ops.cross_entropy. InputError as of `check_pixel_labels`."""
    check_pixel_labels(labels, logits, smoothing)
    classes, xp, there = logits.shape[-1], array_module(labels), labels != IGNORE
    weight = there / xp.maximum(there.mean(axis=(1, 2), keepdims=True), 1 / there[0].size)
    wanted = one_hot(labels.reshape(-1), classes, logits.dtype) * (1 - smoothing) + smoothing / classes
    return wanted * weight.reshape(-1, 1).astype(logits.dtype)


def check_pixel_labels(labels: Array, logits: Tensor, smoothing: float) -> None:
    """InputError for labels of another shape than (B, H, W) of the logits (B, H, W, K), for labels that are
    not whole numbers or, on the CPU, out of range, and for a smoothing that is not from 0 to 1."""
    classes, xp = logits.shape[-1], array_module(labels)
    expect(labels.shape == logits.shape[:3] and labels.dtype.kind in "iu", "Segmenter",
           lambda: f"{shape_of('labels', labels)} {labels.dtype} for {shape_of('logits', logits)}, expected "
                   f"whole numbers (B, H, W)")
    there = labels != IGNORE
    fits = xp is not np or (~there | (labels >= 0) & (labels < classes)).all()
    expect(fits, "Segmenter", lambda: f"labels from {labels.min()} to {labels.max()}, expected 0 to "
                                      f"{classes - 1}, or {IGNORE} for none")
    expect(0 <= smoothing < 1, "Segmenter", lambda: f"smoothing {smoothing}, expected 0 <= smoothing < 1")
