"""All CPU parallelism: `loss_and_grads` and `share_out` share the cores out, and nothing else does."""
import concurrent.futures

import numpy as np

from .. import nn
from ..backend import array_module, blas_threads, cpu_count, prepare_cpu, quick_switches
from ..errors import expect
from ..tensor import Tensor, grad


def loss_and_grads(loss_fn, params, batch, micro=16, threads=None, draws=None):
    """Loss and gradients of a batch -> (loss, parts), floats; the gradients are left in .grad (flat storage),
    overwritten. On CuPy 0-d arrays: reading them would wait for the GPU.

    batch: a tuple of arrays, cut along axis 0 into micro-batches of `micro` images; draws: {name: array} of
    what was drawn for it, cut likewise. loss_fn(*slice, **draws) is a mean over the slice's images, a Tensor
    or (Tensor, parts): it is weighted by the slice's share. threads: Python threads that share the
    micro-batches, by number (thread i takes i, i + threads, ...), each with a gradient buffer of its own,
    added up in a fixed order: the same thread count gives the same bits. None: the CPUs of this process. BLAS
    is held to one thread inside. On CuPy the batch is one slice on one thread.
    """
    params, draws = list(params), draws or {}
    flat = nn.flatten(params)
    size = _batch_size((*batch, *draws.values()))
    if array_module(flat.data) is not np:
        micro, threads = size, 1
    expect(micro >= 1 and (threads is None or threads >= 1), "loss_and_grads",
           f"micro {micro}, threads {threads}: at least 1 each expected")
    cuts = [slice(a, min(a + micro, size)) for a in range(0, size, micro)]
    threads = min(threads or cpu_count(), len(cuts))

    def work(number):
        buffer = flat.grad if number == 0 else np.empty_like(flat.grad)
        buffer[...] = 0
        views, results = flat.cut(buffer), []
        for cut in cuts[number::threads]:
            share = (cut.stop - cut.start) / size
            out = loss_fn(*(array[cut] for array in batch),
                          **{name: array[cut] for name, array in draws.items()})
            loss, parts = out if isinstance(out, tuple) else (out, {})
            expect(isinstance(loss, Tensor) and loss.shape == (), "loss_and_grads",
                   "loss_fn must return a scalar Tensor, or one and its parts")
            results.append([array * share for array in (loss.data, *(_raw(p) for p in parts.values()))])
            grad(loss * share, params, into=views, add=True)
        return buffer, results, tuple(parts)

    done = share_out(work, range(threads), threads)
    for buffer, _, _ in done[1:]:
        flat.grad += buffer
    totals = [sum(values) for values in zip(*(row for _, results, _ in done for row in results))]
    loss, *parts = totals if array_module(flat.data) is not np else map(float, totals)
    return loss, dict(zip(done[0][2], parts))


def _raw(value):
    return value.data if isinstance(value, Tensor) else value


def _batch_size(batch):
    sizes = {len(array) for array in batch}
    expect(len(sizes) == 1 and sizes != {0}, "loss_and_grads",
           lambda: f"batch arrays of {', '.join(str(len(a)) for a in batch)} images: one size expected")
    return sizes.pop()


def share_out(function, items, threads=None):
    """[function(item) for item in items] on threads, BLAS held to one thread each. The first exception is
    raised when all have ended: nothing goes on writing into arrays that the caller uses again."""
    prepare_cpu()
    threads = min(threads or cpu_count(), max(1, len(items)))
    with blas_threads(1):
        if threads == 1:
            return [function(item) for item in items]
        with quick_switches():
            futures = [_pool(threads).submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
                concurrent.futures.wait(futures)


_pools: dict = {}


def _pool(threads):
    """Threads are kept: starting them for each step costs more than a small step's work."""
    if threads not in _pools:
        _pools[threads] = concurrent.futures.ThreadPoolExecutor(threads, "tinytoken")
    return _pools[threads]
