"""Which tokens of a clip go on around a key frame: the options, the state, and the rules, that of EVAD (Chen
et al. 2023, arXiv 2304.08451, section 3.2) and three to compare with, which drop as many.
"""
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import random
from ..backend import Array, array_module
from .base import is_number, is_whole
from .column import PlainConfig
from .videovit import ClipSizes
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


class KeyRules(ViT):
    """The rules, of a model with `slot` tokens in each of its slots that goes on with `counts` tokens."""
    config: Any
    slot: int
    counts: list[int]

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
        """(B, N - S): draws of the rule "random"; without noise they are a function of the
        tokens of the key slot, which are there, hidden or dropped the others."""
        if tokens.noise is not None:
            return tokens.noise[:, stage]
        shape = (len(tokens.x), self.num_patches - self.slot)
        return random.uniform_of(tokens.x.data[:, :self.slot], shape, site=f"key_frame.{stage}")

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        if self.config.rule != "random" or not self.counts:
            return {}
        draws = [random.uniform((size, self.num_patches - self.slot), site=f"key_frame.{stage}", step=step,
                                seed=seed, xp=xp) for stage in range(len(self.counts))]
        return {"noise": xp.stack(draws, axis=1)}


@functools.lru_cache(maxsize=64)
def spread_out(grid: tuple[int, ...]) -> np.ndarray:
    """(N - S,): the order in which "frames" takes the tokens of the other slots: slot by slot, each as far as
    possible from those that are there, of equally far ones the later; in a slot evenly over the picture."""
    slots, slot, key = grid[0], math.prod(grid[1:]), grid[0] // 2
    there, left = [key], [i for i in range(slots) if i != key]
    rank: dict[int, int] = {}
    while left:
        chosen = max(left, key=lambda i: (min(abs(i - other) for other in there), i))
        rank[chosen] = len(rank)
        there.append(chosen)
        left.remove(chosen)
    inside = np.argsort(np.argsort(np.arange(slot) * ((5 ** 0.5 - 1) / 2) % 1))
    return np.concatenate([rank[i] * slot + inside for i in range(slots) if i != key] or [inside[:0]])
