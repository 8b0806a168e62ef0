"""Convolutions and batch norm as layers: what they learn, their running statistics, alone, in slices of a
batch on several threads, in a resumed run."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken
from tinytoken import nn, ops
from tinytoken.checking import gradcheck
from tinytoken.tasks import Task
from tinytoken.train import Run, fit, loss_and_grads
from tiny import PowerCut, at_step, batches, bits, history, power_cut


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


class Stem(nn.Module):
    """Two convolutions, each with its batch norm, and a classifier of the mean."""

    def __init__(self):
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4), nn.BatchNorm2d(4, eps=0.1)
        self.head = nn.Linear(4, 3)
        nn.initialise(self)

    def forward(self, images):
        x = images if isinstance(images, tt.Tensor) else tt.Tensor(images.astype(self.dtype))
        x = ops.relu(self.bn1(self.conv1(x)))
        return self.head(ops.relu(self.bn2(self.conv2(x))).mean(axis=(2, 3)))


class Classify(Task):
    def __call__(self, images, labels, **draws):
        return ops.cross_entropy(self.model(images), labels), {}

    def noise(self, size, step, seed, xp=np):
        return {}


def pictures(batch=6, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8))


def test_names_are_pytorchs_and_statistics_are_no_parameters():
    model = Stem()
    assert [name for name, _ in model.named_parameters()] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias",
        "head.weight", "head.bias"]
    assert [name for name, _ in model.named_buffers()] == [
        f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")]
    assert {name for name, p in model.named_parameters() if p.decay} == {"conv1.weight", "conv2.weight",
                                                                         "head.weight"}
    assert model.conv1.weight.shape == (4, 3, 3, 3) and model.conv2.weight.shape == (4, 1, 3, 1)
    assert model.bn1.running_var.data.tolist() == [1] * 4 and not model.bn1.running_mean.data.any()


def test_convolutions_start_as_he_says():
    weight = nn.Conv2d(8, 50, 3).weight
    assert not weight.data.any()
    model = Stem()
    model.conv1 = nn.Conv2d(8, 50, 3)
    nn.initialise(model)
    bound = (6 / 72) ** 0.5
    weight = model.conv1.weight.data
    assert 0.98 * bound < np.abs(weight).max() <= bound
    assert abs(weight.std() - bound / 3 ** 0.5) < 0.02 * bound
    assert np.abs(model.conv2.weight.data).max() > 0.5 * (6 / 3) ** 0.5  # a filter of 3 places each
    again = Stem()
    assert np.array_equal(again.conv2.weight.data, model.conv2.weight.data)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_layers(training):
    model = shaken(Stem()).train(training)
    for _, buffer in model.named_buffers():
        buffer.data += 0.3 * np.random.default_rng(1).random(buffer.shape)
    x = tt.Tensor(pictures(2), requires_grad=True)
    gradcheck(lambda *leaves: model(x), x, *model.parameters(), max_elements=60)


def test_running_statistics_by_hand():
    norm = nn.BatchNorm2d(2, momentum=0.25).astype("float64")
    mean, var = np.zeros(2), np.ones(2)
    for step in range(3):
        x = 1 + step + np.random.default_rng(step).standard_normal((3, 2, 4, 5))
        norm.train()(tt.Tensor(x))
        mean = 0.75 * mean + 0.25 * x.mean(axis=(0, 2, 3))
        var = 0.75 * var + 0.25 * x.var(axis=(0, 2, 3), ddof=1)
    same(norm.running_mean.data, mean)
    same(norm.running_var.data, var)
    out = norm.eval()(tt.Tensor(x)).data
    same(out, (x - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None])
    same(norm.running_mean.data, mean)  # eval mode moves nothing


def test_one_value_per_channel_has_no_variance():
    with refuses("BatchNorm2d: one value per channel in train mode, which has no variance"):
        nn.BatchNorm2d(2)(tt.Tensor(np.ones((1, 2, 1, 1), "float32")))
    with refuses("Conv2d: groups 2 do not divide channels 3 and 4"):
        nn.Conv2d(3, 4, 1, groups=2)


# Slices and threads

def statistics(model):
    return {name: buffer.data.copy() for name, buffer in model.named_buffers()}


def test_a_cut_batch_moves_the_statistics_once_by_the_mean_of_its_slices():
    model, images, labels = Stem().astype("float64"), pictures(7), np.arange(7) % 3
    task, start = Classify(model), statistics(model)
    found = []
    for cut in (slice(0, 3), slice(3, 6), slice(6, 7)):
        one = Stem().astype("float64")
        one(images[cut])
        found.append(statistics(one))
    loss_and_grads(task, model.parameters(), (images, labels), micro=3, threads=2)
    for name, value in statistics(model).items():
        same(value, 3 / 7 * found[0][name] + 3 / 7 * found[1][name] + 1 / 7 * found[2][name])
        assert not np.array_equal(value, start[name])


def test_statistics_do_not_depend_on_the_threads_to_the_bit():
    labels, bits_of = np.arange(13) % 3, set()
    for threads in (1, 2, 3, 2, 3):
        model = Stem()
        loss_and_grads(Classify(model), model.parameters(), (pictures(13), labels), micro=2, threads=threads)
        bits_of.add(b"".join(value.tobytes() for value in statistics(model).values()))
    assert len(bits_of) == 1


def test_an_uncut_batch_is_a_call_of_the_model():
    one, other, labels = Stem(), Stem(), np.arange(6) % 3
    loss_and_grads(Classify(one), one.parameters(), (pictures(), labels), micro=6)
    other(pictures())
    for name, value in statistics(one).items():
        np.testing.assert_allclose(value, statistics(other)[name], rtol=1e-6)


def test_slices_must_find_the_same():
    model, calls = Stem(), []

    def loss(images, labels):
        calls.append(len(images))
        without = model.head(tt.Tensor(np.ones((2, 4), "float32")))
        return ops.cross_entropy(model(images) if len(calls) > 1 else without, labels)
    with refuses("buffers: slices of one batch that update other buffers, or in another order"):
        loss_and_grads(loss, model.parameters(), (pictures(4), np.arange(4) % 3), micro=2, threads=1)


def test_noted_is_of_its_thread_and_ends():
    model = Stem()
    before = statistics(model)
    with nn.noted() as notes:
        model(pictures())
    assert [buffer for buffer, _, _ in notes] == [buffer for _, buffer in model.named_buffers()]
    assert all(np.array_equal(a, before[name]) for name, a in statistics(model).items())
    model(pictures())
    assert not any(np.array_equal(a, before[name]) for name, a in statistics(model).items())


# Training

def trained(make, run=None, micro=4, steps=12):
    model, task = make()
    report = fit(model, task, batches(), steps=steps, lr=0.01, micro=micro, threads=2, seed=5, offset=100,
                 log_every=3, run=run, bar=False)
    return model, report


def made():
    tt.manual_seed(3)
    model = Stem()
    return model, Classify(model)


@pytest.mark.parametrize("micro", [4, None])
def test_a_resumed_run_has_the_same_bits_statistics_included(micro, tmp_path):
    whole, report = trained(made, Run(tmp_path / "whole", every=4), micro)
    run = Run(tmp_path / "cut", every=4)
    for step in (6, 9):
        with pytest.raises(PowerCut):
            trained(lambda: at_step(made, step, power_cut), run, micro)
    model, again = trained(made, run, micro)
    assert bits(model) == bits(whole) and history(run.folder) == history(tmp_path / "whole")
    assert {name for name, _ in model.named_buffers()} < bits(model).keys()
    assert np.abs(model.bn1.running_mean.data).max() > 0.01
    assert report | {"seconds": 0} == again | {"seconds": 0}


def test_training_learns_and_eval_mode_agrees():
    model, report = trained(made, micro=6, steps=150)
    assert report["loss"] < 0.5 and not model.training
    images, labels = batches(40)(0)
    assert (model(images).data.argmax(axis=1) == labels).mean() > 0.8
