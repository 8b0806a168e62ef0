"""Training through every way a run can end: resumed runs give the same bits, and other runs' checkpoints are
refused."""
import itertools
import json
import pathlib
import random
import signal
import time

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import (SIZES, STEPS, PowerCut, at_step, batches, bits, ctrl_c, dynamicvit, history, lookupvit,
                  power_cut, python, same_run, train, vit)
from tinytoken.models import ViT
from tinytoken.train import Classify, Distil, Run, checkpoint, fit

both = pytest.mark.parametrize("make", [vit, dynamicvit])


# Interrupted and resumed

@both
@pytest.mark.parametrize("step", [3, 4, 7, 19])
def test_a_crash_and_a_resumed_run_are_as_if_nothing_had_been(make, step, tmp_path, uninterrupted):
    run = Run(tmp_path, every=4)
    with pytest.raises(PowerCut):
        train(at_step(make, step, power_cut), run)
    assert run.checkpoint("train").exists() == (step >= 4)
    if step >= 4:
        assert checkpoint.load(run.checkpoint("train"))[0]["step"] == step // 4 * 4
    same_run(*train(make, run), tmp_path, uninterrupted[make])


def test_several_crashes_and_a_line_that_was_cut_off(tmp_path, uninterrupted):
    run = Run(tmp_path, every=4)
    run.log(phase="before", step=99, loss=1.0, seconds=2.0)
    for step in (2, 6, 5):
        with pytest.raises(PowerCut):
            train(at_step(dynamicvit, step, power_cut), run)
        with open(run.history, "a") as file:
            file.write('{"phase": "train", "step": 1')
    model, report = train(dynamicvit, run)
    first, *rows = history(tmp_path)
    assert first == {"phase": "before", "step": 99, "loss": 1.0}
    assert (bits(model), rows) == (uninterrupted[dynamicvit][0], uninterrupted[dynamicvit][2])


@both
@pytest.mark.parametrize("step", [6, 19])
def test_ctrl_c_ends_the_run_after_its_step_with_a_checkpoint(make, step, tmp_path, uninterrupted):
    run, before = Run(tmp_path, every=4), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"^train stopped after step {step + 1} of 20$"):
        train(at_step(make, step, ctrl_c), run)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.load(run.checkpoint("train"))[0]["step"] == step + 1
    same_run(*train(make, run), tmp_path, uninterrupted[make])


def test_seconds_are_of_all_parts_of_a_run(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # a second for each step
    with pytest.raises(KeyboardInterrupt):
        train(at_step(vit, 6, ctrl_c), Run(tmp_path))
    next(ticks)  # what passes between the parts is no training
    assert train(vit, Run(tmp_path))[1]["seconds"] == STEPS


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    run = Run(tmp_path, every=4)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        train(at_step(vit, 6, lambda: (ctrl_c(), ctrl_c())), run)
    assert checkpoint.load(run.checkpoint("train"))[0]["step"] == 4


def test_ctrl_c_without_a_run_stops_too():
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        train(at_step(vit, 2, ctrl_c))


SLOW_RUN = """
import sys, time, tiny
from tinytoken.train import Run
model, task = tiny.dynamicvit()
noise = task.noise
task.noise = lambda *args: (time.sleep(0.01), noise(*args))[1]
tiny.train((model, task), Run(sys.argv[1], every=5), steps=60, log_every=1)
"""


def test_kill_9_loses_at_most_the_interval_since_the_last_checkpoint(tmp_path):
    """Killed again and again at moments that nobody chose, and gone on with by a new process each time."""
    run, kills = Run(tmp_path / "killed", every=5), 0
    path = run.checkpoint("train")
    written = lambda: path.exists() and path.stat().st_mtime_ns
    step_there = lambda: checkpoint.load(path)[0]["step"] if path.exists() else 0
    for _ in range(3):
        before, when, process = step_there(), written(), python("-c", SLOW_RUN, run.folder)
        deadline = time.monotonic() + 60
        while written() == when and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        lines = run.history.read_text().splitlines()
        done = 1 + max(json.loads(line)["step"] for line in lines if line.endswith("}"))
        assert before < step_there() and 0 <= done - step_there() <= 5
    assert kills >= 2
    steps = dict(steps=60, log_every=1)
    same_run(*train(dynamicvit, run, **steps), run.folder, _reference(tmp_path / "whole", **steps))


def _reference(folder, **more):
    model, report = train(dynamicvit, Run(folder, every=5), **more)
    return bits(model), report, history(folder)


# Finished, and other runs

def test_a_finished_phase_is_not_done_again(tmp_path, uninterrupted):
    run = Run(tmp_path, every=4)
    train(vit, run)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    header, groups = checkpoint.load(run.checkpoint("train"))
    assert header["step"] == STEPS and not groups["optimizer"]  # no moments: it is half or a third the size
    model, report = train(at_step(vit, 0, power_cut), run)
    assert bits(model) == uninterrupted[vit][0] and report == header["result"] and not model.training
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_phases_share_a_history_and_have_checkpoints_of_their_own(tmp_path):
    run = Run(tmp_path)
    train(vit, run, phase="one", steps=3)
    train(vit, run, phase="two", steps=6)
    train(vit, run, phase="one", steps=3)
    assert [(row["phase"], row["step"]) for row in history(tmp_path)] == [("one", 2), ("two", 2), ("two", 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "one.npz", "two.npz"]


def test_checkpoints_need_no_pickle(tmp_path):
    run = Run(tmp_path, every=4)
    with pytest.raises(PowerCut):
        train(at_step(dynamicvit, 6, power_cut), run, header={"classes": ["a", "b", "c"]})
    with np.load(run.checkpoint("train"), allow_pickle=False) as box:
        header = json.loads(str(box["header"]))
        assert all(box[name].dtype.kind in "fU" for name in box.files)
        assert {"optimizer/m", "optimizer/v"} <= set(box.files)
    assert (header["format"], header["model"], header["classes"]) == ("tinytoken checkpoint 1", "DynamicViT",
                                                                      ["a", "b", "c"])
    assert header["step"] == 4 and header["optimizer_steps"] == 4 and header["config"]["keep_ratios"] == [0.5]


def test_run_knows_its_files():
    run = Run("somewhere")
    assert run.checkpoint("vit") == pathlib.Path("somewhere/vit.npz")
    assert run.history == pathlib.Path("somewhere/history.jsonl")


OTHERS = {
    "steps": (dict(steps=30), "steps 20 there, 30 now"),
    "two things": (dict(lr=0.02, clip=None), "lr 0.01 there, 0.02 now, clip 1.0 there, None now"),
    "decay": (dict(weight_decay=0.1), "weight_decay 0.05 there, 0.1 now"),
    "warm-up": (dict(warmup=0.2), "warmup 0.1 there, 0.2 now"),
    "micro": (dict(micro=5), "micro 4 there, 5 now"),
    "seed": (dict(seed=6), "seed 5 there, 6 now"),
    "offset": (dict(offset=0), "offset 100 there, 0 now"),
    "header": (dict(header={"data": "cifar10", "mean": (0.5, 0.5)}),
               "data 'scenes' there, 'cifar10' now, mean None there, [0.5, 0.5] now"),
}


@pytest.mark.parametrize("step", [6, None], ids=["interrupted", "finished"])
@pytest.mark.parametrize("changes, text", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_recipe_is_refused(changes, text, step, tmp_path):
    run = Run(tmp_path, every=4)
    if step is None:
        train(vit, run, header={"data": "scenes"})
    else:
        with pytest.raises(PowerCut):
            train(at_step(vit, step, power_cut), run, header={"data": "scenes"})
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with refuses(f"fit: {run.checkpoint('train')} belongs to another run ({text}): choose another --out, or "
                 f"delete it"):
        train(vit, run, **dict(header={"data": "scenes"}) | changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_bounds_of_pictures_are_noted_and_older_checkpoints_lack_them(tmp_path, uninterrupted):
    """They follow from the pictures, so a run from before they were noted is the same run."""
    run, header = Run(tmp_path, every=4), {"data": "scenes"}
    with pytest.raises(PowerCut):
        train(at_step(vit, 6, power_cut), run, header=header)
    header |= {"bounds": {"mean of red": [0.1, 0.2]}}
    same_run(*train(vit, run, header=header), tmp_path, uninterrupted[vit])
    assert checkpoint.load(run.checkpoint("train"))[0]["bounds"] == {"mean of red": [0.1, 0.2]}
    with refuses(f"fit: {run.checkpoint('train')} belongs to another run (data 'scenes' there, 'other' now): "
                 f"choose another --out, or delete it"):
        train(vit, run, header=header | {"data": "other"})


@pytest.mark.parametrize("there, goes_on", [
    ([0.25 + 1e-9, 0.5], True), ([0.25 + 1e-5, 0.5], False), ([0.25], False), ("0.25", False), (None, False),
    ([0.25, None], False)], ids=str)
def test_pictures_that_another_machine_drew_are_the_same_pictures(tmp_path, there, goes_on):
    """Their mean differs in the last digits. An option that does is another option."""
    run, header = Run(tmp_path), {"mean": [0.25, 0.5], "rates": [0.25]}
    train(vit, run, header=header | {"mean": there})
    if goes_on:
        train(vit, run, header=header)
    else:
        with pytest.raises(tt.InputError, match=r"another run \(mean .* there, \[0.25, 0.5\] now\)"):
            train(vit, run, header=header)
    with pytest.raises(tt.InputError, match="rates"):
        train(vit, run, header=header | {"mean": there, "rates": [0.25 + 1e-9]})


def test_another_task_or_group_is_another_run(tmp_path):
    run, (model, task) = Run(tmp_path), dynamicvit()
    fit(model, task, batches(4), steps=2, run=run, bar=False)
    for change, text in ((dict(smoothing=0.5), "smoothing 0.0 there, 0.5 now"),
                         (dict(weights=(1, 2, 3, 4)), "weights [1, 2, 0.5, 0.5] there, [1, 2, 3, 4] now")):
        with refuses(f"fit: {run.checkpoint('train')} belongs to another run ({text}): choose another --out, "
                     f"or delete it"):
            fit(model, Distil(model, task.teacher, **change), batches(4), steps=2, run=run, bar=False)
    model, task = dynamicvit()
    for p in model.parameters():
        p.lr_scale = 1.0
    text = r"another run \(groups \[.*3.0.*\] there, \[\[1.0, False\], \[1.0, True\]\] now\)"
    with pytest.raises(tt.InputError, match=text):
        fit(model, task, batches(4), steps=2, run=run, bar=False)
    for p in model.score_predictor[0].parameters():
        p.lr_scale, p.frozen_steps = 3.0, 1
    with pytest.raises(tt.InputError, match=r"another run \(groups .* there, .*\[3.0, False, 1\].* now\)"):
        fit(model, task, batches(4), steps=2, run=run, bar=False)


def test_numpy_numbers_among_the_settings(tmp_path):
    for _ in range(2):
        model, task = vit()
        fit(model, task, batches(4), steps=2, seed=np.int64(3), lr=np.float32(0.5), run=Run(tmp_path),
            bar=False)


def test_another_batch_size_is_another_run(tmp_path):
    model, task = vit()
    for size in (4, 5):
        arguments = dict(steps=2, run=Run(tmp_path), bar=False)
        if size == 4:
            fit(model, task, batches(4), **arguments)
        else:
            with pytest.raises(tt.InputError, match=r"belongs to another run \(batch 4 there, 5 now\)"):
                fit(model, task, batches(5), **arguments)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    run = Run(tmp_path, every=4)
    with pytest.raises(PowerCut):
        train(at_step(vit, 6, power_cut), run)
    model, task = lookupvit()
    before = bits(model)
    text = (r"^fit: \S+train.npz belongs to another run \(model 'ViT' there, 'LookupViT' now, "
            r"compressed None there, \[1, 1\] now")
    with pytest.raises(tt.InputError, match=text):
        train((model, task), run)
    wide = ViT(**SIZES | {"dim": 16})
    with pytest.raises(tt.InputError,
                       match=r"belongs to another run \(dim 8 there, 16 now, smoothing 0.1 there, 0.0 now\)"):
        train((wide, Classify(wide)), run)
    assert bits(model) == before and checkpoint.load(run.checkpoint("train"))[0]["step"] == 4


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path)
    train(vit, run)
    path = run.checkpoint("train")
    path.write_bytes(path.read_bytes()[:-100])
    with refuses(f"checkpoint: {path} is not a whole .npz file: truncated, or not a checkpoint"):
        train(vit, run)
