"""Dynamic spatial sparsification (Rao et al. 2022, arXiv 2207.01580): pyramids that decide about positions.

No position is ever removed: mixing between positions stays dense, so that every map keeps its shape. What
works on each position alone is split: the important ones take the block's MLP, the slow path, the others one
linear layer, the fast path. At the end of the stage the map is whole, for what follows or for dense
prediction.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .base import Loss, Output
from .dynamicvit import DynamicOutput
from .pruning import Deciding, check_stages, mask_at, mask_of, places_of
from .stages import Map, Pair, Stages, StagesConfig, StagesOutput


def chosen(keep: Any, slow: Tensor, fast: Tensor) -> Tensor:
    """keep slow + (1 - keep) fast. keep (B, N, 1), the others (B, N, C)."""
    return keep * slow + (1 - keep) * fast


class AdaptiveBlock(nn.Module):
    """What a block with two paths adds to a plain one. It has the parts mix(x, grid, paths), between the
    positions, and `slow` and `fast`, of each position; from_mixed says whether these two are added to what
    mix gives, or to what it was given. The last two of its `branches` are theirs."""
    mix: Callable[..., Tensor]
    slow: Callable[[Tensor], Tensor]
    fast: Callable[[Tensor], Tensor]
    from_mixed = False
    branches = 2

    def streams(self, slow: Tensor, fast: Tensor, keep: Any, grid: Pair, paths: Array | None) -> Any:
        """In training: both streams (B, N, C) -> the same. keep (B, N, 1) says where the slow one is the map.

        Each path runs on all positions; where it is not chosen, on what its stream had there before. So a
        decision has a gradient at every position."""
        mixed = self.mix(chosen(keep, slow, fast), grid, paths)
        added = (self.slow(chosen(keep, mixed, slow)), self.fast(chosen(keep, fast, mixed)))
        onto = (mixed, mixed) if self.from_mixed else (slow, fast)
        return [x + nn.scaled(out, nn.column(paths, self.branches - 2 + i))
                for i, (x, out) in enumerate(zip(onto, added))]

    def gathered(self, x: Tensor, places: Array, others: Array, grid: Pair) -> Tensor:
        """At inference: the positions `places` (B, k) take the slow path, `others` the fast one."""
        mixed = self.mix(x, grid, None)
        added = ops.concat(self.slow(ops.take_tokens(mixed, places)),
                           self.fast(ops.take_tokens(mixed, others)), axis=1)
        xp = array_module(places)
        # every position is in one of the two, so each has its row among what was added
        rows = xp.argsort(xp.concatenate([places, others], axis=1), axis=1)
        return (mixed if self.from_mixed else x) + ops.take_tokens(added, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicStagesConfig(StagesConfig):
    """prune_before: the blocks, of the last stage but one, before which it is decided which positions take
    the slow path. keep_ratios: their share. The defaults are the official ones, rho, rho - 0.2 and rho - 0.4
    with rho = 0.7: 0.7 - 0.2 is a little less than 0.5, so that of 196 positions 97 are kept. stale: the two
    streams of training go through all decisions, as in the official code; False: at each decision both begin
    anew from the map, so that training is inference, whatever is decided."""
    prune_before: tuple[int, ...] = (1, 2, 3)
    keep_ratios: tuple[float, ...] = (0.7, 0.7 - 0.2, 0.7 - 0.4)
    stale: bool = True

    def __post_init__(self, *sizes: int) -> None:
        super().__post_init__(*sizes)
        self.check(len(self.depths) > 1, "1 stage, expected at least 2: it is decided in the last but one")
        check_stages(self, self.depths[-2], self.widths[-2], falling=False)


@dataclasses.dataclass
class DynamicStagesOutput(DynamicOutput, StagesOutput):
    """kept[s] (B, k): the positions that take the slow path from the s-th decision on, in eval mode.
    decisions[s] (B, N): the same in train mode. Each decision is about all positions: none is multiplied by
    an earlier one. keep: ones, for every position of the last map counts in the loss."""


@dataclasses.dataclass
class Streams(Map):
    """noise, hard, forced: arguments of the call (forced: `keep`). decisions, kept: those made so far."""
    noise: list[Array] | None = None
    hard: bool = True
    forced: list[Any] | None = None
    decisions: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)


class DynamicStages(Deciding, Stages):
    """A pyramid that decides, in its last stage but one, which positions take the slow path.

    In training both paths run everywhere, in two streams, and a mask chooses between them (Gumbel-softmax,
    straight-through); at inference each position takes one path. Where a later decision turns a position
    round, training goes on with what the other stream had there, inference with what the map had: so with
    decisions that differ the two differ, in the official code, too; not with stale=False. images ->
    DynamicStagesOutput."""
    loss_weights = (1, 10, 0.5, 0.5)  # of class, ratio, kl, token

    @property
    def predictors(self) -> list[Any]:
        """One for each decision."""
        raise NotImplementedError

    def is_adaptive(self, s: int, i: int) -> bool:
        """Whether block i of stage s has two paths."""
        return s == len(self.config.depths) - 2 and i >= self.config.prune_before[0]

    def start_deciding(self) -> None:
        """The last part of `build`."""
        rows, columns = self.grids[-2]
        self.decide_by(self.predictors, list(self.config.keep_ratios), rows * columns)

    def forward(self, images: Tensor | Array, noise: Any = None, hard: bool = True, keep: list | None = None,
                trace: bool = False, paths: Array | None = None) -> DynamicStagesOutput:
        """keep: per decision, a mask (B, N) that replaces it; in eval mode with as many ones in every image.

        Only in train mode: noise, Gumbel draws that are added to the log-probabilities, (B, N, 2) per
        decision or (B, S, N, 2) for all; None draws them. hard=False: decisions stay soft. paths, trace: as
        in Stages."""
        draws = self.draws_of(noise, hard, keep, paths)
        state = self.encode(Streams(self.embed(images), self.grids[0], paths, noise=draws, hard=hard,
                                    forced=keep))
        logits, tokens = self.read(state.x)
        ones = Tensor(array_module(tokens.data).ones(tokens.shape[:2], tokens.dtype))
        return DynamicStagesOutput(logits, tokens, maps=state.maps, kept=state.kept,
                                   decisions=state.decisions, keep=ones)

    def run_stage(self, s: int, blocks: list[Any], state: Streams, paths: Array | None) -> None:
        first = self.prune_before[0]
        if s != len(self.stages) - 2:
            super().run_stage(s, blocks, state, paths)
            return
        super().run_stage(s, blocks[:first], state, paths)
        (self.run_streams if self.training else self.run_gathered)(blocks, state, paths)

    def run_streams(self, blocks: list[Any], state: Streams, paths: Array | None) -> None:
        """The blocks with two paths, in training."""
        slow, fast, keep = state.x, state.x, None
        for i in range(self.prune_before[0], len(blocks)):
            if i in self.prune_before:
                if state.decisions:
                    state.x = chosen(keep, slow, fast)  # by the decision before: this is what is judged
                    slow, fast = (slow, fast) if self.config.stale else (state.x, state.x)
                state.decisions.append(self.decide(self.prune_before.index(i), state))
                keep = state.decisions[-1].reshape(*state.x.shape[:2], 1)
            slow, fast = blocks[i].streams(slow, fast, keep, state.grid, nn.column(paths, i))
        state.x = chosen(keep, slow, fast)

    def decide(self, stage: int, state: Streams) -> Tensor:
        """The decisions (B, N) of one stage, in training."""
        if state.forced is not None:
            return mask_of(state.forced[stage], state.x, self.num_patches)
        draw = (self.draw(stage, len(state.x), xp=array_module(state.x.data)) if state.noise is None
                else state.noise[stage])
        return ops.gumbel_softmax(self.predictors[stage](state.x), draw, hard=state.hard)[:, :, 0]

    def run_gathered(self, blocks: list[Any], state: Streams, paths: Array | None) -> None:
        """The blocks with two paths, at inference."""
        for i in range(self.prune_before[0], len(blocks)):
            if i in self.prune_before:
                places = self.choose(self.prune_before.index(i), state)
                state.kept.append(places)
                rest = 1 - mask_at(places, state.x, self.num_patches).data
                others = ops.top_k(rest, self.num_patches - places.shape[1])
            state.x = blocks[i].gathered(state.x, places, others, state.grid)

    def choose(self, stage: int, state: Streams) -> Array:
        """The positions (B, k) with the highest scores, or those that are forced, ascending."""
        if state.forced is not None:
            return places_of(mask_of(state.forced[stage], state.x, self.num_patches).data)
        return ops.top_k(self.predictors[stage](state.x)[:, :, 0], self.counts[stage])

    def loss(self, out: Any, targets: Array, teacher: Any = None, **options: Any) -> Loss:
        """DynamicViT's four losses; "token" is the mean squared difference of the last maps, all positions. A
        teacher whose last map has another shape leaves it out."""
        if teacher is not None and getattr(teacher.tokens, "shape", None) != out.tokens.shape:
            teacher = Output(teacher.logits)
        return super().loss(out, targets, teacher, **options)

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        return [(title, self.by_patch(mask, len(self.stages) - 2)) for title, mask in super().show(out)]
