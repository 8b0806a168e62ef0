"""Inference, slice by slice on all cores; and the size of a slice."""
import numpy as np

from ..backend import array_module, cpu_count, faster, products_in, to_numpy
from ..tensor import no_grad
from .parallel import share_out

ENOUGH_MACS = 1.45e9  # recorded in the forward pass of a slice: beyond them what Python adds hardly shows
WORTH_CAPTURING = 5  # slices: the first calls of what is captured are ordinary ones


def slice_size(images, threads=None, macs=0):
    """Images of a slice. So many that each thread has one slice, since threads cannot share what Python does
    between the ops; at most 32, and halved, for the memory, as long as half of it still has enough to do.
    macs: multiply-adds of one image, as `cost.recorded_macs` counts them; 0 where nothing is recorded and
    slices need little memory."""
    size = max(1, min(32, -(-images // (threads or cpu_count()))))
    while size > 1 and macs * (size // 2) >= ENOUGH_MACS:
        size //= 2
    return size


def repeated(function, xp, what):
    """The function, of a list of arrays of the module xp, for many calls with arrays of the same shapes: an
    implementation may keep what they launch and repeat it. what: its name, for messages."""
    fast = faster(repeated, xp, function, xp, what)
    return fast(function, xp, what) if fast else function


def infer(model, images, prepare=lambda images: images, batch_size=None, threads=None, precision="fp32",
          read=lambda out: out.logits, **call):
    """Answers in host memory of a model in eval mode: its logits (B, K), or what `read` takes from its
    Output.

    prepare: raw images -> model input. batch_size: images of a slice (None: `slice_size`, on a GPU 128).
    precision: as of `products_in`. call: further arguments of the model."""
    training, first = model.training, model.parameters()[0]
    xp = array_module(first.data)
    batch_size = batch_size or (slice_size(len(images), threads) if xp is np else 128)
    cuts = [slice(a, a + batch_size) for a in range(0, len(images), batch_size)]
    model.eval()
    forward = lambda arrays: read(model(*arrays, **call)).data
    if len(cuts) >= WORTH_CAPTURING:
        forward = repeated(forward, xp, "a forward pass")

    def answers(cut):
        with no_grad():
            return to_numpy(forward((prepare(images[cut]),)))
    try:
        with products_in(precision, first.device):
            return np.concatenate(share_out(answers, cuts, threads if xp is np else 1))
    finally:
        model.train(training)
