"""The ground floor: the array modules, the devices, and the functions that NumPy and CuPy do not share.

Nothing but this file and `cuda/` names CuPy, and nothing here imports it until a CUDA device is asked for.
"""
import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, TypeVar

import numpy as np

from .errors import InputError, expect, this_python

FLOATS = ("float32", "float64")
DOCTOR = "`{} -m tinytoken doctor` says how to fix it"
Array: TypeAlias = np.ndarray  # in type hints: a NumPy or CuPy array
Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Context -> value: owner.name is `value` inside the block, and afterwards what it was before."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield value
    finally:
        setattr(owner, name, before)


# Array modules and devices

def array_module(*arrays: Any) -> Any:
    """The module that the arrays belong to: cupy if any of them is a CuPy array, else numpy."""
    cupy = sys.modules.get("cupy")  # an array of a module that was never imported cannot exist
    if cupy is not None and any(isinstance(a, cupy.ndarray) for a in arrays):
        return cupy
    return np


def is_array(x: Any) -> bool:
    """True for a NumPy or CuPy array."""
    cupy = sys.modules.get("cupy")
    return isinstance(x, np.ndarray) or (cupy is not None and isinstance(x, cupy.ndarray))


def native_array(x: Any) -> Array:
    """x (anything that numpy.asarray takes) with the same values as an array that computes as expected.

    Of a subclass the array below it, since np.matrix means something else by `*`; but one that defines
    __array_ufunc__ stays, since it wants to see what is computed (lessons 12 and 13 count so). In this
    machine's byte order, which kernels and BLAS need. The very object if it is so already. InputError for a
    masked array with masked values: without its mask they would count.
    """
    if type(x) is np.ndarray and x.dtype.isnative or array_module(x) is not np:
        return x
    expect(not np.ma.is_masked(x), "array", "a masked array, whose masked values would count",
           "array.filled(0), and the mask as an argument of its own")
    sees = isinstance(x, np.ndarray) and type(x).__array_ufunc__ is not np.ndarray.__array_ufunc__
    array = x if sees else np.asarray(x)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@functools.cache
def cuda_ready() -> tuple[bool, str]:
    """(True, "") if CuPy can compile and run a kernel here, else (False, reason). Never raises."""
    wheels = cupy_wheels()
    if len(wheels) > 1:
        return False, f"{' and '.join(wheels)} are installed together, which breaks both"
    try:
        import cupy
        if not cupy.is_available():  # does not say why not; a call that needs a device raises the reason
            cupy.cuda.runtime.getDeviceCount()
            return False, "CuPy finds no CUDA device"
        (cupy.arange(2, dtype="float32") + 1).get()  # compiles: proves NVRTC, headers and a launch
    except ImportError as error:
        # CuPy's own text has fifteen lines; the reason is in the error that it was raised from
        reason = error.__cause__ or error
        return False, f"CuPy cannot be imported ({' '.join(str(reason).split())})"
    except Exception as error:  # whatever a broken installation raises is the reason we report
        return False, type(error).__name__ + ": " + str(error).partition("\n")[0]
    return True, ""


@functools.cache
def cupy_wheels() -> list[str]:
    """Names of the installed packages that bring a module cupy."""
    return sorted(set(importlib.metadata.packages_distributions().get("cupy", ())))


def choose_device(name: str = "auto") -> str:
    """'cpu' or 'cuda' for name auto | cpu | cuda.

    'auto' takes the GPU where one works; 'cuda' raises InputError with the reason where none does.
    """
    expect(name in ("auto", "cpu", "cuda"), "device", f"{name!r}, expected auto, cpu or cuda")
    if name == "cpu":
        return "cpu"
    ready, reason = cuda_ready()
    if not ready and name == "cuda":
        raise InputError(f"device: cuda asked for, but {reason}; {DOCTOR.format(this_python())}")
    return "cuda" if ready else "cpu"


def announced_device(name: str = "auto") -> str:
    """choose_device for a program: prints why, where 'auto' falls back to the CPU though a GPU is here."""
    device = choose_device(name)
    if name == "auto" and device == "cpu" and gpu_present():
        print(f"running on the CPU: {cuda_ready()[1]}; {DOCTOR.format(this_python())}")
    return device


def gpu_present() -> bool:
    """Whether anything here speaks of an NVIDIA GPU: its driver's tool or its files."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/proc/driver/nvidia")


def module_for(device: str) -> Any:
    """numpy for 'cpu', cupy for 'cuda'."""
    if device == "cpu":
        return np
    expect(device == "cuda", "device", lambda: f"{device!r}, expected cpu or cuda")
    import cupy
    _first_cuda()
    return cupy


# functions to call when a CUDA device is used for the first time; tinytoken/__init__ adds the kernels
at_first_cuda: list[Callable[[], Any]] = []


@functools.cache
def _first_cuda():
    for call in at_first_cuda:
        call()


def device_of(array: Any) -> str:
    """'cpu' or 'cuda'."""
    return "cpu" if array_module(array) is np else "cuda"


def to_device(array: Array, device: str) -> Array:
    """The array on that device; the same object if it is there already."""
    if device_of(array) == device:
        return array
    return to_numpy(array) if device == "cpu" else module_for(device).asarray(native_array(array), order="C")


def to_numpy(array: Array) -> np.ndarray:
    """The array in host memory (waits for the GPU)."""
    on_device: Any = array
    return on_device.get() if array_module(array) is not np else np.asarray(array)


def out_of_memory(error: BaseException) -> bool:
    """Whether this exception says that the host or the device ran out of memory."""
    words = ("cudaErrorMemoryAllocation", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


# Implementations. A plain function defines what is computed; arrays of another module may have a faster one.

class Mode(threading.local):
    """Whose implementations this thread uses: a module's name, "plain" for none, None for its arrays' own."""
    implementations: str | None = None


mode = Mode()
# (plain function, name of an array module) -> [(covers, function), ...]
implementations: dict[tuple[Callable, str], list[tuple[Callable, Callable]]] = {}


def implementation(plain: Callable[..., Any], module: str = "cupy",
                   covers: Callable[..., Any] = lambda *args, **settings: True
                   ) -> Callable[[Function], Function]:
    """Decorator: a function with the contract of `plain`, for arrays of `module`.

    It runs for the calls that it covers, those where covers(*args, **settings) is true. The others run as
    `plain`, which stays the definition.
    """
    def register(function):
        implementations.setdefault((plain, module), []).append((covers, function))
        return function
    return register


def faster(plain: Callable[..., Any], xp: Any, /, *args: Any, **settings: Any) -> Callable[..., Any] | None:
    """The implementation of plain(*args, **settings) for arrays of the module xp.

    None where there is none, where none covers this call, or where this thread uses the plain functions.
    """
    for covers, function in implementations.get((plain, mode.implementations or xp.__name__), ()):
        if covers(*args, **settings):
            return function
    return None


def using_implementations(module: str | None) -> AbstractContextManager[Any]:
    """Context: this thread uses that module's implementations, whatever its arrays are; see Mode."""
    return swapped(mode, "implementations", module)


def products_in(precision: str, device: str) -> AbstractContextManager[Any]:
    """Context: the precision to which products on the device round their factors.

    "fp32" rounds nothing and is the only one on a CPU. "tf32" and "bf16" need a GPU; "bf16" also holds for
    what lies between the products of a block. Sums, parameters and gradients are float32 always. Raises
    InputError, as soon as the context is made, where there is no such precision.
    """
    fast = faster(products_in, module_for(device), precision, device)
    expect(precision == "fp32" or fast, "precision",
           f"{precision!r}: on the CPU and under plain() products are in fp32")
    return fast(precision, device) if fast else contextlib.nullcontext()


# Functions that NumPy lacks, or that the two modules spell differently

# q of Phi(x) = 1 / (1 + exp(x q(x^2))), lowest power first. erf(x / sqrt 2) is tanh(x p(x^2)) to 7e-6, which
# gives Phi that form with q = -2 p. Fitted so that x Phi(x) is right to 4e-6 on [-9, 9]; the last coefficient
# is negative, so Phi saturates without a clip.
CDF_POLYNOMIAL = (-1.5957048, -0.072876744, 2.2750696e-4, 6.4096842e-5, -2.3604346e-6)
_exact_erfc = np.frompyfunc(math.erfc, 1, 1)


def normal_cdf(x: Array) -> Array:
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2 of a float array.

    float64: exact, by math.erfc, slowly. float32: the logistic function of a fitted polynomial (Phi and
    x Phi(x) are within 4e-6). CuPy: its own erf.
    """
    xp = array_module(x)
    if xp is not np:
        from cupyx.scipy.special import erf as cuda_erf
        return 0.5 * (1 + cuda_erf(x * math.sqrt(0.5)))
    if x.dtype == np.float64:
        return 0.5 * np.asarray(_exact_erfc(x * -math.sqrt(0.5)), np.float64)
    # with out= the result stays an array: a product of 0-d arrays would be a scalar, which += cannot fill
    square = np.multiply(x, x, out=np.empty_like(x))
    out = np.multiply(square, CDF_POLYNOMIAL[-1], out=np.empty_like(x))
    for coefficient in CDF_POLYNOMIAL[-2:0:-1]:
        out += coefficient
        out *= square
    out += CDF_POLYNOMIAL[0]
    out *= x
    with np.errstate(over="ignore"):  # an infinite exp is right here: Phi is then 0
        np.exp(out, out=out)  # twice as fast as tanh on a CPU without AVX-512
    out += 1
    return np.divide(1, out, out=out)


def erf(x: Array) -> Array:
    """The error function of a float array, as `normal_cdf` computes it."""
    return 2 * normal_cdf(x * math.sqrt(2)) - 1


def vecdot(a: Array, b: Array) -> Array:
    """sum(a * b, axis=-1), without keeping the product in memory where the module can do that."""
    xp = array_module(a, b)
    return np.vecdot(a, b) if xp is np else (a * b).sum(axis=-1)


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum g over the axes along which an array of `shape` was repeated to g's shape."""
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1))
    out = g.sum(axis=axes, keepdims=True) if axes else g
    return array_module(g).asarray(out).reshape(shape)


def scatter_add(target: Array, index: Array, values: Array) -> None:
    """target[index] += values, where a repeated index adds every time. index: integers, of axis 0."""
    if array_module(target) is not np:
        import cupyx
        cupyx.scatter_add(target, index, values)
        return
    # np.add.at is several times slower than sorting the rows and adding the runs.
    flat = index.reshape(-1)
    if flat.size == 0:
        return
    order = np.argsort(flat, kind="stable")
    rows, starts = np.unique(flat[order], return_index=True)
    target[rows] += np.add.reduceat(values.reshape(flat.size, *target.shape[1:])[order], starts, axis=0)


# Settings of the process: the allocator and the BLAS threads. They are never made at import but by
# threads.share_out, which training and inference run on.

MALLOPT = {"M_MMAP_THRESHOLD": (-3, 1 << 30), "M_TRIM_THRESHOLD": (-1, (1 << 31) - 1),
           "M_TOP_PAD": (-2, 1 << 26)}  # name: (glibc's code of the parameter, value)


@functools.cache
def prepare_cpu() -> str:
    """Keep freed memory in the process; returns what was done, as text. Repeated calls do nothing.

    NumPy otherwise returns each large array to the system and pays page faults for the next one. glibc only,
    elsewhere nothing is done; TINYTOKEN_MALLOC=0 turns it off.
    """
    if os.environ.get("TINYTOKEN_MALLOC") == "0":
        return "off (TINYTOKEN_MALLOC=0)"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return "not available (no glibc)"
    done = [mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values()]
    return "freed memory is kept (mallopt)" if all(done) else "partly refused by this C library"


@functools.cache
def blas_controller() -> Any:
    """threadpoolctl's handle on NumPy's BLAS (OpenBLAS, MKL, BLIS, FlexiBLAS); None for another."""
    import threadpoolctl
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    return controller if controller.lib_controllers else None


def blas_description() -> str:
    """'openblas 0.3.31 Haswell, 2 threads': library, version, its kernels' instruction set, where known."""
    controller = blas_controller()
    if controller is None:
        config: Any = np.show_config("dicts")
        return f"{config['Build Dependencies']['blas']['name']} (threads not under our control)"
    words = ("internal_api", "version", "architecture")
    return "; ".join(f"{' '.join(library[word] for word in words if library.get(word))}, "
                     f"{library['num_threads']} threads" for library in controller.info())


def blas_environment() -> dict[str, str]:
    """The environment's settings of BLAS, threads and allocator, by name."""
    return {k: v for k, v in sorted(os.environ.items())
            if k.startswith(("OPENBLAS_", "OMP_", "MKL_", "MALLOC_"))}


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Hold BLAS to `count` threads inside the block (where it can be told), and restore what was before."""
    controller = blas_controller()
    with controller.limit(limits=count) if controller else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def quick_switches(seconds: float = 5e-4) -> Iterator[None]:
    """Context: a thread that holds the interpreter gives it up to a waiting one after this many seconds.

    Python's own 5 ms are longer than the ops of small models, whose threads would wait for each other.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Sharing:
    """How many processes of one group (group.py) share this process's CPUs."""
    processes = 1


sharing = Sharing()


def cpu_count() -> int:
    """The CPUs that this process may use; its share of them, where processes of one group share them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // sharing.processes)
