"""The ground floor: array modules, devices, the functions that NumPy lacks, the settings of the process."""
import functools
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from tinytoken import InputError, backend
from tinytoken.backend import to_numpy
from tinytoken.errors import this_python

ROOT = pathlib.Path(__file__).parents[1]


def test_array_module_and_is_array(xp):
    assert backend.array_module(xp.ones(2)) is xp
    assert backend.array_module(None, 2.0, xp.ones(2)) is xp
    assert backend.array_module() is np and backend.array_module(3) is np
    assert backend.is_array(xp.ones(2)) and backend.is_array(xp.ones(()))
    assert not any(map(backend.is_array, (1.0, [1.0], None, np.float32(1))))


def test_devices(xp):
    array, device = xp.arange(3.0), "cpu" if xp is np else "cuda"
    assert backend.device_of(array) == device and backend.module_for(device) is xp
    assert backend.to_device(array, device) is array
    assert isinstance(backend.to_numpy(array), np.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(array), [0, 1, 2])
    moved = backend.to_device(array, "cpu")
    assert isinstance(moved, np.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(backend.to_device(moved, device)), [0, 1, 2])


def test_choose_device(monkeypatch):
    assert backend.choose_device("cpu") == "cpu"
    monkeypatch.setattr(backend, "cuda_ready", lambda: (True, ""))
    assert [backend.choose_device(*name) for name in ((), ("cuda",), ("cpu",))] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy finds no usable CUDA device or driver"))
    assert backend.choose_device("auto") == "cpu"
    with pytest.raises(InputError) as error:
        backend.choose_device("cuda")
    assert str(error.value) == ("device: cuda asked for, but CuPy finds no usable CUDA device or driver; "
                                f"`{this_python()} -m tinytoken doctor` says how to fix it")
    with pytest.raises(InputError) as error:
        backend.choose_device("gpu")
    assert str(error.value) == "device: 'gpu', expected auto, cpu or cuda"


def broken_cupy(**members):
    """A module that stands for a CuPy which does not work."""
    module = types.ModuleType("cupy")
    module.ndarray = type("ndarray", (), {})
    vars(module).update(members)
    return module


def counting_devices(count):
    """CuPy's `cuda`, with count() for its number of devices."""
    return types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=count))


def raising(error):
    def call(*args, **kwargs):
        raise error
    return call


@pytest.mark.parametrize("cupy, reason", [
    (None, "CuPy cannot be imported (import of cupy halted; None in sys.modules)"),
    (broken_cupy(is_available=lambda: False, cuda=counting_devices(raising(RuntimeError(
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient")))),
     "RuntimeError: cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
    (broken_cupy(is_available=lambda: False, cuda=counting_devices(lambda: 0)),
     "CuPy finds no CUDA device"),
    (broken_cupy(is_available=raising(RuntimeError("cudaErrorInsufficientDriver: too old\nmore"))),
     "RuntimeError: cudaErrorInsufficientDriver: too old"),
    (broken_cupy(is_available=lambda: True, arange=raising(OSError("libnvrtc.so.12 not found"))),
     "OSError: libnvrtc.so.12 not found"),
    (broken_cupy(is_available=raising(RuntimeError())), "RuntimeError: "),
])
def test_a_gpu_that_does_not_work_is_a_reason_and_no_error(monkeypatch, cupy, reason):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(backend, "cupy_wheels", lambda: ["cupy-cuda13x"])
    assert backend.cuda_ready.__wrapped__() == (False, reason)


def test_two_wheels_of_cupy_are_a_reason(monkeypatch):
    monkeypatch.setattr(backend, "cupy_wheels", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    monkeypatch.setitem(sys.modules, "cupy", broken_cupy(is_available=raising(AssertionError("imported"))))
    text = "cupy-cuda12x and cupy-cuda13x are installed together, which breaks both"
    assert backend.cuda_ready.__wrapped__() == (False, text)


def test_cupy_wheels_are_what_brings_a_module_cupy(monkeypatch):
    packages = {"cupy": ["cupy-cuda13x", "cupy-cuda12x", "cupy-cuda12x"], "cupyx": ["cupy-cuda12x"]}
    monkeypatch.setattr(backend.importlib.metadata, "packages_distributions", lambda: packages)
    assert backend.cupy_wheels.__wrapped__() == ["cupy-cuda12x", "cupy-cuda13x"]
    monkeypatch.setattr(backend.importlib.metadata, "packages_distributions", dict)
    assert backend.cupy_wheels.__wrapped__() == []


def test_out_of_memory():
    for error, expected in ((MemoryError("Out of memory allocating 10 bytes"), True),
                            (RuntimeError("cudaErrorMemoryAllocation: x"), True),
                            (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
                            (RuntimeError("illegal address"), False)):
        assert backend.out_of_memory(error) is expected


# Functions

def exact(f, x):
    return np.array([f(a) for a in x.ravel().tolist()]).reshape(x.shape)


def normal_cdf(a):
    return 0.5 * math.erfc(-a / math.sqrt(2))


def test_erf_and_normal_cdf_in_float64(xp):
    x = np.concatenate([np.linspace(-9, 9, 1001), [-40, 0, 40]])
    for name, formula in (("erf", math.erf), ("normal_cdf", normal_cdf)):
        found = to_numpy(getattr(backend, name)(xp.asarray(x)))
        assert found.dtype == "float64"
        np.testing.assert_allclose(found, exact(formula, x), rtol=0, atol=4e-16)


def test_erf_and_normal_cdf_in_float32(xp):
    x = np.linspace(-9, 9, 100_001).astype("float32")
    cdf = to_numpy(backend.normal_cdf(xp.asarray(x)))
    assert cdf.dtype == "float32" and cdf.min() >= 0 and cdf.max() <= 1
    correct = exact(normal_cdf, x)
    assert np.abs(cdf - correct).max() < 4e-6
    assert np.abs(x * cdf - x.astype("float64") * correct).max() < 4e-6  # gelu
    found = to_numpy(backend.erf(xp.asarray(x)))
    assert found.dtype == "float32" and np.abs(found - exact(math.erf, x)).max() < 8e-6
    far = xp.asarray([-1e4, -30, 0, 30, 1e4], "float32")
    np.testing.assert_allclose(to_numpy(backend.normal_cdf(far)), [0, 0, 0.5, 1, 1], atol=1e-7)


def test_normal_cdf_leaves_its_input_alone():
    for dtype in ("float32", "float64"):
        x = np.linspace(-2, 2, 5).astype(dtype)
        x.flags.writeable = False
        backend.normal_cdf(x)
    assert backend.normal_cdf(np.zeros((0, 3), "float32")).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vecdot(dtype, xp):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5)).astype(dtype), rng.standard_normal((3, 5)).astype(dtype)
    found = backend.vecdot(xp.asarray(a), xp.asarray(b))
    assert found.dtype == dtype and found.shape == (2, 3)
    expected = [[math.fsum(x * y for x, y in zip(row, other)) for row, other in zip(block, b.tolist())]
                for block in a.tolist()]
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("shape, index",
                         [((5, 3), [4, 0, 4, 4, 2]), ((5,), [1, 1, 1]), ((4, 2, 3), [[3, 0], [3, 3]]),
                                          ((5, 3), [])])
def test_scatter_add(shape, index, xp):
    rng = np.random.default_rng(1)
    index = np.array(index, "int64")
    values, target = rng.standard_normal((*index.shape, *shape[1:])), rng.standard_normal(shape)
    expected = target.copy()
    for place in np.ndindex(index.shape):
        expected[index[place]] += values[place]
    found = xp.asarray(target)
    found = found.copy() if found is target else found
    backend.scatter_add(found, xp.asarray(index), xp.asarray(values))
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-14)


# Settings

def test_malloc_setting_is_made_once_and_can_be_turned_off(monkeypatch):
    calls = []

    class C:
        def mallopt(self, *setting):
            calls.append(setting)
            return answer
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: C())
    monkeypatch.delenv("TINYTOKEN_MALLOC", raising=False)
    for answer, text in ((1, "freed memory is kept (mallopt)"), (0, "partly refused by this C library")):
        calls.clear()
        prepare = functools.cache(backend.prepare_cpu.__wrapped__)
        assert prepare() == prepare() == text
        assert calls == [(-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)]
    monkeypatch.setenv("TINYTOKEN_MALLOC", "0")
    calls.clear()
    assert backend.prepare_cpu.__wrapped__() == "off (TINYTOKEN_MALLOC=0)" and not calls
    monkeypatch.delenv("TINYTOKEN_MALLOC")
    monkeypatch.setattr(backend.ctypes, "CDLL", raising(OSError("no C library")))
    assert backend.prepare_cpu.__wrapped__() == "not available (no glibc)"


def test_import_changes_no_setting():
    code = ("import tinytoken.backend as b\n"
            "print(b.prepare_cpu.cache_info().misses, b.blas_controller.cache_info().misses, "
            "b.cuda_ready.cache_info().misses)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout == "0 0 0\n"


def threads_of_blas():
    return {one["num_threads"] for one in backend.blas_controller().info()}


@pytest.mark.skipif(backend.blas_controller() is None, reason="a BLAS whose threads cannot be set")
def test_blas_threads_are_held_and_restored():
    with backend.blas_threads(2):
        with backend.blas_threads(1):
            assert threads_of_blas() == {1}
            with backend.blas_threads(2):
                assert threads_of_blas() == {2}
            assert threads_of_blas() == {1}
        assert threads_of_blas() == {2}
        with pytest.raises(ZeroDivisionError), backend.blas_threads(1):
            1 / 0
        assert threads_of_blas() == {2} and backend.blas_description().endswith(", 2 threads")


def test_blas_is_described(monkeypatch):
    one = {"internal_api": "openblas", "version": "0.3.31", "architecture": "Zen", "num_threads": 2}
    libraries = [one, {"internal_api": "mkl", "version": "2026.1", "num_threads": 4}]
    monkeypatch.setattr(backend, "blas_controller", lambda: types.SimpleNamespace(info=lambda: libraries))
    assert backend.blas_description() == "openblas 0.3.31 Zen, 2 threads; mkl 2026.1, 4 threads"


def test_another_blas_is_left_alone(monkeypatch):
    controller = types.SimpleNamespace(select=lambda user_api: types.SimpleNamespace(lib_controllers=[]))
    monkeypatch.setattr("threadpoolctl.ThreadpoolController", lambda: controller)
    monkeypatch.setattr(backend, "blas_controller", backend.blas_controller.__wrapped__)
    with backend.blas_threads(1):
        pass
    assert backend.blas_description().endswith(" (threads not under our control)")


def test_cpu_count(monkeypatch):
    assert 1 <= backend.cpu_count() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert backend.cpu_count() == os.cpu_count()
