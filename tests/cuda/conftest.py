"""Where the kernels run: on the CPU through the shim, and on the device where there is one. One test body for
both."""
import numpy as np
import pytest

import emulate
from tinytoken import backend
from tinytoken.cuda import gemm, launcher

POISON = {"float32": np.nan, "uint16": emulate.BF16_NAN, "int64": -1}  # in an array that a kernel is to fill


def poisoned(like, *shape, dtype="float32"):
    """launcher.empty."""
    return backend.array_module(like).full(shape, POISON[dtype], dtype)


@pytest.fixture(params=["shim", pytest.param("device", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Outputs are poisoned before a launch, so whatever a kernel leaves out shows. Its `launches` are what
    was launched."""
    if request.param == "shim" and emulate.compiler is None:
        pytest.skip("no C++ compiler to run the kernels with")
    if request.param == "device" and request.config.getoption("--standin"):
        pytest.skip("the stand-in has no kernels: the shim runs them")
    found = emulate.Place("cpu" if request.param == "shim" else "cuda")
    monkeypatch.setattr(launcher, "empty", poisoned)
    monkeypatch.setattr(emulate, "place", found)
    if found.device == "cpu":
        monkeypatch.setattr(launcher, "most_shared", lambda: 163 * 1024)
        monkeypatch.setattr(gemm, "product", emulate.numpy_product)
        monkeypatch.setattr(gemm, "library", lambda: "some")
        emulate.fewer_threads(monkeypatch)
    with launcher.running_on(found.runner):
        yield found


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def there(request, monkeypatch):
    """A device "cuda" with kernels in place: the stand-in for CuPy, whose kernels the shim runs, and a real
    one. Yields the launches."""
    if request.param == "stand-in" and emulate.compiler is None:
        pytest.skip("no C++ compiler to run the kernels with")
    if request.param == "device":
        if request.config.getoption("--standin"):
            pytest.skip("the stand-in has no kernels: the shim runs them")
        found = emulate.Place("cuda")
        with launcher.running_on(found.runner):
            yield found.launches
        return
    with emulate.stand_in(monkeypatch) as emulator:
        yield emulator.launches
