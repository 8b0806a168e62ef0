"""The main job: what it writes, that its numbers are right, that nobody trains longer, and that nothing is
done twice."""
import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import RECIPE, bits, history, recipes_model, small_cifar
from tinytoken import backend, files
from tinytoken.data import load_pictures, make_scenes, normalise
from tinytoken.errors import install
from tinytoken.experiments import Trial, compare, tables, timing, trial
from tinytoken.train import Run, checkpoint, step

PHASES = {"vit-start": 12, "vit": 4, "dynamicvit": 4, "lookupvit-start": 12, "lookupvit": 4}
NAMES = {"ViT": "vit", "DynamicViT": "dynamicvit", "LookupViT": "lookupvit"}
RUN = dict(device="cpu", every=5, threads=2, bar=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, table, last line) of a whole run, the picture included."""
    out = tmp_path_factory.mktemp("compare") / "run"
    return out, *compare.run(RECIPE, out, **RUN)


@pytest.fixture
def copied(done, tmp_path):
    """A copy of that run's folder, to change."""
    return shutil.copytree(done[0], tmp_path / "copy")


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *_: "no picture")


def trained(folder):
    return {name: checkpoint.load_model(folder / f"{phase}.npz")[0] for name, phase in NAMES.items()}


# What is written

def test_files(done):
    out, table, line = done
    expected = {f"{phase}.npz" for phase in PHASES} | {"history.jsonl", "table.json", "tokens.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert line == f"picture: {out / 'tokens.png'}"
    assert (out / "tokens.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "table.json").read_text()) == json.loads(json.dumps(table))


def test_history_has_all_phases(done):
    last_steps = [(phase, steps - 1) for phase, steps in PHASES.items()]
    assert [(row["phase"], row["step"]) for row in history(done[0])] == last_steps
    for phase, report in done[1]["training"].items():
        more = {"dynamicvit": {"ratio", "kl", "token"}}
        assert set(report) == {"seconds", "loss", "class"} | more.get(phase, set())


def test_checkpoints_say_what_a_picture_of_ones_own_needs(done):
    out, table, _ = done
    data = make_scenes(RECIPE.train_pictures, seed=0, split="train")
    for phase, steps in PHASES.items():
        header, _ = checkpoint.load(out / f"{phase}.npz")
        expected = {"phase": phase, "step": steps, "classes": list(data.names), "data": "scenes"}
        assert header | expected == header
        assert (tuple(header["mean"]), tuple(header["std"])) == tt.data.channel_statistics(data.images)


# The table

def closed_forms():
    """Multiply-adds of ViT and DynamicViT at RECIPE's size: 16 patches of 8 x 8, 8 of them left in the second
    block."""
    D, block = RECIPE.dim, lambda tokens: 12 * tokens * RECIPE.dim ** 2 + 2 * tokens ** 2 * RECIPE.dim
    ends = 16 * (3 * 8 * 8) * D + D * 10
    predictor = 1.625 * 16 * D ** 2 + 16 * D / 2
    return {"ViT": ends + 2 * block(17), "DynamicViT": ends + block(17) + predictor + block(9)}


def test_rows(done):
    out, table, _ = done
    test = make_scenes(RECIPE.test_pictures, seed=0, split="test")
    header, _ = checkpoint.load(out / "vit.npz")
    images, found = normalise(test.images, header["mean"], header["std"]), trained(out)
    assert [row["model"] for row in table["rows"]] == list(found)
    for row, (name, model) in zip(table["rows"], found.items()):
        logits = model.eval()(images).logits.data
        assert row["accuracy"] == np.mean(logits.argmax(axis=1) == test.labels)
        assert row["macs"] == tt.macs(model, images[:2]).total
        assert row["macs"] == closed_forms().get(name, row["macs"])
        assert row["parameters"] == sum(p.size for p in model.parameters())
        assert list(row["images_per_second"]) == ["1", "128"]
        for median, low, high in row["images_per_second"].values():
            assert 0 < low <= median <= high


def test_each_row_is_its_models(monkeypatch):
    """infer is replaced by one that is right for a single row."""
    job, used = Trial(RECIPE, threads=7, bar=False), set()
    model = recipes_model("lookupvit", compressed=(2, 2))
    found = {"ViT": recipes_model("vit"), "LookupViT": model,
             "DynamicViT": recipes_model("dynamicvit", prune_before=(1,), keep_ratios=(0.5,))}

    def infer(asked, images, *prepare, threads, batch_size=128, **call):
        used.add(threads)
        right, labels = asked is model and not call, job.test.labels
        return np.eye(10)[labels if right else (labels + 1) % 10]
    monkeypatch.setattr(timing, "infer", infer)
    monkeypatch.setattr(trial, "infer", infer)
    table = compare.measure(job, found)
    assert [row["accuracy"] for row in table["rows"]] == [0, 1, 0] and used == {7}


def test_what_the_table_says_of_itself(done):
    _, table, _ = done
    assert table["test_pictures"] == 20 and table["recipe"] == dataclasses.asdict(RECIPE)
    assert list(table["training"]) == list(PHASES)
    assert all(phase["seconds"] > 0 for phase in table["training"].values())
    known = {"device": "cpu", "cpus": backend.cpu_count(), "numpy": np.__version__}
    assert table["machine"] | known == table["machine"]
    assert 20 < table["this_call"]["peak_memory_mb"] <= timing.peak_memory()


# Fair: equal steps, one beginning

def test_all_get_the_same_steps_and_dynamicvit_starts_from_the_vits_first_part(monkeypatch, tmp_path):
    """fit is replaced by one that writes down what it is given, and moves every weight by a step that tells
    the phases apart."""
    calls = []

    def fit(model, task, batches, *, phase, **settings):
        scales = {name: p.lr_scale for name, p in model.named_parameters()}
        calls.append(types.SimpleNamespace(phase=phase, model=model, task=task, before=model.state_dict(),
                                           scales=scales, **settings))
        for p in model.parameters():
            p.data += len(calls)
        calls[-1].after = model.state_dict()
        return {"phase": phase}
    monkeypatch.setattr(trial, "fit", fit)
    recipe = dataclasses.replace(RECIPE, steps=18, smoothing=0.1)
    job = Trial(recipe, compare.arms(recipe), run=Run(tmp_path), threads=3, bar=False)
    results = {phase: job.train(phase)[1] for phase in job.arms}

    by = {call.phase: call for call in calls}
    assert list(by) == list(PHASES) == list(results)
    first, further = (14, 0, 1e-3), (4, 14, 3e-4)
    assert [(c.steps, c.offset, c.lr) for c in calls] == [first, further, further, first, further]
    assert {(c.seed, c.weight_decay, c.threads, c.task.smoothing) for c in calls} == {(0, 0.05, 3, 0.1)}
    assert compare.SHOWN == NAMES and all(by[phase].model is job.train(phase)[0] for phase in PHASES)
    for start, goes_on in (("vit-start", "vit"), ("lookupvit-start", "lookupvit")):
        assert by[start].model is not by[goes_on].model
        assert all(np.array_equal(array, by[goes_on].before[name]) for name, array in by[start].after.items())
    dynamic, first = by["dynamicvit"], by["vit-start"].after
    assert all(np.array_equal(dynamic.before[name], array) for name, array in first.items())
    assert all(np.array_equal(dynamic.task.teacher.state_dict()[name], array)
               for name, array in first.items())
    assert dynamic.task.teacher is by["vit-start"].model
    assert {scale for name, scale in dynamic.scales.items() if "score_predictor" in name} == {3.0}
    assert {scale for name, scale in dynamic.scales.items() if "score_predictor" not in name} == {1.0}


# Nothing is done twice

def test_a_finished_run_is_only_measured_again(copied, done, no_picture, monkeypatch):
    monkeypatch.setattr(step, "loss_and_grads", lambda *_: pytest.fail("a step was trained again"))
    table, _ = compare.run(RECIPE, copied, **RUN)
    same = lambda t: [{k: v for k, v in row.items() if k != "images_per_second"} for row in t["rows"]]
    assert same(table) == same(done[1])
    assert (table["training"], table["kept_on_object"]) == (done[1]["training"], done[1]["kept_on_object"])
    assert (copied / "history.jsonl").read_text() == (done[0] / "history.jsonl").read_text()


def test_an_interrupted_run_goes_on_where_it_was(copied, done, no_picture, monkeypatch):
    """As after a crash in the DynamicViT phase: two phases are done, the third and what follows are not."""
    for phase in ("dynamicvit", "lookupvit-start", "lookupvit"):
        (copied / f"{phase}.npz").unlink()
    steps, real = [], step.loss_and_grads

    def loss_and_grads(task, *rest):
        steps.append(type(task.model).__name__)
        return real(task, *rest)
    monkeypatch.setattr(step, "loss_and_grads", loss_and_grads)
    compare.run(RECIPE, copied, **RUN)
    assert steps == ["DynamicViT"] * 4 + ["LookupViT"] * 16
    for name, model in trained(copied).items():
        assert bits(model) == bits(trained(done[0])[name])
    assert sorted(map(str, history(copied))) == sorted(map(str, history(done[0])))


def test_without_matplotlib_it_says_how_to_get_the_picture(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python leaves where an import is refused
    for name in ("tokens.png", "table.json"):
        (copied / name).unlink()
    _, line = compare.run(RECIPE, copied, **RUN)
    assert line == (f"no tokens.png: matplotlib is not installed ({install('matplotlib')}); "
                    "run the command again for it, nothing is trained twice")
    assert (copied / "table.json").exists() and not (copied / "tokens.png").exists()


# Other pictures

def test_cifar_from_a_folder(tmp_path, monkeypatch, no_picture):
    (tmp_path / "data").mkdir()
    folder, images, labels = small_cifar(tmp_path / "data", monkeypatch)
    train_set, test_set = load_pictures(str(folder))
    assert np.array_equal(train_set.images, images[:40]) and np.array_equal(test_set.labels, labels[40:])
    assert test_set.names[0] == "airplane"
    seen, real = {}, trial.Batches
    monkeypatch.setattr(trial, "Batches", lambda *args, **settings: seen.update(settings)
                        or real(*args, **settings))
    recipe = dataclasses.replace(RECIPE, data=str(folder), steps=4)
    table, _ = compare.run(recipe, tmp_path / "out", **RUN)
    assert seen == {"seed": 0, "pad": 4, "flip": True} and table["kept_on_object"] is None
    assert table["test_pictures"] == 8
    assert "chance" not in tables.table_text(table)
    belongs = r"vit-start.npz belongs to another run \(classes .*, data '.*data' there, 'scenes' now\)"
    with pytest.raises(tt.InputError, match=belongs):
        compare.run(dataclasses.replace(recipe, data="scenes"), tmp_path / "out", **RUN)
    seen.clear()
    compare.run(dataclasses.replace(recipe, data="scenes", seed=3), tmp_path / "scenes", **RUN)
    assert seen == {"seed": 3}  # scenes are neither moved nor mirrored


# Refused before any work

@pytest.mark.parametrize("changes, settings, text", [
    (dict(steps=3), {}, "compare: 3 steps, expected at least 4"),
    (dict(steps=-5), {}, "compare: -5 steps, expected at least 4"),
    (dict(seed=-1), {}, "random: seed -1, expected 0 <= int < 2**64"),
    ({}, dict(threads=0), "compare: 0 threads, expected at least 1"),
    ({}, dict(device="gpu"), "device: 'gpu', expected auto, cpu or cuda"),
])
def test_refused_before_any_work(changes, settings, text, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "load_pictures", lambda *_, **__: pytest.fail("pictures were loaded"))
    with refuses(text):
        compare.run(dataclasses.replace(RECIPE, **changes), tmp_path / "out", **RUN | settings)
    assert not list(tmp_path.iterdir())


def test_labels_that_are_no_classes_are_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "train", lambda *_: pytest.fail("something was trained"))
    with refuses("compare: captions has labels (128, 4, 10), expected a class of each picture"):
        compare.run(dataclasses.replace(RECIPE, data="captions", train_pictures=128), tmp_path / "out", **RUN)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "load_pictures", lambda *_, **__: pytest.fail("pictures were loaded"))
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(tt.InputError,
                           match=f"^cannot write {out}: {tmp_path}/file is a file, expected a folder$"):
            compare.run(RECIPE, out, **RUN)
    files.check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
