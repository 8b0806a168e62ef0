"""How fast this machine trains and runs the models, and where the time of a training step goes, op by op."""
import contextlib
import dataclasses
import statistics
import time

import numpy as np

from . import models, random, tensor
from .backend import blas_description, blas_threads, cpu_count
from .cost import recorded_macs
from .errors import expect
from .tasks import task as tasks
from .train import AdamW, infer, loss_and_grads, slice_size


class Job:
    """A model, by its name, with random pictures: a training step of its own task and an inference pass, to
    be timed. micro: images of a slice of the step, as in fit. sizes: of the model. Sets the global seed to
    0."""

    def __init__(self, name, batch=64, micro=None, threads=None, **sizes):
        expect(batch >= 1, "bench", f"batch {batch}, expected at least 1")
        random.manual_seed(0)
        sizes = dict(image_size=32, patch_size=4, dim=96, depth=6, heads=3) | sizes
        self.model, self.threads = models.create(name, **sizes), threads
        kind = tasks.pick(self.model.task)
        self.task = kind(self.model, models.ViT(**sizes)) if kind.taught else kind(self.model)
        self.optimizer = AdamW(self.model.parameters(), clip=1.0)
        self.images = random.normal((batch, 3, sizes["image_size"], sizes["image_size"]),
                                    site="bench.images", step=0)
        self.batch, self.draws = (self.images, np.arange(batch) % 10), self.task.noise(batch, 0, 0)
        macs = recorded_macs(self.task, self.batch, self.draws)
        self.micro = slice_size(batch, threads, macs) if micro is None else micro

    def gradients(self, threads=None):
        if not self.model.training:
            self.model.train()
        return loss_and_grads(self.task, self.optimizer.params, self.batch, self.micro, threads
                              or self.threads, self.draws)

    def step(self):
        self.gradients()
        self.optimizer.step()

    def infer(self):
        return infer(self.model, self.images, threads=self.threads)


def speeds(job, rounds=9):
    """{"step" | "infer": [median, lowest, highest] seconds of a batch}, in interleaved rounds."""
    times = {"step": [], "infer": []}
    for turn in range(rounds + 1):
        for name, found in times.items():
            began = time.perf_counter()
            getattr(job, name)()
            if turn:  # the first is for warming up
                found.append(time.perf_counter() - began)
    return {name: [f(found) for f in (statistics.median, min, max)] for name, found in times.items()}


def speeds_text(job, found):
    """The speeds as text."""
    lines = [f"{name:<6}{1e3 * median:>9.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}), "
             f"{len(job.images) / median:,.0f} images/s"
             for name, (median, low, high) in found.items()]
    return "\n".join([*lines, f"float32, batch {len(job.images)}, {job.threads or cpu_count()} threads, "
                              f"{blas_description()}"])


# Where a step's time goes

@dataclasses.dataclass
class OpTime:
    """Of one op: calls, multiply-adds (a vjp's count as twice the forward ones), seconds of its function and
    of its vjp."""
    calls: int = 0
    macs: int = 0
    forward: float = 0.0
    backward: float = 0.0


@contextlib.contextmanager
def timed_ops():
    """Context: {name of an op: OpTime} of what this thread runs inside. What the graph does between
    the ops, sums of gradients included, is in no row."""
    rows = {}

    def timed(op, way, shapes, run):
        began = time.perf_counter()
        result = run()
        spent, row = time.perf_counter() - began, rows.setdefault(op.name, OpTime())
        macs = op.shapes_to_macs(*shapes) if op.shapes_to_macs else 0
        if way == "forward":
            row.calls, row.macs, row.forward = row.calls + 1, row.macs + macs, row.forward + spent
        elif way == "backward":
            row.macs, row.backward = row.macs + 2 * macs, row.backward + spent
        else:
            row.backward -= spent
        return result

    with tensor.around(timed):
        yield rows


def profile(job, rounds=5):
    """A training step by op, on one thread, medians over rounds -> {"ops": {name: OpTime}, "gradients" and
    "adamw": seconds, "peak": multiply-adds per second of a large product, the best of the same rounds}."""
    totals, updates, peaks, tables = [], [], [], []
    job.gradients(threads=1)
    for _ in range(rounds):
        totals.append(_seconds(lambda: job.gradients(threads=1)))
        updates.append(_seconds(job.optimizer.step))
        peaks.append(blas_rate())
        with timed_ops() as rows:
            job.gradients(threads=1)
        tables.append(rows)
    ops = {name: OpTime(row.calls, row.macs,
                        *(statistics.median(getattr(table[name], way) for table in tables)
                                               for way in ("forward", "backward"))) for name,
           row in tables[0].items()}
    return {"ops": ops, "gradients": statistics.median(totals), "adamw": statistics.median(updates),
            "peak": max(peaks)}


def _seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def blas_rate(size=1024):
    """Multiply-adds per second of a float32 product of two size x size matrices on one thread."""
    a = np.ones((size, size), "float32")
    with blas_threads(1):
        return size ** 3 / min(_seconds(lambda: a @ a) for _ in range(3))


def profile_text(found):
    """The profile as a table."""
    rows = sorted(found["ops"].items(), key=lambda item: -item[1].forward - item[1].backward)
    lines = [f"{'op':<16}{'calls':>7}{'forward ms':>12}{'backward ms':>13}{'share':>8}{'M MACs':>10}{'of BLAS peak':>14}"]
    spent, total = 0.0, found["gradients"] + found["adamw"]
    for name, row in rows:
        seconds = row.forward + row.backward
        spent += seconds
        rate = f"{100 * row.macs / seconds / found['peak']:.0f} %" if row.macs else ""
        lines.append(f"{name:<16}{row.calls:>7}{1e3 * row.forward:>12.1f}{1e3 * row.backward:>13.1f}"
                     f"{100 * seconds / total:>6.1f} %{row.macs / 1e6:>10.0f}{rate:>14}")
    rest = found["gradients"] - spent
    lines += [f"{name:<23}{1e3 * seconds:>25.1f}{100 * seconds / total:>6.1f} %"
              for name, seconds in (("AdamW", found["adamw"]), ("the graph and the rest", rest))]
    lines.append(f"{1e3 * total:.0f} ms on one thread; BLAS peak {2e-9 * found['peak']:.0f} GFLOP/s (2 per "
                 f"multiply-add)")
    return "\n".join(lines)
