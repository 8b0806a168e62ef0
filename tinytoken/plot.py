"""Pictures of what the models did. Needs matplotlib (the `plot` extra), imported when a picture is made."""
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import one_line_of_warnings, printable
from .files import FilePath, replacing


FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".pdf": "pdf", ".svg": "svg"}  # by a name's ending
TRUTH, WRONG = "black", "#b03000"  # colours of texts
HATCH = np.uint8(150)  # grey of the lines across a hidden patch


def tokens(path: FilePath, images: np.ndarray, labels: Sequence[str] | None,
           predictions: dict[str, Sequence[str]], panels: Sequence[tuple[str, np.ndarray]],
           patch: int) -> None:
    """One row per picture: the picture, then a panel for everything that the models have to show.

    images (B, 3, H, W) uint8; labels: B names, or None where the truth is not known; predictions: {model: B
    names}; panels: [(title, (B, N) array)] as Model.show returns them. A boolean array hides the patches
    where it is False; an array of weights shows the larger ones in a stronger red. The picture has the format
    that the path's ending says, one of FORMATS; PNG without one.

    The truth stands at the left of a row, as "truth: NAME"; what the models say stands below its picture, as
    "MODEL says NAME", where it is wrong or the truth is not known.
    """
    figure_module = _figure()
    # a class may be called after a folder: its name need not be text, and is no formula (parse_math)
    labels = None if labels is None else [printable(name) for name in labels]
    predictions = {model: [printable(name) for name in names] for model, names in predictions.items()}
    columns = ["picture", *(title for title, _ in panels)]
    figure = figure_module.Figure(figsize=(1.9 * len(columns), 2.15 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for b, row in enumerate(axes):
        picture = images[b].transpose(1, 2, 0)
        drawn = [(hide if values.dtype == bool else heat)(picture, values[b], patch) for _, values in panels]
        for axis, panel, title in zip(row, [picture, *drawn], columns):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if b == 0:
                axis.set_title(title, fontsize=8, parse_math=False)
        if labels is not None:
            row[0].set_ylabel(f"truth: {labels[b]}", fontsize=8, parse_math=False)
        row[0].set_xlabel(**_answers({name: names[b] for name, names in predictions.items()},
                                     None if labels is None else labels[b]), parse_math=False)
    with one_line_of_warnings(path, "matplotlib"), replacing(path) as file:
        figure.savefig(file, format=FORMATS.get(pathlib.Path(path).suffix.lower(), "png"), dpi=110)


def stages(figure: Any, pictures: Any, called: Sequence[int], kept: Sequence[np.ndarray], patch: int,
           labels: Sequence[str]) -> None:
    """A column per picture: the picture, and below it what is left of it after each stage, the rest hidden.

    pictures: a set, of whose first pictures `called` has the classes that a model gives them. kept: for each
    stage, as `hide` takes it, of each of these. labels: what stands beside the rows, the first one too."""
    axes = figure.subplots(1 + len(kept), len(called))
    for b, picture in enumerate(pictures.images[:len(called)].transpose(0, 2, 3, 1)):
        panels = [picture, *(hide(picture, each[b], patch) for each in kept)]
        for axis, panel, label in zip(axes[:, b], panels, labels):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[], ylabel="" if b else label)
        truth, said = pictures.names[pictures.labels[b]], pictures.names[called[b]]
        axes[0, b].set_title(truth if truth == said else f"{truth}, called {said}", fontsize=9)


def _answers(said, truth):
    """The text below a picture. said: {model: class}; truth: a class, or None."""
    wrong = [f"{model} says {name}" for model, name in said.items() if name != truth]
    text = "\n".join(wrong) if wrong or not said else f"{'all' if len(said) > 1 else next(iter(said))} right"
    return dict(xlabel=text, color=WRONG if wrong and truth is not None else TRUTH, fontsize=7)


def _figure():
    from matplotlib import figure  # not pyplot: no window system, no global state
    return figure


def _grid(picture, patch):
    return picture.shape[0] // patch, picture.shape[1] // patch


def hide(picture: np.ndarray, kept: np.ndarray, patch: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 with every patch that is not kept faded to a light grey and hatched.

    kept: indices of patches, or a boolean for each. The hatching (a line per patch, going up) tells a hidden
    patch from a white one.
    """
    rows, columns = _grid(picture, patch)
    mask = np.zeros(rows * columns, bool)
    mask[kept] = True
    mask = np.kron(mask.reshape(rows, columns), np.ones((patch, patch), bool))[..., None]
    line = np.add.outer(np.arange(picture.shape[0]), np.arange(picture.shape[1])) % patch == patch - 1
    faded = np.where(line[..., None], HATCH, 225 + (picture * 0.1).astype("uint8"))
    return np.where(mask, picture, faded)


def heat(picture: np.ndarray, weights: np.ndarray, patch: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 in grey; in red its patches' weights (N,), relative to the largest."""
    weights = (weights / weights.max()).reshape(_grid(picture, patch))
    weights = np.kron(weights, np.ones((patch, patch)))[..., None]
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.7 + 60
    return (grey * (1 - 0.8 * weights) + np.array([255, 40, 20]) * 0.8 * weights).clip(0, 255).astype("uint8")
