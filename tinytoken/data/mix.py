"""What may be done to a batch of normalised pictures after the crop: a rectangle of each is erased, or
pictures are mixed in pairs.

Every choice is a pure function of (seed, step, number of the picture), with the same bits on NumPy and CuPy.
Pictures are mixed with the batch in reverse order: batches are shuffled, so any partner is as good as
another.
"""
import functools

import numpy as np

from .. import random
from ..backend import array_module, faster
from ..errors import expect

AREA, ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)  # of an erased rectangle: Zhong et al., section 4.1
SITE = "tinytoken.data.mix."


def erase(images, share, *, step, seed):
    """Random erasing (Zhong et al. 2020, algorithm 1) with the mean colour, which is 0 here: in a `share` of
    the pictures a rectangle. images (B, C, H, W) float -> a new array. Its area is uniform in AREA of the
    picture's, its aspect ratio (height over width) log-uniform in ASPECT; one that sticks out is cut, where
    the paper draws again."""
    boxes = erased_boxes(images, share, step, seed)
    fast = faster(blank, array_module(images), images, boxes)
    return (fast or blank)(images, boxes)


def blank(images, boxes):
    """The images with the mean colour, 0, in their rectangles (4, B)."""
    xp = array_module(images)
    return xp.where(_inside(images, boxes)[:, None], xp.zeros((), images.dtype), images)


def erased_boxes(images, share, step, seed):
    """The rectangles that `erase` erases, (4, B): first row, the row after the last, and columns likewise. Of
    pictures that are left whole they are empty."""
    xp, (count, _, height, width) = array_module(images), images.shape
    draw = random.uniform((count, 5), site=SITE + "erase", step=step, seed=seed, xp=xp, dtype="float64")
    area = (AREA[0] + (AREA[1] - AREA[0]) * draw[:, 1]) * (height * width)
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draw[:, 2]
    tall, wide = xp.minimum(xp.rint(xp.sqrt(area * aspect)),
                            height), xp.minimum(xp.rint(xp.sqrt(area / aspect)), width)
    top, left = xp.floor(draw[:, 3] * (height - tall + 1)), xp.floor(draw[:, 4] * (width - wide + 1))
    return xp.stack([top, top + tall * (draw[:, 0] < share), left, left + wide])


def mixup(images, targets, alpha, *, step, seed):
    """mixup (Zhang et al. 2018, section 2): x_i <- l_i x_i + (1 - l_i) x_j, and so the targets (B, K), l_i ~
    Beta(alpha, alpha) for each picture -> new arrays."""
    kept = mixup_shares(images, alpha, step, seed)
    whole = kept[:, None, None, None]
    return images * whole + images[::-1] * (1 - whole), _mixed(targets, kept)


def cutmix(images, targets, alpha, *, step, seed):
    """CutMix (Yun et al. 2019, section 3.1): a rectangle of x_j, of the picture's aspect ratio and share 1 -
    l of its area, around a point that is uniform in the picture, comes into x_i; l ~ Beta(alpha, alpha).
    Targets (B, K) are mixed by the area that is left after the rectangle is cut at the border -> new
    arrays."""
    xp, inside = array_module(images), _inside(images, cutmix_boxes(images, alpha, step, seed))
    kept = 1 - inside.mean(axis=(1, 2), dtype=images.dtype)
    return xp.where(inside[:, None], images[::-1], images), _mixed(targets, kept)


def mixup_shares(images, alpha, step, seed):
    """What `mixup` keeps of each picture (B,)."""
    return _kept(images, alpha, "mixup", step, seed).astype(images.dtype)


def cutmix_boxes(images, alpha, step, seed):
    """The rectangles that `cutmix` pastes, (4, B) as in erased_boxes."""
    xp, (count, _, height, width) = array_module(images), images.shape
    side = xp.sqrt(1 - _kept(images, alpha, "cutmix", step, seed))
    centre = random.uniform((count, 2), site=SITE + "centre", step=step, seed=seed, xp=xp, dtype="float64")
    edges = []
    for middle, length in ((centre[:, 0], height), (centre[:, 1], width)):
        half, middle = xp.floor(side * length) / 2, xp.floor(middle * length)
        edges += [xp.maximum(xp.ceil(middle - half), 0), xp.minimum(xp.ceil(middle + half), length)]
    return xp.stack(edges)


WAYS = {"mixup": mixup, "cutmix": cutmix}


def mixed(images, labels, classes, ways, site, *, step, seed):
    """Pictures, and targets of their labels (B,), mixed in one of the `ways`, {name: alpha}, which is drawn
    from `site` for the whole batch -> (images, targets (B, classes))."""
    arguments, draw = (images, labels, classes, ways, site), dict(step=step, seed=seed)
    fast = faster(mixed, array_module(images), *arguments, **draw)
    if fast:
        return fast(*arguments, **draw)
    number = random.integers(1, len(ways), site=site, **draw)
    name, alpha = list(ways.items())[int(number[0])]
    return WAYS[name](images, one_hot(labels, classes), alpha, **draw)


def one_hot(labels, classes, dtype="float32"):
    """Labels (B,) -> targets (B, classes)."""
    return (labels[:, None] == array_module(labels).arange(classes)).astype(dtype)


def _kept(images, alpha, what, step, seed):
    """Draws of Beta(alpha, alpha), one for each picture. float64, so that what is rounded is rounded alike on
    every device."""
    xp = array_module(images)
    u = random.uniform(len(images), site=SITE + what, step=step, seed=seed, xp=xp, dtype="float64")
    return xp.interp(u, *_beta_table(alpha, xp))


@functools.lru_cache(maxsize=32)
def _beta_table(alpha, xp):
    """`beta_quantiles` on the device, where it is copied to once."""
    return tuple(xp.asarray(array) for array in beta_quantiles(alpha))


def beta_quantiles(alpha, points=2049):
    """The quantile function of Beta(alpha, alpha) as a table (u, x), both from 0 to 1, for linear
    interpolation.

    On [0, 1/2] put x = s^(1/alpha) / 2. Then the density x^(alpha - 1) (1 - x)^(alpha - 1) dx is (1 -
    x)^(alpha - 1) ds up to a constant: smooth, also where alpha < 1 and the density itself is infinite at 0.
    The other half is its mirror image."""
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
    """(B, H, W): True inside of each picture's rectangle."""
    xp, (height, width), (top, bottom, left, right) = array_module(images), images.shape[2:], boxes
    rows, columns = xp.arange(height), xp.arange(width)
    return (((rows >= top[:, None]) & (rows < bottom[:, None]))[:, :, None]
            & ((columns >= left[:, None]) & (columns < right[:, None]))[:, None, :])
