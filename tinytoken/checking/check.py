"""gradcheck: is the gradient that backward() gives the slope that the forward pass has?

`differences.py` measures the slope, `diagnosis.py` reads what kind of mistake a wrong gradient looks like.
"""
import contextlib
import dataclasses
import functools
import inspect
import math

import numpy as np

from ..backend import array_module, is_array, to_device, to_numpy
from ..errors import GradientError, expect
from ..tensor import Op, Tensor, grad, no_grad, op
from .diagnosis import Evidence, read, read_crash, read_refusal
from .differences import Slopes, element_line, random_line

SAME = 1e-10  # two calls agree to this share of the largest value: a threaded BLAS may add in another order
JACOBIAN = 2_000_000  # numbers that a diagnosis may ask for
# a stream of our own: inputs drawn from default_rng(seed) must not come back as the upstream gradient
STREAM = 0x67726164


@dataclasses.dataclass
class Checked:
    """One input: how many of its elements were compared, their largest slope, and the largest |analytic -
    numeric| beside what was allowed for it."""
    name: str
    shape: tuple
    elements: int
    size: int
    slope: float
    error: float = 0.0
    allowed: float = 0.0

    def __str__(self):
        return (f"{self.name} {self.shape}: {self.elements} of {self.size} elements, largest error "
                f"{self.error:.1e}, "
                f"allowed {self.allowed:.1e}" + ("" if self.slope else "; the outputs do not change with it"))


@dataclasses.dataclass
class Report:
    """What a gradcheck that found nothing wrong looked at. outputs: their shapes. directions: how many random
    directions over all inputs, taken if not every element was compared."""
    name: str
    inputs: list
    outputs: list
    seed: int
    directions: int

    def __str__(self):
        outputs = ", ".join(map(str, self.outputs))
        lines = [f"{self.name}: gradients agree with finite differences (output {outputs}; seed {self.seed})", *self.inputs]
        lines += [f"{self.directions} random directions over all inputs"] if self.directions else []
        return "\n  ".join(map(str, lines))


def gradcheck(fn, *inputs, wrt=None, eps=1e-6, rtol=1e-6, atol=1e-8, max_elements=512, seed=0, names=None):
    """Compare the gradients of fn(*inputs) with central differences. Returns a Report, or raises
    GradientError saying which input is wrong, where, by how much, and what kind of mistake fits (in a word:
    its attribute `kind`).

    fn: gets Tensors, returns one or a tuple of them. inputs: float64 arrays or Tensors; integer ones and None
    are passed on unchecked. A Tensor (a model's Parameter) is perturbed in place and put back, so fn may
    ignore its arguments: gradcheck(lambda *p: loss(), *model.parameters()). wrt: positions or names of the
    inputs to check (None: all floats). Passes if |analytic - numeric| <= atol + rtol max |numeric|, the
    maximum over the input. More than max_elements elements in all: a seeded sample of that many, and two
    random directions. names: of the inputs, for the messages.

    A hard sample has no slope: check the soft path, then that the gradient of the hard output equals the soft
    one's.
    """
    expect(inputs, "gradcheck", "no inputs to check")
    expect(eps > 0 and rtol >= 0 and atol >= 0 and max_elements >= 1, "gradcheck",
           lambda: f"eps {eps}, rtol {rtol}, atol {atol}, max_elements {max_elements}: expected positive ones")
    tensors = [x if x is None or isinstance(x, Tensor) else Tensor(x.copy() if is_array(x) else np.array(x))
               for x in inputs]
    names = _names(fn, len(tensors), names)
    wrt = _positions(wrt, tensors, names)
    with _borrowed([t for t in tensors if t is not None], [tensors[i] for i in wrt]):
        return _Check(fn, tensors, names, wrt, (eps, rtol, atol), seed).run(max_elements)


def _names(fn, count, given):
    """The inputs' names: as given, as an op or function calls them, or 'input 0', 'input 1', ..."""
    expect(given is None or len(given) == count, "gradcheck",
           lambda: f"{len(given)} names for {count} inputs")
    if given is not None:
        return list(given)
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
            raise _error("dtype", f"gradcheck: {names[i]} {tensors[i].shape} is {tensors[i].dtype}, expected "
                                  f"float64: finite "
                         "differences need its digits. Cast it: x.astype('float64'), a model's p.data = "
                         "p.data.astype('float64')")
    expect(len({id(tensors[i]) for i in chosen}) == len(chosen), "gradcheck",
           "one Tensor is given twice: give it once")
    return chosen


def _error(kind, text):
    error = GradientError(text)
    error.kind = kind
    return error


@contextlib.contextmanager
def _borrowed(tensors, wanted):
    """Whatever happens inside, the tensors come back as they were."""
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
    """Equal but for the order of sums."""
    if _equal(a, b):
        return True
    a, b = to_numpy(a), to_numpy(b)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=SAME * np.abs(np.nan_to_num(a)).max(),
                                              equal_nan=True)


@op
def _root(*outputs, upstream):
    """The end of the graph: hands each output the upstream gradient it is checked with. Its value is never
    read."""
    return array_module(*outputs).zeros(()), lambda g: upstream


class _Check:
    """One function at one point. `wanted` are the tensors to check; `which` lists the outputs that have an
    upstream gradient."""

    def __init__(self, fn, tensors, names, wrt, tolerances, seed):
        self.fn, self.tensors, self.all_names, self.seed = fn, tensors, names, seed
        self.names, self.wanted = [names[i] for i in wrt], [tensors[i] for i in wrt]
        self.eps, self.rtol, self.atol = tolerances
        self.label, self.rng = _label(fn), np.random.default_rng([seed, STREAM])
        self.start = [None if t is None else t.data.copy() for t in tensors]

    def run(self, max_elements):
        outputs = self.forward()
        self.label, self.shapes = _label(self.fn, outputs), [o.shape for o in outputs]
        # Never ones: the sum of a softmax does not depend on its input, nor that of moved tokens on where
        # they went.
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
        # Each output alone first, since that says more about a mistake. What reaches the others is None then.
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
        """The outputs as a list; that they are finite float64 Tensors, and that the inputs were left
        alone."""
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
                                            f"cast what it is made of "
                                   "(weights, masks, constants) with .astype('float64')")
            if not np.isfinite(to_numpy(o.data)).all():
                raise self.failure("not finite", f"output {i} {o.shape} has NaN or infinite values at this "
                                                 f"point")
        self.inputs_unchanged("the forward pass")
        return outputs

    def values(self):
        """The outputs' arrays at the inputs as they are now; copies, since an output may be a view of an
        input."""
        with no_grad():
            outputs = self.fn(*self.tensors)
        return [o.data.copy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    def analytic(self, which, factor=1.0):
        """(the outputs' arrays, the gradients of the wanted tensors)."""
        outputs = self.forward()
        values = [o.data.copy() for o in outputs]
        upstream = [self.upstream[i] * factor for i in which]
        given = tuple(u.copy() for u in upstream)
        try:
            gradients = grad(_root(*(outputs[i] for i in which), upstream=given), self.wanted)
        except GradientError as error:
            raise self.refused(error) from error
        except Exception as error:
            raise self.failure("raised", f"the backward pass{self.alone(which)} raised "
                                         f"{type(error).__name__}: {error}\n"
                               f"  reading: {read_crash(error)}") from error
        self.inputs_unchanged("the backward pass")
        if not all(map(_equal, given, upstream)):
            raise self.failure("writes", "its vjp writes into the upstream gradient it is given, which "
                                         "others still need")
        if not all(_equal(o.data, v) for o, v in zip(outputs, values)):
            raise self.failure("writes", "its vjp writes into the output of the forward pass")
        return values, gradients

    def inputs_unchanged(self, when):
        for name, t, start in zip(self.all_names, self.tensors, self.start):
            if t is not None and not _equal(t.data, start):
                raise self.failure("writes", f"{when} writes into {name} {t.shape}: an op never writes into "
                                             f"its inputs")

    def reproducible(self, which):
        """The gradients, if a second call gives the same."""
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
        """Flat positions to compare, per input: all while they are few, else max_elements shared out, small
        inputs first."""
        left, positions = max_elements, [None] * len(self.wanted)
        for rank, i in enumerate(sorted(range(len(self.wanted)), key=lambda i: self.wanted[i].size)):
            size = self.wanted[i].size
            take = min(size, max(1, left // (len(self.wanted) - rank)))
            positions[i] = np.sort(self.rng.choice(size, take, replace=False)) if take < size else np.arange(size)
            left -= take
        return positions

    def line(self, i, position):
        return element_line(self.wanted[i].data, position, self.eps)

    def compare(self, which, gradients):
        """Every input's gradient, at the sampled elements."""
        found = []
        for i, gradient in enumerate(gradients):
            a, n = to_numpy(gradient).reshape(-1)[self.positions[i]], self.numeric[i][:, which].sum(axis=1)
            allowed = self.atol + self.rtol * float(np.abs(n[np.isfinite(n)]).max(initial=0))
            wrong = ~(np.abs(a - n) <= allowed)
            for k in sorted(np.flatnonzero(wrong), key=lambda k: -abs(a[k] - n[k])):
                n[k] = self.slopes.settle(a[k], n[k], allowed, self.line(i, self.positions[i][k]), which)
                wrong[k] = not abs(a[k] - n[k]) <= allowed
                if wrong[k]:  # the others are not worth their time
                    found.append((i, a, n, wrong, allowed))
                    break
            self.note(i, float(np.abs(a - n).max(initial=0)), allowed)
        if found:
            raise self.mistake(*found[0], which, also=[self.names[i] for i, *_ in found[1:]])

    def note(self, i, error, allowed):
        """For the report: the error that came closest to what was allowed."""
        record = self.checked[i]
        if error * record.allowed >= record.error * allowed:
            record.error, record.allowed = error, allowed

    def compare_direction(self, which, gradients):
        """All inputs at once along a random direction: shows an error in an element that was not sampled."""
        gradients = [to_numpy(g) for g in gradients]
        direction = [self.rng.standard_normal(g.shape) for g in gradients]
        parts = [float((g * d).sum()) for g, d in zip(gradients, direction)]
        spread = math.sqrt(sum(((g * d) ** 2).sum() for g, d in zip(gradients, direction)))

        def differs(chosen):
            line = random_line([self.wanted[i].data for i in chosen], [direction[i] for i in chosen],
                               self.eps)
            a, n = sum(parts[i] for i in chosen), float(self.slopes.central(line)[which].sum())
            allowed = self.atol + self.rtol * max(spread, abs(n))
            n = self.slopes.settle(a, n, allowed, line, which)
            return None if abs(a - n) <= allowed else (a, n, allowed,
                                                       self.slopes.excuse(line, abs(a - n), which))
        every = range(len(self.wanted))
        found = differs(every)
        if not found:
            return
        guilty, found = next(((self.names[i], part) for i in every if (part := differs([i]))),
                             ("all inputs together", found))
        a, n, allowed, excuse = found
        kind, reading = excuse or (None, "no element of the sample differs; raise max_elements to find those "
                                         "that do")
        verdict = "cannot be checked" if excuse else "is wrong"
        raise self.failure(kind, f"the gradient of {guilty} {verdict} along a random direction: analytic "
                                 f"{a:.9g}, "
                           f"numeric {n:.9g} (allowed difference {allowed:.1e})\n  reading: {reading}")

    def zero_upstream(self, which):
        for name, gradient in zip(self.names, self.analytic(which, factor=0.0)[1]):
            bad = np.count_nonzero(to_numpy(gradient))
            if bad:
                raise self.failure("upstream not used",
                                   f"the gradient of {name} {gradient.shape} is not zero with zeros "
                                   f"upstream, at {bad} of {gradient.size} elements: each of its terms has "
                                   f"the upstream gradient "
                                   "as a factor")

    # Failing

    def failure(self, kind, text):
        return _error(kind, f"{self.label}: {text}\n  seed {self.seed}")

    def refused(self, error):
        """What the engine refused, with a reading."""
        kind, reading = read_refusal(str(error))
        return _error(kind, f"{error}\n  reading: {reading}\n  seed {self.seed}")

    def alone(self, which):
        return f" with only output {which[0]} used" if len(which) < len(self.shapes) else ""

    def mistake(self, i, a, n, wrong, allowed, which, also):
        """The error for input i: where, by how much, and what it looks like."""
        gaps = np.where(wrong, np.where(np.isfinite(a - n), np.abs(a - n), np.inf), -1)
        worst = int(gaps.argmax())
        position, shape = self.positions[i][worst], self.wanted[i].shape
        place = [int(k) for k in np.unravel_index(position, shape)]
        excuse = self.slopes.excuse(self.line(i, position), gaps[worst],
                                    which) if np.isfinite(gaps[worst]) else None
        kind, reading = excuse or read(self.evidence(i, a, n, allowed, which))
        verdict = f"{'cannot be checked' if excuse else 'is wrong'}{self.alone(which)}: {wrong.sum()} of {len(a)} elements differ"
        lines = [f"the gradient of {self.names[i]} {shape} {verdict}",
                 f"worst at {place}: analytic {a[worst]:.9g}, numeric {n[worst]:.9g} (allowed difference "
                 f"{allowed:.1e})",
                 f"reading: {reading}"]
        return self.failure(kind, "\n  ".join(lines + [f"also wrong: {', '.join(also)}"] * bool(also)))

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
        found = {}
        shapes = [(name, t.shape) for name, t in zip(self.names, self.wanted)]
        shapes += [(f"output {k}", shape) for k, shape in enumerate(self.shapes)]
        for name, shape in shapes:
            for axis, size in enumerate(shape):
                found.setdefault(size, f"axis {axis} of {name}")
        for name, shape in shapes:
            found.setdefault(math.prod(shape), f"all of {name}")
        return {size: what for size, what in found.items() if size > 1}


def _label(fn, outputs=()):
    """What to call fn: the op's or function's name; a lambda around one op has the op's."""
    fn = getattr(fn, "func", fn)  # of a functools.partial
    if isinstance(fn, Op):
        return fn.name
    name = getattr(fn, "__name__", type(fn).__name__)
    nodes = {o.node for o in outputs} - {None}
    if name != "<lambda>" or not nodes:
        return name
    last = ", ".join(sorted({node.op.name for node in nodes}))
    return f"a lambda that ends in {last}" if any(node.parents() for node in nodes) else last
