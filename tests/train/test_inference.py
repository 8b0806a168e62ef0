"""Inference: the forward pass in parts, on all threads, and the size of a part."""
import numpy as np
import pytest

import tinytoken as tt
from tiny import SIZES, dynamicvit, lookupvit, vit
from tinytoken import backend, ops
from tinytoken.models import ViT
from tinytoken.train import infer, inference, slice_size


@pytest.mark.parametrize("images, threads, macs, size", [
    (64, 2, 0, 32), (64, 2, 4.8e7, 32), (64, 2, 1.83e8, 8), (64, 1, 1.83e8, 8), (7, 1, 3e9, 1),
    (7, 1, 6e8, 3),
    (200, 2, 1e8, 16), (1, 2, 1e12, 1)])
def test_slices_are_halved_as_long_as_half_has_enough_to_do(images, threads, macs, size):
    assert slice_size(images, threads, macs) == size


def test_inference_too_shares_its_images_among_the_threads():
    model, seen = vit()[0], []
    for size, threads in ((7, 2), (1, 2), (70, 1)):
        infer(model, np.zeros((size, 3, 8, 8), "float32"), lambda images: seen.append(len(images)) or images,
              threads=threads)
    assert sorted(seen) == sorted([4, 3, 1, 32, 32, 6])


def test_infer_is_the_forward_pass_in_parts(xp):
    model = ViT(**SIZES).to("cpu" if xp is np else "cuda").train()
    images = xp.asarray(np.random.default_rng(0).standard_normal((11, 3, 8, 8)).astype("float32"))
    logits = infer(model, images, batch_size=4, threads=2)
    assert isinstance(logits, np.ndarray) and model.training  # the mode is as it was
    expected = model.eval()(images).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert infer(model, images, lambda x: x * 0, batch_size=3).shape == (11, 3) and not model.training
    with pytest.raises(tt.InputError):
        infer(model.train(), images[:, :2])
    assert model.training


def test_infer_passes_the_call_on_and_makes_no_graph():
    model, _ = lookupvit()
    images, seen = np.zeros((5, 3, 8, 8), "float32"), []
    prepare = lambda x: seen.append(ops.exp(model.pos_embed).requires_grad) or x
    logits = infer(model, images, prepare, threads=1, mean_of_heads=True)
    assert seen == [False]
    np.testing.assert_array_equal(logits, model.eval()(images, mean_of_heads=True).logits.numpy())


def test_infer_cuts_what_stands_beside_the_images_as_it_cuts_them():
    class Shifted(ViT):
        def forward(self, images, shift, times=1):
            return super().forward(images + times * shift[:, None, None, None])

    model, shift = Shifted(**SIZES).eval(), np.arange(5, dtype="float32")
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype("float32")
    logits = infer(model, images, batch_size=2, threads=1, beside={"shift": shift}, times=2)
    np.testing.assert_allclose(logits, model(images, shift, times=2).logits.numpy(), rtol=1e-5, atol=1e-6)


def test_infer_reads_what_it_is_asked_for():
    model = dynamicvit()[0].eval()
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype("float32")
    tokens = infer(model, images, batch_size=2, threads=1, read=lambda out: out.tokens)
    assert tokens.shape == (5, 2, 8)
    np.testing.assert_allclose(tokens, model(images).tokens.data, rtol=1e-5, atol=1e-6)
    peaks = infer(model, images, batch_size=5, trace=True, read=lambda out: out.attention[0].max(axis=3))
    np.testing.assert_array_equal(peaks, model(images, trace=True).attention[0].data.max(axis=3))


def test_an_implementation_may_repeat_what_many_slices_run(monkeypatch):
    """It is asked once for a pass of five slices or more, and gets every slice but no say in what is
    prepared."""
    model, images, taken = vit()[0].eval(), np.zeros((5, 3, 8, 8), "float32"), []
    monkeypatch.setattr(backend, "implementations", {})

    @backend.implementation(inference.repeated, "numpy",
                            covers=lambda function, xp, what: xp is np and what == "a forward pass")
    def counted(function, xp, what):
        taken.append([])
        return lambda arrays: taken[-1].append([array.shape for array in arrays]) or function(arrays)
    expected = model(images).logits.data
    np.testing.assert_allclose(infer(model, images, batch_size=1, threads=1), expected, rtol=1e-5, atol=1e-6)
    assert taken == [[[(1, 3, 8, 8)]] * 5]
    infer(model, images, batch_size=2)  # three slices
    with tt.plain():
        infer(model, images, batch_size=1)
    assert len(taken) == 1
