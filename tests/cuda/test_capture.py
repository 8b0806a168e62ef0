"""The captured step: replayed steps equal ordinary ones. The stand-in's graphs repeat what was captured, on
the same memory."""
import numpy as np
import pytest

import standin
import tinytoken as tt
from test_lessons import run, scripts
from test_standin import SIZES, TASKS, batches
from tinytoken import random
from tinytoken.backend import implementations, module_for, to_numpy
from tinytoken.train import Run, fit, infer
from tinytoken.train.step import Work, stepper


def trained(name, steps=None, **more):
    """steps: two ordinary ones, the captured one and a replay on the stand-in, which is slow; else 20."""
    steps = steps or (4 if standin.in_place_of_cupy() else 20)
    tt.manual_seed(0)
    task = TASKS[name]("cuda")
    found = fit(task.model, task, batches("cuda"), steps=steps, log_every=2, bar=False, **more)
    weights = {n: to_numpy(p.data) for n, p in task.model.named_parameters()}
    return weights, {n: v for n, v in found.items() if n != "seconds"}


@pytest.mark.parametrize("name, precision", [pytest.param(name, precision, marks=[] if (name, precision) == (
    "dynamicvit", "bf16") else pytest.mark.slow) for name in TASKS for precision in ("fp32", "bf16")])
def test_replayed_steps_are_the_ordinary_ones_bit_by_bit(name, precision, there, monkeypatch):
    if precision == "bf16":
        monkeypatch.setitem(SIZES, "dim", 32)  # heads that its kernels cover
    weights, said = trained(name, average=0.9, precision=precision, offset=7)
    monkeypatch.delitem(implementations, (stepper, "cupy"))
    expected, told = trained(name, average=0.9, precision=precision, offset=7)
    assert said == told and all(np.array_equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["vit", pytest.param("dynamicvit", marks=pytest.mark.slow)])
def test_from_the_third_step_on_nothing_is_launched(name, there):
    """Not the batch either, nor the noise or the rates; within an epoch: its order is drawn before it."""
    trained(name, 3)
    before = list(there)
    there.clear()
    trained(name, 6)
    more = [name for name, *_ in there[len(before):]]
    assert there[:len(before)] == before and more == ["random_bits"]  # an epoch has three steps


def test_noise_that_looks_at_the_number_is_drawn_outside_of_the_graph(there, monkeypatch):
    class Counting(type(TASKS["vit"]("cpu"))):
        def noise(self, size, step, seed, xp):
            drawn = random.integers(2, 5, site="here", step=step, seed=seed)
            of_pictures = lambda n: xp.full((size, 1, 1, 1), float(n), "float32")
            return {"times": of_pictures(drawn[0]), "more": of_pictures(drawn[1])}

        def __call__(self, images, labels, times, more):
            return super().__call__(images * times + more, labels)
    monkeypatch.setitem(TASKS, "counting", lambda device: Counting(TASKS["vit"](device).model))
    weights, _ = trained("counting")
    monkeypatch.delitem(implementations, (stepper, "cupy"))
    expected, _ = trained("counting")
    assert all(np.array_equal(weights[n], expected[n]) for n in expected)


def test_an_interrupted_run_goes_on_with_the_steps_that_follow(there, tmp_path):
    whole, said = trained("vit", 6)

    class Stopped(type(batches("cpu"))):
        def chosen(self, step):
            if step == 4:
                raise KeyboardInterrupt
            return super().chosen(step)

    def go(kind):
        tt.manual_seed(0)
        task, given = TASKS["vit"]("cuda"), batches("cuda")
        given.__class__ = kind
        found = fit(task.model, task, given, steps=6, log_every=2, bar=False, run=Run(tmp_path, every=2))
        return {n: to_numpy(p.data) for n, p in task.model.named_parameters()}, found
    with pytest.raises(KeyboardInterrupt):
        go(Stopped)
    weights, found = go(type(batches("cpu")))
    assert all(np.array_equal(weights[n], whole[n]) for n in whole) and found["loss"] == said["loss"]


def test_a_step_that_cannot_be_captured_goes_on_with_one_warning(there, monkeypatch):
    class Nosy(type(TASKS["vit"]("cpu"))):
        def __call__(self, images, *rest, **draws):
            float(images.sum())
            return super().__call__(images, *rest, **draws)
    make = lambda device: Nosy(TASKS["vit"](device).model)
    monkeypatch.setitem(TASKS, "nosy", make)
    text = "a training step could not be captured .*launched by itself"
    with pytest.warns(UserWarning, match=text) as warned:
        weights, _ = trained("nosy")
    assert len(warned) == 1
    monkeypatch.delitem(implementations, (stepper, "cupy"))
    expected, _ = trained("nosy")
    assert all(np.array_equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["dynamicvit", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("lookupvit", "vit"))])
def test_inference_is_captured_where_it_is_worth_it(name, there):
    tt.manual_seed(0)
    model = TASKS[name]("cuda").model
    images, many = batches("cuda")(0)[0], module_for("cuda").concatenate
    expected = infer(model, images, batch_size=8)
    there.clear()
    found = infer(model, many([images] * 6 + [images[:3]]), batch_size=8)
    once = len(there)
    assert np.array_equal(found, np.concatenate([expected] * 6 + [infer(model, images[:3])]))
    there.clear()
    infer(model, many([images] * 12 + [images[:3]]), batch_size=8)
    assert len(there) == once  # the six more launched nothing


def test_another_batch_size_is_an_ordinary_step(there):
    from tinytoken.cuda.capture import CapturedSteps
    tt.manual_seed(0)
    task, arrays = TASKS["lookupvit"]("cuda"), batches("cuda")(0)
    fewer = lambda step: tuple(a[:5] for a in arrays) if step == 4 else arrays
    take = CapturedSteps(Work(task, fewer, tt.optim.AdamW(task.model.parameters()), rates=[1e-3] * 6))
    for step in range(4):
        take(step)
    there.clear()
    loss, parts, norm = take(4)
    assert len(there) > 20 and float(norm) > 0
    assert float(loss) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)
    there.clear()
    take(5)
    assert there == []


@pytest.mark.slow
def test_lesson_13_on_a_device(there, tmp_path, monkeypatch):
    script, = (script for script in scripts if script.stem == "13_one_step")
    # it asserts that captured and ordinary steps end in the same weights
    noted = run(script, tmp_path, monkeypatch, "--device", "cuda")
    assert noted["on_gpu"] and noted["accuracy"].keys() == {"fp32", "bf16"} and len(noted["step_seconds"]) == 2
