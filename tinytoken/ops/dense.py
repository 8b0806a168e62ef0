"""Products with matrices: where nearly all multiply-adds of a transformer are."""
import math

import numpy as np

from ..backend import Array, array_module, scatter_add
from ..errors import expect, shape_of
from ..tensor import Index, op


@op
def matmul(a, b):
    """a (..., M, K) @ b (..., K, N) -> (..., M, N); leading axes broadcast."""
    expect(a.ndim >= 2 and b.ndim >= 2, "matmul",
           lambda: f"{shape_of('a', a)} @ {shape_of('b', b)}: at least two axes each expected")
    expect(a.shape[-1] == b.shape[-2], "matmul",
           lambda: f"{shape_of('a', a)} @ {shape_of('b', b)}: "
                   f"inner sizes {a.shape[-1]} and {b.shape[-2]} differ.",
           *(("k.swapaxes(-1, -2)", "03") if a.shape[-1] == b.shape[-1] else ()))
    if b.ndim == 2:  # as one 2-D product: a stack of them is slower, and its gradients of b have to be summed
        rows, shape = rows_of(a), a.shape

        def vjp(g):
            flat = rows_of(g)
            return lambda: (flat @ b.T).reshape(shape), lambda: rows.T @ flat
        return (rows @ b).reshape(*a.shape[:-1], b.shape[-1]), vjp
    return a @ b, lambda g: (lambda: g @ b.swapaxes(-1, -2), lambda: a.swapaxes(-1, -2) @ g)


@matmul.macs
def _(a, b):
    return math.prod(np.broadcast_shapes(a[:-2], b[:-2])) * a[-2] * a[-1] * b[-1]


@op
def linear(x, weight, bias=None):
    """x W^T + b. x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    expect(weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1], "linear",
           lambda: f"{shape_of('x', x)}, {shape_of('weight', weight)}: "
                   "the last size of x must be the weight's second, (out, in)")
    expect(bias is None or bias.shape == weight.shape[:1], "linear",
           lambda: f"{shape_of('bias', bias)} for {shape_of('weight', weight)}: "
                   f"expected ({weight.shape[0]},)")
    rows, shape, by_columns = rows_of(x), x.shape, weight.flags.f_contiguous
    out = rows @ weight.T
    if bias is not None:
        out += bias

    def vjp(g):
        flat = rows_of(g)
        return (lambda: (flat @ weight).reshape(shape),
                lambda: weight_gradient(flat, rows, by_columns),
                lambda: column_sums(flat))
    return out.reshape(*shape[:-1], weight.shape[0]), vjp


@linear.macs
def _(x, weight, bias=None):
    return math.prod(x) * weight[0]


def rows_of(x: Array) -> Array:
    """x (..., D) as rows (R, D), also where there are none or D is 0."""
    return x.reshape(-1 if x.shape[-1] else math.prod(x.shape[:-1]), x.shape[-1])


def weight_gradient(g: Array, x: Array, by_columns: bool) -> Array:
    """g^T x, the gradient of W (out, in) in x W^T. x (R, in), g (R, out).

    by_columns: how W lies. The gradient lies so too: to add it to what is there is then one pass."""
    return (x.T @ g).T if by_columns else g.T @ x


def column_sums(rows: Array) -> Array:
    """rows (R, D) -> (D,), as a product with ones: several times faster than .sum(0)."""
    return array_module(rows).ones(len(rows), rows.dtype) @ rows


@op
def embedding(weight, rows: Index):
    """Rows of a table: weight (K, D), rows (...) integers -> (..., D).

    The gradients of a row that is used more than once add up.
    """
    expect(weight.ndim == 2, "embedding", lambda: f"{shape_of('weight', weight)}, expected (K, D)")
    expect(rows.dtype.kind in "iu", "embedding", lambda: f"rows of dtype {rows.dtype}, expected integers")
    shape = weight.shape
    in_range = array_module(rows) is not np or not rows.size or 0 <= rows.min() and rows.max() < len(weight)
    expect(in_range, "embedding", lambda: f"rows from {rows.min()} to {rows.max()} of a table {weight.shape}")

    def vjp(g):
        out = array_module(g).zeros(shape, g.dtype)
        scatter_add(out, rows.reshape(-1), g.reshape(rows.size, shape[1]))
        return out, None
    return weight[rows], vjp
