"""Slopes by finite differences: the numbers that gradcheck holds a gradient against.

The outputs are subtracted element by element, and the small differences contracted with the upstream gradient
afterwards: they keep the digits that the difference of two large sums would lose.
"""
import numpy as np

from ..backend import device_of, to_device, to_numpy


def element_line(array, position, eps):
    """The line along one element of `array` (its flat position): (go, h). go(t) sets it to x + t, in place,
    and returns the t that rounding made of it; go(0) puts it back. h is the step to take, eps max(1, |x|)."""
    index = np.unravel_index(position, array.shape)
    start = float(array[index])

    def go(t):
        array[index] = start + t if t else start
        return (start + t) - start
    return go, eps * max(1, abs(start))


def random_line(arrays, direction, eps):
    """The line that moves all `arrays` at once along the arrays in `direction`."""
    starts = [array.copy() for array in arrays]

    def go(t):
        for array, start, d in zip(arrays, starts, direction):
            array[...] = start + t * to_device(d, device_of(array)) if t else start
        return t
    return go, eps


class Slopes:
    """Slopes of a function's outputs, each contracted with its upstream gradient. values() gives the outputs'
    arrays at the inputs as they are now, `upstream` an array per output. `which` lists the outputs that
    count."""

    def __init__(self, values, upstream):
        self.values, self.upstream = values, upstream

    def products(self, line, high, low):
        """Per output, upstream * (f(x + high) - f(x + low)) / (high - low), elementwise. Not finite where a
        step leaves the function's domain: then the caller says so, and no warning does."""
        go = line[0]
        with np.errstate(all="ignore"):
            top, above = go(high), self.values()
            bottom, below = go(low), self.values()
            go(0)
            return [to_numpy(u * ((b - a) / (top - bottom))) for u, a, b in zip(self.upstream, below, above)]

    def central(self, line, scale=1.0):
        """The slope of each output, by a central difference of `scale` times the line's step."""
        h = scale * line[1]
        return np.array([p.sum() for p in self.products(line, h, -h)])

    def sided(self, line, scale, which):
        """The slope to the right (scale > 0) or left of the point."""
        products = self.products(line, scale * line[1], 0)
        return float(sum(products[i].sum() for i in which))

    def rounding(self, which):
        """What rounding the outputs may do to a difference of them; over the step, what it may do to a
        slope."""
        values = self.values()
        return 2.0 ** -52 * sum(float(abs(self.upstream[i] * values[i]).sum()) for i in which)

    def extrapolated(self, line, which):
        """(slope at step 0, its estimated error), from steps of 4096 h, 2048 h, ... h. Ridders 1982."""
        row, best, error, rounding = [], float("nan"), float("inf"), self.rounding(which)
        for k in range(12, -1, -1):
            new = [float(self.central(line, 2.0 ** k)[which].sum())]
            for j, old in enumerate(row):
                new.append(new[j] + (new[j] - old) / (4 ** (j + 1) - 1))
                estimate = max(abs(new[j + 1] - new[j]),
                               abs(new[j + 1] - old)) + rounding / (line[1] * 2.0 ** k)
                if estimate < error:  # NaN, from a step that was too large, is not
                    best, error = new[j + 1], estimate
            row = new
        return best, error

    def settle(self, analytic, numeric, allowed, line, which):
        """The numeric slope to judge by. A plain difference that disagrees is measured again by
        extrapolation, since it loses its digits where a slope bends sharply or is small beside its outputs;
        the better value counts if it is sure of itself."""
        if abs(analytic - numeric) <= allowed:
            return numeric
        value, error = self.extrapolated(line, which)
        return value if error <= allowed else numeric

    def excuse(self, line, gap, which):
        """(kind, sentence) if a gap of this size may be nobody's mistake, else None. No slope: the steps h/2,
        h and 2h disagree, or the slopes to the left and right do and stay apart as the step shrinks."""
        if gap <= self.rounding(which) / line[1]:
            return "rounding", "the difference drowns in rounding: the outputs are large beside their slopes. Take a larger eps"
        central = [float(self.central(line, scale)[which].sum()) for scale in (0.5, 1, 2)]
        (left, right), (closer_left, closer_right) = ([self.sided(line, s * side, which) for side in (-1, 1)]
                                                      for s in (1, 0.5))
        apart, closer = abs(right - left), abs(closer_right - closer_left)
        if np.ptp(central) <= 0.1 * gap and not closer > max(0.75 * apart, 0.1 * gap):
            return None
        steps = ", ".join(f"{c:.4g}" for c in central)
        return "not differentiable", (f"not differentiable here: steps of eps/2, eps and 2 eps give {steps}; "
                                      f"to the left "
                                      f"{left:.4g}, to the right {right:.4g}. Move the input off the kink (a "
                                      f"tie, a hard "
                                      "decision), or take a smaller eps")
