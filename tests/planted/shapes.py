"""Mistakes in ops that move values, and in products."""
import numpy as np

from tinytoken import op, ops

from .catalogue import normal, plant


@op
def scale_images(x, factor):
    """x (B, N, D) times one factor (B,) per image: a broadcast that NumPy's rules do not line up, undone by
    the op itself."""
    spread = factor[:, None, None]
    return x * spread, lambda g: (g * spread, (g * x).sum(axis=(1, 2)))


@plant(scale_images, normal((2, 3, 4), (2,)), "not summed")
def scale_images_forgets_unbroadcast(out, x, factor):
    return lambda g: (g * factor[:, None, None], g * x)


@plant(scale_images, normal((3, 2, 3), (3,)), "not summed")
def scale_images_unbroadcast_by_accident(out, x, factor):
    # B = D: the engine sums over the first two axes, since that fits
    return lambda g: (g * factor[:, None, None], g * x)


@plant(scale_images, normal((2, 3, 2), (2,)), "not summed")
def scale_images_takes_one_token(out, x, factor):
    return lambda g: (g * factor[:, None, None], (g * x).sum(axis=2)[:, 0])


# Shape

@plant(ops.reshape, normal((2, 6)), "shape", shape=(3, 4))
def reshape_forgets_back(out, x, shape):
    return lambda g: g


@plant(ops.reshape, normal((2, 6)), "permuted", shape=(3, 4))
def reshape_through_transpose(out, x, shape):
    return lambda g: g.T.reshape(x.shape)


@plant(ops.transpose, normal((2, 3)), "transposed")
def transpose_by_reshape(out, x):
    return lambda g: g.reshape(x.shape)


@plant(ops.transpose, normal((2, 3, 4)), "transposed", axes=(1, 2, 0))
def transpose_same_order_back(out, x, axes):
    return lambda g: g.transpose(axes)


@plant(ops.transpose, normal((3, 3)), "transposed")
def transpose_not_undone(out, x):
    return lambda g: g


@plant(ops.concat, normal((2, 3), (2, 3)), "swapped", axis=1)
def concat_in_reverse(out, *xs, axis):
    return lambda g: (g[:, 3:], g[:, :3])


@plant(ops.concat, normal((1, 3), (2, 3)), "zeros")
def concat_forgets_second(out, *xs):
    return lambda g: (g[:1], None)


@plant(ops.concat, normal((1, 3), (2, 3)), "entries")
def concat_bare_entry(out, *xs):
    return lambda g: g[:1]


@plant(ops.index, normal((4, 2)), "duplicates", key=np.array([3, 1, 3]))
def index_overwrites(out, x, key):
    def vjp(g):
        back = np.zeros_like(x)
        back[key] = g
        return back
    return vjp


@plant(ops.index, normal((4, 2)), "duplicates", key=np.array([0, 2, 2, 2]))
def index_adds_by_fancy_assignment(out, x, key):
    def vjp(g):
        back = np.zeros_like(x)
        back[key] += g
        return back
    return vjp


@plant(ops.index, normal((4, 2)), "permuted", key=slice(1, 3))
def index_puts_at_start(out, x, key):
    return lambda g: np.concatenate([g, np.zeros_like(g)])


@plant(ops.pad, normal((2, 3)), widths=((1, 1), (0, 2)))
def pad_cuts_from_corner(out, x, widths):
    return lambda g: g[:2, :3]


@plant(ops.broadcast_to, normal((1, 3)), "not summed", shape=(4, 3))
def broadcast_takes_first(out, x, shape):
    return lambda g: g[:1]


@plant(ops.broadcast_to, normal((1, 3)), "factor", shape=(4, 3))
def broadcast_averages(out, x, shape):
    return lambda g: g.mean(axis=0, keepdims=True)


# Products

@plant(ops.matmul, normal((3, 3), (3, 3)))
def matmul_forgets_transpose(out, a, b):
    return lambda g: (g @ b, a @ g)


@plant(ops.matmul, normal((3, 3), (3, 3)), "transposed")
def matmul_transposed_result(out, a, b):
    return lambda g: ((g @ b.T).T, a.T @ g)


@plant(ops.matmul, normal((2, 4), (4, 3)), "transposed")
def matmul_transposed_result_not_square(out, a, b):
    return lambda g: (g @ b.T, g.T @ a)


@plant(ops.matmul, normal((2, 4), (4, 3)), "raised")
def matmul_shapes_do_not_fit(out, a, b):
    return lambda g: (g @ b, a.T @ g)


@plant(ops.matmul, normal((2, 2, 3), (3, 2)), "not summed")
def matmul_first_of_batch(out, a, b):
    return lambda g: (g @ b.T, a[0].T @ g[0])


@plant(ops.linear, normal((2, 3), (3, 3), (3,)), "transposed")
def linear_weight_transposed(out, x, weight, bias):
    return lambda g: (g @ weight, x.T @ g, g.sum(axis=0))


@plant(ops.linear, normal((5, 2), (3, 2), (3,)), "factor")
def linear_bias_averaged(out, x, weight, bias):
    return lambda g: (g @ weight, g.T @ x, g.mean(axis=0))


@plant(ops.linear, normal((4, 2), (3, 2), (3,)), "not summed")
def linear_bias_of_last_row(out, x, weight, bias):
    return lambda g: (g @ weight, g.T @ x, g[-1])


@plant(ops.linear, normal((2, 3), (3, 3), None))
def linear_applies_weight_again(out, x, weight, bias):
    return lambda g: (g @ weight.T, g.T @ x, None)


@plant(ops.embedding, normal((4, 2), np.array([[1, 0], [3, 1]])), "duplicates")
def embedding_overwrites(out, weight, rows):
    def vjp(g):
        back = np.zeros_like(weight)
        back[rows] = g
        return back, None
    return vjp


@plant(ops.embedding, normal((4, 2), np.array([2, 0, 2])), "permuted")
def embedding_off_by_one(out, weight, rows):
    def vjp(g):
        back = np.zeros_like(weight)
        np.add.at(back, (rows + 1) % len(weight), g)
        return back, None
    return vjp
