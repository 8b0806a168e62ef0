"""A ViT that shows what it has after several blocks, and may go on with fewer tokens: the encoder of SegViT
and of its Shrunk and Shrunk++ forms (Zhang et al. 2022 and 2023, arXiv 2210.05844 and 2306.06289).

At one block the queries are some of the tokens and the keys all: what goes on are these some. Shrunk takes
every second token in both directions; Shrunk++ also tokens at edges. How these are found is not public: here
a linear layer scores each token, and a fixed number of the highest scores is added, so that all pictures have
as many tokens.
"""
import dataclasses
import math
from typing import Any, ClassVar

from .. import nn, ops, random
from ..backend import Array, array_module
from ..tensor import Tensor
from .base import is_whole
from .column import PlainConfig
from .masks import packed_qkv
from .vit import Tokens, ViT


@dataclasses.dataclass(frozen=True)
class ShrunkConfig(PlainConfig):
    """read: the blocks after which the tokens are shown, None: at each third of the depth. shrink: at a third
    of the depth, "strided": every second token in both directions goes on; "edges": these and `extra` more,
    of the highest edge scores; "random": and `extra` others, drawn once, the same for all pictures;
    "average": the means of 2 x 2 tokens; "none": all go on. When it shrinks, what is shown is the tokens
    before that block, and those at the end."""
    _: dataclasses.KW_ONLY
    read: tuple[int, ...] | None = None
    shrink: str = "none"
    extra: int = 0
    choices: ClassVar = {"shrink": ("none", "average", "strided", "edges", "random")}

    def __post_init__(self):
        super().__post_init__()
        if self.read is None:
            self.settle("read", tuple(sorted({max(0, self.depth * (s + 1) // 3 - 1) for s in range(3)})))
        self.check(isinstance(self.read, tuple) and all(map(is_whole, self.read)) and len(self.read)
                   and list(self.read) == sorted(set(self.read)) and 0 <= self.read[0]
                   and self.read[-1] == self.depth - 1,
                   f"read {self.read!r} of {self.depth} blocks, expected rising numbers of blocks, the last "
                   f"{self.depth - 1}")
        grid = tuple(side // self.patch_size for side in nn.both_sides(self.image_size))
        self.check(self.shrink == "none" or all(side % 2 == 0 for side in grid) and self.depth > 1,
                   f"shrink {self.shrink!r} of {grid[0]} x {grid[1]} tokens and {self.depth} blocks, "
                   f"expected an even number of rows and columns, and at least 2 blocks")
        most = grid[0] * grid[1] * 3 // 4 if self.shrink in ("edges", "random") else 0
        self.check(is_whole(self.extra) and 0 <= self.extra <= most,
                   f"extra {self.extra!r} with shrink {self.shrink!r}, expected 0 to {most}")


@dataclasses.dataclass
class ShownTokens(Tokens):
    """shown: the tokens (B, n, D) after the blocks that are read. edges (B, N): edge scores, as logits."""
    shown: list[Tensor] = dataclasses.field(default_factory=list)
    edges: Tensor | None = None


class ShrunkViT(ViT):
    """images -> ShownTokens. The last of `shown` is normed, as a ViT's tokens are."""
    Config = ShrunkConfig
    head: Any
    norm: Any

    def build(self, c: Any) -> None:
        super().build(c)
        self.head = None
        self.at = max(1, c.depth // 3) if c.shrink != "none" else None
        self.edge_head = nn.Linear(c.dim, 1) if c.shrink == "edges" else None
        if self.edge_head is not None:
            nn.xavier(self.edge_head.weight, "edge_head.weight")

    def start(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None) -> Any:
        return super().start(images, trace, paths, ShownTokens)

    def before_block(self, i: int, tokens: ShownTokens) -> None:
        if i == self.at:
            tokens.shown.append(tokens.x)
            if self.config.shrink == "average":
                rows, columns = self.patch_embed.grid
                x = tokens.x.reshape(len(tokens.x), rows // 2, 2, columns // 2, 2, -1)
                tokens.x = x.mean(axis=(2, 4)).reshape(len(x), rows * columns // 4, -1)

    def run_block(self, i: int, tokens: ShownTokens) -> None:
        if i == self.at and self.config.shrink != "average":
            self.shrink(i, tokens)
        else:
            super().run_block(i, tokens)
        if i in self.config.read and self.at is None or i == len(self.blocks) - 1:
            tokens.shown.append(tokens.x)

    def read(self, tokens: ShownTokens) -> Any:
        tokens.shown[-1] = tokens.x = self.norm(tokens.x)
        return tokens

    def shrink(self, i: int, tokens: ShownTokens) -> None:
        """Block i, of which only the tokens at `places` are computed."""
        block, paths, places = self.blocks[i], nn.column(tokens.paths, i), self.places(tokens)
        attn, normed = block.attn, block.norm1(tokens.x)
        qkv = packed_qkv(ops.take_tokens(normed, places), normed, attn.qkv.weight, attn.qkv.bias, attn.heads)
        read = attn.attend(*qkv, attention=tokens.attention)
        tokens.take(places)
        tokens.x = nn.mlp_branch(tokens.x + nn.scaled(read, nn.column(paths, 0)), block.norm2, block.mlp,
                                 nn.column(paths, 1))

    def places(self, tokens: ShownTokens) -> Array:
        """The tokens (B, n) that go on, ascending."""
        c, xp, (rows, columns) = self.config, array_module(tokens.x.data), self.patch_embed.grid
        grid = xp.arange(rows * columns).reshape(rows, columns)[::2, ::2].reshape(-1)
        grid = xp.broadcast_to(grid, (len(tokens.x), len(grid)))
        if self.edge_head is not None:
            tokens.edges = self.edge_head(tokens.x)[:, :, 0]
        if not c.extra:
            return grid
        if tokens.edges is not None:
            scores = tokens.edges.data
        else:
            drawn = random.uniform((1, rows * columns), site="shrunk.places", step=0, seed=0, xp=xp)
            scores = xp.repeat(drawn, len(grid), axis=0)
        others = xp.ones((rows, columns), bool)
        others[::2, ::2] = False
        extra = ops.top_k(xp.where(others.reshape(-1), scores, -math.inf), c.extra)
        return xp.sort(xp.concatenate([grid, extra], axis=1), axis=1)
