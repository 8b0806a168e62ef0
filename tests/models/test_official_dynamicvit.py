"""DynamicViT against the official code: values, decisions, losses and gradients of one run
(fixtures/make_reference.py)."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from small import same
from tinytoken.backend import to_numpy
from tinytoken.models import DynamicViT, dynamicvit_loss


@pytest.fixture(scope="module")
def official():
    with np.load(Path(__file__).parents[1] / "fixtures" / "official_dynamicvit.npz") as file:
        return dict(file)


def under(arrays, prefix):
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


@pytest.fixture
def loaded(official, xp):
    """(model, images, noise, loss settings) as the official run had them."""
    config = {name: a.tolist() for name, a in under(official, "config/").items()}
    weights = config.pop("loss_weights")
    model = DynamicViT(**config, official=True)
    assert model.load_state_dict(under(official, "weights/")) == ([], [])
    noise = [xp.asarray(official[f"noise/{s}"]) for s in range(3)]
    model.to("cpu" if xp is np else "cuda")
    return model, xp.asarray(official["images"]), noise, dict(keep_ratios=config["keep_ratios"],
                                                              weights=weights)


def test_official_training_pass_and_losses(official, loaded, xp):
    model, images, noise, settings = loaded
    out = model.train()(images, noise=noise)
    same(out.logits.numpy(), official["train/logits"])
    same(out.tokens.numpy(), official["train/tokens"])
    for s in range(3):
        assert np.array_equal(out.decisions[s].numpy(), official[f"train/decisions/{s}"])
    assert np.array_equal(out.keep.numpy(), official["train/decisions/2"]) and not out.keep.requires_grad
    given = [xp.asarray(official[name]) for name in ("targets", "teacher_logits", "teacher_tokens")]
    loss, parts = dynamicvit_loss(out, *given, **settings)
    assert tuple(parts) == ("class", "ratio", "kl", "token")
    for name, part in [*parts.items(), ("total", loss)]:
        assert part.item() == pytest.approx(official[f"losses/{name}"].item(), rel=1e-12), name
    loss.backward()
    gradients = under(official, "gradients/")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    # the gradient of k's bias is nothing else
    rounding = 1e-14 * max(np.abs(g).max() for g in gradients.values())
    for name, p in model.named_parameters():
        allowed = 1e-9 * np.abs(gradients[name]).max() + rounding
        np.testing.assert_allclose(to_numpy(p.grad), gradients[name], rtol=0, atol=allowed, err_msg=name)


def test_official_inference(official, loaded):
    model, images, _, _ = loaded
    out = model.eval()(images)
    same(out.logits.numpy(), official["eval/logits"])
    assert len(out.kept) == 3
    for s, kept in enumerate(out.kept):
        assert np.array_equal(to_numpy(kept), official[f"eval/kept/{s}"])


def test_the_official_form_is_another_function_than_the_exact_one(official, loaded):
    model, images, noise, _ = loaded
    exact = DynamicViT(**dataclasses.asdict(model.config) | dict(official=False))
    exact.load_state_dict(under(official, "weights/"))
    logits = exact(to_numpy(images), noise=[to_numpy(n) for n in noise]).logits
    assert 1e-9 < np.abs(logits.data - official["train/logits"]).max() < 1e-2  # eps is 1e-6
