"""Products of float32 matrices by cuBLASLt, called through ctypes: CuPy's own matmul cannot be captured in a CUDA graph.

cuBLASLt thinks in columns. A row-major (R, C) array is a column-major (C, R) matrix without being touched, and out = a b is, in columns,
out^T = b^T a^T. So b is handed over first, transposed if the caller wants it transposed, and nothing is ever copied.
"""
import contextlib
import ctypes
import functools
import threading

from ..backend import module_for
from ..errors import InputError, expect
from . import launcher

# cublasLt.h: attributes and values
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # of a product
ROWS, COLS, LD = 2, 3, 4  # of a matrix
WORKSPACE_LIMIT = 1  # of a preference
FLOAT32, TRANSPOSED, ADD_BIAS = 0, 1, 4
PRECISIONS = {"fp32": 68, "tf32": 77, "bf16": 75}  # what the factors may be rounded to; sums are float32 always
WORKSPACE = 32 << 20  # bytes; what the makers advise on Hopper
CANDIDATES = 8  # algorithms that are timed at the first use of a shape

_mode = threading.local()


@contextlib.contextmanager
def precision(name):
    """Context: products round their factors to fp32 (that is, not), tf32 or bf16."""
    expect(name in PRECISIONS, "precision", lambda: f"{name!r}, expected {', '.join(PRECISIONS)}")
    before = getattr(_mode, "precision", "fp32")
    _mode.precision = name
    try:
        yield
    finally:
        _mode.precision = before


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm that can do a product."""
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int), ("waves", ctypes.c_float),
                ("reserved", ctypes.c_int * 4)]


@functools.cache
def library():
    """The loaded cuBLASLt, or None where it is not installed."""
    try:
        from cuda import pathfinder  # comes with CuPy
        return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, OSError, RuntimeError):
        return None


def call(name, *arguments):
    """A function of the library. Its status is its result: anything but 0 is an error."""
    code = getattr(library(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: cuBLAS status {code}" + (" (ALLOC_FAILED)" if code == 3 else ""))


def set_attribute(kind, thing, attribute, value):
    call(f"cublasLt{kind}SetAttribute", thing, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def made(kind, *arguments):
    thing = ctypes.c_void_p()
    call(f"cublasLt{kind}Create", ctypes.byref(thing), *arguments)
    return thing


class Plan:
    """The descriptors of out (M, N) = op(a) op(b) [+ bias (N,)], and, after the first run, its algorithm."""

    def __init__(self, M, N, K, ta, tb, with_bias, precision):
        self.sizes, self.algorithm = (M, N, K), None
        self.product = made("MatmulDesc", PRECISIONS[precision], FLOAT32)
        for attribute, wanted in ((TRANSA, tb), (TRANSB, ta)):
            set_attribute("MatmulDesc", self.product, attribute, ctypes.c_int32(TRANSPOSED if wanted else 0))
        if with_bias:
            set_attribute("MatmulDesc", self.product, EPILOGUE, ctypes.c_uint32(ADD_BIAS))
        self.first, self.second = matrix(N, K, tb), matrix(K, M, ta)
        self.out = matrix(N, M, False)

    def point_at(self, bias):
        """Bias is a pointer in the descriptor, not an argument."""
        if bias is not None:
            set_attribute("MatmulDesc", self.product, BIAS_POINTER, ctypes.c_void_p(bias))

    def arguments(self, a, b, out, algorithm, workspace, stream):
        """Of cublasLtMatmul, after the handle. a, b, out, workspace: addresses."""
        one, none = ctypes.byref(ctypes.c_float(1.0)), ctypes.byref(ctypes.c_float(0.0))
        p = ctypes.c_void_p
        return (self.product, one, p(b), self.first, p(a), self.second, none, p(out), self.out, p(out), self.out,
                ctypes.byref(algorithm), p(workspace), ctypes.c_size_t(WORKSPACE), p(stream))

    def candidates(self, handle):
        """Algorithms that the library proposes, best guess first."""
        preference, found, count = made("MatmulPreference"), (Result * CANDIDATES)(), ctypes.c_int()
        set_attribute("MatmulPreference", preference, WORKSPACE_LIMIT, ctypes.c_size_t(WORKSPACE))
        call("cublasLtMatmulAlgoGetHeuristic", handle, self.product, self.first, self.second, self.out, self.out, preference, CANDIDATES,
             found, ctypes.byref(count))
        call("cublasLtMatmulPreferenceDestroy", preference)
        expect(count.value, "product", lambda: f"cuBLASLt knows no algorithm for sizes M, N, K = {self.sizes}")
        return [one.algorithm for one in found[:count.value] if one.state == 0]


def matrix(rows, columns, transposed):
    """The layout of a column-major factor that acts as (rows, columns): stored the other way round if transposed."""
    rows, columns = (columns, rows) if transposed else (rows, columns)
    return made("MatrixLayout", FLOAT32, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))


@functools.lru_cache(maxsize=1024)
def plan(*what):
    return Plan(*what)


@functools.cache
def device_state():
    """(handle, workspace) of the current device, kept for good: a captured graph points at the workspace."""
    handle = ctypes.c_void_p()
    call("cublasLtCreate", ctypes.byref(handle))
    return handle, module_for("cuda").cuda.alloc(WORKSPACE)


def on_device(chosen, a, b, out, bias):
    """Run a plan on the current stream. The first run of a plan times the candidates, which a capture cannot: warm up before."""
    cupy, (handle, workspace) = module_for("cuda"), device_state()
    stream = cupy.cuda.get_current_stream()
    chosen.point_at(None if bias is None else bias.data.ptr)
    run = lambda algorithm: call("cublasLtMatmul", handle, *chosen.arguments(
        a.data.ptr, b.data.ptr, out.data.ptr, algorithm, workspace.ptr, stream.ptr))
    if chosen.algorithm is None:
        if stream.is_capturing():
            raise InputError(f"product: sizes M, N, K = {chosen.sizes} are new within a capture; run the step before")
        chosen.algorithm = min(chosen.candidates(handle), key=lambda algorithm: _milliseconds(cupy, run, algorithm))
    run(chosen.algorithm)


def _milliseconds(cupy, run, algorithm, rounds=5):
    try:
        run(algorithm)
    except RuntimeError:  # proposed, and refused
        return float("inf")
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(rounds):
        run(algorithm)
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop)


_runner = on_device


@contextlib.contextmanager
def running_on(runner):
    """Context: products go to runner(plan, a, b, out, bias) instead of the device."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def product(a, b, *, ta=False, tb=False, bias=None):
    """op(a) op(b) + bias of contiguous float32 matrices, op being the transpose where ta or tb is set -> a new (M, N) array."""
    (M, K), (inner, N) = a.shape[::-1] if ta else a.shape, b.shape[::-1] if tb else b.shape
    expect(K == inner and (bias is None or bias.shape == (N,)) and min(M, N, K) > 0, "product",
           lambda: f"a {a.shape}{' transposed' * ta}, b {b.shape}{' transposed' * tb}, bias {getattr(bias, 'shape', None)}")
    expect(all(x.dtype == "float32" and x.flags.c_contiguous for x in (a, b)), "product", "contiguous float32 matrices expected")
    out = launcher.empty(a, M, N)
    _runner(plan(M, N, K, ta, tb, bias is not None, getattr(_mode, "precision", "fp32")), a, b, out, bias)
    return out
