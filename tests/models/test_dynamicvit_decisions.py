"""DynamicViT's decisions: exactly zero or one, from scores and Gumbel noise, and where their gradients go."""
import numpy as np
import pytest

import small
import tinytoken as tt
from small import STAGES, gumbel, masks, pictures, refuses, same, shaken
from tinytoken.models import DynamicViT

SMALL = small.SMALL | dict(depth=3)


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def test_decisions_are_exactly_zero_or_one_and_nested():
    model = DynamicViT(**SMALL, prune_before=(0, 1, 2), keep_ratios=(0.9, 0.8, 0.7)).train()
    out = model(pictures(8), noise=gumbel(3, batch=8))
    decisions = [d.data for d in out.decisions]
    for s, d in enumerate(decisions):
        assert d.shape == (8, 16) and d.dtype == np.float32 and set(np.unique(d)) == {0, 1}
        assert s == 0 or (d <= decisions[s - 1]).all()
    assert decisions[2].sum() < decisions[1].sum() < decisions[0].sum()
    assert np.array_equal(out.keep.data, decisions[2]) and not out.keep.requires_grad
    assert out.decisions[2].requires_grad


def test_noise_of_the_caller_decides():
    """Column 0 is keep, and draws are added to the log-probabilities: a large one settles the matter."""
    model = DynamicViT(**SMALL, **STAGES).train()
    wanted = [m.astype(float) for m in masks((9, 4), batch=2)]
    noise = [np.stack([1e3 * m, 1e3 * (1 - m)], axis=-1) for m in wanted]
    out = model(pictures(), noise=noise)
    assert np.array_equal(out.decisions[0].data, wanted[0])
    assert np.array_equal(out.decisions[1].data, wanted[0] * wanted[1])
    forced = model(pictures(), keep=wanted)
    assert np.array_equal(out.logits.data, forced.logits.data)
    assert np.array_equal(out.tokens.data, forced.tokens.data)


def test_soft_decisions_are_the_softmax_of_log_probabilities_and_noise():
    model, noise = shaken(DynamicViT(**SMALL, **STAGES)), gumbel()
    out = model(pictures(), noise=noise, hard=False)
    patches = model.blocks[0](model.embed(pictures()))[:, 1:]
    scores = model.score_predictor[0](patches, np.ones((2, 16))).data + noise[0]
    first = 1 / (1 + np.exp(scores[:, :, 1] - scores[:, :, 0]))
    same(out.decisions[0].data, first)
    assert ((0 < first) & (first < 1)).all() and (out.decisions[1].data < out.decisions[0].data).all()


def test_noise_is_drawn_anew_and_again_after_the_seed():
    model = DynamicViT(**SMALL, **STAGES).train()
    tt.manual_seed(5)
    first, second = (np.stack([d.data for d in model(pictures(8)).decisions]) for _ in range(2))
    assert not np.array_equal(first, second)
    tt.manual_seed(5)
    again = np.stack([d.data for d in model(pictures(8)).decisions])
    assert np.array_equal(first, again)
    tt.manual_seed(6)
    assert not np.array_equal(first, np.stack([d.data for d in model(pictures(8)).decisions]))


def test_untrained_predictors_keep_what_the_ratios_ask():
    model = DynamicViT(**SMALL, prune_before=(0, 1, 2), keep_ratios=(0.8, 0.8, 0.3)).train()
    for predictor in model.score_predictor:
        predictor.out_conv[-1].weight.data[...] = 0  # what is left is the bias
    shares = [d.data.mean() for d in model(pictures(256), noise=gumbel(3, batch=256)).decisions]
    # 0.99: never sure of a token
    assert shares == pytest.approx([0.8, 0.8 * 0.99, 0.8 * 0.99 * 0.375], abs=0.03)


def test_inference_draws_nothing():
    model = DynamicViT(**SMALL, **STAGES).eval()
    assert np.array_equal(model(pictures()).logits.data, model(pictures()).logits.data)
    for training_only in (dict(noise=gumbel(2)), dict(hard=False)):
        with refuses("DynamicViT: noise, paths or hard=False in eval mode, where the best scores are kept "
                     "and nothing is drawn: call .train() first"):
            model(pictures(), **training_only)


def test_the_predictor_averages_over_kept_tokens_only():
    predictor = shaken(DynamicViT(**SMALL, **STAGES)).score_predictor[0]
    x = np.random.default_rng(0).standard_normal((2, 6, 8))
    keep = np.array([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]])
    masked, kept = predictor(x, keep).data, keep.astype(bool)
    gathered = predictor(x[kept].reshape(2, 3, 8)).data
    same(masked[kept].reshape(2, 3, 2), gathered)
    np.testing.assert_allclose(np.exp(masked).sum(axis=-1), 1, rtol=0, atol=1e-12)
    assert np.isfinite(predictor(x, np.zeros((2, 6))).data).all()


def test_later_stages_send_gradient_into_earlier_decisions():
    """The keep mask enters the predictor undetached: through its mean, and through the product of
    decisions."""
    model = shaken(DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4)))
    out = model(pictures(), noise=gumbel(), hard=False)
    patches = model.embed(pictures())[:, 1:]
    mean_only = model.score_predictor[1](patches, out.decisions[0])[:, :, 0].sum()
    first = list(model.score_predictor[0].parameters())
    assert any(np.abs(g).max() > 1e-6 for g in tt.grad(mean_only, first))
