"""The parts of VLTP (Chen et al. 2024, arXiv 2409.08464) that read a sentence: the encoder that makes one
guidance token of its words, and two decoders in which that token and the positions of a picture read each
other, one for the scores of the positions and one for the mask.

Names and layout are the official code's (HanningChen/VLTP) and those of SAM (Kirillov et al. 2023, arXiv
2304.02643), whose two-way transformer it takes. There a language model makes the guidance token; here it is
one block. SAM's dense prompt and its token for the quality of a mask are left out.
"""
from typing import Any

from .. import nn, ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .captioner import PAD
from .masks import EPS, Embedding
from .pixels import squares

FINE = 8  # channels of a pixel in the decoder of masks: an eighth of the width in SAM, which has 256


class TextEncoder(nn.Module):
    """words (B, L), numbers below `words` -> the guidance token (B, 1, dim).

    One pre-norm block, the mean over the words that are no <pad> (0 where there is none), two linear layers
    with a ReLU between."""

    def __init__(self, words: int, length: int, dim: int, heads: int) -> None:
        self.word_embed = nn.Parameter(nn.zeros(words, dim))
        self.pos_embed = nn.Parameter(nn.zeros(length, dim))
        self.block, self.norm = nn.Block(dim, heads), nn.LayerNorm(dim)
        self.text_hidden_fcs = [nn.Sequential(nn.Linear(dim, dim), None, nn.Linear(dim, dim))]

    def forward(self, words: Array) -> Tensor:
        x = ops.embedding(self.word_embed, words) + self.pos_embed
        there = (words != PAD).astype(x.dtype)
        share = there / array_module(words).maximum(there.sum(axis=1, keepdims=True), 1)
        x = self.norm(self.block(x, keep=there))
        first, _, second = self.text_hidden_fcs[0].layers  # type: Any, Any, Any
        return second(ops.relu(first((x * share[:, :, None]).sum(axis=1, keepdims=True))))


class NarrowAttention(nn.Module):
    """Multi-head attention of the width `inner`: q (B, Tq, dim) reads k, v (B, Tk, dim) -> (B, Tq, dim)."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (ops.split_heads(layer(x), heads=self.heads)
                   for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        return self.out_proj(ops.merge_heads(ops.attention(q, k, v)))


class ReluMLP(nn.Module):
    """Linear, ReLU, Linear; eight times as wide inside, as in SAM."""

    def __init__(self, dim: int) -> None:
        self.lin1, self.lin2 = nn.Linear(dim, 8 * dim), nn.Linear(8 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(ops.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens read themselves and then the map, go through an MLP, and then the map reads them; a norm after
    each sum. first: what they read of themselves first replaces them, as in SAM."""

    def __init__(self, dim: int, heads: int, first: bool) -> None:
        self.self_attn = NarrowAttention(dim, heads, dim)
        self.cross_attn_token_to_image = NarrowAttention(dim, heads, dim // 2)
        self.mlp, self.first = ReluMLP(dim), first
        self.cross_attn_image_to_token = NarrowAttention(dim, heads, dim // 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim, EPS) for _ in range(4))

    def forward(self, T: Tensor, F: Tensor, T0: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """T (B, t, dim) the tokens, F (B, N, dim) the map; T0, pe: what is added to them where they ask and
        are asked."""
        if self.first:
            T = self.self_attn(T, T, T)
        else:
            T = T + self.self_attn(T + T0, T + T0, T)
        T = self.norm1(T)
        T = self.norm2(T + self.cross_attn_token_to_image(T + T0, F + pe, F))
        T = self.norm3(T + self.mlp(T))
        return T, self.norm4(F + self.cross_attn_image_to_token(F + pe, T + T0, T))


class TwoWayTransformer(nn.Module):
    """Two such blocks, and the tokens read the map once more. T0 (B, t, dim), F and pe (B, N, dim) and (N,
    dim) -> tokens, map."""

    def __init__(self, dim: int, heads: int) -> None:
        self.layers = [TwoWayBlock(dim, heads, first=i == 0) for i in range(2)]
        self.final_attn_token_to_image = NarrowAttention(dim, heads, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim, EPS)

    def forward(self, T0: Tensor, F: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        T = T0
        for layer in self.layers:
            T, F = layer(T, F, T0, pe)
        return self.norm_final_attn(T + self.final_attn_token_to_image(T + T0, F + pe, F)), F


class PruneDecoder(nn.Module):
    """x (B, N, width), all positions of a grid, and the guidance token (B, 1, dim) -> scores (B, N), as
    logits: the product of a learned token, after the transformer, with each position of the map."""

    def __init__(self, width: int, dim: int, heads: int, grid: Any) -> None:
        self.grid, self.mask_tokens = grid, Embedding(1, dim)
        # convolutions of the kernels 1 and 3; the first is a linear layer of each position
        self.input_neck = [nn.Projection(dim, width, 1, bias=False), nn.LayerNorm(dim),
                           nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.LayerNorm(dim)]
        self.transformer = TwoWayTransformer(dim, heads)
        self.pe = nn.Parameter(nn.start_positions(grid, dim))

    def read(self, x: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The learned token (B, dim) and the map (B, N, dim) after the transformer."""
        narrow, norm, conv, last = self.input_neck  # type: Any, Any, Any, Any
        x = norm(narrow(x))
        batch, count, dim = x.shape
        x = conv(x.swapaxes(1, 2).reshape(batch, dim, *self.grid)).reshape(batch, dim, count)
        T0 = ops.concat(self.mask_tokens.rows(batch), guide, axis=1)
        T, F = self.transformer(T0, last(x.swapaxes(1, 2)), self.pe)
        return T[:, 0], F

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        asked, F = self.read(x, guide)
        return ops.matmul(F, asked.reshape(len(F), -1, 1))[:, :, 0]


class MaskDecoder(PruneDecoder):
    """The same with a result for each pixel: logits (B, H, W). Each position gives FINE channels to each
    pixel of its patch; the learned token makes the vector that they are multiplied with."""

    def __init__(self, width: int, dim: int, heads: int, grid: Any, patch: int) -> None:
        super().__init__(width, dim, heads, grid)
        self.patch = patch
        self.output_upscaling = nn.Linear(dim, patch * patch * FINE)
        self.output_hypernetworks_mlps = [nn.Linear(dim, dim), nn.Linear(dim, FINE)]

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        asked, F = self.read(x, guide)
        first, second = self.output_hypernetworks_mlps
        asked = second(ops.relu(first(asked)))
        fine = squares(ops.gelu(self.output_upscaling(F)), self.grid, (self.patch, self.patch))
        batch, height, width, _ = fine.shape
        logits = ops.matmul(fine.reshape(batch, height * width, FINE), asked.reshape(batch, FINE, 1))
        return logits.reshape(batch, height, width)


def start_guides(model: nn.Module) -> None:
    """Starting weights of what nn.initialise does not know, of all parts from here in a model."""
    for path, module in model.named_modules():
        if isinstance(module, Embedding):
            nn.normal(module.weight, f"{path}.weight", std=1)
        elif isinstance(module, TextEncoder):
            for name in ("word_embed", "pos_embed"):
                nn.normal(getattr(module, name), f"{path}.{name}", std=0.5)
