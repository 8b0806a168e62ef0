"""The Vision Transformer (Dosovitskiy et al. 2021): patches, positions, blocks, one head. Names follow timm.

Every model with a single set of tokens shares its loop over blocks: a method that prunes or merges tokens
overrides `before_block`, or `run_block` if it works between the two branches of a block.
"""
import dataclasses
from typing import Any, ClassVar

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .base import Model, Output, Sizes, model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(Sizes):
    """pool: what the head reads. "token": the class token (timm's default, and DynamicViT's). "mean": the
    mean of the normed tokens; there is no class token then."""
    qkv_bias: bool = True
    pool: str = "token"
    choices: ClassVar = {"pool": ("token", "mean")}


@dataclasses.dataclass
class Tokens:
    """The state that goes from block to block.

    x (B, T, D): the tokens; the first `extra` of them (the class token) are not patches. keep (B, T): the
    mask of the attention; None: all are seen. official: whether the mask acts as in DynamicViT's official
    code. size (B, T): how many patches each token stands for; None: one. attention: a list to which each
    block adds its weights, or None. paths (B, depth, branches): factors of the residual branches, or None.
    taken (B, n): what `index` is once tokens have been taken."""
    x: Tensor
    extra: int = 0
    keep: Tensor | None = None
    official: bool = False
    size: Array | None = None
    attention: list[Tensor] | None = None
    paths: Array | None = None
    taken: Array | None = None

    @property
    def patches(self) -> Tensor:
        """The patch tokens (B, n, D)."""
        return self.x[:, self.extra:] if self.extra else self.x

    @property
    def index(self) -> Array:
        """(B, n): for each patch token, which patch of the picture it is, counted row by row."""
        if self.taken is not None:
            return self.taken
        xp, n = array_module(self.x.data), self.x.shape[1] - self.extra
        return xp.broadcast_to(xp.arange(n), (len(self.x), n))

    def take(self, places: Array) -> None:
        """Go on with the patch tokens at `places` (B, k), ascending, and with the class token."""
        xp = array_module(places)
        self.taken = places if self.taken is None else xp.take_along_axis(self.taken, places, axis=1)
        if self.extra:
            first = xp.broadcast_to(xp.arange(self.extra), (len(places), self.extra))
            places = xp.concatenate([first, places + self.extra], axis=1)
        self.x = ops.take_tokens(self.x, places)


@model("vit")
class ViT(Model):
    """A ViT. images (B, channels, H, W) -> Output."""
    Config: type[Sizes] = ViTConfig

    def build(self, c: Any) -> None:
        self.patch_embed = nn.PatchEmbed(c.image_size, c.patch_size, c.dim, c.channels)
        positions = nn.start_positions(self.patch_embed.grid, c.dim)
        self.num_patches = len(positions)
        if c.pool == "token":
            self.cls_token = nn.Parameter(np.zeros((1, 1, c.dim), "float32"))
            nn.normal(self.cls_token, "cls_token", std=0.02)
            positions = np.concatenate([np.zeros((1, c.dim), "float32"), positions])
        self.pos_embed = nn.Parameter(positions[None])
        self.blocks = [nn.Block(c.dim, c.heads, c.mlp_ratio, c.qkv_bias) for _ in range(c.depth)]
        self.norm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.num_classes)
        nn.initialise(self)

    def embed(self, images: Tensor | Array) -> Tensor:
        """images -> tokens with positions (B, T, D), the class token first if there is one."""
        x = self.patch_embed(images)
        if self.config.pool == "token":
            x = ops.concat(ops.broadcast_to(self.cls_token, shape=(len(x), 1, x.shape[2])), x, axis=1)
        return x + self.pos_embed

    def forward(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None) -> Output:
        """trace: keep the weights of the attention. paths: factors (B, depth, 2) of the residual branches
        (tasks.drop_paths), in training."""
        return self.read(self.encode(self.start(images, trace, paths)))

    def start(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None,
              state: type[Any] = Tokens, **fields: Any) -> Any:
        """The Tokens before the first block. state: Tokens, or a subclass with further `fields`."""
        x = self.embed(images)
        return state(x, x.shape[1] - self.num_patches, attention=[] if trace else None, paths=paths, **fields)

    def encode(self, tokens: Tokens) -> Any:
        """Run the Tokens through all blocks; returns them."""
        for i in range(len(self.blocks)):
            self.before_block(i, tokens)
            self.run_block(i, tokens)
        return tokens

    def before_block(self, i: int, tokens: Tokens) -> None:
        """What a method does to the tokens before block i. A ViT: nothing."""

    def run_block(self, i: int, tokens: Tokens) -> None:
        """Block i."""
        tokens.x = self.blocks[i](tokens.x, nn.column(tokens.paths, i), keep=tokens.keep,
                                  official=tokens.official, attention=tokens.attention)

    def read(self, tokens: Tokens) -> Output:
        """Tokens after the last block -> Output."""
        tokens.x = self.norm(tokens.x)
        return Output(self.classify(tokens.x), tokens.patches, tokens.attention or [])

    def classify(self, x: Tensor) -> Tensor:
        """Normed tokens (B, T, D) -> logits (B, K)."""
        return self.head(x[:, 0] if self.config.pool == "token" else x.mean(axis=1))
