"""Multiply-adds (MACs), counted from the ops that ran. Biases, and the ops in FREE, count zero."""
import collections
import dataclasses

from . import nn
from .errors import GraphError
from .tensor import no_grad, observe

# Norms, softmax, elementwise arithmetic, reductions, resizes, and whatever only moves values. An op that is neither here nor
# declares its MACs makes the count fail.
FREE = frozenset("""
    add subtract multiply divide negative power exp log sqrt sum mean max reshape transpose concat index pad broadcast_to
    embedding softmax log_softmax layer_norm gelu relu sigmoid tanh split_heads merge_heads gumbel_softmax take_tokens put_tokens
    patchify resize cross_entropy kl_divergence mse
""".split())


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-adds per image: `total`, `by_op` {name: MACs}, `by_module` {dotted name of the innermost module: MACs}."""
    total: int
    by_op: dict
    by_module: dict

    def __int__(self):
        return self.total

    def __str__(self):
        return "\n".join(f"{name:<28}{count:>14,}" for name, count in [*self.by_module.items(), ("total MACs per image", self.total)])


def macs(model, images, **call):
    """The multiply-adds of one image through model(images, **call) -> Macs: one pass in eval mode under no_grad, divided by
    the batch size. Accelerator-free facts: counted from shapes, the same on every machine."""
    names = {id(module): name or "(model)" for name, module in model.named_modules()}
    by_op, by_module = collections.Counter(), collections.Counter()

    def count(op, shapes):
        if op.shapes_to_macs is None:
            if op.name not in FREE:
                raise GraphError(f"macs: op {op.name} neither declares its multiply-adds nor stands in cost.FREE")
            return
        n = op.shapes_to_macs(*shapes)
        by_op[op.name] += n
        by_module[names.get(id(nn.innermost()), "(outside)")] += n

    modes = [(module, module.training) for _, module in model.named_modules()]
    try:
        with no_grad(), observe(count):
            model.eval()(images, **call)
    finally:
        for module, mode in modes:
            module.training = mode
    share = lambda counts: {name: n // len(images) for name, n in counts.items()}
    return Macs(sum(by_op.values()) // len(images), share(by_op), share(by_module))
