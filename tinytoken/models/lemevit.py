"""LeMeViT (Jiang et al. 2024, arXiv 2405.09789, "Learnable Meta Tokens"): a pyramid in which the picture
attends to a few learned tokens, and these to the picture. Names of parameters are the official ones.

Its attention costs N M, not N^2, for N positions and M meta tokens. Three kinds of block: "C" starts the meta
tokens, which read the picture; in "D" picture and meta tokens read each other; in "S" each set attends to
itself. "D2" is D with one projection to queries and keys, for both directions.
"""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..tensor import Tensor
from .base import is_whole, model
from .maps import LocalConv, as_map, as_tokens
from .stages import Map, Pair, Stage, Stages, StagesOutput, WidthsConfig

EPS, META_EPS = 1e-6, 1e-5  # of the norms of blocks; of those of the meta tokens elsewhere


@dataclasses.dataclass(frozen=True)
class LeMeViTConfig(WidthsConfig):
    """attn_type: the kind of the blocks of each stage, "C", "D", "D2" or "S". Between two stages the map is
    halved, but not after a stage of "C". meta_tokens: how many there are. head_dim: the width of a head;
    None: dim / heads.

    The stem halves pictures with one convolution after another, so patch_size is a power of 2, from 2.
    Without attn_type there is a stage "C" before those of the maps, of which the latter half (rounded down)
    is "S", the others are "D"."""
    _: dataclasses.KW_ONLY
    attn_type: tuple[str, ...] | None = None
    meta_tokens: int = 16
    head_dim: int | None = None
    positive = ("patch_size", "channels", "num_classes", "meta_tokens")

    def __post_init__(self, *sizes: int) -> None:
        self.check(self.attn_type is None or isinstance(self.attn_type, (tuple, list)) and self.attn_type
                   and all(isinstance(kind, str) and kind in ATTENTION for kind in self.attn_type),
                   f"attn_type {self.attn_type!r}, expected one of {', '.join(ATTENTION)} for each stage")
        super().__post_init__(*sizes)
        if self.head_dim is None:
            self.settle("head_dim", max(1, sizes[0] // sizes[2]))
        halved = self.patch_size.bit_length() - 1
        self.check(self.patch_size == 1 << halved > 1,
                   f"patch_size {self.patch_size}, expected a power of 2, from 2")
        self.check(self.widths[0] % (1 << halved - 1) == 0,
                   f"dims {self.widths}, expected the first to be a multiple of {1 << halved - 1}")
        head = self.head_dim or 0
        self.check(is_whole(head) and head > 0 and not any(dim % head for dim in self.widths),
                   f"head_dim {self.head_dim!r}, expected a whole number that divides the widths "
                   f"{self.widths}")
        patches = math.prod(side // self.patch_size for side in nn.both_sides(self.image_size))
        for kind, dim, after, n in zip(
                self.attn_type or (), self.widths, (*self.widths[1:], None), self.halvings):
            self.check(patches >> 2 * n > 1 or kind[0] != "D",
                       f"attn_type {self.attn_type}: a D with a map of one position, expected 2 at least")
            self.check(kind != "C" or after in (dim, None),
                       f"dims {self.widths}, expected the same width after a stage of C")

    @property
    def halvings(self) -> tuple[int, ...]:
        kinds = self.attn_type or ()
        return tuple(s - kinds[:s].count("C") for s in range(len(kinds)))

    def stages_of_the_map(self) -> int:
        return len(self.attn_type) if self.attn_type else 1 + super().stages_of_the_map()

    def settle_widths(self, stages: int, dim: int) -> None:
        if self.attn_type is None:
            self.settle("attn_type", ("C", *"D" * (stages // 2), *"S" * ((stages - 1) // 2)))
        self.check(len(self.halvings) == stages,
                   f"attn_type {self.attn_type}, expected a kind for each of {stages} stages")
        if self.dims is None:
            self.settle("dims", tuple(dim << n for n in self.halvings))


class First(nn.Attention):
    """C: the meta tokens read the map. x (B, N, dim), c (B, M, dim) -> None, what is added to c."""

    def __init__(self, dim: int, heads: int) -> None:
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim, parts=2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor, attention: Any = None) -> Any:  # type: ignore[override]
        k, v = ops.split_heads(self.kv(x), heads=self.heads, parts=2)
        return None, self.attend(ops.split_heads(self.q(c), heads=self.heads), k, v, attention=attention)

    def tie_keys(self) -> None:
        self.kv.weight.data[:len(self.q.weight)] = self.q.weight.data


class Dual(nn.Attention):
    """D: the map reads the meta tokens, and they the map, both as they were before. x (B, N, dim), c (B, M,
    dim) -> what is added to each.

    Scores are divided by the square root of dim, not of a head's width, as in the official code; those of the
    map are also multiplied by log M / log N, for they are about M keys."""
    proj: Any = property(lambda self: self.proj_c)  # of `attend`

    def __init__(self, dim: int, heads: int) -> None:
        self.heads = heads
        self.projections(dim)
        self.proj_x, self.proj_c = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def projections(self, dim: int) -> None:
        """Make what `both` needs."""
        self.qkv1, self.qkv2 = nn.Linear(dim, 3 * dim, parts=3), nn.Linear(dim, 3 * dim, parts=3)

    def both(self, x: Tensor, c: Tensor) -> Any:
        """Queries, keys and values of x and of c."""
        return [ops.split_heads(of(tokens), heads=self.heads, parts=3)
                for of, tokens in ((self.qkv1, x), (self.qkv2, c))]

    def forward(self, x: Tensor, c: Tensor, attention: Any = None) -> Any:  # type: ignore[override]
        (q1, k1, v1), (q2, k2, v2) = self.both(x, c)
        scale = self.heads ** -0.5  # ops.attention divides by the root of a head's width
        few = math.log(c.shape[1]) / math.log(x.shape[1])
        dx = self.proj_x(ops.merge_heads(ops.attention(q1 * (few * scale), k2, v2)))
        return dx, self.attend(q2 * scale, k1, v1, attention=attention)

    def tie_keys(self) -> None:
        dim = len(self.proj_x.weight)
        for asking, asked in ((self.qkv1, self.qkv2), (self.qkv2, self.qkv1)):
            asked.weight.data[dim:2 * dim] = asking.weight.data[:dim]


class DualOfOne(Dual):
    """D2: what is a query of the map is a key of it too; and of a meta token, likewise."""

    def projections(self, dim: int) -> None:
        self.qv1, self.kv2 = nn.Linear(dim, 2 * dim, parts=2), nn.Linear(dim, 2 * dim, parts=2)

    def both(self, x: Tensor, c: Tensor) -> Any:
        (q, v1), (k, v2) = (ops.split_heads(of(tokens), heads=self.heads, parts=2)
                            for of, tokens in ((self.qv1, x), (self.kv2, c)))
        return (q, q, v1), (k, k, v2)

    def tie_keys(self) -> None:
        dim = len(self.proj_x.weight)
        self.kv2.weight.data[:dim] = self.qv1.weight.data[:dim]


class Apart(nn.Attention):
    """S: each set of tokens attends to itself, with the same weights."""

    def forward(self, x: Tensor, c: Tensor, attention: Any = None) -> Any:  # type: ignore[override]
        return super().forward(x), super().forward(c)


ATTENTION: dict[str, Any] = {"C": First, "D": Dual, "D2": DualOfOne, "S": Apart}


class MetaBlock(nn.Module):
    """x + a depthwise convolution of it, as positions; then the attention of `kind` and an MLP, with the
    same norms and MLP for both sets of tokens. x (B, N, dim), a map of the shape `grid`, and c (B, M, dim)
    -> both; a block of "C" leaves x as it was.

    paths (B, 4): factors of attention and MLP of x, and of c. attention: a list to which the weights (B, H,
    M, N) are added with which meta tokens read the map; "S" has none."""
    branches = 4

    def __init__(self, dim: int, heads: int, mlp_ratio: float, kind: str) -> None:
        hidden = round(dim * mlp_ratio)
        self.pos_embed = LocalConv(dim)
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), ATTENTION[kind](dim, heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), None, nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, c: Tensor, grid: Pair, paths: Array | None = None,
                attention: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        placed = x + self.pos_embed(x, grid)
        dx, dc = self.attn(self.norm1(placed), self.norm1(c), attention)
        if dx is not None:
            x = self.second(placed + nn.scaled(dx, nn.column(paths, 0)), nn.column(paths, 1))
        return x, self.second(c + nn.scaled(dc, nn.column(paths, 2)), nn.column(paths, 3))

    def second(self, x: Tensor, factors: Array | None) -> Tensor:
        """The branch of the MLP."""
        return x + nn.scaled(self.mlp(self.norm2(x)), factors)


class MetaStage(Stage):
    """A stage whose blocks are named by their numbers alone."""

    def children(self) -> Any:
        return ((str(i), block) for i, block in enumerate(self.blocks))


@dataclasses.dataclass
class LeMeOutput(StagesOutput):
    """meta (B, M, C): the meta tokens after their norm. attention: of each block of C and D, the weights
    (B, H, M, N) with which meta tokens read the map."""
    meta: Tensor | None = None


@dataclasses.dataclass
class MetaMap(Map):
    """c (B, M, C): the meta tokens. attention: a list to which blocks add their weights, or None."""
    c: Any = None
    attention: list[Tensor] | None = None


@model("lemevit")
class LeMeViT(Stages):
    """images (B, channels, H, W) -> LeMeOutput.

    Its batch norms make what train mode computes for an image depend on the others: see nn.BatchNorm2d."""
    Config = LeMeViTConfig

    def build(self, c: Any) -> None:
        super().build(c)
        self.meta_tokens = nn.Parameter(nn.zeros(c.meta_tokens, c.dims[0]))
        self.downsample_layers = [stem(c.channels, c.dims[0], c.patch_size), *(
            halving(before, dim) if c.attn_type[s] != "C" else nn.Sequential()
            for s, (before, dim) in enumerate(zip(c.dims, c.dims[1:])))]
        self.meta_token_downsample = [nn.Sequential(
            nn.Linear(before, 4 * before), nn.LayerNorm(4 * before, META_EPS), nn.GELU(),
            nn.Linear(4 * before, dim), nn.LayerNorm(dim, META_EPS))
            for before, dim in zip(c.dims[:1] + c.dims, c.dims)]
        self.stages = [MetaStage(self.downsample_layers[s], [
            MetaBlock(dim, dim // c.head_dim, c.mlp_ratio, c.attn_type[s]) for _ in range(c.depths[s])])
            for s, dim in enumerate(c.dims)]
        self.norm, self.norm_c = nn.BatchNorm2d(c.dims[-1]), nn.LayerNorm(c.dims[-1], META_EPS)
        self.head = nn.Linear(c.dims[-1], c.num_classes)
        nn.initialise(self, keys_as_queries=c.keys_as_queries)
        nn.normal(self.meta_tokens, "meta_tokens", std=1)

    def embed(self, images: Tensor | Array) -> Tensor:
        images = nn.checked_images(images, self.config.image_size, self.config.channels, self.dtype)
        return as_tokens(self.downsample_layers[0](images))

    def halve(self, stage: Stage, x: Tensor, grid: Pair) -> Tensor:
        return as_tokens(stage.downsample(as_map(x, grid)))

    def forward(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None) -> LeMeOutput:
        """trace: keep the weights with which meta tokens read the map. paths: factors (B, blocks, 4) of the
        residual branches (tasks.drop_paths), in training."""
        x = self.embed(images)
        c = ops.broadcast_to(self.meta_tokens, shape=(len(x), *self.meta_tokens.shape))
        state = self.encode(MetaMap(x, self.grids[0], paths, c=c, attention=[] if trace else None))
        tokens, meta = as_tokens(self.norm(as_map(state.x, state.grid))), self.norm_c(state.c)
        logits = self.head(tokens.mean(axis=1) + meta.mean(axis=1))
        return LeMeOutput(logits, tokens, state.attention or [], maps=state.maps, meta=meta)

    def run_stage(self, s: int, blocks: list[Any], state: Any, paths: Array | None) -> None:
        state.c = self.meta_token_downsample[s](state.c)
        for i, block in enumerate(blocks):
            state.x, state.c = block(state.x, state.c, state.grid, nn.column(paths, i), state.attention)

    def show(self, out: LeMeOutput) -> list[tuple[str, np.ndarray]]:
        if not out.attention:
            return []
        weights = to_numpy(out.attention[-1].data).mean(axis=1)  # the last that read: (B, M, N)
        s = [math.prod(grid) for grid in self.grids].index(weights.shape[2])
        return [("LeMeViT's meta tokens read", self.by_patch(weights.sum(axis=1), s))]


def halving(channels: int, dim: int) -> nn.Sequential:
    """A convolution of stride 2, and batch norm."""
    return nn.Sequential(nn.Conv2d(channels, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


def stem(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """Halvings to 1 / patch_size of the picture, with GELU between; each has twice the channels, the last
    dim."""
    layers: list[nn.Module] = []
    for n in reversed(range(patch_size.bit_length() - 1)):
        layers += [*halving(channels, dim >> n).layers, nn.GELU()]  # type: ignore[list-item]
        channels = dim >> n
    return nn.Sequential(*layers[:-1])
