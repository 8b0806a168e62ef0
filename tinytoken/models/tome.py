"""ToMe, token merging (Bolya et al. 2023, arXiv 2210.09461): no token is dropped, the most alike are
averaged.

In every block, between attention and MLP, r tokens merge into others. Which ones is found by bipartite soft
matching: the tokens are dealt alternately into two sets; each token of the first is joined to the one of the
second whose key is most like its own (cosine); the r strongest joins are made. A token remembers how many
patches it stands for, and attention counts it as often. Nothing is learned, so a trained ViT's weights serve
as they are, and training with merging goes on from them.
"""
import dataclasses

import numpy as np

from .. import nn, ops
from ..backend import array_module, to_numpy
from ..errors import expect
from .base import Output, Sizes, model
from .vit import Tokens, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMeConfig(ViTConfig):
    """r: how many tokens each block merges away, one number for all or one per block; at most half of the
    tokens that may merge go in one block, and the class token stays."""
    r: int | tuple[int, ...] = 8

    def __post_init__(self):
        super().__post_init__()
        each = self.r if isinstance(self.r, tuple) else (self.r,) * self.depth
        expect(len(each) == self.depth and all(isinstance(n, (int, np.integer)) and n >= 0 for n in each),
               self.where,
               f"r {self.r!r}, expected a whole number that is not negative, or one per block ({self.depth})")


@dataclasses.dataclass
class MergedOutput(Output):
    """tokens (B, n, D): those that are left. size (B, n): how many patches each stands for; together all N.
    source (B, N): for each patch, the place of its token among them."""
    size: object = None
    source: object = None


@dataclasses.dataclass
class MergedTokens(Tokens):
    """source (B, N): for each patch, the place in x of the token that it has become part of; None before any
    merge."""
    source: object = None


@model("tome")
class ToMe(ViT):
    """A ViT that merges r tokens in each block. images (B, channels, H, W) -> MergedOutput. r = 0 is the
    ViT."""
    Config: type[Sizes] = ToMeConfig

    def start(self, images, trace=False, paths=None):
        return super().start(images, trace, paths, MergedTokens)

    def merged_by(self, i, tokens):
        """How many tokens block i merges away."""
        r = self.config.r
        return min(r[i] if isinstance(r, tuple) else r, (tokens.x.shape[1] - tokens.extra) // 2)

    def run_block(self, i, tokens):
        """Block i, with the merge between its two branches."""
        r, block, paths = self.merged_by(i, tokens), self.blocks[i], nn.column(tokens.paths, i)
        if not r and tokens.size is None:
            super().run_block(i, tokens)
            return
        q, k, v = block.attn.project(block.norm1(tokens.x))
        # softmax(q k / sqrt d + log size), eq. 1: a key that stands for s patches weighs s times as much
        out = block.attn.attend(q, k, v, tokens.size, sees_itself=False, attention=tokens.attention)
        tokens.x = tokens.x + nn.scaled(out, nn.column(paths, 0))
        if r:
            self.merge(tokens, matching(k.data.mean(axis=1), r, tokens.extra), r)
        tokens.x = nn.mlp_branch(tokens.x, block.norm2, block.mlp, nn.column(paths, 1))

    def merge(self, tokens, target, r):
        """Average tokens by size. target (B, T): the place that each goes to, out of T - r."""
        xp, (batch, T, _) = array_module(target), tokens.x.shape
        size = xp.ones((batch, T), tokens.x.dtype) if tokens.size is None else tokens.size
        total = ops.put_tokens(size[:, :, None], target, length=T - r).data
        tokens.x = ops.put_tokens(tokens.x * size[:, :, None], target, length=T - r) / total
        tokens.size = total[:, :, 0]
        places = xp.arange(tokens.extra, T) if tokens.source is None else tokens.source
        tokens.source = xp.take_along_axis(target, xp.broadcast_to(places, (batch, self.num_patches)), axis=1)

    def read(self, tokens):
        out, xp = super().read(tokens), array_module(tokens.x.data)
        shape = (len(tokens.x), self.num_patches)
        size = xp.ones(shape, tokens.x.dtype) if tokens.size is None else tokens.size[:, tokens.extra:]
        source = xp.broadcast_to(xp.arange(shape[1]),
                                 shape) if tokens.source is None else tokens.source - tokens.extra
        return MergedOutput(**vars(out), size=size, source=source)

    def show(self, out):
        size, source = to_numpy(out.size), to_numpy(out.source)
        left = f"{size.shape[1]} of {source.shape[1]} tokens"
        return [(f"ToMe: {left}, red: merged most", np.take_along_axis(size, source, axis=1))]


def matching(keys, r, extra):
    """Bipartite soft matching (section 3, appendix D). keys (B, T, d); r >= 1 tokens merge, but not the
    first, if extra is 1 and it is the class token -> (B, T): the new place of each token, of T - r: the first
    set's that are left, then the second set."""
    xp = array_module(keys)
    unit = keys / xp.sqrt((keys * keys).sum(axis=2, keepdims=True))
    first, second = unit[:, 0::2], unit[:, 1::2]
    alike = ops.matmul(first, second.swapaxes(1, 2)).data
    best, partner = alike.max(axis=2), alike.argmax(axis=2)
    best[:, :extra] = -xp.inf
    rank = xp.argsort(xp.argsort(-best, axis=1, kind="stable"), axis=1)
    merged, left = rank < r, first.shape[1] - r
    target = xp.empty(keys.shape[:2], "int64")
    target[:, 0::2] = xp.where(merged, left + partner, xp.cumsum(~merged, axis=1) - 1)
    target[:, 1::2] = left + xp.arange(second.shape[1])
    return target
