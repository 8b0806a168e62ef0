"""The package's own, for the tests of the exercises that use them: a slip in one costs nothing in another."""
import numpy as np

import tinytoken as tt


def axis_weights(a, b):
    return tt.ops.resize_matrix((1, a), (1, b))


def resize_matrix(grid, size):
    return tt.ops.resize_matrix(grid, size)


def gather(q, k, v):
    return tuple(part.data for part in tt.ops.lookup_gather(q, k, v))


def infuse(A, scores, values, reuse):
    return tt.ops.lookup_infuse(A, scores, values, reuse=reuse).data


def block_cost(N, M, D):
    """By the package's counter: two blocks of a model less one."""
    side, small = round(N**0.5), round(M**0.5)
    picture = np.zeros((1, 3, 2 * side, 2 * side), "float32")
    one, two = (tt.macs(tt.models.LookupViT(2 * side, 2, D, depth, 1, compressed=(small, small)),
                        picture).total for depth in (1, 2))
    return two - one
