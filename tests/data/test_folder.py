"""A folder of images by class: which pictures are read, how, what is left out and what is refused; and the
main job on any number of classes."""
import dataclasses
import os
import pathlib
import re
import struct
import sys
import zlib

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import SmallRecipe
from tinytoken import experiments, predict
from tinytoken.__main__ import main
from tinytoken.data import cifar, dataset, folder, load_pictures
from tinytoken.data.folder import load_images, read_image
from tinytoken.errors import install, some_of
from tinytoken.experiments import compare

Image = pytest.importorskip("PIL.Image", reason="pictures are read with pillow")
CLASSES = ("ant", "bee", "cat")
LAYOUTS = folder.PICTURES.expected


def write(path, *colour, size=(40, 30)):
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_classes(path, count=10, classes=CLASSES, ending="png"):
    """Pictures of odd sizes whose colour tells them: red the class's place in CLASSES, green the number."""
    for name in classes:
        for i in range(count):
            colour = 10 * CLASSES.index(name), i, 200
            write(path / name / f"{i}.{ending}", *colour, size=(20 + 7 * i, 50 - 2 * i))
    return path


def content(pictures):
    """{(class, number)} of such pictures, read off their colours. The labels must agree."""
    red, green, blue = pictures.images[:, :, 5, 7].T
    assert (pictures.images == pictures.images[:, :, :1, :1]).all() and (blue == 200).all()
    assert (red == [10 * CLASSES.index(pictures.names[k]) for k in pictures.labels]).all()
    found = {(pictures.names[k], int(i)) for k, i in zip(pictures.labels, green)}
    assert len(found) == len(pictures)
    return found


def every(count, classes=CLASSES):
    return {(name, i) for name in classes for i in range(count)}


# The layouts

@pytest.mark.parametrize("part", ["test", "val"])
def test_a_training_and_a_test_folder(tmp_path, part):
    write_classes(tmp_path / "train", 9)
    write_classes(tmp_path / part, 4, ending="BMP")
    train, test = load_pictures(tmp_path, size=24)
    for pictures, count in ((train, 9), (test, 4)):
        assert pictures.images.shape == (3 * count, 3, 24, 24) and pictures.images.dtype == "uint8"
        assert pictures.labels.shape == (3 * count,) and pictures.labels.dtype == "int64"
        assert pictures.names == CLASSES and pictures.moves == cifar.Pictures.moves
        assert content(pictures) == every(count)


def test_val_is_not_read_beside_test(tmp_path):
    write_classes(tmp_path / "train", 2)
    write_classes(tmp_path / "test", 3)
    write_classes(tmp_path / "val", 4)
    assert content(load_images(tmp_path)[1]) == every(3)
    for file in (tmp_path / "test").rglob("*.png"):  # without labels, as test pictures often are
        file.rename(tmp_path / "test" / f"{file.parent.name}{file.name}")
    assert content(load_images(tmp_path)[1]) == every(4)


def test_one_in_five_of_each_class_is_the_test_part(tmp_path):
    write_classes(tmp_path, 14)
    train, test = load_images(tmp_path)
    assert content(train) | content(test) == every(14) and not content(train) & content(test)
    assert [np.bincount(pictures.labels).tolist() for pictures in (train, test)] == [[12] * 3, [2] * 3]


def test_a_class_of_two_has_one_in_each_part(tmp_path):
    train, test = load_images(write_classes(tmp_path, 2))
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist() == [1, 1, 1]


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path / "train" / "a.png", 1), write(tmp_path / "train" / "b.png", 1)
    write(tmp_path / "plane" / "a.png", 2), write(tmp_path / "plane" / "b.png", 2)
    assert load_pictures(tmp_path)[0].names == ("plane", "train")


def test_the_split_is_the_seeds_alone(tmp_path, monkeypatch):
    write_classes(tmp_path, 20)
    splits = [content(load_images(tmp_path, seed=seed)[1]) for seed in range(4)]
    assert len(set(map(frozenset, splits))) == 4
    for split in splits:
        assert len({frozenset(i for other, i in split if other == name) for name in CLASSES}) == 3
    train, test = load_images(tmp_path)
    listed = pathlib.Path.iterdir
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))
    for now, before in zip(load_images(tmp_path), (train, test)):
        assert (now.images == before.images).all() and (now.labels == before.labels).all()
    for file in (tmp_path / "ant").iterdir():
        file.unlink()
    (tmp_path / "ant").rmdir()
    assert content(load_images(tmp_path)[1]) == {(name, i) for name, i in splits[0] if name != "ant"}


def test_the_order_mixes_the_classes(tmp_path):
    for labels in (pictures.labels for pictures in load_images(write_classes(tmp_path, 20))):
        assert (np.diff(labels) != 0).sum() > len(labels) / 3


def test_pictures_need_not_be_square(tmp_path):
    train, test = load_images(write_classes(tmp_path), (16, 24))
    assert train.images.shape == (24, 3, 16, 24) and test.images.shape == (6, 3, 16, 24)


def test_a_folder_is_recognised_by_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # not for this
    makes = {"parts": ["train/a/x.png", "test/a/x.png"], "split": ["a/x.JPEG"], "loose": ["x.webp"],
             "texts": ["a/x.txt", "train/a/notes.md"], "deep": ["a/b/c/x.png"], "empty": ["a/b/c"],
             "hidden": ["a/.x.png", ".a/x.png"], "cifar": ["data_batch_1.bin", "readme.html"], "file.png": []}
    for name, files in makes.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    (tmp_path / "file.png").touch()
    assert {name for name in makes if folder._recognised(tmp_path / name)} == {"parts", "split", "loose"}
    for name in ("texts", "empty", "file.png"):
        with pytest.raises(tt.InputError, match=f"^data: {tmp_path / name} holds no data set that is known"):
            load_pictures(tmp_path / name)


def small_cifar100(path, monkeypatch, records=40):
    """Files in CIFAR-100's layout with few pictures, and the reader told so."""
    layout = cifar.LAYOUTS["cifar100"]
    monkeypatch.setitem(cifar.LAYOUTS, "cifar100", dataclasses.replace(layout, train={"train.bin": records},
                                                                       test={"test.bin": records}))
    table = np.random.default_rng(0).integers(0, 256, (2, records, 2 + cifar.PIXELS), dtype="uint8")
    table[:, :, :2] %= 100
    for rows, name in zip(table, ("train.bin", "test.bin")):
        (path / name).write_bytes(rows.tobytes())
    return path, table[0, :, 1]


def test_cifar_is_asked_first(tmp_path, monkeypatch):
    """Its folder stays CIFAR's, also with pictures in it."""
    readers = [load for _, load in dataset.readers]
    assert readers.index(dataset["cifar10"]) < readers.index(dataset["imagefolder"])
    write_classes(tmp_path)
    path, labels = small_cifar100(tmp_path, monkeypatch)
    train, _ = load_pictures(path)
    assert len(train.names) == 100 and (train.labels == labels).all()


# One picture

def saved(path, array, mode=None, **more):
    """An array, or one colour of a mode, as a picture file, read back in 4 x 6."""
    picture = Image.fromarray(array) if mode is None else Image.new(mode, (6, 4), array)
    if mode == "P":
        picture.putpalette([value for k in range(16) for value in (10 * k, k, 255 - k)])
    picture.save(path, **more)
    return read_image(path, (4, 6))


GREY16 = np.full((4, 6), 32896, "uint16")  # 128 * 257; clipped it would be 255
MODES = {
    "RGB": (("x.png", (1, 2, 3), "RGB"), {}, (1, 2, 3)),
    "L": (("x.png", 77, "L"), {}, (77, 77, 77)),
    "1": (("x.png", 1, "1"), {}, (255, 255, 255)),
    "P": (("x.gif", 3, "P"), {}, (30, 3, 252)),
    "CMYK": (("x.tif", (0, 255, 255, 0), "CMYK"), {}, (255, 0, 0)),
    "16 bits": (("x.png", GREY16), {}, (128, 128, 128)),
    "16 bits, TIFF": (("x.tif", GREY16), {}, (128, 128, 128)),
    "16 bits in 32": (("x.pgm", GREY16), {}, (128, 128, 128)),
    "16 bits, white": (("x.png", GREY16 * 0 + 65535), {}, (255, 255, 255)),
    "16 bits, nearest": (("x.png", GREY16 * 0 + 129), {}, (1, 1, 1)),  # 129 / 257 = 0.502
    "16 bits, transparent": (("x.png", GREY16), {"transparency": 32896}, (255, 255, 255)),
    "RGBA": (("x.png", (200, 0, 100, 51), "RGBA"), {}, (244, 204, 224)),  # 0.2 of it and 0.8 of white
    "LA": (("x.png", (0, 51), "LA"), {}, (204, 204, 204)),
    "P, transparent": (("x.png", 3, "P"), {"transparency": 3}, (255, 255, 255)),
    "1, transparent": (("x.png", 0, "1"), {"transparency": 0}, (255, 255, 255)),
    "P, half transparent": (("x.png", 3, "P"), {"transparency": bytes([255] * 3 + [51])}, (210, 205, 254)),
    "LAB": (("x.tif", (136, 208, 195), "LAB"), {}, (250, 3, 11)),  # red, near 255 0 0
    "LAB, grey": (("x.tif", (99, 128, 128), "LAB"), {}, (91, 91, 91)),
    "YCbCr": (("x.jpg", (128, 128, 128), "RGB"), {}, (128, 128, 128)),
    "16 bits, big-endian": (("x.tif", GREY16.astype(">u2")), {}, (128, 128, 128)),
    "L, transparent": (("x.png", 77, "L"), {"transparency": 77}, (255, 255, 255)),
}


@pytest.mark.parametrize("how, more, expected", MODES.values(), ids=MODES)
def test_modes_and_transparency(tmp_path, how, more, expected):
    name, *what = how
    image = saved(tmp_path / name, *what, **more)
    assert image.shape == (3, 4, 6) and image.dtype == "uint8"
    assert (image == np.array(expected)[:, None, None]).all(), image[:, 0, 0]


def png(bits, colours, row, transparent):
    """A PNG of 4 rows of these bytes, 6 pixels each, with a tRNS chunk."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, bits, colours, 0, 0, 0))
            + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 4))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits, colours, row, transparent, seen", [
    (2, 0, b"\x55\x50", b"\0\x01", 255), (2, 0, b"\x55\x50", b"\0\x02", 85),
    (4, 0, b"\x33" * 3, b"\0\x03", 255), (4, 0, b"\x33" * 3, b"\0\x04", 51),
    (8, 0, b"\x33" * 6, b"\0\x33", 255), (8, 0, b"\x33" * 6, b"\0\x03", 51),
    (16, 2, b"\x33\x44" * 18, b"\x33\x44" * 3, 255), (16, 2, b"\x33\x44" * 18, b"\x44\x33" * 3, 51)])
def test_what_a_png_calls_transparent_is_in_its_own_bits(bits, colours, row, transparent, seen, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(bits, colours, row, transparent))
    assert (read_image(path, (4, 6)) == seen).all()


@pytest.mark.parametrize("stored_as, tag", [
    (None, 1), ("FLIP_LEFT_RIGHT", 2), ("ROTATE_180", 3), ("FLIP_TOP_BOTTOM", 4), ("TRANSPOSE", 5),
    ("ROTATE_90", 6), ("TRANSVERSE", 7), ("ROTATE_270", 8)])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_pictures_are_turned_upright(tmp_path, stored_as, tag, name):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), "uint8"))
    stored = upright if stored_as is None else upright.transpose(Image.Transpose[stored_as])
    exif = Image.Exif()
    exif[0x112] = tag
    stored.save(tmp_path / name, exif=exif)
    assert (read_image(tmp_path / name, (4, 6)) == np.asarray(upright).transpose(2, 0, 1)).all()


def test_the_central_part_is_scaled_by_averages(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), "uint8")
    wide = tmp_path / "wide.png"
    Image.fromarray(pixels).save(wide)
    assert (read_image(wide, (32, 32)) == pixels[:, 16:48].transpose(2, 0, 1)).all()
    assert (read_image(wide, (32, 16)) == pixels[:, 24:40].transpose(2, 0, 1)).all()
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR, box=(16, 0, 48, 32))
    assert (read_image(wide, (16, 16)) == np.asarray(expected).transpose(2, 0, 1)).all()
    assert (predict.read_picture(wide, (16, 12)) == read_image(wide, (16, 12))[None]).all()
    Image.fromarray(np.tile(np.uint8([[0], [200]]), (16, 32))).save(wide)  # lines of one pixel
    np.testing.assert_allclose(read_image(wide, (4, 4))[:, 1:3], 100, atol=2)


BROKEN = {
    "text": (lambda path: path.write_text("a text"), "cannot identify image file"),
    "half": (lambda path: path.write_bytes(noise(path)[:3000]), "truncated"),
    "floats": (lambda path: Image.new("F", (4, 4), 0.5).save(path, "TIFF"),
               "grey in floats: which value is white? expected 8 or 16 bits"),
    "PFM": (lambda path: Image.new("F", (4, 4), 0.5).save(path, "PPM"), "grey in floats: which"),
    "32 bits": (lambda path: Image.new("I", (4, 4), 65536).save(path, "TIFF"), "grey in integers of 32 bits"),
    "32 bits, small": (lambda path: Image.new("I", (4, 4), 200).save(path, "TIFF"), "32 bits or with a sign"),
    "negative": (lambda path: Image.new("I", (4, 4), -1).save(path, "TIFF"), "integers of 32 bits or with a"),
    "with a sign": (lambda path: tiff(path, np.full((4, 6), 99, "<i2").tobytes(), 16, sample_format=2),
                    "integers of 32 bits or with a sign"),
}


def tiff(path, data, bits, photometric=1, sample_format=1):
    """Write grey of 6 x 4 as an uncompressed TIFF: pillow itself writes not all that it reads."""
    tags = {256: 6, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: 4,
            279: len(data), 339: sample_format}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + struct.pack("<I", 0) + data)


@pytest.mark.parametrize("data, bits, photometric, expected", [
    (np.full((4, 6), 32896, "<u2"), 16, 1, 128), (np.full((4, 6), 32896, "<u2"), 16, 0, 127),
    (np.full((4, 6), 65535, "<u2"), 16, 0, 0), (np.full((4, 6), 200, "u1"), 8, 0, 55),
    (np.full((4, 3), 0x808), 12, 1, 128), (np.full((4, 3), 0xFFF), 12, 1, 255)])
def test_grey_of_a_tiff_as_its_tags_say(tmp_path, data, bits, photometric, expected):
    """Of 12 bits, two values in three bytes."""
    twelve = b"".join(int(value << 12 | value).to_bytes(3, "big") for value in data.flat if bits == 12)
    tiff(tmp_path / "x.tif", twelve or data.tobytes(), bits, photometric)
    assert (read_image(tmp_path / "x.tif", (4, 6)) == expected).all()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_a_pipe_or_a_device_is_not_read(tmp_path):
    """To read a pipe would wait for its writer."""
    os.mkfifo(tmp_path / "x.png")
    with refuses(f"here: {tmp_path / 'x.png'} is a pipe, expected a file"):
        read_image(tmp_path / "x.png", (8, 8), "here")
    with refuses(f"imagefolder: {os.devnull} is a device, expected a file"):
        read_image(os.devnull, (8, 8))


def test_what_pillow_warns_of_is_one_line(tmp_path, monkeypatch, capsys, recwarn):
    write_classes(tmp_path / "set", 4)
    write(tmp_path / "one.png", 1, 2, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)  # all have more, and less than twice as many
    text = "Image size (1200 pixels) exceeds limit of 999 pixels, could be decompression bomb DOS attack."
    assert predict.read_picture(tmp_path / "one.png", (8, 8)).shape == (1, 3, 8, 8)
    assert capsys.readouterr().err == f"{tmp_path / 'one.png'}: pillow warns: {text}\n"
    train, test = load_images(tmp_path / "set")
    assert len(train) + len(test) == 12
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 'set'}: pillow warns, 12 times: Image size ("), err
    assert err.endswith("DOS attack.\n") and err.count("\n") == 1
    assert not recwarn.list


def noise(path):
    """Write a picture that hardly compresses -> its bytes."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), "uint8")).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("make, reason", BROKEN.values(), ids=BROKEN)
def test_a_broken_picture_is_refused(tmp_path, make, reason):
    make(tmp_path / "x.png")
    text = rf"^here: {tmp_path}/x.png is not a picture that pillow can read \(.*{re.escape(reason)}"
    with pytest.raises(tt.InputError, match=text):
        read_image(tmp_path / "x.png", (8, 8), "here")


def test_decoders_may_raise_anything_but_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    def raises(error):
        def opened(path):
            raise error
        return opened
    monkeypatch.setattr(Image, "open", raises(SyntaxError("broken chunk")))
    with refuses("imagefolder: x is not a picture that pillow can read (broken chunk)"):
        read_image("x", (8, 8))
    monkeypatch.setattr(Image, "open", raises(MemoryError()))
    with pytest.raises(MemoryError):
        read_image("x", (8, 8))


def test_without_pillow(tmp_path, monkeypatch):
    write_classes(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    text = "imagefolder reads pictures with pillow, which is not installed: " + install("pillow")
    with refuses(text):
        load_pictures(tmp_path)


# What is left out

def test_what_is_left_out_is_said_once(tmp_path, capsys):
    write_classes(tmp_path / "train", 3)
    write_classes(tmp_path / "test", 3)
    assert content(load_images(tmp_path)[0]) == every(3) and capsys.readouterr() == ("", "")
    for name in ("train/.DS_Store", "test/cat/.hidden.png", "test/cat/b.txt", "test/bee/a.png.bak",
                 "train/loose.png", "test/labels.csv", "test/ant/1.tokens.png"):
        (tmp_path / name).touch()
    (tmp_path / "train" / "ant" / "deeper").mkdir()
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")  # to open it would wait for ever
    assert content(load_images(tmp_path)[0]) == every(3)
    assert capsys.readouterr() == ("", (
        f"{tmp_path}: left out: 7 that are no pictures of a class (train/loose.png, train/ant/pipe.png, "
        f"train/ant/deeper and 4 more), 2 hidden\n"))
    assert some_of(["a", "b", "c"]) == "a, b, c" and some_of(["a", "b"], 1) == "a and 1 more"


def test_broken_pictures_are_left_out_and_counted(tmp_path, capsys):
    write_classes(tmp_path, 10)
    (tmp_path / "cat" / "0.png").write_text("a text")
    (tmp_path / "bee" / "10.png").symlink_to("nowhere.png")
    (tmp_path / "bee" / "11.png").symlink_to("11.png")
    (tmp_path / "bee" / "12.png").write_bytes(noise(tmp_path / "noise.jpg")[:500])
    (tmp_path / "noise.jpg").unlink()
    train, test = load_images(tmp_path)
    assert content(train) | content(test) == every(10) - {("cat", 0)}
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(
        f"{tmp_path}: left out: 4 of 33 pictures, which cannot be read (bee/10.png, bee/11.png, bee/12.png "
        f"and 1 more; of the first: [Errno 2] No such file or directory:")


def spoil(path):
    for file in path.iterdir():
        file.write_text("no picture")


REFUSED = {
    "spoilt": (lambda path: spoil(path / "bee"),
               "{}/bee: of its 2 pictures for the training part none can be read (cannot identify image"),
    "no pictures": (lambda path: (path / "dog").mkdir(), f"{{}}/dog: no pictures in it; {LAYOUTS}"),
    "deeper pictures": (lambda path: write(path / "dog" / "red" / "a.png", 1),
                        f"{{}}/dog: no pictures in it, only folders (red); {LAYOUTS}"),
    "one picture": (lambda path: write(path / "dog" / "a.png", 1),
                    "{}/dog: one picture only; expected at least one for each part"),
    "train alone": (lambda path: write_classes(path / "train"),
                    "{0}: pictures by class in train/, but not in test/ or val/; with {0}/train for the "
                    "folder, one in 5 of each class would be the test part"),
    "other classes": (lambda path: [write_classes(path / part, 2, classes) for part, classes in (
                                    ("train", CLASSES[:2]), ("val", CLASSES[1:]))],
                      "{}: the parts differ in their classes: train/ lacks cat; val/ lacks ant"),
    "link to itself": (lambda path: (path / "dog").symlink_to(path),
                       "{}/dog: a link to a folder above it, expected pictures of a class"),
    "link above": (lambda path: (path / "dog").symlink_to(path.parent.parent),
                   "{}/dog: a link to a folder above it, expected pictures of a class"),
    "train is a link": (lambda path: (path / "train").symlink_to("."),
                        "{}: pictures by class in train/, but not in test/"),
}


@pytest.mark.parametrize("change, text", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, change, text):
    change(write_classes(tmp_path / "data", 3))
    with pytest.raises(tt.InputError, match="^" + re.escape(text.format(tmp_path / "data"))):
        load_pictures(tmp_path / "data")


def test_refused_from_the_start(tmp_path):
    with refuses(f"{tmp_path}: no folders for the classes in it; {LAYOUTS}"):
        load_images(tmp_path)
    with refuses(f"{tmp_path / 'none'}: does not exist; {LAYOUTS}"):
        load_images(tmp_path / "none")
    write(tmp_path / "a.png", 1)
    with refuses(f"{tmp_path / 'a.png'}: not a folder; {LAYOUTS}"):
        load_images(tmp_path / "a.png")
    with refuses(f"{tmp_path}: no folders for the classes in it; {LAYOUTS}"):
        load_pictures(tmp_path)  # pictures, but none by class
    (tmp_path / "circle").symlink_to("circle")  # no folder: nobody can enter it
    write_classes(tmp_path, classes=["cat"])
    with refuses(f"{tmp_path}: one class only, cat; expected more"):
        load_pictures(tmp_path)
    with refuses(f"imagefolder: a sort of folder, not one: say which, --data DIR; {LAYOUTS}"):
        load_pictures("imagefolder")


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    """By an error that is put there: root, who may run the tests, may enter all."""
    write_classes(tmp_path)
    listed = pathlib.Path.iterdir

    def iterdir(path):
        if path.name == "bee":
            raise PermissionError(13, "Permission denied")
        return listed(path)
    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    with refuses(f"{tmp_path / 'bee'}: the folder cannot be read (Permission denied)"):
        load_images(tmp_path)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names of files are text there")
def test_a_class_whose_name_is_no_text(tmp_path):
    for name in (b"ant", b"caf\xe9"):
        for i in range(5):
            write(tmp_path / os.fsdecode(name) / f"{i}.png", 1, 2, 3)
    train, test = load_images(tmp_path)
    assert train.names == ("ant", "caf\udce9") and len(train) == 8 and len(test) == 2


# The main job on any number of classes

@pytest.fixture
def small_job(monkeypatch, tmp_path):
    """The main job at the small recipe's size, in an empty folder, without its picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "Recipe", SmallRecipe)
    monkeypatch.setattr(compare, "draw", lambda *_: "no picture")


@pytest.mark.usefixtures("small_job")
def test_compare_and_predict_on_a_folder(tmp_path, capsys):
    for file in (tmp_path / "data" / name / f"{i}.jpg" for name in CLASSES for i in range(10)):
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(file)
    assert main("compare --data data --steps 4 --device cpu --threads 1".split()) == 0
    out, _ = capsys.readouterr()
    assert "6 test pictures;" in out and out.endswith("no picture\neverything is in runs/compare-data-0\n")
    assert main(["predict", "runs/compare-data-0/vit.npz", "data/cat/3.jpg"]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == list(CLASSES)


@pytest.mark.usefixtures("small_job")
def test_compare_on_cifar100(tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    small_cifar100(tmp_path / "data", monkeypatch)
    assert main("compare --data data --steps 4 --device cpu --threads 1".split()) == 0
    assert "40 test pictures;" in capsys.readouterr().out
    model, header = tt.checkpoint.load_model("runs/compare-data-0/lookupvit.npz")
    assert model.config.num_classes == 100 and header["classes"] == list(cifar.LAYOUTS["cifar100"].names)
