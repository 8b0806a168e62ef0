"""A ViT for clips that keeps the tokens of one time slot, the key frame's, and between attention and MLP of
some blocks drops those of the others that are attended to least: the encoder of EVAD (Chen et al. 2023, arXiv
2304.08451, section 3.2). Three other rules drop as many, to compare with.

Names of parameters are the official ones.
"""
import dataclasses
import functools
import math
import zlib
from typing import Any

import numpy as np

from .. import nn, ops, random
from ..backend import Array, array_module, to_numpy
from ..tensor import Tensor
from .base import is_number, is_whole
from .column import PlainConfig
from .videovit import ClipModel, ClipSizes
from .vit import Tokens, ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyFrameConfig(PlainConfig, ClipSizes):
    """prune_in: the blocks in which tokens are dropped, and none is in the others. keep_rates: the share of
    the tokens that are there, those of the key slot among them, that goes on; one number, or one for each of
    these blocks. key_weight: how much the attention of the key slot's tokens counts, that of others being 1.

    rule: which tokens go on, beside those of the key slot. "key": those that are attended to most. "random":
    any. "frames": those of whole slots, evenly spread in time. "global": of all tokens those that are
    attended to most; those of the key slot may be dropped, too."""
    prune_in: tuple[int, ...] = (1, 3)
    keep_rates: float | tuple[float, ...] = 0.7
    key_weight: float = 1.0
    rule: str = "key"
    choices = {"rule": ("key", "random", "frames", "global")}

    def __post_init__(self):
        super().__post_init__()
        blocks, depth = self.prune_in, self.depth
        self.check(isinstance(blocks, tuple) and all(map(is_whole, blocks))
                   and list(blocks) == sorted(set(blocks)) and all(0 <= i < depth for i in blocks),
                   f"prune_in {blocks!r}, expected rising numbers of blocks, from 0 to {depth - 1}")
        self.check(len(self.rates) == len(blocks) and all(is_number(r) and 0 < r <= 1 for r in self.rates),
                   f"keep_rates {self.keep_rates!r}, expected 0 < rate <= 1, one number, or one for each of "
                   f"{len(blocks)} blocks")
        self.check(is_number(self.key_weight) and 0 < self.key_weight < math.inf,
                   f"key_weight {self.key_weight!r}, expected a positive number")

    @property
    def rates(self) -> tuple[float, ...]:
        """One for each block of prune_in."""
        rates = self.keep_rates
        return rates if isinstance(rates, tuple) else (rates,) * len(self.prune_in)


@dataclasses.dataclass
class KeyTokens(Tokens):
    """Tokens of the key slot stand first; where the rule keeps them, they are the `extra` ones. noise, hide:
    of the call. scores: of each pruning (B, n), of the tokens that may be dropped. kept: after each, which
    tokens of the clip are left (B, k). rank (B, n): which one each of them was at the last pruning, that of
    the highest score being 0."""
    noise: Any = None
    hide: bool = False
    scores: list[Array] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)
    rank: Array | None = None


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


class KeyFrameViT(ClipModel, ViT):
    """The encoder. Positions are a fixed table over (t, h, w), counted through."""
    config: Any

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

    def start(self, clips: Tensor | Array, trace: bool = False, paths: Array | None = None,  # type: ignore[override]
              **fields: Any) -> KeyTokens:
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
        xp, extra, keep = array_module(weights), tokens.extra, tokens.keep
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

    def scores(self, stage: int, tokens: KeyTokens, weights: Array) -> Array:
        """(B, n): those of the tokens that may be dropped; the highest stay."""
        xp, c, extra = array_module(weights), self.config, tokens.extra
        if c.rule == "random":
            return xp.take_along_axis(self.drawn(stage, tokens), tokens.index, axis=1)
        if c.rule == "frames":
            order = xp.asarray(spread_out(self.patch_embed.grid), weights.dtype)
            return -order[tokens.index]
        by_key = xp.arange(weights.shape[2])[None] < self.slot if extra else tokens.index < self.slot
        reads = xp.where(by_key, c.key_weight, 1.0).astype(weights.dtype)
        if tokens.keep is not None:
            reads = reads * tokens.keep
        mean = (reads[:, None, None] @ weights)[:, :, 0].mean(axis=1)
        return mean[:, extra:] / (weights.shape[2] if tokens.keep is None
                                  else tokens.keep.sum(axis=1, keepdims=True))

    def drawn(self, stage: int, tokens: KeyTokens) -> Array:
        """(B, N - S): draws of the rule "random"; without noise they are a function of the batch."""
        if tokens.noise is not None:
            return tokens.noise[:, stage]
        shape, xp = (len(tokens.x), self.num_patches - self.slot), array_module(tokens.x.data)
        checksum = zlib.crc32(to_numpy(self.embedded(tokens)).tobytes())
        return random.uniform(shape, site=f"key_frame.{stage}", step=checksum, seed=0, xp=xp)

    def embedded(self, tokens: KeyTokens) -> Array:
        """What a draw may depend on, hidden or dropped alike: the tokens of the key slot."""
        return tokens.x.data[:, :self.slot]

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        if self.config.rule != "random" or not self.counts:
            return {}
        draws = [random.uniform((size, self.num_patches - self.slot), site=f"key_frame.{stage}", step=step,
                                seed=seed, xp=xp) for stage in range(len(self.counts))]
        return {"noise": xp.stack(draws, axis=1)}

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


@functools.lru_cache(maxsize=64)
def spread_out(grid: tuple[int, ...]) -> np.ndarray:
    """(N - S,): the order in which "frames" takes the tokens of the other slots: slot by slot, each as far as
    possible from those that are there, of equally far ones the later; in a slot evenly over the picture."""
    slots, slot, key = grid[0], math.prod(grid[1:]), grid[0] // 2
    there, left, rank = [key], [i for i in range(slots) if i != key], {}
    while left:
        chosen = max(left, key=lambda i: (min(abs(i - other) for other in there), i))
        rank[chosen] = len(rank)
        there.append(chosen)
        left.remove(chosen)
    inside = np.argsort(np.argsort(np.arange(slot) * ((5 ** 0.5 - 1) / 2) % 1))
    return np.concatenate([rank[i] * slot + inside for i in range(slots) if i != key] or [inside[:0]])
