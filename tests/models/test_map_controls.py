"""The controls of DynamicConvNeXt: where the slow path goes, and that it costs what DynamicConvNeXt does less
its predictors."""
import numpy as np
import pytest

import tinytoken as tt
from small import same, shaken
from tinytoken.models import DynamicConvNeXt, FastPath, RandomPaths
from tinytoken.tasks import Distil

SIZES = dict(image_size=(16, 24), dims=(8, 12), depths=(3, 1), num_classes=5, patch_size=4, layer_scale=0.5,
             prune_before=(1, 2), keep_ratios=(0.7, 0.25))
N, COUNTS = 24, {RandomPaths: [16, 6], FastPath: [0, 0]}
each = pytest.mark.parametrize("kind", COUNTS)


def pictures(batch=3, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 24))


@each
def test_as_many_positions_in_training_as_at_inference(kind):
    model = shaken(kind(**SIZES))
    kept = model.eval()(pictures()).kept
    assert [k.shape for k in kept] == [(3, n) for n in COUNTS[kind]]
    noise = list(np.random.default_rng(1).gumbel(size=(2, 3, N, 2)))
    decisions = model.train()(pictures(), noise=noise).decisions
    for decision, draw, count in zip(decisions, noise, COUNTS[kind]):
        best = np.argsort(-draw[:, :, 0], axis=1)[:, :count]
        assert np.array_equal(decision.data, (best[:, :, None] == np.arange(N)).any(axis=1))
    drawn = model.eval()(pictures(), noise=noise).kept
    assert all(np.array_equal((k[:, :, None] == np.arange(N)).any(axis=1), d.data)
               for k, d in zip(drawn, decisions))
    # other pictures, other positions; the same, the same
    again, other = model.eval()(pictures()).kept, model(pictures(seed=2)).kept
    assert all(np.array_equal(a, b) for a, b in zip(kept, again))
    assert kind is FastPath or not np.array_equal(kept[0], other[0])
    assert kind is FastPath or not np.array_equal(kept[0][0], kept[0][1])


def test_every_position_is_drawn_as_often():
    tt.manual_seed(0)
    model = RandomPaths(**SIZES).eval()
    kept = model(pictures(1500).astype("float32")).kept
    counts = np.bincount(np.concatenate([k.reshape(-1) for k in kept]), minlength=N)
    wanted = 1500 * 22 / N
    assert abs(counts - wanted).max() < 5 * (wanted * (1 - 11 / N)) ** 0.5


@each
def test_forced_decisions_are_dynamicconvnexts(kind):
    model, other = shaken(kind(**SIZES)), DynamicConvNeXt(**SIZES).astype("float64")
    other.load_state_dict(model.state_dict(), strict=False)
    keep = [np.random.default_rng(s).permuted(np.tile(np.arange(N) < 9, (3, 1)), axis=1) for s in (0, 1)]
    for training in (True, False):
        ours, theirs = (m.train(training)(pictures(), keep=keep) for m in (model, other))
        same(ours.logits.data, theirs.logits.data)
    images = np.zeros((1, 3, 16, 24), "float32")
    counts = [np.arange(N)[None] < n for n in COUNTS[kind]]
    cost, forced = tt.macs(model, images).total, tt.macs(other, images, keep=counts).total
    assert cost == forced and tt.macs(other, images).total > tt.macs(model, images).total


@each
def test_they_are_trained(kind):
    model = kind(**SIZES)
    task = Distil(model.train(), tt.models.ConvNeXt(**{n: v for n, v in SIZES.items() if n not in (
        "prune_before", "keep_ratios")}), weights=(1, 0, 0.5, 0.5))
    assert "score_predictor" not in " ".join(model.state_dict())
    loss, parts = task(pictures().astype("float32"), np.array([0, 4, 2]), **task.noise(3, 0, 0))
    loss.backward()
    kl, token = parts["kl"].item(), parts["token"].item()
    assert loss.item() == pytest.approx(parts["class"].item() + 0.5 * (kl + token), rel=1e-5)
    slow, fast = (abs(dict(model.named_parameters())[f"stages.0.blocks.2.{n}"].grad).max()
                  for n in ("mlp.fc2.weight", "fast_path.1.weight"))
    assert fast > 0 and (slow > 0) == (kind is RandomPaths)
