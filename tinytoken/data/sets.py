"""Data sets by name or folder: what `--data` may say. Each is a function that a file here registers."""
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import random
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


def hold_out(pictures: Any, count: int) -> tuple[Any, Any]:
    """Cut a set in two -> (the others, `count` pictures drawn at random).

    The draw depends on the size of the set alone: whoever holds out as many of it holds out the same ones, so
    what was chosen by them was never trained on. InputError where nothing would be left."""
    expect(0 < count < len(pictures.images), "hold_out",
           lambda: f"{count} pictures of {len(pictures.images)}, expected at least 1, and fewer than all")
    order = random.permutation(len(pictures.images), site="tinytoken.data.hold_out", step=0, seed=0)
    return _part_of(pictures, np.sort(order[count:])), _part_of(pictures, np.sort(order[:count]))


def _part_of(pictures, chosen):
    """The same set with the chosen pictures alone: indices."""
    arrays = {field.name: value[chosen] for field in dataclasses.fields(pictures)
              if isinstance(value := getattr(pictures, field.name), np.ndarray)}
    return dataclasses.replace(pictures, **arrays)
