"""Inference, slice by slice on all cores; and the size of a slice."""
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import nn
from ..backend import Array, array_module, cpu_count, faster, products_in, to_numpy
from ..group import alone, current
from ..tensor import no_grad
from ..threads import share_out

ENOUGH_MACS = 1.45e9  # of a slice's recorded forward pass: beyond them the time that Python adds hardly shows
WORTH_CAPTURING = 5  # slices: the first calls of what is captured are ordinary ones


def slice_size(images: int, threads: int | None = None, macs: float = 0) -> int:
    """How many of a batch's `images` go into a slice.

    Each thread gets one slice, since threads cannot share what Python does between the ops. A slice has at
    most 32 images; to save memory it is halved as long as half of it still has ENOUGH_MACS to do. macs:
    multiply-adds of one image, as `cost.recorded_macs` counts them; 0 where nothing is recorded, since slices
    need little memory then."""
    size = max(1, min(32, -(-images // (threads or cpu_count()))))
    while size > 1 and macs * (size // 2) >= ENOUGH_MACS:
        size //= 2
    return size


def repeated(function: Callable[..., Array], xp: Any, what: str) -> Callable[..., Array]:
    """The function, which takes a list of arrays of the module xp, for many calls with the same shapes.

    An implementation may keep what the first calls launch, and repeat it. what: its name, for messages."""
    fast = faster(repeated, xp, function, xp, what)
    return fast(function, xp, what) if fast else function


def infer(model: nn.Module, images: Array, prepare: Callable[[Array], Array] = lambda images: images,
          batch_size: int | None = None, threads: int | None = None, precision: str = "fp32",
          read: Callable[[Any], Any] = lambda out: out.logits, beside: Mapping[str, Array] | None = None,
          **call: Any) -> np.ndarray:
    """Answers of a model in eval mode, in host memory: logits (B, K), or what `read` takes from its Output.

    prepare: raw images -> model input. batch_size: images of a slice (None: `slice_size`, on a GPU 128).
    precision: as in `products_in`. beside: arguments of the model with a row for each image, as the boxes of
    actors; call: further ones, the same for all images.

    In a group of processes each answers a part of the images, and all get all answers. A call without a
    batch_size then cuts other slices than one process would, which may change the last bits."""
    group, beside = current(), beside or {}
    if group.size > 1:
        rows, _ = group.rows(len(images), batch_size or 1)
        with alone():
            part = {name: values[rows] for name, values in beside.items()}
            mine = lambda: infer(model, images[rows], prepare, batch_size, threads, precision, read, part,
                                 **call)
            found = group.together("inference", mine)
        return np.concatenate(found) if rows != slice(0, len(images)) else found[group.rank]
    training, (_, first) = model.training, next(model.named_parameters())
    xp = array_module(first.data)
    batch_size = batch_size or (slice_size(len(images), threads) if xp is np else 128)
    cuts = [slice(a, a + batch_size) for a in range(0, len(images), batch_size)]
    model.eval()
    forward = lambda arrays: read(model(arrays[0], **dict(zip(beside, arrays[1:])), **call)).data
    if len(cuts) >= WORTH_CAPTURING:
        forward = repeated(forward, xp, "a forward pass")

    def answers(cut):
        with no_grad():
            return to_numpy(forward((prepare(images[cut]), *(values[cut] for values in beside.values()))))
    try:
        with products_in(precision, first.device):
            return np.concatenate(share_out(answers, cuts, threads if xp is np else 1))
    finally:
        if training:
            model.train()
