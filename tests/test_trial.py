"""Trials: equal starts, equal pictures in equal order, and figures that are what they say."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken import checkpoint
from tinytoken.compare import Recipe
from tinytoken.errors import Busy
from tinytoken.models import DynamicViT, ViT
from tinytoken.train import Classify
from tinytoken.trial import Trial, difference

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


def test_a_phase_is_trained_by_one_process_at_a_time(tmp_path):
    trial = Trial(RECIPE, folder=tmp_path, bar=False)
    model = trial.new(ViT)
    with checkpoint.claimed(trial.run.checkpoint("a-b")), pytest.raises(Busy, match="a-b.npz"):
        trial.fit("a b", Classify(model), 1, 1e-3)
    trial.fit("a b", Classify(model), 1, 1e-3)


def test_photographs_are_moved_and_mirrored_and_scenes_are_not(trial, monkeypatch):
    assert not trial.batches.pad and not trial.batches.flip
    monkeypatch.setattr("tinytoken.compare.load_pictures", lambda recipe: (trial.test, trial.test))
    photographs = Trial(Recipe(data="cifar10", batch=4), bar=False).batches
    assert photographs.pad == 4 and photographs.flip


def test_difference_is_paired_with_students_interval():
    rng = np.random.default_rng(0)
    right = [rng.random(1000) < 0.8 for _ in range(3)]
    worse = [a & (rng.random(1000) < share) for a, share in zip(right, (0.99, 0.98, 0.97))]
    gaps = [100 * (b.mean() - a.mean()) for a, b in zip(right, worse)]
    middle, low, high = difference(worse, right)
    assert middle == pytest.approx(np.mean(gaps)) and high - middle == pytest.approx(middle - low)
    assert high - middle == pytest.approx(4.303 * np.std(gaps, ddof=1) / 3 ** 0.5, rel=1e-3)
    middle, low, high = difference(worse[:1], right)  # as many seeds as both have: over the pictures then
    share = -gaps[0] / 100
    assert middle == pytest.approx(gaps[0]) and high - middle == pytest.approx(1.96 * 100 * (share * (1 - share) / 1000) ** 0.5)
