"""How fast this machine trains and runs the models, and where the time of a training step goes, op by op."""
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import models, random, tensor
from .backend import Array, blas_description, blas_threads, cpu_count
from .errors import expect
from .experiments import timing
from .tasks import task as tasks
from .train import AdamW, infer, loss_and_grads
from .train.step import slice_of


class Job:
    """A model with random pictures: a training step of its own task and an inference pass, both to be timed.

    name, sizes: of the model. micro: images of a slice of the step, as in fit. Sets the global seed to 0.
    """

    def __init__(self, name: str, batch: int = 64, micro: int | None = None, threads: int | None = None,
                 **sizes: Any):
        expect(batch >= 1, "bench", f"batch {batch}, expected at least 1")
        random.manual_seed(0)
        sizes = dict(image_size=32, patch_size=4, dim=96, depth=6, heads=3) | sizes
        self.model, self.threads = models.create(name, **sizes), threads
        task_class = tasks.pick(self.model.task)
        self.task = task_class(self.model, *([models.ViT(**sizes)] if task_class.taught else []))
        self.optimizer = AdamW(self.model.parameters(), clip=1.0)
        self.images = random.normal((batch, *self.model.config.input_shape), site="bench.images", step=0)
        self.batch = self.images, self.task.labels(batch)
        self.draws = self.task.noise(batch, 0, 0)
        self.micro = slice_of(self.task, self.batch, self.draws, threads) if micro is None else micro

    def gradients(self, threads: int | None = None) -> Any:
        """The loss and the gradients of one step, as loss_and_grads returns them."""
        if not self.model.training:
            self.model.train()
        return loss_and_grads(self.task, self.optimizer.params, self.batch, self.micro,
                              threads or self.threads, self.draws)

    def step(self) -> None:
        """One training step: the gradients and the update."""
        self.gradients()
        self.optimizer.step()

    def infer(self) -> Array:
        """The logits of the batch in inference."""
        return infer(self.model, self.images, threads=self.threads)


def speeds(job: Job, rounds: int = 9) -> dict[str, list[float]]:
    """{"step" | "infer": [median, lowest, highest] seconds of a batch}, in interleaved rounds."""
    times = timing.interleaved({"step": job.step, "infer": job.infer}, rounds)
    return {name: [f(taken) for f in (statistics.median, min, max)] for name, taken in times.items()}


def speeds_text(job: Job, times: dict[str, list[float]]) -> str:
    """The speeds as text. times: as `speeds` returns them."""
    images = len(job.images)
    lines = [f"{name:<6}{1e3 * median:>9.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}), "
             f"{images / median:,.0f} images/s" for name, (median, low, high) in times.items()]
    return "\n".join([*lines, f"float32, batch {images}, {job.threads or cpu_count()} threads, "
                              f"{blas_description()}"])


# Where a step's time goes

@dataclasses.dataclass
class OpTime:
    """One op's calls, multiply-adds (its vjp counts twice its forward pass); seconds of each."""
    calls: int = 0
    macs: int = 0
    forward: float = 0.0
    backward: float = 0.0


@contextlib.contextmanager
def timed_ops() -> Iterator[dict[str, OpTime]]:
    """Context: {name of an op: OpTime} of what this thread runs inside the block.

    The time that the graph takes between the ops, sums of gradients included, is in no row.
    """
    rows: dict[str, OpTime] = {}

    def timed(op, way, shapes, run):
        began = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - began
        row = rows.setdefault(op.name, OpTime())
        macs = op.multiply_adds(shapes)
        if way == "forward":
            row.calls += 1
            row.macs += macs
            row.forward += elapsed
        elif way == "backward":
            row.macs += 2 * macs
            row.backward += elapsed
        else:  # sums of gradients, which ran inside of the vjp's time
            row.backward -= elapsed
        return result

    with tensor.around(timed):
        yield rows


def profile(job: Job, rounds: int = 5) -> dict[str, Any]:
    """A training step by op, on one thread: medians over the rounds.

    {"ops": {name: OpTime}, "gradients" and "adamw": seconds, "peak": multiply-adds per second of a large
    product, the best of the same rounds}.
    """
    totals, updates = [], []
    peaks, tables = [], []
    job.gradients(threads=1)
    for _ in range(rounds):
        totals.append(timing.seconds(lambda: job.gradients(threads=1)))
        updates.append(timing.seconds(job.optimizer.step))
        peaks.append(blas_rate())
        with timed_ops() as rows:
            job.gradients(threads=1)
        tables.append(rows)
    ops = {name: OpTime(row.calls, row.macs, statistics.median(table[name].forward for table in tables),
                        statistics.median(table[name].backward for table in tables))
           for name, row in tables[0].items()}
    return {"ops": ops, "gradients": statistics.median(totals), "adamw": statistics.median(updates),
            "peak": max(peaks)}


def blas_rate(size: int = 1024) -> float:
    """Multiply-adds per second of a float32 product of two size x size matrices on one thread."""
    a = np.ones((size, size), "float32")
    with blas_threads(1):
        return size ** 3 / min(timing.seconds(lambda: a @ a) for _ in range(3))


def profile_text(times: dict[str, Any]) -> str:
    """The profile as a table. times: as `profile` returns them."""
    rows = sorted(times["ops"].items(), key=lambda item: -item[1].forward - item[1].backward)
    lines = [f"{'op':<16}{'calls':>7}{'forward ms':>12}{'backward ms':>13}{'share':>8}{'M MACs':>10}"
             f"{'of BLAS peak':>14}"]
    in_ops = 0.0
    total = times["gradients"] + times["adamw"]
    for name, row in rows:
        seconds = row.forward + row.backward
        in_ops += seconds
        rate = f"{100 * row.macs / seconds / times['peak']:.0f} %" if row.macs else ""
        lines.append(f"{name:<16}{row.calls:>7}{1e3 * row.forward:>12.1f}{1e3 * row.backward:>13.1f}"
                     f"{100 * seconds / total:>6.1f} %{row.macs / 1e6:>10.0f}{rate:>14}")
    rest = times["gradients"] - in_ops
    lines += [f"{name:<23}{1e3 * seconds:>25.1f}{100 * seconds / total:>6.1f} %"
              for name, seconds in (("AdamW", times["adamw"]), ("the graph and the rest", rest))]
    lines.append(f"{1e3 * total:.0f} ms on one thread; "
                 f"BLAS peak {2e-9 * times['peak']:.0f} GFLOP/s (2 per multiply-add)")
    return "\n".join(lines)
