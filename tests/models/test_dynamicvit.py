"""DynamicViT: whole-model gradients, masking equals removing, keep ratios, its output, what it refuses."""
import dataclasses

import numpy as np
import pytest

import small
import tinytoken as tt
from small import STAGES, gumbel, masks, pictures, refuses, same, same_logits_and_gradients, shaken, teacher
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.models import DynamicOutput, DynamicViT, ViT, dynamicvit_loss

SMALL = small.SMALL | dict(depth=3)


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


# Gradients

@pytest.mark.parametrize("form", [False, True], ids=["exact", "official"])
def test_gradients_of_the_whole_model_with_soft_decisions(form):
    model, images, noise = shaken(DynamicViT(**SMALL, **STAGES, official=form)), pictures(), gumbel()
    targets, (teacher_logits, teacher_tokens) = np.array([4, 0]), teacher()

    def outputs(*parameters):
        out = model(images, noise=noise, hard=False)
        loss, _ = dynamicvit_loss(out, targets, teacher_logits, teacher_tokens, (0.7, 0.4), smoothing=0.1)
        return loss, out.logits, out.tokens, *out.decisions
    names = [name for name, _ in model.named_parameters()]
    report = gradcheck(outputs, *model.parameters(), names=names, max_elements=80)
    assert report.directions == 2 and len(report.inputs) == len(names)


@pytest.mark.parametrize("training", [True, False], ids=["masked", "gathered"])
def test_gradients_of_the_whole_model_with_forced_decisions(training):
    model = shaken(DynamicViT(**SMALL, **STAGES)).train(training)
    images, keep = pictures(), masks((9, 4), batch=2)

    def outputs(*parameters):
        out = model(images, keep=keep)
        return out.logits, out.tokens
    gradcheck(outputs, *model.parameters(), max_elements=80)


@pytest.mark.parametrize("stage_before", [0, 2])
def test_straight_through_equals_soft_exactly(stage_before):
    """The gradient of the hard decisions is that of the soft ones, to the bit: both are taken at the same
    soft value."""
    model = shaken(DynamicViT(**SMALL, prune_before=(stage_before,), keep_ratios=(0.5,)))
    upstream = np.random.default_rng(3).standard_normal((2, 16))
    wrt = [p for name, p in model.named_parameters() if not name.startswith(("head", "norm", "blocks.2"))]
    wrt = wrt if stage_before else [p for name, p in model.named_parameters()
                                    if name.startswith(("score", "patch", "pos"))]
    gradients, values = {}, {}
    for hard in (True, False):
        decision = model(pictures(), noise=gumbel(1), hard=hard).decisions[0]
        values[hard] = decision.data
        gradients[hard] = tt.grad((decision * upstream).sum(), wrt)
    assert set(np.unique(values[True])) == {0, 1} and ((values[False] > 0) & (values[False] < 1)).all()
    for hard, soft in zip(gradients[True], gradients[False]):
        assert np.array_equal(hard, soft)
    assert sum(np.abs(g).max() > 0 for g in gradients[True]) >= len(wrt) - 1


# Masking is removing

@pytest.mark.parametrize("counts", [(16, 16, 16), (11, 7, 5), (12, 12, 3), (9, 1, 1), (1, 1, 1), (5, 2, 0),
                                    (0, 0, 0)], ids=str)
@pytest.mark.parametrize("spread", [1, 5, 20])
def test_masked_equals_gathered(counts, spread, xp):
    """The same forced decisions by masking and by gathering: the same class logits, and the same gradient of
    every weight."""
    model = shaken(DynamicViT(**SMALL | dict(depth=4), prune_before=(1, 2, 3),
                              keep_ratios=(0.7, 0.49, 0.343)), spread=spread)
    model.to("cpu" if xp is np else "cuda")
    images, keep = xp.asarray(pictures(3)), [xp.asarray(m) for m in masks(counts)]
    upstream = xp.asarray(np.random.default_rng(1).standard_normal((3, 5)))
    masked = model.train()(images, keep=keep)
    gathered = model.eval()(images, keep=keep)
    assert [k.shape for k in gathered.kept] == [(3, n) for n in counts]
    assert [d.numpy().sum(axis=1).tolist() for d in masked.decisions] == [[n] * 3 for n in counts]
    same_logits_and_gradients(model, masked, gathered, upstream)
    # the kept tokens are the same, too
    kept = xp.asarray(np.sort(to_numpy(gathered.kept[-1]), axis=1))[:, :, None]
    same(to_numpy(xp.take_along_axis(masked.tokens.data, kept, axis=1)), gathered.tokens.numpy())


@pytest.mark.parametrize("spread", [1, 5, 20])
def test_the_spread_of_the_attention_logits_is_what_the_tests_say(spread):
    model = shaken(DynamicViT(**SMALL, **STAGES), spread=spread)
    block, x = model.blocks[0], model.embed(pictures(3))
    q, k, _ = tt.ops.split_heads(block.attn.qkv(block.norm1(x)), heads=2, parts=3)
    assert spread / 2.5 < (q.data @ k.data.swapaxes(-1, -2) / 2).std() < 2.5 * spread


def test_the_official_mask_is_not_removing():
    """Why the exact form exists: under the official formula a dropped key can win the row's maximum."""
    model = shaken(DynamicViT(**SMALL, **STAGES, official=True), spread=20)
    keep = masks((4, 2))
    masked, gathered = (model.train(training)(pictures(3), keep=keep).logits for training in (True, False))
    assert np.abs(masked.data - gathered.data).max() > 1e-2


def test_tokens_that_are_gone_do_not_reach_the_logits():
    """What a dropped patch shows changes nothing: for decisions before block 0 not a bit."""
    model = shaken(DynamicViT(**SMALL, prune_before=(0,), keep_ratios=(0.5,)))
    keep, images = masks((5,)), pictures(3)
    hidden = images.reshape(3, 3, 4, 2, 4, 2).copy()
    hidden.transpose(0, 2, 4, 1, 3, 5)[~keep[0].reshape(3, 4, 4)] = 99  # the pixels of the dropped patches
    hidden = hidden.reshape(images.shape)
    for training in (False, True):
        out, blind = (model.train(training)(x, keep=keep).logits.data for x in (images, hidden))
        same(out, blind)
        assert training or np.array_equal(out, blind)


def test_forced_decisions_in_eval_mode_must_keep_as_many_in_every_image():
    model = shaken(DynamicViT(**SMALL, **STAGES)).eval()
    keep = [np.arange(16) < np.array([[9], [7]]), np.ones((2, 16))]
    with refuses("DynamicViT: forced decisions keep 7 to 9 tokens: in eval mode every image must keep as "
                 "many"):
        model(pictures(), keep=keep)
    assert model.train()(pictures(), keep=keep).keep.data.sum(axis=1).tolist() == [9, 7]


@pytest.mark.parametrize("spread", [1, 20, 200])
@pytest.mark.parametrize("lost", ["forced", "by noise", "none", "one left"])
@pytest.mark.parametrize("token_norm", ["pooled", "image"])
def test_float32_training_stays_finite(spread, lost, token_norm):
    """Whatever is dropped, values, losses and gradients are finite, and so are the gradients' squares
    (AdamW's moments)."""
    model = shaken(DynamicViT(**SMALL, **STAGES), spread=spread).astype("float32").train()
    noise, keep = gumbel(batch=3), None
    if lost == "forced":
        keep = [np.ones((3, 16)) - (np.arange(3) == 1)[:, None], np.zeros((3, 16))]
    elif lost == "by noise":
        noise[0][0, :, 1] = 1e6   # image 0 loses all at the first stage, images 1 and 2 at the second
        noise[1][1:, :, 1] = 1e6
    elif lost == "one left":
        noise[0][:, 1:, 1], noise[0][:, 0, 0] = 1e6, 1e6
        noise[1][:, 0, 0] = 1e6
    out = model(pictures(3), noise=noise, keep=keep)
    left = {"forced": [0, 0, 0], "by noise": [0, 0, 0], "one left": [1, 1, 1]}.get(lost)
    assert left is None or out.keep.data.sum(axis=1).tolist() == left
    teacher_logits, teacher_tokens = (a.astype("float32") for a in teacher(3))
    loss, parts = dynamicvit_loss(out, np.array([0, 1, 2]), teacher_logits, teacher_tokens, (0.7, 0.4),
                                  token_norm=token_norm)
    loss.backward()
    assert loss.dtype == np.float32 and out.logits.dtype == np.float32
    assert all(np.isfinite(t.data).all()
               for t in (loss, *parts.values(), out.logits, out.tokens, *out.decisions))
    assert lost in ("none", "one left") or parts["token"].item() == 0
    for name, p in model.named_parameters():
        if keep is None or "score_predictor" not in name:
            assert p.grad.dtype == np.float32 and np.isfinite(p.grad ** 2).all(), name


# Keep ratios

@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keep_ratios_of_one_are_the_vit_to_the_bit(dtype):
    vit = shaken(ViT(**SMALL)).astype(dtype)
    model = DynamicViT(**SMALL, prune_before=(0, 1, 2), keep_ratios=(1, 1.0, 1)).eval()
    model.load_state_dict(vit.state_dict(), strict=False)
    out, wanted = model(pictures(4)), vit(pictures(4))
    assert out.logits.dtype == dtype and np.array_equal(out.logits.data, wanted.logits.data)
    assert np.array_equal(out.tokens.data, wanted.tokens.data)
    assert [k.tolist() for k in out.kept] == [[list(range(16))] * 4] * 3
    if dtype == "float64":  # by masking with ones it is another formula of the same numbers
        same(model.train()(pictures(4), keep=[np.ones((4, 16))] * 3).logits.data, wanted.logits.data)


@pytest.mark.parametrize("ratios, counts", [  # of 196 tokens, as published (Rao et al. 2021)
    ((0.9, 0.9 ** 2, 0.9 ** 3), (176, 158, 142)), ((0.8, 0.8 ** 2, 0.8 ** 3), (156, 125, 100)),
    ((0.7, 0.49, 0.343), (137, 96, 67)),
    ((0.7, 0.7 - 0.2, 0.7 - 0.4), (137, 97, 58)),  # 0.7 - 0.2 is a little less than 0.5
])
def test_kept_counts_of_196_tokens(ratios, counts):
    model = DynamicViT(28, 2, 4, 3, 1, prune_before=(0, 1, 2), keep_ratios=ratios).eval()
    out = model(pictures(2, size=28))
    assert [k.shape for k in out.kept] == [(2, n) for n in counts] and out.tokens.shape == (2, counts[-1], 4)


@pytest.mark.parametrize("size, patch, ratios", [
    (8, 2, (0.7, 0.49, 0.343)), (12, 2, (1, 0.5, 0.5)), (6, 2, (0.34, 0.23, 0.12)),
    (20, 2, (0.29, 0.29, 0.01))])
def test_kept_counts_are_of_the_original_number_and_the_indices_ascend(size, patch, ratios):
    model = DynamicViT(size, patch, 8, 4, 2, prune_before=(1, 2, 3), keep_ratios=ratios).eval()
    n = (size // patch) ** 2
    stages = model(pictures(3, size=size)).kept
    assert [k.shape[1] for k in stages] == [int(n * r) for r in ratios]
    for s, kept in enumerate(stages):
        assert kept.dtype.kind == "i" and (np.diff(kept, axis=1) > 0).all() and kept.min() >= 0
        assert kept.max() < n
        assert s == 0 or all(set(a) >= set(b) for a, b in zip(stages[s - 1], kept))


def test_inference_keeps_the_highest_scores():
    """Stage 0 against its definition: the patches with the highest log-probability of keep, all of them
    counted in the mean."""
    model = shaken(DynamicViT(**SMALL, **STAGES)).eval()
    scores = model.score_predictor[0](model.blocks[0](model.embed(pictures(3)))[:, 1:]).data[:, :, 0]
    wanted = np.sort(np.argsort(-scores, axis=1)[:, :11], axis=1)
    assert np.array_equal(model(pictures(3)).kept[0], wanted)


# The output, names, weights

@pytest.mark.parametrize("training", [True, False])
def test_the_output_and_its_trace_which_changes_nothing(training):
    model, images = shaken(DynamicViT(**SMALL, **STAGES)).train(training), pictures(3)
    call = dict(noise=gumbel(batch=3)) if training else {}
    out, without = model(images, trace=True, **call), model(images, **call)
    assert type(out) is type(without) is DynamicOutput and without.attention == []
    assert np.array_equal(out.logits.data, without.logits.data)
    assert np.array_equal(out.tokens.data, without.tokens.data)
    for of in (out, without):
        if training:
            assert of.kept == [] and of.tokens.shape == (3, 16, 8)
            assert [d.shape for d in of.decisions] == [(3, 16)] * 2
            assert np.array_equal(of.keep.data, of.decisions[1].data)
        else:
            assert [k.shape for k in of.kept] == [(3, 11), (3, 6)] and of.tokens.shape == (3, 6, 8)
            assert of.decisions == [] and of.keep is None
    if training:
        assert [A.shape for A in out.attention] == [(3, 2, 17, 17)] * 3
        dropped = np.broadcast_to(out.decisions[0].data[:, None, :] == 0, (3, 2, 16))
        # as the class token sees them
        assert dropped.any() and (out.attention[1].data[:, :, 0, 1:][dropped] == 0).all()
    else:
        assert [A.shape for A in out.attention] == [(3, 2, 17, 17), (3, 2, 12, 12), (3, 2, 7, 7)]
    for A in out.attention:
        assert not A.requires_grad
        np.testing.assert_allclose(A.data.sum(axis=-1), 1, rtol=0, atol=1e-12)


def test_a_vits_weights_go_in():
    vit, model = shaken(ViT(**SMALL)), DynamicViT(**SMALL, **STAGES)
    before = model.state_dict()
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    assert missing == [name for name in before if name.startswith("score_predictor.")] and len(missing) == 20
    assert unexpected == []
    assert model.dtype == np.float64 and all(p.dtype == np.float64 for p in model.parameters())
    for name, array in vit.state_dict().items():
        assert np.array_equal(model.state_dict()[name], array)
    for name in missing:
        assert np.array_equal(model.state_dict()[name], before[name])
    missing, unexpected = vit.load_state_dict(model.state_dict(), strict=False)
    assert missing == [] and len(unexpected) == 20


def test_a_vit_and_a_dynamicvit_of_one_seed_start_from_the_same_backbone():
    backbone, model = ViT(**SMALL).state_dict(), DynamicViT(**SMALL, **STAGES).state_dict()
    assert all(np.array_equal(model[name], a) for name, a in backbone.items())


def test_the_configuration_makes_the_same_model_again():
    model = DynamicViT(**SMALL, **STAGES, qkv_bias=False, official=True)
    again = DynamicViT(**dataclasses.asdict(model.config))
    assert again.load_state_dict(model.state_dict()) == ([], [])
    assert np.array_equal(again(pictures(), noise=gumbel()).logits.data,
                          model(pictures(), noise=gumbel()).logits.data)


# What it refuses

@pytest.mark.parametrize("options, text", [
    (dict(keep_ratios=(0.7, 0)), "DynamicViT: keep_ratios (0.7, 0), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(1.1, 0.5)), "DynamicViT: keep_ratios (1.1, 0.5), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(0.7, float("nan"))), "DynamicViT: keep_ratios (0.7, nan), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(0.5, 0.7)),
     "DynamicViT: keep_ratios (0.5, 0.7) rise; they are of the original number of tokens, so they cannot"),
    (dict(keep_ratios=(0.5, 0.05)), "DynamicViT: keep ratio 0.05 of 16 tokens keeps none"),
    (dict(keep_ratios=0.5), "DynamicViT: keep_ratios 0.5, expected one per stage: a tuple or list"),
    (dict(prune_before=1), "DynamicViT: prune_before 1, expected one per stage: a tuple or list"),
    (dict(keep_ratios=(0.5,)), "DynamicViT: 2 places to prune and 1 keep ratios"),
    (dict(prune_before=(), keep_ratios=()), "DynamicViT: 0 places to prune and 0 keep ratios"),
    (dict(prune_before=(1, 3)), "DynamicViT: prune_before (1, 3), expected rising block numbers from 0 to 2"),
    (dict(prune_before=(2, 1)), "DynamicViT: prune_before (2, 1), expected rising block numbers from 0 to 2"),
    (dict(prune_before=(1, 1)), "DynamicViT: prune_before (1, 1), expected rising block numbers from 0 to 2"),
    (dict(prune_before=(-1, 1)),
     "DynamicViT: prune_before (-1, 1), expected rising block numbers from 0 to 2"),
    (dict(dim=10),
     "DynamicViT: dim 10, expected a multiple of 4 (the predictor's last hidden width is dim / 4)"),
    (dict(heads=3), "Attention: heads 3 do not divide dim 8"),
], ids=str)
def test_options_that_make_no_model(options, text):
    with refuses(text):
        DynamicViT(**SMALL | STAGES | options)


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call, text", [
    (dict(keep=[ones(2, 16)]), "DynamicViT: 1 arrays of keep for 2 stages"),
    (dict(noise=[ones(2, 16, 2)] * 3), "DynamicViT: 3 arrays of noise for 2 stages"),
    (dict(keep=[ones(2, 15), ones(2, 16)]), "DynamicViT: keep (2, 15), expected (B, N) = (2, 16)"),
    (dict(keep=[ones(2, 16), ones(2, 17)]), "DynamicViT: keep (2, 17), expected (B, N) = (2, 16)"),
    (dict(keep=[ones(3, 16)] * 2), "DynamicViT: keep (3, 16), expected (B, N) = (2, 16)"),
    (dict(keep=[ones(2, 16, 1)] * 2), "DynamicViT: keep (2, 16, 1), expected (B, N) = (2, 16)"),
], ids=str)
def test_decisions_that_do_not_fit(training, call, text):
    with refuses(text):
        DynamicViT(**SMALL, **STAGES).train(training)(pictures(), **call)


@pytest.mark.parametrize("images, text", [
    (np.zeros((2, 3, 16, 16)), "images: (2, 3, 16, 16), expected (B, 3, 8, 8)"),
    (np.zeros((2, 3, 8, 8), "uint8"),
     "images: dtype uint8, expected float32: normalise them first (tt.data.normalise)"),
], ids=["size", "uint8"])
def test_images_that_do_not_fit(images, text):
    with refuses(text):
        DynamicViT(**SMALL, **STAGES)(images)


def test_noise_of_another_shape():
    with refuses("gumbel_softmax: log_probs (2, 16, 2), noise (2, 15, 2): equal shapes expected"):
        DynamicViT(**SMALL, **STAGES)(pictures(), noise=[ones(2, 15, 2)] * 2)


def test_block_numbers_are_whole():
    with pytest.raises(tt.InputError, match="prune_before .0.5,., expected rising block numbers"):
        DynamicViT(prune_before=(0.5,), keep_ratios=(0.5,))
