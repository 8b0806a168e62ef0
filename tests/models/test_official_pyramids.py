"""Pyramids against timm's models, and blocks with two paths against the official ones (tests/fixtures)."""
import numpy as np
import pytest

import tinytoken as tt
from small import reference, same
from tinytoken import models, ops
from tinytoken.backend import to_numpy
from tinytoken.models import convnext, swin

OPTIONS = {"convnext": dict(dims=(6, 8, 12, 16), depths=(1, 1, 2, 1)),
           "swin": dict(embed_dim=4, depths=(2, 2, 2, 1), heads=(2, 2, 4, 4), window_size=4, patch_size=2),
           "swin, filled up": dict(embed_dim=6, depths=(2, 2), heads=(2, 3), window_size=3)}


def under(arrays, prefix):
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def timm():
    return reference("timm_pyramids.npz")


@pytest.fixture(scope="module")
def official():
    return reference("official_adaptive_blocks.npz")


@pytest.mark.parametrize("case", OPTIONS)
def test_timms_models(case, timm, xp):
    model = models.create(case.split(",")[0], image_size=(32, 64), num_classes=5, **OPTIONS[case])
    weights = under(timm, f"{case}/weights/")
    assert model.load_state_dict({name: a.astype("float64") for name, a in weights.items()}) == ([], [])
    model.to("cpu" if xp is np else "cuda")
    for training in (True, False):  # without drop path the two are one
        out = model.train(training)(xp.asarray(timm["images"]))
        same(out.logits.numpy(), timm[f"{case}/logits"], 1e-10)
    features = timm[f"{case}/features"]
    if case == "convnext":  # before the norm there
        features = features.reshape(*features.shape[:2], -1).swapaxes(1, 2)
        same(out.maps[-1].numpy(), features, 1e-10)
    else:
        same(out.tokens.numpy(), features.reshape(out.tokens.shape), 1e-10)
    ops.cross_entropy(out.logits, xp.asarray(timm["labels"])).backward()
    gradients, own = under(timm, f"{case}/gradients/"), dict(model.named_parameters())
    rounding = 1e-13 * max(np.abs(g).max() for g in gradients.values())
    assert len(gradients) > 20
    for name, g in gradients.items():
        np.testing.assert_allclose(to_numpy(own[name].grad), g, rtol=0, err_msg=name,
                                   atol=1e-9 * np.abs(g).max() + rounding)


# Single blocks

RENAMED = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}  # the official name: timm's
BLOCKS = {"convnext_block": lambda: convnext.AdaptiveConvNeXtBlock(16, 4, 1e-6)} | {
    f"swin_block_shift{by}": lambda by=by: swin.AdaptiveSwinBlock(16, 2, (4, 4), (by, by), 4, True)
    for by in (0, 2)}


def ours(arrays):
    """Under timm's names, without constants."""
    renamed = {name: ".".join([RENAMED.get(part := name.split(".")[0], part), *name.split(".")[1:]])
               for name in arrays}
    return {renamed[name]: a for name, a in arrays.items() if a.dtype.kind == "f" and name != "attn_mask"}


def as_tokens(a):
    """A map (B, C, H, W), or tokens already, as (B, N, C)."""
    return a.reshape(*a.shape[:2], -1).swapaxes(1, 2) if a.ndim == 4 else a


@pytest.fixture(params=BLOCKS)
def loaded(request, official, xp):
    """(block, its arrays, the shape of the map)."""
    arrays = under(official, f"{request.param}/")
    block = BLOCKS[request.param]()
    weights = {name: a.astype("float64") for name, a in ours(under(arrays, "w/")).items()}
    assert block.load_state_dict(weights) == ([], [])
    arrays = {name: a.astype("float64") if a.dtype.kind == "f" else a for name, a in arrays.items()}
    side = 7 if request.param == "convnext_block" else 8
    return block.to("cpu" if xp is np else "cuda"), arrays, (side, side)


def test_official_blocks_at_inference(loaded, xp):
    block, arrays, grid = loaded
    x = tt.Tensor(xp.asarray(as_tokens(arrays["x"])))
    places, others = xp.asarray(arrays["slow_idx"]), xp.asarray(arrays["fast_idx"])
    same(block.gathered(x, places, others, grid).numpy(), as_tokens(arrays["eval_out"]))
    same(block(x, grid).numpy(), as_tokens(arrays["nomask_out"]))


def test_official_blocks_in_training(loaded, xp):
    block, arrays, grid = loaded
    leaves = [tt.Tensor(xp.asarray(as_tokens(arrays[name])), requires_grad=True) for name in ("x1", "x2", "mask")]
    out = block.streams(*leaves, grid, None)
    for i in (1, 2):
        same(out[i - 1].numpy(), as_tokens(arrays[f"train_y{i}"]))
    total = sum((y * xp.asarray(as_tokens(arrays[f"up{i}"]))).sum() for i, y in enumerate(out, 1))
    total.backward()
    expected = {name: as_tokens(arrays[f"grad_{name}"]) for name in ("x1", "x2", "mask")}
    found = dict(zip(expected, leaves)) | dict(block.named_parameters())
    expected |= ours(under(arrays, "grad/"))
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        np.testing.assert_allclose(to_numpy(found[name].grad), g, rtol=0, err_msg=name,
                                   atol=1e-11 * max(1, np.abs(g).max()))


# Official names

def official_names(model):
    """A model's arrays under the names that the official ConvNeXt has, and in its layouts."""
    state = {}
    for name, array in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[0] = "downsample_layers.0"
        elif parts[0] == "head":
            parts = ["head" if parts[1] == "fc" else "norm", parts[2]]
        elif parts[2:3] == ["downsample"]:
            parts = ["downsample_layers", parts[1], *parts[3:]]
        elif parts[0] == "stages":
            parts = ".".join([*parts[:2], *parts[3:]]).replace("mlp.fc", "pwconv").replace("conv_dw", "dwconv")
            parts = parts.split(".")
        convolution = parts[0] == "score_predictor" and array.ndim == 2
        state[".".join(parts)] = array[:, :, None, None] if convolution else array
    return state


def test_official_names_of_convnext():
    sizes = OPTIONS["convnext"] | dict(image_size=32, prune_before=(1,), keep_ratios=(0.5,))
    source, model = models.DynamicConvNeXt(**sizes), models.DynamicConvNeXt(**sizes)
    for p in source.parameters():
        p.data += 0.1
    state = official_names(source)
    assert {"downsample_layers.0.1.bias", "downsample_layers.3.1.weight", "stages.2.1.pwconv2.bias", "norm.bias",
            "stages.2.1.fast_path.1.weight", "stages.2.1.fast_path_gamma", "stages.0.0.dwconv.weight",
            "score_predictor.0.out_conv.4.weight", "head.weight", "stages.0.0.gamma"} <= state.keys()
    models.load_weights(model, state, quiet=True)
    assert all(np.array_equal(a, model.state_dict()[name]) for name, a in source.state_dict().items())
