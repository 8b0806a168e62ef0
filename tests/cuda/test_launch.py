"""What a launch refuses, and what the shim finds: missing barriers, tails, waits that never end."""
import numpy as np
import pytest

import tinytoken as tt
from emulate import Emulator, compiler
from small import refuses
from tinytoken.cuda import launcher

needs_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler to run the kernels with")
X = np.ones(10, "float32")


def run(**sources):
    return launcher.running_on(Emulator(**sources))


def test_declarations_are_read():
    found = launcher.kernels()
    assert found["gelu_backward"].parameters == (("x", "float32", True, False), ("g", "float32", True, False),
                                                 ("dx", "float32", True, True), ("n", "int32", False, False))
    assert dict((p[0], p[1]) for p in found["attention_forward"].parameters)["q_b"] == "int64"
    assert found["top_k"].parameters[1] == ("index", "int64", True,
                                            True) and found["top_k"].family == "select"


@pytest.mark.parametrize("arguments, text", [
    ((X, X), "gelu_forward: 2 arguments, expected 3"),
    ((X, X.astype("float64"), 10), "gelu_forward: out is float64, expected float32"),
    ((X, 3.0, 10), "gelu_forward: out is <class 'float'>, expected float32"),
])
def test_arguments_are_checked(arguments, text):
    with run() as ran, refuses(text):
        launcher.launch("gelu_forward", 1, 32, *arguments)
    assert ran.launches == []


def test_a_view_with_gaps_is_refused_where_the_kernel_does_not_know_its_strides():
    wide, parts = np.ones((4, 20), "float32"), np.ones((3, 40), "float32")
    with run() as ran, refuses("gelu_forward: x (4, 10) is not contiguous"):
        launcher.launch("gelu_forward", 1, 64, wide[:, ::2], np.ones((4, 10), "float32"), 40)
    assert ran.launches == [] and launcher.kernels()["attention_forward"].strided == {"q", "k", "v"}
    with launcher.running_on(lambda *_: None):
        launcher.launch("column_parts", 3, 32, wide, parts[:, 8:], 40, 0, 4, 20, 2)


@pytest.mark.parametrize("grid", [(0, 32), (1, 33), (1, 2048), (2**31, 32)])
def test_grids_are_checked(grid):
    with run(), refuses(f"gelu_forward: a grid of {grid[0]} x {grid[1]}"):
        launcher.launch("gelu_forward", *grid, X, X, 10)


def test_numbers_get_the_declared_width():
    seen = []
    with launcher.running_on(lambda kernel, blocks, threads, arguments, shared: seen.append(arguments)):
        launcher.launch("layer_norm_forward", 1, 32, X, None, None, X, X, X, 1, np.int64(10), 1e-6)
    assert [type(a) for a in seen[0][6:]] == [np.int32, np.int32, np.float32] and seen[0][1] is None


def test_a_view_with_gaps_is_copied():
    wide = np.arange(12.0).reshape(3, 4)
    assert launcher.contiguous(wide) is wide and launcher.contiguous(wide[:, ::2]).flags.c_contiguous


def test_a_grid_covers_all_elements():
    assert [launcher.cover(n, 32) for n in (1, 32, 33)] == [(1, 32), (1, 32), (2, 32)]
    with refuses(f"cuda: {2**39} elements are too many for one launch"):
        launcher.cover(2**39)


# The shim

MEAN = (launcher.SOURCES / "loss.cu").read_text()
NORM = (launcher.SOURCES / "norm.cu").read_text()


def mean(n=700, **sources):
    out = np.full(1, np.nan, "float32")
    with run(**sources):
        launcher.launch("mean_of", 1, 256, np.arange(n, dtype="float32"), out, n, shared=4 * 256)
    return out[0]


@needs_compiler
def test_a_missing_barrier_is_found():
    assert mean() == 349.5
    broken = MEAN.replace("        __syncthreads();\n    }\n    if (threadIdx.x == 0) out",
                          "    }\n    if (threadIdx.x == 0) out")
    assert broken != MEAN
    with pytest.raises(AssertionError, match="mean_of: out depends on the order of the threads"):
        mean(loss=broken)


@needs_compiler
def test_threads_that_wait_for_each_other_are_found():
    stuck = MEAN.replace("    if (threadIdx.x == 0) out", "    if (threadIdx.x < 40) __syncwarp();\n    if "
                                                          "(threadIdx.x >= 40) __syncthreads();\n    if "
                                                          "(threadIdx.x == 0) out")
    with pytest.raises(AssertionError, match="wait for each other"):
        mean(loss=stuck)


@needs_compiler
def test_shared_memory_that_is_too_small_is_found():
    with run(), pytest.raises(AssertionError, match="past their shared memory"):
        launcher.launch("mean_of", 1, 32, X, np.zeros(1, "float32"), 10, shared=4 * 31)


@needs_compiler
def test_shared_memory_begins_as_nan():
    lazy = MEAN.replace("    sums[threadIdx.x] = total;\n", "    if (threadIdx.x < 100) sums[threadIdx.x] = "
                                                            "total;\n")
    assert lazy != MEAN and np.isnan(mean(loss=lazy))


@needs_compiler
def test_a_missing_tail_is_found():
    broken = (launcher.SOURCES / "activation.cu").read_text().replace("if (i < n) out", "out")
    out = np.full(300, 7, "float32")
    with run(activation=broken):
        launcher.launch("gelu_forward", 2, 128, np.zeros(300, "float32"), out, 200)
    # 56 elements too many
    assert (out[:200] == 0).all() and (out[200:256] == 0).all() and (out[256:] == 7).all()


@needs_compiler
def test_a_kernel_that_stops_within_a_warp_still_sums_right():
    """Rows that do not fill the last block: whole warps end early, and the others must not wait for them."""
    x, out, mean_, scale = np.arange(15, dtype="float32").reshape(5, 3), *(np.full(s, np.nan, "float32")
                                                                           for s in ((5, 3), 5, 5))
    with run():
        launcher.launch("layer_norm_forward", 2, 128, x, None, None, out, mean_, scale, 5, 3, 1e-6)
    assert np.allclose(mean_, x.mean(axis=1)) and np.allclose(out.mean(axis=1), 0, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("by_clock", [False, True])
def test_adamw_and_clipping_are_the_optimisers(by_clock, frozen):
    rng, n = np.random.default_rng(0), 1000
    weight = tt.nn.Parameter(rng.standard_normal(n).astype("float32"), decay=True)
    expected = tt.nn.Parameter(weight.data.copy(), decay=True)
    w, m, v = weight.data, np.zeros(n, "float32"), np.zeros(n, "float32")
    expected.frozen_steps = frozen
    optimizer = tt.optim.AdamW([expected], 1e-2, weight_decay=0.05, clip=1.0)
    for step in range(1, 6):
        g = rng.standard_normal(n).astype("float32")
        expected.grad[...] = g
        norm = optimizer.step()
        parts, found, factor = (np.full(s, np.nan, "float32") for s in (7, 1, 1))
        rates = np.array([1e-2, 1 / (1 - 0.9 ** step), 1 / (1 - 0.999 ** step), 0, step], "float32")
        row = (rates, None, 0)
        # the rates of this step are those of number 10 + step, in a table that begins with number 11
        if by_clock:
            table, clock = np.full((5, 5), np.nan, "float32"), np.array([10 + step], "uint32")
            table[step - 1], row = rates, (table, clock, 11)
        with run():
            launcher.launch("squares", 7, 64, g, parts, n, shared=4 * 64)
            launcher.launch("clip_factor", 1, 32, parts, found, factor, 7, 1.0)
            launcher.launch("adamw", *launcher.cover(n), w, g, m, v, None, factor, *row, n, 1.0, frozen, 0.05,
                            0.9, 0.999, 1e-8)
        assert found[0] == pytest.approx(float(norm), rel=1e-5)
        np.testing.assert_allclose(w, expected.data, rtol=0, atol=2e-6)
