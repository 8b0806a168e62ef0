"""LeMeViT against the official code: a whole model with blocks of C, D and S, and a block of D2
(fixtures/official_lemevit.npz)."""
import numpy as np
import pytest

import tinytoken as tt
from small import reference, same
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.models.lemevit import MetaBlock
from tinytoken.models.maps import as_map, as_tokens

CONFIG = dict(image_size=64, dims=(16, 16, 24, 24, 32), depths=(1,) * 5, attn_type=("C", "D", "D", "S", "S"),
              head_dim=8, mlp_ratio=2, meta_tokens=4, num_classes=7)


@pytest.fixture(scope="module")
def official():
    return reference("official_lemevit.npz")


def under(arrays, prefix):
    return {name.removeprefix(prefix): a.astype("float64")
            for name, a in arrays.items() if name.startswith(prefix)}


def same_gradients(found, gradients):
    assert len(gradients) > 6
    for name, g in gradients.items():
        of_pictures = g.ndim == 4 and g.size > 6000  # stored in float32
        largest, tolerance = np.abs(g).max(), 1e-7 if of_pictures else 1e-12
        same(to_numpy(found[name].grad) / largest, g / largest, tolerance)


@pytest.mark.parametrize("by", ["load_state_dict", "load_weights"])
def test_a_whole_model(by, official, xp):
    arrays, model = under(official, "model/"), models.LeMeViT(**CONFIG)
    weights = under(arrays, "w/")
    if by == "load_state_dict":
        assert model.load_state_dict(weights) == ([], [])
    else:  # under these names, which look like ConvNeXt's
        notes = models.load_weights(model, weights | {"norm.num_batches_tracked": np.int64(3)}, quiet=True)
        assert notes[0] == "left out norm.num_batches_tracked" and len(notes) == 2
    model.eval().to("cpu" if xp is np else "cuda")
    images = tt.Tensor(xp.asarray(arrays["x"]), requires_grad=True)
    out = model(images)
    same(out.logits.numpy(), arrays["out"], 1e-11)
    assert np.array_equal(out.maps[0].numpy(), model.embed(images).numpy())  # C leaves the map as it was
    same(as_map(out.maps[3], (4, 4)).numpy(), arrays["stage3_x"], 1e-11)
    same(out.tokens.mean(axis=1).numpy() + out.meta.mean(axis=1).numpy(), arrays["pooled"], 1e-11)
    loss, _ = model.loss(out, xp.asarray(official["model/labels"]))
    same(loss.numpy(), arrays["loss"])
    loss.backward()
    same_gradients(dict(model.named_parameters()) | {"x": images}, under(arrays, "g/"))


def test_a_block_with_one_projection_for_both_directions(official, xp):
    arrays, block = under(official, "D2/"), MetaBlock(16, 2, 2, "D2")
    assert block.load_state_dict(under(arrays, "w/")) == ([], [])
    block.to("cpu" if xp is np else "cuda")
    x, c = (tt.Tensor(xp.asarray(arrays[name]), requires_grad=True) for name in "xc")
    tokens, meta = block(as_tokens(x), c, (4, 6))
    same(as_map(tokens, (4, 6)).numpy(), arrays["out_x"])
    same(meta.numpy(), arrays["out_c"])
    up_x, up_c = (xp.asarray(arrays[f"up_{name}"]) for name in "xc")
    ((as_map(tokens, (4, 6)) * up_x).sum() + (meta * up_c).sum()).backward()
    same_gradients(dict(block.named_parameters()) | {"x": x, "c": c}, under(arrays, "g/"))
