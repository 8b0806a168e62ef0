"""Nine corruptions at five strengths, like CIFAR-10-C's (Hendrycks & Dietterich 2019, arXiv 1903.12261).

"Theirs" below is their script for 32 x 32 pictures, github.com/hendrycks/robustness,
ImageNet-C/create_c/make_cifar_c.py; each docstring says what is theirs and what is ours. So accuracies
measured here are not CIFAR-10-C accuracies. Where theirs computes in floats, it then cuts off the fraction of
a level, which darkens by half a level on average; ours rounds.

Picture i's draws are a pure function of (corruption, seed, i). They are the same at each strength, so that
strengths differ in nothing but strength. The random bits are the same everywhere. What float32 makes of them
is the same on one machine; another NumPy or BLAS may round the last bit differently, and so move a pixel by a
level now and then.
"""
import functools
import math
from typing import Any

import numpy as np

from .. import random
from ..errors import expect, shape_of

CORRUPTIONS: dict = {}  # {name: (function, its setting at strengths 1 to 5)}
CHUNK = 64  # pictures at a time: bounds memory and fits the cache. Another chunk makes the same pictures.
GUIDES = 1024  # places in the table of Poisson counts from which a search starts

# ITU-T T.81 (JPEG), tables K.1 and K.2: at quality 50, the steps that the 8 x 8 cosine coefficients are
# rounded to.
LUMINANCE = np.array([[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
                      [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
                      [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
                      [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]])
CHROMINANCE = np.full((8, 8), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# ITU-T T.871 (JFIF): red, green, blue -> Y, Cb, Cr; without the 128 that is added to Cb and Cr.
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.299 / 1.772, -0.587 / 1.772, 0.5],
                  [0.5, -0.587 / 1.402, -0.114 / 1.402]])


def corrupt(images: np.ndarray, name: str, strength: int, seed: int = 0, first: int = 0) -> np.ndarray:
    """images uint8 (B, 3, H, W) -> new uint8 (B, 3, H, W), corrupted by CORRUPTIONS[name] at strength 1 to 5.

    first: the index of images[0] in its set, so that a part of a set is corrupted as it is in the whole:
    corrupt(images[a:b], ..., first=a) equals corrupt(images, ...)[a:b]. Raises InputError for other images,
    or H or W below 8; an unknown name; a strength, seed or first out of range.
    """
    whole = (int, np.integer)
    expect(isinstance(images, np.ndarray), "corrupt",
           f"images is a {type(images).__name__}, expected a NumPy array")
    ok = images.dtype == "uint8" and images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
    expect(ok and min(images.shape[2:]) >= 8, "corrupt",
           f"{shape_of('images', images)} {images.dtype}, "
           f"expected (B, 3, H, W) uint8, H and W at least 8")
    expect(name in tuple(CORRUPTIONS), "corrupt",
           f"name is {name!r}, expected one of {', '.join(CORRUPTIONS)}")
    expect(isinstance(strength, whole) and 1 <= strength <= 5, "corrupt",
           f"strength is {strength!r}, expected an int from 1 to 5")
    expect(isinstance(seed, whole) and 0 <= seed < 2**64, "corrupt",
           f"seed is {seed!r}, expected 0 <= int < 2**64")
    # `first` counts pictures for the draws, which do so in 32 bits
    expect(isinstance(first, whole) and 0 <= first <= 2**32 - len(images), "corrupt",
           f"first is {first!r} with {len(images)} images, expected an int from 0 to 2**32 - {len(images)}")
    function, settings = CORRUPTIONS[name]
    out = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = images[start:start + CHUNK]
        draw = functools.partial(_draw, name, seed, range(first + start, first + start + len(part)))
        x = function(part.astype("float32") / 255, settings[strength - 1], draw)
        out[start:start + CHUNK] = np.rint(255 * x.clip(0, 1))
    return out


def _draw(name, seed, indices, distribution, *shape):
    """(B, *shape) float32: for each picture, a draw from `distribution` (random.uniform, random.normal)."""
    return np.stack([distribution(shape, site=f"tinytoken.data.corruptions.{name}", step=i, seed=seed)
                     for i in indices])


def _strengths(*settings):
    """Enter a function into CORRUPTIONS.

    It takes float32 x (B, 3, H, W) in 0 to 1, the setting of the strength, and draw(distribution, *shape), as
    above. It returns an array of x's shape, whose values may lie outside 0 to 1."""
    def register(function):
        CORRUPTIONS[function.__name__] = function, settings
        return function
    return register


@_strengths(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(x: np.ndarray, std: float, draw: Any) -> np.ndarray:
    """x + std z, z standard normal. Definition and strengths are theirs."""
    return x + std * draw(random.normal, *x.shape[1:])


@_strengths(500, 250, 100, 75, 50)
def shot_noise(x: np.ndarray, photons: int, draw: Any) -> np.ndarray:
    """Poisson(photons x) / photons: each pixel counts photons, a white one `photons` on average. Definition
    and strengths are theirs.

    The draw inverts the distribution function: it is the least count whose cdf is at least u, exact to u's
    2**-23. A pixel has one of 256 levels, so the cdf is a table. The search starts from a second table, at
    the count of the nearest lower u."""
    cdf, guide = _poisson(photons)
    level, u = np.rint(255 * x).astype("int64").ravel(), draw(random.uniform, *x.shape[1:]).ravel()
    place = level * (photons + 1) + guide[level, (u * GUIDES).astype("int64")]
    low = np.arange(u.size)
    while low.size:  # a hundred rounds or so, but after the first few almost none are left
        low = low[cdf[place[low]] < u[low]]
        place[low] += 1
    return (place % (photons + 1) / photons).astype("float32").reshape(x.shape)


@functools.lru_cache
def _poisson(photons):
    """cdf (256 (photons + 1),): P(count <= k) at level v is at v (photons + 1) + k; it is 1 at k = photons,
    since more is white, too. guide (256, GUIDES): the least count k with cdf >= j / GUIDES.

    In float64, because 1 - cdf becomes small."""
    rate = np.maximum(np.arange(256) / 255 * photons, 1e-30)[:, None]  # not 0, whose log is not finite
    steps = np.log(rate / np.arange(1, photons + 1))  # log P(k) - log P(k - 1)
    cdf = np.exp(np.concatenate([-rate, steps], axis=1).cumsum(axis=1)).cumsum(axis=1)
    cdf[:, -1] = 1
    return cdf.ravel(), np.stack([np.searchsorted(row, np.arange(GUIDES) / GUIDES) for row in cdf])


@_strengths(1, 1.5, 2, 2.25, 2.5)
def motion_blur(x: np.ndarray, std: float, draw: Any) -> np.ndarray:
    """Each pixel becomes a mean of those on a line from it to the right, weighted by half a Gaussian of their
    distance. The line's angle is uniform in -45 to 45 degrees: one pixel in each column. The border is
    repeated.

    Theirs is ImageMagick's blur, half a Gaussian, too, with (radius, std) = (6, 1), (6, 1.5), (6, 2), (8, 2),
    (9, 2.5). The strengths here are ours: std alone, since the radius hardly matters, with 2.25 for their
    second 2; the line ends at 4 std."""
    reach = math.ceil(4 * std)
    across = np.arange(reach + 1)
    slope = np.tan(math.pi / 4 * (2 * draw(random.uniform) - 1))[:, None]
    down = np.rint(slope * across).astype("int64")  # (B, taps)
    weights = np.exp(-0.5 * (1 + slope**2) * (across / std)**2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype("float32")
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    # shifted: a view (B, 3, shifts, shifts, H, W)
    shifted = np.lib.stride_tricks.sliding_window_view(padded, x.shape[2:], axis=(2, 3))
    out = np.zeros_like(x)
    for i in across:
        out += weights[:, i, None, None, None] * shifted[np.arange(len(x)), :, reach + down[:, i], reach + i]
    return out


@_strengths((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
def defocus_blur(x: np.ndarray, setting: tuple[float, float], draw: Any) -> np.ndarray:
    """Convolution with a small, softened disc; the border is mirrored. Definition and strengths (radius,
    softness) are theirs."""
    kernel, (height, width) = _disc(*setting), x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    out = np.zeros_like(x)
    for i, j in np.argwhere(kernel):
        out += float(kernel[i, j]) * padded[:, :, i:i + height, j:j + width]
    return out


def _disc(radius, softness):
    """(5, 5): constant over the pixels within `radius` of the middle, then blurred along each axis by a
    Gaussian of std `softness` with three taps."""
    at = np.arange(-2, 3)
    kernel = (at[:, None]**2 + at**2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * (np.arange(-1, 2) / softness)**2)
    for axis in (0, 1):
        kernel = np.apply_along_axis(np.convolve, axis, kernel, taps, mode="same")
    return kernel / kernel.sum()


@_strengths(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(x: np.ndarray, factor: float, draw: Any) -> np.ndarray:
    """Differences from each picture's and channel's mean, times factor. Definition and strengths: theirs."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return mean + factor * (x - mean)


@_strengths(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(x: np.ndarray, more: float, draw: Any) -> np.ndarray:
    """HSV's V, the largest channel, grows by `more`, to at most 1, at the same hue and saturation: all
    channels grow by one factor, and black becomes grey. Definition and strengths are theirs; this form saves
    the way to HSV and back."""
    value = x.max(axis=1, keepdims=True)
    colour = np.where(value > 0, x / np.maximum(value, 1e-6), 1)  # with V = 1
    return colour * np.minimum(value + more, 1)


@_strengths((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
def haze(x: np.ndarray, setting: tuple[float, float], draw: Any) -> np.ndarray:
    """x + amount fog, scaled so that the picture's maximum stays; fog is smooth noise from 0 to 1. Form and
    strengths (amount, decay) are those of their "fog".

    The noise is ours: normal draws, whose frequencies f are weighted by f**-(1 + 2 log2 decay). So its
    amplitude falls by decay**2 from octave to octave, as that of their diamond-square fractal does."""
    amount, decay = setting
    height, width = x.shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width))
    frequency[0, 0] = math.inf  # no mean
    weights = (frequency**-(1 + 2 * math.log2(decay))).astype("float32")
    spectrum = np.fft.rfft2(draw(random.normal, height, width)) * weights
    fog = np.fft.irfft2(spectrum, s=(height, width))[:, None]
    fog -= fog.min(axis=(2, 3), keepdims=True)
    fog /= fog.max(axis=(2, 3), keepdims=True)
    white = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + amount * fog) * (white / (white + amount))


@_strengths(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(x: np.ndarray, share: float, draw: Any) -> np.ndarray:
    """The picture is cut into int(share H) x int(share W) cells. A pixel belongs to the cell in which its
    centre lies, and becomes the mean of its cell. Definition and strengths are theirs; there it is two calls
    of Pillow's box resize, with a rounding between them."""
    rows, columns = (_cell_means(n, int(share * n)) for n in x.shape[2:])
    return rows @ x @ columns.T


def _cell_means(size, cells):
    """(size, size) float32: times a line of pixels, it gives the mean of each pixel's cell."""
    cell = np.floor((np.arange(size) + 0.5) / size * cells)
    same = (cell[:, None] == cell).astype("float32")
    return same / same.sum(axis=1, keepdims=True)


@_strengths(80, 65, 58, 50, 40)
def jpeg(x: np.ndarray, quality: int, draw: Any) -> np.ndarray:
    """What JPEG does to the pixels: colours to Y, Cb, Cr; each 8 x 8 block to cosine coefficients (ITU-T
    T.81, A.3.3); these rounded to multiples of table K.1 (Y) or K.2 (Cb, Cr); and back.

    Qualities are theirs, the code is ours. Chroma keeps its resolution, which Pillow's files halve by
    default. Y, Cb, Cr are not rounded: that would put many coefficients just between two multiples, where the
    last bit decides. The entropy code is left out: it would change nothing."""
    return _quantised(255 * x, _tables(quality)) / 255


def _tables(quality):
    """(3, 8, 8): K.1 and twice K.2, scaled as in libjpeg: by 200 - 2 quality per cent; below quality 50, by
    5000 / quality per cent."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((np.stack([LUMINANCE, CHROMINANCE, CHROMINANCE]) * scale + 50) // 100).clip(1, 255)


def _quantised(x, tables):
    """x (B, 3, H, W), from 0 to 255, taken to coefficients, rounded to multiples of the tables (3, 8, 8) for
    Y, Cb, Cr, and taken back."""
    B, _, height, width = x.shape
    x = np.pad(x, ((0, 0), (0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")  # whole blocks
    # one cosine transform per block of 8, along the diagonal
    rows, columns = (np.kron(np.eye(n // 8), _cosines()).astype("float32") for n in x.shape[2:])
    tables = np.tile(tables, (1, len(rows) // 8, len(columns) // 8)).astype("float32")
    colours = (YCBCR.astype("float32") @ x.reshape(B, 3, -1)).reshape(x.shape)
    colours[:, 0] -= 128
    coefficients = np.rint(rows @ colours @ columns.T / tables) * tables
    colours = rows.T @ coefficients @ columns
    colours[:, 0] += 128
    x = (np.linalg.inv(YCBCR).astype("float32") @ colours.reshape(B, 3, -1)).reshape(x.shape)
    return x[:, :, :height, :width]


def _cosines():
    """(8, 8): the orthonormal cosine transform (DCT-II); row k has frequency k."""
    k, n = np.arange(8)[:, None], np.arange(8)
    return np.sqrt(np.where(k == 0, 1, 2) / 8) * np.cos(math.pi / 8 * (n + 0.5) * k)
