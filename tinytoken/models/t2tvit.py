"""T2T-ViT (Yuan et al. 2021, arXiv 2101.11986, "Tokens-to-Token ViT"): a ViT whose tokens are made of
overlapping windows, step by step. Names of parameters are the official ones.

A soft split reads overlapping windows of the picture, each as a token; a small attention layer lets the
tokens see each other; laid out as a map again, they are split the next time. The ViT behind it is deep and
narrow.
"""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import nn, ops, random
from ..backend import Array
from ..errors import expect
from ..ops.conv import output_size
from ..tensor import Tensor
from .base import is_whole, model
from .maps import as_map
from .vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class T2TViTConfig(ViTConfig):
    """tokens_type: the layer between two soft splits, "performer" or "transformer" (softmax attention).
    token_dim: its width. splits: (kernel, stride, padding) of each soft split; the strides multiply to
    patch_size. None: the last two (or as many as patch_size can be halved) are (3, 2, 1), and the first has
    the stride s that is left, with kernel 2 s - 1, at least 3: patches of 16 pixels make the official
    (7, 4, 2), (3, 2, 1), (3, 2, 1). The other defaults are the official ones, too:
    mlp_ratio, qkv_bias, eps."""
    mlp_ratio: float = dataclasses.field(default=3, kw_only=False)
    qkv_bias: bool = False
    eps: float = 1e-5
    tokens_type: str = "performer"
    token_dim: int = 64
    splits: tuple[tuple[int, int, int], ...] | None = None
    choices = {"tokens_type": ("performer", "transformer")}

    def __post_init__(self):
        super().__post_init__()
        self.check(is_whole(self.token_dim) and self.token_dim > 1,
                   f"token_dim {self.token_dim!r}, expected a whole number from 2")
        if self.splits is None:
            halved = sum(self.patch_size % n == 0 for n in (2, 4))
            first = self.patch_size >> halved
            split = (max(3, 2 * first - 1), first, max(1, first // 2))
            self.settle("splits", (split, *((3, 2, 1),) * halved))
        triples = isinstance(self.splits, tuple) and self.splits and all(
            isinstance(split, (tuple, list)) and len(split) == 3 and min(map(is_whole, split))
            and min(split[:2]) > 0 <= split[2] for split in self.splits)
        self.check(triples, f"splits {self.splits!r}, expected (kernel, stride, padding) of each")
        self.settle("splits", tuple(map(tuple, self.splits)))


class TokenAttention(nn.Module):
    """Softmax attention with one head. x (B, N, inputs) -> v + attention (B, N, dim). As in the official
    code, the residual is the values, and scores are divided by the square root of `inputs`."""

    def __init__(self, inputs: int, dim: int) -> None:
        self.scale = math.sqrt(dim / inputs)  # ops.attention divides by the root of dim
        self.qkv, self.proj = nn.Linear(inputs, 3 * dim, bias=False, parts=3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ops.split_heads(self.qkv(x), heads=1, parts=3)
        out = self.proj(ops.merge_heads(ops.attention(q * self.scale, k, v)))
        return ops.merge_heads(v) + out


class TokenTransformer(nn.Module):
    """A layer between two soft splits. x (B, N, inputs) -> (B, N, dim)."""

    def __init__(self, inputs: int, dim: int, eps: float) -> None:
        self.norm1, self.attn = nn.LayerNorm(inputs, eps), TokenAttention(inputs, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), nn.MLP(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return nn.mlp_branch(self.attn(self.norm1(x)), self.norm2, self.mlp)


class TokenPerformer(nn.Module):
    """The same with the attention of a Performer (Choromanski et al. 2021, arXiv 2009.14794), whose cost
    grows with N, not its square: softmax's exp(q . k) is replaced by phi(q) . phi(k), with

        phi(a) = exp(W a - |a|^2 / 2) / sqrt(m),    W (m, dim) fixed, its rows orthogonal, m = dim // 2.

    As in the official code, rows of W have the length sqrt(m), and scores are not scaled: phi(q) . phi(k) is
    not near exp(q . k), but is larger for like q and k, too. Where |k|^2 is large, all of phi(k) is nearly
    0; then the 1e-8 in the quotient decides, and little is added to the values. (The official code drops a
    tenth of what it adds in training; here nothing is dropped.)"""

    def __init__(self, inputs: int, dim: int, eps: float) -> None:
        self.w = nn.Buffer(nn.zeros(dim // 2, dim))
        self.kqv, self.proj = nn.Linear(inputs, 3 * dim, parts=3), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(inputs, eps), nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def features(self, a: Tensor) -> Tensor:
        """phi. a (B, 1, N, dim) -> (B, 1, N, m)."""
        exponent = ops.linear(a, self.w.data) - (a * a).sum(axis=-1, keepdims=True) * 0.5
        return ops.exp(exponent) * (1 / math.sqrt(len(self.w.data)))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = ops.split_heads(self.kqv(self.norm1(x)), heads=1, parts=3)
        k, q = self.features(k), self.features(q)
        total = q @ k.sum(axis=2, keepdims=True).swapaxes(2, 3) + 1e-8
        out = q @ (k.swapaxes(2, 3) @ v) / total
        x = ops.merge_heads(v) + self.proj(ops.merge_heads(out))
        return x + self.mlp(self.norm2(x))

    def start(self, name: str) -> None:
        """Draw W: orthogonal rows of the length sqrt(m), evenly over all directions."""
        m, dim = self.w.shape
        draw = random.normal((dim, m), site=f"{name}.w", step=0)
        q, r = np.linalg.qr(draw.astype("float64"))
        self.w.data[...] = (q * np.sign(np.diag(r))).T * math.sqrt(m)


LAYERS: dict[str, Any] = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.PatchEmbed):
    """Soft splits, a layer between each two of them, a projection. images (B, C, H, W) -> (B, N, dim)."""
    project: nn.Linear  # the official name of what PatchEmbed calls proj
    proj: Any = property(lambda self: self.project, lambda self, linear: setattr(self, "project", linear))

    def __init__(self, c: T2TViTConfig) -> None:
        splits: Any = c.splits
        widths = [channels * kernel**2 for channels, (kernel, _, _) in
                  zip((c.channels, *(c.token_dim,) * (len(splits) - 1)), splits)]
        linear: Any = nn.Linear(widths[-1], c.dim, bias=not c.pre_norm)
        super().__init__(c.image_size, c.patch_size, c.dim, c.channels, proj=linear)
        self.splits, self.grids = splits, [nn.both_sides(c.image_size)]
        for split in splits:
            self.grids.append(output_size(self.grids[-1], *split))  # type: ignore[arg-type]
        for i, width in enumerate(widths[:-1], 1):
            setattr(self, f"attention{i}", LAYERS[c.tokens_type](width, c.token_dim, c.eps))
        expect(self.grids[-1] == self.grid, "T2TViT",
               f"splits {splits} make tokens of a grid {self.grids[-1]}, expected {self.grid}, as patches of "
               f"{c.patch_size} pixels")

    def forward(self, images: Tensor | Array) -> Tensor:
        x: Any = nn.checked_images(images, self.image_size, self.channels, self.project.weight.dtype)
        for i, (kernel, stride, padding) in enumerate(self.splits, 1):
            x = ops.unfold(x, kernel=kernel, stride=stride, padding=padding)
            if i < len(self.splits):
                x = as_map(getattr(self, f"attention{i}")(x), self.grids[i])
        return self.project(x)


@model("t2tvit")
class T2TViT(ViT):
    """images (B, channels, H, W) -> Output. Its table of positions is fixed.

    The released weights were trained with scores in the blocks that are divided by the square root of dim,
    not of a head's width. So multiply the first dim rows of each blocks.i.attn.qkv.weight by heads ** -0.5
    before they are loaded."""
    Config = T2TViTConfig
    # what ViT calls patch_embed has its official name
    patch_embed: Any = property(lambda self: self.tokens_to_token,
                                lambda self, module: setattr(self, "tokens_to_token", module))

    def build(self, c: Any) -> None:
        super().build(c)
        self.pos_embed = nn.Buffer(nn.sinusoids(self.pos_embed.shape[1], c.dim)[None])
        for name, module in self.named_modules():
            if isinstance(module, TokenPerformer):
                module.start(name)

    def embedding(self, c: Any) -> nn.PatchEmbed:
        return TokensToToken(c)

    @property
    def pos_embed(self) -> Array:  # type: ignore[override]
        """The table (1, T, dim), an array: a buffer holds it, for it is not learned."""
        return vars(self)["pos_embed"].data

    @pos_embed.setter
    def pos_embed(self, table: Any) -> None:
        vars(self)["pos_embed"] = nn.Buffer(table.data)
