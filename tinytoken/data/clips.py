"""Clips of scenes: short videos in which an object does something. The label is what it does.

On a scene's ground, with clutter that flickers, there are two objects: a disc, which stays where it is, and
the actor, a square, triangle, cross, crescent or bars. The actor goes left, right, up or down, grows,
shrinks, spins, blinks (between two colours), stays still, approaches the disc or flees from it.

No single frame tells the action. An action moves one quantity around a cycle, by the same step from frame to
frame: the actor's column or row, its size, its angle, its colour, or how far it is on the ray from the disc
through it. Each quantity starts anywhere on its cycle with the same probability, and a uniform distribution
on a cycle stays uniform when all of it is moved on. So in every frame, whichever its number, all quantities
together have the same distribution for all eleven actions. What comes to the end of its cycle goes on at the
beginning: after the right end of its way an actor that goes right is at the left end, and one that grows is
small again after it was largest. Played backward, a clip to the left is one to the right, with the same
probability. So it is with growing and shrinking, approaching and fleeing: only the order tells them apart.

The key frame is the one for which the state was drawn, any of the frames with the same probability. Clip i is
a pure function of (seed, split, i, frames), as in scenes.
"""
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from .. import random
from ..errors import expect
from .scenes import (JITTER, NAMES, PALETTE, Draws, Scenes, background, boxes_of, check_request, clutter,
                     paint, paint_object)
from .sets import dataset

ACTIONS = ("left", "right", "up", "down", "grow", "shrink", "spin", "blink", "still", "approach", "flee")
# played backward, one of a pair is the other
OPPOSITES = (("left", "right"), ("up", "down"), ("grow", "shrink"), ("approach", "flee"))
FRAMES = 8
ACTORS = ("square", "triangle", "cross", "crescent", "bars")
RADIUS = (0.1, 0.2)  # of the circle around the actor; in the picture's side, as all lengths
DISC = 0.125  # of that around the disc, see SHAPES
SPEED = (0.07, 0.11)  # share of a cycle that a quantity is moved by, from frame to frame
SPUN = 1.5 * math.pi  # by how much an actor turns where another quantity would go once around its cycle
HELD = 2  # a colour stays for up to this many frames
CLUTTER = (4, 8)  # pieces in a clip, both ends included
LIT = 2 / 3  # share of frames in which a piece of clutter is there
CHUNK = 32  # clips drawn at a time: bounds memory. Another chunk makes other clips.


@dataclass(frozen=True)
class Clips:
    """A set of B clips of T frames.

    images (B, T, 3, H, W) uint8; labels (B,) int64, indices into `names`. key (B,) int64: the key frame.
    instances (B, T, H, W) uint8: 0 for background and clutter, 1 for the pixels of the actor, 2 for those of
    the disc that are not behind it. boxes (B, T, 2, 4) int64: row k - 1 has object k's (left, top, right,
    bottom) in pixels, right and bottom excluded; zeros where nothing of it is seen."""
    images: np.ndarray
    labels: np.ndarray
    key: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...] = ACTIONS
    moves: ClassVar[dict] = {}  # mirrored, left would be right; objects are everywhere already

    def __len__(self):
        return len(self.images)

    @property
    def masks(self) -> np.ndarray:
        """(B, T, H, W) bool: the pixels that belong to any object."""
        return self.instances > 0

    def key_frames(self) -> Scenes:
        """The key frames alone, as pictures with the clips' labels."""
        at = np.arange(len(self)), self.key
        return Scenes(self.images[at], self.labels, self.instances[at], self.boxes[at], self.names)

    def shuffled(self, seed: int = 0) -> "Clips":
        """The same clips, with the frames of each in an order of its own. All orders are equally likely, so
        nothing is left that tells opposites apart."""
        draw = random.uniform(self.images.shape[:2], site="tinytoken.data.clips.order", step=0, seed=seed)
        order = draw.argsort(axis=1)
        rows = np.arange(len(self))[:, None]
        return replace(self, images=self.images[rows, order], instances=self.instances[rows, order],
                       boxes=self.boxes[rows, order], key=(order == self.key[:, None]).argmax(axis=1))


def make_clips(count: int, *, seed: int = 0, split: str = "train", size: int = 32,
               frames: int = FRAMES) -> Clips:
    """Draw `count` clips of `frames` pictures of size x size pixels (see the top of this file).

    Raises InputError for what make_scenes refuses, and for frames outside 1 to 64."""
    check_request("make_clips", count, split, size)
    expect(isinstance(frames, (int, np.integer)) and 1 <= frames <= 64, "make_clips",
           f"frames is {frames!r}, expected an int from 1 to 64")
    clips = Clips(np.empty((count, frames, 3, size, size), "uint8"), np.empty(count, "int64"),
                  np.empty(count, "int64"), np.empty((count, frames, size, size), "uint8"),
                  np.empty((count, frames, 2, 4), "int64"))
    bar = tqdm(total=count, desc=f"drawing clips ({split})", unit="clip", delay=2, leave=False)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        draw = Draws(part.stop - start, seed, f"clips.{split}", start // CHUNK)
        labels = draw.integers("label", (), len(ACTIONS))
        course = _course(draw, labels, frames)
        picture, instances = _paint_frames(draw, course, size)
        clips.labels[part], clips.key[part] = labels, course.key
        clips.images[part] = np.rint(picture.clip(0, 255, out=picture), out=picture).reshape(
            -1, frames, 3, size, size)
        clips.instances[part] = instances.reshape(-1, frames, size, size)
        clips.boxes[part] = boxes_of(instances, 2).reshape(-1, frames, 2, 4)
        bar.update(part.stop - start)
    bar.close()
    return clips


@dataclass(frozen=True)
class Course:
    """The state of clips in each of T frames. key (rows,). Of the actor: centre (rows, T, 2), radius and
    angle (rows, T), colour (rows, T, 3), kind (rows,), which indexes SHAPES. disc (rows, 2): its centre."""
    key: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    colour: np.ndarray
    kind: np.ndarray
    disc: np.ndarray


def _course(draw, labels, frames):
    """What the actors do: labels (rows,) -> Course."""
    key = draw.integers("key", (), frames)
    time = np.arange(frames) - key[:, None]  # of each frame, counted from the key frame
    gone = draw.uniform("speed", (1,), *SPEED) * time.astype("float32")  # shares of a cycle
    does = {name: (labels == i)[:, None].astype("float32") for i, name in enumerate(ACTIONS)}
    start = draw.uniform("start", (4, 1))  # on the cycles of column, row, size and angle
    steps = (does["right"] - does["left"], does["down"] - does["up"], does["grow"] - does["shrink"])
    across, down, size = (on_cycle(start[:, k] + step * gone) for k, step in enumerate(steps))
    way = does["flee"] - does["approach"]
    place, disc = _on_ways(np.stack([across, down], axis=2)), _on_ways(draw.uniform("disc.centre", (2,)))
    centre = np.where(way[:, :, None], _on_ray(place, disc[:, None], way * gone), place)
    spins = does["spin"] * np.where(draw.integers("spin.way", (1,), 2), gone, -gone) * SPUN
    kinds = np.array([NAMES.index(name) for name in ACTORS])[draw.integers("actor", (), len(ACTORS))]
    held = 1 + draw.integers("blink.held", (1,), HELD)
    other = (does["blink"] > 0) & (time // held % 2 == 1)
    colour = np.where(other[:, :, None], *(c[:, None] for c in two_colours(draw, "actor")[::-1]))
    return Course(key, centre, RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size, 2 * math.pi * start[:, 3] + spins,
                  colour, kinds, disc)


def on_cycle(phase: np.ndarray) -> np.ndarray:
    """What has gone beyond the end of its cycle, 1, goes on at the beginning, 0."""
    return phase - np.floor(phase)


def _on_ways(phase):
    """Shares of the way across or down -> centres: there even the largest actor is wholly inside."""
    return RADIUS[1] + (1 - 2 * RADIUS[1]) * phase


def _on_ray(place, disc, gone):
    """Centres at the key frame, place (rows, T, 2), moved on the rays from the disc (rows, 1, 2) through
    them.

    A ray ends at the border of the square of all centres. Of a uniform distribution in the square, what lies
    on a ray is uniform in (distance / length of the ray)^2: that is the quantity on the cycle, moved by
    `gone`."""
    apart = place - disc
    apart = np.where(apart == 0, np.float32(1e-6), apart)
    end = _on_ways((apart > 0).astype("float32"))
    longer = ((end - disc) / apart).min(axis=2, keepdims=True)  # the whole ray, in lengths of `apart`
    share = on_cycle(1 / longer ** 2 + gone[:, :, None])
    return disc + apart * longer * np.sqrt(share)


def two_colours(draw: Draws, whose: str) -> tuple[np.ndarray, np.ndarray]:
    """Two colours (rows, 3) of each actor, each of the palette by the rule of scenes, and not alike."""
    first = draw.integers(f"{whose}.palette", (), len(PALETTE))
    second = first + 1 + draw.integers(f"{whose}.other", (), len(PALETTE) - 1)
    jitter = draw.uniform(f"{whose}.jitter", (2, 3), -JITTER, JITTER)
    return PALETTE[first] + jitter[:, 0], PALETTE[second % len(PALETTE)] + jitter[:, 1]


def flickering(draw: Draws, size: int, frames: int) -> np.ndarray:
    """Background and clutter of clips (rows T, 3, size, size) float32, clip by clip: the background stays, of
    the clutter each piece is there in some of the frames."""
    each = lambda array: np.repeat(array, frames, axis=0)
    picture = each(background(draw, size))
    lit = draw.uniform("clutter.lit", (frames, CLUTTER[1])) < LIT
    for k, (distance, colour) in enumerate(clutter(draw, size, *CLUTTER)):
        distance = each(distance)
        distance[~lit[:, :, k].reshape(-1)] = 1
        paint(picture, distance, each(colour))
    return picture


def _paint_frames(draw, course, size):
    """-> pictures (rows T, 3, size, size) float32 and instances (rows T, size, size), clip by clip."""
    frames = course.centre.shape[1]
    each = lambda array: np.repeat(array, frames, axis=0)
    flat = lambda array: array.reshape(-1, *array.shape[2:])
    picture = flickering(draw, size, frames)
    instances = np.zeros((len(picture), size, size), "uint8")
    disc = np.full(len(picture), NAMES.index("disc"))
    still = each(np.zeros(draw.rows, "float32"))
    coverage = paint_object(picture, disc, each(course.disc), still + DISC, still,
                             each(draw.colours("disc", ())))
    instances[coverage >= 0.5] = 2
    coverage = paint_object(picture, each(course.kind), flat(course.centre), flat(course.radius),
                             flat(course.angle), flat(course.colour))
    instances[coverage >= 0.5] = 1
    return picture, instances


@dataset("clips")
def clips_of_both_splits(place: Any, *, train: int, test: int, seed: int, size: int) -> tuple[Clips, Clips]:
    """Made on the spot."""
    return (make_clips(train, seed=seed, split="train", size=size),
            make_clips(test, seed=seed, split="test", size=size))
