"""Where a training run keeps its files, and how it goes on from them."""
import contextlib
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from .. import nn
from ..errors import InputError, expect
from ..files import as_json, claimed, plain_number, replacing
from ..group import current, digest
from ..reading import field, finite, numbers, open_regular, read_bytes, read_rows, whole
from . import checkpoint

# The step to go on from, the report so far, and the losses since the last logged step
State: TypeAlias = tuple[int, dict[str, Any], list[dict[str, float]]]


class Run:
    """The files of a training run: history.jsonl, with a line per logged step of any phase, and a checkpoint
    per phase, written every `every` steps."""

    def __init__(self, folder: str | os.PathLike, every: int = 200) -> None:
        expect(every >= 1, "Run", f"a checkpoint every {every} steps, expected at least 1")
        self.folder, self.every = pathlib.Path(folder), every
        self.history = self.folder / "history.jsonl"

    def checkpoint(self, phase: str) -> pathlib.Path:
        """The path of a phase's checkpoint."""
        return self.folder / f"{phase}.npz"

    @contextlib.contextmanager
    def claimed(self, phase: str, model: nn.Module, optimizer: Any,
                header: dict[str, Any]) -> Iterator[State]:
        """Context: this process alone trains the phase -> what `resume` returns. Busy, which says who trains
        it, where another does."""
        with claimed(self.checkpoint(phase)):
            yield self.resume(phase, model, optimizer, header)

    def log(self, **row: Any) -> None:
        """Append one line to the history."""
        if current().rank:
            return
        line = json.dumps(row, default=plain_number) + "\n"
        with claimed(self.history, wait=True):  # of another phase, in another process
            try:
                with open_regular(self.history, "ab") as file:
                    file.write(line.encode())
            except OSError as error:
                raise InputError(f"cannot write {self.history}: {error.strerror}") from error

    def rows(self) -> list[dict[str, Any]]:
        """The history: a dictionary per line."""
        return current().agreed("the history", lambda: [row for *_, row in read_rows(self.history, "Run")])

    def forget(self, phase: str, step: int) -> None:
        """Drop the history of `phase` from `step` on: what an interrupted run logged after its last
        checkpoint, and a last line that a crash cut off. InputError for other lines that cannot be read."""
        if not self.history.exists():
            return
        with claimed(self.history, wait=True):
            rows = read_rows(self.history, "Run")
            steps = [field("Run", f"{self.history}, line {number},", row, "step", whole, "a whole number")
                     if row.get("phase") == phase else -1 for number, _, row in rows]
            kept = b"".join(line + b"\n" for at, (_, line, _) in zip(steps, rows) if at < step)
            if kept != read_bytes(self.history, "Run"):
                with replacing(self.history) as file:
                    file.write(kept)

    def save(self, phase: str, model: nn.Module, optimizer: Any, **header: Any) -> None:
        """Write the checkpoint of a phase, as checkpoint.save. InputError where the ranks of a group have
        come to other weights."""
        if current().size > 1:
            current().same(f"the weights of {phase}", weights=digest(*(p.data for p in model.parameters())))
        checkpoint.save(self.checkpoint(phase), model, optimizer, phase=phase, **header)

    def resume(self, phase: str, model: nn.Module, optimizer: Any, header: dict[str, Any]) -> State:
        """Load the checkpoint of a phase, if there is one -> (step to go on from, the report so far, losses
        since the last logged step).

        A checkpoint that does not say what `header` says, recipe and all, is another run's, and refused."""
        path, state = self.checkpoint(phase), fresh()
        if path.exists():
            there, groups = checkpoint.load(path)
            differences = ", ".join(_differences(there, model, header))
            expect(not differences, "fit",
                   f"{path} belongs to another run ({differences}): choose another --out, or delete it")
            steps = header["recipe"]["steps"]
            state = _state(path, there, steps)
            checkpoint.fill(path, there, groups, model, optimizer if state[0] < steps else None)
        self.forget(phase, state[0])
        return state


@contextlib.contextmanager
def begun(run: Run | None, phase: str, model: nn.Module, optimizer: Any, batches: Any,
          header: dict[str, Any]) -> Iterator[State]:
    """Context: the training of a phase -> where it goes on from, as `Run.resume`. In a group of processes
    rank 0 reads that, and the others have the weights and moments from it; all go on when it has written the
    last checkpoint. InputError where a rank has another recipe, other pictures or another model."""
    group = current()
    if group.size > 1:
        shapes = [(name, p.shape, str(p.dtype)) for name, p in model.named_parameters()]
        arrays = [getattr(batches, name) for name in ("images", "labels") if hasattr(batches, name)]
        group.same(f"training of {phase}", header=as_json(header), model=shapes,
                   pictures=digest(*arrays, *batches(header["recipe"]["offset"])))
    context = run.claimed(phase, model, optimizer, header) if run else contextlib.nullcontext(fresh())
    with group.leading(f"the beginning of {phase}", context) as state:
        if group.size > 1:
            [optimizer.steps] = group.exchange("the optimiser", optimizer.steps)[:1]
            held = [p.data for p in model.parameters()] + [b.data for _, b in model.named_buffers()]
            for array in (*optimizer.moments.values(), *held):
                group.broadcast(array)
        yield state
        group.exchange(f"the end of {phase}")


def fresh() -> State:
    """What `Run.resume` returns where there is no checkpoint."""
    return 0, {"seconds": 0.0}, []


def _state(path, there, steps):
    """What `Run.resume` returns of a checkpoint's header, if all of it has the right type and size."""
    def found(name, ok, expected):
        return field("fit", path, there, name, ok, expected)
    step = found("step", lambda value: whole(value) and value <= steps, f"a whole number up to {steps}")
    if step < steps:
        found("optimizer_steps", lambda value: value == step, f"{step}, as its step")
    report = found("result", numbers, "numbers by name")
    field("fit", f"{path}: its result", report, "seconds", lambda value: finite(value) and value >= 0,
          "those of the training so far")
    recent = found("recent", lambda value: isinstance(value, list) and all(map(numbers, value)),
                   "a list of losses, numbers by name")
    return step, report, recent


def _differences(there, model, header):
    """What differs between a checkpoint's header and this run's, one text per name."""
    mine = checkpoint.description(model)
    if not checkpoint.same_model(there, mine):
        yield from _changed(there, mine)
    # the bounds follow from the pictures, and checkpoints from before they were noted lack them
    yield from _changed(there, {name: value for name, value in as_json(header).items() if name != "bounds"})


def _changed(there, now):
    for name, value in now.items():
        old = there.get(name)
        if isinstance(value, dict) and isinstance(old, dict | None):
            yield from _changed(old or {}, value)
        elif old != value and not (name in ("mean", "std") and _nearly(old, value)):
            yield f"{name} {reprlib.repr(old)} there, {reprlib.repr(value)} now"


def _nearly(old, now):
    """Whether two lists of numbers are of the same pictures. Scenes that are drawn with other BLAS kernels
    differ by a level of a pixel here and there."""
    fits = isinstance(old, list) and len(old) == len(now) and numbers(dict(enumerate(old)))
    return fits and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(old, now))
