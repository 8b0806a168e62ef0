"""Maps as tokens, row by row, and as convolutions take them."""
from .. import nn
from ..tensor import Tensor

Pair = tuple[int, int]


def as_map(x: Tensor, grid: Pair) -> Tensor:
    """(B, N, C) -> (B, C, H, W)."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], *grid)


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C), row by row."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


class LocalConv(nn.Conv2d):
    """A 3 x 3 depthwise convolution of a map x (B, N, C) of the shape `grid` -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:  # type: ignore[override]
        return as_tokens(super().forward(as_map(x, grid)))
