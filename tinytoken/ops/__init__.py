"""The ops, one file per family, and the operators of Tensor made of them.

An op is one function, with its vjp inside it.
"""
from ..tensor import Tensor
from .activation import gelu, log_sigmoid, relu, sigmoid, tanh
from .arithmetic import add, divide, exp, log, max, mean, multiply, negative, power, sqrt, subtract, sum
from .attend import attention, lookup_gather, lookup_infuse, merge_heads, split_heads
from .conv import batch_norm, conv2d, unfold
from .dense import embedding, linear, matmul
from .grid import patchify, resize, resize_matrix
from .loss import binary_cross_entropy, cross_entropy, kl_divergence, mse
from .norm import layer_norm, log_softmax, softmax
from .numpy_functions import numpy_function, numpy_ufunc
from .roi import roi_align
from .select import gumbel_softmax, put_tokens, take_tokens, top_k
from .shape import broadcast_to, concat, getitem, index, pad, reshape, swapaxes, transpose
from .window import (cut_overlapping, cut_windows, join_windows, max_in_windows, relative_bias,
                     seen_in_windows, window_attention, windows_in)


def _shape(sizes):
    """reshape(2, 3) and reshape((2, 3)) mean the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


# mypy: disable-error-code="assignment, method-assign"
Tensor.__add__ = Tensor.__radd__ = lambda a, b: add(a, b)
Tensor.__mul__ = Tensor.__rmul__ = lambda a, b: multiply(a, b)
Tensor.__sub__ = lambda a, b: subtract(a, b)
Tensor.__rsub__ = lambda a, b: subtract(b, a)
Tensor.__truediv__ = lambda a, b: divide(a, b)
Tensor.__rtruediv__ = lambda a, b: divide(b, a)
Tensor.__matmul__ = lambda a, b: matmul(a, b)
Tensor.__rmatmul__ = lambda a, b: matmul(b, a)
Tensor.__neg__ = lambda a: negative(a)
Tensor.__pow__ = lambda a, exponent: power(a, exponent=exponent)
Tensor.__getitem__ = getitem
Tensor.sum = lambda a, axis=None, keepdims=False: sum(a, axis=axis, keepdims=keepdims)
Tensor.mean = lambda a, axis=None, keepdims=False: mean(a, axis=axis, keepdims=keepdims)
Tensor.max = lambda a, axis=None, keepdims=False: max(a, axis=axis, keepdims=keepdims)
Tensor.reshape = lambda a, *shape: reshape(a, shape=_shape(shape))
Tensor.transpose = lambda a, *axes: transpose(a, axes=_shape(axes) or None)
Tensor.swapaxes = swapaxes
Tensor.__array_ufunc__, Tensor.__array_function__ = numpy_ufunc, numpy_function
