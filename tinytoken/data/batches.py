"""Batches for training: shuffled, cropped, flipped and normalised, from a set of uint8 pictures or clips.

The same code serves NumPy and CuPy: on a GPU the whole set lies in its memory, and all of this happens there.
"""
import functools
from typing import Any

from .. import random
from ..backend import Array, array_module
from ..errors import expect, shape_of
from ..tensor import fused
from . import mix

SITE = "tinytoken.data.batches."
IGNORE = 255  # the label of a pixel without a class, as in the PASCAL VOC challenge's files


class Batches:
    """batches(step) -> (images (batch_size, 3, H, W) float32, labels (batch_size, ...)).

    Of clips (B, T, 3, H, W), a batch is (batch_size, T, 3, H, W); all frames of one are moved alike.

    A batch is a pure function of (seed, step). An epoch goes through the set once, in a new order; a last,
    incomplete batch is dropped. `len` is the steps in an epoch.

    pad: each picture is moved by up to this many pixels each way; what comes in at the border is zero after
        normalisation, the mean colour (the usual crop with padding).
    flip: half of the pictures are mirrored left to right. Refused for clips, since what goes left would
        keep its label and go right; so are erase, mixup and cutmix.
    erase: the share of pictures in which a rectangle gets the mean colour (mix.erase).
    mixup, cutmix: alpha of the Beta distribution by which pictures are mixed in pairs (mix.mixup,
        mix.cutmix); 0 mixes none, and with both each batch gets one of them, either with probability 1/2.
        The labels then are probabilities (batch_size, classes), float32.
    classes: how many there are (default: the largest label + 1).
    mean, std: per channel, in units of [0, 1]; by default those of `images`. Give the training set's to a
        test set.
    labels: class indices (B,); or any arrays, one per image, for a task that knows what they are. Whole
        numbers (B, H, W) are classes of the pixels: they move along with the picture, what comes in at the
        border is IGNORE, and what is erased keeps its class. Other maps of the picture's size cannot move:
        pad or flip refuse them.

    Raises InputError for images that are not uint8 of these shapes, more or fewer labels than images, or a
    batch that is larger than the set.
    """

    def __init__(self, images: Array, labels: Array, batch_size: int, *, seed: int = 0, pad: int = 0,
                 flip: bool = False, mean: tuple[float, ...] | None = None,
                 std: tuple[float, ...] | None = None, erase: float = 0.0, mixup: float = 0.0,
                 cutmix: float = 0.0, classes: int | None = None) -> None:
        _check_images("Batches", images)
        classes_known = labels.ndim == 1 and labels.dtype.kind in "iu"
        count, shape = len(images), shape_of("labels", labels)
        numbers = labels.dtype.kind in "iuf" or labels.dtype.kind == "b" and labels.ndim > 1
        expect(labels.ndim >= 1 and len(labels) == count and numbers, "Batches",
               f"{shape} {labels.dtype} for {count} images, expected ({count},) integers, "
               f"or one array of numbers per image")
        expect(classes_known or not (mixup or cutmix), "Batches",
               f"mixup or cutmix with {shape} {labels.dtype}, expected class numbers ({count},)")
        expect(images.ndim == 4 or not (flip or erase or mixup or cutmix), "Batches",
               "flip, erase, mixup or cutmix of clips, which can only be moved: pad alone expected")
        # an int8 has no room for IGNORE
        self.by_pixel = (images.ndim == 4 and labels.shape[1:] == images.shape[2:]
                         and labels.dtype.kind in "iu" and labels.dtype != "int8")
        expect(not (pad or flip) or self.by_pixel or labels.shape[1:][-2:] != images.shape[-2:], "Batches",
               f"pad or flip with {shape} {labels.dtype}, maps of the pictures: they would not move along")
        expect(1 <= batch_size <= count, "Batches",
               f"batch size {batch_size}, expected 1 to the set's {count}")
        expect(0 <= pad < min(images.shape[-2:]), "Batches",
               f"pad is {pad}, expected 0 to {min(images.shape[-2:]) - 1}")
        expect(0 <= erase <= 1 and min(mixup, cutmix) >= 0, "Batches",
               f"erase {erase}, mixup {mixup}, cutmix {cutmix}: a share from 0 to 1 "
               f"and two numbers not below 0 expected")
        if mean is None or std is None:
            mean, std = channel_statistics(images)
            std = tuple(s or 1.0 for s in std)  # a channel that has one value alone becomes 0
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.pad, self.flip = pad, flip
        self.mean, self.std = mean, std
        self.erase = erase
        self.ways = {way: alpha for way, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
        self.classes = int(labels.max()) + 1 if classes is None and classes_known else classes
        self.steps_per_epoch = count // batch_size
        # the epoch drawn last, and its order: drawing it at each step would cost more than the step
        self._order: tuple[Any, Any] = (None, None)

    def __len__(self):
        return self.steps_per_epoch

    def __call__(self, step: int) -> tuple[Array, Array]:
        return self.make(self.chosen(step), step)

    def chosen(self, step: int) -> Array:
        """Which pictures of the set the step's batch has: their indices (batch_size,), on their device."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[place * self.batch_size:(place + 1) * self.batch_size]

    def make(self, chosen: Array, step: int) -> tuple[Array, Array]:
        """The batch of these pictures. step: of what is drawn for it, see random.bits."""
        images, labels = self.pictures(chosen, step), self.labels[chosen]
        if self.by_pixel and (self.pad or self.flip):
            labels = self._moved_labels(chosen, step)
        if self.erase:
            images = mix.erase(images, self.erase, step=step, seed=self.seed)
        if not self.ways:
            return images, labels
        return mix.mixed(images, labels, self.classes, self.ways, SITE + "way", step=step,
                         seed=self.seed)

    @fused
    def pictures(self, chosen: Array, step: int) -> Array:
        """The chosen pictures, moved and mirrored, normalised."""
        if self.pad or self.flip:
            return self._moved(chosen, step)
        return normalise(self.images[chosen], self.mean, self.std)

    def _epoch_order(self, epoch):
        known, order = self._order
        if known != epoch:
            order = random.permutation(len(self.images), site=SITE + "order", step=epoch, seed=self.seed,
                                       xp=array_module(self.images))
            self._order = (epoch, order)
        return order

    def _moved(self, chosen, step):
        """The chosen pictures, moved and mirrored by one gather. The channels of a clip are those of all its
        frames."""
        xp, (height, width) = array_module(self.images), self.images.shape[-2:]
        rows, columns, inside = self._sources(step)
        images = self.images.reshape(len(self.images), -1, height, width)
        picked = images[chosen[:, None, None, None], xp.arange(images.shape[1])[:, None, None],
                        rows[:, None], columns[:, None]]
        normal = normalise(picked.reshape(len(chosen), *self.images.shape[1:]), self.mean, self.std)
        return normal * inside.reshape(len(chosen), *[1] * (normal.ndim - 3), height, width)

    def _moved_labels(self, chosen, step):
        """Their labels (B, H, W), moved with them."""
        rows, columns, inside = self._sources(step)
        picked = self.labels[chosen[:, None, None], rows, columns]
        xp = array_module(picked)
        return xp.where(inside, picked, xp.full((), IGNORE, picked.dtype))

    def _sources(self, step):
        """Where every pixel of a moved picture comes from: its row (B, H, 1) and column (B, 1, W), and
        whether it lies inside (B, H, W)."""
        xp, (height, width) = array_module(self.images), self.images.shape[-2:]
        draw = dict(step=step, seed=self.seed, xp=xp)
        shift = random.integers((self.batch_size, 2, 1), 2 * self.pad + 1, site=SITE + "crop", **draw)
        shift = shift - self.pad
        rows, columns = xp.arange(height) + shift[:, 0], xp.arange(width) + shift[:, 1]
        if self.flip:
            mirrored = random.integers((self.batch_size, 1), 2, site=SITE + "flip", **draw) == 1
            columns = xp.where(mirrored, columns[:, ::-1], columns)
        in_rows, in_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        return (rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None],
                in_rows[:, :, None] & in_columns[:, None])


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 (B, 3, H, W), or clips (B, T, 3, H, W) -> float32, (images / 255 - mean) / std per channel.

    mean, std: three floats each, in units of [0, 1]."""
    _check_images("normalise", images)
    expect(len(mean) == len(std) == 3 and min(std) > 0, "normalise",
           f"mean {mean} and std {std}, expected three of each, std above 0")
    scale, offset = _line(tuple(mean), tuple(std), array_module(images))
    out = images.astype("float32")
    out *= scale
    out += offset
    return out


@functools.lru_cache(maxsize=32)
def _line(mean, std, xp):
    """Scale and offset (3, 1, 1) of `normalise` on the device. They are made once: a copy to the device in
    every step would hold the step up."""
    return tuple(xp.asarray(three, dtype="float32")[:, None, None] for three in line(mean, std))


def line(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """`normalise` as a scale and an offset for each channel."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


def channel_statistics(images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (B, 3, H, W) or (B, T, 3, H, W): three floats
    each, in units of [0, 1]."""
    _check_images("channel_statistics", images)
    images = images.reshape(-1, *images.shape[-3:])
    xp = array_module(images)
    counts = xp.zeros((3, 256), "int64")  # exact, and no float copy of the set
    for start in range(0, len(images), 1024):
        for channel in range(3):
            counts[channel] += xp.bincount(images[start:start + 1024, channel].reshape(-1), minlength=256)
    value = xp.arange(256) / 255
    mean = counts @ value / counts.sum(axis=1)
    variance = counts @ value**2 / counts.sum(axis=1) - mean**2
    variance[(counts > 0).sum(axis=1) == 1] = 0  # of one value alone rounding may leave -1e-19
    return tuple(float(m) for m in mean), tuple(float(v) ** 0.5 for v in variance)


def _check_images(where, images):
    expect(images.ndim in (4, 5) and images.shape[-3] == 3 and images.size and images.dtype == "uint8", where,
           f"{shape_of('images', images)} {images.dtype}, expected (B, 3, H, W) uint8, or (B, T, 3, H, W)")
