"""Folders of files by class, the way most collections of photographs and of videos are kept.

    DIR/train/CLASS/FILE and DIR/test/CLASS/FILE (or DIR/val/CLASS/FILE, where there is no test)
    DIR/CLASS/FILE, of which the seed sends one in five of each class, at least one, to the test part

The classes have the names of their folders, in sorted order. Files are recognised by the endings of their
names. Files that are hidden, have another ending or lie deeper are left out, and so are those that cannot be
read; one line on stderr counts them. A class of which nothing is left is an error.
"""
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable

import numpy as np
from tqdm import tqdm

from .. import random
from ..errors import InputError, expect, one_line_of_warnings, printable, some_of
from ..threads import share_out

WRITTEN = ".tokens.png"  # the ending of what `predict` writes beside a picture
SITE = "tinytoken.data.folder."
TEST_SHARE = 5  # one in so many, where the folder has no test part of its own


@dataclasses.dataclass(frozen=True)
class Kind:
    """What files are asked for. noun: of one, "picture". endings: those of their names, the most usual one
    first. library: what reads them. chunk: how many a thread reads before it takes the next ones: Ctrl-C
    waits for no more than these."""
    noun: str
    endings: tuple[str, ...]
    library: str
    chunk: int

    @property
    def layouts(self) -> str:
        """How such folders look, for the reader."""
        end = self.endings[0]
        return f"{self.noun}s by class: CLASS/*{end}, or train/CLASS/*{end} and test/CLASS/*{end}"

    @property
    def expected(self) -> str:
        """The same, for messages."""
        end = self.endings[0]
        return f"expected DIR/train/CLASS/*{end} and DIR/test/CLASS/*{end}, or DIR/CLASS/*{end}"


class Folder:
    """What is in a folder, sorted by name: folders, files of the kind and others, all paths. hidden: how many
    more."""

    def __init__(self, path: pathlib.Path, kind: Kind) -> None:
        try:
            entries = sorted(path.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{path}: the folder cannot be read ({error.strerror or error})") from error
        self.folders: list[pathlib.Path] = []
        self.files: list[pathlib.Path] = []
        self.others: list[pathlib.Path] = []
        self.hidden = 0
        for entry in entries:
            if entry.name.startswith("."):
                self.hidden += 1
            elif entry.is_dir():
                self.folders.append(entry)
            else:
                (self.files if _is_file(entry, kind) else self.others).append(entry)


def _is_file(path, kind):
    """Whether a file is to be read. A link to nowhere is read, so that it counts as broken; a pipe is not: to
    read it would hang."""
    named = path.suffix.lower() in kind.endings and not path.name.endswith(WRITTEN)
    return named and (path.is_file() or not path.exists())


def _by_class(path, kind):
    """Whether the folder has folders of files in it."""
    return path.is_dir() and any(Folder(folder, kind).files for folder in Folder(path, kind).folders)


def recognised(path: pathlib.Path, kind: Kind) -> bool:
    """Whether the path is a folder of files: by class; or loose, so that `load` can say what is wrong."""
    if not path.is_dir():
        return False
    here = Folder(path, kind)
    return bool(here.files) or any(_by_class(folder, kind) for folder in (path, *here.folders))


def _classes(path, left_out):
    """{class: its files}, both in sorted order."""
    kind = left_out.kind
    here, above = Folder(path, kind), (path.resolve(), *path.resolve().parents)
    left_out.add(here, here.files)
    expect(here.folders, path, f"no folders for the classes in it; {kind.expected}")
    expect(len(here.folders) > 1, path, lambda: f"one class only, {here.folders[0].name}; expected more")
    classes = {}
    for folder in here.folders:
        expect(folder.resolve() not in above, folder,
               f"a link to a folder above it, expected {kind.noun}s of a class")
        inside = Folder(folder, kind)
        left_out.add(inside, inside.folders)
        expect(inside.files, folder, lambda: f"no {kind.noun}s in it{_only(inside.folders)}; {kind.expected}")
        classes[folder.name] = inside.files
    return classes


def _parts(path, left_out, seed):
    """({class: its files} of the training part, the same for the test part)."""
    kind = left_out.kind
    expect(path.is_dir(), path, f"{'not a folder' if path.exists() else 'does not exist'}; {kind.expected}")
    if not _by_class(path / "train", kind):
        return _split(path, _classes(path, left_out), kind, seed)
    places = [path / "train", *(path / name for name in ("test", "val") if _by_class(path / name, kind))][:2]
    expect(len(places) == 2, path, f"{kind.noun}s by class in train/, but not in test/ or val/; with "
           f"{path / 'train'} for the folder, one in {TEST_SHARE} of each class would be the test part")
    parts = [_classes(place, left_out) for place in places]
    classes = set().union(*parts)
    lacks = [f"{place.name}/ lacks {some_of(sorted(classes - part.keys()), 9)}"
             for place, part in zip(places, parts) if classes - part.keys()]
    expect(not lacks, path, f"the parts differ in their classes: {'; '.join(lacks)}")
    return parts


def _split(path, classes, kind, seed):
    """{class: files} -> the same for the training part, and for the test part.

    The draw of a class depends on its name and on how many files it has, on nothing else."""
    train, test = {}, {}
    for name, files in classes.items():
        expect(len(files) > 1, path / name, f"one {kind.noun} only; expected at least one for each part")
        order = random.permutation(len(files), site=f"{SITE}test.{name}", step=0, seed=seed)
        share = max(1, len(files) // TEST_SHARE)
        test[name], train[name] = ([files[k] for k in chosen] for chosen in (order[:share], order[share:]))
    return train, test


# Many files

class LeftOut:
    """What is left out of the folder `path`, to be told in one line. broken: [(file, why it is broken)]."""

    def __init__(self, path: pathlib.Path, kind: Kind) -> None:
        self.path, self.kind, self.hidden = path, kind, 0
        self.others: list[pathlib.Path] = []
        self.broken: list[tuple[pathlib.Path, str]] = []

    def add(self, folder: Folder, misplaced: list[pathlib.Path]) -> None:
        """Leave out what `folder` has that is no file of a class; misplaced: further files and folders."""
        self.hidden += folder.hidden
        self.others += folder.others + misplaced

    def names(self, paths: Iterable[pathlib.Path]) -> str:
        """The first of the paths, as seen from the folder."""
        return some_of([path.relative_to(self.path) for path in paths], 3)

    def say(self, count: int) -> None:
        """Print the line. count: how many files there were, with the broken ones."""
        texts, noun = [], f"{self.kind.noun}s"
        if self.broken:
            files, reasons = zip(*self.broken)
            texts.append(f"{len(files):,} of {count:,} {noun}, which cannot be read "
                         f"({self.names(files)}; of the first: {reasons[0]})")
        if self.others:
            texts.append(f"{len(self.others):,} that are no {noun} of a class ({self.names(self.others)})")
        if self.hidden:
            texts.append(f"{self.hidden:,} hidden")
        if texts:
            print(printable(" ".join(f"{self.path}: left out: {', '.join(texts)}".split())), file=sys.stderr)


def _only(folders):
    return f", only folders ({some_of([folder.name for folder in folders], 3)})" if folders else ""


Part = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # files as arrays (B, ...), labels (B,), classes' names


def load(path: pathlib.Path, kind: Kind, read: Callable[[pathlib.Path], np.ndarray], shape: tuple[int, ...],
         seed: int) -> tuple[Part, Part]:
    """Read a folder of files by class (see the top of this file) -> (train, test).

    read(file) -> uint8 of the `shape`, or InputError, whose cause says what is wrong with the file. seed: of
    the split, where there is one. The order is mixed, the same for every seed. Raises InputError, naming the
    folder, for another layout, parts that differ in their classes, fewer than two classes, or a class of
    which no file can be read."""
    left_out = LeftOut(path, kind)
    parts = _parts(path, left_out, seed)
    with one_line_of_warnings(path, kind.library):
        train, test = (_read(classes, read, shape, left_out) for classes in parts)
    left_out.say(sum(len(files) for classes in parts for files in classes.values()))
    for part, classes, (_, labels, _) in zip(("training", "test"), parts, (train, test)):
        counts = np.bincount(labels, minlength=len(classes))
        for files, count in zip(classes.values(), counts):
            expect(count, str(files[0].parent),
                   lambda: f"of its {len(files)} {kind.noun}s for the {part} part none can be read "
                           f"({dict(left_out.broken)[files[0]]})")
    return train, test


def _read(classes, read, shape, left_out):
    """{class: files} -> a Part, in a mixed order, so that a part of them has all classes."""
    kind = left_out.kind
    files = [file for those in classes.values() for file in those]
    labels = np.repeat(np.arange(len(classes), dtype="int64"), [len(those) for those in classes.values()])
    order = random.permutation(len(files), site=SITE + "order", step=0, seed=0)
    arrays, reasons = np.empty((len(files), *shape), "uint8"), {}  # reasons: why a file is broken
    bar = tqdm(total=len(files), desc=f"reading {kind.noun}s", unit=kind.noun, delay=2, leave=False)

    def read_some(start):
        for k in range(start, min(start + kind.chunk, len(files))):
            try:
                arrays[k] = read(files[order[k]])
            except InputError as error:
                reasons[k] = str(error.__cause__)
            bar.update()
    with bar:
        share_out(read_some, range(0, len(files), kind.chunk))  # they are decoded without holding the GIL
    left_out.broken += sorted((files[order[k]], reason) for k, reason in reasons.items())
    labels = labels[order]
    if reasons:
        arrays, labels = (np.delete(array, list(reasons), axis=0) for array in (arrays, labels))
    return arrays, labels, tuple(classes)
