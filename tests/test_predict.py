"""predict: the classes of a picture by a checkpoint, the picture of what it used, and what is refused in one
line."""
import pathlib
import re
import sys
import zlib

import numpy as np
import pytest

from tiny import KINDS, MEAN, STD, everything, recipes_model, refused, saved
from tinytoken import predict
from tinytoken.__main__ import main
from tinytoken.data import scenes
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


def test_predict_without_matplotlib_or_pillow(capsys, tmp_path, monkeypatch):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["predict", "model.npz", "cat.png"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(" %\nno picture written: matplotlib is not installed (pip install "
                        "'tinytoken-vit[plot]')\n")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(capsys, "predict", "model.npz", "cat.png") == (
        "predict reads pictures with pillow, which is not installed: pip install 'tinytoken-vit[plot]'")
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
    "missing": (lambda path: None, ".*No such file or directory.*"),
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


def test_predict_refuses_a_place_that_cannot_be_written(capsys, tmp_path):
    saved("model.npz", "dynamicvit")
    picture("cat.png")
    assert re.fullmatch("cannot write cat.png/tokens.png: (File exists|Not a directory)",
                        refused(capsys, "predict", "model.npz", "cat.png", "--out", "cat.png/tokens.png"))
    assert everything(tmp_path) == ["cat.png", "model.npz"]
