"""The layers of a transformer: what they compute, and the residual branches of a block."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken
from tinytoken import nn


def test_layers_compute_what_they_say():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    linear, norm = nn.Linear(4, 5).astype("float64"), nn.LayerNorm(4, eps=0.1).astype("float64")
    for p in (*linear.parameters(), *norm.parameters()):
        p.data[...] = rng.standard_normal(p.shape)
    np.testing.assert_allclose(linear(x).data, x @ linear.weight.data.T + linear.bias.data, rtol=1e-12)
    np.testing.assert_allclose(nn.Linear(4, 5, bias=False).astype("float64")(x).data, 0)
    centred = x - x.mean(axis=-1, keepdims=True)
    wanted = centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + 0.1)
    wanted = wanted * norm.weight.data + norm.bias.data
    np.testing.assert_allclose(norm(x).data, wanted, rtol=1e-11)
    mlp = nn.MLP(4, 7).astype("float64")
    for p in mlp.parameters():
        p.data[...] = rng.standard_normal(p.shape)
    np.testing.assert_allclose(mlp(x).data, mlp.fc2(nn.GELU()(mlp.fc1(x))).data, rtol=1e-12)
    assert mlp.fc1.weight.shape == (7, 4) and mlp.fc2.weight.shape == (4, 7)


def test_the_patch_embedding_is_a_convolution_with_stride():
    rng = np.random.default_rng(0)
    layer, images = nn.PatchEmbed(6, 2, 4, channels=3).astype("float64"), rng.standard_normal((2, 3, 6, 6))
    layer.proj.weight.data[...] = rng.standard_normal((4, 3, 2, 2))
    layer.proj.bias.data[...] = rng.standard_normal(4)
    out = layer(images).data
    for b, d, r, c in np.ndindex(2, 4, 3, 3):
        patch = images[b, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2]
        wanted = (patch * layer.proj.weight.data[d]).sum() + layer.proj.bias.data[d]
        assert out[b, 3 * r + c, d] == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("size, grid", [((4, 6), (2, 3)), ([6, 2], (3, 1)), (6, (3, 3))], ids=str)
def test_pictures_may_be_rectangular(size, grid):
    """Row by row; the patch at (r, c) is token r columns + c."""
    rng = np.random.default_rng(0)
    layer, (height, width) = nn.PatchEmbed(size, 2, 4).astype("float64"), nn.both_sides(size)
    layer.proj.weight.data[...] = rng.standard_normal((4, 3, 2, 2))
    images = rng.standard_normal((2, 3, height, width))
    out = layer(images).data
    assert layer.grid == grid and out.shape == (2, grid[0] * grid[1], 4)
    for r, c in np.ndindex(grid):
        patch = images[:, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2]
        same(out[:, r * grid[1] + c], np.einsum("bcij,dcij->bd", patch, layer.proj.weight.data))
    if height != width:
        with refuses(f"images: (2, 3, {width}, {height}), expected (B, 3, {height}, {width})"):
            layer(images.swapaxes(2, 3))


@pytest.mark.parametrize("size", [(4, 5), (5, 4), [3, 4], 5], ids=str)
def test_patches_must_divide_both_sides(size):
    with refuses(f"PatchEmbed: patch_size 2 does not divide image_size {size}"):
        nn.PatchEmbed(size, 2, 4)


# Attention and the branches of a block

def tokens(batch=2, count=5, dim=8):
    return np.random.default_rng(1).standard_normal((batch, count, dim))


@pytest.mark.parametrize("options", [{}, dict(keep=np.array([[1, 0, 1, 1, 0]] * 2)),
                                     dict(official=True, keep=np.ones((2, 5))),
                                     dict(sees_itself=False, keep=np.array([[1, 0, 1, 1, 0]] * 2))],
                         ids=["plain", "keep", "official", "not itself"])
def test_attention_is_its_two_halves(options):
    layer, x = shaken(nn.Attention(8, 2)), tokens()
    q, k, v = layer.project(x)
    assert q.shape == k.shape == v.shape == (2, 2, 5, 4)
    seen = []
    out = layer(x, **options, attention=seen)
    assert np.array_equal(out.data, layer.attend(q, k, v, **options).data)
    mixed, A = tt.ops.attention(q, k, v, options.get("keep"), weights=True,
                                **{n: o for n, o in options.items() if n != "keep"})
    assert len(seen) == 1 and np.array_equal(seen[0].data, A.data) and not seen[0].requires_grad
    same(out.data, layer.proj(tt.ops.merge_heads(mixed)).data)


def test_a_block_is_its_branches():
    block, x = shaken(nn.Block(8, 2)), tokens()
    middle = x + block.attn(block.norm1(x)).data
    same(block(x).data, middle + block.mlp(block.norm2(middle)).data)
    seen, again = [], []
    keep = np.array([[1, 1, 0, 1, 1]] * 2)
    block(x, keep=keep, attention=seen)
    block.attn(block.norm1(x), keep=keep, attention=again)
    assert np.array_equal(seen[0].data, again[0].data)


def test_factors_scale_what_each_branch_adds_for_each_image():
    block, x, paths = shaken(nn.Block(8, 2)), tokens(), np.array([[0.5, 2.0], [0.0, 3.0]])
    added = block.attn(block.norm1(x)).data
    middle = x + paths[:, 0, None, None] * added
    same(nn.attention_branch(x, block.norm1, block.attn, paths[:, 0]).data, middle)
    expected = middle + paths[:, 1, None, None] * block.mlp(block.norm2(middle)).data
    same(nn.mlp_branch(middle, block.norm2, block.mlp, paths[:, 1]).data, expected)
    same(block(x, paths).data, expected)
    same(block(x, np.zeros((2, 2))).data, x)
    assert nn.scaled(x, None) is x and nn.column(None, 3) is None
    assert np.array_equal(nn.column(paths, 1), [2.0, 3.0])


def test_the_gradient_of_a_block_with_factors():
    block, paths = shaken(nn.Block(8, 2)), np.array([[0.5, 2.0], [0.0, 3.0]])
    names = [name for name, _ in block.named_parameters()]
    tt.gradcheck(lambda x, *_: block(x, paths), tokens(), *block.parameters(), names=["x", *names],
                 max_elements=60)


def test_a_linear_layers_weight_and_gradient_lie_column_after_column():
    layer, rng = nn.Linear(3, 5), np.random.default_rng(0)
    layer.weight.data[...] = np.arange(15).reshape(5, 3)
    for change in (nn.flatten, lambda _: layer.astype("float64"), nn.flatten):
        flat = change(layer.parameters())
        assert layer.weight.shape == (5, 3) and layer.weight.data.T.flags.c_contiguous
        assert layer.state_dict()["weight"].flags.c_contiguous
        for array in (layer.state_dict()["weight"], layer.weight.data):
            np.testing.assert_array_equal(array, np.arange(15).reshape(5, 3))
        x, g = (rng.standard_normal((4, n)).astype(layer.weight.dtype) for n in (3, 5))
        layer.zero_grad()
        (layer(tt.Tensor(x)) * g).sum().backward()
        assert layer.weight.grad.T.flags.c_contiguous
        np.testing.assert_allclose(layer.weight.grad, g.T @ x, rtol=1e-5)
    assert np.shares_memory(layer.weight.data, flat.data) and np.shares_memory(layer.weight.grad, flat.grad)
    np.testing.assert_array_equal(flat.cut(flat.data)[0], layer.weight.data)
