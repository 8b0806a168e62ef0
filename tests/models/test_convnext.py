"""ConvNeXt and the form of it with two paths: what it is made of, what it costs, what it refuses. (What holds
of every pyramid: test_pyramids.py.)"""
import math

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken
from tinytoken.models import ConvNeXt, DynamicConvNeXt, load_weights

SMALL = dict(image_size=(16, 24), dims=(4, 8, 12), depths=(1, 3, 1), num_classes=5, patch_size=2)


def expected_macs(c, counts=()):
    """Stem, halvings, blocks (a 7 x 7 filter per channel, and 2 x mlp_ratio C^2 or, on the fast path, C^2),
    predictors and classifier."""
    height, width = (side // c.patch_size for side in c.image_size)
    total, before = height * width * c.channels * c.patch_size ** 2 * c.dims[0], None
    for s, (C, depth) in enumerate(zip(c.dims, c.depths)):
        N = height * width >> 2 * s
        total += N * 4 * before * C if s else 0
        for i in range(depth):
            adaptive = counts and s == len(c.dims) - 2 and i >= c.prune_before[0]
            if adaptive and i in c.prune_before:
                slow = counts[c.prune_before.index(i)]
                total += 1.625 * N * C ** 2 + N * C / 2
            on_slow = slow if adaptive else N
            total += 49 * N * C + 2 * c.mlp_ratio * on_slow * C ** 2 + (N - on_slow) * C ** 2
        before = C
    return total + before * c.num_classes


@pytest.mark.parametrize("dims", [(4, 8, 12), (8, 16, 12)])
def test_macs(dims):
    images = np.zeros((2, 3, 16, 24), "float32")
    plain = ConvNeXt(**SMALL | dict(dims=dims), mlp_ratio=3)
    assert tt.macs(plain, images).total == expected_macs(plain.config)
    model = DynamicConvNeXt(**SMALL | dict(dims=dims), prune_before=(0, 2), keep_ratios=(0.7, 0.3))
    assert model.counts == [16, 7] and tt.macs(model, images).total == expected_macs(model.config, model.counts)


def test_published_sizes():
    """Parameters of ConvNeXt-T, -S and -B and of their dynamic forms; the cost as the official README has it."""
    for depths, dim, plain, dynamic, places in (((3, 3, 9, 3), 96, 28.59, 30.50, (1, 2, 3)),
                                                ((3, 3, 27, 3), 96, 50.22, 54.52, (3, 6, 9))):
        sizes = dict(image_size=224, dims=tuple(dim << s for s in range(4)), depths=depths, num_classes=1000)
        assert round(ConvNeXt(**sizes).parameter_count() / 1e6, 2) == plain
        model = DynamicConvNeXt(**sizes, prune_before=places)
        assert round(model.parameter_count() / 1e6, 2) == dynamic and model.counts == [137, 97, 58]
    by_one_width = ConvNeXt(image_size=224, dim=96, depth=18, heads=3)
    assert by_one_width.config.dims == (96, 192, 384, 768) and by_one_width.config.depths == (3, 3, 9, 3)


def test_a_block_by_loops():
    """49 products for each value of the map, then norm and MLP of each position."""
    model = shaken(ConvNeXt(**SMALL))
    block, grid = model.stages[1].blocks[0], (3, 5)
    x = np.random.default_rng(0).standard_normal((2, 15, 8))
    wide = np.zeros((2, 9, 11, 8))
    wide[:, 3:6, 3:8] = x.reshape(2, 3, 5, 8)
    mixed = np.zeros_like(x)
    for n, (r, s) in enumerate(np.ndindex(*grid)):
        for i, j in np.ndindex(7, 7):
            mixed[:, n] += wide[:, r + i, s + j] * block.conv_dw.weight.data[:, 0, i, j]
    mixed += block.conv_dw.bias.data
    normed = (mixed - mixed.mean(-1, keepdims=True)) / np.sqrt(mixed.var(-1, keepdims=True) + 1e-6)
    normed = normed * block.norm.weight.data + block.norm.bias.data
    hidden = normed @ block.mlp.fc1.weight.data.T + block.mlp.fc1.bias.data
    hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / 2 ** 0.5))
    added = (hidden @ block.mlp.fc2.weight.data.T + block.mlp.fc2.bias.data) * block.gamma.data
    paths = np.array([[2.0], [0.5]])
    same(block(tt.Tensor(x), grid, paths).data, x + added * paths[:, :, None])


def test_branches_without_a_scale():
    model = DynamicConvNeXt(**SMALL, prune_before=(0,), keep_ratios=(0.5,), layer_scale=0)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.endswith("gamma") for name in names) and "stages.1.blocks.0.fast_path.1.weight" in names
    scaled = dict(DynamicConvNeXt(**SMALL, prune_before=(0,), keep_ratios=(0.5,)).named_parameters())
    assert len(scaled) == len(names) + 5 + 3
    assert (scaled["stages.1.blocks.2.fast_path_gamma"].data == np.float32(1e-6)).all()


def test_a_head_of_ones_own_keeps_the_norm():
    source, model = shaken(ConvNeXt(**SMALL)).astype("float32"), ConvNeXt(**SMALL | dict(num_classes=3))
    notes = load_weights(model, source.state_dict(), new_head=True, quiet=True)
    assert np.array_equal(model.head.norm.weight.data, source.head.norm.weight.data)
    assert model.head.fc.weight.shape == (3, 12) and not any("heads" in note for note in notes)


@pytest.mark.parametrize("options, text", [
    (dict(dims=(4, 0, 8)), "dims (4, 0, 8), expected a positive whole number"),
    (dict(dims=4), "dims 4, expected a number for each stage"),
    (dict(dims=()), "dims (), expected a number for each stage"),
    (dict(depths=(1, 2)), "widths (4, 8, 12) and depths (1, 2), expected as many"),
    (dict(layer_scale=None), "layer_scale None, expected a number")])
def test_options_that_make_no_convnext(options, text):
    for kind in (ConvNeXt, DynamicConvNeXt):
        with refuses(f"{kind.__name__}: {text}"):
            kind(**SMALL | options)
