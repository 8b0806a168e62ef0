"""A training step as one CUDA graph. The models here are small, so a GPU waits for the host to launch the next kernel; a graph is
launched once, with all its kernels.

A graph repeats what was captured: the same kernels on the same addresses with the same numbers. So whatever changes from step to
step lies in device memory that is written before each launch: the batch and its noise, and AdamW's rates. Its temporaries live in a
memory pool of its own, which nothing else uses.
"""
import contextlib
import gc
import warnings

from ..backend import module_for
from . import gemm, mixed, registered

WARM_UP = 2  # ordinary steps before the capture: they compile the kernels, time the products and fill the pool


class CapturedStep:
    """step(arrays, lr) -> (loss, parts, norm), 0-d arrays: gradients(arrays) -> (loss, parts), and AdamW's update. The first calls are
    ordinary steps; then the step is captured, and from there on replayed, with the same bits. Where that fails, or for arrays of
    other shapes, steps go on being ordinary ones, after one warning that says why."""

    def __init__(self, gradients, optimizer):
        cupy = module_for("cuda")
        self.gradients, self.optimizer, self.calls, self.graph, self.failed = gradients, optimizer, 0, None, False
        self.stream, self.pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        self.given = self.names = self.values = None
        self.weights = mixed.Weights(optimizer.flat) if gemm.current_precision() == "bf16" else None

    def __call__(self, arrays, lr):
        cupy = module_for("cuda")
        self.given = self.given or [cupy.empty_like(array) for array in arrays]
        fits = [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in self.given]
        if fits:
            for mine, array in zip(self.given, arrays):
                mine[...] = array
        registered.set_rates(self.optimizer, lr)
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
        loss, *parts, norm = values.copy()  # the next launch writes over them
        return loss, dict(zip(self.names, parts)), norm

    def _run(self, arrays):
        """What is captured -> loss, parts and norm in one array."""
        with self.weights.in_use() if self.weights else contextlib.nullcontext():
            loss, parts = self.gradients(arrays)
        norm = registered.update(self.optimizer)
        self.names = tuple(parts)
        return module_for("cuda").stack([loss, *parts.values(), norm])

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
        warnings.warn(f"a training step could not be captured ({type(error).__name__}: {error}): every kernel is launched by itself",
                      stacklevel=3)
