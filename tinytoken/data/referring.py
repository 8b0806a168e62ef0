"""Pictures of four objects with sentences, each of which means one of them: "disc left of blue square".

Ground, clutter, colours and outlines are those of scenes (scenes.py); colours, shapes and words those of
captions (captions.py). Each object lies in a circle of 0.24 to 0.3 of the picture's side, the circles apart.
A picture is of one of two sorts, either as often:

    look       two colours and two shapes in all four pairings. A sentence is "colour shape", and both words
               are needed: for each object another one shares its colour, and a third its shape.
    relation   two objects of one look, on either side of a third that differs in colour and shape. The fourth
               has the colour of the first two and the shape of the third. A sentence is "shape relation
               colour shape" and means one of the first two; here, too, the third is known by both its words.

An object is left of another if its centre is, and likewise for right of, above and below; along the axis that
the sentences speak of, the two centres are CLEAR or more away from the third's. So a sentence is true of one
object alone. (It is also true that of the first two it means the one that lies further to that side: whoever
knows this need not find the third.)

A picture comes with two sentences that mean two of its objects, in any order. It is not to be mirrored (left
would be right), nor moved. Picture i is a pure function of (seed, split, i), as in scenes.
"""
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from .captions import COLOURS, KINDS, NUMBER, RELATIONS, WORDS
from .scenes import (CHUNK, CLUTTER, JITTER, NAMES, PALETTE, TURN, Draws, background, boxes_of, check_request,
                     clutter, paint, paint_object)
from .sets import dataset

LENGTH = 5  # words of the longest sentence
SENTENCES = 2  # of a picture
OBJECTS = 4
RADIUS = (0.12, 0.15)
CLEAR = 0.1  # in sides of the picture
TRIES = 64  # arrangements drawn at a time, until one fits
PARTS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])  # "look": the first or second colour and shape
PAIRED = np.array([[0, 0], [0, 0], [1, 1], [0, 1]])  # "relation"


@dataclass(frozen=True)
class ReferringScenes:
    """A set of B pictures. images (B, 3, H, W) uint8.

    labels (B, 2, 5 + H W) uint8: for each of the two sentences its words, as numbers of `names`, with <pad>
    after the last; then the pixels of what it means, row by row, 1 for the object. meant (B, 2) int64: which
    object that is, from 1. looks (B, 4, 2) int64: each object's number among captions' COLOURS and KINDS.
    instances (B, H, W) uint8 and boxes (B, 4, 4) int64: as in Scenes."""
    images: np.ndarray
    labels: np.ndarray
    meant: np.ndarray
    looks: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...] = WORDS
    moves: ClassVar[dict] = {}  # see the top of this file

    def __len__(self):
        return len(self.images)

    @property
    def sentences(self) -> np.ndarray:
        """(B, 2, 5) uint8."""
        return self.labels[:, :, :LENGTH]

    @property
    def masks(self) -> np.ndarray:
        """(B, 2, H, W) bool: the pixels of what each sentence means."""
        return self.labels[:, :, LENGTH:].reshape(len(self), SENTENCES, *self.images.shape[2:]) > 0


def make_referring(count: int, *, seed: int = 0, split: str = "train", size: int = 32) -> ReferringScenes:
    """Draw `count` pictures of size x size pixels with their sentences. 10,000 of 32 x 32 take seconds.

    Raises InputError for a count below 1, an unknown split, or a size outside 16 to 256."""
    check_request("make_referring", count, split, size)
    parts, starts = [], range(0, count, CHUNK)
    for start in tqdm(starts, desc=f"drawing sentences ({split})", unit="chunk", delay=2, leave=False):
        rows = min(CHUNK, count - start)
        parts.append(_chunk(Draws(rows, seed, f"referring.{split}", start // CHUNK), size))
    arrays: Any = map(np.concatenate, zip(*parts))
    return ReferringScenes(*arrays)


def _chunk(draw, size):
    """The arrays of some pictures, in the order of ReferringScenes."""
    related = draw.integers("sort", (), 2) == 1
    looks = _looks(draw, related)
    axis = draw.integers("relation.axis", (), 2)
    radius = draw.uniform("object.radius", (OBJECTS,), *RADIUS)
    centre = _place(draw, radius, related, axis)
    picture = background(draw, size)
    for distance, tone in clutter(draw, size, *CLUTTER):
        paint(picture, distance, tone)
    tones = PALETTE[looks[:, :, 0]] + draw.uniform("object.jitter", (OBJECTS, 3), -JITTER, JITTER)
    angle = draw.uniform("object.angle", (OBJECTS,), -TURN, TURN)
    shapes = np.array([NAMES.index(name) for name in KINDS])[looks[:, :, 1]]
    instances = np.zeros((draw.rows, size, size), "uint8")
    for k in range(OBJECTS):
        coverage = paint_object(picture, shapes[:, k], centre[:, k], radius[:, k], angle[:, k], tones[:, k])
        instances[coverage >= 0.5] = k + 1
    images = np.rint(picture.clip(0, 255, out=picture)).astype("uint8")
    meant = _meant(draw, related)
    along = np.take_along_axis(centre, axis[:, None, None], axis=2)[:, :, 0]
    after = np.take_along_axis(along, meant, axis=1) > along[:, 2:3]
    words = np.array([sentence(looks[i, k], looks[i, 2], 2 * axis[i] + after[i, s] if related[i] else None)
                      for i, row in enumerate(meant) for s, k in enumerate(row)], "uint8")
    masks = instances[:, None] == (meant + 1)[:, :, None, None]
    labels = np.concatenate([words.reshape(draw.rows, SENTENCES, LENGTH),
                             masks.reshape(draw.rows, SENTENCES, -1)], axis=2).astype("uint8")
    return images, labels, meant + 1, looks, instances, boxes_of(instances, OBJECTS)


def _looks(draw, related):
    """Colour and shape of each object, (rows, 4, 2)."""
    colour, kind = ((first := draw.integers(f"look.{what}", (), count),
                     (first + 1 + draw.integers(f"look.other_{what}", (), count - 1)) % count)
                    for what, count in (("colour", len(COLOURS)), ("shape", len(KINDS))))
    both = np.stack([np.stack(colour, axis=1), np.stack(kind, axis=1)], axis=2)  # (rows, one and other, 2)
    return np.take_along_axis(both, np.where(related[:, None, None], PAIRED, PARTS), axis=1)


def _meant(draw, related):
    """Which two objects the sentences mean, from 0: any two in pictures of looks, else the first two."""
    first = draw.integers("meant.first", (), OBJECTS)
    other = (first + 1 + draw.integers("meant.other", (), OBJECTS - 1)) % OBJECTS
    pair = draw.integers("meant.pair", (), 2)
    return np.where(related[:, None], np.stack([pair, 1 - pair], axis=1), np.stack([first, other], axis=1))


def _place(draw, radius, related, axis):
    """Centres (rows, 4, 2): circles inside the picture and apart; in pictures of relations the first object
    before the third along the axis, and the second after it, or the reverse."""
    centre, left, time = np.zeros((draw.rows, OBJECTS, 2), "float32"), np.arange(draw.rows), 0
    margin, pairs = radius[:, None, :, None], np.triu_indices(OBJECTS, 1)
    touch = (radius[:, pairs[0]] + radius[:, pairs[1]])[:, None]
    while len(left):  # the draws are of all rows: a row's are the same, however many others are left
        tries = margin + (1 - 2 * margin) * draw.uniform(f"object.centre.{time}", (TRIES, OBJECTS, 2))
        tries = tries[left]
        apart = np.hypot(*np.moveaxis(tries[:, :, pairs[0]] - tries[:, :, pairs[1]], -1, 0)) > touch[left]
        along = np.take_along_axis(tries, axis[left, None, None, None], axis=3)[..., 0]
        first, second = along[:, :, 0] - along[:, :, 2], along[:, :, 1] - along[:, :, 2]
        clear = (np.minimum(abs(first), abs(second)) >= CLEAR) & (first * second < 0)
        fits = apart.all(axis=2) & (clear | ~related[left, None])
        rows, chosen = np.arange(len(left)), fits.argmax(axis=1)
        centre[left] = tries[rows, chosen]
        left, time = left[~fits[rows, chosen]], time + 1
    return centre


def sentence(look: Any, other: Any = None, relation: int | None = None) -> list[int]:
    """A sentence as LENGTH numbers of WORDS, <pad> at the end. look: of the object that is meant, its numbers
    among COLOURS and KINDS. relation: its number among RELATIONS, to an object of the look `other`; None: the
    sentence has its colour and its shape alone."""
    colour, kind = COLOURS[look[0]], KINDS[look[1]]
    said = [colour, kind]
    if relation is not None:
        said = [kind, *RELATIONS[relation], COLOURS[other[0]], KINDS[other[1]]]
    return [*(NUMBER[word] for word in said), *[NUMBER["<pad>"]] * (LENGTH - len(said))]


@dataset("referring")
def referring_splits(place: Any, *, train: int, test: int, seed: int, size: int
                     ) -> tuple[ReferringScenes, ReferringScenes]:
    """Made on the spot."""
    return (make_referring(train, seed=seed, split="train", size=size),
            make_referring(test, seed=seed, split="test", size=size))
