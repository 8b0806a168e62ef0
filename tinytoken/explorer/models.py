"""The three small models of the explorer, in two files: float16 weights, and JSON that says what they are."""
import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import swapped
from ..files import FilePath, replacing, write_json
from ..models import create
from ..reading import read_json, read_npz
from ..train import checkpoint

HERE = pathlib.Path(__file__).parent
WEIGHTS, ABOUT = "models.npz", "models.json"
NAMES = ("vit", "dynamicvit", "lookupvit")
KEEPS = tuple(n / 20 for n in range(6, 21))  # of the slider: the share that each stage keeps of the one before


def save(folder: FilePath, models: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write {name: model} as float16 into `folder`, and what the page says of them. about: {"models": {name:
    what was measured}, and what holds for all}."""
    folder = pathlib.Path(folder)
    with replacing(folder / WEIGHTS) as file:
        np.savez_compressed(file, **{f"{name}/{key}": array.astype("float16") for name, model in models.items()
                                     for key, array in model.state_dict().items()})
    described = {name: checkpoint.description(model) | about["models"].get(name, {})
                 for name, model in models.items()}
    write_json(folder / ABOUT, {**about, "models": described})


def load(folder: FilePath = HERE) -> tuple[dict[str, Any], dict[str, Any]]:
    """({name: model in eval mode}, what the JSON says) of a folder that `save` wrote to; default: the
    package's. InputError for files that are damaged."""
    folder = pathlib.Path(folder)
    about = read_json(folder / ABOUT, "explore")
    arrays = read_npz(folder / WEIGHTS, "explore")
    models = {}
    for name, described in about["models"].items():
        model = create(described["model"].lower(), **described["config"])
        model.load_state_dict({key.removeprefix(f"{name}/"): array.astype("float32")
                               for key, array in arrays.items() if key.startswith(f"{name}/")})
        models[name] = model.eval()
    return models, about


def read_about(folder: FilePath = HERE) -> dict[str, Any]:
    """What the JSON says, without the models."""
    return json.loads((pathlib.Path(folder) / ABOUT).read_text(encoding="utf-8"))


@contextlib.contextmanager
def keeping(model: Any, share: float) -> Iterator[None]:
    """Context: each stage of a DynamicViT keeps `share` of what the one before has left, at inference. The
    predictors only rank the tokens, so that any number of the best can be taken."""
    counts = [max(1, int(model.num_patches * share ** (stage + 1) + 1e-9)) for stage in range(len(model.counts))]
    with swapped(model, "counts", counts):
        yield
