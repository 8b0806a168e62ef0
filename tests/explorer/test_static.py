"""The explorer as a folder: what it holds, and that a Python without threads, locks and pillow can run it."""
import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tiny import everything, refused
from tinytoken.explorer import models, static
from tinytoken.explorer.look import Explorer


@pytest.fixture(scope="module")
def explorer():
    return Explorer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, explorer):
    out = tmp_path_factory.mktemp("static") / "explorer"
    static.write(out, explorer=explorer)
    return out


def pyodide_in(folder, digest=None):
    """A folder as Pyodide's, with another content."""
    folder.mkdir()
    for name in (*static.CORE, static.PROGRAM[1], "numpy.whl"):
        (folder / name).write_bytes(name.encode())
    sha = digest or hashlib.sha256(b"numpy.whl").hexdigest()
    (folder / "pyodide-lock.json").write_text(json.dumps(
        {"packages": {"numpy": {"file_name": "numpy.whl", "sha256": sha, "depends": []}}}))
    return folder


def test_the_folder_and_its_page(folder):
    assert everything(folder) == ["examples.json", "index.html", "tinytoken.zip"]
    text = (folder / "index.html").read_text()
    form = json.loads(text.partition('type="application/json">')[2].partition("<")[0])
    assert form == {"form": "pyodide", "pyodide": static.DISTRIBUTION, "archive": "tinytoken.zip",
                    "examples": "examples.json"}
    assert static.VERSION in form["pyodide"] and len(text.encode()) < 100_000


def test_the_examples_are_what_the_models_say(folder, explorer):
    recorded = json.loads((folder / "examples.json").read_text())
    assert recorded["setup"] == json.loads(explorer.answer('{"want": "setup"}'))
    assert list(recorded["scenes"]) == [str(n) for n in static.RECORDED]
    seen = explorer.look(scene=2, keep=0.35, grid=5)
    there = recorded["scenes"]["2"]
    assert there["pixels"] == seen["pixels"] and there["label"] == seen["label"]
    for name, row in (("vit", there["models"]["vit"]), ("dynamicvit", there["models"]["dynamicvit"]["0.35"]),
                      ("lookupvit", there["models"]["lookupvit"]["5x5"])):
        wanted = seen["models"][name]
        assert "seconds" not in row and row["macs"] == wanted["macs"]
        assert np.allclose(row["probabilities"], wanted["probabilities"], atol=1e-5)


# What a browser's Python lacks: no module of these can be imported, and no thread starts.
BROWSER = """
import importlib.abc, json, sys, threading
LACKING = {"fcntl", "msvcrt", "PIL", "matplotlib", "starlette", "uvicorn"}
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in LACKING:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Lacking())
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
sys.path.insert(0, sys.argv[1])
import tqdm
tqdm.tqdm.monitor_interval = 0
import tinytoken
from tinytoken.explorer.look import Explorer
import threadpoolctl
for module in (tinytoken, tqdm, threadpoolctl):
    assert module.__file__.startswith(sys.argv[1]), module
print(Explorer().answer('{"scene": 5}'))
"""


def test_the_archive_is_all_that_it_needs(folder, explorer, tmp_path):
    with zipfile.ZipFile(folder / "tinytoken.zip") as box:
        names = box.namelist()
        box.extractall(tmp_path / "unpacked")
    assert "tinytoken/explorer/models.npz" in names and any("LICEN" in name for name in names)
    assert not [name for name in names if name.startswith(("tinytoken/cuda", "tinytoken/course", "..", "/"))]
    done = subprocess.run([sys.executable, "-I", "-c", BROWSER, str(tmp_path / "unpacked")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)["models"]
    for name, wanted in explorer.look(scene=5)["models"].items():
        assert np.allclose(seen[name]["probabilities"], wanted["probabilities"], atol=1e-5)


def test_a_folder_of_pyodide_is_copied(explorer, tmp_path):
    lines = static.write(tmp_path / "out", pyodide_in(tmp_path / "pyodide"), explorer)
    copied = [name for name in everything(tmp_path / "out") if name.startswith("pyodide/")]
    wanted = (*static.CORE, static.PROGRAM[1], "numpy.whl")
    assert sorted(copied) == sorted(f"pyodide/{name}" for name in wanted)
    assert '"pyodide": "pyodide/"' in (tmp_path / "out" / "index.html").read_text() and len(lines) == 2


def test_what_is_refused(capsys, tmp_path):
    good = pyodide_in(tmp_path / "good")
    (good / "pyodide.mjs").unlink()
    wrong = pyodide_in(tmp_path / "wrong", digest="0" * 64)
    bare = pyodide_in(tmp_path / "bare")
    (bare / "pyodide-lock.json").write_text('{"packages": {}}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    for pyodide, text in ((good, "pyodide.mjs is nothing, expected a file of Pyodide's"),
                          (wrong, "numpy.whl is not the file that pyodide-lock.json lists: its checksum differs"),
                          (bare, "pyodide-lock.json does not list NumPy (KeyError('numpy'))"),
                          (other, "pyodide-lock.json does not exist")):
        line = refused(capsys, "explore", "--static", tmp_path / "out", "--pyodide", pyodide)
        assert line == f"explore: {pyodide}/{text}"
    assert "is no folder of the explorer" in refused(capsys, "explore", "--static", other)
    assert not (tmp_path / "out").exists() and everything(other) == ["letter.txt"]


def test_damaged_models_are_refused(tmp_path):
    for name in (models.WEIGHTS, models.ABOUT):
        (tmp_path / name).write_bytes((models.HERE / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not JSON"):
        models.load(tmp_path)
    (tmp_path / models.ABOUT).write_bytes((models.HERE / models.ABOUT).read_bytes())
    with pytest.raises(ValueError, match="explore: .* is not a whole .npz file"):
        models.load(tmp_path)
