"""Random bits, and batches from pictures that lie on the device, by one kernel each. The bits and the pixels of the plain forms. A step's
number may lie in device memory (random.bits).
"""
import math
import zlib

from ..backend import is_array
from . import launcher
from .launcher import contiguous, cover


def random_bits(xp, shape, site, step, seed):
    """random.bits."""
    out, size = xp.empty(shape, "uint32"), math.prod(shape)
    if size:
        launcher.launch("random_bits", *cover(-(-size // 4)), out, size, site, *number_of(step), *halves(seed))
    return out


def gather_pictures(batches, chosen, step, scale, offset, crop, flip):
    """The chosen pictures of data.Batches, moved, mirrored and normalised. scale and offset: of each channel; crop and flip: sites."""
    images = batches.images
    out = launcher.empty(images, len(chosen), *images.shape[1:])
    crop, flip = (zlib.crc32(site.encode()) for site in (crop, flip))
    launcher.launch("gather_pictures", len(chosen), 256, contiguous(images), contiguous(chosen), out, *images.shape[2:], batches.pad,
                    batches.flip, crop, flip, *number_of(step), *halves(batches.seed), *scale, *offset, shared=4 * 3)
    return out


def erase_boxes(images, boxes):
    """data.mix.erase, of the rectangles (4, B)."""
    images, out = contiguous(images), launcher.empty_like(images)
    launcher.launch("erase_boxes", len(images), 256, images, boxes.astype("int32"), out, *images.shape[1:])
    return out


def mix_pictures(images, labels, classes, shares, boxes, drawn):
    """data.mix.mixed. shares (B,) of mixup, boxes (4, B) of cutmix, or None; drawn (1,): which, where both are given."""
    images, out = contiguous(images), launcher.empty_like(images)
    ways = shares, None if boxes is None else boxes.astype("int32"), drawn
    launcher.launch("mix_pictures", len(images), 256, images, *ways, out, *images.shape[1:])
    targets = launcher.empty(images, len(images), classes)
    launcher.launch("mix_labels", *cover(targets.size), contiguous(labels.astype("int64", copy=False)), *ways, targets, *targets.shape,
                    *images.shape[2:])
    return out, targets


def number_of(step):
    """A step for a kernel: its number, or where it stands."""
    return (0, step) if is_array(step) else (step, None)


def halves(seed):
    """A seed as two words of 32 bits, the lower one first."""
    return seed & 0xFFFFFFFF, seed >> 32
