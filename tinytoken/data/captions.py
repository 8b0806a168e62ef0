"""Pictures of groups of things, and all captions that are true of them: "two red crosses left of a blue
disc".

A picture has one group of 1 to 3 objects (a quarter of the pictures), or two groups of 4 objects at most. All
objects of a group have one shape and one colour; two groups differ in shape, or in colour, or in both.
Ground, clutter, colours and outlines are those of scenes (scenes.py), the objects smaller: each in a circle
of 0.26 to 0.32 of the picture's side.

The grammar:

    caption:  group, or group relation group
    group:    count colour shape          count: a (an), two, three; the shape in the plural after two, three
    relation: left of, right of, above, below

A caption is true of a picture if it names every group once, with its number, colour and shape, and a relation
that holds. A group is left of another if each of its objects is left of each of the other's. Every relation
of a picture is clear: along either axis the circles around the objects are MARGIN or more apart, and the
relation holds, or two of them overlap by OVERLAP or more, and neither this relation nor its reverse does. So
the true captions are all known: one of one group, and of two groups two for each axis, as either may be named
first.

Pictures are not to be mirrored (left would be right), nor moved (objects would be cut off). Picture i is a
pure function of (seed, split, i), as in scenes.
"""
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from .scenes import (CHUNK, CLUTTER, JITTER, NAMES, PALETTE, TURN, Draws, background, boxes_of, check_request,
                     clutter, paint, paint_object)
from .sets import dataset

COUNTS = ("a", "two", "three")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")  # of PALETTE
KINDS = ("disc", "ring", "square", "triangle", "cross", "star")
PLURALS = tuple(kind + ("es" if kind.endswith("s") else "s") for kind in KINDS)
RELATIONS = (("left", "of"), ("right", "of"), ("above",), ("below",))  # 2 axis + (1 where it is reversed)
WORDS = ("<pad>", "<start>", "<end>", *COUNTS, "an", *COLOURS, *KINDS, *PLURALS, "left", "right", "of",
         "above", "below")
NUMBER = {word: number for number, word in enumerate(WORDS)}
LENGTH = 10  # words of the longest caption, with <start> and <end>
CAPTIONS = 4  # true ones of a picture at most
# What a caption says, as numbers: three facts of the first group, the relation, three of the second group
FACTS = ("count", "colour", "shape", "relation", "count", "colour", "shape")
NONE = -1  # the fact of a group or relation that a caption does not have

PAIRS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # sizes of two groups
MOST = 4  # objects of a picture
RADIUS = (0.13, 0.16)
MARGIN, OVERLAP = 0.03, 0.16  # in sides of the picture
TRIES = 32  # arrangements drawn at a time, until one is clear


@dataclass(frozen=True)
class CaptionedScenes:
    """A set of B pictures. images (B, 3, H, W) uint8.

    labels (B, 4, 10) int64: the true captions, as numbers of `names`, the vocabulary: <start>, words, <end>,
    then <pad>. Of fewer than four captions each stands there equally often. attributes (B, A) uint8: yes or
    no, see `attribute_names`. instances (B, H, W) uint8 and boxes (B, 4, 4) int64: as in Scenes. group (B, 4)
    int64: which group object k belongs to, 0 or 1; -1 where there is no such object."""
    images: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    group: np.ndarray
    names: tuple[str, ...] = WORDS
    moves: ClassVar[dict] = {}  # see the top of this file

    def __len__(self):
        return len(self.images)


def make_captions(count: int, *, seed: int = 0, split: str = "train", size: int = 32) -> CaptionedScenes:
    """Draw `count` pictures of size x size pixels with their captions. 10,000 of 32 x 32 take seconds.

    Raises InputError for a count below 1, an unknown split, or a size outside 16 to 256."""
    check_request("make_captions", count, split, size)
    parts = []
    starts = range(0, count, CHUNK)
    for start in tqdm(starts, desc=f"drawing captions ({split})", unit="chunk", delay=2, leave=False):
        rows = min(CHUNK, count - start)
        # other draws than those of scenes: the split's name is a part of their sites
        parts.append(_chunk(Draws(rows, seed, f"captions.{split}", start // CHUNK), size))
    arrays: Any = map(np.concatenate, zip(*parts))
    return CaptionedScenes(*arrays)


def _chunk(draw, size):
    """The arrays of some pictures, in the order of CaptionedScenes."""
    counts, facts, group = _groups(draw)
    radius = draw.uniform("object.radius", (MOST,), *RADIUS)
    centre, holds = _place(draw, group, radius)
    there = group >= 0
    colour, kind = (np.take_along_axis(facts[:, :, fact], np.maximum(group, 0), axis=1) for fact in (1, 2))
    picture = background(draw, size)
    for distance, tone in clutter(draw, size, *CLUTTER):
        paint(picture, distance, tone)
    tones = PALETTE[colour] + draw.uniform("object.jitter", (MOST, 3), -JITTER, JITTER)
    angle = draw.uniform("object.angle", (MOST,), -TURN, TURN)
    shapes = np.where(there, np.array([NAMES.index(name) for name in KINDS])[kind], -1)
    instances = np.zeros((draw.rows, size, size), "uint8")
    for k in range(MOST):
        coverage = paint_object(picture, shapes[:, k], centre[:, k], radius[:, k], angle[:, k], tones[:, k])
        instances[coverage >= 0.5] = k + 1
    images = np.rint(picture.clip(0, 255, out=picture)).astype("uint8")
    return (images, _references(facts, counts[:, 1] > 0, holds), _attributes(colour, kind, centre, there),
            instances, boxes_of(instances, MOST), group)


def _groups(draw):
    """Sizes (rows, 2), facts (rows, 2, 3) and the objects' group (rows, 4); of one group the second size
    is 0."""
    alone = draw.integers("group.number", (), 4) == 0
    single = 1 + draw.integers("group.single", (), len(COUNTS))
    counts = np.array(PAIRS)[draw.integers("group.pair", (), len(PAIRS))]
    counts[alone] = np.stack([single, 0 * single], axis=1)[alone]
    looks = len(COLOURS) * len(KINDS)
    first = draw.integers("group.first", (), looks)
    second = (first + 1 + draw.integers("group.second", (), looks - 1)) % looks  # any other look
    colour, kind = np.divmod(np.stack([first, second], axis=1), len(KINDS))
    place = np.arange(MOST)
    group = np.where(place < counts[:, :1], 0, np.where(place < counts.sum(axis=1, keepdims=True), 1, -1))
    return counts, np.stack([counts - 1, colour, kind], axis=2), group


def _place(draw, group, radius):
    """Centres (rows, 4, 2), and which relations hold, (rows, 4) bool: those of group 0 to group 1.

    The picture is cut in two, across or down, each group on a side of the cut. Arrangements are drawn until
    one has all circles apart and clear relations."""
    centre, holds = np.zeros((draw.rows, MOST, 2), "float32"), np.zeros((draw.rows, 4), bool)
    left, time = np.arange(draw.rows), 0
    low, high = _sides(draw, group)
    low, high = (low + radius[:, :, None])[:, None], (high - radius[:, :, None])[:, None]
    there = group >= 0
    pairs = np.triu(there[:, :, None] & there[:, None], 1)[:, None]
    touch = (radius[:, :, None] + radius[:, None])[:, None]
    while len(left):  # the draws are of all rows: a row's are the same, however many others are left
        tries = low + (high - low) * draw.uniform(f"object.centre.{time}", (TRIES, MOST, 2))
        tries = tries[left]
        apart = np.hypot(*np.moveaxis(tries[:, :, :, None] - tries[:, :, None], -1, 0)) > touch[left]
        relations, clear = _relations(tries, radius[left, None, :, None], group[left])
        fits = (apart | ~pairs[left]).all(axis=(2, 3)) & clear
        rows, chosen = np.arange(len(left)), fits.argmax(axis=1)
        centre[left], holds[left] = tries[rows, chosen], relations[rows, chosen]
        left, time = left[~fits[rows, chosen]], time + 1
    return centre, holds


def _sides(draw, group):
    """Where objects may be, (rows, 4, 2) twice: the lowest and the highest of either coordinate. The larger
    group gets the larger part of the picture."""
    size = [(group == of).sum(axis=1) for of in (0, 1)]
    across = draw.integers("cut.axis", (), 2)[:, None] == np.arange(2)
    second = draw.integers("cut.order", (), 2)  # the group on the second side
    larger = (size[0] - size[1]) * np.where(second == 1, 1, -1)  # of the group on the first side
    cut = 0.5 + 0.06 * larger + draw.uniform("cut", (), -0.06, 0.06)
    along = across[:, None] & (size[1] > 0)[:, None, None]
    after = (group == second[:, None])[:, :, None]
    cut = cut[:, None, None].astype("float32")
    return (np.where(along & after, cut + MARGIN / 2, 0).astype("float32"),
            np.where(along & ~after, cut - MARGIN / 2, 1).astype("float32"))


def _relations(tries, margin, group):
    """Of arrangements (rows, TRIES, 4, 2): the relations that hold, (rows, TRIES, 4), and whether all are
    clear, and one holds if there are two groups."""
    def ends(of):
        there = (group == of)[:, None, :, None]
        return (np.where(there, tries - margin, 2).min(axis=2),
                np.where(there, tries + margin, -2).max(axis=2))
    (low, high), (other_low, other_high) = ends(0), ends(1)
    before, after = other_low - high, low - other_high  # the gaps along either axis
    gap = np.maximum(before, after)
    alone = (group != 1).all(axis=1)[:, None]
    clear = ((gap >= MARGIN) | (gap <= -OVERLAP)).all(axis=2) & (gap >= MARGIN).any(axis=2)
    holds = np.stack([before, after], axis=3).reshape(*gap.shape[:2], 4) >= MARGIN
    return holds & ~alone[:, :, None], clear | alone


def _references(facts, two, holds):
    """The true captions (rows, 4, 10) as numbers of words."""
    labels = np.empty((len(facts), CAPTIONS, LENGTH), "int64")
    for row, (groups, pair, of_first) in enumerate(zip(facts.tolist(), two.tolist(), holds)):
        (first, second), true = map(tuple, groups), []
        for relation in np.flatnonzero(of_first) if pair else ():
            true += [(*first, int(relation), *second), (*second, int(relation) ^ 1, *first)]
        true = true or [(*first, *[NONE] * 4)]
        labels[row] = [words_of(true[i % len(true)]) for i in range(CAPTIONS)]
    return labels


def _attributes(colour, kind, centre, there):
    """(rows, A) uint8, see attribute_names."""
    quarter = (centre >= 0.5) @ np.array([1, 2])
    looks = np.concatenate([colour[:, :, None] == np.arange(len(COLOURS)),
                            kind[:, :, None] == np.arange(len(KINDS))], axis=2) & there[:, :, None]
    number = looks.sum(axis=1)
    at = [(looks & (quarter == q)[:, :, None]).any(axis=1) for q in range(4)]
    return np.concatenate([*(number >= least for least in (1, 2, 3)), *at], axis=1).astype("uint8")


def attribute_names() -> list[str]:
    """What the attributes ask of a picture: of each colour and of each shape whether there are one, two and
    three objects of it or more, and whether one has its centre in each quarter."""
    looks = (*COLOURS, *KINDS)
    asked = ["one or more", "two or more", "three or more"]
    asked += [f"{place}, one that is" for place in ("top left", "top right", "bottom left", "bottom right")]
    return [f"{question} {look}" for question in asked for look in looks]


# Facts to words, and words to facts

def _group_words(count, colour, kind):
    article = "an" if COLOURS[colour][0] in "aeiou" else "a"
    return ((COUNTS[count] if count else article), COLOURS[colour], (PLURALS if count else KINDS)[kind])


GROUPS = {_group_words(*facts): facts for facts in np.ndindex(len(COUNTS), len(COLOURS), len(KINDS))}


@functools.lru_cache(maxsize=None)
def words_of(facts: tuple[int, ...]) -> tuple[int, ...]:
    """The caption of seven facts (see FACTS) as numbers of WORDS: <start>, words, <end>, <pad> up to
    LENGTH."""
    said = [*_group_words(*facts[:3])]
    if facts[3] != NONE:
        said += [*RELATIONS[facts[3]], *_group_words(*facts[4:])]
    numbers = [NUMBER[word] for word in ("<start>", *said, "<end>")]
    return (*numbers, *[NUMBER["<pad>"]] * (LENGTH - len(numbers)))


def facts_of(words: Any) -> tuple[int, ...] | None:
    """The seven facts of a caption (numbers of WORDS; <start>, and what follows <end>, may be there or not);
    None if it is not of the grammar."""
    said = tuple(text_of(words).split())
    if said in GROUPS:
        return (*GROUPS[said], *[NONE] * 4)
    first, relation, second = said[:3], said[3:-3], said[-3:]
    if first in GROUPS and relation in RELATIONS and second in GROUPS:
        return (*GROUPS[first], RELATIONS.index(relation), *GROUPS[second])
    return None


def text_of(words: Any) -> str:
    """A caption as text: its words up to <end>."""
    said = [WORDS[number] for number in words]
    said = said[:said.index("<end>")] if "<end>" in said else said
    return " ".join(word for word in said if word not in ("<start>", "<pad>"))


@dataset("captions")
def captioned_splits(place: Any, *, train: int, test: int, seed: int, size: int
                     ) -> tuple[CaptionedScenes, CaptionedScenes]:
    """Made on the spot."""
    return (make_captions(train, seed=seed, split="train", size=size),
            make_captions(test, seed=seed, split="test", size=size))
