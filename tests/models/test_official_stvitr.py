"""STViT-R's parts against the official code (tests/fixtures)."""
import numpy as np
import pytest

import tinytoken as tt
from small import reference, same
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.models.stvit import Generation
from tinytoken.models.stvitr import SemanticMap

STAGE = dict(image_size=56, embed_dim=12, depths=(12, 1), heads=(3, 3), mlp_ratio=1, window_size=7,
             relative_pos=True, semantic_stage=0)


@pytest.fixture(scope="module")
def official():
    return reference("official_stvitr.npz")


def under(arrays, prefix):
    """In float64; what is stored in float32 is exact to 6e-8."""
    return {name.removeprefix(prefix): a.astype("float64") for name, a in arrays.items()
            if name.startswith(prefix)}


def check(out, leaves, arrays, prefix, xp, count):
    """The output, and `count` gradients of the sum of out * up."""
    same(out.numpy(), arrays[f"{prefix}out"], 1e-12)
    up = arrays[f"{prefix.replace('added', 'replaced')}up"]
    (out * xp.asarray(up.astype("float64"))).sum().backward()
    gradients = {n.removeprefix(f"{prefix}g/"): g for n, g in arrays.items() if n.startswith(f"{prefix}g/")}
    assert len(gradients) == count
    for name, g in gradients.items():
        np.testing.assert_allclose(to_numpy(leaves[name].grad), g, rtol=0, err_msg=name,
                                   atol=(1e-6 if g.dtype == "float32" else 1e-9) * np.abs(g).max())


def place_of(name):
    """An official name of the stage in our model, where halving begins the next stage."""
    return f"layers.{int(name.startswith('downsample'))}.{name}"


def test_two_dumbbells_with_relative_positions(official, xp):
    model, weights = models.STViTR(**STAGE).astype("float64"), under(official, "stage/w/")
    assert model.config.dumbbell == 6 and (model.config.seeds, model.config.reach) == (3, 10)
    missing, unexpected = model.load_state_dict({place_of(n): a for n, a in weights.items()}, strict=False)
    assert unexpected == [] and not any(n.startswith("layers.0") or "downsample" in n for n in missing)
    model.to("cpu" if xp is np else "cuda")
    x = tt.Tensor(xp.asarray(official["stage/x"].astype("float64")), requires_grad=True)
    state = SemanticMap(x, (14, 14))
    model.run_stage(0, model.layers[0].blocks, state, None)
    for tokens, block in zip(state.semantic, (4, 10)):
        same(tokens.numpy(), official[f"stage/block{block}"], 1e-12)
    own = dict(model.named_parameters())
    leaves = {n: own[place_of(n)] for n in weights} | {"x": x}
    check(model.layers[1].downsample(state.x, (14, 14)), leaves, official, "stage/", xp, 9)


@pytest.mark.parametrize("case, side, window, gradients", [("replaced", 14, 7, 5), ("added", 14, 7, 4),
                                                           ("three windows", 18, 6, 1)])
def test_the_first_generation(case, side, window, gradients, official, xp):
    block = Generation(16, 4, 2, True, 1e-5, 1, grid=(side, side), window=(window, window), seeds=(3, 3),
                       reach=(10, 10), shortcut=case == "added")
    assert block.load_state_dict(under(official, "replaced/w/")) == ([], [])
    block.to("cpu" if xp is np else "cuda")
    images = official[f"{case.replace('added', 'replaced')}/x"].astype("float64")
    x = tt.Tensor(xp.asarray(images), requires_grad=True)
    check(block(x), dict(block.named_parameters()) | {"x": x}, official, f"{case}/", xp, gradients)


def test_the_patches(official, xp):
    patches = models.STViTR(image_size=16, embed_dim=8, depths=(4,), heads=2).patch_embed.eval()
    assert patches.load_state_dict(under(official, "patches/w/")) == ([], [])
    patches.to("cpu" if xp is np else "cuda")
    x = tt.Tensor(xp.asarray(official["patches/x"].astype("float64")), requires_grad=True)
    check(patches(x), dict(patches.named_parameters()) | {"x": x}, official, "patches/", xp, 3)


def test_official_names():
    """A whole model's: halving ends a stage there, and the head has no layer of its own."""
    source, model = (models.STViTR(image_size=32, embed_dim=8, depths=(1, 4, 1), heads=2) for _ in range(2))
    for p in source.parameters():
        p.data += 0.1
    state = {"layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), "int64")}
    for name, array in source.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = array
    assert {"layers.1.semantic_token2", "layers.1.blocks.1.layer_scale_1", "layers.1.blocks.3.attn.kv.weight",
            "layers.0.downsample.norm.weight", "patch_embed.proj.2.bn.running_var", "head.weight"} <= state.keys()
    models.load_weights(model, state, quiet=True)
    assert all(np.array_equal(a, model.state_dict()[n]) for n, a in source.state_dict().items())
