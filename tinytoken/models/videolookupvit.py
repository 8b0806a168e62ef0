"""A LookupViT for clips: all tubelets are lookup tokens, and the compressed tokens are the same features,
resized in time and space.

Koner et al. 2024 (arXiv 2407.12753) report results on clips; only the abstract was at hand, which does not
say how. That the compressed tokens lie on a grid in time and space, and that there is one set of blocks for
both, are choices of ours.
"""
import dataclasses

from .base import model
from .lookupvit import LookupViT, LookupViTConfig
from .videovit import ClipModel, ClipSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLookupViTConfig(LookupViTConfig, ClipSizes):
    """The options of LookupViT and of ClipSizes. compressed: the grid (t, m, n) of compressed tokens; a call
    may ask for any other, up to that of the tubelets."""
    compressed: tuple[int, ...] = (2, 3, 3)


@model("videolookupvit")
class VideoLookupViT(ClipModel, LookupViT):
    """A VideoLookupViT. clips (B, frames, channels, H, W) -> LookupOutput; see LookupViT."""
    Config = VideoLookupViTConfig
