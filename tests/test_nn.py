"""Modules: names, modes, layers, weights in and out, starting weights."""
import threading

import numpy as np
import pytest

import tinytoken as tt
from equations import resize_by_loops
from small import MODELS, SMALL, each_model, loss_of, refuses
from tinytoken import cost, nn
from tinytoken.models import LookupViT, ViT

@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


class Tree(nn.Module):
    """One of each kind of attribute."""

    def __init__(self):
        self.last, self.items = nn.Linear(2, 1, bias=False), [nn.Linear(1, 2), nn.GELU(), nn.LayerNorm(3)]
        self.scale, self.note, self.empty = nn.Parameter(np.ones(3, "float32")), "not a parameter", []

    def forward(self, x):
        return self.last(x)


# Finding parameters and modules

def test_names_are_found_in_the_order_they_were_set():
    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == [
        "scale", "last.weight", "items.0.weight", "items.0.bias", "items.2.weight", "items.2.bias"]
    assert [name for name, _ in tree.named_modules()] == ["", "last", "items.0", "items.1", "items.2"]
    assert [id(p) for p in tree.parameters()] == [id(p) for _, p in tree.named_parameters()]
    assert tree.parameter_count() == 3 + 2 + 4 + 6


def test_names_of_the_predictors_are_the_official_ones():
    names = [name for name, _ in MODELS["DynamicViT"]().named_parameters() if name.startswith("score_predictor.0.")]
    layers = ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
    assert names == [f"score_predictor.0.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def test_decay_is_for_matrices_of_linear_layers_and_the_patch_embedding():
    for make in MODELS.values():
        for name, p in make().named_parameters():
            assert p.decay == (name.endswith("weight") and p.ndim > 1), name


def test_the_summary():
    assert Tree().summary() == """\
(model)  Tree       (3,)                   3
last     Linear     (1, 2)                 2
items.0  Linear     (2, 1), (2,)           4
items.2  LayerNorm  (3,), (3,)             6
Tree: 15 parameters"""


@each_model
def test_summary_rows_add_up(make):
    model = make()
    *rows, last = model.summary().splitlines()
    counts = [int(row.split()[-1].replace(",", "")) for row in rows]
    assert sum(counts) == model.parameter_count() == sum(p.size for p in model.parameters())
    assert last == f"{type(model).__name__}: {model.parameter_count():,} parameters"


def test_parameter_count_of_the_default_vit():
    block = 12 * 96 ** 2 + 13 * 96
    assert ViT().parameter_count() == 6 * block + 48 * 96 + 96 + 65 * 96 + 96 + 2 * 96 + 96 * 10 + 10


# Modes, gradients

@each_model
def test_modes_reach_every_module(make):
    model = make()
    assert all(m.training for _, m in model.named_modules())
    assert model.eval() is model and not any(m.training for _, m in model.named_modules())
    assert model.train() is model and all(m.training for _, m in model.named_modules())


@each_model
def test_requires_grad_freezes(make):
    model = make().requires_grad_(False)
    assert not loss_of(model).requires_grad
    model.head.requires_grad_()
    loss_of(model).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    with refuses("Tensor: requires_grad with dtype int64, expected float32 or float64"):
        nn.Parameter(np.arange(3))


def test_zero_grad_fills_with_zeros_in_place():
    model = ViT(**SMALL)
    model.zero_grad()  # nothing there yet
    assert all(p.grad is None for p in model.parameters())
    loss_of(model).backward()
    before = [p.grad for p in model.parameters()]
    once = [g.copy() for g in before]
    loss_of(model).backward()
    for p, g in zip(model.parameters(), once):
        np.testing.assert_allclose(p.grad, 2 * g, rtol=1e-5, atol=1e-7)  # gradients add up until they are cleared
    model.zero_grad()
    assert all(p.grad is g and (g == 0).all() for p, g in zip(model.parameters(), before))


def test_another_dtype_drops_the_gradients_of_the_old_one():
    model = ViT(**SMALL)
    loss_of(model).backward()
    assert model.astype("float64") is model and all(p.dtype == np.float64 and p.grad is None for p in model.parameters())
    loss_of(model).backward()
    assert all(p.grad.dtype == np.float64 for p in model.parameters())


def test_the_innermost_module_is_known_per_thread():
    seen = []

    class Outer(nn.Module):
        def __init__(self):
            self.inner = Inner()

        def forward(self, x):
            seen.append(cost.innermost())
            self.inner(x)
            seen.append(cost.innermost())
            other = threading.Thread(target=lambda: seen.append(cost.innermost()))
            other.start()
            other.join()

    class Inner(nn.Module):
        def forward(self, x):
            seen.append(cost.innermost())
            if x:
                raise ValueError("inside")
    model = Outer()
    model(0)
    assert seen == [model, model.inner, model, None] and cost.innermost() is None
    with pytest.raises(ValueError, match="inside"):
        model(1)
    assert cost.innermost() is None


# Layers

def test_layers_compute_what_they_say():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    linear, norm = nn.Linear(4, 5).astype("float64"), nn.LayerNorm(4, eps=0.1).astype("float64")
    for p in (*linear.parameters(), *norm.parameters()):
        p.data[...] = rng.standard_normal(p.shape)
    np.testing.assert_allclose(linear(x).data, x @ linear.weight.data.T + linear.bias.data, rtol=1e-12)
    np.testing.assert_allclose(nn.Linear(4, 5, bias=False).astype("float64")(x).data, 0)
    centred = x - x.mean(axis=-1, keepdims=True)
    wanted = centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + 0.1) * norm.weight.data + norm.bias.data
    np.testing.assert_allclose(norm(x).data, wanted, rtol=1e-11)
    mlp = nn.MLP(4, 7).astype("float64")
    for p in mlp.parameters():
        p.data[...] = rng.standard_normal(p.shape)
    np.testing.assert_allclose(mlp(x).data, mlp.fc2(nn.GELU()(mlp.fc1(x))).data, rtol=1e-12)
    assert mlp.fc1.weight.shape == (7, 4) and mlp.fc2.weight.shape == (4, 7)


def test_the_patch_embedding_is_a_convolution_with_stride():
    rng = np.random.default_rng(0)
    layer, images = nn.PatchEmbed(6, 2, 4, channels=3).astype("float64"), rng.standard_normal((2, 3, 6, 6))
    layer.proj.weight.data[...], layer.proj.bias.data[...] = rng.standard_normal((4, 3, 2, 2)), rng.standard_normal(4)
    out = layer(images).data
    for b, d, r, c in np.ndindex(2, 4, 3, 3):
        patch = images[b, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2]
        wanted = (patch * layer.proj.weight.data[d]).sum() + layer.proj.bias.data[d]
        assert out[b, 3 * r + c, d] == pytest.approx(wanted, rel=1e-11)


# Weights out and in

@each_model
def test_state_dict_copies(make):
    model = make()
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    for (name, p), array in zip(model.named_parameters(), state.values()):
        assert type(array) is np.ndarray and array.dtype == np.float32 and np.array_equal(array, p.data)
        assert not np.shares_memory(array, p.data)
    twin = make()
    for p in twin.parameters():
        p.data += 1
    assert twin.load_state_dict(state) == ([], [])
    for array in state.values():
        array[...] = np.nan  # what was loaded is a copy too
    assert np.array_equal(loss_of(twin.eval()).data, loss_of(model.eval()).data)


def unchanged(model, state, dtype="float32"):
    return all(p.dtype == dtype and np.array_equal(p.data, state[name]) for name, p in model.named_parameters())


def changed(state, **other):
    return {name: other.get(name.replace(".", "_"), a + 1) for name, a in state.items()}


@pytest.mark.parametrize("change, text", [
    (lambda s: s.pop("head.bias"), "missing head.bias; unexpected none"),
    (lambda s: s.update(extra=np.ones(2)), "missing none; unexpected extra"),
    (lambda s: (s.pop("cls_token"), s.update({"dist_token": np.ones(3)})), "missing cls_token; unexpected dist_token"),
    (lambda s: s.clear(), "missing cls_token, pos_embed, patch_embed.proj.weight, patch_embed.proj.bias, blocks.0.norm1.weight, "
     "blocks.0.norm1.bias and 26 more; unexpected none"),
    (lambda s: s.update({"head.bias": np.ones(6, "float32")}), "other shapes: head.bias (6,), expected (5,)"),
    (lambda s: s.update({"head.bias": np.ones((1, 5), "float32"), "cls_token": np.ones(8, "float32")}),
     "other shapes: cls_token (8,), expected (1, 1, 8), head.bias (1, 5), expected (5,)"),
    (lambda s: s.update({"head.bias": np.ones(5)}), "dtypes float32, float64, expected all float32 or all float64"),
    (lambda s: s.update({"head.bias": np.ones(5, "int64")}), "dtypes float32, int64, expected all float32 or all float64"),
])
def test_load_state_dict_refuses_and_changes_nothing(change, text):
    model = ViT(**SMALL)
    before = model.state_dict()
    state = changed(before)
    change(state)
    with refuses("load_state_dict: " + text):
        model.load_state_dict(state)
    assert unchanged(model, before)


def test_shapes_and_widths_must_agree_without_strict_too():
    model = ViT(**SMALL)
    before = model.state_dict()
    with refuses("load_state_dict: other shapes: head.bias (6,), expected (5,)"):
        model.load_state_dict(changed(before, head_bias=np.ones(6, "float32")), strict=False)
    with refuses("load_state_dict: dtypes float32, float64, expected all float32 or all float64"):
        model.load_state_dict(changed(before, head_bias=np.ones(5)), strict=False)
    assert unchanged(model, before)


def test_without_strict_what_fits_by_name_goes_in():
    model = ViT(**SMALL)
    before = model.state_dict()
    missing, unexpected = model.load_state_dict({"head.bias": np.arange(5, dtype="float32"), "fc.bias": np.ones(3)}, strict=False)
    assert missing == [name for name in before if name != "head.bias"] and unexpected == ["fc.bias"]
    assert unchanged(model, before | {"head.bias": np.arange(5, dtype="float32")})
    assert model.load_state_dict({}, strict=False) == (list(before), [])


@each_model
def test_float64_weights_make_a_float64_model(make):
    model, wide = make(), make().astype("float64")
    for p in wide.parameters():
        p.data += np.pi / 100
    model.load_state_dict(wide.state_dict())
    assert unchanged(model, wide.state_dict(), "float64") and model.dtype == np.float64 and loss_of(model).dtype == np.float64
    model.load_state_dict(make().state_dict())
    assert unchanged(model, make().state_dict(), "float32")


def test_float16_becomes_float32_and_it_says_so():
    model, narrow = ViT(**SMALL), changed(ViT(**SMALL).state_dict())
    narrow = {name: a.astype("float16") for name, a in narrow.items()}
    with pytest.warns(UserWarning, match=r"^load_state_dict: 32 arrays of dtype float16 become float32$") as caught:
        assert model.load_state_dict(narrow) == ([], [])
    assert unchanged(model, narrow) and len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^load_state_dict: 1 arrays of dtype float16 become float32$"):
        model.load_state_dict(changed(model.state_dict(), head_bias=np.arange(5).astype("float16")))
    assert model.head.bias.data.tolist() == [0, 1, 2, 3, 4]
    before = model.state_dict()
    with pytest.warns(UserWarning), refuses("load_state_dict: dtypes float32, float64, expected all float32 or all float64"):
        model.load_state_dict({name: a.astype("float64") for name, a in before.items()} | {"head.bias": np.ones(5, "float16")})
    assert unchanged(model, before)


def test_bfloat16_becomes_float32_and_it_says_so():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 of its own; ml_dtypes is not installed").bfloat16
    model = ViT(**SMALL)
    narrow = {name: a.astype(bfloat16) for name, a in changed(model.state_dict()).items()}
    with pytest.warns(UserWarning, match=r"^load_state_dict: 32 arrays of dtype bfloat16 become float32$"):
        model.load_state_dict(narrow)
    assert unchanged(model, {name: a.astype("float32") for name, a in narrow.items()})


# Starting weights

@each_model
def test_starting_weights_are_xavier_with_small_ends_of_branches(make):
    for name, module in make().named_modules():
        if not isinstance(module, (nn.Linear, nn.Projection)):
            continue
        weight = module.weight.data
        fan_in, fan_out = weight[0].size, len(weight) // (3 if name.endswith("qkv") else 1)
        small = name.split(".")[-1] in ("proj", "fc2", "gather_proj", "infuse_proj") and name != "patch_embed.proj"
        bound = (6 / (fan_in + fan_out)) ** 0.5 * (0.3 if small else 1)
        assert np.abs(weight).max() <= bound, name
        if weight.size > 60:  # it fills the interval evenly
            assert np.abs(weight).max() > 0.9 * bound and abs(weight.std() - bound / 3 ** 0.5) < 0.15 * bound, name
            assert abs(weight.mean()) < 0.2 * bound, name
        if not name.endswith("out_conv.4"):  # a predictor's last: see test_untrained_predictors_keep_what_the_ratios_ask
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
