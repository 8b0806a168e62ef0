"""LookupViT (Koner et al. 2024, arXiv 2407.12753): many lookup tokens on a cheap path, few compressed tokens on a heavy one.

Each block: (a) the compressed tokens gather from the lookup tokens by cross-attention, (b) they are refined by an ordinary
transformer block, (c) the same attention, read backward, infuses them into the lookup tokens, (d) a light MLP follows there.
The paper's text leaves readers room; where public readings differ (reuse, norms, output projections) the choice is ours and
an option. Nothing in a block depends on the number of compressed tokens, so one set of weights serves every compressed grid.
"""
import dataclasses

import numpy as np

from .. import nn, ops
from ..errors import expect
from ..tensor import Tensor
from .vit import Trace, check_sizes, of_block

REUSE = ("probs", "renorm", "resoftmax", "separate", "none")


@dataclasses.dataclass
class LookupOutput:
    """What training needs. logits (B, K) of the compressed head; lookup_logits (B, K) of the other, or None without one."""
    logits: Tensor
    lookup_logits: Tensor | None


class LookupBlock(nn.Module):
    """One block, (a) to (d). lookup (B, N, D), compressed (B, M, D) -> both, refined. paths (B, 5): factors of what is added by (a),
    by the two branches of (b), by (c) and by (d), see nn.branch.

    norm: "qk" norms the projected queries and keys of (a), "pre" its inputs, of values too. reuse: how (c) reads the attention
    of (a) (ops.lookup_infuse); "separate" gives (c) queries and keys of its own, "none" leaves (c) out.
    """

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

    def forward(self, lookup, compressed, tail=True, trace=None, paths=None):
        """tail=False stops after (b): what only the lookup tokens would see of the last block."""
        found = nn.by_kernel("gather_branch", lookup, compressed, self, paths)
        if found is None:
            out, A, logits = self.gather(lookup, compressed)
            compressed = compressed + nn.branch(self.gather_proj(ops.merge_heads(out)), paths, 0)
        else:
            (compressed, A), logits = found, None
        if trace is not None:
            trace.append(A.detach())
        compressed = self.refine(compressed, paths=None if paths is None else paths[:, 1:3])
        if not tail:
            return lookup, compressed
        if self.reuse != "none":
            infused = nn.by_kernel("infuse_branch", lookup, compressed, A, self, paths)
            lookup = lookup + nn.branch(self.infuse(lookup, compressed, A, logits), paths, 3) if infused is None else infused
        return nn.residual(lookup, self.lookup_norm, self.lookup_mlp, paths, 4), compressed

    def gather(self, lookup, compressed):
        """(a) information gathering -> what each head read (B, H, M, d), the attention A (B, H, M, N), its logits."""
        if self.norm == "pre":
            compressed, lookup = self.gather_norm_q(compressed), self.gather_norm_k(lookup)
        q, k, v = self.gather_q(compressed), self.gather_k(lookup), self.gather_v(lookup)
        if self.norm == "qk":
            q, k = self.gather_norm_q(q), self.gather_norm_k(k)
        return ops.lookup_gather(*(ops.split_heads(x, heads=self.heads) for x in (q, k, v)))

    def infuse(self, lookup, compressed, A, logits):
        """(c) global context infusion -> what is added to the lookup tokens (B, N, D)."""
        compressed = self.infuse_norm(compressed)
        v = ops.split_heads(self.infuse_v(compressed), heads=self.heads)
        if self.reuse == "separate":
            q = ops.split_heads(self.infuse_q(self.infuse_norm_q(lookup)), heads=self.heads)
            out = ops.attention(q, ops.split_heads(self.infuse_k(compressed), heads=self.heads), v)
        else:
            out = ops.lookup_infuse(A, logits, v, reuse=self.reuse)
        return self.infuse_proj(ops.merge_heads(out))


class LookupViT(nn.Module):
    """A LookupViT on square pictures. images (B, channels, S, S); no class token.

    compressed: the grid (m, n) of compressed tokens, for which their position table is made; a call may ask for any other up to
    the lookup grid. classifiers: "both" trains a head on each token set, "compressed" one. train mode -> LookupOutput; eval mode
    -> the compressed head's logits (B, K), without the last block's part that only the lookup tokens would see.
    """

    def __init__(self, image_size=32, patch_size=4, dim=96, depth=6, heads=3, mlp_ratio=4, num_classes=10, *, compressed=(3, 3),
                 lookup_mlp_ratio=0.5, reuse="probs", norm="qk", classifiers="both", channels=3):
        expect(reuse in REUSE, "LookupViT", f"reuse {reuse!r}, expected one of {', '.join(REUSE)}")
        expect(norm in ("qk", "pre"), "LookupViT", f"norm {norm!r}, expected qk or pre")
        expect(classifiers in ("both", "compressed"), "LookupViT", f"classifiers {classifiers!r}, expected both or compressed")
        check_sizes("LookupViT", image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                    num_classes=num_classes, channels=channels, mlp_ratio=min(mlp_ratio, lookup_mlp_ratio))
        self.patch_embed = nn.PatchEmbed(image_size, patch_size, dim, channels)
        self.compressed = self._check_grid(compressed)
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio,
                           num_classes=num_classes, compressed=self.compressed, lookup_mlp_ratio=lookup_mlp_ratio, reuse=reuse,
                           norm=norm, classifiers=classifiers, channels=channels)
        positions = nn.start_positions(self.patch_embed.grid, dim)
        resized = ops.resize_matrix(self.patch_embed.grid, self.compressed) @ positions
        self.pos_embed = nn.Parameter(positions[None])
        self.pos_embed_compressed = nn.Parameter(resized.astype("float32")[None])
        self.blocks = [LookupBlock(dim, heads, mlp_ratio, lookup_mlp_ratio, reuse, norm) for _ in range(depth)]
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        if classifiers == "both":
            self.lookup_norm, self.lookup_head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        nn.initialise(self)

    def _check_grid(self, grid):
        rows, columns = self.patch_embed.grid
        ok = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, (int, np.integer)) for n in grid)
        expect(ok and 1 <= grid[0] <= rows and 1 <= grid[1] <= columns, "LookupViT",
               lambda: f"compressed {grid!r}, expected (m, n) from (1, 1) to the lookup grid ({rows}, {columns})")
        return tuple(grid)

    def embed(self, images, grid):
        """images -> lookup tokens (B, N, D) and compressed tokens (B, M, D): the patches resized before positions are added."""
        x = self.patch_embed(images)
        small = ops.resize(x, grid=self.patch_embed.grid, size=grid)
        return x + self.pos_embed, small + ops.resize(self.pos_embed_compressed, grid=self.compressed, size=grid)

    def forward(self, images, compressed=None, mean_of_heads=False, trace=False, paths=None):
        """compressed: another grid (m, n) for this call. paths: factors (B, depth, 5) of what the parts of the blocks add, for
        training (train.drop_paths). mean_of_heads: in eval mode, the mean of both heads' logits, at the
        cost of the last block's tail."""
        grid = self.compressed if compressed is None else self._check_grid(compressed)
        two = self.config["classifiers"] == "both"
        expect(two or not mean_of_heads, "LookupViT", "mean_of_heads asked of a model with classifiers='compressed'")
        finish = two and (self.training or mean_of_heads)
        record = Trace()
        lookup, small = self.embed(images, grid)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            lookup, small = block(lookup, small, tail=finish or not last, trace=record.attention if trace else None,
                                  paths=of_block(paths, i))
        record.tokens = self.norm(small)
        record.lookup = self.lookup_norm(lookup) if finish else None
        logits = self.head(record.tokens.mean(axis=1))
        lookup_logits = self.lookup_head(record.lookup.mean(axis=1)) if finish else None
        if self.training:
            out = LookupOutput(logits, lookup_logits)
        else:
            out = (logits + lookup_logits) * 0.5 if mean_of_heads else logits
        return (out, record) if trace else out


def lookupvit_loss(out, targets, *, smoothing=0.0):
    """Cross-entropy of each head, summed -> (loss, parts)."""
    parts = {"class": ops.cross_entropy(out.logits, targets, smoothing=smoothing)}
    if out.lookup_logits is not None:
        parts["lookup"] = ops.cross_entropy(out.lookup_logits, targets, smoothing=smoothing)
    loss = parts["class"] + parts["lookup"] if "lookup" in parts else parts["class"]
    return loss, parts
