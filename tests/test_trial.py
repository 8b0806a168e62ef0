"""Trials: equal starts, equal pictures in equal order, and figures that are what they say."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.compare import Recipe
from tinytoken.models import DynamicViT, ViT
from tinytoken.train import Classify
from tinytoken.trial import Trial

RECIPE = Recipe(batch=4, dim=16, depth=2, heads=2, patch=8, train_pictures=12, test_pictures=10, seed=3)


@pytest.fixture
def trial():
    return Trial(RECIPE, bar=False)


def test_a_models_weights_are_its_starts_and_else_the_seeds(trial):
    vit = trial.new(ViT)
    for name, array in trial.new(ViT).state_dict().items():
        assert np.array_equal(array, vit.state_dict()[name]), name
    vit.head.bias.data += 1
    dynamic, fresh = (trial.new(DynamicViT, start, prune_before=(1,), keep_ratios=(0.5,)) for start in (vit, None))
    for name, array in dynamic.state_dict().items():
        assert np.array_equal(array, vit.state_dict().get(name, fresh.state_dict()[name])), name
    assert trial.new(ViT, sizes={"dim": 8, "depth": 1}).config["dim"] == 8 and trial.recipe.dim == 16


def test_what_is_measured(trial):
    vit = trial.new(ViT)
    report = trial.fit("a b", Classify(vit), 2, 1e-3)
    row, logits = trial.measure(vit, report), trial.answers(vit)
    assert row["accuracy"] == np.mean(logits.argmax(axis=1) == trial.test.labels) and logits.shape == (10, 10)
    assert row["macs"] == tt.macs(vit, trial.prepare(trial.test.images[:1])).total
    assert row["parameters"] == sum(p.data.size for p in vit.parameters()) and row["trained"] is report and report["seconds"] > 0


def test_an_interrupted_trial_goes_on_and_a_finished_one_is_not_trained_twice(tmp_path):
    def train(folder, steps):
        trial = Trial(RECIPE, folder=folder, bar=False)
        vit = trial.new(ViT)
        return trial.fit("vit further", Classify(vit), steps, 1e-3, offset=5), vit.state_dict()

    report, weights = train(tmp_path, 3)
    again, same = train(tmp_path, 3)
    assert again == report and all(np.array_equal(same[name], weights[name]) for name in weights)
    assert (tmp_path / "seed3" / "vit-further.npz").exists() and (tmp_path / ".gitignore").read_text() == "*\n"
    with pytest.raises(tt.InputError, match="another run"):
        train(tmp_path, 4)


def test_photographs_are_moved_and_mirrored_and_scenes_are_not(trial, monkeypatch):
    assert not trial.batches.pad and not trial.batches.flip
    monkeypatch.setattr("tinytoken.compare.load_pictures", lambda recipe: (trial.test, trial.test))
    photographs = Trial(Recipe(data="cifar10", batch=4), bar=False).batches
    assert photographs.pad == 4 and photographs.flip
