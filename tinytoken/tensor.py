"""The engine, on which all that is differentiable is built: Tensor, @op, the graph, backward() and grad().

An op is one function on raw arrays that returns its output and its vector-Jacobian product (vjp):

    @op
    def multiply(a, b):
        def vjp(g):
            return lambda: g * b, lambda: g * a
        return a * b, vjp

Calling it with Tensors runs it on their arrays and, if an input needs a gradient, records one Node. The graph
of nodes is the tape: a Node knows the nodes it came from and nothing knows the Node but its outputs, so there
is no global list and no reference cycle. Backward sorts the nodes, runs each vjp once with everything that
arrived, and frees the node.
"""
import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import (FLOATS, Array, array_module, device_of, faster, implementation, is_array, native_array,
                      swapped, to_numpy, unbroadcast, using_implementations)
from .errors import GradientError, GraphError, InputError, expect


class _Mode(threading.local):
    recording, around = True, None


_mode = _Mode()
registry: dict = {}  # (module, name) -> Op; a later definition replaces an earlier one


def no_grad() -> contextlib.AbstractContextManager:
    """Context (or decorator): ops record nothing. Holds for the thread that enters it."""
    return swapped(_mode, "recording", False)


def recording() -> bool:
    """Whether ops record here and now: not under no_grad()."""
    return _mode.recording


def plain() -> contextlib.AbstractContextManager:
    """Context (or decorator): this thread runs the plain definitions, whatever faster ones are registered."""
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
    __array_ufunc__ = None  # array * Tensor comes to Tensor.__rmul__

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        if isinstance(array, Tensor):
            array = array.data
        array = native_array(array)
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

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: device_of(self.data))

    def __len__(self):
        return len(self.data)

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
        """The one value as a Python number (waits for the GPU)."""
        return self.data.item()

    def __float__(self):
        return float(self.data)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def backward(self, gradient: Any = None) -> None:
        """Add d(self)/d(leaf) to .grad of every leaf that requires it, and free the graph. `gradient` is the
        upstream gradient, an array of this tensor's shape; it may be left out for a tensor of one element."""
        _backward(self, gradient, None, _add_to_leaf)


def grad(loss: Tensor, wrt: Sequence[Tensor], into: Any = None, *, gradient: Any = None,
         add: bool = False) -> Sequence[Array]:
    """The gradients of `loss` with respect to the tensors in `wrt`, as a list of arrays; nothing else is
    touched (.grad stays as it is, but the graph is freed). A tensor that the loss does not depend on gets
    zeros.

    into: arrays to fill instead of making new ones (add=True adds to what they hold). gradient: as in
    Tensor.backward.
    """
    expect(into is None or len(into) == len(wrt), "grad",
           lambda: f"{len(into)} arrays in `into` for {len(wrt)} tensors in `wrt`")
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
        _backward(loss, gradient, place, add_to_place)
    return into


# Ops

class Index(np.ndarray):
    """Annotation of an array argument of an op: integer arrays (indices, labels) are passed as they are, not
    cast to the float dtype. Never made."""


class Op:
    """A registered operation. Made by @op; called like the function it wraps."""

    def __init__(self, function):
        self.function = function
        self.name, self.module, self.__doc__ = function.__name__, function.__module__, function.__doc__
        self.__wrapped__ = function  # so that inspect and help show the function's own signature
        self.shapes_to_macs = None
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.arrays = [p.name for p in positional]
        self.variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        self.settings = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        self.index = {i for i, p in enumerate(positional) if p.annotation is Index}
        registry[self.module, self.name] = self

    def implementation(self, module: str = "cupy", covers: Callable = lambda *_, **__: True) -> Callable:
        """See backend.implementation."""
        return implementation(self, module, covers)

    def macs(self, shapes_to_macs: Callable) -> Callable:
        """Decorator: declares the op's multiply-adds, as a function of the shapes of its array arguments."""
        self.shapes_to_macs = shapes_to_macs
        return shapes_to_macs

    def __repr__(self):
        return f"<op {self.module}.{self.name}>"

    def __call__(self, *args, **settings):
        if not settings.keys() <= self.settings or len(args) != len(self.arrays) and not self.variadic:
            args, settings = self._bind(args, settings)
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
        try:
            run = faster(self, xp, *arrays, **settings) or self.function
            out, vjp = run(*arrays, **settings) if _mode.around is None else _mode.around(
                self, "forward", _shapes(arrays), functools.partial(run, *arrays, **settings))
        except (ValueError, IndexError) as error:  # what no check of the op foresaw, in its form
            if isinstance(error, InputError):
                raise
            shapes = ", ".join(str(a.shape) for a in arrays if is_array(a))
            raise InputError(f"{self.name}: {shapes}: {error}") from error
        several = isinstance(out, tuple)
        outputs = out if several else (out,)
        record = record and vjp is not None and _mode.recording
        node = Node(self, args, arrays, outputs, vjp) if record else None
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
        """One argument as the function gets it: arrays as `dtype`; index arrays, numbers, None unchanged."""
        a = xp.asarray(a) if isinstance(a, np.generic) else a  # whose dtype would else spread
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


# The graph

class Node:
    """One run of an op. `edges` holds, per array argument, None or (key, shape, dtype). A key is what a
    gradient is addressed to: (node, place) for output `place` of a node, the leaf Tensor itself otherwise.
    Intermediate Tensors are not held: their arrays live as long as a vjp needs them."""
    __slots__ = ("op", "edges", "vjp", "shapes", "outputs", "number")
    numbers = itertools.count()  # a node is made after those that it came from, so has a larger one

    def __init__(self, op, args, arrays, outputs, vjp):
        self.op, self.vjp, self.number = op, vjp, next(self.numbers)
        self.edges = [(_key(a), a.data.shape, a.data.dtype) if isinstance(a, Tensor) and a.requires_grad
                      else None for a in args]
        self.shapes = _shapes(arrays)
        self.outputs = [o.shape for o in outputs]

    def parents(self) -> list["Node"]:
        """The nodes that made its inputs."""
        return [edge[0][0] for edge in self.edges if edge and isinstance(edge[0], tuple)]


def _shapes(arrays):
    return [getattr(a, "shape", None) for a in arrays]


def _key(tensor):
    return (tensor.node, tensor.place) if tensor.node else tensor


def topological_order(root: "Node") -> list["Node"]:
    """The nodes under `root`, each after all that it depends on. Iterative: a graph may be very deep."""
    found, stack = {root}, [root]
    while stack:
        new = [parent for parent in stack.pop().parents() if parent not in found]
        found.update(new)
        stack += new
    return sorted(found, key=lambda node: node.number)


def _add_to_leaf(leaf, g):
    if leaf.grad is None:
        leaf.grad = array_module(g).array(g)  # a copy: g may belong to somebody else
    else:
        leaf.grad += g


def _backward(root, gradient, wanted, deliver):
    """Run the graph backward from `root`, and deliver(key, gradient) whatever arrives at a wanted key (None:
    at every leaf). Nodes that lead to none of them are not run. wanted: {key: the array that its gradient is
    added to}, or None."""
    gradient = _upstream(root, gradient)
    order = topological_order(root.node) if root.node else []
    if any(node.vjp is None for node in order):
        raise GraphError("backward: this graph is already freed: backward() or grad() ran through it before. "
                         "Run the forward pass again.")
    is_wanted = _is_leaf if wanted is None else wanted.__contains__
    place_of = lambda key: wanted.get(key) if wanted and _is_leaf(key) else None
    live, arrived = _live_edges(order, is_wanted), {}
    run_node = functools.partial(_run_node_in, _mode.around) if _mode.around else _run_node

    def arrive(key, g):
        if is_wanted(key):
            deliver(key, g)
        if isinstance(key, tuple):
            _accumulate(arrived, key, g)

    arrive(_key(root), gradient)
    while order:
        node = order.pop()
        upstream = [arrived.pop((node, place), (None,))[0] for place in range(len(node.outputs))]
        if node in live and any(g is not None for g in upstream):
            run_node(node, live[node], upstream, arrive, place_of)


_is_leaf = lambda key: isinstance(key, Tensor)


def _live_edges(order, is_wanted):
    """{node: its edges, None for those that lead to no wanted key} of nodes that lead to one, in `order`."""
    live = {}
    for node in order:
        leads = lambda key: is_wanted(key) or isinstance(key, tuple) and key[0] in live
        edges = [edge if edge and leads(edge[0]) else None for edge in node.edges]
        if any(edges):
            live[node] = edges
    return live


def _upstream(root, gradient):
    expect(root.requires_grad, "backward", "this tensor does not depend on anything that requires a gradient")
    if gradient is None:
        expect(root.size == 1, "backward",
               lambda: f"a tensor of shape {root.shape} needs an upstream gradient; "
                       f"only a scalar does without")
        return array_module(root.data).ones_like(root.data)
    gradient = gradient.data if isinstance(gradient, Tensor) else gradient
    expect(is_array(gradient) and gradient.shape == root.shape and gradient.dtype == root.dtype, "backward",
           lambda: f"upstream gradient {getattr(gradient, 'shape', gradient)} "
                   f"{getattr(gradient, 'dtype', '')} for a tensor {root.shape} {root.dtype}")
    return native_array(gradient)


class Into:
    """An entry of a vjp that can add its gradient to an array itself: run(array) adds to it and returns
    nothing, run(None) returns the gradient. The engine gives it the array of `grad(..., into=)` where a
    leaf's gradient belongs."""

    def __init__(self, run):
        self.run = run


def _run_node(node, edges, upstream, arrive, place_of):
    """Free a node, run its vjp, and send on the gradients along `edges`. What only the vjp held goes when
    this returns. place_of(key): the array that a leaf's gradient is to be added to, or None."""
    vjp = node.vjp
    node.vjp, node.edges = None, ()
    entries = vjp(*upstream)
    entries = entries if isinstance(entries, tuple) else (entries,)
    if len(entries) != len(edges):
        raise GradientError(f"{node.op.name}: its vjp returned {len(entries)} entries for {len(edges)} array "
                            f"arguments")
    for i, (edge, g) in enumerate(zip(edges, entries)):
        if not edge or g is None:
            continue
        if isinstance(g, Into):
            place = place_of(edge[0])
            g = g.run(place)
            if place is not None:
                continue
        elif callable(g):
            g = g()
        arrive(edge[0], _checked(node.op, i, g, edge))


def _run_node_in(wrapper, node, edges, upstream, arrive, place_of):
    """_run_node through the wrapper of `around`."""
    add = lambda key, g: wrapper(node.op, "add", node.shapes, functools.partial(arrive, key, g))
    run = functools.partial(_run_node, node, edges, upstream, add, place_of)
    wrapper(node.op, "backward", node.shapes, run)


def _accumulate(arrived, key, g):
    """The first gradient is held by reference, the second makes an array, and only to that one is added."""
    held, ours = arrived.get(key, (None, False))
    if held is None:
        arrived[key] = (g, False)
        return
    if ours:
        # not in place where held is a NumPy scalar, as the sum of 0-d arrays is: so it is stored again
        held += g
    else:
        held = held + g
    arrived[key] = (held, True)


def _checked(op, i, g, edge):
    """The gradient with broadcasting undone; GradientError if its shape or dtype cannot be the input's."""
    _, shape, dtype = edge
    if is_array(g) and g.shape == shape and g.dtype == dtype:
        return g
    name = f"input {i}" if op.variadic else op.arrays[i]
    if not is_array(g) and not isinstance(g, np.generic):
        raise GradientError(f"{op.name}: its vjp returned a {type(g).__name__} for {name}, expected an array")
    if g.dtype != dtype:
        raise GradientError(f"{op.name}: its vjp returned {g.dtype} for {name}, which is {dtype}: is a "
                            f"constant a NumPy scalar?")
    try:
        if np.broadcast_shapes(g.shape, shape) != g.shape:
            raise ValueError
    except ValueError:
        text = f"{op.name}: its vjp returned shape {g.shape} for {name}, which is {shape}"
        raise GradientError(text) from None
    return unbroadcast(g, shape)
