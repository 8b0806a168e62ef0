"""The kernels in bf16, and the two branches made of them, run on the CPU through the shim: against the plain ops in float64, at the
values that bf16 has. What is written as float32 agrees as float32 does; what is written as bf16 to a rounding."""
import numpy as np
import pytest

import tinytoken as tt
from emulate import BF16_NAN, Emulator, bf16, compiler, floats, numpy_product
from tinytoken import nn, ops
from tinytoken.cuda import gemm, launcher, mixed
from tinytoken.cuda.registered import rows_of, stretches

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler to run the kernels with")
ROUNDING = 2.0 ** -8


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    monkeypatch.setattr(launcher, "empty", lambda like, *shape, dtype="float32": np.full(
        shape, np.nan if dtype == "float32" else BF16_NAN, dtype))
    monkeypatch.setattr(launcher, "most_shared", lambda: 163 * 1024)
    monkeypatch.setattr(gemm, "product", numpy_product)
    with launcher.running_on(Emulator()) as found:
        yield found


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def near(found, expected, tolerance):
    found = floats(found)
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=1e-3))


def wide(array):
    return floats(array).astype("float64")


def test_rounding_is_to_nearest_even():
    x = np.array([1.0, 1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, -1e-40, 3.1415927, np.inf], "float32")
    assert floats(mixed.rounded(x)).tolist() == [1.0, 1.0, 1.015625, floats(bf16(x))[3], 3.140625, np.inf]
    assert np.array_equal(mixed.rounded(normal(33, 8)), bf16(normal(33, 8)))


@pytest.mark.parametrize("rows, width", [(1, 8), (5, 40), (9, 64), (3, 200)])
def test_norm(rows, width):
    x, weight, bias, g, past = normal(rows, width, scale=2) + 1, normal(width, seed=1), normal(width, seed=2), bf16(normal(rows, width, seed=3)), normal(
        rows, width, seed=4)
    norm = mixed.Norm(x, weight, bias, 1e-6)
    expected, vjp = ops.layer_norm.function(*map(wide, (x, weight, bias)), eps=1e-6)
    near(norm.out, expected, ROUNDING)
    found, plain = [one() for one in norm.gradients(lambda: g, past, x.shape)], [one() for one in vjp(wide(g))]
    for mine, one in zip(found, (plain[0] + past, *plain[1:])):
        near(mine, one, 1e-4)


@pytest.mark.parametrize("rows, width", [(1, 8), (40, 72), (7, 520)])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradient_of_a_branchs_end(rows, width, dropped):
    g, paths = normal(rows, width), np.array([0.0, 2.0][:1 + rows % 2 == 0] or [2.0], "float32") if dropped else None
    up = mixed.Upstream(g, paths)
    expected = wide(g) * (1 if paths is None else np.repeat(paths, rows // len(paths))[:, None])
    near(up.rounded, expected, ROUNDING)
    near(up.parts.sum(axis=0), expected.sum(axis=0), 1e-5)


@pytest.mark.parametrize("rows, width", [(1, 8), (40, 72)])
def test_gelu(rows, width):
    x, g = bf16(normal(rows, width, scale=2)), bf16(normal(rows, width, seed=1))
    expected, vjp = ops.gelu.function(wide(x))
    out, dx = (np.full_like(x, BF16_NAN) for _ in range(2))
    launcher.launch("bf16_gelu_forward", *launcher.cover(x.size // 2), x, out, x.size // 2)
    near(out, expected, ROUNDING)
    parts = stretches("bf16_gelu_backward", (x, g, dx), rows, width, each=2)
    near(dx, vjp(wide(g)), ROUNDING)
    near(parts.sum(axis=0), vjp(wide(g)).sum(axis=0), 1e-5)
    near(stretches("bf16_sum", (g,), rows, width, each=2).sum(axis=0), wide(g).sum(axis=0), 1e-5)


MASKS = {None: None, "hard": lambda rng, shape: rng.random(shape) < 0.5, "soft": lambda rng, shape: rng.random(shape),
         "none": lambda rng, shape: np.zeros(shape)}


@pytest.mark.parametrize("batch, heads, tokens, d", [(1, 1, 1, 16), (2, 2, 16, 16), (1, 2, 37, 32), (1, 1, 65, 64)])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(batch, heads, tokens, d, mask):
    qkv, g = bf16(normal(batch, tokens, 3 * heads * d, scale=1.5)), bf16(normal(batch, tokens, heads * d, seed=1))
    keep = None if mask is None else MASKS[mask](np.random.default_rng(3), (batch, tokens)).astype("float32")
    (q, k, v), split = ops.split_heads.function(wide(qkv), heads=heads, parts=3)
    expected, vjp = ops.attention.function(q, k, v, None if keep is None else wide(keep))
    merged, merge = ops.merge_heads.function(expected)
    highest, total = (np.full((batch, heads, tokens), np.nan, "float32") for _ in range(2))
    out, dqkv, dkeep = np.full_like(g, BF16_NAN), np.full_like(qkv, BF16_NAN), None if keep is None else np.full_like(highest, np.nan)
    run = lambda *given: mixed.launch_attention(batch, heads, tokens, d, *given)
    run("forward", 3, 1, qkv, keep, out, highest, total)
    near(out, merged, 2 * ROUNDING)
    assert not np.isnan(floats(out)).any() and (total > 0).all()
    run("backward", 4, 4, qkv, keep, out, g, highest, total, dqkv, dkeep)
    found = [one() if callable(one) else one for one in vjp(merge(wide(g)))]
    near(dqkv, split(*found[:3]), 3 * ROUNDING)
    if keep is not None:
        near(dkeep.sum(axis=1), found[3], 4 * ROUNDING)


def modules(D=32, heads=2):
    tt.manual_seed(0)
    block = nn.Block(D, heads, 2)
    nn.initialise(block, residual_scale=1.0)
    for n, (_, p) in enumerate(block.named_parameters()):
        p.data[...] += normal(*p.shape, seed=n, scale=0.2)
    return block


def plain_branch(x, norm, inner, paths, *more):
    """nn.residual without a kernel, in float64."""
    return nn.residual(x, norm, inner, None if paths is None else paths[:, None], 0, *more)


@pytest.mark.parametrize("which", ["attention", "attention under a mask", "mlp"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_branch_and_all_its_gradients(which, dropped, flat):
    block, x, g = modules(), normal(2, 9, 32), normal(2, 9, 32, seed=1)
    norm, inner = (block.norm2, block.mlp) if which == "mlp" else (block.norm1, block.attn)
    keep = (np.random.default_rng(0).random((2, 9)) < 0.6).astype("float32") if "mask" in which else None
    more = [] if which == "mlp" else [keep]
    paths = np.array([0.5, 2.0], "float32") if dropped else None
    params = [*norm.parameters(), *inner.parameters()]
    exact = modules().astype("float64")
    exact_norm, exact_inner = (exact.norm2, exact.mlp) if which == "mlp" else (exact.norm1, exact.attn)
    exact_params, exact_x = [*exact_norm.parameters(), *exact_inner.parameters()], tt.Tensor(wide(x), requires_grad=True)
    exact_keep = tt.Tensor(wide(keep), requires_grad=True) if keep is not None else None
    expected = plain_branch(exact_x, exact_norm, exact_inner, None if paths is None else wide(paths), *([exact_keep] if more else []))
    wanted = [exact_x, *exact_params] + ([exact_keep] if exact_keep else [])
    plain = tt.grad(expected, wanted, gradient=wide(g))

    mine_x, mine_keep = tt.Tensor(x, requires_grad=True), None if keep is None else tt.Tensor(keep, requires_grad=True)
    op, given, settings = mixed.COVERED["tinytoken.nn", type(inner).__name__](mine_x, inner, paths, *([mine_keep] if more else []))
    run = lambda: op(mine_x, norm.weight, norm.bias, *given, eps=norm.eps, **settings)
    mine_wanted = [mine_x, *params] + ([mine_keep] if mine_keep else [])
    if flat:
        storage = nn.flatten(params)
        storage.grad[...] = 1  # what is there is added to
        with mixed.Weights(storage).in_use():
            out = run()
            found = tt.grad(out, mine_wanted, gradient=g)
        assert all((one == 0).all() for one in found[1:1 + len(params)])
        found[1:1 + len(params)] = [p.grad - 1 for p in params]
    else:
        out = run()
        found = tt.grad(out, mine_wanted, gradient=g)
    near(out.data, expected.data, 2 * ROUNDING)
    for name, a, b in zip(["x", *(n for n, _ in norm.named_parameters()), *(n for n, _ in inner.named_parameters()), "keep"], found, plain):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.03 * np.abs(b).max(), err_msg=name)


def test_one_kernel_rounds_all_weights(emulator):
    block = modules()
    flat = nn.flatten(block.parameters())
    with mixed.Weights(flat).in_use():
        emulator.launches.clear()
        assert np.array_equal(mixed.rounded(block.attn.qkv.weight.data), bf16(block.attn.qkv.weight.data)) and not emulator.launches
        block.attn.qkv.weight.data += 1
    with mixed.Weights(flat).in_use():
        assert np.array_equal(mixed.rounded(block.attn.qkv.weight.data), bf16(block.attn.qkv.weight.data))
    with mixed.Weights().in_use():  # of a model that is not trained here: rounded once, and no place for gradients
        first = mixed.rounded(block.attn.qkv.weight.data)
        assert mixed.rounded(block.attn.qkv.weight.data) is first and mixed.place_of(block.attn.qkv.weight.data) is None
    assert mixed.place_of(block.attn.qkv.weight.data) is None


@pytest.mark.parametrize("why", ["fp32", "official", "trace", "a head of 24", "float64", "another class"])
def test_what_is_not_covered_is_left_to_the_plain_ops(why, monkeypatch):
    class Other(nn.Attention):
        pass
    block, x = modules(48, 2) if "24" in why else modules(), normal(1, 5, 48 if "24" in why else 32)
    monkeypatch.setattr(gemm, "library", lambda: "some")
    inner = block.attn if why != "another class" else Other(32, 2)
    more = {"official": (None, True), "trace": (None, False, [])}.get(why, ())
    with gemm.precision("fp32" if why == "fp32" else "bf16"):
        assert mixed.residual(tt.Tensor(x.astype("float64") if why == "float64" else x), block.norm1, inner, None, *more) is None
        if why == "fp32":
            with gemm.precision("bf16"):
                assert mixed.residual(tt.Tensor(x), block.norm1, inner, None) is not None
