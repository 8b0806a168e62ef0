"""The files of a run: damaged ones are refused before work starts, and each phase belongs to one process."""
import json
import os
import shutil
import subprocess

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import PowerCut, at_step, bits, history, power_cut, python, same_run, train, vit
from tinytoken.errors import Busy
from tinytoken.reading import read_rows
from tinytoken.train import Run, checkpoint


# The history

def test_lines_of_others_in_the_history_stay(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"note": "mine"}\n{"phase": "train", "step": 0}\n')
    Run(tmp_path).forget("train", 0)
    assert (tmp_path / "history.jsonl").read_text() == '{"note": "mine"}\n'


def test_a_last_line_without_its_end_gets_one(tmp_path):
    """Or the next line would be written behind it."""
    (tmp_path / "history.jsonl").write_text('{"phase": "train", "step": 0}\n{"note": "mine"}')
    run = Run(tmp_path)
    run.forget("train", 1)
    run.log(phase="train", step=1)
    assert [row for *_, row in read_rows(run.history, "test")] == [
        {"phase": "train", "step": 0}, {"note": "mine"}, {"phase": "train", "step": 1}]


DAMAGES = {
    "a bad byte": (b'{"phase": "train", "step": \xff}', "line 2, is not JSON (UnicodeDecodeError: "),
    "half a row": (b'{"phase": "train", "st', "line 2, is not JSON (JSONDecodeError: "),
    "a list": (b"[1, 2]", "line 2, is a list, expected a JSON object: delete it"),
    "no step": (b'{"phase": "train"}', "line 2, has the step None, expected a whole number"),
    "an odd step": (b'{"phase": "train", "step": "2"}', "line 2, has the step '2', expected a whole number"),
}


@pytest.mark.parametrize("line, text", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_history_is_refused_before_a_step_is_made(line, text, tmp_path):
    run = Run(tmp_path)
    damaged = b'{"phase": "before", "step": 3}\n' + line + b'\n{"phase": "before", "step": 5}\n'
    run.history.write_bytes(damaged)
    with pytest.raises(tt.InputError) as caught:
        train(at_step(vit, 0, lambda: pytest.fail("a step was made")), run)
    assert str(caught.value).startswith(f"Run: {run.history}, {text}") and "\n" not in str(caught.value)
    assert run.history.read_bytes() == damaged and [path.name for path in tmp_path.iterdir()] == [
        "history.jsonl"]


def test_a_pipe_in_place_of_the_history_does_not_hang(tmp_path):
    run = Run(tmp_path)
    os.mkfifo(run.history)
    with refuses(f"Run: {run.history} cannot be read: not a regular file"):
        train(vit, run)
    reader = os.open(run.history, os.O_RDONLY | os.O_NONBLOCK)
    with refuses(f"cannot write {run.history}: not a regular file"):
        run.log(phase="train", step=1)
    os.close(reader)


# The header of a checkpoint

def interrupted(run):
    """A run that stopped after step 5 -> the path of its checkpoint, and a function that changes its
    header."""
    with pytest.raises(PowerCut):
        train(at_step(vit, 6, power_cut), run, log_every=3)
    path = run.checkpoint("train")

    def change(**changes):
        header, groups = checkpoint.load(path)
        arrays = {f"{group}/{name}": array for group in groups for name, array in groups[group].items()}
        header = {name: value for name, value in (header | changes).items() if value != "gone"}
        np.savez(path, header=np.array(json.dumps(header)), **arrays)
    return path, change


LOSSES = "expected a list of losses, numbers by name"
SECONDS = "expected those of the training so far"
HEADERS = {
    "too many steps": (dict(step=10**9), "has the step 1000000000, expected a whole number up to 20"),
    "a negative step": (dict(step=-1), "has the step -1, expected a whole number up to 20"),
    "half a step": (dict(step=5.0), "has the step 5.0, expected a whole number up to 20"),
    "no step": (dict(step="gone"), "has the step None, expected a whole number up to 20"),
    "another step": (dict(step=4), "has the optimizer_steps 5, expected 4, as its step"),
    "another optimiser's": (dict(optimizer_steps=10**9), "has the optimizer_steps 1000000000, expected 5, as "
                                                         "its step"),
    "no result": (dict(result="gone"), "has the result None, expected numbers by name"),
    "a list of results": (dict(result=[]), "has the result [], expected numbers by name"),
    "no seconds": (dict(result={"loss": 1.0}), f": its result has the seconds None, {SECONDS}"),
    "seconds of nothing": (dict(result={"seconds": float("nan")}),
                           f": its result has the seconds nan, {SECONDS}"),
    "negative seconds": (dict(result={"seconds": -1}), f": its result has the seconds -1, {SECONDS}"),
    "no losses": (dict(recent="gone"), f"has the recent None, {LOSSES}"),
    "other losses": (dict(recent=[1, 2]), f"has the recent [1, 2], {LOSSES}"),
    "texts as losses": (dict(recent=[{"loss": "1"}]), "has the recent [{'loss': '1'}], " + LOSSES),
}


@pytest.mark.parametrize("changes, text", HEADERS.values(), ids=HEADERS)
def test_an_odd_header_is_refused_before_a_step_is_made(changes, text, tmp_path):
    path, change = interrupted(Run(tmp_path, every=5))
    change(**changes)
    with refuses(f"fit: {path}{' ' * (text[0] != ':')}{text}"):
        train(at_step(vit, 0, lambda: pytest.fail("a step was made")), Run(tmp_path, every=5))


def test_losses_of_another_name_are_refused_at_the_first_mean(tmp_path):
    _, change = interrupted(Run(tmp_path, every=5))
    change(recent=[{"penalty": 1.0}])
    with refuses("fit: losses penalty in the checkpoint, loss, class now"):
        train(vit, Run(tmp_path, every=5), log_every=3)


def test_a_header_whose_recipe_is_a_list_is_another_runs(tmp_path):
    path, change = interrupted(Run(tmp_path, every=5))
    change(recipe=[1])
    with pytest.raises(tt.InputError, match=rf"^fit: {path} belongs to another run \(recipe \[1\] there, "):
        train(vit, Run(tmp_path, every=5))


# Two processes in one folder

def test_step_and_weights_are_of_one_reading(tmp_path, monkeypatch, uninterrupted):
    """Though another process replaces the checkpoint right after it was read."""
    run, other = Run(tmp_path / "run", every=4), Run(tmp_path / "other", every=4)
    for folder, step in ((run, 6), (other, 14)):
        with pytest.raises(PowerCut):
            train(at_step(vit, step, power_cut), folder)
    load, path = checkpoint.load, run.checkpoint("train")

    def load_and_replace(asked):
        loaded = load(asked)
        shutil.copy(other.checkpoint("train"), path)
        return loaded
    monkeypatch.setattr(checkpoint, "load", load_and_replace)
    same_run(*train(vit, run), run.folder, uninterrupted[vit])


HOLD = """
import sys, time, tiny
from tinytoken.train import Run
model, task = tiny.vit()
noise = task.noise
def slow(size, step, *rest):
    if step == 105:
        print("at step 5", flush=True)
        sys.stdin.read()
    return noise(size, step, *rest)
task.noise = slow
tiny.train((model, task), Run(sys.argv[1], every=2))
"""


def test_a_second_process_is_told_who_trains_here_and_the_first_goes_on(tmp_path, uninterrupted):
    process = python("-c", HOLD, tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "at step 5\n"
    run, before = Run(tmp_path, every=2), history(tmp_path)
    text = rf"^another process is at work on {run.checkpoint('train')}: process {process.pid} on \S+, since "
    with pytest.raises(Busy, match=text):
        train(at_step(vit, 0, lambda: pytest.fail("a step was made")), run)
    assert history(tmp_path) == before
    train(vit, run, phase="beside", steps=3)  # another phase is nobody's
    assert process.communicate("go on", timeout=60) == ("", "") and process.returncode == 0
    rows = [row for row in history(tmp_path) if row["phase"] == "train"]
    model, report = train(vit, run)  # it is finished: only read
    weights, full_report, expected = uninterrupted[vit]
    assert (bits(model), rows, report["loss"]) == (weights, expected, full_report["loss"])


ROWS = """
import sys
from tinytoken.train import Run
run = Run(sys.argv[1])
for step in range(100):
    run.log(phase=sys.argv[2], step=step)
    run.forget("nobody's", step)
    if step == 49:
        run.forget(sys.argv[2], 40)
"""


def test_phases_of_several_processes_lose_no_row_of_their_history(tmp_path):
    """Though each rewrites the file now and then."""
    processes = [python("-c", ROWS, tmp_path, phase) for phase in "abc"]
    assert [process.communicate(timeout=120)[1] for process in processes] == [""] * 3
    rows = [row for *_, row in read_rows(Run(tmp_path).history, "test")]
    for phase in "abc":
        assert [row["step"] for row in rows if row["phase"] == phase] == [*range(40), *range(50, 100)]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, uninterrupted):
    for name in (".train.npz.a1b2c3d4.part", ".history.jsonl.a1b2c3d4.part"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "train.npz.lock").write_text("process 1 on a machine that is switched off\n")
    same_run(*train(vit, Run(tmp_path)), tmp_path, uninterrupted[vit])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "train.npz"]
