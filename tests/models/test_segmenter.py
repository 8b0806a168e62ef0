"""Segmenter: which maps are read and how, what it costs, its losses by formulas, on pictures that are not
square."""
import dataclasses
import functools

import numpy as np
import pytest

import tinytoken as tt
from small import gumbel, refuses, same, shaken, softmax
from tinytoken import models
from tinytoken.checking import gradcheck
from tinytoken.data import Batches
from tinytoken.data.batches import IGNORE
from tinytoken.models import DynamicViT, LookupViT, Segmenter
from tinytoken.models.pixels import pixel_targets
from tinytoken.tasks import SegmentTaught, Segment
from tinytoken.train import fit

K, COLUMN = 3, dict(patch_size=4, dim=8, depth=3, heads=2)
PYRAMID = dict(patch_size=2, depths=(1, 3, 1))
TWO_PATHS, DROPS = dict(prune_before=(1, 2), keep_ratios=(0.7, 0.4)), dict(prune_before=(1, 2),
                                                                          keep_ratios=(0.7, 0.4))
OPTIONS = {"vit": COLUMN, "dynamicvit": COLUMN | DROPS, "lookupvit": COLUMN | dict(compressed=(2, 2)),
           "convnext": PYRAMID | dict(dims=(4, 8, 12), layer_scale=0.5),
           "swin": PYRAMID | dict(embed_dim=4, heads=(1, 2, 2), window_size=3),
           "stvitr": dict(patch_size=2, depths=(1, 5, 1), embed_dim=4, heads=(1, 2, 2), window_size=2, seeds=1,
                          reach=3)}
OPTIONS |= {f"dynamic{name}": OPTIONS[name] | TWO_PATHS for name in ("convnext", "swin")}
each = pytest.mark.parametrize("name", OPTIONS)
each_taught = pytest.mark.parametrize("name", ["dynamicvit", "dynamicconvnext", "dynamicswin"])


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def new(name, **more):
    return shaken(Segmenter(name, K, image_size=(16, 24), width=8, options=OPTIONS[name] | more))


def pictures(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 24))


def labels(batch=2):
    """Some pixels of the first picture have no class, and all but one of the second."""
    out = np.random.default_rng(1).integers(0, K, (batch, 16, 24)).astype("uint8")
    out[0, :3], out[1] = IGNORE, IGNORE
    out[1, 5, 7] = 2
    return out


@functools.cache
def teacher(name):
    plain = name.removeprefix("dynamic")
    kind = shaken(Segmenter(plain, K, image_size=(16, 24), width=8, options=OPTIONS[plain]), seed=5)
    with tt.no_grad():
        return kind.eval()(pictures())


# What it is made of

@each
def test_answers_have_the_pictures_shape_and_the_decoder_is_its_formula(name):
    """Laterals, the coarser map resized, norm, GELU, and a square of pixels for each position."""
    model = new(name).eval()
    out = model(pictures())
    assert out.logits.shape == (2, 16, 24, K)
    features, decoder = out.features, model.decoder
    if name in ("vit", "dynamicvit", "lookupvit"):
        x = decoder.lateral[0](features.lookup if name == "lookupvit" else features.tokens)
        grid = (4, 6)
    else:
        fine, coarse, grid = features.maps[1], features.tokens, (4, 6)
        x = decoder.lateral[0](decoder.norms[0](fine))
        x = x + tt.ops.resize_matrix((2, 3), grid) @ decoder.lateral[1](coarse).data
    x = decoder.head(tt.ops.gelu(decoder.norm(x))).data
    for r, c in np.ndindex(16, 24):
        place = (r // 4 * 6 + c // 4, slice((r % 4 * 4 + c % 4) * K, (r % 4 * 4 + c % 4 + 1) * K))
        same(out.logits.data[:, r, c], x[:, *place])


@each
def test_macs(name):
    """The backbone's without its classifiers, and of the decoder two sorts of linear layers."""
    model, images = new(name).astype("float32"), np.zeros((2, 3, 16, 24), "float32")
    made, both = model.backbone.config, {"mean_of_heads": True} if name == "lookupvit" else {}
    heads = 2 if name == "lookupvit" else 1
    read = made.widths[-2:] if hasattr(made, "widths") else (made.dim,)
    kept = dict(keep_ratios=(1.0, 1.0)) if name == "dynamicvit" else {}  # none is removed from the map
    whole = models.create(name, **dataclasses.asdict(made) | kept)
    lateral = sum(24 // 4 ** s * C * 8 for s, C in enumerate(read))
    expected = tt.macs(whole, images, **both).total - heads * read[-1] * K + lateral + 24 * 8 * 4 * 4 * K
    assert tt.macs(model, images).total == expected


def test_a_masked_dynamicvit_drops_what_the_other_removes():
    model = new("dynamicvit").eval()
    other = shaken(DynamicViT(image_size=(16, 24), **OPTIONS["dynamicvit"])).eval()
    own = other.state_dict() | {n: a for n, a in model.backbone.state_dict().items()}
    other.load_state_dict({n: own[n] for n in other.state_dict()})
    removed, out = other(pictures(3)), model(pictures(3)).features
    assert [k.shape[1] for k in out.kept] == other.counts == [16, 9] and out.tokens.shape == (3, 24, 8)
    for a, b in zip(removed.kept, out.kept):
        assert np.array_equal(a, b)
    same(np.take_along_axis(out.tokens.data, out.kept[-1][:, :, None], axis=1), removed.tokens.data)
    keep = [(kept[:, :, None] == np.arange(24)).any(axis=1) for kept in removed.kept]
    forced = model(pictures(3), keep=keep)
    same(forced.features.tokens.data, out.tokens.data)
    assert all(np.array_equal(a, b) for a, b in zip(forced.features.kept, out.kept))


def test_a_lookupvits_lookup_tokens_reach_the_end():
    model = new("lookupvit")
    assert model.config.options["classifiers"] == "both"
    for training in (True, False):
        assert model.train(training)(pictures(), compressed=(3, 1)).features.lookup.shape == (2, 24, 8)
    plain = LookupViT(image_size=(16, 24), **OPTIONS["lookupvit"])
    assert set(plain.state_dict()) - {"head.weight", "head.bias"} <= model.backbone.state_dict().keys()


def test_an_stvitrs_semantic_tokens_reach_all_pixels_and_only_by_the_recovery():
    model = new("stvitr").eval()
    stage = model.backbone.layers[1]

    def moved():
        """How far the answers of each pixel go with the learned weights of the semantic tokens."""
        before = model(pictures()).logits.data
        stage.semantic_token2.data *= -1  # to add a constant would change nothing: a norm comes next
        return np.abs(model(pictures()).logits.data - before).max(axis=3)
    assert (moved() > 1e-6).all()
    recover = stage.blocks[-1]
    names, read = zip(*recover.attn.named_parameters())
    gradcheck(lambda *_: model(pictures()).logits, stage.semantic_token2, *read, names=["G", *names],
              max_elements=10)
    recover.layer_scale_1.data[:] = 0
    assert not moved().any()


# Losses

@each
def test_gradients_of_the_whole_model(name):
    model = new(name).train()
    soft = {}
    if "dynamic" in name:
        soft = dict(noise=gumbel(2, 2, 24), hard=False)

    def outputs(*_):
        out = model(pictures(), **soft)
        return model.loss(out, labels(), teacher(name), smoothing=0.1)[0], out.logits
    unread = "backbone.norm." if name == "lookupvit" else " "  # of the compressed tokens, which none reads
    used = [(n, p) for n, p in model.named_parameters() if not n.startswith(unread)]
    used = used[:-12:5] + used[-12:]  # the backbone's are checked elsewhere, the last are the decoder's
    gradcheck(outputs, *(p for _, p in used), names=[n for n, _ in used], max_elements=10)


@each
def test_the_losses_by_their_formulas(name):
    model, taught = new(name).train(), teacher(name)
    out = model(pictures(), **({"noise": gumbel(2, 2, 24)} if "dynamic" in name else {}))
    loss, parts = model.loss(out, labels(), taught)
    q, p, y = softmax(out.logits.data), softmax(taught.logits.data), labels()
    first = -np.log(q[0, 3:][np.arange(13)[:, None], np.arange(24), y[0, 3:]]).mean()
    expected = {"class": (first - np.log(q[1, 5, 7, 2])) / 2}  # a mean over pictures of that of their pixels
    if "dynamic" in name:
        features, keep = out.features, out.features.decisions[-1].data
        expected["ratio"] = sum(((d.data.mean(axis=1) - r) ** 2).mean()
                                for d, r in zip(features.decisions, (0.7, 0.4)))
    expected["kl"] = (p * np.log(p / q)).sum(axis=-1).mean()
    if "dynamic" in name:
        errors = ((features.tokens.data - taught.features.tokens.data) ** 2).mean(axis=2)
        counted = keep if name == "dynamicvit" else np.ones_like(keep[:, :6])  # all of a pyramid's last map
        expected["token"] = ((errors * counted).sum(axis=1) / counted.sum(axis=1)).mean()
    assert {n: part.item() for n, part in parts.items()} == pytest.approx(expected)
    ratio = {"dynamicvit": 2}.get(name, 10) / 2  # decisions
    weights = (1, ratio, 0.5, 0.5) if "dynamic" in name else (1, 0.5)
    assert loss.item() == pytest.approx(sum(w * v for w, v in zip(weights, expected.values())))


def test_targets_of_pixels():
    logits = tt.Tensor(np.random.default_rng(0).standard_normal((2, 16, 24, K)))
    rows = pixel_targets(labels(), logits, smoothing=0.3).reshape(2, 16, 24, K)
    same(rows.sum(axis=(1, 2, 3)), np.array([384, 384]))
    assert not rows[0, :3].any() and np.flatnonzero(rows[1].any(axis=2)).tolist() == [5 * 24 + 7]
    same(rows[1, 5, 7], 384 * np.array([0.1, 0.1, 0.8]))
    none = np.full((2, 16, 24), IGNORE, "uint8")
    assert not pixel_targets(none, logits, 0.3).any()

    def loss(cut):
        goal = pixel_targets(labels()[cut], logits[cut])
        return tt.ops.cross_entropy(logits[cut].reshape(-1, K), goal).item()
    halves = [loss(slice(i, i + 1)) for i in range(2)]
    assert loss(slice(2)) == pytest.approx(np.mean(halves))  # so that a batch may be cut into slices
    wrong = labels()
    wrong[0, 9, 9] = K
    with refuses("Segmenter: labels from 0 to 255, expected 0 to 2, or 255 for none"):
        pixel_targets(wrong, logits)
    with refuses("Segmenter: labels (2,) uint8 for logits (2, 16, 24, 3), expected whole numbers (B, H, W)"):
        pixel_targets(wrong[:, 0, 0], logits)


@each
def test_it_is_trained_with_moved_pictures(name):
    model = new(name).astype("float32")
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 24)).astype("uint8")
    batches = Batches(images, (images[:, 0] // 86).astype("uint8"), 3, pad=2, flip=True)
    task = (SegmentTaught(model, new(name.removeprefix("dynamic")).astype("float32")) if "dynamic" in name
            else Segment(model, drop_path=0.2))
    assert type(task) is tt.tasks.task.pick(model.task)
    before = task(*batches(0), **task.noise(3, 0, 0))[1]["class"].item()
    report = fit(model, task, batches, steps=16, lr=0.01, bar=False, threads=1)
    model.train()
    after = task(*batches(0), **task.noise(3, 0, 0))[1]["class"].item()
    assert after < before and np.isfinite(report["loss"])


# Its configuration

@each
def test_a_configuration_goes_through_json_and_checkpoints(name, tmp_path):
    model = new(name).astype("float32")
    tt.checkpoint.save(tmp_path / "m.npz", model)
    again, _ = tt.checkpoint.load_model(tmp_path / "m.npz")
    assert again.config == model.config and again.backbone.config == model.backbone.config
    same(again.eval()(pictures()).logits.data, model.eval()(pictures()).logits.data)


def test_sizes_are_those_of_the_backbone_unless_its_options_say_so():
    model = Segmenter(image_size=8, patch_size=2, dim=8, depth=1, heads=2, options=dict(dim=16))
    made = model.backbone.config
    assert (made.patch_size, made.dim, made.depth, made.num_classes) == (2, 16, 1, 11)
    assert model.decoder.lateral[0].weight.shape == (64, 16) and model.decoder.head.weight.shape == (44, 64)


@pytest.mark.parametrize("options, text", [
    (dict(backbone="tome"), "Segmenter: backbone 'tome', expected one of vit, dynamicvit, "),
    (dict(backbone="stvit"), "Segmenter: backbone 'stvit', expected one of vit, dynamicvit, "),
    (dict(backbone="segmenter"), "Segmenter: backbone 'segmenter', expected one of vit, dynamicvit, "),
    (dict(width=0), "Segmenter: width 0, expected a positive whole number"),
    (dict(options=[1]), "Segmenter: options (1,), expected {name: value}"),
    (dict(options=dict(dims=(4,))), "Segmenter: option 'dims', expected one of vit: image_size, "),
    (dict(backbone="swin", image_size=20, options=PYRAMID), "Swin: image_size 20, expected multiples of 8")])
def test_options_that_make_no_segmenter(options, text):
    with pytest.raises(tt.InputError) as refused:
        Segmenter(**options)
    assert str(refused.value).startswith(text)


def test_what_cannot_teach():
    model = new("dynamicconvnext").train()
    out, other = model(pictures()), models.ViT(image_size=(16, 24), **COLUMN)
    with refuses("Segmenter: teacher Output, expected a SegmenterOutput"):
        model.loss(out, labels(), other(pictures().astype("float32")))
