"""Tokens that stop on their way through a ViT's blocks and wait in their places: what DoViT and VLTP do in
training, where a mask hides them, and at inference, where they are not computed.
"""
import dataclasses
import functools
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module, to_numpy
from ..tensor import Tensor
from .pixels import squares
from .pruning import mask_of
from .vit import Tokens, ViT


@dataclasses.dataclass
class WaitingTokens(Tokens):
    """x (B, T, D): always all tokens. keep (B, T): those that go on, None: all. forced, bucket: of the call.
    kept[s] (B, N): whether a patch goes on after stop s."""
    forced: list[Any] | None = None
    bucket: int = 1
    kept: list[Array] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class PassingTokens(WaitingTokens):
    """tau: of the call. going: whether a patch goes on by its confidence. The lists: as in DoViTOutput."""
    tau: Any = ()
    going: Any = None
    aux: list[Tensor] = dataclasses.field(default_factory=list)
    confidence: list[Array] = dataclasses.field(default_factory=list)


class Waiting(ViT):
    """A ViT of which, before the blocks `stops`, `decide` says which tokens go on: tokens.keep."""
    stops: tuple[int, ...]

    def before_block(self, i: int, tokens: WaitingTokens) -> None:  # type: ignore[override]
        if i in self.stops:
            self.decide(self.stops.index(i), tokens)

    def decide(self, stop: int, tokens: Any) -> None:
        """Set tokens.keep, and whatever else changes at this stop."""
        raise NotImplementedError

    def run_block(self, i: int, tokens: WaitingTokens) -> None:  # type: ignore[override]
        before, keep = tokens.x, tokens.keep
        tokens.x = self.blocks[i](before, nn.column(tokens.paths, i), keep=keep, sees_itself=keep is None,
                                  attention=tokens.attention)
        if keep is not None:
            tokens.x = tokens.x * keep[:, :, None] + before * (1 - keep)[:, :, None]

    def encode_kept(self, tokens: WaitingTokens) -> Any:
        """Run the Tokens through all blocks, of which only what goes on is computed."""
        number, starts = len(tokens.x), sorted({0, *self.stops})
        for start, stop in zip(starts, (*starts[1:], len(self.blocks))):
            self.before_block(start, tokens)
            keep: Any = tokens.keep
            done, order = [], []
            for rows, places, there in self.groups(tokens):
                x = part = tokens.x if len(rows) == number else ops.index(tokens.x, key=rows)
                part = part if places is None else ops.take_tokens(x, places)
                for i in range(start, stop):
                    part = self.blocks[i](part, keep=there, sees_itself=there is None)
                if places is not None:
                    part = part if there is None else part * there[:, :, None]
                    waits = 1 - keep[rows][:, :, None]
                    part = x * waits + ops.put_tokens(part, places, length=x.shape[1])
                done.append(part)
                order.append(rows)
            tokens.x = done[0] if len(done) == 1 else ops.concat(*done, axis=0)[
                np.argsort(np.concatenate(order), kind="stable")]
        return tokens

    def groups(self, tokens: WaitingTokens) -> Any:
        """Pictures that go on with about as many tokens: (rows, places (b, n) of the tokens that are
        computed, which of them go on (b, n)), the last two None where all are."""
        every = np.arange(len(tokens.x))
        if tokens.keep is None:
            return [(every, None, None)]
        keep: Any = tokens.keep
        xp, groups = array_module(keep), []
        counts, total = to_numpy(keep.sum(axis=1)).astype(int), tokens.x.shape[1]
        sizes = np.minimum(-(-counts // tokens.bucket) * tokens.bucket, total)
        for size in np.unique(sizes):
            rows = every[sizes == size]
            places = ops.top_k(keep[rows], int(size))
            there = xp.take_along_axis(keep[rows], places, axis=1)
            groups.append((rows, places, None if (counts[rows] == size).all() else there))
        return groups


class Passing(Waiting):
    """A ViT whose patches stop before the blocks `exits` where a head of `auxiliary_head` is sure."""
    auxiliary_head: list[Any]

    def decide(self, exit: int, tokens: PassingTokens) -> None:
        """Which patches go on; the class token takes in what waits."""
        xp, c, patches = array_module(tokens.x.data), self.config, tokens.patches
        (rows, columns), p = self.patch_embed.grid, c.patch_size
        tokens.aux.append(squares(self.auxiliary_head[exit](patches), (rows, columns), (p, p)))
        # class by class: NumPy's max over a short last axis takes ten times as long
        classes = xp.moveaxis(ops.softmax(tokens.aux[-1].data).data, 3, 0)
        sure = functools.reduce(xp.maximum, classes).reshape(-1, rows, p, columns, p)
        tokens.confidence.append(sure.mean(axis=(2, 4)).reshape(len(sure), -1))
        on = (tokens.confidence[-1] <= tokens.tau[exit] if tokens.forced is None
              else mask_of(tokens.forced[exit], tokens.x, self.num_patches, "DoViT").data > 0.5)
        tokens.going = on if tokens.going is None else on & tokens.going
        kept = tokens.going
        if c.official:  # as many in each picture; of the others the first ones
            count = kept.sum(axis=1).mean().astype("int64")
            order = xp.argsort(xp.argsort(~kept, axis=1, kind="stable"), axis=1)
            kept = order < count
        tokens.kept.append(kept)
        waiting = (~kept).astype(tokens.x.dtype)
        count = waiting.sum(axis=1, keepdims=True)
        half = (count / (self.num_patches + 1) > c.aggregate) * waiting / xp.maximum(count, 1) / 2
        first = tokens.x[:, :1] * (1 - half.sum(axis=1)[:, None, None])
        first = first + ops.matmul(half[:, None].astype(tokens.x.dtype), patches)
        tokens.x = ops.concat(first, patches, axis=1)
        tokens.keep = xp.concatenate([xp.ones((len(kept), 1), tokens.x.dtype), 1 - waiting], axis=1)
