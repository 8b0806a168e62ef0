"""The layers of a transformer. Class and parameter names follow timm."""
from typing import Any

from .. import ops
from ..backend import Array
from ..errors import expect
from ..tensor import Tensor, fused
from .images import both_sides, checked_images
from .module import Module, Parameter, zeros


class Linear(Module):
    """x W^T + b. x (..., in_features) -> (..., out_features); weight (out, in).

    parts: how many matrices are packed in the weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, parts: int = 1) -> None:
        self.parts = parts
        # column after column, as a product x W^T reads it
        self.weight = Parameter(zeros(in_features, out_features).T, decay=True)
        self.bias = Parameter(zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer norm over the last axis. x (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.weight, self.bias = Parameter(zeros(dim) + 1), Parameter(zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class GELU(Module):
    """ops.gelu as a layer, for lists of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x)


class MLP(Module):
    """Linear, GELU, Linear. x (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x)))


class Attention(Module):
    """Multi-head self-attention. x (B, T, dim) -> (B, T, dim).

    It is `attend(*project(x))`: a method that needs the queries, keys or values calls the two itself.
    qk_norm: a layer norm of each query and each key (Dehghani et al. 2023, section 2), with `eps`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, qk_norm: bool = False,
                 eps: float = 1e-6) -> None:
        expect(dim % heads == 0, "Attention", f"heads {heads} do not divide dim {dim}")
        self.heads = heads
        self.qkv, self.proj = Linear(dim, 3 * dim, bias=qkv_bias, parts=3), Linear(dim, dim)
        self.q_norm = LayerNorm(dim // heads, eps) if qk_norm else None
        self.k_norm = LayerNorm(dim // heads, eps) if qk_norm else None

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attend(*self.project(x), **options)

    def tie_keys(self) -> None:
        """Let the keys' part of qkv start as the queries', see nn.initialise."""
        dim = len(self.proj.weight)
        self.qkv.weight.data[dim:2 * dim] = self.qkv.weight.data[:dim]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, dim) -> queries, keys and values, each (B, H, T, d)."""
        q, k, v = ops.split_heads(self.qkv(x), heads=self.heads, parts=3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | Array | None = None, *,
               sees_itself: bool = True, official: bool = False,
               attention: list[Tensor] | None = None) -> Tensor:
        """Queries, keys and values -> (B, T, dim). keep, sees_itself, official: as in ops.attention.
        attention: a list to which the weights (B, H, T, T) are added."""
        out = ops.attention(q, k, v, keep, sees_itself=sees_itself, official=official,
                            weights=attention is not None)
        if attention is not None:
            out, weights = out
            attention.append(weights.detach())
        return self.proj(ops.merge_heads(out))


# Residual branches. What a branch adds may be scaled per channel (LayerScale), and per image; there a factor
# of 0 drops it (drop path, Huang et al. 2016).

class LayerScale(Module):
    """x (..., dim) times a learned gamma (dim,), which begins as `start` (Touvron et al. 2021, arXiv
    2103.17239, section 2)."""

    def __init__(self, dim: int, start: float) -> None:
        self.gamma = Parameter(zeros(dim) + start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def scaled(out: Tensor, factors: Array | None, scale: LayerScale | None = None,
           divisor: float = 1) -> Tensor:
    """out (B, T, D), through the LayerScale if there is one, divided, times factors (B,) if there are any."""
    out = out if scale is None else scale(out)
    out = out if divisor == 1 else out * (1 / divisor)
    return out if factors is None else out * factors[:, None, None]


def column(paths: Array | None, *index: Any) -> Array | None:
    """paths[:, *index]: the factors of one block or branch; None without any."""
    return None if paths is None else paths[:, *index]


@fused
def attention_branch(x: Tensor, norm: LayerNorm, attn: Attention, factors: Array | None = None,
                     **options: Any) -> Tensor:
    """x + factors attn(norm(x)). x (B, T, D), factors (B,) or None; options: of Attention.attend."""
    return x + scaled(attn(norm(x), **options), factors)


@fused
def mlp_branch(x: Tensor, norm: LayerNorm, mlp: MLP, factors: Array | None = None) -> Tensor:
    """x + factors mlp(norm(x)). x (B, T, D), factors (B,) or None."""
    return x + scaled(mlp(norm(x)), factors)


class Block(Module):
    """A pre-norm transformer block: x + ls1(attention(norm1 x)), then x + ls2(mlp(norm2 x)).

    x (B, T, dim) -> (B, T, dim). paths (B, 2): the two branches' factors. options: of Attention.attend.
    eps: of all its norms. layer_scale: the start of its two LayerScales' gammas; 0: it has none. skip_lam:
    what both branches are divided by (Jiang et al. 2021)."""
    branches = 2

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 eps: float = 1e-6, qk_norm: bool = False, layer_scale: float = 0,
                 skip_lam: float = 1) -> None:
        self.norm1, self.attn = LayerNorm(dim, eps), Attention(dim, heads, qkv_bias, qk_norm, eps)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else None
        self.norm2, self.mlp = LayerNorm(dim, eps), MLP(dim, round(dim * mlp_ratio))
        self.ls2, self.skip_lam = LayerScale(dim, layer_scale) if layer_scale else None, skip_lam

    def forward(self, x: Tensor, paths: Array | None = None, **options: Any) -> Tensor:
        factors = column(paths, 0)
        if self.ls1 is None and self.skip_lam == 1:
            x = attention_branch(x, self.norm1, self.attn, factors, **options)
        else:
            x = x + scaled(self.attn(self.norm1(x), **options), factors, self.ls1, self.skip_lam)
        return self.second(x, column(paths, 1))

    def second(self, x: Tensor, factors: Array | None) -> Tensor:
        """The second branch, that of the MLP, alone. x (B, T, dim), factors (B,) or None."""
        if self.ls2 is None and self.skip_lam == 1:
            return mlp_branch(x, self.norm2, self.mlp, factors)
        return x + scaled(self.mlp(self.norm2(x)), factors, self.ls2, self.skip_lam)


class Projection(Module):
    """The patch embedding's weight as the convolution it is: (dim, C, p, p), stride p."""
    parts = 1

    def __init__(self, dim: int, channels: int, patch: int, bias: bool = True) -> None:
        self.weight = Parameter(zeros(dim, channels, patch, patch), decay=True)
        self.bias = Parameter(zeros(dim)) if bias else None

    def forward(self, patches: Tensor) -> Tensor:
        return ops.linear(patches, self.weight.reshape(len(self.weight), -1), self.bias)


class PatchEmbed(Module):
    """Pictures to tokens: images (B, C, H, W) float -> (B, N, dim), the patches row by row.

    N = (H / patch_size)(W / patch_size). image_size: H = W, or (H, W). Refuses pictures of another size or
    channel count, and integer pixels. Arrays are cast to the weights' dtype. A subclass may put layers before
    the projection, `features`, which is then `proj`, of what they give."""

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, dim: int,
                 channels: int = 3, bias: bool = True, proj: Projection | None = None) -> None:
        height, width = both_sides(image_size)
        expect(height % patch_size == 0 and width % patch_size == 0, "PatchEmbed",
               f"patch_size {patch_size} does not divide image_size {image_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.channels = channels
        self.grid: tuple[int, ...] = (height // patch_size, width // patch_size)
        self.proj = proj or Projection(dim, channels, patch_size, bias)

    def features(self, images: Tensor | Array) -> Tensor | Array:
        """Pictures -> what the projection reads: they themselves."""
        return images

    def forward(self, images: Tensor | Array) -> Tensor:
        images = checked_images(images, self.image_size, self.channels, self.proj.weight.dtype)
        return self.proj(ops.patchify(self.features(images), patch=self.proj.weight.shape[-1]))
