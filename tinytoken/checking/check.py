"""gradcheck: is the gradient that backward() computes the slope that the forward pass has?

`passes.py` runs the function, `differences.py` measures its slope, `compare.py` and `upstream.py` judge the
gradient, and `diagnosis.py` says which mistake a wrong one looks like.
"""
import contextlib
import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..backend import is_array
from ..errors import InputError, expect
from ..tensor import Tensor
from .compare import Checked, Comparison
from .passes import Passes, equal, refusal
from .upstream import linear, zero_upstream

# The upstream gradient has a random stream of its own, since the inputs may be draws of default_rng(seed).
STREAM = 0x67726164
EVERY = 1 << 62  # elements: more than any input has


@dataclasses.dataclass
class Report:
    """What a gradcheck compared that passed.

    outputs: their shapes. directions: the count of random directions over all inputs, which are compared
    where not every element is.
    """
    name: str
    inputs: list[Checked]
    outputs: list[tuple[int, ...]]
    seed: int
    directions: int

    def __str__(self) -> str:
        outputs = ", ".join(map(str, self.outputs))
        lines = [f"{self.name}: gradients agree with finite differences (output {outputs}; seed {self.seed})",
                 *map(str, self.inputs)]
        lines += [f"{self.directions} random directions over all inputs"] if self.directions else []
        return "\n  ".join(lines)


def gradcheck(fn: Callable[..., Any], *inputs: Any, wrt: Iterable[int | str] | int | str | None = None,
              eps: float = 1e-6, rtol: float = 1e-6, atol: float = 1e-8, max_elements: float = 512,
              seed: int = 0, names: Iterable[str] | None = None) -> Report:
    """Compare the gradients of fn(*inputs) with central differences.

    Returns a Report, or raises GradientError, which says which input is wrong, where, by how much, and which
    mistake would explain it (its attribute `kind` is the mistake in a word).

    fn: gets Tensors, returns one or a tuple of them. inputs: float64 arrays or Tensors; integer ones and None
        are passed on unchecked. A Tensor (a model's Parameter) is perturbed in place and put back, so fn may
        ignore its arguments: gradcheck(lambda *p: loss(), *model.parameters()).
    wrt: positions or names of the inputs to check, or one of them (None: all floats). names: of the inputs,
        for the messages.
    eps: the step is eps max(1, |x|); where that has too few digits, longer ones are tried, and steps down to
        |x| / 8192. rtol, atol: an element passes if |analytic - numeric| <= atol + rtol |numeric| and what
        the numeric slope may be off (but never more than rtol of the input's largest slope).
    max_elements: if there are more elements in all, a seeded sample of this many is compared, and two random
        directions.

    The upstream gradient is a normal draw. Then the gradients for zeros, for a wide one (sizes from 1e-4 to
    1e4, zeros among them, not contiguous) and for the difference of the two are compared with the first, by
    linearity; and the function is checked along a line through a point nearby, and called once more.

    A hard sample has no slope: check the soft path, and then that the gradient of the hard output equals the
    gradient of the soft one.
    """
    expect(inputs, "gradcheck", "no inputs to check")
    expect(callable(fn), "gradcheck", lambda: f"fn is a {type(fn).__name__}, expected a function")
    expect(all(isinstance(n, numbers.Real) for n in (eps, rtol, atol, max_elements))
           and eps > 0 and rtol >= 0 and atol >= 0 and max_elements >= 1, "gradcheck",
           lambda: f"eps {eps}, rtol {rtol}, atol {atol}, max_elements {max_elements}: "
                   "expected positive ones")
    try:
        rng = np.random.default_rng([seed, STREAM])
    except (TypeError, ValueError) as error:
        raise InputError(f"gradcheck: seed {seed!r}, expected a whole number from 0") from error
    tensors = [x if x is None or isinstance(x, Tensor) else Tensor(x.copy() if is_array(x) else x)
               for x in inputs]
    named = _names(fn, len(tensors), names)
    positions = _positions(wrt, tensors, named)
    with _borrowed([t for t in tensors if t is not None], [tensors[i] for i in positions]):
        passes = Passes(fn, tensors, named, positions, seed, rng)
        return _checked(passes, (eps, rtol, atol), rng, int(min(max_elements, EVERY)))


def _checked(passes, tolerances, rng, max_elements):
    """Every check, in the order in which it says most about a mistake -> Report."""
    first = passes.repeated()
    gradients = first[1]
    compare = Comparison(passes, tolerances, rng, max_elements)
    # Each output alone first, which says more about a mistake. The other outputs then get None.
    for i in compare.every if len(compare.every) > 1 else ():
        compare.elements([i], passes.gradients([i])[1])
    compare.elements(compare.every, gradients)
    sampled = any(c.elements < c.size for c in compare.checked)
    if sampled:
        compare.directions(gradients)
    zero_upstream(passes)
    linear(passes, first, tolerances[2], rng)
    compare.nearby()
    passes.repeated(first)  # after all these calls
    return Report(passes.label, compare.checked, passes.shapes, passes.seed, 2 if sampled else 0)


def _names(fn, count, names):
    """The inputs' names: `names`, or what an op or function calls them, or 'input 0', 'input 1', ..."""
    names = list(names) if isinstance(names, Iterable) else names
    expect(names is None or isinstance(names, list) and len(names) == count, "gradcheck",
           lambda: f"{len(names) if isinstance(names, list) else repr(names)} names for {count} inputs")
    if names is not None:
        return names
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        parameters = ()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (known + [f"input {i}" for i in range(len(known), count)])[:count]


def _positions(wrt, tensors, names):
    """The positions of the inputs to check. Refuses float32, where finite differences have no digits left."""
    floats = [i for i, t in enumerate(tensors) if t is not None and t.dtype.kind == "f"]
    wrt = [wrt] if isinstance(wrt, (int, str)) else list(wrt) if isinstance(wrt, Iterable) else wrt
    expect(wrt is None or isinstance(wrt, list), "gradcheck",
           lambda: f"wrt {wrt!r}, expected a list of positions or names")
    for w in wrt or ():
        whole = isinstance(w, (int, np.integer))
        known = w in names if isinstance(w, str) else whole and 0 <= w < len(tensors)
        expect(known, "gradcheck",
               lambda: f"wrt {w!r}, expected positions 0 to {len(tensors) - 1} or names ({', '.join(names)})")
    chosen = floats if wrt is None else [names.index(w) if isinstance(w, str) else w for w in wrt]
    chosen = [i for i in chosen if i in floats]
    expect(chosen, "gradcheck", "no float input to check: integers and None have no gradient")
    for i in floats:
        if tensors[i].dtype != np.float64:
            raise refusal("dtype", f"gradcheck: {names[i]} {tensors[i].shape} is {tensors[i].dtype}, "
                                  "expected float64: finite differences need its digits. Cast it: "
                                  "x.astype('float64'), a model's p.data = p.data.astype('float64')")
    expect(len({id(tensors[i]) for i in chosen}) == len(chosen), "gradcheck",
           "one Tensor is given twice: give it once")
    return chosen


@contextlib.contextmanager
def _borrowed(tensors, wanted):
    """Context: the tensors have their old values afterwards, whatever happens inside the block."""
    kept = [(t, t.data, t.data.copy(), t.requires_grad) for t in tensors]
    try:
        for t in wanted:
            t.requires_grad = True
        yield
    finally:
        for t, data, values, requires_grad in kept:
            t.data, t.requires_grad = data, requires_grad
            if not equal(data, values):
                data[...] = values
