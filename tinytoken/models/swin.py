"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030), and the form of it that decides about positions.
Names of the plain model are timm's; those of the second path and of the predictors are the official ones.

A block is attention in windows, whose borders lie elsewhere in every second block, then an MLP.
"""
import dataclasses
from typing import Any

from .. import nn, ops
from ..backend import Array
from ..tensor import Tensor
from .adaptive import AdaptiveBlock, DynamicStages, DynamicStagesConfig
from .base import is_whole, model
from .pruning import Predictor
from .stages import Pair, Stage, Stages, StagesConfig

EPS = 1e-5  # of all its norms


@dataclasses.dataclass(frozen=True)
class SwinConfig(StagesConfig):
    """embed_dim: the width of the first stage, doubled by each. heads: of each stage, or of the first,
    doubled by each. window_size: the sides of a window; published models have 7. A map that is no larger
    has one window of its own size on that axis, and one that windows do not divide is filled up
    (ops.window)."""
    image_size: int | tuple[int, int] = 32
    embed_dim: int | None = None
    depths: tuple[int, ...] | None = None
    num_classes: int = 10
    _: dataclasses.KW_ONLY
    heads: int | tuple[int, ...] = 3  # type: ignore[assignment]
    window_size: int = 4
    qkv_bias: bool = True
    positive = ("patch_size", "channels", "num_classes", "window_size")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple((self.embed_dim or 0) << s for s in range(len(self.depths or ())))

    def settle_widths(self, stages: int, dim: int) -> None:
        if self.embed_dim is None:
            self.settle("embed_dim", dim)
        self.check(is_whole(self.embed_dim) and (self.embed_dim or 0) > 0,
                   f"embed_dim {self.embed_dim!r}, expected a positive whole number")
        self.settle_heads(stages)


class WindowAttention(nn.Attention):
    """Attention in windows of (h, w) positions, with a learned bias for each distance. x (B, N, C) -> the
    same; the map, of the shape `grid`, is moved by `shift` first, and moved back."""

    def __init__(self, dim: int, heads: int, window: Pair, shift: Pair, qkv_bias: bool) -> None:
        super().__init__(dim, heads, qkv_bias)
        self.window, self.shift = window, shift
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(nn.zeros(rows, heads))

    def forward(self, x: Tensor, grid: Pair) -> Tensor:  # type: ignore[override]
        cut = dict(grid=grid, window=self.window, shift=self.shift)
        q, k, v = self.project(ops.cut_windows(x, **cut))
        bias = ops.relative_bias(self.relative_position_bias_table, window=self.window)
        out = self.proj(ops.merge_heads(ops.window_attention(q, k, v, bias, **cut)))
        return ops.join_windows(out, **cut)


class SwinBlock(nn.Module):
    """x + attention in windows, then x + MLP. x (B, N, C), a map of the shape `grid`; paths (B, 2)."""
    branches = 2

    def __init__(self, dim: int, heads: int, window: Pair, shift: Pair, mlp_ratio: float,
                 qkv_bias: bool) -> None:
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), WindowAttention(dim, heads, window, shift, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(dim, EPS), nn.MLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Pair, paths: Array | None = None) -> Tensor:
        x = self.mix(x, grid, paths)
        return x + nn.scaled(self.slow(x), nn.column(paths, 1))

    def mix(self, x: Tensor, grid: Pair, paths: Array | None) -> Tensor:
        """Between positions: the attention, with its residual."""
        return x + nn.scaled(self.attn(self.norm1(x), grid), nn.column(paths, 0))

    def slow(self, x: Tensor) -> Tensor:
        """Of each position: norm and MLP."""
        return self.mlp(self.norm2(x))


class FastMLP(nn.Module):
    """The second path: a norm and one linear layer. x (..., dim) -> the same."""

    def __init__(self, dim: int) -> None:
        self.fc1 = [nn.LayerNorm(dim, EPS), nn.Linear(dim, dim)]

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.fc1
        return linear(norm(x))


class AdaptiveSwinBlock(AdaptiveBlock, SwinBlock):
    """A block with a second path; both are added to what the attention gives. paths (B, 3)."""
    branches = 3
    from_mixed = True

    def __init__(self, dim: int, *sizes: Any) -> None:
        super().__init__(dim, *sizes)
        self.fastmlp = FastMLP(dim)

    def fast(self, x: Tensor) -> Tensor:
        """Of each position: the second path."""
        return self.fastmlp(x)


class PatchMerging(nn.Module):
    """Squares of 2 x 2 positions side by side, a norm, one linear layer. x (B, H W, C) -> (B, H W / 4,
    2 C)."""

    def __init__(self, dim: int) -> None:
        self.norm, self.reduction = nn.LayerNorm(4 * dim, EPS), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        (height, width), (B, _, C) = grid, x.shape
        squares = x.reshape(B, height // 2, 2, width // 2, 2, C).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(squares.reshape(B, height * width // 4, 4 * C)))


class NormedPatches(nn.PatchEmbed):
    """A patch embedding, then a norm."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(len(self.proj.weight), EPS)

    def forward(self, images: Tensor | Array) -> Tensor:
        return self.norm(super().forward(images))


class Head(nn.Module):
    """The mean over positions, then the classifier. x (B, N, C) -> logits (B, K)."""

    def __init__(self, dim: int, classes: int) -> None:
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(axis=1))


@model("swin")
class Swin(Stages):
    """images (B, channels, H, W) -> StagesOutput."""
    Config: Any = SwinConfig

    def build(self, c: Any) -> None:
        super().build(c)
        self.patch_embed = self.embedding(c)
        self.layers = [self.stage(c, s) for s in range(len(c.depths))]
        self.norm = nn.LayerNorm(c.widths[-1], EPS)
        self.head = Head(c.widths[-1], c.num_classes)
        nn.initialise(self, keys_as_queries=c.keys_as_queries)
        for name, module in self.named_modules():
            if hasattr(module, "relative_position_bias_table"):
                nn.normal(module.relative_position_bias_table, f"{name}.relative_position_bias_table", 0.02)

    def embedding(self, c: Any) -> nn.Module:
        """What turns pictures into the first map."""
        return NormedPatches(c.image_size, c.patch_size, c.embed_dim, c.channels)

    def stage(self, c: Any, s: int) -> Stage:
        """A new stage s. Every second block's windows are moved by half their size."""
        dim, fits = c.widths[s], [side <= c.window_size for side in self.grids[s]]
        window = tuple(side if one else c.window_size for side, one in zip(self.grids[s], fits))
        moved = tuple(0 if one else c.window_size // 2 for one in fits)
        blocks = [self.block(s, i)(dim, c.heads[s], window, moved if i % 2 else (0, 0), c.mlp_ratio,
                                   c.qkv_bias) for i in range(c.depths[s])]
        return Stage(PatchMerging(c.widths[s - 1]) if s else None, blocks)

    def block(self, s: int, i: int) -> Any:
        """The class of block i of stage s."""
        return SwinBlock

    @property
    def stages(self) -> list[Stage]:  # type: ignore[override]
        return self.layers

    def embed(self, images: Tensor | Array) -> Tensor:
        return self.patch_embed(images)

    def halve(self, stage: Stage, x: Tensor, grid: Pair) -> Tensor:
        return stage.downsample(x, grid)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.head(x), x


@dataclasses.dataclass(frozen=True)
class DynamicSwinConfig(SwinConfig, DynamicStagesConfig):
    """Those of both."""


@model("dynamicswin")
class DynamicSwin(DynamicStages, Swin):
    """A Swin that decides about positions. images (B, channels, H, W) -> DynamicStagesOutput."""
    Config = DynamicSwinConfig

    def build(self, c: Any) -> None:
        super().build(c)
        self.start_deciding()

    def stage(self, c: Any, s: int) -> Stage:
        stage: Any = super().stage(c, s)
        if s == len(c.depths) - 2:
            stage.score_predictor = [Predictor(c.widths[s], EPS) for _ in c.prune_before]
        return stage

    def block(self, s: int, i: int) -> Any:
        return AdaptiveSwinBlock if self.is_adaptive(s, i) else SwinBlock

    @property
    def predictors(self) -> list[Any]:
        stage: Any = self.layers[-2]
        return stage.score_predictor
