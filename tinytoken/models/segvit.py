"""SegViT (Zhang et al. 2022, arXiv 2210.05844) and SegViTv2 (2023, arXiv 2306.06289): segmentation by a plain
ViT, in which the scores of the attention from a class's query to the positions are the class's mask.

The encoder and its Shrunk forms are in shrunk.py, the attention to mask in masks.py, its loss in
mask_losses.py. Here they are put together, beside three simpler decoders to compare with.
"""
import dataclasses
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..errors import expect
from ..tensor import Tensor
from .base import Loss, Model, Output, is_whole, model
from .mask_losses import edge_patches, mask_loss
from .masks import MaskDecoder, Reader, UpSampler
from .pixels import check_pixel_labels, pixel_targets
from .shrunk import ShrunkConfig, ShrunkViT


@dataclasses.dataclass(frozen=True)
class SegViTConfig(ShrunkConfig):
    """num_classes: of a pixel, the background being one. decoder: "atm": attention to mask; "dot": the same
    queries, but a mask is the product of the last of them with the positions, as in Segmenter (Strudel et al.
    2021, arXiv 2105.05633); "linear" and "mlp": each position answers by itself, through one or two layers.
    width: of the decoder, None: half of dim. stages: how many of the maps it reads, the deepest first, None:
    all. layers: of each stage. A shrunk encoder's two maps are brought back to all positions by `layers`
    further layers each, and then the decoder has one stage of which each layer makes a mask. placed (ours):
    what brings them back is told where each position is, see UpSampler. new_classes: see MaskDecoder."""
    num_classes: int = 11
    _: dataclasses.KW_ONLY
    decoder: str = "atm"
    width: int | None = None
    stages: int | None = None
    layers: int = 3
    placed: bool = False
    new_classes: int = 0
    choices = ShrunkConfig.choices | {"decoder": ("atm", "dot", "linear", "mlp")}
    positive = (*ShrunkConfig.positive, "layers")

    def __post_init__(self):
        super().__post_init__()
        if self.width is None:
            self.settle("width", max(1, self.dim // 2 // self.heads) * self.heads)
        self.check(is_whole(self.width) and self.width > 0 and self.width % self.heads == 0,
                   f"width {self.width!r}, expected a multiple of the {self.heads} heads")
        if self.stages is None:
            self.settle("stages", len(self.read))
        self.check(is_whole(self.stages) and 0 < self.stages <= len(self.read),
                   f"stages {self.stages!r} of the maps after the blocks {self.read}, expected 1 to "
                   f"{len(self.read)}")
        self.check(isinstance(self.placed, bool) and (self.shrink != "none" or not self.placed),
                   f"placed {self.placed!r} with shrink {self.shrink!r}, expected True or False, and True "
                   f"only of an encoder that shrinks")
        most = self.num_classes - 1 if self.decoder in ("atm", "dot") else 0
        self.check(is_whole(self.new_classes) and 0 <= self.new_classes <= most,
                   f"new_classes {self.new_classes!r} of {self.num_classes} with decoder {self.decoder!r}, "
                   f"expected 0 to {most}")


@dataclasses.dataclass
class SegViTOutput(Output):
    """logits (B, H, W, K): scores of each pixel; of a decoder with queries the sum over queries of what the
    query says of the class times its mask (sigmoid). tokens: the encoder's last. steps: the pairs of a
    MaskDecoder. edges (B, N): the edge scores, where there are any."""
    steps: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    edges: Tensor | None = None


@model("segvit")
class SegViT(Model):
    """A ViT and a decoder of masks. images (B, channels, H, W) -> SegViTOutput."""
    Config: Any = SegViTConfig
    task = "segment"
    whole = True

    def build(self, c: Any) -> None:
        kept = [field.name for field in dataclasses.fields(ShrunkConfig)]
        self.backbone = ShrunkViT(**{name: getattr(c, name) for name in kept})
        self.grid, shrunk = self.backbone.patch_embed.grid, c.shrink != "none"
        places, width = self.backbone.num_patches, c.width if shrunk else c.dim
        self.up = UpSampler(places, c.dim, c.width, c.heads, 2, c.layers, c.placed) if shrunk else None
        if c.decoder == "linear":
            self.decoder: Any = nn.Linear(width, c.num_classes)
        elif c.decoder == "mlp":
            self.decoder = nn.Sequential(nn.Linear(width, c.width), nn.GELU(),
                                         nn.Linear(c.width, c.num_classes))
        else:
            self.decoder = MaskDecoder(c.num_classes, None if shrunk else width, c.width, c.heads,
                                       1 if shrunk else c.stages, c.layers, shrunk, c.decoder == "dot",
                                       c.new_classes)
        for name in ("up", "decoder"):
            part = getattr(self, name)
            if part is not None:
                nn.initialise(part)
            if isinstance(part, Reader):
                part.start(name)

    @property
    def blocks(self) -> list[Any]:
        """The encoder's."""
        return self.backbone.blocks

    @property
    def patch_embed(self) -> Any:
        """The encoder's."""
        return self.backbone.patch_embed

    def forward(self, images: Tensor | Array, trace: bool = False,
                paths: Array | None = None) -> SegViTOutput:
        """trace: keep the weights of the encoder's attention. paths: factors of its residual branches."""
        state = self.backbone(images, trace, paths)
        maps, steps = state.shown[-self.config.stages:], []
        if self.up is not None:
            maps = [self.up(state.shown, self.backbone.pos_embed)]
        if isinstance(self.decoder, MaskDecoder):
            steps = self.decoder(maps)
            presence, masks = steps[-1]
            answers = ops.matmul(ops.sigmoid(self.pixels(masks)), ops.softmax(presence)[:, :, :-1])
        else:
            answers = self.pixels(self.decoder(maps[-1]))
        size = nn.both_sides(self.config.image_size)
        return SegViTOutput(answers.reshape(len(answers), *size, -1), state.x, state.attention or [], steps,
                            state.edges)

    def pixels(self, x: Tensor) -> Tensor:
        """(B, N, K) -> (B, H W, K), bilinearly."""
        return ops.resize(x, grid=self.grid, size=nn.both_sides(self.config.image_size))

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None) -> Loss:
        """`class_loss`. InputError for a teacher: what a pixel answers is no logit."""
        expect(teacher is None, "SegViT", "a teacher, expected none: its pixels answer with no logits")
        return self.class_loss(out, targets, smoothing=smoothing)

    def class_loss(self, out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
        """targets (B, H, W): labels, as `pixel_targets` takes them. The loss of the masks, or the
        cross-entropy of the pixels; the cross-entropy of edge patches is added. smoothing: of what a query,
        or a pixel, says of the classes."""
        if out.steps:
            check_pixel_labels(targets, out.logits, smoothing)
            loss, parts = mask_loss(out.steps, targets, self.grid, smoothing=smoothing)
        else:
            goal = pixel_targets(targets, out.logits, smoothing)
            loss = ops.cross_entropy(out.logits.reshape(-1, out.logits.shape[-1]), goal)
            parts = {"class": loss}
        if out.edges is not None:
            parts["edges"] = ops.binary_cross_entropy(out.edges, edge_patches(targets, self.grid))
            loss = loss + parts["edges"]
        return loss, parts

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        """The mask of each class, as a probability."""
        if not out.steps:
            return []
        masks = to_numpy(ops.sigmoid(out.steps[-1][1]).data)
        return [(f"SegViT: mask of class {k}", masks[:, :, k]) for k in range(masks.shape[2])]
