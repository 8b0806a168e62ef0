"""The task of captions: what is drawn and learned, the encoder that stays as it is, and which facts are
right."""
import sys

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import bits
from tinytoken import tasks
from tinytoken.data import Batches, make_captions, normalise
from tinytoken.data.captions import LENGTH, NUMBER, WORDS, words_of
from tinytoken.models import Captioner, LookupViT, ViT
from tinytoken.tasks import Caption, corpus_scores
from tinytoken.train import fit, loss_and_grads

SIZES = dict(image_size=16, patch_size=4, dim=8, depth=1, heads=2, num_classes=3)


@pytest.fixture(scope="module")
def some():
    return make_captions(12, seed=1, size=16)


def task(encoder=None, **options):
    captioner = Captioner(8, WORDS, 8, 2, 2, length=LENGTH)
    return Caption(captioner, encoder or LookupViT(**SIZES, compressed=(2, 2), classifiers="both"), **options)


def batch(some):
    return normalise(some.images, (0.2,) * 3, (0.2,) * 3), some.labels


def test_the_encoder_is_never_changed_and_not_in_the_graph(some):
    for tokens in ("tokens", "lookup", "both"):
        job = task(tokens=tokens)
        encoder = job.describer.encoder.train()
        before = bits(encoder)
        fit(job.model, job, Batches(some.images, some.labels, 4), steps=2, bar=False)
        assert bits(encoder) == before and not encoder.training
        assert all(p.grad is None for p in encoder.parameters())
        assert all(np.abs(p.grad).max() > 0 for p in job.model.parameters())


def test_the_loss_is_that_of_the_caption_that_was_drawn(some):
    job, (images, labels) = task(ViT(**SIZES)), batch(some)
    draws = job.noise(12, 3, 4)
    assert np.array_equal(job.noise(5, 3, 4)["which"], draws["which"][:5]) and draws.keys() == {"which"}
    assert not np.array_equal(job.noise(12, 4, 4)["which"], draws["which"])
    chosen = labels[np.arange(12), np.floor(4 * draws["which"]).astype(int)]
    out = job.model(job.describer.encoder(images).tokens, chosen[:, :-1])
    assert job(images, labels, **draws)[0].item() == job.model.loss(out, chosen)[0].item()
    ends = [np.full(12, value, "float32") for value in (2.0 ** -24, 1 - 2.0 ** -24)]
    first, last = (job(images, labels, which)[0].item() for which in ends)
    expected = [job(images, labels[:, [row] * 4], ends[0])[0].item() for row in (0, 3)]
    assert [first, last] == expected and first != last


def test_a_batch_may_be_cut_into_slices(some):
    job, arrays = task(drop_path=0.5, smoothing=0.1), batch(some)
    draws = job.noise(12, 0, 0)
    assert draws["paths"].shape == (12, 2, 3) and (draws["paths"][:, 0] == 1).all()
    params = job.model.parameters()
    found = []
    for micro in (12, 5):
        loss, _ = loss_and_grads(job, params, arrays, micro, 1, draws)
        found.append((loss, [p.grad.copy() for p in params]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_a_step_on_either_module(some, xp):
    device = "cpu" if xp is np else "cuda"
    job = task(tokens="both", drop_path=0.5, smoothing=0.1)
    arrays, draws = batch(some), job.noise(12, 0, 0)
    expected = job(*arrays, **draws)[0].item()
    job.model.to(device), job.describer.encoder.to(device)
    found = job(*map(xp.asarray, arrays), **job.noise(12, 0, 0, xp))[0]
    assert found.item() == pytest.approx(expected, rel=1e-5)
    job.describer(xp.asarray(arrays[0]), beam=2)


def test_it_is_registered_and_says_what_it_reads():
    assert tasks.task.pick("caption") is Caption and Caption.taught and not Caption.whole
    settings = task(tokens="both", drop_path=0.1).settings
    assert settings == {"smoothing": 0.0, "drop_path": 0.1, "tokens": "both"}
    with refuses("Describer: tokens 'all', expected one of tokens, lookup, both"):
        task(tokens="all")


def test_a_few_pictures_are_learned_by_heart(some):
    """The words of four pictures' captions from a random encoder's tokens."""
    tt.manual_seed(3)
    job = task(ViT(**SIZES | dict(dim=16, heads=2, pool="mean")))
    job.describer.captioner = job.model = Captioner(16, WORDS, 32, 2, 2, length=LENGTH)
    labels = some.labels[:4, :1]
    batches = Batches(some.images[:4], labels, 4)
    report = fit(job.model, job, batches, steps=120, lr=5e-3, bar=False)
    images = normalise(some.images[:4], batches.mean, batches.std)
    assert report["loss"] == report["words"] < 0.1
    assert np.array_equal(job.describer(images), labels[:, 0, 1:])
    assert Caption.metrics(job.describer(images), labels)["exact"] == 1


# Which facts are right

def rows(*texts):
    """Captions as numbers, filled up to one length."""
    words = [[NUMBER[word] for word in text.split()] + [NUMBER["<end>"]] for text in texts]
    return np.array([row + [0] * (LENGTH - len(row)) for row in words])


# two red crosses left of a blue disc; three purple rings
TWO = np.array([[words_of((1, 0, 4, 0, 0, 5, 0)), words_of((0, 5, 0, 1, 1, 0, 4))]])
ONE = np.array([[words_of((2, 6, 1, -1, -1, -1, -1))] * 2])


@pytest.mark.parametrize("said, labels, right, of", [
    ("two red crosses left of a blue disc", TWO, "count colour shape relation count colour shape", 7),
    ("a blue disc right of two red crosses", TWO, "count colour shape relation count colour shape", 7),
    ("two red crosses right of a blue disc", TWO, "count colour shape count colour shape", 7),
    ("a blue disc left of two red crosses", TWO, "count colour shape count colour shape", 7),
    # the groups' colours exchanged: with "a blue disc right of two red crosses" it has four facts in common
    ("a red disc left of two blue crosses", TWO, "count shape count shape", 7),
    ("a blue ring above three red crosses", TWO, "count colour colour shape", 7),
    ("two red crosses", TWO, "count colour shape", 7), ("a blue disc", TWO, "count colour shape", 7),
    ("two red crosses left a blue disc", TWO, "", 7), ("", TWO, "", 7),
    ("three purple rings", ONE, "count colour shape", 3), ("two purple rings", ONE, "colour shape", 3),
    ("three purple rings above a red disc", ONE, "count colour shape", 7)])
def test_facts_that_are_right(said, labels, right, of):
    found = Caption.metrics(rows(said), labels)
    assert found["facts"] == pytest.approx(len(right.split()) / of)
    assert found["exact"] == (len(right.split()) == of)
    total = {"count": 2, "colour": 2, "shape": 2, "relation": 1} if of == 7 else dict.fromkeys(
        ("count", "colour", "shape"), 1)
    for sort in ("count", "colour", "shape", "relation"):
        assert found[sort] == pytest.approx(right.split().count(sort) / total.get(sort, 1))


def test_shares_are_of_all_images_together(some):
    found = Caption.metrics(rows("two red crosses left of a blue disc", "two purple rings"),
                            np.concatenate([TWO, ONE]))
    assert found == pytest.approx({"exact": 1 / 2, "facts": 9 / 10, "count": 2 / 3, "colour": 1, "shape": 1,
                                   "relation": 1})
    for place in range(4):
        assert set(Caption.metrics(some.labels[:, place, 1:], some.labels).values()) == {1}


# BLEU and CIDEr

def test_without_the_extra_it_says_how_to_get_it(some, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(tt.InputError, match="^corpus_scores: pycocoevalcap.* is not installed .*pip install "
                                            "'?pycocoevalcap==1.2'? sacrebleu"):
        corpus_scores(some.labels[:, 0, 1:], some.labels)


def test_bleu_and_cider(some):
    reason = "BLEU and CIDEr want the extra `captions`: pycocoevalcap and sacrebleu"
    pytest.importorskip("sacrebleu", reason=reason)
    pytest.importorskip("pycocoevalcap", reason=reason)
    made = make_captions(60, seed=4, size=16)
    perfect = corpus_scores(made.labels[:, 3, 1:], made.labels)
    assert perfect["bleu4"] == pytest.approx(100) and 2 < perfect["cider"] <= 10
    others = corpus_scores(np.roll(made.labels[:, 3, 1:], 1, axis=0), made.labels)
    assert others["bleu4"] < 50 and others["cider"] < 0.3 * perfect["cider"]
    # the third and fourth captions of a picture with two are the first ones again: they change nothing
    two = [i for i in range(60) if len({tuple(words) for words in made.labels[i]}) == 2]
    said, labels = made.labels[two, 1, 1:], made.labels[two]
    assert corpus_scores(said, labels) == pytest.approx(corpus_scores(said, labels[:, :2]))
