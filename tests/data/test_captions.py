"""Pictures with captions: what is drawn is what the captions say, they are all that are true, the grammar
takes no others."""
import itertools
import zlib

import numpy as np
import pytest

from small import refuses
from tiny import streams
from tinytoken.data import captions, load_pictures, make_captions, scenes
from tinytoken.data.captions import (COLOURS, COUNTS, KINDS, LENGTH, MOST, NUMBER, PAIRS, RELATIONS, WORDS,
                                     attribute_names, facts_of, text_of, words_of)
from tinytoken.models import captioner

FIELDS = ("images", "labels", "attributes", "instances", "boxes", "group")


@pytest.fixture(scope="module")
def some():
    return make_captions(600, seed=1, size=64)  # to be looked at only


def true_of(labels):
    """The true captions' facts, each once, of one picture."""
    return list(dict.fromkeys(facts_of(words) for words in labels))


def read(text):
    return facts_of([NUMBER[word] for word in text.split()])


def test_shapes_and_dtypes(some):
    assert some.images.shape == (600, 3, 64, 64) and some.images.dtype == "uint8" and len(some) == 600
    assert some.labels.shape == (600, 4, LENGTH) and some.labels.dtype == "int64"
    assert some.attributes.shape == (600, len(attribute_names())) and some.attributes.dtype == "uint8"
    assert some.boxes.shape == (600, MOST, 4) and some.group.shape == (600, MOST)
    assert some.names == WORDS and len(set(WORDS)) == len(WORDS) and WORDS[:3] == captioner.SPECIAL
    assert len(COLOURS) == len(scenes.PALETTE) and set(KINDS) <= set(scenes.NAMES) and some.moves == {}
    assert len(set(attribute_names())) == 98


@pytest.mark.parametrize("short", [1, scenes.CHUNK - 1, scenes.CHUNK + 1])
def test_a_longer_set_begins_with_the_shorter_one(short):
    one, other = make_captions(short, seed=3, size=16), make_captions(scenes.CHUNK + 20, seed=3, size=16)
    for field in FIELDS:
        assert (getattr(one, field) == getattr(other, field)[:short]).all(), field


def test_other_seeds_and_splits_are_others_and_size_is_only_resolution():
    drawn = [make_captions(40, seed=seed, split=split, size=16) for seed in (0, 1) for split in scenes.SPLITS]
    assert len({picture.tobytes() for part in drawn for picture in part.images}) == 6 * 40
    large = make_captions(40, seed=1, split="test", size=32)
    assert (large.labels == drawn[-1].labels).all() and (large.attributes == drawn[-1].attributes).all()


def test_no_two_draws_share_a_stream(monkeypatch):
    sites = streams(monkeypatch)
    for split in scenes.SPLITS:
        make_captions(scenes.CHUNK + 1, split=split, size=16)
        scenes.make_scenes(1, split=split, size=16)
    assert len(sites) >= 6 * 15 and len({zlib.crc32(site.encode()) for site in sites}) == len(sites)
    assert all(len(set(steps)) == len(steps) for steps in sites.values())


def test_the_captions_say_what_is_there(some):
    """Numbers and relations from the boxes of what was drawn, colours from its pixels."""
    for i in range(len(some)):
        true = true_of(some.labels[i])
        sizes = [(some.group[i] == of).sum() for of in (0, 1)]
        assert sorted(set(some.instances[i].reshape(-1)) - {0}) == list(range(1, sum(sizes) + 1))
        boxes = [some.boxes[i][some.group[i] == of] for of in (0, 1)]
        if not sizes[1]:
            assert len(true) == 1 and true[0][0] == sizes[0] - 1 and true[0][3:] == (-1,) * 4
            continue
        assert tuple(sizes) in PAIRS and sum(sizes) <= MOST
        expected = set()
        for (one, first), (two, second) in itertools.permutations(enumerate(boxes)):
            for axis, forward in itertools.product((0, 1), (True, False)):
                before, after = (first, second) if forward else (second, first)
                if before[:, axis + 2].max() <= after[:, axis].min():
                    expected.add((sizes[one] - 1, 2 * axis + (not forward), sizes[two] - 1))
        assert expected and {(facts[0], facts[3], facts[4]) for facts in true} == expected
        assert len(true) in (2, 4) and all(facts[:3][1:] != facts[4:][1:] for facts in true)


def test_relations_are_clear(some):
    """Of shapes that hold, a gap is to be seen; of others, no object could be taken for being beside all."""
    for i in np.flatnonzero((some.group == 1).any(axis=1)):
        first, second = (some.boxes[i][some.group[i] == of] for of in (0, 1))
        for axis in (0, 1):
            gap = max(second[:, axis].min() - first[:, axis + 2].max(),
                      first[:, axis].min() - second[:, axis + 2].max())
            assert gap >= 1 or gap <= 0, (i, axis)  # 0.03 of 64 pixels, less a pixel at each end


def test_colours_and_shapes_are_those_of_the_captions(monkeypatch):
    drawn, real = [], captions.paint_object

    def spy(picture, kinds, centre, radius, angle, colour):
        drawn.append((kinds.copy(), colour))
        return real(picture, kinds, centre, radius, angle, colour)
    monkeypatch.setattr(captions, "paint_object", spy)
    made = make_captions(200, seed=2, size=16)
    for i, k in np.ndindex(200, MOST):
        kinds, colours = drawn[k]
        assert (kinds[i] == -1) == (made.group[i, k] == -1)
        if kinds[i] == -1:
            continue
        nearest = ((scenes.PALETTE - colours[i]) ** 2).sum(axis=1).argmin()
        look = (nearest, KINDS.index(scenes.NAMES[kinds[i]]))
        # groups may be told in either order: the number of the object's group goes with its look
        size = (made.group[i] == made.group[i, k]).sum() - 1
        assert all((size, *look) in (facts[:3], facts[4:]) for facts in true_of(made.labels[i]))


def test_objects_lie_inside_and_apart(some):
    """Nothing is cut off: an object has the area of its shape, whatever else is there."""
    for k in range(MOST):
        there = some.group[:, k] >= 0
        area = (some.instances == k + 1).mean(axis=(1, 2))
        low, high = captions.RADIUS
        assert (area[~there] == 0).all()
        assert (area[there] > 1.299 * low ** 2 * 0.85).all()
        assert (area[there] < 1.299 * high ** 2 * 1.15).all()


def test_every_fact_occurs_and_neither_order_nor_side_is_preferred(some):
    facts = [facts_of(words) for labels in make_captions(2000, seed=5, size=16).labels for words in labels]
    two = np.array([row for row in facts if row[3] >= 0])
    for column, values in zip(two.T, (COUNTS, COLOURS, KINDS, RELATIONS, COUNTS, COLOURS, KINDS)):
        assert (np.bincount(column, minlength=len(values)) > 0.6 * len(two) / max(6, len(values))).all()
    assert np.abs(np.bincount(two[:, 3]) / len(two) - 0.25).max() < 0.03
    assert 0.7 < len(two) / len(facts) < 0.8


def test_attributes_are_the_pictures(some):
    names = {name: column for name, column in zip(attribute_names(), some.attributes.T)}
    for i in range(300):
        true = true_of(some.labels[i])[0]
        groups = [true[:3], true[4:]][:1 + (true[3] >= 0)]
        for fact, looks in ((1, COLOURS), (2, KINDS)):
            for number, look in enumerate(looks):
                count = sum(facts[0] + 1 for facts in groups if facts[fact] == number)
                said = [names[f"{least} or more {look}"][i] for least in ("one", "two", "three")]
                assert said == [count >= least for least in (1, 2, 3)]
                assert any(names[f"{place}, one that is {look}"][i] for place in
                           ("top left", "top right", "bottom left", "bottom right")) == (count > 0)
        for k in np.flatnonzero(some.group[i] >= 0):  # which group has which look is not looked up: any look
            x, y = (some.boxes[i, k, :2] + some.boxes[i, k, 2:]) / 2 / 64
            if min(abs(x - 0.5), abs(y - 0.5)) > 0.06:
                place = ("top", "bottom")[int(y > 0.5)] + " " + ("left", "right")[int(x > 0.5)]
                assert any(names[f"{place}, one that is {KINDS[facts[2]]}"][i] for facts in groups)


# The grammar

def test_facts_and_words_are_each_others_reverse():
    groups = list(itertools.product(range(3), range(8), range(6)))
    assert len(captions.GROUPS) == len(groups)
    for group in groups:
        assert facts_of(words_of((*group, -1, -1, -1, -1))) == (*group, -1, -1, -1, -1)
        for relation in range(4):
            facts = (*group, relation, *groups[(7 * relation + sum(group)) % len(groups)])
            assert facts_of(words_of(facts)) == facts and len(words_of(facts)) == LENGTH
    assert text_of(words_of((1, 0, 4, 0, 0, 5, 0))) == "two red crosses left of a blue disc"
    assert text_of(words_of((0, 1, 5, 3, 2, 7, 1))) == "an orange star below three pink rings"


@pytest.mark.parametrize("text", ["", "a red discs", "two red disc", "an red disc", "a orange disc",
                                  "red disc", "a disc red", "a red disc left a blue ring", "a red disc above",
                                  "a red disc above of a blue ring", "a red disc a blue ring",
                                  "a red disc above a blue ring above a teal star", "<end> a red disc",
                                  "above a red disc"])
def test_what_is_not_of_the_grammar(text):
    assert read(text) is None


def test_what_follows_the_end_does_not_count():
    assert read("a red disc <end> a <pad> above") == read("<start> a red disc") == (0, 0, 0, -1, -1, -1, -1)


# Asking for them

def test_the_set_is_registered():
    train, test = load_pictures("captions", train=6, test=4, seed=2, size=16)
    for part, count, split in ((train, 6, "train"), (test, 4, "test")):
        made = make_captions(count, seed=2, split=split, size=16)
        assert all(np.array_equal(getattr(part, field), getattr(made, field)) for field in FIELDS)


def test_what_cannot_be_drawn():
    with refuses("make_captions: count is 0, expected an int of at least 1"):
        make_captions(0)
    with refuses("make_captions: split is 'all', expected one of train, val, test"):
        make_captions(1, split="all")
    with refuses("make_captions: size is 8, expected an int from 16 to 256"):
        make_captions(1, size=8)
