"""What lessons on captions share: the questions' loss and scores, the encoder that sees nothing, the labels
of the trials, what is written."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.data.captions import LENGTH, WORDS, attribute_names
from tinytoken.experiments import Recipe, Trial
from tinytoken.experiments.captioning import Attributes, Blind, of_attributes, written
from tinytoken.models import Captioner, Describer, LookupViT, ViT

RECIPE = Recipe(data="captions", batch=4, dim=8, depth=1, heads=2, patch=8, train_pictures=12,
                test_pictures=6)
SIZES = dict(patch_size=8, dim=8, depth=1, heads=2, num_classes=98)


@pytest.fixture(scope="module")
def trial():
    return Trial(RECIPE, bar=False)


def test_the_questions_are_asked_of_every_classifier(trial):
    images, labels = trial.prepare(trial.test.images), trial.test.attributes
    for model in (ViT(**SIZES), LookupViT(**SIZES, compressed=(2, 2)),
                  LookupViT(**SIZES, compressed=(2, 2), classifiers="both")):
        out = model.train()(images)
        heads = [getattr(out, name, None) for name in ("logits", "lookup_logits")]
        heads = [head.data for head in heads if head is not None]
        assert len(heads) == 1 + (getattr(model.config, "classifiers", None) == "both")
        expected = sum((np.logaddexp(0, x) - labels * x).mean() for x in heads)
        loss, parts = Attributes(model)(images, labels)
        assert loss.item() == pytest.approx(expected, rel=1e-5) and parts == {"questions": loss}


def test_f1_is_of_all_yeses_together():
    labels = np.zeros((2, 98), "uint8")
    answers = np.full((2, 98), -1.0)
    labels[0, [0, 41, 42]] = labels[1, 97] = 1  # two to number, two to place
    answers[0, [0, 1]] = answers[1, [97, 41]] = 1  # right: 0 and 97
    assert len(attribute_names()) == 98
    assert Attributes.metrics(answers, labels) == {"number_f1": 2 / 5, "place_f1": 2 / 3}


def test_the_trial_of_encoders_differs_in_its_labels_alone(trial):
    other = of_attributes(trial)
    images, questions = other.batches(3)
    same, captions = trial.batches(3)
    assert np.array_equal(images, same) and questions.shape == (4, 98) and captions.shape == (4, 4, LENGTH)
    assert other.test is trial.test


def test_the_blind_write_the_same_of_all_pictures_and_others_do_not(trial):
    tt.manual_seed(0)
    captioner = Captioner(8, WORDS, 8, 1, 2, length=LENGTH)
    for p in captioner.parameters():
        p.data += np.random.default_rng(0).standard_normal(p.shape).astype("float32")
    blind, sees = Describer(Blind(8), captioner), Describer(ViT(**SIZES), captioner)
    assert (blind.memory(trial.prepare(trial.test.images)).data == 0).all()
    for beam in (1, 2):
        found = written(blind, trial, beam)
        assert found.shape == (6, LENGTH - 1) and (found == found[0]).all()
    by_beam = [written(sees, trial, beam) for beam in (1, 4)]
    for found, beam in zip(by_beam, (1, 4)):
        assert np.array_equal(found, sees(trial.prepare(trial.test.images), beam=beam))
    assert (by_beam[0] != by_beam[0][0]).any() and (by_beam[0] != by_beam[1]).any()
