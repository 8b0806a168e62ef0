"""LookupViT (Koner et al. 2024, arXiv 2407.12753): many lookup tokens on a cheap path, few compressed tokens
on a heavy one.

Each block: (a) the compressed tokens gather from the lookup tokens by cross-attention; (b) an ordinary
transformer block refines them; (c) the same attention, read backward, infuses them into the lookup tokens;
(d) a light MLP follows there. Of the paper only the abstract was at hand, and three public programs that read
the rest in different ways, so this may not be its authors' block. Where the programs differ, the choice is
ours; reuse, norms and heads are options, and lesson 09 lists all choices. Nothing in a block depends on how
many compressed tokens there are, so one set of weights serves every compressed grid.
"""
import dataclasses

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..errors import expect
from ..tensor import Tensor, fused
from .base import Loss, Model, Output, Sizes, is_whole, model, weighted_sum

REUSE = ("probs", "renorm", "resoftmax", "separate", "none")
# The reading of the paper that most of the programs share: LookupViT(**PAPER). The defaults are what learned
# best here (lessons/full/lookupvit_recipe.py).
PAPER = dict(reuse="probs", norm="qk", classifiers="both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupViTConfig(Sizes):
    """compressed: the grid (m, n) of compressed tokens for which their position table is made; a call may ask
    for any other, up to the lookup grid. lookup_mlp_ratio: of the light MLP (d).

    reuse: how (c) reads the attention of (a) (ops.lookup_infuse); "separate" gives (c) queries and keys of
    its own, "none" leaves (c) out. norm: "qk" norms the projected queries and keys of (a), "pre" the inputs
    of all three projections. classifiers: "both" trains a head on each token set, "compressed" on one."""
    compressed: tuple[int, ...] = (3, 3)
    lookup_mlp_ratio: float = 0.5
    reuse: str = "resoftmax"
    norm: str = "pre"
    classifiers: str = "compressed"
    choices = {"reuse": REUSE, "norm": ("qk", "pre"), "classifiers": ("both", "compressed")}


@dataclasses.dataclass
class LookupOutput(Output):
    """tokens: the compressed ones. lookup_logits (B, K): of the lookup tokens' head; lookup (B, N, D): the
    tokens that it read. Both are None in eval mode without mean_of_heads."""
    lookup_logits: Tensor | None = None
    lookup: Tensor | None = None


class LookupBlock(nn.Module):
    """One block, (a) to (d). lookup (B, N, D), compressed (B, M, D) -> both, refined.

    paths (B, 5): factors of what is added by (a), by the two branches of (b), by (c) and by (d), see
    nn.scaled. reuse, norm: as in LookupViTConfig."""
    branches = 5

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4, lookup_mlp_ratio: float = 0.5,
                 reuse: str = "resoftmax", norm: str = "pre") -> None:
        self.heads, self.reuse, self.norm = heads, reuse, norm
        self.gather_norm_q, self.gather_norm_k = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gather_q, self.gather_k, self.gather_v, self.gather_proj = (nn.Linear(dim, dim) for _ in "qkvo")
        self.refine = nn.Block(dim, heads, mlp_ratio)
        if reuse != "none":
            self.infuse_norm = nn.LayerNorm(dim)
            self.infuse_v, self.infuse_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if reuse == "separate":
            self.infuse_norm_q = nn.LayerNorm(dim)
            self.infuse_q, self.infuse_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lookup_norm, self.lookup_mlp = nn.LayerNorm(dim), nn.MLP(dim, round(dim * lookup_mlp_ratio))

    def forward(self, lookup: Tensor, compressed: Tensor, tail: bool = True, attention: list | None = None,
                paths: Array | None = None) -> tuple[Tensor, Tensor]:
        """tail=False stops after (b): in the last block, only the lookup tokens would see the rest.
        attention: a list to which the weights (B, H, M, N) of (a) are added."""
        compressed, A, logits = self.gather(lookup, compressed, nn.column(paths, 0))
        if attention is not None:
            attention.append(A.detach())
        compressed = self.refine(compressed, nn.column(paths, slice(1, 3)))
        if tail:
            if self.reuse != "none":
                lookup = self.infuse(lookup, compressed, A, logits, nn.column(paths, 3))
            lookup = nn.mlp_branch(lookup, self.lookup_norm, self.lookup_mlp, nn.column(paths, 4))
        return lookup, compressed

    def tie_keys(self) -> None:
        """Let the keys of (a) start as its queries, see nn.initialise."""
        self.gather_k.weight.data[...] = self.gather_q.weight.data

    @fused
    def gather(self, lookup: Tensor, compressed: Tensor, factors: Array | None = None) -> tuple:
        """(a) information gathering -> the new compressed tokens, the attention A (B, H, M, N), its logits.

        factors (B,): of what is added. An implementation may return None for logits that (c) does not
        read."""
        asking, asked = ((self.gather_norm_q(compressed), self.gather_norm_k(lookup)) if self.norm == "pre"
                         else (compressed, lookup))
        q, k, v = self.gather_q(asking), self.gather_k(asked), self.gather_v(asked)
        if self.norm == "qk":
            q, k = self.gather_norm_q(q), self.gather_norm_k(k)
        out, A, logits = ops.lookup_gather(*(ops.split_heads(x, heads=self.heads) for x in (q, k, v)))
        return compressed + nn.scaled(self.gather_proj(ops.merge_heads(out)), factors), A, logits

    @fused
    def infuse(self, lookup: Tensor, compressed: Tensor, A: Tensor, logits: Tensor,
               factors: Array | None = None) -> Tensor:
        """(c) global context infusion -> the new lookup tokens. factors (B,): of what is added."""
        compressed = self.infuse_norm(compressed)
        v = ops.split_heads(self.infuse_v(compressed), heads=self.heads)
        if self.reuse == "separate":
            q = ops.split_heads(self.infuse_q(self.infuse_norm_q(lookup)), heads=self.heads)
            out = ops.attention(q, ops.split_heads(self.infuse_k(compressed), heads=self.heads), v)
        else:
            out = ops.lookup_infuse(A, logits, v, reuse=self.reuse)
        return lookup + nn.scaled(self.infuse_proj(ops.merge_heads(out)), factors)


def lookupvit_loss(out: LookupOutput, targets: Array, *, smoothing: float = 0.0) -> Loss:
    """Cross-entropy of each head, summed -> (loss, parts)."""
    heads = {"class": out.logits} | ({} if out.lookup_logits is None else {"lookup": out.lookup_logits})
    parts = {name: ops.cross_entropy(of, targets, smoothing=smoothing) for name, of in heads.items()}
    return weighted_sum((1, 1), parts), parts


@model("lookupvit")
class LookupViT(Model):
    """A LookupViT. images (B, channels, H, W) -> LookupOutput. There is no class token.

    In eval mode the end of the last block is left out: only the lookup tokens would see it."""
    Config: type[LookupViTConfig] = LookupViTConfig
    class_loss = staticmethod(lookupvit_loss)  # of a teacher, the compressed head alone learns the answers

    def build(self, c: LookupViTConfig) -> None:
        self.patch_embed = self.embedding(c)
        positions = nn.start_positions(self.patch_embed.grid, c.dim)
        self.pos_embed, self.compressed = nn.Parameter(positions[None]), self._check_grid(c.compressed)
        resized = ops.resize_matrix(self.patch_embed.grid, self.compressed) @ positions
        self.pos_embed_compressed = nn.Parameter(resized.astype("float32")[None])
        self.blocks = [LookupBlock(c.dim, c.heads, c.mlp_ratio, c.lookup_mlp_ratio, c.reuse, c.norm)
                       for _ in range(c.depth)]
        self.norm, self.head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.num_classes)
        if c.classifiers == "both":
            self.lookup_norm, self.lookup_head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.num_classes)
        nn.initialise(self, keys_as_queries=c.keys_as_queries)

    def _check_grid(self, grid):
        own = self.patch_embed.grid
        fits = isinstance(grid, (tuple, list)) and len(grid) == len(own) and all(map(is_whole, grid))
        expect(fits and all(1 <= n <= top for n, top in zip(grid, own)), type(self).__name__,
               f"compressed {grid!r}, expected a grid from {(1,) * len(own)} to the lookup grid {own}")
        return tuple(grid)

    def embed(self, images: Tensor | Array, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """images -> lookup tokens (B, N, D) and compressed tokens (B, M, D), with positions. The compressed
        ones are the patches, resized before positions are added."""
        x = self.patch_embed(images)
        positions = ops.resize(self.pos_embed_compressed, grid=self.compressed, size=grid)
        return x + self.pos_embed, ops.resize(x, grid=self.patch_embed.grid, size=grid) + positions

    def forward(self, images: Tensor | Array, compressed: tuple[int, ...] | None = None,
                mean_of_heads: bool = False, trace: bool = False, paths: Array | None = None) -> LookupOutput:
        """compressed: another grid (m, n) for this call. paths: factors (B, depth, 5) of what the parts of
        the blocks add, in training (tasks.drop_paths). mean_of_heads: in eval mode, the logits are the mean
        of both heads', at the cost of the last block's end."""
        expect(self.config.classifiers == "both" or not mean_of_heads, "LookupViT",
               "mean_of_heads asked of a model with classifiers='compressed'")
        both = self.config.classifiers == "both" and (self.training or mean_of_heads)
        grid = self.compressed if compressed is None else self._check_grid(compressed)
        (lookup, small), attention = self.embed(images, grid), list[Tensor]()
        for i, block in enumerate(self.blocks):
            tail = both or i < len(self.blocks) - 1
            lookup, small = block(lookup, small, tail, attention if trace else None, nn.column(paths, i))
        small = self.norm(small)
        out = LookupOutput(self.head(small.mean(axis=1)), small, attention)
        if both:
            out.lookup = self.lookup_norm(lookup)
            out.lookup_logits = self.lookup_head(out.lookup.mean(axis=1))
            out.logits = out.logits if self.training else (out.logits + out.lookup_logits) * 0.5
        return out

    def show(self, out: LookupOutput) -> list[tuple[str, np.ndarray]]:
        weights = to_numpy(out.attention[-1].data).mean(axis=1)  # (B, M, N): last block, mean over heads
        peaked = weights[np.arange(len(weights)), weights.max(axis=2).argmax(axis=1)]
        return [("LookupViT gathers", weights.sum(axis=1)), ("its most peaked token", peaked)]
