"""The house rules, read off the sources: sizes, floors, what may be imported, names."""
import ast
import graphlib
import importlib
import importlib.util
import os
import subprocess
import sys
import types

import pytest

import house
import tinytoken

FILES = house.files()
every_file = pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])

ANYWHERE = {"numpy", "threadpoolctl", "tqdm"}       # the core dependencies
IN_FUNCTIONS = {"matplotlib", "PIL", "IPython",      # the `plot` extra; IPython is there in a notebook
                "safetensors",                       # the extra of its name
                "av",                                # the `video` extra
                "pycocoevalcap", "sacrebleu",        # the extra `captions`
                "mpi4py",                            # the extra `mpi`
                "starlette", "uvicorn",              # the extra `explore`
                "jupytext", "nbformat", "docutils",  # the extra `site`, which starts Sphinx
                "pytest"}                           # the course's grader
IN_BACKEND_AND_CUDA = {"cuda", "cupy", "cupyx"}
NEVER = {"pickle", "shelve", "marshal", "torch", "jax"}


def test_sizes(capsys):
    """Prints the table with its budgets. Ceilings for every file: 400 lines, blank ones aside, 60 of a
    function."""
    with capsys.disabled():
        print("\n" + house.table())
    too_long = {file.name: file.lines() for file in FILES if file.lines() > 400}
    too_long |= {f"{file.name}: {name}": n for file in FILES for name, n in file.functions() if n > 60}
    assert too_long == {}


@pytest.mark.parametrize("what", ["the sitting path", "a task", "an op", "columns"])
def test_budgets(what):
    assert house.sizes()[what] <= house.BUDGETS[what]


def test_a_new_model_keeps_to_the_budget():
    for path in sorted((house.PACKAGE / "models").glob("*.py")):
        kind = "a pyramid" if f"models/{path.name}" in house.PYRAMIDS else "a model"
        assert house.File(path).code_lines() <= house.BUDGETS[kind], path.name


def entries():
    """(name, its class or function, the file it stands in) of all models, tasks and data sets."""
    for registry in (tinytoken.models.base.model, tinytoken.tasks.task, tinytoken.data.dataset):
        for name, entry in registry.items():
            yield name, entry, "/".join(entry.__module__.split(".")[1:]) + ".py"


@pytest.mark.parametrize("name, entry, own", [pytest.param(*e, id=e[0]) for e in entries()])
def test_what_is_registered_is_named_in_its_own_file(name, entry, own):
    """As CONTRIBUTING.md says: a model, a task, a data set is one file and its test. (ViT is the base class
    of many.)"""
    named = set()
    for file in FILES:
        identifiers, texts = file.names()
        if name in texts or entry.__name__ in identifiers and not (name == "vit" and file.name.startswith("models/")):
            named.add(file.name)
    assert named - {own, house.FAMILY, *house.EXPORTS} <= house.NAMED_IN.get(name, set())


def test_code_lines_are_counted_without_blanks_comments_and_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    (tmp_path / "example.py").write_text('"""Two\nlines."""\n\n# a comment\nX = """a\nstring"""  # 2\n\n\n'
                                         'def f(\n    a):\n    """Doc."""\n    # why\n    return a\n')
    file = house.File(tmp_path / "example.py")
    assert (file.code_lines(), file.lines(), file.functions()) == (5, 10, [("f", 5)])


@every_file
def test_imports_come_from_floors_below(file):
    own, _ = file.imports()
    floor = house.floor_of(file.module)
    assert floor is not None, f"{file.module} has no floor: give it one in tests/house.py"
    above = {name for name in own if house.floor_of(name) is None or house.floor_of(name) > floor}
    assert not above, f"{file.name} imports from above: {', '.join(sorted(above))}"


def test_imports_make_no_circle():
    graph = {}
    for file in FILES:
        own, _ = file.imports()
        package = file.module if file.path.name == "__init__.py" else file.module.rpartition(".")[0]
        graph[file.module] = {name for name in own if name != file.module and name != package}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@every_file
def test_only_what_may_be_imported_is(file):
    def first(names):
        return {name.split(".")[0] for name in names}
    everywhere, at_top = first(file.imports()[1]), first(file.imports(inside=False)[1])
    gpu = file.name == "backend.py" or file.name.startswith("cuda/")
    allowed = ANYWHERE | IN_FUNCTIONS | set(sys.stdlib_module_names) | (IN_BACKEND_AND_CUDA if gpu else set())
    allowed |= {"numba"} if file.name == "compiled/kernels.py" else set()
    assert everywhere - (allowed - NEVER) == set()
    assert at_top & (IN_FUNCTIONS | (set() if file.name.startswith("cuda/")
                                     else IN_BACKEND_AND_CUDA)) == set()


@every_file
def test_nothing_is_unpickled_or_evaluated(file):
    grader = file.name == "course/child.py"  # runs submissions, in a process of their own
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("exec", "eval") or grader
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False
                           for k in node.keywords)


@every_file
def test_no_function_bears_its_modules_name(file):
    own = file.path.parent.name if file.path.name == "__init__.py" else file.path.stem
    defined = {node.name for node in file.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert own not in defined, f"{file.name} defines {own}"


def test_no_name_hides_a_module():
    """tinytoken.random stays the module, whatever a package takes in from its files."""
    for file in FILES:
        parent, _, name = f"tinytoken.{file.module}".rpartition(".")
        needs_numba = file.name == "compiled/kernels.py" and importlib.util.find_spec("numba") is None
        if name not in ("__init__", "__main__") and not needs_numba:
            importlib.import_module(f"{parent}.{name}")
            assert isinstance(getattr(importlib.import_module(parent), name),
                              types.ModuleType), f"{parent}.{name}"


def test_import_loads_nothing_optional():
    code = ("import sys, tinytoken; print({'cupy', 'cupyx', 'matplotlib', 'PIL', 'av', 'torch', 'jax', 'numba'} "
            "& set(sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=house.ROOT,
                         check=True,
                         env={**os.environ, "PYTHONPATH": str(house.ROOT)})
    assert out.stdout == "set()\n"


def test_public_names_are_there():
    """Names that others call."""
    for name in ("Tensor", "op", "grad", "no_grad", "plain", "gradcheck", "GradientError", "manual_seed",
                 "ops", "models", "macs",
                 "explain"):
        assert hasattr(tinytoken, name), name


def says_no_encoding(tree):
    """The lines of a file's calls that read or write text in whatever encoding the system has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {keyword.arg for keyword in node.keywords}
            texts = {each.value for each in [*node.args, *(keyword.value for keyword in node.keywords)]
                     if isinstance(each, ast.Constant) and isinstance(each.value, str)}
            binary = any("b" in text and set(text) <= set("rwaxb+") for text in texts)
            of_os = ast.unparse(node.func) in ("os.open", "Image.open", "gzip.open", "tarfile.open", "av.open",
                                                  "box.open")  # box: a zip archive
            if (name in ("read_text", "write_text") or name in ("open", "fdopen") and not binary and not of_os
                    or words & {"text", "universal_newlines"}) and "encoding" not in words:
                yield node.lineno


@pytest.mark.parametrize("folder", ["tinytoken", "lessons"])
def test_every_file_is_read_and_written_with_its_encoding_said(folder):
    paths = sorted((house.ROOT / folder).rglob("*.py"))
    assert len(paths) > 10
    assert not {f"{path}:{line}" for path in paths
                for line in says_no_encoding(ast.parse(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("call, said", [
    ("open(p)", False), ("open(p, 'w')", False), ("open(p, 'rb')", True), ("open(p, mode='wb')", True),
    ("p.open()", False), ("p.read_text()", False), ("p.read_text(errors='replace')", False),
    ("p.write_text(t, encoding='utf-8')", True), ("gzip.open(p)", True), ("Image.open(p)", True),
    ("os.fdopen(h, 'a')", False), ("os.open(p, os.O_RDWR)", True), ("run(c, text=True)", False),
    ("run(c, text=True, encoding='utf-8')", True), ("p.read_bytes()", True)])
def test_an_encoding_that_is_not_said_is_seen(call, said):
    assert (not list(says_no_encoding(ast.parse(call)))) == said
