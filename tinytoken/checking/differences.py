"""Slopes by finite differences, with which gradcheck compares a gradient.

The outputs are subtracted element by element, and only then contracted with the upstream gradient: so the
small differences keep the digits that the difference of two large sums would lose.
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, device_of, to_device, to_numpy

UNIT = 2.0 ** -52  # of rounding, in float64
LARGEST = 12  # extrapolation starts at 2^12 times the last of its steps
SAFETY = 10  # an extrapolated slope may be off by this many times its estimated error


class Line(NamedTuple):
    """A line through the point.

    go(t) moves the inputs by t along it, in place, and returns the t that rounding makes of it; go(0) puts
    them back. step: the step to take. fine: the last and smallest of the steps to take where that one is too
    long, 0 where there is no shorter length to go by.
    """
    go: Callable[[float], float]
    step: float
    fine: float = 0.0


def element_line(array: Array, position: int, eps: float) -> Line:
    """The line along one element x of `array`, at its flat position.

    The step is eps max(1, |x|). The fine steps of a small x stay between 0 and 2x, since sqrt, log or 1 / x
    end or bend at 0: the longest is |x| / 2.
    """
    index = np.unravel_index(position, array.shape)
    start = float(array[index])

    def go(t):
        array[index] = start + t if t else start
        return (start + t) - start
    step, fine = eps * max(1, abs(start)), abs(start) / 2 ** (LARGEST + 1)
    return Line(go, step, fine if fine < step else 0.0)


def random_line(arrays: Sequence[Array], direction: Sequence[np.ndarray], eps: float) -> Line:
    """The line that moves all `arrays` at once along the arrays in `direction`. The step is eps."""
    starts = [array.copy() for array in arrays]

    def go(t):
        for array, start, d in zip(arrays, starts, direction):
            array[...] = start + t * to_device(d, device_of(array)) if t else start
        return t
    return Line(go, eps)


class Slopes:
    """Slopes of a function's outputs, each contracted with its upstream gradient.

    values() returns the outputs' arrays at the present inputs; upstream: an array per output. rtol: what a
    slope may be off, as a share of itself. `which`, in the methods, lists the outputs that count.
    """

    def __init__(self, values: Callable[[], list[Array]], upstream: Sequence[Array], rtol: float = 0.0):
        self.values, self.upstream, self.rtol = values, upstream, rtol

    def products(self, line: Line, high: float, low: float) -> list[np.ndarray]:
        """Per output, upstream * (f(x + high) - f(x + low)) / (high - low), elementwise.

        Not finite where a step leaves the function's domain. The caller reports that, so NumPy's warnings are
        off.
        """
        go = line.go
        with np.errstate(all="ignore"):
            top, above = go(high), self.values()
            bottom, below = go(low), self.values()
            go(0)
            return [to_numpy(u * ((b - a) / (top - bottom))) for u, a, b in zip(self.upstream, below, above)]

    def central(self, line: Line, scale: float = 1.0) -> np.ndarray:
        """The slope of each output, by a central difference of `scale` times the line's step."""
        h = scale * line.step
        return np.array([p.sum() for p in self.products(line, h, -h)])

    def sided(self, line: Line, scale: float, which: Sequence[int]) -> float:
        """The slope to the right (scale > 0) or left of the point."""
        products = self.products(line, scale * line.step, 0)
        return float(sum(products[i].sum() for i in which))

    def sizes(self) -> list[np.ndarray]:
        """|upstream * output|, per output: what rounding is proportional to."""
        return [abs(to_numpy(u * v)) for u, v in zip(self.upstream, self.values())]

    def rounding(self, which: Sequence[int]) -> float:
        """The error that rounding may make in a difference of outputs; divided by the step, in a slope."""
        sizes = self.sizes()
        return UNIT * sum(float(sizes[i].sum()) for i in which)

    def extrapolated(self, line: Line, which: Any, last: float = 0.0) -> tuple[float, float]:
        """(slope at step 0, its estimated error), from steps of 4096 h, 2048 h, ... h. Ridders 1982.

        last: h; 0 takes the line's step.
        """
        last, sizes = last or line.step, self.sizes()
        if last < line.step:
            # an output that does not move with a long step either does not depend on this; long, since one
            # that is large beside its slope moves by less than its rounding
            far = 2.0 ** (2 * LARGEST) * line.step
            sizes = [size * (p != 0) for size, p in zip(sizes, self.products(line, far, -far))]
        row: list[float] = []
        before: list[float] = []
        best, error, moved, still = float("nan"), float("inf"), 0.0, 0.0
        for k in range(LARGEST, -1, -1):
            h = last * 2.0 ** k
            products = self.products(line, h, -h)
            new = [float(sum(products[i].sum() for i in which))]
            if not row and np.isfinite(new[0]):
                # an output that does not move with the longest step adds no rounding at the shorter ones
                moved = UNIT * sum(float(sizes[i][products[i] != 0].sum()) for i in which)
                still = UNIT * sum(float(sizes[i][products[i] == 0].sum()) for i in which) / h
            for j, old in enumerate(row):
                new.append(new[j] + (new[j] - old) / (4 ** (j + 1) - 1))
                change = max(abs(new[j + 1] - new[j]), abs(new[j + 1] - old))
                estimate = change + moved / h + still
                if estimate < error:  # false for NaN, from a step that was too large
                    best, error = new[j + 1], estimate
            before, row = row[:1], new if np.isfinite(new[0]) else []
        # Steps that reach beyond a pole agree too. But the last plain difference is near the slope, by about
        # what halving the step changed.
        if before and row and abs(best - row[0]) > SAFETY * (abs(row[0] - before[0]) + moved / last + still):
            error = max(error, abs(best - row[0]))
        return best, error

    def settle(self, analytic: float, numeric: float, tight: float, loose: float, line: Line,
               which: Any) -> tuple[float, bool, float]:
        """(the numeric slope to judge by, whether the analytic one agrees, the step that measured it well).

        Within `tight` they agree. Where a plain difference says otherwise, the slope is measured again by
        extrapolation, since a difference loses its digits where a slope bends sharply or is small beside its
        outputs. That value counts if its estimated error is within `loose`: they then have to agree within
        `tight` and that error, several times over, and within `loose`. (Near a pole the slope is far larger
        than the plain differences, from which `loose` comes: then `rtol` of the value itself.) If it never
        is, the step is 0, and the plain difference decides by `loose`.
        """
        if abs(analytic - numeric) <= tight:
            return numeric, True, line.step
        slope, step = numeric, 0.0
        for last in (line.step, line.fine)[:1 + bool(line.fine)]:
            value, error = self.extrapolated(line, which, last)
            room = max(loose, self.rtol * abs(value))
            if error <= room:
                slope, step = value, last
                if abs(analytic - slope) <= min(room, tight + SAFETY * error):
                    return slope, True, step
        if not step and abs(analytic - numeric) <= self.rounding(which) / line.step:
            # only rounding stands between them, and longer steps have more digits
            value, error = self.extrapolated(line, which, 2.0 ** LARGEST * line.step)
            if error <= loose and abs(analytic - value) <= min(loose, tight + SAFETY * error):
                return value, True, line.step
        return slope, not step and abs(analytic - slope) <= loose, step

    def excuse(self, line: Line, gap: float, which: Any, step: float) -> tuple[str, str] | None:
        """(reason, sentence) where a gap of this size need not be a mistake in the gradient, else None.

        The reason is rounding, or that there is no slope here: the steps h/2, h and 2h disagree, or the
        slopes to the left and right do, and stay apart as the step shrinks. step: h, the one that measured
        the slope well; 0 if none did.
        """
        if not step and gap <= self.rounding(which) / line.step:
            return "rounding", ("the difference drowns in rounding: "
                                "the outputs are large beside their slopes. Take a larger eps")
        line = line._replace(step=step or line.step)
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
