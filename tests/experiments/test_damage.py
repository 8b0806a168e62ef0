"""Errors under damage: which pictures are asked about, and what is made of the answers."""
import numpy as np
import pytest

from tinytoken.data import CORRUPTIONS, corrupt
from tinytoken.experiments import Damage, Recipe, Trial, corruption_error, mean_error

RECIPE = Recipe(batch=4, dim=16, depth=1, heads=2, patch=8, train_pictures=12, test_pictures=24, seed=3)
OWN = {"clean": 0.1, "damaged": {"noise": [0.2, 0.4], "haze": [0.5, 0.7]}}
VIT = {"clean": 0.2, "damaged": {"noise": [0.3, 0.3], "haze": [0.2, 0.6]}}


def test_errors_are_set_against_the_baseline_by_corruption():
    assert mean_error(OWN) == pytest.approx(0.45)
    assert corruption_error(OWN, VIT) == pytest.approx(100 * (0.3 / 0.3 + 0.6 / 0.4) / 2)
    assert corruption_error(OWN, VIT, added=True) == pytest.approx(100 * (0.2 / 0.1 + 0.5 / 0.2) / 2)
    assert corruption_error(VIT, VIT) == corruption_error(VIT, VIT, added=True) == pytest.approx(100)


def test_a_baseline_without_errors_compares_with_nothing():
    perfect = {"clean": 0.0, "damaged": {"noise": [0.0, 0.0], "haze": [0.0, 0.1]}}
    assert corruption_error(OWN, perfect) is None
    unharmed = VIT | {"clean": 0.3}
    assert corruption_error(OWN, unharmed, added=True) is None


def test_every_model_is_asked_about_the_same_damaged_pictures():
    trial = Trial(RECIPE, bar=False, threads=1)
    damage, seen = Damage(trial, (1, 4), most=16), []
    model = trial.new("vit")
    call = model.forward
    model.forward = lambda images, **more: seen.append(images) or call(images, **more)
    errors = damage.errors(model)
    assert errors == damage.errors(model) and errors["damaged"].keys() == CORRUPTIONS.keys()
    assert all(len(by_strength) == 2 for by_strength in errors["damaged"].values())
    shown = np.concatenate(seen)
    clean, last = trial.test.images[:16], corrupt(trial.test.images[:16], list(CORRUPTIONS)[-1], 4, seed=3)
    assert np.array_equal(shown[:16], trial.prepare(clean))
    half = len(shown) // 2
    assert np.array_equal(shown[half - 16:half], trial.prepare(last))
    logits = model(trial.prepare(last)).logits.data
    wrong = np.mean(logits.argmax(axis=1) != trial.test.labels[:16])
    assert errors["damaged"][list(CORRUPTIONS)[-1]][1] == pytest.approx(wrong)
