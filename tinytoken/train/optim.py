"""AdamW on flat storage, and the learning-rate schedule."""
import math

import numpy as np

from .. import nn
from ..backend import array_module, blas_threads, faster
from ..errors import expect

# elements of a pass over the flat buffers: few enough that all its temporaries stay in the cache
BLOCK = 32768


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on the flat storage of `params`.

    lr times each parameter's lr_scale is its learning rate; weight_decay goes to parameters with decay set
    (matrices of linear layers). clip: the largest global gradient norm, or None. step(lr) applies what is in
    the gradients; they are not cleared. average: None, or a in the running mean of the weights, mean <- a
    mean + (1 - a) weights after each step, with a at most (1 + step) / (10 + step), so that it forgets where
    it started (Polyak & Juditsky 1992; the form usual for networks).
    """

    def __init__(self, params, lr=1e-3, *, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip=None,
                 average=None):
        expect(lr >= 0 and weight_decay >= 0 and eps > 0 and all(0 <= b < 1 for b in betas), "AdamW",
               f"lr {lr}, weight_decay {weight_decay}, betas {betas}, eps {eps}: "
               "not negative, eps positive, betas below 1 expected")
        expect(clip is None or clip > 0, "AdamW", f"clip {clip}, expected a positive norm or None")
        expect(average is None or 0 <= average < 1, "AdamW",
               f"average {average}, expected 0 <= average < 1 or None")
        self.params = list(params)
        self.flat = nn.flatten(self.params)
        self.lr, self.weight_decay, self.betas, self.eps, self.clip = lr, weight_decay, betas, eps, clip
        xp = array_module(self.flat.data)
        self.m, self.v, self.steps = xp.zeros_like(self.flat.data), xp.zeros_like(self.flat.data), 0
        self.rates = None  # of an implementation: what changes from step to step, in device memory
        self.average, self.mean = average, None if average is None else self.flat.data.copy()

    def step(self, lr=None):
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
        with blas_threads(1):  # more of them would sum in another order
            norm = clip_norm(flat.grad, math.inf if self.clip is None else self.clip)
        block = BLOCK if array_module(flat.data) is np else flat.data.size
        for start, stop, scale, decay in flat.segments:
            for a in range(start, stop, block):
                cut = slice(a, min(a + block, stop))
                self._update(flat.data[cut], flat.grad[cut], self.m[cut], self.v[cut], lr * scale,
                             self.weight_decay if decay else 0.0, corrections)
                if self.mean is not None:
                    change = flat.data[cut] - self.mean[cut]
                    change *= self.mean_share(self.steps)
                    self.mean[cut] += change
        return norm

    def corrections(self, t):
        """1 - beta^t at step t, from 1, for both betas: what the moments, which begin at 0, are too small
        by."""
        return [1 - beta ** t for beta in self.betas]

    def mean_share(self, t):
        """The share of the weights in their running mean at step t."""
        return 0.0 if self.mean is None else 1 - min(self.average, (1 + t) / (10 + t))

    def use_average(self):
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

    def state(self):
        """What a checkpoint needs: (arrays, steps)."""
        return {"m": self.m, "v": self.v} | ({} if self.mean is None else {"mean": self.mean}), self.steps

    def load_state(self, arrays, steps):
        """Continue from what state() gave."""
        moments, _ = self.state()
        expect(arrays.keys() == moments.keys(), "AdamW",
               f"arrays {', '.join(arrays)}, expected {', '.join(moments)}")
        for name, mine in moments.items():
            given = arrays[name]
            expect(given.shape == mine.shape and given.dtype == mine.dtype, "AdamW",
                   f"moments {name} {given.shape} {given.dtype}, expected {mine.shape} {mine.dtype}")
        for name, mine in moments.items():
            mine[...] = array_module(mine).asarray(arrays[name])
        self.steps = steps


def clip_norm(flat_grad, largest):
    """Scale the flat gradient down in place to at most the Euclidean norm `largest`; returns the norm before,
    a 0-d array on the gradient's device (it is not read here)."""
    xp = array_module(flat_grad)
    norm = xp.sqrt(flat_grad @ flat_grad)
    flat_grad *= xp.minimum(largest / (norm + 1e-12), 1.0)
    return norm


def warmup_cosine(step, steps, warmup=0.1):
    """The share of the peak learning rate at `step` of `steps`: linear from 0 over the first `warmup` share
    of the steps (the first step is not 0), then half a cosine down to 0 at the end."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
