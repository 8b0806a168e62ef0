"""Batches: a pure function of (seed, step); what the crop and the flip do, pixel by pixel; the numbers of
normalisation."""
import numpy as np
import pytest

from tinytoken.data.batches import IGNORE, Batches, channel_statistics, normalise
from tinytoken.errors import InputError

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)  # leaves pixel values as they are


def host(array):
    return array.get() if hasattr(array, "get") else array


def picture_set(xp, count=10, size=8):
    """Every pixel of every picture has another value or another neighbourhood: values count 1, 2, ... modulo
    251."""
    pixels = np.arange(count * 3 * size * size) % 251 + 1
    return xp.asarray(pixels.reshape(count, 3, size, size).astype("uint8")), xp.arange(count)


def test_an_epoch_has_each_picture_once_in_a_new_order(xp):
    images, labels = picture_set(xp, 12)
    batches = Batches(images, labels, 4, **PLAIN)
    assert len(batches) == batches.steps_per_epoch == 3
    epochs = [[host(batches(step)[1]).tolist() for step in range(3 * e, 3 * e + 3)] for e in range(3)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_images_and_labels_stay_together(xp):
    images, labels = picture_set(xp, 12)
    for step in range(4):
        x, y = Batches(images, labels, 5, seed=3, **PLAIN)(step)
        assert x.shape == (5, 3, 8, 8) and x.dtype == "float32" and y.dtype == "int64"
        np.testing.assert_allclose(host(x), host(images[y]), rtol=1e-6)


def test_the_incomplete_batch_is_dropped(xp):
    batches = Batches(*picture_set(xp, 11), 4, **PLAIN)
    assert len(batches) == 2
    seen = np.concatenate([host(batches(step)[1]) for step in (0, 1)])
    assert len(set(seen.tolist())) == 8


def test_a_batch_depends_on_seed_and_step_only(xp):
    images, labels = picture_set(xp, 12)
    settings = dict(pad=2, flip=True, **PLAIN)
    forwards = Batches(images, labels, 4, seed=1, **settings)
    backwards = Batches(images, labels, 4, seed=1, **settings)
    drawn = [forwards(step) for step in range(7)]
    for step in reversed(range(7)):
        for one, other in zip(drawn[step], backwards(step)):
            assert (one == other).all()
    other = Batches(images, labels, 4, seed=2, **settings)(0)
    assert (host(other[0]) != host(drawn[0][0])).any() and (host(other[1]) != host(drawn[0][1])).any()
    assert (host(images) == host(picture_set(xp, 12)[0])).all()


def find_view(picture, source, pad):
    """All (mirrored, down, across) for which `picture` is that crop of `source` padded with zeros."""
    size, padded = source.shape[-1], np.pad(source, ((0, 0), (pad, pad), (pad, pad)))
    views = {(mirrored, i, j): padded[:, i:i + size, j:j + size][..., ::-1 if mirrored else 1]
             for mirrored in (False, True) for i in range(2 * pad + 1) for j in range(2 * pad + 1)}
    return [place for place, view in views.items() if np.allclose(view, picture, rtol=1e-6)]


def test_each_picture_is_a_crop_of_its_padded_self_or_of_its_mirror_image(xp):
    images, labels = picture_set(xp, 40)
    pad, seen, mirrored = 2, set(), 0
    batches = Batches(images, labels, 40, pad=pad, flip=True, **PLAIN)
    for step in range(5):
        x, y = batches(step)
        for picture, source in zip(host(x), host(images[y])):
            found = find_view(picture, source, pad)
            assert len(found) == 1
            seen.add(found[0][1:])
            mirrored += found[0][0]
    assert len(seen) == 25  # all shifts occur
    assert 70 < mirrored < 130  # of 200


def test_flip_alone_mirrors_and_pad_alone_does_not(xp):
    images, labels = picture_set(xp, 40)
    x, y = Batches(images, labels, 40, flip=True, **PLAIN)(0)
    kinds = [find_view(picture, source, 0)[0][0] for picture, source in zip(host(x), host(images[y]))]
    assert {True, False} == set(kinds)
    x, y = Batches(images, labels, 40, pad=1, **PLAIN)(0)
    assert not any(find_view(picture, source, 1)[0][0] for picture, source in zip(host(x), host(images[y])))


@pytest.mark.parametrize("moves", [dict(pad=3), dict(flip=True), dict(pad=3, flip=True), {}], ids=str)
def test_labels_of_pixels_move_along(xp, moves):
    """Every pixel's label is its value in the first channel, 0 to 250: where the picture went, it went."""
    images, _ = picture_set(xp, 20)
    batches = Batches(images, images[:, 0], 20, seed=1, **moves, **PLAIN)
    for step in range(3):
        x, labels = map(host, batches(step))
        assert labels.shape == (20, 8, 8) and labels.dtype == "uint8"
        inside = labels != IGNORE
        np.testing.assert_allclose(x[:, 0][inside], labels[inside], rtol=1e-6)
        assert (x[:, :, :] * ~inside[:, None] == 0).all() and (inside.all() != ("pad" in moves))
        plain = Batches(images, xp.arange(20), 20, seed=1, **moves, **PLAIN)(step)[0]
        assert (host(plain) == x).all()  # labels change nothing of the pictures


def test_labels_of_pixels_in_wide_pictures_and_what_is_erased(xp):
    images = xp.asarray(np.random.default_rng(0).integers(0, 255, (9, 3, 6, 10)).astype("uint8"))
    x, labels = map(host, Batches(images, images[:, 1].astype("int64"), 9, pad=2, erase=1.0, **PLAIN)(0))
    inside = labels != IGNORE
    left = (x != 0).any(axis=1)
    assert labels.shape == (9, 6, 10) and labels.dtype == "int64" and (left <= inside).all()
    np.testing.assert_allclose(x[:, 1][left], labels[left], rtol=1e-6)
    assert (inside & ~left).any()  # erased pixels keep their class


def test_padding_is_the_mean_colour(xp):
    images = xp.full((6, 3, 8, 8), 200, dtype="uint8")
    x = host(Batches(images, xp.arange(6), 6, pad=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))(0)[0])
    expected = [(200 / 255 - m) / s for m, s in ((0.1, 0.5), (0.2, 0.25), (0.3, 0.2))]
    for channel, value in enumerate(expected):
        inside = np.isclose(x[:, channel], value, rtol=1e-5)
        assert (inside | (x[:, channel] == 0)).all() and inside.any() and not inside.all()


def test_statistics_and_normalisation(xp):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1500, 3, 4, 4)).astype("uint8")
    images //= np.array([1, 2, 4], "uint8")[:, None, None]
    mean, std = channel_statistics(xp.asarray(images))
    exact = images.astype("float64") / 255
    assert all(type(value) is float for value in mean + std)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std(axis=(0, 2, 3)), rtol=1e-9)
    x = normalise(xp.asarray(images), mean, std)
    assert x.dtype == "float32" and type(x) is type(xp.asarray(images))
    expected = (exact - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(host(x), expected, atol=2e-6)


def test_a_channel_of_one_value_deviates_by_nothing():
    """mean(x²) - mean(x)² leaves up to 1e-19 of either sign, of which the root is complex or 1e-10."""
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8)).astype("uint8")
    for value in range(256):
        images[:, 1] = value
        red, green, blue = channel_statistics(images)[1]
        assert green == 0 and type(green) is float and min(red, blue) > 0.2
    batch = Batches(images, np.arange(7), 7)
    pictures = batch(0)[0]
    assert batch.std == (red, 1, blue) and pictures[:, 0].std() > 0.9
    assert np.abs(pictures[:, 1]).max() < 1e-6


def test_a_channel_of_two_values_deviates(xp):
    images = xp.full((50, 3, 32, 32), 5, dtype="uint8")
    images[0, :, 0, 0] = 6
    expected = (1 / 255) * (50 * 1024) ** -0.5
    np.testing.assert_allclose(channel_statistics(images)[1], [expected] * 3, rtol=1e-4)


def test_the_sets_own_statistics_are_the_default(xp):
    images, labels = picture_set(xp)
    batches = Batches(images, labels, 10)
    assert (batches.mean, batches.std) == channel_statistics(images)
    x = host(batches(0)[0])
    assert abs(x.mean(axis=(0, 2, 3))).max() < 1e-5 and abs(x.std(axis=(0, 2, 3)) - 1).max() < 1e-5


@pytest.mark.parametrize("change, message", [
    (dict(images=np.zeros((10, 3, 8, 8), "float32")),
     r"Batches: images \(10, 3, 8, 8\) float32, expected \(B, 3, H, W\) uint8"),
    (dict(images=np.zeros((10, 8, 8, 3), "uint8")),
     r"Batches: images \(10, 8, 8, 3\) uint8, expected \(B, 3, H, W\) uint8"),
    (dict(images=np.zeros((3, 8, 8), "uint8")), r"Batches: images \(3, 8, 8\) uint8, expected"),
    (dict(images=np.zeros((0, 3, 8, 8), "uint8")), r"Batches: images \(0, 3, 8, 8\) uint8, expected"),
    (dict(labels=np.zeros(9, "int64")),
     r"Batches: labels \(9,\) int64 for 10 images, expected \(10,\) integers"),
    (dict(labels=np.zeros((9, 10))),
     r"Batches: labels \(9, 10\) float64 for 10 images, .* or one array of numbers per image"),
    (dict(labels=np.array(["a"] * 10)), r"Batches: labels \(10,\) <U1 for 10 images, expected \(10,\) integers, "),
    (dict(labels=np.zeros(10, bool)), r"Batches: labels \(10,\) bool for 10 images, expected \(10,\) integers, "),
    (dict(labels=np.array(3)), r"Batches: labels \(\) int64 for 10 images, expected \(10,\) integers"),
    (dict(labels=np.zeros(10, "float32"), mixup=0.2),
     r"Batches: mixup or cutmix with labels \(10,\) float32, expected class numbers \(10,\)"),
    (dict(labels=np.zeros((10, 10), "int64"), cutmix=1.0),
     r"Batches: mixup or cutmix with labels \(10, 10\) int64, expected class numbers \(10,\)"),
    (dict(labels=np.zeros((10, 8, 8), "int8"), flip=True),
     r"Batches: pad or flip with labels \(10, 8, 8\) int8, maps of the pictures: they would not move along"),
    (dict(labels=np.zeros((10, 8, 8)), flip=True),
     r"Batches: pad or flip with labels \(10, 8, 8\) float64, maps of the pictures: they would not move"),
    (dict(labels=np.zeros((10, 2, 8, 8)), pad=1),
     r"Batches: pad or flip with labels \(10, 2, 8, 8\) float64, maps of the pictures: they would not move"),
    (dict(batch_size=11), "Batches: batch size 11, expected 1 to the set's 10"),
    (dict(batch_size=0), "Batches: batch size 0, expected 1 to the set's 10"),
    (dict(pad=8), "Batches: pad is 8, expected 0 to 7"),
    (dict(pad=-1), "Batches: pad is -1, expected 0 to 7"),
])
def test_bad_input_is_refused(change, message):
    images, labels = picture_set(np)
    with pytest.raises(InputError, match=message):
        Batches(**(dict(images=images, labels=labels, batch_size=2) | change))


@pytest.mark.parametrize("shape, dtype, changes", [
    ((), "float32", dict(pad=1, flip=True)), ((3, 3), "bool", {}), ((4,), "float32", dict(pad=1, flip=True)),
    ((7,), "int64", dict(flip=True)), ((4, 4), "int64", dict(pad=1)), ((8, 8), "uint8", dict(erase=0.5))],
                         ids=str)
def test_labels_may_be_any_arrays_one_per_image(shape, dtype, changes, xp):
    """Each comes with its picture, as it is. Maps of the pictures do where nothing moves."""
    images, numbers = picture_set(xp, 12)
    rng = np.random.default_rng(0)
    labels = xp.asarray(rng.integers(0, 2 if dtype == "bool" else 200, (12, *shape)).astype(dtype))
    settings = dict(seed=3, **changes, **PLAIN)
    for step in range(4):
        x, y = Batches(images, labels, 5, **settings)(step)
        same_x, chosen = Batches(images, numbers, 5, **settings)(step)
        assert y.dtype == dtype and y.shape == (5, *shape)
        assert (host(x) == host(same_x)).all() and (host(y) == host(labels)[host(chosen)]).all()


def test_class_numbers_are_counted_and_others_are_not():
    images, labels = picture_set(np)
    assert Batches(images, labels, 2).classes == 10 and Batches(images, labels, 2, classes=12).classes == 12
    assert Batches(images, labels.astype("float32"), 2).classes is None


def test_bad_normalisation_is_refused():
    images = picture_set(np)[0]
    with pytest.raises(InputError, match=r"normalise: mean \(0.5,\) and std \(1, 1, 1\), expected three of "
                                         r"each, std above 0"):
        normalise(images, (0.5,), (1, 1, 1))
    with pytest.raises(InputError, match="std above 0"):
        normalise(images, (0.5, 0.5, 0.5), (1, 0, 1))
    with pytest.raises(InputError, match=r"normalise: images .* float64, expected \(B, 3, H, W\) uint8"):
        normalise(images / 255, (0.5, 0.5, 0.5), (1, 1, 1))


# Clips

def clip_set(xp, count=6, frames=4, size=8):
    images, _ = picture_set(xp, count * frames, size)
    return images.reshape(count, frames, 3, size, size), xp.arange(count)


def test_all_frames_of_a_clip_are_moved_alike(xp):
    """Each is the same crop of its padded self, and none is mirrored."""
    images, labels = clip_set(xp)
    batches, seen = Batches(images, labels, 6, pad=2, **PLAIN), set()
    for step in range(6):
        x, y = (host(array) for array in batches(step))
        assert x.shape == (6, 4, 3, 8, 8) and x.dtype == "float32"
        for clip, number in zip(x, y):
            views = [find_view(frame, source, 2) for frame, source in zip(clip, host(images)[number])]
            common = set.intersection(*map(set, views))
            assert common and not any(mirrored for mirrored, *_ in common)
            seen |= common
    assert len(seen) > 12


def test_clips_that_are_not_moved_are_normalised_as_their_frames(xp):
    images, labels = clip_set(xp)
    x, y = Batches(images, labels, 3)(1)
    frames = images.reshape(-1, 3, 8, 8)
    assert channel_statistics(images) == channel_statistics(frames)
    expected = normalise(frames, *channel_statistics(frames)).reshape(images.shape)[y]
    assert (host(x) == host(expected)).all()


@pytest.mark.parametrize("change", [dict(flip=True), dict(erase=0.5), dict(mixup=0.2), dict(cutmix=1.0)], ids=str)
def test_what_would_change_what_a_clip_shows_is_refused(change):
    with pytest.raises(InputError, match="^Batches: flip, erase, mixup or cutmix of clips, which can only be "
                                         "moved: pad alone expected$"):
        Batches(*clip_set(np), 2, **change)
    with pytest.raises(InputError, match="^Batches: pad is 8, expected 0 to 7$"):
        Batches(*clip_set(np), 2, pad=8)
    with pytest.raises(InputError, match=r"maps of the pictures: they would not move along$"):
        Batches(clip_set(np)[0], np.zeros((6, 4, 8, 8)), 2, pad=1)
