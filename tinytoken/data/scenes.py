"""Pictures made on the spot from a seed, with everything known about them: masks, boxes, instances.

A scene is a dark ground of smooth noise (mean brightness 20 to 50 of 255), 6 to 12 strokes and blobs of
clutter, and 1 to 3 filled objects in front, each in a circle 0.38 to 0.6 of the picture's side across. The
label is the shape of the objects: disc, ring, square, triangle (its tip down), cross, star, crescent (open to
the right), bars (three, lying), dots (four) or lattice (two bars across two), each turned by up to 20 degrees
either way. A model trained on scenes has seen nothing else: no shape upside down, no outline, no drawing on
white. All objects of one picture share the shape, so the label is true of each of them, and a model may look
at any.

Nothing but shape tells the classes apart: colours of objects and clutter come from one palette by one rule,
and how many objects there are, their place, size, turn and area are drawn without looking at the class. (A
fine histogram of colours still classifies about 20 % right, where chance is 10: the pixels of outlines are
mixed, and the outlines' length depends on the class.)

Image i is a pure function of (seed, split, i): a longer set begins with the shorter one, and `size` only
changes the resolution at which the same scene is drawn. Inside, lengths are in units of the picture's side.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from .. import random
from ..errors import expect
from .sets import dataset

SPLITS = ("train", "val", "test")
# How hard the scenes are. Tuned once, for the ViT alone: dim 96, depth 6, 500 steps of 64 reach 89 % on new
# scenes (chance 10).
CLUTTER = (6, 12)  # strokes and blobs in a picture, both ends included
RADII = ((0.25, 0.30), (0.22, 0.26), (0.19, 0.21))  # of objects' circles, in pictures of 1, 2, 3 objects
SIZED = ((0.1, 0.4),)  # of "sized_scenes"
TURN = math.pi / 9  # objects are turned by up to this angle, either way
LEVEL = (20, 50)  # mean brightness of the background, of 255
NOISE = ((4, 20), (8, 10))  # its smooth noise: cells across the picture, and strength
JITTER = 20.0  # each channel of a colour is moved by up to this much
TRIES = 64  # arrangements tried; objects that have no room in any are left out
PALETTE = np.array([[225, 60, 55], [240, 145, 40], [235, 215, 65], [85, 180, 75],
                    [60, 185, 190], [70, 110, 215], [150, 85, 195], [235, 130, 175]], "float32")
CHUNK = 256  # scenes drawn at a time: bounds memory and fits the cache. Another chunk makes other pictures.


# The ten shapes: signed distance (nearly; negative inside) from the edge of a shape within the unit circle.
# All have the area of the largest triangle in that circle, 1.299, so that the amount of object says nothing
# about the class.

def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.643


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.1436


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.57


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * math.sqrt(0.75) + y * 0.5, -y) - 0.5


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.93, y - 0.195), np.maximum(y - 0.93, x - 0.195))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five rays, folded into half of one: there the edge is the line from the tip (1, 0) to the notch."""
    ray, notch = math.pi / 5, 0.442
    angle, r = np.abs((np.arctan2(y, x) + ray) % (2 * ray) - ray), np.hypot(x, y)
    nx, ny = notch * math.sin(ray), 1 - notch * math.cos(ray)
    return ((r * np.cos(angle) - 1) * nx + r * np.sin(angle) * ny) / math.hypot(nx, ny)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.92, 0.7021 - np.hypot(x - 0.4, y))


def bars(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(np.abs(y), np.abs(np.abs(y) - 0.5)) - 0.1443, np.abs(x) - 0.75)


def dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Four discs in a square."""
    return np.hypot(np.abs(x) - 0.479, np.abs(y) - 0.479) - 0.3215


def lattice(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two bars across two bars, on the diagonals: upright it is too easily taken for a cross."""
    u, v = np.abs(x + y) * math.sqrt(0.5), np.abs(x - y) * math.sqrt(0.5)
    return np.minimum(np.maximum(np.abs(u - 0.38) - 0.1315, v - 0.75),
                      np.maximum(np.abs(v - 0.38) - 0.1315, u - 0.75))


SHAPES = (disc, ring, square, triangle, cross, star, crescent, bars, dots, lattice)
NAMES = tuple(shape.__name__ for shape in SHAPES)


@dataclass(frozen=True)
class Scenes:
    """A set of B scenes. `masks` and `object_share` follow from `instances`, pixel by pixel and exactly.

    images (B, 3, H, W) uint8; labels (B,) int64, indices into `names`. instances (B, H, W) uint8: 0 for
    background and clutter, k = 1, 2, 3 for the pixels of object k. boxes (B, 3, 4) int64: row k - 1 has
    object k's (left, top, right, bottom) in pixels, right and bottom excluded; zeros if there is none.
    """
    images: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...] = NAMES
    moves: ClassVar[dict] = {}  # objects are drawn everywhere already

    def __len__(self):
        return len(self.images)

    @property
    def masks(self) -> np.ndarray:
        """(B, H, W) bool: the pixels that belong to any object."""
        return self.instances > 0

    def object_share(self, patch_size: int) -> np.ndarray:
        """(B, N) float32: the share of each patch's pixels that belong to an object, patches row by row as
        ViT orders them."""
        B, side, _ = self.instances.shape
        expect(patch_size >= 1 and side % patch_size == 0, "object_share",
               f"patch size {patch_size} does not divide the picture's {side} pixels")
        cells = side // patch_size
        patches = self.masks.reshape(B, cells, patch_size, cells, patch_size)
        return patches.mean(axis=(2, 4), dtype="float32").reshape(B, cells * cells)

    @property
    def pixel_labels(self) -> np.ndarray:
        """(B, H, W) uint8: the class of each pixel, 0 for the background and 1 + the picture's label for an
        object.

        A pixel is an object's where at least half of it is covered by it. Clutter is background, and so is
        what is seen through a hole: the middle of a ring, the gaps between bars."""
        return np.where(self.masks, 1 + self.labels[:, None, None], 0).astype("uint8")

    def token_labels(self, patch_size: int) -> np.ndarray:
        """(B, 1 + N, K) float32: probabilities of the classes for the picture, then for each of its patches,
        row by row (token labels: Jiang et al. 2021, arXiv 2104.10858).

        The picture's are its label. Of a patch, the share of its pixels that belong to an object goes to the
        label, and the rest evenly to all K classes. They are right for pictures as they are: not cropped, not
        flipped."""
        share, classes = self.object_share(patch_size)[:, :, None], len(self.names)
        picture = np.eye(classes, dtype="float32")[self.labels][:, None]
        return np.concatenate([picture, share * picture + (1 - share) / classes], axis=1)


def make_scenes(count: int, *, seed: int = 0, split: str = "train", size: int = 32,
                radii: tuple[tuple[float, float], ...] = RADII) -> Scenes:
    """Draw `count` scenes of size x size pixels (see the top of this file). 10,000 of 32 x 32 take seconds.

    radii: between what bounds the radius of an object's circle lies, in units of the side, in pictures of 1
    object, of 2, and so on: with one pair, every picture has one. `boxes` has a row for as many objects.
    Raises InputError for a count below 1, an unknown split, a size outside 16 to 256, or radii that are not
    between 0 and 1/2."""
    check_request("make_scenes", count, split, size)
    expect(len(radii) and all(0 < low <= high < 0.5 for low, high in radii), "make_scenes",
           f"radii are {radii!r}, expected pairs 0 < low <= high < 0.5")
    images, labels = np.empty((count, 3, size, size), "uint8"), np.empty(count, "int64")
    instances, boxes = np.empty((count, size, size), "uint8"), np.empty((count, len(radii), 4), "int64")
    bar = tqdm(total=count, desc=f"drawing scenes ({split})", unit="scene", delay=2, leave=False)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        draw = Draws(part.stop - start, seed, split, start // CHUNK)
        labels[part] = draw.integers("label", (), len(SHAPES))
        picture = background(draw, size)
        _paint_clutter(draw, picture)
        shapes = np.repeat(labels[part, None], len(radii), axis=1)
        instances[part] = _paint_objects(draw, picture, shapes, radii)
        images[part] = np.rint(picture.clip(0, 255, out=picture), out=picture)
        boxes[part] = boxes_of(instances[part], len(radii))
        bar.update(part.stop - start)
    bar.close()
    return Scenes(images, labels, instances, boxes)


def check_request(where: str, count: int, split: str, size: int) -> None:
    """Refuse a count, a split or a size that nothing can be drawn with. where: who was asked."""
    whole = (int, np.integer)
    expect(isinstance(count, whole) and count >= 1, where,
           f"count is {count!r}, expected an int of at least 1")
    expect(isinstance(size, whole) and 16 <= size <= 256, where,
           f"size is {size!r}, expected an int from 16 to 256")
    expect(split in SPLITS, where, f"split is {split!r}, expected one of {', '.join(SPLITS)}")


class Draws:
    """What is drawn for a chunk of `rows` scenes. A row's draws are the same in a chunk that is not full."""

    def __init__(self, rows: int, seed: int, split: str, chunk: int) -> None:
        self.rows, self.split = rows, split
        self.stream: dict[str, Any] = dict(seed=seed, step=chunk)

    def uniform(self, what: str, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(rows, *shape) float32. what: its name; each is drawn from a stream of its own."""
        site = f"tinytoken.data.scenes.{self.split}.{what}"
        return low + (high - low) * random.uniform((self.rows, *shape), site=site, **self.stream)

    def integers(self, what: str, shape: tuple[int, ...], high: int) -> np.ndarray:
        """(rows, *shape) int64, from 0 to high - 1."""
        site = f"tinytoken.data.scenes.{self.split}.{what}"
        return random.integers((self.rows, *shape), high, site=site, **self.stream)

    def colours(self, what: str, shape: tuple[int, ...]) -> np.ndarray:
        """Colours of the palette, each channel moved a little: (rows, *shape, 3) float32 in 0 to 255."""
        chosen = PALETTE[self.integers(f"{what}.palette", shape, len(PALETTE))]
        return chosen + self.uniform(f"{what}.jitter", (*shape, 3), -JITTER, JITTER)


def background(draw: Draws, size: int) -> np.ndarray:
    """Smooth noise (rows, 3, size, size): draws on a 4 x 4 and an 8 x 8 grid, smoothly interpolated."""
    picture = draw.uniform("noise.level", (1, 1, 1), *LEVEL)
    for cells, strength in NOISE:
        at = (np.arange(size) + 0.5) / size * cells
        t = np.maximum(1 - np.abs(at[:, None] - np.arange(cells + 1)), 0)
        weights = (t * t * (3 - 2 * t)).astype("float32")  # (size, cells + 1), rows sum to one
        values = draw.uniform(f"noise.{cells}", (3, cells + 1, cells + 1), -strength, strength)
        picture = picture + weights @ values @ weights.T
    return picture


def _frame(size, centre, angle):
    """x and y, each (rows, size, size), of the pixels' centres, as seen from `centre` (rows, 2) and turned by
    `angle` (rows,)."""
    pixel = ((np.arange(size) + 0.5) / size).astype("float32")
    across, down = pixel - centre[:, :1], pixel - centre[:, 1:]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = (cos * across)[:, None, :] + (sin * down)[:, :, None]
    y = (cos * down)[:, :, None] - (sin * across)[:, None, :]
    return x, y


def paint(picture: np.ndarray, distance: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay `colour` (rows, 3) over the picture where distance < 0 -> the coverage (rows, size, size), which
    rises from 0 to 1 across one pixel at the edge.

    Works in place, and overwrites `distance`: this is where the time goes."""
    coverage = distance
    coverage *= -picture.shape[-1]
    coverage += 0.5
    np.clip(coverage, 0, 1, out=coverage)
    change = colour[:, :, None, None] - picture
    change *= coverage[:, None]
    picture += change
    return coverage


def _paint_clutter(draw, picture):
    for distance, colour in clutter(draw, picture.shape[-1], *CLUTTER):
        paint(picture, distance, colour)


def clutter(draw: Draws, size: int, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """From `low` to `high` capsules, half of them long and thin (strokes), half short and thick (blobs).

    Yields of one after another the distance from its edge (rows, size, size) and the colour (rows, 3)."""
    count = low + draw.integers("clutter.number", (), high - low + 1)
    centre = draw.uniform("clutter.centre", (high, 2))
    angle = draw.uniform("clutter.angle", (high,), 0, math.pi)
    stroke = draw.uniform("clutter.kind", (high,)) < 0.5
    length = np.where(stroke, 0.2, 0.05).astype("float32") * draw.uniform("clutter.length", (high,))
    radius = np.where(stroke, 0.014, 0.03).astype("float32") * draw.uniform("clutter.radius", (high,), 1, 2)
    colour = draw.colours("clutter", (high,))
    for k in range(high):
        x, y = _frame(size, centre[:, k], angle[:, k])
        x = np.maximum(np.abs(x) - length[:, k, None, None], 0)
        distance = np.sqrt(x * x + y * y) - radius[:, k, None, None]
        distance[k >= count] = 1  # this scene has fewer pieces
        yield distance, colour[:, k]


def _paint_objects(draw, picture, shapes, radii):
    """Draw each scene's objects; shapes (rows, 3) index SHAPES -> instances (rows, size, size) uint8."""
    centre, radius, present = _place(draw, radii)
    angle = draw.uniform("object.angle", (len(radii),), -TURN, TURN)
    colour = draw.colours("object", (len(radii),))
    instances = np.zeros((draw.rows, *picture.shape[2:]), "uint8")
    for k in range(len(radii)):
        kinds = np.where(present[:, k], shapes[:, k], -1)
        coverage = paint_object(picture, kinds, centre[:, k], radius[:, k], angle[:, k], colour[:, k])
        instances[coverage >= 0.5] = k + 1
    return instances


def paint_object(picture: np.ndarray, kinds: np.ndarray, centre: np.ndarray, radius: np.ndarray,
                 angle: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Draw one object in each picture -> the coverage, see paint.

    kinds (rows,) index SHAPES; -1: none. centre (rows, 2), radius and angle (rows,), colour (rows, 3)."""
    x, y = _frame(picture.shape[-1], centre, angle)
    distance = np.ones_like(x)
    for i, shape in enumerate(SHAPES):
        rows = np.flatnonzero(kinds == i)
        r = radius[rows, None, None]
        distance[rows] = r * shape(x[rows] / r, y[rows] / r)
    return paint(picture, distance, colour)


def _place(draw, radii=RADII):
    """Places for 1 to 3 objects -> centre (rows, 3, 2), radius (rows, 3), present (rows, 3).

    The circles around the objects lie inside the picture and do not overlap: TRIES arrangements are drawn,
    and the first of those with the most objects is taken."""
    most = len(radii)
    wanted = 1 + draw.integers("object.number", (), most)
    low, high = np.array(radii, "float32")[wanted - 1, :, None].swapaxes(0, 1)
    radius = low + (high - low) * draw.uniform("object.radius", (most,))
    margin = radius[:, None, :, None]
    tries = margin + (1 - 2 * margin) * draw.uniform("object.centre", (TRIES, most, 2))
    fits = np.ones((draw.rows, TRIES, most), bool)  # object k, and all before it, have room
    for k in range(1, most):
        apart = np.hypot(*np.moveaxis(tries[:, :, k, None] - tries[:, :, :k], -1, 0))
        room = apart > (radius[:, k, None] + radius[:, :k])[:, None]
        fits[:, :, k] = fits[:, :, k - 1] & room.all(axis=2) & (k < wanted)[:, None]
    chosen = np.arange(draw.rows), fits.sum(axis=2).argmax(axis=1)
    return tries[chosen], radius, fits[chosen]


def boxes_of(instances: np.ndarray, objects: int = len(RADII)) -> np.ndarray:
    """(rows, size, size) -> (rows, objects, 4): left, top, right, bottom of each object."""
    boxes = np.zeros((len(instances), objects, 4), "int64")
    for k in range(objects):
        mask = instances == k + 1
        for axis in (0, 1):  # across, then down
            line = mask.any(axis=1 + axis)
            last = line.shape[1] - line[:, ::-1].argmax(axis=1)
            boxes[:, k, axis] = line.argmax(axis=1)
            boxes[:, k, axis + 2] = np.where(line.any(axis=1), last, 0)
    return boxes


@dataset("scenes")
def both_splits(place: Any, *, train: int, test: int, seed: int, size: int) -> tuple[Scenes, Scenes]:
    """Made on the spot."""
    return (make_scenes(train, seed=seed, split="train", size=size),
            make_scenes(test, seed=seed, split="test", size=size))


@dataset("sized_scenes")
def both_splits_of_sizes(place: Any, *, train: int, test: int, seed: int, size: int) -> tuple[Scenes, Scenes]:
    """Scenes with one object each, of a fifth to four fifths of the picture's side across, every size as
    often: for methods that are about objects of different sizes."""
    return (make_scenes(train, seed=seed, split="train", size=size, radii=SIZED),
            make_scenes(test, seed=seed, split="test", size=size, radii=SIZED))


@dataclass(frozen=True)
class PixelScenes(Scenes):
    """Scenes for segmentation: labels (B, H, W) uint8 are the `pixel_labels` of the same scenes, and the
    first of the names is that of the background."""
    names: tuple[str, ...] = ("background", *NAMES)


@dataset("pixel_scenes")
def both_splits_by_pixel(place: Any, **request: Any) -> tuple[PixelScenes, PixelScenes]:
    """The pictures of "scenes", with a label for each pixel."""
    train, test = (PixelScenes(s.images, s.pixel_labels, s.instances, s.boxes)
                   for s in both_splits(place, **request))
    return train, test
