"""Checkpoints: one .npz with arrays and a JSON header. No pickle; written as a whole (files.replacing)."""
import dataclasses
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from .. import nn
from ..backend import native_array, to_numpy
from ..errors import InputError, expect
from ..files import as_json, plain_number, replacing
from ..models import create, names
from ..models import model as models

FORMAT = "tinytoken checkpoint 1"
Path = str | os.PathLike


def save(path: Path, model: nn.Module, optimizer: Any = None, **header: Any) -> None:
    """Write the model's class, config and weights, with an optimiser its moments, and the JSON `header`."""
    header |= {"format": FORMAT, **description(model)}
    arrays: dict[str, Any] = {f"model/{name}": array for name, array in model.state_dict().items()}
    if optimizer is not None:
        moments, header["optimizer_steps"] = optimizer.state()
        arrays |= {f"optimizer/{name}": to_numpy(array) for name, array in moments.items()}
    with replacing(path) as file:
        np.savez(file, header=np.array(json.dumps(header, default=plain_number)), **arrays)


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """(header, {group: {name: array}}) of a checkpoint; the groups are "model" and "optimizer".

    InputError says what is wrong with a file that is not a checkpoint."""
    path = pathlib.Path(path)
    expect(path.exists(), "checkpoint", f"{path} does not exist")
    groups: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}}
    try:
        with open(path, "rb") as file:
            expect(zipfile.is_zipfile(file), "checkpoint",
                   f"{path} is not a whole .npz file: truncated, or not a checkpoint")
            file.seek(0)
            with np.load(file, allow_pickle=False) as box:
                header = json.loads(str(box["header"])) if "header" in box.files else {}
                expect(header.get("format") == FORMAT, "checkpoint",
                       f"{path} is not a {FORMAT!r} (its header says {header.get('format')!r})")
                expect({"model", "config"} <= header.keys(), "checkpoint",
                       f"{path} does not say its model and config")
                for name in box.files:
                    if name != "header":
                        group, _, rest = name.partition("/")
                        groups[group][rest] = native_array(box[name])
    except InputError:
        raise
    except Exception as error:  # of a damaged file zipfile, zlib, json and NumPy raise a dozen different ones
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"checkpoint: {path} is not a readable checkpoint ({reason})") from error
    return header, groups


def description(model: nn.Module) -> dict[str, Any]:
    """What a header says of a model: its class and config, as JSON.

    The config is {} for a model without one, for example a task's head on another model."""
    config = getattr(model, "config", None)
    return {"model": type(model).__name__, "config": as_json(dataclasses.asdict(config)) if config else {}}


def load_model(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model that a checkpoint holds -> (model, header)."""
    header, groups = load(path)
    name, config = str(header["model"]).lower(), header["config"]
    expect(name in names(), "checkpoint",
           f"{path} holds a {header['model']!r}, expected one of {', '.join(names())}")
    expect(isinstance(config, dict), "checkpoint",
           f"{path} has the config {config!r}, expected options by name")
    try:
        model = create(name, **config)
    except (InputError, TypeError) as error:  # an option or a value that this version does not know
        raise InputError(f"checkpoint: {path} does not describe a {header['model']}: {error}") from error
    model.load_state_dict(groups["model"])
    return model, header


def restore(path: Path, model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Load a checkpoint into a model (and optimiser) made as the saved one was -> header.

    A checkpoint of another class or size of model is refused, and nothing is changed."""
    header, groups = load(path)
    there, expected = {"model": header["model"], "config": header["config"]}, description(model)
    expect(same_model(there, expected), "checkpoint",
           f"{path} holds {_call(**there)}, expected {_call(**expected)}")
    if optimizer is not None:
        expect(groups["optimizer"], "checkpoint",
               f"{path} holds no optimiser moments: it is a finished model, not a run to go on with")
        optimizer.load_state(groups["optimizer"], header["optimizer_steps"])
    model.load_state_dict(groups["model"])
    return header


def same_model(there: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two descriptions are of one model.

    An option that a checkpoint does not name is newer than the checkpoint, and counts as its default."""
    return there["model"] == expected["model"] and with_defaults(there) == with_defaults(expected)


def with_defaults(description: dict[str, Any]) -> dict[str, Any]:
    """The config of a description, with the defaults of the options that it does not name."""
    registered = models.get(description["model"].lower())
    fields = dataclasses.fields(registered.Config) if registered else ()
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return as_json(defaults | description["config"])


def _call(model, config):
    return f"{model}({', '.join(f'{k}={v}' for k, v in config.items())})"
