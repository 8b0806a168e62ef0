"""The branches of a block, each as one op, against their parts: values, gradients, dtypes, errors; and which
calls run so."""
import contextlib

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken import backend, nn
from tinytoken.models.lookupvit import LookupBlock
from tinytoken.tensor import Tensor

pytest.importorskip("numba", exc_type=ImportError)
from tinytoken.compiled import branches, launcher  # noqa: E402

pytestmark = pytest.mark.usefixtures("any_size")
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}  # times the largest value; GELU in float32 is a polynomial
DIM = 12


def drawn(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def layers(dtype, last):
    """A layer norm and attention or an MLP, with weights far from their start."""
    block = nn.Block(DIM, 3)
    for i, p in enumerate(block.parameters()):
        p.data[...] = 0.4 * drawn(*p.shape, seed=i) + (p.ndim == 1)
    block.astype(dtype)
    return (block.norm1, block.attn) if last == "attention" else (block.norm2, block.mlp)


def run(branch, norm, inner, x, g, factors=None, keep=None, **options):
    """-> output, gradients of x, of keep if there is one, and of the parameters; ops of the graph."""
    leaves = [Tensor(x, requires_grad=True)]
    if keep is not None:
        leaves.append(Tensor(keep, requires_grad=True))
        options["keep"] = leaves[1]
    names = []
    with tt.tensor.observe(lambda op, shapes: names.append(op.name)):
        out = branch(leaves[0], norm, inner, factors, **options)
    params = [*norm.parameters(), *inner.parameters()]
    return [out.data, *tt.grad(out, [*leaves, *params], gradient=g)], names


def agree(branch, dtype, covered=True, keep=None, tokens=7, layers_of=None, **options):
    norm, inner = layers_of or layers(dtype, "mlp" if branch is nn.mlp_branch else "attention")
    x, g = (drawn(2, tokens, DIM, seed=seed).astype(dtype) for seed in (3, 4))
    before = x.copy(), g.copy()
    mine, names = run(branch, norm, inner, x, g, keep=keep, **options)
    with tt.plain():
        parts, _ = run(branch, norm, inner, x, g, keep=keep, **options)
    assert (names == [branch.__name__]) == covered
    for got, wanted in zip(mine, parts, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(wanted).max()))
    assert (x == before[0]).all() and (g == before[1]).all()


both = pytest.mark.parametrize("dtype", ["float32", "float64"])


@both
@pytest.mark.parametrize("branch", [nn.mlp_branch, nn.attention_branch], ids=lambda branch: branch.__name__)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_a_branch_is_one_op_that_computes_what_its_parts_do(branch, tokens, dtype):
    agree(branch, dtype, tokens=tokens)


@both
@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_attention_under_a_mask(soft, sees_itself, dtype):
    keep = np.random.default_rng(5).random((2, 7))
    keep = (keep if soft else keep.round()).astype(dtype)
    agree(nn.attention_branch, dtype, keep=keep, sees_itself=sees_itself)


@both
def test_a_qkv_without_a_bias(dtype):
    norm, _ = layers(dtype, "attention")
    inner = nn.Attention(DIM, 3, qkv_bias=False).astype(dtype)
    for i, p in enumerate(inner.parameters()):
        p.data[...] = 0.4 * drawn(*p.shape, seed=i)
    agree(nn.attention_branch, dtype, layers_of=(norm, inner))


class Other(nn.Linear):
    """A layer that may compute something else."""


def test_what_runs_as_its_parts():
    norm, mlp = layers("float32", "mlp")
    agree(nn.mlp_branch, "float32", covered=False, factors=np.ones(2, "float32"))
    mlp.fc2 = Other(4 * DIM, DIM)
    agree(nn.mlp_branch, "float32", covered=False, layers_of=(norm, mlp))
    norm, attn = layers("float32", "attention")
    agree(nn.attention_branch, "float32", covered=False, official=True, keep=np.ones((2, 7), "float32"))
    agree(nn.attention_branch, "float32", covered=False, attention=[])
    attn.q_norm, attn.k_norm = nn.LayerNorm(DIM // 3), nn.LayerNorm(DIM // 3)
    agree(nn.attention_branch, "float32", covered=False, layers_of=(norm, attn))


def test_small_ones_run_as_their_parts(monkeypatch):
    monkeypatch.setattr(launcher, "LEAST", 4096)
    norm, mlp = layers("float32", "mlp")
    x = Tensor(np.zeros(((4096 - mlp.fc1.weight.size) // DIM // 2 + 1, 2, DIM), "float32"))
    assert backend.faster(nn.mlp_branch, np, x, norm, mlp) is branches.mlp_as_one
    assert backend.faster(nn.mlp_branch, np, Tensor(x.data[1:]), norm, mlp) is None


def test_wrong_arguments_are_refused_as_by_the_parts():
    norm, mlp = layers("float32", "mlp")
    x = Tensor(np.zeros((2, 3, DIM + 1), "float32"))
    with refuses(f"layer_norm: weight ({DIM},) for x (2, 3, {DIM + 1}): expected ({DIM + 1},)"):
        nn.mlp_branch(x, norm, mlp)
    norm, attn = layers("float32", "attention")
    with refuses("attention: keep (2, 3) for k (2, 3, 5, 4): expected (B, Tk)"):
        nn.attention_branch(Tensor(np.zeros((2, 5, DIM), "float32")), norm, attn,
                            keep=np.ones((2, 3), "float32"))


def test_multiply_adds_are_those_of_the_parts():
    for branch, last in ((nn.mlp_branch, "mlp"), (nn.attention_branch, "attention")):
        totals, (norm, inner) = [], layers("float32", last)
        for context in (backend.using_implementations(None), tt.plain()):
            counts = []
            with context, tt.tensor.observe(lambda op, shapes: counts.append(op.multiply_adds(shapes))):
                branch(Tensor(np.zeros((2, 7, DIM), "float32")), norm, inner)
            totals.append((len(counts), sum(counts)))
        assert totals[0][0] == 1 < totals[1][0] and totals[0][1] == totals[1][1] > 0


# The two directions of a LookupBlock, in inference

READINGS = [("pre", "resoftmax"), ("qk", "probs"), ("pre", "renorm")]


def lookup_block(norm, reuse, dtype="float32"):
    block = LookupBlock(DIM, 3, norm=norm, reuse=reuse)
    for i, p in enumerate(block.parameters()):
        p.data[...] = 0.4 * drawn(*p.shape, seed=i) + (p.ndim == 1)
    return block.astype(dtype)


def both_directions(block, dtype="float32", **options):
    """-> arrays of gather and infuse, and the names of the ops that ran."""
    lookup, compressed = (Tensor(drawn(2, n, DIM).astype(dtype)) for n in (16, 4))
    names = []
    with tt.tensor.observe(lambda op, shapes: names.append((op.name, op.multiply_adds(shapes)))):
        small, A, logits = block.gather(lookup, compressed, **options)
        large = block.infuse(lookup, small, A, logits, **options)
    return [small.data, A.data, logits.data, large.data], names


@both
@pytest.mark.parametrize("norm, reuse", READINGS)
def test_gather_and_infuse_are_one_op_each_in_inference(norm, reuse, dtype):
    block = lookup_block(norm, reuse, dtype)
    with tt.no_grad():
        mine, ops_run = both_directions(block, dtype)
        with tt.plain():
            parts, parts_run = both_directions(block, dtype)
    assert [name for name, _ in ops_run] == ["gather", "infuse"]
    assert sum(macs for _, macs in ops_run) == sum(macs for _, macs in parts_run) > 0
    for got, wanted in zip(mine, parts, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


def test_gather_and_infuse_run_as_their_parts_in_training():
    block = lookup_block("pre", "probs")
    factors = {"factors": np.ones(2, "float32")}
    for context, options in ((contextlib.nullcontext(), {}), (tt.no_grad(), factors)):
        with context:
            names = [name for name, _ in both_directions(block, **options)[1]]
        assert "lookup_gather" in names and "lookup_infuse" in names
