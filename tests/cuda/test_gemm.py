"""Products without a GPU: the descriptors are made by the real cuBLASLt, read back from it, and carried out
here as it documents them. So sizes, transposes, leading dimensions and the bias are checked; its kernels and
its choice of algorithms are not."""
import ctypes

import numpy as np
import pytest

from emulate import bf16, floats
from small import refuses
from tinytoken.cuda import gemm

needs_library = pytest.mark.skipif(gemm.library() is None, reason="no cuBLASLt: pip install "
                                                                  "'cupy-cuda13x[ctk]'")


def attribute(kind, thing, number, type_):
    value, written = type_(), ctypes.c_size_t()
    gemm.call(f"cublasLt{kind}GetAttribute", thing, number, ctypes.byref(value),
              ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written))
    return value.value


TYPES = {0: ("float32", ctypes.c_float), 14: ("uint16", ctypes.c_uint16)}


def stored(layout, address):
    """A column-major matrix at an address, as its layout says: a view of it."""
    rows, columns = (attribute("MatrixLayout", layout, number, ctypes.c_uint64)
                     for number in (gemm.ROWS, gemm.COLS))
    _, c_type = TYPES[attribute("MatrixLayout", layout, 0, ctypes.c_uint32)]
    assert attribute("MatrixLayout", layout, gemm.LD, ctypes.c_int64) == rows
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(c_type)),
                                 (rows * columns,)).reshape(columns, rows).T


def interpret(plan, a, b, out, bias, add):
    """D = op(A) op(B) (+ bias on each row of D) + beta C, in columns, from what the descriptors say."""
    address = lambda array: None if array is None else array.__array_interface__["data"][0]
    plan.point_at(address(bias))
    product, alpha, first, first_layout, second, second_layout, beta, c, c_layout, d, d_layout, *_ = plan.arguments(
        address(a), address(b), address(out), address(add), (ctypes.c_uint64 * 8)(), 0, 0)
    numbers = lambda pointer: ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))[0]
    assert numbers(alpha) == 1 and numbers(beta) == (0 if add is None
                                                     else 1) and attribute("MatmulDesc", product, 0,
                                                                           ctypes.c_int32) == 68
    turned = [attribute("MatmulDesc", product, number, ctypes.c_int32)
              for number in (gemm.TRANSA, gemm.TRANSB)]
    A, B = (stored(layout, pointer).T if turn else stored(layout, pointer)
            for layout, pointer,
            turn in ((first_layout, first, turned[0]), (second_layout, second, turned[1])))
    result, D = floats(A) @ floats(B), stored(d_layout, d)
    if attribute("MatmulDesc", product, gemm.EPILOGUE, ctypes.c_uint32) == gemm.ADD_BIAS:
        pointer, c_type = attribute("MatmulDesc", product, gemm.BIAS_POINTER, ctypes.c_void_p), TYPES[
            # the bias has the result's type, where nothing else is said
            attribute("MatrixLayout", d_layout, 0, ctypes.c_uint32)][1]
        result = result + floats(np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(c_type)),
                                                       (len(result),)))[:, None]
    if numbers(beta):
        result = result + floats(stored(c_layout, c))
    D[...] = bf16(result) if D.dtype == "uint16" else result


KINDS = {"float32": ("float32", "float32"), "bf16": ("uint16", "uint16"),
         "bf16 to float32": ("uint16", "float32")}


@needs_library
@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("more", [(), ("bias",), ("add",), ("bias", "add"), ("in place",)])
@pytest.mark.parametrize("M, N, K", [(3, 5, 4), (1, 7, 2), (6, 6, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_say_the_product(ta, tb, more, M, N, K, kind):
    rng, (factors, result) = np.random.default_rng(0), KINDS[kind]
    make = lambda shape, dtype: bf16(rng.standard_normal(shape)) if dtype == "uint16" else rng.standard_normal(shape).astype("float32")
    a, b, bias, add = make((M, K), factors), make((K, N), factors), make((N,), result), make((M, N), result)
    expected = floats(a) @ floats(b) + floats(bias) * ("bias" in more) + floats(add) * (more not in ((), ("bias",)))
    into = add.copy()
    given = {"bias": {"bias": bias}, "add": {"add": add}, "in place": {"add": into, "out": into}}
    with gemm.running_on(interpret):
        out = gemm.product(np.ascontiguousarray(a.T) if ta else a, np.ascontiguousarray(b.T) if tb else b,
                           ta=ta, tb=tb, dtype=result,
                           **{k: v for one in more for k, v in given[one].items()})
    assert out.dtype == result and (out is into) == ("in place" in more)
    np.testing.assert_allclose(floats(out), expected, rtol=2 ** -8 if result == "uint16" else 0, atol=1e-5)


@pytest.mark.parametrize("addresses, most",
                         [((512, 1024), 256), ((512, 16), 16), ((4, 512, 512), 4), ((768, 256), 256),
                          ((2, 3), 1)])
def test_alignment_is_what_all_have(addresses, most):
    assert gemm.common_alignment(*addresses) == most


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
        gemm.set_attribute("MatmulDesc", gemm.plan(2, 2, 2, False, False, False, False, "float32", "float32",
                                                   "fp32").product, 9999, ctypes.c_int32(0))


def test_bad_inputs_are_refused():
    a, b = np.ones((2, 3), "float32"), np.ones((4, 5), "float32")
    with refuses("product: a (2, 3), b (4, 5) transposed, bias None, add None, out None"):
        gemm.product(a, b, tb=True)
    with refuses("product: a (2, 3), b (3, 2), bias None, add (2, 3), out None"):
        gemm.product(a, np.ones((3, 2), "float32"), add=a)
    for wrong in (dict(b=np.ones((3, 2))), dict(b=np.ones((2, 3), "float32").T),
                  dict(b=np.ones((3, 2), "uint16")),
                  dict(a=np.ones((2, 3), "int32"), b=np.ones((3, 2), "int32")),
                  dict(bias=np.ones(2, "uint16"))):
        with refuses("product: contiguous matrices expected, factors both float32 or both bf16, the rest of "
                     "the result's dtype"):
            gemm.product(**{"a": a, "b": np.ones((3, 2), "float32")} | wrong)
    with refuses("precision: 'fp8', expected fp32, tf32, bf16"), gemm.precision("fp8"):
        pass
