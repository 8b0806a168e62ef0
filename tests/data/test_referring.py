"""Pictures with sentences that mean an object: each is true of one object alone, by what was drawn; the mask
is that object's; the two sentences of a picture mean two."""
import collections
import zlib

import numpy as np
import pytest

from small import refuses
from tiny import streams
from tinytoken.data import hold_out, load_pictures, referring, scenes
from tinytoken.data.captions import COLOURS, KINDS, NUMBER, RELATIONS, WORDS, text_of
from tinytoken.data.referring import LENGTH, OBJECTS, make_referring, sentence

FIELDS = ("images", "labels", "meant", "looks", "instances", "boxes")
# how (axis, sign) of (its centre - the other's) makes a relation true
HOLDS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@pytest.fixture(scope="module")
def some():
    return make_referring(500, seed=1, size=64)  # to be looked at only


@pytest.fixture(scope="module")
def drawn():
    """The same pictures, and what was drawn: for each object shapes, centres and colours."""
    objects, real = [], referring.paint_object

    def spy(picture, kinds, centre, radius, angle, colour):
        objects.append((kinds.copy(), centre.copy(), colour.copy()))
        return real(picture, kinds, centre, radius, angle, colour)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referring, "paint_object", spy)
        made = make_referring(250, seed=1, size=16)  # a chunk: OBJECTS calls
    assert len(objects) == OBJECTS
    return made, [np.stack(part, axis=1) for part in zip(*objects)]


def true_of(text, colours, kinds, centres):
    """The objects, by number from 1, of which the sentence is true: an interpreter of its own."""
    words, found = text.split(), []
    for k in range(OBJECTS):
        if len(words) == 2:
            if words == [colours[k], kinds[k]]:
                found.append(k + 1)
            continue
        axis, sign = HOLDS[" ".join(words[1:-2])]
        others = [j for j in range(OBJECTS) if [colours[j], kinds[j]] == words[-2:]]
        assert len(others) == 1  # what it is related to is one object, too
        if kinds[k] == words[0] and sign * (centres[k] - centres[others[0]])[axis] > 0:
            found.append(k + 1)
    return found


def test_a_sentence_is_true_of_one_object_alone_by_what_was_drawn(drawn):
    made, (shapes, centres, tones) = drawn
    sorts = collections.Counter()
    for i in range(len(made)):
        colours = [COLOURS[((scenes.PALETTE - tone) ** 2).sum(axis=1).argmin()] for tone in tones[i]]
        kinds = [scenes.NAMES[shape] for shape in shapes[i]]
        assert made.looks[i].tolist() == [[COLOURS.index(c), KINDS.index(k)] for c, k in zip(colours, kinds)]
        for words, meant in zip(made.sentences[i], made.meant[i]):
            assert true_of(text_of(words), colours, kinds, centres[i]) == [meant]
            sorts[len(text_of(words).split()) > 2] += 1
    assert min(sorts.values()) > 0.4 * sum(sorts.values())


def test_two_sentences_mean_two_objects_and_the_masks_are_theirs(some):
    assert (some.meant[:, 0] != some.meant[:, 1]).all() and set(np.unique(some.meant)) == {1, 2, 3, 4}
    assert (some.sentences[:, 0] != some.sentences[:, 1]).any(axis=1).all()
    for s in range(2):
        assert (some.masks[:, s] == (some.instances == some.meant[:, s, None, None])).all()
    area, (low, high) = some.masks.mean(axis=(2, 3)), referring.RADIUS
    assert area.min() > 1.299 * low ** 2 * 0.85 and area.max() < 1.299 * high ** 2 * 1.15  # none is cut off
    order = np.bincount(some.meant[:, 0], minlength=5)[1:] / len(some)
    assert order.min() > 0.08 and abs((some.meant[:, 0] < some.meant[:, 1]).mean() - 0.5) < 0.08


def test_both_words_are_needed(some):
    """For each object that a look means another one has its colour, and a third its shape."""
    for i in range(len(some)):
        looks = some.looks[i]
        if len(text_of(some.sentences[i, 0]).split()) == 2:
            for k in some.meant[i] - 1:
                alike = looks == looks[k]
                assert (alike.sum(axis=0) == 2).all() and alike.all(axis=1).sum() == 1
        else:
            assert (looks[0] == looks[1]).all() and (looks[0] != looks[2]).all()
            assert looks[3].tolist() == [looks[0, 0], looks[2, 1]]


def test_relations_are_clear(drawn):
    made, (_, centres, _) = drawn
    for i in range(len(made)):
        words = text_of(made.sentences[i, 0]).split()
        if len(words) > 2:
            axis, _ = HOLDS[" ".join(words[1:-2])]
            apart = centres[i, :2, axis] - centres[i, 2, axis]
            assert abs(apart).min() >= referring.CLEAR and apart[0] * apart[1] < 0


def test_every_word_and_relation_occurs_as_often():
    texts = [text_of(words) for row in make_referring(1500, seed=5, size=16).sentences for words in row]
    counts = collections.Counter(word for text in texts for word in text.split() if word != "of")
    for family in (COLOURS, KINDS, ("left", "right", "above", "below")):
        found = [counts[word] for word in family]
        assert min(found) > 0.75 * np.mean(found) and max(found) < 1.25 * np.mean(found)
    assert set(counts) == {*COLOURS, *KINDS, "left", "right", "above", "below"}


def test_shapes_and_dtypes(some):
    assert some.images.shape == (500, 3, 64, 64) and some.images.dtype == "uint8" and len(some) == 500
    assert some.labels.shape == (500, 2, LENGTH + 64 * 64) and some.labels.dtype == "uint8"
    assert some.sentences.shape == (500, 2, LENGTH) and some.masks.shape == (500, 2, 64, 64)
    assert some.looks.shape == (500, 4, 2) and some.boxes.shape == (500, 4, 4) and some.names == WORDS
    assert some.moves == {} and len(hold_out(some, 20)[1].labels) == 20
    assert sentence((0, 0)) == [NUMBER["red"], NUMBER["disc"], 0, 0, 0]
    assert text_of(sentence((1, 4), (5, 2), 0)) == "cross left of blue square"
    assert text_of(sentence((1, 4), (5, 2), 3)) == "cross below blue square" and len(RELATIONS) == 4


@pytest.mark.parametrize("short", [1, scenes.CHUNK + 1])
def test_a_longer_set_begins_with_the_shorter_one(short):
    one, other = make_referring(short, seed=3, size=16), make_referring(scenes.CHUNK + 20, seed=3, size=16)
    for field in FIELDS:
        assert (getattr(one, field) == getattr(other, field)[:short]).all(), field


def test_other_seeds_and_splits_are_others_and_size_is_only_resolution():
    made = [make_referring(30, seed=seed, split=split, size=16) for seed in (0, 1) for split in scenes.SPLITS]
    assert len({picture.tobytes() for part in made for picture in part.images}) == 6 * 30
    large = make_referring(30, seed=1, split="test", size=32)
    assert (large.sentences == made[-1].sentences).all() and (large.meant == made[-1].meant).all()


def test_no_two_draws_share_a_stream(monkeypatch):
    sites = streams(monkeypatch)
    for split in scenes.SPLITS:
        make_referring(scenes.CHUNK + 1, split=split, size=16)
        scenes.make_scenes(1, split=split, size=16)
    assert len({zlib.crc32(site.encode()) for site in sites}) == len(sites)
    assert all(len(set(steps)) == len(steps) for steps in sites.values())


def test_asking_for_them():
    train, test = load_pictures("referring", train=6, test=4, seed=2, size=16)
    for part, count, split in ((train, 6, "train"), (test, 4, "test")):
        made = make_referring(count, seed=2, split=split, size=16)
        assert all(np.array_equal(getattr(part, field), getattr(made, field)) for field in FIELDS)
    with refuses("make_referring: count is 0, expected an int of at least 1"):
        make_referring(0)
    with refuses("make_referring: size is 8, expected an int from 16 to 256"):
        make_referring(1, size=8)
