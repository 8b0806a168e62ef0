"""Mistakes in choosing tokens, and in grids."""
import numpy as np

from tinytoken import ops
from tinytoken.ops.grid import resize_matrix
from tinytoken.ops.norm import softmax_of, softmax_vjp

from .catalogue import STRAIGHT_THROUGH, normal, plant

NOISY = normal((2, 3), (2, 3))
INDEX = np.array([[0, 3], [1, 2]])
TOKENS = normal((2, 4, 2), INDEX)


@plant(ops.gumbel_softmax, NOISY, "factor", tau=0.7)
def gumbel_forgets_tau(out, log_probs, noise, tau):
    def vjp(g):
        grad = softmax_vjp(out, g)
        return grad, grad
    return vjp


@plant(ops.gumbel_softmax, NOISY, tau=0.7)
def gumbel_forgets_sum(out, log_probs, noise, tau):
    return lambda g: (g * out / tau, g * out / tau)


@plant(ops.gumbel_softmax, NOISY, "zeros")
def gumbel_noise_gradient_lost(out, log_probs, noise):
    return lambda g: (softmax_vjp(out, g), None)


@plant(ops.gumbel_softmax, NOISY)
def gumbel_noise_left_out(out, log_probs, noise):
    def vjp(g):
        grad = softmax_vjp(softmax_of(log_probs), g)
        return grad, grad
    return vjp


# Straight-through: forward one-hot, so the check is that the gradient equals the soft path's

@plant(ops.gumbel_softmax, NOISY, into=STRAIGHT_THROUGH, tau=0.7)
def straight_through_zeros(out, log_probs, noise, tau, hard=False):
    soft = softmax_of((log_probs + noise) / tau)

    def vjp(g):
        grad = softmax_vjp(soft, g) / tau * (not hard)  # the slope that a one-hot really has
        return grad, grad
    return vjp


@plant(ops.gumbel_softmax, NOISY, into=STRAIGHT_THROUGH, tau=0.7)
def straight_through_of_the_hard_value(out, log_probs, noise, tau, hard=False):
    def vjp(g):
        grad = softmax_vjp(out, g) / tau
        return grad, grad
    return vjp


@plant(ops.gumbel_softmax, NOISY, into=STRAIGHT_THROUGH, tau=0.7)
def straight_through_identity(out, log_probs, noise, tau, hard=False):
    soft = softmax_of((log_probs + noise) / tau)

    def vjp(g):
        grad = g if hard else softmax_vjp(soft, g) / tau
        return grad, grad
    return vjp


@plant(ops.gumbel_softmax, NOISY, into=STRAIGHT_THROUGH, tau=0.7)
def straight_through_forgets_tau(out, log_probs, noise, tau, hard=False):
    soft = softmax_of((log_probs + noise) / tau)

    def vjp(g):
        grad = softmax_vjp(soft, g) / (1 if hard else tau)
        return grad, grad
    return vjp


# Tokens

def scattered(x, index, g):
    """g's rows added to zeros like x."""
    back = np.zeros_like(x)
    np.add.at(back, (np.arange(len(x))[:, None], index), g)
    return back


@plant(ops.take_tokens, normal((1, 4, 2), np.array([[1, 3]])), "permuted")
def take_tokens_to_first_rows(out, x, index):
    return lambda g: (scattered(x, np.array([[0, 1]]), g), None)


@plant(ops.take_tokens, TOKENS, "permuted")
def take_tokens_to_other_image(out, x, index):
    return lambda g: (scattered(x, index, g)[::-1], None)


@plant(ops.take_tokens, TOKENS, "permuted")
def take_tokens_all_to_first_image(out, x, index):
    def vjp(g):
        back = np.zeros_like(x)
        np.add.at(back[0], index, g)
        return back, None
    return vjp


@plant(ops.take_tokens, normal((1, 3, 2), np.array([[2, 0, 2]])), "duplicates")
def take_tokens_overwrites(out, x, index):
    def vjp(g):
        back = np.zeros_like(x)
        back[np.arange(len(x))[:, None], index] = g
        return back, None
    return vjp


@plant(ops.put_tokens, normal((2, 2, 2), INDEX), length=4)
def put_tokens_reads_first_rows(out, x, index, length):
    return lambda g: (g[:, :2], None)


@plant(ops.put_tokens, normal((2, 2, 2), INDEX), "permuted", length=4)
def put_tokens_reads_backward(out, x, index, length):
    return lambda g: (np.take_along_axis(g, index[:, ::-1, None], axis=1), None)


# Grids

@plant(ops.patchify, normal((1, 2, 4, 2)), "permuted", patch=2)
def patchify_by_reshape(out, images, patch):
    return lambda g: g.reshape(images.shape)


@plant(ops.patchify, normal((1, 2, 2, 4)), "permuted", patch=2)
def patchify_channels_last(out, images, patch):
    return lambda g: g.reshape(1, 1, 2, 2, 2, 2).transpose(0, 5, 1, 3, 2, 4).reshape(images.shape)


@plant(ops.resize, normal((1, 9, 1)), grid=(3, 3), size=(2, 2))
def resize_back_instead_of_transpose(out, x, grid, size):
    return lambda g: resize_matrix(size, grid) @ g


@plant(ops.resize, normal((1, 9, 1)), grid=(3, 3), size=(2, 2))
def resize_transpose_normalised(out, x, grid, size):
    back = resize_matrix(grid, size).T
    return lambda g: back / back.sum(axis=1, keepdims=True) @ g


@plant(ops.resize, normal((1, 4, 2)), "permuted", grid=(4, 1), size=(4, 1), antialias=False)
def resize_reads_upside_down(out, x, grid, size, antialias):
    return lambda g: g[:, ::-1]
