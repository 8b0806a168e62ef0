"""ToMe, token merging (Bolya et al. 2023, arXiv 2210.09461): the most similar tokens are averaged.

In every block, between attention and MLP, r tokens merge into others. Bipartite soft matching chooses them:
the tokens are dealt alternately into two sets; each token of the first set is paired with the token of the
second whose key is most like its own (cosine); the r most similar pairs merge. A token remembers how many
patches it stands for, and attention counts it as often. Nothing new is learned: a trained ViT's weights serve
as they are, and training with merging can go on from them.
"""
import dataclasses
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module, to_numpy
from ..tensor import Tensor
from .base import Output, model
from .vit import Tokens, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMeConfig(ViTConfig):
    """r: how many tokens each block merges away: the same for all, or a tuple with one entry per block.

    In one block, at most half of the patch tokens merge. The class token, and what else is no patch, never
    does."""
    r: int | tuple[int, ...] = 8

    def __post_init__(self):
        super().__post_init__()
        each = self.r if isinstance(self.r, tuple) else (self.r,) * self.depth
        self.check(len(each) == self.depth and all(isinstance(n, (int, np.integer)) and n >= 0 for n in each),
                   f"r {self.r!r}, expected a whole number that is not negative, or one per block "
                   f"({self.depth})")


@dataclasses.dataclass
class MergedOutput(Output):
    """tokens (B, n, D): those that are left. size (B, n): how many patches each stands for; they sum to N.
    source (B, N): for each patch, the place of its token among them."""
    size: Array | None = None
    source: Array | None = None


@dataclasses.dataclass
class MergedTokens(Tokens):
    """source (B, N): for each patch, the place in x of the token that it is part of; None: no merge yet."""
    source: Array | None = None


@model("tome")
class ToMe(ViT):
    """A ViT that merges r tokens in each block; with r = 0, the ViT itself.

    images (B, channels, H, W) -> MergedOutput."""
    Config = ToMeConfig

    def start(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None) -> MergedTokens:
        return super().start(images, trace, paths, MergedTokens)

    def merged_by(self, i: int, tokens: Tokens) -> int:
        """How many tokens block i merges away."""
        r = self.config.r
        return min(r[i] if isinstance(r, tuple) else r, (tokens.x.shape[1] - tokens.extra) // 2)

    def run_block(self, i: int, tokens: MergedTokens) -> None:
        """Block i, with the merge between its two branches."""
        r, block = self.merged_by(i, tokens), self.blocks[i]
        paths = nn.column(tokens.paths, i)
        if not r and tokens.size is None:
            super().run_block(i, tokens)
            return
        q, k, v = block.attn.project(block.norm1(tokens.x))
        # softmax(q k / sqrt d + log size), eq. 1: a key that stands for s patches weighs s times as much
        out = block.attn.attend(q, k, v, tokens.size, sees_itself=False, attention=tokens.attention)
        tokens.x = tokens.x + nn.scaled(out, nn.column(paths, 0), block.ls1)
        if r:
            self.merge(tokens, matching(k.data.mean(axis=1), r, tokens.extra), r)
        tokens.x = block.second(tokens.x, nn.column(paths, 1))

    def merge(self, tokens: MergedTokens, target: Array, r: int) -> None:
        """Average the tokens that merge, weighted by size. target (B, T): the place, out of T - r, that each
        token goes to."""
        xp, (batch, T, _) = array_module(target), tokens.x.shape
        size = xp.ones((batch, T), tokens.x.dtype) if tokens.size is None else tokens.size
        total = ops.put_tokens(size[:, :, None], target, length=T - r).data
        tokens.x = ops.put_tokens(tokens.x * size[:, :, None], target, length=T - r) / total
        tokens.size = total[:, :, 0]
        places = xp.arange(tokens.extra, T) if tokens.source is None else tokens.source
        tokens.source = xp.take_along_axis(target, xp.broadcast_to(places, (batch, self.num_patches)), axis=1)

    def read(self, tokens: MergedTokens) -> MergedOutput:
        out, xp = super().read(tokens), array_module(tokens.x.data)
        shape = (len(tokens.x), self.num_patches)
        unmerged = xp.broadcast_to(xp.arange(shape[1]), shape)
        size = xp.ones(shape, tokens.x.dtype) if tokens.size is None else tokens.size[:, tokens.extra:]
        source = unmerged if tokens.source is None else tokens.source - tokens.extra
        return MergedOutput(**vars(out), size=size, source=source)

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        size, source = to_numpy(out.size), to_numpy(out.source)
        left = f"{size.shape[1]} of {source.shape[1]} tokens"
        return [(f"ToMe: {left}, red: merged most", np.take_along_axis(size, source, axis=1))]


def matching(keys: Array, r: int, extra: int) -> Array:
    """Bipartite soft matching (section 3, appendix D) of r >= 1 tokens -> (B, T): each token's new place.

    There are T - r places: first the tokens of the first set that are left, then the second set. keys (B, T,
    d). The first `extra` tokens (the class token, registers) do not merge, and keep their places."""
    xp = array_module(keys)
    length = xp.sqrt((keys * keys).sum(axis=2, keepdims=True))
    unit = keys / (length + (length == 0))
    first, second = unit[:, 0::2], unit[:, 1::2]
    alike = ops.matmul(first, second.swapaxes(1, 2)).data
    # a token of the prefix is neither merged away nor merged into
    alike[:, :(extra + 1) // 2], alike[:, :, :extra // 2] = -xp.inf, -xp.inf
    best, partner = alike.max(axis=2), alike.argmax(axis=2)
    rank = xp.argsort(xp.argsort(-best, axis=1, kind="stable"), axis=1)
    merged, left = rank < r, first.shape[1] - r
    target = xp.empty(keys.shape[:2], "int64")
    target[:, 0::2] = xp.where(merged, left + partner, xp.cumsum(~merged, axis=1) - 1)
    target[:, 1::2] = left + xp.arange(second.shape[1])
    if extra < 2:
        return target
    prefix = [left + i // 2 if i % 2 else i // 2 for i in range(extra)]  # where these tokens are by now
    others = [place for place in range(keys.shape[1] - r) if place not in prefix]
    return xp.asarray(np.argsort(prefix + others))[target]
