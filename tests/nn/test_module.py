"""Modules: names, modes, gradients, weights in and out."""
import threading

import numpy as np
import pytest

import tinytoken as tt
from small import MODELS, SMALL, each_model, loss_of, refuses
from tinytoken import cost, nn
from tinytoken.models import ViT


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
    names = [name for name, _ in MODELS["DynamicViT"]().named_parameters()
             if name.startswith("score_predictor.0.")]
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
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight",
                                                                                    "head.bias"}
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
        # gradients add up until they are cleared
        np.testing.assert_allclose(p.grad, 2 * g, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    assert all(p.grad is g and (g == 0).all() for p, g in zip(model.parameters(), before))


def test_another_dtype_drops_the_gradients_of_the_old_one():
    model = ViT(**SMALL)
    loss_of(model).backward()
    assert model.astype("float64") is model
    assert all(p.dtype == np.float64 and p.grad is None for p in model.parameters())
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
    return all(p.dtype == dtype and np.array_equal(p.data, state[name])
               for name, p in model.named_parameters())


def changed(state, **other):
    return {name: other.get(name.replace(".", "_"), a + 1) for name, a in state.items()}


LIKELY = ("\n  likely: tt.models.load_weights, which resizes pos_embed and can leave out the head "
          "(new_head=True)")


@pytest.mark.parametrize("change, text", [
    (lambda s: s.pop("head.bias"), "missing head.bias; unexpected none"),
    (lambda s: s.update(extra=np.ones(2)), "missing none; unexpected extra"),
    (lambda s: (s.pop("cls_token"), s.update({"dist_token": np.ones(3)})),
     "missing cls_token; unexpected dist_token"),
    (lambda s: s.clear(),
     "missing cls_token, pos_embed, patch_embed.proj.weight, patch_embed.proj.bias, blocks.0.norm1.weight, "
     "blocks.0.norm1.bias and 26 more; unexpected none"),
    (lambda s: s.update({"head.bias": np.ones(6, "float32")}),
     "other shapes: head.bias (6,), expected (5,)" + LIKELY),
    (lambda s: s.update({"head.bias": np.ones((1, 5), "float32"), "cls_token": np.ones(8, "float32")}),
     "other shapes: cls_token (8,), expected (1, 1, 8), head.bias (1, 5), expected (5,)" + LIKELY),
    (lambda s: s.update({"head.bias": np.ones(5)}),
     "dtypes float32, float64, expected all float32 or all float64"),
    (lambda s: s.update({"head.bias": np.ones(5, "int64")}),
     "dtypes float32, int64, expected all float32 or all float64"),
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
    with refuses("load_state_dict: other shapes: head.bias (6,), expected (5,)" + LIKELY):
        model.load_state_dict(changed(before, head_bias=np.ones(6, "float32")), strict=False)
    with refuses("load_state_dict: dtypes float32, float64, expected all float32 or all float64"):
        model.load_state_dict(changed(before, head_bias=np.ones(5)), strict=False)
    assert unchanged(model, before)


def test_without_strict_what_fits_by_name_goes_in():
    model = ViT(**SMALL)
    before = model.state_dict()
    missing, unexpected = model.load_state_dict({"head.bias": np.arange(5, dtype="float32"),
                                                 "fc.bias": np.ones(3)}, strict=False)
    assert missing == [name for name in before if name != "head.bias"] and unexpected == ["fc.bias"]
    assert unchanged(model, before | {"head.bias": np.arange(5, dtype="float32")})
    assert model.load_state_dict({}, strict=False) == (list(before), [])


@each_model
def test_float64_weights_make_a_float64_model(make):
    model, wide = make(), make().astype("float64")
    for p in wide.parameters():
        p.data += np.pi / 100
    model.load_state_dict(wide.state_dict())
    assert unchanged(model, wide.state_dict(), "float64") and model.dtype == np.float64
    assert loss_of(model).dtype == np.float64
    model.load_state_dict(make().state_dict())
    assert unchanged(model, make().state_dict(), "float32")


def test_float16_becomes_float32_and_it_says_so():
    model, narrow = ViT(**SMALL), changed(ViT(**SMALL).state_dict())
    narrow = {name: a.astype("float16") for name, a in narrow.items()}
    with pytest.warns(UserWarning,
                      match=r"^load_state_dict: 32 arrays of dtype float16 become float32$") as caught:
        assert model.load_state_dict(narrow) == ([], [])
    assert unchanged(model, narrow) and len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^load_state_dict: 1 arrays of dtype float16 become float32$"):
        model.load_state_dict(changed(model.state_dict(), head_bias=np.arange(5).astype("float16")))
    assert model.head.bias.data.tolist() == [0, 1, 2, 3, 4]
    before = model.state_dict()
    text = "load_state_dict: dtypes float32, float64, expected all float32 or all float64"
    with pytest.warns(UserWarning), refuses(text):
        model.load_state_dict({name: a.astype("float64") for name, a in before.items()}
                              | {"head.bias": np.ones(5, "float16")})
    assert unchanged(model, before)


def test_bfloat16_becomes_float32_and_it_says_so():
    reason = "NumPy has no bfloat16 of its own; ml_dtypes is not installed"
    bfloat16 = pytest.importorskip("ml_dtypes", reason=reason).bfloat16
    model = ViT(**SMALL)
    narrow = {name: a.astype(bfloat16) for name, a in changed(model.state_dict()).items()}
    with pytest.warns(UserWarning, match=r"^load_state_dict: 32 arrays of dtype bfloat16 become float32$"):
        model.load_state_dict(narrow)
    assert unchanged(model, {name: a.astype("float32") for name, a in narrow.items()})


@pytest.mark.parametrize("dtype, said", [("float16", "float16"), ("int", "int64"), ("complex64", "complex64"),
                                         (">f2", "float16"), ("x", "'x'")])
def test_other_dtypes_and_devices_are_refused_and_change_nothing(dtype, said):
    model = ViT(**SMALL)
    before = model.state_dict()
    with refuses(f"astype: {said}, expected float32 or float64"):
        model.astype(dtype)
    for device in ("tpu", None, 1):
        with refuses(f"device: {device!r}, expected cpu or cuda"):
            model.to(device)
    assert all(np.array_equal(array, before[name]) and array.dtype == "float32"
               for name, array in model.state_dict().items())
    assert model.astype(np.float64).dtype == model.astype(np.dtype("float64")).dtype == "float64"


def test_what_is_no_state_and_no_picture():
    model = ViT(**SMALL)
    for state in (None, 1, "a", [("head.weight", 1)]):
        for strict in (True, False):
            with refuses(f"load_state_dict: a {type(state).__name__}, expected arrays by name"):
                model.load_state_dict(state, strict=strict)
    for images in (None, 1, [[1.0]], "a"):
        with refuses(f"images: a {type(images).__name__}, expected an array (B, 3, 8, 8)"):
            model(images)
