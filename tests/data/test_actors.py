"""Clips with actors: who does what, that boxes and masks are exact, and that neither a frame nor the actor
alone tells the actions that are about the other."""
import zlib

import numpy as np
import pytest

from small import refuses
from tiny import linear_accuracy, streams
from tinytoken.data import actors, clips, hold_out, load_pictures, scenes
from tinytoken.data.actors import CONTEXT, NOBODY, OWN, make_actors
from tinytoken.data.clips import ACTIONS

FIELDS = ("images", "labels", "key", "instances", "boxes")
APPROACH, FLEE = (ACTIONS.index(name) for name in CONTEXT)


@pytest.fixture(scope="module")
def some():
    return make_actors(500, seed=1)  # to be looked at only


def courses(rows=20_000, seed=0):
    """Actions (rows, 2), and centre, radius, angle, colour and kind of as many clips."""
    draw = actors.Draws(rows, seed, "actors.train", 0)
    does = actors._actions(draw)
    return does, actors._course(draw, does, 8)


def test_shapes_dtypes_and_who_is_there(some):
    assert some.images.shape == (500, 8, 3, 32, 32) and some.images.dtype == "uint8" and len(some) == 500
    assert some.labels.shape == (500, 2, 5) and some.labels.dtype == "int64" and some.names == ACTIONS
    assert (some.key == 4).all() and set(np.unique(some.instances)) == {0, 1, 2}
    does, there = some.labels[:, :, 4], some.labels[:, :, 4] != NOBODY
    assert there[:, 0].all() and 0.65 < there[:, 1].mean() < 0.85
    assert not some.labels[:, :, :4][~there].any() and (some.instances[~there[:, 1]] < 2).all()
    context = np.isin(does, (APPROACH, FLEE))
    assert there[context[:, 0], 1].all() and not context[:, 1].any()
    assert 0.4 < context[there[:, 1], 0].mean() < 0.6
    assert set(does[context[:, 0], 1]) == {ACTIONS.index(name) for name in actors.IN_PLACE}
    assert set(does.reshape(-1)) == {NOBODY, *range(11)} and set(OWN) | set(CONTEXT) == set(ACTIONS)


def test_boxes_and_instances(some):
    at = np.arange(500), some.key
    assert (some.labels[:, :, :4] == some.boxes[at]).all()
    for instances, boxes in zip(some.instances[:30].reshape(-1, 32, 32), some.boxes[:30].reshape(-1, 2, 4)):
        for number in (1, 2):
            rows, columns = np.nonzero(instances == number)
            expected = [0] * 4
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert boxes[number - 1].tolist() == expected


def test_the_share_of_a_tubelet(some):
    share = some.tubelet_share((2, 8, 4), 2).reshape(500, 4, 4, 8)
    assert share.dtype == "float32"
    expected = (some.instances[7, 2:4, 8:16, 20:24] == 2).mean()
    assert share[7, 1, 1, 5] == np.float32(expected)
    with refuses("tubelet_share: tubelets (3, 8, 8) do not divide clips of 8 frames of 32 x 32"):
        some.tubelet_share((3, 8, 8), 1)


@pytest.mark.parametrize("short", [1, actors.CHUNK + 1])
def test_a_longer_set_begins_with_the_shorter_one_and_others_differ(short):
    one, other = make_actors(short, seed=3), make_actors(actors.CHUNK + 9, seed=3)
    for field in FIELDS:
        assert (getattr(one, field) == getattr(other, field)[:short]).all(), field
    for changed in (make_actors(short, seed=4), make_actors(short, seed=3, split="test")):
        assert (changed.images != one.images).mean() > 0.5


def test_no_two_draws_share_a_stream_nor_one_of_clips(monkeypatch):
    sites = streams(monkeypatch)
    clips.make_clips(1)
    for split in scenes.SPLITS:
        make_actors(actors.CHUNK + 1, split=split)
    assert len(sites) > 80 and len({zlib.crc32(site.encode()) for site in sites}) == len(sites)
    assert all(steps in ([0, 1], [0]) for steps in sites.values())


def test_a_data_set_like_others(some):
    train, test = load_pictures("actor_clips", train=6, test=4, seed=2, size=16)
    assert (train.images == make_actors(6, seed=2, size=16).images).all() and train.moves == {}
    assert (test.labels == make_actors(4, seed=2, split="test", size=16).labels).all()
    rest, held = hold_out(some, 100)
    assert len(rest) == 400 and held.labels.shape == (100, 2, 5)


def test_an_actor_approaches_or_flees_by_where_the_other_stands():
    does, (centre, radius, *_) = courses()
    for action, sign in ((APPROACH, -1), (FLEE, 1)):
        rows = does[:, 0] == action
        first, second = centre[rows].swapaxes(0, 1)
        assert (np.ptp(second, axis=1) == 0).all()
        apart = np.diff(np.hypot(*np.moveaxis(first - second, 2, 0)), axis=1)
        assert (np.sign(np.median(apart, axis=1)) == sign).all()
        assert ((apart * sign > 0).sum(axis=1) >= 5).all()  # but where it begins anew
        way = np.abs(np.diff(first, axis=1)[:, 0])
        assert (way.min(axis=1) / way.max(axis=1) > 0.57).all()  # askew
    assert centre.min() > actors.RADIUS[1] - 1e-4 and centre.max() < 1 - actors.RADIUS[1] + 1e-4


def test_own_actions_move_as_in_clips():
    does, (centre, radius, angle, colour, _) = courses()
    for name, change in (("left", -centre[..., 0]), ("right", centre[..., 0]), ("up", -centre[..., 1]),
                         ("down", centre[..., 1]), ("grow", radius), ("shrink", -radius)):
        found = np.diff(change[does == ACTIONS.index(name)], axis=1)
        assert (np.median(found, axis=1) > 0).all() and ((found < 0).sum(axis=1) <= 1).all(), name
    still = does == ACTIONS.index("still")
    for values in (centre, radius[..., None], angle[..., None], colour):
        assert (np.ptp(values[still], axis=1) == 0).all()
    assert (np.ptp(angle[does == ACTIONS.index("spin")], axis=1) > 0.5).all()
    assert (np.ptp(colour[does == ACTIONS.index("blink")], axis=1).max(axis=1) > 0).all()


def told(labels, features, train=6000):
    return linear_accuracy(features, labels, train)


def meetings(seed=0):
    """Of clips in which the first actor approaches or flees: which, and where both are (rows, T, 2)."""
    does, (centre, *_) = courses(24_000, seed)
    rows = np.isin(does[:, 0], (APPROACH, FLEE))
    return (does[rows, 0] == FLEE).astype(int), centre[rows, 0], centre[rows, 1]


def pairs(*arrays):
    """These columns and their products two by two."""
    x = np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
    x = x - x.mean(axis=0)
    return np.concatenate([x, *(x[:, i:i + 1] * x[:, i:] for i in range(x.shape[1]))], axis=1)


def test_neither_the_actor_alone_nor_a_frame_tells_approach_from_flee_and_both_do():
    labels, first, second = meetings()
    assert abs(labels.mean() - 0.5) < 0.02
    chance = 4 * 0.5 / (len(labels) - 6000) ** 0.5
    assert abs(told(labels, pairs(first)) - 0.5) < chance
    assert abs(told(labels, pairs(second[:, 0])) - 0.5) < chance
    for t in (0, 4, 7):
        assert abs(told(labels, pairs(first[:, t], second[:, t])) - 0.5) < chance
    step = np.median(np.diff(first, axis=1), axis=1)
    assert told(labels, (step * (second - first)[:, 4]).sum(axis=1)[:, None]) > 0.9


@pytest.mark.parametrize("mistake", ["always ahead", "no cycle"])
def test_an_actor_or_a_frame_that_tells_is_seen(mistake, monkeypatch):
    if mistake == "no cycle":  # what comes to the end stays there
        monkeypatch.setattr(actors, "on_cycle", lambda phase: phase.clip(0, 1))
    else:  # the segment begins nearer to the border for one that flees
        real = actors._on_segment
        monkeypatch.setattr(actors, "_on_segment", lambda draw, sign, gone: (
            lambda way, stands: (way + 0.02 * sign[:, :, None], stands))(*real(draw, sign, gone)))
    labels, first, second = meetings()
    found = [told(labels, pairs(first))] + [told(labels, pairs(first[:, t], second[:, t])) for t in (0, 4, 7)]
    assert max(found) > 0.55


@pytest.mark.parametrize("call, message", [
    (dict(count=0), "make_actors: count is 0, expected an int of at least 1"),
    (dict(count=1, split="dev"), "make_actors: split is 'dev', expected one of train, val, test"),
    (dict(count=1, size=8), "make_actors: size is 8, expected an int from 16 to 256"),
    (dict(count=1, frames=1), "make_actors: frames is 1, expected an int from 2 to 64")])
def test_bad_input_is_refused(call, message):
    with refuses(message):
        make_actors(**call)
