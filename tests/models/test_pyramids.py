"""What holds of every pyramid: whole-model gradients, the two paths, its output, recipes' sizes, refusals,
checkpoints, training."""
import dataclasses
import inspect
import json

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken import experiments, models, predict
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, scenes
from tinytoken.tasks import Classify, Distil, drop_paths
from tinytoken.train import checkpoint, fit, infer

# Three stages, maps of 4 x 6, 2 x 3 and 1... the decisions are made in the second, of 4 x 6 positions
COMMON = dict(image_size=(16, 24), depths=(1, 3, 1), num_classes=5, patch_size=2)
SIZES = {"convnext": COMMON | dict(dims=(4, 8, 12), layer_scale=0.5),
         "swin": COMMON | dict(embed_dim=4, heads=(1, 2, 2), window_size=3)}
STAGES = dict(prune_before=(1, 2), keep_ratios=(0.7, 0.7 - 0.2))
N = 24
RIGHT = np.array([4, 0])
each_plain = pytest.mark.parametrize("name", SIZES)
each_form = pytest.mark.parametrize("name", [*SIZES, *(f"dynamic{name}" for name in SIZES)])


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def options(name, **more):
    dynamic = name.startswith("dynamic")
    return SIZES[name.removeprefix("dynamic")] | (STAGES if dynamic else {}) | more


def new(name, **more):
    """A model; "dynamic..." with decisions before the blocks 1 and 2."""
    return shaken(models.create(name, **options(name, **more)))


def pictures(batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 16, 24))


def gumbel(batch=2, seed=0):
    return list(np.random.default_rng(seed).gumbel(size=(2, batch, N, 2)))


def mask(count, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(N) < count for _ in range(batch)]).astype("float64")


def teacher(name, batch=2):
    with tt.no_grad():
        return shaken(models.create(name, **SIZES[name]), seed=5).eval()(pictures(batch))


# Gradients

@each_plain
@pytest.mark.parametrize("form", ["plain", "soft decisions", "hard, forced"])
def test_gradients_of_the_whole_model(name, form):
    model = new(name if form == "plain" else f"dynamic{name}").train()
    call = {"plain": {}, "soft decisions": dict(noise=gumbel(), hard=False),
            "hard, forced": dict(keep=[mask(9), mask(14, seed=1)])}[form]
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 5, 3))
    taught = teacher(name)

    def outputs(*parameters):
        out = model(pictures(), paths=paths, **call)
        return model.loss(out, RIGHT, taught)[0], out.logits, *out.maps
    used = [(n, p) for n, p in model.named_parameters() if form != "hard, forced" or "score_predictor" not in n]
    gradcheck(outputs, *(p for _, p in used), names=[n for n, _ in used], max_elements=40)


@each_plain
def test_a_hard_decision_has_the_soft_ones_gradient(name):
    """Straight-through: of a linear function of the decision exactly, and decisions are 0 or 1."""
    model, upstream = new(f"dynamic{name}", prune_before=(1,), keep_ratios=(0.7,)).train(), mask(11)
    gradients = []
    for hard in (True, False):
        decision = model(pictures(), noise=gumbel()[:1], hard=hard).decisions[0]
        assert not hard or set(np.unique(decision.data)) == {0, 1}
        gradients.append(tt.grad((decision * upstream).sum(), model.predictors[0].parameters()))
    for of_hard, of_soft in zip(*gradients):
        assert np.array_equal(of_hard, of_soft) and of_hard.any()


# The two paths

@each_plain
@pytest.mark.parametrize("count", [0, 1, 11, N])
def test_training_is_inference_while_no_decision_changes(name, count):
    model, keep = new(f"dynamic{name}"), [mask(count, 3)] * 2
    streams, gathered = (model.train(mode)(pictures(3), keep=keep) for mode in (True, False))
    assert [k.shape for k in gathered.kept] == [(3, count)] * 2
    for a, b in zip([streams.logits, *streams.maps], [gathered.logits, *gathered.maps]):
        same(a.data, b.data)
    known = [p for n, p in model.named_parameters() if "score_predictor" not in n]
    upstream = np.random.default_rng(1).standard_normal((3, 5))
    for a, b in zip(*(tt.grad((out.logits * upstream).sum(), known) for out in (streams, gathered))):
        same(a, b)
    changed = [mask(count, 3), mask(12, 3, seed=1)]
    a, b = (model.train(mode)(pictures(3), keep=changed).logits.data for mode in (True, False))
    assert np.abs(a - b).max() > 1e-6  # the other stream's values are of before


@each_plain
def test_without_stale_values_training_is_inference_whatever_is_decided(name):
    model, keep = new(f"dynamic{name}", stale=False), [mask(15, 3), mask(12, 3, seed=1)]
    assert (keep[0] > keep[1]).any() and (keep[0] < keep[1]).any()
    trained, used = (model.train(mode)(pictures(3), keep=keep) for mode in (True, False))
    same(trained.logits.data, used.logits.data)
    known = [p for n, p in model.named_parameters() if "score_predictor" not in n]
    upstream, noise = np.random.default_rng(1).standard_normal((3, 5)), gumbel()
    for a, b in zip(*(tt.grad((out.logits * upstream).sum(), known) for out in (trained, used))):
        same(a, b)
    gradcheck(lambda *_: model.train()(pictures(), noise=noise, hard=False).logits, *model.parameters(),
              max_elements=40)


@each_plain
def test_a_training_pass_by_its_formulas(name):
    """Decisions are of all positions anew, about the map as the decision before has chosen it. Each branch of
    each block has factors of its own."""
    model, noise = new(f"dynamic{name}").train(), gumbel()
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 5, 3))
    out, stage, grid = model(pictures(), noise=noise, paths=paths), model.stages[1], model.grids[1]
    x = model.stages[0].blocks[0](model.embed(pictures()), model.grids[0], paths[:, 0])
    x = stage.blocks[0](model.halve(stage, x, model.grids[0]), grid, paths[:, 1])
    x1, x2, masks = x, x, []
    for s, block in enumerate(stage.blocks[1:]):
        merged = x if s == 0 else m * x1 + (1 - m) * x2
        log_probs = model.predictors[s](merged).data
        masks.append((log_probs + noise[s]).argmax(axis=2) == 0)
        m = masks[-1][:, :, None].astype("float64")
        x0 = m * x1 + (1 - m) * x2
        y = block.mix(x0, grid, paths[:, 2 + s])
        from1, from2, first = (y, y, 1) if name == "swin" else (x1, x2, 0)
        f1, f2 = (paths[:, 2 + s, i, None, None] for i in (first, first + 1))
        x1, x2 = (from1 + f1 * block.slow(m * y + (1 - m) * x1), from2 + f2 * block.fast((1 - m) * y + m * x2))
    assert (masks[1] & ~masks[0]).any() and (masks[0] & ~masks[1]).any()  # not nested
    for found, expected in zip(out.decisions, masks):
        assert np.array_equal(found.data, expected)
    x = m * x1 + (1 - m) * x2
    same(out.maps[1].data, x.data)
    x = model.halve(model.stages[2], x, grid)
    same(out.maps[2].data, model.stages[2].blocks[0](x, model.grids[2], paths[:, 4]).data)
    assert (out.keep.data == 1).all() and out.keep.shape == (2, 6)


@each_plain
def test_the_highest_scores_are_slow_at_any_batch_size(name):
    model = new(f"dynamic{name}").eval()
    alone = [model(pictures(5)[i:i + 1]) for i in range(5)]
    for batch in (1, 2, 3, 5):
        out = model(pictures(5)[:batch])
        assert model.counts == [16, 11] and [k.shape for k in out.kept] == [(batch, 16), (batch, 11)]
        for i in range(batch):
            same(out.logits.data[i], alone[i].logits.data[0])
    scores, first = [], model.predictors[0]
    first.forward = lambda x: scores.append(type(first).forward(first, x)) or scores[0]
    out = model(pictures(5))
    best = np.argsort(-scores[0].data[:, :, 0], axis=1)[:, :16]
    assert np.array_equal(np.sort(best, axis=1), out.kept[0])
    keep = [(kept[:, :, None] == np.arange(N)).any(axis=1) for kept in out.kept]
    same(model(pictures(5), keep=keep).logits.data, out.logits.data)


@each_plain
def test_the_dynamic_form_takes_the_plain_weights_and_all_slow_it_is_the_plain_model(name):
    plain, model = new(name), models.create(f"dynamic{name}", **options(f"dynamic{name}", keep_ratios=(1, 1)))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and all("fast" in n or "score_predictor" in n for n in missing)
    assert {n for n, _ in model.named_parameters() if "fast" in n or "predictor" in n} == set(missing)
    out, expected = model.eval()(pictures()), plain(pictures())
    same(out.logits.data, expected.logits.data)
    same(out.tokens.data, expected.tokens.data)
    shares = [softmax(p.out_conv[-1].bias.data.astype("float64"))[0] for p in models.create(
        f"dynamic{name}", **options(f"dynamic{name}")).predictors]
    np.testing.assert_allclose(shares, STAGES["keep_ratios"], rtol=1e-6)


# Losses

@each_plain
@pytest.mark.parametrize("weights", [None, (2, 3, 0.25, 0.75)])
def test_the_losses_by_their_formulas(name, weights):
    model, taught = new(f"dynamic{name}").train(), teacher(name)
    out = model(pictures(), noise=gumbel())
    loss, parts = model.loss(out, RIGHT, taught, weights=weights)
    log_q, p = np.log(softmax(out.logits.data)), softmax(taught.logits.data)
    expected = {"class": -log_q[np.arange(2), RIGHT].mean(),
                "ratio": sum(((d.data.mean(axis=1) - r) ** 2).mean()
                             for d, r in zip(out.decisions, STAGES["keep_ratios"])),
                "kl": (p * (np.log(p) - log_q)).sum(axis=1).mean(),
                "token": ((out.tokens.data - taught.tokens.data) ** 2).mean()}
    assert {n: part.item() for n, part in parts.items()} == pytest.approx(expected)
    of = weights or (1, 10, 0.5, 0.5)
    total = sum(w * v for w, v in zip((of[0], of[1] / 2, *of[2:]), expected.values()))
    assert loss.item() == pytest.approx(total)
    other = models.ViT(image_size=(16, 24), patch_size=2, dim=8, depth=1, heads=2, num_classes=5)
    _, parts = model.loss(out, RIGHT, shaken(other)(pictures()))
    assert list(parts) == ["class", "ratio", "kl"]  # no map to compare


# As every registered model

@each_form
def test_a_configuration_goes_through_json_and_checkpoints(name, tmp_path):
    model = models.create(name, **options(name))
    written = json.dumps(dataclasses.asdict(model.config))
    again = models.create(name, **json.loads(written))
    assert again.config == model.config
    assert not any(isinstance(value, list) for value in vars(again.config).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.depths = (1, 1, 1)
    model = model.train()
    checkpoint.save(tmp_path / "m.npz", model, step=1)
    loaded, header = checkpoint.load_model(tmp_path / "m.npz")
    assert loaded.config == model.config and header["config"]["image_size"] == [16, 24]
    images = pictures().astype("float32")
    assert np.array_equal(loaded.eval()(images).logits.data, model.eval()(images).logits.data)
    checkpoint.restore(tmp_path / "m.npz", model)


@each_form
def test_outputs_draws_and_panels(name):
    model = new(name)
    for training in (True, False):
        for trace in (True, False):
            draws = model.noise(2, 3, 4) if training else {}
            out = model.train(training)(pictures(), trace=trace, **draws)
            assert out.logits.shape == (2, 5) and out.attention == [] and out.tokens.shape[:2] == (2, 6)
            assert [m.shape[1] for m in out.maps] == [r * c for r, c in model.grids] == [96, 24, 6]
    whole, part, other = (model.noise(*of) for of in ((6, 2, 1), (4, 2, 1), (6, 3, 1)))
    assert list(whole) == (["noise"] if name.startswith("dynamic") else [])
    for argument, array in whole.items():
        assert array.shape == (6, 2, N, 2) and argument in inspect.signature(model.forward).parameters
        assert np.array_equal(array[:4], part[argument]) and not np.array_equal(array, other[argument])
    panels = model.show(out)
    assert [title for title, _ in panels] == (
        [f"{type(model).__name__} keeps {n} of 24" for n in (16, 11)] if whole else [])
    for (_, panel), kept in zip(panels, getattr(out, "kept", ())):
        squares = panel.reshape(2, 4, 2, 6, 2)
        assert panel.shape == (2, 96) and (squares == squares[:, :, :1, :, :1]).all()
        assert [np.flatnonzero(row).tolist() for row in squares[:, :, 0, :, 0].reshape(2, N)] == kept.tolist()
    with refuses("images: (2, 3, 24, 16), expected (B, 3, 16, 24)"):
        model(pictures().swapaxes(2, 3))
    if whole:
        kind = type(model).__name__
        with refuses(f"{kind}: noise, paths or hard=False in eval mode, where the best scores are kept and nothing "
                     "is drawn: call .train() first"):
            model(pictures(), noise=gumbel())
        with refuses(f"{kind}: 1 arrays of keep for 2 stages"):
            model(pictures(), keep=[mask(3)])
        with refuses("DynamicViT: keep (2, 6), expected (B, N) = (2, 24)"):
            model(pictures(), keep=[np.ones((2, 6))] * 2)
        with refuses("DynamicViT: forced decisions keep 3 to 4 tokens: in eval mode every image must keep as "
                     "many"):
            model(pictures(), keep=[np.arange(N) < np.array([[3], [4]])] * 2)


@each_form
def test_sizes_of_a_model_with_one_width(name):
    for size, patch, depth, stages, blocks in ((32, 4, 6, 3, (1, 4, 1)), (224, 4, 12, 4, (2, 2, 6, 2)),
                                               (8, 2, 7, 2, (6, 1)), ((24, 40), 4, 6, 2, (5, 1))):
        c = models.model[name].Config(image_size=size, patch_size=patch, dim=12, depth=depth, heads=3)
        assert c.widths == tuple(12 << s for s in range(stages)) and c.depths == blocks
    trial = experiments.Trial(experiments.Recipe(train_pictures=64, test_pictures=8, dim=8, heads=2))
    model = trial.new(name)
    assert model.config.widths == (8, 16, 32) and model.config.num_classes == len(scenes.NAMES)
    own = trial.new(name, image_size=(32, 16), depths=(4, 1))
    assert own.config.widths == (8, 16) and own.grids == [(8, 4), (4, 2)]
    assert trial.answers(model).shape == (8, len(scenes.NAMES))


@pytest.mark.parametrize("more, text", [
    (dict(depths=(1, 0, 1)), "depths (1, 0, 1), expected a positive whole number"),
    (dict(image_size=(16, 20)), "image_size (16, 20), expected multiples of 8: patches of 2 pixels, halved 2 "
                                "times"),
    (dict(patch_size=0), "patch_size 0, expected a positive whole number"),
    (dict(mlp_ratio="4"), "mlp_ratio '4', expected a positive number"),
    (dict(dim=2.5), "dim 2.5, expected a positive whole number"),
    (dict(image_size=(8,)), "image_size (8,), expected H, or (H, W)")])
@each_form
def test_options_that_make_no_pyramid(name, more, text):
    kind = models.model[name].__name__
    with refuses(f"{kind}: {text}"):
        models.create(name, **options(name, **more))


@pytest.mark.parametrize("more, text", [
    (dict(prune_before=(1, 3)), "prune_before (1, 3), expected rising block numbers from 0 to 2"),
    (dict(keep_ratios=(0.5, 0)), "keep_ratios (0.5, 0), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(0.5,)), "2 places to prune and 1 keep ratios")])
@each_plain
def test_decisions_that_cannot_be(name, more, text):
    kind = models.model[f"dynamic{name}"]
    with refuses(f"{kind.__name__}: {text}"):
        kind(**options(f"dynamic{name}", **more))
    with refuses(f"{kind.__name__}: depth 1, expected a block at least in each of 2 stages"):
        kind(image_size=8, patch_size=2, dim=8, depth=1, heads=2)
    with refuses(f"{kind.__name__}: 1 stage, expected at least 2: it is decided in the last but one"):
        kind(image_size=8, patch_size=4, dim=8, depth=4, heads=2)


@each_plain
def test_training_on_scenes_with_drop_path_and_the_picture(name, tmp_path):
    drawn = scenes.make_scenes(40, size=16)
    sizes = dict(image_size=16, patch_size=2, dim=8, depth=4, heads=2)
    batches = Batches(drawn.images, drawn.labels, 12, seed=0, **drawn.moves)
    plain = models.create(name, **sizes)
    report = fit(plain, Classify(plain, drop_path=0.2), batches, steps=4, micro=5, threads=2, bar=False)
    model = models.create(f"dynamic{name}", **sizes, prune_before=(0, 1), keep_ratios=(0.7, 0.4))
    model.load_state_dict(plain.state_dict(), strict=False)
    task = Distil(model, plain, drop_path=0.2)
    branches = max(block.branches for block in model.blocks)
    assert drop_paths(model, 0.2, 6, 0, 0).shape == (6, 4, branches) and "class" in report
    report = fit(model, task, batches, steps=4, micro=5, threads=2, bar=False)
    assert {"class", "ratio", "kl", "token"} <= report.keys()
    checkpoint.save(tmp_path / "m.npz", model, classes=list(scenes.NAMES), mean=[0.0] * 3, std=[1.0] * 3)
    again, _ = checkpoint.load_model(tmp_path / "m.npz")
    images = drawn.images[:7].astype("float32") / 255
    assert np.array_equal(infer(again, images), infer(model, images))
    image = pytest.importorskip("PIL.Image", reason="predict reads pictures with pillow")
    image.fromarray(drawn.images[3].transpose(1, 2, 0)).save(tmp_path / "p.png")
    *_, last = predict.classify(*(tmp_path / name for name in ("m.npz", "p.png", "out.png"))).splitlines()
    assert "picture" in last
