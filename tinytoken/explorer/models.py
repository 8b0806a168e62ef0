"""The three small models of the explorer, in two files: float16 weights, and JSON that says what they are."""
import contextlib
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
KEEPS = tuple(n / 20 for n in range(6, 21))  # of the slider: what each stage keeps of the one before


def save(folder: FilePath, models: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write {name: model} as float16 into `folder`, and what the page says of them. about: {"models": {name:
    what was measured}, and what holds for all}."""
    folder = pathlib.Path(folder)
    arrays: dict[str, Any] = {f"{name}/{key}": array.astype("float16") for name, model in models.items()
                              for key, array in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as file:
        np.savez_compressed(file, **arrays)
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


@contextlib.contextmanager
def keeping(model: Any, share: float) -> Iterator[None]:
    """Context: each stage of a DynamicViT keeps `share` of what the one before has left, at inference. The
    predictors only rank the tokens, so that any number of the best can be taken."""
    shares = (share ** (stage + 1) + 1e-9 for stage in range(len(model.counts)))  # 0.7 ** 2 is below 0.49
    counts = [max(1, int(model.num_patches * part)) for part in shares]
    with swapped(model, "counts", counts):
        yield
