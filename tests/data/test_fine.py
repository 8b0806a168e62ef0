"""Fine-grained scenes: the mark is where it is said to be, alone tells the class, and nothing else does."""
import numpy as np
import pytest

from small import refuses
from tinytoken.data import load_pictures
from tinytoken.data.fine import DARK, LIGHT, MARKS, make_fine
from tinytoken.data.scenes import make_scenes


@pytest.fixture(scope="module")
def drawn():
    return make_fine(1200, seed=3)


def test_the_mark_is_the_class(drawn):
    for i in range(200):
        rows, columns = np.nonzero(drawn.cues[i])
        r, c = rows.min(), columns.min()
        assert len(rows) == 4 and r % 2 == c % 2 == 0
        mark = drawn.images[i, :, r:r + 2, c:c + 2]
        assert set(np.unique(mark)) == {LIGHT, DARK} and (mark == mark[:1]).all()
        text = " ".join("".join("1" if value == LIGHT else "0" for value in row) for row in mark[0])
        assert text == MARKS[drawn.names[drawn.labels[i]]]
        assert drawn.cue_patch(4)[i] == r // 4 * 8 + c // 4 and drawn.cue_patch(8)[i] == r // 8 * 4 + c // 8


def test_it_stands_on_the_object_and_the_rest_is_the_scene(drawn):
    scenes = make_scenes(1200, seed=3, radii=((0.3, 0.4),))
    assert (scenes.masks | ~drawn.cues).all() and np.array_equal(drawn.shapes, scenes.labels)
    changed = (drawn.images != scenes.images).any(axis=1)
    assert (drawn.cues <= changed | (scenes.images == drawn.images).all(axis=1)).all()
    beside = changed & ~drawn.cues
    assert not (beside & scenes.masks).any()
    assert beside.sum() > 0.99 * 1200 * 12 and beside.sum(axis=(1, 2)).max() == 12
    values = drawn.images.swapaxes(1, 3)[beside.swapaxes(1, 2)]
    assert set(np.unique(values)) == {LIGHT, DARK}


def test_nothing_else_tells_the_class(drawn):
    """Neither the shape nor the place of the mark: counts are as chance has them (chi-square)."""
    rows, columns = np.divmod(drawn.cue_patch(8), 4)
    for other in (drawn.shapes, rows, columns, drawn.images.mean(axis=(1, 2, 3)) > 60):
        table = np.zeros((6, int(other.max()) + 1))
        np.add.at(table, (drawn.labels, other.astype(int)), 1)
        expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
        seen = expected > 0
        freedom = 5 * (table.sum(axis=0) > 0).sum() - 5
        assert ((table - expected)[seen] ** 2 / expected[seen]).sum() < freedom + 4 * (2 * freedom) ** 0.5
    assert np.bincount(drawn.labels, minlength=6).min() > 150


def test_a_longer_set_begins_with_the_shorter_one(drawn):
    few = make_fine(300, seed=3)
    assert np.array_equal(few.images, drawn.images[:300]) and np.array_equal(few.labels, drawn.labels[:300])
    train, test = load_pictures("fine_scenes", train=8, test=6, seed=3)
    assert np.array_equal(train.images, drawn.images[:8]) and len(test) == 6 and train.names == tuple(MARKS)
    assert not np.array_equal(test.images, drawn.images[:6])
    assert make_fine(2, size=64).cues.shape == (2, 64, 64)


def test_what_it_refuses():
    with refuses("make_fine: size is 33, expected an even number"):
        make_fine(2, size=33)
    with refuses("make_scenes: count is 0, expected an int of at least 1"):
        make_fine(0)
