"""Sums over the rows of an array, for the gradients of norms and biases: of stretches of rows first, a row of partial sums for each,
then of these. Both in a fixed order. Where the weights of a step are in use (weights.py), all of its partial sums lie in one
array, and one kernel adds them up when the backward pass has ended."""
import functools

from ..tensor import ADDED
from . import launcher, weights

ROW_WARPS = 4  # rows of a block, a warp for each
STRETCHES = 264  # two blocks for each multiprocessor of an H100; always as many, some perhaps empty: the same sums have the same bits


def rows_of(count):
    """(blocks, threads) with a warp for each row."""
    return -(-count // ROW_WARPS), 32 * ROW_WARPS


class Sums:
    """The gradients of one parameter's array, or of two, as sums over rows: `run` makes the partial ones, `finish` adds them up, or
    leaves that to the step's end."""

    def __init__(self, *arrays):
        self.arrays, known = arrays, weights.in_use_now()
        self.columns = known.columns_of(arrays) if known else None
        self.parts = None if self.columns is None else known.parts

    def run(self, kernel, inputs, rows, width, *more, each=1):
        """Launch `kernel` on stretches of rows, a thread for `each` columns. -> self"""
        size, first, second = len(self.arrays) * width, 0, width
        if self.columns is None:
            self.parts = launcher.empty(inputs[0], STRETCHES, size)
        else:
            first, second = self.columns[0], self.columns[-1] - self.columns[0]
        launcher.launch(kernel, STRETCHES, min(256, -(-width // (32 * each)) * 32), *inputs, self.parts[:, first:], self.parts.shape[1], second,
                        rows, width, *more, -(-rows // STRETCHES))
        return self

    def finish(self):
        """The gradients, one for each array."""
        if self.columns is not None:
            return [ADDED] * len(self.arrays)
        outs = [launcher.empty_like(array) for array in self.arrays]
        add_up(self.parts, outs)
        return outs


def add_up(parts, outs, add=False):
    """The sums over the rows of parts (P, pitch), cut into `outs`, one or two arrays of the same size; add: to what they hold."""
    size = outs[0].size * len(outs)
    pitch = parts.strides[0] // parts.itemsize
    launcher.launch("sum_parts", -(-size // 32), 256, parts, outs[0], outs[-1], pitch, len(parts), size, outs[0].size, add, shared=4 * 256)


def summed_gradients(compute, *arrays):
    """Functions for a vjp, one for each array: compute(sums) makes the partial sums when one of them is first asked for."""
    @functools.cache
    def run():
        sums = Sums(*arrays)
        compute(sums)
        return sums.finish()
    return [lambda i=i: run()[i] for i in range(len(arrays))]
