"""What the ops compute, against formulas written out with Python numbers and loops."""
import itertools
import math

import numpy as np
import pytest

from tinytoken import Tensor, ops
from tinytoken.backend import to_numpy

rng = np.random.default_rng(7)


def close(tensor, expected, tolerance=1e-12):
    assert isinstance(tensor, Tensor)
    expected = np.asarray(expected)
    assert tensor.shape == expected.shape
    np.testing.assert_allclose(to_numpy(tensor.data), expected, rtol=tolerance, atol=tolerance)


def by_element(f, *arrays):
    arrays = np.broadcast_arrays(*arrays)
    return np.array([f(*values)
                     for values in zip(*(a.ravel().tolist() for a in arrays))]).reshape(arrays[0].shape)


def softmax_row(row):
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


# Elementwise

@pytest.mark.parametrize("name, formula", [
    ("exp", math.exp), ("tanh", math.tanh), ("negative", lambda x: -x),
    ("relu", lambda x: x if x > 0 else 0.0),
    ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
    ("log_sigmoid", lambda x: -math.log(1 + math.exp(-x))),
    ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
])
def test_functions_of_one_number(name, formula, xp):
    x = 3 * rng.standard_normal((3, 4))
    close(getattr(ops, name)(xp.asarray(x)), by_element(formula, x))


@pytest.mark.parametrize("name, formula", [("log", math.log), ("sqrt", math.sqrt)])
def test_functions_of_a_positive_number(name, formula, xp):
    x = rng.uniform(0.1, 5, (3, 4))
    close(getattr(ops, name)(xp.asarray(x)), by_element(formula, x))


@pytest.mark.parametrize("exponent", [-2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 2.5])
def test_power(exponent, xp):
    x = rng.uniform(0.1, 2, (3, 4))
    close(ops.power(xp.asarray(x), exponent=exponent), by_element(lambda a: a ** exponent, x))
    if exponent in (1, 2, 3):
        close(ops.power(xp.asarray(-x), exponent=exponent), by_element(lambda a: a ** exponent, -x))


@pytest.mark.parametrize("name, formula", [("add", lambda a, b: a + b), ("subtract", lambda a, b: a - b),
                                           ("multiply", lambda a, b: a * b), ("divide", lambda a, b: a / b)])
def test_functions_of_two_numbers_broadcast(name, formula, xp):
    a, b = rng.standard_normal((2, 1, 3)), rng.uniform(1, 2, (4, 1))
    close(getattr(ops, name)(xp.asarray(a), xp.asarray(b)), by_element(formula, a, b))
    close(getattr(ops, name)(xp.asarray(a), 3), by_element(formula, a, np.array(3.0)))


def test_far_out_nothing_overflows(xp):
    for dtype in ("float32", "float64"):
        x = xp.asarray([-1e4, -200, 0, 200, 1e4], dtype)
        close(ops.sigmoid(x), [0, 0, 0.5, 1, 1], 1e-30)
        close(ops.tanh(x), [-1, -1, 0, 1, 1])
        close(ops.relu(x), [0, 0, 0, 200, 1e4])
        close(ops.softmax(x), [0, 0, 0, 0, 1], 1e-30)
        close(ops.log_softmax(x), [-2e4, -10200, -1e4, -9800, 0])
        close(ops.cross_entropy(x[None], xp.asarray([0])), 2e4)
    close(ops.gelu(xp.asarray([-200.0, -40, 0, 40, 200])), [0, 0, 0, 40, 200], 1e-30)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (1, -1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions(axis, keepdims, xp):
    x = rng.standard_normal((2, 3, 4))
    axes = range(3) if axis is None else [a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))]
    groups = {}
    for place in itertools.product(*map(range, x.shape)):
        groups.setdefault(tuple(0 if i in axes else p for i, p in enumerate(place)),
                          []).append(float(x[place]))
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    for name, formula in (("sum", math.fsum), ("mean", lambda v: math.fsum(v) / len(v)), ("max", max)):
        expected = np.array([formula(groups[place])
                             for place in itertools.product(*map(range, shape))]).reshape(shape)
        if not keepdims:
            expected = expected.reshape([n for i, n in enumerate(x.shape) if i not in axes])
        close(getattr(ops, name)(xp.asarray(x), axis=axis, keepdims=keepdims), expected)


def test_max_shares_its_gradient_among_equals(xp):
    x = Tensor(xp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True)
    ops.max(x, axis=1).backward(xp.asarray([1.0, 6.0]))
    np.testing.assert_array_equal(to_numpy(x.grad), [[0, 0.5, 0.5], [2, 2, 2]])


def test_relu_has_no_slope_at_zero(xp):
    x = Tensor(xp.asarray([-1.0, 0.0, 2.0]), requires_grad=True)
    ops.relu(x).sum().backward()
    np.testing.assert_array_equal(to_numpy(x.grad), [0, 0, 1])


# Products

def test_matmul(xp):
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 5))
    product = [[[math.fsum(a[n, i, k] * b[n, k, j] for k in range(4)) for j in range(5)] for i in range(3)]
               for n in range(2)]
    close(ops.matmul(xp.asarray(a), xp.asarray(b)), product)
    close(ops.matmul(xp.asarray(a[0]), xp.asarray(b[0])), product[0])
    with_one = [[[math.fsum(a[n, i, k] * b[0, k, j] for k in range(4)) for j in range(5)] for i in range(3)]
                for n in range(2)]
    close(ops.matmul(xp.asarray(a), xp.asarray(b[0])), with_one)
    close(ops.matmul(xp.asarray(a), xp.asarray(b[:1])), with_one)


def test_linear_is_x_times_the_weight_transposed(xp):
    x, weight, bias = rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)
    product = np.array([[[math.fsum(row[k] * weight[o, k] for k in range(4)) for o in range(5)]
                         for row in block] for block in x])
    close(ops.linear(xp.asarray(x), xp.asarray(weight), xp.asarray(bias)), product + bias)
    close(ops.linear(xp.asarray(x), xp.asarray(weight)), product)
    close(ops.linear(xp.asarray(x[0, 0]), xp.asarray(weight)), product[0, 0])


def test_embedding(xp):
    table = rng.standard_normal((4, 3))
    close(ops.embedding(xp.asarray(table), xp.asarray([[1, 3], [3, 0]])),
          [[table[1], table[3]], [table[3], table[0]]])


# Rows

@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax_and_its_logarithm(axis, xp):
    x = 3 * rng.standard_normal((2, 4, 3))
    rows = np.moveaxis(x, axis, -1)
    expected = np.moveaxis(np.array([[softmax_row(row) for row in block] for block in rows.tolist()]), -1,
                           axis)
    close(ops.softmax(xp.asarray(x), axis=axis), expected)
    close(ops.log_softmax(xp.asarray(x), axis=axis), np.log(expected))
    close(ops.softmax(xp.asarray(x), axis=axis).sum(axis=axis), np.ones(expected.sum(axis=axis).shape))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_layer_norm(eps, xp):
    x, weight, bias = 3 + 2 * rng.standard_normal((2, 3, 5)), rng.standard_normal(5), rng.standard_normal(5)

    def normed(row):
        mean = math.fsum(row) / len(row)
        variance = math.fsum((a - mean) ** 2 for a in row) / len(row)
        return [(a - mean) / math.sqrt(variance + eps) for a in row]
    expected = np.array([[normed(row) for row in block] for block in x.tolist()])
    close(ops.layer_norm(xp.asarray(x), eps=eps), expected)
    close(ops.layer_norm(xp.asarray(x), xp.asarray(weight), xp.asarray(bias), eps=eps),
          expected * weight + bias)
    close(ops.layer_norm(xp.asarray(x), None, xp.asarray(bias), eps=eps), expected + bias)
    out = to_numpy(ops.layer_norm(xp.asarray(x), eps=eps).data)
    np.testing.assert_allclose(out.mean(axis=-1), 0, atol=1e-14)
    np.testing.assert_allclose(out.var(axis=-1), x.var(axis=-1) / (x.var(axis=-1) + eps), rtol=1e-12)


def test_layer_norm_of_equal_values_is_zero(xp):
    x = Tensor(xp.full((2, 3), 5.0), requires_grad=True)
    out = ops.layer_norm(x)
    out.backward(xp.asarray(rng.standard_normal((2, 3))))
    assert (to_numpy(out.data) == 0).all() and np.isfinite(to_numpy(x.grad)).all()


# Values that move

def test_moves(xp):
    x = np.arange(24.0).reshape(2, 3, 4)
    t = xp.asarray(x)
    close(ops.reshape(t, shape=(4, 6)), x.reshape(4, 6))
    close(ops.transpose(t), x.T)
    close(ops.transpose(t, axes=(1, -1, 0)), np.einsum("abc->bca", x))
    close(ops.swapaxes(Tensor(t), 0, -1), x.swapaxes(0, -1))
    close(ops.concat(t, t[:, :1], axis=1), [[*block, block[0]] for block in x])
    close(ops.pad(t, widths=((0, 1), (2, 0), (0, 0)))[0, 2:], x[0])
    assert to_numpy(ops.pad(t, widths=((0, 1), (2, 0), (0, 0))).data).sum() == x.sum()
    close(ops.broadcast_to(t[:, :1], shape=(5, 2, 3, 4))[3, :, 2], x[:, 0])
    close(ops.index(t, key=(slice(None), -1)), x[:, -1])


def test_heads_are_the_slices_of_the_last_axis(xp):
    x = rng.standard_normal((2, 3, 24))
    q, k, v = ops.split_heads(xp.asarray(x), heads=4, parts=3)
    for part, tensor in enumerate((q, k, v)):
        for head in range(4):
            start = part * 8 + head * 2
            close(tensor[:, head], x[:, :, start:start + 2])
    close(ops.merge_heads(k), x[:, :, 8:16])
    close(ops.split_heads(xp.asarray(x), heads=4)[:, 1], x[:, :, 6:12])


def test_patchify_and_linear_are_a_convolution(xp):
    images, weight, p = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((5, 3, 2, 2)), 2
    expected = np.zeros((2, 2 * 3, 5))
    for b, row, column, out in itertools.product(range(2), range(2), range(3), range(5)):
        window = images[b, :, row * p:(row + 1) * p, column * p:(column + 1) * p]
        expected[b, row * 3 + column, out] = math.fsum((window * weight[out]).ravel())
    close(ops.linear(ops.patchify(xp.asarray(images), patch=p), xp.asarray(weight.reshape(5, -1))), expected)


# Resizing

@pytest.mark.parametrize("grid, size", [((8, 8), (3, 3)), ((4, 6), (2, 5)), ((3, 2), (7, 5)),
                                        ((1, 5), (1, 1)), ((8, 8), (8, 3))])
@pytest.mark.parametrize("antialias", [True, False])
def test_each_row_of_the_resize_matrix_is_an_average(grid, size, antialias):
    matrix = ops.resize_matrix(grid, size, antialias)
    assert matrix.shape == (size[0] * size[1], grid[0] * grid[1]) and matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-14)
    # Symmetric: the picture turned round is resized as the picture is.
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-15)


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_to_the_same_size_changes_nothing(antialias, xp):
    np.testing.assert_array_equal(ops.resize_matrix((3, 4), (3, 4), antialias), np.eye(12))
    x = rng.standard_normal((2, 12, 5))
    close(ops.resize(xp.asarray(x), grid=(3, 4), size=(3, 4), antialias=antialias), x, 1e-15)


@pytest.mark.parametrize("inputs, outputs, without",
                         [(8, 2, 4), (8, 3, 6), (14, 3, 6), (14, 5, 10), (8, 4, 8), (8, 5, 8)])
def test_antialiased_resize_reads_every_token(inputs, outputs, without):
    def rows_read(antialias):
        return (ops.resize_matrix((inputs, 1), (outputs, 1), antialias) > 0).any(axis=0).sum()
    assert rows_read(True) == inputs
    assert rows_read(False) == without


def test_resize_is_bilinear(xp):
    """Loops over the definition, one axis after the other."""
    def weights(n, m, antialias):
        step = n / m
        out = np.zeros((m, n))
        for o, i in itertools.product(range(m), range(n)):
            out[o, i] = max(0, 1 - abs((i + 0.5) - (o + 0.5) * step) / (max(step, 1) if antialias else 1))
        return out / out.sum(axis=1, keepdims=True)
    for grid, size, antialias in (((4, 6), (3, 2), True), ((4, 6), (3, 2), False), ((2, 3), (5, 4), True)):
        x = rng.standard_normal((2, *grid, 3))
        expected = np.einsum("oh,pw,bhwd->bopd", weights(grid[0], size[0], antialias),
                             weights(grid[1], size[1], antialias), x)
        out = ops.resize(xp.asarray(x.reshape(2, -1, 3)), grid=grid, size=size, antialias=antialias)
        close(out, expected.reshape(2, -1, 3))


def test_resize_agrees_with_pillow():
    Image = pytest.importorskip("PIL.Image")  # its "bilinear" is antialiased too
    for (h, w), (m, n) in (((14, 9), (5, 4)), ((8, 8), (3, 3)), ((5, 6), (11, 7))):
        picture = rng.standard_normal((h, w)).astype("float32")
        expected = np.asarray(Image.fromarray(picture).resize((n, m), Image.Resampling.BILINEAR))
        close(ops.resize(picture.reshape(1, -1, 1), grid=(h, w), size=(m, n)), expected.reshape(1, -1, 1),
              1e-6)


# Losses

def cross_entropy_by_loops(logits, targets, smoothing):
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        total -= math.fsum((t * (1 - smoothing) + smoothing / len(row)) * math.log(p)
                           for t, p in zip(target, softmax_row(row)))
    return total / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing, xp):
    logits, labels = 2 * rng.standard_normal((4, 5)), np.array([1, 4, 0, 4])
    one_hot = np.eye(5)[labels]
    hard = ops.cross_entropy(xp.asarray(logits), xp.asarray(labels), smoothing=smoothing)
    close(hard, cross_entropy_by_loops(logits, one_hot, smoothing))
    assert hard.item() == ops.cross_entropy(xp.asarray(logits), xp.asarray(one_hot),
                                            smoothing=smoothing).item()
    soft = rng.dirichlet(np.ones(5), 4)
    found = ops.cross_entropy(xp.asarray(logits), xp.asarray(soft), smoothing=smoothing)
    close(found, cross_entropy_by_loops(logits, soft, smoothing))


def test_cross_entropy_of_uniform_logits_is_log_k(xp):
    for smoothing in (0, 0.3):
        close(ops.cross_entropy(xp.zeros((3, 7)), xp.asarray([0, 3, 6]), smoothing=smoothing), math.log(7))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3, 4)])
def test_binary_cross_entropy(shape, xp):
    logits, soft = 2 * rng.standard_normal(shape), rng.uniform(size=shape)
    for targets in (soft, soft > 0.4, (soft > 0.4).astype(int), (soft > 0.4).astype("uint8")):
        expected = math.fsum(by_element(lambda x, t: -t * math.log(1 / (1 + math.exp(-x)))
                                        - (1 - t) * math.log(1 - 1 / (1 + math.exp(-x))),
                                        logits, targets).ravel()) / np.asarray(logits).size
        close(ops.binary_cross_entropy(xp.asarray(logits), xp.asarray(targets)), expected)
    rounded = np.clip(soft * 1.5, -1e-7, 1 + 1e-7)  # as a resized mask may be
    assert ops.binary_cross_entropy(xp.asarray(logits), xp.asarray(rounded)).item() > 0


def test_kl_divergence(xp):
    student, teacher = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    expected = math.fsum(p * math.log(p / q) for s, t in zip(student.tolist(), teacher.tolist())
                         for p, q in zip(softmax_row(t), softmax_row(s))) / 4
    close(ops.kl_divergence(xp.asarray(student), xp.asarray(teacher)), expected)


def test_kl_divergence_is_not_negative_and_zero_only_for_equal_distributions(xp):
    for seed in range(20):
        a, b = np.random.default_rng(seed).standard_normal((2, 3, 4))
        assert ops.kl_divergence(xp.asarray(a), xp.asarray(b)).item() > 1e-3
        student = Tensor(xp.asarray(a), requires_grad=True)
        same = ops.kl_divergence(student, xp.asarray(a + 2))  # a shift of all logits is the same distribution
        same.backward()
        assert abs(same.item()) < 1e-15 and abs(to_numpy(student.grad)).max() < 1e-15


def test_mse(xp):
    a, b = rng.standard_normal((2, 2, 3, 4))
    squares = np.array([(x - y) ** 2
                        for x, y in zip(a.ravel().tolist(), b.ravel().tolist())]).reshape(a.shape)
    close(ops.mse(xp.asarray(a), xp.asarray(b)), math.fsum(squares.ravel()) / 24)
    close(ops.mse(xp.asarray(a), xp.asarray(b), axis=-1), squares.mean(axis=-1))
    close(ops.mse(xp.asarray(a), xp.asarray(b), axis=(1, 2)), squares.mean(axis=(1, 2)))


# Single numbers and whole ones

@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_of_a_single_number(dtype):
    x = Tensor(np.array(0.3, dtype), requires_grad=True)
    out = ops.gelu(x)
    out.backward()
    assert out.shape == x.grad.shape == () and out.dtype == x.grad.dtype == dtype
    cdf = 0.5 * (1 + math.erf(0.3 / math.sqrt(2)))
    assert np.isclose(out.item(), 0.3 * cdf, atol=4e-6)
    assert np.isclose(x.grad, cdf + 0.3 * math.exp(-0.045) / math.sqrt(2 * math.pi), atol=1e-5)


def test_integer_one_hot_targets_are_probabilities():
    logits, labels = np.random.default_rng(0).standard_normal((3, 4)).astype("float32"), np.array([2, 0, 3])
    hard, soft = ops.cross_entropy(logits, labels), ops.cross_entropy(logits, np.eye(4, dtype=int)[labels])
    assert soft.item() == pytest.approx(hard.item(), rel=1e-6)


def test_the_gradient_of_a_zeroth_power_is_zero_even_at_zero():
    x = Tensor(np.array([0.0, 2.0]), requires_grad=True)
    (x ** 0).sum().backward()
    assert np.array_equal(x.grad, [0.0, 0.0])


def test_indexing_whole_numbers_keeps_them_whole():
    labels = Tensor(np.arange(5))
    assert labels[1:3].dtype == labels.dtype and np.array_equal(labels[1:3], [1, 2])


def test_an_op_takes_bare_numbers():
    assert ops.exp(1.0).dtype == np.float32 and ops.exp(1.0).item() == pytest.approx(math.e)
