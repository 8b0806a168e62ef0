"""predict: the classes of a picture by a checkpoint, the picture of what it used, and what is refused in one
line."""
import json
import os
import pathlib
import re
import sys
import zlib

import numpy as np
import pytest

import make_samples
from tiny import KINDS, MEAN, STD, everything, recipes_model, refused, saved
from tinytoken import plot, predict
from tinytoken.__main__ import main
from tinytoken.data import likeness, scenes
from tinytoken.errors import install
from tinytoken.train import checkpoint

Image = pytest.importorskip("PIL.Image", reason="predict reads pictures with pillow")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def picture(path, size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype("uint8")
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("kind", KINDS)
def test_predict_prints_all_classes_and_writes_the_picture(kind, capsys, tmp_path):
    model = saved("model.npz", kind)
    pixels = picture("cat.png", (32, 32))
    assert main(["predict", "model.npz", "cat.png"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\w+) +(\d+\.\d) %", line).groups() for line in lines]
    shares = [float(share) for _, share in found]
    assert sorted(name for name, _ in found) == sorted(scenes.NAMES)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    logits = model.eval()(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)[None]).logits
    logits = logits.data[0].astype("float64")
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert dict(found) == {name: f"{100 * share:.1f}" for name, share in zip(scenes.NAMES, expected)}
    if kind == "vit":
        assert last == "a ViT keeps every token: no picture written"
        assert everything(tmp_path) == ["cat.png", "model.npz"]
    else:
        assert last == "picture: cat.tokens.png"
        with Image.open("cat.tokens.png") as written:
            columns = 2 if kind == "dynamicvit" else 3
            assert written.format == "PNG" and written.size == (round(1.9 * 110 * columns), round(2.15 * 110))


def test_predict_takes_the_central_square_of_any_picture(tmp_path):
    pixels = picture("wide.png", (64, 32))
    assert np.array_equal(predict.read_picture("wide.png", (32, 32)),
                          pixels[:, 16:48].transpose(2, 0, 1)[None])
    Image.new("RGBA", (10, 50), (255, 0, 0, 128)).save("tall.png")
    image = predict.read_picture("tall.png", (32, 32))
    assert image.shape == (1, 3, 32, 32) and image.dtype == "uint8" and (image[0, 0] == 255).all()


def test_predict_writes_where_it_is_told(capsys, tmp_path):
    saved("model.npz", "lookupvit")
    picture("cat.png")
    assert main("predict model.npz cat.png --out there/it.png".split()) == 0
    assert capsys.readouterr().out.endswith("picture: there/it.png\n")
    assert (tmp_path / "there" / "it.png").stat().st_size > 1000


PLACES = {
    "the checkpoint": ("model.npz", "expected a name that ends in .png or .jpg or .jpeg or .pdf or .svg"),
    "no ending": ("answer", "expected a name that ends in .png or .jpg or .jpeg or .pdf or .svg"),
    "the picture": ("cat.png", "it is cat.png, which is read: give another name"),
    "the picture, by a link": ("link.png", "it is cat.png, which is read: give another name"),
    "a folder": ("folder.png", "it is a folder, expected the name of a file"),
    "a pipe": ("pipe.png", "it is a pipe, expected the name of a file"),
    "a device": ("null.png", "it is a device, expected the name of a file"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("place, reason", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["vit", "lookupvit"])
def test_predict_refuses_to_write_over_what_is_no_result(place, reason, kind, capsys, tmp_path):
    """Before any work, also where nothing would be written."""
    saved("model.npz", kind)
    picture("cat.png")
    pathlib.Path("folder.png").mkdir()
    pathlib.Path("link.png").symlink_to("cat.png")
    pathlib.Path("null.png").symlink_to(os.devnull)  # a link, so that nothing is lost if this fails
    os.mkfifo("pipe.png")
    before = {path: (os.lstat(path), path.is_file() and path.read_bytes()) for path in tmp_path.iterdir()}
    line = refused(capsys, "predict", "model.npz", "cat.png", "--out", place)
    assert line == f"cannot write {place}: {reason}"
    after = {path: (os.lstat(path), path.is_file() and path.read_bytes()) for path in tmp_path.iterdir()}
    for path, (stat, content) in before.items():
        assert after[path][1] == content and after[path][0].st_mtime_ns == stat.st_mtime_ns
    assert after.keys() == before.keys()


def test_a_checkpoint_with_a_pictures_name_is_not_overwritten(capsys):
    saved("model.npz", "dynamicvit")
    os.rename("model.npz", "model.png")
    picture("cat.png")
    assert refused(capsys, "predict", "model.png", "cat.png", "--out", "model.png") == (
        "cannot write model.png: it is model.png, which is read: give another name")


def test_predict_writes_over_its_own_result(capsys):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    for _ in range(2):
        assert main(["predict", "model.npz", "cat.png"]) == 0


def test_predict_says_that_the_label_is_an_answer(monkeypatch):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    drawn = []
    monkeypatch.setattr(plot, "tokens", lambda *arguments: drawn.append(arguments))
    text = predict.classify("model.npz", "cat.png", "out.png")
    [(path, _, labels, predictions, _, patch)] = drawn
    assert (path, labels, patch) == ("out.png", None, 8)
    assert predictions == {"DynamicViT": [text.split()[0]]}


# A picture of another kind

def plain(path):
    """A black triangle on white."""
    Image.fromarray(np.where(np.tri(64, dtype=bool), 0, 255).astype("uint8")).save(path)


def test_predict_warns_of_a_picture_unlike_the_training_ones(capsys):
    known = likeness.bounds(scenes.make_scenes(600).images)
    saved("model.npz", bounds=known, data="scenes")
    plain("plain.png")
    assert main(["predict", "model.npz", "plain.png"]) == 0
    out, err = capsys.readouterr()
    low, high = known["mean of red"]
    assert re.fullmatch(
        rf"warning: plain.png is unlike the pictures of the training \(scenes\): mean of red 0.49, there "
        rf"{low:.2f} to {high:.2f}, mean of green .* and 5 more. The classes below may mean nothing.\n", err)
    assert len(out.splitlines()) == len(scenes.NAMES) + 1
    for sample in predict.SAMPLES.glob("*.png"):
        assert main(["predict", "model.npz", str(sample)]) == 0
        assert capsys.readouterr().err == ""


def test_a_checkpoint_from_before_the_bounds_warns_of_nothing(capsys):
    saved("model.npz")
    plain("plain.png")
    assert main(["predict", "model.npz", "plain.png"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bounds, text", [
    ([1], "likeness: [1], expected {measure: [low, high]}"),
    ({"mean of red": 3}, "likeness: bounds 3 of the mean of red, expected two numbers"),
    ({"mean of red": ["a", "b"]}, "likeness: bounds ['a', 'b'] of the mean of red, expected two numbers")])
def test_bounds_of_another_form_are_refused(bounds, text, capsys):
    saved("model.npz", bounds=bounds)
    plain("plain.png")
    assert refused(capsys, "predict", "model.npz", "plain.png") == text


# The samples that come with the package

def test_the_samples_are_those_of_their_script():
    made = make_samples.samples()
    assert sorted(f"{name}.png" for name in made) == everything(predict.SAMPLES)
    for name, picture in made.items():
        file = predict.SAMPLES / f"{name}.png"
        with Image.open(file) as image:
            assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - picture).max() <= 1
        assert name in scenes.NAMES and file.stat().st_size < 4000


def test_what_a_sample_shows_is_written_where_the_command_runs(capsys, tmp_path):
    """Not beside it: it lies in the package."""
    saved("model.npz", "dynamicvit")
    before = everything(predict.SAMPLES)
    assert main(["predict", "model.npz", str(predict.SAMPLES / "star.png")]) == 0
    assert capsys.readouterr().out.endswith("picture: star.tokens.png\n")
    assert everything(predict.SAMPLES) == before and everything(tmp_path) == ["model.npz", "star.tokens.png"]


def test_the_help_says_what_predict_expects(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in scenes.NAMES) and str(predict.SAMPLES) in text
    assert "dark" in text and "clutter" in text


def test_predict_without_matplotlib_or_pillow(capsys, tmp_path, monkeypatch):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["predict", "model.npz", "cat.png"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(" %\nno picture written: matplotlib is not installed "
                        f"({install('matplotlib')})\n")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(capsys, "predict", "model.npz", "cat.png") == (
        "predict reads pictures with pillow, which is not installed: " + install("pillow"))
    assert everything(tmp_path) == ["cat.png", "model.npz"]


def bomb(path):
    """A PNG that claims to be 100,000 x 100,000 pixels."""
    picture("small.png")
    data = bytearray(pathlib.Path("small.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def half(path):
    picture(path)
    path.write_bytes(path.read_bytes()[:1500])


PICTURES = {
    "text": (lambda path: path.write_text("a text"), "cannot identify image file .*"),
    "folder": (lambda path: path.mkdir(), ".*Is a directory.*"),
    "half": (half, ".*"),
    "huge": (bomb, "Image size .* exceeds limit.*"),
}


@pytest.mark.parametrize("make, reason", PICTURES.values(), ids=PICTURES)
def test_predict_refuses_what_is_no_picture(make, reason, capsys, tmp_path):
    saved("model.npz", "dynamicvit")
    make(tmp_path / "x.png")
    before = everything(tmp_path)
    line = refused(capsys, "predict", "model.npz", tmp_path / "x.png")
    assert re.fullmatch(rf"predict: {tmp_path}/x.png is not a picture that pillow can read \({reason}\)",
                        line)
    assert everything(tmp_path) == before


def test_predict_says_that_a_picture_is_not_there(capsys):
    saved("model.npz", "dynamicvit")
    os.symlink("nowhere", "link.png")
    for name in ("none.png", "link.png", "none/x.png"):
        assert refused(capsys, "predict", "model.npz", name) == f"predict: {name} does not exist"


def test_predict_refuses_a_picture_without_a_name(capsys):
    saved("model.npz")
    assert "is not a picture that pillow can read" in refused(capsys, "predict", "model.npz", ".")


def test_predict_refuses_checkpoints(capsys, tmp_path):
    picture("cat.png")
    np.savez("arrays.npz", a=np.ones(3))
    checkpoint.save("bare.npz", recipes_model("vit"))
    for path, text in (("none.npz", "checkpoint: none.npz does not exist"),
                       ("cat.png",
                        "checkpoint: cat.png is not a whole .npz file: truncated, or not a checkpoint"),
                       ("arrays.npz",
                        "checkpoint: arrays.npz is not a 'tinytoken checkpoint 1' (its header says None)"),
                       ("bare.npz", "predict: bare.npz does not say its classes and pixel statistics: train "
                                    "it with `compare`")):
        assert refused(capsys, "predict", path, "cat.png") == text
    assert everything(tmp_path) == ["arrays.npz", "bare.npz", "cat.png"]


FEW = list(scenes.NAMES[:9])
ODD = {"too few classes": (dict(classes=FEW), r"the classes \[.*\], expected 10 names"),
       "too many": (dict(classes=[*scenes.NAMES, "one more"]), r"the classes \[.*\], expected 10 names"),
       "numbers": (dict(classes=[*FEW, 5]), r"the classes \[.*\], expected 10 names"),
       "a text": (dict(classes="ten chars!"), "the classes 'ten chars!', expected 10 names"),
       "no mean": (dict(mean=None), "the mean None, expected 3 numbers"),
       "a short mean": (dict(mean=[0.5]), r"the mean \[0.5\], expected 3 numbers"),
       "a mean that is not finite": (dict(mean=[0.5, 0.5, float("nan")]),
                                     r"the mean \[0.5, 0.5, nan\], expected 3 numbers"),
       "a long name": (dict(classes=[*FEW, "x" * 256]), r"the classes \[.*\], expected 10 names"),
       "a mean of texts": (dict(mean=["0.5"] * 3), r"the mean \['0.5', '0.5', '0.5'\], expected 3 numbers"),
       "a zero": (dict(std=[0.5, 0.5, 0]), r"the std \[0.5, 0.5, 0\], expected 3 positive numbers")}


@pytest.mark.parametrize("header, text", ODD.values(), ids=ODD)
def test_predict_refuses_a_header_that_does_not_fit_its_model(header, text, capsys):
    saved("model.npz", **header)
    picture("cat.png")
    assert re.fullmatch(f"predict: model.npz has {text}", refused(capsys, "predict", "model.npz", "cat.png"))


@pytest.mark.parametrize("header", [dict(std=[0.5, 1e-300, 0.5]), dict(mean=[0.5, 0.5, 1e300])])
def test_predict_refuses_answers_that_are_no_numbers(header, capsys):
    saved("model.npz", **header)
    picture("cat.png")
    assert main(["predict", "model.npz", "cat.png"]) == 2
    *warned, last = capsys.readouterr().err.splitlines()
    assert last == ("error: predict: model.npz makes numbers of cat.png that are not finite: damaged, or its "
                    "mean and std are no use")
    assert all(re.match("model.npz: NumPy warns", line) for line in warned)


def test_predict_refuses_a_model_of_pixels(capsys):
    checkpoint.save("m.npz", recipes_model("segmenter", num_classes=10), classes=list(scenes.NAMES), mean=MEAN,
                    std=STD)
    assert refused(capsys, "predict", "m.npz", predict.SAMPLES / "star.png") == (
        "predict: m.npz holds a Segmenter, which answers for pixels: a classifier is expected")


def test_names_of_others_stay_on_their_line(capsys):
    """A name is printed, and may hold what a terminal would obey."""
    saved("model.npz", classes=[*FEW, "cut\x1b[2J\nhere ü"], bounds={"mean of red": [0.0, 0.001]})
    picture("a\nb\x1b.png")
    assert main(["predict", "model.npz", "a\nb\x1b.png"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: a\\nb\\x1b.png is unlike the pictures") and err.count("\n") == 1
    assert len(out.splitlines()) == 11 and "\ncut\\x1b[2J\\nhere ü " in "\n" + out and "\x1b" not in out
    assert main(["predict", "model.npz", "no\x1b.png"]) == 2
    assert "no\\x1b.png" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_half_precision_is_said_on_one_line(capsys):
    saved("model.npz")
    header, groups = checkpoint.load("model.npz")
    half = {f"model/{name}": array.astype("float16") for name, array in groups["model"].items()}
    with open("model.npz", "wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **half)
    picture("cat.png")
    assert main(["predict", "model.npz", "cat.png"]) == 0
    assert re.fullmatch(r"model.npz: tinytoken warns: load_state_dict: \d+ arrays of dtype float16 become "
                        r"float32\n", capsys.readouterr().err)


def test_predict_refuses_a_place_that_cannot_be_written(capsys, tmp_path):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    assert re.fullmatch("cannot write cat.png/tokens.png: (File exists|Not a directory)",
                        refused(capsys, "predict", "model.npz", "cat.png", "--out", "cat.png/tokens.png"))
    assert everything(tmp_path) == ["cat.png", "model.npz"]
