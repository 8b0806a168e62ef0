"""Clips: what each action does, that masks, boxes and key frames are exact, and that no single frame tells
the action: by the state of the objects, by pixels, and by a model that is trained on key frames (slow)."""
import zlib

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import linear_accuracy, streams
from tinytoken.data import clips, hold_out, load_pictures, make_scenes, scenes
from tinytoken.data.clips import ACTIONS, make_clips
from tinytoken.experiments import Arm, Recipe, Trial

FIELDS = ("images", "labels", "key", "instances", "boxes")
CHANCE = 1 / len(ACTIONS)


@pytest.fixture(scope="module")
def some():
    return make_clips(900, seed=1)  # to be looked at only


@pytest.fixture(scope="module")
def fine():
    return make_clips(40, seed=2, size=128)


def courses(rows=20_000, seed=0):
    """Labels (rows,), and the states of as many clips, without their pictures."""
    draw = clips.Draws(rows, seed, "clips.train", 0)
    labels = draw.integers("label", (), len(ACTIONS))
    return labels, clips._course(draw, labels, 8)


def of(labels, *names):
    return np.isin(labels, [ACTIONS.index(name) for name in names])


# What a set is

def test_shapes_and_dtypes(some):
    assert some.images.shape == (900, 8, 3, 32, 32) and some.images.dtype == "uint8"
    assert some.labels.shape == some.key.shape == (900,) and some.labels.dtype == some.key.dtype == "int64"
    assert some.masks.shape == (900, 8, 32, 32) and some.masks.dtype == bool
    assert some.boxes.shape == (900, 8, 2, 4) and some.boxes.dtype == "int64" and len(some) == 900
    assert some.names == ACTIONS and set(some.labels.tolist()) == set(range(11))
    assert set(some.key.tolist()) == set(range(8)) and set(np.unique(some.instances)) == {0, 1, 2}
    assert make_clips(2, frames=3, size=20).images.shape == (2, 3, 3, 20, 20)


@pytest.mark.parametrize("short", [1, clips.CHUNK, clips.CHUNK + 1])
def test_a_longer_set_begins_with_the_shorter_one_and_others_differ(short):
    one, other = make_clips(short, seed=3), make_clips(clips.CHUNK + 9, seed=3)
    for field in FIELDS:
        assert (getattr(one, field) == getattr(other, field)[:short]).all(), field
    for changed in (make_clips(short, seed=4), make_clips(short, seed=3, split="test")):
        assert (changed.images != one.images).mean() > 0.5


def test_no_two_draws_share_a_stream_nor_one_of_scenes(monkeypatch):
    sites = streams(monkeypatch)
    make_scenes(1)
    for split in scenes.SPLITS:
        make_clips(clips.CHUNK + 1, split=split)
    assert len(sites) > 60 and len({zlib.crc32(site.encode()) for site in sites}) == len(sites)
    assert all(steps in ([0, 1], [0]) for steps in sites.values())


def test_size_is_only_resolution():
    small, large = make_clips(20, seed=4, size=32), make_clips(20, seed=4, size=96)
    assert (small.labels == large.labels).all() and (small.key == large.key).all()
    shrunk = large.images.reshape(20, 8, 3, 32, 3, 32, 3).mean(axis=(4, 6))
    assert abs(shrunk - small.images).mean() < 4 and abs(small.boxes - large.boxes / 3).max() <= 1.5


def test_boxes_and_instances(some, fine):
    for instances, boxes in zip(some.instances[:40].reshape(-1, 32, 32), some.boxes[:40].reshape(-1, 2, 4)):
        for number in (1, 2):
            rows, columns = np.nonzero(instances == number)
            expected = [0] * 4
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert boxes[number - 1].tolist() == expected
    draw = clips.Draws(clips.CHUNK, 2, "clips.train", 0)  # the actor is whole in every frame
    course = clips._course(draw, draw.integers("label", (), 11), 8)
    area = (fine.instances[:clips.CHUNK] == 1).mean(axis=(2, 3))
    np.testing.assert_allclose(area, 1.299 * course.radius ** 2, rtol=0.12)


def test_key_frames_are_pictures_with_the_clips_labels(some):
    key = some.key_frames()
    assert type(key) is scenes.Scenes and key.names == ACTIONS and key.labels is some.labels
    for i in (0, 5, 9):
        assert (key.images[i] == some.images[i, some.key[i]]).all()
        assert (key.boxes[i] == some.boxes[i, some.key[i]]).all()
        assert (key.instances[i] == some.instances[i, some.key[i]]).all()


def test_shuffled_clips_have_their_frames_in_an_order_of_their_own(some):
    found, frames = some.shuffled(5), [clip.tobytes() for clip in some.images[0]]
    order = [frames.index(clip.tobytes()) for clip in found.images[0]]
    assert sorted(order) == list(range(8)) and found.labels is some.labels
    for field in ("images", "instances", "boxes"):
        assert (getattr(found, field)[0] == getattr(some, field)[0][order]).all(), field
    assert all((getattr(found.key_frames(), field) == getattr(some.key_frames(), field)).all()
               for field in ("images", "boxes"))
    again, other = some.shuffled(5), some.shuffled(6)
    assert (again.images == found.images).all() and (other.key != found.key).mean() > 0.8
    # of each frame's number the new one is uniform
    counts = np.bincount(8 * some.key + found.key, minlength=64)
    assert counts.min() >= 2 and counts.max() <= 35


def test_a_data_set_like_others(some):
    train, test = load_pictures("clips", train=6, test=4, seed=2, size=16)
    assert (train.images == make_clips(6, seed=2, size=16).images).all() and train.moves == {}
    assert (test.images == make_clips(4, seed=2, split="test", size=16).images).all()
    rest, held = hold_out(some, 100)
    assert len(rest) == 800 and held.boxes.shape == (100, 8, 2, 4)


# What the actions are

def steps(values):
    """From frame to frame: (rows, T) -> (rows, T - 1), and of each row how many go against the most."""
    change = np.diff(values, axis=1)
    return change, np.minimum((change > 0).sum(axis=1), (change < 0).sum(axis=1))


@pytest.mark.parametrize("back, forth, what", [
    ("left", "right", lambda c: c.centre[:, :, 0]), ("up", "down", lambda c: c.centre[:, :, 1]),
    ("shrink", "grow", lambda c: c.radius),
    ("approach", "flee", lambda c: np.hypot(*np.moveaxis(c.centre - c.disc[:, None], 2, 0)))])
def test_an_action_moves_one_quantity_around_its_cycle(back, forth, what):
    """Always the same way but where it begins anew, and nothing else; the two of a pair are each other's
    opposites."""
    labels, course = courses()
    values = what(course)
    for name, sign in ((back, -1), (forth, 1)):
        change, against = steps(values[of(labels, name)])
        assert against.max() == 1 and 0.3 < against.mean() < 0.9
        assert (np.sign(np.median(change, axis=1)) == sign).all()
    alike = of(labels, "still", "spin", "blink") if back == "approach" else ~of(labels, back, forth)
    if back in ("left", "up"):
        alike &= ~of(labels, "approach", "flee")
    assert (np.ptp(values[alike], axis=1) == 0).all()


def test_those_on_a_ray_stay_on_it():
    labels, course = courses()
    way = (course.centre - course.disc[:, None])[of(labels, "approach", "flee")]
    angle = np.arctan2(way[:, :, 1], way[:, :, 0])
    apart = np.hypot(way[:, :, 0], way[:, :, 1])
    turned = np.abs((angle - angle[:, :1] + np.pi) % (2 * np.pi) - np.pi)
    assert turned[(apart > 0.01) & (apart[:, :1] > 0.01)].max() < 0.01
    low, high = clips.RADIUS[1], 1 - clips.RADIUS[1]
    assert course.centre.min() > low - 1e-3 and course.centre.max() < high + 1e-3


def test_spinning_and_blinking():
    labels, course = courses()
    turned = np.diff(course.angle, axis=1)
    spins = of(labels, "spin")
    assert (turned[~spins] == 0).all()
    per_frame = np.abs(turned[spins])
    assert np.ptp(per_frame, axis=1).max() < 1e-4 and 0.05 < per_frame.min() and per_frame.max() < np.pi / 4
    assert 0.4 < (turned[spins, 0] > 0).mean() < 0.6
    changes = (np.diff(course.colour, axis=1) != 0).any(axis=2)
    blinks = of(labels, "blink")
    assert not changes[~blinks].any() and set(changes[blinks].sum(axis=1)) == {3, 4, 7}
    colours = [len(np.unique(colour, axis=0)) for colour in course.colour[blinks][:200]]
    assert set(colours) == {2}


def test_the_disc_stays_and_the_clutter_flickers(some):
    """Where no object is, pictures change from frame to frame, in still clips as in others."""
    elsewhere = ~some.masks.any(axis=1)[:, None, None]
    changes = (np.abs(np.diff(some.images.astype(int), axis=1)) * elsewhere).max(axis=(2, 3, 4)) > 20
    assert changes.mean() > 0.8 and changes[of(some.labels, "still")].mean() > 0.8
    seen = (some.instances == 2).any(axis=1)
    middle = [np.argwhere(mask).mean(axis=0) for mask in seen[:50]]
    for masks, at in zip((some.instances == 2)[:50], middle):
        assert all(abs(np.argwhere(mask).mean(axis=0) - at).max() < 3 for mask in masks if mask.any())


# No single frame tells

def shares(course, t):
    """{quantity: (rows,)} in frame t."""
    away = course.centre[:, t] - course.disc
    return {"column": course.centre[:, t, 0], "row": course.centre[:, t, 1], "radius": course.radius[:, t],
            "angle": course.angle[:, t] % (2 * np.pi), "red": course.colour[:, t, 0],
            "blue": course.colour[:, t, 2], "distance": np.hypot(*away.T), "way": np.arctan2(*away.T),
            "kind": course.kind, "sum": course.centre[:, t].sum(axis=1) - course.disc.sum(axis=1),
            "of two": course.centre[:, t, 0] * course.radius[:, t]}


def furthest(labels, quantities):
    """How far the share of an action in a tenth of a quantity's range is from its share in all, at most, in
    standard errors."""
    worst = 0
    for values in quantities.values():
        cells = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, 11)[1:-1])), values)
        for cell in np.unique(cells):
            found = np.bincount(labels[cells == cell], minlength=11)
            expected = np.bincount(labels, minlength=11) * (cells == cell).mean()
            worst = max(worst, (np.abs(found - expected) / np.sqrt(expected)).max())
    return worst


def test_in_every_frame_every_quantity_is_distributed_alike_for_all_actions():
    """So it is in the key frame, and the key frame's number tells nothing. (Of 8,000 cells the furthest of
    true chance is at about 4 standard errors.)"""
    labels, course = courses(60_000)
    assert max(furthest(labels, shares(course, t)) for t in range(8)) < 5
    at = np.arange(len(labels)), course.key
    keyed = clips.Course(course.key, course.centre[at][:, None], course.radius[at][:, None],
                         course.angle[at][:, None], course.colour[at][:, None], course.kind, course.disc)
    assert furthest(labels, shares(keyed, 0) | {"key": course.key}) < 5


@pytest.mark.parametrize("mistake", ["no cycle", "even distance", "key frame first", "a colour of its own"])
def test_a_frame_that_tells_is_seen(mistake, monkeypatch):
    if mistake == "no cycle":  # what comes to the end stays there
        monkeypatch.setattr(clips, "on_cycle", lambda phase: phase.clip(0, 1))
    elif mistake == "even distance":  # the step is of the distance, not of its square
        monkeypatch.setattr(clips, "_on_ray", lambda place, disc, gone, real=clips._on_ray: (
            disc + (real(place, disc, 0 * gone) - disc) * (1 + gone[:, :, None]).clip(0)))
    elif mistake == "a colour of its own":
        monkeypatch.setattr(clips, "two_colours", lambda draw, whose, real=clips.two_colours: (
            real(draw, whose)[0], 0 * real(draw, whose)[1] + 100))
    labels, course = courses(20_000)
    if mistake == "key frame first":
        course.key[of(labels, "grow")] //= 2
        assert furthest(labels, {"key": course.key}) > 8
    else:
        assert max(furthest(labels, shares(course, t)) for t in range(8)) > 8


def of_pictures(images, boxes, instances):
    """Features of single pictures."""
    coarse = images.reshape(len(images), 3, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(len(images), -1)
    area = np.stack([(instances == k).mean(axis=(1, 2)) for k in (1, 2)], axis=1)
    return np.c_[coarse, images.std(axis=(2, 3)), boxes.reshape(len(boxes), -1), area]


def test_pixels_boxes_and_masks_of_one_frame_do_not_tell_and_of_two_do(some):
    """Chance is 9 %; of 300 test clips 4 standard errors are 7 points."""
    key = some.key_frames()
    frames = [(some.images[:, t], some.boxes[:, t], some.instances[:, t]) for t in (0, 4, 7)]
    for one in [(key.images, key.boxes, key.instances), *frames]:
        assert linear_accuracy(of_pictures(*one), some.labels, 600) < CHANCE + 0.07
    change = np.diff(some.boxes.astype(float), axis=1)[:, :, 0]
    moved = np.c_[np.median(change, axis=1), np.abs(change).mean(axis=1)]
    assert linear_accuracy(moved, some.labels, 600) > 4 * CHANCE


@pytest.mark.slow
def test_a_model_of_key_frames_learns_nothing():
    """A ViT that knows its training pictures well is at chance on others."""
    train, test = make_clips(256).key_frames(), make_clips(1000, split="test").key_frames()
    recipe = Recipe(train_pictures=256, dim=48, depth=2, patch=8, batch=32, smoothing=0.0)
    trial = Trial(recipe, {"key frame": Arm("vit", steps=300)}, pictures=(train, test), bar=False)
    model, _ = trial.train("key frame")
    known = tt.train.infer(model, train.images, trial.prepare).argmax(axis=1) == train.labels
    assert known.mean() > 0.6
    assert abs((trial.answers(model).argmax(axis=1) == test.labels).mean() - CHANCE) < 4 * 0.0091


# What is refused

@pytest.mark.parametrize("call, message", [
    (dict(count=0), "make_clips: count is 0, expected an int of at least 1"),
    (dict(count=1, split="dev"), "make_clips: split is 'dev', expected one of train, val, test"),
    (dict(count=1, size=8), "make_clips: size is 8, expected an int from 16 to 256"),
    (dict(count=1, frames=0), "make_clips: frames is 0, expected an int from 1 to 64"),
    (dict(count=1, frames=2.0), "make_clips: frames is 2.0, expected an int from 1 to 64")])
def test_bad_input_is_refused(call, message):
    with refuses(message):
        make_clips(**call)


def test_a_model_of_pictures_is_not_given_clips(some):
    trial = Trial(Recipe(batch=8, dim=8, heads=2), {"vit": Arm("vit", steps=1)}, pictures=(some, some))
    with refuses("trial: clips for ViT, a model of pictures; expected a model of clips"):
        trial.train("vit")
