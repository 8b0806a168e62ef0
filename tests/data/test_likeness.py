"""The measures of a picture against their definition, the bounds of a set, and what lies outside of them."""
import numpy as np
import pytest

from tinytoken.data import likeness, scenes


def by_hand(image):
    """The measures of one picture, pixel by pixel."""
    numbers = [getattr(channel / 255, what)() for what in ("mean", "std") for channel in image]
    shares = []
    for down, across in ((1, 0), (0, 1)):
        pairs = [abs(image[:, i, j].astype(int) - image[:, i + down, j + across]).max() <= 1
                 for i in range(image.shape[1] - down) for j in range(image.shape[2] - across)]
        shares.append(sum(pairs) / len(pairs))
    return [*numbers, sum(shares) / 2]


def test_measures_as_they_are_defined():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4, (5, 3, 6, 9)).astype("uint8") + rng.integers(0, 250, (5, 3, 1, 1), "uint8")
    np.testing.assert_allclose(likeness.measures(images), [by_hand(image) for image in images], atol=1e-12)
    assert len(likeness.MEASURES) == 7 and len(set(likeness.MEASURES)) == 7


def test_neighbours_are_even_up_to_one_step_in_every_channel():
    for step, share in ((0, 1), (1, 1), (2, 0.5), (254, 0.5), (255, 0.5)):
        image = np.zeros((1, 3, 4, 4), "uint8")
        image[:, 1, :, ::2] = step  # differs from its neighbours at the sides, not from those above
        assert likeness.measures(image)[0, 6] == share


def test_bounds_are_quantiles_and_a_margin(monkeypatch):
    values = np.linspace(0.3, 0.5, 1001)
    monkeypatch.setattr(likeness, "measures", lambda images: np.tile(values[images[:, :1, 0, 0]], (1, 7)))
    images = np.zeros((1001, 3, 1, 1), int)
    images[:, 0, 0, 0] = np.random.default_rng(0).permutation(1001)
    low, high = 0.3002 - 0.2 * 0.1996, 0.4998 + 0.2 * 0.1996
    assert likeness.bounds(images) == {name: [round(low, 4), round(high, 4)] for name in likeness.MEASURES}


def test_bounds_stay_between_0_and_1():
    images = np.random.default_rng(0).choice([0, 255], (50, 3, 2, 2)).astype("uint8")
    assert all(0 <= low < high <= 1 for low, high in likeness.bounds(images).values())


def test_of_many_pictures_a_part_is_measured_from_end_to_end(monkeypatch):
    monkeypatch.setattr(likeness, "MOST", 3)
    images = np.arange(9, dtype="uint8").repeat(3 * 4).reshape(9, 3, 2, 2)
    seen = []
    measures = likeness.measures
    monkeypatch.setattr(likeness, "measures", lambda some: seen.extend(some[:, 0, 0, 0]) or measures(some))
    likeness.bounds(images)
    assert seen == [0, 4, 8]


@pytest.fixture(scope="module")
def known():
    return likeness.bounds(scenes.make_scenes(2000).images)


def test_new_scenes_are_inside_and_other_pictures_are_not(known):
    """The shares of thousands stand in lessons/results/likeness.json."""
    new = scenes.make_scenes(300, seed=1, split="test").images
    assert sum(bool(likeness.outside(image, known)) for image in new) <= 3
    rng = np.random.default_rng(0)
    others = {"white": np.full((3, 32, 32), 255), "noise": rng.integers(0, 256, (3, 32, 32)),
              "negative": 255 - new[0], "red": np.stack([new[0][0] * 0 + 150, new[0][1], new[0][2]])}
    drawing = np.full((3, 32, 32), 35)
    drawing[:, 8:20, 10:22] = np.array([225, 60, 55])[:, None, None]
    for name, image in (others | {"a drawing": drawing}).items():
        assert likeness.outside(image.astype("uint8"), known), name


def test_what_is_said_of_a_measure(known):
    white = np.full((3, 8, 8), 255, "uint8")
    text = "mean of green 1.00, there 0.25 to 0.50"
    assert likeness.outside(white, {"mean of green": [0.25, 0.5]}) == [text]
    assert likeness.outside(white, {"mean of green": [0, 1], "of a later version": 3}) == []
    assert likeness.outside(white, {"mean of green": [0.5, 1.0]}) == []
    assert likeness.outside(white * 0, {"mean of green": [0.5, 1.0]})
    assert [text.split(" 0")[0].split(" 1")[0] for text in likeness.outside(white, known)] == (
        list(likeness.MEASURES))


def test_clips_are_measured_frame_by_frame():
    images = scenes.make_scenes(40).images
    assert likeness.bounds(images.reshape(10, 4, 3, 32, 32)) == likeness.bounds(images)
