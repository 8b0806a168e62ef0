"""The main job: what it writes, that its numbers are right, that nobody trains longer, and that nothing is done twice."""
import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import RECIPE, bits, history, small_cifar
from tinytoken import backend, checkpoint, compare, models, train
from tinytoken.data import make_scenes, normalise

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
    assert line == f"picture: {out / 'tokens.png'}" and (out / "tokens.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "table.json").read_text()) == json.loads(json.dumps(table))


def test_history_has_all_phases(done):
    assert [(row["phase"], row["step"]) for row in history(done[0])] == [(phase, steps - 1) for phase, steps in PHASES.items()]
    for phase, report in done[1]["training"].items():
        more = {"ratio", "kl", "token"} if phase == "dynamicvit" else {"lookup"} if "lookup" in phase else set()
        assert set(report) == {"seconds", "loss", "class"} | more


def test_checkpoints_say_what_a_picture_of_ones_own_needs(done):
    out, table, _ = done
    data = make_scenes(RECIPE.train_pictures, seed=0, split="train")
    for phase, steps in PHASES.items():
        header, _ = checkpoint.load(out / f"{phase}.npz")
        assert (header["phase"], header["step"], header["classes"], header["data"]) == (phase, steps, list(data.names), "scenes")
        assert (tuple(header["mean"]), tuple(header["std"])) == tt.data.channel_statistics(data.images)


# The table

def closed_forms():
    """Multiply-adds of ViT and DynamicViT at RECIPE's size: 16 patches of 8 x 8, 8 of them left in the second block."""
    D, block = RECIPE.dim, lambda tokens: 12 * tokens * RECIPE.dim ** 2 + 2 * tokens ** 2 * RECIPE.dim
    ends = 16 * (3 * 8 * 8) * D + D * 10
    predictor = 1.625 * 16 * D ** 2 + 16 * D / 2
    return {"ViT": ends + 2 * block(17), "DynamicViT": ends + block(17) + predictor + block(9)}


def test_rows(done):
    out, table, _ = done
    test, (header, _) = make_scenes(RECIPE.test_pictures, seed=0, split="test"), checkpoint.load(out / "vit.npz")
    images, found = normalise(test.images, header["mean"], header["std"]), trained(out)
    ways = [(name, model, {}) for name, model in found.items()]
    ways.append(("LookupViT, both heads", found["LookupViT"], {"mean_of_heads": True}))
    assert [row["model"] for row in table["rows"]] == [name for name, _, _ in ways]
    for row, (name, model, call) in zip(table["rows"], ways):
        logits = model.eval()(images, **call).data
        assert row["accuracy"] == np.mean(logits.argmax(axis=1) == test.labels)
        assert row["macs"] == tt.macs(model, images[:2], **call).total == closed_forms().get(name, row["macs"])
        assert row["parameters"] == sum(p.size for p in model.parameters())
        assert list(row["images_per_second"]) == ["1", "128"]
        for median, low, high in row["images_per_second"].values():
            assert 0 < low <= median <= high
    both, one = table["rows"][3], table["rows"][2]
    assert both["macs"] > one["macs"] and both["parameters"] == one["parameters"]


def test_each_row_is_a_way_to_call_its_model(monkeypatch):
    """infer is replaced by one that is right for a single row."""
    test = make_scenes(RECIPE.test_pictures, seed=0, split="test")
    model = RECIPE.model(models.LookupViT, compressed=(2, 2))
    dynamic = RECIPE.model(models.DynamicViT, prune_before=(1,), keep_ratios=(0.5,))
    used = set()

    def infer(asked, images, *prepare, threads, batch_size=128, **call):
        used.add(threads)
        right = asked is model and call == {"mean_of_heads": True}
        return np.eye(10)[test.labels if right else (test.labels + 1) % 10]
    monkeypatch.setattr(compare, "infer", infer)
    found = {"ViT": RECIPE.model(models.ViT), "DynamicViT": dynamic, "LookupViT": model}
    table = compare.measure(RECIPE, found, test, lambda images: normalise(images, (0.2,) * 3, (0.2,) * 3), "cpu", threads=7)
    assert [row["accuracy"] for row in table["rows"]] == [0, 0, 0, 1] and used == {7}


def test_what_the_table_says_of_itself(done):
    _, table, _ = done
    assert table["test_pictures"] == 20 and table["recipe"] == dataclasses.asdict(RECIPE)
    assert list(table["training"]) == list(PHASES) and all(phase["seconds"] > 0 for phase in table["training"].values())
    assert table["machine"] | {"device": "cpu", "cpus": backend.cpu_count(), "numpy": np.__version__} == table["machine"]


def test_machine_names_the_settings_that_decide_speed(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.setenv("SECRET", "x")
    found = compare.machine("cpu")
    assert found["environment"]["OPENBLAS_NUM_THREADS"] == "7" and "SECRET" not in found["environment"]
    monkeypatch.setattr(compare.pathlib.Path, "exists", lambda self: False)
    assert compare.machine("cpu")["processor"]  # a system without /proc/cpuinfo


def test_peak_memory_is_in_megabytes_everywhere(monkeypatch, done):
    assert 20 < compare.peak_memory() < 5000 and 20 < done[1]["this_call"]["peak_memory_mb"] <= compare.peak_memory()
    usage = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3_000_000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for system, megabytes in (("Linux", 3072), ("Darwin", 3)):  # kilobytes here, bytes there
        monkeypatch.setattr(compare.platform, "system", lambda system=system: system)
        assert compare.peak_memory() == megabytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert compare.peak_memory() is None


def row(name, accuracy, macs, parameters, one, many):
    return {"model": name, "accuracy": accuracy, "macs": macs, "parameters": parameters,
            "images_per_second": {"1": [one, 1, 9], "128": [many, 1, 9]}}


def test_table_text():
    table = {"rows": [row("ViT", 0.9375, 50_000_000, 690_000, 123.4, 1234.5),
                      row("DynamicViT", 0.5, 25_500_000, 1_700_000, 99.6, 2000)],
             "test_pictures": 2000, "kept_on_object": {"all": 0.15, "stages": [0.2, 0.34567]}}
    lines = ["| model | accuracy | M MACs | of ViT's | parameters | images/s, batch 1 | images/s, batch 128 |",
             "|---|---|---|---|---|---|---|",
             "| ViT | 93.8 % | 50.00 | 1.00 | 690,000 | 123 | 1234 |",
             "| DynamicViT | 50.0 % | 25.50 | 0.51 | 1,700,000 | 100 | 2000 |",
             "",
             "2,000 test pictures; MACs are multiply-adds per image, counted by the engine; images/s are medians.",
             "Share of object in the patches that DynamicViT keeps, by stage: 20.0 %, 34.6 %; in all patches (chance): 15.0 %."]
    assert compare.table_text(table) == "\n".join(lines)
    assert compare.table_text(table | {"kept_on_object": None}) == "\n".join(lines[:-1])
    other = {"rows": [row("ViT", 0.9175, 1, 1, 1, 1), row("DynamicViT", 0.54, 1, 1, 1, 1)], "test_pictures": 2000,
             "kept_on_object": {"all": 0.17, "stages": [0.3, 0.34567]}}
    lines[2:4] = ["| ViT | 92.8 ± 1.4 % | 50.00 | 1.00 | 690,000 | 123 | 1234 |",
                  "| DynamicViT | 52.0 ± 2.8 % | 25.50 | 0.51 | 1,700,000 | 100 | 2000 |"]
    lines[-1] = ("Share of object in the patches that DynamicViT keeps, by stage: 25.0 %, 34.6 %; in all patches (chance): "
                 "16.0 %.")
    assert compare.table_text(table, other) == "\n".join(lines)


def test_conditions_text():
    seconds = {"vit-start": 90, "vit": 30, "dynamicvit": 60, "lookupvit-start": 150, "lookupvit": 60}
    table = {"recipe": dataclasses.asdict(RECIPE) | {"steps": 6000}, "training": {k: {"seconds": v} for k, v in seconds.items()},
             "machine": {"processor": "An EPYC", "cpus": 2, "numpy": "2.4", "blas": "OpenBLAS Zen, 2 threads", "environment": {}}}
    text = ("Recipe: 6,000 steps of 8 pictures, the last 1,500 at learning rate 0.0003 after 0.001; dim 16, depth 2, 2 heads, "
            "patch 8. One seed, 0. Training: ViT 2.0 min, DynamicViT 1.0 min after the ViT's first 1.5, LookupViT 3.5 min. "
            "Machine: An EPYC, 2 CPUs, NumPy 2.4, OpenBLAS Zen, 2 threads, no BLAS variables set.")
    assert compare.conditions_text(table) == text
    other = table | {"recipe": table["recipe"] | {"seed": 5}}
    several = "Seeds 0, 5: accuracies are mean and standard deviation, speeds and times those of the first."
    assert compare.conditions_text(table, other) == text.replace("One seed, 0.", several)
    table["machine"]["environment"] = {"OMP_NUM_THREADS": "2", "MALLOC_X": "1"}
    assert compare.conditions_text(table).endswith(", OMP_NUM_THREADS=2 MALLOC_X=1.")


def test_kept_on_object_is_the_mean_over_kept_patches_pixel_by_pixel():
    """140 scenes, of which 131 are looked at: neither is a multiple of the 128 that go through the model at once."""
    test = make_scenes(140, seed=1, split="test")
    model = RECIPE.model(models.DynamicViT, prune_before=(0, 1), keep_ratios=(0.5, 0.2))
    prepare = lambda images: normalise(images, (0.2,) * 3, (0.2,) * 3)
    for p in model.score_predictor[0].parameters() + model.score_predictor[1].parameters():
        p.data += np.random.default_rng(0).standard_normal(p.shape).astype("float32")
    found = compare.kept_on_object(model, test, prepare, patch=8, most=131)
    _, trace = model(prepare(test.images), trace=True)
    masks = test.instances > 0
    share = lambda b, n: masks[b, n // 4 * 8:n // 4 * 8 + 8, n % 4 * 8:n % 4 * 8 + 8].mean()
    for stage, kept in zip(found["stages"], trace.kept):
        assert stage == pytest.approx(np.mean([share(b, n) for b in range(131) for n in kept[b]]), rel=1e-6)
    assert found["all"] == pytest.approx(masks[:131].mean(), rel=1e-6)
    assert [k.shape[1] for k in trace.kept] == [8, 3] and found["stages"][0] != pytest.approx(found["all"], rel=1e-3)


def test_images_per_second_takes_turns_and_leaves_out_the_first(monkeypatch):
    clock, calls = [0.0], []
    durations = {"slow": iter([100, 2, 4, 8]), "fast": iter([100, 1, 0.5, 0.25])}

    def fake(model, images, threads, **call):
        calls.append((model, len(images), threads, call))
        clock[0] += next(durations[model])
    monkeypatch.setattr(compare, "infer", fake)
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    ways = {"a": ("slow", {}), "b": ("fast", {"mean_of_heads": True})}
    found = compare.images_per_second(ways, np.zeros((10, 3)), threads=4, rounds=3)
    assert found == {"a": [2.5, 1.2, 5.0], "b": [20.0, 10.0, 40.0]}
    assert calls == [("slow", 10, 4, {}), ("fast", 10, 4, {"mean_of_heads": True})] * 4


# Fair: equal steps, one beginning

def test_all_get_the_same_steps_and_dynamicvit_starts_from_the_vits_first_part(monkeypatch, tmp_path):
    """fit is replaced by one that writes down what it is given, and moves every weight by a step that tells the phases apart."""
    calls = []

    def fit(model, objective, batches, *, phase, **settings):
        calls.append(types.SimpleNamespace(phase=phase, model=model, objective=objective, before=model.state_dict(), **settings,
                                           scales={name: p.lr_scale for name, p in model.named_parameters()}))
        for p in model.parameters():
            p.data += len(calls)
        calls[-1].after = model.state_dict()
        return {"phase": phase}
    monkeypatch.setattr(compare, "fit", fit)
    recipe = dataclasses.replace(RECIPE, steps=18, smoothing=0.1)
    data = types.SimpleNamespace(mean=(0,) * 3, std=(1,) * 3)
    found, results = compare.train_all(recipe, data, ["a"], train.Run(tmp_path), "cpu", threads=3, bar=False)

    by = {call.phase: call for call in calls}
    assert list(by) == list(PHASES) == list(results)
    first, further = (14, 0, 1e-3), (4, 14, 3e-4)
    assert [(c.steps, c.offset, c.lr) for c in calls] == [first, further, further, first, further]
    assert {(c.seed, c.weight_decay, c.threads, c.objective.smoothing) for c in calls} == {(0, 0.05, 3, 0.1)}
    assert {n: by[phase].model for n, phase in NAMES.items()} == found
    for start, goes_on in (("vit-start", "vit"), ("lookupvit-start", "lookupvit")):
        assert by[start].model is by[goes_on].model
        assert all(np.array_equal(array, by[goes_on].before[name]) for name, array in by[start].after.items())
    dynamic, first = by["dynamicvit"], by["vit-start"].after
    assert all(np.array_equal(dynamic.before[name], array) for name, array in first.items())
    assert all(np.array_equal(dynamic.objective.teacher.state_dict()[name], array) for name, array in first.items())
    assert dynamic.objective.teacher is not by["vit"].model
    assert {scale for name, scale in dynamic.scales.items() if "score_predictor" in name} == {3.0}
    assert {scale for name, scale in dynamic.scales.items() if "score_predictor" not in name} == {1.0}


# Nothing is done twice

def test_a_finished_run_is_only_measured_again(copied, done, no_picture, monkeypatch):
    monkeypatch.setattr(train, "loss_and_grads", lambda *_: pytest.fail("a step was trained again"))
    table, _ = compare.run(RECIPE, copied, **RUN)
    same = lambda t: [{k: v for k, v in row.items() if k != "images_per_second"} for row in t["rows"]]
    assert same(table) == same(done[1])
    assert (table["training"], table["kept_on_object"]) == (done[1]["training"], done[1]["kept_on_object"])
    assert (copied / "history.jsonl").read_text() == (done[0] / "history.jsonl").read_text()


def test_an_interrupted_run_goes_on_where_it_was(copied, done, no_picture, monkeypatch):
    """As after a crash in the DynamicViT phase: two phases are done, the third and what follows are not."""
    for phase in ("dynamicvit", "lookupvit-start", "lookupvit"):
        (copied / f"{phase}.npz").unlink()
    steps, real = [], train.loss_and_grads

    def loss_and_grads(objective, *rest):
        steps.append(type(objective.model).__name__)
        return real(objective, *rest)
    monkeypatch.setattr(train, "loss_and_grads", loss_and_grads)
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
    assert line == ("no tokens.png: matplotlib is not installed (pip install 'tinytoken-vit[plot]'); "
                    "run the command again for it, nothing is trained twice")
    assert (copied / "table.json").exists() and not (copied / "tokens.png").exists()


# Other pictures

def test_cifar_from_a_folder(tmp_path, monkeypatch, no_picture):
    (tmp_path / "data").mkdir()
    folder, images, labels = small_cifar(tmp_path / "data", monkeypatch)
    train_set, test_set = compare.load_pictures(dataclasses.replace(RECIPE, data=str(folder)))
    assert np.array_equal(train_set.images, images[:40]) and np.array_equal(test_set.labels, labels[40:])
    assert test_set.names[0] == "airplane"
    seen, real = {}, compare.Batches
    monkeypatch.setattr(compare, "Batches", lambda *args, **settings: seen.update(settings) or real(*args, **settings))
    recipe = dataclasses.replace(RECIPE, data=str(folder), steps=4)
    table, _ = compare.run(recipe, tmp_path / "out", **RUN)
    assert seen == {"seed": 0, "pad": 4, "flip": True} and table["kept_on_object"] is None and table["test_pictures"] == 8
    assert "chance" not in compare.table_text(table)
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
    monkeypatch.setattr(compare, "load_pictures", lambda *_: pytest.fail("pictures were loaded"))
    with refuses(text):
        compare.run(dataclasses.replace(RECIPE, **changes), tmp_path / "out", **RUN | settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "load_pictures", lambda *_: pytest.fail("pictures were loaded"))
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(tt.InputError, match=rf"^cannot write {tmp_path}/file/\S+: (File exists|Not a directory)$"):
            compare.run(RECIPE, out, **RUN)
    compare.check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("values, form, text", [
    ([3.0], ".1f", "3.0"), ([1.0, 2.0, 3.0], "+.1f", "+2.0 ± 1.0"), ([0.25, 0.5], ".3f", "0.375 ± 0.177"),
    ([1.0, None, 3.0], ".1f", "2.0 ± 1.4 (2 of 3)"), ([None, 4.0], ".1f", "4.0 (1 of 2)"), ([None, None], ".1f", "not known")])
def test_mean_and_spread_as_text(values, form, text):
    assert compare.spread_text(values, form) == text


def test_a_difference_and_its_interval_as_text():
    assert compare.interval_text(-1.1, -1.92, 0.29) == "-1.1 [-1.9, +0.3]" and compare.interval_text(0.0, 0.0, 0.0) == "+0.0 [+0.0, +0.0]"
