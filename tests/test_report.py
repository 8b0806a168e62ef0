"""lessons/report.py writes the measured parts of the pages from the committed JSON; what it lacks it says."""
import json
import pathlib
import shutil

import pytest

import tinytoken as tt
from lessons import report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "lessons" / "results"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the pages, the lessons and their results."""
    other = shutil.ignore_patterns("*.png", "__pycache__", "assignments")
    shutil.copytree(ROOT / "lessons", tmp_path / "lessons", ignore=other)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_it_rewrites_what_was_typed_and_nothing_else(checkout):
    pages = {checkout / page: (ROOT / page).read_text() for page in report.PAGES}
    for path, text in pages.items():
        typed = text.replace("| ViT |", "| ViT, improved |")
        assert typed != text
        path.write_text(typed)
    assert report.write(checkout) == list(report.PAGES)
    assert all(path.read_text() == text for path, text in pages.items())
    assert report.write(checkout) == []


@pytest.mark.parametrize("page", report.PAGES)
def test_what_it_cannot_know_is_refused_and_no_page_is_written(page, checkout):
    before = {name: "<!-- measured: scenes -->\ntyped\n<!-- /measured -->" for name in report.PAGES}

    def refused(message, **texts):
        for name, text in (before | texts).items():
            (checkout / name).write_text(text)
        with pytest.raises(tt.InputError, match=message):
            report.write(checkout)
        assert all((checkout / name).read_text() == text for name, text in (before | texts).items())
    refused("unknown part 'wishes'", **{page: "<!-- measured: wishes -->\n<!-- /measured -->"})
    (checkout / "lessons" / "results" / "likeness.json").write_text("{")
    refused("likeness.json", **{page: "<!-- measured: likeness -->\n<!-- /measured -->"})
    (checkout / "lessons" / "results" / "likeness.json").unlink()
    refused("likeness.json", **{page: "<!-- measured: likeness -->\n<!-- /measured -->"})
    (checkout / page).unlink()
    with pytest.raises(tt.InputError, match=page):
        report.write(checkout)


def test_the_script_says_what_it_did(checkout, capsys):
    for path in (checkout / "lessons" / "results").glob("[0-9]*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"headline": f"{path.stem} says so."}))
    report.main(checkout)
    assert "lessons/RESULTS.md" in capsys.readouterr().out
    text = (checkout / "lessons" / "RESULTS.md").read_text()
    assert "\n- 07 [DynamicViT](07_dynamicvit.py): 07_dynamicvit says so.\n" in text
    report.main(checkout)
    assert capsys.readouterr().out == "as the results say: README.md, lessons/RESULTS.md\n"
    shutil.rmtree(checkout / "lessons" / "results")
    with pytest.raises(SystemExit, match="error: report: no compare_scenes_seed"):
        report.main(checkout)


def test_lessons_without_a_headline_are_named(checkout):
    path = checkout / "lessons" / "results" / "07_dynamicvit.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in saved.items() if name != "headline"}))
    with pytest.raises(SystemExit, match="no headline in the committed results of .*07_dynamicvit.py"):
        report.main(checkout)
    text = report.parts["lessons"](path.parent)
    assert "no headline; `python lessons/07_dynamicvit.py --out lessons/results`" in text


def test_every_lesson_has_a_headline():
    assert [script.name for script, text in report.headlines(RESULTS).items() if not text] == []


def test_full_runs_of_related_lessons_say_which_bounds_fail(checkout):
    results = checkout / "lessons" / "results"
    for path in results.glob("related_*_full.json"):
        path.unlink()
    assert report.parts["related_full"](results) == ""
    claims = [{"claim": "points", "measured": 2.0, "bound": [None, 1], "holds": False},
              {"claim": "share", "measured": 0.5, "bound": [None, 1], "holds": True}]
    saved = {"headline": "Tokens part.", "results": {"claims": claims}}
    for name, some in (("related_stvit_full", claims), ("related_dovit_full", claims[1:])):
        saved["results"]["claims"] = some
        (results / f"{name}.json").write_text(json.dumps(saved))
    assert report.parts["related_full"](results).splitlines() == [
        "- related/04 [STViT](related/04_stvit.py): Tokens part. 1 of 2 bounds hold.",
        "  - **fails**: points: 2 (at most 1)",
        "- related/06 [DoViT](related/06_dovit.py): Tokens part. 1 of 1 bound hold."]


def test_seeds_of_different_recipes_are_not_averaged(tmp_path):
    table = json.loads((RESULTS / "compare_scenes_seed0.json").read_text())
    for seed, steps in ((0, 500), (1, 499)):
        table["recipe"] |= {"seed": seed, "steps": steps}
        (tmp_path / f"compare_scenes_seed{seed}.json").write_text(json.dumps(table))
    for name in ("scenes", "scenes_full"):
        with pytest.raises(tt.InputError, match="differ in more than their seed"):
            report.parts[name](tmp_path)


def test_the_short_table_is_that_of_the_full_one():
    def table(name):
        return [line for line in report.parts[name](RESULTS).splitlines() if line.startswith("|")]
    assert table("scenes") == table("scenes_full") != []


def test_ratios_are_taken_inside_a_round():
    ms = {"tinytoken": [100, 200, 300, 400, 500], "torch": [100] * 5, "jax": [500, 400, 300, 200, 100]}
    ratios = ["3.00 [2.00, 4.00]", "1.00 [0.50, 2.00]", ""]
    assert report.times_text(ms, ["torch", "jax", "mygrad"]) == ["300.0 (100.0 to 500.0)", *ratios]


def test_arms_are_compared_seed_by_seed():
    def row(accuracy, **more):
        return {"accuracy": accuracy, "macs": 2e6} | more

    kept = {"on_object": {"all": 0.1, "stages": [0.15, 0.2]}, "ratios": [0.7, 0.5], "targets": [0.7, 0.49]}
    rows = {"ViT, further": [row(0.90), row(0.80)], "ours": [row(0.91, **kept), row(0.84, **kept)],
            "once": [row(0.85)]}
    recipe = {"first_steps": 1000, "further_steps": 10, "batch": 64, "further_lr": 0.1, "test_pictures": 2000}
    saved = {"machine": {"processor": "P", "cpus": 2, "numpy": "2", "blas": "B"},
             "results": {"rows": rows, "seeds": [0, 1], "starts": [row(0.5), row(0.7)], "recipe": recipe}}
    lines = report.arms_text(saved).splitlines()
    assert lines[2] == "| ViT, further | 2 | 85.0 ± 7.1 % |  | 2.0 |  |  |"
    kept = "0.700 (0.700), 0.500 (0.490)"
    assert lines[3] == f"| ours | 2 | 87.5 ± 4.9 % | +2.5 ± 2.1 | 2.0 | 1.50, 2.00 | {kept} |"
    assert lines[4] == "| once | 1 | 85.0 % | -5.0 | 2.0 |  |  |"
    assert "1,000 steps (60.0 ± 14.1 %)" in lines[6] and "seeds 0, 1." in lines[6]
    rows["once"][0]["all_tokens"] = 0.875
    assert report.arms_text(saved).splitlines()[4] == "| once | 1 | 85.0 % | -5.0 | 87.5 % | 2.0 |  |  |"
    rows["ConvNeXt, further"] = rows.pop("once")
    lines = report.arms_text(saved, "ConvNeXt").splitlines()
    assert "minus ConvNeXt's, points" in lines[0]
    assert lines[2].startswith("| ViT, further | 2 | 85.0 ± 7.1 % | +5.0 |")
    assert "All arms go on from a ConvNeXt of 1,000 steps" in lines[6]


def test_the_family_is_shown_once_it_was_run(tmp_path):
    assert report.parts["family"](tmp_path) == "This has not been run yet."
    row = lambda accuracy, macs: {"accuracy": accuracy, "macs": macs, "parameters": 500_000}
    values = {"rows": {"ViT": [row(0.9, 4e6), row(0.8, 4e6)], "ours": [row(0.7, 1e6), row(0.7, 1e6)]},
              "thins": {"ViT": "nothing", "ours": "rows"}, "seeds": [0, 1], "metric": "accuracy",
              "seconds": {"128": {"ViT": [1, 2, 8], "ours": [2, 2, 2]}},
              "megabytes": {"ViT": {"step": 10.4, "inference": 1.6}},
              "recipe": {"steps": 5000, "batch": 64, "dim": 96, "depth": 6, "test_pictures": 2000}}
    machine = {"processor": "P", "cpus": 2, "numpy": "2", "blas": "B"}
    (tmp_path / "family_full.json").write_text(json.dumps({"machine": machine, "results": values}))
    lines = report.parts["family"](tmp_path).splitlines()
    assert lines[2] == ("| ViT | nothing | 85.0 ± 7.1 % | 4.0 | 1.00 | 0.50 | 64 (1.00 [1.00, 1.00]) "
                        "| 10 | 2 |")
    assert lines[3] == "| ours | rows | 70.0 ± 0.0 % | 1.0 | 0.25 | 0.50 | 64 (1.00 [0.75, 2.50]) |  |  |"
    assert lines[5].startswith("5,000 steps of 64 pictures, width 96, 6 blocks; 2,000 test pictures, seeds 0, 1;")


def test_the_arms_of_the_headline_are_shown_with_what_damage_does(tmp_path):
    assert report.parts["lookup_headline"](tmp_path) == "This has not been run yet."
    row = lambda accuracy: {"accuracy": accuracy, "macs": 4e6, "parameters": 500_000}
    errors = lambda share: {"clean": 0.0, "damaged": {"haze": [share, share], "jpeg": [share, 0.0]}}
    values = {"rows": {"ViT": [row(0.9), row(0.8)], "ours": [row(0.7)]}, "above": {"ViT": [-10, -11, -9]},
              "damaged": {"ViT": [errors(0.2), errors(0.4)], "ours": [errors(0.3)]}, "seeds": [0, 1],
              "claims": [{"claim": "a", "measured": 1.5, "bound": [1, None], "holds": True}],
              "recipe": {"steps": 5000, "batch": 64, "test_pictures": 2000}}
    machine = {"processor": "P", "cpus": 2, "numpy": "2", "blas": "B"}
    saved = {"machine": machine, "results": values}
    (tmp_path / "lookupvit_headline_full.json").write_text(json.dumps(saved))
    lines = report.parts["lookup_headline"](tmp_path).splitlines()
    assert lines[2] == ("| ViT | 2 | 85.0 ± 7.1 % | 4.0 | 0.50 | -10.0 [-11.0, -9.0] | 22.5 ± 10.6 "
                        "| 100.0 ± 0.0 |")
    assert lines[3] == "| ours | 1 | 70.0 % | 4.0 | 0.50 |  | 22.5 | 150.0 |"
    assert lines[5].startswith("5,000 steps of 64 pictures, 2,000 test pictures, seeds 0, 1.")
    assert lines[-1] == "- holds: a: 1.5 (above 1)"


def test_the_arms_of_the_recipe_are_shown_the_best_first(tmp_path):
    row = lambda accuracy, cosines: {"accuracy": accuracy, "macs": 4e6, "trained": {"class": 1.0},
                                     "cosines": cosines}
    values = {"rows": {"ViT": row(0.7, [None, None]), "ours": row(0.8, [[0.1, 0.5], [0.2, 0.6]])}, "seed": 0,
              "recipe": {"steps": 5000, "batch": 64, "held_out": 2000}}
    machine = {"processor": "P", "cpus": 2, "numpy": "2", "blas": "B"}
    saved = {"machine": machine, "results": values}
    (tmp_path / "lookupvit_recipe_full_cifar10.json").write_text(json.dumps(saved))
    lines = report.parts["lookup_recipe_cifar10"](tmp_path).splitlines()
    assert lines[2:4] == ["| ours | 80.00 % | 4.0 | 1.00 | 0.60 |", "| ViT | 70.00 % | 4.0 | 1.00 |  |"]
    assert "2,000 pictures that were held out, seed 0." in lines[5]


def test_claims():
    claims = [{"claim": "a", "measured": 1.5, "bound": [1, None], "holds": True},
              {"claim": "b", "measured": 0.75, "bound": [None, 0.5], "holds": False}]
    assert report.claims_text(claims) == "- holds: a: 1.5 (above 1)\n- **fails**: b: 0.75 (at most 0.5)"


def test_machines_of_a_run_that_was_made_on_several():
    def machine(cpus):
        return {"processor": "P", "cpus": cpus, "numpy": "2", "blas": "B"}
    saved = {"machine": machine(8)}
    assert report.machine_text(saved) == "Machine: P, 8 CPUs, NumPy 2, B."
    saved["machines_of_parts"] = [machine(1), machine(2), machine(1)]
    assert report.machine_text(saved) == "Machines: P, 1 CPU, NumPy 2, B; P, 2 CPUs, NumPy 2, B."
