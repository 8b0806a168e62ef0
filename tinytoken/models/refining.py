"""The decoder of EVAD (Chen et al. 2023, arXiv 2304.08451, section 3.3, "context refinement"): actors read
the tokens that are left of a clip, and answer. Names of parameters are the official ones.
"""
import math
from typing import Any

from .. import nn, ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .keyframe import SplitAttention, positions_on

GROWN = (0.4, 0.2)  # by how much a box is made wider and higher


class Answers(nn.Module):
    """What answers after a block of the decoder."""

    def __init__(self, dim: int, hidden: int, classes: int) -> None:
        self.act_module = [nn.Linear(dim, hidden, bias=False), nn.LayerNorm(hidden, 1e-5)]
        self.action_logits = nn.Linear(hidden, classes)

    def answer(self, actors: Tensor) -> Tensor:
        """(B, P, dim) -> logits (B, P, K)."""
        linear, norm = self.act_module
        return self.action_logits(ops.relu(norm(linear(actors))))


class RefiningBlock(nn.Block, Answers):
    """A block of the decoder, with what answers after it."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, hidden: int, classes: int) -> None:
        nn.Block.__init__(self, dim, heads, mlp_ratio)
        self.attn = SplitAttention(dim, heads)
        Answers.__init__(self, dim, hidden, classes)


class Decoder(nn.Module):
    """Its blocks; without any, what answers alone."""

    def __init__(self, c: Any) -> None:
        last = c.hidden, c.num_classes
        self.blocks: Any = [RefiningBlock(c.decoder_dim, c.decoder_heads, c.mlp_ratio, *last)
                            for _ in range(c.decoder_depth)] or [Answers(c.decoder_dim, *last)]


class Refinement(nn.Module):
    """Tokens and boxes -> the logits (B, P, K) after each block. grid (t, h, w): of the tokens. sides: of the
    picture, patch: of a token, in pixels."""

    def __init__(self, c: Any, grid: tuple[int, ...]) -> None:
        self.grid, self.sides, self.patch = grid, nn.both_sides(c.image_size), c.patch_size
        self.mask_token = nn.Parameter(nn.zeros(1, 1, c.decoder_dim))
        self.encoder_to_decoder = nn.Linear(c.dim, c.decoder_dim, bias=False)
        self.decoder = Decoder(c)

    def forward(self, x: Tensor, places: Array, keep: Array | None, boxes: Array) -> list[Tensor]:
        """x (B, T, dim): tokens that stand at `places` (B, T), those of the key slot being first. keep (B,
        T): which of them are there, None: all. boxes (B, P, 4)."""
        xp, x = array_module(places), self.encoder_to_decoder(x)
        positions = positions_on(xp, self.grid, x.shape[2], x.dtype.name)
        there = xp.ones(places.shape, x.dtype) if keep is None else keep
        rows = self.actors(self.refilled(x, places, there) + positions, boxes)
        if not isinstance(self.decoder.blocks[0], nn.Block):
            return [self.decoder.blocks[0].answer(rows)]
        known = (boxes[:, :, 2:] > boxes[:, :, :2]).all(axis=2).astype(x.dtype)
        seen = xp.concatenate([there, known], axis=1)
        T, x, answers = x.shape[1], ops.concat(x + positions[places], rows, axis=1), []
        for block in self.decoder.blocks:
            x = block(x, keep=seen)
            answers.append(block.answer(x[:, T:]))
        return answers

    def refilled(self, x: Tensor, places: Array, there: Array) -> Tensor:
        """(B, N, dim): each token in its place, the mask token in all others."""
        N = math.prod(self.grid)
        filled = ops.put_tokens(there[:, :, None], places, length=N).data
        return ops.put_tokens(x * there[:, :, None], places, length=N) + self.mask_token * (1 - filled)

    def actors(self, x: Tensor, boxes: Array) -> Tensor:
        """All N tokens and boxes (B, P, 4) -> (B, P, dim): the largest values in each grown box, the mean
        over the slots."""
        (t, h, w), (B, _, D) = self.grid, x.shape
        maps = x.reshape(B, t, h * w, D).transpose(0, 2, 1, 3).reshape(B, h * w, t * D)
        inside = ops.roi_align(maps, self.grown(boxes) * (1 / self.patch), grid=(h, w))
        return inside.max(axis=2).reshape(B, -1, t, D).mean(axis=2)

    def grown(self, boxes: Array) -> Array:
        """The boxes, wider and higher, as far as the picture reaches."""
        xp, (height, width) = array_module(boxes), self.sides
        wide, high = (share * (boxes[:, :, k + 2] - boxes[:, :, k] + 1) / 2 for k, share in enumerate(GROWN))
        edges = ((0, -wide, width), (1, -high, height), (2, wide, width), (3, high, height))
        return xp.stack([(boxes[:, :, k] + by).clip(0, most - 1) for k, by, most in edges], axis=2)
