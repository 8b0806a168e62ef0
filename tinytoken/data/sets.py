"""Data sets by name or folder: what `--data` may say. Each is a function that a file here registers."""
import os
import pathlib
from collections.abc import Callable
from typing import Any

from ..errors import InputError, expect
from ..registry import Registry


class DataSets(Registry):
    """{name: load(place, *, train, test, seed, size) -> (training pictures, test pictures)}.

    place: the folder or file that was asked for; None where the set was asked for by name. train, test: how
    many pictures, of a set that is made; size: the side of a picture in pixels, where the set can choose it.
    Pictures have images (B, 3, H, W) uint8, labels (B, ...), the classes' names, and moves: what may be done
    to a picture without changing its label (options of Batches)."""

    def __init__(self) -> None:
        super().__init__("data")
        self.readers: list[tuple[Callable, Callable]] = []  # (recognises, load) of sets that lie in a folder
        self.layouts: list[str] = []  # what such folders hold

    def __call__(self, name: str, recognises: Callable[[pathlib.Path], bool] | None = None,
                 layout: str = "") -> Callable:
        """Decorator: register a set. recognises(path): whether a folder or file holds such a set; layout: how
        it looks, for the reader."""
        def register(load):
            if recognises is not None:
                self.readers.append((recognises, load))
                self.layouts.append(layout or name)
            return super(DataSets, self).__call__(name)(load)
        return register


    def choices(self) -> str:
        """What may be asked for, as text."""
        return f"{', '.join(self)}, or a folder with {' or with '.join(self.layouts)}"


dataset = DataSets()


def load_pictures(name_or_dir: str | os.PathLike, *, train: int = 16000, test: int = 2000, seed: int = 0,
                  size: int = 32) -> tuple[Any, Any]:
    """(training, test) pictures of a registered set, or of a folder or archive that a set recognises.

    InputError says what may be asked for."""
    name = str(name_or_dir)
    choices = f"expected {dataset.choices()}"
    expect(name, "data", f"no name; {choices}")
    request = dict(train=train, test=test, seed=seed, size=size)
    if name in dataset:
        return dataset[name](None, **request)
    path = pathlib.Path(name)
    for recognises, load in dataset.readers if path.exists() else ():
        if recognises(path):
            return load(path, **request)
    what = "holds no data set that is known here" if path.exists() else "does not exist"
    raise InputError(f"data: {name} {what}; {choices}")
