"""The ViT: timm's outputs from timm's weights, whole-model gradients, what it refuses."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, loss_of, pictures, refuses, same, shaken
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.models import Output, Tokens, ViT


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "fixtures" / "timm_vit.npz") as file:
        return dict(file)


def timm_model(reference, dtype, xp):
    weights = {name.removeprefix("weights/"): a.astype(dtype) for name, a in reference.items()
               if name.startswith("weights/")}
    model = ViT(32, 8, 48, 3, 3, num_classes=10)
    assert model.load_state_dict(weights) == ([], [])
    return model.to("cpu" if xp is np else "cuda"), xp.asarray(reference["images"])


# Parity with timm

def test_names_and_their_order_are_timms(reference):
    names = [name.removeprefix("weights/") for name in reference if name.startswith("weights/")]
    assert [name for name, _ in ViT(32, 8, 48, 3, 3).named_parameters()] == names and len(names) == 44


def test_timms_logits_in_float32(reference, xp):
    model, images = timm_model(reference, "float32", xp)
    logits = model(images).logits
    assert logits.dtype == np.float32
    wanted = reference["logits32"]
    assert (np.abs(logits.numpy() - wanted) <= 2e-5 * np.maximum(1, np.abs(wanted))).all()


def test_timms_logits_and_features_in_float64(reference, xp):
    model, images = timm_model(reference, "float64", xp)
    out = model(images)
    assert out.logits.dtype == np.float64
    np.testing.assert_allclose(out.logits.numpy(), reference["logits64"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(out.tokens.numpy(), reference["features64"][:, 1:], rtol=0, atol=1e-9)


# Gradients

@pytest.mark.parametrize("options", [dict(), dict(pool="mean"), dict(qkv_bias=False)], ids=str)
def test_gradients_of_the_whole_model(options):
    model = shaken(ViT(**SMALL, **options))
    images, targets = pictures(), np.array([4, 1])

    def outputs(*parameters):
        out = model(images)
        return tt.ops.cross_entropy(out.logits, targets), out.logits, out.tokens
    names = [name for name, _ in model.named_parameters()]
    assert gradcheck(outputs, *model.parameters(), names=names, max_elements=80).directions == 2


def test_the_gradient_of_the_images():
    model = shaken(ViT(**SMALL))
    gradcheck(lambda images: model(images).logits, pictures(), max_elements=60)


def test_float32_stays_float32():
    model = ViT(**SMALL)
    loss = loss_of(model)  # float64 pictures are cast to the weights' dtype
    loss.backward()
    assert loss.dtype == np.float32
    assert all(p.grad.dtype == np.float32 and p.grad.shape == p.shape for p in model.parameters())


# What the model is

@pytest.mark.parametrize("training", [True, False])
def test_the_output_and_its_trace_which_changes_nothing(training):
    model, images = shaken(ViT(**SMALL)).train(training), pictures(3)
    out, plain = model(images, trace=True), model(images)
    assert type(out) is type(plain) is Output and plain.attention == []
    assert np.array_equal(out.logits.data, plain.logits.data)
    assert np.array_equal(out.tokens.data, plain.tokens.data)
    assert out.tokens.shape == (3, 16, 8)
    assert [A.shape for A in out.attention] == [(3, 2, 17, 17)] * 2
    for A in out.attention:
        assert not A.requires_grad and (A.data >= 0).all()
        same(A.data.sum(axis=-1), 1)


def test_pool_mean_has_no_class_token_and_averages_the_normed_tokens():
    model, images = shaken(ViT(**SMALL, pool="mean")), pictures()
    assert "cls_token" not in dict(model.named_parameters()) and model.pos_embed.shape == (1, 16, 8)
    out = model(images, trace=True)
    assert out.tokens.shape == (2, 16, 8) and out.attention[0].shape == (2, 2, 16, 16)
    by_hand = out.tokens.data.mean(axis=1) @ model.head.weight.data.T + model.head.bias.data
    same(out.logits.data, by_hand)


def test_qkv_bias_can_be_left_out():
    with_bias, without = (dict(ViT(**SMALL, qkv_bias=wanted).named_parameters()) for wanted in (True, False))
    assert with_bias.keys() - without.keys() == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}


def test_pool_token_reads_the_class_token_alone():
    model, images = shaken(ViT(**SMALL)), pictures()
    out = model(images)
    loss = (out.logits * np.random.default_rng(1).standard_normal(out.logits.shape)).sum()
    assert (tt.grad(loss, [out.tokens])[0] == 0).all()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_images_of_a_batch_do_not_meet(pool):
    model, images = shaken(ViT(**SMALL, pool=pool)), pictures(3)
    alone = np.concatenate([model(images[i:i + 1]).logits.data for i in range(3)])
    same(model(images).logits.data, alone)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_without_positions_the_order_of_patches_does_not_matter(pool):
    """Attention sees a set of tokens: only the position table tells them apart."""
    model, images = shaken(ViT(**SMALL, pool=pool)), pictures(1)
    # rows of patches in reverse order
    flipped = images.reshape(1, 3, 4, 2, 8)[:, :, ::-1].reshape(1, 3, 8, 8)
    assert np.abs(model(flipped).logits.data - model(images).logits.data).max() > 1e-3
    model.pos_embed.data[...] = 0
    same(model(flipped).logits.data, model(images).logits.data)


def test_train_and_eval_modes_give_the_same():
    model, images = shaken(ViT(**SMALL)), pictures()
    assert np.array_equal(model.train()(images).logits.data, model.eval()(images).logits.data)


# The loop over blocks, which methods build on

def test_a_pass_is_start_encode_and_read():
    model, images = shaken(ViT(**SMALL)), pictures()
    tokens = model.start(images, trace=True)
    assert type(tokens) is Tokens and tokens.extra == 1 and tokens.keep is None and tokens.attention == []
    assert np.array_equal(tokens.x.data, model.embed(images).data)
    assert model.encode(tokens) is tokens and len(tokens.attention) == 2
    out = model.read(tokens)
    by_hand = model.embed(images)
    for block in model.blocks:
        by_hand = block(by_hand)
    by_hand = model.norm(by_hand)
    assert np.array_equal(out.tokens.data, by_hand.data[:, 1:])
    assert np.array_equal(out.logits.data, model.classify(by_hand).data) and out.attention is tokens.attention


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_tokens_know_which_patches_they_are(extra, xp):
    x = xp.asarray(np.random.default_rng(0).standard_normal((2, extra + 6, 3)))
    tokens = Tokens(tt.Tensor(x), extra)
    assert to_numpy(tokens.index).tolist() == [list(range(6))] * 2
    assert np.array_equal(tokens.patches.numpy(), to_numpy(x[:, extra:]))
    tokens.take(xp.asarray([[0, 2, 3, 5], [1, 2, 3, 4]]))
    assert tokens.x.shape == (2, extra + 4, 3)
    assert np.array_equal(tokens.x.numpy()[:, :extra], to_numpy(x)[:, :extra])
    assert to_numpy(tokens.index).tolist() == [[0, 2, 3, 5], [1, 2, 3, 4]]
    tokens.take(xp.asarray([[1, 3], [0, 3]]))  # places among those that are left
    assert to_numpy(tokens.index).tolist() == [[2, 5], [1, 4]]
    for b, kept in enumerate(to_numpy(tokens.index)):
        assert np.array_equal(tokens.patches.numpy()[b], to_numpy(x)[b, extra + kept])


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_a_method_overrides_what_happens_before_a_block(pool):
    """Every second patch goes before block 1: what comes out is the model by hand, and the images do not
    meet."""
    class Halved(ViT):
        def before_block(self, i, tokens):
            seen.append((i, tokens.x.shape[1]))
            if i == 1:
                tokens.take(np.tile(np.arange(0, 16, 2), (len(tokens.x), 1)))

    seen, model, images = [], shaken(Halved(**SMALL, pool=pool)), pictures()
    out, extra = model(images, trace=True), int(pool == "token")
    assert seen == [(0, 16 + extra), (1, 16 + extra)]
    x = model.blocks[0](model.embed(images)).data
    x = model.norm(model.blocks[1](np.concatenate([x[:, :extra], x[:, extra::2]], axis=1))).data
    same(out.tokens.data, x[:, extra:])
    same(out.logits.data, model.classify(tt.Tensor(x)).data)
    assert [A.shape[2] for A in out.attention] == [16 + extra, 8 + extra]


def test_a_mask_in_the_state_reaches_the_attention():
    class Masked(ViT):
        def before_block(self, i, tokens):
            tokens.keep, tokens.official = np.array([[1.0] * 9 + [0.0] * 8] * 2), official
    model, images = shaken(Masked(**SMALL)), pictures()
    outs = []
    for official in (False, True):
        outs.append(model(images, trace=True))
    exact, other = (out.attention[0].data for out in outs)
    itself = np.eye(17)[9:, 9:].astype(bool)
    assert (exact[:, :, :9, 9:] == 0).all() and (exact[:, :, 9:, 9:][:, :, ~itself] == 0).all()
    assert (other[:, :, :9, 9:] > 0).all()  # the official form's eps


def test_the_configuration_makes_the_same_model_again():
    model = ViT(**SMALL, pool="mean", qkv_bias=False, mlp_ratio=2)
    again = ViT(**dataclasses.asdict(model.config))
    ours, theirs = ([(n, p.shape) for n, p in m.named_parameters()] for m in (model, again))
    assert ours == theirs
    assert again.load_state_dict(model.state_dict()) == ([], [])
    assert np.array_equal(again(pictures()).logits.data, model(pictures()).logits.data)


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
    (dict(heads=True), "ViT: heads True, expected a positive whole number"),
    (dict(image_size=(8, True)), "ViT: image_size (8, True), expected a positive whole number"),
    (dict(mlp_ratio=True), "ViT: mlp_ratio True, expected a positive number"),
    (dict(eps=True), "ViT: eps True, expected a positive number"),
    (dict(reg_tokens=True), "ViT: reg_tokens True, expected a whole number that is not negative"),
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
    ((2, 3, 8, 8), "uint8",
     "images: dtype uint8, expected float32: normalise them first (tt.data.normalise)"),
], ids=str)
@pytest.mark.parametrize("wrap", [np.asarray, tt.Tensor])
def test_images_that_do_not_fit(shape, dtype, text, wrap):
    with refuses(text):
        ViT(**SMALL)(wrap(np.zeros(shape, dtype)))


def test_the_advice_for_uint8_pictures_works():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype("uint8")
    assert ViT(**SMALL)(tt.data.normalise(images, *tt.data.channel_statistics(images))).logits.shape == (2, 5)


@pytest.mark.parametrize("targets, text", [
    (np.array([0, 5]), "cross_entropy: labels from 0 to 5, expected 0 to 4"),
    (np.array([-1, 4]), "cross_entropy: labels from -1 to 4, expected 0 to 4"),
    (np.array([0, 1, 2]),
     "cross_entropy: targets (3,) int64, expected (2,) integer labels or (2, 5) probabilities"),
    (np.array([0.0, 1.0]),
     "cross_entropy: targets (2,) float32, expected (2,) integer labels or (2, 5) probabilities"),
], ids=str)
def test_labels_that_do_not_fit(targets, text):
    logits = ViT(**SMALL)(pictures()).logits
    with refuses(text):
        tt.ops.cross_entropy(logits, targets)
