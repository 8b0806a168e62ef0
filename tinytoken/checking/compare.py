"""A function's gradients beside its slopes: element by element, and along lines."""
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import to_device, to_numpy
from ..errors import GradientError
from .diagnosis import Evidence, read
from .differences import Line, Slopes, element_line, random_line
from .passes import Passes

JACOBIAN = 2_000_000  # a diagnosis computes a Jacobian of at most so many entries
AGAIN = 32  # of the elements that are suspicious by their own scale alone, so many are measured again
AWAY = 1e-3  # at the second point each input is nearer to 0, by at most this share of itself


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


class Comparison:
    """The gradients that `passes` makes, beside finite differences of its outputs.

    `which`, in the methods, lists the outputs with an upstream gradient. `positions` are the flat places that
    are compared, per input, `numeric` their slopes (elements, outputs), `checked` what was found.
    """

    def __init__(self, passes: Passes, tolerances: tuple[float, float, float], rng: np.random.Generator,
                 max_elements: int):
        self.passes, self.rng = passes, rng
        self.eps, self.rtol, self.atol = tolerances
        self.wanted, self.names = passes.wanted, passes.names
        self.every, self.every_input = list(range(len(passes.shapes))), list(range(len(passes.wanted)))
        self.slopes = Slopes(passes.values, passes.upstream, self.rtol)
        self.positions = self.sample(max_elements)
        self.numeric = [np.array([self.slopes.central(self.line(i, p))
                                  for p in self.positions[i]]).reshape(-1, len(self.every))
                        for i in self.every_input]
        self.checked = [Checked(name, t.shape, len(n), t.size, float(np.abs(n).max(initial=0)))
                        for name, t, n in zip(self.names, self.wanted, self.numeric)]

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

    def line(self, i: int, position: int) -> Line:
        return element_line(self.wanted[i].data, position, self.eps)

    # Element by element

    def elements(self, which: Sequence[int], gradients: Sequence[Any]) -> None:
        """Every input's gradient at the sampled elements, each by its own size."""
        mistakes = {}  # {the input's name: what makes its error}
        for i, gradient in enumerate(gradients):
            a, n = to_numpy(gradient).reshape(-1)[self.positions[i]], self.numeric[i][:, which].sum(axis=1)
            scale, gaps = np.abs(np.where(np.isfinite(n), n, a)), np.abs(a - n)
            tight = self.atol + self.rtol * scale
            loose = float(tight.max(initial=self.atol, where=np.isfinite(tight)))
            wrong = ~(gaps <= tight)  # a NaN is wrong
            again = np.count_nonzero(~(gaps <= loose)) + AGAIN
            for k in sorted(np.flatnonzero(wrong), key=lambda k: -gaps[k])[:again]:
                line = self.line(i, self.positions[i][k])
                n[k], right, step = self.slopes.settle(a[k], n[k], tight[k], loose, line, which)
                wrong[k] = not right
                if not right:  # one is enough: to settle the others too would take long
                    mistakes[self.names[i]] = functools.partial(
                        self.mistake, i, a, n, wrong, int(k), tight[k], loose, step, which)
                    break
            self.note(i, float(np.abs(a - n).max(initial=0)), loose)
        if mistakes:
            first, *also = mistakes
            raise mistakes[first](also)

    def note(self, i, error, allowed):
        """Keep, for the report, the error that is largest relative to what was allowed."""
        record = self.checked[i]
        if error * record.allowed >= record.error * allowed:
            record.error, record.allowed = error, allowed

    def mistake(self, i: int, a: np.ndarray, n: np.ndarray, wrong: np.ndarray, worst: int, tight: float,
                loose: float, step: float, which: Sequence[int], also: Sequence[str]) -> GradientError:
        """The error for input i: where, by how much, and what it looks like."""
        position, shape, gap = self.positions[i][worst], self.wanted[i].shape, abs(a[worst] - n[worst])
        place = [int(k) for k in np.unravel_index(position, shape)]
        excuse = None
        if np.isfinite(gap):
            excuse = self.slopes.excuse(self.line(i, position), gap, which, step)
        for k in np.flatnonzero(wrong)[:AGAIN]:  # a reading looks at all: those with few digits again
            line = self.line(i, self.positions[i][k])
            n[k] = self.slopes.settle(a[k], n[k], tight, loose, line, which)[0] if line.fine else n[k]
        if excuse or gap > loose or not np.isfinite(gap):
            mistake, reading = excuse or read(self.evidence(i, a, n, loose, which))
        else:
            mistake = "small elements"
            reading = ("right where the gradient is large, wrong where it is small: a branch, or a term that "
                       "matters only there")
        unknown = excuse or np.isfinite(a).all() and not np.isfinite(n[worst])
        verdict = "cannot be checked" if unknown else "is wrong"
        lines = [f"the gradient of {self.names[i]} {shape} {verdict}{self.passes.alone(which)}: "
                 f"{wrong.sum()} of {len(a)} elements differ",
                 f"worst at {place}: analytic {a[worst]:.9g}, numeric {n[worst]:.9g} "
                 f"(allowed difference {tight:.1e})",
                 f"reading: {reading}"] + [f"also wrong: {', '.join(also)}"] * bool(also)
        return self.passes.failure(mistake, "\n  ".join(lines))

    def evidence(self, i, a, n, allowed, which):
        shape, full = self.wanted[i].shape, len(a) == self.wanted[i].size
        at_zero = self.passes.gradients(which, [0 * u for u in self.passes.upstream])[1][i]
        others = {self.names[j]: self.numeric[j][:, which].sum(axis=1) for j, t in enumerate(self.wanted)
                  if full and j != i and t.shape == shape}

        @functools.cache
        def contributions():
            if len(a) * sum(math.prod(self.passes.shapes[k]) for k in which) > JACOBIAN:
                return None
            lines = [self.line(i, p) for p in self.positions[i]]
            rows = [self.slopes.products(line, line.step, -line.step) for line in lines]
            return [np.stack([row[k] for row in rows]) for k in which]
        at_zero = to_numpy(at_zero).reshape(-1)[self.positions[i]]
        return Evidence(shape, a, n, at_zero, allowed, full, self.sizes(), others, contributions)

    def sizes(self):
        """What a forgotten constant may be made of: {8: 'axis 3 of q'}."""
        names = {}
        shapes = [(name, t.shape) for name, t in zip(self.names, self.wanted)]
        shapes += [(f"output {k}", shape) for k, shape in enumerate(self.passes.shapes)]
        for name, shape in shapes:
            for axis, size in enumerate(shape):
                names.setdefault(size, f"axis {axis} of {name}")
        for name, shape in shapes:
            names.setdefault(math.prod(shape), f"all of {name}")
        return {size: name for size, name in names.items() if size > 1}

    # All inputs at once, along a line: shows errors in elements that were not sampled

    def directions(self, gradients: Sequence[Any]) -> None:
        """Two random directions, of which the second gives each element a like share of the slope.

        In the first a small gradient drowns beside a large one; in the second the elements with large
        gradients move less. Where that has no digits left, it says nothing.
        """
        sizes = [np.abs(to_numpy(g)) for g in gradients]
        slopes = np.concatenate([s[s > 0] for s in sizes])
        least = max(slopes.min(), 1e-6 * slopes.max()) if slopes.size else 1.0
        for shared in (False, True):
            direction = [self.rng.standard_normal(s.shape) for s in sizes]
            if shared:
                direction = [d * least / np.maximum(s, least) for d, s in zip(direction, sizes)]
            found = self.along(direction, gradients, shared)
            if found and not (shared and found[-1]):
                excuse = found[-1]
                mistake, reading = excuse or (None, "no element of the sample differs; "
                                                    "raise max_elements to find those that do")
                verdict = "cannot be checked" if excuse else "is wrong"
                raise self.wrong_along(mistake, found, verdict, reading)

    def along(self, direction: Sequence[np.ndarray], gradients: Sequence[Any], known: bool = False) -> Any:
        """(whose gradient, analytic, numeric, allowed, excuse) if they differ along the direction, else None.

        known: only a slope that is known well can differ. Where the direction has no slope, small inputs are
        moved less: it may have left the domain of a sqrt or log.
        """
        found = self.difference(self.every_input, direction, gradients, known)
        if found and found[-1]:
            direction = self.within_reach(direction)
            found = self.difference(self.every_input, direction, gradients, known)
        if not found:
            return None
        for i in self.every_input:
            if alone := self.difference([i], direction, gradients, known):
                return self.names[i], *alone
        return "all inputs together", *found

    def within_reach(self, direction):
        """The direction with each small input moving in proportion to itself, and so keeping its sign."""
        sizes = [np.abs(to_numpy(t.data)) for t in self.wanted]
        return [d * np.where(size == 0, 1, np.minimum(1, size)) for d, size in zip(direction, sizes)]

    def difference(self, chosen, direction, gradients, known):
        """(analytic, numeric, allowed, excuse) along the direction of the chosen inputs, or None."""
        products = [to_numpy(gradients[i]) * direction[i] for i in chosen]
        line = random_line([self.wanted[i].data for i in chosen], [direction[i] for i in chosen], self.eps)
        a, n = float(sum(p.sum() for p in products)), float(self.slopes.central(line).sum())
        tight = self.atol + self.rtol * max(math.sqrt(sum((p ** 2).sum() for p in products)), abs(n))
        loose = 1000 * tight if known else tight
        n, right, step = self.slopes.settle(a, n, tight, loose, line, self.every)
        if right or known and not step:
            return None
        return a, n, tight, self.slopes.excuse(line, abs(a - n), self.every, step)

    def nearby(self) -> None:
        """At a second point, along one direction: shows gradients that belong to an earlier call."""
        point = [t.data * (1 - AWAY * to_device(self.rng.random(t.shape), t.device)) for t in self.wanted]
        with self.passes.at(point):
            if not all(np.isfinite(to_numpy(v)).all() for v in self.passes.values()):
                return  # the inputs lie at the edge of the function's domain
            gradients = self.passes.gradients()[1]
            direction = self.within_reach([self.rng.standard_normal(t.shape) for t in self.wanted])
            found = self.along(direction, gradients, known=True)
        if found and not found[-1]:
            raise self.wrong_along("state", found, "is right at these inputs, but not after a small step",
                                   "is something kept from an earlier call: a cache, an array of the first "
                                   "inputs? Else it is wrong there")

    def wrong_along(self, mistake, found, verdict, reading):
        name, a, n, allowed, _ = found
        return self.passes.failure(mistake, f"the gradient of {name} {verdict} along a random direction: "
                                            f"analytic {a:.9g}, numeric {n:.9g} "
                                            f"(allowed difference {allowed:.1e})\n  reading: {reading}")
