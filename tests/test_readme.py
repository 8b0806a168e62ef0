"""The pages say what was measured and nothing else: their tables are made from the committed JSON, the
commands and files that they name exist, the README's example runs."""
import pathlib
import re

import pytest

from lessons import report
from tinytoken.__main__ import parser

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*report.PAGES, "tinytoken/cuda/README.md"]
every_page = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", report.PAGES)
def test_the_measured_parts_are_those_of_the_saved_runs(page):
    text = text_of(page)
    assert report.render(text, ROOT / "lessons" / "results") == text, "run: python lessons/report.py"


def test_every_measured_part_stands_on_a_page_and_is_closed():
    texts = [text_of(page) for page in report.PAGES]
    names = [name for text in texts for name in re.findall(r"<!-- measured: (\w+) -->", text)]
    assert sorted(names) == sorted(report.parts)
    assert sum(text.count("<!-- /measured -->") for text in texts) == len(names)
    assert "<!-- measured: scenes -->" in README


def test_ci_runs_the_readmes_test_command():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    [command] = [line for line in commands if "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readmes_example_runs(capsys):
    code = README.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert "multiply-adds" in capsys.readouterr().out


def anchors(path):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text_of(page)) if not link.startswith("https://")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def code_of(page):
    """Indented lines, and what stands in backticks."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`]+)`", text)


@every_page
def test_the_files_that_are_named_exist(page):
    for code in code_of(page):
        for name in re.findall(r"(?<![\w/.])(?:tests|lessons|tinytoken)/[\w/*.]+", code):
            assert list(ROOT.glob(name.rstrip("./"))), name


def test_the_commands_that_are_named_exist():
    named = {name for page in PAGES for code in code_of(page)
             for name in re.findall(r"^\s*(?:.* )?(?:\S*/|python -m )?tinytoken ([a-z-]+)", code)}
    [commands] = [action.choices for action in parser()._subparsers._group_actions]
    assert {"compare", "doctor", "grade"} <= named <= set(commands)


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150
