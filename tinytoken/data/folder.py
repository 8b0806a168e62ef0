"""A folder of images by class: byclass.py says how it may look."""
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError, expect, install
from ..files import kind_of
from . import byclass
from .cifar import Pictures
from .sets import dataset

PICTURES = byclass.Kind("picture", (".png", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".ppm", ".tif",
                                    ".tiff", ".webp"), "pillow", 32)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value
TO_8_BITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # what makes 8 bits of a PNG's 2, 4 and 16
BACKGROUND = "white"  # what shows where a picture is transparent


# One picture

def read_image(path: str | os.PathLike, size: tuple[int, int], where: str = "imagefolder") -> np.ndarray:
    """The picture at `path` -> (3, H, W) uint8. size: (H, W); where: who asks, for messages.

    It is turned upright (EXIF), grey of 16 bits (of a TIFF: of as many as its tags say) is scaled to 8, and
    transparent parts become white. Then the largest central part of the shape H : W is cut out (for a square
    model, the central square), and scaled with bilinear weights, which average where it shrinks. Of an
    animation, this is the first picture. InputError for what pillow cannot read, for grey of which nobody can
    know the value of white (32 bits, floats), and for pipes and devices."""
    pillow(where)
    kind = kind_of(path)
    expect(kind in ("a file", "a folder", "nothing"), where, f"{path} is {kind}, expected a file")
    return decoded(path, size, where, path)


def decoded(file: Any, size: tuple[int, int], where: str, name: Any, formats: Sequence[str] | None = None,
            most: int | None = None) -> np.ndarray:
    """`read_image` of a path or of an open binary file. name: what messages call it. formats: those of pillow
    that are tried; None: all. most: pixels of the picture at most, checked before they are decoded."""
    Image, ImageOps = pillow(where)
    try:
        with (Image.open(file) if formats is None else Image.open(file, formats=formats)) as image:
            pixels = image.width * image.height
            if most is not None and pixels > most:
                raise ValueError(f"it has {pixels:,} pixels, expected at most {most:,}")
            ends = _black_and_white(image) if image.mode[0] in "IF" else None
            _transparent_in_8_bits(image)
            image = _rgb(ImageOps.exif_transpose(image), ends, Image)
            return fitted(image, size)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: {name} does not exist") from error
    except Exception as error:  # of a damaged file: OSError, SyntaxError, ValueError, struct.error, ...
        unknown = formats and type(error).__name__ == "UnidentifiedImageError"  # it says the stream's address
        reason = f"none of {', '.join(formats or ())}" if unknown else error
        raise InputError(f"{where}: {name} is not a picture that pillow can read ({reason})") from error


def pillow(where: str) -> tuple[Any, Any]:
    """Its modules Image and ImageOps; InputError, where it is not installed. where: who asks."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(f"{where} reads pictures with pillow, which is not installed: "
                         f"{install('pillow')}") from None
    return Image, ImageOps


def fitted(image: Any, size: tuple[int, int]) -> np.ndarray:
    """The largest central part of the shape H : W of a picture of pillow's, scaled -> (3, H, W) uint8."""
    Image, ImageOps = pillow("fitted")
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _transparent_in_8_bits(image):
    """A PNG names a grey or a colour that is transparent in bits of its own; pillow compares it with 8."""
    factor = TO_8_BITS.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    if factor and "transparency" in image.info:
        value = image.info["transparency"]
        image.info["transparency"] = (int(value * factor) if isinstance(value, int)
                                      else tuple(int(v * factor) for v in value))


def _rgb(image, ends, Image):
    """A picture of pillow's modes as RGB. ends: black and white of grey of more than 8 bits, else None."""
    if ends:  # pillow itself would cut these off at 255
        image = Image.fromarray(_eight_bits(np.asarray(image), *ends, image.info.get("transparency")))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def _black_and_white(image):
    """The values that are black and white in grey of more than 8 bits: 0 and 65535, or as a TIFF's tags say.

    ValueError for floats and wider integers. Of a PNG or a PGM pillow may hold the 16 bits in wider ones."""
    wide = image.mode == "I" and image.format in ("PNG", "PPM")
    if not wide and not image.mode.startswith("I;16"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
        raise ValueError(f"grey in {kind}: which value is white? expected 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    ends = 0, 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    return ends[::-1] if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else ends


def _eight_bits(grey, black, white, transparent):
    """Grey (H, W) integers as 8 bits. transparent: the value that means so, or None."""
    scaled = np.rint((grey.astype("float64") - black) * (255 / (white - black))).clip(0, 255).astype("uint8")
    return scaled if transparent is None else np.where(grey == transparent, np.uint8(255), scaled)


# Many pictures

def load_images(path: str | os.PathLike, size: tuple[int, int] = (32, 32),
                seed: int = 0) -> tuple[Pictures, Pictures]:
    """Read a folder of images by class -> (train, test).

    size: the pictures' (H, W). seed: of the split, where there is one. byclass.load says the rest."""
    pillow("imagefolder")  # refuses here, not once for each picture
    train, test = byclass.load(pathlib.Path(path), PICTURES, lambda file: read_image(file, size),
                               (3, *size), seed)
    return Pictures(*train), Pictures(*test)


def _recognised(path):
    return byclass.recognised(path, PICTURES)


@dataset("imagefolder", recognises=_recognised, layout=PICTURES.layouts.replace("pictures", "images"))
def imagefolder(place: Any, *, seed: int, size: int, **_: Any) -> tuple[Pictures, Pictures]:
    """A folder of images by class."""
    expect(place is not None, "imagefolder",
           f"a sort of folder, not one: say which, --data DIR; {PICTURES.expected}")
    return load_images(place, (size, size), seed)
