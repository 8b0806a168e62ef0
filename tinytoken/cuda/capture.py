"""A training step, or a forward pass, as one CUDA graph. The models here are small, so a GPU waits for the
host to launch the next kernel; a graph is launched once, with all its kernels.

A graph repeats what was captured: the same kernels on the same addresses with the same numbers. So whatever
changes from step to step lies in device memory: what it is given is copied there before each launch. Its
temporaries live in a memory pool of its own, which nothing else uses.
"""
import gc
import warnings

import numpy as np

from ..backend import module_for
from ..errors import InputError
from ..train.inference import repeated
from ..train.step import stepper
from . import fallback, launcher, registered
from .fallback import implementation
from .weights import Weights

WARM_UP = 2  # ordinary steps before the capture: they compile kernels, time products and fill the pool


class Captured:
    """captured(arrays) -> what function(arrays) gives, one array. The first calls are ordinary ones; then the
    call is captured, and from there on replayed, with the same bits. Where that fails, or for arrays of other
    shapes, calls go on being ordinary ones, after one warning that says why. Weights that do not change are
    rounded once (weights.Weights)."""

    def __init__(self, function, what="a call"):
        cupy = module_for("cuda")
        self.function, self.what, self.weights = function, what, Weights()
        self.stream, self.pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        self.calls, self.graph, self.failed, self.inputs, self.values = 0, None, False, None, None

    def __call__(self, arrays):
        cupy = module_for("cuda")
        self.inputs = self.inputs or [cupy.empty_like(array) for array in arrays]
        fits = [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in self.inputs]
        if fits:
            for mine, array in zip(self.inputs, arrays):
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
                values = self._ordinary(self.inputs if fits else arrays)
        outside.wait_event(self.stream.record())
        self.calls += 1
        return values.copy()  # the next launch writes over them

    def _ordinary(self, arrays):
        with self.weights.in_use():
            return self.function(arrays)

    def _capture(self):
        gc.collect()
        gc.disable()  # an object of CUDA's that dies meanwhile would end the capture
        error = None
        self.stream.begin_capture()
        try:
            self.values = self._ordinary(self.inputs)
        except Exception as raised:
            error = raised
        finally:
            try:
                graph = self.stream.end_capture()
            except Exception as raised:  # after an error inside it fails as well: the first says why
                error = error or raised
            gc.enable()
        if error is None:
            self.graph = graph
            return
        self.failed = True
        warnings.warn(f"{self.what} could not be captured ({type(error).__name__}: {error}): every kernel is "
                      "launched by itself", stacklevel=4)


@implementation(repeated)
def captured(function, xp, what):
    """train.inference.repeated: the function, captured."""
    return Captured(function, what)


@implementation(stepper)
class CapturedSteps:
    """train.step.stepper: take(step) -> (loss, parts, norm), a whole training step captured, from the
    pictures on; steps come one after another. Whatever differs between them follows from the step's number,
    which lies in device memory and is counted on there: the crop, the noise, and AdamW's rates, a row of a
    table each. The host hands over the numbers of the batch's pictures, and nothing else.

    What cannot be drawn by a number in device memory (batches that are no data.Batches, noise that looks at
    the number) is drawn outside of the graph. work.rates: of all steps, of which optimizer.steps are done."""

    def __init__(self, work):
        xp, optimizer = module_for("cuda"), work.optimizer
        self.work, self.parts, self.done = work, (), optimizer.steps
        self.clock = xp.full(1, work.offset + self.done, "uint32")
        rates = enumerate(work.rates[self.done:], self.done + 1)
        rows = [registered.rates_of(optimizer, lr, t) for t, lr in rates]
        self.rates = xp.asarray(np.array(rows, "float32"))
        self.batches_inside, self.draws_inside = hasattr(work.batches, "make"), self._drawn_there()
        self.draws = ()  # names of what is drawn outside
        self.instead = None  # what takes the steps once the kernels are off
        self.replay, self.weights = Captured(self.compute, "a training step"), Weights(optimizer.flat)

    def _drawn_there(self):
        try:
            self.work.noise(1, self.clock)
        except InputError:
            return False
        return True

    def __call__(self, step):
        if not self.instead:
            inputs, before = self.inputs(self.work.offset + step), self.work.optimizer.steps
            self.work.optimizer.steps += 1
            try:
                loss, *parts, norm = self.replay(inputs)
                return loss, dict(zip(self.parts, parts)), norm
            except Exception:
                if fallback.state.off is None:
                    raise
                # what cannot run does not begin: the weights are those before the step
                self.work.optimizer.steps, self.instead = before, stepper(self.work)
        return self.instead(step)

    def inputs(self, number):
        """What the host hands over for the step of this number."""
        batches = self.work.batches
        inputs = [batches.chosen(number)] if self.batches_inside else list(batches(number))
        if self.draws_inside:
            return inputs
        draws = self.work.noise(len(inputs[0]), number)
        self.draws = tuple(draws)
        return [*inputs, *draws.values()]

    def compute(self, inputs):
        """The step: batch, draws, gradients, update; and one is added to the number."""
        work, arrays = self.work, inputs[:len(inputs) - len(self.draws)]
        draws = dict(zip(self.draws, inputs[len(arrays):]))
        if self.batches_inside:
            arrays = work.batches.make(*arrays, self.clock)
        if self.draws_inside:
            draws = work.noise(len(arrays[0]), self.clock)
        arrays, draws, share = work.mine(arrays, draws)
        with self.weights.in_use():
            loss, parts = work.gradients(arrays, draws, len(arrays[0]), share=share)
        launcher.launch("count_step", 1, 32, self.clock)
        # last, so that a step that fails has moved no weight
        norm = registered.update(work.optimizer, self.rates, self.clock, work.offset + self.done + 1)
        self.parts = tuple(parts)
        return module_for("cuda").stack([loss, *parts.values(), norm])
