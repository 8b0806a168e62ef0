"""Products of matrices by cuBLASLt, called through ctypes: CuPy's own matmul cannot be captured in a CUDA
graph. Matrices are float32, or bf16, which NumPy does not know: its bits lie in uint16 arrays.

cuBLASLt thinks in columns. A row-major (R, C) array is a column-major (C, R) matrix without being touched,
and out = a b is, in columns, out^T = b^T a^T. So b is handed over first, transposed if the caller wants it
transposed, and nothing is ever copied.
"""
import ctypes
import functools
import operator
import threading
import types
import warnings

from ..backend import module_for, out_of_memory, products_in, swapped
from ..errors import InputError, expect
from . import launcher
from .fallback import check_on, implementation, switch_off

# cublasLt.h: attributes and values
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # of a product
ROWS, COLS, LD = 2, 3, 4  # of a matrix
# of a preference; of the first and second factor, what is added, the result
WORKSPACE_LIMIT, ALIGNMENTS = 1, (5, 6, 7, 8)
FLOAT32, TRANSPOSED, ADD_BIAS = 0, 1, 4
NEEDED = ("Create", "Matmul", "MatmulAlgoGetHeuristic", "MatmulDescCreate", "MatmulDescSetAttribute",
          "MatrixLayoutCreate", "MatmulPreferenceCreate", "MatmulPreferenceSetAttribute",
          "MatmulPreferenceDestroy")  # functions, without cublasLt before them
TYPES = {"float32": FLOAT32, "uint16": 14}  # of matrices: 14 is bf16
# what float32 factors may be rounded to; sums are float32 always
PRECISIONS = {"fp32": 68, "tf32": 77, "bf16": 75}
WORKSPACE = 32 << 20  # bytes; what the makers advise on Hopper
CANDIDATES = 8  # algorithms that are timed at the first use of a shape


class Mode(threading.local):
    """precision: of this thread's products."""
    precision = "fp32"


mode = Mode()


def precision(name):
    """Context: products round their factors to fp32 (that is, not), tf32 or bf16."""
    expect(name in PRECISIONS, "precision", lambda: f"{name!r}, expected {', '.join(PRECISIONS)}")
    return swapped(mode, "precision", name)


@implementation(products_in)
def products_on(precision_name, device):
    """backend.products_in."""
    return precision(precision_name)


def current_precision():
    """The one that holds here and now, in this thread."""
    return mode.precision


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm that can do a product."""
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float),
                ("reserved", ctypes.c_int * 4)]


@functools.cache
def library():
    """The loaded cuBLASLt, or None where it is not installed, or (with a warning) lacks a function."""
    try:
        from cuda import pathfinder  # comes with CuPy
        path = pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path
        loaded = ctypes.CDLL(path)
    except (ImportError, OSError, RuntimeError):
        return None
    lacking = [name for name in NEEDED if not hasattr(loaded, f"cublasLt{name}")]
    if lacking:
        warnings.warn(f"products are CuPy's own, and steps are not captured: {path} has no "
                      f"{', '.join(f'cublasLt{name}' for name in lacking)}", stacklevel=2)
    return None if lacking else loaded


def call(name, *arguments):
    """A function of the library. Its status is its result: anything but 0 is an error."""
    code = getattr(library(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: cuBLAS status {code}" + (" (ALLOC_FAILED)" if code == 3 else ""))


def set_attribute(kind, thing, attribute, value):
    call(f"cublasLt{kind}SetAttribute", thing, attribute, ctypes.byref(value),
         ctypes.c_size_t(ctypes.sizeof(value)))


def made(kind, *arguments):
    thing = ctypes.c_void_p()
    call(f"cublasLt{kind}Create", ctypes.byref(thing), *arguments)
    return thing


class Plan:
    """The descriptors of out (M, N) = op(a) op(b) [+ bias (N,)] [+ add (M, N)], and, after the first runs, an
    algorithm for each alignment of the arrays. factors, result: dtypes; bias has the result's."""

    def __init__(self, M, N, K, ta, tb, with_bias, with_add, factors, result, precision):
        self.sizes, self.with_add, self.algorithms = (M, N, K), with_add, {}
        self.product = made("MatmulDesc", PRECISIONS[precision], FLOAT32)
        for attribute, wanted in ((TRANSA, tb), (TRANSB, ta)):
            set_attribute("MatmulDesc", self.product, attribute, ctypes.c_int32(TRANSPOSED if wanted else 0))
        if with_bias:
            set_attribute("MatmulDesc", self.product, EPILOGUE, ctypes.c_uint32(ADD_BIAS))
        self.first, self.second = matrix(N, K, tb, factors), matrix(K, M, ta, factors)
        self.out = matrix(N, M, False, result)

    def point_at(self, bias):
        """Bias is a pointer in the descriptor, not an argument."""
        if bias is not None:
            set_attribute("MatmulDesc", self.product, BIAS_POINTER, ctypes.c_void_p(bias))

    def arguments(self, a, b, out, add, algorithm, workspace, stream):
        """Of cublasLtMatmul, after the handle. a, b, out, add (None: nothing is added), workspace:
        addresses."""
        one, share = (ctypes.byref(ctypes.c_float(value)) for value in (1.0, 1.0 if self.with_add else 0.0))
        p = ctypes.c_void_p
        return (self.product, one, p(b), self.first, p(a), self.second, share,
                p(add if self.with_add else out), self.out, p(out), self.out,
                ctypes.byref(algorithm), p(workspace), ctypes.c_size_t(WORKSPACE), p(stream))

    def candidates(self, handle, alignment):
        """Algorithms that the library proposes for arrays at multiples of `alignment` bytes, best guess
        first."""
        preference, found, count = made("MatmulPreference"), (Result * CANDIDATES)(), ctypes.c_int()
        set_attribute("MatmulPreference", preference, WORKSPACE_LIMIT, ctypes.c_size_t(WORKSPACE))
        for attribute in ALIGNMENTS:
            set_attribute("MatmulPreference", preference, attribute, ctypes.c_uint32(alignment))
        call("cublasLtMatmulAlgoGetHeuristic", handle, self.product, self.first, self.second, self.out,
             self.out, preference, CANDIDATES, found, ctypes.byref(count))
        call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value:
            raise RuntimeError(f"cuBLASLt knows no algorithm for sizes M, N, K = {self.sizes}")
        return [one.algorithm for one in found[:count.value] if one.state == 0]


def matrix(rows, columns, transposed, dtype):
    """The layout of a column-major factor that acts as (rows, columns): stored the other way round if
    transposed."""
    rows, columns = (columns, rows) if transposed else (rows, columns)
    return made("MatrixLayout", TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns),
                ctypes.c_int64(rows))


@functools.lru_cache(maxsize=1024)
def plan(*what):
    return Plan(*what)


@functools.cache
def device_state():
    """(handle, workspace) of the current device, kept for good: a captured graph points at the workspace."""
    handle = ctypes.c_void_p()
    call("cublasLtCreate", ctypes.byref(handle))
    return handle, module_for("cuda").cuda.alloc(WORKSPACE)


def on_device(chosen, a, b, out, bias, add):
    """Run a plan on the current stream. The first run of a plan times the candidates, which a capture cannot:
    warm up before."""
    cupy, (handle, workspace) = module_for("cuda"), device_state()
    stream = cupy.cuda.get_current_stream()
    chosen.point_at(None if bias is None else bias.data.ptr)
    run = lambda algorithm, into: call("cublasLtMatmul", handle, *chosen.arguments(
        a.data.ptr, b.data.ptr, into.data.ptr, None if add is None else add.data.ptr, algorithm,
        workspace.ptr, stream.ptr))
    alignment = common_alignment(*(array.data.ptr for array in (a, b, out, add) if array is not None))
    if alignment not in chosen.algorithms:
        if stream.is_capturing():
            raise InputError(f"product: sizes M, N, K = {chosen.sizes} are new within a capture; "
                             "run the step before")
        scratch = cupy.empty_like(out)  # `out` may be what is added to: each run would add again
        candidates = chosen.candidates(handle, common_alignment(alignment, scratch.data.ptr))
        took = lambda algorithm: _milliseconds(cupy, run, algorithm, scratch)
        chosen.algorithms[alignment] = min(candidates, key=took)
    run(chosen.algorithms[alignment], out)


def common_alignment(*addresses, most=256):
    """The largest power of two, at most `most` bytes, of which all addresses are multiples."""
    together = functools.reduce(operator.or_, addresses, most)
    return together & -together


def _milliseconds(cupy, run, algorithm, scratch, rounds=5):
    try:
        run(algorithm, scratch)
    except RuntimeError:  # proposed, and refused
        return float("inf")
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(rounds):
        run(algorithm, scratch)
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop)


now = types.SimpleNamespace(run=on_device)


def running_on(runner):
    """Context -> runner: products go to runner(plan, a, b, out, bias, add) instead of the device."""
    return swapped(now, "run", runner)


def product(a, b, *, ta=False, tb=False, bias=None, add=None, out=None, dtype="float32"):
    """op(a) op(b) [+ bias] [+ add] -> (M, N) of `dtype`, op being the transpose where ta or tb is set. All
    are contiguous; a and b both float32 or both bf16 (uint16), bias (N,) and add (M, N) of the result's
    dtype. out: where to write (default: a new array); it may be `add` itself. bf16 factors are multiplied as
    they are; float32 ones are rounded as `precision` says."""
    (M, K), (inner, N) = a.shape[::-1] if ta else a.shape, b.shape[::-1] if tb else b.shape
    more = (("bias", bias, (N,)), ("add", add, (M, N)), ("out", out, (M, N)))
    expect(K == inner and min(M, N, K) > 0 and all(x is None or x.shape == shape for _, x, shape in more),
           "product", lambda: f"a {a.shape}{' transposed' * ta}, b {b.shape}{' transposed' * tb}, "
           + ", ".join(f"{name} {getattr(x, 'shape', None)}" for name, x, _ in more))
    given = [(a, a.dtype), (b, a.dtype), (bias, dtype), (add, dtype), (out, dtype)]
    expect(a.dtype.name in TYPES
           and all(x is None or x.dtype == wanted and x.flags.c_contiguous for x, wanted in given), "product",
           "contiguous matrices expected, factors both float32 or both bf16, the rest of the result's dtype")
    out = launcher.empty(a, M, N, dtype=dtype) if out is None else out
    rounding = current_precision() if a.dtype == "float32" else "fp32"
    check_on()
    try:
        chosen = plan(M, N, K, ta, tb, bias is not None, add is not None, a.dtype.name, dtype, rounding)
        now.run(chosen, a, b, out, bias, add)
    except RuntimeError as error:  # cuBLASLt's status
        if out_of_memory(error):
            raise
        raise switch_off(f"the product of sizes M, N, K = {M}, {N}, {K}", error) from error
    return out
