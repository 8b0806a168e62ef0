"""Published weights, and how they are fitted to a model.

Names and layouts are timm's, and those of the official DeiT and DynamicViT code.
"""
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backend import native_array
from ..errors import InputError, expect, some_of
from ..files import FilePath
from ..ops import resize_matrix
from .base import is_number
from .formats import clean_names, options_of, read_weights

KEEP = "new_head=True, with which the model keeps its own, untrained"
ASSUMED = ("layer norms' eps={eps} (CLIP's is 1e-05), pool={pool!r} (what the head reads), the exact GELU "
           "(OpenAI's CLIP has another), and pictures normalised as when the weights were trained (often by "
           "ImageNet's mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225), or by 0.5 and 0.5): names "
           "do not tell")


def load_weights(model: Any, weights: FilePath | Mapping[str, np.ndarray], *, new_head: bool = False,
                 grid: tuple[int, int] | None = None, strict: bool = True, quiet: bool = False) -> list[str]:
    """Load published weights into a model -> what was changed and what was assumed, lines that are printed
    unless `quiet`.

    weights: a file for read_weights, or arrays by name. A position table of another grid is resized as timm
    does it (bicubic, with antialias); grid: the (rows, columns) that it has in the file, where it is not
    square. new_head: the model keeps its own heads, untrained, whatever the file has. strict: names must
    agree; the error says which options the file's names ask for. Half precision becomes float32. InputError
    for what does not fit, and then nothing is changed."""
    expect(grid is None or isinstance(grid, (tuple, list)) and len(grid) == 2
           and all(is_number(side) and side > 0 for side in grid), "load_weights",
           lambda: f"grid {grid!r}, expected (rows, columns)")
    state, notes = clean_names(weights if isinstance(weights, Mapping) else read_weights(weights))
    state = {name: native_array(array) for name, array in state.items()}
    narrow = [name for name, array in state.items() if array.dtype.name in ("float16", "bfloat16")]
    if narrow:
        state |= {name: state[name].astype("float32") for name in narrow}
        notes.append(f"{len(narrow)} arrays of half precision are float32 now")
    own = {name: p.shape for name, p in (*model.named_parameters(), *model.named_buffers())}
    notes += _heads(state, own, new_head)
    missing = [name for name in own if name not in state and not (new_head and _of_a_head(name))]
    unexpected = [name for name in state if name not in own]
    if strict and (missing or unexpected):
        way = KEEP if all(map(_of_a_head, missing + unexpected)) else (
            _asked_for(state, model) or "strict=False, which leaves what is missing as it is")
        expect(False, "load_weights", f"missing {some_of(missing)}; unexpected {some_of(unexpected)}", way)
    notes += _positions(state, own, model, grid)
    model.load_state_dict(state, strict=False)
    notes += [f"{what}: {some_of(names)}" for what, names in (("not in the file", missing),
                                                              ("not in the model", unexpected)) if names]
    config = model.config
    read = {"eps": getattr(config, "eps", 1e-6), "pool": getattr(config, "pool", "mean")}
    heads = f"heads={config.heads}, " if any(f.name == "heads" for f in dataclasses.fields(config)) else ""
    notes.append(f"assumed: {heads}{ASSUMED.format(**read)}")
    if not quiet:
        print("\n".join(f"load_weights: {note}" for note in notes))
    return notes


def _of_a_head(name):
    """Whether it is a weight of a classifier; ConvNeXt has a norm before it, head.norm, which is none."""
    return name.split(".")[0] in ("head", "head_dist", "aux_head", "lookup_head") and ".norm." not in name


def _heads(state, own, new_head):
    """Take the heads out of `state` if the model is to keep its own; refuse those of another size."""
    theirs = [name for name in state if _of_a_head(name)]
    if new_head:
        for name in theirs:
            del state[name]
        return [f"the model's own, untrained head; the file's {some_of(theirs)} left out"]
    wrong = [f"{name} {state[name].shape}, expected {own[name]}" for name in theirs
             if name in own and state[name].shape != own[name]]
    expect(not wrong, "load_weights", lambda: f"a head of another size: {some_of(wrong)}", KEEP)
    return []


def _positions(state, own, model, grid):
    """Resize the table of positions in `state` to the model's grid."""
    table = state.get("pos_embed")
    if table is None or "pos_embed" not in own or grid is None and table.shape == own["pos_embed"]:
        return []
    new, before = model.patch_embed.grid, own["pos_embed"][1] - math.prod(model.patch_embed.grid)
    expect(table.ndim == 3 and len(table) == 1, "load_weights",
           lambda: f"pos_embed {table.shape}, expected (1, positions, dim)")
    places = table.shape[1] - before
    side = math.isqrt(max(places, 0))
    old = tuple(grid or (side, side))
    expect(places > 0 and math.prod(old) == places, "load_weights",
           lambda: f"pos_embed has {table.shape[1]} rows, {before} of them for tokens before the patches: "
                   f"{places} are no grid of {old[0]} x {old[1]}",
           " or ".join(filter(None, ("grid=(rows, columns), where it is not square",
                                     _asked_for(state, model)))))
    if old == tuple(new):
        return []
    resized = (resize_matrix(old, new, cubic=True) @ table[:, before:]).astype(table.dtype)
    state["pos_embed"] = np.concatenate([table[:, :before], resized], axis=1)
    return [f"pos_embed resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} (bicubic, antialiased)"]


def _asked_for(state, model):
    """'a model with' the options that the names in `state` ask for and this one has not; '' if there are
    none."""
    try:
        options = options_of(state)
    except InputError:
        return ""
    size = ("image_size", "num_classes", "heads", "layer_scale")
    wrong = {name: value for name, value in options.items()
             if name not in size and hasattr(model.config, name) and getattr(model.config, name) != value}
    if bool(options["layer_scale"]) != bool(getattr(model.config, "layer_scale", options["layer_scale"])):
        wrong["layer_scale"] = options["layer_scale"]
    found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
    return f"a model with {found}" if found else ""
