"""How a mistake is planted: the op's own forward pass, under another name, with a vjp that a student might
write."""
import dataclasses
import functools
import inspect

import numpy as np

from tinytoken import Tensor, op

CATALOGUE, STRAIGHT_THROUGH = [], []


@dataclasses.dataclass
class Planted:
    """`wrong` and `right`: the two ops. inputs(rng): a tuple of tiny arrays. kind: what gradcheck should call
    it, or None if no simple reading fits. state: what wrong keeps between calls, empty at the start of each
    check."""
    name: str
    wrong: object
    right: object
    inputs: object
    kind: str
    settings: dict
    state: dict

    def call(self, function):
        """The function of the inputs alone, settings filled in."""
        self.state.clear()
        return functools.partial(function, **self.settings)


def plant(right, inputs, kind=None, into=CATALOGUE, **settings):
    """Decorator of wrong(output, *arrays, **the settings it names) -> vjp: plants it in place of right's own
    vjp. A wrong with an argument `state` gets the same dictionary at every call."""
    def decorate(wrong):
        names, state = inspect.signature(wrong).parameters, {}

        @functools.wraps(right.function)
        def function(*arrays, **given):
            out, _ = right.function(*arrays, **given)
            kept = {name: value for name, value in (given | {"state": state}).items() if name in names}
            return out, wrong(out, *arrays, **kept)
        function.__name__, function.__module__ = wrong.__name__, wrong.__module__
        into.append(Planted(wrong.__name__, op(function), right, inputs, kind, settings,
                            state))
        return wrong
    return decorate


def normal(*shapes):
    """Makes standard normal arrays of these shapes; an array or None among them is taken as it is."""
    return lambda rng: tuple(rng.standard_normal(s) if isinstance(s, tuple) else s for s in shapes)


def positive(*shapes):
    """Makes arrays of these shapes with values from 0.5 to 2."""
    return lambda rng: tuple(rng.uniform(0.5, 2, s) for s in shapes)


def gradients(function, inputs, upstream, **settings):
    """The gradients of all inputs, as arrays."""
    tensors = [Tensor(np.array(x), requires_grad=True) for x in inputs]
    function(*tensors, **settings).backward(upstream)
    return [t.grad for t in tensors]
