"""LeMeViT: gradients, blocks by their formulas, sizes, multiply-adds, refusals, what it shows, training."""
import dataclasses
import json
import math

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken import experiments
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, scenes
from tinytoken.models import LeMeViT
from tinytoken.models.lemevit import MetaBlock
from tinytoken.tasks import Classify, drop_paths
from tinytoken.train import checkpoint, fit

# maps of 8 x 12, twice, and 4 x 6, 2 x 3
SIZES = dict(image_size=(16, 24), patch_size=2, dims=(4, 4, 6, 8), depths=(1, 1, 2, 1), head_dim=2,
             mlp_ratio=2, attn_type=("C", "D", "D2", "S"), meta_tokens=3, num_classes=5)
each_kind = pytest.mark.parametrize("kind", ["C", "D", "D2", "S"])
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def new(**more):
    return shaken(LeMeViT(**SIZES | more))


def pictures(batch=2):
    return np.random.default_rng(1).standard_normal((batch, 3, 16, 24))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_whole_model(training):
    """In train mode also through the statistics of the batch."""
    model, labels = new().train(training), np.array([4, 0])
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 5, 4))
    if not training:
        for _, buffer in model.named_buffers():
            buffer.data = np.random.default_rng(3).uniform(0.5, 1.5, buffer.shape)

    def outputs(*_):
        out = model(pictures(), paths=paths)
        return model.loss(out, labels)[0], out.logits, out.meta, *out.maps
    # in training a bias before a batch norm has no effect; its gradient is rounding
    none = lambda name: training and name.startswith("downsample") and name.endswith("0.bias")
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if not none(n)))
    gradcheck(outputs, *parameters, names=names, max_elements=40, atol=1e-7)


def split(x, heads=2):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attend(q, k, v, scale):
    out = softmax(scale * split(q) @ split(k).swapaxes(2, 3)) @ split(v)
    return out.transpose(0, 2, 1, 3).reshape(q.shape)


@each_kind
def test_the_attention_by_its_formulas(kind):
    """Both sets read what the other was before; scales and which of the two is a key differ by kind."""
    attn = shaken(MetaBlock(6, 2, 2, kind)).attn
    x, c = rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 3, 6))
    of = lambda tokens, name, parts: np.split(
        tokens @ getattr(attn, name).weight.data.T + getattr(attn, name).bias.data, parts, axis=2)
    if kind == "C":
        (q,), (k, v) = of(c, "q", 1), of(x, "kv", 2)
        expected = None, of(attend(q, k, v, 3 ** -0.5), "proj", 1)[0]
    elif kind == "S":
        expected = [of(attend(*of(tokens, "qkv", 3), 3 ** -0.5), "proj", 1)[0] for tokens in (x, c)]
    else:
        if kind == "D":
            (q1, k1, v1), (q2, k2, v2) = of(x, "qkv1", 3), of(c, "qkv2", 3)
        else:
            (q1, v1), (q2, v2) = of(x, "qv1", 2), of(c, "kv2", 2)
            k1, k2 = q1, q2
        expected = (of(attend(q1, k2, v2, math.log(3, 5) / math.sqrt(6)), "proj_x", 1)[0],
                    of(attend(q2, k1, v1, 1 / math.sqrt(6)), "proj_c", 1)[0])
    kept = []
    found = attn(tt.Tensor(x), tt.Tensor(c), kept)
    shapes = [None if out is None else out.shape for out in found]
    assert shapes == [None if kind == "C" else x.shape, c.shape]
    for out, by_formula in zip(found, expected):
        if by_formula is not None:
            same(out.data, by_formula)
    assert [A.shape for A in kept] == ([] if kind == "S" else [(2, 2, 3, 5)])


@each_kind
def test_factors_of_the_branches(kind):
    """A factor of zero leaves its set of tokens without that branch."""
    block = shaken(MetaBlock(6, 2, 2, kind))
    x, c = rng.standard_normal((2, 6, 6)), rng.standard_normal((2, 3, 6))
    whole = [t.data for t in block(tt.Tensor(x), tt.Tensor(c), (2, 3), np.ones((2, 4)))]
    for branch in range(4):
        paths = np.ones((2, 4))
        paths[1, branch] = 0
        changed = [np.abs(a.data - b).max(axis=(1, 2)) > 1e-3
                   for a, b in zip(block(tt.Tensor(x), tt.Tensor(c), (2, 3), paths), whole)]
        of_x = branch < 2 and kind != "C"
        assert [each.tolist() for each in changed] == [[False, of_x], [False, branch > 1]]
    nothing = block(tt.Tensor(x), tt.Tensor(c), (2, 3), np.zeros((2, 4)))
    same(nothing[1].data, c)
    assert kind != "C" or np.array_equal(nothing[0].data, x)


def block_macs(N, M, C, kind, ratio=2):
    """For C also the keys and values of the map; D2 saves a projection of each set."""
    mlps = 2 * ratio * (M + N * (kind != "C")) * C * C
    linear = {"C": 2, "D": 4, "D2": 3, "S": 4}[kind] * (N + M) * C * C
    products = {"C": 2 * N * M, "D": 4 * N * M, "D2": 4 * N * M, "S": 2 * N * N + 2 * M * M}[kind] * C
    return 9 * N * C + linear + products + mlps


def test_macs_are_the_closed_form():
    c, M = SIZES, 3
    grids, dims = (96, 96, 24, 6), c["dims"]
    expected = 96 * 9 * 3 * 4 + 24 * 9 * 4 * 6 + 6 * 9 * 6 * 8 + 8 * 5
    expected += sum(4 * M * before * (before + dim) for before, dim in zip((4, *dims), dims))
    expected += sum(depth * block_macs(N, M, dim, kind)
                    for N, depth, dim, kind in zip(grids, c["depths"], dims, c["attn_type"]))
    model = LeMeViT(**SIZES)
    assert tt.macs(model, pictures().astype("float32")).total == expected
    # a block of D against one of self-attention alone, without the convolution
    for N, M, ratio in ((64, 4, 0.97), (64, 16, 1.18), (256, 8, 0.73), (1024, 16, 0.39)):
        plain = 12 * N * 96**2 + 2 * N * N * 96
        found = (block_macs(N, M, 96, "D", 4) - 9 * N * 96) / plain
        assert found == pytest.approx(ratio, abs=0.006)


def test_sizes_by_default():
    for size, patch, dims, kinds in ((32, 4, (96, 96, 192, 384), "CDDS"), (8, 4, (96, 96), "CD"),
                                     (224, 4, (96, 96, 192, 384, 768), "CDDSS"),
                                     ((16, 32), 4, (96, 96, 192), "CDS")):
        model = LeMeViT.Config(image_size=size, patch_size=patch, depth=6)
        assert model.dims == dims and model.attn_type == tuple(kinds) and model.head_dim == 32
        assert sum(model.depths) == 6 and model.halvings == (0, *range(len(dims) - 1))
    column = LeMeViT(image_size=32, dims=(8, 8), depths=(1, 3), attn_type=("C", "D"), head_dim=4)
    assert column.grids == [(8, 8), (8, 8)]
    trial = experiments.Trial(experiments.Recipe(train_pictures=64, test_pictures=8, dim=8, heads=2))
    assert trial.answers(trial.new("lemevit")).shape == (8, len(scenes.NAMES))
    for patch, kinds in ((2, "Conv2d BatchNorm2d"), (4, "Conv2d BatchNorm2d GELU Conv2d BatchNorm2d")):
        stem = LeMeViT(patch_size=patch, image_size=64).downsample_layers[0]
        assert [type(layer).__name__ for layer in stem.layers] == kinds.split()


@pytest.mark.parametrize("more, text", [
    (dict(attn_type=("C", "E", "D", "S")),
     "attn_type ('C', 'E', 'D', 'S'), expected one of C, D, D2, S for each stage"),
    (dict(attn_type=("C", "D", "S")), "attn_type ('C', 'D', 'S'), expected a kind for each of 4 stages"),
    (dict(dims=(4, 6, 6, 8)), "dims (4, 6, 6, 8), expected the same width after a stage of C"),
    (dict(head_dim=3), "head_dim 3, expected a whole number that divides the widths (4, 4, 6, 8)"),
    (dict(head_dim="2"), "head_dim '2', expected a whole number that divides the widths (4, 4, 6, 8)"),
    (dict(meta_tokens=0), "meta_tokens 0, expected a positive whole number"),
    (dict(patch_size=1), "patch_size 1, expected a power of 2, from 2"),
    (dict(patch_size=8, image_size=64, dims=(6, 6, 6, 8)),
     "dims (6, 6, 6, 8), expected the first to be a multiple of 4"),
    (dict(image_size=8, attn_type=("C", "D", "D", "D")),
     "attn_type ('C', 'D', 'D', 'D'): a D with a map of one position, expected 2 at least"),
    (dict(image_size=(16, 20)),
     "image_size (16, 20), expected multiples of 8: patches of 2 pixels, halved 2 times")])
def test_options_that_cannot_be(more, text):
    with refuses(f"LeMeViT: {text}"):
        LeMeViT(**SIZES | more)


def test_keys_that_start_as_queries():
    model = LeMeViT(**SIZES, keys_as_queries=True)
    w = {name: p.data for name, p in model.named_parameters()}
    same(w["stages.0.0.attn.kv.weight"][:4], w["stages.0.0.attn.q.weight"])
    for a, b in ((1, 2), (2, 1)):
        same(w[f"stages.1.0.attn.qkv{a}.weight"][4:8], w[f"stages.1.0.attn.qkv{b}.weight"][:4])
    same(w["stages.2.0.attn.kv2.weight"][:6], w["stages.2.0.attn.qv1.weight"][:6])
    same(w["stages.3.0.attn.qkv.weight"][8:16], w["stages.3.0.attn.qkv.weight"][:8])


def test_outputs_panels_and_json(tmp_path):
    model = new()
    for training in (True, False):
        out = model.train(training)(pictures(), trace=True)
        assert [A.shape for A in out.attention] == [(2, 2, 3, 96), (2, 2, 3, 96), *[(2, 3, 3, 24)] * 2]
        assert [m.shape for m in out.maps] == [(2, 96, 4), (2, 96, 4), (2, 24, 6), (2, 6, 8)]
        assert out.meta.shape == (2, 3, 8) and model(pictures()).attention == []
    (title, panel), = model.show(out)
    assert title == "LeMeViT's meta tokens read" and panel.shape == (2, 96)
    same(panel.reshape(2, 4, 2, 6, 2)[:, :, 1, :, 1].reshape(2, 24),
         out.attention[-1].data.mean(axis=1).sum(axis=1))
    assert model.show(model(pictures())) == [] and model.noise(2, 0, 0) == {}
    again = LeMeViT(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config
    with refuses("images: (2, 3, 24, 16), expected (B, 3, 16, 24)"):
        model(pictures().swapaxes(2, 3))


def test_training_on_scenes_with_drop_path(tmp_path):
    drawn = scenes.make_scenes(40, size=16)
    model = LeMeViT(image_size=16, patch_size=2, dim=8, depth=4, heads=2)
    task = Classify(model, drop_path=0.2)
    assert drop_paths(model, 0.2, 6, 0, 0).shape == (6, 4, 4)
    batches = Batches(drawn.images, drawn.labels, 12, seed=0, **drawn.moves)
    report = fit(model, task, batches, steps=4, micro=5, threads=2, bar=False)
    assert np.isfinite(report["class"])
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    again, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = drawn.images[:7].astype("float32") / 255
    assert np.array_equal(again.eval()(images).logits.data, model.eval()(images).logits.data)
