"""One picture through one checkpoint: its classes, and the tokens that were kept or looked at."""
import numpy as np

from . import checkpoint, plot
from .backend import to_numpy
from .data import normalise
from .errors import InputError, expect
from .ops import softmax
from .tensor import no_grad


def classify(path, picture, out):
    """Classify `picture` (any format that pillow reads; its central square is scaled to the model's size) with the checkpoint at
    `path`, write it with its tokens to `out` -> the text to print. Raises InputError for files that cannot be used."""
    model, header = checkpoint.load_model(path)
    expect("classes" in header, "predict", f"{path} does not say its classes and pixel statistics: train it with `compare`")
    images = read_picture(picture, model.config["image_size"])
    with no_grad():
        logits, trace = model.eval()(normalise(images, header["mean"], header["std"]), trace=True)
        shares = to_numpy(softmax(logits).data)[0]
    order = np.argsort(-shares, kind="stable")
    lines = [f"{header['classes'][k]:<12} {100 * shares[k]:5.1f} %" for k in order]
    return "\n".join([*lines, show(out, model, images, header["classes"][order[0]], trace)])


def read_picture(path, size):
    """(1, 3, size, size) uint8."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError("predict reads pictures with pillow, which is not installed: "
                         "pip install 'tinytoken-vit[plot]'") from None
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"predict: {path} is not a picture that pillow can read ({error})") from error
    return np.asarray(image).transpose(2, 0, 1)[None]


def show(out, model, images, name, trace):
    """Write the picture with its tokens -> a line that says so, or why not."""
    kind = type(model).__name__
    if kind == "ViT":
        return "a ViT keeps every token: no picture written"
    attention = to_numpy(trace.attention[-1].data) if kind == "LookupViT" else None
    try:
        plot.tokens(out, images, [name], {}, [to_numpy(k) for k in trace.kept], attention, model.config["patch_size"])
    except ImportError:
        return "no picture written: matplotlib is not installed (pip install 'tinytoken-vit[plot]')"
    return f"picture: {out}"
