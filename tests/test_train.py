"""Training: the same bits from the same seed, through every way a run can end, and what is refused."""
import itertools
import json
import math
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import SIZES, STEPS, batches, bits, dynamicvit, history, lookupvit, python, train, vit
from tinytoken import checkpoint, ops
from tinytoken.cost import macs, recorded_macs
from tinytoken.data import normalise
from tinytoken.models import DynamicViT, ViT
from tinytoken.tensor import no_grad, op
from tinytoken.train import Classify, Distil, Run, accuracy, fit, infer, slice_size

both = pytest.mark.parametrize("make", [vit, dynamicvit])


class PowerCut(Exception):
    """Ends a run at any place, as a crash would: nothing in fit expects it."""


def at_step(make, step, event):
    """`make`, with event() called in the main thread as the step begins."""
    model, objective = make()
    noise = objective.noise

    def noise_or_event(size, at, seed, xp):
        if at == 100 + step:  # train() counts batches from 100
            event()
        return noise(size, at, seed, xp)
    objective.noise = noise_or_event
    return model, objective


def power_cut():
    raise PowerCut


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """{kind: (weights, report, history)} of runs that nothing disturbed."""
    found = {}
    for make in (vit, dynamicvit):
        folder = tmp_path_factory.mktemp(make.__name__)
        model, report = train(make, Run(folder, every=4))
        found[make] = bits(model), report, history(folder)
    return found


def same_run(model, report, folder, expected):
    weights, full_report, rows = expected
    assert bits(model) == weights
    assert history(folder) == rows
    assert report | {"seconds": 0} == full_report | {"seconds": 0}


# The same bits

@both
def test_twice_the_same_seed_is_the_same_bits(make, uninterrupted):
    again, report = train(make)
    assert bits(again) == uninterrupted[make][0]
    assert report | {"seconds": 0} == uninterrupted[make][1] | {"seconds": 0}


def test_seed_and_offset_decide_the_draws():
    two = bits(train(dynamicvit, steps=2)[0])
    assert bits(train(dynamicvit, steps=2)[0]) == two
    for other in (dict(seed=6), dict(offset=101)):
        assert bits(train(dynamicvit, steps=2, **other)[0]) != two


@both
def test_history_and_report(make, uninterrupted):
    _, report, rows = uninterrupted[make]
    assert [row["step"] for row in rows] == [2, 5, 8, 11, 14, 17, 19]
    parts = ["class"] if make is vit else ["class", "ratio", "kl", "token"]
    assert list(report) == ["seconds", "loss", *parts]
    for row in rows:
        assert list(row) == ["phase", "step", "lr", "loss", *parts] and row["phase"] == "train"
        assert row["lr"] == pytest.approx(0.01 * tt.optim.warmup_cosine(row["step"], STEPS))
    assert {name: rows[-1][name] for name in report if name != "seconds"} == {n: v for n, v in report.items() if n != "seconds"}


def test_the_history_has_means_since_the_row_before(tmp_path):
    train(vit, Run(tmp_path / "each"), log_every=1)
    train(vit, Run(tmp_path / "mean"), log_every=8)
    single = [row["loss"] for row in history(tmp_path / "each")]
    assert [row["loss"] for row in history(tmp_path / "mean")] == pytest.approx(
        [np.mean(single[:8]), np.mean(single[8:16]), np.mean(single[16:])])


def test_fit_learns_and_leaves_the_model_in_eval_mode():
    data, (model, objective) = batches(20), vit()
    first, last = [fit(model, objective, data, steps=steps, lr=0.01, bar=False)["loss"] for steps in (1, 60)]
    assert last < 0.75 * first and not model.training and not model.head.training
    prepare = lambda images: normalise(images, data.mean, data.std)
    assert accuracy(infer(model, data.images, prepare), data.labels) > 0.9


def test_fit_trains_a_model_that_was_in_eval_mode(uninterrupted):
    model, objective = dynamicvit()
    model.eval()
    assert bits(train((model, objective))[0]) == uninterrupted[dynamicvit][0]


def test_the_teacher_is_never_changed():
    model, objective = dynamicvit()
    before, student = bits(objective.teacher), bits(model)
    objective.teacher.train()
    train((model, Distil(model, objective.teacher)))
    assert bits(objective.teacher) == before and not objective.teacher.training
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(bits(model)[name] != value for name, value in student.items())


def test_the_teacher_is_not_in_the_graph():
    model, objective = dynamicvit()
    images, labels = batches()(0)
    loss, _ = objective(images, labels, *objective.noise(len(images), 0, 0, np))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in objective.teacher.parameters())


def test_distil_draws_for_the_whole_batch_by_image_number():
    model = DynamicViT(**SIZES | {"depth": 2}, prune_before=(0, 1), keep_ratios=(0.75, 0.5))
    objective = Distil(model, ViT(**SIZES))
    (whole,), (part,), (other,) = (objective.noise(size, step, 1, np) for size, step in ((8, 2), (3, 2), (8, 3)))
    assert whole.shape == (8, 2, 4, 2) and np.array_equal(whole[:3], part) and not np.array_equal(whole, other)
    assert not np.array_equal(whole[:, 0], whole[:, 1])


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


def test_lines_of_others_in_the_history_stay(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"note": "mine"}\n{"phase": "train", "step": 0}\n')
    Run(tmp_path).forget("train", 0)
    assert (tmp_path / "history.jsonl").read_text() == '{"note": "mine"}\n'


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
    monkeypatch.setattr(tt.train.time, "perf_counter", lambda: next(ticks))  # a second for each step
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


def test_fit_runs_outside_the_main_thread(uninterrupted):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(vit)[0]))
    thread.start()
    thread.join()
    assert bits(found[0]) == uninterrupted[vit][0]


SLOW_RUN = """
import sys, time, tiny
from tinytoken.train import Run
model, objective = tiny.dynamicvit()
noise = objective.noise
objective.noise = lambda *args: (time.sleep(0.01), noise(*args))[1]
tiny.train((model, objective), Run(sys.argv[1], every=5), steps=60, log_every=1)
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
        assert all(box[name].dtype.kind in "fU" for name in box.files) and {"optimizer/m", "optimizer/v"} <= set(box.files)
    assert (header["format"], header["model"], header["classes"]) == ("tinytoken checkpoint 1", "DynamicViT", ["a", "b", "c"])
    assert header["step"] == 4 and header["optimizer_steps"] == 4 and header["config"]["keep_ratios"] == [0.5]


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
    with refuses(f"fit: {run.checkpoint('train')} belongs to another run ({text}): choose another --out, or delete it"):
        train(vit, run, **dict(header={"data": "scenes"}) | changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_another_objective_or_group_is_another_run(tmp_path):
    run, (model, objective) = Run(tmp_path), dynamicvit()
    fit(model, objective, batches(4), steps=2, run=run, bar=False)
    for change, text in ((dict(smoothing=0.5), "smoothing 0.0 there, 0.5 now"),
                         (dict(weights=(1, 2, 3, 4)), "weights [1, 2, 0.5, 0.5] there, [1, 2, 3, 4] now")):
        with refuses(f"fit: {run.checkpoint('train')} belongs to another run ({text}): choose another --out, or delete it"):
            fit(model, Distil(model, objective.teacher, **change), batches(4), steps=2, run=run, bar=False)
    model, objective = dynamicvit()
    for p in model.parameters():
        p.lr_scale = 1.0
    with pytest.raises(tt.InputError, match=r"another run \(groups \[.*3.0.*\] there, \[\[1.0, False\], \[1.0, True\]\] now\)"):
        fit(model, objective, batches(4), steps=2, run=run, bar=False)


def test_numpy_numbers_among_the_settings(tmp_path):
    for _ in range(2):
        model, objective = vit()
        fit(model, objective, batches(4), steps=2, seed=np.int64(3), lr=np.float32(0.5), run=Run(tmp_path), bar=False)


@pytest.mark.parametrize("size, threads, slices", [(6, 2, [3, 3]), (7, 2, [4, 3]), (6, 1, [6]), (100, 2, [32, 32, 32, 4]),
                                                   (3, 8, [1, 1, 1])])
def test_each_thread_has_one_slice_of_at_most_32_images(size, threads, slices):
    model, seen = vit()[0], []

    class Watched(Classify):
        def __call__(self, images, labels):
            seen.append(len(images))
            return super().__call__(images, labels)
    drawn = lambda step: (np.zeros((size, 3, 8, 8), "float32"), np.zeros(size, int))
    drawn.batch_size = size
    fit(model, Watched(model), drawn, steps=1, threads=threads, bar=False)
    assert seen.pop(0) == 1  # whose multiply-adds are counted
    assert sorted(seen, reverse=True) == slices


@pytest.mark.parametrize("images, threads, macs, size", [(64, 2, 0, 32), (64, 2, 4.8e7, 32), (64, 2, 1.83e8, 8), (64, 1, 1.83e8, 8),
                                                         (7, 1, 3e9, 1), (7, 1, 6e8, 3), (200, 2, 1e8, 16), (1, 2, 1e12, 1)])
def test_slices_are_halved_as_long_as_half_has_enough_to_do(images, threads, macs, size):
    assert slice_size(images, threads, macs) == size


def test_what_is_recorded_is_counted():
    """Not the teacher, which runs under no_grad, and an op without declared multiply-adds counts zero."""
    model, objective = vit()
    images, labels = np.zeros((3, 3, 8, 8), "float32"), np.zeros(3, int)
    assert recorded_macs(objective, (images, labels)) == macs(model, images).total

    @op
    def unheard_of(x):
        return 2 * x, lambda g: 2 * g

    def teach(images):
        with no_grad():
            model(images)
        return unheard_of(model(images))
    assert recorded_macs(teach, (images,)) == macs(model, images).total


def test_inference_too_shares_its_images_among_the_threads():
    model, seen = vit()[0], []
    for size, threads in ((7, 2), (1, 2), (70, 1)):
        infer(model, np.zeros((size, 3, 8, 8), "float32"), lambda images: seen.append(len(images)) or images, threads=threads)
    assert sorted(seen) == sorted([4, 3, 1, 32, 32, 6])


def test_another_batch_size_is_another_run(tmp_path):
    model, objective = vit()
    for size in (4, 5):
        arguments = dict(steps=2, run=Run(tmp_path), bar=False)
        if size == 4:
            fit(model, objective, batches(4), **arguments)
        else:
            with pytest.raises(tt.InputError, match=r"belongs to another run \(batch 4 there, 5 now\)"):
                fit(model, objective, batches(5), **arguments)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    run = Run(tmp_path, every=4)
    with pytest.raises(PowerCut):
        train(at_step(vit, 6, power_cut), run)
    model, objective = lookupvit()
    before = bits(model)
    text = r"^fit: \S+train.npz belongs to another run \(model 'ViT' there, 'LookupViT' now, compressed None there, \[1, 1\] now"
    with pytest.raises(tt.InputError, match=text):
        train((model, objective), run)
    wide = ViT(**SIZES | {"dim": 16})
    with pytest.raises(tt.InputError, match=r"belongs to another run \(dim 8 there, 16 now, smoothing 0.1 there, 0.0 now\)"):
        train((wide, Classify(wide)), run)
    assert bits(model) == before and checkpoint.load(run.checkpoint("train"))[0]["step"] == 4


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path)
    train(vit, run)
    path = run.checkpoint("train")
    path.write_bytes(path.read_bytes()[:-100])
    with refuses(f"checkpoint: {path} is not a whole .npz file: truncated, or not a checkpoint"):
        train(vit, run)


def test_frozen_parameters_stay_as_they_are(tmp_path):
    model, objective = vit()
    model.blocks[0].requires_grad_(False)
    before = model.state_dict()
    train((model, objective), Run(tmp_path))
    frozen = {name for name, array in model.state_dict().items() if np.array_equal(array, before[name])}
    assert frozen == {name for name in before if name.startswith("blocks.0.")}


# Refused

def test_a_finite_loss_whose_gradient_is_not_is_refused_before_it_is_saved(tmp_path):
    model, _ = vit()

    class Steep(Classify):
        def __call__(self, images, labels):
            loss, parts = super().__call__(images, labels)
            return loss + ops.sqrt(loss * 0), parts  # its slope at 0 is infinite, and times 0 it is no number
    run = Run(tmp_path, every=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        with refuses("fit: the gradient's norm is nan at step 0 of train: try a learning rate below 0.01. "
                     "The last checkpoint is unharmed."):
            train((model, Steep(model)), run, threads=1)  # NumPy's error state is the thread's
    assert not run.checkpoint("train").exists()


@pytest.mark.parametrize("value, text", [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_no_number_is_refused_and_the_last_checkpoint_unharmed(value, text, tmp_path):
    run = Run(tmp_path, every=3)
    with pytest.raises(PowerCut):
        train(at_step(vit, 7, power_cut), run)
    saved = run.checkpoint("train").read_bytes()
    model, objective = vit()

    class Diverging(Classify):
        def __call__(self, images, labels):
            loss, parts = super().__call__(images, labels)
            return (loss + value if at[0] == 8 else loss), parts

        def noise(self, size, step, seed, xp):
            at[0] = step - 100
            return ()

    at = [None]
    with refuses(f"fit: the loss is {text} at step 8 of train: try a learning rate below 0.01. The last checkpoint is unharmed."):
        train((model, Diverging(model, smoothing=0.1)), run)
    with refuses(f"fit: the loss is {text} at step 8 of train: try a learning rate below 0.01"):
        at[0] = None
        train((model, Diverging(model, smoothing=0.1)))
    assert run.checkpoint("train").read_bytes() == saved
    assert all(np.isfinite(array).all() for array in checkpoint.load(run.checkpoint("train"))[1]["model"].values())


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_fit_refuses_steps(steps, tmp_path):
    with refuses(f"fit: steps {steps!r}, expected a positive whole number"):
        train(vit, Run(tmp_path), steps=steps)
    assert not list(tmp_path.iterdir())


def test_refused_before_a_step_is_made(tmp_path):
    with refuses("Run: a checkpoint every 0 steps, expected at least 1"):
        Run(tmp_path, every=0)
    with refuses("loss_and_grads: micro 0, threads 2: at least 1 each expected"):
        train(vit, micro=0)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("no folder")
    run = Run(tmp_path / "file" / "run")
    with pytest.raises(tt.InputError, match=rf"^cannot write {run.history}: (Not a directory|File exists)$"):
        train(vit, run, steps=2)
    with pytest.raises(tt.InputError, match=rf"^cannot write {run.history}: "):
        run.log(phase="x")


# Inference

def test_infer_is_the_forward_pass_in_parts(xp):
    model = ViT(**SIZES).to("cpu" if xp is np else "cuda").train()
    images = xp.asarray(np.random.default_rng(0).standard_normal((11, 3, 8, 8)).astype("float32"))
    logits = infer(model, images, batch_size=4, threads=2)
    assert isinstance(logits, np.ndarray) and model.training  # the mode is as it was
    expected = model.eval()(images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert infer(model, images, lambda x: x * 0, batch_size=3).shape == (11, 3) and not model.training
    with pytest.raises(tt.InputError):
        infer(model.train(), images[:, :2])
    assert model.training


def test_infer_passes_the_call_on_and_makes_no_graph():
    model, _ = lookupvit()
    images, seen = np.zeros((5, 3, 8, 8), "float32"), []
    prepare = lambda x: seen.append(ops.exp(model.pos_embed).requires_grad) or x
    logits = infer(model, images, prepare, threads=1, mean_of_heads=True)
    assert seen == [False]
    np.testing.assert_array_equal(logits, model.eval()(images, mean_of_heads=True).numpy())


def test_accuracy():
    logits = np.array([[0, 1, 2], [3, 1, 2], [0, 5, 1], [1, 0, 0]])
    assert accuracy(logits, np.array([2, 0, 0, 0])) == 0.75


def test_run_knows_its_files():
    run = Run("somewhere")
    assert run.checkpoint("vit") == pathlib.Path("somewhere/vit.npz") and run.history == pathlib.Path("somewhere/history.jsonl")


# Memory

class Greedy:
    """An objective that has room for `most` images at a time."""
    settings = {}

    def __init__(self, model, most):
        self.inner, self.model, self.most, self.tried = Classify(model), model, most, []

    def noise(self, size, step, seed, xp):
        return ()

    def __call__(self, images, labels):
        self.tried.append(len(images))
        if len(images) > self.most:
            raise MemoryError(f"Out of memory allocating {len(images)} bytes\n(allocated so far: 0)")
        return self.inner(images, labels)


@pytest.mark.parametrize("most, said", [
    (3, "a batch of 16 images does not fit into memory, one of 2 does (Out of memory allocating 16 bytes (allocated so far: 0))"),
    (0, "not even one image fits into memory (Out of memory allocating 16 bytes (allocated so far: 0))")])
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(most, said):
    objective = Greedy(ViT(**SIZES), most)
    weights = bits(objective.model)
    with refuses(f"fit: {said}"):
        fit(objective.model, objective, batches(16), steps=3, micro=16, threads=1, bar=False)
    assert objective.tried == [16, 8, 4, 2] + [1] * (most == 0) and bits(objective.model) == weights


def test_other_errors_in_a_step_pass():
    objective = Greedy(ViT(**SIZES), 99)
    objective.inner = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(objective.model, objective, batches(16), steps=3, micro=16, threads=1, bar=False)
