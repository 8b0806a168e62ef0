"""Kernels by name, and their launch. A kernel's declaration in `sources/` is the one place that says what it
takes; each argument is checked against it and given its width, so a Python number never arrives as 64 bits
where the kernel reads 32.
"""
import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import types

import numpy as np

from ..backend import array_module, cpu_count, is_array, module_for, out_of_memory, swapped
from ..errors import InputError, expect
from .fallback import check_on, switch_off

SOURCES = pathlib.Path(__file__).parent / "sources"
DECLARATION = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
# bf16 lies in uint16 arrays, which kernels read one or, as bf16x2, two at a time
DTYPES = {"float": "float32", "int": "int32", "long long": "int64", "unsigned": "uint32",
          "unsigned char": "uint8",
          "bf16": "uint16", "bf16x2": "uint16"}
# numbers that a source is compiled for, and the ones it is tested with
CONSTANTS = {"HEAD_DIM": (16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's name, its source file without .cu, its parameters: (name, dtype, whether an array, whether
    written), and the constants that the source is compiled for: (name, number)."""
    name: str
    family: str
    parameters: tuple
    constants: tuple = ()

    @functools.cached_property
    def strided(self):
        """Arrays that it is told how to walk, by a stride of the tokens (q, q_t) or the length of a row
        (parts, pitch)."""
        names = {name for name, *_ in self.parameters}
        return {name for name in names if f"{name}_t" in names} | ({"parts"} if "pitch" in names else set())


@functools.cache
def kernels():
    """{name: Kernel} of all sources."""
    found = {}
    for path in sorted(SOURCES.glob("*.cu")):
        for name, parameters in DECLARATION.findall(path.read_text(encoding="utf-8")):
            found[name] = Kernel(name, path.stem, tuple(map(_parameter, parameters.split(","))))
    return found


def _parameter(text):
    words = re.fullmatch(r"\s*(const )?([\w ]+?)(\*?) ?(\w+)\s*", text)
    return words[4], DTYPES[words[2]], bool(words[3]), bool(words[3]) and not words[1]


@functools.cache
def source(family, constants=(), device=True):
    """The text of a family with what all kernels share before it, and, for the device, what only a device
    understands."""
    shared = [SOURCES / name for name in (("device.cuh",) if device else ()) + ("common.cuh", f"{family}.cu")]
    defined = "".join(f"#define {name} {value}\n" for name, value in constants)
    return defined + "".join(path.read_text(encoding="utf-8") for path in shared)


def launch(name, blocks, threads, *arguments, shared=0, constants=()):
    """Run a kernel on `blocks` blocks of `threads` threads, with `shared` bytes of shared memory of each.
    Arrays must be contiguous and of the declared dtype, None stands for a null pointer, numbers get the
    declared width. Raises InputError otherwise."""
    check_on()
    kernel = kernels()[name]
    if constants:
        kernel = dataclasses.replace(kernel, constants=constants)
    expect(len(arguments) == len(kernel.parameters), name,
           lambda: f"{len(arguments)} arguments, expected {len(kernel.parameters)}")
    expect(0 < blocks < 2**31 and threads % 32 == 0 and 0 < threads <= 1024, name,
           lambda: f"a grid of {blocks} x {threads}")
    now.run(kernel, blocks, threads,
            [_argument(kernel, value, *p) for value, p in zip(arguments, kernel.parameters)], shared)


def _argument(kernel, value, name, dtype, array, _):
    if not array:
        return np.dtype(dtype).type(value)
    if value is None:
        return None
    expect(is_array(value) and value.dtype == dtype, kernel.name,
           lambda: f"{name} is {getattr(value, 'dtype', type(value))}, expected {dtype}")
    expect(value.flags.c_contiguous or name in kernel.strided, kernel.name,
           lambda: f"{name} {value.shape} is not contiguous")
    return value


def on_device(kernel, blocks, threads, arguments, shared):
    """Launch on the current device and stream. Unusable, with all kernels off, where it cannot begin."""
    try:
        compiled = _compiled(kernel)
        if shared > 48 * 1024:
            compiled.max_dynamic_shared_size_bytes = shared
        compiled((blocks,), (threads,), tuple(np.uintp(0) if a is None else a for a in arguments),
                 shared_mem=shared)
    except Exception as error:  # of the compiler or the driver
        if out_of_memory(error):
            raise
        raise switch_off(f"kernel {kernel.name}", error) from error


@functools.cache
def _compiled(kernel):
    what = kernel.family, kernel.constants
    module = compiling()[what].result() if what in compiling() else _module(*what)
    return module.get_function(kernel.name)


def families():
    """(family, constants) of all that can be compiled: of a family with a constant, one for each value."""
    return [(family, constants) for family in sorted({kernel.family for kernel in kernels().values()})
            for constants in [((name, value),) for name, values in CONSTANTS.items()
                              if name in source(family) for value in values] or [()]]


@functools.cache
def compiling():
    """{(family, constants): a Future of its module}: at the first launch all CPUs compile everything, once;
    CuPy keeps it on disk."""
    device, cpus = module_for("cuda").cuda.Device(), concurrent.futures.ThreadPoolExecutor(cpu_count())

    def compiled(*what):
        with device:  # which is set for each thread by itself
            return _module(*what)
    return {what: cpus.submit(compiled, *what) for what in families()}


@functools.cache
def _module(family, constants):
    module = module_for("cuda").RawModule(code=source(family, constants), options=("-std=c++17",))
    module.compile()
    return module


@functools.cache
def most_shared():
    """Bytes of shared memory that a block may have on the device."""
    return module_for("cuda").cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]


now = types.SimpleNamespace(run=on_device)


def running_on(runner):
    """Context -> runner: launches go to runner(kernel, blocks, threads, arguments, shared) instead of the
    device."""
    return swapped(now, "run", runner)


def contiguous(array):
    """The array, or a contiguous copy: kernels know no strides but those that they are told."""
    return array if array.flags.c_contiguous else array_module(array).ascontiguousarray(array)


def cover(elements, threads=256):
    """(blocks, threads) with a thread for each element."""
    if elements >= 2**31 * threads:
        raise InputError(f"cuda: {elements} elements are too many for one launch")
    return max(1, -(-elements // threads)), threads


def empty(like, *shape, dtype="float32"):
    """An array for a kernel to fill, on the device of `like`."""
    return array_module(like).empty(shape, dtype)


def empty_like(array):
    """The same, of that shape."""
    return empty(array, *array.shape)
