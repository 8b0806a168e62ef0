"""The site: what is refused before work, what becomes of links and docstrings, that a planted leak is found; and,
slow, the whole of it, in a browser where there is one."""
import functools
import http.server
import json
import os
import pathlib
import re
import shutil
import threading
import zipfile

import pytest

import tinytoken as tt
from tiny import ROOT, everything, refused
from tinytoken import site
from tinytoken.course import assignment

ADDRESS = "https://github.com/owner/name"


@pytest.fixture
def source(tmp_path):
    return site.Source(tmp_path / "source", ADDRESS)


def test_what_cannot_be_used_is_refused_before_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(site, "run_sphinx", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for arguments, text in ((["--out", tmp_path / "mine"], "it holds other files (thesis.txt)"),
                            (["--out", tmp_path / "mine" / "thesis.txt"], "it is a file, expected a folder"),
                            (["--out", tmp_path / "new", "--address", "example.org"],
                             "address example.org, expected https://github.com/OWNER/NAME")):
        assert text in refused(capsys, "site", *arguments)
    monkeypatch.setitem(site.NEEDS, "no_such_package", "no-such-package>=2")
    assert "pip install 'no-such-package>=2'" in refused(capsys, "site", "--out", tmp_path / "new")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    assert "it builds a checkout's site" in refused(capsys, "site", "--out", tmp_path / "new")
    assert everything(tmp_path) == ["mine", "mine/thesis.txt"]


def test_the_extra_brings_what_is_needed():
    import tomllib
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert list(site.NEEDS.values()) == extras["site"] and set(extras["site"]) <= set(extras["test"])


def test_links_lead_to_pages_or_to_the_address_or_nowhere(source):
    source.api()
    text = ("[tape](lessons/01_tape.py) [engine](tinytoken/tensor.py) [ops](tinytoken/ops) [more](lessons/RESULTS.md#how-fast) "
            "[tests](tests/tiny.py) [x](https://example.org) f[i](x)")
    pages = ("[tape](/lessons/01_tape.md) [engine](/api/tinytoken.tensor.rst) [ops](/api/tinytoken.ops.rst) "
             "[more](/lessons/RESULTS.md#how-fast) ")
    rest = " [x](https://example.org) f[i](x)"
    assert source.linked(text, ROOT / "README.md") == f"{pages}[tests]({ADDRESS}/blob/main/tests/tiny.py){rest}"
    source.address = None
    assert source.linked(text, ROOT / "README.md") == f"{pages}tests{rest}"


def test_a_lesson_has_its_pictures_what_it_measured_and_downloads(source):
    script = ROOT / "lessons" / "07_dynamicvit.py"
    source.lesson(script, "07_dynamicvit")
    page = (source.folder / "lessons" / "07_dynamicvit.md").read_text()
    saved = json.loads((ROOT / "lessons" / "results" / "07_dynamicvit.json").read_text())
    assert saved["headline"] in page and "Bounds set before the run" in page and "| random tokens .5 |" in page
    pictures = re.findall(r"!\[[^\]]+\]\(/(.*?)\)", page)
    assert len(pictures) == len(set(pictures)) and all((ROOT / name).exists() for name in pictures)
    assert {f"lessons/results/07_dynamicvit{run}_kept.png" for run in ("", "_full", "_full_cifar10")} <= set(pictures)
    assert f"colab.research.google.com/github/owner/name/blob/gh-pages/notebooks/07_dynamicvit.ipynb" in page
    book = json.loads((source.folder / "extra" / "notebooks" / "07_dynamicvit.ipynb").read_text())
    assert "".join(book["cells"][0]["source"]) == f'%pip install -q "tinytoken-vit[plot,fast]=={tt.__version__}"'
    source.address = None
    source.lesson(script, "07_dynamicvit")
    assert "colab" not in (source.folder / "lessons" / "07_dynamicvit.md").read_text()


def test_docstrings_are_plain_text():
    lines = ["*xs and a_ |b| `c`.", "", "keep (B, Tk): 1 keeps", "    more", "weights: two", "", "    a  *  b"]
    site.plain_docstring(None, "function", "f", None, None, lines)
    assert lines == [r"\*xs and a\_ \|b\| ``c``.", "", "- keep (B, Tk): 1 keeps", "  more", "- weights: two", "", "::", "",
                     "      a  *  b", ""]


PLANTS = {  # file: how a line of a solution may stand in it
    "lessons/a.html": "<pre><span>    {}</span></pre>",
    "notebooks/a1_autograd.ipynb": '{{"cells": [{{"source": ["    {}"]}}]}}',
    "a.js": "{}"}


@pytest.mark.parametrize("name, form", PLANTS.items(), ids=PLANTS)
def test_a_planted_leak_is_found(name, form, tmp_path):
    given = assignment.load(ROOT / "lessons" / "assignments" / "a1_autograd")
    secret = "return [unbroadcast(g * b.value, a.value.shape), unbroadcast(g * a.value, b.value.shape)]"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(form.format("x = 1"))
    assert site.leaks(tmp_path, [given]) == []
    (tmp_path / name).write_text(form.format(secret))
    assert [leak for leak in site.leaks(tmp_path, [given]) if name in leak and secret in leak]
    (tmp_path / name).unlink()
    with zipfile.ZipFile(tmp_path / "a1_autograd.zip", "w") as box:
        box.writestr("a.py", f"    {secret}\n### BEGIN SOLUTION\n")
    assert len(site.leaks(tmp_path, [given])) == 2


def test_nothing_is_written_where_something_leaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(site.Source, "write", lambda self: None)

    def run(source, made):
        (made / "lessons").mkdir(parents=True)
        (made / "lessons" / "a.html").write_text("### BEGIN SOLUTION")
    monkeypatch.setattr(site, "run_sphinx", run)
    assert "not published: lessons/a.html holds the marker" in refused(capsys, "site", "--out", tmp_path / "site")
    assert everything(tmp_path) == []
    monkeypatch.setattr(site, "leaks", lambda *_: [])
    assert site.build(tmp_path / "site").parent == site.build(tmp_path / "site").parent  # the second replaces the first
    assert everything(tmp_path) == ["site", "site/.tinytoken-site", "site/lessons", "site/lessons/a.html"]
