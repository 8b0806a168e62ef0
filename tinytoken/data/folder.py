"""A folder of images by class, the way most collections of photographs are kept.

    DIR/train/CLASS/*.png and DIR/test/CLASS/*.png (or DIR/val/CLASS/*.png, where there is no test)
    DIR/CLASS/*.png, of which the seed sends one in five of each class, at least one, to the test part

The classes have the names of their folders, in sorted order. Files are recognised as pictures by the endings
of their names. Files that are hidden, have another ending or lie deeper are left out, and so are pictures
that cannot be read; one line on stderr counts them. A class of which nothing is left is an error.
"""
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import random
from ..errors import InputError, expect, install, one_line_of_warnings, printable, some_of
from ..files import kind_of
from ..threads import share_out
from .cifar import Pictures
from .sets import dataset

WRITTEN = ".tokens.png"  # the ending of what `predict` writes beside a picture
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SITE = "tinytoken.data.folder."
TEST_SHARE = 5  # one in so many, where the folder has no test part of its own
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value
TO_8_BITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # what makes 8 bits of a PNG's 2, 4 and 16
BACKGROUND = "white"  # what shows where a picture is transparent
CHUNK = 32  # pictures that a thread reads before it takes the next ones: Ctrl-C waits for no more than these
EXPECTED = "expected DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png"


# One picture

def read_image(path: str | os.PathLike, size: tuple[int, int], where: str = "imagefolder") -> np.ndarray:
    """The picture at `path` -> (3, H, W) uint8. size: (H, W); where: who asks, for messages.

    It is turned upright (EXIF), grey of 16 bits (of a TIFF: of as many as its tags say) is scaled to 8, and
    transparent parts become white. Then the largest central part of the shape H : W is cut out (for a square
    model, the central square), and scaled with bilinear weights, which average where it shrinks. Of an
    animation, this is the first picture. InputError for what pillow cannot read, for grey of which nobody can
    know the value of white (32 bits, floats), and for pipes and devices."""
    Image, ImageOps = _pillow(where)
    kind = kind_of(path)
    expect(kind in ("a file", "a folder", "nothing"), where, f"{path} is {kind}, expected a file")
    try:
        with Image.open(path) as image:
            ends = _black_and_white(image) if image.mode[0] in "IF" else None
            _transparent_in_8_bits(image)
            image = _rgb(ImageOps.exif_transpose(image), ends, Image)
            return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: {path} does not exist") from error
    except Exception as error:  # of a damaged file: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{where}: {path} is not a picture that pillow can read ({error})") from error


def _pillow(where):
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(f"{where} reads pictures with pillow, which is not installed: "
                         f"{install('pillow')}") from None
    return Image, ImageOps


def _transparent_in_8_bits(image):
    """A PNG names a grey or a colour that is transparent in bits of its own; pillow compares it with 8."""
    factor = TO_8_BITS.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    if factor and "transparency" in image.info:
        value = image.info["transparency"]
        image.info["transparency"] = (int(value * factor) if isinstance(value, int)
                                      else tuple(int(v * factor) for v in value))


def _rgb(image, ends, Image):
    """A picture of pillow's modes as RGB. ends: black and white of grey of more than 8 bits, else None."""
    if ends:  # pillow itself would cut these off at 255
        image = Image.fromarray(_eight_bits(np.asarray(image), *ends, image.info.get("transparency")))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _black_and_white(image):
    """The values that are black and white in grey of more than 8 bits: 0 and 65535, or as a TIFF's tags say.

    ValueError for floats and wider integers. Of a PNG or a PGM pillow may hold the 16 bits in wider ones."""
    wide = image.mode == "I" and image.format in ("PNG", "PPM")
    if not wide and not image.mode.startswith("I;16"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
        raise ValueError(f"grey in {kind}: which value is white? expected 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    ends = 0, 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    return ends[::-1] if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else ends


def _eight_bits(grey, black, white, transparent):
    """Grey (H, W) integers as 8 bits. transparent: the value that means so, or None."""
    scaled = np.rint((grey.astype("float64") - black) * (255 / (white - black))).clip(0, 255).astype("uint8")
    return scaled if transparent is None else np.where(grey == transparent, np.uint8(255), scaled)


# What a folder holds

class Folder:
    """What is in a folder, sorted by name: folders, pictures and others, all paths. hidden: how many more."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            entries = sorted(path.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{path}: the folder cannot be read ({error.strerror or error})") from error
        self.folders: list[pathlib.Path] = []
        self.pictures: list[pathlib.Path] = []
        self.others: list[pathlib.Path] = []
        self.hidden = 0
        for entry in entries:
            if entry.name.startswith("."):
                self.hidden += 1
            elif entry.is_dir():
                self.folders.append(entry)
            else:
                (self.pictures if _is_picture(entry) else self.others).append(entry)


def _is_picture(path):
    """Whether a file is to be read. A link to nowhere is read, so that it counts as broken; a pipe is not: to
    read it would hang."""
    named = path.suffix.lower() in ENDINGS and not path.name.endswith(WRITTEN)
    return named and (path.is_file() or not path.exists())


def _by_class(path):
    """Whether the folder has folders of pictures in it."""
    return path.is_dir() and any(Folder(folder).pictures for folder in Folder(path).folders)


def _recognised(path):
    """Whether the path is a folder of pictures: by class; or loose, so that load_images can say what is
    wrong."""
    if not path.is_dir():
        return False
    here = Folder(path)
    return bool(here.pictures) or _by_class(path) or any(_by_class(folder) for folder in here.folders)


def _classes(path, left_out):
    """{class: its pictures}, both in sorted order."""
    here, above = Folder(path), (path.resolve(), *path.resolve().parents)
    left_out.add(here, here.pictures)
    expect(here.folders, path, f"no folders for the classes in it; {EXPECTED}")
    expect(len(here.folders) > 1, path, lambda: f"one class only, {here.folders[0].name}; expected more")
    classes = {}
    for folder in here.folders:
        expect(folder.resolve() not in above, folder,
               "a link to a folder above it, expected pictures of a class")
        inside = Folder(folder)
        left_out.add(inside, inside.folders)
        expect(inside.pictures, folder, lambda: f"no pictures in it{_only(inside.folders)}; {EXPECTED}")
        classes[folder.name] = inside.pictures
    return classes


def _parts(path, left_out, seed):
    """({class: its pictures} of the training part, the same for the test part)."""
    expect(path.is_dir(), path, f"{'not a folder' if path.exists() else 'does not exist'}; {EXPECTED}")
    if not _by_class(path / "train"):
        return _split(path, _classes(path, left_out), seed)
    places = [path / "train", *(path / name for name in ("test", "val") if _by_class(path / name))][:2]
    expect(len(places) == 2, path, f"pictures by class in train/, but not in test/ or val/; with "
           f"{path / 'train'} for the folder, one in {TEST_SHARE} of each class would be the test part")
    parts = [_classes(place, left_out) for place in places]
    classes = set().union(*parts)
    lacks = [f"{place.name}/ lacks {some_of(sorted(classes - part.keys()), 9)}"
             for place, part in zip(places, parts) if classes - part.keys()]
    expect(not lacks, path, f"the parts differ in their classes: {'; '.join(lacks)}")
    return parts


def _split(path, classes, seed):
    """{class: pictures} -> the same for the training part, and for the test part.

    The draw of a class depends on its name and on how many pictures it has, on nothing else."""
    train, test = {}, {}
    for name, files in classes.items():
        expect(len(files) > 1, path / name, "one picture only; expected at least one for each part")
        order = random.permutation(len(files), site=f"{SITE}test.{name}", step=0, seed=seed)
        share = max(1, len(files) // TEST_SHARE)
        test[name], train[name] = ([files[k] for k in chosen] for chosen in (order[:share], order[share:]))
    return train, test


# Many pictures

class LeftOut:
    """What is left out of the folder `path`, to be told in one line. broken: [(file, why it is broken)]."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.hidden = path, 0
        self.others: list[pathlib.Path] = []
        self.broken: list[tuple[pathlib.Path, str]] = []

    def add(self, folder: Folder, misplaced: list[pathlib.Path]) -> None:
        """Leave out what `folder` has that is no picture of a class; misplaced: further files and folders."""
        self.hidden += folder.hidden
        self.others += folder.others + misplaced

    def names(self, paths: Iterable[pathlib.Path]) -> str:
        """The first of the paths, as seen from the folder."""
        return some_of([path.relative_to(self.path) for path in paths], 3)

    def say(self, pictures: int) -> None:
        """Print the line. pictures: how many there were, with the broken ones."""
        texts = []
        if self.broken:
            files, reasons = zip(*self.broken)
            texts.append(f"{len(files):,} of {pictures:,} pictures, which cannot be read "
                         f"({self.names(files)}; of the first: {reasons[0]})")
        if self.others:
            texts.append(f"{len(self.others):,} that are no pictures of a class ({self.names(self.others)})")
        if self.hidden:
            texts.append(f"{self.hidden:,} hidden")
        if texts:
            print(printable(" ".join(f"{self.path}: left out: {', '.join(texts)}".split())), file=sys.stderr)


def _only(folders):
    return f", only folders ({some_of([folder.name for folder in folders], 3)})" if folders else ""


def load_images(path: str | os.PathLike, size: tuple[int, int] = (32, 32),
                seed: int = 0) -> tuple[Pictures, Pictures]:
    """Read a folder of images by class (see the top of this file) -> (train, test).

    size: the pictures' (H, W). seed: of the split, where there is one. The order is mixed, the same for every
    seed. Raises InputError, naming the folder, for another layout, parts that differ in their classes, fewer
    than two classes, or a class of which no picture can be read."""
    path = pathlib.Path(path)
    left_out = LeftOut(path)
    parts = _parts(path, left_out, seed)
    _pillow("imagefolder")  # refuses here, not once for each picture
    with one_line_of_warnings(path, "pillow"):
        train, test = (_read(classes, size, left_out) for classes in parts)
    left_out.say(sum(len(files) for classes in parts for files in classes.values()))
    for part, classes, pictures in zip(("training", "test"), parts, (train, test)):
        counts = np.bincount(pictures.labels, minlength=len(classes))
        for files, count in zip(classes.values(), counts):
            expect(count, str(files[0].parent),
                   lambda: f"of its {len(files)} pictures for the {part} part none can be read "
                           f"({dict(left_out.broken)[files[0]]})")
    return train, test


def _read(classes, size, left_out):
    """{class: files} -> Pictures, in a mixed order, so that a part of them has all classes."""
    files = [file for those in classes.values() for file in those]
    labels = np.repeat(np.arange(len(classes), dtype="int64"), [len(those) for those in classes.values()])
    order = random.permutation(len(files), site=SITE + "order", step=0, seed=0)
    images, reasons = np.empty((len(files), 3, *size), "uint8"), {}  # reasons: why a picture is broken
    bar = tqdm(total=len(files), desc="reading pictures", unit="picture", delay=2, leave=False)

    def read(start):
        for k in range(start, min(start + CHUNK, len(files))):
            try:
                images[k] = read_image(files[order[k]], size)
            except InputError as error:
                reasons[k] = str(error.__cause__)
            bar.update()
    with bar:
        share_out(read, range(0, len(files), CHUNK))  # pillow decodes without holding the GIL
    left_out.broken += sorted((files[order[k]], reason) for k, reason in reasons.items())
    labels = labels[order]
    if reasons:
        images, labels = (np.delete(array, list(reasons), axis=0) for array in (images, labels))
    return Pictures(images, labels, tuple(classes))


@dataset("imagefolder", recognises=_recognised,
         layout="images by class: CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png")
def imagefolder(place: Any, *, seed: int, size: int, **_: Any) -> tuple[Pictures, Pictures]:
    """A folder of images by class."""
    expect(place is not None, "imagefolder", f"a sort of folder, not one: say which, --data DIR; {EXPECTED}")
    return load_images(place, (size, size), seed)
