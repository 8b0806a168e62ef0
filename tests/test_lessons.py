"""Every lesson runs at smoke size, is a percent script, and notes what it claims; the committed results are
of longer runs."""
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import tinytoken as tt
from tinytoken import files
from tinytoken.errors import install
from tinytoken.experiments import Recipe, lesson

LESSONS = pathlib.Path(__file__).parents[1] / "lessons"
scripts = sorted(LESSONS.glob("[0-9][0-9]*_*.py")) + sorted(LESSONS.glob("related/[0-9][0-9]*_*.py"))
every_lesson = pytest.mark.parametrize("script", scripts, ids=[script.stem for script in scripts])
TITLES = {"lessons": ("What was measured", "Exercises", "The paper"),
          "related": ("The idea", "The mechanism by hand", "The experiment", "What came out",
                      "What this does not show")}


def name_of(script):
    """What a lesson calls itself: of related/02_shunted.py, related_shunted."""
    return f"related_{script.stem.partition('_')[2]}" if script.parent.name == "related" else script.stem


def run(script, out, monkeypatch, *options):
    """What the lesson noted."""
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke", "--out", str(out), *options])
    return runpy.run_path(str(script), run_name="__main__")["here"].results


def losses(results):
    """{arm: the names of its losses}, of what a lesson noted."""
    rows = results.get("rows", {})
    rows = {name: row[0] if isinstance(row, list) else row for name, row in
            (rows.items() if isinstance(rows, dict) else ())}
    return {name: row["trained"].keys() for name, row in rows.items() if "trained" in row}


@every_lesson
def test_the_lesson_runs(script, tmp_path, monkeypatch):
    noted = run(script, tmp_path, monkeypatch)
    saved = json.loads((tmp_path / f"{name_of(script)}.json").read_text())
    assert saved["lesson"] == name_of(script) and saved["size"] == "smoke" and saved["headline"]
    assert saved["results"].keys() == noted.keys() != set()
    assert list(tmp_path.glob(f"{name_of(script)}_*.png"))
    committed = losses(json.loads((LESSONS / "results" / f"{name_of(script)}.json").read_text())["results"])
    for name, parts in losses(noted).items():
        assert committed.get(name, parts) == parts, f"{name}: the committed result is of another arm"


@every_lesson
def test_the_lesson_is_a_percent_script(script):
    lines = script.read_text().splitlines()
    assert lines[0] == "# %% [markdown]" and lines[1].startswith(f"# # Lesson {script.stem.split('_')[0]}: ")
    cells = [line for line in lines if line.startswith("# %%")]
    assert len(cells) > 5 and set(cells) <= {"# %%", "# %% [markdown]"}
    titles = [line[5:] for line in lines if line.startswith("# ## ")]
    for title in TITLES[script.parent.name]:
        assert title in titles, f"no part {title!r}"
    assert script.parent == LESSONS or len(lines) <= 350


def flat(*folders):
    """The sources below these folders as one line."""
    return " ".join(" ".join(path.read_text(encoding="utf-8").split())
                    for folder in folders for path in sorted(folder.rglob("*.py")))


ROOT = LESSONS.parent
SOURCES = flat(ROOT / "tinytoken", ROOT / "tests")


@every_lesson
def test_the_lines_of_code_beside_the_paper_exist(script):
    """Each is in the package, a test or the lesson, but for what "..." stands for. Class.method names a
    method, and what has a slash and an ending names a file."""
    text = script.read_text(encoding="utf-8")
    code = " ".join(" ".join(line for line in text.splitlines() if not line.startswith("#")).split())
    table = [line for line in text.partition("# ## The paper")[2].splitlines() if line.startswith("# |")]
    for quoted in re.findall(r"`([^`]+)`", "\n".join(table)):
        if re.fullmatch(r"(\w+/)+\w+\.\w+", quoted):
            assert any((ROOT / folder / quoted).exists() for folder in ("", "tinytoken")), f"no {quoted}"
            continue
        method = re.fullmatch(r"([A-Z]\w+)\.(\w+)", quoted)
        parts = [f"class {method[1]}", f"def {method[2]}("] if method else quoted.split("...")
        missing = [part for part in map(str.strip, parts) if part not in SOURCES and part not in code]
        assert not missing, f"{quoted}: no line has {missing}"


@every_lesson
def test_the_committed_result_is_of_a_longer_run(script):
    saved = json.loads((LESSONS / "results" / f"{name_of(script)}.json").read_text())
    assert saved["size"] in ("default", "full") and saved["machine"]["cpus"] and saved["seconds"]


def test_the_recipe_for_cifar10_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "cifar10.py", tmp_path, monkeypatch, "--data", "scenes")
    arms = noted["rows"]
    assert len(arms) == 8 and [row["holds"] in (True, False) for row in noted["claims"]] == [True] * 6
    assert arms["DynamicViT .7"][0]["macs"] < arms["ViT"][0]["macs"] and noted["above"]["ViT"] == [0, 0, 0]
    assert all(row[0]["seconds_per_epoch"]["second"] > 0 for row in arms.values())


def test_the_script_of_clips_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "clips.py", tmp_path, monkeypatch)
    arms = {name: row for name, (row,) in noted["rows"].items()}
    assert len(arms) == 5 and noted["above"].keys() == arms.keys() - {"VideoLookupViT 2x2x2"}
    for name, row in arms.items():
        assert 0 <= row["accuracy"] <= 1 and len(row["by_action"]) == 11 and len(row["which"]) == 4
        assert ("shuffled" in row) == (name != "key frame")
    halved, narrower = (arms[name]["macs"] for name in ("VideoLookupViT 2x2x2", "VideoViT, narrower"))
    assert halved <= arms["VideoViT"]["macs"] / 2 and halved <= narrower < 1.1 * halved
    assert all(len(by["milliseconds"]) == len(by["megabytes"]) == 2 for by in noted["grown"].values())
    with pytest.raises(tt.InputError, match="^clips: --data elsewhere: the clips are made, expected no --data$"):
        run(LESSONS / "full" / "clips.py", tmp_path, monkeypatch, "--data", "elsewhere")


@pytest.mark.parametrize("name, arms", [("lookupvit_headline", 6), ("lookupvit_recipe", 50),
                                        ("dynamicvit_headline", 9), ("dynamicvit_recipe", 19)])
def test_the_recipes_of_the_two_papers_run(name, arms, tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / f"{name}.py", tmp_path, monkeypatch, "--data", "scenes")
    rows = [by_seed[0] if isinstance(by_seed, list) else by_seed for by_seed in noted["rows"].values()]
    assert len(rows) == arms and all(0 <= row["accuracy"] <= 1 and row["macs"] > 0 for row in rows)
    # a recipe is chosen by pictures that no arm was trained on, a headline by the test pictures
    assert noted["recipe"]["choosing"] == name.endswith("recipe")
    watched = [row["cosines"] for row in rows if row.get("cosines") not in (None, [None] * 6)]
    by_step = [list(course.values()) if isinstance(course, dict) else course for course in watched]
    assert all(-1 <= cosine <= 1 + 1e-6
               for course in by_step for blocks in course if blocks for cosine in blocks)


def test_the_recipe_of_dense_prediction_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "dense.py", tmp_path, monkeypatch)
    for task, metrics in (("classes", {"accuracy"}), ("pixels", {"mIoU", "boundary_f1"})):
        rows = {name: by_seed[0] for name, by_seed in noted["rows"][task].items()}
        macs = [rows[name]["macs"] for name in ("dense", "keep 0.9", "keep 0.7", "keep 0.5", "fast path alone")]
        assert macs == sorted(macs, reverse=True) and rows["random 0.7"]["macs"] < rows["keep 0.7"]["macs"]
        assert all(metrics < row.keys() and 0 <= row[metric] <= 1 for row in rows.values() for metric in metrics)
        assert len(rows["keep 0.7"]["slow_on_object"]["stages"]) == 3
    assert len(noted["claims"]) == 8 and list(tmp_path.glob("dense_masks.png"))


def test_the_script_of_two_paths_speed_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "two_paths_speed.py", tmp_path, monkeypatch)
    assert list(noted["rows"]) == ["ConvNeXt, narrow, batch 1", "ConvNeXt, narrow, batch 2"]
    for forms in noted["rows"].values():
        assert forms["keep 0.5"]["macs"] < forms["keep 0.7"]["macs"] < forms["dense"]["macs"]
        saved, taken = (1 - forms["keep 0.7"]["macs"] / forms["dense"]["macs"],
                        forms["keep 0.7"]["of_time"][1])
        assert forms["keep 0.7"]["shows"][1] == pytest.approx((1 - taken) / saved)


def test_the_script_of_passing_speed_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "passing_speed.py", tmp_path, monkeypatch)
    assert len(noted["rows"]) == 4
    for name, ways in noted["rows"].items():
        costs = [row["macs"] for row in ways.values()]  # dense, then buckets, small to large
        assert costs[1:] == sorted(costs[1:]) and costs[-1] < costs[0], name
        saved, (_, taken, _) = 1 - costs[1] / costs[0], ways["bucket 1"]["of_time"]
        assert ways["bucket 1"]["shows"][1] == pytest.approx((1 - taken) / saved)


@pytest.mark.parametrize("data, metric", [("scenes", "accuracy"), ("pixel_scenes", "mIoU"),
                                          ("actor_clips", "accuracy"), ("referring", "mIoU")])
def test_the_script_of_the_family_runs(data, metric, tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "family.py", tmp_path, monkeypatch, "--data", data)
    names = list(noted["rows"])
    assert names == list(noted["thins"]) == list(noted["megabytes"]) and len(names) > 2
    assert {name: len(taken) for name, taken in noted["seconds"]["128"].items()} == dict.fromkeys(names, 2)
    for name, (row,) in noted["rows"].items():
        assert 0 <= row[metric] <= 1 and noted["megabytes"][name]["step"] > 0, name
        if noted["thins"][name].startswith("rows") and name != "DoViT":  # which is not sure of anything yet
            assert row["macs"] < noted["rows"]["ViT"][0]["macs"], name


def test_the_script_of_captions_runs(tmp_path, monkeypatch):
    noted = run(LESSONS / "full" / "captions.py", tmp_path, monkeypatch)
    rows = {name: by_seed[0] for name, by_seed in noted["rows"].items()}
    assert list(rows) == ["ViT", "compressed", "lookup", "compressed and lookup", "blind"]
    assert all(0 <= row[sort] <= 1 for row in rows.values() for sort in ("exact", "facts", "count", "relation"))
    assert rows["compressed"]["macs"] < rows["lookup"]["macs"] < rows["compressed and lookup"]["macs"]
    assert [claim["holds"] in (True, False) for claim in noted["claims"]] == [True] * 2
    assert set(noted["encoders"]) == {"ViT", "LookupViT"} and (tmp_path / "captions_facts.png").exists()
    with pytest.raises(tt.InputError, match="captions: --data cifar10: there are captions of scenes alone"):
        run(LESSONS / "full" / "captions.py", tmp_path, monkeypatch, "--data", "cifar10")


def test_sizes_options_and_results(tmp_path, capsys):
    here = lesson.begin("00_test", ["--full", "--seed", "3", "--out", str(tmp_path), "--device", "cpu"])
    assert (here.size, here.seed, here.data, here.pick(1, 2, 3)) == ("full", 3, "scenes",
                                                                     3) and here.seeds == [3, 4, 5]
    assert lesson.begin("00_test", ["--seed", "3", "--out", str(tmp_path)]).seeds == [3]
    assert lesson.begin("00_test", ["--out", str(tmp_path)]).size == "default"
    train, test = lesson.begin("00_test", ["--smoke", "--out", str(tmp_path)]).pictures(6, 4)
    assert len(train.images) == 6 and len(test.images) == 4
    here.measured(a=1)
    with pytest.raises(tt.InputError, match="noted twice: .'a'"):
        here.measured(a=2)
    here.says("an a of 1")
    here.claim("enough", 2.0, low=1)
    here.claim("not too much", 2.0, low=1, high=1.5)
    assert "an a of 1\nholds  enough: 2.00 (above 1)\n" in (said := capsys.readouterr().out)
    assert "FAILS  not too much: 2.00 (above 1, at most 1.5)" in said
    here.picture("line", lambda figure: figure.subplots().plot([1, 2]))
    saved = json.loads(here.end().read_text())
    assert [row["holds"] for row in saved["results"].pop("claims")] == [True, False]
    assert here.checkpoints == tmp_path / "checkpoints" / "scenes"
    assert saved["results"] == {"a": 1} and saved["seed"] == 3 and saved["headline"] == "an a of 1"
    assert (tmp_path / "00_test_full_line.png").stat().st_size > 1000
    smaller = lesson.begin("00_test", ["--data", "some/where", "--out", str(tmp_path)])
    assert smaller.stem == "00_test_where" and smaller.checkpoints is None


def test_the_jobs_of_a_full_run_are_done_once_on_whatever_machine(tmp_path):
    def run(size="--full", recipe={"steps": (3, 4)}, **broken):
        here, did = lesson.begin("00_test", [size, "--out", str(tmp_path)]), []
        jobs = {name: lambda name=name: did.append(name) or broken.get(name, {"of": [name, 0.1]})
                for name in ("arm a", "arm b")}
        return here.each(jobs, recipe), did, here

    expected = {name: {"of": [name, 0.1]} for name in ("arm a", "arm b")}
    assert run("--smoke")[:2] == (expected, ["arm a", "arm b"]) and not list(tmp_path.glob("*_parts"))
    with pytest.raises(TypeError):
        run(**{"arm b": {1j}})  # as if it had been stopped in the second
    found, did, here = run()
    assert found == expected and did == ["arm b"]
    found, did, here = run()
    assert found == expected and list(found) == list(expected) and did == []
    saved = json.loads(here.end().read_text())
    assert len(saved["machines_of_parts"]) == 1 and "numpy" in saved["machines_of_parts"][0]
    with pytest.raises(tt.InputError, match="arm-a.json belongs to another run .steps"):
        run(recipe={"steps": (3, 5)})


def test_a_part_that_does_not_name_a_newer_option_is_this_runs(tmp_path):
    here = lesson.begin("00_test", ["--full", "--out", str(tmp_path)])
    recipe = dataclasses.asdict(Recipe(steps=10))
    here.each({"a": lambda: 1}, recipe)
    path = tmp_path / "00_test_full_parts" / "a.json"
    part = json.loads(path.read_text())
    del part["recipe"]["size"]  # as version 0.1 wrote it
    path.write_text(json.dumps(part))
    assert here.each({"a": lambda: 2}, recipe) == {"a": 1}
    with pytest.raises(tt.InputError, match=r"another run \(size 32 there, 64 now, steps 10 there, 20 now\)|"
                                            r"\(steps 10 there, 20 now, size 32 there, 64 now\)"):
        here.each({"a": lambda: 2}, dataclasses.asdict(Recipe(steps=20, size=64)))


@pytest.mark.parametrize("text, reason", [
    (b'{"value": 1, "rec', "is not JSON (JSONDecodeError: "), (b'{"value": "\xff"}', "is not JSON (Unicode"),
    (b"[]", "is a list, expected a JSON object: delete it"),
    (b'{"recipe": {}, "machine": {}}', "has no value: delete it"),
    (b'{"value": 1, "machine": {}}', "has the recipe None, expected an object: delete it"),
    (b'{"value": 1, "recipe": {}, "machine": "a"}', "has the machine 'a', expected an object: delete it")])
def test_a_damaged_part_is_refused_by_name(text, reason, tmp_path):
    here = lesson.begin("00_test", ["--full", "--out", str(tmp_path)])
    path = tmp_path / "00_test_full_parts" / "a.json"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(tt.InputError, match=f"^lesson: {re.escape(f'{path} {reason}')}"):
        here.each({"a": lambda: 1}, {})


def test_what_another_process_is_doing_is_left_for_later(tmp_path, monkeypatch, capsys):
    here = lesson.begin("00_test", ["--full", "--out", str(tmp_path)])
    # it ends, and has written nothing
    monkeypatch.setattr(lesson.time, "sleep", lambda seconds: others.close())
    with contextlib.ExitStack() as others:
        others.enter_context(files.claimed(here.out / "00_test_full_parts" / "a.json"))
        order = []
        assert here.each({name: lambda name=name: order.append(name) or name for name in "abc"},
                         {}) == dict(zip("abc", "abc"))
    assert order == ["b", "c", "a"] and capsys.readouterr().out.count("left for later: another process is at "
                                                                      "work on") == 1


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lesson.begin("00_test", ["--out", str(tmp_path)]).picture("line", lambda figure: 1 / 0)
    assert install("matplotlib") in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_options_that_cannot_be_used_end_the_program_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code = "from tinytoken.experiments import lesson; lesson.begin('00_test')"
    done = subprocess.run([sys.executable, "-c", code, "--out", str(tmp_path / "file" / "folder")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr


def test_results_that_could_not_be_written_end_a_lesson_before_its_work(tmp_path, capsys):
    (tmp_path / "00_test_full.json").mkdir()
    with pytest.raises(SystemExit):
        lesson.begin("00_test", ["--full", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith(
        f"error: cannot write {tmp_path}/00_test_full.json: it is a folder, expected the name of a file\n")
    lesson.begin("00_test", ["--smoke", "--out", str(tmp_path)])  # another file


@pytest.mark.parametrize("line, redirected, status, said", [
    ("print('x' * 100_000)", "| true", 141, ""),
    ("print('x'); here.end()", "| sleep 0", 141, ""),
    ("print('x' * 100_000)", "2>&1 | true", 141, ""),
    ("print('x' * 100_000)", ">/dev/full", 2, "error: 00_test.py, line 5: [Errno 28] No space left on"),
    ("here.end()", ">/dev/full", 2, "error: 00_test.py, line 5: [Errno 28] No space left on device\n"),
    ("here.end()", ">&-", 0, ""),
    ("here.end()", "2>&-", 0, ""),
    ("print('\u03bb')", ">/dev/null", 0, ""),
    ("print('x'); here.pictures(1, 1)", "--data nowhere | true", 141, "error: 00_test.py, line 5: data: "),
    ("here.pictures(1, 1)", "--data nowhere", 2, "error: 00_test.py, line 5: data: nowhere does not exist; "),
    ("files.claimed('busy').__enter__()", "", 2, "error: 00_test.py, line 5: another process is at work on"),
    ("[1] @ tt.Tensor([1, 2])", "", 2, "error: 00_test.py, line 5: matmul: "),
    ("[][1]", "", 1, "Traceback (most recent call last):\n"),
    ("raise KeyboardInterrupt", "", 130, "stopped: by Ctrl-C\n"),
    ("", "--out ''", 2, "usage: ")])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_lesson_ends_in_one_line(line, redirected, status, said, tmp_path):
    """Where nobody reads, nothing can be written, an input is no use, or Ctrl-C is pressed; a fault of the
    lesson itself has its traceback."""
    script = tmp_path / "00_test.py"
    script.write_text("import tinytoken as tt\nfrom tinytoken import files\n"
                      "from tinytoken.experiments import lesson\n"
                      f"here = lesson.begin('00_test')\n{line}\n", encoding="utf-8")
    command = f"{shlex.quote(sys.executable)} 00_test.py --smoke {redirected}; exit ${{PIPESTATUS[0]}}"
    with files.claimed(tmp_path / "busy"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT),
                                                 "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr[:len(said)]) == (status, said), done.stderr
    if said[:3] not in ("Tra", "usa"):
        assert done.stderr.count("\n") == bool(said)
