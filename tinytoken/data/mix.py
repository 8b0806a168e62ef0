"""What may be done to a batch of normalised pictures after the crop: erasing a rectangle, mixing in pairs.

Every choice is a pure function of (seed, step, place in the batch), with the same bits on NumPy and CuPy.
Pictures are mixed with the batch in reverse order: batches are shuffled, so every partner is as good.
"""
import functools
import math
from typing import Any

import numpy as np

from .. import random
from ..backend import Array, array_module
from ..errors import expect
from ..tensor import fused

AREA, ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)  # of an erased rectangle: Zhong et al., section 4.1
SITE = "tinytoken.data.mix."


def erase(images: Array, share: float, *, step: int, seed: int) -> Array:
    """Random erasing (Zhong et al. 2020, algorithm 1): a rectangle, in a `share` of the pictures, gets the
    mean colour, which is 0 here. images (B, C, H, W) float -> a new array.

    The rectangle's area, as a share of the picture's, is uniform in AREA; its aspect ratio (height over
    width) is log-uniform in ASPECT. One that sticks out is cut; the paper draws again."""
    return blank(images, erased_boxes(images, share, step, seed))


@fused
def blank(images: Array, boxes: Array) -> Array:
    """The images with the mean colour, 0, in their rectangles (4, B)."""
    xp = array_module(images)
    return xp.where(_inside(images, boxes)[:, None], xp.zeros((), images.dtype), images)


def erased_boxes(images: Array, share: float, step: int, seed: int) -> Array:
    """The rectangles that `erase` erases, (4, B): first row, the row after the last, and columns likewise.

    For a picture that is left whole the rectangle is empty."""
    xp, (count, _, height, width) = array_module(images), images.shape
    draw = random.uniform((count, 5), site=SITE + "erase", step=step, seed=seed, xp=xp, dtype="float64")
    area = (AREA[0] + (AREA[1] - AREA[0]) * draw[:, 1]) * (height * width)
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draw[:, 2]
    tall = xp.minimum(xp.rint(xp.sqrt(area * aspect)), height)
    wide = xp.minimum(xp.rint(xp.sqrt(area / aspect)), width)
    top, left = xp.floor(draw[:, 3] * (height - tall + 1)), xp.floor(draw[:, 4] * (width - wide + 1))
    return xp.stack([top, top + tall * (draw[:, 0] < share), left, left + wide])


def mixup(images: Array, targets: Array, alpha: float, *, step: int, seed: int) -> tuple[Array, Array]:
    """mixup (Zhang et al. 2018, section 2): x_i <- l_i x_i + (1 - l_i) x_j, and the targets (B, K) likewise
    -> new arrays. l_i ~ Beta(alpha, alpha), for each picture."""
    kept = mixup_shares(images, alpha, step, seed)
    whole = kept[:, None, None, None]
    return images * whole + images[::-1] * (1 - whole), _mixed(targets, kept)


def cutmix(images: Array, targets: Array, alpha: float, *, step: int, seed: int) -> tuple[Array, Array]:
    """CutMix (Yun et al. 2019, section 3.1): a rectangle of x_i is replaced by that of x_j -> new arrays.

    It has the picture's aspect ratio and the share 1 - l of its area, l ~ Beta(alpha, alpha), around a point
    that is uniform in the picture. The targets (B, K) are mixed by the area that is left after the rectangle
    is cut at the border."""
    return paste(images, targets, cutmix_boxes(images, alpha, step, seed))


def paste(images: Array, targets: Array, boxes: Array) -> tuple[Array, Array]:
    """What `cutmix` does, with the rectangles (4, B) of `cutmix_boxes`."""
    pasted = _inside(images, boxes)
    kept = 1 - pasted.mean(axis=(1, 2), dtype=images.dtype)
    return array_module(images).where(pasted[:, None], images[::-1], images), _mixed(targets, kept)


def mixup_shares(images: Array, alpha: float, step: int, seed: int) -> Array:
    """The share that `mixup` keeps of each picture, (B,)."""
    return _kept(images, alpha, "mixup", step, seed).astype(images.dtype)


def cutmix_boxes(images: Array, alpha: float, step: int, seed: int) -> Array:
    """The rectangles that `cutmix` pastes, (4, B) as in erased_boxes."""
    xp, (count, _, height, width) = array_module(images), images.shape
    side = xp.sqrt(1 - _kept(images, alpha, "cutmix", step, seed))
    centre = random.uniform((count, 2), site=SITE + "centre", step=step, seed=seed, xp=xp, dtype="float64")
    edges = []
    for middle, length in ((centre[:, 0], height), (centre[:, 1], width)):
        half, middle = xp.floor(side * length) / 2, xp.floor(middle * length)
        edges += [xp.maximum(xp.ceil(middle - half), 0), xp.minimum(xp.ceil(middle + half), length)]
    return xp.stack(edges)


def exchange(images: Array, weights: Array, partner: Array, order: Array) -> tuple[Array, Array, Array]:
    """Overwrite the half of each picture's cells that is lowest in `order` by the half of its partner's that
    is highest: the best of the one goes to the best place among the other's low ones, and so on.

    images (B, C, H, W), weights and order (B, cells), partner (B,) -> mixed pictures, the weight of what is
    kept of the picture (B,), the weight in the partner of what is taken (B,). The two need not sum to 1.
    (Zhang et al. 2022, arXiv 2203.12816, section 3.2.)"""
    xp, (batch, channels, height, width) = array_module(images), images.shape
    side = math.isqrt(weights.shape[1])
    ranked = xp.argsort(-order, axis=1, kind="stable")
    high, low = ranked[:, :side * side // 2], ranked[:, side * side // 2:]
    cut = images.reshape(batch, channels, side, height // side, side, width // side)
    cut = cut.transpose(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    rows, cells = xp.arange(batch)[:, None], cut.copy()
    cells[rows, low] = cut[partner[:, None], high[partner]]
    cells = cells.reshape(batch, side, side, channels, height // side, width // side)
    mixed = cells.transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)
    kept = 1 - xp.take_along_axis(weights, low, axis=1).sum(axis=1)
    return mixed, kept, xp.take_along_axis(weights, high, axis=1).sum(axis=1)[partner]


WAYS = {"mixup": mixup, "cutmix": cutmix}


@fused
def mixed(images: Array, labels: Array, classes: Any, ways: dict[str, float], site: str, *, step: int,
          seed: int) -> tuple[Array, Array]:
    """Pictures, and targets made of their labels (B,), mixed -> (images, targets (B, classes)).

    The whole batch is mixed in one of the `ways`, {name: alpha}, which is drawn from `site`."""
    way = random.integers(1, len(ways), site=site, step=step, seed=seed)
    name, alpha = list(ways.items())[int(way[0])]
    return WAYS[name](images, one_hot(labels, classes), alpha, step=step, seed=seed)


def one_hot(labels: Array, classes: int, dtype: str = "float32") -> Array:
    """Labels (B,) -> targets (B, classes)."""
    return (labels[:, None] == array_module(labels).arange(classes)).astype(dtype)


def _kept(images, alpha, what, step, seed):
    """Draws of Beta(alpha, alpha), one for each picture. They are float64, so that edges of rectangles, which
    are rounded to whole pixels, are the same on every device."""
    xp = array_module(images)
    u = random.uniform(len(images), site=SITE + what, step=step, seed=seed, xp=xp, dtype="float64")
    return xp.interp(u, *_beta_table(alpha, xp))


@functools.lru_cache(maxsize=32)
def _beta_table(alpha, xp):
    """`beta_quantiles`, copied to the device once."""
    return tuple(xp.asarray(array) for array in beta_quantiles(alpha))


def beta_quantiles(alpha: float, points: int = 2049) -> tuple[np.ndarray, np.ndarray]:
    """The quantile function of Beta(alpha, alpha) as a table (u, x), both from 0 to 1, to be interpolated.

    On [0, 1/2] put x = s^(1/alpha) / 2. Then, up to a constant, the density x^(alpha - 1) (1 - x)^(alpha - 1)
    dx is (1 - x)^(alpha - 1) ds. That is smooth even for alpha < 1, where the density itself is infinite at
    0. The other half is the mirror image."""
    expect(alpha > 0, "beta_quantiles", f"alpha {alpha}, expected a positive number")
    s = np.linspace(0, 1, points) ** max(1.0, alpha)  # dense near 0 where x rises steeply there
    x = 0.5 * s ** (1 / alpha)
    slope = (1 - x) ** (alpha - 1)
    u = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(s))])
    u *= 0.5 / u[-1]
    return np.concatenate([u, 1 - u[-2::-1]]), np.concatenate([x, 1 - x[-2::-1]])


def _mixed(targets, kept):
    return targets * kept[:, None] + targets[::-1] * (1 - kept)[:, None]


def _inside(images, boxes):
    """(B, H, W): True inside each picture's rectangle."""
    xp, (height, width) = array_module(images), images.shape[2:]
    top, bottom, left, right = boxes[:, :, None]
    rows, columns = xp.arange(height), xp.arange(width)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]
