"""The two directions between the tokens of a LookupBlock in inference, each as one op: its few compressed
tokens are so little work that most of the time would be Python's between the ops. In training the parts run.
"""
from .. import ops
from ..backend import implementation
from ..models.lookupvit import LookupBlock
from ..ops.dense import rows_of
from ..tensor import op, recording
from .branches import are_linear, plus
from .launcher import contiguous, worth
from .registered import layer_norm, lookup_gather, lookup_infuse


def affine(x, weight, bias):
    """x weight^T + bias, of rows (R, in)."""
    out = x @ weight.T
    out += bias
    return out


def apart(x, images, heads):
    """Rows (B T, D) as (B, H, T, d), a view."""
    return x.reshape(images, -1, heads, x.shape[1] // heads).transpose(0, 2, 1, 3)


def merged(x):
    """(B, H, T, d) as rows (B T, D)."""
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3])


@op
def gather(lookup, compressed, *layers, heads, eps, pre):
    """LookupBlock.gather. layers: weight and bias of gather_norm_q, gather_norm_k, gather_q, gather_k,
    gather_v and gather_proj. pre: whether the norms come before the projections. eps: of both norms."""
    norm_q, norm_k, of_q, of_k, of_v, proj = zip(layers[::2], layers[1::2])
    images, asked, asking = len(lookup), rows_of(contiguous(lookup)), rows_of(contiguous(compressed))
    rows = asking
    if pre:
        asking, asked = layer_norm(asking, *norm_q, eps=eps[0])[0], layer_norm(asked, *norm_k, eps=eps[1])[0]
    q, k, v = affine(asking, *of_q), affine(asked, *of_k), affine(asked, *of_v)
    if not pre:
        q, k = layer_norm(q, *norm_q, eps=eps[0])[0], layer_norm(k, *norm_k, eps=eps[1])[0]
    (read, A, logits), _ = lookup_gather(*(apart(each, images, heads) for each in (q, k, v)))
    return (plus(rows, merged(read), *proj).reshape(compressed.shape), A, logits), None


@gather.macs
def _(lookup, compressed, *layers):
    (images, N, D), M = lookup, compressed[1]
    return images * (2 * (N + M) * D * D + 2 * N * M * D)


@op
def infuse(lookup, compressed, A, logits, *layers, heads, eps, reuse):
    """LookupBlock.infuse, but for "separate" queries. layers: weight and bias of infuse_norm, infuse_v and
    infuse_proj."""
    norm, of_v, proj = zip(layers[::2], layers[1::2])
    normed = layer_norm(rows_of(contiguous(compressed)), *norm, eps=eps)[0]
    v, rows = apart(affine(normed, *of_v), len(lookup), heads), rows_of(contiguous(lookup))
    run = lookup_infuse if reuse == "resoftmax" else ops.lookup_infuse.function
    infused, _ = run(A, logits, v, reuse=reuse)
    return plus(rows, merged(infused), *proj).reshape(lookup.shape), None


@infuse.macs
def _(lookup, compressed, A, logits, *layers):
    (images, N, D), M = lookup, compressed[1]
    return images * ((N + M) * D * D + N * M * D)


def covers(lookup, norms, layers, factors):
    """Whether the layers and norms are what is computed here, and this is inference."""
    return (factors is None and not recording() and layers[0].bias is not None
            and are_linear(lookup, norms, layers) and worth(lookup.data, layers[0].weight.data))


def gather_layers(block):
    return (block.gather_norm_q, block.gather_norm_k), (block.gather_q, block.gather_k, block.gather_v,
                                                        block.gather_proj)


def parameters_of(*layers):
    return [p for layer in layers for p in (layer.weight, layer.bias)]


def covers_gather(block, lookup, compressed, factors=None):
    return covers(lookup, *gather_layers(block), factors)


@implementation(LookupBlock.gather, "numpy", covers_gather)
def gather_as_one(block, lookup, compressed, factors=None):
    norms, layers = gather_layers(block)
    return gather(lookup, compressed, *parameters_of(*norms, *layers), heads=block.heads,
                  eps=(norms[0].eps, norms[1].eps), pre=block.norm == "pre")


@implementation(LookupBlock.infuse, "numpy", lambda block, lookup, compressed, A, logits, factors=None:
                block.reuse != "separate"
                and covers(lookup, (block.infuse_norm,), (block.infuse_v, block.infuse_proj), factors))
def infuse_as_one(block, lookup, compressed, A, logits, factors=None):
    layers = parameters_of(block.infuse_norm, block.infuse_v, block.infuse_proj)
    return infuse(lookup, compressed, A, logits, *layers, heads=block.heads, eps=block.infuse_norm.eps,
                  reuse=block.reuse)
