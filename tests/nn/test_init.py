"""Starting weights: their spread, and that they depend on the seed and on names alone."""
import dataclasses

import numpy as np
import pytest

import tinytoken as tt
from equations import resize_by_loops
from small import MODELS, SMALL, each_model
from tinytoken import nn
from tinytoken.models import LookupViT, ViT


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


@each_model
def test_starting_weights_are_xavier_with_small_ends_of_branches(make):
    for name, module in make().named_modules():
        if not isinstance(module, (nn.Linear, nn.Projection)):
            continue
        weight = module.weight.data
        fan_in, fan_out = weight[0].size, len(weight) // (3 if name.endswith("qkv") else 1)
        ends = ("proj", "fc2", "gather_proj", "infuse_proj")
        small = name.split(".")[-1] in ends and name != "patch_embed.proj"
        bound = (6 / (fan_in + fan_out)) ** 0.5 * (0.3 if small else 1)
        assert np.abs(weight).max() <= bound, name
        if weight.size > 60:  # it fills the interval evenly
            assert np.abs(weight).max() > 0.9 * bound, name
            assert abs(weight.std() - bound / 3 ** 0.5) < 0.15 * bound, name
            assert abs(weight.mean()) < 0.2 * bound, name
        # a predictor's last: see test_untrained_predictors_keep_what_the_ratios_ask
        if not name.endswith("out_conv.4"):
            assert module.bias is None or (module.bias.data == 0).all(), name


@each_model
def test_starting_weights_depend_on_the_seed_and_the_name_alone(make):
    tt.manual_seed(3)
    first = make().state_dict()
    tt.random.uniform(100, site="anything")
    again = make().state_dict()  # made after other draws, and after another model
    tt.manual_seed(4)
    other = make().state_dict()
    matrices = [name for name, a in first.items() if a.ndim in (2, 4)]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(not np.array_equal(first[name], other[name]) for name in matrices)
    values = {name: first[name].ravel()[:4] / np.abs(first[name]).max() for name in matrices}
    assert len({v.tobytes() for v in values.values()}) == len(matrices)  # no two layers start alike


def test_a_deeper_model_starts_with_the_same_first_blocks():
    shallow, deep = (ViT(**SMALL | dict(depth=d)).state_dict() for d in (1, 3))
    assert all(np.array_equal(deep[name], a) for name, a in shallow.items())


@pytest.mark.parametrize("grid, dim", [((4, 4), 8), ((3, 5), 16), ((2, 2), 10), ((1, 1), 3)], ids=str)
def test_sincos_positions(grid, dim):
    table = nn.sincos_positions(grid, dim)
    assert table.shape == (grid[0] * grid[1], dim) and table.dtype == np.float32
    quarter = dim // 4
    for r, c, i in np.ndindex(*grid, quarter):
        w = 10000 ** (-i / quarter)
        wanted = [np.sin(c * w), np.cos(c * w), np.sin(r * w), np.cos(r * w)]
        np.testing.assert_allclose(table[r * grid[1] + c, i:4 * quarter:quarter], wanted, rtol=0, atol=1e-6)
    assert (table[:, 4 * quarter:] == 0).all()
    assert len(np.unique(table, axis=0)) == len(table) or quarter == 0  # no two places look alike


def test_models_start_from_the_scaled_table():
    table = nn.sincos_positions((4, 4), 8)
    vit, look = ViT(**SMALL), LookupViT(**SMALL, compressed=(4, 4))
    assert (vit.pos_embed.data[0, 0] == 0).all()
    mean = ViT(**SMALL, pool="mean")
    for p in (vit.pos_embed.data[:, 1:], mean.pos_embed, look.pos_embed, look.pos_embed_compressed):
        np.testing.assert_allclose(p, 0.7 * table[None], rtol=0, atol=1e-6)
    smaller = LookupViT(**SMALL, compressed=(2, 3)).pos_embed_compressed.data[0]
    np.testing.assert_allclose(smaller, resize_by_loops((4, 4), (2, 3)) @ (0.7 * table), rtol=0, atol=1e-6)
    assert 0.002 < np.abs(vit.cls_token.data).std() < 0.04


def test_float32_everywhere():
    for make in MODELS.values():
        assert all(p.dtype == np.float32 for p in make().parameters())


@each_model
def test_keys_start_as_queries_where_that_is_asked_for(make):
    model = make()
    plain, config = model.state_dict(), dataclasses.asdict(model.config)
    tied = type(model)(**config | dict(keys_as_queries=True)).state_dict()
    keys = {name for name in plain if name.endswith(("qkv.weight", "gather_k.weight"))}
    assert keys and all(np.array_equal(tied[name], plain[name]) for name in plain.keys() - keys)
    for name in keys:
        if name.endswith("qkv.weight"):
            (q, k, v), (plain_q, plain_k, plain_v) = (np.split(of[name], 3) for of in (tied, plain))
            assert np.array_equal(v, plain_v)
        else:
            k, plain_k = tied[name], plain[name]
            q = plain_q = plain[name.replace("gather_k", "gather_q")]
        assert np.array_equal(k, q) and np.array_equal(q, plain_q) and not np.array_equal(k, plain_k), name
