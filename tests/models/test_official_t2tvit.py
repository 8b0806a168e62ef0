"""T2T-ViT against the official code: whole models with either layer, and a Performer layer whose features
underflow (fixtures/official_t2tvit.npz)."""
import numpy as np
import pytest

import tinytoken as tt
from small import reference, same
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.models import t2tvit

CONFIG = dict(image_size=48, patch_size=16, dim=24, depth=2, heads=3, mlp_ratio=2, num_classes=7, token_dim=8)


@pytest.fixture(scope="module")
def official():
    return reference("official_t2tvit.npz")


def under(arrays, prefix):
    return {name.removeprefix(prefix): a.astype("float64")
            for name, a in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["transformer", "performer"])
def test_whole_models(kind, official, xp):
    arrays, model = under(official, f"{kind}/"), models.T2TViT(**CONFIG, tokens_type=kind)
    # the table of positions is the official one before it is loaded
    np.testing.assert_allclose(model.pos_embed, arrays["w/pos_embed"], rtol=0, atol=1e-7)
    weights = under(arrays, "w/")
    assert models.load_weights(model, weights, quiet=True)[0].startswith("assumed: heads=3")
    fixed = {name for name in weights if name.endswith(".w")}
    assert {name for name, _ in model.named_buffers()} == {"pos_embed"} | fixed
    model.to("cpu" if xp is np else "cuda")
    images = tt.Tensor(xp.asarray(official["x"].astype("float64")), requires_grad=True)
    out = model.train()(images)
    same(out.logits.numpy(), arrays["out"])
    if kind == "performer":
        layer = model.tokens_to_token
        first = layer.attention1(tt.ops.unfold(images, kernel=7, stride=4, padding=2))
        same(first.numpy(), arrays["t2t1"])
    loss, _ = model.loss(out, xp.asarray(official["labels"]))
    same(loss.numpy(), arrays["loss"])
    loss.backward()
    gradients = under(arrays, "g/")
    assert len(gradients) >= 6
    for name, g in gradients.items():  # of the pictures it is stored in float32
        found = images if name == "x" else dict(model.named_parameters())[name]
        same(to_numpy(found.grad) / np.abs(g).max(), g / np.abs(g).max(), 1e-7 if name == "x" else 1e-12)


def test_a_performer_with_large_keys(official, xp):
    arrays = under(official, "layer/")
    layer = t2tvit.TokenPerformer(27, 16, 1e-5)
    assert layer.load_state_dict(under(arrays, "w/")) == ([], [])
    layer.to("cpu" if xp is np else "cuda")
    x = tt.Tensor(xp.asarray(arrays["x"]), requires_grad=True)
    k, q, _ = tt.ops.split_heads(layer.kqv(layer.norm1(x)), heads=1, parts=3)
    for features, name in ((layer.features(k), "phi_k"), (layer.features(q), "phi_q")):
        np.testing.assert_allclose(features.numpy()[:, 0], arrays[name], rtol=1e-9, atol=0)  # 1e-101 too
    assert arrays["phi_k"].min() < 1e-80
    out = layer(x)
    same(out.numpy(), arrays["out"])
    (out * xp.asarray(arrays["up"])).sum().backward()
    same(to_numpy(x.grad), arrays["g/x"], 1e-11)
