"""Scenes: what a picture depends on, that masks, boxes and instances are exact, and that nothing but shape
tells the class."""
import itertools
import math
import zlib

import numpy as np
import pytest

from tiny import linear_accuracy, streams
from tinytoken.data import hold_out, load_pictures, scenes
from tinytoken.data.scenes import SHAPES, SPLITS, make_scenes
from tinytoken.errors import InputError

FIELDS = ("images", "labels", "instances", "boxes")


@pytest.fixture(scope="module")
def some():
    return make_scenes(3000, seed=1)  # to be looked at only


@pytest.fixture(scope="module")
def fine():
    """Scenes drawn finely enough to count holes."""
    return make_scenes(120, seed=2, size=128)


def test_shapes_and_dtypes(some):
    assert some.images.shape == (3000, 3, 32, 32) and some.images.dtype == "uint8"
    assert some.labels.shape == (3000,) and some.labels.dtype == "int64"
    assert some.masks.shape == (3000, 32, 32) and some.masks.dtype == bool
    assert some.instances.shape == (3000, 32, 32) and some.instances.dtype == "uint8"
    assert some.boxes.shape == (3000, 3, 4) and some.boxes.dtype == "int64"
    assert len(some) == 3000 and len(some.names) == len(set(some.names)) == len(SHAPES) == 10
    assert set(some.labels.tolist()) == set(range(10))
    with pytest.raises(AttributeError):
        some.images = None


def test_one_object_of_any_size():
    drawn, again = (make_scenes(600, seed=1, size=64, radii=scenes.SIZED) for _ in range(2))
    assert np.array_equal(drawn.images, again.images) and drawn.boxes.shape == (600, 1, 4)
    assert drawn.instances.max() == 1 and drawn.masks.any(axis=(1, 2)).all()
    left, top, right, bottom = drawn.boxes[:, 0].T
    across = np.maximum(right - left, bottom - top) / 64
    counts, _ = np.histogram(across, bins=4, range=(0.1, 0.8))
    assert 0.1 < across.min() < 0.2 and 0.7 < across.max() < 0.8 and counts.min() > 60
    train, test = load_pictures("sized_scenes", train=5, test=3, seed=1, size=64)
    assert np.array_equal(train.images, drawn.images[:5]) and len(test) == 3
    assert not np.array_equal(test.images, train.images[:3])
    for radii in ((), ((0.2, 0.1),), ((0.1, 0.5),)):
        with pytest.raises(InputError, match="expected pairs 0 < low <= high < 0.5"):
            make_scenes(1, radii=radii)


@pytest.mark.parametrize("short", [1, 5, scenes.CHUNK - 1, scenes.CHUNK, scenes.CHUNK + 1])
def test_a_longer_set_begins_with_the_shorter_one(short):
    one, other = make_scenes(short, seed=3), make_scenes(scenes.CHUNK + 40, seed=3)
    for field in FIELDS:
        assert (getattr(one, field) == getattr(other, field)[:short]).all(), field


def test_the_same_call_gives_the_same_and_another_seed_or_split_another():
    drawn = {(seed, split): make_scenes(60, seed=seed, split=split) for seed in (0, 1) for split in SPLITS}
    again = make_scenes(60, seed=1, split="test")
    for field in FIELDS:
        assert (getattr(again, field) == getattr(drawn[1, "test"], field)).all()
    pictures = [picture.tobytes() for scene in drawn.values() for picture in scene.images]
    assert len(set(pictures)) == 6 * 60
    for one, other in itertools.combinations(drawn.values(), 2):
        assert 0 <= (one.labels == other.labels).mean() < 0.35
        assert abs(np.corrcoef(one.images.reshape(-1), other.images.reshape(-1))[0, 1]) < 0.1


def test_no_two_draws_share_a_stream(monkeypatch):
    sites = streams(monkeypatch)
    for split in SPLITS:
        make_scenes(scenes.CHUNK + 1, split=split)
    assert len(sites) >= 3 * 15 and len({zlib.crc32(site.encode()) for site in sites}) == len(sites)
    assert all(steps == [0, 1] for steps in sites.values())  # one draw per site and chunk


def test_size_is_only_resolution():
    small, large = make_scenes(40, seed=4, size=32), make_scenes(40, seed=4, size=96)
    assert (small.labels == large.labels).all()
    shrunk = large.images.reshape(40, 3, 32, 3, 32, 3).mean(axis=(3, 5))
    assert abs(shrunk - small.images).mean() < 4
    assert (small.boxes.max(axis=(1, 2)) <= 32).all() and abs(small.boxes - large.boxes / 3).max() <= 1.5
    assert abs(small.masks.mean(axis=(1, 2)) - large.masks.mean(axis=(1, 2))).max() < 0.02


def test_boxes_and_instances_are_tight_and_complete(some):
    for instances, boxes in zip(some.instances[:200], some.boxes[:200]):
        present = sorted(set(instances[instances > 0].tolist()))
        assert present == list(range(1, len(present) + 1)) and 1 <= len(present) <= 3
        for number in (1, 2, 3):
            rows, columns = np.nonzero(instances == number)
            expected = (columns.min(), rows.min(), columns.max() + 1,
                        rows.max() + 1) if len(rows) else (0, 0, 0, 0)
            assert tuple(boxes[number - 1].tolist()) == expected
    assert (some.masks == (some.instances > 0)).all()


def test_objects_lie_wholly_inside_and_apart(fine):
    """Nothing is cut off by the border or by another object: every object has the area of its shape."""
    draw = scenes.Draws(120, 2, "train", 0)
    centre, radius, present = scenes._place(draw)
    assert (present[:, 0] & (present[:, 1] | ~present[:, 2])).all()
    assert (centre - radius[..., None] >= 0)[present].all()
    assert (centre + radius[..., None] <= 1)[present].all()
    for i, j in itertools.combinations(range(3), 2):
        apart = np.hypot(*(centre[:, i] - centre[:, j]).T)
        assert (apart > radius[:, i] + radius[:, j])[present[:, i] & present[:, j]].all()
    for k in range(3):
        area = (fine.instances == k + 1).mean(axis=(1, 2))
        assert (area[~present[:, k]] == 0).all()
        np.testing.assert_allclose(area[present[:, k]], 1.299 * radius[present[:, k], k]**2, rtol=0.08)


def test_number_and_share_of_objects(some):
    number = some.instances.max(axis=(1, 2))
    assert set(number.tolist()) == {1, 2, 3} and (np.bincount(number)[1:] > 0.2 * len(some)).all()
    assert 0.08 < some.masks.mean() <= 0.25
    centre = some.boxes[:, 0, :2] + some.boxes[:, 0, 2:]
    assert (centre.std(axis=0) > 8).all()  # anywhere, not in the middle: in half pixels


def test_object_share(some):
    for patch in (1, 4, 8, 32):
        share = some.object_share(patch)
        side = 32 // patch
        assert share.shape == (3000, side * side) and share.dtype == "float32"
        for i, token in ((0, 0), (1, side), (2, side * side - 1), (3, side // 2)):
            row, column = divmod(token % (side * side), side)
            part = some.masks[i, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch]
            assert share[i, token % (side * side)] == np.float32(part.mean())
    with pytest.raises(InputError,
                       match="object_share: patch size 5 does not divide the picture's 32 pixels"):
        some.object_share(5)


def test_a_pixel_is_an_objects_or_the_backgrounds(some):
    labels = some.pixel_labels
    assert labels.shape == (3000, 32, 32) and labels.dtype == "uint8"
    for picture, instances, label in zip(labels[:200], some.instances, some.labels):
        assert set(np.unique(picture)) == {0, label + 1}  # all objects of a picture have one shape
        assert ((picture > 0) == (instances > 0)).all()


def test_scenes_by_pixel_are_the_same_scenes():
    request = dict(train=30, test=10, seed=3, size=40)
    sets = zip(load_pictures("pixel_scenes", **request), load_pictures("scenes", **request))
    for by_pixel, scene in sets:
        assert (by_pixel.images == scene.images).all() and (by_pixel.labels == scene.pixel_labels).all()
        assert by_pixel.names == ("background", *scene.names) and by_pixel.moves == {}
        assert (by_pixel.object_share(8) == scene.object_share(8)).all() and len(by_pixel) == len(scene)
    rest, held = hold_out(by_pixel, 4)
    assert rest.labels.shape == (6, 40, 40) and held.labels.shape == (4, 40, 40)


def test_token_labels(some):
    for patch in (4, 16):
        labels, side = some.token_labels(patch), 32 // patch
        assert labels.shape == (3000, 1 + side * side, 10) and labels.dtype == "float32"
        assert (labels[:, 0] == np.eye(10)[some.labels]).all()
        np.testing.assert_allclose(labels.sum(axis=2), 1, rtol=0, atol=1e-6)
        for i in range(40):
            row, column = divmod(i % (side * side), side)
            part = some.instances[i, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch]
            share = (part > 0).sum() / patch ** 2
            expected = [share * (k == some.labels[i]) + (1 - share) / 10 for k in range(10)]
            np.testing.assert_allclose(labels[i, 1 + row * side + column], expected, rtol=1e-6)
    with pytest.raises(InputError, match="patch size 5 does not divide the picture's 32 pixels"):
        some.token_labels(5)


def test_the_mask_is_where_the_objects_colour_is(some):
    """Inside a mask (a pixel from its edge) there is one colour; outside (again a pixel) nothing of the
    object is left."""
    for i in range(100):
        for number in range(1, some.instances[i].max() + 1):
            mask = np.pad(some.instances[i] == number, 1)
            shifts = [np.roll(mask, (a, b), (0, 1))[1:-1, 1:-1] for a in (-1, 0, 1) for b in (-1, 0, 1)]
            inner = some.images[i][:, np.all(shifts, axis=0)]
            assert inner.shape[1] == 0 or (inner == inner[:, :1]).all()


def euler_number(mask):
    """Pieces less holes of a picture (Gray 1971, bit quads; pixels that touch at a corner are one piece)."""
    m = np.pad(mask, 1).astype(int)
    quads = m[:-1, :-1] + m[:-1, 1:] + m[1:, :-1] + m[1:, 1:]
    diagonal = (quads == 2) & (m[:-1, :-1] == m[1:, 1:])
    return ((quads == 1).sum() - (quads == 3).sum() - 2 * diagonal.sum()) / 4


def test_the_label_is_the_shape_that_is_there(fine):
    """Each class has a fact of its own that can be measured on the mask, by another way than the one it was
    drawn by."""
    pieces = {"disc": 1, "ring": 0, "square": 1, "triangle": 1, "cross": 1, "star": 1, "bars": 3, "dots": 4,
              "lattice": 0}
    fills = {"disc": (0.75, 0.83), "ring": (0.41, 0.46), "square": (0.6, 1.0), "triangle": (0.44, 0.52),
             "cross": (0.33, 0.39), "star": (0.36, 0.42), "crescent": (0.39, 0.48), "bars": (0.4, 0.7),
             "dots": (0.36, 0.52), "lattice": (0.36, 0.6)}
    seen = set()
    for i, label in enumerate(fine.labels):
        name = fine.names[label]
        for k, (left, top, right, bottom) in enumerate(fine.boxes[i]):
            mask = fine.instances[i, top:bottom, left:right] == k + 1
            if mask.size:
                seen.add(name)
                low, high = fills[name]
                assert low <= mask.mean() <= high, name
                assert euler_number(mask) == pieces.get(name, euler_number(mask)), name
    assert seen == set(fine.names)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shapes_have_one_area_and_fit_the_unit_circle(shape):
    axis = (np.arange(1200, dtype="float32") + 0.5) / 600 * 1.1 - 1.1
    x, y = np.meshgrid(axis, axis)
    distance = shape(x, y)
    assert distance.dtype == "float32" and distance.shape == x.shape
    inside = distance < 0
    assert inside.mean() * 2.2**2 == pytest.approx(1.299, rel=0.005)
    assert np.hypot(x, y)[inside].max() < 1.003
    slope = np.hypot(*np.gradient(distance, axis[1] - axis[0]))[abs(distance) < 0.02]
    assert 0.95 < np.median(slope) < 1.05  # a distance: edges of all shapes are equally sharp


def test_the_class_has_no_say_in_number_and_area(some):
    """Class means are one number, to five standard errors."""
    for values in (some.instances.max(axis=(1, 2)).astype(float), some.masks.mean(axis=(1, 2))):
        for label in range(10):
            group = values[some.labels == label]
            assert abs(group.mean() - values.mean()) < 5 * values.std() / math.sqrt(len(group))


def test_colour_does_not_tell_the_class(some):
    """Chance is 10 %, and the same classifier, given the mask's outline, does far better. The histogram
    counts pixels by the palette's colour next to theirs: finer bins would count the mixed pixels along the
    edges, which is to measure outlines."""
    images = some.images.astype("float32")
    moments = np.c_[images.mean(axis=(2, 3)), images.std(axis=(2, 3))]
    nearest = np.stack([np.square(images - colour[:, None, None]).sum(axis=1)
                        for colour in (*scenes.PALETTE, np.full(3, np.mean(scenes.LEVEL)))]).argmin(axis=0)
    histogram = np.stack([(nearest == k).mean(axis=(1, 2)) for k in range(9)], axis=1)
    assert linear_accuracy(moments, some.labels, 2000) < 0.14
    assert linear_accuracy(np.c_[histogram, np.sort(histogram, axis=1)], some.labels, 2000) < 0.14
    outline = np.stack([(some.masks[:, a:, b:] != some.masks[:, :32 - a, :32 - b]).mean(axis=(1, 2))
                        for a in range(6) for b in range(6)], axis=1)
    assert linear_accuracy(outline, some.labels, 2000) > 0.3


def test_objects_and_clutter_have_the_same_colours(some):
    """The same means, spreads and palette shares; and what is drawn in the pictures is of the palette."""
    draw = scenes.Draws(scenes.CHUNK, 0, "train", 0)
    clutter, objects = (draw.colours(of, (count,)).reshape(-1, 3)
                        for of, count in (("clutter", 12), ("object", 3)))
    for moment in (lambda x: x, lambda x: (x - x.mean(axis=0))**2):
        one, other = moment(clutter), moment(objects)
        assert (abs(one.mean(axis=0) - other.mean(axis=0)) < 5 * other.std(axis=0)
                / math.sqrt(len(other))).all()
    distance, nearest = zip(*(palette_distance(colours) for colours in (clutter, objects)))
    assert max(d.max() for d in distance) <= scenes.JITTER
    shares = [np.bincount(n, minlength=8) / len(n) for n in nearest]
    assert abs(shares[0] - shares[1]).max() < 0.06
    shifts = [np.roll(some.masks, (a, b), (1, 2)) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    inner = some.images.transpose(0, 2, 3, 1)[np.all(shifts, axis=0)].astype("float32")
    assert len(inner) > 10_000 and palette_distance(inner)[0].max() <= scenes.JITTER + 0.5


def palette_distance(colours):
    """(..., 3) -> the largest channel's distance to the nearest colour of the palette, and that one's
    number."""
    distance = abs(colours[:, None] - scenes.PALETTE).max(axis=2)
    return distance.min(axis=1), distance.argmin(axis=1)


@pytest.mark.parametrize("call, message", [
    (dict(count=0), "make_scenes: count is 0, expected an int of at least 1"),
    (dict(count=2.5), "make_scenes: count is 2.5, expected an int of at least 1"),
    (dict(count=1, split="dev"), "make_scenes: split is 'dev', expected one of train, val, test"),
    (dict(count=1, size=8), "make_scenes: size is 8, expected an int from 16 to 256"),
    (dict(count=1, seed=-1), "random: seed -1, expected 0 <= int < 2..64"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make_scenes(**call)
