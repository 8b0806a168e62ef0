"""Whole training steps with the kernels in place against the plain ops: losses, gradients, launches."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.backend import module_for, to_device, to_numpy
from tinytoken.cuda import gemm, launcher, registered
from tinytoken.cuda.weights import Weights
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.models.lookupvit import PAPER
from tinytoken.train import Classify, Distil, loss_and_grads

SIZES = dict(image_size=16, patch_size=4, dim=8, depth=2, heads=2, num_classes=3)
STEPS = {
    "vit": lambda: Classify(ViT(**SIZES), smoothing=0.1),
    "lookupvit": lambda: Classify(LookupViT(**SIZES, compressed=(2, 2), **PAPER)),
    "lookupvit, resoftmax": lambda: Classify(LookupViT(**SIZES, compressed=(2, 2))),
    "dynamicvit": lambda: Distil(DynamicViT(**SIZES, prune_before=(1,), keep_ratios=(0.5,)), ViT(**SIZES))}


def step(name, steps=STEPS):
    """A step's loss and gradients, on the host."""
    tt.manual_seed(0)
    task = steps[name]()
    for module in (task.model, getattr(task, "teacher", task.model)):
        module.to("cuda")
    rng = np.random.default_rng(1)
    arrays = (rng.standard_normal((3, 3, 16, 16)).astype("float32"), rng.integers(0, 3, 3))
    task.model.train()
    loss, _ = task(*(to_device(a, "cuda") for a in arrays), **task.noise(3, 0, 0, module_for("cuda")))
    loss.backward()
    return float(loss), {n: p.grad.get() for n, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_kernels_equals_the_plain_one(name, there):
    loss, grads = step(name)
    first = list(there)
    assert len({name for name, *_ in first}) > 8
    with tt.plain():
        expected, plain_grads = step(name)
    assert there == first  # plain() launched nothing
    assert loss == pytest.approx(expected, abs=2e-5) and grads.keys() == plain_grads.keys()
    largest = max(np.abs(g).max() for g in plain_grads.values())
    for n, g in grads.items():
        np.testing.assert_allclose(g, plain_grads[n], rtol=0, atol=1e-4 * largest, err_msg=n)


WIDE = dict(SIZES, dim=32)  # heads that the bf16 kernels cover
WIDE_STEPS = {
    "vit": lambda: Classify(ViT(**WIDE), smoothing=0.1, drop_path=0.5),
    "lookupvit": lambda: Classify(LookupViT(**WIDE | PAPER, compressed=(2, 2)), drop_path=0.5),
    "dynamicvit": lambda: Distil(DynamicViT(**WIDE, prune_before=(1,), keep_ratios=(0.5,)), ViT(**WIDE))}


@pytest.mark.parametrize("name", WIDE_STEPS)
def test_a_step_in_bf16_is_near_the_plain_one(name, there):
    with gemm.precision("bf16"):
        loss, grads = step(name, WIDE_STEPS)
    assert {"bf16_attention_backward", "bf16_gelu_backward"} <= {name for name, *_ in there}
    with tt.plain():
        expected, plain_grads = step(name, WIDE_STEPS)
    assert loss == pytest.approx(expected, rel=0.01) and grads.keys() == plain_grads.keys()
    for n, g in grads.items():
        # no softmax sees what all keys have in common: this bias has no gradient but what is rounded off
        like = n.replace("gather_norm_k.bias", "gather_norm_k.weight")
        tolerance = 0.05 * np.abs(plain_grads[like]).max() + 1e-5
        np.testing.assert_allclose(g, plain_grads[n], rtol=0, atol=tolerance, err_msg=n)


def test_a_step_makes_the_same_launches_again(there):
    first, once = step("dynamicvit"), list(there)
    there.clear()
    again = step("dynamicvit")
    assert there == once and again[0] == first[0]
    assert all(np.array_equal(g, first[1][name]) for name, g in again[1].items())


def test_a_step_finds_what_lasts_at_the_same_addresses(there, monkeypatch):
    """Weights, gradients and moments: what a captured step is to find again when it is replayed."""
    tt.manual_seed(0)
    task = Classify(ViT(**WIDE).to("cuda"))
    optimizer = tt.optim.AdamW(task.model.parameters())
    rng, calls = np.random.default_rng(1), []
    images, labels = rng.standard_normal((3, 3, 16, 16)).astype("float32"), rng.integers(0, 3, 3)
    arrays = [to_device(a, "cuda") for a in (images, labels)]
    registered.set_rates(optimizer, 1e-3)
    with gemm.precision("bf16"):
        weights = Weights(optimizer.flat)
    lasting = {name: (address_of(a), a.nbytes) for name, a in {
        "data": optimizer.flat.data, "grad": optimizer.flat.grad, "m": optimizer.m, "v": optimizer.v,
        "rates": optimizer.rates, "rounded": weights.rounded}.items()}

    def note(kernel, blocks, threads, arguments, shared):
        places = [(name, address_of(a) - start) for a in arguments if hasattr(a, "nbytes") and a.ndim
                  for name, (start, size) in lasting.items() if start <= address_of(a) < start + size]
        calls.append((kernel, blocks, threads, shared, places))
        before(kernel, blocks, threads, arguments, shared)
    before = launcher.now.run
    for _ in range(2):
        with launcher.running_on(note), gemm.precision("bf16"), weights.in_use():
            loss_and_grads(task, optimizer.params, arrays)
            registered.update(optimizer)
    half = len(calls) // 2
    assert calls[:half] == calls[half:]
    assert {name for *_, places in calls for name, _ in places} == set(lasting)


def address_of(array):
    array = getattr(array, "host", array)
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0]
    return array.data.ptr if hasattr(array, "data") else -1


def test_pruned_inference(there):
    tt.manual_seed(0)
    model = DynamicViT(**SIZES, prune_before=(1,), keep_ratios=(0.5,)).to("cuda").eval()
    images = to_device(np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype("float32"), "cuda")
    with tt.no_grad():
        logits = model(images).logits.numpy()
        with tt.plain():
            expected = model(images).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert {"take_rows", "attention_forward"} <= {name for name, *_ in there}


@pytest.mark.parametrize("clip, average", [(0.5, None), (None, 0.9), (1e9, None)])
def test_the_optimiser_with_kernels_equals_the_plain_one(clip, average, there):
    def trained(device, plain):
        tt.manual_seed(0)
        model = ViT(**SIZES).to(device)
        model.head.weight.lr_scale = 3.0
        optimizer = tt.optim.AdamW(model.parameters(), 1e-2, clip=clip, average=average)
        norms = []
        for step in range(3):
            gradient = np.random.default_rng(step).standard_normal(optimizer.flat.grad.size).astype("float32")
            optimizer.flat.take_rows(optimizer.flat.grad, to_device(gradient, device))
            norms.append(float(optimizer.step()))
        weights = optimizer.flat.by_rows(optimizer.flat.data)
        return norms, to_numpy(weights), [to_numpy(a) for a in optimizer.state()[0].values()]

    norms, weights, moments = trained("cuda", False)
    assert {"squares", "clip_factor", "set_rates", "adamw"} == {name for name, *_ in there}
    plain_norms, plain_weights, plain_moments = trained("cpu", True)
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    for a, b in zip([weights, *moments], [plain_weights, *plain_moments]):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6)


def test_top_k_is_the_kernel_where_it_can_be(there):
    scores = np.random.default_rng(0).standard_normal((3, 40)).astype("float32")
    wide, double = np.zeros((2, 7000), "float32"), scores.astype("float64")
    for array, launched in ((scores, ["top_k"]), (double, []), (wide, [])):
        there.clear()
        found = tt.ops.top_k(to_device(array, "cuda"), 5)
        assert np.array_equal(found.get(), tt.ops.top_k(array, 5))
        assert [name for name, *_ in there] == launched
