"""Which mistake makes a gradient wrong in this way? Every reading is a guess that fits the numbers.

A reading looks at the Evidence and returns (mistake, text) or None; `read` takes the first that fits. To add
one, write it and put it into READINGS.
"""
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Reading: TypeAlias = tuple[str | None, str]  # (the mistake in a word, a sentence about it)


@dataclasses.dataclass
class Evidence:
    """One input whose gradient is wrong.

    `analytic`, `numeric` and `at_zero` (the analytic gradient with zeros upstream) are flat, of the elements
    that were compared. full: those are all elements. allowed: the difference that would have passed.
    """
    shape: tuple[int, ...]
    analytic: np.ndarray
    numeric: np.ndarray
    at_zero: np.ndarray
    allowed: float
    full: bool
    sizes: dict[int, str]  # what a factor may be made of: {8: "axis 3 of q"}
    others: dict[str, np.ndarray]  # {name of another input of the same shape: its numeric gradient}
    # () -> per output, upstream x slope (elements, *its shape); None if that is too large
    contributions: Callable[[], list[np.ndarray] | None]

    def near(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Equal for a reading: ten times looser than for the check."""
        return a.shape == b.shape and bool((np.abs(a - b) <= 10 * self.allowed).all())

    @property
    def wrong(self) -> np.ndarray:
        return ~(np.abs(self.analytic - self.numeric) <= self.allowed)


def read(evidence: Evidence) -> Reading:
    """(mistake, text) of the first reading that fits; (None, text) if none does."""
    for reading in READINGS:
        result = reading(evidence)
        if result:
            return result
    return None, ("no simple kind of mistake fits; a term may be missing. "
                  "Check the formula against the forward pass")


def not_finite(e: Evidence) -> Reading | None:
    if not np.isfinite(e.analytic).all():
        return "not finite", ("the analytic gradient has NaN or infinite values: "
                              "a division by 0, or an overflow")
    if not np.isfinite(e.numeric).all():
        return "not finite", ("a small step leads to NaN or infinite outputs: "
                              "the input lies at the edge of the function's domain")
    return None


def zeros(e: Evidence) -> Reading | None:
    if not e.analytic.any():
        return "zeros", ("zeros: the gradient is lost (None returned, a detached value, "
                         "or an array that nothing was written into)")
    return None


def flat(e: Evidence) -> Reading | None:
    if np.abs(e.numeric).max() <= e.allowed:
        return "flat", ("the output does not change with this input, so its gradient should be zero. "
                        "A hard or rounded value? Check the soft path by differences, "
                        "then that the hard output has its gradient")
    return None


def upstream_not_used(e: Evidence) -> Reading | None:
    if e.near(e.analytic, e.at_zero):
        return "upstream not used", ("the upstream gradient is not used: "
                                     "with zeros upstream nothing changes. Multiply by g")
    if np.abs(e.at_zero).max() > e.allowed:
        return "upstream not used", ("the upstream gradient is not used in one term: "
                                     "with zeros upstream the gradient is not zero")
    return None


def sign(e: Evidence) -> Reading | None:
    if e.near(e.analytic, -e.numeric):
        return "sign", "the sign: analytic is -1 x numeric"
    return None


def factor(e: Evidence) -> Reading | None:
    c = float(e.analytic @ e.numeric) / float(e.numeric @ e.numeric)
    if not e.near(e.analytic, c * e.numeric):
        return None
    names = _factor_names(abs(c), e.sizes)
    if names or (np.abs(e.numeric) > 100 * e.allowed).sum() > 1:  # a single value is always a multiple
        perhaps = f", perhaps {' or '.join(names)}" if names else ""
        return "factor", f"a constant factor: analytic is {c:.6g} x numeric{perhaps}"
    return None


def _factor_names(c, sizes):
    """['1/sqrt(8) (axis 3 of q)', ...]: how the factor could be made of the sizes at hand, or of 2."""
    forms = {"{}": 1, "1/{}": -1, "sqrt({})": 0.5, "1/sqrt({})": -0.5}
    fits = [f"{text.format(size)} ({name})" for text, power in forms.items() for size, name in sizes.items()
            if math.isclose(c, size ** power, rel_tol=1e-4)]
    return fits[:3] or [text.format(2) for text, power in forms.items()
                        if math.isclose(c, 2 ** power, rel_tol=1e-4)]


def swapped(e: Evidence) -> Reading | None:
    for name, numeric in e.others.items():
        if e.near(e.analytic, numeric):
            return "swapped", (f"swapped: this is the gradient of {name}. "
                               "The entries of the vjp go in the order of the arguments")
    return None


def transposed(e: Evidence) -> Reading | None:
    if not e.full or len(e.shape) > 5:
        return None
    for axes in itertools.permutations(range(len(e.shape))):
        moved = e.analytic.reshape([e.shape[i] for i in axes]).transpose(np.argsort(axes))
        if e.near(moved.reshape(-1), e.numeric):
            return "transposed", ("transposed: analytic has the numeric values with the axes in the order "
                                  f"{axes} (a transpose missing, or a reshape in place of one?)")
    return None


def permuted(e: Evidence) -> Reading | None:
    if not e.full:
        return None
    a, n = e.analytic.reshape(e.shape), e.numeric.reshape(e.shape)
    for axis in range(len(e.shape)):
        if _same_rows(e, *(np.moveaxis(x, axis, 0).reshape(e.shape[axis], -1) for x in (a, n))):
            return "permuted", f"rows permuted: along axis {axis} the slices are right but in another order"
    if e.near(np.sort(e.analytic), np.sort(e.numeric)):
        return "permuted", ("permuted: the values are right but in other places "
                            "(heads or patches put together in another order?)")
    return None


def _same_rows(e, a, n):
    """Equal as sets of rows, which are compared in the order of their products with a fixed vector."""
    along = np.cos(np.arange(a.shape[1]) ** 1.5)
    return e.near(a[np.argsort(a @ along)], n[np.argsort(n @ along)])


def not_summed(e: Evidence) -> Reading | None:
    """An input that was repeated along an axis gets the sum over that axis.

    The mistakes: one place of the axis only, or the sum over other axes.
    """
    for output, c in enumerate(e.contributions() or ()):
        for axis in range(1, c.ndim):
            slices = np.moveaxis(c, axis, -1).reshape(len(c), -1, c.shape[axis]).sum(axis=1)
            for place in range(c.shape[axis]) if c.shape[axis] > 1 else ():
                if e.near(slices[:, place], e.analytic):
                    return "not summed", (f"not summed over a broadcast axis: only place {place} "
                                          f"of axis {axis - 1} of output {output} is in it")
            everything = c.sum(axis=(0, *(i for i in range(1, c.ndim) if i != axis)))
            if math.prod(e.shape) == max(e.shape, default=0) and e.near(everything, e.analytic):
                return "not summed", (f"summed over the wrong axes: axis {axis - 1} of output {output} "
                                      "is left, not this input's")
    return None


def duplicates(e: Evidence) -> Reading | None:
    """Elements that are used once are right; the others have the gradient of one of their uses."""
    contributions = None if e.wrong.all() else e.contributions()
    if not contributions:
        return None
    parts = np.concatenate([c.reshape(len(c), -1) for c in contributions], axis=1)
    for part, a in zip(parts[e.wrong], e.analytic[e.wrong]):
        part = part[np.abs(part) > e.allowed]
        if len(part) < 2 or np.abs(part - a).min() > 10 * e.allowed:
            return None
    return "duplicates", ("duplicates not added: an element that is used more than once has the gradient of "
                          "one use. `out[rows] = g` and `out[rows] += g` overwrite; use scatter_add")


def offset(e: Evidence) -> Reading | None:
    if not e.full:
        return None
    gap = (e.analytic - e.numeric).reshape(e.shape)
    for axis in range(len(e.shape)):
        if e.shape[axis] > 1 and np.ptp(gap, axis=axis).max() <= 10 * e.allowed:
            return "offset", (f"off by the same number all along axis {axis}: "
                              "a mean or a sum over it is missing, or one too many")
    return None


READINGS = (not_finite, zeros, sign, swapped, flat, upstream_not_used, factor, transposed, permuted,
            not_summed, duplicates, offset)


def read_refusal(message: str) -> Reading:
    """(mistake, text) for a gradient that the engine itself refused, from its message."""
    if "entries for" in message:
        return "entries", ("one entry per array argument, in the order of the signature; "
                           "None where there is no gradient")
    if re.search("returned (bool|u?int)", message):
        return "dtype", "the upstream gradient is not used: a mask alone is no gradient. Multiply by g"
    if "NumPy scalar" in message:
        return "dtype", ("constants are Python floats: math.sqrt(2), not np.sqrt(2); "
                         "zeros are made like x: np.zeros_like(x)")
    shapes = re.search(r"returned shape \(([\d, ]*)\) for .*?, which is \(([\d, ]*)\)", message)
    if not shapes:
        return "type", "each entry is an array of its input's shape, None, or a function that returns one"
    returned, shape = ([int(n) for n in sizes.split(",") if n.strip()] for sizes in shapes.groups())
    if sorted(returned) == sorted(shape):
        return "transposed", "transposed: the same sizes in another order"
    rest = iter(returned)
    if len(returned) > len(shape) and all(n in rest for n in shape):  # a subsequence
        return "not summed", ("not summed over a broadcast axis: "
                              "the extra axes are those along which this input was repeated")
    if math.prod(returned) == math.prod(shape):
        return "shape", "the values may be right: reshape them to the input's shape"
    return "shape", ("a gradient has its input's shape: "
                     "was an axis summed away (keepdims), or not brought back?")


def read_crash(error: Exception) -> str:
    """A sentence about an exception that a vjp raised."""
    if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error):
        return "the upstream gradient of an output that nothing used is None: the vjp has to allow for it"
    if isinstance(error, ValueError):
        return "shapes that do not fit: is a transpose missing, or are two factors in the wrong order?"
    return "the vjp fails by itself: call it with an array like the output"
