"""The two branches of a transformer block in mixed precision: bf16 wherever tensor cores multiply and
whatever lies between two products; float32 for the residual stream, statistics, sums, parameters and their
gradients. Runs where `gemm.precision("bf16")` does.

Each branch is one op, so what is bf16 never leaves it: x + proj(attention(qkv(norm(x)))), and
x + fc2(gelu(fc1(norm(x)))).
"""
import functools

from .. import nn
from ..graph import Into
from ..tensor import Tensor, op
from . import gemm, launcher
from .fallback import implementation
from .gradients import Sums, summed_gradients, weight_gradient
from .launcher import contiguous, cover
from .sums import rows_of
from .weights import rounded


def half(a, b, **more):
    """A product with a result in bf16."""
    return gemm.product(a, b, dtype="uint16", **more)


class Norm:
    """Layer norm of rows x (R, D), float32 or bf16, written as bf16, and the gradients of what went into
    it."""

    def __init__(self, x, weight, bias, eps):
        self.x, self.parameters, self.sizes = x, (weight, bias), x.shape
        self.kernels = "bf16_norm" if x.dtype == "float32" else "bf16_qk_norm"
        self.out = launcher.empty(x, *x.shape, dtype="uint16")
        self.mean, self.scale = launcher.empty(x, len(x)), launcher.empty(x, len(x))
        launcher.launch(f"{self.kernels}_forward", *rows_of(len(x)), x, weight, bias, self.out, self.mean,
                        self.scale, *self.sizes, eps)

    def gradients(self, g, past, shape):
        """Functions for a vjp, of x (as `shape`), weight and bias. g() of the norm's output, past: of what
        goes past the branch, or None."""
        def of_x():
            dx = launcher.empty(self.x, *self.x.shape, dtype=self.x.dtype.name)
            launcher.launch(f"{self.kernels}_backward", *rows_of(len(self.x)), self.x, self.parameters[0],
                            g(), self.mean, self.scale, past, dx, *self.sizes)
            return dx.reshape(shape)

        def of_parameters(sums):
            inputs = (self.x, g(), self.mean, self.scale)
            return sums.run(f"{self.kernels}_parameters", inputs, *self.sizes)
        return of_x, *summed_gradients(of_parameters, *self.parameters)


class Upstream:
    """The gradient of a branch's output, g (R, D) float32 times the branch's factors, in bf16, and that of
    its bias."""

    def __init__(self, g, paths, bias):
        self.rounded = launcher.empty(g, *g.shape, dtype="uint16")
        per = len(g) if paths is None else len(g) // len(paths)
        self.sums = Sums(bias).run("bf16_round_and_sum", (g, paths, self.rounded), *g.shape, per)
        self.of_bias = Into(lambda place: self.sums.give(0, place))


def joined(x, inner, weight, bias, paths):
    """x + factor (inner weight^T + bias), the end of a branch; rows (R, D) float32."""
    if paths is None:
        return gemm.product(inner, rounded(weight), tb=True, bias=bias, add=x)
    branch, out = half(inner, rounded(weight), tb=True, bias=rounded(bias)), launcher.empty_like(x)
    launcher.launch("bf16_add_branch", *cover(x.size // 2), x, branch, paths, out, x.size // 2, x.shape[1],
                    len(x) // len(paths))
    return out


def as_rows(x):
    return contiguous(x).reshape(-1, x.shape[-1])


@op
def attention_branch(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, keep=None,
                     paths=None, *, heads, eps):
    """x + paths proj(attention(qkv(layer_norm(x)), keep)).
    x (B, T, D), keep (B, T), paths (B,) -> (B, T, D)."""
    (batch, tokens, width), rows = x.shape, as_rows(x)
    keep, paths = (None if one is None else contiguous(one) for one in (keep, paths))
    norm = Norm(rows, norm_weight, norm_bias, eps)
    run = functools.partial(launch_attention, batch, heads, tokens, width // heads)
    qkv = half(norm.out, rounded(qkv_weight), tb=True, bias=None if qkv_bias is None else rounded(qkv_bias))
    attended = launcher.empty(x, *rows.shape, dtype="uint16")
    highest, total = launcher.empty(x, batch, heads, tokens), launcher.empty(x, batch, heads, tokens)
    run("forward", 3, 1, qkv, keep, attended, highest, total)
    out = joined(rows, attended, proj_weight, proj_bias, paths)

    def vjp(g):
        up = Upstream(as_rows(g), paths, proj_bias)

        @functools.cache
        def of_qkv():
            dqkv = launcher.empty(x, *qkv.shape, dtype="uint16")
            dkeep = None if keep is None else launcher.empty_like(highest)
            of_attended = half(up.rounded, rounded(proj_weight))
            run("backward", 4, 4, qkv, keep, attended, of_attended, highest, total, dqkv, dkeep)
            return dqkv, dkeep
        of_normed = functools.cache(lambda: half(of_qkv()[0], rounded(qkv_weight)))
        of_bias = lambda sums: sums.run("bf16_sum", (of_qkv()[0],), *qkv.shape)
        return (*norm.gradients(of_normed, as_rows(g), x.shape),
                weight_gradient(lambda: of_qkv()[0], norm.out),
                *([None] if qkv_bias is None else summed_gradients(of_bias, qkv_bias)),
                weight_gradient(lambda: up.rounded, attended), up.of_bias,
                None if keep is None else lambda: of_qkv()[1].sum(axis=1), None)
    return out.reshape(x.shape), vjp


def shared_bytes(tokens, d, arrays, vectors):
    """Of a block of the attention: so many arrays of rows in bf16, and so many vectors of floats."""
    padded = -(-tokens // 16) * 16
    return padded * (2 * (d + 8) * arrays + 4 * vectors)


def launch_attention(batch, heads, tokens, d, which, arrays, vectors, *given):
    threads, masked = 32 * min(8, -(-tokens // 16)), given[1] is not None
    launcher.launch(f"bf16_attention_{which}", batch * heads, threads, *given, heads, tokens, masked,
                    d ** -0.5, shared=shared_bytes(tokens, d, arrays, vectors), constants=(("HEAD_DIM", d),))


@op
def mlp_branch(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, paths=None, *, eps):
    """x + paths fc2(gelu(fc1(layer_norm(x)))). x (B, T, D), paths (B,) -> (B, T, D)."""
    rows, paths = as_rows(x), None if paths is None else contiguous(paths)
    norm = Norm(rows, norm_weight, norm_bias, eps)
    hidden = half(norm.out, rounded(fc1_weight), tb=True, bias=rounded(fc1_bias))
    active = launcher.empty(x, *hidden.shape, dtype="uint16")
    launcher.launch("bf16_gelu_forward", *cover(hidden.size // 2), hidden, active, hidden.size // 2)
    out = joined(rows, active, fc2_weight, fc2_bias, paths)

    def vjp(g):
        up = Upstream(as_rows(g), paths, fc2_bias)

        @functools.cache
        def of_hidden():
            d_hidden = launcher.empty(x, *hidden.shape, dtype="uint16")
            given = (hidden, half(up.rounded, rounded(fc2_weight)), d_hidden)
            return d_hidden, Sums(fc1_bias).run("bf16_gelu_backward", given, *hidden.shape)
        of_normed = functools.cache(lambda: half(of_hidden()[0], rounded(fc1_weight)))
        return (*norm.gradients(of_normed, as_rows(g), x.shape),
                weight_gradient(lambda: of_hidden()[0], norm.out),
                Into(lambda place: of_hidden()[1].give(0, place)),
                weight_gradient(lambda: up.rounded, active), up.of_bias, None)
    return out.reshape(x.shape), vjp


def covers_stream(x):
    """Whether products are to be in bf16, and can be, for a residual stream x (B, T, D)."""
    return (gemm.current_precision() == "bf16" and gemm.library() is not None and isinstance(x, Tensor)
            and x.dtype == "float32" and x.shape[2] % 8 == 0 and x.size > 0)


def are_known(*layers):
    """Whether these layers are what their kernels compute: with a bias, and of no class that may compute
    something else."""
    return all(type(layer) in (nn.LayerNorm, nn.Linear) and layer.bias is not None for layer in layers)


def covers_attention(x, norm, attn, factors=None, *, keep=None, sees_itself=True, official=False,
                     attention=None):
    if not (covers_stream(x) and type(attn) is nn.Attention and type(attn.qkv) is nn.Linear
            and attn.q_norm is None and are_known(norm, attn.proj)):
        return False
    d, tokens = x.shape[2] // attn.heads, x.shape[1]
    return ((sees_itself or keep is None) and not official and attention is None
            and d in launcher.CONSTANTS["HEAD_DIM"]
            and shared_bytes(tokens, d, 4, 4) <= launcher.most_shared())


@implementation(nn.attention_branch, covers=covers_attention)
def attention_as_one(x, norm, attn, factors=None, *, keep=None, **_):
    return attention_branch(x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight,
                            attn.proj.bias, keep, factors, heads=attn.heads, eps=norm.eps)


def covers_mlp(x, norm, mlp, factors=None):
    return (covers_stream(x) and type(mlp) is nn.MLP and are_known(norm, mlp.fc1, mlp.fc2)
            and len(mlp.fc1.weight) % 8 == 0)


@implementation(nn.mlp_branch, covers=covers_mlp)
def mlp_as_one(x, norm, mlp, factors=None):
    return mlp_branch(x, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
                      factors, eps=norm.eps)
