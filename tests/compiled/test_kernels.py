"""Each compiled op against the plain one: values, gradients, dtypes, errors; and what may be done with the
arrays."""
import gc
import inspect
import re
import weakref

import numpy as np
import pytest

import house
import tinytoken as tt
from cases import CASES
from test_contract import outputs_of
from test_float32 import error, forward_and_backward
from tinytoken import InputError, Tensor, backend, ops
from tinytoken.compiled import launcher, registered
from tinytoken.train import AdamW

pytest.importorskip("numba", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("any_size")
MINE = [case for case in CASES if case.name in registered.registry]
TOLERANCE = {"float64": 1e-12, "float32": 3e-6}  # times the largest value
FITTED = {"float64": 1e-12, "float32": 1e-5}  # gelu in float32 is a fitted polynomial; or a sum of many terms


def agree(op, *arrays, dtype, covered=True, tolerance=None, upstream_of=None, **settings):
    """The compiled op equals the plain one in float64: outputs, and the gradients of random upstream ones (of
    the outputs numbered upstream_of, where that is given)."""
    arrays = [np.asarray(a, dtype) if getattr(a, "dtype", None) is not None and a.dtype.kind == "f" else a
              for a in arrays]
    wide = [a.astype("float64") if getattr(a, "dtype", "") == "float32" else a for a in arrays]
    bound = op._bind(arrays, settings) if len(arrays) < len(op.arrays) else (arrays, settings)
    assert (backend.faster(op, np, *bound[0], **bound[1]) is not None) == covered
    results = []
    for given, context in ((arrays, backend.using_implementations(None)), (wide, tt.plain())):
        with context:
            leaves = [Tensor(a, requires_grad=a.dtype.kind == "f") if backend.is_array(a) else a
                      for a in given]
            outs = outputs_of(op(*leaves, **settings))
            rng, total = np.random.default_rng(3), 0
            for i, out in enumerate(outs):
                g = rng.standard_normal(out.shape).astype(dtype).astype(out.dtype)
                if upstream_of is None or i in upstream_of:
                    total = (out * g).sum() + total
            total.backward()
            results.append([*(out.data for out in outs),
                            *(t.grad for t in leaves if isinstance(t, Tensor) and t.requires_grad)])
    for mine, its in zip(*results, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            assert mine.dtype == dtype and mine.shape == its.shape
            largest = np.abs(its).max(initial=1.0, where=np.isfinite(its))
            np.testing.assert_allclose(mine, its, rtol=0, atol=(tolerance or TOLERANCE[dtype]) * largest)


both = pytest.mark.parametrize("dtype", ["float32", "float64"])


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng((seed, *shape)).standard_normal(shape)


# Values and gradients

@both
@pytest.mark.parametrize("case", MINE, ids=[case.id for case in MINE])
def test_every_case_of_the_op(case, dtype):
    settings = {"official": False, "axis": -1, "reuse": "resoftmax", "groups": 1, "stride": 1} | case.settings
    fits = (settings["official"], settings["axis"], settings["reuse"]) == (False, -1, "resoftmax")
    if case.op is ops.conv2d:
        x, weight, *_ = case.arrays()
        fits = settings["groups"] == x.shape[1] == len(weight) and settings["stride"] in (1, (1, 1))
    agree(case.op, *case.arrays(), dtype=dtype, covered=fits, tolerance=FITTED[dtype], **case.settings)


@both
@pytest.mark.parametrize("shape", [(1,), (7, 37), (257,), (2, 3, 100), ()])
def test_gelu(shape, dtype):
    agree(ops.gelu, normal(*shape, scale=3), dtype=dtype, tolerance=FITTED[dtype])


def test_gelu_is_as_right_as_the_plain_one():
    x = np.concatenate([np.linspace(-9, 9, 100_001), np.linspace(-60, 60, 2_001)]).astype("float32")
    exact = ops.gelu.function(x.astype("float64"))[0]
    mine, plain = (np.abs(out - exact).max() for out in (registered.gelu(x)[0], ops.gelu.function(x)[0]))
    assert mine <= max(plain, 3.74e-6)


def test_gelu_of_what_is_no_number():
    x = np.array([np.nan, np.inf, 1.0], "float32")
    np.testing.assert_array_equal(registered.gelu(x)[0][:2], [np.nan, np.inf])


@both
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 31), (9, 32), (600, 96), (33, 100), (257, 3)])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_layer_norm(rows, width, given, dtype):
    weight, bias = (normal(width, seed=i) if there else None for i, there in enumerate(given, 1))
    tolerance = {"float64": 1e-11, "float32": 2e-5}[dtype]
    far = normal(rows, width, scale=2) + 3
    agree(ops.layer_norm, far, weight, bias, dtype=dtype, tolerance=tolerance, eps=1e-5)


@both
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 9), (5, 64), (2, 65), (40, 46)])
def test_softmax(rows, width, dtype):
    agree(ops.softmax, normal(rows, width, scale=9), dtype=dtype)
    agree(ops.softmax, normal(2, rows, width, scale=9), dtype=dtype, axis=2)
    agree(ops.softmax, normal(2, rows, width, scale=9), dtype=dtype, axis=1, covered=False)


@both
@pytest.mark.parametrize("heads, queries, keys, size", [(1, 1, 1, 1), (2, 5, 5, 4), (2, 33, 33, 8),
                                                        (1, 9, 64, 32)])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("upstream_of", [None, (0,), (-1,)])
def test_attention(heads, queries, keys, size, weights, upstream_of, dtype):
    upstream_of = (int(weights),) if upstream_of == (-1,) else upstream_of
    q = normal(2, heads, queries, size, scale=2)
    k, v = (normal(2, heads, keys, size, seed=i) for i in (1, 2))
    agree(ops.attention, q, k, v, None, dtype=dtype, weights=weights, upstream_of=upstream_of)


MASKS = {"hard": lambda rng, shape: rng.random(shape) < 0.5,
         "soft": lambda rng, shape: 1.5 * rng.random(shape),
         "one": lambda rng, shape: np.arange(shape[1]) == 0 * np.ones(shape),
         "none": lambda rng, shape: np.zeros(shape)}


@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("spread", [1, 20])
def test_attention_under_a_mask(mask, sees_itself, spread, dtype):
    keep = MASKS[mask](np.random.default_rng(3), (2, 37)).astype("float64")
    arrays = [normal(2, 2, 37, 8, seed=i, scale=spread ** 0.5) for i in range(3)]
    tolerance = {"float64": 1e-11, "float32": 1e-5 * spread}[dtype]
    agree(ops.attention, *arrays, keep, dtype=dtype, sees_itself=sees_itself, tolerance=tolerance)
    if not sees_itself:
        arrays[0] = arrays[0][:, :, :9]
        agree(ops.attention, *arrays, keep, dtype=dtype, sees_itself=False, weights=True, tolerance=tolerance)


def test_the_official_mask_is_the_plain_op():
    q = normal(2, 2, 7, 4)
    agree(ops.attention, q, q, q, np.ones((2, 7)), dtype="float64", official=True, covered=False)


@both
@pytest.mark.parametrize("upstream_of", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_lookup_gather(upstream_of, dtype):
    q, k, v = normal(2, 2, 9, 8), normal(2, 2, 33, 8), normal(2, 2, 33, 8, seed=1)
    agree(ops.lookup_gather, q, k, v, dtype=dtype, upstream_of=upstream_of)


@both
@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax"])
def test_lookup_infuse(reuse, dtype):
    logits = normal(2, 3, 9, 33, scale=4)
    agree(ops.lookup_infuse, ops.softmax(logits).data, logits, normal(2, 3, 9, 5), dtype=dtype, reuse=reuse,
          covered=reuse == "resoftmax", tolerance=FITTED[dtype])


@both
@pytest.mark.parametrize("shape, kernel, padding", [
    ((1, 1, 1, 1), (1, 1), 0), ((2, 3, 5, 4), (3, 3), 1), ((2, 9, 8, 8), (7, 7), 3),
    ((2, 8, 4, 4), (7, 7), 3), ((3, 5, 9, 7), (5, 3), (0, 2)), ((2, 33, 6, 5), (2, 3), (1, 0)),
    ((40, 2, 8, 8), (3, 3), 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_conv2d(shape, kernel, padding, biased, dtype):
    """Depthwise, in both layouts in memory."""
    channels = shape[1]
    weight, bias = normal(channels, 1, *kernel, seed=1), normal(channels) if biased else None
    x = normal(*shape)
    for each in (x, np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        agree(ops.conv2d, each, weight, bias, dtype=dtype, padding=padding, groups=channels)


@pytest.mark.parametrize("settings", [{"stride": 2, "groups": 4}, {"groups": 2},
                                      {"padding": 3, "groups": 4}])
def test_other_convolutions_are_the_plain_op(settings):
    weight = normal(4, 4 // settings["groups"], 3, 3)
    agree(ops.conv2d, normal(2, 4, 7, 7), weight, None, dtype="float64", covered=False, **settings)


def test_every_implemented_op_is_compared():
    assert {name for name in registered.registry if f"test_{name}" not in globals()} == set()


def errors(run, *arrays):
    """Of the output and of each gradient in float32, relative to the largest value of float64's."""
    results = []
    for dtype in ("float32", "float64"):
        with tt.plain() if run == "plain" or dtype == "float64" else backend.using_implementations(None):
            results.append(forward_and_backward(arrays[0], [a.astype(dtype) for a in arrays[1:]]))
    return [error(a, b) for narrow, wide in zip(*results) for a, b in zip(narrow, wide, strict=True)]


WORKING = {"layer_norm": (ops.layer_norm, (4, 65, 96), (96,), (96,)), "gelu": (ops.gelu, (4, 65, 96)),
           "softmax": (ops.softmax, (200, 65)), "attention": (ops.attention, *[(2, 3, 65, 32)] * 3),
           "lookup_gather": (lambda *qkv: ops.lookup_gather(*qkv)[0], (2, 3, 9, 32), *[(2, 3, 65, 32)] * 2),
           "hard keep": (lambda x: ops.attention(x, x, x, np.arange(130).reshape(2, 65) % 3 > 0),
                         (2, 3, 65, 32)),
           "conv2d": (lambda x, w: ops.conv2d(x, w, groups=96), (4, 96, 14, 14), (96, 1, 7, 7))}


@pytest.mark.parametrize("name", WORKING)
def test_float32_at_working_size_is_as_right_as_the_plain_op(name):
    """In the mean over draws: of a single one the roundings of either may be the luckier. 4e-7: of sums of
    hundreds, which the plain op may add up in pairs."""
    function, *shapes = WORKING[name]
    draws = [[normal(*shape, seed=seed, scale=2.2).astype("float32")
              for seed, shape in enumerate(shapes, 10 * i)] for i in range(12)]
    mine, plain = (np.mean([errors(run, function, *arrays) for arrays in draws], axis=0)
                   for run in ("compiled", "plain"))
    assert (mine <= 1.5 * plain + 4e-7).all(), (mine, plain)


# At the ends of the range

def same_as_plain(op, *arrays, atol=1e-6, **settings):
    """The forward passes agree in float32, infinities and NaN included."""
    arrays, settings = op._bind([np.asarray(a, "float32") for a in arrays], settings)
    with np.errstate(all="ignore"):
        plain, _ = op.function(*arrays, **settings)
        mine, _ = backend.faster(op, np, *arrays, **settings)(*arrays, **settings)
    for a, b in zip(outputs_of(mine), outputs_of(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol)
    return mine


def test_one_nan_makes_its_row_nan_and_no_other():
    x, keep = normal(3, 40), np.ones((1, 40))
    x[1, 5] = np.nan
    for op, more in ((ops.softmax, ()), (ops.layer_norm, ())):
        out = same_as_plain(op, x, *more)
        assert np.array_equal(np.isnan(out).all(axis=1), [False, True, False]) and np.isfinite(out[::2]).all()
    q = np.ones((1, 1, 3, 1))
    q[0, 0, 1] = np.nan
    k = normal(1, 1, 40, 1)
    for more in ((), (keep,)):
        out = same_as_plain(ops.attention, q, k, k, *more, sees_itself=False)
        assert np.array_equal(np.isnan(out[0, 0, :, 0]), [False, True, False])


def test_values_of_minus_infinity_are_not_seen():
    x = np.full((3, 20), -np.inf)
    x[1, :2], x[2] = 0, normal(20)
    assert np.array_equal(same_as_plain(ops.softmax, x)[:2, :3], [[0, 0, 0], [0.5, 0.5, 0]])
    A = same_as_plain(ops.lookup_infuse, np.zeros((1, 1, 20, 3)), x.T[None, None], np.ones((1, 1, 20, 1)),
                      reuse="resoftmax")
    np.testing.assert_allclose(A[0, 0, :, 0], [0, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("keep", [None, 1, 0.5])
@pytest.mark.parametrize("left", [[1, 2], []])
def test_scores_of_minus_infinity(keep, left):
    k = np.full((1, 1, 4, 1), -np.inf)
    k[:, :, left] = 0
    more = [] if keep is None else [np.full((1, 4), keep)]
    same_as_plain(ops.attention, np.ones((1, 1, 4, 1)), k, normal(1, 1, 4, 1), *more, sees_itself=False)


@pytest.mark.parametrize("low", [-2e30, -1e37])
def test_scores_as_low_as_numbers_go(low):
    k = np.concatenate([np.full((1, 2, 4, 1), low), np.zeros((1, 2, 4, 2))], axis=3)
    q = np.concatenate([np.ones((1, 2, 4, 1)), np.zeros((1, 2, 4, 2))], axis=3)
    same_as_plain(ops.attention, q, k, normal(1, 2, 4, 3), np.array([[1, 0, 1, 0]]), sees_itself=False)


@pytest.mark.parametrize("gap", [50, 87, 88, 200, 1e4, 3e38])
def test_a_dropped_key_that_towers_over_the_others(gap):
    """Values, and finite gradients."""
    q, k, v = np.ones((1, 1, 2, 1)), np.array([0, gap]).reshape(1, 1, 2, 1), normal(1, 1, 2, 1)
    arrays = [a.astype("float32") for a in (q, k, v, np.array([[1.0, 0.0]]))]
    same_as_plain(ops.attention, *arrays, sees_itself=False)
    g = np.ones((1, 1, 2, 1), "float32")
    mine, its = (f(*arrays, sees_itself=False)[1](g) for f in (registered.attention, ops.attention.function))
    for a, b in zip(mine, its, strict=True):
        a, b = (e() if callable(e) else e for e in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_keeps_that_float32_hardly_holds():
    q, k, v, g = (normal(1, 2, 6, 4, seed=i).astype("float32") for i in range(4))
    keep = np.full((1, 6), 1e-39, "float32")
    (mine, my_vjp), (plain, its_vjp) = (f(q, k, v, keep, sees_itself=False)
                                        for f in (registered.attention, ops.attention.function))
    np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(e() if callable(e) else e).all() for e in my_vjp(g))


def test_exp_over_its_whole_range():
    """By softmax of two values: e^-x / (1 + e^-x)."""
    x = np.linspace(0, 120, 4001)
    rows = np.stack([0 * x, -x], axis=1).astype("float32")
    exact = 1 / (1 + np.exp(-rows[:, 1].astype("float64")))
    np.testing.assert_allclose(registered.softmax(rows)[0][:, 1], exact, rtol=3e-7, atol=1.2e-38)


# AdamW

@both
@pytest.mark.parametrize("clip, average", [(None, None), (0.3, None), (1e9, 0.9)])
def test_adamw(clip, average, dtype):
    sizes = dict(image_size=8, patch_size=4, dim=8, depth=2, heads=2)
    models = [tt.models.ViT(**sizes).astype(dtype) for _ in range(2)]
    for a, b in zip(*(m.parameters() for m in models)):
        b.data[...] = a.data
    for model in models:
        model.parameters()[3].lr_scale, model.parameters()[5].frozen_steps = 0.5, 2
    mine, its = (AdamW(m.parameters(), 0.01, weight_decay=0.1, clip=clip, average=average) for m in models)
    assert backend.faster(AdamW.step, np, mine, 0.01) is registered.adamw
    least = 1e-6 if dtype == "float32" else 1e-14
    for step in range(4):
        for flat in (mine.flat, its.flat):
            for start, stop, *_ in flat.segments:
                flat.grad[start:stop] = normal(stop - start, seed=step)
        norm = mine.step(0.01 * step)
        with tt.plain():
            assert norm == pytest.approx(its.step(0.01 * step), rel=1e-6) and norm.dtype == dtype
        for name in ("m", "v", "mean"):
            a, b = getattr(mine, name), getattr(its, name)
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=least)
        np.testing.assert_allclose(mine.flat.data, its.flat.data, rtol=0, atol=least)
        np.testing.assert_allclose(mine.flat.grad, its.flat.grad, rtol=1e-6)
    assert mine.steps == its.steps == 4


# What is refused

BAD = [(ops.layer_norm, (normal(2, 3), normal(4)), {}),
       (ops.layer_norm, (normal(2, 3), normal(3), normal(2, 3)), {}),
       (ops.attention, (normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 4)), {}),
       (ops.attention, (normal(1, 2, 3, 4), normal(1, 2, 3, 5), normal(1, 2, 3, 4)), {}),
       (ops.attention, (normal(1, 2, 3, 4),) * 3 + (np.ones((1, 4)),), {}),
       (ops.attention, (normal(1, 2, 3, 4),) * 3 + (np.full((1, 3), -np.inf),), {}),
       (ops.lookup_gather, (normal(1, 2, 3, 4), normal(1, 2, 3, 5), normal(1, 2, 3, 4)), {}),
       (ops.lookup_infuse, (normal(1, 2, 3, 4), normal(1, 2, 3, 4), normal(1, 2, 5, 4)),
        {"reuse": "resoftmax"}),
       (ops.lookup_infuse, (normal(1, 2, 3, 4), None, normal(1, 2, 3, 4)), {"reuse": "resoftmax"}),
       (ops.conv2d, (normal(1, 2, 3, 3), normal(2, 1, 5, 5)), {"groups": 2}),
       (ops.conv2d, (normal(1, 2, 3, 3), normal(2, 1, 3, 3), normal(3)), {"groups": 2}),
       (ops.conv2d, (normal(1, 2, 3, 3), normal(2, 1, 3, 3)), {"groups": 2, "padding": -1}),
       (ops.conv2d, (normal(1, 2, 3, 3), normal(2, 1, 3, 3)), {"groups": 2, "padding": (1, 1, 1)}),
       (ops.softmax, (normal(2, 3),), {"axis": 2}), (ops.softmax, (normal(2, 3),), {"axis": "last"}),
       (ops.gelu, (normal(2, 3).astype(complex),), {}), (ops.gelu, (normal(2), normal(2)), {})]


@pytest.mark.parametrize("op, arrays, settings", BAD)
def test_the_same_errors(op, arrays, settings):
    texts = []
    for context in (backend.using_implementations(None), tt.plain()):
        with context, pytest.raises(InputError) as error:
            op(*arrays, **settings)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


# Arrays of other kinds

def test_nothing_it_was_given_is_written_to():
    """Inputs and upstream gradients are write-protected; a vjp runs twice, and changes no output."""
    for case in MINE:
        arrays = case.arrays("float32")
        for a in arrays:
            if backend.is_array(a):
                a.flags.writeable = False
        given, settings = case.op._bind(arrays, case.settings)
        run = backend.faster(case.op, np, *given, **settings)
        if run is None:
            continue
        out, vjp = run(*given, **settings)
        upstream = [normal(*o.shape).astype("float32") for o in outputs_of(out)]
        for g in upstream:
            g.flags.writeable = False
        before = [o.copy() for o in outputs_of(out)]
        first, second = ([e() if callable(e) else e for e in outputs_of(vjp(*upstream))] for _ in range(2))
        assert all(a is b is None or np.array_equal(a, b)
                   for a, b in zip((*first, *before), (*second, *outputs_of(out)), strict=True))


def turned(*shape, seed=0):
    """Not contiguous: an array whose axes lie in memory in reverse order."""
    return normal(*shape[::-1], seed=seed).astype("float32").T


def test_arrays_that_are_not_contiguous():
    agree(ops.gelu, turned(5, 6), dtype="float32", tolerance=1e-5)
    agree(ops.layer_norm, turned(5, 6), turned(12)[::2], turned(12)[::2], dtype="float32", tolerance=2e-5)
    agree(ops.softmax, turned(5, 6), dtype="float32")
    q, k, v = ops.split_heads.function(normal(2, 10, 24).astype("float32"), heads=2, parts=3)[0]
    assert not q.flags.c_contiguous
    for arrays in ((q, k, v), tuple(a.swapaxes(2, 3) for a in (q, k, v))):
        agree(ops.attention, *arrays, None, dtype="float32")
        agree(ops.attention, *arrays, np.ones((4, arrays[0].shape[2]))[::2], dtype="float32")
        agree(ops.lookup_gather, *arrays, dtype="float32")
    agree(ops.lookup_infuse, turned(2, 2, 3, 4), turned(2, 2, 3, 4), turned(2, 2, 3, 5), dtype="float32",
          reuse="resoftmax", tolerance=1e-5)


def test_upstream_gradients_that_are_not_contiguous():
    x = normal(6, 8).astype("float32")
    for op in (ops.gelu, ops.layer_norm, ops.softmax):
        for g in (turned(6, 8), np.broadcast_to(np.float32(0.5), (6, 8)),
                  normal(6, 16).astype("float32")[:, ::2]):
            ways = getattr(registered, op.name), op.function
            (_, mine), (_, plain) = (way(*op._bind([x], {})[0]) for way in ways)
            mine, plain = (outputs_of(vjp(g))[0] for vjp in (mine, plain))
            np.testing.assert_allclose(mine, plain() if callable(plain) else plain, rtol=1e-5, atol=1e-5)


class Counting(np.ndarray):
    """Sees each ufunc that computes with it."""
    seen = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **more):
        Counting.seen += 1
        plain = [np.asarray(one) for one in inputs]
        more.pop("out", None)
        return getattr(ufunc, method)(*plain, **more)


def test_an_array_that_wants_to_see_what_is_computed_does():
    assert not launcher.worth(np.ones((70, 70)).view(Counting))
    assert not launcher.worth(np.ones((70, 70)), np.ones(70).view(Counting))
    assert launcher.worth(np.ones((70, 70))) and not launcher.worth(np.ones((70, 70), int))


def test_nothing_is_kept_alive():
    gc.collect()
    gc.disable()
    try:
        for case in MINE:
            arrays = case.arrays("float32")
            leaves = [Tensor(a, requires_grad=True) if backend.is_array(a) else a for a in arrays]
            out = outputs_of(case.op(*leaves, **case.settings))
            gone = [weakref.ref(t) for t in (*out, *leaves) if isinstance(t, Tensor)]
            del out, leaves, arrays
            assert all(ref() is None for ref in gone), case.id
    finally:
        gc.enable()


# Kernels

def test_no_kernel_is_longer_than_an_op_may_be():
    for file in (house.File(path) for path in (house.PACKAGE / "compiled").glob("*.py")):
        for name, lines in file.functions():
            assert lines <= house.BUDGETS["an op"], f"{file.name}: {name}"


@pytest.mark.slow
def test_loops_of_float32_have_no_float64_and_are_vectors():
    """A constant of the wrong width would double the memory of a loop. Compiled anew: Numba keeps no text of
    what it has read from disk."""
    import numba
    from tinytoken.compiled import kernels
    for case in MINE:
        test_every_case_of_the_op(case, "float32")  # so that there are signatures
    test_adamw(0.3, 0.9, "float32")
    model = tt.models.ViT(image_size=32, patch_size=4, dim=96, depth=1, heads=3)  # has branches
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype("float32")
    model.loss(model.train()(images), np.arange(8))[0].backward()
    found = {name: kernel for name, kernel in inspect.getmembers(kernels)
             if isinstance(kernel, numba.core.dispatcher.Dispatcher)
             and kernel.stats.cache_path}  # what a kernel calls is not kept by itself
    assert len(found) >= 8
    for name, kernel in found.items():
        signature = next(s for s in kernel.signatures if any("float32" in str(a) for a in s)
                         and not any("readonly" in str(a) for a in s))
        fresh = numba.njit(nogil=True, error_model="numpy", fastmath=kernels.ALLOWED)(kernel.py_func)
        fresh.compile(signature)
        text = fresh.inspect_llvm(signature)
        assert not re.search(r"= f(add|sub|mul|div|cmp)\b[^\n]* double ", text), name
        assert "x float>" in text, name
