"""A training step: the batch and what is drawn for it, the gradients, the optimiser's update."""
import dataclasses
import math

import numpy as np

from ..backend import array_module, faster, out_of_memory, to_numpy
from ..cost import recorded_macs
from ..errors import InputError, expect
from .inference import slice_size
from .optim import AdamW
from .parallel import loss_and_grads


@dataclasses.dataclass
class Work:
    """What the steps of a run are made of. task, batches, micro, threads, seed, offset: of `fit`. rates: the
    learning rate of each step. advice: how a message about a loss that is no number ends."""
    task: object
    batches: object
    optimizer: AdamW
    rates: list
    seed: int = 0
    offset: int = 0
    micro: int | None = None
    threads: int | None = None
    advice: str = ""

    @property
    def xp(self):
        return array_module(self.optimizer.flat.data)

    def noise(self, size, step):
        """What the task draws for a batch of `size` images at `step`, counted from the offset."""
        return self.task.noise(size, step, self.seed, self.xp)

    def gradients(self, arrays, draws, micro, threads=None):
        """`loss_and_grads` of a batch. Where it does not fit into memory, InputError with the largest that
        does: by halving, tried."""
        size, reason, params = len(arrays[0]), None, self.optimizer.params
        while size:
            try:
                part = tuple(array[:size] for array in arrays), {name: draw[:size] for name,
                                                                 draw in draws.items()}
                found = loss_and_grads(self.task, params, part[0], min(micro, size), threads, part[1])
                expect(reason is None, "fit",
                       f"a batch of {len(arrays[0])} images does not fit into memory, one of {size} does "
                       f"({reason})")
                return found
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = reason or " ".join(str(error).split())
            size //= 2  # not in the except block: the exception's frames hold arrays
        raise InputError(f"fit: not even one image fits into memory ({reason})")


def stepper(work):
    """take(step) -> (loss, parts, the gradient's norm): takes the steps of `work`, one after another."""
    fast = faster(stepper, work.xp, work)
    if fast:
        return fast(work)
    micro = work.micro

    def take(step):
        nonlocal micro
        number = work.offset + step
        arrays = work.batches(number)
        draws = work.noise(len(arrays[0]), number)
        if micro is None:
            micro = len(arrays[0])
            if work.xp is np:
                count = recorded_macs(work.task, arrays, draws)
                micro = slice_size(len(arrays[0]), work.threads, count)
        loss, parts = work.gradients(arrays, draws, micro, work.threads)
        on_host = isinstance(loss, float)  # else nobody looks yet
        expect(not on_host or math.isfinite(loss), "fit",
               lambda: f"the loss is {loss} at step {step} {work.advice}")
        return loss, parts, work.optimizer.step(work.rates[step])
    return take


class Losses:
    """The losses of the steps since the last logged one. On a GPU nobody looks at one before it is needed: a
    look waits for all work before it. advice: as of Work."""

    def __init__(self, recent, advice):
        self.recent, self.advice, self.unread = recent, advice, []

    def add(self, step, loss, parts, norm):
        self.unread.append((step, {"loss": loss, **parts}, norm))

    def read(self):
        """Make the unread ones numbers: one copy from the device. InputError for a loss or norm that is not
        finite."""
        xp = array_module(self.unread[0][2])
        scalars = [xp.asarray(value) for _, losses, norm in self.unread for value in (*losses.values(), norm)]
        values = iter(to_numpy(xp.stack(scalars)).tolist())
        for step, losses, _ in self.unread:
            row, norm = {name: next(values) for name in losses}, next(values)
            expect(math.isfinite(row["loss"]), "fit",
                   lambda: f"the loss is {row['loss']} at step {step} {self.advice}")
            expect(math.isfinite(norm), "fit",
                   lambda: f"the gradient's norm is {norm} at step {step} {self.advice}")
            self.recent.append(row)
        self.unread.clear()

    def mean(self):
        """{name: mean} of those read, which are then forgotten."""
        means = {name: sum(row[name] for row in self.recent) / len(self.recent) for name in self.recent[0]}
        self.recent.clear()
        return means
