"""A ViT for clips: tubelets for tokens, attention over space and time together (ViViT's model 1: Arnab et al.
2021, arXiv 2103.15691, section 3.3). With one tubelet in time it is the ViT of pictures.
"""
import dataclasses
from typing import Any

from .. import nn
from .base import Options, is_whole, model
from .vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class ClipSizes(Options):
    """What models of clips have before the sizes of a model with one width.

    frames: of a clip. tubelet: (t, p, p), frames and pixels; None: (2, patch_size, patch_size), and where it
    is given patch_size is p."""
    frames: int = 8
    image_size: int | tuple[int, int] = 32
    tubelet: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(is_whole(self.frames) and self.frames > 0,
                   f"frames {self.frames!r}, expected a positive whole number")
        tubelet = (2, self.patch_size, self.patch_size) if self.tubelet is None else self.tubelet
        fits = isinstance(tubelet, (tuple, list)) and len(tubelet) == 3 and all(map(is_whole, tubelet))
        self.check(fits and min(tubelet) > 0 and tubelet[1] == tubelet[2],
                   f"tubelet {self.tubelet!r}, expected (t, p, p), positive whole numbers")
        self.settle("tubelet", tuple(tubelet))
        self.settle("patch_size", tubelet[1])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one clip as the model takes it, (frames, channels, H, W)."""
        return (self.frames, *super().input_shape)


class ClipModel:
    """What makes a model of pictures one of clips; it stands before it."""

    def embedding(self, c: Any) -> nn.TubeletEmbed:
        """What turns clips into tokens."""
        return nn.TubeletEmbed(c.frames, c.image_size, c.tubelet, c.dim, c.channels, bias=not c.pre_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoViTConfig(ViTConfig, ClipSizes):
    """The options of ViT and of ClipSizes."""


@model("videovit")
class VideoViT(ClipModel, ViT):
    """A VideoViT. clips (B, frames, channels, H, W) -> Output.

    Its tokens are those of the tubelets, the first t frames' first, each with a learned position in time and
    space; `pos_embed` has a row for each. All attend to all."""
    Config = VideoViTConfig
