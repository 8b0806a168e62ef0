"""Controls for DynamicConvNeXt: models with its two paths, the places of its decisions and its counts, that
do not look where the slow path goes.

RandomPaths: anywhere. FastPath: nowhere, so that every position takes the fast path from the first decision
on. Both are called as DynamicConvNeXt is, and tasks.Distil trains them; they have no ratio to learn:
weights=(1, 0, 0.5, 0.5).
"""
from typing import Any

from .. import ops, random
from ..backend import Array, array_module
from ..tensor import Tensor
from .adaptive import Streams
from .base import model
from .convnext import DynamicConvNeXt
from .pruning import mask_at, per_stage


@model("randompaths")
class RandomPaths(DynamicConvNeXt):
    """Positions for the slow path drawn evenly, anew for each picture and decision, in training as many as at
    inference. Without noise the draw is a function of the batch's pictures, so inference gives the same
    twice. Many positions change their path at a later decision: stale=False trains what inference does."""

    def build(self, c: Any) -> None:
        super().build(c)
        self.score_predictor = []

    def draws_of(self, noise: Any, *others: Any) -> list[Array] | None:
        """As of DynamicConvNeXt, but noise is taken in eval mode, too."""
        super().draws_of(noise if self.training else None, *others)
        return per_stage(noise)

    def decide(self, stage: int, state: Streams) -> Tensor:
        if state.forced is not None:
            return super().decide(stage, state)
        draws = (self.draw(stage, len(state.x), xp=array_module(state.x.data)) if state.noise is None
                 else state.noise[stage])
        places = ops.top_k(draws[:, :, 0], self.counts[stage])
        return mask_at(places, state.x, self.num_patches)

    def choose(self, stage: int, state: Streams) -> Array:
        if state.forced is not None:
            return super().choose(stage, state)
        if state.noise is not None:
            return ops.top_k(state.noise[stage][:, :, 0], self.counts[stage])
        drawn = random.uniform_of(state.x.data, (len(state.x), self.num_patches),
                                  site=f"random_paths.{stage}")
        return ops.top_k(drawn, self.counts[stage])


@model("fastpath")
class FastPath(RandomPaths):
    """No position on the slow path. keep_ratios have no effect."""

    def build(self, c: Any) -> None:
        super().build(c)
        self.counts = [0] * len(self.counts)
