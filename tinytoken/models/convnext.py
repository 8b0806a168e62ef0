"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545, "A ConvNet for the 2020s"), and the form of it that decides
about positions. Names of the plain model are timm's; those of the second path and of the predictors are the
official ones.

A block is a 7 x 7 depthwise convolution, a layer norm and an MLP of each position, in one residual branch.
"""
import dataclasses
import math
from typing import Any

from .. import nn, ops
from ..backend import Array
from ..tensor import Tensor
from .adaptive import AdaptiveBlock, DynamicStages, DynamicStagesConfig
from .base import is_number, model
from .maps import as_map, as_tokens
from .pruning import Predictor
from .stages import Pair, Stage, Stages, WidthsConfig

EPS = 1e-6  # of all its norms


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(WidthsConfig):
    """layer_scale: the start of the branches' gammas; 0: there are none. heads and keys_as_queries mean
    nothing here."""
    _: dataclasses.KW_ONLY
    layer_scale: float = 1e-6

    def settle_widths(self, stages: int, dim: int) -> None:
        self.check(is_number(self.layer_scale) and math.isfinite(self.layer_scale),
                   f"layer_scale {self.layer_scale!r}, expected a number")
        if self.dims is None:
            self.settle("dims", tuple(dim << s for s in range(stages)))


class ConvNeXtBlock(nn.Module):
    """x + gamma MLP(norm(depthwise convolution of x)). x (B, N, C), a map of the shape `grid`."""
    branches = 1

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float) -> None:
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = nn.LayerNorm(dim, EPS), nn.MLP(dim, round(dim * mlp_ratio))
        self.gamma = nn.Parameter(nn.zeros(dim) + layer_scale) if layer_scale else None

    def forward(self, x: Tensor, grid: Pair, paths: Array | None = None) -> Tensor:
        return x + nn.scaled(self.slow(self.mix(x, grid, paths)), nn.column(paths, 0))

    def mix(self, x: Tensor, grid: Pair, paths: Array | None) -> Tensor:
        """Between positions: the convolution."""
        return as_tokens(self.conv_dw(as_map(x, grid)))

    def slow(self, x: Tensor) -> Tensor:
        """Of each position: norm and MLP."""
        x = self.mlp(self.norm(x))
        return x if self.gamma is None else x * self.gamma


class AdaptiveConvNeXtBlock(AdaptiveBlock, ConvNeXtBlock):
    """A block whose second path is a norm and one linear layer."""
    branches = 2

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__(dim, mlp_ratio, layer_scale)
        self.fast_path = [nn.LayerNorm(dim, EPS), nn.Linear(dim, dim)]
        self.fast_path_gamma = nn.Parameter(nn.zeros(dim) + layer_scale) if layer_scale else None

    def fast(self, x: Tensor) -> Tensor:
        """Of each position: the second path."""
        norm, linear = self.fast_path
        x = linear(norm(x))
        return x if self.fast_path_gamma is None else x * self.fast_path_gamma


class Head(nn.Module):
    """The mean over positions, a norm, the classifier. x (B, N, C) -> logits (B, K)."""

    def __init__(self, dim: int, classes: int) -> None:
        self.norm, self.fc = nn.LayerNorm(dim, EPS), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean(axis=1)))


@model("convnext")
class ConvNeXt(Stages):
    """images (B, channels, H, W) -> StagesOutput."""
    Config: Any = ConvNeXtConfig

    def build(self, c: Any) -> None:
        super().build(c)
        proj = nn.Projection(c.dims[0], c.channels, c.patch_size)
        self.stem = [proj, nn.LayerNorm(c.dims[0], EPS)]
        # in a tuple, which is not looked into for parameters: timm's name of the projection is stem.0
        self.patches = (nn.PatchEmbed(c.image_size, c.patch_size, c.dims[0], c.channels, proj=proj),)
        self.stages = []
        for s, (dim, depth) in enumerate(zip(c.dims, c.depths)):
            before = c.dims[s - 1]
            downsample = [nn.LayerNorm(before, EPS), nn.Conv2d(before, dim, 2, stride=2)] if s else None
            blocks = [self.block(s, i)(dim, c.mlp_ratio, c.layer_scale) for i in range(depth)]
            self.stages.append(Stage(downsample, blocks))
        self.head = Head(c.dims[-1], c.num_classes)
        nn.initialise(self)

    def block(self, s: int, i: int) -> type[ConvNeXtBlock]:
        """The class of block i of stage s."""
        return ConvNeXtBlock

    def embed(self, images: Tensor | Array) -> Tensor:
        return self.stem[1](self.patches[0](images))

    def halve(self, stage: Stage, x: Tensor, grid: Pair) -> Tensor:
        norm, conv = stage.downsample
        return as_tokens(conv(as_map(norm(x), grid)))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head.norm(x)


@dataclasses.dataclass(frozen=True)
class DynamicConvNeXtConfig(ConvNeXtConfig, DynamicStagesConfig):
    """Those of both."""


@model("dynamicconvnext")
class DynamicConvNeXt(DynamicStages, ConvNeXt):
    """A ConvNeXt that decides about positions. images (B, channels, H, W) -> DynamicStagesOutput."""
    Config = DynamicConvNeXtConfig

    def build(self, c: Any) -> None:
        self.score_predictor = [Predictor(c.dims[-2], EPS) for _ in c.prune_before]
        super().build(c)
        self.start_deciding()

    def block(self, s: int, i: int) -> type[ConvNeXtBlock]:
        return AdaptiveConvNeXtBlock if self.is_adaptive(s, i) else ConvNeXtBlock

    @property
    def predictors(self) -> list[Any]:
        return self.score_predictor
