"""What the ops refuse, and how it is said."""
import numpy as np
import pytest

from tinytoken import InputError, Tensor, ops


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize("call, message", [
    (lambda: ops.matmul(ones(8, 16, 4), ones(8, 16, 4)),
     "matmul: a (8, 16, 4) @ b (8, 16, 4): inner sizes 4 and 16 differ.\n  likely: k.swapaxes(-1, -2)   "
     "(lesson 03)"),
    (lambda: ops.matmul(ones(2, 3), ones(4, 5)), "matmul: a (2, 3) @ b (4, 5): inner sizes 3 and 4 differ."),
    (lambda: ops.matmul(ones(2, 3), ones(3)), "matmul: a (2, 3) @ b (3,): at least two axes each expected"),
    (lambda: ops.linear(ones(2, 3), ones(3, 4)),
     "linear: x (2, 3), weight (3, 4): the last size of x must be the weight's second, (out, in)"),
    (lambda: ops.linear(ones(2, 3), ones(4, 3), ones(3)),
     "linear: bias (3,) for weight (4, 3): expected (4,)"),
    (lambda: ops.embedding(ones(4, 3), np.array([0, 4])), "embedding: rows from 0 to 4 of a table (4, 3)"),
    (lambda: ops.embedding(ones(4, 3), np.array([-1])), "embedding: rows from -1 to -1 of a table (4, 3)"),
    (lambda: ops.embedding(ones(4), np.array([0])), "embedding: weight (4,), expected (K, D)"),
    (lambda: ops.embedding(ones(4, 3, 2), np.array([0])), "embedding: weight (4, 3, 2), expected (K, D)"),
    (lambda: ops.embedding(ones(4, 3), ones(2)), "embedding: rows of dtype float64, expected integers"),
    (lambda: ops.layer_norm(ones(2, 3), ones(2)), "layer_norm: weight (2,) for x (2, 3): expected (3,)"),
    (lambda: ops.layer_norm(ones(2, 3), None, ones(2, 3)),
     "layer_norm: bias (2, 3) for x (2, 3): expected (3,)"),
    (lambda: ops.power(ones(2), exponent="2"), "power: exponent '2', expected a number"),
    (lambda: ops.reshape(ones(2, 3), shape=(4, 2)),
     "reshape: x (2, 3) has 6 values, which do not fit (4, 2)"),
    (lambda: ops.reshape(ones(2, 3), shape=(4, -1)),
     "reshape: x (2, 3) has 6 values, which do not fit (4, -1)"),
    (lambda: ops.transpose(ones(2, 3), axes=(0, 0)), "transpose: axes (0, 0) for x (2, 3)"),
    (lambda: ops.concat(ones(2, 3), ones(3, 3), axis=1),
     "concat: shapes (2, 3), (3, 3) differ outside axis 1"),
    (lambda: ops.index(ones(2), key=[0.0]), "index: an index of float64, expected integers or truth values"),
    (lambda: ops.index(ones(2), key="0"), "index: an index of <U1, expected integers or truth values"),
    (lambda: ops.pad(ones(2, 3), widths=((1, 1),)),
     "pad: widths ((1, 1),) for x (2, 3): a pair of counts per axis expected"),
    (lambda: ops.pad(ones(2), widths=((-1, 0),)),
     "pad: widths ((-1, 0),) for x (2,): a pair of counts per axis expected"),
    (lambda: ops.patchify(ones(2, 3, 4), patch=2), "patchify: images (2, 3, 4), expected (B, C, H, W)"),
    (lambda: ops.patchify(ones(2, 3, 4, 5), patch=2),
     "patchify: images (2, 3, 4, 5): height and width must be multiples of the patch size 2"),
    (lambda: ops.resize(ones(2, 5, 3), grid=(2, 3), size=(1, 1)),
     "resize: x (2, 5, 3), expected (B, 6, D) for the grid (2, 3)"),
    (lambda: ops.resize(ones(2, 6, 3), grid=(2, 3), size=(0, 1)),
     "resize: grid (2, 3) to (0, 1): whole numbers, at least 1 x 1, expected"),
    (lambda: ops.resize_matrix((2, 3), (2.5, 1)),
     "resize: grid (2, 3) to (2.5, 1): whole numbers, at least 1 x 1, expected"),
    (lambda: ops.resize_matrix(2, (2, 1)),
     "resize: grid 2 to (2, 1): whole numbers, at least 1 x 1, expected"),
    (lambda: ops.resize_matrix((2, 2), (2, "1")),
     "resize: grid (2, 2) to (2, '1'): whole numbers, at least 1 x 1, expected"),
    (lambda: ops.resize_matrix((2, 2), (2, 2, 2)),
     "resize: grid (2, 2) to (2, 2, 2): whole numbers, at least 1 x 1, expected"),
    (lambda: ops.top_k(ones(2, 3), 1.0), "top_k: k 1.0 of scores (2, 3): expected (B, N) and 0 <= k <= N"),
    (lambda: ops.top_k(ones(2, 3), None), "top_k: k None of scores (2, 3): expected (B, N) and 0 <= k <= N"),
    (lambda: ops.split_heads(ones(2, 3, 10), heads=2, parts=3),
     "split_heads: x (2, 3, 10): the last size must be a multiple of 3 parts x 2 heads"),
    (lambda: ops.merge_heads(ones(2, 3, 4)), "merge_heads: x (2, 3, 4), expected (B, H, T, d)"),
    (lambda: ops.cross_entropy(ones(2), np.array([0])), "cross_entropy: logits (2,), expected (B, K)"),
    (lambda: ops.cross_entropy(ones(2, 3), np.array([0, 3])),
     "cross_entropy: labels from 0 to 3, expected 0 to 2"),
    (lambda: ops.cross_entropy(ones(2, 3), np.array([-1, 1])),
     "cross_entropy: labels from -1 to 1, expected 0 to 2"),
    (lambda: ops.cross_entropy(ones(2, 3), ones(2)),
     "cross_entropy: targets (2,) float64, expected (2,) integer labels or (2, 3) probabilities"),
    (lambda: ops.cross_entropy(ones(2, 3), np.array([0, 1]), smoothing=1.0),
     "cross_entropy: smoothing 1.0, expected 0 <= smoothing < 1"),
    (lambda: ops.binary_cross_entropy(ones(2, 3), ones(3)),
     "binary_cross_entropy: logits (2, 3), targets (3,): two of one shape expected, with elements"),
    (lambda: ops.binary_cross_entropy(ones(0), ones(0)),
     "binary_cross_entropy: logits (0,), targets (0,): two of one shape expected, with elements"),
    (lambda: ops.binary_cross_entropy(ones(2), np.array([0, 255])),
     "binary_cross_entropy: targets from 0.0 to 255.0, expected 0 to 1"),
    (lambda: ops.binary_cross_entropy(ones(2), np.array([-1, 1])),
     "binary_cross_entropy: targets from -1.0 to 1.0, expected 0 to 1"),
    (lambda: ops.kl_divergence(ones(2, 3), ones(3, 2)),
     "kl_divergence: logits (2, 3), teacher_logits (3, 2): two of one shape (B, K) expected"),
    (lambda: ops.kl_divergence(ones(0, 3), ones(0, 3)),
     "kl_divergence: logits (0, 3), teacher_logits (0, 3): two of one shape (B, K) expected"),
    (lambda: ops.mse(ones(2, 3), ones(2, 1)), "mse: x (2, 3), target (2, 1): equal shapes expected"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("call, text", [
    (lambda x: x + np.ones(4), "add: (3,), (4,): operands could not be broadcast together"),
    (lambda x: x.sum(axis=2), "sum: (3,): axis 2 is out of bounds"),
    (lambda x: x[5], "index: (3,): index 5 is out of bounds"),
    (lambda x: ops.broadcast_to(x, shape=(2,)),
     "broadcast_to: (3,): operands could not be broadcast together"),
    (lambda x: ops.swapaxes(x, 0, 1), "swapaxes: axes 0 and 1 of x (3,)"),
    (lambda x: ops.swapaxes(x, 0, 0.0), "swapaxes: axes 0 and 0.0 of x (3,)"),
    (lambda x: ops.swapaxes(x, "0", 0), "swapaxes: axes '0' and 0 of x (3,)"),
    (lambda x: x + None, "add: (3,), None: unsupported operand type(s) for +"),
    (lambda x: x @ 2.0, "matmul: (3,), 2.0: 'float' object has no attribute"),
    (lambda x: ops.gelu(None), "gelu: None: "),
    (lambda x: x.sum(axis=0.5), "sum: (3,): 'float' object cannot be interpreted as an integer "
                                "(axis=0.5, keepdims=False)"),
    (lambda x: x.reshape(None), "reshape: (3,): "),
    (lambda x: x[1.5:], "index: (3,): slice indices must be integers"),
    (lambda x: ops.resize(Tensor(np.ones((1, 4, 2))), grid=3, size=(1, 1)),
     "resize: (1, 4, 2): 'int' object is not iterable (grid=3, "),
    (lambda x: ops.split_heads(Tensor(np.ones((1, 2, 4))), heads=0), "split_heads: (1, 2, 4): "),
    (lambda x: x ** 10 ** 400 + ops.power(x, exponent=10 ** 400), "power: (3,): int too large to convert"),
    (lambda x: Tensor([1, 2, 3])[3], "index: (3,): index 3 is out of bounds for axis 0 with size 3 (key=3)"),
    (lambda x: Tensor([1, 2, 3])[[[1], [1, 2]]], "index: (3,): setting an array element with a sequence"),
    (lambda x: Tensor([True, False])[Tensor([0.5])], "index: (2,): arrays used as indices must be"),
])
def test_what_numpy_refuses_is_refused_in_our_form(call, text):
    with pytest.raises(InputError) as error:
        call(Tensor(np.ones(3)))
    assert str(error.value).startswith(text)
