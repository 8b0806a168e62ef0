"""Attention of some tokens to others. Parameter names are those of PVT, and of the models after it."""
from typing import Any

from .. import ops
from ..errors import expect
from ..tensor import Tensor
from .layers import Attention, Linear


class CrossAttention(Attention):
    """Multi-head attention: x reads y. x (B, Tq, dim), y (B, Tk, dim) -> (B, Tq, dim).

    It is `attend(*project(x, y))`, as nn.Attention is, whose `attend` it has."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        expect(dim % heads == 0, "CrossAttention", f"heads {heads} do not divide dim {dim}")
        self.heads = heads
        self.q, self.kv = Linear(dim, dim, bias=qkv_bias), Linear(dim, 2 * dim, bias=qkv_bias, parts=2)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        return self.attend(*self.project(x, y), **options)

    def tie_keys(self) -> None:
        """Let the keys' part of kv start as q, see nn.initialise."""
        self.kv.weight.data[:len(self.q.weight)] = self.q.weight.data

    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """x (B, Tq, dim), y (B, Tk, dim) -> queries (B, H, Tq, d), keys and values (B, H, Tk, d)."""
        k, v = ops.split_heads(self.kv(y), heads=self.heads, parts=2)
        return ops.split_heads(self.q(x), heads=self.heads), k, v
