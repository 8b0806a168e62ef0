"""DynamicViT's controls: each against its rule, equal counts, gathering equals masking, gradients, training
with Distil."""
import dataclasses

import numpy as np
import pytest

import small
import tiny
import tinytoken as tt
from small import STAGES, gumbel, pictures, refuses, same, shaken, teacher
from tinytoken.checking import gradcheck
from tinytoken.models import DynamicOutput, DynamicViT, ViT, dynamicvit_loss
from tinytoken.models.dynamicvit import DynamicTokens
from tinytoken.models.controls import (CONTROLS, CentreTokens, ClassAttention, LearnedTokens, PooledTokens,
                                       RandomTokens, means_of_parts, morton_order)
from tinytoken.train import Distil

SMALL = small.SMALL | dict(depth=3)
COUNTS = [11, 6]
each_control = pytest.mark.parametrize("kind", CONTROLS.values(), ids=CONTROLS)
each_choice = pytest.mark.parametrize("kind", [RandomTokens, ClassAttention, CentreTokens])


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


@each_control
def test_what_comes_out(kind):
    model, images = shaken(kind(**SMALL, **STAGES)), pictures(3)
    gathered = model.eval()(images, trace=True)
    assert model.counts == COUNTS and gathered.logits.shape == (3, 5)
    assert np.array_equal(model(images).logits.data, gathered.logits.data)
    assert [A.shape[2:] for A in gathered.attention] == [(17, 17), (12, 12), (7, 7)]
    assert gathered.tokens.shape == (3, 6, 8)
    assert gathered.decisions == [] and gathered.keep is None
    out = model.train()(images, noise=gumbel(batch=3))
    assert type(out) is type(gathered) is DynamicOutput and out.logits.shape == (3, 5)
    assert out.tokens.shape == (3, 16, 8)
    assert [d.shape for d in out.decisions] == [(3, 16)] * 2 and out.keep.shape == (3, 16)
    if kind is not LearnedTokens:  # exact counts in training, too
        same(np.array([d.data.mean(axis=1) for d in out.decisions]),
             np.repeat(np.array(COUNTS)[:, None] / 16, 3, axis=1))
    if kind is not PooledTokens:
        assert [kept.shape for kept in gathered.kept] == [(3, 11), (3, 6)]
        assert all(set(later) <= set(kept) for kept, later in zip(*gathered.kept))


@each_control
def test_macs_are_those_of_dynamicvit_without_its_predictors(kind):
    dynamic, control = (k(**SMALL, **STAGES) for k in (DynamicViT, kind))
    inside = tt.macs(dynamic, pictures().astype("float32")).by_module
    predictors = sum(n for name, n in inside.items() if name.startswith("score_predictor"))
    pooling = (16 * 11 + 11 * 6) * 8 if kind is PooledTokens else 0
    assert tt.macs(control, pictures().astype("float32")).total == sum(inside.values()) - predictors + pooling


@each_control
def test_a_vits_weights_go_in_and_the_configuration_makes_the_same_again(kind):
    vit, model = shaken(ViT(**SMALL)), kind(**SMALL, **STAGES)
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    assert unexpected == []
    assert missing == ([f"score_predictor.{s}.scores" for s in (0, 1)] if kind is LearnedTokens else [])
    again = kind(**dataclasses.asdict(model.config))
    again.load_state_dict(model.state_dict())
    assert np.array_equal(again.eval()(pictures()).logits.data, model.eval()(pictures()).logits.data)


# Against DynamicViT with the same tokens

@each_choice
def test_gathering_in_training_is_masking(kind):
    """The logits, the kept tokens, the loss, and the gradient of every weight are those of DynamicViT's
    masks."""
    control, masked = shaken(kind(**SMALL, **STAGES)), DynamicViT(**SMALL, **STAGES)
    masked.load_state_dict(control.state_dict(), strict=False)
    images, targets, (z, f) = pictures(3), np.array([1, 4, 0]), teacher(3)
    ours = control.train()(images, noise=gumbel(batch=3))
    theirs = masked.train()(images, keep=[d.data for d in ours.decisions])
    same(ours.logits.data, theirs.logits.data)
    same(ours.tokens.data, theirs.tokens.data * ours.keep.data[:, :, None])
    gradients = []
    for model, out in ((control, ours), (masked, theirs)):
        loss, _ = dynamicvit_loss(out, targets, z, f, (0.7, 0.4), weights=(1, 0, 0.5, 0.5),
                                  token_norm="image")
        wrt = [p for name, p in model.named_parameters() if not name.startswith("score_predictor")]
        gradients.append((loss.item(), tt.grad(loss, wrt)))
    (a, ours), (b, theirs) = gradients
    same(a, b)
    for g, h in zip(ours, theirs):
        same(g, h)
    assert all(np.abs(g).max() > 0 for g in ours)


@each_control
def test_gradients_of_the_whole_model(kind):
    model, images, noise = shaken(kind(**SMALL, **STAGES)), pictures(), gumbel()
    more = dict(hard=False) if kind is LearnedTokens else {}

    def outputs(*parameters):
        out = model(images, noise=noise, **more)
        return out.logits, out.tokens, *([d for d in out.decisions] if more else [])
    gradcheck(outputs, *model.parameters(), max_elements=80)


@each_choice
def test_training_and_inference_choose_alike(kind):
    model, images = shaken(kind(**SMALL, **STAGES)), pictures(3)
    same(model.train()(images).logits.data, model.eval()(images).logits.data)


# Each rule

def test_random_tokens_are_spread_evenly_and_the_same_twice():
    model, images = shaken(RandomTokens(**SMALL, **STAGES)).eval(), pictures(400)
    first, second = (model(images).kept for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(model(images[::-1].copy()).kept[0], first[0])  # another batch, another draw
    for kept, count in zip(first, COUNTS):
        often, share = np.bincount(kept.reshape(-1), minlength=16) / 400, count / 16
        assert np.abs(often - share).max() < 5 * (share * (1 - share) / 400) ** 0.5
    noise = gumbel(batch=3)
    decisions = model.train()(pictures(3), noise=noise).decisions
    assert np.array_equal(decisions[0].data, [draws >= np.sort(draws)[-11] for draws in noise[0][:, :, 0]])


def test_class_attention_keeps_the_highest():
    model, images = shaken(ClassAttention(**SMALL, **STAGES)), pictures(3)
    out = model.eval()(images, trace=True)
    for stage, (kept, count) in enumerate(zip(out.kept, COUNTS)):  # the stages stand before blocks 1 and 2
        before = out.kept[stage - 1] if stage else np.tile(np.arange(16), (3, 1))
        to_patches = out.attention[stage].data.mean(axis=1)[:, 0, 1:]
        assert all(set(before[b][np.argsort(to_patches[b])[-count:]]) == set(kept[b]) for b in range(3))
    with refuses("ClassAttention: prune_before 0: there is no block before it that attends"):
        ClassAttention(**SMALL, prune_before=(0,), keep_ratios=(0.5,))


def test_centre_tokens_by_hand():
    model = CentreTokens(**SMALL, prune_before=(1, 2), keep_ratios=(0.75, 0.25))
    kept = model.eval()(pictures(2).astype("float32")).kept
    for b in range(2):
        assert kept[0][b].tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]  # all but the corners of 4 x 4
        assert kept[1][b].tolist() == [5, 6, 9, 10]


def test_learned_tokens_keep_the_highest_of_those_left():
    model = shaken(LearnedTokens(**SMALL, **STAGES))
    first, second = ((p.scores.data[:, 0] - p.scores.data[:, 1]) for p in model.score_predictor)
    kept = model.eval()(pictures(2)).kept
    left = np.argsort(first)[-11:]
    last = left[np.argsort(second[left])[-6:]]
    for b in range(2):
        assert kept[0][b].tolist() == sorted(left) and kept[1][b].tolist() == sorted(last)


def test_learned_tokens_start_at_the_ratios_and_decide_as_dynamicvit_does():
    model = LearnedTokens(**SMALL, **STAGES)
    out = model(pictures(500).astype("float32"))
    for decision, ratio in zip(out.decisions, STAGES["keep_ratios"]):
        assert abs(decision.data.mean() - ratio) < 5 * (ratio * (1 - ratio) / 8000) ** 0.5
        assert set(np.unique(decision.data)) == {0, 1}


def test_pools_are_means():
    same(means_of_parts(5, 2), [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
    for n, k in ((64, 44), (44, 31), (31, 21), (16, 16), (7, 1)):
        same(means_of_parts(n, k).sum(axis=1), np.ones(k))
        same(means_of_parts(n, k).sum(axis=0), np.full(n, k / n))
    assert morton_order(2, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    model = shaken(PooledTokens(**SMALL, prune_before=(0,), keep_ratios=(0.25,)))
    x = np.random.default_rng(0).standard_normal((3, 17, 8))
    tokens = DynamicTokens(tt.Tensor(x), extra=1)
    model.reduce(0, tokens)
    # 4 x 4 patches, in squares of 2 x 2
    squares = x[:, 1:].reshape(3, 2, 2, 2, 2, 8).mean(axis=(2, 4)).reshape(3, 4, 8)
    same(tokens.x.data, np.concatenate([x[:, :1], squares], axis=1))
    out = model.train()(pictures(3))
    # each position shows its square's token
    for i, part in enumerate([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]):
        first = [0, 2, 8, 10][part]
        same(out.tokens.data[:, i], out.tokens.data[:, first])


# Training

@each_control
def test_training_with_the_teachers_losses(kind):
    def make():
        tt.manual_seed(3)
        sizes = tiny.SIZES | dict(depth=2)
        model = kind(**sizes, prune_before=(1,), keep_ratios=(0.5,))
        weights = (1, 2, 0.5, 0.5) if kind is LearnedTokens else (1, 0, 0.5, 0.5)
        return model, Distil(model, ViT(**sizes), weights=weights)
    model, first = tiny.train(make)
    again, second = tiny.train(make, threads=1)
    assert first["class"] < 1.1 and first.keys() == {"seconds", "loss", "class", "ratio", "kl", "token"}
    # noise and counts are the picture's, not the slice's
    assert abs(first["loss"] - second["loss"]) < 1e-3 * first["loss"]
    assert kind is LearnedTokens or first["ratio"] == 0
    assert kind is not LearnedTokens or np.ptp(model.score_predictor[0].scores.data[:, 0]) > 0.01
