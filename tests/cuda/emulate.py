"""Kernels on the CPU: their sources, compiled by a C++ compiler behind shim.h, as a runner for
`launcher.running_on`."""
import contextlib
import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

import standin
import tinytoken
from tinytoken import backend, graph
from tinytoken.cuda import gemm, launcher, sums

SHIM = pathlib.Path(__file__).with_name("shim.h")
C_TYPES = {"float32": ("float", ctypes.c_float), "int32": ("int", ctypes.c_int),
           "int64": ("long long", ctypes.c_longlong), "uint32": ("unsigned", ctypes.c_uint),
           "uint8": ("unsigned char", ctypes.c_ubyte)}
compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


@functools.cache
def library(family, constants=(), text=None):
    """The compiled family; text: another source in its place."""
    whole = launcher.source(family, constants, device=False)
    text = whole if text is None else whole.replace((launcher.SOURCES / f"{family}.cu").read_text(), text)
    folder = tempfile.TemporaryDirectory()
    source = pathlib.Path(folder.name) / f"{family}.cpp"
    source.write_text(f'#include "{SHIM}"\n{text}\n' + "\n".join(
        runner(launcher.Kernel(name, family, tuple(map(launcher._parameter, parameters.split(",")))))
        for name, parameters in launcher.DECLARATION.findall(text)))
    made, flags = str(source.with_suffix(".so")), "-std=c++17 -O1 -ffp-contract=off -shared -fPIC".split()
    built = subprocess.run([compiler, *flags, str(source), "-o", made], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(made)
    loaded.folder = folder  # as long as the library
    return loaded


def runner(kernel):
    """C++ that runs a kernel over a grid."""
    given = "".join(f", {'void*' if array else C_TYPES[dtype][0]} {name}"
                    for name, dtype, array, _ in kernel.parameters)
    passed = ", ".join(f"Any{{{name}}}" if array else name for name, _, array, _ in kernel.parameters)
    grid = "shim_blocks", "shim_threads", "shim_bytes", "shim_backward"
    return (f'extern "C" int run_{kernel.name}({", ".join(f"int {name}" for name in grid)}{given}) '
            f'{{ return shim_launch({", ".join(grid)}, [=] {{ {kernel.name}({passed}); }}); }}')


class Emulator:
    """Runs launches on NumPy arrays and notes them. Each runs twice, threads in order and in reverse: what
    differs lacks a barrier. twice=False: in order alone, for whole models of kernels that are tested by
    themselves."""

    def __init__(self, twice=True, **sources):
        self.orders, self.sources, self.launches = (0, 1) if twice else (0,), sources, []

    def __call__(self, kernel, blocks, threads, arguments, shared):
        self.launches.append((kernel.name, blocks, threads, shared))
        arguments = [getattr(a, "host", a) for a in arguments]  # of the stand-in for CuPy
        standin.in_place(lambda: self.run(kernel, blocks, threads, arguments, shared),
                         *(a for a, (*_, out) in zip(arguments, kernel.parameters) if out and a is not None))

    def run(self, kernel, blocks, threads, arguments, shared):
        loaded = library(kernel.family, kernel.constants, self.sources.get(kernel.family))
        run = getattr(loaded, f"run_{kernel.name}")
        names, written = zip(*((name, a) for a, (name, *_, out) in zip(arguments, kernel.parameters)
                               if out and a is not None))
        before = [a.copy() for a in written]
        results = []
        for backward in self.orders:
            for array, old in zip(written, before):
                array[...] = old
            assert run(blocks, threads, shared, backward, *map(pointer, arguments, kernel.parameters)) == 0, (
                f"{kernel.name}: threads wait for each other, or wrote past their shared memory")
            results.append([a.copy() for a in written])
        for name, first, second in zip(names, results[0], results[-1]):
            assert np.array_equal(first, second, equal_nan=True), (
                f"{kernel.name}: {name} depends on the order of the threads")


def fewer_threads(monkeypatch):
    """In sums over rows: the shim runs one thread after the other."""
    monkeypatch.setattr(sums, "STRETCHES", 5)
    monkeypatch.setattr(sums, "THREADS", 96)


@contextlib.contextmanager
def stand_in(monkeypatch):
    """Context: the stand-in for CuPy with kernels in place, which the shim runs -> the Emulator."""
    monkeypatch.setattr(gemm, "product", numpy_product)
    monkeypatch.setattr(gemm, "library", lambda: "some")
    fewer_threads(monkeypatch)
    with standin.installed(kernels=True), launcher.running_on(Emulator(twice=False)) as emulator:
        tinytoken._kernels()
        yield emulator


class Place:
    """A device for the tests, "cpu" (the shim) or "cuda", and what was launched there."""

    def __init__(self, device):
        self.device, self.runner = device, Emulator() if device == "cpu" else self.launch
        self.launches = self.runner.launches if device == "cpu" else []

    def launch(self, kernel, blocks, threads, arguments, shared):
        self.launches.append((kernel.name, blocks, threads, shared))
        launcher.on_device(kernel, blocks, threads, arguments, shared)

    def put(self, array):
        """A NumPy array there; anything else as it is."""
        return backend.to_device(array, self.device) if isinstance(array, np.ndarray) else array


place = Place("cpu")  # the one in use, set by the fixture


def implementation_of(plain, *arrays, **settings):
    """backend.faster for arrays of that place: on the CPU NumPy's, for which nothing is registered."""
    with backend.using_implementations("cupy"):
        return backend.faster(plain, np, *arrays, **settings)


def gradient(entry):
    """What an entry of a vjp stands for."""
    return entry.run(None) if isinstance(entry, graph.Into) else entry() if callable(entry) else entry


def pointer(value, parameter):
    _, dtype, array, _ = parameter
    if not array:
        return C_TYPES[dtype][1](value.item())
    return ctypes.c_void_p(None if value is None else value.__array_interface__["data"][0])


# bf16, which NumPy does not know: its bits in uint16

BF16_NAN = 0x7FC0


def floats(array):
    """float32 of an array of floats or of bf16 bits."""
    return (array.astype("uint32") << 16).view("float32") if array.dtype == "uint16" else array


def bf16(array):
    """The bits of an array of floats, rounded to nearest even."""
    bits = np.ascontiguousarray(array, "float32").view("uint32")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")


def numpy_product(a, b, *, ta=False, tb=False, bias=None, add=None, out=None, dtype="float32"):
    """In the place of gemm.product: see test_gemm.py for what is checked of that."""
    out = launcher.empty(a, a.shape[ta], b.shape[1 - tb], dtype=dtype) if out is None else out
    host = lambda x: getattr(x, "host", x)

    def run():
        # float32 sums would depend on how many threads BLAS has
        x, y = (floats(host(one)).astype("float64") for one in (a, b))
        result = (x.T if ta else x) @ (y.T if tb else y)
        for more in (bias, add):
            result = result if more is None else result + floats(host(more))
        host(out)[...] = bf16(result) if dtype == "uint16" else result
    standin.in_place(run, host(out))
    return out
