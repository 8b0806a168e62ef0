"""Multiply-adds (MACs), counted from the ops that ran, and the graph as text. Biases, and the ops in FREE,
count zero."""
import collections
import dataclasses
import threading

from .errors import GraphError
from .tensor import no_grad, observe, recording, topological_order

# Ops of tinytoken.ops: norms, softmax, elementwise arithmetic, reductions, resizes, and whatever only moves
# values. An op that is neither here nor declares its MACs makes the count fail.
FREE = frozenset("""
    add subtract multiply divide negative power exp log sqrt sum mean max reshape transpose concat index pad broadcast_to
    embedding softmax log_softmax layer_norm gelu relu sigmoid tanh split_heads merge_heads gumbel_softmax take_tokens put_tokens
    patchify resize cross_entropy kl_divergence mse
""".split())


_running = threading.local()


def running_modules():
    """The modules whose forward is running in this thread, outermost first: a list that nn.Module puts itself
    on and takes itself off."""
    return _running.__dict__.setdefault("stack", [])


def innermost():
    """The module whose forward is running now in this thread, or None."""
    stack = running_modules()
    return stack[-1] if stack else None


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-adds per image: `total`, `by_op` {name: MACs}, `by_module` {dotted name of the innermost
    module: MACs}."""
    total: int
    by_op: dict
    by_module: dict

    def __int__(self):
        return self.total

    def __str__(self):
        rows = [*self.by_module.items(), ("total MACs per image", self.total)]
        return "\n".join(f"{name:<28}{count:>14,}" for name, count in rows)


def macs(model, images, **call):
    """The multiply-adds of one image through model(images, **call) -> Macs: one pass in eval mode under
    no_grad, divided by the batch size. Counted from shapes: the same on every machine."""
    names = {id(module): name or "(model)" for name, module in model.named_modules()}
    by_op, by_module = collections.Counter(), collections.Counter()

    def count(op, shapes):
        if op.shapes_to_macs is None:
            if op.name not in FREE or not op.module.startswith("tinytoken.ops."):
                raise GraphError(f"macs: op {op.name} neither declares its multiply-adds nor stands in "
                                 f"cost.FREE")
            return
        n = op.shapes_to_macs(*shapes)
        by_op[op.name] += n
        by_module[names.get(id(innermost()), "(outside)")] += n

    modes = [(module, module.training) for _, module in model.named_modules()]
    try:
        with no_grad(), observe(count):
            model.eval()(images, **call)
    finally:
        for module, mode in modes:
            module.training = mode
    share = lambda counts: {name: n // len(images) for name, n in counts.items()}
    return Macs(sum(by_op.values()) // len(images), share(by_op), share(by_module))


def recorded_macs(function, arrays, draws=None):
    """The multiply-adds of function(*arrays, **draws), run on the first image alone, as far as they are
    recorded for a backward pass. Ops that declare none, a user's own for example, count zero."""
    counts = []

    def count(op, shapes):
        if op.shapes_to_macs and recording():
            counts.append(op.shapes_to_macs(*shapes))

    with observe(count):
        function(*(array[:1] for array in arrays), **{name: draw[:1] for name, draw in (draws or {}).items()})
    return sum(counts)


def explain(loss):
    """Print the graph under a tensor in the order in which it was computed: op, shapes, multiply-adds (MACs).
    A freed node no longer knows where its inputs came from."""
    print(graph_text(loss))


def graph_text(loss):
    """What `explain` prints."""
    if loss.node is None:
        return f"{'a leaf' if loss.requires_grad else 'no graph'}: shape {loss.shape}"
    rows, total, number = [], 0, {}
    for node in topological_order(loss.node):
        number[node] = len(rows)
        inputs = []
        for i, shape in enumerate(node.shapes):
            edge = node.edges[i] if node.edges else None
            made = "" if edge is None else f"%{number[edge[0][0]]}" if isinstance(edge[0], tuple) else "leaf"
            if shape is not None:
                inputs.append(f"{made}{tuple(shape)}")
        macs = node.op.shapes_to_macs(*node.shapes) if node.op.shapes_to_macs else 0
        total += macs
        outputs = ", ".join(str(tuple(s)) for s in node.outputs)
        freed = "  (freed)" if node.vjp is None else ""
        rows.append(f"%{number[node]:<4} {node.op.name:<16} {' '.join(inputs)} -> {outputs}"
                    + (f"  {macs:,} MACs" if macs else "") + freed)
    return "\n".join(rows + [f"{len(rows)} ops, {total:,} multiply-adds (MACs)"])
