"""LookupViT's two directions in bf16, kernels and branches, against the plain ops in float64 at the values
that bf16 has."""
import numpy as np
import pytest

import emulate
import tinytoken as tt
from test_bf16 import ROUNDING, OtherLinear, bf16_there, in_bf16, nan_like, near, normal, normal_there, wide
from tinytoken import nn, ops
from tinytoken.backend import to_numpy
from tinytoken.cuda import gemm, launcher, mixed_lookup
from tinytoken.models.lookupvit import REUSE, LookupBlock

pytestmark = pytest.mark.usefixtures("place")
SIZES = pytest.mark.parametrize("batch, heads, M, N, d", [
    (1, 1, 1, 1, 2), (2, 2, 4, 16, 8), (1, 3, 9, 37, 32), (1, 1, 5, 65, 24),
    pytest.param(1, 2, 25, 256, 64, marks=pytest.mark.slow)])


def heads_of(x, heads):
    return ops.split_heads.function(wide(x), heads=heads)[0]


def rows_of(x):
    return ops.merge_heads.function(x)[0]


@SIZES
@pytest.mark.parametrize("infused", [False, True])
def test_gather(batch, heads, M, N, d, infused):
    q, g = (bf16_there(batch, M, heads * d, seed=i, scale=1.5) for i in (0, 1))
    k, v = (bf16_there(batch, N, heads * d, seed=i) for i in (2, 3))
    g_A = normal_there(batch, heads, M, N, seed=4) if infused else None
    (expected, weights_of_it, _), vjp = ops.lookup_gather.function(*(heads_of(x, heads) for x in (q, k, v)))
    out, A, sizes = nan_like(q), launcher.empty(q, batch, heads, M, N), (heads, M, N, d // 2, d ** -0.5)
    run = lambda *given: mixed_lookup.launch(batch * heads, M, N, d, *given)
    run("lookup_gather_forward", (1, 2, 1), q, k, v, out, A, *sizes)
    near(out, rows_of(expected), 2 * ROUNDING)
    near(A, weights_of_it, 1e-5)
    grads = [nan_like(x) for x in (q, k, v)]
    run("lookup_gather_backward", (2, 2, 2), q, k, v, A, g, g_A, *grads, *sizes)
    for found, plain in zip(grads, vjp(heads_of(g, heads), None if g_A is None else wide(g_A), None)):
        near(found, rows_of(plain()), 2 * ROUNDING)


@SIZES
def test_infuse(batch, heads, M, N, d):
    v, g = bf16_there(batch, M, heads * d), bf16_there(batch, N, heads * d, seed=1)
    A = abs(normal_there(batch, heads, M, N, seed=2))
    expected, vjp = ops.lookup_infuse.function(wide(A), wide(A), heads_of(v, heads), reuse="probs")
    out, dv, dA, sizes = nan_like(g), nan_like(v), nan_like(A), (heads, M, N, d // 2)
    run = lambda *given: mixed_lookup.launch(batch * heads, M, N, d, *given)
    run("lookup_infuse_forward", (1, 0, 1), A, v, out, *sizes)
    near(out, rows_of(expected), ROUNDING)
    run("lookup_infuse_backward", (1, 1, 1), A, v, g, dv, dA, *sizes)
    of_A, _, of_v = vjp(heads_of(g, heads))
    near(dA, of_A(), 1e-5)
    near(dv, rows_of(of_v()), ROUNDING)


@pytest.mark.parametrize("rows, width", [(1, 8), (9, 64), (3, 200)])
def test_norm_of_queries_and_keys(rows, width):
    x, g = bf16_there(rows, width, scale=2), bf16_there(rows, width, seed=4)
    weight, bias = (normal_there(width, seed=i) for i in (1, 2))
    norm = mixed_lookup.Norm(x, weight, bias, 1e-6)
    expected, vjp = ops.layer_norm.function(*map(wide, (x, weight, bias)), eps=1e-6)
    near(norm.out, expected, ROUNDING)
    entries = norm.gradients(lambda: g, None, x.shape)
    for found, plain, tolerance in zip(entries, vjp(wide(g)), (ROUNDING, 1e-4, 1e-4)):
        near(emulate.gradient(found), plain(), tolerance)


def blocks(**options):
    tt.manual_seed(0)
    block = LookupBlock(32, 2, 2, **dict(reuse="probs", norm="qk") | options)
    nn.initialise(block, residual_scale=1.0)
    for n, (_, p) in enumerate(block.named_parameters()):
        p.data[...] += normal(*p.shape, seed=n, scale=0.2)
    return block


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("read", ["both", "the attention alone", "the tokens alone"])
def test_gather_and_infusion_and_all_their_gradients(dropped, flat, read):
    """What the two branches make of both kinds of tokens, without the refinement between them."""
    x, put = [normal(2, 9, 32), normal(2, 4, 32, seed=1)], emulate.place.put
    paths = np.array([[0.5, 9, 9, 2.0, 9], [2.0, 9, 9, 0.5, 9]], "float32") if dropped else None

    def run(block, make, lookup, compressed):
        """-> a scalar of what is wanted, and in `made` both kinds of tokens."""
        factors = None if paths is None else make(paths)
        gathered, A, logits = block.gather(lookup, compressed, nn.column(factors, 0))
        infused = block.infuse(lookup, gathered, A, logits, nn.column(factors, 3))
        made[:] = gathered, infused
        wanted = {"both": (gathered, infused), "the attention alone": (A,), "the tokens alone": (gathered,)}
        upstream = [make(normal(*one.shape, seed=i)) for i, one in enumerate(wanted[read], 5)]
        total, *more = [(one * g).sum() for one, g in zip(wanted[read], upstream)]
        return sum(more, total)
    leaves = lambda make: [tt.Tensor(make(one), requires_grad=True) for one in x]
    parts = ("gather", "infuse") if read == "both" else "gather"
    named = lambda block: {name: p for name, p in block.named_parameters() if name.startswith(parts)}
    used = lambda block: list(named(block).values())
    exact, made = blocks().astype("float64"), []
    given = leaves(wide)
    right = tt.grad(run(exact, wide, *given), given + used(exact))
    expected = made.copy()
    block, given = blocks().to(emulate.place.device), leaves(put)
    _, mine_of = in_bf16(lambda: run(block, put, *given), given, used(block), flat)
    found = made
    assert [one.node.op.name for one in found] == ["gather_branch", "infuse_branch"]
    for a, b in zip(found, expected):
        near(a.data, b.data, 2 * ROUNDING)
    names, layer = ["lookup", "compressed", *named(block)], lambda name: name.rpartition(".")[0]
    largest = {}  # of a layer: the bias of the keys' norm has none, no softmax sees what they have in common
    for name, one in zip(names, right):
        largest[layer(name)] = max(largest.get(layer(name), 1e-4), np.abs(one).max())
    for name, a, b in zip(names, mine_of, right):
        np.testing.assert_allclose(to_numpy(a), b, rtol=0, atol=0.04 * largest[layer(name)], err_msg=name)


COVERED = [({}, True, True), ({"norm": "pre"}, False, True), ({"reuse": "resoftmax"}, False, False),
           ({"reuse": "resoftmax", "norm": "pre"}, False, False), ({"reuse": "renorm"}, True, False),
           ({"reuse": "separate"}, True, False), ({"reuse": "none"}, True, False)]


@pytest.mark.parametrize("options, gathers, infuses", COVERED)
def test_what_is_covered(options, gathers, infuses):
    block = blocks(**options).to(emulate.place.device)
    lookup, compressed = (tt.Tensor(normal_there(*shape)) for shape in ((1, 9, 32), (1, 4, 32)))
    A = tt.Tensor(normal_there(1, 2, 4, 9))
    gather = lambda: emulate.implementation_of(LookupBlock.gather, block, lookup, compressed, None)
    infuse = lambda: emulate.implementation_of(LookupBlock.infuse, block, lookup, compressed, A, None, None)
    assert gather() is infuse() is None
    with gemm.precision("bf16"):
        assert gather() is (mixed_lookup.gather if gathers else None)
        assert infuse() is (mixed_lookup.infuse if infuses else None)
        block.gather_v = OtherLinear(32, 32)
        assert gather() is None
        if infuses:
            block.infuse_proj = nn.Linear(32, 32, bias=False)
            assert infuse() is None


def test_all_ways_to_reuse_are_among_them():
    assert {options.get("reuse", "probs") for options, *_ in COVERED} == set(REUSE)
