"""Clips with one or two actors, each of which does something: the clips face of scenes for methods that are
told where the actors are in the key frame, and are asked what each of them does.

An actor is one of the shapes of clips and does one of their eleven actions. Nine are the actor's own: left,
right, up, down, grow, shrink, spin, blink, still. Two are about the other actor: approach, flee. Of two
actors the first does one of these in half of the clips, and then the second stays in its place.

An actor that approaches or flees goes along a segment, whose ends and direction are drawn: after the end it
goes on at the beginning. The other actor stands on the segment's line, beyond one of its two ends. If it is
the end that the first one goes to, the first one approaches, else it flees. Which end it is, is the toss of a
coin. So nothing that the actor itself does in the clip tells the two apart, only together with the other
actor's place; nor does any single frame, for the actor is anywhere on the segment with the same probability.
The segment lies askew (30 to 60 degrees), so that these two are not taken for left, right, up or down.

All quantities move around cycles, as in clips. The key frame is the middle one, number T // 2.
"""
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from ..errors import expect
from .clips import ACTIONS, ACTORS, FRAMES, HELD, SPEED, SPUN, flickering, on_cycle, two_colours
from .scenes import NAMES, Draws, boxes_of, check_request, paint_object
from .sets import dataset

CONTEXT = ("approach", "flee")
OWN = tuple(name for name in ACTIONS if name not in CONTEXT)
IN_PLACE = ("grow", "shrink", "spin", "blink", "still")  # where an actor does not leave its place
ALONE = 1 / 4  # share of the clips with one actor
RADIUS = (0.09, 0.15)  # of the circle around an actor; in the picture's side, as all lengths
HALF, GAP = 0.15, 0.24  # of the segment: half of its length, and from its end to the other actor
FASTER = 1.5  # how much faster an actor goes around the segment than around other cycles
CHUNK = 32  # clips drawn at a time
NOBODY = -1  # the action of an actor that is not there


@dataclass(frozen=True)
class ActorClips:
    """A set of B clips of T frames with up to two actors.

    images (B, T, 3, H, W) uint8. labels (B, 2, 5) int64, of each actor: its box in the key frame (left, top,
    right, bottom) in pixels, right and bottom excluded, and what it does, an index into `names`; zeros and
    NOBODY for an actor that is not there. key (B,) int64: the key frame. instances (B, T, H, W) uint8: k for
    the pixels of actor k that are not behind another, 0 elsewhere. boxes (B, T, 2, 4) int64: of what is
    seen of each."""
    images: np.ndarray
    labels: np.ndarray
    key: np.ndarray
    instances: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...] = ACTIONS
    moves: ClassVar[dict] = {}  # mirrored, left would be right; moved, the boxes would be elsewhere

    def __len__(self):
        return len(self.images)

    @property
    def masks(self) -> np.ndarray:
        """(B, T, H, W) bool: the pixels that belong to any actor."""
        return self.instances > 0

    def tubelet_share(self, tubelet: tuple[int, int, int], actor: int) -> np.ndarray:
        """(B, N) float32: the share of each tubelet's pixels that belong to an actor, 1 or 2; in the order of
        the tokens of a model of clips."""
        (t, p, q), (B, T, H, W) = tubelet, self.instances.shape
        expect(T % t == H % p == W % q == 0, "tubelet_share",
               f"tubelets {tubelet} do not divide clips of {T} frames of {H} x {W}")
        cells = (self.instances == actor).reshape(B, T // t, t, H // p, p, W // q, q)
        return cells.mean(axis=(2, 4, 6), dtype="float32").reshape(B, -1)


def make_actors(count: int, *, seed: int = 0, split: str = "train", size: int = 32,
                frames: int = FRAMES) -> ActorClips:
    """Draw `count` clips of `frames` pictures of size x size pixels (see the top of this file).

    Raises InputError for what make_scenes refuses, and for frames outside 2 to 64."""
    check_request("make_actors", count, split, size)
    expect(isinstance(frames, (int, np.integer)) and 2 <= frames <= 64, "make_actors",
           f"frames is {frames!r}, expected an int from 2 to 64")
    clips = ActorClips(np.empty((count, frames, 3, size, size), "uint8"), np.empty((count, 2, 5), "int64"),
                       np.full(count, frames // 2), np.empty((count, frames, size, size), "uint8"),
                       np.empty((count, frames, 2, 4), "int64"))
    bar = tqdm(total=count, desc=f"drawing clips ({split})", unit="clip", delay=2, leave=False)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        draw = Draws(part.stop - start, seed, f"actors.{split}", start // CHUNK)
        actions = _actions(draw)
        picture, instances = _paint_frames(draw, size, *_course(draw, actions, frames))
        clips.images[part] = np.rint(picture.clip(0, 255, out=picture), out=picture).reshape(
            -1, frames, 3, size, size)
        clips.instances[part] = instances.reshape(-1, frames, size, size)
        clips.boxes[part] = boxes_of(instances, 2).reshape(-1, frames, 2, 4)
        clips.labels[part, :, :4], clips.labels[part, :, 4] = clips.boxes[part, frames // 2], actions
        bar.update(part.stop - start)
    bar.close()
    return clips


def _actions(draw):
    """What the two actors do (rows, 2): the second may be NOBODY."""
    among = lambda what, names: np.array([ACTIONS.index(name) for name in names])[
        draw.integers(what, (), len(names))]
    alone = draw.uniform("alone", ()) < ALONE
    related = ~alone & (draw.uniform("related", ()) < 0.5)
    first = np.where(related, among("context", CONTEXT), among("own", OWN))
    second = np.where(related, among("in place", IN_PLACE), among("own of the other", OWN))
    return np.stack([first, np.where(alone, NOBODY, second)], axis=1)


def _course(draw, actions, frames):
    """The state of both actors in each of T frames: centre (rows, 2, T, 2), radius and angle (rows, 2, T),
    colour (rows, 2, T, 3), kind (rows, 2), which indexes SHAPES or is -1."""
    time = np.arange(frames) - frames // 2
    gone = draw.uniform("speed", (2, 1), *SPEED) * time.astype("float32")
    does = {name: (actions == i)[:, :, None].astype("float32") for i, name in enumerate(ACTIONS)}
    start = draw.uniform("start", (4, 2, 1))
    steps = (does["right"] - does["left"], does["down"] - does["up"], does["grow"] - does["shrink"])
    across, down, size = (on_cycle(start[:, k] + step * gone) for k, step in enumerate(steps))
    centre = _inside(np.stack([across, down], axis=3))
    related = (does["approach"] + does["flee"])[:, :1, :, None] > 0
    way, stands = _on_segment(draw, (does["approach"] - does["flee"])[:, 0], gone[:, 0])
    centre = np.where(related, np.stack([way, np.broadcast_to(stands[:, None], way.shape)], axis=1), centre)
    turns = np.where(draw.integers("spin.way", (2, 1), 2), gone, -gone)
    kind = np.array([NAMES.index(name) for name in ACTORS])[draw.integers("actor", (2,), len(ACTORS))]
    held = 1 + draw.integers("blink.held", (2, 1), HELD)
    other = (does["blink"] > 0) & (time // held % 2 == 1)
    one, another = (np.stack(both, axis=1)[:, :, None] for both in zip(
        two_colours(draw, "actor"), two_colours(draw, "second")))
    return (centre, RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size,
            2 * np.pi * start[:, 3] + does["spin"] * turns * SPUN, np.where(other[..., None], another, one),
            np.where(actions == NOBODY, -1, kind))


def _inside(share):
    """Shares of the way across or down -> places: there even the largest actor is wholly inside."""
    return RADIUS[1] + (1 - 2 * RADIUS[1]) * share


def _on_segment(draw, sign, gone):
    """The segment (see the top of this file): where the first actor is (rows, T, 2), and where the second one
    stands (rows, 2). sign (rows, 1): 1 where the first one approaches, -1 where it flees."""
    askew = np.pi / 6 + draw.uniform("segment.angle", (), 0, np.pi / 6)
    angle = askew + draw.integers("segment.quarter", (), 4) * (np.pi / 2)
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # the way that it goes
    reach = np.abs(along) * (HALF + GAP)
    low, high = RADIUS[1] + reach, 1 - RADIUS[1] - reach
    middle = low + (high - low) * draw.uniform("segment.middle", (2,))
    share = on_cycle(draw.uniform("segment.start", (1,)) + FASTER * gone)
    way = middle[:, None] + along[:, None] * ((2 * share - 1) * HALF)[:, :, None]
    return way, middle + along * sign * (HALF + GAP)


def _paint_frames(draw, size, centre, radius, angle, colour, kind):
    """-> pictures (rows T, 3, size, size) float32 and instances (rows T, size, size), clip by clip. The first
    actor is before the second."""
    frames = radius.shape[2]
    each = lambda array: np.repeat(array, frames, axis=0)
    flat = lambda array: array.reshape(-1, *array.shape[2:])
    picture = flickering(draw, size, frames)
    instances = np.zeros((len(picture), size, size), "uint8")
    for k in (1, 0):
        coverage = paint_object(picture, each(kind[:, k]), *(flat(of[:, k]) for of in (centre, radius, angle,
                                                                                      colour)))
        instances[coverage >= 0.5] = k + 1
    return picture, instances


@dataset("actor_clips")
def actors_of_both_splits(place: Any, *, train: int, test: int, seed: int, size: int) -> tuple[ActorClips,
                                                                                              ActorClips]:
    """Made on the spot."""
    return (make_actors(train, seed=seed, split="train", size=size),
            make_actors(test, seed=seed, split="test", size=size))
