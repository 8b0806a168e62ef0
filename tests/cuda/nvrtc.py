"""NVRTC by ctypes: compiles kernels to cubin where no GPU and no driver is, from the wheel nvidia-cuda-nvrtc
(the extra `nvrtc`)."""
import ctypes
import functools
import importlib.util
import pathlib
import re

from tinytoken.cuda import launcher

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


@functools.cache
def library():
    """The loaded library, or None where the wheel is not installed."""
    try:
        found = importlib.util.find_spec("nvidia")
    except ImportError:
        return None
    paths = [path for place in (found.submodule_search_locations if found else ()) for path in
             sorted(pathlib.Path(place).glob("**/libnvrtc.so*"))]
    return ctypes.CDLL(str(paths[0])) if paths else None


def compile_family(family, architecture, constants=()):
    """(the log of ptxas with registers and spills of each kernel, PTX as text, size of the cubin)."""
    nvrtc, program = library(), ctypes.c_void_p()
    check = lambda code: _check(nvrtc, program, code)
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), launcher.source(family, constants).encode(),
                                   f"{family}.cu".encode(), 0, None, None))
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "--ptxas-options=-v", "-default-device"]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    check(nvrtc.nvrtcCompileProgram(program, len(options), given))
    log, ptx, cubin = (_read(nvrtc, program, name) for name in ("ProgramLog", "PTX", "CUBIN"))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.decode(), ptx.decode(), len(cubin)


def _read(nvrtc, program, name):
    size = ctypes.c_size_t()
    _check(nvrtc, program, getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, program, getattr(nvrtc, f"nvrtcGet{name}")(program, buffer))
    return buffer.raw[:-1]


def _check(nvrtc, program, code):
    if code:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise AssertionError(f"NVRTC error {code}: {log.value.decode()}")


def registers(log):
    """{kernel: registers of a thread}, of a log."""
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    return {kernel: int(count) for kernel, count in found}


def spills(log):
    """Bytes spilled, or kept in a stack for want of registers, of all kernels of a log."""
    return sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", log))
