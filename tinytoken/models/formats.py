"""The files that published weights come in, read without torch, and the names in them.

Nothing is unpickled: torch's own files become .npz files by lessons/tools/torch_weights.py.
"""
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError, expect, install, some_of
from ..files import FilePath
from ..reading import opened, read_npz

WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and of data-parallel training
UNUSED = re.compile(r"pre_logits\.|n_averaged$")  # a layer that no model has any more; a count of averages
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
               "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?"}
TORCH_FILES = "python lessons/tools/torch_weights.py FILE, which writes an .npz of it"


def read_weights(path: FilePath) -> dict[str, np.ndarray]:
    """{name: array} of an .npz or a .safetensors file (the extra `safetensors`); bfloat16 becomes float32.

    InputError says what is wrong with any other file."""
    path, where = pathlib.Path(path), "weights file"
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

    Prefixes of wrappers ("module.", "_orig_mod.") go, DeiT III's gamma_1 is ls1.gamma, pre_logits is left
    out."""
    names = {name: re.sub(r"\bgamma_([12])$", r"ls\1.gamma", WRAPPERS.sub("", name)) for name in state}
    kept = [name for name in state if not UNUSED.search(name)]
    new = [names[name] for name in kept]
    expect(len(set(new)) == len(new), "weights",
           lambda: f"two entries for one name: {some_of([n for n in new if new.count(n) > 1])}")
    wrapped = [match[0] for name in state if (match := WRAPPERS.match(name))]
    notes = [f"removed {wrapped[0]!r} from {len(wrapped)} names"] if wrapped else []
    if left := [name for name in state if name not in kept]:
        notes.append(f"left out {some_of(left)}")
    return {names[name]: state[name] for name in kept}, notes
