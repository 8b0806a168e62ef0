"""A training step, or a forward pass, as one CUDA graph. The models here are small, so a GPU waits for the host to launch the next
kernel; a graph is launched once, with all its kernels.

A graph repeats what was captured: the same kernels on the same addresses with the same numbers. So whatever changes from step to
step lies in device memory that is written before each launch: the batch and its noise, and AdamW's rates. Its temporaries live in a
memory pool of its own, which nothing else uses.
"""
import gc
import warnings

from ..backend import module_for
from . import registered
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
        loss, *parts, norm = self.run(arrays)
        return loss, dict(zip(self.names, parts)), norm

    def _run(self, arrays):
        with self.weights.in_use():
            loss, parts = self.gradients(arrays)
        norm = registered.update(self.optimizer)
        self.names = tuple(parts)
        return module_for("cuda").stack([loss, *parts.values(), norm])
