"""What the tests of training and of the command line share: models and pictures that train in milliseconds,
and ways to stop."""
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np

import tinytoken as tt
from tinytoken import experiments, models, random
from tinytoken.__main__ import main
from tinytoken.data import Batches, cifar, scenes
from tinytoken.experiments import compare
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import Classify, Distil, checkpoint, fit

ROOT = pathlib.Path(__file__).parents[1]
SIZES = dict(image_size=8, patch_size=4, dim=8, depth=1, heads=2, num_classes=3)
STEPS = 20


def batches(batch_size=6, seed=0):
    """40 pictures of 8 x 8 in three classes, the class being the channel that is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40)
    images = rng.integers(0, 128, (40, 3, 8, 8))
    images[np.arange(40), labels] += 100
    return Batches(images.astype("uint8"), labels, batch_size, seed=seed, pad=1, flip=True)


def vit():
    tt.manual_seed(3)
    model = ViT(**SIZES)
    return model, Classify(model, smoothing=0.1)


def lookupvit():
    tt.manual_seed(3)
    model = LookupViT(**SIZES, compressed=(1, 1), classifiers="both")
    return model, Classify(model)


def dynamicvit():
    """Its noise is drawn anew at each step; a part of its predictor has a learning rate of its own."""
    tt.manual_seed(3)
    model = DynamicViT(**SIZES, prune_before=(0,), keep_ratios=(0.5,))
    for layer in model.score_predictor[0].in_conv:
        for p in layer.parameters():
            p.lr_scale = 3.0
    return model, Distil(model, ViT(**SIZES))


def train(make, run=None, **more):
    """20 steps on two threads with micro-batches that do not divide the batch -> the model, and what fit
    reported. make: one of the functions above, or what it made."""
    model, task = make() if callable(make) else make
    settings = dict(steps=STEPS, lr=0.01, micro=4, threads=2, seed=5, offset=100, log_every=3, run=run,
                    bar=False)
    return model, fit(model, task, batches(), **settings | more)


# The main job in a second or two
SmallRecipe = functools.partial(experiments.Recipe, batch=8, dim=16, depth=2, heads=2, patch=8,
                                prune_before=(1,), keep_ratios=(0.5,), compressed=(2, 2), train_pictures=24,
                                test_pictures=20)
RECIPE = SmallRecipe(steps=16)


def recipes_model(name, **config):
    """A model by its name, at the small recipe's size, as the main job makes it."""
    return models.create(name, **RECIPE.sizes, **config)


def command(argv):
    """The command line, with the small recipe and no picture: matplotlib takes longer than all the rest."""
    experiments.Recipe, compare.draw = SmallRecipe, lambda *_: "no picture"
    return main(argv)


def small_cifar(folder, monkeypatch, records=8):
    """Files in CIFAR-10's binary layout, with `records` pictures each, and the reader told to expect as many
    -> (path, images, labels), training and test pictures together."""
    layout = cifar.LAYOUTS["cifar10"]
    few = {split: dict.fromkeys(getattr(layout, split), records) for split in ("train", "test")}
    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", dataclasses.replace(layout, **few))
    table = np.random.default_rng(0).integers(0, 256, (6, records, 1 + cifar.PIXELS), dtype="uint8")
    table[:, :, 0] %= 10
    for rows, name in zip(table, (*layout.train, *layout.test)):
        (folder / name).write_bytes(rows.tobytes())
    return folder, table[:, :, 1:].reshape(-1, 3, 32, 32), table[:, :, 0].reshape(-1)


def bits(model):
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def history(folder):
    """The rows of history.jsonl, less the seconds, which are never the same."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def python(*arguments, **settings):
    """Start a Python of its own that finds this checkout's tinytoken and the tests' modules ->
    subprocess.Popen."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, **settings)


class PowerCut(Exception):
    """Ends a run at any place, as a crash would: nothing in fit expects it."""


def at_step(make, step, event):
    """`make`, with event() called in the main thread as the step begins."""
    model, task = make()
    noise = task.noise

    def noise_or_event(size, at, seed, xp):
        if at == 100 + step:  # train() counts batches from 100
            event()
        return noise(size, at, seed, xp)
    task.noise = noise_or_event
    return model, task


def power_cut():
    raise PowerCut


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def same_run(model, report, folder, expected):
    weights, full_report, rows = expected
    assert bits(model) == weights
    assert history(folder) == rows
    assert report | {"seconds": 0} == full_report | {"seconds": 0}


# The command line

def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys, *argv):
    """The one line on stderr that main(argv) ends with; it must end with 2 and print nothing else."""
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


KINDS = {"vit": {}, "dynamicvit": dict(prune_before=(1,), keep_ratios=(0.5,)),
         "lookupvit": dict(compressed=(2, 2))}
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def saved(path, kind="vit", **more):
    """A checkpoint as compare leaves it."""
    tt.manual_seed(1)
    model = recipes_model(kind, **KINDS[kind])
    for p in model.parameters():
        p.data += 0.1
    checkpoint.save(path, model, **dict(classes=list(scenes.NAMES), mean=MEAN, std=STD) | more)
    return model


# Of made data

def streams(monkeypatch):
    """{site: the steps that were drawn from it} of all draws from now on."""
    sites = {}
    for name in ("uniform", "integers"):
        real = getattr(random, name)

        def spy(*args, site, step, seed, real=real):
            sites.setdefault(site, []).append(step)
            return real(*args, site=site, step=step, seed=seed)
        monkeypatch.setattr(random, name, spy)
    return sites


def linear_accuracy(features, labels, train):
    """Test accuracy of ridge regression to one-hot targets, fitted on the first `train` rows."""
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-9)
    features = np.c_[features, np.ones(len(features))]
    a, b = features[:train], np.eye(labels.max() + 1)[labels[:train]]
    weights = np.linalg.solve(a.T @ a + 10 * np.eye(a.shape[1]), a.T @ b)
    return ((features[train:] @ weights).argmax(axis=1) == labels[train:]).mean()
