"""Each kernel against the plain op it stands for, in float64: values and gradients, tails and masks."""
import pathlib

import numpy as np
import pytest

import emulate
from tinytoken import ops
from tinytoken.backend import to_numpy, using_implementations
from tinytoken.cuda import launcher, registered
from tinytoken.graph import Into

pytestmark = pytest.mark.usefixtures("place")


def agree(op, *arrays, tolerance=2e-5, upstream_of=None, covered=True, **settings):
    """The implementation's outputs and gradients equal the plain op's in float64. covered: whether there is
    one for these arrays; if not, the plain op runs."""
    host = [to_numpy(a) if hasattr(a, "dtype") else a for a in arrays]
    wide = [a.astype("float64") if getattr(a, "dtype", None) == "float32" else a for a in host]
    there = [emulate.place.put(a) for a in arrays]
    implementation = emulate.implementation_of(op, *there, **settings)
    assert (implementation is not None) == covered
    mine, my_vjp = (implementation or op.function)(*there, **settings)
    plain, plain_vjp = op.function(*wide, **settings)
    rng = np.random.default_rng(5)
    several = isinstance(plain, tuple)
    pairs = list(zip(mine, plain)) if several else [(mine, plain)]
    for a, b in pairs:
        close(a, b, tolerance)
    upstream = [rng.standard_normal(np.shape(p)) for _, p in pairs]
    if upstream_of is not None:
        upstream = [g if i in upstream_of else None for i, g in enumerate(upstream)]
    given = [[None if g is None else put(np.asarray(g, dtype)) for g in upstream] for dtype, put in (
        ("float32", emulate.place.put), ("float64", lambda g: g))]
    mine, plain = (entries(vjp(*g)) for vjp, g in zip((my_vjp, plain_vjp), given))
    assert len(mine) == len(plain) or len(plain) > len(mine)
    for _, a, b in (entry for entry in zip(host, mine, plain) if entry[0] is not None):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b, tolerance)


def entries(result):
    return [emulate.gradient(one) for one in (result if isinstance(result, tuple) else (result,))]


def close(a, b, tolerance):
    assert a.shape == np.shape(b) and a.dtype == "float32"
    largest = np.abs(b).max(initial=1.0, where=np.isfinite(b))
    np.testing.assert_allclose(to_numpy(a), b, rtol=0, atol=tolerance * largest)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def normal_there(*shape, **more):
    return emulate.place.put(normal(*shape, **more))


@pytest.mark.parametrize("shape, outputs", [((1, 1), 1), ((3, 7, 5), 40), ((700, 3), 33)])
def test_linear(shape, outputs):
    weight, bias = normal(outputs, shape[-1], seed=1), normal(outputs, seed=2)
    agree(ops.linear, normal(*shape), weight, bias)
    agree(ops.linear, normal(*shape), weight)
    turned = normal(*shape[::-1]).T if len(shape) == 2 else normal(*shape)
    agree(ops.linear, turned, normal(shape[-1], outputs, seed=1).T, bias)


@pytest.mark.parametrize("shape", [(1,), (7, 37), (256,), (257,), (2, 3, 100)])
def test_gelu(shape):
    agree(ops.gelu, normal(*shape, scale=3))


def test_gelu_of_a_transposed_array():
    agree(ops.gelu, normal(5, 6).T)


@pytest.mark.parametrize("rows, width", [(1, 1), (5, 31), (9, 32), (4, 96), (33, 100), (6, 384)])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
def test_layer_norm(rows, width, given):
    weight, bias = (normal(width, seed=i) if there else None for i, there in enumerate(given, 1))
    arrays = [normal(rows, width, scale=2) + 3] + [p for p in (weight, bias)]
    agree(ops.layer_norm, *arrays, tolerance=5e-5 if width > 1 else 1e-3, covered=given[0] == given[1])


SIZES = [(1, 1, 1, 1, 1), (2, 2, 5, 5, 4), (1, 2, 33, 33, 8), (2, 1, 9, 20, 32), (1, 1, 65, 65, 16),
         (1, 1, 3, 40, 33)]


@pytest.mark.parametrize("batch, heads, queries, tokens, d", SIZES)
@pytest.mark.parametrize("weights", [False, True])
def test_attention_without_a_mask(batch, heads, queries, tokens, d, weights):
    q = normal(batch, heads, queries, d, scale=2)
    k, v = (normal(batch, heads, tokens, d, seed=i) for i in (1, 2))
    agree(ops.attention, q, k, v, weights=weights)


MASKS = {"hard": lambda rng, shape: rng.random(shape) < 0.5, "soft": lambda rng, shape: rng.random(shape),
         "one": lambda rng, shape: np.arange(shape[1]) == 0 * np.ones(shape),
         "none": lambda rng, shape: np.zeros(shape)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("spread", [1, 20])
def test_attention_under_a_mask(mask, sees_itself, spread):
    keep = MASKS[mask](np.random.default_rng(3), (2, 37)).astype("float32")
    arrays = [normal(2, 2, 37, 8, seed=i, scale=spread ** 0.5) for i in range(3)]
    agree(ops.attention, *arrays, keep, sees_itself=sees_itself, tolerance=1e-4 if spread == 1 else 3e-3)


@pytest.mark.parametrize("low", [-2e30, -1e37])
def test_attention_at_scores_as_low_as_numbers_go(low):
    """The gradients of v and keep, too; those of q and k are rounding errors times such numbers."""
    keep, g = np.array([[1, 0, 1, 0]], "float32"), normal(1, 2, 4, 3, seed=1)
    arrays = [np.full((1, 2, 4, 1), value, "float32") for value in (1, low)] + [normal(1, 2, 4, 3), keep]
    arrays[:2] = (np.pad(a, ((0, 0), (0, 0), (0, 0), (0, 2))) for a in arrays[:2])
    there = [emulate.place.put(a) for a in arrays]
    out, vjp = emulate.implementation_of(ops.attention, *there, sees_itself=False)(*there, sees_itself=False)
    _, _, of_v, of_keep = entries(vjp(emulate.place.put(g)))
    plain, plain_vjp = ops.attention.function(*(a.astype("float64") for a in arrays), sees_itself=False)
    close(out, np.tile(arrays[2][:, :, ::2].mean(axis=2, keepdims=True, dtype="float64"), (1, 1, 4, 1)), 1e-6)
    close(out, plain, 1e-6)
    _, _, plain_of_v, plain_of_keep = entries(plain_vjp(g.astype("float64")))
    close(of_v, plain_of_v, 1e-6)
    close(of_keep, plain_of_keep, 1e-5)


@pytest.mark.parametrize("keep", [None, 1, 0.5])
def test_attention_at_scores_of_minus_infinity(keep):
    """Those of two keys; those of all; forward, since the gradient of q is a product with k."""
    q, v = np.ones((1, 1, 4, 1), "float32"), normal(1, 1, 4, 1)
    for left in ([1, 2], []):
        k = np.full((1, 1, 4, 1), -np.inf, "float32")
        k[:, :, left] = 0
        arrays = [q, k, v] + ([] if keep is None else [np.full((1, 4), keep, "float32")])
        there = [emulate.place.put(a) for a in arrays]
        op = emulate.implementation_of(ops.attention, *there, sees_itself=False)
        out, _ = op(*there, sees_itself=False)
        close(out, np.full((1, 1, 4, 1), v[0, 0, left].mean() if left else 0, "float64"), 1e-6)


@pytest.mark.parametrize("sees_itself", [True, False])
def test_attention_under_keeps_that_float32_hardly_holds(sees_itself):
    """As the plain op in float32: from there on the slope toward keep is limited."""
    q, k, v, g = (emulate.place.put(normal(1, 2, 6, 4, seed=i)) for i in range(4))
    keep = emulate.place.put(np.full((1, 6), 1e-39, "float32"))
    for op in (emulate.implementation_of(ops.attention, q, k, v, keep, sees_itself=sees_itself),):
        (mine, my_vjp), (plain, plain_vjp) = (f(q, k, v, keep, sees_itself=sees_itself)
                                              for f in (op, ops.attention.function))
        close(mine, to_numpy(plain), 1e-5)
        for a, b in zip(entries(my_vjp(g)), entries(plain_vjp(g)), strict=True):
            assert np.isfinite(to_numpy(a)).all()
            close(a, to_numpy(b), 1e-4)


def test_attention_reads_the_parts_of_a_packed_qkv_where_they_are(place):
    q, k, v = ops.split_heads.function(place.put(normal(2, 10, 3 * 2 * 4)), heads=2, parts=3)[0]
    assert not q.flags.c_contiguous and registered.strided(q)[0] is q
    agree(ops.attention, q, k, v)
    agree(ops.attention, q.swapaxes(-1, -2), k.swapaxes(-1, -2), v.swapaxes(-1, -2))  # these are copied


def test_attention_that_does_not_fit_or_is_official_is_the_plain_op(place, monkeypatch):
    monkeypatch.setattr(launcher, "most_shared", lambda: 99 * 1024)
    big, small = normal_there(1, 1, 200, 64), normal_there(1, 1, 5, 4)
    keep = place.put(np.ones((1, 5), "float32"))
    assert registered.fits(big, big, big) is False
    with using_implementations("cupy"):
        ops.attention(big, big, big)
        ops.attention(small, small, small, keep, official=True)
        assert place.launches == []
        ops.attention(small, small, small, keep)
    assert [name for name, *_ in place.launches] == ["attention_forward"] * len(place.launches) != []


@pytest.mark.parametrize("upstream_of", [(0,), (1,), (2,), (0, 1, 2)])
def test_lookup_gather(upstream_of):
    q, (k, v) = normal(2, 2, 9, 8), (normal(2, 2, 33, 8, seed=i) for i in (1, 2))
    agree(ops.lookup_gather, q, k, v, upstream_of=upstream_of)


@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax"])
@pytest.mark.parametrize("batch, heads, M, N, d", [(1, 1, 1, 1, 1), (2, 2, 9, 33, 8), (1, 3, 4, 64, 5)])
def test_lookup_infuse(reuse, batch, heads, M, N, d):
    logits = normal(batch, heads, M, N, scale=2)
    A = ops.softmax.function(logits)[0]
    if N > 40:
        A[..., 3] = 0  # a column that underflowed
    agree(ops.lookup_infuse, A, logits, normal(batch, heads, M, d, seed=1), reuse=reuse, tolerance=2e-4)


@pytest.mark.parametrize("shape, patch", [((1, 1, 1, 1), 1), ((2, 3, 8, 8), 4), ((3, 3, 6, 10), 2)])
def test_patchify(shape, patch):
    agree(ops.patchify, normal(*shape), patch=patch)


@pytest.mark.parametrize("grid, size", [
    ((4, 4), (2, 2)), ((3, 5), (2, 3)), ((1, 1), (1, 1)), ((2, 3), (4, 4))])
@pytest.mark.parametrize("antialias", [True, False])
def test_resize(grid, size, antialias):
    agree(ops.resize, normal(3, grid[0] * grid[1], 7), grid=grid, size=size, antialias=antialias)


@pytest.mark.parametrize("shape", [(1, 2), (3, 37, 2), (5, 3, 7)])
@pytest.mark.parametrize("tau, hard", [(1.0, True), (1.0, False), (0.3, True), (2.0, False)])
def test_gumbel_softmax(shape, tau, hard):
    agree(ops.gumbel_softmax, normal(*shape), normal(*shape, seed=1), tau=tau, hard=hard, tolerance=1e-4)


def test_of_equal_values_the_first_wins():
    log_probs, noise = (emulate.place.put(np.zeros((3, 4), "float32")) for _ in range(2))
    out, _ = registered.gumbel_softmax(log_probs, noise, hard=True)
    assert np.array_equal(to_numpy(out), [[1, 0, 0, 0]] * 3)


@pytest.mark.parametrize("shape", [(1, 1), (4, 5, 2), (3, 33), (2, 100)])
def test_log_softmax(shape):
    agree(ops.log_softmax, normal(*shape, scale=5))
    agree(ops.log_softmax, normal(*shape, scale=5), axis=len(shape) - 1)


def masked(rows, classes, seed=0, fewest=1):
    """Logits with minus infinity for some classes of each row, of which at least the first `fewest` stay."""
    hidden = (np.random.default_rng(seed + 9).random((rows, classes)) < 0.5) & (np.arange(classes) >= fewest)
    return np.where(hidden, -np.inf, normal(rows, classes, seed=seed, scale=2)).astype("float32")


@pytest.mark.parametrize("rows, classes", [(3, 4), (9, 33), (40, 100)])
def test_masked_classes(rows, classes):
    x, nothing = masked(rows, classes), np.full((rows, classes), -np.inf, "float32")
    seen, noise = np.isfinite(x), normal(rows, classes, seed=2)
    for logits in (x, nothing):
        agree(ops.log_softmax, logits)
        if classes <= 32:
            agree(ops.gumbel_softmax, logits, noise, tau=0.5)
            agree(ops.gumbel_softmax, logits, noise, hard=True)
    agree(ops.kl_divergence, x, x)
    agree(ops.kl_divergence, normal(rows, classes, seed=3), x)
    soft = np.where(seen, np.random.default_rng(1).random(x.shape), 0).astype("float32")
    for smoothing in (0.0, 0.1):
        agree(ops.cross_entropy, x, np.zeros(rows, int), smoothing=smoothing)
        agree(ops.cross_entropy, x, soft, smoothing=smoothing)
        on_masked = soft + (np.arange(classes) == np.argmin(seen, axis=1)[:, None]).astype("float32")
        agree(ops.cross_entropy, x, on_masked, smoothing=smoothing)
        agree(ops.cross_entropy, x, np.argmin(seen, axis=1), smoothing=smoothing)
        agree(ops.cross_entropy, nothing, 0 * soft, smoothing=smoothing)
        agree(ops.cross_entropy, nothing, np.zeros(rows, int), smoothing=smoothing)


def test_one_nan_makes_its_row_nan():
    """A loss that is not a number ends a training: it must not be hidden by a maximum."""
    x = normal(3, 40)
    x[1, 5] = np.nan
    there, labels = emulate.place.put(x), emulate.place.put(np.zeros(3, int))
    rows = emulate.implementation_of(ops.log_softmax, there)(there)[0]
    assert np.array_equal(np.isnan(to_numpy(rows)).all(axis=1), [False, True, False])
    assert not np.isnan(to_numpy(rows)[::2]).any()
    for op, other in ((ops.cross_entropy, labels), (ops.kl_divergence, there)):
        assert np.isnan(to_numpy(emulate.implementation_of(op, there, other)(there, other)[0]))
    noise, few = (emulate.place.put(a) for a in (normal(3, 7, seed=1), x[:, :7]))
    soft = emulate.implementation_of(ops.gumbel_softmax, few, noise)(few, noise)[0]
    assert np.array_equal(np.isnan(to_numpy(soft)).all(axis=1), [False, True, False])


def test_infuse_where_a_token_has_no_logit():
    logits = normal(1, 2, 3, 5)
    logits[:, :, :, 2], logits[:, :, 1, 3] = -np.inf, -np.inf
    agree(ops.lookup_infuse, np.zeros_like(logits), logits, normal(1, 2, 3, 4, seed=1), reuse="resoftmax")


def test_kl_divergence_is_infinite_where_only_the_student_masks():
    student, teacher = (emulate.place.put(a) for a in (masked(5, 10), normal(5, 10)))
    loss, vjp = emulate.implementation_of(ops.kl_divergence, student, teacher)(student, teacher)
    assert to_numpy(loss) == np.inf
    right = ops.kl_divergence.function(to_numpy(student), to_numpy(teacher))[1](np.float32(1))[0]()
    close(entries(vjp(emulate.place.put(np.array(1, "float32"))))[0], right, 1e-6)


@pytest.mark.parametrize("batch, classes", [(1, 2), (5, 10), (33, 40)])
def test_kl_divergence(batch, classes):
    agree(ops.kl_divergence, normal(batch, classes, scale=2), normal(batch, classes, seed=1, scale=2))


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 5, 96), (33, 40)])
def test_mse_of_rows(shape):
    agree(ops.mse, normal(*shape), normal(*shape, seed=1), axis=len(shape) - 1)
    agree(ops.mse, normal(*shape), normal(*shape, seed=1), axis=-1)


@pytest.mark.parametrize("index", [[[0, 2, 4], [1, 2, 3]], [[3, 3, 0], [4, 4, 4]], [[2], [0]]])
def test_take_tokens(index):
    agree(ops.take_tokens, normal(2, 5, 7), np.array(index))


@pytest.mark.parametrize("batch, classes", [(1, 2), (5, 10), (9, 33), (40, 33)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(batch, classes, smoothing):
    rng, logits = np.random.default_rng(1), normal(batch, classes, scale=3)
    agree(ops.cross_entropy, logits, rng.integers(0, classes, batch), smoothing=smoothing)
    soft = rng.dirichlet(np.ones(classes), batch).astype("float32")
    agree(ops.cross_entropy, logits, soft, smoothing=smoothing)


@pytest.mark.parametrize("tokens, k", [(1, 1), (8, 3), (33, 33), (64, 45), (100, 0), (1100, 700)])
def test_top_k(tokens, k):
    scores = np.random.default_rng(tokens).integers(0, 9, (3, tokens)).astype("float32")  # many equal ones
    scores[1] = -np.inf
    there = emulate.place.put(scores)
    assert emulate.implementation_of(ops.top_k, there, k) is registered.top_k
    assert np.array_equal(to_numpy(registered.top_k(there, k)), ops.top_k(scores, k))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gradient_is_added_to_its_place_however_that_lies_in_memory(order, dtype):
    shapes = (6, 5), (7, 5), (7,), (6, 7)
    x, weight, bias, g = (normal_there(*shape, seed=i) for i, shape in enumerate(shapes))
    _, of_weight, of_bias = emulate.implementation_of(ops.linear, x, weight, bias)(x, weight, bias)[1](g)
    assert isinstance(of_weight, Into) and isinstance(of_bias, Into)
    for entry, like in ((of_weight, weight), (of_bias, bias)):
        place = emulate.place.put(np.ones(like.shape, dtype, order=order))
        assert entry.run(place) is None
        np.testing.assert_allclose(to_numpy(place) - 1, to_numpy(entry.run(None)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [
    lambda *shape, seed=0: normal_there(*shape, seed=seed).astype("float64"),
    lambda *shape, seed=0: normal_there(0, *shape[1:], seed=seed)], ids=["float64", "no rows"])
def test_other_arrays_are_left_to_the_plain_op(make, place):
    for op, shapes in {ops.gelu: [(3, 4)], ops.linear: [(3, 4), (5, 4)], ops.log_softmax: [(3, 4)],
                       ops.layer_norm: [(3, 4)], ops.attention: [(1, 2, 3, 4)] * 3}.items():
        arrays = [make(*shape, seed=i) for i, shape in enumerate(shapes)]
        assert emulate.implementation_of(op, *arrays) is None, op
        assert emulate.implementation_of(op, *(normal_there(*shape) for shape in shapes)) is not None, op


def test_the_smallest_arrays_are_left_to_the_plain_op(place):
    q, no_keys = normal_there(1, 2, 3, 4), normal_there(1, 2, 0, 4)
    for op, arrays in ((ops.log_softmax, [normal_there()]), (ops.layer_norm, [normal_there()]),
                       (ops.attention, [q, no_keys, no_keys])):
        assert emulate.implementation_of(op, *arrays) is None, op


def test_every_registered_op_is_checked_here():
    text = pathlib.Path(__file__).read_text()
    assert [name for name in registered.registry if f"agree(ops.{name}," not in text] == []
