"""What can be said of a run on a GPU without one, on the stand-in: nothing is read or copied in a step,
arrays of the host and of the device do not meet, and the same code gives what it gives on NumPy."""
import json

import numpy as np
import pytest

import standin
import tinytoken as tt
from test_lessons import name_of, run, scripts
from tinytoken import nn
from tinytoken.backend import choose_device, device_of, to_device
from tinytoken.data import Batches, make_scenes, normalise
from tinytoken.experiments import Recipe, compare
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import Classify, Distil, Run, accuracy, fit, infer

SIZES = dict(patch_size=8, dim=8, depth=2, heads=2)
SCENES = make_scenes(24, seed=0)


@pytest.fixture
def counts():
    with standin.installed() as found:
        yield found


def dynamicvit():
    return DynamicViT(**SIZES, prune_before=(1,), keep_ratios=(0.5,))


TASKS = {
    "vit": lambda device: Classify(ViT(**SIZES).to(device), drop_path=0.2),
    "lookupvit": lambda device: Classify(LookupViT(**SIZES, compressed=(2, 2)).to(device)),
    "dynamicvit": lambda device: Distil(dynamicvit().to(device), ViT(**SIZES).to(device), drop_path=0.2)}


def batches(device):
    images, labels = (to_device(array, device) for array in (SCENES.images, SCENES.labels))
    return Batches(images, labels, 8, pad=4, flip=True, erase=0.3, mixup=0.2, cutmix=1.0)


def trained(name, device, steps=6, **more):
    tt.manual_seed(0)
    task = TASKS[name](device)
    settings = dict(steps=steps, log_every=3, bar=False, micro=8, threads=1)
    found = fit(task.model, task, batches(device), **settings, **more)
    return task.model, {name: value for name, value in found.items() if name != "seconds"}


@pytest.mark.parametrize("name", TASKS)
def test_a_run_is_read_once_where_it_logs_and_equals_the_one_on_numpy(name, counts, tmp_path):
    model, found = trained(name, "cuda", average=0.9, run=Run(tmp_path, every=100))
    expected, said = trained(name, "cpu", average=0.9)
    assert {device_of(p.data) for p in model.parameters()} == {"cuda"}
    images = normalise(SCENES.images, (0.5,) * 3, (0.2,) * 3)
    answers = infer(model, to_device(images, "cuda"))
    np.testing.assert_allclose(answers, infer(expected, images), rtol=0, atol=1e-4)
    assert found == pytest.approx(said, abs=1e-5)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", TASKS)
def test_a_step_copies_nothing(name, counts):
    trained(name, "cuda", steps=3)  # whatever is made once has been made
    tt.manual_seed(0)
    task, made = TASKS[name]("cuda"), batches("cuda")
    counts.update(reads=0, copies=0)
    fit(task.model, task, made, steps=6, log_every=3, bar=False)
    assert counts == {"reads": 2, "copies": 0}  # six steps, read at two of them


def test_the_stand_in_counts_and_refuses(counts):
    x = to_device(np.ones((2, 3), "float32"), "cuda")
    assert counts == {"reads": 0, "copies": 1} and choose_device("auto") == "cuda"
    for read in (lambda: float(x.sum()), lambda: x[0, 0].item(), lambda: bool((x > 0).all()),
                 lambda: x[x > 0], lambda: f"{x.sum():.3f}", lambda: x.tolist(), lambda: x.get()):
        before = counts["reads"]
        read()
        assert counts["reads"] == before + 1
    for mixed in (lambda: x + np.ones(3), lambda: np.ones(3) * x,
                  lambda: np.concatenate([x, np.ones((1, 3))]), lambda: np.asarray(x),
                  lambda: x.__setitem__(..., np.ones((2, 3))), lambda: np.vecdot(x, x)):
        with pytest.raises(TypeError):
            mixed()
    assert isinstance(np.exp(x), standin.ndarray) and isinstance(x.sum(), standin.ndarray)
    assert x.sum().shape == ()
    y = x
    y += 1
    assert y is x and float(y.sum()) == 12
    with pytest.raises(tt.InputError, match="on the CPU and on the GPU"):
        tt.Tensor(x, requires_grad=True) + np.ones(3)


def test_inference_copies_pictures_in_and_logits_out(counts):
    model = dynamicvit().to("cuda")
    prepare = lambda images: normalise(to_device(images, "cuda"), (0.5,) * 3, (0.2,) * 3)
    infer(model, SCENES.images, prepare, batch_size=8)
    counts.update(reads=0, copies=0)
    logits = infer(model, SCENES.images, prepare, batch_size=8)
    assert counts == {"reads": 3, "copies": 3} and 0 <= accuracy(logits, SCENES.labels) <= 1


def test_starting_weights_are_the_same_where_they_are_made(counts):
    tt.manual_seed(3)
    model = ViT(**SIZES)
    before = model.state_dict()
    nn.initialise(model.to("cuda"))
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())


@pytest.mark.slow
def test_the_main_job(counts, tmp_path):
    recipe = Recipe(steps=4, batch=8, dim=8, depth=2, heads=2, patch=8, prune_before=(1,), keep_ratios=(0.5,),
                    compressed=(2, 2), train_pictures=16, test_pictures=8)
    table, _ = compare.run(recipe, tmp_path, device="cuda", bar=False)
    assert len(table["rows"]) == 3 and table["machine"]["device"] == "cuda"


ELSEWHERE = ("12", "13")  # a kernel of its own; cuda/test_capture.py


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in scripts if script.stem[:2] not in ELSEWHERE] + [
    scripts[0].parent / "full" / "cifar10.py"], ids=lambda script: script.stem)
def test_lessons(script, tmp_path, monkeypatch, counts):
    run(script, tmp_path, monkeypatch, "--device", "cuda", "--data", "scenes")
    assert json.loads((tmp_path / f"{name_of(script)}.json").read_text())["machine"]["device"] == "cuda"
