"""The graph of what was computed, and the way back through it.

A Node is one run of an op. It knows the nodes it came from and nothing knows the Node but its outputs, so
there is no global list and no reference cycle. backward() sorts the nodes, runs each vjp once with everything
that arrived, and frees the node.
"""
import functools
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from .backend import Array, is_array, unbroadcast
from .errors import GradientError, GraphError


class Node:
    """One run of an op. `edges` holds, per array argument, None or (key, shape, dtype). A key is what a
    gradient is addressed to: (node, place) for output `place` of a node, the leaf Tensor itself otherwise.
    Intermediate Tensors are not held: their arrays live as long as a vjp needs them. `held`: see
    `watched`."""
    __slots__ = ("op", "edges", "vjp", "shapes", "outputs", "number", "held")
    numbers = itertools.count()  # a node is made after those that it came from, so has a larger one

    def __init__(self, op, edges, shapes, outputs, vjp, samples):
        self.op, self.vjp, self.number = op, vjp, next(self.numbers)
        self.edges, self.shapes, self.outputs = edges, shapes, outputs
        self.held = watched(vjp, samples) if samples else ()

    def parents(self) -> list["Node"]:
        """The nodes that made its inputs."""
        return [edge[0][0] for edge in self.edges if edge and isinstance(edge[0], tuple)]


def watched(vjp: Callable, samples: int) -> list[tuple[np.ndarray, int, bytes]]:
    """[(array, step, every step-th of its elements as they are now)] of the NumPy arrays that a vjp holds, in
    its closure and in those of the functions there: at most `samples` elements of each.

    If one is changed before the vjp runs, the gradient is wrong. NumPy counts no writes, so elements have to
    be compared. Arrays on a GPU are not: the host would have to wait for them."""
    found: list[Any] = []
    functions = [vjp]
    for function in functions:  # which grows meanwhile
        for cell in getattr(function, "__closure__", None) or ():
            try:
                value = cell.cell_contents
            except ValueError:  # a name that this run of the op did not set
                continue
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, np.ndarray):
                    step = (one.size - 1) // samples + 1 if one.size else 1
                    found.append((one, step, one.flat[::step].tobytes()))
                elif isinstance(one, FunctionType) and one not in functions:
                    functions.append(one)
    return found


def topological_order(root: "Node") -> list["Node"]:
    """The nodes under `root`, each after all that it depends on. Iterative: a graph may be very deep."""
    found, stack = {root}, [root]
    while stack:
        new = [parent for parent in stack.pop().parents() if parent not in found]
        found.update(new)
        stack += new
    return sorted(found, key=lambda node: node.number)


def backward(root: Any, gradient: Array, wanted: dict | None, deliver: Callable,
             around: Callable | None) -> None:
    """Run the graph backward from the key `root`, and deliver(key, gradient) whatever arrives at a wanted key
    (None: at every leaf). Nodes that lead to none of them are not run.

    wanted: {key: the array that its gradient is added to}, or None. around: as in tensor.around, or None."""
    order = [] if is_leaf(root) else topological_order(root[0])
    if any(node.vjp is None for node in order):
        raise GraphError("backward: this graph is already freed: backward() or grad() ran through it before. "
                         "Run the forward pass again.")
    is_wanted = is_leaf if wanted is None else wanted.__contains__
    place_of = lambda key: wanted.get(key) if wanted and is_leaf(key) else None
    live = _live_edges(order, is_wanted)
    arrived: dict[Any, Any] = {}
    run_node = functools.partial(_run_node_in, around) if around else _run_node

    def arrive(key, g):
        if is_wanted(key):
            deliver(key, g)
        if isinstance(key, tuple):
            _accumulate(arrived, key, g)

    arrive(root, gradient)
    while order:
        node = order.pop()
        upstream = [arrived.pop((node, place), (None,))[0] for place in range(len(node.outputs))]
        if node in live and any(g is not None for g in upstream):
            run_node(node, live[node], upstream, arrive, place_of)


def is_leaf(key: Any) -> bool:
    """Whether a key is a leaf Tensor, not an output of a node."""
    return not isinstance(key, tuple)


def _live_edges(order, is_wanted):
    """{node: its edges, None for those that lead to no wanted key} of nodes that lead to one, in `order`."""
    live = {}
    for node in order:
        leads = lambda key: is_wanted(key) or isinstance(key, tuple) and key[0] in live
        edges = [edge if edge and leads(edge[0]) else None for edge in node.edges]
        if any(edges):
            live[node] = edges
    return live


class Into:
    """An entry of a vjp that can add its gradient to an array itself: run(array) adds to it and returns
    nothing, run(None) returns the gradient. The engine gives it the array of `grad(..., into=)` where a
    leaf's gradient belongs."""

    def __init__(self, run):
        self.run = run


def _run_node(node, edges, upstream, arrive, place_of):
    """Free a node, run its vjp, and send on the gradients along `edges`. What only the vjp held goes when
    this returns. place_of(key): the array that a leaf's gradient is to be added to, or None."""
    vjp, held = node.vjp, node.held
    node.vjp, node.edges, node.held = None, (), ()
    changed = [array for array, step, before in held if array.flat[::step].tobytes() != before]
    try:
        entries = vjp(*upstream)
    except Exception as error:
        if changed:
            raise _was_changed(node.op, changed[0]) from error
        raise
    entries = entries if isinstance(entries, tuple) else (entries,)
    if changed:
        _check_changed(node.op, changed, edges, entries)
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


def _check_changed(op, changed, edges, entries):
    """GraphError for arrays that were changed, but for those that only gradients nobody asked for need."""
    read = {False: set(), True: set()}  # by whether it is asked for: what the entries that are functions hold
    for edge, entry in zip(edges, entries):
        asked = edge is not None
        read[asked].update(id(array) for array, _, _ in watched(entry, 1))
    for array in changed:
        if id(array) not in read[False] - read[True]:
            raise _was_changed(op, array)


def _was_changed(op, array):
    return GraphError(f"backward: {op.name}: an array {array.shape} was changed in place between the forward "
                      f"and the backward pass, so the gradient would be wrong. Change a copy, or run the "
                      f"forward pass again.")


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
