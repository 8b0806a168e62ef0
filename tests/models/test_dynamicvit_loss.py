"""DynamicViT's four losses: their formulas by loops, gradients, images that lose every token, slices of a
batch."""
import itertools

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, STAGES, gumbel, masks, pictures, refuses, same, shaken, softmax, teacher
from tinytoken.checking import gradcheck
from tinytoken.models import DynamicOutput, DynamicViT, dynamicvit_loss
from tinytoken.models.pruning import RATIO_NORMS, TOKEN_LOSSES, TOKEN_NORMS

FORMS = list(itertools.product(TOKEN_NORMS, RATIO_NORMS, TOKEN_LOSSES))

def outputs_of(decisions):
    """A DynamicOutput of three images made by hand, its tensors leaves that ask for gradients."""
    logits, tokens = teacher(3, seed=2)
    leaf = lambda array: tt.Tensor(np.asarray(array, float), requires_grad=True)
    decisions = [leaf(d) for d in decisions]
    return DynamicOutput(leaf(logits), leaf(tokens), decisions=decisions, keep=decisions[-1].detach())


@pytest.mark.parametrize("token_norm, ratio_norm, token_loss", FORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_losses_by_their_formulas(token_norm, ratio_norm, token_loss, smoothing):
    first = np.random.default_rng(0).random((3, 16)) < [[0.9], [0.6], [0.4]]
    last = first & (np.random.default_rng(1).random((3, 16)) < 0.6)
    assert len({*last.sum(axis=1)}) > 1  # pooled and per image differ
    out, targets, (z, f), ratios = outputs_of([first, last]), np.array([1, 4, 0]), teacher(3), (0.7, 0.4)
    loss, parts = dynamicvit_loss(out, targets, z, f, ratios, weights=(1.5, 3, 0.25, 0.75),
                                  token_norm=token_norm, ratio_norm=ratio_norm, token_loss=token_loss,
                                  smoothing=smoothing)
    log_q, p = np.log(softmax(out.logits.data)), softmax(z)
    wanted = np.full((3, 5), smoothing / 5) + (1 - smoothing) * np.eye(5)[targets]
    by_channels, wanted_channels = softmax(out.tokens.data), softmax(f)
    errors = {"mse": ((out.tokens.data - f) ** 2).mean(axis=2),
              "kl": (wanted_channels * np.log(wanted_channels / by_channels)).sum(axis=2)}[token_loss]
    by_image = [errors[b][last[b]].mean() for b in range(3)]
    expected = {
        "class": -np.mean([wanted[b] @ log_q[b] for b in range(3)]),
        "ratio": sum(np.mean([(d[b].mean() - r) ** 2 for b in range(3)]) if ratio_norm == "image"
                     else (d.mean() - r) ** 2 for d, r in zip((first, last), ratios)),
        "kl": np.mean([sum(p[b, k] * (np.log(p[b, k]) - log_q[b, k]) for k in range(5)) for b in range(3)]),
        "token": np.mean(by_image) if token_norm == "image" else errors[last].mean(),
    }
    for name, wanted_part in expected.items():
        assert parts[name].item() == pytest.approx(wanted_part, rel=1e-12), name
    weights = {"class": 1.5, "ratio": 3 / 2, "kl": 0.25, "token": 0.75}
    total = sum(weight * expected[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_default_weights_are_the_papers():
    out, targets, (z, f) = outputs_of(masks((9, 4))), np.array([1, 4, 0]), teacher(3)
    loss, parts = dynamicvit_loss(out, targets, z, f, (0.7, 0.4))
    of = {name: part.item() for name, part in parts.items()}
    total = of["class"] + 2 * of["ratio"] / 2 + 0.5 * of["kl"] + 0.5 * of["token"]
    assert loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("token_norm, ratio_norm, token_loss", FORMS)
def test_gradients_of_the_losses(token_norm, ratio_norm, token_loss):
    out, (z, f) = outputs_of(masks((9, 4))), teacher(3)

    def parts(*leaves):
        return tuple(dynamicvit_loss(out, np.array([1, 4, 0]), z, f, (0.7, 0.4), token_norm=token_norm,
                                     ratio_norm=ratio_norm, token_loss=token_loss)[1].values())
    gradcheck(parts, out.logits, out.tokens, *out.decisions, max_elements=80)


@pytest.mark.parametrize("token_norm", ["pooled", "image"])
@pytest.mark.parametrize("lost", ["all", "one image"])
def test_without_kept_tokens_the_token_loss_is_zero_and_finite(token_norm, lost):
    last = np.zeros((3, 16))
    if lost == "one image":
        last[1:, :4] = 1
    out, (z, f) = outputs_of([np.ones((3, 16)), last]), teacher(3)
    loss, parts = dynamicvit_loss(out, np.array([1, 4, 0]), z, f, (0.7, 0.4), token_norm=token_norm)
    squares = ((out.tokens.data - f) ** 2).mean(axis=2)[1:, :4]
    images = 3 if token_norm == "image" else 2  # an image without tokens counts as 0 in the mean over images
    assert parts["token"].item() == (0 if lost == "all"
                                     else pytest.approx(squares.mean(axis=1).sum() / images, rel=1e-12))
    loss.backward()
    assert np.isfinite(out.tokens.grad).all() and (out.tokens.grad[last == 0] == 0).all()
    assert lost == "all" or (out.tokens.grad[last == 1] != 0).all()


def test_per_image_the_loss_of_a_batch_is_the_mean_over_its_slices():
    """Why "image" exists: slices of a cut batch, weighted by their share, give the batch's loss and gradient.
    """
    model = shaken(DynamicViT(**SMALL | dict(depth=3), **STAGES))
    images, noise = pictures(5), gumbel(batch=5, seed=1)
    targets, (z, f) = np.array([0, 3, 1, 4, 2]), teacher(5)
    ends = [p for name, p in model.named_parameters() if name.startswith(("norm", "head", "score_predictor"))]

    def run(part, norms):
        out = model(images[part], noise=[n[part] for n in noise])
        assert len({*out.keep.data.sum(axis=1)}) > 1
        loss, _ = dynamicvit_loss(out, targets[part], z[part], f[part], (0.7, 0.4), **norms)
        return loss.item(), tt.grad(loss, ends)
    gaps = {}
    for token_norm, ratio_norm in (("image", "image"), ("pooled", "image"), ("image", "pooled")):
        norms = dict(token_norm=token_norm, ratio_norm=ratio_norm)
        (whole, whole_gradients), *slices = (run(slice(*cut), norms) for cut in ((0, 5), (0, 2), (2, 5)))
        mean = 0.4 * slices[0][0] + 0.6 * slices[1][0]
        gaps[token_norm, ratio_norm] = abs(mean - whole)
        if token_norm == ratio_norm:
            for g, a, b in zip(whole_gradients, slices[0][1], slices[1][1]):
                same(0.4 * a + 0.6 * b, g)
    assert gaps.pop(("image", "image")) < 1e-12 and min(gaps.values()) > 1e-4


@pytest.mark.parametrize("change, text", [
    (dict(targets=np.array([0, 5, 1])), "cross_entropy: labels from 0 to 5, expected 0 to 4"),
    (dict(keep_ratios=(0.7,)), "dynamicvit_loss: 1 keep ratios for 2 stages"),
    (dict(token_norm="batch"), "dynamicvit_loss: token_norm 'batch', expected pooled or image"),
    (dict(ratio_norm="batch"), "dynamicvit_loss: ratio_norm 'batch', expected image or pooled"),
    (dict(token_loss="mae"), "dynamicvit_loss: token_loss 'mae', expected mse or kl"),
    (dict(weights=(1, 2)), "dynamicvit_loss: 2 weights, expected 4: class, ratio, kl, token"),
    (dict(teacher_logits=np.ones((3, 4))),
     "kl_divergence: logits (3, 5), teacher_logits (3, 4): two of one shape (B, K) expected"),
    (dict(teacher_tokens=np.ones((3, 15, 8))), "mse: x (3, 16, 8), target (3, 15, 8): equal shapes expected"),
], ids=str)
def test_losses_that_do_not_fit(change, text):
    z, f = teacher(3)
    given = dict(targets=np.array([0, 1, 2]), teacher_logits=z, teacher_tokens=f, keep_ratios=(0.7, 0.4))
    with refuses(text):
        dynamicvit_loss(outputs_of(masks((9, 4))), **given | change)
