"""The README says what was measured and nothing else: its tables are made from the committed JSON, its commands are CI's."""
import json
import pathlib
import re
import shutil

import pytest

import tinytoken as tt
from tinytoken import report
from tinytoken.__main__ import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "lessons" / "results"


def test_the_measured_parts_are_those_of_the_saved_runs():
    assert "<!-- measured: scenes -->" in README
    assert report.render(README, RESULTS) == README, "run: python -m tinytoken report"


def test_every_measured_part_is_in_the_readme_and_closed():
    names = re.findall(r"<!-- measured: (\w+) -->", README)
    assert sorted(names) == sorted(report.parts) and README.count("<!-- /measured -->") == len(names)


def test_the_report_rewrites_what_was_typed_and_refuses_what_it_cannot_know(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "lessons" / "results")
    readme = tmp_path / "README.md"
    readme.write_text(README.replace("| ViT |", "| ViT, improved |"))
    assert report.write(tmp_path) and readme.read_text() == README
    assert not report.write(tmp_path)
    readme.write_text("<!-- measured: wishes -->\n<!-- /measured -->")
    with pytest.raises(tt.InputError, match="unknown part 'wishes'"):
        report.write(tmp_path)
    (tmp_path / "lessons" / "results" / "scenes_1500_steps.json").write_text("{")
    readme.write_text(README)
    with pytest.raises(tt.InputError, match="scenes_1500_steps.json"):
        report.write(tmp_path)
    assert readme.read_text() == README
    with pytest.raises(tt.InputError, match="README.md"):
        report.write(tmp_path / "lessons")


def test_seeds_of_different_recipes_are_not_averaged(tmp_path):
    table = json.loads((RESULTS / "compare_scenes_seed0.json").read_text())
    for seed, steps in ((0, 500), (1, 499)):
        table["recipe"] |= {"seed": seed, "steps": steps}
        (tmp_path / f"compare_scenes_seed{seed}.json").write_text(json.dumps(table))
    with pytest.raises(tt.InputError, match="differ in more than their seed"):
        report.parts["scenes"](tmp_path)


def test_arms_are_compared_seed_by_seed():
    def row(accuracy, **more):
        return {"accuracy": accuracy, "macs": 2e6} | more

    kept = {"on_object": {"all": 0.1, "stages": [0.15, 0.2]}, "ratios": [0.7, 0.5], "targets": [0.7, 0.49]}
    rows = {"ViT, further": [row(0.90), row(0.80)], "ours": [row(0.91, **kept), row(0.84, **kept)], "once": [row(0.85)]}
    found = {"machine": {"processor": "P", "cpus": 2, "numpy": "2", "blas": "B"}, "results": {
        "rows": rows, "seeds": [0, 1], "starts": [row(0.5), row(0.7)],
        "recipe": {"first_steps": 1000, "further_steps": 10, "batch": 64, "further_lr": 0.1, "test_pictures": 2000}}}
    lines = report.arms_text(found).splitlines()
    assert lines[2] == "| ViT, further | 2 | 85.0 ± 7.1 % |  | 2.0 |  |  |"
    assert lines[3] == "| ours | 2 | 87.5 ± 4.9 % | +2.5 ± 2.1 | 2.0 | 1.50, 2.00 | 0.700 (0.700), 0.500 (0.490) |"
    assert lines[4] == "| once | 1 | 85.0 % | -5.0 | 2.0 |  |  |"
    assert "1,000 steps (60.0 ± 14.1 %)" in lines[6] and "(0, 1)" in lines[6]
    claims = [{"claim": "a", "measured": 1.5, "bound": [1, None], "holds": True},
              {"claim": "b", "measured": 0.75, "bound": [None, 0.5], "holds": False}]
    assert report.claims_text(claims) == "- holds: a: 1.5 (above 1)\n- **fails**: b: 0.75 (at most 0.5)"


def test_the_report_command(capsys):
    assert main(["report", "--root", str(ROOT)]) == 0
    assert "as the results say" in capsys.readouterr().out


def test_ci_runs_the_readmes_test_command():
    [command] = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv") and "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_of_the_readme_lead_somewhere():
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links and all(link.startswith("https://") or (ROOT / link).exists() for link in links)


def test_the_readmes_example_runs(capsys):
    code = README.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert "multiply-adds" in capsys.readouterr().out
