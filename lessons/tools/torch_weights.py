"""Turns a file of PyTorch weights into an .npz that tinytoken's models take.

    python lessons/tools/torch_weights.py WEIGHTS.pth [OUT.npz] [--key NAME]

It takes what people have: the official DeiT and DynamicViT files ({"model": ..., "args": Namespace}), timm's
and other training checkpoints ({"state_dict"}, {"model_ema"}, {"state_dict_ema"}), bare state dicts, names
with "module." before them, half precision, and .safetensors files, which need no torch. It prints what it
took, what it left out and what it assumed, and the model that the names ask for. Then, without torch:

    model = tt.models.ViT(...)                      # as printed
    tt.models.load_weights(model, "WEIGHTS.npz")    # new_head=True: a head of one's own

Unpickling runs whatever code a file asks for, so torch is told to build tensors and plain values only
(weights_only=True), and argparse.Namespace and paths, which hold nothing else. A file that asks for more is
refused, with the name of what it asks for.
"""
import argparse
import collections
import pathlib
import re
import sys
from collections.abc import Mapping

import numpy as np

import tinytoken as tt
from tinytoken.errors import InputError, expect, install, some_of
from tinytoken.files import check_target, replacing
from tinytoken.models.weights import ASSUMED

# What a checkpoint may hold its weights under, the first that is there; averaged weights first, as in timm.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
PLAIN = (argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath,
         pathlib.PureWindowsPath)
OFFICIAL = "(official: 3, 6, 9 of 12 blocks and 0.7, 0.49, 0.343)"


def convert(source, out, key=None):
    """Write the weights of the file `source` to the .npz `out` -> lines that say how."""
    source, out = pathlib.Path(source), pathlib.Path(out)
    check_target(out, ".npz")
    expect(source.is_file(), "torch_weights", f"{source} is not there, or is no file")
    expect(not out.exists(), "torch_weights", f"{out} is there already: name another file for the result")
    loaded = (tt.models.read_weights(source) if source.suffix == ".safetensors" else unpickle(source))
    state, notes = chosen(loaded, key)
    state, renamed = tt.models.clean_names(state)
    arrays, changed = in_float32(state)
    with replacing(out) as file:
        np.savez(file, **arrays)
    return [*notes, *renamed, *changed, f"wrote {len(arrays)} arrays to {out}", *model_of(arrays)]


def unpickle(path):
    """What torch.load gives, of tensors and plain values only."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"torch_weights: {path} needs torch to be read ({error}): {install('torch')}, or in "
                         "an environment of its own, with tinytoken") from error
    expect(hasattr(torch.serialization, "safe_globals"), "torch_weights",
           lambda: f"torch {torch.__version__} is here, expected 2.5 or newer")
    try:
        with torch.serialization.safe_globals(list(PLAIN)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes raise KeyError, UnpicklingError, OSError ... there
        asked = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        expect(not asked, "torch_weights",
               lambda: f"{path} is not loaded: it asks for {asked[1]}, and what it asks for would run. If "
                       "you trust whoever made it, load it in torch with weights_only=False, save its state "
                       "dict alone by torch.save, and give that")
        reason = str(error).partition("\n")[0]
        raise InputError(f"torch_weights: {path} is no file of torch's, or is damaged "
                         f"({type(error).__name__}: {reason})") from error


def chosen(loaded, key):
    """The state dict inside of what was loaded -> (state, notes)."""
    expect(isinstance(loaded, Mapping), "torch_weights",
           f"the file holds a {type(loaded).__name__}, expected a dict")
    inside = [name for name, value in loaded.items() if isinstance(value, Mapping)
              and any(hasattr(entry, "shape") for entry in value.values())]
    expect(key is None or key in inside, "torch_weights",
           f"no weights under {key!r}: there are some under {some_of(inside)}")
    key = key or next((name for name in KEYS if name in inside), None)
    notes = [] if key is None else [f"took {key!r} of {some_of(list(loaded), 12)}"]
    state = loaded if key is None else loaded[key]
    arrays = {name: value for name, value in state.items()
              if isinstance(name, str) and hasattr(value, "shape")}
    others = [name for name in state if name not in arrays]
    notes += [f"left out what is no array with a name: {some_of(others)}"] if others else []
    expect(arrays, "torch_weights", f"no weights under {', '.join(KEYS)}: it holds {some_of(list(loaded))}",
           f"--key {inside[0]}" if inside else "")
    return arrays, notes


def in_float32(state):
    """Arrays of tensors or arrays, all floats in float32 -> (arrays, notes)."""
    arrays, changed = {}, collections.Counter()
    for name, value in state.items():
        kind = str(value.dtype).removeprefix("torch.")
        if hasattr(value, "detach"):
            value = value.detach()
            value = (value.float() if value.is_floating_point() else value).numpy()
        array = np.asarray(value)
        arrays[name] = array.astype("float32") if array.dtype.kind == "f" else array
        if "float" in kind and kind != "float32":
            changed[kind] += 1
    return arrays, [f"{n} arrays of {kind} are float32 now" for kind, n in changed.items()]


def model_of(arrays):
    """Lines that say which model takes the arrays, as far as names and shapes tell."""
    try:
        options = tt.models.options_of(arrays)
    except InputError as error:
        return [f"which model they are for is not clear: {error}"]
    config = tt.models.vit.ViTConfig
    default = {name: getattr(config, name) for name in options}
    sizes = ("image_size", "patch_size", "dim", "depth", "heads", "num_classes")
    call = ", ".join(f"{name}={options[name]!r}" for name in dict.fromkeys((*sizes, *options))
                     if name in options and (name in sizes or options[name] != default[name]))
    lines = [f"model: tt.models.ViT({call})"]
    if "heads" not in options:
        lines.append(f"heads: names do not tell, and dim {options['dim']} is no multiple of 64; give heads=")
    elif not options["qk_norm"]:
        lines.append("assumed: heads of 64 channels")
    if "image_size" not in options:
        lines.append("image_size: names do not tell, and the table of positions is not square; give "
                     "image_size=(H, W)")
    stages = {name.split(".")[1] for name in arrays if name.startswith("score_predictor.")}
    if stages:
        lines.append(f"a DynamicViT of {len(stages)} stages: tt.models.DynamicViT with these options, and "
                     f"prune_before and keep_ratios, which names do not tell {OFFICIAL}")
    return [*lines, f"assumed: {ASSUMED.format(eps=config.eps, pool=options['pool'])}"]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", type=pathlib.Path, help="a .pth, .pt, .bin, .ckpt or .safetensors file")
    parser.add_argument("out", type=pathlib.Path, nargs="?", help="default: the same name with .npz")
    parser.add_argument("--key", help="what the weights are under in a checkpoint with several")
    options = parser.parse_args(arguments)
    try:
        lines = convert(options.weights, options.out or options.weights.with_suffix(".npz"), options.key)
    except (InputError, ImportError) as error:
        sys.exit(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
