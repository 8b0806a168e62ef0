"""ShuntedTransformer: what it costs, its attention by hand, any size, what it refuses. (Against the official
code: test_official_shunted.py.)"""
import dataclasses
import json

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken import models
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, scenes
from tinytoken.models import ShuntedTransformer
from tinytoken.models.shunted import ShuntedAttention
from tinytoken.tasks import Classify
from tinytoken.train import checkpoint, fit

SMALL = dict(image_size=(16, 24), dims=(4, 6, 8), depths=(1, 2, 1), num_classes=5, patch_size=2,
             heads=(2, 2, 2), rates=((4, 2), (2, 2), 1), mlp_ratios=(3, 2, 1))


def pictures(batch=2, seed=0, size=(16, 24)):
    return np.random.default_rng(seed).standard_normal((batch, 3, *size))


def expected_macs(c):
    """Stem, halvings, classifier; of a block with n1 and n2 keys for the two halves of the heads: q and proj
    2 N C^2, the convolutions 2 N C^2, keys and values (n1 + n2) C^2, their convolution 9 (n1 + n2) C / 2, the
    attention N (n1 + n2) C; in plain attention 4 N C^2, 9 N C, 2 N^2 C; the MLP's 2 m N C^2 and 9 m N C."""
    height, width = (side // c.patch_size for side in tt.nn.both_sides(c.image_size))
    stem, D = height * width * (c.patch_size // 2) ** 2, c.dims[0]  # positions of the stem's first map
    total = stem * D * (49 * c.channels + 9 * D * c.stem_convs + D)
    for s, (C, depth) in enumerate(zip(c.dims, c.depths)):
        N = height * width >> 2 * s
        total += 9 * N * C * c.dims[s - 1] if s else 0
        if c.rates[s] == 1:
            block = 4 * N * C ** 2 + 9 * N * C + 2 * N ** 2 * C
        else:
            keys = sum(N // r ** 2 for r in c.rates[s])
            block = 4 * N * C ** 2 + keys * (C ** 2 + 4.5 * C + N * C)
        total += depth * (block + c.mlp_ratios[s] * (2 * N * C ** 2 + 9 * N * C))
    return total + C * c.num_classes


@pytest.mark.parametrize("more", [{}, dict(stem_convs=2), dict(rates=((1, 1), (2, 1), (1, 1))),
                                  dict(patch_size=4, rates=(2, 1, 1), image_size=(32, 48)),
                                  dict(heads=(2, 6, 1))], ids=str)
def test_macs(more):
    model = ShuntedTransformer(**SMALL | more)
    images = np.zeros((2, 3, *model.config.image_size), "float32")
    assert tt.macs(model, images).total == expected_macs(model.config)


def test_against_a_vits_block():
    """A block's cost, relative to 12 N C^2 + 2 N^2 C: it pays off from hundreds of tokens on."""
    for side, rates, ratio in ((8, (4, 2), 0.97), (16, (4, 2), 0.78), (32, (8, 4), 0.40)):
        N, C, images = side ** 2, 96, np.zeros((1, 3, 2 * side, 2 * side), "float32")
        made = (ShuntedTransformer(2 * side, (C,), (depth,), rates=(rates,), patch_size=2) for depth in (1, 2))
        one, two = (tt.macs(model, images).total for model in made)
        assert (two - one) / (12 * N * C ** 2 + 2 * N ** 2 * C) == pytest.approx(ratio, abs=0.005)


def test_published_sizes():
    """Parameters of T, S and B, in millions, as table 1 of the paper has them."""
    for depths, convs, millions in (((1, 2, 4, 1), 0, 11.5), ((2, 4, 12, 1), 1, 22.4),
                                    ((3, 4, 24, 2), 2, 39.6)):
        model = ShuntedTransformer(image_size=224, dims=(64, 128, 256, 512), depths=depths, num_classes=1000,
                                   rates=(8, 4, 2, 1), mlp_ratios=(8, 8, 4, 4), stem_convs=convs)
        assert abs(model.parameter_count() / 1e6 - millions) < 0.06
        assert model.config.rates == ((8, 4), (4, 2), (2, 1), 1) and model.config.heads == (2, 4, 8, 16)


def test_each_group_of_heads_reads_its_own_map():
    """By hand, for three heads: the first sees the map merged by 4, the other two that merged by 2."""
    attn, grid = shaken(ShuntedAttention(6, 3, (4, 2), True)), (4, 8)
    w, x = attn.state_dict(), np.random.default_rng(0).standard_normal((2, 32, 6))
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    q, read = linear(x, "q"), []
    for i, (rate, first, width) in enumerate(((4, 0, 2), (2, 2, 4)), 1):
        rows, columns = 4 // rate, 8 // rate
        squares = x.reshape(2, rows, rate, columns, rate, 6).transpose(0, 1, 3, 5, 2, 4)
        u = squares.reshape(2, rows * columns, -1) @ w[f"sr{i}.weight"].reshape(6, -1).T + w[f"sr{i}.bias"]
        u = tt.ops.gelu(tt.ops.layer_norm(u, w[f"norm{i}.weight"], w[f"norm{i}.bias"], eps=1e-5)).data
        k, v = np.split(linear(u, f"kv{i}"), 2, axis=2)
        padded = np.pad(v.reshape(2, rows, columns, width), ((0, 0), (1, 1), (1, 1), (0, 0)))
        near = sum(padded[:, a:a + rows, b:b + columns] * w[f"local_conv{i}.weight"][:, 0, a, b]
                   for a in range(3) for b in range(3)) + w[f"local_conv{i}.bias"]
        v = v + near.reshape(2, -1, width)
        for h in range(0, width, 2):
            scores = q[:, :, first + h:first + h + 2] @ k[:, :, h:h + 2].swapaxes(1, 2) / 2 ** 0.5
            read.append(softmax(scores) @ v[:, :, h:h + 2])
    same(attn(tt.Tensor(x), grid).data, linear(np.concatenate(read, axis=2), "proj"))


def test_gradients_of_the_whole_model():
    model, paths = shaken(ShuntedTransformer(**SMALL)), np.random.default_rng(2).uniform(0.5, 2, (2, 4, 2))
    names, parameters = zip(*model.train().named_parameters())

    def outputs(*_):
        out = model(pictures(), paths=paths)
        return model.loss(out, np.array([0, 3]))[0], *out.maps
    gradcheck(outputs, *parameters, names=names, max_elements=8)


def test_keys_start_as_queries_if_asked():
    model = ShuntedTransformer(**SMALL, keys_as_queries=True)
    two, plain = model.block1[0].attn, model.block3[0].attn
    assert np.array_equal(two.kv1.weight.data[:2], two.q.weight.data[:2])
    assert np.array_equal(two.kv2.weight.data[:2], two.q.weight.data[2:])
    assert np.array_equal(plain.kv.weight.data[:8], plain.q.weight.data)
    other = ShuntedTransformer(**SMALL).block1[0].attn
    assert not np.array_equal(other.kv1.weight.data[:2], other.q.weight.data[:2])


def test_configuration_checkpoint_and_training(tmp_path):
    model = ShuntedTransformer(**SMALL)
    again = models.create("shuntedtransformer", **json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config and again.config.rates == ((4, 2), (2, 2), 1)
    drawn = scenes.make_scenes(40, size=16)
    batches = Batches(drawn.images, drawn.labels, 12, seed=0)
    model = ShuntedTransformer(image_size=16, patch_size=2, dim=12, depth=4, heads=3)
    assert model.config.rates == ((4, 2), (2, 1), 1) and model.config.heads == (3, 6, 12)
    fit(model, Classify(model, drop_path=0.2), batches, steps=3, bar=False)
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    loaded, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = drawn.images[:3].astype("float32") / 255
    assert np.array_equal(loaded.eval()(images).logits.data, model.eval()(images).logits.data)
    assert model.show(model(images, trace=True)) == []


@pytest.mark.parametrize("options, text", [
    (dict(rates=(3, 2, 1)),
     "rates (3, 1) in stage 0, expected 1, or two numbers that divide the sides of its map, 8 x 12"),
    (dict(rates=((4, 2, 1), 2, 1)),
     "rates (4, 2, 1) in stage 0, expected 1, or two numbers that divide the sides of its map, 8 x 12"),
    (dict(rates=(4, "a", 1)),
     "rates 'a' in stage 1, expected 1, or two numbers that divide the sides of its map, 4 x 6"),
    (dict(rates=(2, 1)), "rates (2, 1), expected one for each of 3 stages"),
    (dict(rates=4), "rates 4, expected one for each of 3 stages"),
    (dict(mlp_ratios=(4, 0, 2)), "mlp_ratios (4, 0, 2), expected positive numbers"),
    (dict(mlp_ratios=(4, 2)), "mlp_ratios (4, 2), expected one for each of 3 stages"),
    (dict(heads=(1, 2, 2)), "1 head in stage 0, expected at least 2, for two rates"),
    (dict(heads=(2, 4, 8)), "heads (2, 4, 8), expected numbers that divide dims (4, 6, 8)"),
    (dict(heads=(2, 2)), "heads (2, 2), expected a number for each of 3 stages"),
    (dict(stem_convs=-1), "stem_convs -1, expected a whole number that is not negative"),
    (dict(patch_size=1), "patch_size 1, expected an even number: the stem halves pictures first"),
    (dict(image_size=(16, 20)), "image_size (16, 20), expected multiples of 8: patches of 2 pixels, halved 2 "
                                "times")])
def test_options_that_make_no_shunted_transformer(options, text):
    with refuses(f"ShuntedTransformer: {text}"):
        ShuntedTransformer(**SMALL | options)


def test_pictures_of_another_size_are_refused():
    with refuses("images: (2, 3, 24, 16), expected (B, 3, 16, 24)"):
        ShuntedTransformer(**SMALL)(pictures(size=(24, 16)))
    with refuses("CrossAttention: heads 3 do not divide dim 8"):
        tt.nn.CrossAttention(8, 3)
