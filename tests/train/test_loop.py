"""The training loop: the same bits from the same seed, what it reports, how it cuts a batch, and what is
refused."""
import math
import threading

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import (SIZES, STEPS, PowerCut, at_step, batches, bits, dynamicvit, history, power_cut, train, vit)
from tinytoken import backend, ops
from tinytoken.cost import macs, recorded_macs
from tinytoken.data import normalise
from tinytoken.models import ViT
from tinytoken.tensor import no_grad, op
from tinytoken.train import Classify, Run, accuracy, checkpoint, fit, infer, step

both = pytest.mark.parametrize("make", [vit, dynamicvit])


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
    report, rows = dict(uninterrupted[make][1]), uninterrupted[make][2]
    assert [row["step"] for row in rows] == [2, 5, 8, 11, 14, 17, 19]
    parts = ["class"] if make is vit else ["class", "ratio", "kl", "token"]
    assert list(report) == ["seconds", "loss", *parts]
    for row in rows:
        assert list(row) == ["phase", "step", "lr", "loss", *parts] and row["phase"] == "train"
        assert row["lr"] == pytest.approx(0.01 * tt.optim.warmup_cosine(row["step"], STEPS))
    del report["seconds"]
    assert {name: rows[-1][name] for name in report} == report


def test_the_history_has_means_since_the_row_before(tmp_path):
    train(vit, Run(tmp_path / "each"), log_every=1)
    train(vit, Run(tmp_path / "mean"), log_every=8)
    single = [row["loss"] for row in history(tmp_path / "each")]
    assert [row["loss"] for row in history(tmp_path / "mean")] == pytest.approx(
        [np.mean(single[:8]), np.mean(single[8:16]), np.mean(single[16:])])


def test_fit_learns_and_leaves_the_model_in_eval_mode():
    data, (model, task) = batches(20), vit()
    first, last = [fit(model, task, data, steps=steps, lr=0.01, bar=False)["loss"] for steps in (1, 60)]
    assert last < 0.75 * first and not model.training and not model.head.training
    prepare = lambda images: normalise(images, data.mean, data.std)
    assert accuracy(infer(model, data.images, prepare), data.labels) > 0.9


def test_fit_trains_a_model_that_was_in_eval_mode(uninterrupted):
    model, task = dynamicvit()
    model.eval()
    assert bits(train((model, task))[0]) == uninterrupted[dynamicvit][0]


def test_fit_runs_outside_the_main_thread(uninterrupted):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(vit)[0]))
    thread.start()
    thread.join()
    assert bits(found[0]) == uninterrupted[vit][0]


def test_frozen_parameters_stay_as_they_are(tmp_path):
    model, task = vit()
    model.blocks[0].requires_grad_(False)
    before = model.state_dict()
    train((model, task), Run(tmp_path))
    frozen = {name for name, array in model.state_dict().items() if np.array_equal(array, before[name])}
    assert frozen == {name for name in before if name.startswith("blocks.0.")}


def test_an_implementation_may_take_the_steps(monkeypatch, uninterrupted):
    """fit asks it for its whole work, once; the numbers of the steps, their rates and their draws are those
    of the plain way."""
    monkeypatch.setattr(backend, "implementations", {})
    works, taken = [], []

    @backend.implementation(step.stepper, "numpy", covers=lambda work: work.seed == 5)
    def mine(work):
        works.append(work)

        def take(number):
            taken.append(number)
            arrays = work.batches(work.offset + number)
            draws = work.noise(len(arrays[0]), work.offset + number)
            loss, parts = work.gradients(arrays, draws, work.micro, work.threads)
            return loss, parts, work.optimizer.step(work.rates[number])
        return take
    model, report = train(dynamicvit)
    assert bits(model) == uninterrupted[dynamicvit][0]
    assert report["loss"] == uninterrupted[dynamicvit][1]["loss"]
    assert taken == list(range(STEPS)) and len(works) == 1 and len(works[0].rates) == STEPS
    train(dynamicvit, seed=6, steps=2)
    with tt.plain():
        train(dynamicvit, steps=2)
    assert len(works) == 1


# Slices and memory

@pytest.mark.parametrize("size, threads, slices",
                         [(6, 2, [3, 3]), (7, 2, [4, 3]), (6, 1, [6]), (100, 2, [32, 32, 32, 4]),
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


def test_what_is_recorded_is_counted():
    """Not the teacher, which runs under no_grad, and an op without declared multiply-adds counts zero."""
    model, task = vit()
    images, labels = np.zeros((3, 3, 8, 8), "float32"), np.zeros(3, int)
    assert recorded_macs(task, (images, labels)) == macs(model, images).total

    @op
    def unheard_of(x):
        return 2 * x, lambda g: 2 * g

    def teach(images):
        with no_grad():
            model(images)
        return unheard_of(model(images).logits)
    assert recorded_macs(teach, (images,)) == macs(model, images).total


class Greedy(Classify):
    """A task that has room for `most` images at a time."""

    def __init__(self, model, most):
        super().__init__(model)
        self.inner, self.most, self.tried = Classify(model), most, []

    def __call__(self, images, labels):
        self.tried.append(len(images))
        if len(images) > self.most:
            raise MemoryError(f"Out of memory allocating {len(images)} bytes\n(allocated so far: 0)")
        return self.inner(images, labels)


@pytest.mark.parametrize("most, said", [
    (3, "a batch of 16 images does not fit into memory, one of 2 does (Out of memory allocating 16 bytes "
        "(allocated so far: 0))"),
    (0, "not even one image fits into memory (Out of memory allocating 16 bytes (allocated so far: 0))")])
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(most, said):
    task = Greedy(ViT(**SIZES), most)
    weights = bits(task.model)
    with refuses(f"fit: {said}"):
        fit(task.model, task, batches(16), steps=3, micro=16, threads=1, bar=False)
    assert task.tried == [16, 8, 4, 2] + [1] * (most == 0) and bits(task.model) == weights


def test_the_refusal_is_not_taken_for_an_error_of_the_memory():
    """CUDA's own message has a word by which such errors are known; the refusal quotes it."""
    class OnDevice(Greedy):
        def __call__(self, images, labels):
            if len(images) > self.most:
                raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
            return self.inner(images, labels)
    task = OnDevice(ViT(**SIZES), 3)
    with refuses("fit: a batch of 16 images does not fit into memory, one of 2 does "
                 "(cudaErrorMemoryAllocation: out of memory)"):
        fit(task.model, task, batches(16), steps=3, micro=16, threads=1, bar=False)


def test_other_errors_in_a_step_pass():
    task = Greedy(ViT(**SIZES), 99)
    task.inner = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(task.model, task, batches(16), steps=3, micro=16, threads=1, bar=False)


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
    model, task = vit()

    class Diverging(Classify):
        def __call__(self, images, labels):
            loss, parts = super().__call__(images, labels)
            return (loss + value if at[0] == 8 else loss), parts

        def noise(self, size, step, seed, xp):
            at[0] = step - 100
            return {}

    at = [None]
    with refuses(f"fit: the loss is {text} at step 8 of train: try a learning rate below 0.01. "
                 "The last checkpoint is unharmed."):
        train((model, Diverging(model, smoothing=0.1)), run)
    with refuses(f"fit: the loss is {text} at step 8 of train: try a learning rate below 0.01"):
        at[0] = None
        train((model, Diverging(model, smoothing=0.1)))
    assert run.checkpoint("train").read_bytes() == saved
    assert all(np.isfinite(array).all()
               for array in checkpoint.load(run.checkpoint("train"))[1]["model"].values())


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
    reasons = "Not a directory|File exists"
    with pytest.raises(tt.InputError, match=rf"^cannot write {run.folder}/train.npz.lock: ({reasons})$"):
        train(vit, run, steps=2)
    with pytest.raises(tt.InputError, match=rf"^cannot write {run.history}.lock: "):
        run.log(phase="x")
