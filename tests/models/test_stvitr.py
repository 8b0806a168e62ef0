"""STViT-R: what it costs, its dumbbells, maps of any size that windows divide, what it refuses. (Against the
official code: test_official_stvitr.py.)"""
import dataclasses
import json

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken
from tinytoken import models
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, scenes
from tinytoken.models import STViTR, Swin
from tinytoken.tasks import Classify
from tinytoken.train import checkpoint, fit

SMALL = dict(image_size=(16, 24), embed_dim=4, depths=(1, 5, 1), num_classes=5, patch_size=2, heads=(1, 2, 2),
             window_size=2, seeds=1, reach=3)  # maps of 8 x 12, 4 x 6, 2 x 3


def pictures(batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 24))


def expected_macs(c):
    """Convolutions of the patches, halvings, classifier, Swin's blocks (4 N C^2 + 2 N T C and the MLP); of a
    block in which q tokens read k others, 2 q C^2 + 2 k C^2 + 2 q k C and the MLP, 2 mlp_ratio q C^2."""
    sides = [side // c.patch_size for side in tt.nn.both_sides(c.image_size)]
    halvings, total = c.patch_size.bit_length() - 1, 0
    widths = [c.channels, *(c.embed_dim >> i for i in reversed(range(halvings)))]
    for i, (before, dim) in enumerate(zip(widths, widths[1:])):
        total += (sides[0] * sides[1] << 2 * (halvings - 1 - i)) * 9 * before * dim
    for s, (C, depth) in enumerate(zip(c.widths, c.depths)):
        grid = [side >> s for side in sides]
        N, T = grid[0] * grid[1], np.prod([min(c.window_size, side) for side in grid])
        filled = np.prod([-(-side // min(c.window_size, side)) * min(c.window_size, side) for side in grid])
        total += N * 2 * C ** 2 if s else 0
        plain = filled * (4 * C ** 2 + 2 * T * C) + 2 * c.mlp_ratio * N * C ** 2
        block = lambda q, k, each: each * (2 * q * C ** 2 + 2 * k * C ** 2 + 2 * q * k * C
                                           + 2 * c.mlp_ratio * q * C ** 2)
        n, m = N // T, np.prod([min(c.seeds, c.window_size, side) for side in grid])
        M, near = n * m, np.prod([min(c.reach, side) for side in grid])
        between = [block(m, m, n) if place % 2 else block(M, M, 1) for place in range(3, c.dumbbell - 1)]
        dumbbell = plain + block(m, m + near, n) + block(M, M + N, 1) + sum(between) + block(N, M, 1)
        total += depth // c.dumbbell * dumbbell if s == c.semantic_stage else depth * plain
    return total + C * c.num_classes


@pytest.mark.parametrize("more", [{}, dict(depths=(1, 8, 1), dumbbell=4),
                                  dict(semantic_stage=0, depths=(6, 1, 1)),
                                  dict(window_size=4, seeds=2, image_size=(32, 16), reach=5),
                                  dict(window_size=9, seeds=2, reach=9, depths=(1, 1, 4), semantic_stage=2)],
                         ids=str)
def test_macs(more):
    model = STViTR(**SMALL | more, relative_pos=True, mlp_ratio=3)
    images = np.zeros((2, 3, *model.config.image_size), "float32")
    assert tt.macs(model, images).total == expected_macs(model.config)


def test_a_third_of_swin_s_is_saved():
    """At 224 pixels, with the published sizes; and so are they chosen where nothing is said."""
    sizes = dict(image_size=224, embed_dim=96, depths=(2, 2, 18, 2), num_classes=1000, window_size=7)
    model, images = STViTR(**sizes), np.zeros((1, 3, 224, 224), "float32")
    c = model.config
    assert (c.semantic_stage, c.dumbbell, c.seeds, c.reach) == (2, 6, 3, 10)
    share = tt.macs(model, images).total / tt.macs(Swin(**sizes), images).total
    assert share == pytest.approx(0.663, abs=1e-3)
    places = [type(block).__name__ for block in model.layers[2].blocks[6:12]]
    assert places == ["SwinBlock", "Generation", "SemanticBlock", *["PlacedBlock"] * 2, "SemanticBlock"]
    assert [b.cut["window"] for b in model.layers[2].blocks[9:11]] == [(3, 3), (6, 6)]
    assert model.layers[2].semantic_token2.shape == (1, 36, 384)


@pytest.mark.parametrize("use_global", [True, False])
def test_a_stage_by_its_blocks(use_global):
    """Two dumbbells: the tokens are made anew, and learned weights are added in the first alone."""
    model = shaken(STViTR(**SMALL | dict(depths=(1, 8, 1), dumbbell=4), use_global=use_global))
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 10, 2))
    out, stage = model(pictures(), trace=True, paths=paths), model.layers[1]
    x = model.halve(stage, model.layers[0].blocks[0](model.embed(pictures()), (8, 12), paths[:, 0]), (8, 12))
    for first in (0, 4):
        full, generate, again, recover = stage.blocks[first:first + 4]
        at = lambda i: paths[:, 1 + first + i]
        x = full(x, (4, 6), at(0))
        S = generate(x, at(1))
        asked = S + stage.semantic_token2 if use_global and first == 0 else S
        S = again(asked, tt.ops.concat(S, x, axis=1), at(2))
        x = recover(x, S, at(3))
        same(out.semantic[first // 4].data, S.data)
    same(out.maps[1].data, x.data)
    assert [A.shape for A in out.attention] == [(2, 2, 6, 30)] * 2 and model(pictures()).attention == []
    assert ("layers.1.semantic_token2" in model.state_dict()) == use_global
    (title, panel), _ = model.show(out)
    assert title == "STViTR: what its 6 tokens read, of 1 each" and panel.shape == (2, 96)
    squares = panel.reshape(2, 4, 2, 6, 2)
    same(squares[:, :, 1, :, 0].reshape(2, 24), out.attention[0].data[:, :, :, 6:].mean(axis=1).sum(axis=1))


def test_gradients_of_the_whole_model():
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 7, 2))
    for more in (dict(relative_pos=True), dict(shortcut=True, semantic_stage=0, depths=(5, 1, 1), seeds=2)):
        model = shaken(STViTR(**SMALL | more)).train()
        names, parameters = zip(*model.named_parameters())

        def outputs(*_):
            out = model(pictures(), paths=paths)
            return model.loss(out, np.array([0, 3]))[0], *out.maps, *out.semantic
        gradcheck(outputs, *parameters, names=names, max_elements=5)


def test_configuration_checkpoint_and_training(tmp_path):
    drawn = scenes.make_scenes(40, size=16)
    batches = Batches(drawn.images, drawn.labels, 12, seed=0)
    model = models.create("stvitr", image_size=16, patch_size=2, dim=8, depth=6, heads=2, relative_pos=True)
    c = model.config
    assert (c.depths, c.dumbbell, c.seeds, c.reach) == ((1, 4, 1), 4, 2, 5)
    assert models.create("stvitr", **json.loads(json.dumps(dataclasses.asdict(c)))).config == c
    tables = [p for n, p in model.named_parameters() if n.endswith("bias_table")]
    assert len(tables) == 3 and all(0.01 < p.data.std() < 0.03 and not p.decay for p in tables)
    assert 0 < model.layers[1].semantic_token2.data.std() < 0.04
    fit(model, Classify(model, drop_path=0.2), batches, steps=3, bar=False)
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    loaded, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = drawn.images[:3].astype("float32") / 255
    assert np.array_equal(loaded.eval()(images).logits.data, model.eval()(images).logits.data)


@pytest.mark.parametrize("options, text", [
    (dict(window_size=4, reach=5), "window_size 4, expected one that divides the map of stage 1, 4 x 6"),
    (dict(depths=(1, 3, 1)), "dumbbell 3 of 3 blocks in stage 1, expected at least 4, dividing them"),
    (dict(dumbbell=4), "dumbbell 4 of 5 blocks in stage 1, expected at least 4, dividing them"),
    (dict(semantic_stage=3), "semantic_stage 3, expected a whole number from 0 to 2"),
    (dict(seeds=0), "seeds 0, expected a positive whole number"),
    (dict(reach=2.5), "reach 2.5, expected a positive whole number"),
    (dict(seeds=3), "seeds 3, reach 3: expected seeds <= window_size 2 <= reach"),
    (dict(reach=1), "seeds 1, reach 1: expected seeds <= window_size 2 <= reach"),
    (dict(patch_size=1), "patch_size 1, expected 2, 4, 8 or so"),
    (dict(patch_size=8, depths=(4,), heads=1, embed_dim=2),
     "embed_dim 2, expected a multiple of 4 for patches of 8 pixels"),
    (dict(layer_scale=None), "layer_scale None, expected a number"),
    (dict(image_size=(16, 20)), "image_size (16, 20), expected multiples of 8: patches of 2 pixels, halved 2 "
                                "times")])
def test_options_that_make_no_stvitr(options, text):
    with refuses(f"STViTR: {text}"):
        STViTR(**SMALL | options)


def test_pictures_of_another_size_are_refused():
    with refuses("images: (2, 3, 24, 16), expected (B, 3, 16, 24)"):
        STViTR(**SMALL)(pictures().swapaxes(2, 3))
