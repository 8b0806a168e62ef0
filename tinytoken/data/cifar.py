"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the binary archives of www.cs.toronto.edu/~kriz/cifar.html.

A binary file is a row of records and nothing else: one label byte (CIFAR-100: the coarse label, then the fine
one), then 1,024 bytes each of red, green and blue, row by row. So a file is checked by its size and its
labels; nothing is unpickled. An archive is read in memory, and only the members named here: nothing is
unpacked, so no member can be written anywhere.
"""
import gzip
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from tqdm import tqdm

from ..errors import InputError, expect, this_python
from ..files import check_target, claimed
from ..reading import opened, read_bytes
from .sets import dataset

PIXELS = 3 * 32 * 32
DEFAULT_FOLDER = "data"  # where "cifar10" and "cifar100" are looked for when TINYTOKEN_DATA is not set
NAMES = 1 << 16  # bytes of the file with the names of the classes, at most
OTHERS = 1 << 24  # bytes that an archive has beside its pictures, at most
TIMEOUT = 60  # seconds without a byte after which a download ends with an error


@dataclass(frozen=True)
class Layout:
    """What one of the two data sets consists of. train, test: {name of a file: how many records it has}."""
    title: str
    folder: str
    archive: str
    md5: str
    train: dict
    test: dict
    label_bytes: int  # in front of each picture; the last one is the label
    names_file: str
    names: tuple

    @property
    def url(self) -> str:
        """Where the archive is."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
        {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, {"test_batch.bin": 10_000}, 1,
        "batches.meta.txt",
        tuple("airplane automobile bird cat deer dog frog horse ship truck".split())),
    "cifar100": Layout(
        "CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
        {"train.bin": 50_000}, {"test.bin": 10_000}, 2, "fine_label_names.txt",
        tuple("""apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
              butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
              crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
              lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
              oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
              possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
              spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
              train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split())),
}


@dataclass(frozen=True)
class Pictures:
    """A labelled set of B photographs: images (B, 3, H, W) uint8; labels (B,) int64, indices into `names`."""
    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    moves: ClassVar[dict] = {"pad": 4, "flip": True}  # a photograph moved or mirrored stays what it is

    def __len__(self):
        return len(self.images)


def load_cifar(path: str | os.PathLike, kind: str = "cifar10") -> tuple[Pictures, Pictures]:
    """Read CIFAR from `path` -> (train, test).

    path: the folder of .bin files, the .tar.gz archive, or a folder that holds one of the two under its
    official name. kind: "cifar10" or "cifar100" (the 100 fine labels). Raises InputError, naming the file,
    where one is missing, not of the official size, or has a label out of range."""
    layout = _layout(kind)
    source = _locate(path, layout)
    expect(source is not None, "load_cifar", f"no {layout.title} in {path}; {_how_to_get(kind)}")
    files = _from_folder(source, layout) if source.is_dir() else _from_archive(source, layout)
    names = layout.names
    if layout.names_file in files:
        names = tuple(files.pop(layout.names_file).decode("utf-8", "replace").split())
        expect(len(names) == len(layout.names), str(source / layout.names_file),
               f"{len(names)} class names found, expected {len(layout.names)}")
    train, test = (_parse(files, source, split, layout, names) for split in (layout.train, layout.test))
    return train, test


def find_data(name_or_dir: str | os.PathLike | None = None) -> tuple[Path, str]:
    """Where the pictures are -> (path, kind) for `load_cifar`.

    name_or_dir: "cifar10", "cifar100", a folder or an archive; None takes the environment variable
    TINYTOKEN_DATA. A name is looked for in TINYTOKEN_DATA, or else in ./data. Raises InputError, which says
    how to get the data, where there is none."""
    setting = os.environ.get("TINYTOKEN_DATA")
    asked: Any = setting if name_or_dir is None else name_or_dir
    expect(asked, "find_data", f"no data given; {_how_to_get('cifar10')}")
    place, layouts = asked, LAYOUTS
    if asked in LAYOUTS:
        place = DEFAULT_FOLDER if setting in (None, "", *LAYOUTS) else setting
        layouts = {asked: LAYOUTS[asked]}
    sources = [(source, name) for name, layout in layouts.items() if (source := _locate(place, layout))]
    titles = [layout.title for layout in layouts.values()]
    expect(sources, "find_data", f"no {' or '.join(titles)} in {place}; {_how_to_get(next(iter(layouts)))}")
    expect(len(sources) == 1, "find_data", f"{place} holds both {' and '.join(titles)}; "
                                           f"give one of {', '.join(str(source) for source, _ in sources)}")
    return sources[0]


def download_cifar(dest: str | os.PathLike, kind: str = "cifar10", url: str | None = None,
                   checksum: str | None = None) -> Path:
    """Download the official archive into the folder `dest` -> its path.

    url and checksum (an MD5 in hex): None takes the official ones. The archive is written to a temporary
    file, which takes its name once the checksum agrees, so nothing half-written is left. An archive that is
    already there with the right checksum is not fetched again. Raises InputError where the server cannot be
    read, the folder cannot be written, or the checksum differs."""
    layout = _layout(kind)
    url, checksum = url or layout.url, checksum or layout.md5
    target, part = Path(dest) / layout.archive, None
    check_target(target, probe=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(target, wait=True):  # another process may be fetching it
            if target.is_file() and _md5(target) == checksum:
                return target
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{layout.archive}.", suffix=".part",
                                             delete=False) as file:
                part = Path(file.name)
                digest = _fetch(url, file)
            expect(digest == checksum, "download_cifar",
                   f"{url} has MD5 {digest}, expected {checksum}: damaged, or another file")
            part.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"download_cifar: {url} to {target}: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def _fetch(url, file):
    """Copy what `url` sends into an open file -> its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
        total = int(reply.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, delay=1) as bar:
            while block := reply.read(1 << 18):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def _md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _layout(name):
    expect(name in LAYOUTS, "cifar", f"kind is {name!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _how_to_get(name):
    layout = LAYOUTS[name]
    return (f"download it (about 170 MB) with\n  {this_python()} -c "
            f"\"from tinytoken.data import download_cifar; "
            f"download_cifar('{DEFAULT_FOLDER}', '{name}')\"\n  or name a folder that has {layout.folder}/ "
            f"or {layout.archive}: --data DIR or TINYTOKEN_DATA=DIR")


def _locate(path, layout):
    """The archive or the folder of .bin files that `path` stands for, or None."""
    path = Path(path)
    if path.is_file() and path.name == layout.archive:
        return path
    if any((path / name).is_file() for name in layout.train | layout.test):
        return path
    inside = (path / layout.folder, path / layout.archive)
    return next((place for place in inside if place.exists()), None)


def _sizes(layout):
    """{name of a file: its official size in bytes}."""
    record = layout.label_bytes + PIXELS
    return {name: records * record for name, records in (layout.train | layout.test).items()}


class Bounded:
    """What an archive unpacks to, as a stream of at most so many bytes: beyond, InputError."""

    def __init__(self, stream: IO[bytes], most: int, archive: Path) -> None:
        self.stream, self.left, self.most, self.archive = stream, most, most, archive

    def read(self, size: int) -> bytes:
        """The next bytes of the stream."""
        data = self.stream.read(size)
        self.left -= len(data)
        expect(self.left >= 0, str(self.archive),
               f"unpacks to more than {self.most:,} bytes, which is more than a CIFAR archive")
        return data


def _check_size(where, size, expected):
    expect(size == expected, where, f"{size:,} bytes, expected {expected:,}: truncated, or not a CIFAR file")


def _from_folder(folder, layout):
    """The files of a data set by name, as bytes; their sizes are checked before any is read."""
    sizes = _sizes(layout)
    for name, size in sizes.items():
        expect((folder / name).is_file(), folder / name, f"no such file, expected one of {size:,} bytes")
        _check_size(folder / name, (folder / name).stat().st_size, size)
    if (folder / layout.names_file).is_file():
        sizes[layout.names_file] = NAMES
    return {name: read_bytes(folder / name, "load_cifar", size) for name, size in sizes.items()}


def _from_archive(archive, layout):
    """The same from a .tar.gz, read once from front to back; members we do not know are skipped."""
    sizes, files = _sizes(layout), {}
    known = {f"{layout.folder}/{name}": name for name in (*sizes, layout.names_file)}
    most = sum(sizes.values()) + OTHERS
    try:
        with opened(archive, "load_cifar") as file, gzip.open(file) as unpacked:
            stream = Bounded(unpacked, most, archive)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if name := known.get(member.name):
                        expect(member.isreg(), archive,
                               f"its member {member.name} is a link or a folder, expected a plain file")
                        where = f"{archive}: {member.name}"
                        expect(name in sizes or member.size <= NAMES, where,
                               f"{member.size:,} bytes, expected at most {NAMES:,}")
                        _check_size(where, member.size, sizes.get(name, member.size))
                        files[name] = tar.extractfile(member).read()
            while stream.read(1 << 20):  # gzip compares its checksum at the end of the file
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        size = archive.stat().st_size
        raise InputError(f"{archive}: {size:,} bytes that are not a whole .tar.gz ({error})") from error
    missing = [name for name in sizes if name not in files]
    expect(not missing, archive, f"{', '.join(missing)} missing, expected in its folder {layout.folder}/")
    return files


def _parse(files, source, split, layout, names):
    """Take the split's files out of `files` and put their records together."""
    total = sum(split.values())
    images, labels = np.empty((total, 3, 32, 32), "uint8"), np.empty(total, "int64")
    start = 0
    for name, records in split.items():
        table = np.frombuffer(files.pop(name), "uint8").reshape(records, layout.label_bytes + PIXELS)
        part = slice(start, start + records)
        images[part] = table[:, layout.label_bytes:].reshape(records, 3, 32, 32)
        labels[part] = table[:, layout.label_bytes - 1]
        wrong = np.flatnonzero(labels[part] >= len(names))
        expect(not len(wrong), f"{source}: {name}",
               lambda: f"record {wrong[0]} has label {labels[part][wrong[0]]}, "
                       f"expected 0 to {len(names) - 1}")
        start += records
    return Pictures(images, labels, names)


def _recognised(path):
    return any(_locate(path, layout) for layout in LAYOUTS.values())


@dataset("cifar10", recognises=_recognised, layout="CIFAR's binary files or their archive")
def cifar10(place: os.PathLike | None, **_: Any) -> tuple[Pictures, Pictures]:
    """CIFAR-10; of a folder or archive, whichever of the two sets it holds."""
    return load_cifar(*find_data("cifar10" if place is None else str(place)))


@dataset("cifar100")
def cifar100(place: os.PathLike | None, **_: Any) -> tuple[Pictures, Pictures]:
    """CIFAR-100, fine labels."""
    return load_cifar(*find_data("cifar100"))
