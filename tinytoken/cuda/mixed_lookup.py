"""LookupViT's two directions in mixed precision, see mixed.py: what the compressed tokens gather, and what is
infused into the lookup tokens, each branch one op. The attention that goes from one to the other is float32.
"""
import functools
import math

from ..backend import array_module
from ..models.lookupvit import LookupBlock
from ..tensor import op
from . import gemm, launcher, weights
from .fallback import implementation
from .gradients import summed_gradients, weight_gradient
from .launcher import contiguous
from .mixed import Norm, Upstream, are_known, as_rows, covers_stream, half, joined

THREADS = 128


def bytes_of(M, N, d, of_M, of_N, scores):
    """Of shared memory: so many arrays of bf16 rows (d + 2 numbers with the padding) of each kind of token,
    and of scores (M, N)."""
    return 2 * (d + 2) * (of_M * M + of_N * N) + 4 * scores * M * N


@op
def gather_branch(lookup, compressed, q_weight, q_bias, q_norm_weight, q_norm_bias, k_weight, k_bias,
                  k_norm_weight, k_norm_bias, v_weight, v_bias, proj_weight, proj_bias, paths=None, *,
                  heads, eps):
    """lookup (B, N, D), compressed (B, M, D), paths (B,) -> compressed + paths proj(A v), and
    A (B, H, M, N)."""
    (batch, N, width), M = lookup.shape, compressed.shape[1]
    sizes = (heads, M, N, width // heads // 2, 1 / math.sqrt(width // heads))
    rows, paths = as_rows(compressed), None if paths is None else contiguous(paths)
    asked, read = weights.rounded_alone(rows), weights.rounded_alone(as_rows(lookup))
    project = lambda x, weight, bias: half(x, weights.rounded(weight), tb=True, bias=weights.rounded(bias))
    q = Norm(project(asked, q_weight, q_bias), q_norm_weight, q_norm_bias, eps)
    k = Norm(project(read, k_weight, k_bias), k_norm_weight, k_norm_bias, eps)
    v, run = project(read, v_weight, v_bias), functools.partial(launch, batch * heads, M, N, width // heads)
    gathered, A = launcher.empty(rows, *rows.shape, dtype="uint16"), launcher.empty(rows, batch, heads, M, N)
    run("lookup_gather_forward", (1, 2, 1), q.out, k.out, v, gathered, A, *sizes)

    def vjp(g, g_A):
        g = array_module(rows).zeros_like(rows) if g is None else as_rows(g)
        up = Upstream(g, paths, proj_bias)

        @functools.cache
        def of_products():
            out = [launcher.empty(x, *x.shape, dtype="uint16") for x in (q.out, k.out, v)]
            of_gathered = half(up.rounded, weights.rounded(proj_weight))
            run("lookup_gather_backward", (2, 2, 2), q.out, k.out, v, A, of_gathered,
                None if g_A is None else contiguous(g_A), *out, *sizes)
            return out
        of_q, *of_q_norm = q.gradients(lambda: of_products()[0], None, q.sizes)
        of_k, *of_k_norm = k.gradients(lambda: of_products()[1], None, k.sizes)
        of_q, of_k, of_v = functools.cache(of_q), functools.cache(of_k), lambda: of_products()[2]

        def of_lookup():
            gradient = gemm.product(of_k(), weights.rounded(k_weight))
            gemm.product(of_v(), weights.rounded(v_weight), add=gradient, out=gradient)
            return gradient.reshape(lookup.shape)

        def of_compressed():
            return gemm.product(of_q(), weights.rounded(q_weight), add=g).reshape(compressed.shape)
        return (of_lookup, of_compressed, *affine_gradients(q_bias, of_q, asked), *of_q_norm,
                *affine_gradients(k_bias, of_k, read), *of_k_norm, *affine_gradients(v_bias, of_v, read),
                weight_gradient(lambda: up.rounded, gathered), up.of_bias, None)
    return (joined(rows, gathered, proj_weight, proj_bias, paths).reshape(compressed.shape), A), vjp


@op
def infuse_branch(lookup, compressed, A, norm_weight, norm_bias, v_weight, v_bias, proj_weight, proj_bias,
                  paths=None, *, heads, eps):
    """lookup + paths proj(A^T v), v = v(layer_norm(compressed)). Shapes as of gather_branch -> (B, N, D)."""
    (batch, N, width), M = lookup.shape, compressed.shape[1]
    rows, A, paths = as_rows(lookup), contiguous(A), None if paths is None else contiguous(paths)
    sizes = heads, M, N, width // heads // 2
    run = functools.partial(launch, batch * heads, M, N, width // heads)
    norm = Norm(as_rows(compressed), norm_weight, norm_bias, eps)
    v = half(norm.out, weights.rounded(v_weight), tb=True, bias=weights.rounded(v_bias))
    infused = launcher.empty(rows, *rows.shape, dtype="uint16")
    run("lookup_infuse_forward", (1, 0, 1), A, v, infused, *sizes)

    def vjp(g):
        up = Upstream(as_rows(g), paths, proj_bias)

        @functools.cache
        def of_products():
            dv, dA = launcher.empty(v, *v.shape, dtype="uint16"), launcher.empty_like(A)
            run("lookup_infuse_backward", (1, 1, 1), A, v, half(up.rounded, weights.rounded(proj_weight)),
                dv, dA, *sizes)
            return dv, dA
        of_v = lambda: of_products()[0]
        of_normed = functools.cache(lambda: half(of_v(), weights.rounded(v_weight)))
        of_compressed, *of_norm = norm.gradients(of_normed, None, compressed.shape)
        return (g, of_compressed, lambda: of_products()[1], *of_norm,
                *affine_gradients(v_bias, of_v, norm.out),
                weight_gradient(lambda: up.rounded, infused), up.of_bias, None)
    return joined(rows, infused, proj_weight, proj_bias, paths).reshape(lookup.shape), vjp


def affine_gradients(bias, g, x):
    """Entries of a vjp, of a linear layer's weight and bias. g() (R, out) of its output, x (R, in), in
    bf16."""
    of_bias = summed_gradients(lambda sums: sums.run("bf16_sum", (g(),), *g().shape), bias)
    return weight_gradient(g, x), *of_bias


def launch(blocks, M, N, d, name, arrays, *given):
    launcher.launch(name, blocks, THREADS, *given, shared=bytes_of(M, N, d, *arrays))


def covers(layers, heads, lookup, compressed):
    """Whether the kernels can compute one of the two directions, in which these layers take part."""
    d = lookup.shape[2] // heads
    return (covers_stream(lookup) and are_known(*layers) and d % 2 == 0
            and bytes_of(compressed.shape[1], lookup.shape[1], d, 2, 2, 2) <= launcher.most_shared())


def parameters_of(layers):
    return [p for layer in layers for p in (layer.weight, layer.bias)]


def gather_layers(block):
    return (block.gather_q, block.gather_norm_q, block.gather_k, block.gather_norm_k, block.gather_v,
            block.gather_proj)


def infuse_layers(block):
    return block.infuse_norm, block.infuse_v, block.infuse_proj


def covers_gather(block, lookup, compressed, factors=None):
    return (block.norm == "qk" and block.reuse != "resoftmax"
            and covers(gather_layers(block), block.heads, lookup, compressed))


def covers_infuse(block, lookup, compressed, A, logits, factors=None):
    return block.reuse == "probs" and covers(infuse_layers(block), block.heads, lookup, compressed)


@implementation(LookupBlock.gather, covers=covers_gather)
def gather(block, lookup, compressed, factors=None):
    """The new compressed tokens and A; logits, which only resoftmax reads, are not kept."""
    new, A = gather_branch(lookup, compressed, *parameters_of(gather_layers(block)), factors,
                           heads=block.heads, eps=block.gather_norm_q.eps)
    return new, A, None


@implementation(LookupBlock.infuse, covers=covers_infuse)
def infuse(block, lookup, compressed, A, logits, factors=None):
    return infuse_branch(lookup, compressed, A, *parameters_of(infuse_layers(block)), factors,
                         heads=block.heads, eps=block.infuse_norm.eps)
