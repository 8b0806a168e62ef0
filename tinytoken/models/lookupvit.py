"""LookupViT (Koner et al. 2024, arXiv 2407.12753): many lookup tokens on a cheap path, few compressed tokens
on a heavy one.

Each block: (a) the compressed tokens gather from the lookup tokens by cross-attention, (b) they are refined
by an ordinary transformer block, (c) the same attention, read backward, infuses them into the lookup tokens,
(d) a light MLP follows there. The paper's text leaves readers room; where public readings differ (reuse,
norms, output projections) the choice is ours and an option. Nothing in a block depends on the number of
compressed tokens, so one set of weights serves every compressed grid.
"""
import dataclasses
from typing import ClassVar

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..errors import expect
from ..tensor import Tensor, fused
from .base import Model, Output, Sizes, model

REUSE = ("probs", "renorm", "resoftmax", "separate", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupViTConfig(Sizes):
    """compressed: the grid (m, n) of compressed tokens, for which their position table is made; a call may
    ask for any other up to the lookup grid. lookup_mlp_ratio: of the light MLP (d). reuse: how (c) reads the
    attention of (a) (ops.lookup_infuse); "separate" gives (c) queries and keys of its own, "none" leaves (c)
    out. norm: "qk" norms the projected queries and keys of (a), "pre" its inputs, of values too. classifiers:
    "both" trains a head on each token set, "compressed" one."""
    compressed: tuple[int, int] = (3, 3)
    lookup_mlp_ratio: float = 0.5
    reuse: str = "probs"
    norm: str = "qk"
    classifiers: str = "both"
    choices: ClassVar = {"reuse": REUSE, "norm": ("qk", "pre"), "classifiers": ("both", "compressed")}

    def __post_init__(self):
        super().__post_init__()
        expect(self.lookup_mlp_ratio > 0, self.where,
               f"lookup_mlp_ratio {self.lookup_mlp_ratio}, expected a positive number")


@dataclasses.dataclass
class LookupOutput(Output):
    """tokens: the compressed ones. lookup_logits (B, K) of the lookup tokens' head, and lookup (B, N, D), the
    tokens that it read: both in train mode and with mean_of_heads, else None."""
    lookup_logits: Tensor | None = None
    lookup: Tensor | None = None


class LookupBlock(nn.Module):
    """One block, (a) to (d). lookup (B, N, D), compressed (B, M, D) -> both, refined. paths (B, 5): factors
    of what is added by (a), by the two branches of (b), by (c) and by (d), see nn.scaled. reuse, norm: as of
    LookupViTConfig."""
    branches = 5

    def __init__(self, dim, heads, mlp_ratio=4, lookup_mlp_ratio=0.5, reuse="probs", norm="qk"):
        self.heads, self.reuse, self.norm = heads, reuse, norm
        self.gather_norm_q, self.gather_norm_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gather_q, self.gather_k, self.gather_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gather_proj = nn.Linear(dim, dim)
        self.refine = nn.Block(dim, heads, mlp_ratio)
        if reuse != "none":
            self.infuse_norm, self.infuse_v, self.infuse_proj = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        if reuse == "separate":
            self.infuse_norm_q, self.infuse_q, self.infuse_k = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lookup_norm, self.lookup_mlp = nn.LayerNorm(dim), nn.MLP(dim, round(dim * lookup_mlp_ratio))

    def forward(self, lookup, compressed, tail=True, attention=None, paths=None):
        """tail=False stops after (b): what only the lookup tokens would see of the last block. attention: a
        list that gets the weights (B, H, M, N) of (a)."""
        compressed, A, logits = self.gather(lookup, compressed, nn.column(paths, 0))
        if attention is not None:
            attention.append(A.detach())
        compressed = self.refine(compressed, nn.column(paths, slice(1, 3)))
        if tail:
            if self.reuse != "none":
                lookup = self.infuse(lookup, compressed, A, logits, nn.column(paths, 3))
            lookup = nn.mlp_branch(lookup, self.lookup_norm, self.lookup_mlp, nn.column(paths, 4))
        return lookup, compressed

    @fused
    def gather(self, lookup, compressed, factors=None):
        """(a) information gathering -> the new compressed tokens, the attention A (B, H, M, N), and its
        logits (None where an implementation does not keep them and (c) does not read them). factors (B,): of
        what is added."""
        asking, asked = compressed, lookup
        if self.norm == "pre":
            asking, asked = self.gather_norm_q(asking), self.gather_norm_k(asked)
        q, k, v = self.gather_q(asking), self.gather_k(asked), self.gather_v(asked)
        if self.norm == "qk":
            q, k = self.gather_norm_q(q), self.gather_norm_k(k)
        out, A, logits = ops.lookup_gather(*(ops.split_heads(x, heads=self.heads) for x in (q, k, v)))
        return compressed + nn.scaled(self.gather_proj(ops.merge_heads(out)), factors), A, logits

    @fused
    def infuse(self, lookup, compressed, A, logits, factors=None):
        """(c) global context infusion -> the new lookup tokens. factors (B,): of what is added."""
        compressed = self.infuse_norm(compressed)
        v = ops.split_heads(self.infuse_v(compressed), heads=self.heads)
        if self.reuse == "separate":
            q = ops.split_heads(self.infuse_q(self.infuse_norm_q(lookup)), heads=self.heads)
            out = ops.attention(q, ops.split_heads(self.infuse_k(compressed), heads=self.heads), v)
        else:
            out = ops.lookup_infuse(A, logits, v, reuse=self.reuse)
        return lookup + nn.scaled(self.infuse_proj(ops.merge_heads(out)), factors)


@model("lookupvit")
class LookupViT(Model):
    """A LookupViT. images (B, channels, H, W) -> LookupOutput; no class token. In eval mode the last block's
    part that only the lookup tokens would see is left out."""
    Config: type[Sizes] = LookupViTConfig

    def build(self, c):
        self.patch_embed = nn.PatchEmbed(c.image_size, c.patch_size, c.dim, c.channels)
        self.compressed = self._check_grid(c.compressed)
        positions = nn.start_positions(self.patch_embed.grid, c.dim)
        resized = ops.resize_matrix(self.patch_embed.grid, self.compressed) @ positions
        self.pos_embed = nn.Parameter(positions[None])
        self.pos_embed_compressed = nn.Parameter(resized.astype("float32")[None])
        self.blocks = [LookupBlock(c.dim, c.heads, c.mlp_ratio, c.lookup_mlp_ratio, c.reuse, c.norm)
                       for _ in range(c.depth)]
        self.norm, self.head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.num_classes)
        if c.classifiers == "both":
            self.lookup_norm, self.lookup_head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.num_classes)
        nn.initialise(self)

    def _check_grid(self, grid):
        rows, columns = self.patch_embed.grid
        ok = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, (int, np.integer))
                                                                        for n in grid)
        expect(ok and 1 <= grid[0] <= rows and 1 <= grid[1] <= columns, "LookupViT",
               lambda: f"compressed {grid!r}, expected (m, n) from (1, 1) to the lookup grid ({rows}, "
                       f"{columns})")
        return tuple(grid)

    def embed(self, images, grid):
        """images -> lookup tokens (B, N, D) and compressed tokens (B, M, D): the patches resized before
        positions are added."""
        x = self.patch_embed(images)
        small = ops.resize(x, grid=self.patch_embed.grid, size=grid)
        return x + self.pos_embed, small + ops.resize(self.pos_embed_compressed, grid=self.compressed,
                                                      size=grid)

    def forward(self, images: Tensor | Array, compressed: tuple[int, int] | None = None,
                mean_of_heads: bool = False, trace: bool = False, paths: Array | None = None) -> LookupOutput:
        """compressed: another grid (m, n) for this call. paths: factors (B, depth, 5) of what the parts of
        the blocks add, for training (tasks.drop_paths). mean_of_heads: in eval mode, the mean of both heads'
        logits, at the cost of the last block's tail."""
        grid = self.compressed if compressed is None else self._check_grid(compressed)
        two = self.config.classifiers == "both"
        expect(two or not mean_of_heads, "LookupViT",
               "mean_of_heads asked of a model with classifiers='compressed'")
        finish = two and (self.training or mean_of_heads)
        attention: list | None = [] if trace else None
        lookup, small = self.embed(images, grid)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            lookup, small = block(lookup, small, finish or not last, attention, nn.column(paths, i))
        small, lookup = self.norm(small), self.lookup_norm(lookup) if finish else lookup
        logits = self.head(small.mean(axis=1))
        if not finish:
            return LookupOutput(logits, small, attention or [])
        lookup_logits = self.lookup_head(lookup.mean(axis=1))
        if not self.training:
            logits = (logits + lookup_logits) * 0.5
        return LookupOutput(logits, small, attention or [], lookup_logits, lookup)

    def loss(self, out, targets, teacher=None, *, smoothing=0.0, weights=None):
        """`lookupvit_loss`; of a teacher the compressed head learns the answers, too."""
        loss, parts = lookupvit_loss(out, targets, smoothing=smoothing)
        if teacher is None:
            return loss, parts
        weights = weights or self.loss_weights
        parts["kl"] = ops.kl_divergence(out.logits, teacher.logits)
        return loss * weights[0] + parts["kl"] * weights[1], parts

    def show(self, out):
        # (B, M, N), of the last block, mean over heads
        weights = to_numpy(out.attention[-1].data).mean(axis=1)
        peaked = weights[np.arange(len(weights)), weights.max(axis=2).argmax(axis=1)]
        return [("LookupViT gathers", weights.sum(axis=1)), ("its most peaked token", peaked)]


def lookupvit_loss(out, targets, *, smoothing=0.0):
    """Cross-entropy of each head, summed -> (loss, parts)."""
    parts = {"class": ops.cross_entropy(out.logits, targets, smoothing=smoothing)}
    if out.lookup_logits is not None:
        parts["lookup"] = ops.cross_entropy(out.lookup_logits, targets, smoothing=smoothing)
    loss = parts["class"] + parts["lookup"] if "lookup" in parts else parts["class"]
    return loss, parts
