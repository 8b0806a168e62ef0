"""A training step, or a forward pass, as one CUDA graph. The models here are small, so a GPU waits for the host to launch the next
kernel; a graph is launched once, with all its kernels.

A graph repeats what was captured: the same kernels on the same addresses with the same numbers. So whatever changes from step to
step lies in device memory: what it is given is copied there before each launch. Its temporaries live in a memory pool of its own, which
nothing else uses.
"""
import gc
import warnings

import numpy as np

from ..backend import module_for
from ..errors import InputError
from . import launcher, registered
from .weights import Weights

WARM_UP = 2  # ordinary steps before the capture: they compile the kernels, time the products and fill the pool


class Captured:
    """captured(arrays) -> what function(arrays) gives, one array. The first calls are ordinary ones; then the call is captured, and
    from there on replayed, with the same bits. Where that fails, or for arrays of other shapes, calls go on being ordinary ones,
    after one warning that says why. Weights that do not change are rounded once (weights.Weights)."""

    def __init__(self, function, what="a call"):
        cupy = module_for("cuda")
        self.function, self.what, self.weights = function, what, Weights()
        self.stream, self.pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        self.calls, self.graph, self.failed, self.given, self.values = 0, None, False, None, None

    def __call__(self, arrays):
        cupy = module_for("cuda")
        self.given = self.given or [cupy.empty_like(array) for array in arrays]
        fits = [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in self.given]
        if fits:
            for mine, array in zip(self.given, arrays):
                mine[...] = array
        outside = cupy.cuda.get_current_stream()
        self.stream.wait_event(outside.record())
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            if fits and self.graph is None and self.calls >= WARM_UP and not self.failed:
                self._capture()
            if fits and self.graph is not None:
                self.graph.launch()
                values = self.values
            else:
                values = self._run(self.given if fits else arrays)
        outside.wait_event(self.stream.record())
        self.calls += 1
        return values.copy()  # the next launch writes over them

    def _run(self, arrays):
        with self.weights.in_use():
            return self.function(arrays)

    def _capture(self):
        gc.collect()
        gc.disable()  # an object of CUDA's that dies meanwhile would end the capture
        error = None
        self.stream.begin_capture()
        try:
            self.values = self._run(self.given)
        except Exception as found:
            error = found
        finally:
            try:
                graph = self.stream.end_capture()
            except Exception as found:  # after an error inside it fails as well: the first says why
                error = error or found
            gc.enable()
        if error is None:
            self.graph = graph
            return
        self.failed = True
        warnings.warn(f"{self.what} could not be captured ({type(error).__name__}: {error}): every kernel is launched by itself",
                      stacklevel=4)


class CapturedStep:
    """step(arrays, lr) -> (loss, parts, norm), 0-d arrays: gradients(arrays) -> (loss, parts), and AdamW's update; captured."""

    def __init__(self, gradients, optimizer):
        self.gradients, self.optimizer, self.names = gradients, optimizer, ()
        self.run, self.weights = Captured(self._run, "a training step"), Weights(optimizer.flat)

    def __call__(self, arrays, lr):
        registered.set_rates(self.optimizer, lr)
        return self._named(self.run(arrays))

    def _named(self, values):
        loss, *parts, norm = values
        return loss, dict(zip(self.names, parts)), norm

    def _run(self, arrays):
        with self.weights.in_use():
            loss, parts = self.gradients(arrays)
        norm = self._update()
        self.names = tuple(parts)
        return module_for("cuda").stack([loss, *parts.values(), norm])

    def _update(self):
        return registered.update(self.optimizer)


class CapturedRun(CapturedStep):
    """take(step) -> (loss, parts, norm): a whole training step of fit, from the pictures on, captured; steps come one after another.
    Whatever differs between them follows from the step's number, which lies in device memory and is counted on there: the crop, the noise,
    and AdamW's rates, a row of a table each. The host hands over the numbers of the batch's pictures, and nothing else.

    noise(size, number), batches(number): of fit. What cannot be drawn by a number in device memory (batches that are no data.Batches,
    noise that looks at the number) is drawn outside of the graph. rates: the learning rates of all steps, of which optimizer.steps are
    done; offset: a step's number is this much more than its place among them."""

    def __init__(self, gradients, optimizer, batches, noise, rates, offset):
        super().__init__(gradients, optimizer)
        xp, done = module_for("cuda"), optimizer.steps
        self.batches, self.noise, self.offset, self.begin = batches, noise, offset, offset + done
        self.clock = xp.full(1, self.begin, "uint32")
        rows = [registered.rates_of(optimizer, lr, t) for t, lr in enumerate(rates[done:], done + 1)]
        self.rates = xp.asarray(np.array(rows, "float32"))
        self.makes, self.draws = hasattr(batches, "make"), self._drawn_there(noise)

    def _drawn_there(self, noise):
        try:
            noise(1, self.clock)
        except InputError:
            return False
        return True

    def __call__(self, step):
        number = self.offset + step
        given = (self.batches.chosen(number),) if self.makes else self.batches(number)
        self.optimizer.steps += 1
        return self._named(self.run(given if self.draws else (*given, *self.noise(len(given[0]), number))))

    def _run(self, given):
        if self.makes:
            chosen, *drawn = given
            given = (*self.batches.make(chosen, self.clock), *drawn)
        values = super()._run((*given, *self.noise(len(given[0]), self.clock)) if self.draws else given)
        launcher.launch("count_step", 1, 32, self.clock)
        return values

    def _update(self):
        return registered.update(self.optimizer, self.rates, self.clock, self.begin)
