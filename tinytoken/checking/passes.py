"""Forward and backward passes of the function that gradcheck checks, with what no op may do refused."""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..backend import Array, array_module, to_device, to_numpy
from ..errors import GradientError
from ..tensor import Op, Tensor, grad, no_grad, op
from .diagnosis import read_crash, read_refusal

SAME = 1e-10  # two calls agree to this share of the largest value: a threaded BLAS may add in another order


def refusal(mistake: str | None, text: str) -> GradientError:
    """A GradientError whose attribute `kind` is the mistake in a word."""
    error = GradientError(text)
    error.kind = mistake
    return error


def equal(a: Array, b: Array) -> bool:
    """Equal, NaNs too."""
    xp = array_module(a)
    return bool(xp.array_equal(a, b) or a.dtype.kind == "f" and xp.array_equal(a, b, equal_nan=True))


def same(a: Array, b: Array) -> bool:
    """Equal up to the rounding of sums in another order."""
    if equal(a, b):
        return True
    a, b = to_numpy(a), to_numpy(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=SAME * np.abs(np.nan_to_num(a)).max(),
                                              equal_nan=True)


def strided(array: Array) -> Array:
    """The same values in other places: axes reversed in memory, and a NaN after each number."""
    room = array_module(array).full((*array.shape[::-1], 2), np.nan, array.dtype)[..., 0].T
    room[...] = array
    return room


def by_columns(array: Array) -> Array:
    """A copy that lies as a transposed array does: the first index runs fastest."""
    return array.copy(order="F")


def by_rows(array: Array) -> Array:
    """A copy that lies as new arrays do."""
    return array.copy()


@op
def _root(*outputs, upstream):
    """The end of the graph: gives each output the upstream gradient to check with. Nobody reads its value."""
    return array_module(*outputs).zeros(()), lambda g: upstream


class Passes:
    """One function and its inputs. `wanted` are the tensors whose gradients are checked, `names` their names.

    `shapes` are those of the outputs, `upstream` random gradients of them. Whatever a pass does that no op
    may do is a GradientError.
    """

    def __init__(self, fn: Callable[..., Any], tensors: Sequence[Tensor | None], names: Sequence[str],
                 positions: Sequence[int], seed: int, rng: np.random.Generator):
        self.fn, self.seed, self.label = fn, seed, _label(fn)
        self.tensors, self.all_names = tensors, names
        self.wanted: list[Any] = [tensors[i] for i in positions]  # Tensors: what is None is not wanted
        self.names = [names[i] for i in positions]
        self.start: list[Any] = [None if t is None else t.data.copy() for t in tensors]
        outputs = self.forward()
        self.label, self.shapes = _label(fn, outputs), [o.shape for o in outputs]
        # Random, never ones: the sum of a softmax does not depend on its input, and the sum of tokens that
        # were moved does not depend on where they went.
        self.upstream = [to_device(np.asarray(rng.standard_normal(o.shape)), o.device) for o in outputs]

    def forward(self) -> list[Tensor]:
        """The outputs; refuses any that is no finite float64 Tensor, and a write into an input."""
        try:
            outputs = self.fn(*self.tensors)
        except GradientError as error:
            raise self.refused(error) from error
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        for i, o in enumerate(outputs):
            if not isinstance(o, Tensor):
                raise self.failure("type", f"output {i} is a {type(o).__name__}, expected a Tensor")
            if o.dtype != np.float64:
                raise self.failure("dtype", f"output {i} is {o.dtype}, expected float64 like the inputs: "
                                            "cast what it is made of (weights, masks, constants) "
                                            "with .astype('float64')")
            if not np.isfinite(to_numpy(o.data)).all():
                raise self.failure("not finite",
                                   f"output {i} {o.shape} has NaN or infinite values at this point")
        self.inputs_unchanged("the forward pass")
        return outputs

    def values(self) -> list[Array]:
        """The outputs' arrays at the present inputs; copies, since an output may be a view of an input."""
        with no_grad():
            outputs = self.fn(*self.tensors)
        return [o.data.copy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    def gradients(self, which: Sequence[int] | None = None, upstream: Sequence[Array] | None = None,
                  lay: Callable[[Array], Array] = by_rows) -> tuple[list[Array], Sequence[Array]]:
        """(the outputs' arrays, the gradients of the wanted tensors).

        which: the outputs that get an upstream gradient (None: all). upstream: per output (None: the random
        ones). lay: copies them to the places in memory where they are to lie.
        """
        outputs = self.forward()
        which = range(len(outputs)) if which is None else which
        values = [o.data.copy() for o in outputs]
        given = [(self.upstream if upstream is None else upstream)[i] for i in which]
        copies = tuple(map(lay, given))
        try:
            gradients = grad(_root(*(outputs[i] for i in which), upstream=copies), self.wanted)
        except GradientError as error:
            raise self.refused(error) from error
        except Exception as error:
            raise self.failure("raised", f"the backward pass{self.alone(which)} raised "
                                         f"{type(error).__name__}: {error}\n"
                                         f"  reading: {read_crash(error)}") from error
        self.inputs_unchanged("the backward pass")
        if not all(map(equal, copies, given)):
            raise self.failure("writes", "its vjp writes into the upstream gradient it is given, "
                                         "which others still need")
        if not all(equal(o.data, v) for o, v in zip(outputs, values)):
            raise self.failure("writes", "its vjp writes into the output of the forward pass")
        return values, gradients

    def inputs_unchanged(self, when: str) -> None:
        for name, t, start in zip(self.all_names, self.tensors, self.start):
            if t is not None and not equal(t.data, start):
                raise self.failure("writes", f"{when} writes into {name} {t.shape}: "
                                             "an op never writes into its inputs")

    def repeated(self, first: tuple | None = None) -> tuple[list[Array], Sequence[Array]]:
        """(values, gradients), after a comparison with those of another call; refuses a difference.

        first: those to compare with; None: of a call before this one.
        """
        (values, gradients), (again, gradients_again) = first or self.gradients(), self.gradients()
        when = "a later call gives" if first else "a second call gives"
        if not all(map(same, values, again)):
            raise self.failure("not deterministic", f"{when} another output. Noise must be an argument")
        if not all(map(same, gradients, gradients_again)):
            raise self.failure("not deterministic", f"{when} the same output and another gradient")
        return values, gradients

    @contextlib.contextmanager
    def laid(self, lay: Callable[[Array], Array]) -> Iterator[None]:
        """Context: the wanted tensors' arrays are copies made by `lay`."""
        arrays = [t.data for t in self.wanted]
        try:
            for t in self.wanted:
                t.data = lay(t.data)
            yield
        finally:
            for t, array in zip(self.wanted, arrays):
                t.data = array

    @contextlib.contextmanager
    def at(self, point: Sequence[Array]) -> Iterator[None]:
        """Context: the wanted tensors have these values."""
        before, start = [t.data.copy() for t in self.wanted], self.start
        values = {id(t): array for t, array in zip(self.wanted, point)}
        self.start = [values.get(id(t), old) for t, old in zip(self.tensors, start)]
        try:
            for t, array in zip(self.wanted, point):
                t.data[...] = array
            yield
        finally:
            self.start = start
            for t, array in zip(self.wanted, before):
                t.data[...] = array

    # Failing

    def failure(self, mistake: str | None, text: str) -> GradientError:
        return refusal(mistake, f"{self.label}: {text}\n  seed {self.seed}")

    def refused(self, error: GradientError) -> GradientError:
        """The engine's own GradientError, with a reading."""
        mistake, reading = read_refusal(str(error))
        return refusal(mistake, f"{error}\n  reading: {reading}\n  seed {self.seed}")

    def alone(self, which: Sequence[int]) -> str:
        return f" with only output {which[0]} used" if len(which) < len(self.shapes) else ""


def _label(fn, outputs=()):
    """The name of fn in messages: an op's or function's own; of a lambda around one op, that of the op."""
    fn = getattr(fn, "func", fn)  # of a functools.partial
    if isinstance(fn, Op):
        return fn.name
    name = getattr(fn, "__name__", type(fn).__name__)
    nodes = {o.node for o in outputs} - {None}
    if name != "<lambda>" or not nodes:
        return name
    last = ", ".join(sorted({node.op.name for node in nodes}))
    return f"a lambda that ends in {last}" if any(node.parents() for node in nodes) else last
