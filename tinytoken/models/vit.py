"""The Vision Transformer (Dosovitskiy et al. 2021): patches, positions, blocks, one head. Names follow timm."""
import dataclasses

import numpy as np

from .. import nn, ops
from ..errors import expect


@dataclasses.dataclass
class Trace:
    """What a forward pass with trace=True saw. tokens: final-norm tokens (B, N, D) without the class token, for LookupViT the
    compressed ones (B, M, D).
    attention[l]: the weights of block l, (B, H, T, T), for LookupViT those of the gather, (B, H, M, N).
    kept[s]: DynamicViT in eval mode, the original numbers (B, k) of the patches kept by stage s, ascending.
    lookup: LookupViT's lookup tokens where they were finished."""
    tokens: object = None
    attention: list = dataclasses.field(default_factory=list)
    kept: list = dataclasses.field(default_factory=list)
    lookup: object = None


class ViT(nn.Module):
    """A ViT on square pictures. images (B, channels, S, S) -> logits (B, num_classes).

    pool: "token" reads the class token, as timm's default and DynamicViT have it; "mean" has none and averages the normed tokens.
    """

    def __init__(self, image_size=32, patch_size=4, dim=96, depth=6, heads=3, mlp_ratio=4, num_classes=10, *,
                 pool="token", channels=3, qkv_bias=True):
        expect(pool in ("token", "mean"), "ViT", f"pool {pool!r}, expected token or mean")
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio,
                           num_classes=num_classes, pool=pool, channels=channels, qkv_bias=qkv_bias)
        check_sizes("ViT", image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                    num_classes=num_classes, channels=channels, mlp_ratio=mlp_ratio)
        self.pool = pool
        self.patch_embed = nn.PatchEmbed(image_size, patch_size, dim, channels)
        rows, columns = self.patch_embed.grid
        positions = nn.start_positions(self.patch_embed.grid, dim)
        if pool == "token":
            self.cls_token = nn.Parameter(np.zeros((1, 1, dim), "float32"))
            nn.normal(self.cls_token, "cls_token", std=0.02)
            positions = np.concatenate([np.zeros((1, dim), "float32"), positions])
        self.pos_embed = nn.Parameter(positions[None])
        self.num_patches = rows * columns
        self.blocks = [nn.Block(dim, heads, mlp_ratio, qkv_bias) for _ in range(depth)]
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.initialise(self)

    def embed(self, images):
        """images -> tokens with positions (B, T, D), the class token first if there is one."""
        x = self.patch_embed(images)
        if self.pool == "token":
            x = ops.concat(ops.broadcast_to(self.cls_token, shape=(len(x), 1, x.shape[2])), x, axis=1)
        return x + self.pos_embed

    def classify(self, x):
        """Normed tokens (B, T, D) -> logits (B, K)."""
        return self.head(x[:, 0] if self.pool == "token" else x.mean(axis=1))

    def patches(self, x):
        """The tokens without the class token."""
        return x[:, 1:] if self.pool == "token" else x

    def features(self, images, attention=None, paths=None):
        """images -> normed tokens (B, T, D), the class token first if there is one. attention: a list that gets the blocks' weights."""
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            x = block(x, trace=attention, paths=of_block(paths, i))
        return self.norm(x)

    def forward(self, images, trace=False, paths=None):
        """paths: factors (B, depth, 2) of the residual branches, for training (train.drop_paths)."""
        record = Trace()
        x = self.features(images, record.attention if trace else None, paths)
        logits = self.classify(x)
        if not trace:
            return logits
        record.tokens = self.patches(x)
        return logits, record


def of_block(paths, number):
    """The factors (B, branches) of one block, or None without any."""
    return None if paths is None else paths[:, number]


def check_sizes(where, mlp_ratio=1, **sizes):
    """Every size must be a positive whole number, and the MLP's ratio positive."""
    expect(mlp_ratio > 0, where, f"mlp_ratio {mlp_ratio}, expected a positive number")
    for name, size in sizes.items():
        expect(isinstance(size, (int, np.integer)) and size > 0, where, f"{name} {size!r}, expected a positive whole number")
