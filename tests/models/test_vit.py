"""The ViT: timm's outputs from timm's weights, whole-model gradients, what it refuses."""
from pathlib import Path

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, pictures, refuses, same, shaken
from tinytoken.checking import gradcheck
from tinytoken.models import ViT


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "fixtures" / "timm_vit.npz") as file:
        return dict(file)


def timm_model(reference, dtype, xp):
    weights = {name.removeprefix("weights/"): a.astype(dtype) for name, a in reference.items() if name.startswith("weights/")}
    model = ViT(32, 8, 48, 3, 3, num_classes=10)
    assert model.load_state_dict(weights) == ([], [])
    return model.to("cpu" if xp is np else "cuda"), xp.asarray(reference["images"])


# Parity with timm

def test_names_and_their_order_are_timms(reference):
    names = [name.removeprefix("weights/") for name in reference if name.startswith("weights/")]
    assert [name for name, _ in ViT(32, 8, 48, 3, 3).named_parameters()] == names and len(names) == 44


def test_timms_logits_in_float32(reference, xp):
    model, images = timm_model(reference, "float32", xp)
    logits = model(images)
    assert logits.dtype == np.float32
    wanted = reference["logits32"]
    assert (np.abs(logits.numpy() - wanted) <= 2e-5 * np.maximum(1, np.abs(wanted))).all()


def test_timms_logits_and_features_in_float64(reference, xp):
    model, images = timm_model(reference, "float64", xp)
    logits, trace = model(images, trace=True)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits.numpy(), reference["logits64"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(trace.tokens.numpy(), reference["features64"][:, 1:], rtol=0, atol=1e-9)


# Gradients

@pytest.mark.parametrize("options", [dict(), dict(pool="mean"), dict(qkv_bias=False)], ids=str)
def test_gradients_of_the_whole_model(options):
    model = shaken(ViT(**SMALL, **options))
    images, targets = pictures(), np.array([4, 1])

    def outputs(*parameters):
        logits, trace = model(images, trace=True)
        return tt.ops.cross_entropy(logits, targets), logits, trace.tokens
    names = [name for name, _ in model.named_parameters()]
    assert gradcheck(outputs, *model.parameters(), names=names, max_elements=80).directions == 2


def test_the_gradient_of_the_images():
    model = shaken(ViT(**SMALL))
    gradcheck(model, pictures(), max_elements=60)


def test_float32_stays_float32():
    model = ViT(**SMALL)
    loss = tt.ops.cross_entropy(model(pictures()), np.array([0, 3]))  # float64 pictures are cast to the weights' dtype
    loss.backward()
    assert loss.dtype == np.float32
    assert all(p.grad.dtype == np.float32 and p.grad.shape == p.shape for p in model.parameters())


# What the model is

def test_trace_shows_tokens_and_attention_and_changes_nothing():
    model, images = shaken(ViT(**SMALL)), pictures(3)
    logits, trace = model(images, trace=True)
    assert np.array_equal(logits.data, model(images).data)
    assert trace.tokens.shape == (3, 16, 8) and trace.kept == [] and trace.lookup is None
    assert [A.shape for A in trace.attention] == [(3, 2, 17, 17)] * 2
    for A in trace.attention:
        assert not A.requires_grad and (A.data >= 0).all()
        same(A.data.sum(axis=-1), 1)


def test_pool_mean_has_no_class_token_and_averages_the_normed_tokens():
    model, images = shaken(ViT(**SMALL, pool="mean")), pictures()
    assert "cls_token" not in dict(model.named_parameters()) and model.pos_embed.shape == (1, 16, 8)
    logits, trace = model(images, trace=True)
    assert trace.tokens.shape == (2, 16, 8) and trace.attention[0].shape == (2, 2, 16, 16)
    by_hand = trace.tokens.data.mean(axis=1) @ model.head.weight.data.T + model.head.bias.data
    same(logits.data, by_hand)


def test_qkv_bias_can_be_left_out():
    with_bias, without = (dict(ViT(**SMALL, qkv_bias=wanted).named_parameters()) for wanted in (True, False))
    assert with_bias.keys() - without.keys() == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}


def test_pool_token_reads_the_class_token_alone():
    model, images = shaken(ViT(**SMALL)), pictures()
    logits, trace = model(images, trace=True)
    logits_loss = (logits * np.random.default_rng(1).standard_normal(logits.shape)).sum()
    assert (tt.grad(logits_loss, [trace.tokens])[0] == 0).all()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_images_of_a_batch_do_not_meet(pool):
    model, images = shaken(ViT(**SMALL, pool=pool)), pictures(3)
    alone = np.concatenate([model(images[i:i + 1]).data for i in range(3)])
    same(model(images).data, alone)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_without_positions_the_order_of_patches_does_not_matter(pool):
    """Attention sees a set of tokens: only the position table tells them apart."""
    model, images = shaken(ViT(**SMALL, pool=pool)), pictures(1)
    flipped = images.reshape(1, 3, 4, 2, 8)[:, :, ::-1].reshape(1, 3, 8, 8)  # rows of patches in reverse order
    assert np.abs(model(flipped).data - model(images).data).max() > 1e-3
    model.pos_embed.data[...] = 0
    same(model(flipped).data, model(images).data)


def test_train_and_eval_modes_give_the_same():
    model, images = shaken(ViT(**SMALL)), pictures()
    assert np.array_equal(model.train()(images).data, model.eval()(images).data)


def test_the_configuration_makes_the_same_model_again():
    model = ViT(**SMALL, pool="mean", qkv_bias=False, mlp_ratio=2)
    again = ViT(**model.config)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert again.load_state_dict(model.state_dict()) == ([], [])
    assert np.array_equal(again(pictures()).data, model(pictures()).data)


# What it refuses

@pytest.mark.parametrize("options, text", [
    (dict(heads=3), "Attention: heads 3 do not divide dim 8"),
    (dict(patch_size=3), "PatchEmbed: patch_size 3 does not divide image_size 8"),
    (dict(patch_size=16), "PatchEmbed: patch_size 16 does not divide image_size 8"),
    (dict(patch_size=0), "ViT: patch_size 0, expected a positive whole number"),
    (dict(image_size=-8), "ViT: image_size -8, expected a positive whole number"),
    (dict(dim=0), "ViT: dim 0, expected a positive whole number"),
    (dict(depth=1.5), "ViT: depth 1.5, expected a positive whole number"),
    (dict(heads=0), "ViT: heads 0, expected a positive whole number"),
    (dict(num_classes=-1), "ViT: num_classes -1, expected a positive whole number"),
    (dict(channels="rgb"), "ViT: channels 'rgb', expected a positive whole number"),
    (dict(pool="max"), "ViT: pool 'max', expected token or mean"),
], ids=str)
def test_options_that_make_no_model(options, text):
    with refuses(text):
        ViT(**SMALL | options)


@pytest.mark.parametrize("shape, dtype, text", [
    ((2, 3, 16, 16), "float32", "images: (2, 3, 16, 16), expected (B, 3, 8, 8)"),
    ((2, 3, 8, 10), "float32", "images: (2, 3, 8, 10), expected (B, 3, 8, 8)"),
    ((2, 1, 8, 8), "float32", "images: (2, 1, 8, 8), expected (B, 3, 8, 8)"),
    ((3, 8, 8), "float32", "images: (3, 8, 8), expected (B, 3, 8, 8)"),
    ((2, 3, 8, 8), "uint8", "images: dtype uint8, expected float32: normalise them first (tt.data.normalise)"),
], ids=str)
@pytest.mark.parametrize("wrap", [np.asarray, tt.Tensor])
def test_images_that_do_not_fit(shape, dtype, text, wrap):
    with refuses(text):
        ViT(**SMALL)(wrap(np.zeros(shape, dtype)))


def test_the_advice_for_uint8_pictures_works():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype("uint8")
    assert ViT(**SMALL)(tt.data.normalise(images, *tt.data.channel_statistics(images))).shape == (2, 5)


@pytest.mark.parametrize("targets, text", [
    (np.array([0, 5]), "cross_entropy: labels from 0 to 5, expected 0 to 4"),
    (np.array([-1, 4]), "cross_entropy: labels from -1 to 4, expected 0 to 4"),
    (np.array([0, 1, 2]), "cross_entropy: targets (3,) int64, expected (2,) integer labels or (2, 5) probabilities"),
    (np.array([0.0, 1.0]), "cross_entropy: targets (2,) float32, expected (2,) integer labels or (2, 5) probabilities"),
], ids=str)
def test_labels_that_do_not_fit(targets, text):
    logits = ViT(**SMALL)(pictures())
    with refuses(text):
        tt.ops.cross_entropy(logits, targets)
