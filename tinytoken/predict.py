"""One picture through one checkpoint: its classes, and the tokens that were kept or looked at."""
from typing import Any

import numpy as np

from . import plot
from .backend import to_numpy
from .data import normalise
from .data.folder import read_image
from .errors import expect
from .files import FilePath
from .nn import both_sides
from .ops import softmax
from .tensor import no_grad
from .train import checkpoint


def classify(path: FilePath, picture: FilePath, path_out: FilePath) -> str:
    """Classify `picture` with the checkpoint at `path`, and write it with its tokens to `path_out`.

    The picture may have any format that pillow reads; data.folder.read_image says how it is cropped. Returns
    the text to print. Raises InputError for files that cannot be used.
    """
    model, header = checkpoint.load_model(path)
    expect("classes" in header, "predict",
           f"{path} does not say its classes and pixel statistics: train it with `compare`")
    images = read_picture(picture, both_sides(model.config.image_size))
    with no_grad():
        out = model.eval()(normalise(images, header["mean"], header["std"]), trace=True)
        probs = to_numpy(softmax(out.logits).data)[0]
    order = np.argsort(-probs, kind="stable")
    lines = [f"{header['classes'][k]:<12} {100 * probs[k]:5.1f} %" for k in order]
    return "\n".join([*lines, show(path_out, model, images, header["classes"][order[0]], out)])


def read_picture(path: FilePath, size: tuple[int, int]) -> np.ndarray:
    """(1, 3, H, W) uint8. size: (H, W)."""
    return read_image(path, size, "predict")[None]


def show(path: FilePath, model: Any, images: np.ndarray, name: str, out: Any) -> str:
    """Write the picture with its tokens -> a line that says where it is, or why there is none."""
    panels = model.show(out)
    if not panels:
        return f"a {type(model).__name__} keeps every token: no picture written"
    try:
        plot.tokens(path, images, [name], {}, panels, model.config.patch_size)
    except ImportError:
        return "no picture written: matplotlib is not installed (pip install 'tinytoken-vit[plot]')"
    return f"picture: {path}"
