"""Where a training run keeps its files, and how it goes on from them."""
import json
import os
import pathlib
import reprlib
from typing import Any

from .. import nn
from ..errors import InputError, expect
from ..files import as_json, plain_number, replacing
from . import checkpoint


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

    def log(self, **row: Any) -> None:
        """Append one line to the history."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.history, "a") as file:
                file.write(json.dumps(row, default=plain_number) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.history}: {error.strerror}") from error

    def forget(self, phase: str, step: int) -> None:
        """Drop the history of `phase` from `step` on: what an interrupted run logged after its last
        checkpoint, and a last line that a crash cut off."""
        if self.history.exists():
            lines = self.history.read_text().splitlines()
            kept = [line for line in lines if _earlier(line, phase, step)]
            if len(kept) < len(lines):
                with replacing(self.history, "w") as file:
                    file.writelines(line + "\n" for line in kept)

    def resume(self, phase: str, model: nn.Module, optimizer: Any,
               header: dict[str, Any]) -> tuple[int, dict[str, Any], list[dict[str, float]]]:
        """Load the checkpoint of a phase, if there is one -> (step to go on from, the report so far, losses
        since the last logged step).

        A checkpoint that does not say what `header` says, recipe and all, is another run's, and refused."""
        path, state = self.checkpoint(phase), fresh()
        if path.exists():
            there, _ = checkpoint.load(path)
            differences = ", ".join(_differences(there, model, header))
            expect(not differences, "fit",
                   f"{path} belongs to another run ({differences}): choose another --out, or delete it")
            checkpoint.restore(path, model, optimizer if there["step"] < header["recipe"]["steps"] else None)
            state = there["step"], there["result"], there["recent"]
        self.forget(phase, state[0])
        return state


def fresh() -> tuple[int, dict[str, Any], list[dict[str, float]]]:
    """What `Run.resume` returns where there is no checkpoint."""
    return 0, {"seconds": 0.0}, []


def _earlier(line, phase, step):
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row.get("phase") != phase or row["step"] < step


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
        if isinstance(value, dict):
            yield from _changed(old or {}, value)
        elif old != value:
            yield f"{name} {reprlib.repr(old)} there, {reprlib.repr(value)} now"
