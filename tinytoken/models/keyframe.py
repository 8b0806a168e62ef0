"""A ViT for clips that keeps the tokens of one time slot, the key frame's, and between attention and MLP of
some blocks drops others: the encoder of EVAD (Chen et al. 2023, arXiv 2304.08451, section 3.2). The rules are
in keyrules.py. Names of parameters are the official ones.
"""
import functools
import math
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .keyrules import KeyRules, KeyTokens
from .videovit import ClipModel


class SplitAttention(nn.Attention):
    """Self-attention with biases of queries and of values, and none of keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, qkv_bias=False)
        self.q_bias, self.v_bias = nn.Parameter(nn.zeros(dim)), nn.Parameter(nn.zeros(dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = array_module(x.data).zeros(self.q_bias.shape, x.dtype)
        bias = ops.concat(self.q_bias, none, self.v_bias, axis=0)
        return ops.split_heads(ops.linear(x, self.qkv.weight, bias), heads=self.heads, parts=3)


def block_of(dim: int, heads: int, mlp_ratio: float) -> nn.Block:
    """A block with SplitAttention."""
    block = nn.Block(dim, heads, mlp_ratio)
    block.attn = SplitAttention(dim, heads)
    return block


class KeyFrameViT(ClipModel, KeyRules):
    """The encoder. Positions are a fixed table over (t, h, w), counted through."""

    def build(self, c: Any) -> None:
        self.patch_embed = self.embedding(c)
        slots, *grid = self.patch_embed.grid
        self.num_patches, self.slot = math.prod(self.patch_embed.grid), math.prod(grid)
        self.blocks = [block_of(c.dim, c.heads, c.mlp_ratio) for _ in range(c.depth)]
        self.norm = nn.LayerNorm(c.dim)
        self.counts, left = [], self.num_patches
        for rate in c.rates:
            left = max(self.slot, math.ceil(rate * left))
            self.counts.append(left)

    def embed(self, clips: Tensor | Array) -> Tensor:
        x, key, S = self.patch_embed(clips), self.patch_embed.grid[0] // 2, self.slot
        x = ops.concat(x[:, key * S:(key + 1) * S], x[:, :key * S], x[:, (key + 1) * S:], axis=1)
        return x + positions_on(array_module(x.data), self.patch_embed.grid, x.shape[2], x.dtype.name)

    def start(self, clips: Tensor | Array, trace: bool = False,  # type: ignore[override]
              paths: Array | None = None, **fields: Any) -> KeyTokens:
        """The KeyTokens before the first block."""
        extra = 0 if self.config.rule == "global" else self.slot
        return KeyTokens(self.embed(clips), extra, attention=[] if trace else None, paths=paths, **fields)

    def run_block(self, i: int, tokens: KeyTokens) -> None:  # type: ignore[override]
        """Block i, where it is one of them with the pruning between its two branches."""
        stage = self.config.prune_in.index(i) if i in self.config.prune_in else None
        if stage is None or self.counts[stage] == ([self.num_patches] + self.counts)[stage]:
            super().run_block(i, tokens)
        else:
            block, paths, weights = self.blocks[i], nn.column(tokens.paths, i), []  # type: Any, Any, Any
            out = block.attn(block.norm1(tokens.x), keep=tokens.keep, attention=weights)
            tokens.x = tokens.x + nn.scaled(out, nn.column(paths, 0))
            if tokens.attention is not None:
                tokens.attention += weights
            self.prune(stage, tokens, weights[0].data)
            tokens.x = block.second(tokens.x, nn.column(paths, 1))
        if stage is not None:
            tokens.kept.append(self.left(tokens))

    def prune(self, stage: int, tokens: KeyTokens, weights: Array) -> None:
        """Go on with counts[stage] tokens. weights (B, H, T, T): of the block's attention."""
        xp, extra = array_module(weights), tokens.extra
        keep: Any = tokens.keep
        scores = self.scores(stage, tokens, weights)
        tokens.scores.append(scores)
        if keep is not None:
            scores = xp.where(keep[:, extra:] > 0.5, scores, -math.inf)
        places = ops.top_k(scores, self.counts[stage] - extra)
        falling = xp.argsort(-xp.take_along_axis(scores, places, axis=1), axis=1, kind="stable")
        tokens.rank = xp.argsort(falling, axis=1)
        if tokens.hide:
            ones = xp.ones((*places.shape, 1), weights.dtype)
            there = ops.put_tokens(ones, places, length=scores.shape[1]).data[:, :, 0]
            tokens.keep = xp.concatenate([xp.ones((len(there), extra), there.dtype), there], axis=1)
        else:
            tokens.take(places)

    def places(self, tokens: KeyTokens) -> Array:
        """(B, T): where each token stands among all, those of the key slot first."""
        xp, extra, index = array_module(tokens.x.data), tokens.extra, tokens.index
        first = xp.broadcast_to(xp.arange(extra), (len(index), extra))
        return xp.concatenate([first, index + extra], axis=1)

    def left(self, tokens: KeyTokens) -> Array:
        """(B, k): which tokens of the clip are left, counted through time and space, ascending."""
        xp, places, S = array_module(tokens.x.data), self.places(tokens), self.slot
        if tokens.keep is not None:
            count = self.counts[len(tokens.kept)]
            places = xp.take_along_axis(places, ops.top_k(tokens.keep, count), axis=1)
        key = self.patch_embed.grid[0] // 2
        in_clip = xp.where(places < S, places + key * S, xp.where(places < (key + 1) * S, places - S, places))
        return xp.sort(in_clip, axis=1)


@functools.lru_cache(maxsize=64)
def positions_on(xp: Any, grid: tuple[int, ...], dim: int, dtype: str) -> Array:
    """The fixed positions (N, dim) of a clip's tokens, the key slot's first, as an array of the module xp."""
    table, slot, key = nn.sinusoids(math.prod(grid), dim), math.prod(grid[1:]), grid[0] // 2
    order = np.r_[key * slot:(key + 1) * slot, :key * slot, (key + 1) * slot:len(table)]
    return xp.asarray(table[order].astype(dtype))
