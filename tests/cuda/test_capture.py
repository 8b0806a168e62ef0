"""The captured step on the stand-in, whose graphs repeat what was captured on the same memory: replayed steps equal ordinary ones."""
import numpy as np
import pytest

import standin
import tinytoken as tt
from emulate import Emulator, compiler, numpy_product
from test_lessons import run, scripts
from test_standin import OBJECTIVES, SIZES, batches
from tinytoken.backend import faster, to_numpy
from tinytoken.cuda import gemm, launcher
from tinytoken.train import fit, infer

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler to run the kernels with")


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    monkeypatch.setattr(gemm, "product", numpy_product)
    monkeypatch.setattr(gemm, "library", lambda: "some")
    with standin.installed(kernels=True), launcher.running_on(Emulator()) as found:
        tt._kernels()
        yield found


def trained(name, steps=6, **more):
    tt.manual_seed(0)
    objective = OBJECTIVES[name]("cuda")
    found = fit(objective.model, objective, batches("cuda"), steps=steps, log_every=2, bar=False, **more)
    return {n: to_numpy(p.data) for n, p in objective.model.named_parameters()}, {n: v for n, v in found.items() if n != "seconds"}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_are_the_ordinary_ones_bit_by_bit(name, precision, monkeypatch):
    if precision == "bf16":
        monkeypatch.setitem(SIZES, "dim", 32)  # heads that its kernels cover
    weights, said = trained(name, average=0.9, precision=precision)
    monkeypatch.delitem(faster, "captured_step")
    expected, told = trained(name, average=0.9, precision=precision)
    assert said == told and all(np.array_equal(weights[n], expected[n]) for n in expected)


def test_from_the_third_step_on_nothing_is_launched_but_the_batch_and_the_rates(emulator):
    trained("vit", 3)
    before = list(emulator.launches)
    emulator.launches.clear()
    trained("vit", 6)
    more = [name for name, *_ in emulator.launches[len(before):]]
    assert emulator.launches[:len(before)] == before and set(more) == {"random_bits", "gather_pictures", "set_rates"}


def test_a_step_that_cannot_be_captured_goes_on_with_one_warning(monkeypatch):
    class Nosy(type(OBJECTIVES["vit"]("cpu"))):
        def __call__(self, images, *rest):
            float(images.sum())
            return super().__call__(images, *rest)
    make = lambda device: Nosy(OBJECTIVES["vit"](device).model)
    monkeypatch.setitem(OBJECTIVES, "nosy", make)
    with pytest.warns(UserWarning, match="could not be captured .RuntimeError: the current stream is capturing.*launched by itself") as warned:
        weights, _ = trained("nosy")
    assert len(warned) == 1
    monkeypatch.delitem(faster, "captured_step")
    expected, _ = trained("nosy")
    assert all(np.array_equal(weights[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_inference_is_captured_where_it_is_worth_it(name, emulator):
    tt.manual_seed(0)
    model = OBJECTIVES[name]("cuda").model
    images, many = batches("cuda")(0)[0], standin.modules()["cupy"].concatenate
    expected = infer(model, images, batch_size=8)
    emulator.launches.clear()
    found = infer(model, many([images] * 6 + [images[:3]]), batch_size=8)
    once = len(emulator.launches)
    assert np.array_equal(found, np.concatenate([expected] * 6 + [infer(model, images[:3])]))
    emulator.launches.clear()
    infer(model, many([images] * 12 + [images[:3]]), batch_size=8)
    assert len(emulator.launches) == once  # the six more launched nothing


def test_another_batch_size_is_an_ordinary_step(emulator):
    from tinytoken.cuda.capture import CapturedStep
    tt.manual_seed(0)
    objective = OBJECTIVES["lookupvit"]("cuda")
    params = objective.model.parameters()
    take = CapturedStep(lambda arrays: tt.optim.loss_and_grads(objective, params, arrays), tt.optim.AdamW(params))
    arrays = batches("cuda")(0)
    for _ in range(4):
        take(arrays, 1e-3)
    emulator.launches.clear()
    loss, parts, norm = take(tuple(a[:5] for a in arrays), 1e-3)
    assert len(emulator.launches) > 20 and float(norm) > 0 and float(loss) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)
    emulator.launches.clear()
    take(arrays, 1e-3)
    assert [name for name, *_ in emulator.launches] == ["set_rates"]


@pytest.mark.slow
def test_lesson_13_on_a_device(tmp_path, monkeypatch):
    script, = (script for script in scripts if script.stem == "13_one_step")
    noted = run(script, tmp_path, monkeypatch, "--device", "cuda")  # it asserts that captured and ordinary steps end in the same weights
    assert noted["on_gpu"] and noted["accuracy"].keys() == {"fp32", "bf16"} and len(noted["step_seconds"]) == 2
