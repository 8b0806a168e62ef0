"""The weights of a step: where their gradients are added, and their copies in bf16."""
import contextlib
import functools
import threading

from ..tensor import ADDED
from . import gemm, launcher
from .launcher import contiguous, cover
from .sums import sum_parts

_now = threading.local()  # .weights: the Weights in use


class Weights:
    """The parameters in flat storage: kernels add gradients where they belong, and in bf16 one kernel rounds all weights of a step.
    Other weights, a teacher's say, are taken for constant and rounded once. Without this in use gradients are returned, and each weight is
    rounded whenever it is wanted."""

    def __init__(self, flat=None):
        self.flat, self.rounded, self.copies, self.others = flat, None, {}, {}
        self.places = {} if flat is None else dict(zip(map(id, flat.views), flat.grads))
        if flat is not None and gemm.current_precision() == "bf16":
            self.rounded = launcher.empty(flat.data, flat.data.size, dtype="uint16")
            self.copies = dict(zip(map(id, flat.views), flat.cut(self.rounded)))

    @contextlib.contextmanager
    def in_use(self):
        """Context: round the weights as they are now, and use them."""
        if self.rounded is not None:
            launcher.launch("bf16_round", *cover(self.rounded.size // 2), self.flat.data, self.rounded, self.rounded.size // 2)
        before, _now.weights = getattr(_now, "weights", None), self
        try:
            yield
        finally:
            _now.weights = before


def rounded(array):
    """A parameter's array in bf16."""
    known = getattr(_now, "weights", None)
    if known is None:
        return rounded_alone(array)
    if id(array) in known.copies:
        return known.copies[id(array)]
    if id(array) not in known.others:
        known.others[id(array)] = array, rounded_alone(array)  # with the array, lest its id should become another's
    return known.others[id(array)][1]


def rounded_alone(array):
    array = contiguous(array)
    out = launcher.empty(array, *array.shape, dtype="uint16")
    launcher.launch("bf16_round", *cover(array.size // 2), array, out, array.size // 2)  # sizes are even, see `residual`
    return out


def place_of(array):
    """Where the gradient of a parameter's array is added to, or None: it is to be returned."""
    known = getattr(_now, "weights", None)
    return known.places.get(id(array)) if known else None


def weight_gradient(weight, a, b):
    """A function for a vjp: a^T b, added to the gradient's place if it has one."""
    def run():
        place = place_of(weight)
        gradient = gemm.product(a(), b, ta=True, out=place, add=place)
        return gradient if place is None else ADDED
    return run


def summed_gradients(parts, *arrays):
    """Functions for a vjp: the sums of parts(), (P, size), are the gradients of one parameter's array, or of two."""
    @functools.cache
    def run():
        places = [place_of(array) for array in arrays]
        placed = all(place is not None for place in places)
        outs = places if placed else [launcher.empty_like(array) for array in arrays]
        sum_parts(parts(), *outs, add=placed)
        return [ADDED] * len(outs) if placed else outs
    return [lambda i=i: run()[i] for i in range(len(arrays))]
