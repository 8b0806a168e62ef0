"""Kernels as implementations of ops: each has the contract of the op it stands in for, from arrays to the
output and its vjp. What they do not cover (float64, the official mask) runs as the plain op."""
import functools
import math

from .. import ops
from ..backend import array_module
from ..ops.attend import REUSE, check_attention
from ..ops.grid import resize_matrix_on
from ..ops.loss import check_labels
from ..train.optim import AdamW
from . import gemm, launcher
from .fallback import Unusable, implementation
from .gradients import summed_gradients, weight_gradient
from .launcher import contiguous, cover
from .sums import rows_of

registry: dict = {}  # op name -> the op


def kernels_of(op, covers=lambda *arrays, **settings: True):
    """Decorator: an implementation of `op` for float32 arrays that `covers` says yes to."""
    def covered(*arrays, **settings):
        first = next(a for a in arrays if a is not None and hasattr(a, "dtype"))
        return first.dtype == "float32" and first.size and covers(*arrays, **settings)
    registry[op.name] = op
    return implementation(op, covered)


@kernels_of(ops.linear, lambda x, weight, bias=None: gemm.library() is not None and weight.ndim == 2
            and weight.size and x.shape[-1:] == weight.shape[1:]
            and (bias is None or bias.shape == weight.shape[:1]))
def linear(x, weight, bias=None):
    rows, W = contiguous(x.reshape(-1, x.shape[-1])), contiguous(weight)
    out = gemm.product(rows, W, tb=True, bias=bias)

    def vjp(g):
        flat = contiguous(g.reshape(-1, g.shape[-1]))
        of_rows = lambda sums: sums.run("column_parts", (flat,), *flat.shape)
        of_bias = [None] if bias is None else summed_gradients(of_rows, bias)
        return lambda: gemm.product(flat, W).reshape(x.shape), weight_gradient(lambda: flat, rows), *of_bias
    return out.reshape(*x.shape[:-1], len(W)), vjp


@kernels_of(ops.gelu)
def gelu(x):
    x, grid = contiguous(x), cover(x.size)
    out = launcher.empty_like(x)
    launcher.launch("gelu_forward", *grid, x, out, x.size)

    def vjp(g):
        dx = launcher.empty_like(x)
        launcher.launch("gelu_backward", *grid, x, contiguous(g), dx, x.size)
        return dx
    return out, vjp


@kernels_of(ops.layer_norm, lambda x, weight=None, bias=None, *, eps=1e-6: x.ndim
            and (weight is None) == (bias is None)
            and (weight is None or weight.shape == bias.shape == x.shape[-1:]))
def layer_norm(x, weight=None, bias=None, *, eps=1e-6):
    width = x.shape[-1]
    x, rows = contiguous(x), x.size // width
    out, mean, scale = launcher.empty_like(x), launcher.empty(x, rows), launcher.empty(x, rows)
    launcher.launch("layer_norm_forward", *rows_of(rows), x, weight, bias, out, mean, scale, rows, width, eps)

    def vjp(g):
        g = contiguous(g)

        def of_x():
            dx = launcher.empty_like(x)
            launcher.launch("layer_norm_backward", *rows_of(rows), x, weight, g, mean, scale, dx, rows, width)
            return dx

        of_parameters = lambda sums: sums.run("layer_norm_parameters", (x, g, mean, scale), rows, width)
        return of_x, *([None, None] if weight is None else summed_gradients(of_parameters, weight, bias))
    return out, vjp


# Attention

def strided(x):
    """The array and its strides of picture, head and token, in elements; a copy if its last axis is not
    contiguous."""
    x = x if x.strides[-1] == x.itemsize else array_module(x).ascontiguousarray(x)
    return x, *(s // x.itemsize for s in x.strides[:3])


def shared_bytes(queries, tokens, d, warps):
    """Of the largest of the three attention kernels."""
    return 4 * max(2 * tokens * (d + 1) + warps * (tokens + 2 * d),
                   2 * queries * (d + 1) + warps * 2 * (queries + d))


def fits(q, k, v, keep=None, *, sees_itself=True, official=False, weights=False):
    """Whether the kernels cover this call: keys and values of a head must fit into shared memory."""
    return (not official and q.ndim == k.ndim == 4 and k.size
            and shared_bytes(q.shape[2], k.shape[2], q.shape[3], 4) <= launcher.most_shared())


@kernels_of(ops.attention, fits)
def attention(q, k, v, keep=None, *, sees_itself=True, official=False, weights=False):
    check_attention("attention", q, k, v, keep, sees_itself)
    out, A, _, gradients = attend(q, k, v, keep, sees_itself and keep is not None, weights, False)

    def vjp(g, g_weights=None):
        of_q, of_k, of_v, of_keep = gradients(g, g_weights, None)
        return of_q, of_k, None if g is None else of_v, None if keep is None else of_keep
    return ((out, A) if weights else out), vjp


@kernels_of(ops.lookup_gather, fits)
def lookup_gather(q, k, v):
    check_attention("lookup_gather", q, k, v, None, False)
    out, A, logits, gradients = attend(q, k, v, None, False, True, True)

    def vjp(g, g_A, g_logits):
        of_q, of_k, of_v, _ = gradients(g, g_A, g_logits)
        return of_q, of_k, None if g is None else of_v
    return (out, A, logits), vjp


def attend(q, k, v, keep, itself, with_weights, with_logits):
    """The launches of attention -> (out, A or None, logits or None, gradients). gradients(g, gA, glogits) ->
    functions of q, k, v, keep."""
    (batch, heads, queries, d), tokens = q.shape, k.shape[2]
    blocks, warps = batch * heads, 8 if shared_bytes(queries, tokens, d, 8) <= launcher.most_shared() else 4
    shape = (heads, queries, tokens, d, itself, 1 / math.sqrt(d))
    given = (*strided(q), *strided(k), *strided(v), None if keep is None else contiguous(keep))
    run = functools.partial(launcher.launch, shared=shared_bytes(queries, tokens, d, warps))
    out = launcher.empty(q, batch, heads, queries, d)
    A, logits = (launcher.empty(q, batch, heads, queries, tokens) if wanted else None
                 for wanted in (with_weights, with_logits))
    highest, total = launcher.empty(q, batch, heads, queries), launcher.empty(q, batch, heads, queries)
    run("attention_forward", blocks, 32 * warps, *given, out, A, logits, highest, total, *shape)

    def gradients(g, g_weights, g_logits):
        upstream = [None if u is None else contiguous(u) for u in (g, g_weights, g_logits)]
        along, dq = launcher.empty_like(highest), launcher.empty_like(out)
        run("attention_backward_queries", blocks, 32 * warps, *given, *upstream, highest, total, along, dq,
            *shape)

        @functools.cache
        def of_keys():
            dk, dv = launcher.empty(q, *k.shape), launcher.empty(q, *k.shape)
            dkeep = None if keep is None else launcher.empty(q, batch, heads, tokens)
            run("attention_backward_keys", blocks, 32 * warps, *given, *upstream, highest, total, along, dk,
                dv, dkeep, *shape)
            return dk, dv, dkeep
        return ((lambda: dq), (lambda: of_keys()[0]), (lambda: of_keys()[1]),
                (lambda: of_keys()[2].sum(axis=1)))
    return out, A, logits, gradients


@kernels_of(ops.lookup_infuse, lambda A, logits, v, *, reuse: reuse in REUSE and A.ndim == v.ndim == 4
            and A.shape[:3] == v.shape[:3]
            and (reuse != "resoftmax" if logits is None else A.shape == logits.shape))
def lookup_infuse(A, logits, v, *, reuse):
    (batch, heads, M, N), d = A.shape, v.shape[3]
    sizes, soft = (batch * heads, M, N, d), reuse == "resoftmax"
    R, v, mass = contiguous(A), contiguous(v), launcher.empty(A, batch, heads, N)
    if reuse != "probs":
        given, R = contiguous(logits if soft else A), launcher.empty_like(A)
        launcher.launch("infuse_weights", *cover(mass.size), given, R, mass, *sizes[:3], soft)
    out = launcher.empty(A, batch, heads, N, d)
    launcher.launch("infuse_out", *cover(out.size), R, v, out, *sizes)

    def vjp(g):
        g = contiguous(g)

        def of_scores():
            d_given = launcher.empty_like(A)
            launcher.launch("infuse_scores", *cover(mass.size), R, mass, v, g, d_given, *sizes,
                            reuse != "probs", soft)
            return d_given

        def of_values():
            dv = launcher.empty_like(v)
            launcher.launch("infuse_values", *cover(dv.size), R, g, dv, *sizes)
            return dv
        return None if soft else of_scores, of_scores if soft else None, of_values
    return out, vjp


@kernels_of(ops.patchify, lambda images, *, patch: images.ndim == 4
            and images.shape[2] % patch == images.shape[3] % patch == 0)
def patchify(images, *, patch):
    (batch, channels, height, width), sizes = images.shape, (*images.shape[1:], patch)
    out = launcher.empty(images, batch, height // patch * (width // patch), channels * patch * patch)
    launcher.launch("patchify", *cover(out.size), contiguous(images), out, out.size, *sizes, False)

    def vjp(g):
        dx = launcher.empty_like(images)
        launcher.launch("patchify", *cover(g.size), contiguous(g), dx, g.size, *sizes, True)
        return dx
    return out, vjp


@kernels_of(ops.resize, lambda x, *, grid, size, antialias=True: x.ndim == 3
            and x.shape[1] == math.prod(grid))
def resize(x, *, grid, size, antialias=True):
    matrix = resize_matrix_on(array_module(x), tuple(grid), tuple(size), antialias)
    return mix_tokens(matrix, x), lambda g: mix_tokens(matrix.T, g)


def mix_tokens(matrix, x):
    """matrix (M, N) times the tokens of each picture, x (B, N, D)."""
    out = launcher.empty(x, len(x), len(matrix), x.shape[2])
    launcher.launch("mix_tokens", *cover(out.size), contiguous(matrix), contiguous(x), out, len(x),
                    *matrix.shape, x.shape[2])
    return out


# Token selection

@kernels_of(ops.gumbel_softmax, lambda log_probs, noise, *, tau=1.0, hard=False:
            log_probs.shape == noise.shape and tau > 0 and log_probs.shape[-1] <= 32)
def gumbel_softmax(log_probs, noise, *, tau=1.0, hard=False):
    rows, classes = log_probs.size // log_probs.shape[-1], log_probs.shape[-1]
    soft = launcher.empty_like(log_probs)
    out = launcher.empty_like(log_probs) if hard else soft
    launcher.launch("gumbel_forward", *cover(rows), contiguous(log_probs), contiguous(noise), soft,
                    out if hard else None, rows, classes, tau, hard)

    def vjp(g):
        dx = launcher.empty_like(soft)
        launcher.launch("gumbel_backward", *cover(rows), soft, contiguous(g), dx, rows, classes, tau)
        return dx, dx
    return out, vjp


@kernels_of(ops.take_tokens, lambda x, index: index.dtype == "int64" and x.ndim == 3 and index.ndim == 2
            and index.size)
def take_tokens(x, index):
    (batch, tokens, width), k = x.shape, index.shape[1]
    x, index = contiguous(x), contiguous(index)
    out = launcher.empty(x, batch, k, width)
    launcher.launch("take_rows", *cover(out.size), x, index, out, batch, tokens, k, width)

    def vjp(g):
        dx = launcher.empty_like(x)
        launcher.launch("put_rows", *cover(dx.size), contiguous(g), index, dx, batch, tokens, k, width)
        return dx, None
    return out, vjp


# Losses

def log_softmax_rows(x):
    """log softmax over the last axis."""
    out, width = launcher.empty_like(x), x.shape[-1]
    launcher.launch("log_softmax_forward", *rows_of(x.size // width), contiguous(x), out, x.size // width,
                    width)
    return out


@kernels_of(ops.log_softmax, lambda x, *, axis=-1: x.ndim and axis in (-1, x.ndim - 1))
def log_softmax(x, *, axis=-1):
    out, width = log_softmax_rows(x), x.shape[-1]

    def vjp(g):
        dx = launcher.empty_like(out)
        launcher.launch("log_softmax_backward", *rows_of(x.size // width), out, contiguous(g), dx,
                        x.size // width, width)
        return dx
    return out, vjp


@kernels_of(ops.kl_divergence, lambda logits, teacher_logits: logits.ndim == 2
            and logits.shape == teacher_logits.shape)
def kl_divergence(logits, teacher_logits):
    student, teacher = log_softmax_rows(logits), log_softmax_rows(teacher_logits)
    (batch, classes), losses, mean = logits.shape, launcher.empty(logits, len(logits)), launcher.empty(logits)
    launcher.launch("kl_forward", *rows_of(batch), student, teacher, losses, batch, classes)
    launcher.launch("mean_of", 1, 256, losses, mean, batch, shared=4 * 256)

    def vjp(g):
        of_student, of_teacher = launcher.empty_like(student), launcher.empty_like(student)
        launcher.launch("kl_backward", *cover(student.size), student, teacher, losses, contiguous(g),
                        of_student, of_teacher, batch, classes)
        return of_student, of_teacher
    return mean, vjp


@kernels_of(ops.mse, lambda x, target, *, axis=None: x.ndim > 1 and x.shape == target.shape
            and axis in (-1, x.ndim - 1))
def mse(x, target, *, axis=None):
    """Of rows: DynamicViT's token loss."""
    x, target, width = contiguous(x), contiguous(target), x.shape[-1]
    out = launcher.empty(x, *x.shape[:-1])
    launcher.launch("row_mse_forward", *rows_of(out.size), x, target, out, out.size, width)

    def vjp(g):
        def gradient(times):
            dx = launcher.empty_like(x)
            launcher.launch("row_mse_backward", *cover(x.size), x, target, contiguous(g), dx, x.size, width,
                            times)
            return dx
        return lambda: gradient(1), lambda: gradient(-1)
    return out, vjp


@kernels_of(ops.cross_entropy, lambda logits, targets, *, smoothing=0.0: logits.ndim == 2
            and 0 <= smoothing < 1)
def cross_entropy(logits, targets, *, smoothing=0.0):
    batch, classes = logits.shape
    soft = targets.shape == logits.shape
    if not soft:
        check_labels("cross_entropy", targets, batch, classes)
    targets = contiguous(targets.astype("float32" if soft else "int64", copy=False))
    logits, pair = contiguous(logits), (None, targets) if soft else (targets, None)
    losses, log_sum, mean = (launcher.empty(logits, *shape) for shape in ((batch,), (batch,), ()))
    launcher.launch("cross_entropy_forward", *rows_of(batch), logits, *pair, losses, log_sum, batch, classes,
                    smoothing)
    launcher.launch("mean_of", 1, 256, losses, mean, batch, shared=4 * 256)

    def vjp(g):
        dlogits, dtargets = launcher.empty_like(logits), launcher.empty_like(logits) if soft else None
        launcher.launch("cross_entropy_backward", *rows_of(batch), logits, *pair, log_sum, contiguous(g),
                        dlogits, dtargets, batch, classes, smoothing)
        return dlogits, dtargets
    return mean, vjp


@implementation(ops.top_k, covers=lambda scores, k: scores.dtype == "float32"
                and 8 * scores.shape[1] <= 48 * 1024)
def top_k(scores, k):
    """ops.top_k of a (B, N) array whose rows fit into shared memory."""
    index = launcher.empty(scores, len(scores), k, dtype="int64")
    if k and len(scores):
        tokens = scores.shape[1]
        launcher.launch("top_k", len(scores), min(1024, -(-tokens // 32) * 32), contiguous(scores), index,
                        tokens, k, shared=8 * tokens)
    return index


# The optimiser

@implementation(AdamW.step)
def adamw(optimizer, lr):
    """AdamW.step's work -> the gradient's norm before clipping, a 0-d array."""
    before = optimizer.steps
    try:
        set_rates(optimizer, lr)
        return update(optimizer)
    except Unusable:
        optimizer.steps = before  # the plain step counts for itself
        raise


def rates_of(optimizer, lr, t):
    """What AdamW's kernel reads for step t: five numbers."""
    return lr, *(1 / c for c in optimizer.corrections(t)), optimizer.mean_share(t), float(t)


def set_rates(optimizer, lr):
    """Count the step, and put what depends on its number into device memory."""
    if optimizer.rates is None:
        optimizer.rates = launcher.empty(optimizer.flat.data, 5)
    optimizer.steps += 1
    launcher.launch("set_rates", 1, 32, optimizer.rates, *rates_of(optimizer, lr, optimizer.steps))


def update(optimizer, rates=None, clock=None, begin=0):
    """Clip, AdamW and the running mean of the weights, on flat storage, by the rates that were set. Or by the
    row of rates (steps, 5) that belongs to the number of the step where `clock` (1,) stands; the first row is
    number `begin`'s."""
    rates = optimizer.rates if rates is None else rates
    flat, (b1, b2), size = optimizer.flat, optimizer.betas, optimizer.flat.data.size
    blocks = min(264, -(-size // 256))
    parts, norm, factor = (launcher.empty(flat.data, *shape) for shape in ((blocks,), (), ()))
    launcher.launch("squares", blocks, 256, flat.grad, parts, size, shared=4 * 256)
    largest = math.inf if optimizer.clip is None else optimizer.clip
    launcher.launch("clip_factor", 1, 32, parts, norm, factor, blocks, largest)
    for start, stop, scale, decay, frozen in flat.segments:
        cut = slice(start, stop)
        launcher.launch("adamw", *cover(stop - start), flat.data[cut], flat.grad[cut], optimizer.m[cut],
                        optimizer.v[cut], None if optimizer.mean is None else optimizer.mean[cut], factor,
                        rates, clock, begin, stop - start, scale, float(frozen),
                        optimizer.weight_decay if decay else 0.0, b1, b2, optimizer.eps)
    return norm
