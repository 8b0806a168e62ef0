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
from .column import ColumnConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ColumnConfig):
    """pool: what the head reads. "token": the class token (timm's default, and DynamicViT's). "mean": the
    mean of the patch tokens. class_token: whether there is one; None: if the head reads it. final_norm: what
    the last norm is applied to, all "tokens", what is "pooled" of them (timm's fc_norm), or "none"."""
    pool: str = "token"
    class_token: bool | None = None
    final_norm: str = "tokens"
    choices: ClassVar = {"pool": ("token", "mean"), "final_norm": ("tokens", "pooled", "none")}


@dataclasses.dataclass
class Tokens:
    """The state that goes from block to block.

    x (B, T, D): the tokens; the first `extra` of them (the class token, registers) are not patches, and
    always stay. keep (B, T): the mask of the attention; None: all are seen. official: whether the mask acts
    as in DynamicViT's official code. size (B, T): how many patches each token stands for; None: one.
    attention: a list to which each block adds its weights, or None; ends: likewise, the tokens after it.
    paths (B, depth, branches): factors of the residual branches, or None. taken (B, n): what `index` is once
    tokens have been taken."""
    x: Tensor
    extra: int = 0
    keep: Tensor | None = None
    official: bool = False
    size: Array | None = None
    attention: list[Tensor] | None = None
    ends: list[Tensor] | None = None
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
        """Go on with the patch tokens at `places` (B, k), ascending, and with the tokens before them."""
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
        self.patch_embed = self.embedding(c)
        positions = nn.start_positions(self.patch_embed.grid, c.dim)
        self.num_patches, self.prefix, self.extra = len(positions), tuple(c.prefix), sum(c.prefix.values())
        for name, count in c.prefix.items():
            token = nn.Parameter(nn.zeros(1, count, c.dim))
            nn.normal(token, name, std=0.02)
            setattr(self, name, token)
            if not c.no_embed_class:
                positions = np.concatenate([nn.zeros(count, c.dim), positions])
        self.pos_embed = nn.Parameter(positions[None])
        self.norm_pre = nn.LayerNorm(c.dim, c.eps) if c.pre_norm else None
        self.blocks = [self.block(c, i) for i in range(c.depth)]
        self.norm = nn.LayerNorm(c.dim, c.eps) if c.final_norm == "tokens" else None
        self.fc_norm = nn.LayerNorm(c.dim, c.eps) if c.final_norm == "pooled" else None
        self.head = nn.Linear(c.dim, c.num_classes)
        self.head_dist = nn.Linear(c.dim, c.num_classes) if c.distilled else None
        nn.initialise(self, keys_as_queries=c.keys_as_queries)

    def block(self, c: Any, i: int) -> Any:
        """A new block i."""
        return nn.Block(c.dim, c.heads, c.mlp_ratio, c.qkv_bias, c.eps, c.qk_norm, c.layer_scale, c.skip_lam)

    def embed(self, images: Tensor | Array) -> Tensor:
        """images -> tokens with positions (B, T, D): those of `prefix` first, then the patches."""
        x, everywhere = self.patch_embed(images), not self.config.no_embed_class
        x = x if everywhere else x + self.pos_embed
        if self.prefix:
            first = (getattr(self, name) for name in self.prefix)
            x = ops.concat(*(ops.broadcast_to(t, shape=(len(x), *t.shape[1:])) for t in first), x, axis=1)
        x = x + self.pos_embed if everywhere else x
        return x if self.norm_pre is None else self.norm_pre(x)

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
        if tokens.ends is not None:
            tokens.ends.append(tokens.x)

    def read(self, tokens: Tokens) -> Output:
        """Tokens after the last block -> Output."""
        if self.norm is not None:
            tokens.x = self.norm(tokens.x)
        return Output(self.classify(tokens.x), tokens.patches, tokens.attention or [])

    def classify(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) after the final norm -> logits (B, K)."""
        if self.config.pool == "token":
            pooled = x[:, 0]
        else:
            pooled = (x[:, self.extra:] if self.extra else x).mean(axis=1)
        logits = self.head(pooled if self.fc_norm is None else self.fc_norm(pooled))
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) * 0.5
