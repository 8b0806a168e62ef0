"""Checkpoints: whole or not at all, whatever happens while they are written; refused by name where they cannot be used."""
import errno
import json
import os
import stat
import zipfile

import numpy as np
import pytest

import tinytoken as tt
from small import each_model, refuses
from tiny import SIZES, bits, dynamicvit, python, vit
from tinytoken import checkpoint
from tinytoken.models import LookupViT, ViT
from tinytoken.optim import AdamW


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Written whole

def fails(name, code):
    def raise_it(*_, **__):
        raise OSError(code, os.strerror(code))
    return lambda monkeypatch: monkeypatch.setattr(os, name, raise_it)


FAILURES = {"disk full at the flush": (fails("fsync", errno.ENOSPC), "No space left on device"),
            "read-only at the rename": (fails("replace", errno.EROFS), "Read-only file system")}


@pytest.mark.parametrize("fail, reason", FAILURES.values(), ids=FAILURES)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(fail, reason, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    checkpoint.save(path, vit()[0], step=1)
    old = path.read_bytes()
    fail(monkeypatch)
    with refuses(f"cannot write {path}: {reason}"):
        checkpoint.save(path, dynamicvit()[0], step=2)
    with refuses(f"cannot write {tmp_path / 'other.json'}: {reason}"):
        checkpoint.write_json(tmp_path / "other.json", {})
    assert path.read_bytes() == old and left_in(tmp_path) == ["model.npz"]


FULL_DISK = """
import resource, sys, tinytoken as tt
model = tt.models.ViT(8, 4, 64, 2, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    tt.checkpoint.save(sys.argv[1], model)
except tt.InputError as error:
    print(error)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(tmp_path):
    """Really: the system refuses to let a file grow beyond 100 kB."""
    path = tmp_path / "model.npz"
    checkpoint.save(path, vit()[0])
    old = path.read_bytes()
    out, err = python("-c", FULL_DISK, path).communicate(timeout=60)
    assert (out, err) == (f"cannot write {path}: File too large\n", "")
    assert path.read_bytes() == old and left_in(tmp_path) == ["model.npz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_replacing_passes_on_what_is_no_fault_of_the_disk(error, tmp_path):
    with pytest.raises(error), checkpoint.replacing(tmp_path / "a.txt", "w") as file:
        file.write("half")
        raise error
    assert left_in(tmp_path) == []


def test_replacing_makes_folders_and_an_ordinary_file(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    checkpoint.write_json(path, {"x": [1, 2.5]})
    checkpoint.write_json(path, {"x": [1, None]})
    assert json.loads(path.read_text()) == {"x": [1, None]} and path.read_text().endswith("}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and left_in(path.parent) == ["c.json"]


def test_the_new_file_is_not_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with checkpoint.replacing(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("place", ["file/model.npz", "file/deep/model.npz", "folder", "/proc/tinytoken/model.npz"])
def test_a_place_that_cannot_be_written(place, tmp_path):
    """Permissions are not asked: root, who may run the tests, has all of them."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    reasons = "File exists|Not a directory|Is a directory|No such file or directory"
    with pytest.raises(tt.InputError, match=rf"^cannot write {path}: ({reasons})$"):
        checkpoint.save(path, vit()[0])
    assert left_in(tmp_path) == ["file", "folder"] and left_in(tmp_path / "folder") == []


# Read back

@each_model
def test_load_model_gives_the_same_logits(make, tmp_path):
    model = make()
    for dtype in ("float32", "float64"):
        for p in model.astype(dtype).parameters():
            p.data += 0.1 * np.random.default_rng(0).standard_normal(p.shape).astype(dtype)
        checkpoint.save(tmp_path / "m.npz", model, classes=["a", "b"], mean=(0.1, 0.2, 0.3))
        again, header = checkpoint.load_model(tmp_path / "m.npz")
        assert type(again) is type(model) and again.config == model.config and again.dtype == dtype
        assert header["classes"] == ["a", "b"] and header["mean"] == [0.1, 0.2, 0.3] and header["model"] == type(model).__name__
        images = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(dtype)
        assert model.eval()(images).data.tobytes() == again.eval()(images).data.tobytes()
        assert bits(again) == bits(model)


def test_sizes_that_are_numpy_numbers(tmp_path):
    model = ViT(**SIZES | {"depth": np.int64(1), "mlp_ratio": np.float32(2.5)})
    checkpoint.save(tmp_path / "m.npz", model)
    assert bits(checkpoint.load_model(tmp_path / "m.npz")[0]) == bits(model)
    checkpoint.restore(tmp_path / "m.npz", model)


def test_restore_brings_back_model_and_optimiser(tmp_path):
    model, _ = dynamicvit()
    optimizer = AdamW(model.parameters(), clip=1.0)
    for _ in range(3):
        optimizer.flat.grad[...] = np.random.default_rng(0).standard_normal(optimizer.flat.grad.shape)
        optimizer.step()
    checkpoint.save(tmp_path / "m.npz", model, optimizer, step=3)
    twin, _ = dynamicvit()
    other = AdamW(twin.parameters(), clip=1.0)
    assert checkpoint.restore(tmp_path / "m.npz", twin, other)["step"] == 3
    assert bits(twin) == bits(model) and other.steps == 3
    assert np.array_equal(other.m, optimizer.m) and np.array_equal(other.v, optimizer.v) and other.m.any()
    other.step()  # loading leaves flat storage as it is


# Refused

@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.npz"
    checkpoint.save(path, vit()[0], step=2)
    return path


def write_header(path, header, **arrays):
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


def write_array(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def damaged(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]


GOOD = {"format": checkpoint.FORMAT, "model": "ViT", "config": {}}
NO_ZIP = "is not a whole .npz file: truncated, or not a checkpoint"
FOREIGN = {
    "empty": (lambda path, data: path.write_bytes(b""), NO_ZIP),
    "text": (lambda path, data: path.write_text("a text"), NO_ZIP),
    "one array": (lambda path, data: write_array(path), NO_ZIP),
    "its first bytes": (lambda path, data: path.write_bytes(data[:50]), NO_ZIP),
    "half": (lambda path, data: path.write_bytes(data[:len(data) // 2]), NO_ZIP),
    "less one byte": (lambda path, data: path.write_bytes(data[:-1]), NO_ZIP),
    "one byte changed": (lambda path, data: path.write_bytes(damaged(data, len(data) // 2)),
                         r"is not a readable checkpoint \(BadZipFile: Bad CRC-32.*"),
    "arrays only": (lambda path, data: np.savez(path, x=np.ones(3)),
                    r"is not a 'tinytoken checkpoint 1' \(its header says None\)"),
    "another format": (lambda path, data: write_header(path, GOOD | {"format": "tinytoken checkpoint 9"}),
                       r"is not a 'tinytoken checkpoint 1' \(its header says 'tinytoken checkpoint 9'\)"),
    "no model": (lambda path, data: write_header(path, {"format": checkpoint.FORMAT}), "does not say its model and config"),
    "a list": (lambda path, data: write_header(path, [1]), r"is not a readable checkpoint \(AttributeError: .*"),
    "not JSON": (lambda path, data: np.savez(path, header=np.array("{")), r"is not a readable checkpoint \(JSONDecodeError: .*"),
    "pickled": (lambda path, data: np.savez(path, header=np.array([{}], dtype=object)),
                r"is not a readable checkpoint \(ValueError: Object arrays cannot be loaded when allow_pickle=False\)"),
    "other arrays": (lambda path, data: write_header(path, GOOD, **{"other/x": np.ones(2)}),
                     r"is not a readable checkpoint \(KeyError: 'other'\)"),
    "another model": (lambda path, data: write_header(path, GOOD | {"model": "ResNet"}),
                      "holds a 'ResNet', expected one of ViT, DynamicViT, LookupViT"),
    "an option of tomorrow": (lambda path, data: write_header(path, GOOD | {"config": {"registers": 4}}),
                              "does not describe a ViT: .* unexpected keyword argument 'registers'"),
}


@pytest.mark.parametrize("write, text", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_checkpoint(write, text, saved):
    write(saved, saved.read_bytes())
    with pytest.raises(tt.InputError, match=rf"^checkpoint: {saved} {text}$"):
        checkpoint.load_model(saved)


def test_a_missing_file_and_a_folder(tmp_path):
    with refuses(f"checkpoint: {tmp_path / 'none.npz'} does not exist"):
        checkpoint.load(tmp_path / "none.npz")
    with pytest.raises(tt.InputError, match=rf"^checkpoint: {tmp_path} is not a readable checkpoint \(IsADirectoryError"):
        checkpoint.load(tmp_path)


def test_any_byte_of_a_checkpoint_may_be_wrong(saved):
    """150 files with a few bytes changed, most in the directory at the end: each is read in full, or refused as an InputError."""
    data, rng, read = saved.read_bytes(), np.random.default_rng(0), 0
    for i in range(150):
        bad = bytearray(data)
        for at in len(data) - 1 - rng.integers(0, len(data) if i % 4 == 0 else 2500, 1 + i % 3):
            bad[at] = rng.integers(256)
        saved.write_bytes(bytes(bad))
        try:
            checkpoint.load(saved)
            read += 1
        except tt.InputError:
            pass
    assert 0 < read < 150


def test_restore_refuses_another_model_and_changes_nothing(saved):
    others = {r"LookupViT\(.*compressed=\[1, 1\].*\)": LookupViT(**SIZES, compressed=(1, 1)),
              r"ViT\(.*dim=12.*\)": ViT(**SIZES | {"dim": 12})}
    for text, other in others.items():
        optimizer, before = AdamW(other.parameters()), bits(other)
        with pytest.raises(tt.InputError, match=rf"^checkpoint: {saved} holds ViT\(.*dim=8.*\), expected {text}$"):
            checkpoint.restore(saved, other, optimizer)
        assert bits(other) == before and optimizer.steps == 0


def test_restore_refuses_another_kind_of_the_same_size(tmp_path):
    class Twin(ViT):
        pass
    checkpoint.save(tmp_path / "m.npz", Twin(**SIZES))
    with pytest.raises(tt.InputError, match=r"holds Twin\(image_size=8, .*\), expected ViT\(image_size=8, .*\)$"):
        checkpoint.restore(tmp_path / "m.npz", ViT(**SIZES))


def test_restore_refuses_a_finished_model_where_moments_are_wanted(saved):
    model = ViT(**SIZES)
    before = bits(model)
    with refuses(f"checkpoint: {saved} holds no optimiser moments: it is a finished model, not a run to go on with"):
        checkpoint.restore(saved, model, AdamW(model.parameters()))
    assert bits(model) == before
    assert checkpoint.restore(saved, model)["step"] == 2 and bits(model) == bits(vit()[0])


def test_restore_refuses_moments_of_another_dtype_and_changes_nothing(tmp_path):
    model, _ = vit()
    checkpoint.save(tmp_path / "m.npz", model, AdamW(model.parameters()))
    double = ViT(**SIZES).astype("float64")
    before = bits(double)
    with pytest.raises(tt.InputError, match=r"^AdamW: moments m \(\d+,\) float32, expected \(\d+,\) float64$"):
        checkpoint.restore(tmp_path / "m.npz", double, AdamW(double.parameters()))
    assert bits(double) == before


def test_a_checkpoint_is_a_plain_zip_of_arrays(saved):
    with zipfile.ZipFile(saved) as box:
        names = box.namelist()
    assert names[0] == "header.npy" and "model/patch_embed.proj.weight.npy" in names
