"""Random bits, and batches from pictures that lie on the device, by one kernel each. The bits and the pixels
of the plain forms. A step's number may lie in device memory (random.bits).
"""
import math
import zlib

from .. import random
from ..backend import array_module, is_array
from ..data import batches, mix
from . import launcher
from .fallback import implementation
from .launcher import contiguous, cover


@implementation(random.bits)
def random_bits(shape, *, site, step, seed, xp):
    """random.bits."""
    out, size = xp.empty(shape, "uint32"), math.prod(shape)
    if size:
        launcher.launch("random_bits", *cover(-(-size // 4)), out, size, site, *number_of(step),
                        *halves(seed))
    return out


@implementation(batches.Batches.pictures, covers=lambda self, *_: self.images.ndim == 4)
def gather_pictures(self, chosen, step):
    """Batches.pictures: moved, mirrored and normalised by one kernel."""
    images = self.images
    out = launcher.empty(images, len(chosen), *images.shape[1:])
    scale, offset = batches.line(self.mean, self.std)
    crop, flip = (zlib.crc32((batches.SITE + site).encode()) for site in ("crop", "flip"))
    launcher.launch("gather_pictures", len(chosen), 256, contiguous(images), contiguous(chosen), out,
                    *images.shape[2:], self.pad, self.flip, crop, flip, *number_of(step), *halves(self.seed),
                    *scale, *offset, shared=4 * 3)
    return out


@implementation(mix.blank)
def erase_boxes(images, boxes):
    """data.mix.blank."""
    images, out = contiguous(images), launcher.empty_like(images)
    launcher.launch("erase_boxes", len(images), 256, images, boxes.astype("int32"), out, *images.shape[1:])
    return out


@implementation(mix.mixed)
def mix_pictures(images, labels, classes, ways, site, *, step, seed):
    """data.mix.mixed: the way is drawn on the device, and both are prepared for it."""
    drawn = random.integers(1, len(ways), site=site, step=step, seed=seed, xp=array_module(images))
    shares = mix.mixup_shares(images, ways["mixup"], step, seed) if "mixup" in ways else None
    boxes = mix.cutmix_boxes(images, ways["cutmix"], step, seed).astype("int32") if "cutmix" in ways else None
    images, out = contiguous(images), launcher.empty_like(images)
    launcher.launch("mix_pictures", len(images), 256, images, shares, boxes, drawn, out, *images.shape[1:])
    targets = launcher.empty(images, len(images), classes)
    labels = contiguous(labels.astype("int64", copy=False))
    launcher.launch("mix_labels", *cover(targets.size), labels, shares, boxes, drawn, targets, *targets.shape,
                    *images.shape[2:])
    return out, targets


def number_of(step):
    """A step for a kernel: its number, or where it stands."""
    return (0, step) if is_array(step) else (step, None)


def halves(seed):
    """A seed as two words of 32 bits, the lower one first."""
    return seed & 0xFFFFFFFF, seed >> 32
