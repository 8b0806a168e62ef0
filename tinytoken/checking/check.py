"""gradcheck: is the gradient that backward() computes the slope that the forward pass has?

`differences.py` measures the slope; `diagnosis.py` says which mistake a wrong gradient looks like.
"""
import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backend import array_module, is_array, to_device, to_numpy
from ..errors import GradientError, expect
from ..tensor import Op, Tensor, grad, no_grad, op
from .diagnosis import Evidence, read, read_crash, read_refusal
from .differences import Slopes, element_line, random_line

SAME = 1e-10  # two calls agree to this share of the largest value: a threaded BLAS may add in another order
JACOBIAN = 2_000_000  # a diagnosis computes a Jacobian of at most so many entries
# The upstream gradient has a random stream of its own, since the inputs may be draws of default_rng(seed).
STREAM = 0x67726164


@dataclasses.dataclass
class Checked:
    """One input that was checked.

    elements: how many of its `size` elements were compared; slope: their largest; error: the largest
    |analytic - numeric|, beside what was allowed.
    """
    name: str
    shape: tuple[int, ...]
    elements: int
    size: int
    slope: float
    error: float = 0.0
    allowed: float = 0.0

    def __str__(self) -> str:
        return (f"{self.name} {self.shape}: {self.elements} of {self.size} elements, "
                f"largest error {self.error:.1e}, allowed {self.allowed:.1e}"
                + ("" if self.slope else "; the outputs do not change with it"))


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


def gradcheck(fn: Callable[..., Any], *inputs: Any, wrt: Sequence[int | str] | None = None, eps: float = 1e-6,
              rtol: float = 1e-6, atol: float = 1e-8, max_elements: int = 512, seed: int = 0,
              names: Sequence[str] | None = None) -> Report:
    """Compare the gradients of fn(*inputs) with central differences.

    Returns a Report, or raises GradientError, which says which input is wrong, where, by how much, and which
    mistake would explain it (its attribute `kind` is the mistake in a word).

    fn: gets Tensors, returns one or a tuple of them. inputs: float64 arrays or Tensors; integer ones and None
        are passed on unchecked. A Tensor (a model's Parameter) is perturbed in place and put back, so fn may
        ignore its arguments: gradcheck(lambda *p: loss(), *model.parameters()).
    wrt: positions or names of the inputs to check (None: all floats). names: of the inputs, for the messages.
    rtol, atol: an input passes if |analytic - numeric| <= atol + rtol max |numeric|, the maximum over it.
    max_elements: if there are more elements in all, a seeded sample of this many is compared, and two random
        directions.

    A hard sample has no slope: check the soft path, and then that the gradient of the hard output equals the
    gradient of the soft one.
    """
    expect(inputs, "gradcheck", "no inputs to check")
    expect(eps > 0 and rtol >= 0 and atol >= 0 and max_elements >= 1, "gradcheck",
           lambda: f"eps {eps}, rtol {rtol}, atol {atol}, max_elements {max_elements}: "
                   "expected positive ones")
    tensors = [x if x is None or isinstance(x, Tensor) else Tensor(x.copy() if is_array(x) else np.array(x))
               for x in inputs]
    names = _names(fn, len(tensors), names)
    positions = _positions(wrt, tensors, names)
    with _borrowed([t for t in tensors if t is not None], [tensors[i] for i in positions]):
        return _Check(fn, tensors, names, positions, (eps, rtol, atol), seed).run(max_elements)


def _names(fn, count, names):
    """The inputs' names: `names`, or what an op or function calls them, or 'input 0', 'input 1', ..."""
    expect(names is None or len(names) == count, "gradcheck",
           lambda: f"{len(names)} names for {count} inputs")
    if names is not None:
        return list(names)
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        parameters = ()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (known + [f"input {i}" for i in range(len(known), count)])[:count]


def _positions(wrt, tensors, names):
    """The positions of the inputs to check. Refuses float32, where finite differences have no digits left."""
    floats = [i for i, t in enumerate(tensors) if t is not None and t.dtype.kind == "f"]
    for w in wrt or ():
        known = w in names if isinstance(w, str) else isinstance(w, int) and 0 <= w < len(tensors)
        expect(known, "gradcheck",
               lambda: f"wrt {w!r}, expected positions 0 to {len(tensors) - 1} or names ({', '.join(names)})")
    chosen = floats if wrt is None else [names.index(w) if isinstance(w, str) else w for w in wrt]
    chosen = [i for i in chosen if i in floats]
    expect(chosen, "gradcheck", "no float input to check: integers and None have no gradient")
    for i in floats:
        if tensors[i].dtype != np.float64:
            raise _error("dtype", f"gradcheck: {names[i]} {tensors[i].shape} is {tensors[i].dtype}, "
                                  "expected float64: finite differences need its digits. Cast it: "
                                  "x.astype('float64'), a model's p.data = p.data.astype('float64')")
    expect(len({id(tensors[i]) for i in chosen}) == len(chosen), "gradcheck",
           "one Tensor is given twice: give it once")
    return chosen


def _error(mistake, text):
    error = GradientError(text)
    error.kind = mistake
    return error


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
            if not _equal(data, values):
                data[...] = values


def _equal(a, b):
    """Equal, NaNs too."""
    xp = array_module(a)
    return bool(xp.array_equal(a, b) or a.dtype.kind == "f" and xp.array_equal(a, b, equal_nan=True))


def _same(a, b):
    """Equal up to the rounding of sums in another order."""
    if _equal(a, b):
        return True
    a, b = to_numpy(a), to_numpy(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=SAME * np.abs(np.nan_to_num(a)).max(),
                                              equal_nan=True)


@op
def _root(*outputs, upstream):
    """The end of the graph: gives each output the upstream gradient to check with. Nobody reads its value."""
    return array_module(*outputs).zeros(()), lambda g: upstream


class _Check:
    """One function at one point.

    `wanted` are the tensors to check; `which`, in the methods, lists the outputs with an upstream gradient.
    """

    def __init__(self, fn, tensors, names, positions, tolerances, seed):
        self.fn, self.seed = fn, seed
        self.tensors, self.all_names = tensors, names
        self.wanted, self.names = [tensors[i] for i in positions], [names[i] for i in positions]
        self.eps, self.rtol, self.atol = tolerances
        self.label = _label(fn)
        self.rng = np.random.default_rng([seed, STREAM])
        self.start = [None if t is None else t.data.copy() for t in tensors]

    def run(self, max_elements):
        outputs = self.forward()
        self.label, self.shapes = _label(self.fn, outputs), [o.shape for o in outputs]
        # Random, never ones: the sum of a softmax does not depend on its input, and the sum of tokens that
        # were moved does not depend on where they went.
        self.upstream = [to_device(np.asarray(self.rng.standard_normal(o.shape)), o.device) for o in outputs]
        every = list(range(len(outputs)))
        gradients = self.reproducible(every)
        self.slopes = Slopes(self.values, self.upstream)
        self.positions = self.sample(max_elements)
        self.numeric = [np.array([self.slopes.central(self.line(i, p))
                                  for p in self.positions[i]]).reshape(-1, len(outputs))
                        for i in range(len(self.wanted))]
        self.checked = [Checked(name, t.shape, len(n), t.size, float(np.abs(n).max(initial=0)))
                        for name, t, n in zip(self.names, self.wanted, self.numeric)]
        # Each output alone first, which says more about a mistake. The other outputs then get None.
        for i in every if len(outputs) > 1 else ():
            self.compare([i], self.analytic([i])[1])
        self.compare(every, gradients)
        directions = 2 if any(c.elements < c.size for c in self.checked) else 0
        for _ in range(directions):
            self.compare_direction(every, gradients)
        self.zero_upstream(every)
        return Report(self.label, self.checked, self.shapes, self.seed, directions)

    # Running the function

    def forward(self):
        """The outputs as a list; refuses any that is no finite float64 Tensor, and a write into an input."""
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

    def values(self):
        """The outputs' arrays at the present inputs; copies, since an output may be a view of an input."""
        with no_grad():
            outputs = self.fn(*self.tensors)
        return [o.data.copy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    def analytic(self, which, factor=1.0):
        """(the outputs' arrays, the gradients of the wanted tensors)."""
        outputs = self.forward()
        values = [o.data.copy() for o in outputs]
        upstream = [self.upstream[i] * factor for i in which]
        copies = tuple(u.copy() for u in upstream)
        try:
            gradients = grad(_root(*(outputs[i] for i in which), upstream=copies), self.wanted)
        except GradientError as error:
            raise self.refused(error) from error
        except Exception as error:
            raise self.failure("raised", f"the backward pass{self.alone(which)} raised "
                                         f"{type(error).__name__}: {error}\n"
                                         f"  reading: {read_crash(error)}") from error
        self.inputs_unchanged("the backward pass")
        if not all(map(_equal, copies, upstream)):
            raise self.failure("writes", "its vjp writes into the upstream gradient it is given, "
                                         "which others still need")
        if not all(_equal(o.data, v) for o, v in zip(outputs, values)):
            raise self.failure("writes", "its vjp writes into the output of the forward pass")
        return values, gradients

    def inputs_unchanged(self, when):
        for name, t, start in zip(self.all_names, self.tensors, self.start):
            if t is not None and not _equal(t.data, start):
                raise self.failure("writes", f"{when} writes into {name} {t.shape}: "
                                             "an op never writes into its inputs")

    def reproducible(self, which):
        """The gradients; refuses a function whose second call gives others."""
        (values, gradients), (values_again, gradients_again) = self.analytic(which), self.analytic(which)
        if not all(map(_same, values, values_again)):
            raise self.failure("not deterministic",
                               "a second call gives another output. Noise must be an argument")
        if not all(map(_same, gradients, gradients_again)):
            raise self.failure("not deterministic",
                               "a second call gives the same output and another gradient")
        return gradients

    # Comparing

    def sample(self, max_elements):
        """Flat positions to compare, per input: all of them, or a share of max_elements.

        Small inputs come first, and what they leave of their share goes to the larger ones.
        """
        left, positions = max_elements, [None] * len(self.wanted)
        for rank, i in enumerate(sorted(range(len(self.wanted)), key=lambda i: self.wanted[i].size)):
            size = self.wanted[i].size
            count = min(size, max(1, left // (len(self.wanted) - rank)))
            positions[i] = np.arange(size)
            if count < size:
                positions[i] = np.sort(self.rng.choice(size, count, replace=False))
            left -= count
        return positions

    def line(self, i, position):
        return element_line(self.wanted[i].data, position, self.eps)

    def compare(self, which, gradients):
        """Every input's gradient, at the sampled elements."""
        mistakes = []
        for i, gradient in enumerate(gradients):
            a, n = to_numpy(gradient).reshape(-1)[self.positions[i]], self.numeric[i][:, which].sum(axis=1)
            allowed = self.atol + self.rtol * float(np.abs(n[np.isfinite(n)]).max(initial=0))
            wrong = ~(np.abs(a - n) <= allowed)
            for k in sorted(np.flatnonzero(wrong), key=lambda k: -abs(a[k] - n[k])):
                n[k] = self.slopes.settle(a[k], n[k], allowed, self.line(i, self.positions[i][k]), which)
                wrong[k] = not abs(a[k] - n[k]) <= allowed
                if wrong[k]:  # one is enough: to settle the others too would take long
                    mistakes.append((i, a, n, wrong, allowed))
                    break
            self.note(i, float(np.abs(a - n).max(initial=0)), allowed)
        if mistakes:
            raise self.mistake(*mistakes[0], which, also=[self.names[i] for i, *_ in mistakes[1:]])

    def note(self, i, error, allowed):
        """Keep, for the report, the error that is largest relative to what was allowed."""
        record = self.checked[i]
        if error * record.allowed >= record.error * allowed:
            record.error, record.allowed = error, allowed

    def compare_direction(self, which, gradients):
        """All inputs at once along a random direction: shows errors in elements that were not sampled."""
        gradients = [to_numpy(g) for g in gradients]
        direction = [self.rng.standard_normal(g.shape) for g in gradients]
        parts = [float((g * d).sum()) for g, d in zip(gradients, direction)]
        spread = math.sqrt(sum(((g * d) ** 2).sum() for g, d in zip(gradients, direction)))

        def difference(chosen):
            line = random_line([self.wanted[i].data for i in chosen], [direction[i] for i in chosen],
                               self.eps)
            a, n = sum(parts[i] for i in chosen), float(self.slopes.central(line)[which].sum())
            allowed = self.atol + self.rtol * max(spread, abs(n))
            n = self.slopes.settle(a, n, allowed, line, which)
            if abs(a - n) <= allowed:
                return None
            return a, n, allowed, self.slopes.excuse(line, abs(a - n), which)
        every = range(len(self.wanted))
        name, mismatch = "all inputs together", difference(every)
        if mismatch is None:
            return
        for i in every:
            if alone := difference([i]):
                name, mismatch = self.names[i], alone
                break
        a, n, allowed, excuse = mismatch
        mistake, reading = excuse or (None, "no element of the sample differs; "
                                            "raise max_elements to find those that do")
        verdict = "cannot be checked" if excuse else "is wrong"
        raise self.failure(mistake, f"the gradient of {name} {verdict} along a random direction: "
                                    f"analytic {a:.9g}, numeric {n:.9g} (allowed difference {allowed:.1e})\n"
                                    f"  reading: {reading}")

    def zero_upstream(self, which):
        for name, gradient in zip(self.names, self.analytic(which, factor=0.0)[1]):
            bad = np.count_nonzero(to_numpy(gradient))
            if bad:
                raise self.failure("upstream not used",
                                   f"the gradient of {name} {gradient.shape} is not zero with zeros "
                                   f"upstream, at {bad} of {gradient.size} elements: "
                                   "each of its terms has the upstream gradient as a factor")

    # Failing

    def failure(self, mistake, text):
        return _error(mistake, f"{self.label}: {text}\n  seed {self.seed}")

    def refused(self, error):
        """The engine's own GradientError, with a reading."""
        mistake, reading = read_refusal(str(error))
        return _error(mistake, f"{error}\n  reading: {reading}\n  seed {self.seed}")

    def alone(self, which):
        return f" with only output {which[0]} used" if len(which) < len(self.shapes) else ""

    def mistake(self, i, a, n, wrong, allowed, which, also):
        """The error for input i: where, by how much, and what it looks like."""
        gaps = np.where(wrong, np.where(np.isfinite(a - n), np.abs(a - n), np.inf), -1)
        worst = int(gaps.argmax())
        position, shape = self.positions[i][worst], self.wanted[i].shape
        place = [int(k) for k in np.unravel_index(position, shape)]
        excuse = None
        if np.isfinite(gaps[worst]):
            excuse = self.slopes.excuse(self.line(i, position), gaps[worst], which)
        mistake, reading = excuse or read(self.evidence(i, a, n, allowed, which))
        verdict = "cannot be checked" if excuse else "is wrong"
        lines = [f"the gradient of {self.names[i]} {shape} {verdict}{self.alone(which)}: "
                 f"{wrong.sum()} of {len(a)} elements differ",
                 f"worst at {place}: analytic {a[worst]:.9g}, numeric {n[worst]:.9g} "
                 f"(allowed difference {allowed:.1e})",
                 f"reading: {reading}"]
        return self.failure(mistake, "\n  ".join(lines + [f"also wrong: {', '.join(also)}"] * bool(also)))

    def evidence(self, i, a, n, allowed, which):
        shape, at_zero = self.wanted[i].shape, self.analytic(which, factor=0.0)[1][i]
        full = len(a) == self.wanted[i].size
        others = {self.names[j]: self.numeric[j][:, which].sum(axis=1) for j, t in enumerate(self.wanted)
                  if full and j != i and t.shape == shape}

        @functools.cache
        def contributions():
            if len(a) * sum(math.prod(self.shapes[k]) for k in which) > JACOBIAN:
                return None
            lines = [self.line(i, p) for p in self.positions[i]]
            rows = [self.slopes.products(line, line[1], -line[1]) for line in lines]
            return [np.stack([row[k] for row in rows]) for k in which]
        at_zero = to_numpy(at_zero).reshape(-1)[self.positions[i]]
        return Evidence(shape, a, n, at_zero, allowed, full, self.sizes(), others, contributions)

    def sizes(self):
        """What a forgotten constant may be made of: {8: 'axis 3 of q'}."""
        names = {}
        shapes = [(name, t.shape) for name, t in zip(self.names, self.wanted)]
        shapes += [(f"output {k}", shape) for k, shape in enumerate(self.shapes)]
        for name, shape in shapes:
            for axis, size in enumerate(shape):
                names.setdefault(size, f"axis {axis} of {name}")
        for name, shape in shapes:
            names.setdefault(math.prod(shape), f"all of {name}")
        return {size: name for size, name in names.items() if size > 1}


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
