"""STViT: what it costs, its two generations by hand, what its options do, what it refuses."""
import dataclasses
import json

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken import models
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, scenes
from tinytoken.models import STViT, ViT
from tinytoken.models.stvit import Generation, SemanticBlock
from tinytoken.tasks import Classify
from tinytoken.train import checkpoint, fit

# 24 patches
SMALL = dict(image_size=(8, 12), patch_size=2, dim=8, depth=4, heads=2, num_classes=5, semantic=(2, 3))


def pictures(batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 12))


def expected_macs(c):
    """Patches, classifier; `base` blocks of 12 N C^2 + 2 N^2 C, two that make M tokens of M + N keys, 10 M C^2
    + 2 (M + N) C^2 + 2 M (M + N) C, and blocks of 12 M C^2 + 2 M^2 C."""
    N, M, C = 24, c.semantic[0] * c.semantic[1], c.dim
    return (N * 12 * C + C * c.num_classes + c.base * (12 * N * C ** 2 + 2 * N ** 2 * C)
            + 2 * (10 * M * C ** 2 + 2 * (M + N) * C ** 2 + 2 * M * (M + N) * C)
            + (c.depth - c.base - 2) * (12 * M * C ** 2 + 2 * M ** 2 * C))


@pytest.mark.parametrize("more", [{}, dict(semantic=(1, 1), base=0), dict(depth=8, queries="learned"),
                                  dict(semantic=(4, 6), base=2, queries="pooled")], ids=str)
def test_macs(more):
    model = STViT(**SMALL | more)
    assert tt.macs(model, pictures().astype("float32")).total == expected_macs(model.config)


def test_a_model_of_eight_blocks_costs_half():
    images = np.zeros((1, 3, 32, 32), "float32")
    whole = tt.macs(ViT(depth=8, pool="mean"), images).total
    shares = [tt.macs(STViT(depth=8, semantic=(m, m)), images).total / whole for m in (4, 3, 2)]
    assert shares == pytest.approx([0.565, 0.499, 0.452], abs=5e-4)
    assert [STViT(depth=n).config.base for n in (2, 6, 8, 12)] == [0, 2, 3, 4]


def norm(x, w, name):
    return tt.ops.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6).data


def by_hand(w, x, keys, residual, heads):
    """A block with queries norm(x) and keys norm(keys): residual + gamma attention, then the MLP."""
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    split = lambda x: x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
    k, v = np.split(linear(norm(keys, w, "norm1"), "attn.kv"), 2, axis=2)
    q, k, v = map(split, (linear(norm(x, w, "norm1"), "attn.q"), k, v))
    A = softmax(q @ k.swapaxes(2, 3) / q.shape[3] ** 0.5)
    read = linear((A @ v).swapaxes(1, 2).reshape(x.shape), "attn.proj") * w["layer_scale_1"]
    x = residual + read
    hidden = tt.ops.gelu(linear(norm(x, w, "norm2"), "mlp.fc1")).data
    return x + linear(hidden, "mlp.fc2") * w["layer_scale_2"], A


@pytest.mark.parametrize("queries", ["both", "pooled", "learned"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_the_two_generations_by_hand(queries, shortcut):
    model = shaken(STViT(**SMALL, queries=queries, shortcut=shortcut, layer_scale=0.5))
    out, state = model(pictures(), trace=True), model.start(pictures())
    model.run_block(0, state)
    X = state.x.data
    squares = X.reshape(2, 2, 2, 3, 2, 8)
    P = squares.max(axis=(2, 4)).reshape(2, 6, 8)
    assert ("semantic_token2" in model.state_dict()) == (queries != "pooled")
    G = model.state_dict().get("semantic_token2", np.zeros((1, 6, 8)))
    start = np.repeat(G, 2, axis=0) if queries == "learned" else P
    first, A1 = by_hand(model.blocks[1].state_dict(), start, np.concatenate([start, X], axis=1),
                        start if shortcut else 0, 2)
    asked = first + G if queries == "both" else first
    second, A2 = by_hand(model.blocks[2].state_dict(), asked, np.concatenate([first, X], axis=1), asked, 2)
    for found, A in zip(out.attention[1:3], (A1, A2)):
        same(found.data, A)
    last, _ = by_hand(model.blocks[3].state_dict(), second, second, second, 2)
    same(out.tokens.data, norm(last, model.state_dict(), "norm"))
    (title, panel), (_, then) = model.show(out)
    assert title == "STViT: what its 6 tokens read first, of 1 each" and panel.shape == (2, 24)
    same(then, A2[:, :, :, 6:].mean(axis=1).sum(axis=1))


def test_gradients_of_the_whole_model():
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 4, 2))
    for more in (dict(), dict(queries="learned", base=0), dict(shortcut=False, semantic=(3, 4))):
        model = shaken(STViT(**SMALL | more)).train()
        names, parameters = zip(*model.named_parameters())
        gradcheck(lambda *_: model.loss(model(pictures(), paths=paths), np.array([0, 3]))[0], *parameters,
                  names=names, max_elements=8)


def test_paths_scale_each_branch_of_each_picture():
    x, paths = np.random.default_rng(0).standard_normal((2, 24, 8)), np.array([[2.0, 0], [0.5, 3]])
    block = shaken(Generation(8, 2, 4, True, 1e-6, 1, grid=(4, 6), window=(2, 3), seeds=(2, 1), reach=(4, 4),
                              shortcut=True))
    assert block.count == (2, 2) and block.semantic_grid == (4, 2)
    both, (none, read) = block(tt.Tensor(x), paths).data, (
        block(tt.Tensor(x), np.array([[a, 0], [a, 0]])).data for a in (0, 1))
    same(both[0], (none + 2 * (read - none))[0])
    half = tt.Tensor((none + 0.5 * (read - none))[1:])
    same(both[1:], half.data + 3 * (block.mlp(block.norm2(half)) * block.layer_scale_2).data)
    plain, y = shaken(SemanticBlock(8, 2, 4, True, 1e-6, 1)), tt.Tensor(x[:, :5])
    assert np.array_equal(plain(y, tt.Tensor(x), np.zeros((2, 2))).data, y.data)


def test_configuration_checkpoint_and_training(tmp_path):
    drawn = scenes.make_scenes(40, size=16)
    batches = Batches(drawn.images, drawn.labels, 12, seed=0)
    model = models.create("stvit", image_size=16, dim=8, depth=4, heads=2, semantic=(2, 2),
                          keys_as_queries=True)
    again = models.create("stvit", **json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config and again.config.semantic == (2, 2)
    kv = model.blocks[1].attn.kv.weight.data
    assert np.array_equal(kv[:8], model.blocks[1].attn.q.weight.data)
    assert 0 < model.semantic_token2.data.std() < 0.04
    fit(model, Classify(model, drop_path=0.2), batches, steps=3, bar=False)
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    loaded, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = drawn.images[:3].astype("float32") / 255
    assert np.array_equal(loaded.eval()(images).logits.data, model.eval()(images).logits.data)


@pytest.mark.parametrize("options, text", [
    (dict(semantic=(5, 3)), "semantic (5, 3), expected (rows, columns) from 1 x 1 to 4 x 6"),
    (dict(semantic=4), "semantic 4, expected (rows, columns) from 1 x 1 to 4 x 6"),
    (dict(semantic=(2, 0)), "semantic (2, 0), expected (rows, columns) from 1 x 1 to 4 x 6"),
    (dict(base=3), "base 3 of 4 blocks, expected at least 0, and two blocks after them"),
    (dict(depth=1), "base 0 of 1 blocks, expected at least 0, and two blocks after them"),
    (dict(base=1.5), "base 1.5 of 4 blocks, expected at least 0, and two blocks after them"),
    (dict(queries="all"), "queries 'all', expected one of both, pooled, learned"),
    (dict(layer_scale="1"), "layer_scale '1', expected a number"),
    (dict(shortcut=2), "shortcut 2, expected True or False")])
def test_options_that_make_no_stvit(options, text):
    with refuses(f"STViT: {text}"):
        STViT(**SMALL | options)
