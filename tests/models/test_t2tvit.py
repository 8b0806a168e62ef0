"""T2T-ViT: gradients, both layers by their formulas, soft splits, multiply-adds, refusals."""
import json
import math

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken.checking import gradcheck
from tinytoken.models import T2TViT, t2tvit
from tinytoken.train import Classify, checkpoint, fit
from tiny import batches

SIZES = dict(image_size=(8, 12), patch_size=4, dim=8, depth=1, heads=2, num_classes=5, token_dim=6)
each_type = pytest.mark.parametrize("kind", ["transformer", "performer"])
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def new(kind="performer", **more):
    return shaken(T2TViT(**SIZES | dict(tokens_type=kind) | more))


def pictures(batch=2, size=(8, 12)):
    return np.random.default_rng(1).standard_normal((batch, 3, *size))


@each_type
def test_gradients_of_the_whole_model(kind):
    model, labels = new(kind), np.array([4, 0])

    def outputs(*_):
        out = model(pictures())
        return model.loss(out, labels)[0], out.logits, out.tokens
    names, parameters = zip(*model.named_parameters())
    gradcheck(outputs, *parameters, names=names, max_elements=40)


def normed(x, norm):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * norm.weight.data + norm.bias.data


def linear(x, layer):
    return x @ layer.weight.data.T + (0 if layer.bias is None else layer.bias.data)


@each_type
def test_a_layer_by_its_formulas(kind):
    """The residual is the values, not the input."""
    layer, x = shaken(t2tvit.LAYERS[kind](9, 6, 1e-5)), rng.standard_normal((2, 5, 9))
    if kind == "transformer":
        q, k, v = np.split(linear(normed(x, layer.norm1), layer.attn.qkv), 3, axis=2)
        y = v + linear(softmax(q @ k.swapaxes(1, 2) / math.sqrt(9)) @ v, layer.attn.proj)
        first, last = layer.mlp.fc1, layer.mlp.fc2
    else:
        W = layer.w.data = rng.standard_normal((3, 6))
        k, q, v = np.split(linear(normed(x, layer.norm1), layer.kqv), 3, axis=2)
        k, q = (np.exp(a @ W.T - (a**2).sum(axis=2, keepdims=True) / 2) / math.sqrt(3) for a in (k, q))
        weights = np.einsum("bim,bjm->bij", q, k)
        y = v + linear(weights @ v / (weights.sum(axis=2, keepdims=True) + 1e-8), layer.proj)
        first, _, last = layer.mlp.layers
    inner = tt.ops.gelu(linear(normed(y, layer.norm2), first)).data
    same(layer(tt.Tensor(x)).data, y + linear(inner, last))


def test_the_fixed_rows_of_a_performer():
    """Orthogonal, of the length sqrt(m); each layer's are its own, and the seed's."""
    first, second = (T2TViT(**SIZES | dict(token_dim=16)).tokens_to_token for _ in range(2))
    w, other = first.attention1.w.data, first.attention2.w.data
    np.testing.assert_allclose(w @ w.T, 8 * np.eye(8), atol=1e-5)
    assert np.array_equal(w, second.attention1.w.data) and np.abs(w - other).max() > 0.1
    tt.manual_seed(1)
    assert np.abs(T2TViT(**SIZES | dict(token_dim=16)).tokens_to_token.attention1.w.data - w).max() > 0.1


def test_a_performer_nears_softmax_with_many_rows_of_unit_variance():
    """With independent normal rows the mean of phi(q) phi(k) is exp(q . k); the official rows are shorter,
    and give half of the score."""
    layer = t2tvit.TokenPerformer(4, 4, 1e-5).astype("float64")
    q, k = 0.5 * rng.standard_normal((2, 1, 1, 6, 4))
    gaps = {}
    for m in (100, 100_000):
        layer.w.data = rng.standard_normal((m, 4))
        found = layer.features(q) @ layer.features(k).swapaxes(2, 3)
        gaps[m] = np.abs(found.data / np.exp(q @ k.swapaxes(2, 3)) - 1).mean()
    assert gaps[100_000] < 0.03 and gaps[100_000] < gaps[100] / 5


@pytest.mark.parametrize("patch, splits", [
    (16, ((7, 4, 2), (3, 2, 1), (3, 2, 1))), (4, ((3, 1, 1), (3, 2, 1), (3, 2, 1))),
    (2, ((3, 1, 1), (3, 2, 1))), (1, ((3, 1, 1),)), (6, ((5, 3, 1), (3, 2, 1))),
    (10, ((9, 5, 2), (3, 2, 1)))])
def test_soft_splits_by_patch_size(patch, splits):
    model = T2TViT(**SIZES | dict(patch_size=patch, image_size=(2 * patch, 3 * patch)))
    assert model.config.splits == splits and model.patch_embed.grid == (2, 3)
    out = model(pictures(size=(2 * patch, 3 * patch)).astype("float32"))
    assert out.logits.shape == (2, 5) and out.tokens.shape == (2, 6, 8)
    names = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("tokens_to")}
    assert names == {"project", *(f"attention{i}" for i in range(1, len(splits)))}
    again = T2TViT(**json.loads(json.dumps(vars(model.config))))
    assert again.config == model.config


@each_type
def test_tokens_are_laid_out_as_maps_between_splits(kind):
    """Against the layers one by one, on a rectangle."""
    model, images = new(kind), pictures()
    layer = model.tokens_to_token
    x = layer.attention1(tt.ops.unfold(images, kernel=3, padding=1)).data
    x = x.reshape(2, 8, 12, 6).transpose(0, 3, 1, 2)
    x = layer.attention2(tt.ops.unfold(x, kernel=3, stride=2, padding=1)).data
    x = x.reshape(2, 4, 6, 6).transpose(0, 3, 1, 2)
    x = linear(tt.ops.unfold(x, kernel=3, stride=2, padding=1).data, layer.project)
    same(model.embed(images).data[:, 1:], x + model.pos_embed[:, 1:])


def layer_macs(N, inputs, d, kind):
    m = d // 2
    attention = 2 * N * N * d if kind == "transformer" else N * (4 * m * d + m)
    return 3 * N * inputs * d + attention + 3 * N * d * d


@each_type
def test_macs_are_the_closed_form(kind):
    model = T2TViT(image_size=32, dim=96, depth=2, heads=4, token_dim=24, tokens_type=kind)
    front = layer_macs(1024, 27, 24, kind) + layer_macs(256, 216, 24, kind) + 64 * 216 * 96
    assert round(front / 1e6) == {"transformer": 63, "performer": 11}[kind]
    blocks = 2 * (10 * 65 * 96**2 + 2 * 65**2 * 96)
    assert tt.macs(model, np.zeros((2, 3, 32, 32), "float32")).total == front + blocks + 96 * 10


def test_scores_over_the_whole_width_by_scaled_weights():
    """What the docstring says of released weights: dividing by sqrt(dim) is the same as smaller queries."""
    model, x = new(), rng.standard_normal((2, 7, 8))
    attn = model.blocks[0].attn
    q, k, v = (t.data for t in attn.project(tt.Tensor(x)))
    expected = softmax(q @ k.swapaxes(2, 3) / math.sqrt(8)) @ v
    attn.qkv.weight.data[:8] *= 2 ** -0.5
    q, k, v = attn.project(tt.Tensor(x))
    same(tt.ops.attention(q, k, v).data, expected)


@pytest.mark.parametrize("more, text", [
    (dict(tokens_type="linear"), "tokens_type 'linear', expected performer or transformer"),
    (dict(token_dim=1), "token_dim 1, expected a whole number from 2"),
    (dict(splits=((3, 1), (3, 2, 1))),
     "splits ((3, 1), (3, 2, 1)), expected (kernel, stride, padding) of each"),
    (dict(splits=((3, 0, 1),)), "splits ((3, 0, 1),), expected (kernel, stride, padding) of each"),
    (dict(splits=()), "splits (), expected (kernel, stride, padding) of each"),
    (dict(splits=((3, 2, 1),)),
     "splits ((3, 2, 1),) make tokens of a grid (4, 6), expected (2, 3), as patches of 4 pixels")])
def test_options_that_cannot_be(more, text):
    with refuses(f"T2TViT: {text}"):
        T2TViT(**SIZES | more)


@each_type
def test_training_leaves_what_is_fixed(kind, tmp_path):
    model = T2TViT(**SIZES | dict(image_size=8, num_classes=3, tokens_type=kind))
    fixed = {name: buffer.data.copy() for name, buffer in model.named_buffers()}
    task = Classify(model, drop_path=0.2)
    report = fit(model, task, batches(), steps=12, lr=3e-3, micro=4, threads=2, bar=False)
    assert len(fixed) == (3 if kind == "performer" else 1) and np.isfinite(report["class"])
    assert all(np.array_equal(buffer.data, fixed[name]) for name, buffer in model.named_buffers())
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    again, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = pictures(size=(8, 8)).astype("float32")
    assert again.config == model.config
    assert np.array_equal(again.eval()(images).logits.data, model.eval()(images).logits.data)
