"""Loss and gradients of a batch, cut into slices that the CPU's cores share; and what several processes have
of a batch, added up.

Gradients are added up over processes when the backward pass is over, not in buckets during it. That could
hide at most the sum itself: with two processes of one CPU 2.6 % of a ViT's step, 1.8 % of DynamicViT's, 5.7 %
of LookupViT's (lessons/results/17_many_processes.json: `sum_seconds` at the gradient's size, beside `parts`
for half a batch). On CPUs a sum takes the time of those that compute the pictures: with a sum in a thread
beside the gradients, 0.8, 0.4 and -1.2 % of the time of both were saved, medians of 12 steps that differed by
more (lessons/results/ranks_overlap.json, by tests/benchmarks/ranks.py --overlap). Not measured between
machines.
"""
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .. import nn
from ..backend import Array, array_module, cpu_count
from ..errors import expect
from ..group import Group
from ..tensor import Tensor, checked, grad
from ..threads import share_out


def loss_and_grads(loss_fn: Callable[..., Any], params: Iterable[nn.Parameter], batch: tuple[Array, ...],
                   micro: int = 16, threads: int | None = None,
                   draws: dict[str, Array] | None = None) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of a batch -> (loss, parts), floats; on CuPy 0-d arrays, since reading them would
    wait for the GPU. The gradients are left in .grad (flat storage), overwritten.

    batch: a tuple of arrays, cut along axis 0 into micro-batches of `micro` images; draws: {name: array} of
    what was drawn for it, cut likewise. loss_fn(*slice, **draws) is a mean over the slice's images, a Tensor
    or (Tensor, parts): it is weighted by the slice's share. On CuPy the batch is one slice on one thread.

    threads: Python threads that share the micro-batches (thread i takes i, i + threads, ...); None: the CPUs
    of this process. Each has a gradient buffer of its own, and these are added up in a fixed order: the same
    thread count gives the same bits. BLAS is held to one thread inside.

    Batch norm normalises each slice by the slice's own statistics ("ghost batch norm", Hoffer et al. 2017,
    arXiv 1705.08741), and the running ones move once per batch, by the mean of what the slices found, added
    up in the order of the slices: they do not depend on the threads, but on `micro` they do.
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

    def work(first):
        buffer = flat.grad if first == 0 else np.empty_like(flat.grad)
        buffer[...] = 0
        views, results, notes = flat.cut(buffer), [], []
        for cut in cuts[first::threads]:
            share = (cut.stop - cut.start) / size
            with checked(0), nn.noted() as found:  # not checked: the backward pass follows at once
                out = loss_fn(*(array[cut] for array in batch),
                              **{name: array[cut] for name, array in draws.items()})
            loss, parts = out if isinstance(out, tuple) else (out, {})
            expect(isinstance(loss, Tensor) and loss.shape == (), "loss_and_grads",
                   "loss_fn must return a scalar Tensor, or one and its parts")
            results.append([array * share for array in (loss.data, *(_raw(p) for p in parts.values()))])
            notes.append(found)
            grad(loss * share, params, into=views, add=True)
        return buffer, results, tuple(parts), notes

    done = share_out(work, range(threads), threads)
    for buffer, *_ in done[1:]:
        flat.grad += buffer
    nn.follow_all([done[i % threads][3][i // threads] for i in range(len(cuts))],
                  [(cut.stop - cut.start) / size for cut in cuts])
    totals = [sum(values) for values in zip(*(row for _, results, *_ in done for row in results))]
    loss, *parts = totals if array_module(flat.data) is not np else map(float, totals)
    return loss, dict(zip(done[0][2], parts))


def add_ranks(group: Group, flat: nn.Flat, share: float, loss: Any, parts: dict[str, Any],
              notes: Sequence[nn.Note]) -> tuple[Any, dict[str, Any]]:
    """What `loss_and_grads` returned and left in flat.grad on each rank, of its rows, added up over the ranks
    -> (loss, parts) of the batch, whose gradient is then in flat.grad. All ranks get the same bits, so their
    weights stay the same.

    share: this rank's part of the batch. notes: what buffers are to follow (nn.noted), which happens here."""
    flat.grad *= share
    group.all_reduce(flat.grad)
    xp = array_module(flat.grad)
    values = [xp.asarray(value) for value in (loss, *parts.values(), *(value for _, value, _ in notes))]
    packed = xp.concatenate([value.reshape(-1) for value in values]) * share
    group.all_reduce(packed)
    ends = itertools.accumulate(value.size for value in values)
    summed = [packed[end - value.size:end].reshape(value.shape).astype(value.dtype)
              for end, value in zip(ends, values)]
    for (buffer, _, momentum), value in zip(notes, summed[1 + len(parts):]):
        buffer.follow(value, momentum)
    loss, *rest = summed[:1 + len(parts)] if xp is not np else map(float, summed[:1 + len(parts)])
    return loss, dict(zip(parts, rest))


def _raw(value):
    return value.data if isinstance(value, Tensor) else value


def _batch_size(batch):
    sizes = {len(array) for array in batch}
    expect(len(sizes) == 1 and sizes != {0}, "loss_and_grads",
           lambda: f"batch arrays of {', '.join(str(len(a)) for a in batch)} images: one size expected")
    return sizes.pop()
