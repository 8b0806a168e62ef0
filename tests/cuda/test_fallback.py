"""What a first run on a new machine can meet, rehearsed on the stand-in: each falls back to plain operations
with one warning, and the work goes on."""
import contextlib
import functools
import sys
import types
import warnings

import numpy as np
import pytest

import standin
import tinytoken as tt
from test_capture import trained
from test_standin import SIZES, TASKS, batches
from tinytoken.backend import to_numpy
from tinytoken.cuda import fallback, gemm, launcher
from tinytoken.train import infer


class Function:
    """A kernel as CuPy gives it; the shim runs it. fault: None, or where it fails."""

    def __init__(self, kernel, runner, fault):
        object.__setattr__(self, "of", (kernel, runner, fault))

    def __setattr__(self, name, value):
        assert name == "max_dynamic_shared_size_bytes"
        if self.of[2] == "shared":
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    def __call__(self, grid, block, arguments, shared_mem):
        kernel, runner, fault = self.of
        if fault == "launch":
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch")
        if fault == "memory":
            raise MemoryError("Out of memory allocating 512 bytes")
        arguments = [None if isinstance(a, np.uintp) else a for a in arguments]
        runner(kernel, grid[0], block[0], arguments, shared_mem)


@pytest.fixture
def broken(there, monkeypatch):
    """broken(name, fault): this kernel fails so from now on; the others run as on a device."""
    if not standin.in_place_of_cupy():
        pytest.skip("a device whose kernels run cannot show it")
    monkeypatch.setattr(fallback.state, "off", None)
    runner, faults = launcher.now.run, {}

    def compiled(kernel):
        if faults.get(kernel.name) == "compile":
            raise ValueError("nvrtc: error: invalid value for --gpu-architecture (-arch)\nand more")
        return Function(kernel, runner, faults.get(kernel.name))
    monkeypatch.setattr(launcher, "_compiled", compiled)
    monkeypatch.setattr(launcher.now, "run", launcher.on_device)
    return faults.__setitem__


def close(found, expected):
    """Of two ways of training: equal but for the order in which kernels add up."""
    (weights, said), (others, told) = found, expected
    assert said["loss"] == pytest.approx(told["loss"], rel=1e-3)
    # Adam divides by the size of a gradient, so one that is nearly zero decides over a whole step
    assert np.mean([np.abs(weights[n] - others[n]).mean() for n in others]) < 1e-5


def the_one_warning(function, text):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = function()
    assert len(said) == 1 and text in str(said[0].message) and "\n" not in str(said[0].message), said
    return result


@pytest.mark.parametrize("name, fault", [
    ("gelu_forward", "compile"), ("layer_norm_forward", "launch"), ("layer_norm_backward", "launch"),
    ("adamw", "compile"), ("squares", "launch"), ("count_step", "launch"), ("gather_pictures", "launch"),
    ("random_bits", "compile"), ("cross_entropy_backward", "launch")])
def test_training_goes_on_without_kernels(name, fault, broken):
    model = "dynamicvit" if name == "random_bits" else "vit"
    with tt.plain():
        expected = trained(model, 4)
    broken(name, fault)
    text = f"kernels are off from here on, plain CuPy operations run in their place (kernel {name}: "
    close(the_one_warning(lambda: trained(model, 4), text), expected)
    assert fallback.state.off.startswith(f"kernel {name}")


def test_a_kernel_that_wants_more_shared_memory_than_it_gets(broken, monkeypatch):
    for size, value in dict(patch_size=2, dim=32, heads=1).items():  # it takes more than 48 KiB
        monkeypatch.setitem(SIZES, size, value)
    task, images = TASKS["vit"]("cuda"), batches("cuda")(0)[0]
    expected = infer(task.model, images)
    broken("attention_forward", "shared")
    found = the_one_warning(lambda: infer(task.model, images), "kernel attention_forward: RuntimeError: CUDA_")
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)  # GELU's formulas differ by 3.7e-6


def test_a_backward_pass_by_hand_says_to_call_it_again(broken):
    x = tt.Tensor(batches("cuda")(0)[0].reshape(8, -1), requires_grad=True)
    broken("gelu_backward", "launch")
    with pytest.warns(UserWarning, match="kernels are off"), pytest.raises(
            fallback.Unusable, match="gelu_backward: .*too many resources.*call it again"):
        tt.ops.gelu(x).sum().backward()
    tt.ops.gelu(x).sum().backward()
    assert np.isfinite(to_numpy(x.grad)).all()
    with pytest.raises(fallback.Unusable, match="kernels are off .kernel gelu_backward"):
        launcher.launch("gelu_forward", 1, 32, x.data, x.data, 10)


def test_too_little_memory_switches_nothing_off(broken):
    broken("cross_entropy_backward", "memory")
    with pytest.raises(tt.InputError, match="not even one image fits into memory .Out of memory allocating"):
        trained("vit", 1)
    assert fallback.state.off is None


def test_a_product_that_the_library_refuses(broken, monkeypatch):
    def refused(name, *arguments):
        raise RuntimeError(f"{name}: cuBLAS status 15")
    with tt.plain():
        expected = trained("vit", 4)
    monkeypatch.setattr(gemm, "product", PRODUCT)
    monkeypatch.setattr(gemm, "call", refused)
    text = "the product of sizes M, N, K = 128, 8, 192: RuntimeError: cublasLtMatmulDescCreate: cuBLAS status"
    close(the_one_warning(lambda: trained("vit", 4), text), expected)


PRODUCT = gemm.product  # before a fixture replaces it


def test_a_library_that_lacks_a_function(monkeypatch):
    other = lambda name: types.SimpleNamespace(abs_path="libm.so.6")
    cuda = types.SimpleNamespace(pathfinder=types.SimpleNamespace(load_nvidia_dynamic_lib=other))
    monkeypatch.setitem(sys.modules, "cuda", cuda)
    monkeypatch.setattr(gemm, "library", functools.cache(gemm.library.__wrapped__))
    found = the_one_warning(gemm.library, "libm.so.6 has no cublasLtCreate, cublasLtMatmul, ")
    assert found is None and gemm.library() is None


def test_all_families_are_compiled_at_once_and_waited_for_one_by_one(broken, monkeypatch):
    made = []

    class Module:
        def __init__(self, code, options):
            made.append(code)

        def compile(self):
            if "gelu_forward" in made[-1]:
                raise ValueError("no")

        def get_function(self, name):
            return name
    cuda = types.SimpleNamespace(Device=contextlib.nullcontext)
    cupy = types.SimpleNamespace(RawModule=Module, cuda=cuda)
    monkeypatch.setattr(launcher, "module_for", lambda device: cupy)
    monkeypatch.setattr(launcher, "cpu_count", lambda: 1)
    for name in ("compiling", "_module"):
        monkeypatch.setattr(launcher, name, functools.cache(getattr(launcher, name).__wrapped__))
    compiled = COMPILED.__wrapped__
    assert compiled(launcher.kernels()["top_k"]) == "top_k"
    with pytest.raises(ValueError, match="no"):
        compiled(launcher.kernels()["gelu_forward"])
    for future in launcher.compiling().values():
        future.exception()
    assert len(made) == len(launcher.families()) == len(set(made))
    other = launcher.Kernel("bf16_attention_forward", "bf16_attention", (), (("HEAD_DIM", 128),))
    assert compiled(other) == other.name and "#define HEAD_DIM 128" in made[-1]  # nobody asked for it before


COMPILED = launcher._compiled
