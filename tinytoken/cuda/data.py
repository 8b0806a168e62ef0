"""Random bits, and batches from pictures that lie on the device, by one kernel each. The bits and the pixels of the plain forms."""
import math
import zlib

from . import launcher
from .launcher import cover


def random_bits(xp, shape, site, step, seed):
    """random.bits."""
    out, size = xp.empty(shape, "uint32"), math.prod(shape)
    if size:
        launcher.launch("random_bits", *cover(-(-size // 4)), out, size, site, step, *halves(seed))
    return out


def gather_pictures(batches, chosen, step, scale, offset, crop, flip):
    """The chosen pictures of data.Batches, moved, mirrored and normalised. scale and offset: of each channel; crop and flip: sites."""
    images = batches.images
    out = launcher.empty(images, len(chosen), *images.shape[1:])
    crop, flip = (zlib.crc32(site.encode()) for site in (crop, flip))
    launcher.launch("gather_pictures", len(chosen), 256, launcher.contiguous(images), launcher.contiguous(chosen), out, *images.shape[2:],
                    batches.pad, batches.flip, crop, flip, step, *halves(batches.seed), *scale, *offset, shared=4 * 3)
    return out


def halves(seed):
    """A seed as two words of 32 bits, the lower one first."""
    return seed & 0xFFFFFFFF, seed >> 32
