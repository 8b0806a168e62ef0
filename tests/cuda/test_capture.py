"""The captured step: replayed steps equal ordinary ones. The stand-in's graphs repeat what was captured, on the same memory."""
import numpy as np
import pytest

import standin
import tinytoken as tt
from test_lessons import run, scripts
from test_standin import OBJECTIVES, SIZES, batches
from tinytoken import random
from tinytoken.backend import faster, module_for, to_numpy
from tinytoken.train import Run, fit, infer


def trained(name, steps=None, **more):
    """steps: two ordinary ones, the captured one and a replay on the stand-in, which is slow; 20 on a device."""
    steps = steps or (4 if standin.in_place_of_cupy() else 20)
    tt.manual_seed(0)
    objective = OBJECTIVES[name]("cuda")
    found = fit(objective.model, objective, batches("cuda"), steps=steps, log_every=2, bar=False, **more)
    return {n: to_numpy(p.data) for n, p in objective.model.named_parameters()}, {n: v for n, v in found.items() if n != "seconds"}


@pytest.mark.parametrize("name, precision", [pytest.param(name, precision, marks=[] if (name, precision) == (
    "dynamicvit", "bf16") else pytest.mark.slow) for name in OBJECTIVES for precision in ("fp32", "bf16")])
def test_replayed_steps_are_the_ordinary_ones_bit_by_bit(name, precision, there, monkeypatch):
    if precision == "bf16":
        monkeypatch.setitem(SIZES, "dim", 32)  # heads that its kernels cover
    weights, said = trained(name, average=0.9, precision=precision, offset=7)
    monkeypatch.delitem(faster, "captured_run")
    expected, told = trained(name, average=0.9, precision=precision, offset=7)
    assert said == told and all(np.array_equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["vit", pytest.param("dynamicvit", marks=pytest.mark.slow)])
def test_from_the_third_step_on_nothing_is_launched(name, there):
    """Not the batch either, nor the noise or the rates; within an epoch: its order is drawn before its first step."""
    trained(name, 3)
    before = list(there)
    there.clear()
    trained(name, 6)
    more = [name for name, *_ in there[len(before):]]
    assert there[:len(before)] == before and set(more) <= {"random_bits"} and len(more) == 1  # an epoch has three steps


def test_noise_that_looks_at_the_number_is_drawn_outside_of_the_graph(there, monkeypatch):
    class Counting(type(OBJECTIVES["vit"]("cpu"))):
        def noise(self, size, step, seed, xp):
            return (xp.full(size, float(random.integers(1, 5, site="here", step=step, seed=seed)[0]), "float32"),)

        def __call__(self, images, labels, times):
            return super().__call__(images * times[:, None, None, None], labels)
    monkeypatch.setitem(OBJECTIVES, "counting", lambda device: Counting(OBJECTIVES["vit"](device).model))
    weights, _ = trained("counting")
    monkeypatch.delitem(faster, "captured_run")
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
        objective, given = OBJECTIVES["vit"]("cuda"), batches("cuda")
        given.__class__ = kind
        found = fit(objective.model, objective, given, steps=6, log_every=2, bar=False, run=Run(tmp_path, every=2))
        return {n: to_numpy(p.data) for n, p in objective.model.named_parameters()}, found
    with pytest.raises(KeyboardInterrupt):
        go(Stopped)
    weights, found = go(type(batches("cpu")))
    assert all(np.array_equal(weights[n], whole[n]) for n in whole) and found["loss"] == said["loss"]


def test_a_step_that_cannot_be_captured_goes_on_with_one_warning(there, monkeypatch):
    class Nosy(type(OBJECTIVES["vit"]("cpu"))):
        def __call__(self, images, *rest):
            float(images.sum())
            return super().__call__(images, *rest)
    make = lambda device: Nosy(OBJECTIVES["vit"](device).model)
    monkeypatch.setitem(OBJECTIVES, "nosy", make)
    with pytest.warns(UserWarning, match="a training step could not be captured .*launched by itself") as warned:
        weights, _ = trained("nosy")
    assert len(warned) == 1
    monkeypatch.delitem(faster, "captured_run")
    expected, _ = trained("nosy")
    assert all(np.array_equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["dynamicvit", pytest.param("lookupvit", marks=pytest.mark.slow), pytest.param("vit", marks=pytest.mark.slow)])
def test_inference_is_captured_where_it_is_worth_it(name, there):
    tt.manual_seed(0)
    model = OBJECTIVES[name]("cuda").model
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
    from tinytoken.cuda.capture import CapturedStep
    tt.manual_seed(0)
    objective = OBJECTIVES["lookupvit"]("cuda")
    params = objective.model.parameters()
    take = CapturedStep(lambda arrays: tt.optim.loss_and_grads(objective, params, arrays), tt.optim.AdamW(params))
    arrays = batches("cuda")(0)
    for _ in range(4):
        take(arrays, 1e-3)
    there.clear()
    loss, parts, norm = take(tuple(a[:5] for a in arrays), 1e-3)
    assert len(there) > 20 and float(norm) > 0 and float(loss) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)
    there.clear()
    take(arrays, 1e-3)
    assert [name for name, *_ in there] == ["set_rates"]


@pytest.mark.slow
def test_lesson_13_on_a_device(there, tmp_path, monkeypatch):
    script, = (script for script in scripts if script.stem == "13_one_step")
    noted = run(script, tmp_path, monkeypatch, "--device", "cuda")  # it asserts that captured and ordinary steps end in the same weights
    assert noted["on_gpu"] and noted["accuracy"].keys() == {"fp32", "bf16"} and len(noted["step_seconds"]) == 2
