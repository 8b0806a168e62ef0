"""Whether a picture is like those that a model was trained on, by seven measures of its pixels.

A model answers for every picture, also for one that has nothing to do with its classes. So a checkpoint
notes within which bounds each measure lies for nearly all training pictures, and `predict` warns of a picture
outside of any. This finds pictures of another kind. It does not show that the answer is right: a picture
within all bounds can still be another kind of picture.
"""
from typing import Any

import numpy as np

from ..errors import expect

MEASURES = (*(f"{what} of {channel}" for what in ("mean", "standard deviation")
              for channel in ("red", "green", "blue")), "share of even neighbours")
TAIL, MARGIN = 0.001, 0.2  # bounds: these quantiles of the training pictures, and a part of what is between
MOST = 10000  # training pictures that are measured
CHUNK = 1 << 20  # numbers that are measured at a time
EVEN = 1  # neighbours are even if no channel differs by more than this, of 255


def measures(images: np.ndarray) -> np.ndarray:
    """MEASURES of pictures (B, 3, H, W) uint8 -> (B, 7) float64, each in [0, 1].

    The mean and the standard deviation of each channel, and the share of neighbouring pixels that are even:
    drawings have many, photographs and noise few."""
    means, deviations = images.mean(axis=(2, 3)) / 255, images.std(axis=(2, 3)) / 255
    even = [(np.abs(np.diff(images.astype("int16"), axis=axis)) <= EVEN).all(axis=1).mean(axis=(1, 2))
            for axis in (2, 3)]
    return np.column_stack([means, deviations, np.mean(even, axis=0)])


def bounds(images: np.ndarray) -> dict[str, list[float]]:
    """{measure: [low, high]} of training pictures (B, 3, H, W) uint8, or of the frames of clips.

    The quantiles TAIL and 1 - TAIL, and MARGIN of the distance between them beyond each. Of a large set, MOST
    pictures are measured, at equal distances."""
    images = images.reshape(-1, *images.shape[-3:])
    chosen = images[np.linspace(0, len(images) - 1, min(MOST, len(images))).astype(int)]
    step = max(1, CHUNK // chosen[0].size)  # bounds memory
    found = np.concatenate([measures(chosen[start:start + step]) for start in range(0, len(chosen), step)])
    low, high = np.quantile(found, (TAIL, 1 - TAIL), axis=0)
    margin = MARGIN * (high - low)
    ends = np.column_stack([low - margin, high + margin]).clip(0, 1)
    return {name: [round(end, 4) for end in pair] for name, pair in zip(MEASURES, ends.tolist())}


def outside(image: np.ndarray, known: dict[str, Any]) -> list[str]:
    """A text for each measure of the picture (3, H, W) uint8 that lies outside of its bounds in `known`.

    Measures that `known` lacks are left out. Raises InputError for bounds of another form."""
    expect(isinstance(known, dict), "likeness", f"{known!r}, expected {{measure: [low, high]}}")
    found = []
    for name, value in zip(MEASURES, measures(image[None])[0]):
        if name in known:
            ends = known[name]
            number = isinstance(ends, list) and [type(end) for end in ends] in ([float] * 2, [int] * 2)
            expect(number, "likeness", f"bounds {ends!r} of the {name}, expected two numbers")
            low, high = ends
            if not low <= value <= high:
                found.append(f"{name} {value:.2f}, there {low:.2f} to {high:.2f}")
    return found
