"""Published weights: the files that hold them, the names in them, and fitting them to a model."""
import json
import re
import struct
import sys
import warnings

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, VARIANTS, pictures, refuses, same, shaken
from tinytoken.models import DynamicViT, LookupViT, ViT, clean_names, load_weights, options_of, read_weights

LIKELY = "\n  likely: "


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def same_weights(model, state):
    return all(np.array_equal(array, state[name]) for name, array in model.state_dict().items())


# Files

def safetensors_file(path, arrays):
    """The format by hand: the header's length, the header in JSON, the bytes.

    arrays: {name: (dtype, array)}."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, array) in arrays.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def bfloat16(x):
    """(values that bfloat16 has, near x in float32; their bits)."""
    bits = (x.astype("float32").view("uint32") >> 16).astype("uint16")
    return (bits.astype("uint32") << 16).view("float32"), bits


def test_an_npz_and_a_safetensors_file_give_their_arrays(tmp_path):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    values, bits = bfloat16(rng.standard_normal((2, 3)))
    arrays = {"a.b": rng.standard_normal((2, 3)).astype("float32"),
              "half": rng.standard_normal(4).astype("float16"),
              "double": rng.standard_normal((1, 1, 2)), "n": np.array([3, -1]), "ok": np.array([True, False]),
              "one": np.array(2.5, "float32")}
    np.savez(tmp_path / "w.npz", **arrays)
    kinds = dict(zip(arrays, ("F32", "F16", "F64", "I64", "BOOL", "F32")))
    written = {name: (kinds[name], array) for name, array in arrays.items()} | {"brain": ("BF16", bits)}
    safetensors_file(tmp_path / "w.safetensors", written)
    for name, more in (("w.npz", {}), ("w.safetensors", {"brain": values})):
        found = read_weights(tmp_path / name)
        assert found.keys() == (arrays | more).keys()
        for key, array in (arrays | more).items():
            assert found[key].dtype == array.dtype and found[key].shape == array.shape
            assert np.array_equal(found[key], array)


@pytest.mark.parametrize("name, content, text", [
    ("none.npz", None, "weights file: .*none.npz does not exist"),
    ("none.safetensors", None, "weights file: .*none.safetensors does not exist"),
    ("w.pth", b"", r"weights file: .*w.pth is neither .npz nor .safetensors\n  likely: python "
                   r"lessons/tools/torch_weights.py FILE, which writes an .npz of it"),
    ("w.npz", b"hello", "weights file: .*w.npz is not a whole .npz file: truncated, or not a weights file"),
    ("w.safetensors", b"", "weights file: .*w.safetensors is not a readable .safetensors file .*"),
    ("w.safetensors", b"\xff" * 50,
     "weights file: .*w.safetensors is not a readable .safetensors file .*header too large.*"),
], ids=str)
def test_files_that_hold_no_weights(tmp_path, name, content, text):
    pytest.importorskip("safetensors")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(tt.InputError, match=f"^{text}$"):
        read_weights(tmp_path / name)


def test_what_is_no_name_of_a_file():
    for path in (None, 1, ["w.npz"]):
        for call in (read_weights, lambda path: load_weights(ViT(**SMALL), path)):
            with refuses(f"weights file: a {type(path).__name__}, expected the name of a file"):
                call(path)


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(tt.InputError, match="w.npz holds 'a.npy' of Python objects, expected numbers$"):
        read_weights(tmp_path / "w.npz")


def test_safetensors_with_a_dtype_that_no_model_has(tmp_path):
    pytest.importorskip("safetensors")
    path = safetensors_file(tmp_path / "w.safetensors", {"a": ("F8_E4M3", np.zeros(3, "uint8"))})
    with pytest.raises(tt.InputError, match="^weights file: a in .*w.safetensors is F8_E4M3, expected one"):
        read_weights(path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="needs safetensors: .* -m pip install safetensors$"):
        read_weights(tmp_path / "w.safetensors")


def test_a_checkpoint_of_this_package_is_told_apart(tmp_path):
    tt.train.checkpoint.save(tmp_path / "c.npz", ViT(**SMALL))
    with pytest.raises(tt.InputError, match=r"c.npz is a checkpoint of this package\n  likely: tt.train."):
        read_weights(tmp_path / "c.npz")


# Names

def test_names_are_cleaned():
    state = {"module._orig_mod.blocks.0.gamma_1": 1, "module.blocks.0.gamma_2": 2, "head.weight": 3,
             "gamma_13": 4, "pre_logits.fc.bias": 5, "n_averaged": 6}
    found, notes = clean_names(state)
    assert found == {"blocks.0.ls1.gamma": 1, "blocks.0.ls2.gamma": 2, "head.weight": 3, "gamma_13": 4}
    assert notes == ["removed 'module._orig_mod.' from 2 names", "left out pre_logits.fc.bias, n_averaged"]
    assert clean_names({"norm.weight": 1}) == ({"norm.weight": 1}, [])
    with refuses("weights: names 5, None, expected texts"):
        clean_names({"norm.bias": 1, 5: 2, None: 3})
    with refuses("weights: two entries for one name: norm.bias, norm.bias"):
        clean_names({"module.norm.bias": 1, "norm.bias": 2})


@pytest.mark.parametrize("case", VARIANTS)
def test_options_are_read_off_names_and_shapes(case):
    """All that names tell: not eps, not what a head reads of tokens that are normed; heads of 64 channels, or
    by the normed queries."""
    config = SMALL | dict(dim=128, mlp_ratio=2.5, channels=1, depth=3) | VARIANTS[case]
    model = ViT(**config)
    options = options_of(model.state_dict())
    blind = {"eps": 1e-6} | {"mean, normed before it": dict(pool="token", class_token=None),
                             "class token, normed alone": dict(pool="mean", class_token=True)}.get(case, {})
    assert options["layer_scale"] == VARIANTS[case].get("layer_scale", 0)
    assert ViT(**options).config == ViT(**config | blind).config


@pytest.mark.parametrize("dim, heads", [(192, 3), (64, 1), (96, None)])
def test_heads_are_of_64_channels_or_left_out(dim, heads):
    assert options_of(ViT(**SMALL | dict(dim=dim)).state_dict()).get("heads") == heads
    assert options_of(ViT(**SMALL | dict(dim=dim), qk_norm=True).state_dict())["heads"] == 2


def test_where_both_fit_the_tokens_before_the_patches_have_positions():
    """As timm makes them if not told otherwise: 25 rows are 16 patches and 9 such tokens, not 25 patches."""
    options = options_of(ViT(**SMALL, reg_tokens=8).state_dict())
    assert options["image_size"] == 8 and not options["no_embed_class"]


def test_what_names_do_not_tell_is_left_out():
    state = ViT(**SMALL | dict(image_size=(8, 10))).state_dict()
    assert not {"image_size", "no_embed_class"} & options_of(state).keys()
    del state["head.weight"], state["head.bias"]
    assert "num_classes" not in options_of(state)
    with refuses("weights: these are not the names of timm's ViT, which has patch_embed.proj.weight, "
                 "pos_embed, blocks.0.mlp.fc1.weight: encoder.weight, a"):
        options_of({"encoder.weight": 0, "a": 1})


@pytest.mark.parametrize("name, shape", [("patch_embed.proj.weight", (8, 12)),
                                         ("patch_embed.proj.weight", (8, 3, 2, 4)), ("pos_embed", (17, 8)),
                                         ("pos_embed", ()), ("blocks.0.mlp.fc1.weight", ()),
                                         ("head.weight", (5,)), ("patch_embed.proj.weight", (0, 3, 2, 2)),
                                         ("reg_token", (8,)), ("blocks.0.attn.q_norm.weight", ())])
def test_options_are_not_read_off_shapes_of_other_layouts(name, shape):
    state = ViT(**SMALL).state_dict() | {name: np.zeros(shape, "float32")}
    with refuses(f"weights: {name} {shape}, expected other axes: timm's patch_embed.proj.weight is (dim, "
                 "channels, p, p) and pos_embed (1, positions, dim)"):
        options_of(state)
    with refuses("weights: pos_embed (), expected other axes: timm's patch_embed.proj.weight is (dim, "
                 "channels, p, p) and pos_embed (1, positions, dim)"):
        options_of(ViT(**SMALL).state_dict() | {"pos_embed": [[1.0]]})
    if name not in ("patch_embed.proj.weight", "pos_embed"):
        return
    with pytest.raises(tt.InputError, match="^load_weights: missing none; unexpected extra\n  likely: str"):
        load_weights(ViT(**SMALL), state | {"extra": np.zeros(2)})


# Loading

def test_loading_and_what_is_said(capsys, tmp_path):
    model, other = ViT(**SMALL, eps=1e-5), shaken(ViT(**SMALL)).astype("float32")
    state = {f"module.{name}": array for name, array in other.state_dict().items()}
    np.savez(tmp_path / "w.npz", **state)
    assumed = ("assumed: heads=2, layer norms' eps=1e-05 (CLIP's is 1e-05), pool='token' (what the head "
               "reads), the exact GELU (OpenAI's CLIP has another), and pictures normalised as when the weights "
               "were trained (often by ImageNet's "
               "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225), or by 0.5 and 0.5): names do not "
               "tell")
    for weights in (state, tmp_path / "w.npz", str(tmp_path / "w.npz")):
        model = ViT(**SMALL, eps=1e-5)
        notes = load_weights(model, weights)
        assert notes == ["removed 'module.' from 32 names", assumed]
        assert capsys.readouterr().out == "".join(f"load_weights: {note}\n" for note in notes)
        assert same_weights(model, other.state_dict())
    assert load_weights(model, state, quiet=True) == notes and capsys.readouterr().out == ""
    assert "eps=1e-06" in load_weights(LookupViT(**SMALL, compressed=(2, 2)),
                                       LookupViT(**SMALL, compressed=(2, 2)).state_dict())[-1]


def test_half_precision_becomes_float32_without_a_warning():
    model, state = ViT(**SMALL), ViT(**SMALL).state_dict()
    state = {name: (array + 1).astype("float16" if name.startswith("blocks") else "float32")
             for name, array in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = load_weights(model, state, quiet=True)
    assert notes[0] == "24 arrays of half precision are float32 now" and model.dtype == np.float32
    assert same_weights(model, state)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_head_of_another_size(distilled):
    theirs = shaken(ViT(**SMALL | dict(num_classes=9), distilled=distilled)).astype("float32").state_dict()
    model = ViT(**SMALL, distilled=distilled)
    before = model.state_dict()
    with pytest.raises(tt.InputError) as refused:
        load_weights(model, theirs)
    more = ", head_dist.weight (9, 8), expected (5, 8), head_dist.bias (9,), expected (5,)"
    assert str(refused.value) == (
        "load_weights: a head of another size: head.weight (9, 8), expected (5, 8), head.bias (9,), "
        f"expected (5,){more if distilled else ''}{LIKELY}"
        "new_head=True, with which the model keeps its own, untrained")
    assert same_weights(model, before)
    notes = load_weights(model, theirs, new_head=True, quiet=True)
    left = "head.weight, head.bias" + (", head_dist.weight, head_dist.bias" if distilled else "")
    assert notes[0] == f"the model's own, untrained head; the file's {left} left out"
    assert same_weights(model, theirs | {name: a for name, a in before.items() if name.startswith("head")})


def test_a_file_without_a_head():
    model, state = ViT(**SMALL), ViT(**SMALL).state_dict()
    del state["head.weight"], state["head.bias"]
    with pytest.raises(tt.InputError) as refused:
        load_weights(model, state)
    assert str(refused.value) == ("load_weights: missing head.weight, head.bias; unexpected none"
                                  f"{LIKELY}new_head=True, with which the model keeps its own, untrained")
    notes = load_weights(model, state, new_head=True, quiet=True)
    assert notes[0] == "the model's own, untrained head; the file's none left out"


def test_strict_load_state_dict_still_refuses_and_names_the_way():
    with pytest.raises(tt.InputError) as refused:
        ViT(**SMALL).load_state_dict(ViT(**SMALL | dict(num_classes=9)).state_dict())
    assert str(refused.value) == (
        "load_state_dict: other shapes: head.weight (9, 8), expected (5, 8), head.bias (9,), expected (5,)"
        f"{LIKELY}tt.models.load_weights, which resizes pos_embed and can leave out the head (new_head=True)")


# Positions

def test_the_cubic_matrix_is_timms_resize(timm):
    cases = {name.split("/")[1] for name in timm if name.startswith("resized/")}
    assert len(cases) == 5
    for case in cases:
        old, new = ([int(n) for n in grid.split("x")] for grid in case.split(" to "))
        table = timm[f"resized/{case}/table"]
        ours = tt.ops.resize_matrix(old, new, cubic=True) @ table[:, 2:]
        np.testing.assert_allclose(ours, timm[f"resized/{case}/float64"], rtol=0, atol=1e-13)
        np.testing.assert_allclose(ours, timm[f"resized/{case}/timm"][:, 2:], rtol=0, atol=2e-6)
        assert np.array_equal(timm[f"resized/{case}/timm"][:, :2], table[:, :2].astype("float32"))
        linear = tt.ops.resize_matrix(old, new) @ table[:, 2:]
        assert np.abs(linear - timm[f"resized/{case}/float64"]).max() > 0.01
    with refuses("resize: cubic without antialias, expected antialias=True"):
        tt.ops.resize_matrix((2, 2), (3, 3), antialias=False, cubic=True)


@pytest.mark.parametrize("size", [(5, 5), (4, 4), (4, 3), (2, 7)])
@pytest.mark.parametrize("options", [{}, dict(reg_tokens=3), dict(reg_tokens=3, no_embed_class=True),
                                     dict(distilled=True), dict(pool="mean")], ids=str)
def test_positions_of_another_grid_are_resized_and_those_of_the_prefix_stay(options, size):
    theirs = shaken(ViT(**SMALL, **options)).astype("float32")  # 4 x 4 patches
    model = ViT(**SMALL | dict(image_size=(2 * size[0], 2 * size[1])), **options)
    notes = load_weights(model, theirs.state_dict(), quiet=True)
    before = 0 if "no_embed_class" in options else sum(model.config.prefix.values())
    old, new = theirs.pos_embed.data, model.pos_embed.data
    assert np.array_equal(new[:, :before], old[:, :before]) and new.dtype == "float32"
    if size == (4, 4):
        assert np.array_equal(new, old) and len(notes) == 1
    else:
        assert notes[0] == f"pos_embed resized from 4 x 4 to {size[0]} x {size[1]} (bicubic, antialiased)"
        expected = tt.ops.resize_matrix((4, 4), size, cubic=True) @ old[:, before:].astype("float64")
        np.testing.assert_allclose(new[:, before:], expected, rtol=0, atol=1e-6)
    assert same_weights(model, theirs.state_dict() | {"pos_embed": new})


def test_a_table_that_is_not_square_needs_its_grid():
    theirs = shaken(ViT(**SMALL | dict(image_size=(4, 16)))).astype("float32")  # 2 x 8
    model = ViT(**SMALL | dict(image_size=(8, 8)))
    before = model.state_dict()
    # as many rows as 4 x 4 have: without a grid nothing tells that it is 2 x 8
    assert len(load_weights(model, theirs.state_dict(), quiet=True)) == 1
    load_weights(model, before, quiet=True)
    notes = load_weights(model, theirs.state_dict(), grid=(2, 8), quiet=True)
    assert notes[0] == "pos_embed resized from 2 x 8 to 4 x 4 (bicubic, antialiased)"
    expected = tt.ops.resize_matrix((2, 8), (4, 4), cubic=True) @ theirs.pos_embed.data[:, 1:]
    np.testing.assert_allclose(model.pos_embed.data[:, 1:], expected, rtol=0, atol=1e-6)
    other = ViT(**SMALL | dict(image_size=(8, 12))).state_dict()
    more = " or a model with no_embed_class=True"  # as 5 x 5 would be
    for state, grid, text in ((other, None, f"24 are no grid of 4 x 4{LIKELY}"),
                              (other, (5, 5), f"24 are no grid of 5 x 5{LIKELY}"),
                              (ViT(**SMALL | dict(image_size=(4, 2))).state_dict(), None,
                               f"2 are no grid of 1 x 1{LIKELY}")):
        with pytest.raises(tt.InputError) as refused:
            load_weights(model, state, grid=grid)
        rows = len(state["pos_embed"][0])
        assert str(refused.value) == (
            f"load_weights: pos_embed has {rows} rows, 1 of them for tokens before the patches: {text}"
            f"grid=(rows, columns), where it is not square{more if rows == 25 else ''}")
    same_grid = load_weights(ViT(**SMALL | dict(image_size=(8, 12))), other, grid=(4, 6), quiet=True)
    assert len(same_grid) == 1


def test_a_grid_that_is_none():
    for grid in (4, (4,), "4 x 4", (4, None), ("4", 1), (-4, -4), (0, 0)):
        with refuses(f"load_weights: grid {grid!r}, expected (rows, columns)"):
            load_weights(ViT(**SMALL), ViT(**SMALL).state_dict(), grid=grid)


def test_a_table_of_other_axes():
    state = ViT(**SMALL).state_dict()
    state["pos_embed"] = state["pos_embed"][0]
    with refuses("load_weights: pos_embed (17, 8), expected (1, positions, dim)"):
        load_weights(ViT(**SMALL), state)


# Names that do not agree

@pytest.mark.parametrize("theirs, likely", [
    (dict(distilled=True, no_embed_class=True), "a model with distilled=True, no_embed_class=True"),
    (dict(layer_scale=0.1), "a model with layer_scale=1e-05"),
    (dict(qk_norm=True, qkv_bias=False), "a model with qkv_bias=False, qk_norm=True"),
    (dict(pre_norm=True), "a model with pre_norm=True"),
    (dict(pool="mean", final_norm="pooled", class_token=True),
     "a model with pool='mean', class_token=True, final_norm='pooled'"),
], ids=str)
def test_the_error_names_the_options_that_the_names_ask_for(theirs, likely):
    model = ViT(**SMALL)
    before = model.state_dict()
    with pytest.raises(tt.InputError) as refused:
        load_weights(model, ViT(**SMALL, **theirs).state_dict())
    assert str(refused.value).startswith("load_weights: ") and str(refused.value).endswith(LIKELY + likely)
    assert same_weights(model, before)


def test_registers_without_positions_are_told_from_those_with():
    for theirs, likely in ((dict(reg_tokens=4), "reg_tokens=4"),
                           (dict(reg_tokens=4, no_embed_class=True), "reg_tokens=4, no_embed_class=True")):
        with pytest.raises(tt.InputError, match=f"likely: a model with {likely}$"):
            load_weights(ViT(**SMALL), ViT(**SMALL, **theirs).state_dict())


def test_a_vits_weights_start_a_dynamicvit():
    vit, model = shaken(ViT(**SMALL)), DynamicViT(**SMALL, prune_before=(1,), keep_ratios=(1.0,)).eval()
    with pytest.raises(tt.InputError, match="likely: strict=False, which leaves what is missing as it is$"):
        load_weights(model, vit.state_dict())
    notes = load_weights(model, vit.state_dict() | {"fc.bias": np.zeros(2)}, strict=False, quiet=True)
    assert re.match(r"not in the file: score_predictor.0.in_conv.0.weight, .* and \d more$", notes[0])
    assert notes[1] == "not in the model: fc.bias"
    same(model(pictures()).logits.data, vit(pictures()).logits.data)


def test_other_names_altogether():
    with pytest.raises(tt.InputError, match="^load_weights: missing cls_token.*; unexpected encoder.weight"):
        load_weights(ViT(**SMALL), {"encoder.weight": np.zeros(3)})
