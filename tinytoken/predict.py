"""One picture through one checkpoint: its classes, and the tokens that were kept or looked at."""
import pathlib
import sys
from typing import Any

import numpy as np

from . import plot
from .backend import to_numpy
from .data import normalise
from .data.folder import read_image
from .data.likeness import outside
from .data.scenes import NAMES
from .errors import expect, install, one_line_of_warnings, printable, some_of
from .files import FilePath, check_target
from .nn import both_sides
from .ops import softmax
from .tensor import no_grad
from .train import checkpoint

SAMPLES = pathlib.Path(__file__).parent / "data" / "samples"  # three scenes, made by tests/make_samples.py
EXPECTED = f"""\
Classes of a picture by a checkpoint, and a picture of the tokens that it used.

A model can only name the classes that it was trained on, in pictures like those
of its training; of others a warning says so. One that `compare` trained on scenes
expects a dark, smoothly noisy ground, 6 to 12 bright strokes and blobs of clutter,
and 1 to 3 filled shapes of one class, nearly upright (a triangle's tip points
down, a crescent opens to the right):
  {', '.join(NAMES)}
A plain drawing on white is no such picture. Three scenes to try, star.png,
ring.png and triangle.png, are in
  {SAMPLES}
"""


def classify(path: FilePath, picture: FilePath, path_out: FilePath) -> str:
    """Classify `picture` with the checkpoint at `path`, and write it with its tokens to `path_out`.

    The picture may have any format that pillow reads; data.folder.read_image says how it is cropped. A line
    on stderr warns of one that is unlike the training pictures, as data.likeness measures it, where the
    checkpoint says how those are. path_out: its ending is one of plot.FORMATS. Returns the text to print.
    Raises InputError for files that cannot be used, and a path_out that should not be written to.
    """
    check_target(path_out, *plot.FORMATS, inputs=(path, picture), probe=False)
    with one_line_of_warnings(path, "tinytoken"):  # of weights in half precision
        model, header = checkpoint.load_model(path)
    expect("classes" in header, "predict",
           f"{path} does not say its classes and pixel statistics: train it with `compare`")
    classes, mean, std = checkpoint.learned(path, header, model.config)
    images = read_picture(picture, both_sides(model.config.image_size))
    warn(picture, images[0], header)
    with no_grad(), one_line_of_warnings(path, "NumPy"):
        out = model.eval()(normalise(images, mean, std), trace=True)
        expect(out.logits.ndim == 2, "predict",
               f"{path} holds a {type(model).__name__}, which answers for pixels: a classifier is expected")
        probs = to_numpy(softmax(out.logits).data)[0]
    expect(np.isfinite(probs).all(), "predict",
           f"{path} makes numbers of {picture} that are not finite: damaged, or its mean and std are no use")
    order = np.argsort(-probs, kind="stable")
    lines = [f"{printable(classes[k]):<12} {100 * probs[k]:5.1f} %" for k in order]
    return "\n".join([*lines, show(path_out, model, images, classes[order[0]], out)])


def default_out(picture: pathlib.Path) -> pathlib.Path:
    """PICTURE.tokens.png beside the picture; of a sample, which lies in the package, in the current one."""
    sample = picture.resolve().parent == SAMPLES.resolve()
    return (pathlib.Path() if sample else picture.parent) / f"{picture.stem}.tokens.png"


def read_picture(path: FilePath, size: tuple[int, int]) -> np.ndarray:
    """(1, 3, H, W) uint8. size: (H, W)."""
    with one_line_of_warnings(path, "pillow"):
        return read_image(path, size, "predict")[None]


def warn(path: FilePath, image: np.ndarray, header: dict[str, Any]) -> None:
    """Say on stderr if the picture (3, H, W) is unlike those that the checkpoint was trained on.

    Nothing is said for a checkpoint from before training noted how its pictures are."""
    if found := outside(image, header.get("bounds", {})):
        training = f"the pictures of the training ({header.get('data')})"
        print(printable(f"warning: {path} is unlike {training}: {some_of(found, 2)}. The classes below may "
                        "mean nothing."), file=sys.stderr)


def show(path: FilePath, model: Any, images: np.ndarray, name: str, out: Any) -> str:
    """Write the picture with its tokens -> a line that says where it is, or why there is none."""
    panels = model.show(out)
    kind = type(model).__name__
    if not panels:
        return f"a {kind} keeps every token: no picture written"
    try:
        plot.tokens(path, images, None, {kind: [name]}, panels, model.config.patch_size)
    except ImportError:
        return f"no picture written: matplotlib is not installed ({install('matplotlib')})"
    return f"picture: {path}"
