"""Checkpoints: one .npz with arrays and a JSON header. No pickle; written as a whole (files.replacing)."""
import dataclasses
import json
import os
import reprlib
from typing import Any, TypeAlias

import numpy as np

from .. import nn
from ..backend import native_array, to_numpy
from ..errors import InputError, expect
from ..files import as_json, plain_number, replacing
from ..models import create, names
from ..models import model as models
from ..reading import field, finite, read_npz, whole

FORMAT = "tinytoken checkpoint 1"
NAME = 255  # letters of a class's name at most: classes may be called after folders
Path = str | os.PathLike
Groups: TypeAlias = dict[str, dict[str, np.ndarray]]  # {"model" or "optimizer": {name: array}}


def save(path: Path, model: nn.Module, optimizer: Any = None, **header: Any) -> None:
    """Write the model's class, config and weights, with an optimiser its moments, and the JSON `header`."""
    header |= {"format": FORMAT, **description(model)}
    arrays: dict[str, Any] = {f"model/{name}": array for name, array in model.state_dict().items()}
    if optimizer is not None:
        moments, header["optimizer_steps"] = optimizer.state()
        arrays |= {f"optimizer/{name}": to_numpy(array) for name, array in moments.items()}
    with replacing(path) as file:
        np.savez(file, header=np.array(json.dumps(header, default=plain_number)), **arrays)


def load(path: Path) -> tuple[dict[str, Any], Groups]:
    """(header, {group: {name: array}}) of a checkpoint; the groups are "model" and "optimizer".

    The two are of one moment, whoever replaces the file meanwhile. InputError says what is wrong with a file
    that is not a checkpoint."""
    arrays = read_npz(path, "checkpoint")
    header = _header(path, arrays.pop("header", None))
    groups: Groups = {"model": {}, "optimizer": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        expect(group in groups, "checkpoint", f"{path} holds {name!r}, expected model/... or optimizer/...")
        groups[group][rest] = native_array(array)
    return header, groups


def _header(path, array):
    """The header, in which model and config have the right types."""
    header = None
    if array is not None:
        expect(array.shape == () and array.dtype.kind == "U", "checkpoint",
               f"{path} has a header of {array.shape} {array.dtype}, expected a text")
        try:
            header = json.loads(str(array))
        except (ValueError, RecursionError) as error:
            raise InputError(f"checkpoint: {path} has a header that is not JSON "
                             f"({type(error).__name__}: {error})") from error
    says = header.get("format") if isinstance(header, dict) else None
    expect(says == FORMAT, "checkpoint", f"{path} is not a {FORMAT!r} (its header says {reprlib.repr(says)})")
    expect({"model", "config"} <= header.keys(), "checkpoint", f"{path} does not say its model and config")
    field("checkpoint", path, header, "model", lambda value: isinstance(value, str), "the name of a class")
    field("checkpoint", path, header, "config", lambda value: isinstance(value, dict), "options by name")
    return header


def learned(path: Path, header: dict[str, Any], config: Any
            ) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """(classes, mean, std) of the pictures that a model with this config was trained on: the names of its
    classes, and the statistics of its channels. InputError where the header does not say them."""
    def listed(name, count, ok, expected):
        fits = lambda value: isinstance(value, list) and len(value) == count and all(map(ok, value))
        return tuple(field("predict", path, header, name, fits, f"{count} {expected}"))
    name = lambda value: isinstance(value, str) and len(value) <= NAME
    return (listed("classes", config.num_classes, name, "names"),
            listed("mean", config.channels, finite, "numbers"),
            listed("std", config.channels, lambda value: finite(value) and value > 0, "positive numbers"))


def description(model: nn.Module) -> dict[str, Any]:
    """What a header says of a model: its class and config, as JSON.

    The config is {} for a model without one, for example a task's head on another model."""
    config = getattr(model, "config", None)
    return {"model": type(model).__name__, "config": as_json(dataclasses.asdict(config)) if config else {}}


def load_model(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model that a checkpoint holds -> (model, header)."""
    header, groups = load(path)
    name = header["model"].lower()
    expect(name in names(), "checkpoint",
           f"{path} holds a {header['model']!r}, expected one of {', '.join(names())}")
    _check_finite(path, groups["model"])
    try:
        values = sum(array.size for array in groups["model"].values() if array.dtype.kind == "f")
        with nn.at_most(2 * values):  # some models make parts, and then put others in their place
            model = create(name, **header["config"])
        model.load_state_dict(groups["model"])
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:  # or an option that is not known
        raise InputError(f"checkpoint: {path} does not describe a {header['model']}: {error}") from error
    return model, header


def restore(path: Path, model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Load a checkpoint into a model (and optimiser) made as the saved one was -> header.

    A checkpoint of another class or size of model is refused, and nothing is changed."""
    header, groups = load(path)
    fill(path, header, groups, model, optimizer)
    return header


def fill(path: Path, header: dict[str, Any], groups: Groups, model: nn.Module, optimizer: Any = None) -> None:
    """`restore` of what `load` has read from `path`."""
    there, expected = {"model": header["model"], "config": header["config"]}, description(model)
    expect(same_model(there, expected), "checkpoint",
           f"{path} holds {_call(**there)}, expected {_call(**expected)}")
    for arrays in groups.values():
        _check_finite(path, arrays)
    if optimizer is not None:
        expect(groups["optimizer"], "checkpoint",
               f"{path} holds no optimiser moments: it is a finished model, not a run to go on with")
        steps = field("checkpoint", path, header, "optimizer_steps", whole, "a whole number")
        optimizer.load_state(groups["optimizer"], steps)
    model.load_state_dict(groups["model"])


def _check_finite(path, arrays):
    for name, array in arrays.items():
        count = array.size - np.isfinite(array).sum() if array.dtype.kind == "f" else 0
        expect(not count, "checkpoint", f"{path} has {count:,} values in {name} that are not finite")


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
