"""Every op in float32 against itself in float64, at the same inputs: values and gradients. Nothing but
float32 comes out."""
import numpy as np
import pytest

from cases import CASES, IDS
from tinytoken import Tensor, ops
from tinytoken.backend import is_array, to_numpy

# Times the largest value. float32 has 6e-8; gelu's polynomial is right to 4e-6, at values of any size.
TOLERANCE = 1e-6
VALUES = {"gelu": 4e-6}
GRADIENTS = {"gelu": 1e-5}


def run(case, dtype, xp=np):
    """(outputs, gradients), computed in `dtype` from inputs rounded to float32."""
    arrays = [a.astype(dtype) if is_array(a) and a.dtype.kind == "f" else a
              for a in case.arrays("float32", xp)]
    return forward_and_backward(case.function(arrays), [arrays[i] for i in case.moving(arrays)])


def forward_and_backward(function, arrays):
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    result = function(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    rng = np.random.default_rng(0)
    total = 0
    for out in outputs:
        total = (out * rng.standard_normal(out.shape).astype("float32")).sum() + total
    total.backward()
    return [o.data for o in outputs], [t.grad for t in inputs]


def error(a, b):
    """The largest |a - b|, relative to the largest |b|."""
    a, b = to_numpy(a).astype("float64"), to_numpy(b)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_is_float64_rounded(case):
    values, gradients = run(case, "float32")
    exact_values, exact_gradients = run(case, "float64")
    for a, b in zip(values, exact_values, strict=True):
        assert (a.dtype, b.dtype, a.shape) == ("float32", "float64", b.shape)
        assert error(a, b) <= VALUES.get(case.name, TOLERANCE)
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, b.dtype, a.shape) == ("float32", "float64", b.shape)
            assert error(a, b) <= GRADIENTS.get(case.name, TOLERANCE)


def normal(*shape, std=1.0):
    return std * np.random.default_rng(sum(shape)).standard_normal(shape)


# At the sizes of a small model, where more numbers are added up.
@pytest.mark.parametrize("function, arrays", [
    (ops.linear, [normal(8, 65, 96), normal(384, 96, std=0.1), normal(384)]),
    (ops.layer_norm, [normal(8, 65, 96), normal(96), normal(96)]),
    (lambda x: ops.layer_norm(x + 100), [normal(4, 65, 96)]),
    (ops.softmax, [normal(64, 65, std=5)]),
    (ops.attention, [normal(2, 3, 65, 32, std=2.2), normal(2, 3, 65, 32, std=2.2), normal(2, 3, 65, 32)]),
    (lambda q, k, v: ops.attention(q, k, v, np.arange(130).reshape(2, 65) % 3 > 0),
     [normal(2, 3, 65, 32, std=2.2)] * 3),
    (ops.cross_entropy, [normal(128, 100, std=5), np.full((128, 100), 0.01)]),
], ids=["linear", "layer_norm", "layer_norm far from zero", "softmax", "attention", "attention, hard keep",
        "cross_entropy"])
def test_at_working_size(function, arrays):
    arrays = [a.astype("float32") for a in arrays]
    wide = [a.astype("float64") for a in arrays]
    results = forward_and_backward(function, arrays), forward_and_backward(function, wide)
    for single, double in zip(*results):
        for a, b in zip(single, double, strict=True):
            assert a.dtype == "float32"
            assert error(a, b) <= 2e-5


def test_gelu_is_right_to_4e_6():
    """The polynomial of backend.normal_cdf against math.erf, where it was fitted and beyond."""
    x = np.concatenate([np.linspace(-9, 9, 100_001), np.linspace(-60, 60, 2_001)]).astype("float32")
    out = ops.gelu(x)
    assert out.dtype == "float32"
    exact = ops.gelu(x.astype("float64")).data
    assert np.abs(out.data - exact)[:100_001].max() <= 4e-6
    assert np.abs(out.data - exact)[100_001:].max() <= 4e-6
