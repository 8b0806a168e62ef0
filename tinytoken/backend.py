"""The ground floor: which array module, which device, and the few array functions that NumPy and CuPy do not
share.

Nothing but this file and `cuda/` names CuPy, and nothing here imports it until a CUDA device is asked for.
"""
import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import sys
import threading
from typing import Any, TypeAlias

import numpy as np

from .errors import InputError, expect

FLOATS = ("float32", "float64")
Array: TypeAlias = np.ndarray  # in type hints: a NumPy or CuPy array


@contextlib.contextmanager
def swapped(thing, name, value):
    """Context -> value: thing.name is `value` inside, and afterwards what it was."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield value
    finally:
        setattr(thing, name, before)


# Array modules and devices

def array_module(*arrays):
    """The module (numpy or cupy) that the arrays belong to: cupy if any one is a CuPy array."""
    cupy = sys.modules.get("cupy")  # an array of a module that was never imported cannot exist
    if cupy is not None and any(isinstance(a, cupy.ndarray) for a in arrays):
        return cupy
    return np


def is_array(x):
    """True for a NumPy or CuPy array."""
    cupy = sys.modules.get("cupy")
    return isinstance(x, np.ndarray) or (cupy is not None and isinstance(x, cupy.ndarray))


@functools.cache
def cuda_ready():
    """(True, "") if CuPy can compile and run a kernel here, else (False, reason). Never raises."""
    wheels = cupy_wheels()
    if len(wheels) > 1:
        return False, f"{' and '.join(wheels)} are installed together, which breaks both"
    try:
        import cupy
        if not cupy.is_available():  # which does not say why: a call that needs a device does
            cupy.cuda.runtime.getDeviceCount()
            return False, "CuPy finds no CUDA device"
        (cupy.arange(2, dtype="float32") + 1).get()  # compiles: proves NVRTC, headers and a launch
    except ImportError as error:
        # CuPy's own text has fifteen lines, and the reason is what it was raised from
        reason = error.__cause__ or error
        return False, f"CuPy cannot be imported ({' '.join(str(reason).split())})"
    except Exception as error:  # whatever a broken installation raises is the reason we report
        return False, type(error).__name__ + ": " + str(error).partition("\n")[0]
    return True, ""


@functools.cache
def cupy_wheels():
    """Names of the installed packages that bring a module cupy."""
    return sorted(set(importlib.metadata.packages_distributions().get("cupy", ())))


def choose_device(name: str = "auto") -> str:
    """'cpu' or 'cuda' for name auto | cpu | cuda. 'auto' takes the GPU where one works; 'cuda' raises
    InputError with the reason where none does."""
    expect(name in ("auto", "cpu", "cuda"), "device", f"{name!r}, expected auto, cpu or cuda")
    if name == "cpu":
        return "cpu"
    ready, reason = cuda_ready()
    if not ready and name == "cuda":
        raise InputError(f"device: cuda asked for, but {reason}; `python -m tinytoken doctor` says how to "
                         f"fix it")
    return "cuda" if ready else "cpu"


def announced_device(name="auto"):
    """choose_device for a program: where 'auto' found no GPU, one line says why."""
    device = choose_device(name)
    if name == "auto" and device == "cpu":
        print(f"running on the CPU: {cuda_ready()[1]}")
    return device


def module_for(device):
    """numpy for 'cpu', cupy for 'cuda'."""
    if device == "cpu":
        return np
    import cupy
    _first_cuda()
    return cupy


# what to call when a CUDA device is used for the first time; tinytoken/__init__ adds the kernels
at_first_cuda: list = []


@functools.cache
def _first_cuda():
    for call in at_first_cuda:
        call()


def device_of(array):
    """'cpu' or 'cuda'."""
    return "cpu" if array_module(array) is np else "cuda"


def to_device(array: Array, device: str) -> Array:
    """The array on that device; the same object if it is there already."""
    if device_of(array) == device:
        return array
    return to_numpy(array) if device == "cpu" else module_for(device).asarray(array)


def to_numpy(array: Array) -> np.ndarray:
    """The array in host memory (waits for the GPU)."""
    on_device: Any = array
    return on_device.get() if array_module(array) is not np else np.asarray(array)


def out_of_memory(error):
    """Whether that is what this exception says, of the host or of the device."""
    return isinstance(error, MemoryError) or any(word in str(error)
                                                 for word in ("cudaErrorMemoryAllocation", "ALLOC_FAILED"))


# Implementations. A plain function defines what is computed; the arrays of another module may have a faster
# one.

class Mode(threading.local):
    """implementations: whose this thread uses. None: those of the arrays' own module; "plain": none; or a
    module's name."""
    implementations = None


mode = Mode()
implementations: dict = {}  # (plain function, name of an array module) -> [(covers, function), ...]


def implementation(plain, module="cupy", covers=lambda *args, **settings: True):
    """Decorator: a function with the contract of `plain` for the arrays of `module`, for the calls that it
    covers: covers(*args, **settings) is true. The others run as `plain`, which stays the definition."""
    def register(function):
        implementations.setdefault((plain, module), []).append((covers, function))
        return function
    return register


def faster(plain, xp, /, *args, **settings):
    """The implementation of plain(*args, **settings) for arrays of the module xp, or None: there is none,
    none covers this call, or this thread uses the plain functions."""
    for covers, function in implementations.get((plain, mode.implementations or xp.__name__), ()):
        if covers(*args, **settings):
            return function
    return None


def using_implementations(module):
    """Context: this thread uses the implementations of that array module ("plain": none), whatever its arrays
    are."""
    return swapped(mode, "implementations", module)


def products_in(precision, device):
    """Context: what products on the device round their factors to. "fp32": to nothing, the only one on a CPU;
    "tf32" and "bf16" are a GPU's, "bf16" also for what lies between the products of a block. Sums, parameters
    and gradients are float32 always. Raises InputError, when it is made, where there is no such precision."""
    fast = faster(products_in, module_for(device), precision, device)
    expect(precision == "fp32" or fast, "precision",
           f"{precision!r}: on the CPU and under plain() products are in fp32")
    return fast(precision, device) if fast else contextlib.nullcontext()


# Functions that NumPy lacks, or that the two modules spell differently

# erf(x / sqrt 2) is tanh(x p(x^2)) to 7e-6, so Phi(x) is 1 / (1 + exp(x q(x^2))) with q = -2 p, which is what
# stands here. Fitted so that x Phi(x) is right to 4e-6 on [-9, 9]; the last coefficient is negative, so it
# saturates without a clip.
CDF_POLYNOMIAL = (-1.5957048, -0.072876744, 2.2750696e-4, 6.4096842e-5, -2.3604346e-6)
_exact_erf = np.frompyfunc(math.erf, 1, 1)


def normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2 of a float array. float64: exact, by math.erf, slowly. float32: the
    logistic function of a fitted polynomial (Phi and x Phi(x) are within 4e-6). CuPy: its own erf."""
    xp = array_module(x)
    if xp is not np:
        from cupyx.scipy.special import erf as cuda_erf
        return 0.5 * (1 + cuda_erf(x * math.sqrt(0.5)))
    if x.dtype == np.float64:
        return 0.5 * (1 + np.asarray(_exact_erf(x * math.sqrt(0.5)), np.float64))
    # out=: a product of 0-d arrays would be a scalar, which has no in-place
    square = np.multiply(x, x, out=np.empty_like(x))
    out = np.multiply(square, CDF_POLYNOMIAL[-1], out=np.empty_like(x))
    for coefficient in CDF_POLYNOMIAL[-2:0:-1]:
        out += coefficient
        out *= square
    out += CDF_POLYNOMIAL[0]
    out *= x
    with np.errstate(over="ignore"):  # an infinite exp is right here: Phi is 0 then
        np.exp(out, out=out)  # without AVX-512 twice as fast as tanh
    out += 1
    return np.divide(1, out, out=out)


def erf(x):
    """The error function of a float array, as `normal_cdf` computes it."""
    return 2 * normal_cdf(x * math.sqrt(2)) - 1


def vecdot(a, b):
    """sum(a * b, axis=-1) without the product in memory where the module can."""
    xp = array_module(a, b)
    return np.vecdot(a, b) if xp is np else (a * b).sum(axis=-1)


def scatter_add(target, index, values):
    """target[index] += values with repeated indices added up. `index` is one integer array over axis 0."""
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


# Settings of the process: the allocator and the BLAS threads. Never at import: optim.share_out, which
# training and inference run on, makes them.

@functools.cache
def prepare_cpu():
    """Keep freed memory in the process, once: NumPy otherwise returns each large array to the system and pays
    page faults for the next one. glibc only, else nothing is done; TINYTOKEN_MALLOC=0 turns it off. Returns
    what was done, as text."""
    if os.environ.get("TINYTOKEN_MALLOC") == "0":
        return "off (TINYTOKEN_MALLOC=0)"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return "not available (no glibc)"
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    threshold, trim, pad = (-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)
    done = [mallopt(*setting) == 1 for setting in (threshold, trim, pad)]
    return "freed memory is kept (mallopt)" if all(done) else "partly refused by this C library"


@functools.cache
def blas_controller():
    """threadpoolctl's handle on the BLAS that NumPy uses (OpenBLAS, MKL, BLIS, FlexiBLAS), or None for one it
    does not know."""
    import threadpoolctl
    found = threadpoolctl.ThreadpoolController().select(user_api="blas")
    return found if found.lib_controllers else None


def blas_description():
    """'openblas 0.3.31 Haswell, 2 threads': library, version, the instruction set of its kernels, or what is
    known of another."""
    found = blas_controller()
    if found is None:
        return f"{np.show_config('dicts')['Build Dependencies']['blas']['name']} (threads not under our control)"
    words = ("internal_api", "version", "architecture")
    return "; ".join(f"{' '.join(one[word] for word in words if one.get(word))}, {one['num_threads']} threads"
                     for one in found.info())


def blas_environment():
    """The environment's settings of BLAS, threads and allocator, by name."""
    return {k: v for k, v in sorted(os.environ.items())
            if k.startswith(("OPENBLAS_", "OMP_", "MKL_", "MALLOC_"))}


@contextlib.contextmanager
def blas_threads(count):
    """Hold BLAS to `count` threads inside the block (where it can be told), and restore what was before."""
    found = blas_controller()
    with found.limit(limits=count) if found else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def quick_switches(seconds=5e-4):
    """Inside the block a Python thread that holds the interpreter gives it up to a waiting one after so many
    seconds instead of Python's 5 ms: the ops of small models are shorter than that, and their threads would
    wait for each other."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
