"""Slopes by finite differences, with which gradcheck compares a gradient.

The outputs are subtracted element by element, and only then contracted with the upstream gradient: so the
small differences keep the digits that the difference of two large sums would lose.
"""
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..backend import Array, device_of, to_device, to_numpy

# (go, h): go(t) moves the inputs by t along the line, in place, and returns the t that rounding makes of it;
# go(0) puts them back. h is the step to take.
Line: TypeAlias = tuple[Callable[[float], float], float]


def element_line(array: Array, position: int, eps: float) -> Line:
    """The line along one element x of `array`, at its flat position. The step is eps max(1, |x|)."""
    index = np.unravel_index(position, array.shape)
    start = float(array[index])

    def go(t):
        array[index] = start + t if t else start
        return (start + t) - start
    return go, eps * max(1, abs(start))


def random_line(arrays: Sequence[Array], direction: Sequence[np.ndarray], eps: float) -> Line:
    """The line that moves all `arrays` at once along the arrays in `direction`. The step is eps."""
    starts = [array.copy() for array in arrays]

    def go(t):
        for array, start, d in zip(arrays, starts, direction):
            array[...] = start + t * to_device(d, device_of(array)) if t else start
        return t
    return go, eps


class Slopes:
    """Slopes of a function's outputs, each contracted with its upstream gradient.

    values() returns the outputs' arrays at the present inputs; upstream: an array per output. `which`, in the
    methods, lists the outputs that count.
    """

    def __init__(self, values: Callable[[], list[Array]], upstream: Sequence[Array]):
        self.values, self.upstream = values, upstream

    def products(self, line: Line, high: float, low: float) -> list[np.ndarray]:
        """Per output, upstream * (f(x + high) - f(x + low)) / (high - low), elementwise.

        Not finite where a step leaves the function's domain. The caller reports that, so NumPy's warnings are
        off.
        """
        go = line[0]
        with np.errstate(all="ignore"):
            top, above = go(high), self.values()
            bottom, below = go(low), self.values()
            go(0)
            return [to_numpy(u * ((b - a) / (top - bottom))) for u, a, b in zip(self.upstream, below, above)]

    def central(self, line: Line, scale: float = 1.0) -> np.ndarray:
        """The slope of each output, by a central difference of `scale` times the line's step."""
        h = scale * line[1]
        return np.array([p.sum() for p in self.products(line, h, -h)])

    def sided(self, line: Line, scale: float, which: Sequence[int]) -> float:
        """The slope to the right (scale > 0) or left of the point."""
        products = self.products(line, scale * line[1], 0)
        return float(sum(products[i].sum() for i in which))

    def rounding(self, which: Sequence[int]) -> float:
        """The error that rounding may make in a difference of outputs; divided by the step, in a slope."""
        values = self.values()
        return 2.0 ** -52 * sum(float(abs(self.upstream[i] * values[i]).sum()) for i in which)

    def extrapolated(self, line: Line, which: Any) -> tuple[float, float]:
        """(slope at step 0, its estimated error), from steps of 4096 h, 2048 h, ... h. Ridders 1982."""
        row: list[float] = []
        best, error = float("nan"), float("inf")
        rounding = self.rounding(which)
        for k in range(12, -1, -1):
            new = [float(self.central(line, 2.0 ** k)[which].sum())]
            for j, old in enumerate(row):
                new.append(new[j] + (new[j] - old) / (4 ** (j + 1) - 1))
                change = max(abs(new[j + 1] - new[j]), abs(new[j + 1] - old))
                estimate = change + rounding / (line[1] * 2.0 ** k)
                if estimate < error:  # false for NaN, from a step that was too large
                    best, error = new[j + 1], estimate
            row = new
        return best, error

    def settle(self, analytic: float, numeric: float, allowed: float, line: Line, which: Any) -> float:
        """The numeric slope to judge by.

        Where a plain difference disagrees with the analytic slope, it is measured again by extrapolation: it
        loses its digits where a slope bends sharply or is small beside its outputs. The extrapolated value
        counts if its estimated error is within what is allowed.
        """
        if abs(analytic - numeric) <= allowed:
            return numeric
        value, error = self.extrapolated(line, which)
        return value if error <= allowed else numeric

    def excuse(self, line: Line, gap: float, which: Any) -> tuple[str, str] | None:
        """(reason, sentence) where a gap of this size need not be a mistake in the gradient, else None.

        The reason is rounding, or that there is no slope here: the steps h/2, h and 2h disagree, or the
        slopes to the left and right do, and stay apart as the step shrinks.
        """
        if gap <= self.rounding(which) / line[1]:
            return "rounding", ("the difference drowns in rounding: "
                                "the outputs are large beside their slopes. Take a larger eps")
        central = [float(self.central(line, scale)[which].sum()) for scale in (0.5, 1, 2)]
        left, right = (self.sided(line, side, which) for side in (-1, 1))
        closer_left, closer_right = (self.sided(line, 0.5 * side, which) for side in (-1, 1))
        apart, closer = abs(right - left), abs(closer_right - closer_left)
        if np.ptp(central) <= 0.1 * gap and not closer > max(0.75 * apart, 0.1 * gap):
            return None
        steps = ", ".join(f"{slope:.4g}" for slope in central)
        return "not differentiable", (f"not differentiable here: steps of eps/2, eps and 2 eps give {steps}; "
                                      f"to the left {left:.4g}, to the right {right:.4g}. Move the input off "
                                      "the kink (a tie, a hard decision), or take a smaller eps")
