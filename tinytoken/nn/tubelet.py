"""Clips to tokens: boxes of pixels over a few frames, each embedded by one linear layer."""
from .. import ops
from ..backend import Array
from ..errors import expect
from ..tensor import Tensor
from .images import both_sides
from .layers import PatchEmbed, Projection
from .module import Parameter, zeros


class TubeletProjection(Projection):
    """The tubelet embedding's weight as the convolution it is: (dim, C, t, p, p), stride (t, p, p)."""

    def __init__(self, dim: int, channels: int, tubelet: tuple[int, int, int], bias: bool = True) -> None:
        self.weight = Parameter(zeros(dim, channels, *tubelet), decay=True)
        self.bias = Parameter(zeros(dim)) if bias else None


class TubeletEmbed(PatchEmbed):
    """Clips to tokens: clips (B, T, C, H, W) float -> (B, N, dim), N = (T / t)(H / p)(W / p), the tubelets of
    the first t frames first, row by row (Arnab et al. 2021, arXiv 2103.15691, section 3.2).

    frames: T. tubelet: (t, p, p). Refuses what PatchEmbed refuses, and clips of another length. Of t = T it
    is the patch embedding of pictures whose channels are those of all frames."""

    def __init__(self, frames: int, image_size: int | tuple[int, int], tubelet: tuple[int, int, int],
                 dim: int, channels: int = 3, bias: bool = True) -> None:
        self.span, self.frames = tubelet[0], frames
        expect(frames % self.span == 0, "TubeletEmbed",
               f"tubelets of {self.span} frames do not divide {frames}")
        super().__init__(image_size, tubelet[1], dim, channels * self.span,
                         proj=TubeletProjection(dim, channels, tubelet, bias))
        self.shape, self.grid = (channels, *both_sides(image_size)), (frames // self.span, *self.grid)

    def forward(self, clips: Tensor | Array) -> Tensor:
        expected = (self.frames, *self.shape)
        shape = tuple(clips.shape) if hasattr(clips, "shape") else f"a {type(clips).__name__}"
        expect(shape[1:] == expected and shape[0], "images",
               lambda: f"{shape}, expected (B, {', '.join(map(str, expected))})")
        channels, *sides = self.shape
        folded = clips.reshape(-1, self.span, channels, *sides).swapaxes(1, 2)
        tokens = super().forward(folded.reshape(-1, channels * self.span, *sides))
        return tokens.reshape(len(clips), -1, tokens.shape[2])
