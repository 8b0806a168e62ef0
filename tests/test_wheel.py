"""The wheel, built and installed in a fresh environment: all that it needs is inside, and its command runs
from another folder. The dependencies are those of the environment that runs the tests: none is downloaded."""
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest

import tinytoken as tt

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
BIN = "Scripts" if os.name == "nt" else "bin"
SMALL = "--batch 2 --image-size 8 --patch-size 4 --dim 8 --depth 1 --heads 2 --threads 1".split()


def run(*command, cwd):
    """A command that is not told of the checkout -> subprocess.CompletedProcess."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    command = [str(part) for part in command]
    env = env | {"TINYTOKEN_COMPILED": "0"}  # which says, once, that it compiles
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def pip(*command, cwd):
    done = run(sys.executable, "-m", "pip", *command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def can_build():
    """Whether the setuptools of this environment builds it; else pip fetches one that does."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves folders behind, and packs what an earlier one has left in them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tinytoken", source / "tinytoken", ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-build-isolation", "--no-index"] if can_build() else []
    pip("wheel", ".", "--no-deps", "--wheel-dir", "wheels", *offline, cwd=source)
    path, = (source / "wheels").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the commands of a fresh environment with the wheel in it."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    python = place / BIN / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).stdout
    pathlib.Path(where.strip(), "dependencies.pth").write_text(str(pathlib.Path(np.__file__).parents[1]))
    return place / BIN


def test_the_wheel_holds_every_file_of_the_package(wheel):
    """Less what is there to be read in the checkout."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tinytoken").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"}
    packed = zipfile.ZipFile(wheel).namelist()
    assert {name for name in packed if ".dist-info/" not in name} == files
    assert any(name.startswith("tinytoken/cuda/sources/") for name in packed)
    assert any(name.endswith("/licenses/LICENSE") for name in packed)


def test_the_version_is_the_packages(wheel):
    assert wheel.name == f"tinytoken_vit-{tt.__version__}-py3-none-any.whl"


def test_it_requires_what_may_be_imported_everywhere(wheel):
    """The running environment's packages, lent to the fresh one, would hide a missing line."""
    metadata = zipfile.ZipFile(wheel).read(f"tinytoken_vit-{tt.__version__}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["numpy", "threadpoolctl", "tqdm"]


def test_what_is_imported_is_the_wheel(installed, tmp_path):
    done = run(installed / "python", "-c", "import tinytoken; print(tinytoken.__file__)", cwd=tmp_path)
    assert pathlib.Path(done.stdout).is_relative_to(installed.parent), done.stdout + done.stderr


COMMANDS = {
    "version": (["--version"], 0, f"tinytoken {tt.__version__}\n", ""),
    "help": (["--help"], 0, "usage: tinytoken [-h]", ""),
    "doctor": (["doctor"], 0, "Python ", ""),
    "bench": (["bench", "--model", "vit", *SMALL], 0, "", ""),
    "profile": (["bench", "--model", "dynamicvit", "--profile", *SMALL, "--depth", "6"], 0, "op ", ""),
    "refused": (["predict", "none.npz", "none.png"], 2, "", "error: checkpoint: none.npz does not exist\n"),
}


@pytest.mark.parametrize("arguments, code, out, err", COMMANDS.values(), ids=COMMANDS)
def test_the_command_runs_from_another_folder(installed, tmp_path, arguments, code, out, err):
    for command in ([installed / "tinytoken"], [installed / "python", "-m", "tinytoken"]):
        done = run(*command, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (code, err) and done.stdout.startswith(out), done.stdout
        assert bool(done.stdout) == (code == 0)
    assert list(tmp_path.iterdir()) == []
