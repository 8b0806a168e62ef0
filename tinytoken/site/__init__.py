"""The lessons, what they measured, the assignments and the API as static pages: `python -m tinytoken site`.

Sphinx makes the pages (theme Furo, Markdown by MyST, the API by autodoc); jupytext reads the lessons. This
file says what goes where. No lesson is run: pictures and figures are those of lessons/results. A page loads
nothing from another address, so the site works without a network; only the explorer's loads Pyodide, if it is
not given a folder of it, and shows recorded examples where it cannot.
"""
import ast
import html
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .. import __version__
from ..course import assignment, notebook, release
from ..errors import InputError, expect, install, some_of
from ..explorer import static
from ..files import FilePath, check_writable, kind_of
from .typeset import STYLE

ROOT = pathlib.Path(__file__).parents[2]
NEEDS = {"sphinx": "sphinx>=8.2", "furo": "furo>=2025.7.19", "myst_parser": "myst-parser>=4",
         "jupytext": "jupytext>=1.17"}
ADDRESS = re.compile(r"(https://github\.com/[\w-]+/[\w.-]+?)/?")
EXPLORER = "explorer/index.html"
EXPLORER_PAGE = """\
# Explorer

A ViT, a DynamicViT and a LookupViT run in your browser, by this package: pick a scene, draw, or drop a
picture, move the sliders, and see which tokens are kept, where attention goes, what it costs, and the time.

![The explorer](/lessons/results/explorer.png)

At its start the page loads Python for the browser (Pyodide), about 19 MB. Where it cannot, it says so and
shows recorded scenes. `tinytoken explore` opens the same page on your own machine, with the models behind it.
"""
MARK = ".tinytoken-site"  # says that a folder is an earlier site, which may be replaced
PAGES = {"README.md": "index.md", "lessons/assignments/README.md": "lessons/assignments/index.md"}
TEXTS = ("lessons/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "tinytoken/cuda/README.md")
NO_API = ("cuda", "compiled")  # not needed to understand the rest, and not to be imported everywhere
INSTALL = '%pip install -q "tinytoken-vit[plot,fast]{}"'
PICTURE = re.compile(r'here\.picture\(\s*"(\w+)"')
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def build(out: FilePath, address: str | None = None,
          pyodide: FilePath | None = None) -> pathlib.Path:
    """Build this checkout's site into the folder `out` -> its first page.

    address: the project's on GitHub, https://github.com/OWNER/NAME, whose branch gh-pages has this site. With
        it, files that have no page are links to it, and each lesson has a link to its notebook in Colab.
    out: new, empty, or an earlier site, which is replaced once the new one is complete.
    pyodide: a folder with Pyodide and its NumPy, which the site gets a copy of, for networks that do not
        reach Pyodide's own distribution.
    InputError, before the work, for what cannot be used or is not installed; and after it, in place of a site
    that gives a solution away, or of which Sphinx warns, as it does of a broken link.
    """
    out = pathlib.Path(out)
    check(out, address)
    if pyodide is not None:
        static.files_of(pathlib.Path(pyodide))  # refuses what is none of Pyodide's
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tinytoken-site.", dir=out.absolute().parent) as folder:
        source, made = pathlib.Path(folder, "source"), pathlib.Path(folder, "site")
        pages = Source(source, address, pyodide)
        pages.write()
        run_sphinx(source, made)
        problems = leaks(made, pages.assignments)
        expect(not problems, "site", lambda: f"not published: {some_of(problems)}")
        (made / MARK).write_text(f"tinytoken {__version__}\n", encoding="utf-8")
        if out.exists():
            out.rename(pathlib.Path(folder, "before"))
        made.rename(out)
    return out / "index.html"


def check(out: pathlib.Path, address: str | None) -> None:
    """InputError for what `build` cannot use."""
    expect((ROOT / "lessons" / "report.py").exists(), "site",
           f"no lessons in {ROOT}: it builds a checkout's site")
    expect(address is None or ADDRESS.fullmatch(address), "site",
           f"address {address}, expected https://github.com/OWNER/NAME")
    expect(kind_of(out) in ("nothing", "a folder"), f"cannot write {out}",
           f"it is {kind_of(out)}, expected a folder")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    expect(not there or MARK in there, f"cannot write {out}",
           f"it holds other files ({some_of(there)}): give a new folder, or an earlier site")
    check_writable(out.absolute().parent)
    missing = [needed for name, needed in NEEDS.items() if not importlib.util.find_spec(name)]
    expect(not missing, "site", lambda: f"missing packages, the extra `site`: {install(*missing)}")


def run_sphinx(source: pathlib.Path, made: pathlib.Path) -> None:
    """Pages of `source` -> HTML in `made`. InputError with what Sphinx warns of: it has nothing to."""
    doctrees = str(source.parent / "doctrees")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-d", doctrees, str(source), str(made)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False,
                          env=environment)
    said = done.stderr.replace(f"{source}{os.sep}", "").strip().splitlines()
    expect(done.returncode == 0 and not said, "site", lambda: f"Sphinx refuses: {some_of(said, 5)}")


class Source:
    """What Sphinx reads: each page at the place that its file has in the checkout, so that links hold."""

    def __init__(self, folder: pathlib.Path, address: str | None, pyodide: FilePath | None = None) -> None:
        self.folder, self.results, self.pyodide = folder, ROOT / "lessons" / "results", pyodide
        self.address = ADDRESS.fullmatch(address)[1] if address else None  # type: ignore[index]
        self.report = report()
        self.scripts = self.report.scripts(self.results)  # {a lesson's file: the name of its results}
        self.assignments = [assignment.load(path.parent)
                            for path in sorted((ROOT / "lessons" / "assignments").glob("*/assignment.toml"))]

    def write(self) -> None:
        """Write all pages, and what there is to download."""
        self.api()  # first: others lead to its pages
        shutil.copytree(self.results, self.folder / "lessons" / "results", ignore=lambda _, names: [
            name for name in names if not name.endswith(".png")])
        self.put("_static/tinytoken.css", STYLE)
        self.put("conf.py", "from tinytoken.site import typeset\n\nglobals().update(typeset.SETTINGS)\n")
        for script, name in self.scripts.items():
            self.lesson(script, name)
        for given in self.assignments:
            self.assignment(given)
        for name in (*TEXTS, *PAGES):
            text = self.linked((ROOT / name).read_text(encoding="utf-8"), ROOT / name)
            links = {"Try the models in your browser": EXPLORER} if name == "README.md" else {}
            self.put(PAGES.get(name, name), with_links(text, links, PAGES[name]) if links else text)
        static.write(self.folder / "extra" / "explorer", self.pyodide)
        self.put("explorer.md", with_links(EXPLORER_PAGE, {"Open the explorer": EXPLORER}, "explorer.md"))
        with open(self.folder / "index.md", "a", encoding="utf-8") as file:
            file.writelines(self.contents())

    def put(self, name: str, text: str) -> None:
        """Write a file of the source."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def contents(self) -> Iterator[str]:
        """The contents at the side of every page, which are also the order of "next" and "previous"."""
        lessons = [page_of(script) for script in self.scripts]
        parts = {"Try it": ["explorer.md"],
                 "Lessons": [page for page in lessons if "/related/" not in page],
                 "Related methods": [page for page in lessons if "/related/" in page],
                 "Assignments": [*(f"lessons/assignments/{given.name}.md" for given in self.assignments),
                                 "lessons/assignments/index.md"],
                 "Reference": [TEXTS[0], "api/index.md", *TEXTS[1:]]}
        for caption, pages in parts.items():
            yield "\n```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```\n" % (caption, "\n".join(pages))

    def lesson(self, script: pathlib.Path, name: str) -> None:
        """A lesson's page: text and code, each picture behind the cell that draws it, what was measured."""
        text, shown = script.read_text(encoding="utf-8"), []
        title = text.splitlines()[1].lstrip("# ")

        def drawn(code: str) -> Iterator[str]:
            for what in PICTURE.findall(code):
                if (path := self.results / f"{name}_{what}.png").exists():
                    shown.append(path)
                    yield picture(script, path, f"{title}: {what.replace('_', ' ')}")
        body = self.page(script, text, drawn)
        install = INSTALL.format(f" @ git+{self.address}" if self.address else f"=={__version__}")
        self.put(f"extra/notebooks/{name}.ipynb", notebook.text_of(
            [notebook.cell(*each) for each in (("code", install), *notebook.cells(text))]))
        self.put(f"extra/notebooks/{name}.py", text)
        links = {"Notebook": f"notebooks/{name}.ipynb", "Script": f"notebooks/{name}.py"}
        if self.address:
            repository = self.address.removeprefix("https://github.com/")
            links["Open in Colab"] = ("https://colab.research.google.com/github/"
                                      f"{repository}/blob/gh-pages/notebooks/{name}.ipynb")
        runs = [self.results / f"{name}{more}.json" for more in ("", "_full", "_full_cifar10")]
        measured = [part for path in runs if path.exists()
                    for part in self.measured(script, name, path, shown)]
        body = with_links(body, links, page_of(script))
        self.put(page_of(script), "\n\n".join([body, "## What was measured", *measured]) + "\n")

    def measured(self, script: pathlib.Path, name: str, path: pathlib.Path,
                 shown: list[pathlib.Path]) -> Iterator[str]:
        """What one run of a lesson has measured: its headline, its table if it has one, its claims, and its
        pictures that the page does not show yet."""
        saved, run = self.report.load(path), path.stem.removeprefix(name)
        yield (f"### {'The full run' if '_full' in run else 'The default run'}"
               f"{' on CIFAR-10' * run.endswith('_cifar10')}\n\n{saved.get('headline', '')}\n\n"
               f"Seed {saved['seed']}, {saved['seconds']:.0f} s. {self.report.machine_text(saved)}")
        if name in self.report.lesson_tables:
            yield self.report.lesson_tables[name](saved)
        if claims := saved["results"].get("claims"):
            yield f"Bounds set before the run:\n\n{self.report.claims_text(claims)}"
        for drawn in sorted(path.parent.glob(f"{path.stem}_*.png")):
            what = drawn.stem.removeprefix(f"{path.stem}_")
            if drawn not in shown and not what.startswith(("full_", "cifar10_")):  # of another run
                yield picture(script, drawn, what.replace("_", " "))

    def page(self, script: pathlib.Path, text: str, drawn: Any = lambda code: ()) -> str:
        """A percent script as Markdown. drawn(a cell's code): paragraphs to put behind it."""
        import jupytext
        book = jupytext.reads(text, "py:percent")
        book.metadata = {"jupytext": {"notebook_metadata_filter": "-all"}}
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cell.source = self.linked(cell.source, script)
        more = {i: list(drawn(cell.source)) for i, cell in enumerate(book.cells) if cell.cell_type == "code"}
        from nbformat.v4 import new_markdown_cell
        book.cells = [each for i, cell in enumerate(book.cells)
                      for each in (cell, *map(new_markdown_cell, more.get(i, ())))]
        return jupytext.writes(book, "md")

    def assignment(self, given: assignment.Assignment) -> None:
        """The page of a student's copy, and the copy as an archive. `write_copy` looks for leaks already."""
        place, name = f"lessons/assignments/{given.name}", given.name
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            copy = pathlib.Path(folder, name)
            files = release.write_copy(given, copy, notebook=True)
            (self.folder / "extra" / "notebooks").mkdir(exist_ok=True)
            with zipfile.ZipFile(self.folder / "extra" / "notebooks" / f"{name}.zip", "w") as box:
                for path in files:
                    box.write(path, path.relative_to(folder))
            shutil.copy(copy / f"{name}.ipynb", self.folder / "extra" / "notebooks")
            body = self.page(given.folder / given.script, (copy / given.script).read_text(encoding="utf-8"))
        links = {"The copy to work in": f"notebooks/{name}.zip", "Notebook": f"notebooks/{name}.ipynb"}
        self.put(f"{place}.md", with_links(body, links, f"{place}.md"))

    def api(self) -> None:
        """A page for each module, and one that lists them. They are no part of the contents: a hundred lines
        more at the side of every page."""
        rows = []
        for path in sorted((ROOT / "tinytoken").rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            if parts[1] not in NO_API and name != "tinytoken.__main__":
                says = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
                rows.append(f"- [`{name}`](/api/{name}.rst): {' '.join(says.split())}")
                head = f":orphan:\n\n{name}\n{'=' * len(name)}\n\n"
                self.put(f"api/{name}.rst",
                         f"{head}.. automodule:: {name}\n\nAll modules: :doc:`/api/index`\n")
        self.put("api/index.md", "\n".join(["# API\n\nThe modules, and what each says of itself.\n", *rows]))

    def linked(self, text: str, file: pathlib.Path) -> str:
        """The text with links to files of the checkout turned into links to their pages. What has no page
        becomes a link to the project's address, or, without one, plain text."""
        def one(match):
            image, words, path, anchor = match.groups()
            target = pathlib.Path(os.path.normpath(file.parent / path))
            if path.startswith("http") or not target.exists():
                return match[0]
            name = target.relative_to(ROOT).as_posix()
            page = self.page_for(target, name)
            if page:
                return f"{image}[{words}](/{page}{anchor or ''})"
            return f"[{words}]({self.address}/blob/main/{name})" if self.address else words
        return LINK.sub(one, text)

    def page_for(self, path: pathlib.Path, name: str) -> str | None:
        """What the site has for a file or folder of the checkout."""
        if path in self.scripts:
            return page_of(path)
        if path.suffix == ".png" or name in TEXTS:
            return name
        module = f"api/{name.removesuffix('.py').replace('/', '.')}.rst"
        if (self.folder / module).exists():
            return module
        first = next(script for script in self.scripts if script.parent.name == "related")
        return {"lessons/related": page_of(first),
                "lessons/assignments": PAGES["lessons/assignments/README.md"], **PAGES}.get(name)


def report() -> ModuleType:
    """lessons/report.py, which makes the tables of measured values."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "lessons" / "report.py")
    if spec is None or spec.loader is None:
        raise InputError("site: lessons/report.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(script: pathlib.Path) -> str:
    """The page of a lesson: lessons/01_tape.md."""
    return script.relative_to(ROOT).with_suffix(".md").as_posix()


def picture(script: pathlib.Path, path: pathlib.Path, text: str) -> str:
    return f"![{text}](/{path.relative_to(ROOT).as_posix()})"


def with_links(body: str, links: dict[str, str], page: str) -> str:
    """The body with a line of links under its title. They lead to files beside the pages, or elsewhere."""
    title, _, rest = body.lstrip().partition("\n")
    up = "../" * page.count("/")
    made = "".join(f'<a href="{where if where.startswith("https") else up + where}">{name}</a>'
                   for name, where in links.items())
    return f'{title}\n\n<p class="downloads">{made}</p>\n\n{rest}'


def leaks(made: pathlib.Path, assignments: list[assignment.Assignment]) -> list[str]:
    """What the site would give away of the assignments' solutions and hidden tests: a line for each leak.

    A solution's line may stand in a lesson or in the package, which show how it is done with other names and
    shapes; so outside the pages of the assignments such lines are none."""
    shown = {line.strip() for folder in ("tinytoken", "lessons/related", "lessons") for path in
             (ROOT / folder).glob("**/*.py" if folder == "tinytoken" else "*.py")
             for line in path.read_text(encoding="utf-8").splitlines()}
    names = [given.name for given in assignments]
    files = {}
    for path in sorted(made.rglob("*")):
        for name, text in texts_of(path, path.relative_to(made).as_posix()):
            if not any(own in name for own in names):
                text = "\n".join(line for line in text.splitlines() if line.strip() not in shown)
            files[name] = text
    return [leak for given in assignments for leak in release.leaks(given, files)]


def texts_of(path: pathlib.Path, name: str) -> Iterator[tuple[str, str]]:
    """(name, text as it is read) of a file of the site, or of each file of an archive but for those of the
    package, which is public."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as box:
            for member in box.namelist():
                data, own = box.read(member), ROOT / member
                if not (member.startswith("tinytoken/") and own.is_file() and own.read_bytes() == data):
                    yield f"{name}/{member}", readable(member, data.decode(errors="replace"))
    elif path.suffix in (".html", ".ipynb", ".py", ".js", ".txt"):
        yield name, readable(name, path.read_text(encoding="utf-8"))


def readable(name: str, text: str) -> str:
    """A page without its tags; a notebook's cells as lines."""
    if name.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return html.unescape(re.sub(r"<[^>]*>", "", text)) if name.endswith(".html") else text
