"""What Naseer et al. 2022 (arXiv 2106.04169, "On Improving Adversarial Transferability of Vision
Transformers") make of a trained ViT: the class token of each block, through the norm and the head of the
last, is a classifier, and all of them together are a better stand-in for other models than the last alone.
The early ones know little; token refinement, a small module for each, is trained for that, and the ViT stays
as it is.
"""
import dataclasses
from typing import Any

from .. import nn, ops
from ..backend import Array
from ..tensor import Tensor
from .base import Loss, Output, cross_entropy_of, model
from .column import PlainConfig
from .maps import as_map
from .vit import ViT


class TokenRefinement(nn.Module):
    """Normed tokens (B, 1 + N, dim), the class token first, of a map -> (B, dim): the mean of the patches
    after a residual unit of two convolutions, plus a linear layer of the class token.

    The two convolutions are one, and so are the norms after them: the official code gives both the same
    name."""

    def __init__(self, dim: int) -> None:
        self.conv, self.bn = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.token_fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = as_map(x[:, 1:], grid)
        y = self.bn(self.conv(ops.relu(self.bn(self.conv(patches)))))
        return ops.relu(patches + y).mean(axis=(2, 3)) + self.token_fc(x[:, 0])


@dataclasses.dataclass(frozen=True)
class ATViTConfig(PlainConfig):
    """As of a ViT with a class token."""
    pool = "token"


@dataclasses.dataclass
class ATViTOutput(Output):
    """logits (B, K): the last block's. by_block: those of each block, the last one's being the same."""
    by_block: list[Tensor] = dataclasses.field(default_factory=list)


@model("atvit")
class ATViT(ViT):
    """A ViT with a class token whose blocks all answer. images (B, channels, H, W) -> ATViTOutput.

    `transformerheads` are the refinement of all blocks but the last. They read the ViT alone, not one
    another, so that all are trained at once: start from a ViT whose learning rate is 0."""
    Config: Any = ATViTConfig
    norm: Any

    def build(self, c: Any) -> None:
        self.transformerheads = [TokenRefinement(c.dim) for _ in range(c.depth - 1)]
        super().build(c)

    def forward(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None,
                refined: bool = True) -> ATViTOutput:
        """refined=False: the class tokens answer as they are."""
        tokens, by_block = self.encode(self.start(images, trace, paths, ends=[])), []
        for x, refine in zip(tokens.ends, self.transformerheads):
            x = self.norm(x)
            by_block.append(self.head(refine(x, self.patch_embed.grid)) if refined else self.classify(x))
        out = self.read(tokens)
        return ATViTOutput(**vars(out), by_block=[*by_block, out.logits])

    def class_loss(self, out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
        """The sum of the blocks' cross-entropies -> (loss, that of the last and that of the others)."""
        loss, parts = cross_entropy_of(out, targets, smoothing=smoothing)
        early: Any = 0
        for logits in out.by_block[:-1]:
            early = early + ops.cross_entropy(logits, targets, smoothing=smoothing)
        return loss + early, parts | ({"early": early} if out.by_block[1:] else {})
