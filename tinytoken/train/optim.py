"""AdamW on flat storage, and the learning-rate schedule."""
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import nn
from ..backend import Array, array_module, blas_threads, faster
from ..errors import expect

BLOCK = 32768  # elements of a pass over the flat buffers: so few that all its temporaries stay in the cache


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on the flat storage of `params`.

    A parameter's learning rate is lr times its lr_scale; for its first frozen_steps steps it is 0, while the
    moments gather already, as in DynamicViT's official training. weight_decay acts on parameters with decay
    set (matrices of linear layers). clip: the largest global gradient norm, or None. step(lr) applies the
    gradients as they are; it does not clear them.

    average: None, or the a of a running mean of the weights (Polyak & Juditsky 1992; the form usual for
    networks): mean <- a mean + (1 - a) weights after each step. a is at most (1 + step) / (10 + step), so
    that the mean forgets where it started.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, *, weight_decay: float = 0.05,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, clip: float | None = None,
                 average: float | None = None) -> None:
        expect(lr >= 0 and weight_decay >= 0 and eps > 0 and all(0 <= b < 1 for b in betas), "AdamW",
               f"lr {lr}, weight_decay {weight_decay}, betas {betas}, eps {eps}: "
               "not negative, eps positive, betas below 1 expected")
        expect(clip is None or clip > 0, "AdamW", f"clip {clip}, expected a positive norm or None")
        expect(average is None or 0 <= average < 1, "AdamW",
               f"average {average}, expected 0 <= average < 1 or None")
        self.params = list(params)
        self.flat = nn.flatten(self.params)
        self.lr, self.weight_decay = lr, weight_decay
        self.betas, self.eps = betas, eps
        self.clip, self.average = clip, average
        xp = array_module(self.flat.data)
        self.m, self.v = xp.zeros_like(self.flat.data), xp.zeros_like(self.flat.data)
        self.mean = None if average is None else self.flat.data.copy()
        self.steps = 0
        self.rates: Any = None  # for an implementation: what changes from step to step, in device memory

    def step(self, lr: float | None = None) -> Array:
        """One update with learning rate lr (default: the optimiser's). Returns the gradient's norm before
        clipping, a 0-d array."""
        expect(self.flat.holds(self.params), "AdamW",
               "a parameter's array, group or place changed since the optimiser was made "
               "(another dtype or device, a copy, another optimiser): make a new optimiser")
        lr = self.lr if lr is None else lr
        flat, fast = self.flat, faster(AdamW.step, array_module(self.flat.data), self, lr)
        if fast:
            return fast(self, lr)
        self.steps += 1
        corrections = self.corrections(self.steps)
        with blas_threads(1):  # more threads would sum in another order
            norm = clip_norm(flat.grad, math.inf if self.clip is None else self.clip)
        block = BLOCK if array_module(flat.data) is np else flat.data.size
        for start, stop, scale, decay, frozen in flat.segments:
            rate = lr * scale if self.steps > frozen else 0.0
            for a in range(start, stop, block):
                cut = slice(a, min(a + block, stop))
                self._update(flat.data[cut], flat.grad[cut], self.m[cut], self.v[cut], rate,
                             self.weight_decay if decay else 0.0, corrections)
                if self.mean is not None:
                    change = flat.data[cut] - self.mean[cut]
                    change *= self.mean_share(self.steps)
                    self.mean[cut] += change
        return norm

    def corrections(self, t: int) -> list[float]:
        """1 - beta^t for both betas at step t, from 1: the factors by which the moments, which begin at 0,
        are too small."""
        return [1 - beta ** t for beta in self.betas]

    def mean_share(self, t: int) -> float:
        """The share of the weights in their running mean at step t."""
        return 0.0 if self.average is None else 1 - min(self.average, (1 + t) / (10 + t))

    def use_average(self) -> None:
        """Put the running mean in the weights' place."""
        expect(self.mean is not None, "AdamW", "no average was asked for: AdamW(..., average=0.999)")
        self.flat.data[...] = self.mean

    def _update(self, w, g, m, v, lr, decay, corrections):
        b1, b2 = self.betas
        change = g - m
        change *= 1 - b1
        m += change  # m = b1 m + (1 - b1) g
        change = g * g
        change -= v
        change *= 1 - b2
        v += change
        size = v / corrections[1]
        size **= 0.5
        size += self.eps
        change = m / size
        change *= lr / corrections[0]
        if decay:
            w *= 1 - lr * decay
        w -= change

    @property
    def moments(self) -> dict[str, Array]:
        """Its arrays, laid out as the flat storage: m, v, and the running mean if there is one."""
        return {"m": self.m, "v": self.v} | ({} if self.mean is None else {"mean": self.mean})

    def state(self) -> tuple[dict[str, Array], int]:
        """What a checkpoint needs: (copies of the moments, steps)."""
        return {name: self.flat.by_rows(array) for name, array in self.moments.items()}, self.steps

    def load_state(self, arrays: dict[str, np.ndarray], steps: int) -> None:
        """Continue from what state() returned."""
        moments = self.moments
        expect(arrays.keys() == moments.keys(), "AdamW",
               f"arrays {', '.join(arrays)}, expected {', '.join(moments)}")
        for name, mine in moments.items():
            new = arrays[name]
            expect(new.shape == mine.shape and new.dtype == mine.dtype, "AdamW",
                   f"moments {name} {new.shape} {new.dtype}, expected {mine.shape} {mine.dtype}")
        for name, mine in moments.items():
            self.flat.take_rows(mine, arrays[name])
        self.steps = steps


def clip_norm(flat_grad: Array, largest: float) -> Array:
    """Scale the flat gradient down, in place, to at most the Euclidean norm `largest`.

    Returns the norm before, a 0-d array on the gradient's device: to read it here would wait for that."""
    xp = array_module(flat_grad)
    norm = xp.sqrt(flat_grad @ flat_grad)
    flat_grad *= xp.minimum(largest / (norm + 1e-12), 1.0)
    return norm


def warmup_cosine(step: int, steps: int, warmup: float = 0.1) -> float:
    """The learning rate at `step` of `steps`, as a share of its peak.

    It rises linearly over the first `warmup` share of the steps (the first step is not 0), then falls as half
    a cosine to 0 at the end."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
