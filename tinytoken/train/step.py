"""A training step: the batch and what is drawn for it, the gradients, the optimiser's update."""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import nn
from ..backend import Array, array_module, faster, out_of_memory, to_numpy
from ..cost import recorded_macs
from ..errors import InputError, expect
from ..group import current
from ..tasks import Task
from .inference import slice_size
from .optim import AdamW
from .parallel import add_ranks, loss_and_grads


@dataclasses.dataclass
class Work:
    """What the steps of a run are made of.

    task, batches, micro, threads, seed, offset: as in `fit`. rates: the learning rate of each step. advice:
    how the message ends about a loss that is not finite."""
    task: Task
    batches: Callable[[int], tuple[Array, ...]]
    optimizer: AdamW
    rates: list[float]
    seed: int = 0
    offset: int = 0
    micro: int | None = None
    threads: int | None = None
    advice: str = ""

    def __post_init__(self):
        expect(self.micro is None or not self.task.whole, "fit",
               f"slices of {self.micro} images for a loss of the whole batch, expected micro None")

    @property
    def xp(self) -> Any:
        """The array module of the parameters."""
        return array_module(self.optimizer.flat.data)

    def noise(self, size: int, step: int) -> dict[str, Array]:
        """What the task draws for a batch of `size` images at `step`, counted from the offset."""
        return self.task.noise(size, step, self.seed, self.xp)

    def mine(self, arrays: tuple[Array, ...], draws: dict[str, Array]
             ) -> tuple[tuple[Array, ...], dict[str, Array], float]:
        """Of a batch and what was drawn for it, the rows of this rank; and its share of the gradient.

        All is drawn for the whole batch, on every rank, so it does not depend on how many ranks there are. A
        batch that may not be cut is every rank's."""
        images = len(arrays[0])
        rows, share = current().rows(images, images if self.task.whole else self.micro or 1)
        if share == 1:
            return arrays, draws, share
        draws = {name: draw[rows] for name, draw in draws.items()}
        return tuple(array[rows] for array in arrays), draws, share

    def gradients(self, arrays: tuple[Array, ...], draws: dict[str, Array], micro: int,
                  threads: int | None = None, share: float = 1.0) -> tuple[Any, dict[str, Any]]:
        """`loss_and_grads` of the rows that `mine` gave; in a group of processes, of those of all ranks."""
        group = current()
        if group.size == 1:
            return self._gradients(arrays, draws, micro, threads)

        def own():
            with nn.noted() as notes:
                return *self._gradients(arrays, draws, micro, threads), notes
        if self.xp is not np:  # in a captured step nothing goes through the host
            return add_ranks(group, self.optimizer.flat, share, *own())
        found: list[Any] = []
        group.together("a step", lambda: found.extend(own()))
        return add_ranks(group, self.optimizer.flat, share, *found)

    def _gradients(self, arrays, draws, micro, threads):
        """`loss_and_grads` of a batch. For a batch that does not fit into memory, InputError with a size that
        does: it is halved until one fits."""
        params, whole = self.optimizer.params, len(arrays[0])
        size, reason = whole, None
        while size:
            part = tuple(array[:size] for array in arrays)
            drawn = {name: draw[:size] for name, draw in draws.items()}
            try:
                result = loss_and_grads(self.task, params, part, min(micro, size), threads, drawn)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = reason or " ".join(str(error).split())
            else:
                expect(reason is None, "fit",
                       f"a batch of {whole} images does not fit into memory, one of {size} does ({reason})")
                return result
            size //= 2  # not in the except block: the exception's frames hold arrays
        raise InputError(f"fit: not even one image fits into memory ({reason})")


def slice_of(task: Task, arrays: tuple[Array, ...], draws: dict[str, Array],
             threads: int | None = None) -> int:
    """How many images of a batch a slice has on the CPU: `slice_size` by the task's own multiply-adds, for
    which it is called once, on one image; all for a task that is `whole`."""
    if task.whole:
        return len(arrays[0])
    with nn.noted():  # it is no step: running statistics stay
        macs = recorded_macs(task, arrays, draws)
    return slice_size(len(arrays[0]), threads, macs)


def stepper(work: Work) -> Callable[[int], tuple[Any, dict[str, Any], Array]]:
    """take(step) -> (loss, parts, the gradient's norm): takes the steps of `work`, one after another."""
    fast = faster(stepper, work.xp, work)
    if fast:
        return fast(work)
    micro = work.micro

    def take(step):
        nonlocal micro
        at = work.offset + step  # the step that the batch and the draws belong to
        arrays = work.batches(at)
        arrays, draws, share = work.mine(arrays, work.noise(len(arrays[0]), at))
        if micro is None:
            micro = slice_of(work.task, arrays, draws, work.threads) if work.xp is np else len(arrays[0])
        loss, parts = work.gradients(arrays, draws, micro, work.threads, share)
        on_host = isinstance(loss, float)  # on a GPU, Losses reads it when it is needed
        expect(not on_host or math.isfinite(loss), "fit",
               lambda: f"the loss is {loss} at step {step} {work.advice}")
        return loss, parts, work.optimizer.step(work.rates[step])
    return take


class Losses:
    """The losses of the steps since the last logged one. advice: as in Work.

    On a GPU they are read only when they are needed: reading one waits for all the work before it."""

    def __init__(self, recent: list[dict[str, float]], advice: str) -> None:
        self.recent, self.advice = recent, advice
        self.unread: list[tuple[int, dict[str, Any], Any]] = []

    def add(self, step: int, loss: Any, parts: dict[str, Any], norm: Any) -> None:
        """Note the loss and its parts, and the gradient's norm, of one step; nothing is read."""
        self.unread.append((step, {"loss": loss, **parts}, norm))

    def read(self) -> None:
        """Turn the unread ones into floats, with one copy from the device. InputError for a loss or norm that
        is not finite."""
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

    def mean(self) -> dict[str, float]:
        """{name: mean} of those that were read, which are then forgotten."""
        first, last = self.recent[0], self.recent[-1]
        expect(all(row.keys() == last.keys() for row in self.recent), "fit",
               lambda: f"losses {', '.join(first)} in the checkpoint, {', '.join(last)} now")
        means = {name: sum(row[name] for row in self.recent) / len(self.recent) for name in self.recent[0]}
        self.recent.clear()
        return means
