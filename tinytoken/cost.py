"""Multiply-adds (MACs), counted from the ops that ran, and the graph as text.

Biases, and the ops in FREE, count zero.
"""
import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .backend import Array
from .errors import GraphError
from .graph import topological_order
from .tensor import Tensor, no_grad, observe, plain, recording

# Ops of tinytoken.ops: norms, softmax, elementwise arithmetic, reductions, resizes, and whatever only moves
# values. The count fails at an op that is not listed here and does not declare its MACs.
FREE = frozenset("""
    add subtract multiply divide negative power exp log sqrt sum mean max
    reshape transpose concat index pad broadcast_to split_heads merge_heads
    softmax log_softmax layer_norm batch_norm gelu relu sigmoid log_sigmoid tanh cross_entropy
    binary_cross_entropy kl_divergence mse embedding gumbel_softmax take_tokens put_tokens patchify resize
    cut_windows join_windows relative_bias unfold cut_overlapping max_in_windows roi_align
""".split())


_running = threading.local()


def running_modules() -> list[Any]:
    """The modules whose forward is running in this thread, outermost first: a list that nn.Module keeps."""
    return _running.__dict__.setdefault("stack", [])


def innermost() -> Any:
    """The module whose forward is running now in this thread, or None."""
    stack = running_modules()
    return stack[-1] if stack else None


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-adds per image: in all, by op, and by the dotted name of the innermost module."""
    total: int
    by_op: dict[str, int]
    by_module: dict[str, int]

    def __int__(self) -> int:
        return self.total

    def __str__(self) -> str:
        rows = [*self.by_module.items(), ("total MACs per image", self.total)]
        return "\n".join(f"{name:<28}{count:>14,}" for name, count in rows)


def macs(model: Any, images: Array, **call: Any) -> Macs:
    """The multiply-adds of one image through model(images, **call).

    One pass of the plain ops in eval mode under no_grad, divided by the batch size. Counted from shapes, so
    the same on every machine.
    """
    names = {id(module): name or "(model)" for name, module in model.named_modules()}
    by_op: collections.Counter[str] = collections.Counter()
    by_module: collections.Counter[str] = collections.Counter()

    def count(op, shapes):
        if op.shapes_to_macs is None:
            if op.name not in FREE or not op.module.startswith("tinytoken.ops."):
                raise GraphError(f"macs: op {op.name} neither declares its multiply-adds "
                                 "nor stands in cost.FREE")
            return
        n = op.multiply_adds(shapes)
        by_op[op.name] += n
        by_module[names.get(id(innermost()), "(outside)")] += n

    modes = [(module, module.training) for _, module in model.named_modules()]
    try:
        with no_grad(), plain(), observe(count):
            model.eval()(images, **call)
    finally:
        for module, mode in modes:
            module.training = mode
    share = lambda counts: {name: n // len(images) for name, n in counts.items()}
    return Macs(sum(by_op.values()) // len(images), share(by_op), share(by_module))


def recorded_macs(function: Callable[..., Any], arrays: Sequence[Array],
                  draws: dict[str, Array] | None = None) -> int:
    """The multiply-adds of function(*arrays, **draws) that are recorded for a backward pass, of one image.

    Runs the function on the first image. Ops that declare no multiply-adds, such as a user's own, count zero.
    """
    counts: list[int] = []

    def count(op, shapes):
        if recording():
            counts.append(op.multiply_adds(shapes))

    with observe(count):
        function(*(array[:1] for array in arrays), **{name: draw[:1] for name, draw in (draws or {}).items()})
    return sum(counts)


def explain(loss: Tensor) -> None:
    """Print the graph under a tensor in the order of computation: op, shapes, multiply-adds (MACs).

    A freed node no longer knows where its inputs came from.
    """
    print(graph_text(loss))


def graph_text(loss: Tensor) -> str:
    """What `explain` prints."""
    if loss.node is None:
        return f"{'a leaf' if loss.requires_grad else 'no graph'}: shape {loss.shape}"
    order = topological_order(loss.node)
    index = {node: i for i, node in enumerate(order)}
    rows: list[str] = []
    total = 0
    for node in order:
        inputs = []
        for i, shape in enumerate(node.shapes):
            edge = node.edges[i] if node.edges else None
            made = "" if edge is None else f"%{index[edge[0][0]]}" if isinstance(edge[0], tuple) else "leaf"
            if shape is not None:
                inputs.append(f"{made}{tuple(shape)}")
        macs = node.op.multiply_adds(node.shapes)
        total += macs
        outputs = ", ".join(str(tuple(s)) for s in node.outputs)
        freed = "  (freed)" if node.vjp is None else ""
        rows.append(f"%{index[node]:<4} {node.op.name:<16} {' '.join(inputs)} -> {outputs}"
                    + (f"  {macs:,} MACs" if macs else "") + freed)
    return "\n".join(rows + [f"{len(rows)} ops, {total:,} multiply-adds (MACs)"])
