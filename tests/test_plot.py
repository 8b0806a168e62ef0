"""The pictures: which pixels are faded and which are red, which panel stands where, and nothing
half-written."""
import errno
import struct
import types

import numpy as np
import pytest

from small import refuses
from tinytoken import plot

RED = np.array([255, 40, 20])


def test_hide_fades_and_hatches_what_is_not_kept():
    picture = np.arange(4 * 4 * 3, dtype="uint8").reshape(4, 4, 3) * 5
    shown = plot.hide(picture, np.array([1, 2]), 2)  # upper right and lower left
    faded = 225 + picture // 10
    for row in range(4):  # one line per patch, up to the right
        for column in range(4):
            if (row + column) % 2:
                faded[row, column] = 150
    assert shown.dtype == "uint8" and shown.shape == (4, 4, 3)
    for rows, columns, expected in ((slice(0, 2), slice(2, 4), picture), (slice(2, 4), slice(0, 2), picture),
                                    (slice(0, 2), slice(0, 2), faded), (slice(2, 4), slice(2, 4), faded)):
        assert np.array_equal(shown[rows, columns], expected[rows, columns])
    assert np.array_equal(plot.hide(picture, np.arange(4), 2), picture)
    assert np.array_equal(plot.hide(picture, np.array([], int), 2), faded)
    marked = np.array([False, True, True, False])  # or a boolean for each patch
    assert np.array_equal(plot.hide(picture, marked, 2), shown)
    assert np.array_equal(plot.hide(picture, np.zeros(4, bool), 2), faded)


@pytest.mark.parametrize("level", [0, 128, 200, 255])
def test_a_hidden_patch_is_told_from_one_that_looks_like_it(level):
    """A white patch, too: without the lines it would be 250, 250, 250 where hidden."""
    picture = np.full((16, 16, 3), level, "uint8")
    shown = plot.hide(picture, np.array([0]), 8).astype(int)
    assert (shown[:8, :8] == level).all()
    for rows, columns in ((slice(8), slice(8, 16)), (slice(8, 16), slice(8)), (slice(8, 16), slice(8, 16))):
        hidden = shown[rows, columns, 0]
        assert (hidden == 150).sum() == 8 and np.ptp(hidden) >= 75
        assert ((hidden == 150).sum(axis=0) == 1).all() and hidden.max() == 225 + level // 10


def test_heat_is_red_where_the_weight_is():
    picture = np.zeros((4, 4, 3), "uint8")
    picture[:, :, 1] = 150  # grey 50
    shown = plot.heat(picture, np.array([0.0, 0.2, 0.1, 0.0]), 2)
    grey = 50 * 0.7 + 60
    assert shown.dtype == "uint8" and shown.shape == (4, 4, 3)
    for b, weight in enumerate((0, 1, 0.5, 0)):  # scaled to the largest
        block = shown[b // 2 * 2:b // 2 * 2 + 2, b % 2 * 2:b % 2 * 2 + 2]
        expected = (grey * (1 - 0.8 * weight) + RED * 0.8 * weight).astype("uint8")
        assert (block == expected).all(), weight
    assert plot.heat(np.full((1, 1, 3), 255, "uint8"), np.ones(1), 1).max() <= 255


def example(count=2):
    """Pictures of 4 x 4 in patches of 2, and panels as models show them: patches that are kept, and
    weights."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 4, 4)).astype("uint8")
    kept = np.array([[True, True, False, True], [True, False, True, True]])[:count]
    return images, [("keeps 3 of 4", kept), ("gathers", rng.dirichlet(np.ones(4), count))]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are made."""
    made, real = [], plot._figure().Figure

    def figure(**size):
        made.append(real(**size))
        return made[-1]
    monkeypatch.setattr(plot, "_figure", lambda: types.SimpleNamespace(Figure=figure))
    return made


def test_tokens_draws_a_row_per_picture(tmp_path, figures):
    images, panels = example()
    predictions = {"ViT": ["cat", "dog"], "DynamicViT": ["cat", "cat"], "LookupViT": ["cat", "frog"]}
    plot.tokens(tmp_path / "t.png", images, ["cat", "dog"], predictions, panels, 2)
    data = (tmp_path / "t.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and [path.name for path in tmp_path.iterdir()] == ["t.png"]
    assert struct.unpack(">II", data[16:24]) == (round(3 * 1.9 * 110), round(2 * 2.15 * 110))

    axes = np.array(figures[0].axes).reshape(2, 3)
    assert [axis.get_title() for axis in axes[0]] == ["picture", "keeps 3 of 4", "gathers"]
    assert not any(axis.get_title() for axis in axes[1])
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["truth: cat", "truth: dog"]
    assert [axis.get_xlabel() for axis in axes[:, 0]] == ["all right",
                                                          "DynamicViT says cat\nLookupViT says frog"]
    assert [axis.xaxis.label.get_color() for axis in axes[:, 0]] == [plot.TRUTH, plot.WRONG]
    assert not any(axis.get_xlabel() or axis.get_ylabel() for axis in axes[:, 1:].flat)
    for b in range(2):
        picture, (kept, weights) = images[b].transpose(1, 2, 0), (values[b] for _, values in panels)
        expected = [picture, plot.hide(picture, np.flatnonzero(kept), 2), plot.heat(picture, weights, 2)]
        for axis, panel in zip(axes[b], expected):
            assert np.array_equal(axis.images[0].get_array(), panel)


@pytest.mark.parametrize("of, titles", [
    (slice(1), ["picture", "keeps 3 of 4"]), (slice(1, 2), ["picture", "gathers"]), (slice(0), ["picture"])])
def test_tokens_of_one_model(of, titles, tmp_path, figures):
    images, panels = example(1)
    plot.tokens(tmp_path / "t.png", images, ["cat"], {}, panels[of], 2)
    assert [axis.get_title() for axis in figures[0].axes] == titles and figures[0].axes[0].get_xlabel() == ""


@pytest.mark.parametrize("truth, said, expected, colour", [
    (["cat"], "cat", ("truth: cat", "ViT right"), plot.TRUTH),
    (None, "cat", ("", "ViT says cat"), plot.TRUTH),
    (["$dog_1$"], "cat", ("truth: $dog_1$", "ViT says cat"), plot.WRONG)])
def test_an_answer_does_not_look_like_the_truth(truth, said, expected, colour, tmp_path, figures):
    images, panels = example(1)
    plot.tokens(tmp_path / "t.png", images, truth, {"ViT": [said]}, panels, 2)
    axis = figures[0].axes[0]
    assert (axis.get_ylabel(), axis.get_xlabel()) == expected
    assert axis.xaxis.label.get_color() == colour
    assert not axis.xaxis.label.get_parse_math() and not (truth and axis.yaxis.label.get_parse_math())


def test_what_matplotlib_warns_of_is_one_line(tmp_path, capsys, recwarn):
    """A class in letters that its font lacks."""
    images, panels = example(1)
    plot.tokens(tmp_path / "t.png", images, ["\u732b"], {}, panels, 2)
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 't.png'}: matplotlib warns") and "missing from font" in err
    assert err.count("\n") == 1 and not recwarn.list
    plot.tokens(tmp_path / "t.png", images, ["cat"], {}, panels, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["t.png", "t.svg"])
def test_names_that_are_no_text_are_written_as_python_writes_them(name, tmp_path, figures):
    images, panels = example(1)
    plot.tokens(tmp_path / name, images, ["caf\udce9"], {"ViT": ["two\nlines"]}, panels, 2)
    axis = figures[0].axes[0]
    assert (axis.get_ylabel(), axis.get_xlabel()) == (r"truth: caf\udce9", r"ViT says two\nlines")


@pytest.mark.parametrize("name, begin", [
    ("t.png", b"\x89PNG"), ("t.JPG", b"\xff\xd8"), ("t", b"\x89PNG"), ("t.jpg", b"\xff\xd8"),
    ("t.jpeg", b"\xff\xd8"), ("t.pdf", b"%PDF"), ("t.svg", b"<?xml")])
def test_a_picture_has_the_format_that_its_name_says(name, begin, tmp_path):
    images, panels = example(1)
    plot.tokens(tmp_path / name, images, None, {}, panels, 2)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_failing_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch, figures):
    path = tmp_path / "t.png"
    path.write_bytes(b"old")

    def savefig(self, file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(type(plot._figure().Figure()), "savefig", savefig)
    images, panels = example()
    with refuses(f"cannot write {path}: No space left on device"):
        plot.tokens(path, images, ["a", "b"], {}, panels, 2)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["t.png"]
