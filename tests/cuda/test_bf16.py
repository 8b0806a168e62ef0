"""The kernels in bf16, and the two branches made of them, against the plain ops in float64, at the values
that bf16 has. What is written as float32 agrees as float32 does; what is written as bf16 to a rounding."""
import numpy as np
import pytest

import emulate
import tinytoken as tt
from emulate import bf16, floats
from tinytoken import nn, ops
from tinytoken.backend import to_numpy, using_implementations
from tinytoken.cuda import gemm, launcher, mixed, registered, weights
from tinytoken.cuda.gradients import Sums

pytestmark = pytest.mark.usefixtures("place")
ROUNDING = 2.0 ** -8


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def near(found, expected, tolerance):
    found = floats(to_numpy(found))
    assert found.shape == np.shape(expected)
    largest = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * largest)


def wide(array):
    return floats(to_numpy(array)).astype("float64")


def normal_there(*shape, **more):
    return emulate.place.put(normal(*shape, **more))


def bf16_there(*shape, **more):
    return emulate.place.put(bf16(normal(*shape, **more)))


def nan_like(array):
    """The same, as a kernel finds what it is to write."""
    return launcher.empty(array, *array.shape, dtype=array.dtype.name)


def test_rounding_is_to_nearest_even():
    x = np.array([1.0, 1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, -1e-40, 3.1415927, np.inf], "float32")
    expected = [1.0, 1.0, 1.015625, floats(bf16(x))[3], 3.140625, np.inf]
    assert floats(to_numpy(weights.rounded(emulate.place.put(x)))).tolist() == expected
    assert np.array_equal(to_numpy(weights.rounded(normal_there(33, 8))), bf16(normal(33, 8)))


@pytest.mark.parametrize("rows, width", [(1, 8), (5, 40), (9, 64), (3, 200)])
def test_norm(rows, width):
    x, past = normal_there(rows, width, scale=2) + 1, normal_there(rows, width, seed=3)
    g, (weight, bias) = bf16_there(rows, width, seed=4), (normal_there(width, seed=i) for i in (1, 2))
    norm = mixed.Norm(x, weight, bias, 1e-6)
    expected, vjp = ops.layer_norm.function(*map(wide, (x, weight, bias)), eps=1e-6)
    near(norm.out, expected, ROUNDING)
    found = [emulate.gradient(one) for one in norm.gradients(lambda: g, past, x.shape)]
    plain = [one() for one in vjp(wide(g))]
    for mine, one in zip(found, (plain[0] + to_numpy(past), *plain[1:])):
        near(mine, one, 1e-4)


@pytest.mark.parametrize("rows, width", [(1, 8), (40, 72), (7, 520)])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradient_of_a_branchs_end(rows, width, dropped):
    g = normal_there(rows, width)
    paths = np.array([2.0, 0.0][:1 + (rows % 2 == 0)], "float32") if dropped else None
    up = mixed.Upstream(g, emulate.place.put(paths), normal_there(width))
    expected = wide(g) * (1 if paths is None else np.repeat(paths, rows // len(paths))[:, None])
    near(up.rounded, expected, ROUNDING)
    near(emulate.gradient(up.of_bias), expected.sum(axis=0), 1e-4)


@pytest.mark.parametrize("rows, width", [(1, 8), (40, 72)])
def test_gelu(rows, width):
    x, g = bf16_there(rows, width, scale=2), bf16_there(rows, width, seed=1)
    expected, vjp = ops.gelu.function(wide(x))
    out, dx = nan_like(x), nan_like(x)
    launcher.launch("bf16_gelu_forward", *launcher.cover(x.size // 2), x, out, x.size // 2)
    near(out, expected, ROUNDING)
    sums = Sums(normal_there(width)).run("bf16_gelu_backward", (x, g, dx), rows, width)
    near(dx, vjp(wide(g)), ROUNDING)
    near(sums.totals[0], vjp(wide(g)).sum(axis=0), 1e-5)
    near(Sums(normal_there(width)).run("bf16_sum", (g,), rows, width).totals[0], wide(g).sum(axis=0), 1e-5)


MASKS = {None: None, "hard": lambda rng, shape: rng.random(shape) < 0.5,
         "soft": lambda rng, shape: rng.random(shape), "none": lambda rng, shape: np.zeros(shape)}


@pytest.mark.parametrize("batch, heads, tokens, d", [
    (1, 1, 1, 16), (2, 2, 16, 16), (1, 2, 37, 32), (1, 1, 65, 64),
    pytest.param(1, 1, 257, 64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", MASKS)
def test_attention(batch, heads, tokens, d, mask):
    qkv, g = bf16_there(batch, tokens, 3 * heads * d, scale=1.5), bf16_there(batch, tokens, heads * d, seed=1)
    keep = None
    if mask is not None:
        keep = emulate.place.put(MASKS[mask](np.random.default_rng(3), (batch, tokens)).astype("float32"))
    (q, k, v), split = ops.split_heads.function(wide(qkv), heads=heads, parts=3)
    expected, vjp = ops.attention.function(q, k, v, None if keep is None else wide(keep))
    merged, merge = ops.merge_heads.function(expected)
    highest, total = (launcher.empty(g, batch, heads, tokens) for _ in range(2))
    out, dqkv, dkeep = nan_like(g), nan_like(qkv), None if keep is None else nan_like(highest)
    run = lambda *given: mixed.launch_attention(batch, heads, tokens, d, *given)
    run("forward", 3, 1, qkv, keep, out, highest, total)
    near(out, merged, 2 * ROUNDING)
    assert (to_numpy(total) > 0).all()
    run("backward", 4, 4, qkv, keep, out, g, highest, total, dqkv, dkeep)
    found = [one() if callable(one) else one for one in vjp(merge(wide(g)))]
    near(dqkv, split(*found[:3]), 3 * ROUNDING)
    if keep is not None:
        near(dkeep.sum(axis=1), found[3], 4 * ROUNDING)


def test_a_keep_that_bf16_cannot_hold_is_none():
    """Though the key towers over the others, whose shares of the sum are subnormal, too."""
    qkv, keep = np.zeros((1, 5, 3, 16), "float32"), np.array([[1e-39, 1, 1, 0, 1]], "float32")
    qkv[0, :, 0, 0], qkv[0, 0, 1, 0], qkv[0, :, 2] = 10, 40, normal(5, 16)
    there = emulate.place.put(emulate.bf16(qkv.reshape(1, 5, 48)))
    g, highest, total = bf16_there(1, 5, 16, seed=1), *(launcher.empty(there, 1, 1, 5) for _ in range(2))
    out, dqkv, dkeep = nan_like(g), nan_like(there), nan_like(highest)
    (q, k, v), split = ops.split_heads.function(wide(there), heads=1, parts=3)
    expected, vjp = ops.attention.function(q, k, v, np.where(keep < 0.5, 0, 1.0))
    run = lambda *given: mixed.launch_attention(1, 1, 5, 16, *given)
    run("forward", 3, 1, there, emulate.place.put(keep), out, highest, total)
    near(out, expected[:, 0], 2 * ROUNDING)
    run("backward", 4, 4, there, emulate.place.put(keep), out, g, highest, total, dqkv, dkeep)
    found = [one() if callable(one) else one for one in vjp(wide(g)[:, None])]
    near(dqkv, split(*found[:3]), 3 * ROUNDING)
    near(dkeep.sum(axis=1), found[3], 4 * ROUNDING)


def modules(D=32, heads=2):
    tt.manual_seed(0)
    block = nn.Block(D, heads, 2)
    nn.initialise(block, residual_scale=1.0)
    for n, (_, p) in enumerate(block.named_parameters()):
        p.data[...] += normal(*p.shape, seed=n, scale=0.2)
    return block


def in_bf16(run, leaves, params, flat, gradient=None):
    """(run(), the gradients of what it gives with respect to leaves and params), by the kernels in bf16.
    flat: as in a step, where those of the params are added to what lies in flat storage."""
    with using_implementations("cupy"), gemm.precision("bf16"):
        if not flat:
            out = run()
            return out, tt.grad(out, leaves + params, gradient=gradient)
        storage = nn.flatten(params)
        storage.grad[...] = 1
        into = [0 * leaf.data for leaf in leaves]
        with weights.Weights(storage).in_use():
            out = run()
            tt.grad(out, leaves + params, into + storage.grads, gradient=gradient, add=True)
        return out, into + [g - 1 for g in storage.grads]


@pytest.mark.parametrize("which", ["attention", "attention under a mask", "mlp"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_branch_and_all_its_gradients(which, dropped, flat):
    x, g, put = normal(2, 9, 32), normal(2, 9, 32, seed=1), emulate.place.put
    keep = (np.random.default_rng(0).random((2, 9)) < 0.6).astype("float32") if "mask" in which else None
    paths = np.array([0.5, 2.0], "float32") if dropped else None

    branch = nn.mlp_branch if which == "mlp" else nn.attention_branch

    def parts(block):
        return (block.norm2, block.mlp) if which == "mlp" else (block.norm1, block.attn)

    def leaves(make):
        return [tt.Tensor(make(one), requires_grad=True) for one in (x, keep) if one is not None]

    def run(make, leaves, *modules):
        masked = {"keep": leaves[1]} if leaves[1:] else {}
        return branch(leaves[0], *modules, None if paths is None else make(paths), **masked)
    norm, inner = parts(modules().astype("float64"))
    exact = leaves(wide)
    expected = run(wide, exact, norm, inner)
    plain = tt.grad(expected, [*exact, *norm.parameters(), *inner.parameters()], gradient=wide(g))

    norm, inner = parts(modules().to(emulate.place.device))
    mine, params = leaves(put), [*norm.parameters(), *inner.parameters()]
    out, found = in_bf16(lambda: run(put, mine, norm, inner), mine, params, flat, put(g))
    assert out.node.op.name == branch.__name__  # one op
    near(out.data, expected.data, 2 * ROUNDING)
    parts = (("norm", norm), ("inner", inner))
    names = ["x", "keep"][:len(mine)]
    names += [f"{part}.{n}" for part, module in parts for n, _ in module.named_parameters()]
    for name, a, b in zip(names, found, plain):
        np.testing.assert_allclose(to_numpy(a), b, rtol=0, atol=0.03 * np.abs(b).max(), err_msg=name)


def test_one_kernel_rounds_all_weights(place):
    block = modules().to(place.device)
    weight = block.attn.qkv.weight
    right = lambda: np.array_equal(to_numpy(weights.rounded(weight.data)), bf16(to_numpy(weight.data)))
    flat = nn.flatten(block.parameters())
    with gemm.precision("bf16"), weights.Weights(flat).in_use():
        place.launches.clear()
        assert right() and not place.launches
        weight.data += 1
    with gemm.precision("bf16"), weights.Weights(flat).in_use():
        assert right()
    with weights.Weights().in_use():  # of a model that is not trained here: rounded once
        first = weights.rounded(weight.data)
        assert right() and weights.rounded(weight.data) is first


class OtherAttention(nn.Attention):
    pass


class OtherLinear(nn.Linear):
    pass


@pytest.mark.parametrize("why", [
    "fp32", "tf32", "official", "sees not itself", "the weights are asked for", "a head of 24", "float64",
    "another class", "another norm", "another layer", "no bias"])
def test_what_is_not_covered_is_left_to_the_plain_ops(why):
    block, width = (modules(48, 2), 48) if "24" in why else (modules(), 32)
    block.attn = OtherAttention(32, 2) if why == "another class" else block.attn
    block.norm1 = nn.LayerNorm(32) if why != "another norm" else type("OtherNorm", (nn.LayerNorm,), {})(32)
    block.attn.qkv = OtherLinear(32, 96) if why == "another layer" else block.attn.qkv
    block.attn.proj = nn.Linear(32, 32, bias=False) if why == "no bias" else block.attn.proj
    x = tt.Tensor(normal_there(1, 5, width).astype("float64" if why == "float64" else "float32"))
    keep = emulate.place.put(np.ones((1, 5), "float32"))
    more = {"official": {"keep": keep, "official": True},
            "sees not itself": {"keep": keep, "sees_itself": False},
            "the weights are asked for": {"attention": []}}.get(why, {})
    branch = nn.attention_branch, x, block.norm1, block.attn, None
    covered = lambda **more: emulate.implementation_of(*branch, **more)
    with gemm.precision(why if why in ("fp32", "tf32") else "bf16"):
        assert covered(**more) is None
    if more or why in ("fp32", "tf32"):
        with gemm.precision("bf16"):
            assert covered() is covered(keep=keep) is mixed.attention_as_one


def test_the_mlps_that_are_not_covered():
    x, norm = tt.Tensor(normal_there(1, 5, 32)), nn.LayerNorm(32)
    covered = lambda mlp, norm=norm: emulate.implementation_of(nn.mlp_branch, x, norm, mlp, None)
    other, subclass = nn.MLP(32, 64), type("OtherMLP", (nn.MLP,), {})
    other.fc2 = OtherLinear(64, 32)
    assert covered(nn.MLP(32, 64)) is None  # in float32
    with gemm.precision("bf16"):
        assert covered(nn.MLP(32, 64)) is mixed.mlp_as_one
        assert covered(nn.MLP(32, 63)) is covered(other) is covered(subclass(32, 64)) is None


@tt.op
def kernel_norm(x, weight, bias):
    return registered.layer_norm(x, weight, bias)


def test_sums_of_a_step_are_those_of_its_pass():
    """A norm that runs twice in a pass, one that ran in the pass before only, and passes of other sizes."""
    first, second = (nn.LayerNorm(32).to(emulate.place.device) for _ in range(2))
    params = first.parameters() + second.parameters()
    storage = nn.flatten(params)
    step = weights.Weights(storage)
    for norms, rows in (((first, second), 9), ((second, second), 40), ((first,), 3), ((first, second), 9)):
        x, g = normal_there(rows, 32, seed=rows), normal_there(rows, 32, seed=rows + 1)

        def run(into=None):
            out = tt.Tensor(x)
            for norm in norms:
                out = kernel_norm(out, norm.weight, norm.bias)
            return tt.grad(out, params, into, gradient=g)
        expected = [to_numpy(one) for one in run()]
        storage.grad[...] = 0
        with step.in_use():
            run(storage.grads)
        for p, one in zip(params, expected):
            np.testing.assert_allclose(to_numpy(p.grad), one, rtol=0, atol=1e-5 * max(1, np.abs(one).max()))


def test_a_gradient_within_a_step_is_no_part_of_the_steps(place):
    """A task may take a gradient of its own, of the pictures say, before the one that the step is for."""
    block = modules().to(place.device)
    params = [*block.norm1.parameters(), *block.attn.parameters()]
    storage, g = nn.flatten(params), normal_there(2, 9, 32, seed=1)
    x = tt.Tensor(normal_there(2, 9, 32), requires_grad=True)

    def run(*wanted, **more):
        return tt.grad(nn.attention_branch(x, block.norm1, block.attn), wanted, gradient=g, **more)
    with using_implementations("cupy"), gemm.precision("bf16"):
        expected, storage.grad[...] = [to_numpy(one) for one in run(x, *params)], 0
        step = weights.Weights(storage)
        for _ in range(2):
            storage.grad[...] = 0
            with step.in_use():
                within = run(x) + run(*params) + run(params[-1])
                run(*params, into=storage.grads, add=True)
            for found, one in zip([*within[:1], *storage.grads], expected):
                np.testing.assert_allclose(to_numpy(found), one, rtol=0, atol=1e-5)
            for found, one in zip(within[1:], [*expected[1:], expected[-1]]):
                np.testing.assert_allclose(to_numpy(found), one, rtol=0, atol=1e-5)
