"""Gradients of parameters: added where they belong while the weights of a step are in use (weights.py), else returned. A matrix's is a
product. A vector's is a sum over rows; in a step all partial sums lie in one array, and one kernel adds them up at its end."""
import functools

from ..tensor import ADDED
from . import gemm, launcher, sums, weights


def weight_gradient(weight, a, b):
    """A function for a vjp: a^T b, added to the gradient's place if it has one."""
    def run():
        place = weights.place_of(weight)
        gradient = gemm.product(a(), b, ta=True, out=place, add=place)
        return gradient if place is None else ADDED
    return run


class Sums:
    """The gradients of one parameter's array, or of two, as sums over rows: `run` makes the partial ones, `finish` adds them up, or
    leaves that to the step's end."""

    def __init__(self, *arrays):
        self.arrays, known = arrays, weights.now.weights
        self.columns = known.columns_of(arrays) if known else None
        self.parts = None if self.columns is None else known.parts

    def run(self, kernel, inputs, rows, width, *more):
        """Launch `kernel` on stretches of rows. -> self"""
        size, first, second = len(self.arrays) * width, 0, width
        if self.columns is None:
            self.parts = launcher.empty(inputs[0], sums.STRETCHES, size)
        else:
            first, second = self.columns[0], self.columns[-1] - self.columns[0]
        launcher.launch(kernel, len(self.parts), sums.THREADS, *inputs, self.parts[:, first:], self.parts.shape[1], second, rows, width,
                        *more, -(-rows // len(self.parts)), shared=8 * sums.THREADS)
        return self

    def finish(self):
        """The gradients, one for each array."""
        if self.columns is not None:
            return [ADDED] * len(self.arrays)
        outs = [launcher.empty_like(array) for array in self.arrays]
        sums.add_up(self.parts, outs)
        return outs


def summed_gradients(compute, *arrays):
    """Functions for a vjp, one for each array: compute(sums) makes the partial sums when one of them is first asked for."""
    @functools.cache
    def run():
        mine = Sums(*arrays)
        compute(mine)
        return mine.finish()
    return [lambda i=i: run()[i] for i in range(len(arrays))]
