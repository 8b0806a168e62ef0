"""The README says what was measured and nothing else: its tables are made from the committed JSON, its commands are CI's."""
import json
import pathlib

import pytest

from tinytoken.compare import conditions_text, table_text

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "lessons" / "results"


@pytest.mark.parametrize("name", ["compare_scenes", "compare_cifar10"])
def test_tables_are_those_of_the_saved_runs(name):
    tables = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json"))]
    assert tables and all(t["recipe"] | {"seed": 0} == tables[0]["recipe"] | {"seed": 0} for t in tables)
    assert table_text(*tables) in README
    assert conditions_text(*tables) in README


def test_the_longer_run_is_quoted_as_it_was():
    table = json.loads((RESULTS / "scenes_1500_steps.json").read_text())
    assert table["recipe"] | {"steps": 500} == json.loads((RESULTS / "compare_scenes_seed0.json").read_text())["recipe"]
    vit, dynamic, lookup = (f"{100 * row['accuracy']:.1f}" for row in table["rows"][:3])
    said = f"(`--steps 1500`, seed 0 alone) ViT, DynamicViT and LookupViT reach {vit}, {dynamic} and {lookup} %."
    assert said in " ".join(README.split())


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
