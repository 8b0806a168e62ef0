"""The task of masks that sentences mean: which sentence is learned, and intersection over union by hand."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken import tasks
from tinytoken.data import Batches, normalise
from tinytoken.data.referring import LENGTH, make_referring
from tinytoken.models import VLTP
from tinytoken.tasks.refer import Refer
from tinytoken.train import fit, loss_and_grads

SIZES = dict(image_size=16, patch_size=4, dim=8, depth=3, heads=2, prune_before=(1,), keep_ratios=(0.5,))


@pytest.fixture(scope="module")
def some():
    return make_referring(12, seed=1, size=16)


def batch(some):
    return normalise(some.images, (0.2,) * 3, (0.2,) * 3), some.labels


def test_the_loss_is_that_of_the_sentence_that_was_drawn(some):
    job, (images, labels) = Refer(VLTP(**SIZES).train(), smoothing=0.1), batch(some)
    draws = job.noise(12, 3, 4)
    assert np.array_equal(job.noise(5, 3, 4)["which"], draws["which"][:5]) and draws.keys() == {"which"}
    assert not np.array_equal(job.noise(12, 4, 4)["which"], draws["which"])
    chosen = (draws["which"] >= 0.5).astype(int)
    assert 0 < chosen.sum() < 12
    words, masks = (part[np.arange(12), chosen] for part in (some.sentences, some.masks))
    out = job.model(images, words)
    loss, parts = job(images, labels, **draws)
    assert loss.item() == job.model.loss(out, masks.astype("float32"), smoothing=0.1)[0].item()
    assert parts.keys() == {"class", "dice", "scores"}


def test_draws_of_the_model_and_slices(some):
    job, arrays = Refer(VLTP(**SIZES, choose="random").train(), drop_path=0.5), batch(some)
    draws = job.noise(12, 0, 0)
    assert draws.keys() == {"which", "draw", "paths"} and draws["paths"].shape == (12, 3, 2)
    params, found = job.model.parameters(), []
    for micro in (12, 5):
        loss, _ = loss_and_grads(job, params, arrays, micro, 1, draws)
        found.append((loss, [p.grad.copy() for p in params]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_it_is_registered_and_learns_a_few_pictures_by_heart(some):
    assert tasks.task.pick("refer") is Refer and not Refer.taught and not Refer.whole
    tt.manual_seed(3)
    job = Refer(VLTP(**SIZES | dict(dim=16, keep_ratios=(1.0,))))
    assert job.labels(3).shape == (3, 1, LENGTH + 256)
    batches = Batches(some.images[:4], some.labels[:4], 4)
    fit(job.model, job, batches, steps=300, lr=5e-3, bar=False)
    images = normalise(some.images[:4], batches.mean, batches.std)
    answers = np.stack([job.model(images, some.sentences[:4, s]).logits.data for s in (0, 1)], axis=1)
    assert Refer.metrics(answers, some.labels[:4])["mIoU"] > 0.7
    assert Refer.metrics(answers[:, ::-1], some.labels[:4])["mIoU"] < 0.3  # each sentence has its own mask


def test_intersection_over_union_by_hand():
    labels = np.zeros((2, 1, LENGTH + 4), "uint8")
    labels[:, :, :LENGTH] = 7  # words, which do not count
    labels[0, 0, LENGTH:], labels[1, 0, LENGTH:] = (1, 1, 0, 0), (0, 0, 0, 1)
    answers = np.array([[[[2.0, -1.0], [3.0, -1.0]]], [[[-1.0, -1.0], [-2.0, 0.5]]]])
    assert Refer.metrics(answers, labels) == {"mIoU": (1 / 3 + 1) / 2, "oIoU": 2 / 4}
    assert Refer.metrics(answers * 0, labels) == {"mIoU": 0, "oIoU": 0}
