"""Checkpoints: what is read back is what was saved, and what cannot be used is refused by name."""
import json
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

import tinytoken as tt
from small import each_model, refuses
from tiny import SIZES, PowerCut, at_step, bits, dynamicvit, power_cut, train, vit
from tinytoken import models, nn
from tinytoken.models import LookupViT, ViT
from tinytoken.train import AdamW, Run, checkpoint


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
        assert header["classes"] == ["a", "b"] and header["mean"] == [0.1, 0.2, 0.3]
        assert header["model"] == type(model).__name__
        images = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(dtype)
        assert model.eval()(images).logits.data.tobytes() == again.eval()(images).logits.data.tobytes()
        assert bits(again) == bits(model)


def without(path, *options, **changes):
    """The checkpoint as a version that did not know these options would have left it."""
    header, groups = checkpoint.load(path)
    header["config"] = {name: value for name, value in header["config"].items()
                        if name not in options} | changes
    write_header(path, header, **{f"{group}/{name}": array for group, arrays in groups.items()
                                  for name, array in arrays.items()})


def test_an_option_that_a_checkpoint_does_not_name_has_its_default(tmp_path):
    """What is newer than the checkpoint: it is loaded, gone on with, and refused where the option is
    another."""
    path, model = tmp_path / "m.npz", vit()[0]
    optimizer = AdamW(model.parameters())
    checkpoint.save(path, model, optimizer, step=3)
    without(path, "pool", "channels")
    again, _ = checkpoint.load_model(path)
    assert bits(again) == bits(model) and again.config == model.config
    twin, _ = vit()
    twin.head.bias.data += 1
    checkpoint.restore(path, twin, AdamW(twin.parameters()))
    assert bits(twin) == bits(model)
    other = ViT(**SIZES, pool="mean")
    with pytest.raises(tt.InputError, match=r"holds ViT\(image.*\), expected ViT\(.*pool=mean, .*\)$"):
        checkpoint.restore(path, other)
    without(path, depth=2)  # and what it does name has to agree
    with pytest.raises(tt.InputError, match=r"holds ViT\(.*depth=2.*\), expected ViT\(.*depth=1.*\)$"):
        checkpoint.restore(path, twin)


def test_a_run_goes_on_from_a_checkpoint_without_a_newer_option(tmp_path):
    with pytest.raises(PowerCut):
        train(at_step(dynamicvit, 7, power_cut), Run(tmp_path, every=4))
    without(tmp_path / "train.npz", "official", "mlp_ratio")
    model, _ = train(dynamicvit, Run(tmp_path, every=4))
    assert bits(model) == bits(train(dynamicvit)[0])


def test_a_rectangle_comes_back(tmp_path):
    model = LookupViT(**SIZES | {"image_size": (8, 12)}, compressed=(2, 3))
    checkpoint.save(tmp_path / "m.npz", model)
    again, header = checkpoint.load_model(tmp_path / "m.npz")
    assert again.config == model.config and again.config.image_size == (8, 12) and bits(again) == bits(model)
    assert header["config"]["image_size"] == [8, 12] and header["config"]["compressed"] == [2, 3]
    checkpoint.restore(tmp_path / "m.npz", model)


@pytest.mark.parametrize("name", models.names())
def test_every_registered_model_is_saved_and_loaded(name, tmp_path):
    model = models.create(name, **SIZES | {"depth": 6, "image_size": 16})
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    again, header = checkpoint.load_model(tmp_path / "m.npz")
    assert type(again) is type(model) and again.config == model.config and bits(again) == bits(model)
    checkpoint.restore(tmp_path / "m.npz", model)


def test_a_module_that_has_no_config_is_kept_by_its_class(tmp_path):
    """A task's head on another model, say: there is nothing to make it from, and nothing else to compare."""
    class Head(nn.Module):
        def __init__(self, model):
            self.model, self.head = model, nn.Linear(8, 2)
    checkpoint.save(tmp_path / "m.npz", Head(vit()[0]))
    other = Head(ViT(**SIZES))
    other.head.weight.data += 1
    checkpoint.restore(tmp_path / "m.npz", other)
    assert (other.head.weight.data == 0).all()
    with pytest.raises(tt.InputError, match=r"holds a 'Head', expected one of vit, "):
        checkpoint.load_model(tmp_path / "m.npz")
    with pytest.raises(tt.InputError, match=r"holds Head\(\), expected Linear\(\)$"):
        checkpoint.restore(tmp_path / "m.npz", nn.Linear(8, 2))


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
    "no model": (lambda path, data: write_header(path, {"format": checkpoint.FORMAT}),
                 "does not say its model and config"),
    "a list": (lambda path, data: write_header(path, [1]),
               r"is not a 'tinytoken checkpoint 1' \(its header says None\)"),
    "its format alone": (lambda path, data: write_header(path, checkpoint.FORMAT),
                         r"is not a 'tinytoken checkpoint 1' \(its header says None\)"),
    "not JSON": (lambda path, data: np.savez(path, header=np.array("{")),
                 r"has a header that is not JSON \(JSONDecodeError: .*"),
    "a deep list": (lambda path, data: np.savez(path, header=np.array("[" * 100_000)),
                    r"has a header that is not JSON \(RecursionError: .*"),
    "a header of numbers": (lambda path, data: np.savez(path, header=np.ones(2)),
                            r"has a header of \(2,\) float64, expected a text"),
    "pickled": (lambda path, data: np.savez(path, header=np.array([{}], dtype=object)),
                "holds 'header.npy' of Python objects, expected numbers"),
    "other arrays": (lambda path, data: write_header(path, GOOD, **{"other/x": np.ones(2)}),
                     "holds 'other/x', expected model/... or optimizer/..."),
    "another model": (lambda path, data: write_header(path, GOOD | {"model": "ResNet"}),
                      f"holds a 'ResNet', expected one of {', '.join(models.names())}"),
    "an option of tomorrow": (lambda path, data: write_header(path, GOOD | {"config": {"registers": 4}}),
                              r"does not describe a ViT: ViT: got an unexpected keyword argument "
                              r"'registers'; it takes .*"),
}


@pytest.mark.parametrize("write, text", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_checkpoint(write, text, saved):
    write(saved, saved.read_bytes())
    with pytest.raises(tt.InputError, match=rf"^checkpoint: {saved} {text}$"):
        checkpoint.load_model(saved)


def test_a_missing_file_and_a_folder(tmp_path):
    with refuses(f"checkpoint: {tmp_path / 'none.npz'} does not exist"):
        checkpoint.load(tmp_path / "none.npz")
    with pytest.raises(tt.InputError,
                       match=rf"^checkpoint: {tmp_path} cannot be read: Is a directory$"):
        checkpoint.load(tmp_path)


def test_any_byte_of_a_checkpoint_may_be_wrong(saved):
    """150 files with a few bytes changed, most in the directory at the end: each is read in full, or refused
    as an InputError."""
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
        with pytest.raises(tt.InputError,
                           match=rf"^checkpoint: {saved} holds ViT\(.*dim=8.*\), expected {text}$"):
            checkpoint.restore(saved, other, optimizer)
        assert bits(other) == before and optimizer.steps == 0


def test_restore_refuses_another_kind_of_the_same_size(tmp_path):
    class Twin(ViT):
        pass
    checkpoint.save(tmp_path / "m.npz", Twin(**SIZES))
    with pytest.raises(tt.InputError,
                       match=r"holds Twin\(image_size=8, .*\), expected ViT\(image_size=8, .*\)$"):
        checkpoint.restore(tmp_path / "m.npz", ViT(**SIZES))


def test_restore_refuses_a_finished_model_where_moments_are_wanted(saved):
    model = ViT(**SIZES)
    before = bits(model)
    with refuses(f"checkpoint: {saved} holds no optimiser moments: it is a finished model, not a run to go "
                 f"on with"):
        checkpoint.restore(saved, model, AdamW(model.parameters()))
    assert bits(model) == before
    assert checkpoint.restore(saved, model)["step"] == 2 and bits(model) == bits(vit()[0])


def test_restore_refuses_moments_of_another_dtype_and_changes_nothing(tmp_path):
    model, _ = vit()
    checkpoint.save(tmp_path / "m.npz", model, AdamW(model.parameters()))
    double = ViT(**SIZES).astype("float64")
    before = bits(double)
    with pytest.raises(tt.InputError,
                       match=r"^AdamW: moments m \(\d+,\) float32, expected \(\d+,\) float64$"):
        checkpoint.restore(tmp_path / "m.npz", double, AdamW(double.parameters()))
    assert bits(double) == before


def test_a_checkpoint_is_a_plain_zip_of_arrays(saved):
    with zipfile.ZipFile(saved) as box:
        names = box.namelist()
    assert names[0] == "header.npy" and "model/patch_embed.proj.weight.npy" in names


def changed(path, change=lambda arrays: None, **header):
    """Another header, or other arrays, in the checkpoint at `path`."""
    with np.load(path) as box:
        arrays = dict(box)
    there = json.loads(str(arrays.pop("header")))
    change(arrays)
    write_header(path, {name: value for name, value in (there | header).items() if value != "gone"}, **arrays)


@pytest.mark.parametrize("change, text", [
    ({"model": 5}, "has the model 5, expected the name of a class"),
    ({"model": None}, "has the model None, expected the name of a class"),
    ({"config": []}, "has the config [], expected options by name"),
    ({"config": {"mlp_ratio": "4"}},
     "does not describe a ViT: ViT: mlp_ratio '4', expected a positive number"),
    ({"config": {"pool": None}}, "does not describe a ViT: ViT: pool None, expected token or mean")])
def test_a_header_with_wrong_types_is_refused_by_name(change, text, tmp_path):
    path = tmp_path / "vit.npz"
    checkpoint.save(path, tt.models.ViT(8, 4, 8, 1, 2))
    changed(path, **change)
    with pytest.raises(tt.InputError, match=re.escape(f"checkpoint: {path} {text}")):
        checkpoint.load_model(path)


@pytest.mark.parametrize("change, text", [
    (lambda arrays: arrays.pop("model/head.bias"), "load_state_dict: missing head.bias; unexpected none"),
    (lambda arrays: arrays.update({"model/head.bias": np.zeros(3, "f")}),
     "load_state_dict: other shapes: head.bias (3,), expected (10,)")])
def test_weights_that_do_not_fit_are_refused_with_the_files_name(change, text, tmp_path):
    path = tmp_path / "vit.npz"
    checkpoint.save(path, tt.models.ViT(8, 4, 8, 1, 2))
    changed(path, change)
    with pytest.raises(tt.InputError, match=re.escape(f"checkpoint: {path} does not describe a ViT: {text}")):
        checkpoint.load_model(path)


@pytest.mark.parametrize("read", [checkpoint.load_model, lambda path: checkpoint.restore(path, vit()[0])])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, read, saved):
    changed(saved, lambda arrays: arrays["model/head.weight"].put([2, 3], value))
    with refuses(f"checkpoint: {saved} has 2 values in head.weight that are not finite"):
        read(saved)


def test_moments_that_are_not_finite_are_refused_and_nothing_is_changed(tmp_path):
    path, (model, _) = tmp_path / "m.npz", vit()
    checkpoint.save(path, model, AdamW(model.parameters()))
    for change, header, text in (
            (lambda arrays: arrays["optimizer/v"].put(0, np.nan), {}, "1 values in v that are not finite"),
            (lambda arrays: None, {"optimizer_steps": -1}, "the optimizer_steps -1, expected a whole number"),
            (lambda arrays: None, {"optimizer_steps": "gone"},
             "the optimizer_steps None, expected a whole number")):
        checkpoint.save(path, model, AdamW(model.parameters()))
        changed(path, change, **header)
        other = ViT(**SIZES)
        before, optimizer = bits(other), AdamW(other.parameters())
        with pytest.raises(tt.InputError, match=f"^checkpoint: {path} has {text}"):
            checkpoint.restore(path, other, optimizer)
        assert bits(other) == before and optimizer.steps == 0 and not optimizer.v.any()


@pytest.mark.parametrize("config", [
    {"depth": 10**9}, {"dim": 10**9}, {"dim": 20_000}, {"num_classes": 10**9}, {"mlp_ratio": 1e12},
    {"mlp_ratio": float("inf")},
    {"image_size": 4_000}, {"image_size": 10**12}, {"channels": 10**9}, {"mlp_ratio": 10**400},
    {"depth": 500}, {"patch_size": 10**9, "image_size": 10**9}])
def test_a_config_beyond_the_weights_is_refused_before_anything_is_made(config, saved):
    """The saved model has some 1,300 values."""
    changed(saved, config=SIZES | config)
    tracemalloc.start()
    try:
        with pytest.raises(tt.InputError, match=f"^checkpoint: {saved} does not describe a ViT: "):
            checkpoint.load_model(saved)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_pipe_in_place_of_a_checkpoint_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "m.npz")
    with refuses(f"checkpoint: {tmp_path / 'm.npz'} cannot be read: not a regular file"):
        checkpoint.load(tmp_path / "m.npz")
