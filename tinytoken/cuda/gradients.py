"""Gradients of parameters, as entries of a vjp: added to the array where they belong, or returned. A matrix's
is a product. A vector's is a sum over rows: in a captured step all partial sums lie in one array, and one
kernel adds them up at its end (weights.py)."""
import functools

from ..graph import Into
from . import gemm, launcher, sums, weights


def weight_gradient(a, b):
    """The entry of a matrix: a()^T b."""
    def run(place):
        if place is None or not place.flags.c_contiguous or place.dtype != "float32":
            return added(gemm.product(a(), b, ta=True), place)
        gemm.product(a(), b, ta=True, out=place, add=place)
        return None
    return Into(run)


def added(gradient, place):
    """The gradient; None where it has a place, to which it is added."""
    if place is None:
        return gradient
    place += gradient
    return None


class Sums:
    """The gradients of one parameter's array, or of two, as sums over rows: `run` makes the partial ones,
    `give` adds them up, or leaves that to the step's end."""

    def __init__(self, *arrays):
        self.arrays, self.step = arrays, weights.now.weights
        self.columns = self.step.columns_of(arrays) if self.step else None
        self.parts = None if self.columns is None else self.step.parts

    def run(self, kernel, inputs, rows, width, *more):
        """Launch `kernel` on stretches of rows. -> self"""
        size, first, second = len(self.arrays) * width, 0, width
        if self.columns is None:
            self.parts = launcher.empty(inputs[0], sums.STRETCHES, size)
        else:
            first, second = self.columns[0], self.columns[-1] - self.columns[0]
        launcher.launch(kernel, len(self.parts), sums.THREADS, *inputs, self.parts[:, first:],
                        self.parts.shape[1], second, rows, width,
                        *more, -(-rows // len(self.parts)), shared=8 * sums.THREADS)
        return self

    @functools.cached_property
    def totals(self):
        """The gradients, one for each array."""
        outs = [launcher.empty_like(array) for array in self.arrays]
        if self.columns is None:
            sums.add_up(self.parts, outs)
        for column, out in zip(self.columns or (), outs):
            sums.add_up(self.parts[:, column:], [out])
        return outs

    def give(self, i, place):
        """The gradient of the i-th array: added to its place, at the step's end at the latest, or
        returned."""
        in_columns = self.columns is not None and place is not None
        if in_columns and self.step.left_for_the_end(self.arrays[i], place):
            return None
        return added(self.totals[i], place)


def summed_gradients(compute, *arrays):
    """Entries of a vjp, one for each array: compute(sums) -> sums makes the partial sums, when one of them is
    first asked for."""
    sums_of_both = functools.cache(lambda: compute(Sums(*arrays)))
    return [Into(lambda place, i=i: sums_of_both().give(i, place)) for i in range(len(arrays))]
