"""gradcheck: is the gradient that backward() gives the slope that the forward pass has?

The slope is measured by central differences of the outputs, contracted with a random upstream gradient afterwards: the
differences of single outputs keep the digits that the difference of a sum would lose. `diagnosis.py` reads a mistake.
"""
import contextlib
import dataclasses
import functools
import inspect

import numpy as np

from . import diagnosis
from .backend import array_module, is_array, to_device, to_numpy
from .errors import GradientError, expect
from .tensor import Op, Tensor, grad, no_grad, op

SAME = 1e-10  # two calls agree to this share of the largest value: BLAS may add in another order
JACOBIAN = 2_000_000  # numbers that a diagnosis may ask for


@dataclasses.dataclass
class Checked:
    """One input: how many of its elements were compared, the largest |analytic - numeric|, and what was allowed there."""
    name: str
    shape: tuple
    elements: int
    size: int
    error: float = 0.0
    allowed: float = 0.0


@dataclasses.dataclass
class Report:
    """What a gradcheck that found nothing wrong looked at. `directions`: random directions over all inputs, taken if not
    every element was compared."""
    name: str
    inputs: list
    outputs: list
    seed: int
    directions: int = 0

    def __str__(self):
        lines = [f"{self.name}: gradients agree with finite differences (outputs {', '.join(map(str, self.outputs))}; seed {self.seed})"]
        for c in self.inputs:
            lines.append(f"  {c.name} {c.shape}: {c.elements} of {c.size} elements, largest error {c.error:.1e}, allowed {c.allowed:.1e}")
        if self.directions:
            lines.append(f"  and {self.directions} random directions over all inputs")
        return "\n".join(lines)


def gradcheck(fn, *inputs, wrt=None, eps=1e-6, rtol=1e-6, atol=1e-8, max_elements=512, seed=0, names=None):
    """Compare the gradients of fn(*inputs) with central differences. Returns a Report, or raises GradientError saying which
    input is wrong, where, by how much, and what kind of mistake fits (its attribute `kind` has that in a word).

    fn: gets Tensors, returns one or a tuple of them. inputs: float64 arrays or Tensors; integer ones and None are passed on
    unchecked. A Tensor (a model's Parameter) is perturbed in place and put back, so fn may ignore its arguments:
    gradcheck(lambda *p: loss(), *model.parameters()). wrt: positions or names of the inputs to check (None: all floats).
    Passes if |analytic - numeric| <= atol + rtol max |numeric|, the maximum over the input. More than max_elements elements
    in all: a seeded sample of that many, and two random directions. names: the inputs' names for the messages.

    A hard sample has no slope: check the soft path, then that the gradient of the hard output equals the soft one's.
    """
    tensors = [x if x is None or isinstance(x, Tensor) else Tensor(_own(x)) for x in inputs]
    names = _names(fn, len(tensors), names)
    wrt = _positions(wrt, tensors, names)
    with _borrowed([t for t in tensors if t is not None], [tensors[i] for i in wrt]):
        check = _Check(fn, tensors, names, wrt, (eps, rtol, atol), seed)
        return check.run(max_elements)


def _own(x):
    return x.copy() if is_array(x) else np.array(x)


def _names(fn, count, given):
    """The inputs' names: as given, as an op or function calls them, or 'input 0', 'input 1', ..."""
    expect(given is None or len(given) == count, "gradcheck", lambda: f"{len(given)} names for {count} inputs")
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
        expect(known, "gradcheck", lambda: f"wrt {w!r}, expected positions 0 to {len(tensors) - 1} or names ({', '.join(names)})")
    chosen = floats if wrt is None else [names.index(w) if isinstance(w, str) else w for w in wrt]
    chosen = [i for i in chosen if i in floats]
    expect(chosen, "gradcheck", "no float input to check: integers and None have no gradient")
    for i in floats:
        if tensors[i].dtype != np.float64:
            raise _error("dtype", f"gradcheck: {names[i]} {tensors[i].shape} is {tensors[i].dtype}, expected float64: finite differences "
                         f"need its digits. Cast it: x.astype('float64'), a model's p.data = p.data.astype('float64')")
    expect(len({id(tensors[i]) for i in chosen}) == len(chosen), "gradcheck", "the same Tensor is given twice: give it once")
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
    return bool(array_module(a).array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _same(a, b):
    if a.shape != b.shape:
        return False
    gap, scale = np.abs(to_numpy(a - b)), np.abs(to_numpy(a))
    return bool((gap <= SAME * scale.max(initial=0)).all())


@op
def _root(*outputs, upstream):
    """The end of the graph: hands each output the upstream gradient it is checked with. Its value is never read."""
    return array_module(*outputs).zeros(()), lambda g: upstream


class _Check:
    """One function at one point."""

    def __init__(self, fn, tensors, names, wrt, tolerances, seed):
        self.fn, self.tensors, self.seed = fn, tensors, seed
        self.names, self.wanted = [names[i] for i in wrt], [tensors[i] for i in wrt]
        self.eps, self.rtol, self.atol = tolerances
        self.label, self.rng = _label(fn), np.random.default_rng(seed)
        self.all_names, self.start = names, [None if t is None else t.data.copy() for t in tensors]

    def run(self, max_elements):
        outputs = self.forward()
        self.label = _label(self.fn, outputs)
        self.shapes = [o.shape for o in outputs]
        self.upstream = [to_device(np.asarray(self.rng.standard_normal(o.shape)), o.device) for o in outputs]
        everything = tuple(range(len(outputs)))
        self.reproducible(everything)
        self.positions = self.sample(max_elements)
        self.numeric = [self.differences(i) for i in range(len(self.wanted))]
        self.checked = [Checked(name, t.shape, len(p), t.size) for name, t, p in zip(self.names, self.wanted, self.positions)]
        # Each output alone first: it says more about a mistake than their sum. An unused output's gradient is None there.
        for which in ([(i,) for i in everything] if len(outputs) > 1 else []) + [everything]:
            self.compare(which)
        directions = 2 if any(c.elements < c.size for c in self.checked) else 0
        for _ in range(directions):
            self.compare_direction(everything)
        self.zero_upstream(everything)
        return Report(self.label, self.checked, self.shapes, self.seed, directions)

    # Running the function

    def forward(self):
        """The outputs, as a list of Tensors; that they are such, are float64 and finite, and that the inputs were left alone."""
        try:
            outputs = self.fn(*self.tensors)
        except GradientError as error:
            raise self.refused(error) from error
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        for i, o in enumerate(outputs):
            if not isinstance(o, Tensor):
                raise self.failure("type", f"output {i} is a {type(o).__name__}, expected a Tensor")
            if o.dtype != np.float64:
                raise self.failure("dtype", f"output {i} is {o.dtype}, expected float64 as the inputs are: cast what it is made of "
                                   "(weights, masks, constants) with .astype('float64')")
            if not np.isfinite(to_numpy(o.data)).all():
                raise self.failure("not finite", f"output {i} {o.shape} has NaN or infinite values at this point")
        self.inputs_unchanged("the forward pass")
        return outputs

    def values(self):
        """The outputs' arrays at the present inputs; copies, since an output may be a view of an input."""
        with no_grad():
            outputs = self.fn(*self.tensors)
        return [o.data.copy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    def analytic(self, which, factor=1.0):
        """(outputs' arrays, gradients of the wanted inputs) with the upstream gradients of the outputs in `which`."""
        outputs = self.forward()
        values = [o.data.copy() for o in outputs]
        upstream = [self.upstream[i] * factor for i in which]
        given = tuple(u.copy() for u in upstream)
        try:
            gradients = grad(_root(*(outputs[i] for i in which), upstream=given), self.wanted)
        except GradientError as error:
            raise self.refused(error) from error
        except Exception as error:
            raise self.failure("raised", f"the backward pass{self.alone(which)} raised {type(error).__name__}: {error}") from error
        self.inputs_unchanged("the backward pass")
        if not all(map(_equal, given, upstream)):
            raise self.failure("writes into the upstream gradient", "its vjp writes into the upstream gradient it is given, which others still need")
        if not all(_equal(o.data, v) for o, v in zip(outputs, values)):
            raise self.failure("writes into the output", "its vjp writes into the output of the forward pass")
        return values, gradients

    def inputs_unchanged(self, when):
        for name, t, start in zip(self.all_names, self.tensors, self.start):
            if t is not None and not _equal(t.data, start):
                raise self.failure("writes into an input", f"{when} changes its input {name} {t.shape}: an op never writes into its inputs")

    def reproducible(self, which):
        (values, gradients), (again, gradients_again) = self.analytic(which), self.analytic(which)
        if not all(map(_same, values, again)):
            raise self.failure("not deterministic", "a second call gives another output. Noise must be an argument, drawn once, outside")
        if not all(map(_same, gradients, gradients_again)):
            raise self.failure("not deterministic", "a second call gives the same output but another gradient")

    # Finite differences

    def sample(self, max_elements):
        """Flat positions to compare, per input: all while they are few, else max_elements shared out, small inputs first."""
        left, positions = max_elements, {}
        for count, i in zip(range(len(self.wanted), 0, -1), sorted(range(len(self.wanted)), key=lambda i: self.wanted[i].size)):
            size = self.wanted[i].size
            take = min(size, max(1, left // count))
            positions[i] = np.sort(self.rng.choice(size, take, replace=False)) if take < size else np.arange(size)
            left -= take
        return [positions[i] for i in range(len(self.wanted))]

    def differences(self, i):
        """The numeric slopes of input i: (elements compared, outputs)."""
        slopes = [self.slope(*self.along(i, position)) for position in self.positions[i]]
        return np.array(slopes).reshape(len(slopes), len(self.shapes))

    def along(self, i, position):
        """(go, h) for one element: go(t) sets it to x + t and returns the t that floating point made of it; h is the step."""
        data = self.wanted[i].data
        index = np.unravel_index(position, data.shape)
        start = float(data[index])

        def go(t):
            data[index] = start + t if t else start
            return (start + t) - start
        return go, self.eps * max(1, abs(start))

    def slope(self, go, h, contract=True):
        """(f(x + h) - f(x - h)) / 2h, contracted with the upstream gradient: one number per output, or the products themselves."""
        up, high = go(h), self.values()
        down, low = go(-h), self.values()
        go(0)
        products = [u * ((b - a) / (up - down)) for u, a, b in zip(self.upstream, low, high)]
        return np.array([float(p.sum()) for p in products]) if contract else [to_numpy(p) for p in products]

    # Comparing

    def compare(self, which):
        gradients = self.analytic(which)[1]
        for i, gradient in enumerate(gradients):
            a = to_numpy(gradient).reshape(-1)[self.positions[i]]
            n = self.numeric[i][:, which].sum(axis=1)
            allowed = self.atol + self.rtol * np.abs(n).max(initial=0)
            wrong = self.wrong(a, n, allowed, lambda k: self.along(i, self.positions[i][k]), which)
            if wrong.any():
                raise self.mistake(i, a, n, wrong, allowed, which)
            record = self.checked[i]
            error = float(np.abs(a - n).max(initial=0))
            if error * record.allowed >= record.error * allowed:
                record.error, record.allowed = error, allowed

    def wrong(self, a, n, allowed, along, which):
        """Which of the elements differ. Those that do are measured again with steps that shrink (into n), the worst first,
        until one stands: the plain difference may have lost its digits where a slope is steep or tiny."""
        wrong = ~(np.abs(a - n) <= allowed)
        for k in sorted(np.flatnonzero(wrong), key=lambda k: -abs(a[k] - n[k])):
            better, error = diagnosis.extrapolate(lambda h: self.slope(go, h)[list(which)].sum(), (go_h := along(k))[1]) if False else (None, None)
        return wrong
