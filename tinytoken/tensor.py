"""The engine, on which all that is differentiable is built: Tensor, @op, backward() and grad().

An op is one function on raw arrays that returns its output and its vector-Jacobian product (vjp):

    @op
    def multiply(a, b):
        def vjp(g):
            return lambda: g * b, lambda: g * a
        return a * b, vjp

Calling it with Tensors runs it on their arrays and, if an input needs a gradient, records one Node. The graph
of nodes is the tape; graph.py holds it, and the way back through it.
"""
import contextlib
import functools
import inspect
import re
import reprlib
import threading
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .backend import (FLOATS, Array, array_module, device_of, faster, implementation, is_array, native_array,
                      swapped, to_numpy, using_implementations)
from .errors import GradientError, InputError, expect
from .graph import Node, backward


class _Mode(threading.local):
    recording, around, samples = True, None, 16


_mode = _Mode()
registry: dict = {}  # (module, name) -> Op; a later definition replaces an earlier one


def no_grad() -> contextlib.AbstractContextManager:
    """Context (or decorator): ops record nothing. Holds for the thread that enters it."""
    return swapped(_mode, "recording", False)


def recording() -> bool:
    """Whether ops record here and now: not under no_grad()."""
    return _mode.recording


def checked(samples: int = 1 << 62) -> contextlib.AbstractContextManager:
    """Context (or decorator): of each array that the ops of this thread hold for backward(), `samples`
    elements are compared, and GraphError is raised if one was changed in place meanwhile.

    Without this it is 16, which finds what changes a whole array (`x += 1`, an optimiser's step) and costs a
    ViT's step 1 or 2 %. All elements, as here, make it three times as long. 0: none are compared, which is
    how train.loss_and_grads runs, where nothing comes between the passes."""
    return swapped(_mode, "samples", samples)


def plain() -> contextlib.AbstractContextManager:
    """Context (or decorator): this thread, and those that share its work (threads.share_out), run the plain
    definitions, whatever faster ones are registered."""
    return using_implementations("plain")


def around(wrapper: Callable) -> contextlib.AbstractContextManager:
    """Context: this thread computes an op's parts by wrapper(op, way, shapes, run), which returns run().

    way: "forward", the op's function; "backward", its vjp and the entries that are wanted; "add", inside of
    that, one of the gradients added to those that arrived before. shapes: of the op's array arguments."""
    return swapped(_mode, "around", wrapper)


def observe(observer: Callable) -> contextlib.AbstractContextManager:
    """Context: observer(op, shapes of the array arguments) is called after each op that this thread runs."""
    def observed(op, way, shapes, run):
        result = run()
        if way == "forward":
            observer(op, shapes)
        return result
    return around(observed)


class Tensor:
    """An array, its gradient, and the node that made it.

    array: NumPy or CuPy array, number or nested list (by numpy.asarray's rules); floats are float32 or
        float64. Copied only to change the byte order (backend.native_array).
    requires_grad: collect .grad for it in backward().

    .data and .grad are raw arrays; .grad is None before the first backward.
    """
    __slots__ = ("data", "grad", "requires_grad", "node", "place", "__weakref__")

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        if isinstance(array, Tensor):
            array = array.data
        array = native_array(array if is_array(array) else _as_array("Tensor", array))
        letter = array.dtype.kind
        expect(letter in "biu" or array.dtype.name in FLOATS, "Tensor",
               f"dtype {array.dtype}, expected float32, float64, int or bool")
        expect(letter == "f" or not requires_grad, "Tensor",
               f"requires_grad with dtype {array.dtype}, expected float32 or float64")
        self.data: Any = array
        self.grad: Any = None
        self.requires_grad = bool(requires_grad)
        self.node, self.place = None, 0  # the node that made it, and which of its outputs it is

    if TYPE_CHECKING:  # what ops/__init__.py attaches
        def _binary(self, other: Any) -> "Tensor": ...
        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _binary
        __matmul__ = __rmatmul__ = __pow__ = __getitem__ = _binary
        def __neg__(self) -> "Tensor": ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        mean = max = sum
        def reshape(self, *shape: Any) -> "Tensor": ...
        transpose = swapaxes = reshape
        __array_ufunc__: Any
        __array_function__: Any

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: device_of(self.data))

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        """Its rows, each in the graph: `q, k, v = t`."""
        expect(self.ndim, "Tensor", "a 0-d tensor has no rows to go through; .item() is its value")
        return (self[i] for i in range(len(self)))

    __contains__: Any = None  # `x in t` would compare objects, not values

    def __repr__(self):
        origin = f", made by {self.node.op.name}" if self.node else ", requires_grad" * self.requires_grad
        return f"Tensor({self.data}, shape {self.shape}, {self.dtype}{origin})"

    def detach(self) -> "Tensor":
        """The same array, cut from the graph."""
        return Tensor(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array (a copy only if they are on a GPU)."""
        return to_numpy(self.data)

    def item(self) -> float | int | bool:
        """The one value as a Python number (waits for the GPU). InputError unless there is one."""
        expect(self.size == 1, "Tensor", lambda: f"shape {self.shape}, expected one value for item(), "
               "float(), int() or bool()")
        return self.data.item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        return bool(self.item())

    def __format__(self, spec):
        """f"{loss:.3f}": the one value. Without a format it is the text of `repr`."""
        return format(self.item(), spec) if spec else repr(self)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def backward(self, gradient: Any = None) -> None:
        """Add d(self)/d(leaf) to .grad of every leaf that requires it, and free the graph. `gradient` is the
        upstream gradient, an array of this tensor's shape; it may be left out for a tensor of one element."""
        backward(_key(self), _upstream(self, gradient), None, _add_to_leaf, _mode.around)


def grad(loss: Tensor, wrt: Sequence[Tensor] | Tensor, into: Any = None, *, gradient: Any = None,
         add: bool = False) -> Any:
    """The gradients of `loss` with respect to the tensors in `wrt`, as a list of arrays; nothing else is
    touched (.grad stays as it is, but the graph is freed). A tensor that the loss does not depend on gets
    zeros. A bare Tensor as `wrt` gets its bare array (and `into` is one).

    into: arrays to fill instead of making new ones (add=True adds to what they hold). gradient: as in
    Tensor.backward.
    """
    if isinstance(wrt, Tensor):
        return grad(loss, [wrt], None if into is None else [into], gradient=gradient, add=add)[0]
    expect(isinstance(wrt, Iterable), "grad", lambda: f"`wrt` is a {type(wrt).__name__}, expected Tensors")
    wrt = list(wrt)
    for one in (loss, *wrt):
        expect(isinstance(one, Tensor), "grad", lambda: f"a {type(one).__name__}, expected a Tensor")
    expect(into is None or isinstance(into, Collection), "grad",
           lambda: f"`into` is a {type(into).__name__}, expected a list of arrays")
    expect(into is None or len(into) == len(wrt), "grad",
           lambda: f"{len(into)} arrays in `into` for {len(wrt)} tensors in `wrt`")
    for t, array in zip(wrt, () if into is None else into):
        expect(is_array(array) and array.shape == t.shape and array.dtype.kind == "f", "grad",
               lambda: f"an array in `into` is {getattr(array, 'shape', type(array).__name__)} "
                       f"{getattr(array, 'dtype', '')}, expected {t.shape} {t.dtype}")
    expect(all(t.requires_grad for t in wrt), "grad", "a tensor in `wrt` does not require a gradient")
    expect(len({id(t) for t in wrt}) == len(wrt), "grad", "a tensor in `wrt` is given twice")
    if into is None:
        into, add = [array_module(t.data).zeros_like(t.data) for t in wrt], True
    if not add:
        for array in into:
            array[...] = 0
    place = {_key(t): array for t, array in zip(wrt, into)}

    def add_to_place(key, g):
        place[key] += g

    if loss.requires_grad:
        backward(_key(loss), _upstream(loss, gradient), place, add_to_place, _mode.around)
    return into


# Ops

class Index(np.ndarray):
    """Annotation of an array argument of an op: integer arrays (indices, labels) are passed as they are, not
    cast to the float dtype. Never made."""


class Shapes(list):
    """The shapes of an op's array arguments, and the settings, on which its multiply-adds depend too."""

    def __init__(self, arrays, settings):
        super().__init__(_shapes(arrays))
        self.settings = settings


WITH_DTYPE = (np.generic, np.ndarray, Tensor)


class Op:
    """A registered operation. Made by @op; called like the function it wraps."""

    def __init__(self, function):
        self.function = function
        self.name, self.module, self.__doc__ = function.__name__, function.__module__, function.__doc__
        self.__wrapped__ = function  # so that inspect and help show the function's own signature
        self.shapes_to_macs, self.counts_settings = None, False
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.arrays = [p.name for p in positional]
        self.variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        self.settings = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        self.index = {i for i, p in enumerate(positional) if _says_index(p.annotation, function)}
        registry[self.module, self.name] = self

    def implementation(self, module: str = "cupy", covers: Callable = lambda *_, **__: True) -> Callable:
        """See backend.implementation."""
        return implementation(self, module, covers)

    def macs(self, shapes_to_macs: Callable) -> Callable:
        """Decorator: declares the op's multiply-adds, as a function of the shapes of its array arguments, and
        of the op's settings if it has arguments after *."""
        self.shapes_to_macs = shapes_to_macs
        self.counts_settings = getattr(shapes_to_macs, "__kwdefaults__", None) is not None
        return shapes_to_macs

    def multiply_adds(self, shapes: Sequence[Any]) -> int:
        """Those of one run, from what `around` and a Node know of its shapes; 0 if none are declared."""
        return self.shapes_to_macs(*shapes, **getattr(shapes, "settings", {})) if self.shapes_to_macs else 0

    def __repr__(self):
        return f"<op {self.module}.{self.name}>"

    def __call__(self, *args, **settings):
        if not settings.keys() <= self.settings or len(args) != len(self.arrays) and not self.variadic:
            args, settings = self._bind(args, settings)
        for name, value in settings.items():
            if isinstance(value, WITH_DTYPE):
                settings[name] = self._setting(name, value)
        arrays, dtype, record, uniform = [], None, False, True
        for a in args:
            if isinstance(a, Tensor):
                record = record or a.requires_grad
                a = a.data
                dtype = dtype or a.dtype
                uniform = uniform and a.dtype is dtype
            else:
                uniform = uniform and a is None
            arrays.append(a)
        xp = array_module(*arrays)
        # the usual call has tensors of one dtype and nothing to convert
        if not uniform or dtype is None or dtype.kind != "f":
            dtype = self._float_dtype(args)
            arrays = [self._raw(i, a, dtype, xp) for i, a in enumerate(arrays)]
            if not any(map(is_array, arrays)):
                arrays = [a if a is None else xp.asarray(a, dtype) for a in arrays]
        shapes = Shapes(arrays, settings) if self.counts_settings else None
        try:
            run = faster(self, xp, *arrays, **settings) or self.function
            out, vjp = run(*arrays, **settings) if _mode.around is None else _mode.around(
                self, "forward", shapes or _shapes(arrays), functools.partial(run, *arrays, **settings))
        except UNFORESEEN as error:
            refuse(self.name, arrays, settings, error)
        several = isinstance(out, tuple)
        outputs = out if several else (out,)
        record = record and vjp is not None and _mode.recording
        node = self._node(args, shapes or _shapes(arrays), outputs, vjp) if record else None
        wrapped = [self._wrap(o, dtype, node, i) for i, o in enumerate(outputs)]
        return tuple(wrapped) if several else wrapped[0]

    def _bind(self, args, settings):
        """Arrays in the signature's order, and settings, from a call that names or leaves out some."""
        try:
            bound = self.signature.bind(*args, **settings)
        except TypeError as error:
            raise InputError(f"{self.name}: {error}; it takes {self.signature}") from None
        bound.apply_defaults()
        given = bound.arguments
        arrays = args if self.variadic else tuple(given[name] for name in self.arrays)
        return arrays, {name: given[name] for name in self.settings}

    def _setting(self, name, value):
        """A setting that is not a Python value: a NumPy scalar or 0-d array, whose dtype would spread, as its
        number."""
        if isinstance(value, Tensor):
            expect(not value.requires_grad, self.name, lambda: f"{name} is a setting and gets no gradient: "
                   "give a number, or a Tensor's .data")
            value = value.data
        return value.item() if isinstance(value, (np.generic, np.ndarray)) and not value.ndim else value

    def _float_dtype(self, args):
        """The op's float dtype: its tensors', which must agree; without tensors the widest of its arrays."""
        tensors = {a.dtype for a in args if isinstance(a, Tensor) and a.dtype.kind == "f"}
        if len(tensors) > 1:
            names = [f"input {i}" for i in range(len(args))] if self.variadic else self.arrays
            given = ", ".join(f"{n} {a.dtype}" for n, a in zip(names, args) if isinstance(a, Tensor))
            raise InputError(f"{self.name}: tensors of one float dtype expected, given {given}: "
                             f"cast one of them")
        arrays = {a.dtype for a in args if is_array(a) and a.dtype.kind == "f"}
        dtype = tensors.pop() if tensors else np.result_type(*arrays) if arrays else np.dtype("float32")
        expect(dtype.name in FLOATS, self.name, lambda: f"dtype {dtype}, expected float32 or float64")
        return dtype

    def _raw(self, i, a, dtype, xp):
        """One argument as the function gets it: float, bool and int arrays and lists as `dtype`; index
        arrays, numbers, None unchanged."""
        if isinstance(a, (list, tuple)) and not self.variadic:
            a = xp.asarray(_as_array(self.name, a, "int64" if i in self.index else dtype))
        if isinstance(a, np.generic) or isinstance(a, int) and i in self.index:
            a = xp.asarray(a)  # of a NumPy scalar the dtype would else spread
        if not is_array(a):
            expect(a is None or isinstance(a, (int, float)), self.name,
                   lambda: f"argument {i} is a {type(a).__name__}, expected a Tensor, an array or a number")
            return a
        expect(array_module(a) is xp, self.name,
               "arguments on the CPU and on the GPU in one op: move one (backend.to_device)")
        a = native_array(a)
        if a.dtype == dtype or a.dtype.kind in "iu" and i in self.index:
            return a
        expect(a.dtype.kind in "fbiu" or np.can_cast(a.dtype, dtype, "same_kind"), self.name,
               lambda: f"argument {i} has dtype {a.dtype}, expected float, int or bool")
        return a.astype(dtype)

    def _node(self, args, shapes, outputs, vjp):
        edges = [(_key(a), a.data.shape, a.data.dtype) if isinstance(a, Tensor) and a.requires_grad else None
                 for a in args]
        return Node(self, edges, shapes, [o.shape for o in outputs], vjp, _mode.samples)

    def _wrap(self, array, dtype, node, place):
        if not is_array(array):  # a reduction of everything gives a NumPy scalar
            array = np.asarray(array)
        if array.dtype != dtype and array.dtype.kind == "f":
            raise GradientError(f"{self.name}: {array.dtype} output for {dtype} inputs: is one of its "
                                f"constants a NumPy scalar?")
        out = Tensor.__new__(Tensor)
        out.data, out.grad = array, None
        out.requires_grad, out.node, out.place = node is not None, node, place
        return out


# What Python and NumPy raise for arguments that no check of an op foresaw
UNFORESEEN = (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError, OverflowError)


def refuse(where: str, arrays: Iterable[Any], settings: dict[str, Any], error: Exception) -> NoReturn:
    """Raise one of UNFORESEEN as an InputError that says what was given."""
    if isinstance(error, InputError):
        raise error
    given = ", ".join([str(a.shape) if is_array(a) else reprlib.repr(a) for a in arrays])
    options = ", ".join([f"{name}={reprlib.repr(value)}" for name, value in settings.items()])
    raise InputError(f"{where}: {given}: {error}" + f" ({options})" * bool(options)) from error


def _says_index(annotation, function):
    """Whether an argument is annotated Index, or Index | None. Under `from __future__ import annotations` an
    annotation is its text."""
    if not isinstance(annotation, str):
        return Index in (annotation, *typing.get_args(annotation))
    words = re.findall(r"\w+", annotation)
    return "Index" in words or any(function.__globals__.get(word) is Index for word in words)


def _as_array(where, values, empty=None):
    """A number or nested list as a NumPy array; with no values in it, as one of dtype `empty`. Tensors of a
    graph in a list are refused, since it would end here."""
    inside = [values]
    while inside:
        part = inside.pop()
        expect(not (isinstance(part, Tensor) and part.requires_grad and _mode.recording), where,
               "a list of Tensors would cut their graph", "ops.concat(*tensors), or their .data")
        if isinstance(part, (list, tuple)):
            inside += [one for one in part if isinstance(one, (list, tuple, Tensor))]
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise InputError(f"{where}: {error}") from error
    return array if array.size else array.astype(empty or array.dtype)


def tensor_like(x: Tensor, values: Any) -> Tensor:
    """An array or nested list as a Tensor of x's dtype, on its device; a Tensor as it is."""
    if isinstance(values, Tensor):
        return values
    array = values if is_array(values) else _as_array("Tensor", values)
    return Tensor(array_module(x.data).asarray(array, x.dtype))


def op(function: Callable) -> Op:
    """Make an op of a function on raw arrays that returns (output or outputs, vjp).

    Parameters before `*` (and `*args`) are arrays; those after it are settings. vjp takes one upstream
    gradient per output (None for an output that nothing used) and returns one entry per array argument, bare
    if there is one: an array, None, or a function without arguments that is called only if that input needs
    its gradient. Broadcasting is undone here. An op never writes into its inputs or into the gradient it is
    given, and draws no random numbers.
    """
    return Op(function)


def fused(function: Callable) -> Callable:
    """Mark a function or method that is made of ops, or of the array module's functions, which an array
    module may implement as one (backend.implementation). Where none does, its parts run and are recorded. The
    first Tensor or array among its arguments says whose implementation is asked for."""
    @functools.wraps(function)
    def run(*args, **settings):
        arrays = (a.data if isinstance(a, Tensor) else a for a in (*args, *settings.values()))
        first = next(filter(is_array, arrays), None)
        return (faster(run, array_module(first), *args, **settings) or function)(*args, **settings)
    return run


# The way back: graph.py

def _key(tensor):
    return (tensor.node, tensor.place) if tensor.node else tensor


def _shapes(arrays):
    return [getattr(a, "shape", None) for a in arrays]


def _upstream(root, gradient):
    expect(root.requires_grad, "backward", "this tensor does not depend on anything that requires a gradient")
    if gradient is None:
        expect(root.size == 1, "backward",
               lambda: f"a tensor of shape {root.shape} needs an upstream gradient; "
                       f"only a scalar does without")
        return array_module(root.data).ones_like(root.data)
    gradient = gradient.data if isinstance(gradient, Tensor) else gradient
    gradient = native_array(gradient) if is_array(gradient) else gradient
    expect(is_array(gradient) and gradient.shape == root.shape and gradient.dtype == root.dtype, "backward",
           lambda: f"upstream gradient {getattr(gradient, 'shape', gradient)} "
                   f"{getattr(gradient, 'dtype', '')} for a tensor {root.shape} {root.dtype}")
    return gradient


def _add_to_leaf(leaf, g):
    if leaf.grad is None:
        leaf.grad = array_module(g).array(g)  # a copy: g may belong to somebody else
    else:
        leaf.grad += g
