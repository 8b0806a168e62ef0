"""The two branches of a transformer block, each as one op: x + proj(attention(qkv(norm(x)))), and
x + fc2(gelu(fc1(norm(x)))).

So a bias is added where its sum is next read, by GELU or with the residual; the attention writes its heads
side by side; and a block has 2 ops between which Python works, not 12."""
import numpy as np

from .. import nn
from ..backend import implementation
from ..ops.attend import check_attention
from ..ops.dense import column_sums, rows_of, weight_gradient
from ..tensor import Tensor, op
from .launcher import contiguous, launch, worth
from .registered import attention_weights, layer_norm, polynomial_of


def plus(rows, inner, weight, bias):
    """rows + inner weight^T + bias, the end of a branch. rows (R, D)."""
    out = inner @ weight.T
    launch("add_bias_and_rows", out, contiguous(bias), rows)
    return out


@op
def mlp_branch(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, eps):
    """x + fc2(gelu(fc1(layer_norm(x)))). x (..., D) -> (..., D)."""
    rows, polynomial = rows_of(contiguous(x)), polynomial_of(x)
    normed, of_norm = layer_norm(rows, norm_weight, norm_bias, eps=eps)
    hidden, fc1_bias = normed @ fc1_weight.T, contiguous(fc1_bias)
    active = np.empty_like(hidden)
    launch("bias_gelu", hidden, fc1_bias, polynomial, active)

    def vjp(g):
        g = rows_of(contiguous(g))
        d_hidden = g @ fc2_weight
        launch("bias_gelu_vjp", hidden, fc1_bias, polynomial, d_hidden)
        dx, *of_parameters = of_norm(d_hidden @ fc1_weight)
        dx += g
        return (dx.reshape(x.shape), *of_parameters,
                lambda: weight_gradient(d_hidden, normed, fc1_weight.flags.f_contiguous),
                lambda: column_sums(d_hidden),
                lambda: weight_gradient(g, active, fc2_weight.flags.f_contiguous), lambda: column_sums(g))
    return plus(rows, active, fc2_weight, fc2_bias).reshape(x.shape), vjp


@mlp_branch.macs
def _(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return 2 * int(np.prod(x)) * fc1_weight[0]


@op
def attention_branch(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, keep=None, *,
                     heads, eps, sees_itself=True):
    """x + proj(attention(qkv(layer_norm(x)), keep)). x (B, T, D), keep (B, T) -> (B, T, D)."""
    (batch, tokens, width), rows = x.shape, rows_of(contiguous(x))
    apart = lambda packed: packed.reshape(batch, tokens, -1, heads, width // heads).transpose(2, 0, 3, 1, 4)
    normed, of_norm = layer_norm(rows, norm_weight, norm_bias, eps=eps)
    qkv = normed @ qkv_weight.T
    if qkv_bias is not None:
        qkv += qkv_bias
    q, k, v = apart(qkv)
    check_attention("attention", q, k, v, keep, sees_itself)
    A, of_scores = attention_weights(q, k, keep, sees_itself)
    merged = np.empty_like(rows)
    np.matmul(A, v, out=apart(merged)[0])

    def vjp(g):
        g = rows_of(contiguous(g))
        d_qkv, up = np.empty_like(qkv), apart(g @ proj_weight)[0]
        (dq, dk, dv), u = apart(d_qkv), contiguous(up @ v.swapaxes(-1, -2))
        np.matmul(A.swapaxes(-1, -2), up, out=dv)
        d_keep = of_scores(u)
        np.matmul(u, k, out=dq)
        np.matmul(u.swapaxes(-1, -2), q, out=dk)
        dx, *of_parameters = of_norm(d_qkv @ qkv_weight)
        dx += g
        return (dx.reshape(x.shape), *of_parameters,
                lambda: weight_gradient(d_qkv, normed, qkv_weight.flags.f_contiguous),
                None if qkv_bias is None else lambda: column_sums(d_qkv),
                lambda: weight_gradient(g, merged, proj_weight.flags.f_contiguous),
                lambda: column_sums(g), d_keep)
    return plus(rows, merged, proj_weight, proj_bias).reshape(x.shape), vjp


@attention_branch.macs
def _(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, keep=None):
    return int(np.prod(x)) * (4 * x[2] + 2 * x[1])


def are_linear(x, norms, layers):
    """Whether norms and layers are what a branch computes with: of no class that may compute something else,
    with biases (but for the first), and of the shape and dtype of the stream x (B, T, D)."""
    return (isinstance(x, Tensor) and x.ndim == 3
            and all(type(norm) is nn.LayerNorm and norm.weight.shape == x.shape[2:]
                    and norm.weight.dtype == x.dtype for norm in norms)
            and all(type(layer) is nn.Linear and layer.weight.dtype == x.dtype for layer in layers)
            and all(layer.bias is not None for layer in layers[1:]))


def covers(x, norm, first, last, factors):
    """Whether a branch is one op: of these layers, without factors."""
    return (factors is None and are_linear(x, (norm,), (first, last))
            and worth(x.data, first.weight.data))


@implementation(nn.mlp_branch, "numpy", lambda x, norm, mlp, factors=None: type(mlp) is nn.MLP
                and mlp.fc1.bias is not None and covers(x, norm, mlp.fc1, mlp.fc2, factors))
def mlp_as_one(x, norm, mlp, factors=None):
    return mlp_branch(x, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
                      eps=norm.eps)


@implementation(nn.attention_branch, "numpy", lambda x, norm, attn, factors=None, *, official=False,
                attention=None, **_: type(attn) is nn.Attention and attn.q_norm is None and not official
                and attention is None and covers(x, norm, attn.qkv, attn.proj, factors))
def attention_as_one(x, norm, attn, factors=None, *, keep=None, sees_itself=True, **_):
    return attention_branch(x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight,
                            attn.proj.bias, keep, heads=attn.heads, eps=norm.eps, sees_itself=sees_itself)
