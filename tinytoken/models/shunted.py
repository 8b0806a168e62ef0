"""Shunted Transformer (Ren et al. 2022, arXiv 2111.15193, "Shunted Self-Attention via Multi-Scale Token
Aggregation"). Names of parameters are the official ones.

A pyramid in which the heads of one layer read the map at two resolutions. The keys of a group of heads are
squares of rate x rate positions, each merged into one token by a convolution: so one group sees details, and
the other large objects as a whole.
"""
import dataclasses
from typing import Any

from .. import nn, ops
from ..backend import Array
from ..tensor import Tensor
from .base import is_number, is_whole, model
from .maps import LocalConv, as_map, as_tokens
from .stages import Map, Pair, Stage, Stages, WidthsConfig

EPS, CONV_EPS = 1e-6, 1e-5  # of the norms of blocks and stages; of those that follow a convolution


@dataclasses.dataclass(frozen=True)
class ShuntedTransformerConfig(WidthsConfig):
    """heads: of each stage, or of the first, doubled by each. mlp_ratios: of each stage; None: all have
    mlp_ratio. stem_convs: how many further 3 x 3 convolutions the stem has.

    rates: for each stage (r1, r2), the rates at which the keys of the first half of the heads, and of the
    rest, are merged. A number r stands for (r, r // 2), and 1 for plain attention, which merges nothing; (1,
    1) is the layer with two groups at these rates. None: the last stage's is 1, twice as much in each stage
    before.

    The published models have patch_size=4, dims=(64, 128, 256, 512), heads=2, rates=(8, 4, 2, 1),
    mlp_ratios=(8, 8, 4, 4); depths and stem_convs are (1, 2, 4, 1) and 0 in T, (2, 4, 12, 1) and 1 in S, (3,
    4, 24, 2) and 2 in B."""
    _: dataclasses.KW_ONLY
    heads: int | tuple[int, ...] = 2  # type: ignore[assignment]
    rates: tuple[Any, ...] | None = None
    mlp_ratios: tuple[float, ...] | None = None
    stem_convs: int = 0
    qkv_bias: bool = True

    def settle_widths(self, stages: int, dim: int) -> None:
        self.check(self.patch_size % 2 == 0,
                   f"patch_size {self.patch_size}, expected an even number: the stem halves pictures first")
        self.check(is_whole(self.stem_convs) and self.stem_convs >= 0,
                   f"stem_convs {self.stem_convs!r}, expected a whole number that is not negative")
        if self.dims is None:
            self.settle("dims", tuple(dim << s for s in range(stages)))
        self.settle_heads(stages)
        for name, default in (("mlp_ratios", (self.mlp_ratio,) * stages),
                              ("rates", tuple(1 << s for s in reversed(range(stages))))):
            value = default if getattr(self, name) is None else getattr(self, name)
            self.check(isinstance(value, (tuple, list)) and len(value) == stages,
                       f"{name} {value!r}, expected one for each of {stages} stages")
            self.settle(name, tuple(value))
        self.check(all(is_number(ratio) and ratio > 0 for ratio in self.mlp_ratios or ()),
                   f"mlp_ratios {self.mlp_ratios}, expected positive numbers")

    def __post_init__(self, *sizes: int) -> None:
        super().__post_init__(*sizes)
        self.settle("rates", tuple(self.pair_of(s, rates) for s, rates in enumerate(self.rates or ())))
        heads: Any = self.heads
        self.check(not any(dim % n for dim, n in zip(self.widths, heads)),
                   f"heads {heads}, expected numbers that divide dims {self.dims}")

    def pair_of(self, s: int, rates: Any) -> Any:
        """What `rates` stands for in stage s: 1, or (r1, r2)."""
        if is_whole(rates):
            rates = 1 if rates == 1 else (rates, rates // 2)
        sides = [side // self.patch_size >> s for side in nn.both_sides(self.image_size)]
        self.check(rates == 1 or isinstance(rates, (tuple, list)) and len(rates) == 2
                   and all(is_whole(r) and r > 0 and not any(side % r for side in sides) for r in rates),
                   f"rates {rates!r} in stage {s}, expected 1, or two numbers that divide the sides of its "
                   f"map, {sides[0]} x {sides[1]}")
        self.check(rates == 1 or self.heads[s] > 1,  # type: ignore[index]
                   f"1 head in stage {s}, expected at least 2, for two rates")
        return 1 if rates == 1 else tuple(rates)


class ShuntedAttention(nn.Module):
    """Attention with keys merged at two rates, each seen by a group of heads (section 3.1.1). x (B, N, dim),
    a map of the shape `grid` -> the same."""
    kv1: nn.Linear
    kv2: nn.Linear

    def __init__(self, dim: int, heads: int, rates: Pair, qkv_bias: bool) -> None:
        self.heads, self.rates, self.groups = heads, rates, (heads // 2, heads - heads // 2)
        self.q, self.proj = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim)
        for i, (rate, group) in enumerate(zip(rates, self.groups), 1):
            width = group * (dim // heads)
            setattr(self, f"sr{i}", nn.Conv2d(dim, dim, rate, stride=rate))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, CONV_EPS))
            setattr(self, f"kv{i}", nn.Linear(dim, 2 * width, bias=qkv_bias, parts=2))
            setattr(self, f"local_conv{i}", LocalConv(width))

    def tie_keys(self) -> None:
        """Let each group's keys start as its queries, see nn.initialise."""
        start = 0
        for kv in (self.kv1, self.kv2):
            width = len(kv.weight) // 2
            kv.weight.data[:width] = self.q.weight.data[start:start + width]
            start += width

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        q, start, read = ops.split_heads(self.q(x), heads=self.heads), 0, []
        for i, group in enumerate(self.groups):
            k, v = self.keys_and_values(i, x, grid)
            read.append(ops.attention(q[:, start:start + group], k, v))
            start += group
        return self.proj(ops.merge_heads(ops.concat(*read, axis=1)))

    def keys_and_values(self, i: int, x: Tensor, grid: Pair) -> tuple[Tensor, Tensor]:
        """Those of group i, each (B, heads of the group, N / rate^2, d); to the values, a convolution of them
        is added (eq. 3)."""
        sr, norm, kv, conv = (getattr(self, f"{name}{i + 1}") for name in ("sr", "norm", "kv", "local_conv"))
        packed = kv(ops.gelu(norm(as_tokens(sr(as_map(x, grid))))))
        k, v = packed[:, :, :packed.shape[2] // 2], packed[:, :, packed.shape[2] // 2:]
        v = v + conv(v, (grid[0] // self.rates[i], grid[1] // self.rates[i]))
        return ops.split_heads(k, heads=self.groups[i]), ops.split_heads(v, heads=self.groups[i])


class LocalAttention(nn.CrossAttention):
    """Plain attention, to which a convolution of the values is added. x (B, N, dim) -> the same."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__(dim, heads, qkv_bias)
        self.local_conv = LocalConv(dim)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:  # type: ignore[override]
        q, k, v = self.project(x, x)
        return self.proj(ops.merge_heads(ops.attention(q, k, v)) + self.local_conv(ops.merge_heads(v), grid))


class DetailMLP(nn.MLP):
    """Linear, a convolution that is added, GELU, Linear ("detail-specific feedforward", section 3.2). x (B,
    N, dim), a map of the shape `grid` -> the same."""
    dwconv: Any  # a module around it, for its official name

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = LocalConv(hidden)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:  # type: ignore[override]
        x = self.fc1(x)
        return self.fc2(ops.gelu(x + self.dwconv.dwconv(x, grid)))


class ShuntedBlock(nn.Module):
    """x + attention, then x + MLP. x (B, N, C), a map of the shape `grid`; paths (B, 2)."""
    branches = 2

    def __init__(self, dim: int, heads: int, rates: Any, mlp_ratio: float, qkv_bias: bool) -> None:
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attn = (LocalAttention(dim, heads, qkv_bias) if rates == 1
                     else ShuntedAttention(dim, heads, rates, qkv_bias))
        self.mlp = DetailMLP(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Pair, paths: Array | None = None) -> Tensor:
        x = x + nn.scaled(self.attn(self.norm1(x), grid), nn.column(paths, 0))
        return x + nn.scaled(self.mlp(self.norm2(x), grid), nn.column(paths, 1))


class ReLU(nn.Module):
    """ops.relu as a layer, for lists of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Stem(nn.Module):
    """Convolutions with batch norm and ReLU, the first 7 x 7 of stride 2, and one whose stride is its size,
    then a norm. images (B, channels, H, W) -> the first map (B, N, dim)."""

    def __init__(self, c: Any) -> None:
        self.config, dim, side = c, c.dims[0], c.patch_size // 2
        kernels = [(c.channels, dim, 7, 2, 3), *[(dim, dim, 3, 1, 1)] * c.stem_convs]
        self.conv = [layer for sizes in kernels
                     for layer in (nn.Conv2d(*sizes, bias=False), nn.BatchNorm2d(dim), ReLU())]
        self.conv.append(nn.Conv2d(dim, dim, side, stride=side))
        self.norm = nn.LayerNorm(dim, CONV_EPS)

    def forward(self, images: Tensor | Array) -> Tensor:
        c = self.config
        x: Any = nn.checked_images(images, c.image_size, c.channels, self.norm.weight.dtype)
        for layer in self.conv:
            x = layer(x)
        return self.norm(as_tokens(x))


class Merging(nn.Module):
    """A map of half the sides, by a 3 x 3 convolution of stride 2, then a norm. x (B, N, C) -> (B, N / 4,
    C')."""

    def __init__(self, before: int, dim: int) -> None:
        self.proj, self.norm = nn.Conv2d(before, dim, 3, stride=2, padding=1), nn.LayerNorm(dim, CONV_EPS)

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        return self.norm(as_tokens(self.proj(as_map(x, grid))))


@model("shuntedtransformer")
class ShuntedTransformer(Stages):
    """images (B, channels, H, W) -> StagesOutput, whose maps are after the norm that ends each stage.

    Its batch norm makes what train mode computes for an image depend on the others: see nn.BatchNorm2d."""
    Config = ShuntedTransformerConfig
    patch_embed1: Stem

    def build(self, c: Any) -> None:
        super().build(c)
        for s, dim in enumerate(c.dims):
            setattr(self, f"patch_embed{s + 1}", Merging(c.dims[s - 1], dim) if s else Stem(c))
            sizes = dim, c.heads[s], c.rates[s], c.mlp_ratios[s], c.qkv_bias
            setattr(self, f"block{s + 1}", [ShuntedBlock(*sizes) for _ in range(c.depths[s])])
            setattr(self, f"norm{s + 1}", nn.LayerNorm(dim, EPS))
        self.head = nn.Linear(c.dims[-1], c.num_classes)
        nn.initialise(self, keys_as_queries=c.keys_as_queries)

    @property
    def stages(self) -> list[Stage]:  # type: ignore[override]
        return [Stage(getattr(self, f"patch_embed{s}"), getattr(self, f"block{s}"))
                for s in range(1, len(self.grids) + 1)]

    def embed(self, images: Tensor | Array) -> Tensor:
        return self.patch_embed1(images)

    def halve(self, stage: Stage, x: Tensor, grid: Pair) -> Tensor:
        return stage.downsample(x, grid)

    def run_stage(self, s: int, blocks: list[Any], state: Map, paths: Array | None) -> None:
        super().run_stage(s, blocks, state, paths)
        state.x = getattr(self, f"norm{s + 1}")(state.x)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x.mean(axis=1)), x
