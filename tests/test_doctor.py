"""The doctor: what is found on a machine, and the pip line for what is missing."""
import importlib.metadata
import subprocess
import sys
import types

import numpy as np
import pytest

from tinytoken import backend, doctor
from tinytoken.__main__ import main

NO_DRIVER = ("No nvidia-smi here, so probably no NVIDIA driver; with one: "
             "pip install 'tinytoken-vit[cuda13]' (driver 580 or newer) or [cuda12]")


def test_doctor_prints_what_it_found(capsys, monkeypatch):
    no_gpu = False, "CuPy cannot be imported (No module named 'cupy')"
    monkeypatch.setattr(backend, "cuda_ready", lambda: no_gpu)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: {"matplotlib": "9.8", "pillow": "7.6"}.get(name))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["doctor"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["Python", "NumPy", "BLAS", "settings", "CPUs", "allocator", "GPU", "pictures"]
    assert rows["Python"].startswith(sys.version.split()[0])
    assert rows["NumPy"] == np.__version__ and rows["BLAS"] == backend.blas_description()
    assert "OMP_NUM_THREADS=3" in rows["settings"] and rows["CPUs"] == f"{backend.cpu_count()} may be used"
    assert rows["allocator"] == f"for training and inference: {backend.prepare_cpu()}"
    assert rows["pictures"] == "matplotlib 9.8 and pillow 7.6"
    assert rows["GPU"] == f"none in use: CuPy cannot be imported (No module named 'cupy'). {NO_DRIVER}"


def test_doctor_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "9.8" if name == "matplotlib" else None)
    for name in backend.blas_environment():
        monkeypatch.delenv(name)
    assert "matplotlib 9.8 and pillow missing: pip install 'tinytoken-vit[plot]'" in doctor.report()
    assert "no OPENBLAS_, OMP_, MKL_ or MALLOC_ variable is set" in doctor.report()


@pytest.mark.parametrize("said, advice", [
    ("580.65.06\n", "Driver 580.65.06: pip install 'tinytoken-vit[cuda13]'"),
    ("610.10\n610.10\n", "Driver 610.10: pip install 'tinytoken-vit[cuda13]'"),
    ("579.99\n", "Driver 579.99: pip install 'tinytoken-vit[cuda12]'"),
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
     "pip uninstall cupy-cuda12x cupy-cuda13x, then install one. Driver 580.65: "
     "pip install 'tinytoken-vit[cuda13]'"),
    (["cupy-cuda13x"], "535.1",
     "Driver 535.1: pip uninstall cupy-cuda13x, then pip install 'tinytoken-vit[cuda12]'"),
    (["cupy-cuda13x"], "580.65", "Driver 580.65: pip install 'tinytoken-vit[cuda13]'")])
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
