"""The site: what is refused before work, what becomes of links and docstrings, that a planted leak is found; and,
slow, the whole of it, in a browser where there is one."""
import json
import os
import pathlib
import re
import zipfile

import pytest

import chromium
import tinytoken as tt
from tiny import ROOT, everything, refused
from tinytoken import site
from tinytoken.course import assignment, notebook
from tinytoken.explorer import static
from tinytoken.site import typeset

ADDRESS = "https://github.com/owner/name"
SCRIPTS = [*ROOT.glob("lessons/[0-9]*.py"), *ROOT.glob("lessons/related/[0-9]*.py"),
           *ROOT.glob("lessons/assignments/a*/a?_*.py")]


@pytest.fixture
def source(tmp_path):
    return site.Source(tmp_path / "source", ADDRESS)


def test_what_cannot_be_used_is_refused_before_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(site, "run_sphinx", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for arguments, text in ((["--out", tmp_path / "mine"], "it holds other files (thesis.txt)"),
                            (["--out", tmp_path / "mine" / "thesis.txt"], "it is a file, expected a folder"),
                            (["--out", tmp_path / "new", "--pyodide", tmp_path / "mine"],
                             "pyodide-lock.json does not exist"),
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
    assert "colab.research.google.com/github/owner/name/blob/gh-pages/notebooks/07_dynamicvit.ipynb" in page
    book = source.folder / "extra" / "notebooks" / "07_dynamicvit.ipynb"
    first = lambda: "".join(json.loads(book.read_text())["cells"][0]["source"])
    assert first() == f'%pip install -q "tinytoken-vit[plot,fast] @ git+{ADDRESS}"'
    source.address = None
    source.lesson(script, "07_dynamicvit")
    assert first() == f'%pip install -q "tinytoken-vit[plot,fast]=={tt.__version__}"'
    assert "colab" not in (source.folder / "lessons" / "07_dynamicvit.md").read_text()


def test_docstrings_are_plain_text():
    lines = ["*xs and a_ |b| `c`.", "", "keep (B, Tk): 1 keeps", "    more", "weights: two", "", "    a  *  b"]
    typeset.plain_docstring(None, "function", "f", None, None, lines)
    assert lines == [r"\*xs and a\_ \|b\| ``c``.", "", "- keep (B, Tk): 1 keeps", "  more", "- weights: two", "", "::", "",
                     "      a  *  b", ""]


FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_formulas_are_whole(script):
    """The converter, which refuses what it does not know, reads each; a sign without its twin is none."""
    tex2mathml = pytest.importorskip("docutils.utils.math.latex2mathml").tex2mathml
    for kind, text in notebook.cells(script.read_text(encoding="utf-8")):
        if kind == "markdown":
            for block, inline in FORMULA.findall(text):
                assert "<math" in str(tex2mathml(block or inline, as_block=bool(block)))
            assert "$" not in FORMULA.sub("", text)


def test_the_lessons_have_formulas():
    found = {path.stem: path.read_text().count("$$") // 2 for path in SCRIPTS}
    assert sum(found.values()) >= 45 and found["03_attention"] >= 7 and found["07_dynamicvit"] == 2


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
        box.writestr("a.txt", b"\xff\x00")  # no text
        box.writestr("tinytoken/explorer/models.npz", (ROOT / "tinytoken" / "explorer" / "models.npz").read_bytes())
    assert len(site.leaks(tmp_path, [given])) == 2
    with zipfile.ZipFile(tmp_path / "a1_autograd.zip", "w") as box:
        box.writestr("tinytoken/explorer/models.npz", b"another")
    assert "models.npz is no file for students" in site.leaks(tmp_path, [given])[0]


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


# The whole site, and a browser

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The whole site; TINYTOKEN_SITE names one that is built already."""
    there = os.environ.get("TINYTOKEN_SITE")
    return pathlib.Path(there) if there else site.build(tmp_path_factory.mktemp("site") / "site", ADDRESS).parent


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(built):
    files = sorted(built.rglob("*.html"))
    assert len(files) > 100 and len(list(built.glob("notebooks/*.ipynb"))) == len(SCRIPTS)
    ids = {file: set(re.findall(r' id="([^"]+)"', file.read_text())) for file in files}
    for file in files:
        text = file.read_text()
        for tag, link in re.findall(r'<(\w+)\b[^>]*? (?:href|src)="([^"]+)"', text):
            path, _, anchor = link.partition("#")
            if re.match(r"https?:|mailto:|data:", link):
                assert tag == "a" or link == "data:,", f"{file} loads {link}"
                continue
            target = (file.parent / path.partition("?")[0]).resolve() if path else file
            assert target.exists(), f"{file}: {link}"
            assert not anchor or target.suffix != ".html" or anchor in ids[target], f"{file}: {link}"
        assert "$$" not in text and r"\frac" not in text, f"{file}: a formula as it is written"
    assert site.leaks(built, site.Source(built, None).assignments) == []


@pytest.mark.slow
def test_the_explorer_is_the_one_of_the_command(built, tmp_path):
    static.write(tmp_path / "explorer")
    for name in everything(tmp_path / "explorer"):
        there, wanted = built / "explorer" / name, tmp_path / "explorer" / name
        assert there.read_bytes() == wanted.read_bytes() or (built / "explorer" / "pyodide").exists(), name


@pytest.fixture(scope="module")
def browser(built, tmp_path_factory):
    """(Chromium, the address of the site on a local server)."""
    driver = chromium.started(tmp_path_factory.mktemp("profile"))
    driver.set_page_load_timeout(300)
    with chromium.files_of(built) as address:
        yield driver, address
    driver.quit()


@pytest.mark.slow
@chromium.needs_browser
def test_every_page_loads_without_an_error_and_first_paint_is_light(built, browser):
    """Light: what the browser has when it first paints, that is style, scripts in the head, and the page itself as
    a server compresses it."""
    import gzip
    driver, address = browser
    for page in sorted(built.rglob("*.html")):
        name = page.relative_to(built).as_posix()
        driver.get(f"{address}/{name}")
        errors = [line for line in chromium.errors(driver) if "favicon.ico" not in line  # the server has none
                  and not (name == site.EXPLORER and static.DISTRIBUTION in line)]  # no test asks for that
        assert errors == [], name
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        parts = [page] + [built / url.split("?")[0].removeprefix(f"{address}/") for url in loaded
                          if re.search(r"\.(css|js)(\?|$)", url) and "searchindex" not in url]
        assert sum(len(gzip.compress(part.read_bytes())) for part in parts) < 100_000, name


@pytest.mark.slow
@chromium.needs_browser
def test_search_finds_gumbel(browser):
    from selenium.webdriver.support.wait import WebDriverWait
    driver, address = browser
    driver.get(f"{address}/search.html?q=Gumbel")
    found = WebDriverWait(driver, 120).until(lambda d: d.find_elements("css selector", "#search-results li a"))
    WebDriverWait(driver, 120).until(lambda d: "06_gumbel_softmax" in " ".join(
        link.get_attribute("href") for link in d.find_elements("css selector", "#search-results li a")))
    assert found


FRACTIONS = """
const seen = element => element.getBoundingClientRect();
return [...document.querySelectorAll("article .formula mfrac")].map(({children: [over, under]}) =>
  seen(over).height > 4 && seen(under).height > 4 && seen(over).bottom <= seen(under).top);
"""
GAPS = """  // to the right of what stands before the first "&" of a line
return [...document.querySelectorAll(".ams-align mtd:first-child")].filter(cell => cell.lastElementChild).map(cell =>
  cell.getBoundingClientRect().right - cell.lastElementChild.getBoundingClientRect().right);
"""


@pytest.mark.slow
@chromium.needs_browser
@pytest.mark.parametrize("name, least", [("03_attention", 5), ("06_gumbel_softmax", 8), ("07_dynamicvit", 6),
                                         ("08_lookup_attention", 6)])
def test_formulas_are_typeset(name, least, browser):
    """Each fraction has its upper part above its lower one, lines are aligned, and no formula is there as it is
    written."""
    driver, address = browser
    driver.get(f"{address}/lessons/{name}.html")
    fractions, gaps = driver.execute_script(FRACTIONS), driver.execute_script(GAPS)
    assert len(fractions) >= least and all(fractions) and gaps and max(gaps) < 8
    text = driver.execute_script("for (let code of document.querySelectorAll('article pre')) code.remove();"
                                 "return document.querySelector('article').innerText")
    assert "$" not in text and "\\" not in text


@pytest.mark.slow
@chromium.needs_browser
def test_the_explorer_is_reached_from_the_front_page_and_from_the_contents(built, browser):
    driver, address = browser
    form = "pyodide" if (built / "explorer" / "pyodide").exists() else "without"
    for link in ("Try the models in your browser", "Open the explorer"):
        driver.get(f"{address}/index.html")
        if link == "Open the explorer":
            contents = driver.find_element("css selector", ".sidebar-tree a[href='explorer.html']")
            driver.get(contents.get_attribute("href"))
        driver.find_element("link text", link).click()
        chromium.settled(driver, form, 300)
        assert driver.title == "tinytoken: explorer of tokens"
    told = "return document.getElementById('keep-text').textContent"
    before = driver.execute_script(told)
    driver.find_element("id", "keep").send_keys("\ue012")  # the arrow to the left
    chromium.settled(driver)
    assert before == "0.70 (of 64: 44, 31, 21)" and driver.execute_script(told) == "0.65 (of 64: 41, 27, 17)"


@pytest.mark.slow
@chromium.needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "explorer", "lessons/07_dynamicvit", "lessons/08_lookup_attention",
                                  "lessons/RESULTS", "api/tinytoken.ops.attend", "lessons/assignments/a1_autograd"])
def test_contrast_and_a_phones_width(name, theme, browser):
    from selenium_axe_python import Axe
    driver, address = browser
    driver.set_window_size(390, 844)
    driver.get(f"{address}/{name}.html")
    driver.execute_script(f"document.body.dataset.theme = '{theme}'")
    wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    axe = Axe(driver)
    axe.inject()
    found = axe.run(options={"runOnly": ["color-contrast", "image-alt", "link-name", "document-title", "html-has-lang"]})
    assert [(v["id"], v["nodes"][0]["html"], v["nodes"][0]["any"]) for v in found["violations"]] == []
    assert wide <= 0, "the page is wider than the screen"
