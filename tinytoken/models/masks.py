"""Attention to mask (Zhang et al. 2022, arXiv 2210.05844, and 2023, arXiv 2306.06289, "SegViT"): a decoder in
which the scores between a class's query and the positions are the class's mask.

A query stands for each class. Through layers of self-attention, cross-attention to a map, and an MLP it
learns whether its class is there; the scores of the cross-attention, before their softmax, say where. Names
of parameters, the order of norms (after each branch) and eps are those of the official code.
"""
import math
from typing import Any

from .. import nn, ops
from ..tensor import Tensor

EPS = 1e-5  # of all norms here


def packed_qkv(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """x (B, Tq, dim) reads y (B, Tk, dim): queries, keys and values (B, H, T, d), of one packed projection
    with weight (3 dim, dim)."""
    dim = x.shape[2]
    q = ops.split_heads(ops.linear(x, weight[:dim], bias[:dim]), heads=heads)
    k, v = ops.split_heads(ops.linear(y, weight[dim:], bias[dim:]), heads=heads, parts=2)
    return q, k, v


class TorchAttention(nn.Module):
    """Multi-head attention with the names of PyTorch's layer: x (B, Tq, dim) reads y (B, Tk, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.zeros(3 * dim, dim), decay=True)
        self.in_proj_bias = nn.Parameter(nn.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def tie_keys(self) -> None:
        """Start the keys as the queries, see nn.initialise."""
        q, k, _ = self.in_proj_weight.data.reshape(3, -1)
        k[:] = q

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        qkv = packed_qkv(x, y, self.in_proj_weight, self.in_proj_bias, self.heads)
        return self.out_proj(ops.merge_heads(ops.attention(*qkv)))


class MaskAttention(nn.Module):
    """Multi-head attention that shows its scores: x (B, Tq, dim) reads y (B, Tk, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, masks: list[Tensor]) -> Tensor:
        """masks: a list to which the mean over heads of the scores, (B, Tk, Tq), is added."""
        q, k, v = (ops.split_heads(layer(z), heads=self.heads)
                   for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
        scores = ops.matmul(q * (1 / math.sqrt(q.shape[3])), k.swapaxes(2, 3))
        masks.append(scores.mean(axis=1).swapaxes(1, 2))
        return self.proj(ops.merge_heads(ops.matmul(ops.softmax(scores), v)))


class DecoderLayer(nn.Module):
    """Queries read themselves, then a map, then go through an MLP with ReLU; a norm after each sum.

    attention: the class of what reads the map. queries (B, K, dim), memory (B, N, dim) -> (B, K, dim)."""

    def __init__(self, dim: int, heads: int, attention: Any = MaskAttention) -> None:
        self.self_attn, self.multihead_attn = TorchAttention(dim, heads), attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, EPS) for _ in range(3))

    def forward(self, queries: Tensor, memory: Tensor, *masks: list[Tensor]) -> Tensor:
        """masks: of MaskAttention.forward."""
        x = self.norm1(queries + self.self_attn(queries, queries))
        x = self.norm2(x + self.multihead_attn(x, memory, *masks))
        return self.norm3(x + self.linear2(ops.relu(self.linear1(x))))


class Layers(nn.Module):
    """A list of layers under the name `layers`."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers


class Embedding(nn.Module):
    """`count` learned rows: weight (count, dim)."""

    def __init__(self, count: int, dim: int) -> None:
        self.weight = nn.Parameter(nn.zeros(count, dim))

    def rows(self, batch: int) -> Tensor:
        """(batch, count, dim)."""
        return ops.broadcast_to(self.weight, shape=(batch, *self.weight.shape))


class Reader(nn.Module):
    """Queries that read maps, `layers` decoder layers for each: what the two decoders below share.

    width: of the maps; None: they are read as they are, and have `dim` channels. count: of the queries.
    attention: of its layers."""

    def __init__(self, count: int, width: int | None, dim: int, heads: int, stages: int, layers: int,
                 attention: Any) -> None:
        self.q, self.stages, self.projects = Embedding(count, dim), stages, width is not None
        for s in range(1, stages + 1):
            if width is not None:
                setattr(self, f"input_proj_{s}", nn.Linear(width, dim))
                setattr(self, f"proj_norm_{s}", nn.LayerNorm(dim, EPS))
            made = [DecoderLayer(dim, heads, attention) for _ in range(layers)]
            setattr(self, f"decoder_{s}", Layers(made))

    def memory(self, s: int, x: Tensor) -> Tensor:
        """What the queries of stage s = 1, 2, ... read of its map x."""
        return getattr(self, f"proj_norm_{s}")(getattr(self, f"input_proj_{s}")(x)) if self.projects else x

    def layers(self, s: int) -> list[DecoderLayer]:
        return getattr(self, f"decoder_{s}").layers

    def start(self, name: str) -> None:
        """Starting weights of what nn.initialise does not know. name: of this module."""
        for path, module in self.named_modules():
            if isinstance(module, Embedding):
                nn.normal(module.weight, f"{name}.{path}", std=1)
            elif isinstance(module, TorchAttention):
                nn.xavier(module.in_proj_weight, f"{name}.{path}.in_proj", parts=3)


class MaskDecoder(Reader):
    """A query for each class reads maps, the deepest first (the official ATMHead).

    maps: list of (B, N, width) -> [(class logits (B, classes + 1), the last for "absent"; masks (B, N,
    classes), as logits), ...]. With a map for each stage: one pair for each, and a mask is the sum of those
    of the stages so far, of which each gives its last layer's. With one map (each_layer): one pair for each
    layer, with its own mask. dot: a mask is instead the product of a layer's result with the map, divided by
    sqrt(dim).

    new: how many of the classes, the last ones, have queries and outputs of their own, `q_new` and
    `class_embed_new`: those that a trained decoder is to learn while all else stays."""

    def __init__(self, classes: int, width: int | None, dim: int, heads: int, stages: int = 3,
                 layers: int = 3, each_layer: bool = False, dot: bool = False,
                 new: int = 0) -> None:
        super().__init__(classes - new, width, dim, heads, stages, layers,
                         TorchAttention if dot else MaskAttention)
        self.class_embed, self.each_layer = nn.Linear(dim, classes - new + 1), each_layer
        self.q_new = Embedding(new, dim) if new else None
        self.class_embed_new = nn.Linear(dim, new) if new else None
        self.mask_proj = nn.Linear(dim, dim) if dot else None

    def forward(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        rows = [part.rows(len(maps[0])) for part in (self.q, self.q_new) if part is not None]
        queries, total, steps = ops.concat(*rows, axis=1), None, []
        for s, x in enumerate(maps[::-1], start=1):
            memory, masks = self.memory(s, x), []  # type: Tensor, list[Tensor]
            for layer in self.layers(s):
                queries = layer(queries, memory, *([masks] if self.mask_proj is None else []))
                if self.mask_proj is not None:
                    asked = self.mask_proj(queries) * (1 / math.sqrt(queries.shape[2]))
                    masks.append(ops.matmul(memory, asked.swapaxes(1, 2)))
                if self.each_layer:
                    steps.append((self.classes(queries), masks[-1]))
            total = masks[-1] if total is None else total + masks[-1]
            if not self.each_layer:
                steps.append((self.classes(queries), total))
        return steps

    def classes(self, queries: Tensor) -> Tensor:
        """Their class logits."""
        old = self.class_embed(queries)
        if self.class_embed_new is None:
            return old
        return ops.concat(old[:, :, :-1], self.class_embed_new(queries), old[:, :, -1:], axis=2)


class UpSampler(Reader):
    """A query for each position reads maps, of which the last has fewer, in the order of the encoder (Shrunk,
    Zhang et al. 2022, section 3.3; the official TPNATMHead). maps: list of (B, n, width) -> (B, count,
    dim).

    placed (ours): the queries begin as what the first stage makes of the encoder's position embeddings
    (1, count, width), and the keys' weights as those of the queries, so that a position first reads what is
    near it. The official one has to learn where each is from nothing."""

    def __init__(self, count: int, width: int, dim: int, heads: int, stages: int, layers: int,
                 placed: bool = False) -> None:
        super().__init__(count, width, dim, heads, stages, layers, TorchAttention)
        self.placed = placed

    def start(self, name: str) -> None:
        super().start(name)
        if self.placed:
            self.q.weight.data *= 0.1
            for layer in (layer for s in range(1, self.stages + 1) for layer in self.layers(s)):
                layer.multihead_attn.tie_keys()

    def forward(self, maps: list[Tensor], positions: Any = None) -> Tensor:
        """positions: of a placed one, (1, count, width)."""
        queries = self.q.rows(len(maps[0]))
        if self.placed:
            queries = queries + self.memory(1, positions)
        for s, x in enumerate(maps, start=1):
            memory = self.memory(s, x)
            for layer in self.layers(s):
                queries = layer(queries, memory)
        return queries
