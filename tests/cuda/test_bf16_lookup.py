"""LookupViT's two directions in bf16, kernels and branches, against the plain ops in float64 at the values that bf16 has."""
import numpy as np
import pytest

import emulate
import tinytoken as tt
from test_bf16 import ROUNDING, bf16_there, nan_like, near, normal, normal_there, wide
from tinytoken import nn, ops
from tinytoken.backend import to_numpy
from tinytoken.cuda import gemm, launcher, mixed_lookup, weights
from tinytoken.models.lookupvit import LookupBlock

pytestmark = pytest.mark.usefixtures("place")
SIZES = pytest.mark.parametrize("batch, heads, M, N, d", [(1, 1, 1, 1, 2), (2, 2, 4, 16, 8), (1, 3, 9, 37, 32), (1, 1, 5, 65, 24),
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
    v, g, A = bf16_there(batch, M, heads * d), bf16_there(batch, N, heads * d, seed=1), abs(normal_there(batch, heads, M, N, seed=2))
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
    for found, plain, tolerance in zip(norm.gradients(lambda: g, None, x.shape), vjp(wide(g)), (ROUNDING, 1e-4, 1e-4)):
        near(found(), plain(), tolerance)


def blocks(**options):
    tt.manual_seed(0)
    block = LookupBlock(32, 2, 2, **options)
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

    def plain(block, lookup, compressed):
        out, A, logits = block.gather(lookup, compressed)
        gathered = compressed + nn.branch(block.gather_proj(ops.merge_heads(out)), None if paths is None else wide(paths), 0)
        return gathered, lookup + nn.branch(block.infuse(lookup, gathered, A, logits), None if paths is None else wide(paths), 3), A

    def mine(block, lookup, compressed):
        with gemm.precision("bf16"):
            gathered, A = mixed_lookup.gather(lookup, compressed, block, put(paths))
            return gathered, mixed_lookup.infuse(lookup, gathered, A, block, put(paths)), A

    def gradients(function, block, make, params):
        leaves = [tt.Tensor(make(one), requires_grad=True) for one in x]
        gathered, infused, A = function(block, *leaves)
        wanted = {"both": (gathered, infused), "the attention alone": (A,), "the tokens alone": (gathered,)}[read]
        total, *more = [(one * make(normal(*one.shape, seed=i))).sum() for i, one in enumerate(wanted, 5)]
        for one in more:
            total = total + one
        return (gathered, infused), tt.grad(total, leaves + params)

    used = lambda block: [p for name, p in block.named_parameters() if name.startswith(("gather", "infuse") if read == "both" else "gather")]
    exact = blocks().astype("float64")
    expected, right = gradients(plain, exact, wide, used(exact))
    block = blocks().to(emulate.place.device)
    if flat:
        storage = nn.flatten(used(block))
        storage.grad[...] = 1
        with gemm.precision("bf16"), weights.Weights(storage).in_use():
            found, mine_of = gradients(mine, block, put, used(block))
        mine_of = mine_of[:2] + [p.grad - 1 for p in used(block)]
    else:
        found, mine_of = gradients(mine, block, put, used(block))
    for a, b in zip(found, expected):
        near(a.data, b.data, 2 * ROUNDING)
    names = ["lookup", "compressed", *(name for name, p in block.named_parameters() if any(p is one for one in used(block)))]
    largest = {}  # of a layer: the bias of the norm of the keys has none, since no softmax sees what is the same for all keys
    for name, one in zip(names, right):
        largest[name.rpartition(".")[0]] = max(largest.get(name.rpartition(".")[0], 1e-4), np.abs(one).max())
    for name, a, b in zip(names, mine_of, right):
        np.testing.assert_allclose(to_numpy(a), b, rtol=0, atol=0.04 * largest[name.rpartition(".")[0]], err_msg=name)


@pytest.mark.parametrize("options, gathers, infuses", [
    ({}, True, True), ({"norm": "pre"}, False, True), ({"reuse": "resoftmax"}, False, False), ({"reuse": "renorm"}, True, False),
    ({"reuse": "separate"}, True, False)])
def test_what_is_covered(options, gathers, infuses):
    block = blocks(**options).to(emulate.place.device)
    lookup, compressed, A = (tt.Tensor(normal_there(*shape)) for shape in ((1, 9, 32), (1, 4, 32), (1, 2, 4, 9)))
    assert mixed_lookup.gather(lookup, compressed, block, None) is None and mixed_lookup.infuse(lookup, compressed, A, block, None) is None
    with gemm.precision("bf16"):
        assert (mixed_lookup.gather(lookup, compressed, block, None) is not None) == gathers
        assert (mixed_lookup.infuse(lookup, compressed, A, block, None) is not None) == infuses
