"""DoViT: against the official code, masked against gathered, its rule, losses and cost by hand."""
import re

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, reference, refuses, same, shaken, softmax
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures
from tinytoken.data.batches import IGNORE
from tinytoken.models import DoViT
from tinytoken.models.pixels import pixel_targets
from tinytoken.tasks import Segment, SegmentTaught
from tinytoken.train import fit

# 24 patches
SMALL = dict(image_size=(16, 24), patch_size=4, dim=8, depth=4, heads=2, num_classes=3, exits=(1, 3), width=8)
NAMES = ((r"^layers\.", "blocks."), (r"\.ln", ".norm"), (r"^ln1", "norm"), (r"ffn\.layers\.0\.0", "mlp.fc1"),
         (r"ffn\.layers\.1", "mlp.fc2"), (r"projection", "proj"))


@pytest.fixture(scope="module")
def official():
    return reference("official_dovit.npz")


def pictures(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 24)) * 2


def labels(batch=2):
    out = np.random.default_rng(1).integers(0, 3, (batch, 16, 24)).astype("uint8")
    out[0, :3] = IGNORE
    return out


def between(model, images, share=0.5):
    """Thresholds at which about this share of the patches goes on, and less at the second exit."""
    confidence = model(images, trace=True, tau=2.0).confidence
    return tuple(float(np.quantile(to_numpy(c), q)) for c, q in zip(confidence, (share, share * 0.6)))


# Parity

@pytest.mark.parametrize("case, options", [("b1", {}), ("b1", {"official": True}),
                                           ("b3", {"official": True})])
@pytest.mark.parametrize("mode", ["masked", "gathered", "traced"])
def test_the_official_backbone(case, options, mode, official, xp):
    size = official[f"{case}/x"].shape[-1]
    tau = tuple(official[f"{case}_stable/exit_conf"].tolist())
    model = DoViT(size, 4, 16, 4, 2, 2, 5, exits=(1, 2), tau=tau, **options).astype("float64")
    model.train(mode == "masked")
    weights = {}
    for name, array in official.items():
        if name.startswith(f"{case}/w/"):
            name = name.removeprefix(f"{case}/w/")
            for old, new in NAMES:
                name = re.sub(old, new, name)
            if name.startswith("auxiliary_head"):  # here a head answers for each of 16 pixels
                name, array = name.replace(".cls", ""), np.tile(array.reshape(5, -1), (16, 1))
                array = array[:, 0] if name.endswith("bias") else array
            weights[name] = array.astype("float64")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == [] and all(name.startswith("decoder") for name in missing)
    model.to("cpu" if xp is np else "cuda")
    x = tt.Tensor(xp.asarray(official[f"{case}/x"].astype("float64")), requires_grad=True)
    out, expected = model(x, trace=mode == "traced", bucket=1), lambda name: official[f"{case}_stable/{name}"]
    tokens = lambda name: expected(name).reshape(*expected(name).shape[:2], -1).swapaxes(1, 2)
    same(out.tokens.numpy(), tokens("out2"))
    loss = (out.tokens * xp.asarray(flat(official[f"{case}/up"]))).sum()
    for k in (0, 1):
        same(out.aux[k].numpy()[:, ::4, ::4].transpose(0, 3, 1, 2), expected(f"aux{k}"))
        same(to_numpy(out.confidence[k]), expected(f"exit{k}_conf"))
        if case == "b1":
            assert np.array_equal(to_numpy(out.kept[k]), expected(f"exit{k}_keepmask")[:, 1:] > 0)
        assert set(to_numpy(out.kept[k]).sum(axis=1) + 1) == {expected("n_keep")[k + 1]}
        up = xp.asarray(official[f"{case}/upa{k}"].astype("float64").transpose(0, 2, 3, 1))
        loss = loss + (out.aux[k][:, ::4, ::4] * up).sum()
    same(loss.numpy(), expected("loss"))
    loss.backward()
    same(to_numpy(x.grad), expected("g/x"), 1e-9)
    same(to_numpy(model.cls_token.grad), expected("g/cls_token"), 1e-9)
    of_head = to_numpy(model.auxiliary_head[0].weight.grad).reshape(4, 4, 5, 16)[0, 0]
    same(of_head[:, :, None, None], expected("g/auxiliary_head.0.cls.weight"), 1e-9)


def flat(array):
    return array.astype("float64").reshape(*array.shape[:2], -1).swapaxes(1, 2)


# What waits

@pytest.mark.parametrize("bucket", [1, 4, 8, 64])
@pytest.mark.parametrize("official", [False, True])
def test_masked_equals_gathered(bucket, official):
    """Logits, the heads' answers, and the gradients of all weights."""
    model = shaken(DoViT(**SMALL, official=official)).eval()
    images, rng = pictures(5), np.random.default_rng(3)
    tau, upstream = between(model, images), rng.standard_normal((5, 16, 24, 3))
    masked, gathered = model(images, trace=True, tau=tau), model(images, tau=tau, bucket=bucket)
    counts = [kept.sum(axis=1) for kept in masked.kept]
    assert len(set(counts[0])) > 1 or official and counts[0].min() < 24
    assert counts[1].sum() < counts[0].sum()
    for a, b in zip(masked.kept, gathered.kept):
        assert np.array_equal(a, b)
    for a, b in zip([masked.logits, *masked.aux], [gathered.logits, *gathered.aux]):
        same(a.data, b.data)
    sums = (((out.logits + out.aux[0] * 2 + out.aux[1] * 3) * upstream).sum() for out in (masked, gathered))
    for a, b in zip(*(tt.grad(each, model.parameters()) for each in sums)):
        same(a, b)
        assert abs(a).max() > 0


def test_the_rule_by_hand():
    model = shaken(DoViT(**SMALL)).eval()
    out = model(pictures(), trace=True, tau=(tau := between(model, pictures())))
    p = softmax(out.aux[0].data).max(axis=3).reshape(2, 4, 4, 6, 4).mean(axis=(2, 4)).reshape(2, 24)
    same(out.confidence[0], p)
    first = p <= tau[0]
    assert np.array_equal(out.kept[0], first)
    assert np.array_equal(out.kept[1], first & (out.confidence[1] <= tau[1]))
    assert model.show(out)[1][0] == "DoViT: what goes on into block 3"
    everything = model(pictures(), tau=1.0)  # no probability is above 1
    assert all(kept.all() for kept in everything.kept)
    nothing = model(pictures(), tau=-1.0)
    assert not any(kept.any() for kept in nothing.kept)
    forced = model(pictures(), keep=[first, np.ones((2, 24))])  # what waits does not come back
    assert np.array_equal(forced.kept[1], first)


def test_the_class_token_takes_in_what_waits_and_the_rest_stays():
    model = shaken(DoViT(**SMALL)).eval()
    keep = np.zeros((2, 24))
    keep[0, :23], keep[1, 5:9] = 1, 1
    state = model.start(pictures(), forced=[keep, keep], state=models.passing.PassingTokens)
    model.run_block(0, state)
    before = state.x.data
    model.before_block(1, state)
    mean = before[1, 1:][keep[1] == 0].mean(axis=0)
    same(state.x.data[0], before[0])  # 1 of 25 waits, which is less than a tenth
    same(state.x.data[1, 0], (before[1, 0] + mean) / 2)
    same(state.x.data[:, 1:], before[:, 1:])
    model.run_block(1, state)
    assert np.array_equal(state.x.data[1, 1:][keep[1] == 0], before[1, 1:][keep[1] == 0])
    assert (state.x.data[1, 1:][keep[1] == 1] != before[1, 1:][keep[1] == 1]).all()


def test_macs_are_those_of_what_goes_on():
    model, N, C, cell = DoViT(**SMALL), 24, 8, 16 * 3
    block = lambda n: 12 * n * C ** 2 + 2 * n ** 2 * C
    fixed = N * 48 * C + 2 * N * C * cell + N * C * 8 + N * 8 * cell
    keep = [np.zeros((2, N)), np.zeros((2, N))]
    keep[0][0, :9], keep[0][1, :12], keep[1][:, :3] = 1, 1, 1
    images = pictures().astype("float32")
    found = tt.macs(model, images, keep=keep, bucket=1).total
    blocks = [block(25) + 2 * block(n + 1) + block(4) for n in (9, 12)]
    mixing = 2 * 24 * C  # two means of what waits
    assert found == fixed + mixing + sum(blocks) / 2
    assert tt.macs(model, images, keep=keep, bucket=16).total == fixed + mixing + block(25) + 3 * block(16)


# Training

def test_losses_and_gradients():
    model = shaken(DoViT(**SMALL)).train()
    tau = between(model, pictures())
    out, goal = model(pictures(), tau=tau), None
    goal = pixel_targets(labels(), out.logits, 0.1)
    entropy = lambda x: float(tt.ops.cross_entropy(x.data.reshape(-1, 3), goal).data)
    loss, parts = model.loss(out, labels(), smoothing=0.1)
    same(loss.data, entropy(out.logits) + 0.4 * sum(map(entropy, out.aux)))
    teacher = shaken(DoViT(**SMALL), seed=5)(pictures(), tau=2.0)
    taught, parts = model.loss(out, labels(), teacher, smoothing=0.1)
    kl = tt.ops.kl_divergence(out.logits.data.reshape(-1, 3), teacher.logits.data.reshape(-1, 3)).data
    same(taught.data, loss.data + kl + 0.5 * ((out.tokens.data - teacher.tokens.data) ** 2).mean())
    names, parameters = zip(*model.named_parameters())
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 4, 2))
    kept = [kept.astype("float64") for kept in out.kept]
    gradcheck(lambda *_: model.loss(model(pictures(), keep=kept, paths=paths), labels(), teacher)[0],
              *parameters, names=names, max_elements=6)


def test_configuration_checkpoint_and_training(tmp_path):
    train = load_pictures("pixel_scenes", train=24, test=8, seed=0)[0]
    model = models.create("dovit", dim=8, depth=3, heads=2, num_classes=11, exits=(1, 2), tau=(0.9, 0.8))
    for task in (Segment(model), SegmentTaught(model, models.create("dovit", dim=8, depth=3, heads=2,
                                                                    exits=(1, 2), tau=2.0))):
        found = fit(model, task, Batches(train.images, train.labels, 8), steps=4, log_every=1, bar=False)
        assert np.isfinite(found["loss"]) and found["aux"] > 0
    comes_back(model, tmp_path)


@pytest.mark.parametrize("config, text", [
    (dict(exits=()), "DoViT: exits (), expected rising numbers of blocks, from 1 to 3"),
    (dict(exits=(0, 2)), "DoViT: exits (0, 2), expected rising numbers of blocks, from 1 to 3"),
    (dict(exits=(3, 1)), "DoViT: exits (3, 1), expected rising numbers of blocks, from 1 to 3"),
    (dict(tau=(0.9,)), "DoViT: tau (0.9,), expected a number, or one for each of 2 exits"),
    (dict(aggregate=2), "DoViT: aggregate 2, expected a share from 0 to 1")])
def test_what_it_refuses(config, text):
    with refuses(text):
        DoViT(**SMALL | config)


def test_calls_that_it_refuses():
    model = DoViT(**SMALL)
    with refuses("DoViT: 1 masks for 2 exits"):
        model(pictures(), keep=[np.ones((2, 24))])
    with refuses("DoViT: keep (2, 23), expected (B, N) = (2, 24)"):
        model(pictures(), keep=[np.ones((2, 23))] * 2)
    with refuses("DoViT: bucket 0, expected 1 or more"):
        model(pictures(), bucket=0)
    with refuses("DoViT: tau 'low', expected a number, or one for each of 2 exits"):
        model(pictures(), tau="low")
