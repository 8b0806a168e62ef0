"""The fine-grained face of scenes: what tells the classes apart is a mark of 2 x 2 pixels.

A picture is a scene with one object, of any of the ten shapes and of three fifths to four fifths of the
picture's side across. Somewhere on it stands a mark of four pixels, two light and two dark, and how they
stand is the class: light left, right, above, below, or on one of the two diagonals. Three more such marks
stand beside the object, and how they stand means nothing: so a mark has to be found, and seen to be on the
object. A mark begins at even rows and columns, so that it lies in one patch, whatever the patch size. Shape,
colours, clutter and place say nothing of the class, and all marks have the same four values.
"""
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import expect
from .scenes import Draws, Scenes, make_scenes
from .sets import dataset

MARKS = {"left": "10 10", "right": "01 01", "above": "11 00", "below": "00 11", "falling": "10 01",
         "rising": "01 10"}  # rows of the mark, 1 is light
LIGHT, DARK = 250, 5
DECOYS = 3
RADII = ((0.3, 0.4),)


@dataclass(frozen=True)
class FineScenes:
    """images (B, 3, H, W) uint8; labels (B,) int64, indices into `names`; cues (B, H, W) bool: the
    pixels of the mark that counts; shapes (B,): what the object is, an index into scenes.SHAPES."""
    images: np.ndarray
    labels: np.ndarray
    cues: np.ndarray
    shapes: np.ndarray
    names: tuple[str, ...] = tuple(MARKS)
    moves: ClassVar[dict] = {}  # mirrored, a mark would be another

    def __len__(self):
        return len(self.images)

    def cue_patch(self, patch_size: int) -> np.ndarray:
        """(B,) int64: which patch the mark is in, patches row by row."""
        first = self.cues.reshape(len(self), -1).argmax(axis=1)
        rows, columns = np.divmod(first, self.cues.shape[2])
        return rows // patch_size * (self.cues.shape[2] // patch_size) + columns // patch_size


def make_fine(count: int, *, seed: int = 0, split: str = "train", size: int = 32) -> FineScenes:
    """Draw `count` pictures of size x size pixels (see the top of this file).

    InputError for what make_scenes refuses, and for an odd size."""
    expect(not isinstance(size, int) or size % 2 == 0, "make_fine",
           f"size is {size}, expected an even number")
    scenes = make_scenes(count, seed=seed, split=split, size=size, radii=RADII)
    return marked(scenes, Draws(count, seed, split, 0))


def marked(scenes: Scenes, draw: Draws) -> FineScenes:
    """Scenes with a mark each on the object, and DECOYS beside it."""
    count, size = len(scenes), scenes.images.shape[2]
    cells = scenes.masks.reshape(count, size // 2, 2, size // 2, 2).sum(axis=(2, 4)).reshape(count, -1)
    order = draw.uniform("fine.place", (cells.shape[1],))
    labels, decoys = (draw.integers(f"fine.{what}", shape, len(MARKS))
                      for what, shape in (("mark", ()), ("decoys", (DECOYS,))))
    images, cues = scenes.images.copy(), np.zeros(scenes.instances.shape, bool)
    on_object = np.where(cells == 4, order, -1).argmax(axis=1)
    beside = np.argsort(np.where(cells == 0, order, -1), axis=1)[:, ::-1]
    for number in range(DECOYS):
        _stamp(images, beside[:, number], decoys[:, number])
    cues[_stamp(images, on_object, labels)] = True
    return FineScenes(images, labels, cues, scenes.labels)


def _stamp(images, cells, marks):
    """Draw marks (B,) in cells (B,) of the pictures -> the places of their pixels, an index (B, 4)."""
    patterns = np.array([[value == "1" for value in mark.replace(" ", "")] for mark in MARKS.values()])
    rows, columns = np.divmod(cells[:, None], images.shape[2] // 2)
    place = np.arange(len(images))[:, None], rows * 2 + [0, 0, 1, 1], columns * 2 + [0, 1, 0, 1]
    for channel in range(3):
        images[place[0], channel, place[1], place[2]] = np.where(patterns[marks], LIGHT, DARK)
    return place


@dataset("fine_scenes")
def both_splits_of_marks(place: Any, *, train: int, test: int, seed: int,
                         size: int) -> tuple[FineScenes, FineScenes]:
    """Made on the spot."""
    return (make_fine(train, seed=seed, split="train", size=size),
            make_fine(test, seed=seed, split="test", size=size))
