"""STViT (Chang et al. 2023, arXiv 2303.08685, "Making Vision Transformers Efficient from A Token
Sparsification View"): after some blocks on all patches, a few semantic tokens read them, and the later blocks
work on these alone.

The two blocks that make the semantic tokens are those of STViT-R's official code, and so are the names of
their parameters; there is no official code of this model. What that code has beside the paper's equations:
tokens are also read by themselves (they are among the keys), and branches are scaled per channel.
"""
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..tensor import Tensor
from .base import Output, is_number, is_whole, model
from .column import PlainConfig
from .vit import Tokens, ViT

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class STViTConfig(PlainConfig):
    """semantic: the (rows, columns) of the semantic tokens; None: 4 x 4, or those of a smaller grid. base:
    how many of the `depth` blocks come before the two that make them; None: three eighths, as 3 of 8 or 4 of
    12.

    queries: what the semantic tokens start from. "pooled": each is the largest values in its part of the map.
    "learned": weights, the same for every picture. "both": from what is pooled, and the second block adds
    weights. shortcut: whether the first block adds what it reads to the pooled tokens (the paper's equation)
    or replaces them (the official default). layer_scale: the start of the gammas; published weights are
    trained from 1e-5, with which a short training leaves the branches at next to nothing."""
    _: dataclasses.KW_ONLY
    semantic: Pair | None = None
    base: int | None = None
    queries: str = "both"
    shortcut: bool = True
    layer_scale: float = 1
    qkv_bias: bool = True
    choices: ClassVar = {"queries": ("both", "pooled", "learned")}

    def __post_init__(self):
        super().__post_init__()
        grid = tuple(side // self.patch_size for side in nn.both_sides(self.image_size))
        if self.semantic is None:
            self.settle("semantic", tuple(min(4, side) for side in grid))
        self.check(isinstance(self.semantic, tuple) and len(self.semantic) == 2
                   and all(is_whole(n) and 0 < n <= most for n, most in zip(self.semantic, grid)),
                   f"semantic {self.semantic!r}, expected (rows, columns) from 1 x 1 to {grid[0]} x "
                   f"{grid[1]}")
        if self.base is None:
            self.settle("base", self.depth * 3 // 8)
        self.check(is_whole(self.base) and 0 <= self.base <= self.depth - 2,
                   f"base {self.base!r} of {self.depth} blocks, expected at least 0, and two blocks after "
                   f"them")
        self.check(is_number(self.layer_scale) and math.isfinite(self.layer_scale),
                   f"layer_scale {self.layer_scale!r}, expected a number")


class SemanticBlock(nn.Module):
    """x + gamma attention(norm x, to norm y), then x + gamma MLP(norm x). x (B, Tq, dim), y (B, Tk, dim),
    None for x itself; paths (B, 2): factors of the two branches. attention: as in nn.Attention.attend."""
    branches = 2

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, eps: float,
                 layer_scale: float) -> None:
        self.layer_scale_1 = nn.Parameter(nn.zeros(dim) + layer_scale)
        self.layer_scale_2 = nn.Parameter(nn.zeros(dim) + layer_scale)
        self.norm1, self.attn = nn.LayerNorm(dim, eps), nn.CrossAttention(dim, heads, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), nn.MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, y: Tensor | None = None, paths: Array | None = None,
                attention: list[Tensor] | None = None) -> Tensor:
        q = self.norm1(x)
        read = self.attn(q, q if y is None else self.norm1(y), attention=attention) * self.layer_scale_1
        return self.second(x + nn.scaled(read, nn.column(paths, 0)), paths)

    def second(self, x: Tensor, paths: Array | None) -> Tensor:
        """The second branch, that of the MLP, alone."""
        return x + nn.scaled(self.mlp(self.norm2(x)) * self.layer_scale_2, nn.column(paths, 1))


class Generation(SemanticBlock):
    """The first of the two blocks that make semantic tokens of a map. Each window of the map has `seeds` =
    (rows, columns) of them, which start as the largest values of their parts of the window, and read
    themselves and the positions within `reach` (h, w): windows that may be larger, and then overlap.

    x (B, N, dim), a map of the shape `grid` -> (B, M, dim), the rows and columns of all windows."""

    def __init__(self, *sizes: Any, grid: Pair, window: Pair, seeds: Pair, reach: Pair,
                 shortcut: bool) -> None:
        super().__init__(*sizes)
        self.grid, self.window, self.seeds, self.reach = grid, window, seeds, reach
        self.count, self.shortcut = ops.windows_in(grid, window), shortcut
        self.semantic_grid = (self.count[0] * seeds[0], self.count[1] * seeds[1])

    def forward(self, x: Tensor, paths: Array | None = None,  # type: ignore[override]
                attention: list[Tensor] | None = None, start: Tensor | None = None) -> Tensor:
        """start (B n, tokens of a window, dim): what the tokens start from instead."""
        if start is None:
            windows = ops.cut_windows(x, grid=self.grid, window=self.window)
            start = ops.max_in_windows(windows, window=self.window, parts=self.seeds)
        q = self.norm1(start)
        near = ops.cut_overlapping(self.norm1(x), grid=self.grid, window=self.reach, count=self.count)
        read = self.attn(q, ops.concat(q, near, axis=1), attention=attention) * self.layer_scale_1
        tokens = start + self.by_window(read, nn.column(paths, 0)) if self.shortcut else read
        return self.second(ops.join_windows(tokens, grid=self.semantic_grid, window=self.seeds), paths)

    def by_window(self, read: Tensor, factors: Array | None) -> Tensor:
        """read (B n, T, dim) times the factors (B,) of the pictures."""
        return nn.scaled(read, None if factors is None else factors.repeat(self.count[0] * self.count[1]))


@dataclasses.dataclass
class SemanticTokens(Tokens):
    """x (B, T, D): the patches, from the second generation on the semantic tokens. first (B, M, D): those of
    the first."""
    first: Tensor | None = None


@model("stvit")
class STViT(ViT):
    """A ViT whose later blocks work on semantic tokens, whose mean is classified. images (B, channels, H, W)
    -> Output.

    tokens: the semantic ones, (B, M, D). attention, with trace=True: of the `base` blocks (B, H, N, N), of
    the two that make the semantic tokens (B, H, M, M + N), whose keys are these themselves and then the
    patches, and of the others (B, H, M, M)."""
    Config = STViTConfig

    def build(self, c: Any) -> None:
        if c.queries != "pooled":
            self.semantic_token2 = nn.Parameter(nn.zeros(1, c.semantic[0] * c.semantic[1], c.dim))
            nn.normal(self.semantic_token2, "semantic_token2", std=0.02)
        super().build(c)

    def block(self, c: Any, i: int) -> Any:
        sizes = c.dim, c.heads, c.mlp_ratio, c.qkv_bias, c.eps
        if i < c.base:
            return nn.Block(*sizes)
        if i > c.base:
            return SemanticBlock(*sizes, c.layer_scale)
        grid = self.patch_embed.grid
        return Generation(*sizes, c.layer_scale, grid=grid, window=grid, seeds=c.semantic, reach=grid,
                          shortcut=c.shortcut)

    def start(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None) -> Any:
        return super().start(images, trace, paths, SemanticTokens)

    def run_block(self, i: int, tokens: SemanticTokens) -> None:
        c, block, paths = self.config, self.blocks[i], nn.column(tokens.paths, i)
        if i < c.base:
            super().run_block(i, tokens)
        elif i == c.base:
            tokens.first = block(tokens.x, paths, tokens.attention,
                                 start=self.learned(tokens.x) if c.queries == "learned" else None)
        elif i == c.base + 1:
            first: Any = tokens.first
            queries = first + self.semantic_token2 if c.queries == "both" else first
            tokens.x = block(queries, ops.concat(first, tokens.x, axis=1), paths, tokens.attention)
        else:
            tokens.x = block(tokens.x, None, paths, tokens.attention)

    def learned(self, x: Tensor) -> Tensor:
        """The learned tokens, for each picture."""
        return ops.broadcast_to(self.semantic_token2, shape=(len(x), *self.semantic_token2.shape[1:]))

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        return [(f"STViT: what its {A.shape[2]} tokens read {when}, of 1 each",
                 to_numpy(A.data[:, :, :, A.shape[2]:].mean(axis=1).sum(axis=1)))
                for A, when in zip(out.attention[self.config.base:], ("first", "then"))]
