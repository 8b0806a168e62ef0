"""Products without a GPU: the descriptors are made by the real cuBLASLt, read back from it, and carried out here as it documents
them. So sizes, transposes, leading dimensions and the bias are checked; its kernels and its choice of algorithms are not."""
import ctypes

import numpy as np
import pytest

from small import refuses
from tinytoken.cuda import gemm

needs_library = pytest.mark.skipif(gemm.library() is None, reason="no cuBLASLt: pip install 'tinytoken-vit[cuda13]'")


def attribute(kind, thing, number, type_):
    value, written = type_(), ctypes.c_size_t()
    gemm.call(f"cublasLt{kind}GetAttribute", thing, number, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written))
    return value.value


def stored(layout, address):
    """A column-major matrix at an address, as its layout says."""
    rows, columns = (attribute("MatrixLayout", layout, number, ctypes.c_uint64) for number in (gemm.ROWS, gemm.COLS))
    assert attribute("MatrixLayout", layout, gemm.LD, ctypes.c_int64) == rows and attribute("MatrixLayout", layout, 0, ctypes.c_uint32) == 0
    floats = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (rows * columns,))
    return floats.reshape(columns, rows).T


def interpret(plan, a, b, out, bias):
    """D = op(A) op(B) (+ bias on each row of D), in columns, from what the descriptors say."""
    address = lambda array: array.__array_interface__["data"][0]
    plan.point_at(None if bias is None else address(bias))
    product, alpha, first, first_layout, second, second_layout, beta, c, c_layout, d, d_layout, *_ = plan.arguments(
        address(a), address(b), address(out), (ctypes.c_uint64 * 8)(), 0, 0)
    assert c.value == d.value and c_layout is d_layout
    turned = [attribute("MatmulDesc", product, number, ctypes.c_int32) for number in (gemm.TRANSA, gemm.TRANSB)]
    A, B = (stored(layout, pointer).T if turn else stored(layout, pointer)
            for layout, pointer, turn in ((first_layout, first, turned[0]), (second_layout, second, turned[1])))
    result = A @ B
    if attribute("MatmulDesc", product, gemm.EPILOGUE, ctypes.c_uint32) == gemm.ADD_BIAS:
        pointer = attribute("MatmulDesc", product, gemm.BIAS_POINTER, ctypes.c_void_p)
        result = result + np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (len(result),))[:, None]
    stored(d_layout, d)[...] = result


@needs_library
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("M, N, K", [(3, 5, 4), (1, 7, 2), (6, 6, 6)])
def test_descriptors_say_the_product(ta, tb, bias, M, N, K):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype("float32") for shape in ((M, K), (K, N), (N,)))
    with gemm.running_on(interpret):
        out = gemm.product(np.ascontiguousarray(a.T) if ta else a, np.ascontiguousarray(b.T) if tb else b, ta=ta, tb=tb, bias=c if bias else None)
    np.testing.assert_allclose(out, a @ b + (c if bias else 0), rtol=0, atol=1e-5)


@needs_library
def test_precision_is_in_the_descriptor_and_plans_are_kept():
    a, seen = np.ones((4, 4), "float32"), []
    note = lambda plan, *_: seen.append((plan, attribute("MatmulDesc", plan.product, 0, ctypes.c_int32)))
    with gemm.running_on(note):
        gemm.product(a, a)
        with gemm.precision("bf16"):
            gemm.product(a, a)
            with gemm.precision("tf32"):
                gemm.product(a, a)
        gemm.product(a, a)
    assert [code for _, code in seen] == [68, 75, 77, 68] and seen[0][0] is seen[3][0] is not seen[1][0]
    assert ctypes.sizeof(gemm.Result) == 96


@needs_library
def test_a_status_is_an_error():
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescSetAttribute: cuBLAS status"):
        gemm.set_attribute("MatmulDesc", gemm.plan(2, 2, 2, False, False, False, "fp32").product, 9999, ctypes.c_int32(0))


def test_bad_inputs_are_refused():
    a, b = np.ones((2, 3), "float32"), np.ones((4, 5), "float32")
    with refuses("product: a (2, 3), b (4, 5) transposed, bias None"):
        gemm.product(a, b, tb=True)
    with refuses("product: contiguous float32 matrices expected"):
        gemm.product(a, np.ones((3, 2)))
    with refuses("product: contiguous float32 matrices expected"):
        gemm.product(a, np.ones((2, 3), "float32").T)
    with refuses("precision: 'fp8', expected fp32, tf32, bf16"), gemm.precision("fp8"):
        pass
