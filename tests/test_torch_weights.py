"""The script that turns PyTorch's files into ours. With torch installed, on files that torch wrote; without
it, with a stand-in that gives what torch.load gives. .safetensors files need neither."""
import argparse
import contextlib
import json
import pathlib
import pickle
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

import tinytoken as tt
from lessons.tools import torch_weights
from small import SMALL, pictures, shaken

ROOT = pathlib.Path(__file__).parents[1]
SIZES = SMALL | dict(dim=64, heads=1)


class FakeTensor:
    """What the script asks of a torch.Tensor."""

    def __init__(self, array, kind=None):
        self.array, self.dtype = array, f"torch.{kind or array.dtype.name}"
        self.shape = array.shape

    def detach(self):
        return self

    def is_floating_point(self):
        return self.array.dtype.kind == "f"

    def float(self):
        return FakeTensor(self.array.astype("float32"))

    def numpy(self):
        assert "bfloat16" not in self.dtype, "NumPy has none"
        return self.array


@pytest.fixture
def fake(monkeypatch):
    """A torch whose load() gives `fake.loaded`, or raises it; fake.allowed: what it was told is safe."""
    torch = types.SimpleNamespace(allowed=None, inside=False)

    @contextlib.contextmanager
    def safe_globals(kinds):
        torch.allowed, torch.inside = kinds, True
        yield
        torch.inside = False

    def load(path, *, map_location, weights_only):
        assert torch.inside and weights_only is True and map_location == "cpu"
        if isinstance(torch.loaded, Exception):
            raise torch.loaded
        return torch.loaded
    torch.serialization, torch.load = types.SimpleNamespace(safe_globals=safe_globals), load
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def weights(seed=0, **options):
    return shaken(tt.models.ViT(**SIZES, **options), seed).astype("float32").state_dict()


def tensors(state, kind=None):
    return {name: FakeTensor(array, kind) for name, array in state.items()}


def source(tmp_path, name="w.pth"):
    path = tmp_path / name
    path.write_bytes(b"")
    return path


STATE, OTHER = weights(), weights(1)
PREFIXED = {f"module.{name}": a for name, a in STATE.items()}
# what is in the file, and which lines are printed before "wrote 32 arrays"
FILES = {
    "bare": (lambda t: t(STATE), []),
    "official": (lambda t: {"model": t(STATE), "optimizer": {"state": {0: {}}}, "epoch": 3,
                            "args": argparse.Namespace(lr=1, output_dir=pathlib.PurePosixPath("x"))},
                 ["took 'model' of model, optimizer, epoch, args"]),
    "state_dict": (lambda t: {"epoch": 1, "arch": "x", "state_dict": t(PREFIXED)},
                   ["took 'state_dict' of epoch, arch, state_dict", "removed 'module.' from 32 names"]),
    "model_ema": (lambda t: {"model": t(OTHER), "model_ema": t(STATE)},
                  ["took 'model_ema' of model, model_ema"]),
    "no ema yet": (lambda t: {"model": t(STATE), "model_ema": None, "state_dict_ema": {}},
                   ["took 'model' of model, model_ema, state_dict_ema"]),
    "state_dict_ema": (lambda t: {"state_dict": t(OTHER), "state_dict_ema": t(STATE)},
                       ["took 'state_dict_ema' of state_dict, state_dict_ema"]),
    "averaged": (lambda t: t(PREFIXED | {"n_averaged": np.array(3)}),
                 ["removed 'module.' from 32 names", "left out n_averaged"]),
    "more than arrays": (lambda t: t(STATE) | {"epoch": 3} | {0: next(iter(t(STATE).values()))},
                         ["left out what is no array with a name: epoch, 0"])}
MODEL = ["model: tt.models.ViT(image_size=8, patch_size=2, dim=64, depth=2, heads=1, num_classes=5)",
         "assumed: heads of 64 channels",
         "assumed: layer norms' eps=1e-06 (CLIP's is 1e-05), pool='token' (what the head reads), "
         "the exact GELU (OpenAI's CLIP has another), and "
         "pictures normalised as when the weights were trained (often by ImageNet's mean (0.485, 0.456, "
         "0.406) and std (0.229, 0.224, 0.225), or by 0.5 and 0.5): names do not tell"]


def check(lines, before, out, state=STATE):
    assert lines == [*before, f"wrote {len(state)} arrays to {out}", *MODEL]
    with np.load(out) as box:
        assert set(box.files) == set(state)
        assert all(box[name].dtype == "float32" and np.array_equal(box[name], a) for name, a in state.items())
    model = tt.models.ViT(**SIZES)
    assert model.load_state_dict(tt.models.read_weights(out)) == ([], [])


@pytest.mark.parametrize("name", FILES)
def test_what_people_have(fake, tmp_path, name):
    make, before = FILES[name]
    fake.loaded = make(tensors)
    check(torch_weights.convert(source(tmp_path), tmp_path / "o.npz"), before, tmp_path / "o.npz")
    assert set(fake.allowed) == set(torch_weights.PLAIN) and argparse.Namespace in fake.allowed


@pytest.mark.parametrize("kind, dtype", [("float16", "float16"), ("bfloat16", "float32"),
                                         ("float64", "float64")])
def test_every_width_becomes_float32(fake, tmp_path, kind, dtype):
    narrow = {name: a.astype(dtype) for name, a in STATE.items()}
    fake.loaded = tensors(narrow, kind) | {"head.bias": FakeTensor(STATE["head.bias"])}
    lines = torch_weights.convert(source(tmp_path), tmp_path / "o.npz")
    expected = {name: a.astype("float32") for name, a in narrow.items()} | {"head.bias": STATE["head.bias"]}
    check(lines, [f"31 arrays of {kind} are float32 now"], tmp_path / "o.npz", expected)


def test_whole_numbers_stay(fake, tmp_path):
    fake.loaded = tensors({"steps": np.array([1, 2])})
    torch_weights.convert(source(tmp_path), tmp_path / "o.npz")
    assert np.load(tmp_path / "o.npz")["steps"].dtype == "int64"


def test_a_key_chooses(fake, tmp_path):
    fake.loaded = {"teacher": tensors(STATE), "student": tensors(OTHER), "model": tensors(OTHER)}
    check(torch_weights.convert(source(tmp_path), tmp_path / "o.npz", "teacher"),
          ["took 'teacher' of teacher, student, model"], tmp_path / "o.npz")


ASKS = pickle.UnpicklingError("Weights only load failed. ...\n(2) ... WeightsUnpickler error: Unsupported "
                              "global: GLOBAL types.SimpleNamespace was not an allowed global by default. "
                              "Please use ...")


@pytest.mark.parametrize("loaded, key, text", [
    (ASKS, None, "{path} is not loaded: it asks for types.SimpleNamespace, and what it asks for would run. "
                 "If you trust whoever made it, load it in torch with weights_only=False, save its state "
                 "dict alone by torch.save, and give that"),
    (KeyError(101), None, "{path} is no file of torch's, or is damaged (KeyError: 101)"),
    (RuntimeError("PytorchStreamReader failed\nat line 3"), None,
     "{path} is no file of torch's, or is damaged (RuntimeError: PytorchStreamReader failed)"),
    ([1, 2], None, "the file holds a list, expected a dict"),
    ({"x": 1}, None, "no weights under state_dict_ema, model_ema, state_dict, model: it holds x"),
    ({"teacher": tensors(STATE), "student": {}}, None,
     "no weights under state_dict_ema, model_ema, state_dict, model: it holds teacher, student\n"
     "  likely: --key teacher"),
    ({"model": tensors(STATE), "epoch": 3}, "epoch", "no weights under 'epoch': there are some under model"),
], ids=range(7))
def test_files_that_are_refused(fake, tmp_path, loaded, key, text):
    fake.loaded, path = loaded, source(tmp_path)
    with pytest.raises(tt.InputError) as refused:
        torch_weights.convert(path, tmp_path / "o.npz", key)
    assert str(refused.value) == "torch_weights: " + text.format(path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_names_of_files_that_are_refused(fake, tmp_path):
    fake.loaded = tensors(STATE)
    taken = source(tmp_path, "taken.npz")
    (tmp_path / "folder.npz").mkdir()
    for args, text in ((("gone.pth", "o.npz"), "torch_weights: .*gone.pth is not there, or is no file"),
                       (("folder.npz", "o.npz"), "torch_weights: .*folder.npz is not there, or is no file"),
                       (("w.pth", "o.npy"), "cannot write .*o.npy: expected a name that ends in .npz"),
                       (("w.pth", "folder.npz"), "cannot write .*folder.npz: it is a folder, expected .*"),
                       (("w.pth", "taken.npz"),
                        "torch_weights: .*taken.npz is there already: name another file for the result")):
        source(tmp_path)
        with pytest.raises(tt.InputError, match=f"^{text}$"):
            torch_weights.convert(*(tmp_path / name for name in args))
    assert taken.read_bytes() == b""


def test_without_torch_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(tt.InputError, match="w.pth needs torch to be read .*: .*-m pip install torch, or in"):
        torch_weights.convert(source(tmp_path), tmp_path / "o.npz")


def test_a_torch_that_is_too_old(fake, tmp_path):
    fake.__version__ = "2.1"
    del fake.serialization.safe_globals
    with pytest.raises(tt.InputError, match="^torch_weights: torch 2.1 is here, expected 2.5 or newer$"):
        torch_weights.convert(source(tmp_path), tmp_path / "o.npz")


def test_which_model_the_names_ask_for(fake, tmp_path):
    dynamic = tt.models.DynamicViT(**SIZES | dict(depth=3), prune_before=(1, 2), keep_ratios=(0.7, 0.4))
    odd = tt.models.ViT(**SMALL | dict(image_size=(8, 10)), distilled=True, reg_tokens=2, qkv_bias=False)
    normed = tt.models.ViT(**SMALL, qk_norm=True, layer_scale=1.0)
    for model, call, more in (
            (dynamic, "image_size=8, patch_size=2, dim=64, depth=3, heads=1, num_classes=5",
             ["a DynamicViT of 2 stages: tt.models.DynamicViT with these options, and prune_before and "
              "keep_ratios, which names do not tell (official: 3, 6, 9 of 12 blocks and 0.7, 0.49, 0.343)",
              "assumed: heads of 64 channels"]),
            (odd, "patch_size=2, dim=8, depth=2, num_classes=5, distilled=True, reg_tokens=2, qkv_bias=False",
             ["heads: names do not tell, and dim 8 is no multiple of 64; give heads=",
              "image_size: names do not tell, and the table of positions is not square; give "
              "image_size=(H, W)"]),
            (normed, "image_size=8, patch_size=2, dim=8, depth=2, heads=2, num_classes=5, qk_norm=True, "
                     "layer_scale=1e-05", [])):
        lines = torch_weights.model_of(model.state_dict())
        assert sorted(lines[1:-1]) == sorted(more) and lines[0].startswith("model: tt.models.ViT(")
        assert lines[0] == f"model: tt.models.ViT({call})" and lines[-1] == MODEL[-1]
    [line] = torch_weights.model_of({"encoder.weight": np.zeros(2)})
    assert line.startswith("which model they are for is not clear: weights: these are not the names of ")


def test_the_printed_model_takes_the_file(fake, tmp_path):
    state = weights(distilled=True, reg_tokens=3, no_embed_class=True, layer_scale=0.5, qk_norm=True)
    fake.loaded = {"model": tensors(state)}
    lines = torch_weights.convert(source(tmp_path), tmp_path / "o.npz")
    call = next(line for line in lines if line.startswith("model: ")).removeprefix("model: ")
    options = dict(eval(call, {"tt": types.SimpleNamespace(models=types.SimpleNamespace(ViT=dict))}))
    model = tt.models.ViT(**options)
    tt.models.load_weights(model, tmp_path / "o.npz", quiet=True)
    assert all(np.array_equal(array, state[name]) for name, array in model.state_dict().items())
    assert model(pictures().astype("float32")).logits.shape == (2, 5)


def test_the_command_takes_safetensors_without_torch(tmp_path):
    pytest.importorskip("safetensors")
    header, data = {}, b""
    for name, array in STATE.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    command = [sys.executable, ROOT / "lessons" / "tools" / "torch_weights.py", tmp_path / "w.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    check(done.stdout.splitlines(), [], tmp_path / "w.npz")
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1 and again.stdout == ""
    text = f"torch_weights: {tmp_path / 'w.npz'} is there already: name another file for the result\n"
    assert again.stderr == text


# With torch itself

@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed; a stand-in for it is tried instead")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_torchs(torch, tmp_path, name, new):
    make, before = FILES[name]
    content = make(lambda state: {name: torch.tensor(array) for name, array in state.items()})
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    check(torch_weights.convert(tmp_path / "w.pth", tmp_path / "o.npz"), before, tmp_path / "o.npz")


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_tensors_of_every_width(torch, tmp_path, kind):
    content = {name: torch.tensor(array).to(getattr(torch, kind)) for name, array in STATE.items()}
    torch.save(content, tmp_path / "w.pth")
    lines = torch_weights.convert(tmp_path / "w.pth", tmp_path / "o.npz")
    check(lines, [f"32 arrays of {kind} are float32 now"], tmp_path / "o.npz",
          {name: tensor.float().numpy() for name, tensor in content.items()})


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_file_of_torchs_that_asks_for_more(torch, tmp_path, new):
    torch.save({"model": {"a": torch.ones(2)}, "config": types.SimpleNamespace(a=1)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=new)
    with pytest.raises(tt.InputError, match="is not loaded: it asks for types.SimpleNamespace, and what it"):
        torch_weights.convert(tmp_path / "w.pth", tmp_path / "o.npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4 and no more"])
def test_bytes_that_are_no_file_of_torchs(torch, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(tt.InputError, match="w.pth is no file of torch's, or is damaged"):
        torch_weights.convert(tmp_path / "w.pth", tmp_path / "o.npz")
