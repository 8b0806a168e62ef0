"""The files that published weights come in, read without torch, the names in them, and the options of a ViT
that these ask for.

Nothing is unpickled: torch's own files become .npz files by lessons/tools/torch_weights.py.
"""
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError, expect, install, some_of
from ..files import FilePath
from ..reading import opened, read_npz

WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and of data-parallel training
# A layer that no model has any more; a count of averages, and one of batches; constants of Swin's windows
UNUSED = re.compile(r"pre_logits\.|n_averaged$|num_batches_tracked$|attn_mask$|relative_position_index$")
# The official names of ConvNeXt, by its downsample_layers, and of Swin, where halving ends a stage: timm's
CONVNEXT = ((r"^stages\.(\d+)\.(?=\d)", r"stages.\1.blocks."), (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."), (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv([12])\.", r".mlp.fc\1."), (r"^head\.", "head.fc."), (r"^norm\.", "head.norm."))
FIRST_HALVING = "layers.0.downsample.norm.weight"
SWIN = ((r"^layers\.(\d+)\.downsample\.", lambda name: f"layers.{int(name[1]) + 1}.downsample."),
        (r"^head\.(?!fc\.)", "head.fc."))
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
               "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?"}
QUERIES = "blocks.0.attn.q_norm.weight"
AXES = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2,  # these every ViT has
        "head.weight": 2, "reg_token": 3, QUERIES: 1}
TORCH_FILES = "python lessons/tools/torch_weights.py FILE, which writes an .npz of it"


def read_weights(path: FilePath) -> dict[str, np.ndarray]:
    """{name: array} of an .npz or a .safetensors file (the extra `safetensors`); bfloat16 becomes float32.

    InputError says what is wrong with any other file."""
    where = "weights file"
    expect(isinstance(path, (str, os.PathLike)), where,
           lambda: f"a {type(path).__name__}, expected the name of a file")
    path = pathlib.Path(path)
    expect(path.suffix in (".npz", ".safetensors"), where, f"{path} is neither .npz nor .safetensors",
           TORCH_FILES)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, where)
    arrays = read_npz(path, where)
    expect("header" not in arrays, where, f"{path} is a checkpoint of this package",
           "tt.train.checkpoint.load_model(path)")
    return arrays


def _read_safetensors(path, where):
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: {install('safetensors')}") from error
    with opened(path, where) as file:
        try:
            entries = safetensors.deserialize(file.read())  # checks the header and all bounds
        except safetensors.SafetensorError as error:
            raise InputError(f"{where}: {path} is not a readable .safetensors file ({error})") from error
    arrays = {}
    for name, entry in entries:
        kind = entry["dtype"]
        expect(kind in SAFETENSORS, where,
               f"{name} in {path} is {kind}, expected one of {', '.join(SAFETENSORS)}")
        array = np.frombuffer(entry["data"], SAFETENSORS[kind])
        if kind == "BF16":  # the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def clean_names(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries under the names that a model has -> (state, what was changed, in words).

    Prefixes of wrappers ("module.", "_orig_mod.") go, DeiT III's gamma_1 is ls1.gamma, the official names of
    ConvNeXt and Swin are timm's; what no model reads is left out."""
    expect(all(isinstance(name, str) for name in state), "weights",
           lambda: f"names {some_of([repr(n) for n in state if not isinstance(n, str)])}, expected texts")
    names = {name: re.sub(r"\bgamma_([12])$", r"ls\1.gamma", WRAPPERS.sub("", name)) for name in state}
    for known, rules in (("stages.0.0.dwconv.weight", CONVNEXT), (FIRST_HALVING, SWIN)):
        for rule, timms in rules if known in set(names.values()) else ():
            names = {name: re.sub(rule, timms, new) for name, new in names.items()}
    kept = [name for name in state if not UNUSED.search(name)]
    new = [names[name] for name in kept]
    expect(len(set(new)) == len(new), "weights",
           lambda: f"two entries for one name: {some_of([n for n in new if new.count(n) > 1])}")
    wrapped = [match[0] for name in state if (match := WRAPPERS.match(name))]
    notes = [f"removed {wrapped[0]!r} from {len(wrapped)} names"] if wrapped else []
    if left := [name for name in state if name not in kept]:
        notes.append(f"left out {some_of(left)}")
    return {names[name]: _as_linear(names[name], state[name]) for name in kept}, notes


def _as_linear(name, array):
    """An array; of a predictor's 1 x 1 convolution (out, in, 1, 1), the matrix that it is."""
    ones = getattr(array, "shape", ())[2:] == (1, 1) and "score_predictor." in name
    return array.reshape(array.shape[:2]) if ones else array


def options_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the ViT that has these names and shapes: tt.models.ViT(**options_of(state)).

    Heads are read off normed queries, else they are taken to have 64 channels, as nearly all have; pictures
    are taken as square. What cannot be told is left out. InputError if these are no timm names."""
    needed = tuple(AXES)[:3]
    stem = "patch_embed.conv1.weight" in state  # LV-ViT's
    expect(all(name in state for name in needed) and not stem, "weights",
           lambda: f"these are not the names of timm's ViT, which has {', '.join(needed)}: "
                   f"{some_of(list(state))}")
    shapes = {name: tuple(getattr(state[name], "shape", ())) for name in AXES if name in state}
    wrong = [name for name, shape in shapes.items() if len(shape) != AXES[name] or not all(shape)]
    wrong = wrong or [needed[0]] * (shapes[needed[0]][2] != shapes[needed[0]][3])
    expect(not wrong, "weights",
           lambda: f"{some_of([f'{name} {shapes[name]}' for name in wrong])}, expected other axes: timm's "
                   f"{needed[0]} is (dim, channels, p, p) and pos_embed (1, positions, dim)")
    dim, channels, _, patch = shapes[needed[0]]
    has, hidden = state.__contains__, shapes[needed[2]][0]
    depth = 1 + max(int(number[1]) for name in state if (number := re.match(r"blocks\.(\d+)\.", str(name))))
    options = {"patch_size": patch, "dim": dim, "depth": depth, "channels": channels,
               "mlp_ratio": hidden // dim if hidden % dim == 0 else hidden / dim}
    if has("head.weight"):
        options["num_classes"] = shapes["head.weight"][0]
    head = shapes[QUERIES][0] if has(QUERIES) else 64
    if dim % head == 0:
        options["heads"] = dim // head
    pooled = has("fc_norm.weight")
    return options | _prefix_and_positions(state, patch) | {
        "qkv_bias": has("blocks.0.attn.qkv.bias"), "qk_norm": has(QUERIES),
        "pre_norm": has("norm_pre.weight"), "layer_scale": 1e-5 if has("blocks.0.ls1.gamma") else 0.0,
        "pool": "token" if has("cls_token") and not pooled else "mean",
        "class_token": True if has("cls_token") and pooled else None,
        "final_norm": "pooled" if pooled else "tokens" if has("norm.weight") else "none"}


def _prefix_and_positions(state, patch):
    """The options of the tokens before the patches, of their positions, and of the pictures' size."""
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    options = {"distilled": "dist_token" in state, "reg_tokens": registers}
    rows, before = state["pos_embed"].shape[1], ("cls_token" in state) + options["distilled"] + registers
    for embedded in (True, False):  # whether the tokens before the patches have positions, too
        side = math.isqrt(max(rows - before * embedded, 0))
        if "image_size" not in options and side and side**2 == rows - before * embedded:
            options |= {"image_size": side * patch, "no_embed_class": before > 0 and not embedded}
    return options
