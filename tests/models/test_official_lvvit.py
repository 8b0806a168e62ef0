"""LV-ViT and its dynamic form against the official code: values, decisions, losses, gradients and running
statistics of one run (fixtures/make_reference.py)."""
import numpy as np
import pytest

from small import reference, same
from tinytoken import models
from tinytoken.backend import to_numpy


@pytest.fixture(scope="module")
def official():
    return reference("official_lvvit.npz")


def under(arrays, prefix):
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def loaded(official, form, xp):
    """(model, images) with the weights of the official run."""
    config = {name: a.tolist() for name, a in under(official, "config/").items() if name != "loss_weights"}
    weights = under(official, "weights/")
    if form == "plain":
        del config["prune_before"], config["keep_ratios"]
        weights = {name: a for name, a in weights.items() if not name.startswith("score_predictor")}
        model = models.LVViT(**config)
    else:
        model = models.DynamicLVViT(**config, official=True)
    assert model.load_state_dict(weights) == ([], [])
    return model.to("cpu" if xp is np else "cuda"), xp.asarray(official["images"])


def same_gradients_and_statistics(model, official, form):
    gradients = under(official, f"{form}/gradients/")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    rounding = 1e-14 * max(np.abs(g).max() for g in gradients.values())
    for name, p in model.named_parameters():
        allowed = 1e-9 * np.abs(gradients[name]).max() + rounding
        np.testing.assert_allclose(to_numpy(p.grad), gradients[name], rtol=0, atol=allowed, err_msg=name)
    for name, buffer in model.named_buffers():
        same(to_numpy(buffer.data), official[f"{form}/running/{name}"])


def test_training_pass_with_token_labels(official, xp):
    model, images = loaded(official, "plain", xp)
    out = model.train()(images)
    same(out.logits.numpy(), official["plain/train/logits"])
    same(out.class_logits.numpy(), official["plain/train/logits"])
    same(out.token_logits.numpy(), official["plain/train/tokens"])
    loss, parts = model.loss(out, xp.asarray(official["token_labels"]))
    assert loss.item() == pytest.approx(official["plain/losses/total"].item(), rel=1e-12)
    assert list(parts) == ["class", "token_label"]
    loss.backward()
    same_gradients_and_statistics(model, official, "plain")


def test_training_pass_and_losses_of_the_dynamic_form(official, xp):
    model, images = loaded(official, "dynamic", xp)
    out = model.train()(images, noise=[xp.asarray(official[f"noise/{s}"]) for s in range(3)])
    same(out.logits.numpy(), official["dynamic/train/logits"])
    same(out.token_logits.numpy(), official["dynamic/train/tokens"])
    for s in range(3):
        assert np.array_equal(out.decisions[s].numpy(), official[f"dynamic/train/decisions/{s}"])
    given = {name: xp.asarray(official[name]) for name in ("targets", "teacher_logits", "teacher_tokens")}
    teacher = models.lvvit.LVOutput(None, class_logits=given["teacher_logits"],
                                    token_logits=given["teacher_tokens"])
    loss, parts = model.loss(out, given["targets"], teacher, token_norm="pooled")
    assert tuple(parts) == ("class", "ratio", "kl", "token")
    for name, part in [*parts.items(), ("total", loss)]:
        assert part.item() == pytest.approx(official[f"dynamic/losses/{name}"].item(), rel=1e-12), name
    loss.backward()
    same_gradients_and_statistics(model, official, "dynamic")


@pytest.mark.parametrize("form", ["plain", "dynamic"])
def test_inference(form, official, xp):
    model, images = loaded(official, form, xp)
    out = model.eval()(images)
    same(out.class_logits.numpy(), official[f"{form}/eval/class"])
    same(out.logits.numpy(), official[f"{form}/eval/answer"])
    assert np.abs(official[f"{form}/eval/class"] - official[f"{form}/eval/answer"]).min() > 1e-3
    for s, kept in enumerate(getattr(out, "kept", [])):
        assert np.array_equal(to_numpy(kept), official[f"dynamic/eval/kept/{s}"])
