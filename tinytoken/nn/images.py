"""What every model takes: pictures of its size."""
from typing import Any

from ..backend import Array
from ..errors import expect
from ..tensor import Tensor


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image_size: H for a square, or (H, W)."""
    return (size[0], size[1]) if isinstance(size, (tuple, list)) else (size, size)


def checked_images(images: Tensor | Array, image_size: int | tuple[int, int], channels: int,
                   dtype: Any) -> Tensor | Array:
    """Pictures (B, channels, H, W) of this size; arrays are cast to `dtype`. InputError for another size or
    channel count, an empty batch, and integer pixels."""
    expected = (channels, *both_sides(image_size))
    expect(hasattr(images, "shape"), "images",
           lambda: f"a {type(images).__name__}, expected an array (B, {', '.join(map(str, expected))})")
    expect(len(images.shape) == 4 and len(images) and tuple(images.shape[1:]) == expected, "images",
           lambda: f"{tuple(images.shape)}, expected (B, {', '.join(map(str, expected))})")
    expect(images.dtype.kind == "f", "images",
           lambda: f"dtype {images.dtype}, expected float32: normalise them first (tt.data.normalise)")
    return images if isinstance(images, Tensor) else images.astype(dtype, copy=False)
