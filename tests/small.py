"""What the tests of modules and models share: a tiny size, pictures for it, weights that hide no mistake,
exact error texts."""
import json
import pathlib
import re
from dataclasses import asdict

import numpy as np
import pytest

import tinytoken as tt
from tinytoken.backend import to_numpy
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import checkpoint

SMALL = dict(image_size=8, patch_size=2, dim=8, depth=2, heads=2, num_classes=5)  # 16 patches
MODELS = {"ViT": lambda: ViT(**SMALL),
          "DynamicViT": lambda: DynamicViT(**SMALL, prune_before=(1,), keep_ratios=(0.5,)),
          "LookupViT": lambda: LookupViT(**SMALL, compressed=(2, 2))}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)

# ViTs with the options that published weights have, as fixtures/make_reference.py makes them of timm's
VARIANTS = {
    "distilled": dict(distilled=True),
    "registers": dict(reg_tokens=3),
    "registers without positions": dict(reg_tokens=3, no_embed_class=True),
    "layer scale": dict(layer_scale=1e-5),
    "qk norm": dict(qk_norm=True),
    "no qkv bias": dict(qkv_bias=False),
    "pre-norm": dict(pre_norm=True),
    "eps": dict(eps=0.1),
    "mean, normed after it": dict(pool="mean", class_token=True, final_norm="pooled"),
    "mean, normed before it": dict(pool="mean", class_token=True),
    "mean, no class token": dict(pool="mean", final_norm="pooled", reg_tokens=2, no_embed_class=True),
    "class token, normed alone": dict(final_norm="pooled"),
    "no final norm": dict(final_norm="none"),
    "all": dict(reg_tokens=3, no_embed_class=True, layer_scale=1e-5, qk_norm=True, qkv_bias=False, eps=0.1,
                pre_norm=True, pool="mean", class_token=True, final_norm="pooled"),
    "all, distilled": dict(distilled=True, layer_scale=1e-5, qk_norm=True, qkv_bias=False, eps=0.1,
                           pre_norm=True)}


def reference(name):
    """The arrays of a file that fixtures/make_reference.py has made."""
    with np.load(pathlib.Path(__file__).parent / "fixtures" / name) as file:
        return dict(file)


def pictures(batch=2, seed=0, size=8):
    return np.random.default_rng(seed).standard_normal((batch, 3, size, size))


def shaken(module, seed=0, spread=None):
    """The module in float64 with no parameter left at a special value: a zero bias or a unit scale hides
    mistakes.

    spread: the standard deviation of its self-attention's logits. Rows x after a norm have |x|^2 near D, so
    weights of variance spread / D give q and k entries of variance spread.
    """
    rng = np.random.default_rng(seed)
    for name, p in module.astype("float64").named_parameters():
        p.data += 0.3 * rng.standard_normal(p.shape)
        if spread and name.endswith("qkv.weight"):
            p.data[...] = rng.standard_normal(p.shape) * (spread / p.shape[1]) ** 0.5
            p.data[2 * len(p) // 3:] /= spread ** 0.5  # the values
    return module


def loss_of(model):
    """A loss of any of the models in any mode."""
    return tt.ops.cross_entropy(model(pictures()).logits, np.array([0, 3]))


def same(a, b, tolerance=1e-12):
    """Equal to `tolerance` of b's largest value."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0)))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def comes_back(model, folder):
    """Its configuration goes through JSON, and from a checkpoint it answers to the same bits -> both Outputs."""
    again = tt.models.create(type(model).__name__.lower(), **json.loads(json.dumps(asdict(model.config))))
    assert again.config == model.config
    checkpoint.save(folder / "model.npz", model, step=4)
    loaded, _ = checkpoint.load_model(folder / "model.npz")
    images = np.random.default_rng(0).standard_normal((2, *model.config.input_shape)).astype("float32")
    mine, its = model.eval()(images), loaded.eval()(images)
    assert np.array_equal(mine.logits.data, its.logits.data)
    return mine, its


def refuses(text):
    """The block raises InputError with exactly this one-line text."""
    return pytest.raises(tt.InputError, match=f"^{re.escape(text)}$")


# For DynamicViT

STAGES = dict(prune_before=(1, 2), keep_ratios=(0.7, 0.4))


def gumbel(stages=2, batch=2, tokens=16, seed=0):
    return list(np.random.default_rng(seed).gumbel(size=(stages, batch, tokens, 2)))


def masks(counts, batch=3, tokens=16, seed=0):
    """Nested decisions, counts[s] tokens left by stage s, other ones in each image. Every second mask also
    names a token that is gone already: a decision counts times the earlier ones."""
    places = np.array([np.random.default_rng((seed, i)).permutation(tokens) for i in range(batch)])
    kept = [places < n for n in counts]
    return [k | (places == counts[s - 1]) if s % 2 else k for s, k in enumerate(kept)]


def teacher(batch=2, seed=7):
    """The dense network's logits and tokens, by chance."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, 5)), rng.standard_normal((batch, 16, 8))


def same_logits_and_gradients(model, masked, gathered, upstream, field="logits", without="score_predictor"):
    """Two outputs of a DynamicViT agree, and so do the gradients of all that is no predictor, none of which
    is zero. field: of the outputs. without: the modules that have no part in it."""
    masked, gathered = getattr(masked, field), getattr(gathered, field)
    same(masked.numpy(), gathered.numpy())
    params = [p for name, p in model.named_parameters() if name.split(".")[0] not in without]
    of_masked, of_gathered = (tt.grad((out * upstream).sum(), params) for out in (masked, gathered))
    for a, b in zip(of_masked, of_gathered):
        same(to_numpy(a), to_numpy(b))
    assert all(abs(g).max() > 0 for g in of_gathered)
