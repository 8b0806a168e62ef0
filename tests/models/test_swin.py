"""Swin and the form of it with two paths: what it costs, its windows, its names, what it refuses. (What holds
of every pyramid: test_pyramids.py.)"""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken
from tinytoken import models
from tinytoken.models import DynamicSwin, Swin, load_weights
from tinytoken.models.swin import PatchMerging

SMALL = dict(image_size=(16, 24), embed_dim=4, depths=(1, 3, 1), num_classes=5, patch_size=2, heads=(1, 2, 2),
             window_size=3)


def expected_macs(c, counts=()):
    """Patches, halvings, per block 4 C^2 and 2 T C of attention for each position of windows, filled up, and
    2 x mlp_ratio C^2 or, on the fast path, C^2 for each of the map; predictors and classifier."""
    height, width = (side // c.patch_size for side in c.image_size)
    total = height * width * c.channels * c.patch_size ** 2 * c.embed_dim
    for s, (C, depth) in enumerate(zip(c.widths, c.depths)):
        sides = height >> s, width >> s
        N, window = sides[0] * sides[1], [min(c.window_size, side) for side in sides]
        in_windows, T = np.prod([-(-side // w) * w for side, w in zip(sides, window)]), window[0] * window[1]
        total += N * 2 * C * C if s else 0  # 4 of the map before, of half the width
        for i in range(depth):
            adaptive = counts and s == len(c.widths) - 2 and i >= c.prune_before[0]
            if adaptive and i in c.prune_before:
                slow = counts[c.prune_before.index(i)]
                total += 1.625 * N * C ** 2 + N * C / 2
            on_slow = slow if adaptive else N
            total += in_windows * (4 * C ** 2 + 2 * T * C)
            total += 2 * c.mlp_ratio * on_slow * C ** 2 + (N - on_slow) * C ** 2
    return total + C * c.num_classes


@pytest.mark.parametrize("window", [2, 3, 4, 9])
def test_macs(window):
    images, sizes = np.zeros((2, 3, 16, 24), "float32"), SMALL | dict(window_size=window)
    plain = Swin(**sizes, mlp_ratio=3)
    assert tt.macs(plain, images).total == expected_macs(plain.config)
    model = DynamicSwin(**sizes, prune_before=(0, 2), keep_ratios=(0.7, 0.3))
    assert model.counts == [16, 7] and tt.macs(model, images).total == expected_macs(model.config, model.counts)


def test_published_sizes():
    """Parameters of Swin-T and Swin-S and of their dynamic forms, at 224 pixels."""
    for depths, plain, dynamic, places in (((2, 2, 6, 2), 28.29, 29.76, (1, 2, 3)),
                                           ((2, 2, 18, 2), 49.61, 52.71, (2, 4, 6))):
        sizes = dict(image_size=224, embed_dim=96, depths=depths, num_classes=1000, window_size=7)
        assert round(Swin(**sizes).parameter_count() / 1e6, 2) == plain
        model = DynamicSwin(**sizes, prune_before=places)
        assert round(model.parameter_count() / 1e6, 2) == dynamic and model.counts == [137, 97, 58]
        assert model.config.heads == (3, 6, 12, 24)
    by_one_width = Swin(image_size=224, dim=96, depth=12, heads=3, window_size=7)
    assert (by_one_width.config.widths, by_one_width.config.depths) == ((96, 192, 384, 768), (2, 2, 6, 2))


def test_windows_move_in_every_second_block_and_never_beyond_a_side():
    model = Swin(image_size=(32, 64), embed_dim=4, depths=(2, 2, 3), heads=2, patch_size=4)
    assert [(b.attn.window, b.attn.shift) for b in model.blocks] == [
        ((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 4), (0, 0)), ((4, 4), (0, 2)), ((2, 4), (0, 0)),
        ((2, 4), (0, 0)), ((2, 4), (0, 0))]
    assert model.config.heads == (2, 4, 8) and model.grids == [(8, 16), (4, 8), (2, 4)]
    table = model.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (49, 2) and 0.01 < table.data.std() < 0.03 and not table.decay
    q, k, _ = np.split(model.layers[1].blocks[1].attn.qkv.weight.data, 3)
    assert not np.array_equal(q, k)
    q, k, _ = np.split(Swin(**SMALL, keys_as_queries=True).blocks[0].attn.qkv.weight.data, 3)
    assert np.array_equal(q, k)


@pytest.mark.parametrize("paths", [None, np.array([[2.0, 0], [0.5, 3]])], ids=["all", "factors"])
def test_a_block_is_two_branches(paths):
    block, x = shaken(Swin(**SMALL)).layers[1].blocks[1], np.random.default_rng(0).standard_normal((2, 24, 8))
    first, second = (1, 1) if paths is None else (paths[:, i, None, None] for i in (0, 1))
    half = x + first * block.attn(block.norm1(tt.Tensor(x)), (4, 6)).data
    added = block.mlp(block.norm2(tt.Tensor(half))).data
    same(block(tt.Tensor(x), (4, 6), paths).data, half + second * added)


def test_merging_is_squares_side_by_side():
    merging, x = shaken(PatchMerging(3)), np.random.default_rng(0).standard_normal((2, 24, 3))
    square = x.reshape(2, 4, 6, 3)
    out = merging(tt.Tensor(x), (4, 6)).data.reshape(2, 2, 3, 6)
    for r, c in np.ndindex(2, 3):
        row = np.concatenate([square[:, 2 * r + i, 2 * c + j] for j in (0, 1) for i in (0, 1)], axis=1)
        same(out[:, r, c], merging.reduction(merging.norm(tt.Tensor(row))).data)


def official_names(model):
    """A model's arrays under the official names, where halving ends a stage, with Swin's constants."""
    state = {"layers.0.blocks.1.attn_mask": np.zeros((4, 9, 9)),
             "layers.0.blocks.0.attn.relative_position_index": np.zeros((9, 9), "int64")}
    for name, array in model.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = array
    return state


def test_official_names():
    sizes = SMALL | dict(prune_before=(1,), keep_ratios=(0.5,))
    source, model = DynamicSwin(**sizes), DynamicSwin(**sizes)
    for p in source.parameters():
        p.data += 0.1
    state = official_names(source)
    assert {"patch_embed.norm.bias", "layers.0.downsample.reduction.weight", "layers.1.downsample.norm.weight",
            "layers.1.blocks.2.fastmlp.fc1.1.weight", "layers.1.score_predictor.0.in_conv.1.weight",
            "layers.1.blocks.0.attn.relative_position_bias_table", "head.weight", "norm.bias"} <= state.keys()
    notes = load_weights(model, state, quiet=True)
    assert all(np.array_equal(a, model.state_dict()[name]) for name, a in source.state_dict().items())
    assert notes[0] == "left out layers.0.blocks.1.attn_mask, layers.0.blocks.0.attn.relative_position_index"
    other = Swin(**SMALL | dict(num_classes=3))
    load_weights(other, Swin(**SMALL).state_dict(), new_head=True, quiet=True)
    with pytest.raises(tt.InputError, match="other shapes: layers.0.blocks.0.attn.relative_position_bias_table"):
        load_weights(Swin(**SMALL | dict(window_size=4)), Swin(**SMALL).state_dict(), quiet=True)


@pytest.mark.parametrize("options, text", [
    (dict(embed_dim=0), "embed_dim 0, expected a positive whole number"),
    (dict(embed_dim=(4, 8, 16)), "embed_dim (4, 8, 16), expected a positive whole number"),
    (dict(heads=(1, 2)), "heads (1, 2), expected a number for each of 3 stages"),
    (dict(heads=0), "heads 0, expected a positive whole number, or one for each stage"),
    (dict(window_size=2.5), "window_size 2.5, expected a positive whole number"),
    (dict(depths=(1, 0)), "depths (1, 0), expected a positive whole number")])
def test_options_that_make_no_swin(options, text):
    for kind in (Swin, DynamicSwin):
        with refuses(f"{kind.__name__}: {text}"):
            kind(**SMALL | options)
    with refuses("Attention: heads 3 do not divide dim 4"):
        models.create("swin", **SMALL | dict(heads=3))
