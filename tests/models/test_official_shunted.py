"""ShuntedTransformer against the official code (tests/fixtures)."""
import numpy as np
import pytest

import tinytoken as tt
from small import reference, same
from tinytoken import models, ops
from tinytoken.backend import to_numpy

SIZES = dict(image_size=32, dims=(64, 16, 24, 32), depths=(1, 1, 2, 1), num_classes=7, heads=(2, 2, 2, 4),
             rates=(2, 4, 2, 1), mlp_ratios=(1, 2, 2, 2))


@pytest.fixture(scope="module")
def official():
    return reference("official_shunted.npz")


def loaded(official, xp):
    model = models.ShuntedTransformer(**SIZES).eval()
    weights = {n[2:]: a.astype("float64") for n, a in official.items() if n.startswith("w/")}
    assert model.load_state_dict(weights) == ([], [])
    return model.to("cpu" if xp is np else "cuda")


def test_outputs_and_gradients(official, xp):
    model = loaded(official, xp)
    images = tt.Tensor(xp.asarray(official["x"].astype("float64")), requires_grad=True)
    out = model(images)
    same(out.logits.numpy(), official["out"], 1e-12)
    same(model.embed(images).numpy()[:1, :8], official["stem"], 1e-12)
    for s, found in enumerate(out.maps, 1):
        expected = official[f"stage{s}"]
        same(found.numpy()[:len(expected), :expected.shape[1]], expected, 1e-12)
    same(out.tokens.numpy().mean(axis=1), official["pooled"], 1e-12)
    ops.cross_entropy(out.logits, xp.asarray(official["labels"])).backward()
    leaves, count = dict(model.named_parameters()) | {"x": images}, 0
    for name, g in ((n[2:], g) for n, g in official.items() if n.startswith("g/")):
        tolerance = 1e-6 if g.dtype == "float32" else 1e-9  # of what is stored
        np.testing.assert_allclose(to_numpy(leaves[name].grad), g, rtol=0, atol=tolerance * np.abs(g).max())
        count += 1
    assert count == 7


def test_official_files_are_loaded_by_name(official):
    """With what PyTorch counts, and with the wrapper of a training on several devices."""
    state = {f"module.{n[2:]}": a for n, a in official.items() if n.startswith("w/")}
    state["module.patch_embed1.conv.1.num_batches_tracked"] = np.array(7)
    model = models.ShuntedTransformer(**SIZES).eval()
    models.load_weights(model, state, quiet=True)
    logits = model(official["x"]).logits.data
    assert logits.dtype == "float32"
    same(logits, official["out"], 1e-5)
