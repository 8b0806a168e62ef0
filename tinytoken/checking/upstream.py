"""Is a vjp linear in its upstream gradient, whatever that holds and however it lies in memory?

Finite differences have no digits for an upstream gradient with sizes from 10^-4 to 10^4. But vjp(v) + vjp(w)
is vjp(v + w), whatever v and w are, and that can be compared to the last digits.
"""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import device_of, to_device, to_numpy
from .passes import SAME, Passes, by_columns, strided

DECADES = 4  # a wide upstream gradient has sizes from 10^-4 to 10^4


def zero_upstream(passes: Passes) -> None:
    """With zeros upstream every gradient is exactly zero."""
    zeros = [0 * u for u in passes.upstream]
    for name, gradient in zip(passes.names, passes.gradients(upstream=zeros)[1]):
        bad = np.count_nonzero(to_numpy(gradient))
        if bad:
            raise passes.failure("upstream not used",
                                 f"the gradient of {name} {gradient.shape} is not zero with zeros "
                                 f"upstream, at {bad} of {gradient.size} elements: "
                                 "each of its terms has the upstream gradient as a factor")


def linear(passes: Passes, first: tuple[Any, Sequence[Any]], atol: float, rng: np.random.Generator) -> None:
    """The gradients for w and for u - w add up to those for u, which are in `first` (values, gradients).

    w is wide and has zeros; it is not contiguous, and neither are the inputs with it. u - w and its inputs
    lie by columns.
    """
    wide = [to_device(wide_upstream(u.shape, rng), device_of(u)) for u in passes.upstream]
    rest = [u - w for u, w in zip(passes.upstream, wide)]
    with passes.laid(by_columns):
        of_rest = passes.gradients(upstream=rest, lay=by_columns)[1]
    with passes.laid(strided):
        of_wide = passes.gradients(upstream=wide, lay=strided)[1]
    wrong = _not_the_sum(atol, first[1], of_wide, of_rest)
    if wrong is None:
        return
    passes.repeated(first)
    name, place = passes.names[wrong[0]], wrong[1]
    by_rows = [passes.gradients(upstream=part)[1] for part in (wide, rest)]
    if _not_the_sum(atol, first[1], *by_rows) is None:
        raise passes.failure("strides", f"the gradient of {name} is wrong at {place} where the inputs or the "
                                        "upstream gradient are not contiguous (transposed, sliced)\n"
                                        "  reading: order='K', a buffer, or writing through a reshape "
                                        "that then copies")
    raise passes.failure("not linear", f"the gradient of {name} is not linear in the upstream gradient, at "
                                       f"{place}: those for v and w do not add up to that for v + w. (w has "
                                       "large, small and zero elements.)\n"
                                       "  reading: a clip, a division by g, or a branch on its values")


def wide_upstream(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random signs, sizes evenly from 10^4 down to 10^-4 in a random order, and a zero for every fourth."""
    size = math.prod(shape)
    values = 10 ** np.linspace(DECADES, -DECADES, size) * rng.choice([-1.0, 1.0], size)
    values[2::4] = 0
    return rng.permutation(values).reshape(shape)


def _not_the_sum(atol, whole, *parts):
    """(input, place) where the parts' gradients do not add up to the whole's, up to rounding; else None."""
    for i, arrays in enumerate(zip(whole, *parts)):
        u, v, w = map(to_numpy, arrays)
        allowed = atol + SAME * max(np.abs(v).max(initial=0), np.abs(w).max(initial=0))
        with np.errstate(invalid="ignore"):
            wrong = np.argwhere(~(np.abs(v + w - u) <= allowed))
        if len(wrong):
            return i, wrong[0].tolist()
    return None
