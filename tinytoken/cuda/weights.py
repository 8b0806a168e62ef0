"""The weights of a step: their copies in bf16, and the partial sums of their gradients."""
import contextlib
import threading

from ..backend import array_module, swapped
from . import gemm, launcher, sums
from .launcher import contiguous, cover


class Now(threading.local):
    """weights: the Weights of the step that this thread is in, or None."""
    weights = None


now = Now()


class Weights:
    """The parameters in flat storage: in bf16 one kernel rounds all weights of a step. Other weights, a
    teacher's say, are taken for constant and rounded once. Outside of a step each weight is rounded whenever
    it is wanted.

    Gradients that are sums over rows, of vectors, are added at the end of a step: `parts` has a column for
    each number of them."""

    def __init__(self, flat=None):
        self.flat, self.rounded, self.copies, self.others = flat, None, {}, {}
        self.columns, self.regions, self.filled, self.written = {}, [], set(), set()
        if flat is None:
            return
        self._lay_columns()
        if gemm.current_precision() == "bf16":
            self.rounded = launcher.empty(flat.data, flat.data.size, dtype="uint16")
            self.copies = dict(zip(map(id, flat.views), flat.cut(self.rounded)))

    def _lay_columns(self):
        """A region of columns for each segment's vectors, from the first to the last; what else lies between
        stays zero."""
        vectors = [(start, stop, id(view))
                   for view, (start, stop, shape, _) in zip(self.flat.views, self.flat.bounds)
                   if len(shape) == 1]
        width = 0
        for first, last, *_ in self.flat.segments:
            inside = [vector for vector in vectors if first <= vector[0] < last]
            if inside:
                begin, end = min(v[0] for v in inside), max(v[1] for v in inside)
                self.regions.append((width, begin, end))
                self.columns.update({key: width + start - begin for start, _, key in inside})
                width += -(-(end - begin) // 64) * 64
        self.parts = array_module(self.flat.data).zeros((sums.STRETCHES, width), "float32")

    @contextlib.contextmanager
    def in_use(self):
        """Context: round the weights as they are now, and use them; at its end add up the sums over rows."""
        if self.rounded is not None:
            launcher.launch("bf16_round", *cover(self.rounded.size // 2), self.flat.data, self.rounded,
                            self.rounded.size // 2)
        self.filled = set()
        with swapped(now, "weights", self):
            yield
            self._add_up()

    def columns_of(self, arrays):
        """Where the partial sums of these parameters' gradients go, or None: some have no column, or a sum is
        in it already."""
        keys = [id(array) for array in arrays]
        if not all(key in self.columns and key not in self.filled for key in keys):
            return None
        self.written.update(keys)
        return [self.columns[key] for key in keys]

    def left_for_the_end(self, array, place):
        """Whether the sum in a parameter's column is added at the step's end: it is, if the gradient is to be
        added to its place in flat storage. One that goes elsewhere, of a step within the step, is added up at
        once."""
        if not array_module(place).may_share_memory(place, self.flat.grad):
            return False
        self.filled.add(id(array))
        return True

    def _add_up(self):
        if not self.filled:
            return
        for view in self.flat.views:
            if id(view) in self.written - self.filled:  # in the pass before, or not for this gradient
                self.parts[:, self.columns[id(view)]:][:, :view.size] = 0
        self.written = set(self.filled)
        for column, begin, end in self.regions:
            sums.add_up(self.parts[:, column:], [self.flat.grad[begin:end]], add=True)


def rounded(array):
    """A parameter's array in bf16."""
    known = now.weights
    if known is None:
        return rounded_alone(array)
    if id(array) in known.copies:
        return known.copies[id(array)]
    if id(array) not in known.others:
        # the array is kept, so that no other gets its id
        known.others[id(array)] = array, rounded_alone(array)
    return known.others[id(array)][1]


def rounded_alone(array):
    array = contiguous(array)
    out = launcher.empty(array, *array.shape, dtype="uint16")
    # sizes are even, see mixed.covers_stream
    launcher.launch("bf16_round", *cover(array.size // 2), array, out, array.size // 2)
    return out
