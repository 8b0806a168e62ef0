"""STViT-R (Chang et al. 2023, arXiv 2303.08685): a Swin in which most blocks of one stage work on a few
semantic tokens, and the map is recovered from them. Names of parameters are the official ones; halving begins
a stage, as in timm's Swin.

The stage is made of dumbbells. A dumbbell is a block on the map; two that make semantic tokens (`stvit`);
some on these alone; and one in which the map reads them.
"""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..tensor import Tensor
from .base import is_number, is_whole, model
from .maps import as_tokens
from .stages import Map, Pair, Stage, StagesOutput
from .stvit import Generation, SemanticBlock
from .swin import EPS, Swin, SwinBlock, SwinConfig


@dataclasses.dataclass(frozen=True)
class STViTRConfig(SwinConfig):
    """semantic_stage: the stage with semantic tokens; None: the last but one. dumbbell: the blocks of a
    dumbbell; None: 6, as published, where they divide the stage's blocks, else all of these.

    seeds: the semantic tokens on each side of a window. reach: the sides of the window of the map that they
    read. None: 3 and 10 for windows of 7, as published, and in proportion.

    use_global: learned weights are added to the semantic tokens of the first dumbbell (the official
    configuration has them off). relative_pos: blocks on semantic tokens have a bias for each distance.
    shortcut, layer_scale: as of STViT. patch_size: a power of 2, for the patches are made by convolutions of
    stride 2."""
    _: dataclasses.KW_ONLY
    semantic_stage: int | None = None
    dumbbell: int | None = None
    seeds: int | None = None
    reach: int | None = None
    shortcut: bool = False
    use_global: bool = True
    relative_pos: bool = False
    layer_scale: float = 1

    def __post_init__(self, *sizes: int) -> None:
        super().__post_init__(*sizes)
        stages, patch = len(self.depths or ()), self.patch_size
        self.check(patch > 1 and not patch & patch - 1, f"patch_size {patch}, expected 2, 4, 8 or so")
        self.check((self.embed_dim or 0) * 2 % patch == 0,
                   f"embed_dim {self.embed_dim}, expected a multiple of {patch // 2} for patches of {patch} "
                   f"pixels")
        self.check(is_number(self.layer_scale) and math.isfinite(self.layer_scale),
                   f"layer_scale {self.layer_scale!r}, expected a number")
        stage: Any = max(0, stages - 2) if self.semantic_stage is None else self.semantic_stage
        self.check(is_whole(stage) and 0 <= stage < stages,
                   f"semantic_stage {stage!r}, expected a whole number from 0 to {stages - 1}")
        depth = self.depths[stage]  # type: ignore[index]
        default = {"dumbbell": depth if depth % 6 else 6, "seeds": max(1, round(self.window_size * 3 / 7)),
                   "reach": self.window_size * 10 // 7, "semantic_stage": stage}
        for name, value in default.items():
            if getattr(self, name) is None:
                self.settle(name, value)
            one: Any = getattr(self, name)
            self.check(is_whole(one) and one >= (name != "semantic_stage"),
                       f"{name} {one!r}, expected a positive whole number")
        self.check(self.dumbbell >= 4 and depth % self.dumbbell == 0,  # type: ignore[operator]
                   f"dumbbell {self.dumbbell} of {depth} blocks in stage {stage}, expected at least 4, "
                   f"dividing them")
        self.check(self.seeds <= self.window_size <= self.reach,  # type: ignore[operator]
                   f"seeds {self.seeds}, reach {self.reach}: expected seeds <= window_size "
                   f"{self.window_size} <= reach")
        sides = [side // patch >> stage for side in nn.both_sides(self.image_size)]
        self.check(not any(side % min(side, self.window_size) for side in sides),
                   f"window_size {self.window_size}, expected one that divides the map of stage {stage}, "
                   f"{sides[0]} x {sides[1]}")


class PlacedBlock(SemanticBlock):
    """A block on semantic tokens alone, in each window of their grid, or in all of it as one window.

    relative_pos: whether there is a bias for each distance. x (B, M, dim) -> the same; paths (B, 2)."""

    def __init__(self, dim: int, heads: int, *sizes: Any, grid: Pair, window: Pair,
                 relative_pos: bool) -> None:
        super().__init__(dim, heads, *sizes)
        self.cut = dict(grid=grid, window=window)
        if relative_pos:
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            attn: Any = self.attn
            attn.relative_position_bias_table = nn.Parameter(nn.zeros(rows, heads))

    def forward(self, x: Tensor, paths: Array | None = None) -> Tensor:  # type: ignore[override]
        tokens = ops.cut_windows(self.norm1(x), **self.cut)
        q, k, v = self.attn.project(tokens, tokens)
        table = getattr(self.attn, "relative_position_bias_table", None)
        if table is None:
            read = ops.attention(q, k, v)
        else:
            bias = ops.relative_bias(table, window=self.cut["window"])
            read = ops.window_attention(q, k, v, bias, **self.cut)
        read = ops.join_windows(self.attn.proj(ops.merge_heads(read)), **self.cut) * self.layer_scale_1
        return self.second(x + nn.scaled(read, nn.column(paths, 0)), paths)


class ConvBN(nn.Module):
    """A 3 x 3 convolution of stride 2, then batch norm. x (B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, channels: int, dim: int) -> None:
        self.c, self.bn = nn.Conv2d(channels, dim, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Hardswish(nn.Module):
    """x min(max(x + 3, 0), 6) / 6 (Howard et al. 2019, arXiv 1905.02244, section 5.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (ops.relu(x + 3) - ops.relu(x - 3)) * (1 / 6)


class ConvPatches(nn.Module):
    """Patches by convolutions of stride 2, each with batch norm and hardswish. images (B, C, H, W) -> (B, N,
    dim)."""

    def __init__(self, c: Any) -> None:
        self.config, halvings = c, c.patch_size.bit_length() - 1
        widths = [c.channels, *(c.embed_dim >> i for i in reversed(range(halvings)))]
        self.proj: list[Any] = [layer for sizes in zip(widths, widths[1:])
                                for layer in (ConvBN(*sizes), Hardswish())]

    def forward(self, images: Tensor | Array) -> Tensor:
        c = self.config
        x: Any = nn.checked_images(images, c.image_size, c.channels, self.proj[0].c.weight.dtype)
        for layer in self.proj:
            x = layer(x)
        return as_tokens(x)


@dataclasses.dataclass
class STViTROutput(StagesOutput):
    """semantic[d] (B, M, C): the tokens of dumbbell d, as its last block on them left them. attention[d],
    with trace=True: what they read when they were made, (B, H, M, M + N): the weights of the second of the
    two blocks, whose keys are the tokens themselves and then the map."""
    semantic: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SemanticMap(Map):
    """attention, semantic: as of STViTROutput; None: no weights are kept."""
    attention: list[Tensor] | None = None
    semantic: list[Tensor] = dataclasses.field(default_factory=list)


@model("stvitr")
class STViTR(Swin):
    """images (B, channels, H, W) -> STViTROutput.

    Its batch norms make what train mode computes for an image depend on the others: see nn.BatchNorm2d."""
    Config = STViTRConfig

    def build(self, c: Any) -> None:
        super().build(c)
        if c.use_global:
            semantic, name = self.layers[c.semantic_stage], f"layers.{c.semantic_stage}.semantic_token2"
            tokens = math.prod(semantic.blocks[1].semantic_grid)
            semantic.semantic_token2 = nn.Parameter(nn.zeros(1, tokens, c.widths[c.semantic_stage]))
            nn.normal(semantic.semantic_token2, name, std=0.02)

    def embedding(self, c: Any) -> nn.Module:
        return ConvPatches(c)

    def stage(self, c: Any, s: int) -> Stage:
        stage = super().stage(c, s)
        if s == c.semantic_stage:
            stage.blocks = [self.in_dumbbell(c, s, i % c.dumbbell) for i in range(c.depths[s])]
        return stage

    def in_dumbbell(self, c: Any, s: int, place: int) -> Any:
        """A new block at this place of a dumbbell. Those on semantic tokens see the tokens of a window and
        all tokens, in turn."""
        grid, dim, heads = self.grids[s], c.widths[s], c.heads[s]
        window, reach = (tuple(min(side, size) for side in grid) for size in (c.window_size, c.reach))
        if place == 0:
            return SwinBlock(dim, heads, window, (0, 0), c.mlp_ratio, c.qkv_bias)
        sizes = dim, heads, c.mlp_ratio, c.qkv_bias, EPS, c.layer_scale
        seeds = tuple(min(side, c.seeds) for side in window)
        if place == 1:
            return Generation(*sizes, grid=grid, window=window, seeds=seeds, reach=reach, shortcut=c.shortcut)
        if place in (2, c.dumbbell - 1):
            return SemanticBlock(*sizes)
        whole = tuple(n * side for n, side in zip(ops.windows_in(grid, window), seeds))
        return PlacedBlock(*sizes, grid=whole, window=seeds if place % 2 else whole,
                           relative_pos=c.relative_pos)

    def forward(self, images: Tensor | Array, trace: bool = False,
                paths: Array | None = None) -> STViTROutput:
        """trace: keep what the semantic tokens read. paths: as in Stages."""
        state = self.encode(SemanticMap(self.embed(images), self.grids[0], paths,
                                        attention=[] if trace else None))
        logits, tokens = self.read(state.x)
        return STViTROutput(logits, tokens, state.attention or [], state.maps, state.semantic)

    def run_stage(self, s: int, blocks: list[Any], state: SemanticMap, paths: Array | None) -> None:
        c = self.config
        if s != c.semantic_stage:
            super().run_stage(s, blocks, state, paths)
            return
        for first in range(0, len(blocks), c.dumbbell):
            added = getattr(self.layers[s], "semantic_token2", None) if first == 0 else None
            self.run_dumbbell(blocks[first:first + c.dumbbell], added, state,
                              nn.column(paths, slice(first, None)))

    def run_dumbbell(self, blocks: list[Any], added: Tensor | None, state: SemanticMap,
                     paths: Array | None) -> None:
        """added (1, M, C): learned weights for the second generation's queries, or None."""
        full, generate, again, *between, recover = blocks
        x = full(state.x, state.grid, nn.column(paths, 0))
        tokens = generate(x, nn.column(paths, 1))
        tokens = again(tokens if added is None else tokens + added, ops.concat(tokens, x, axis=1),
                       nn.column(paths, 2), state.attention)
        for i, block in enumerate(between, 3):
            tokens = block(tokens, nn.column(paths, i))
        state.semantic.append(tokens)
        state.x = recover(x, tokens, nn.column(paths, len(blocks) - 1))

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        return [(f"STViTR: what its {A.shape[2]} tokens read, of 1 each",
                 self.by_patch(to_numpy(A.data[:, :, :, A.shape[2]:].mean(axis=1).sum(axis=1)),
                               self.config.semantic_stage)) for A in out.attention]
