"""Segmentation: a class for each pixel, by a light decoder on the map that another model ends with.

That a pyramid with two paths (adaptive.py) serves dense prediction is a claim of its paper (Rao et al. 2022,
arXiv 2207.01580, abstract); the official code has no such model. What is there: the maps keep their shape, so
that a decoder can read them. What is here is ours: the decoder, how its losses go with the others, and which
maps it reads. Of a pyramid these are that of the last stage but one, in which the positions have taken their
paths, and the last one, resized to it and added, as in an FPN (Lin et al. 2017, arXiv 1612.03144).
In STViT-R (stvitr.py) the first of the two is, by default, the map that it recovers.

Each position answers for all pixels of its own square, as in a sub-pixel convolution (Shi et al. 2016, arXiv
1609.05158). One answer for each position, resized bilinearly, could not draw a ring that is thinner than a
position.
"""
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module
from ..errors import expect
from ..tensor import Tensor
from .adaptive import DynamicStages
from .base import Loss, Model, Options, Output, model
from .dynamicvit import DynamicTokens, DynamicViT
from .lookupvit import LookupOutput, LookupViT
from .pixels import Decoder, Same, pixel_targets, squares
from .pruning import Deciding, mask_at, places_of
from .stages import Stages

SIZES = ("patch_size", "dim", "depth", "heads", "mlp_ratio", "keys_as_queries")


@dataclasses.dataclass(frozen=True)
class SegmenterConfig(Options):
    """backbone: the registered name of the model whose map is read: a pyramid, a ViT, a DynamicViT or a
    LookupViT. num_classes: of a pixel, the background being one. width: of the decoder.

    options: those of the backbone. patch_size, dim, depth, heads, mlp_ratio, keys_as_queries: the same for
    what `options` does not say; afterwards `options` holds all that the backbone was made with."""
    backbone: str = "vit"
    num_classes: int = 11
    image_size: int | tuple[int, int] = 32
    _: dataclasses.KW_ONLY
    channels: int = 3
    width: int = 64
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patch_size: dataclasses.InitVar[int] = 4
    dim: dataclasses.InitVar[int] = 96
    depth: dataclasses.InitVar[int] = 6
    heads: dataclasses.InitVar[int] = 3
    mlp_ratio: dataclasses.InitVar[float] = 4
    keys_as_queries: dataclasses.InitVar[bool] = False
    positive = ("num_classes", "channels", "width")

    def __post_init__(self, *sizes: Any) -> None:
        super().__post_init__()
        self.check(self.backbone in backbones(),
                   f"backbone {self.backbone!r}, expected one of {', '.join(backbones())}")
        self.check(isinstance(self.options, Mapping), f"options {self.options!r}, expected {{name: value}}")
        made: Any = backbones()[self.backbone].Config
        known = inspect.signature(made).parameters
        for name in self.options:
            self.check(name in known, f"option {name!r}, expected one of {self.backbone}: {', '.join(known)}")
        both = {"classifiers": "both"} if hasattr(made, "classifiers") else {}  # or no lookup token is left
        made = made(**dict(zip(SIZES, sizes)) | dict(self.options) | both | self.shared)
        self.settle("options", {name: value for name, value in dataclasses.asdict(made).items()
                                if name not in self.shared})

    @property
    def shared(self) -> dict[str, Any]:
        """The options that the backbone has from here."""
        return dict(image_size=self.image_size, num_classes=self.num_classes, channels=self.channels)


def backbones() -> dict[str, type[Model]]:
    """{name: class} of the registered models whose last map is whole, or can be kept so."""
    return {name: kind for name, kind in model.items()
            if name in ("vit", "dynamicvit", "lookupvit", "convnext", "swin", "stvitr")
            or issubclass(kind, DynamicStages)}


class MaskedDynamicViT(DynamicViT):
    """A DynamicViT that keeps its map: what it drops is hidden from the other tokens, at inference too, and
    stays where it is. It drops the same tokens as one that removes them, and saves nothing."""

    def remove(self, stage: int, tokens: DynamicTokens) -> None:
        places, tokens.official = None, False  # the exact softmax, for which to mask is to remove
        if tokens.forced is None or stage >= len(tokens.forced):  # what is decided here, is forced then
            places = self.best(stage, tokens)
            tokens.forced = [*(tokens.forced or ()), mask_at(places, tokens.x, self.num_patches)]
        self.mask(stage, tokens)
        tokens.kept.append(places_of(tokens.decisions[-1].data) if places is None else places)

    def best(self, stage: int, tokens: DynamicTokens) -> Array:
        """The places (B, k) of the highest scores among the tokens that are left."""
        xp, shape = array_module(tokens.x.data), (len(tokens.x), self.num_patches)
        left = tokens.decisions[-1].data if stage else xp.ones(shape, tokens.x.dtype)
        scores = self.score_predictor[stage](tokens.patches, left).data[:, :, 0]
        return ops.top_k(xp.where(left > 0, scores, -xp.inf), self.counts[stage])


@dataclasses.dataclass
class SegmenterOutput(Output):
    """logits (B, H, W, K): of each pixel. tokens, attention: the backbone's; features: its whole Output, the
    logits of which mean nothing."""
    features: Any = None


@model("segmenter")
class Segmenter(Model):
    """Another model without its classifier, and a decoder of its last map. images (B, channels, H, W) ->
    SegmenterOutput."""
    Config: Any = SegmenterConfig
    task = "segment"

    def build(self, c: Any) -> None:
        kind: Any = backbones()[c.backbone]
        kind = MaskedDynamicViT if kind is DynamicViT else kind
        self.backbone: Any = kind(**c.options, **c.shared)
        for name in ("head", "head_dist", "lookup_head"):
            head: Any = getattr(self.backbone, name, None)
            if hasattr(head, "fc"):
                head.fc = Same()
            elif head is not None:
                setattr(self.backbone, name, Same())
        pyramid, made = isinstance(self.backbone, Stages), self.backbone.config
        self.grids = self.backbone.grids[-2:] if pyramid else [self.backbone.patch_embed.grid]
        self.cell = tuple(side // n for side, n in zip(nn.both_sides(c.image_size), self.grids[0]))
        self.decoder = Decoder(list(made.widths[-2:]) if pyramid else [made.dim], c.width,
                               self.cell[0] * self.cell[1] * c.num_classes)
        nn.initialise(self.decoder)
        self.loss_weights = self.backbone.loss_weights
        self.task = "segment_taught" if isinstance(self.backbone, Deciding) else self.task

    @property
    def blocks(self) -> list[Any]:
        """The backbone's."""
        return self.backbone.blocks

    def forward(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None,
                **call: Any) -> SegmenterOutput:
        """trace, paths, and further arguments: of the backbone's call."""
        call |= {"mean_of_heads": True} if isinstance(self.backbone, LookupViT) else {}
        out = self.backbone(images, trace=trace, paths=paths, **call)
        finer = getattr(out, "maps", [])[-2:-1]
        x = self.decoder([*finer, out.lookup if isinstance(out, LookupOutput) else out.tokens], self.grids)
        return SegmenterOutput(squares(x, self.grids[0], self.cell), out.tokens, out.attention, features=out)

    def noise(self, *draw: Any, **options: Any) -> dict[str, Array]:
        return self.backbone.noise(*draw, **options)

    def show(self, out: SegmenterOutput) -> list[tuple[str, np.ndarray]]:
        return self.backbone.show(out.features)

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             **options: Any) -> Loss:
        """The backbone's own loss, with each pixel in the place of a picture: cross-entropy, and the KL
        divergence from the answers of a teacher, a Segmenter for pictures of the same size, are of pixels.
        targets (B, H, W): labels, as `pixel_targets` takes them.

        The divergence is of all pixels, also of those without a class."""
        goal = pixel_targets(targets, out.logits, smoothing)
        taught = None if teacher is None else of_pixels(teacher)
        return self.backbone.loss(of_pixels(out), goal, taught, **options)


def of_pixels(out: SegmenterOutput) -> Any:
    """The backbone's Output with the logits of pixels, (B H W, K)."""
    expect(isinstance(out, SegmenterOutput), "Segmenter",
           lambda: f"teacher {type(out).__name__}, expected a SegmenterOutput")
    others = {"lookup_logits": None} if isinstance(out.features, LookupOutput) else {}
    return dataclasses.replace(out.features, logits=out.logits.reshape(-1, out.logits.shape[-1]), **others)
