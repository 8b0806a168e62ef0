"""Drop path: what the factors are, what they do to a model, and that training with them repeats."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import SIZES, bits, dynamicvit, lookupvit, train, vit
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.models.controls import CONTROLS
from tinytoken.models.lookupvit import PAPER
from tinytoken.nn import Block
from tinytoken.tasks import Classify, Distil, drop_paths
from tinytoken.train import AdamW, Run

DEEP = SIZES | {"depth": 3}
MODELS = {"ViT": lambda: ViT(**DEEP), "LookupViT": lambda: LookupViT(**DEEP | PAPER, compressed=(1, 1)),
          "DynamicViT": lambda: DynamicViT(**DEEP, prune_before=(1,), keep_ratios=(0.5,))}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def host(array):
    return array.get() if hasattr(array, "get") else array


def logits(out):
    return out.logits.data


def made(make):
    tt.manual_seed(1)
    model = make().astype("float64").train()
    for p in model.parameters():
        p.data += 0.1 * np.random.default_rng(0).standard_normal(p.shape)
    return model, np.random.default_rng(1).standard_normal((3, 3, 8, 8))


def draws(model):
    """Gumbel draws for a DynamicViT, nothing for others: then only the factors differ between two calls."""
    return {"noise": [np.zeros((3, model.num_patches, 2))]} if isinstance(model, DynamicViT) else {}


def test_factors_are_zero_or_keep_the_mean(xp):
    class Deep:
        blocks = [Block(4, 1) for _ in range(5)]
    factors = host(drop_paths(Deep, 0.4, 20_000, step=3, seed=1, xp=xp))
    assert factors.shape == (20_000, 5, 2) and factors.dtype == "float32" and (factors[:, 0] == 1).all()
    for number, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        values = set(np.unique(factors[:, number]).tolist())
        kept = float(np.float32(1) / np.float32(1 - rate))
        assert values == ({1.0} if number == 0 else {0.0, kept}) or len(values) == 2
        assert abs((factors[:, number] == 0).mean() - rate) < 0.008  # over 3 standard errors of 40,000
        assert abs(factors[:, number].mean() - 1) < 0.02
    drop = factors[:, 1:].reshape(len(factors), -1) == 0
    assert np.abs(np.corrcoef(drop.T) - np.eye(8)).max() < 0.03  # each branch by itself


def test_one_block_drops_nothing():
    class Single:
        blocks = [Block(4, 1)]
    assert (drop_paths(Single, 0.5, 10, step=0, seed=0) == 1).all()


@each_model
def test_factors_of_one_change_nothing_and_of_zero_leave_the_embedding(make):
    model, images = made(make)
    shape = (3, 3, model.blocks[0].branches)
    plain = logits(model(images, **draws(model)))
    np.testing.assert_allclose(logits(model(images, **draws(model), paths=np.ones(shape))), plain, rtol=1e-12)
    empty = logits(model(images, **draws(model), paths=np.zeros(shape)))
    if isinstance(model, LookupViT):
        expected = model.head(model.norm(model.embed(images, (1, 1))[1]).mean(axis=1)).data
    else:
        expected = model.classify(model.norm(model.embed(images))).data
    np.testing.assert_allclose(empty, expected, rtol=1e-12)


@each_model
def test_a_branch_is_dropped_for_its_image_alone_and_each_counts(make):
    model, images = made(make)
    branches = model.blocks[0].branches
    for block in range(3):
        for number in range(branches):
            paths = np.ones((3, 3, branches))
            paths[1, block, number] = 0
            out = model(images, **draws(model), paths=paths)
            whole = model(images, **draws(model))
            heads = ("logits", "lookup_logits") if isinstance(model, LookupViT) else ("logits",)
            moved = [np.abs(getattr(out, head).data - getattr(whole, head).data).max(axis=1) > 1e-9
                     for head in heads]
            assert np.any(moved, axis=0).tolist() == [False, True, False], (block, number)


@each_model
def test_gradients_with_factors(make):
    model, images = made(make)
    paths = drop_paths(model, 0.5, 3, step=2, seed=0).astype("float64")
    assert (paths == 0).any()
    names, parameters = zip(*model.named_parameters())
    options = draws(model) | ({"hard": False} if isinstance(model, DynamicViT) else {})
    tt.gradcheck(lambda *_: model(images, **options, paths=paths).logits, *parameters, names=names,
                 max_elements=150)


@pytest.mark.parametrize("kind", CONTROLS.values(), ids=CONTROLS.keys())
def test_controls_take_factors_too(kind):
    tt.manual_seed(0)
    model = kind(**DEEP, prune_before=(1,), keep_ratios=(0.5,)).train()
    images, noise = np.ones((2, 3, 8, 8), "float32"), [np.zeros((2, 4, 2), "float32")]
    whole, dropped = (logits(model(images, noise=noise, paths=np.full((2, 3, 2), factor, "float32")))
                      for factor in (1, 0))
    assert np.abs(whole - dropped).max() > 1e-6


@pytest.mark.parametrize("make", [vit, lookupvit, dynamicvit])
def test_training_with_drop_path_and_an_average_repeats_and_resumes(make, tmp_path, monkeypatch):
    def with_drop():
        model, task = make()
        if isinstance(task, Distil):
            return model, Distil(model, task.teacher, drop_path=0.3)
        return model, Classify(model, drop_path=0.3)
    whole, _ = train(with_drop, average=0.9)
    twice, _ = train(with_drop, average=0.9)
    assert bits(whole) == bits(twice) != bits(train(with_drop)[0])
    calls = []

    def cut(*arguments, original=AdamW.step):
        calls.append(0)
        if len(calls) == 12:
            raise RuntimeError("power cut")
        return original(*arguments)
    monkeypatch.setattr(AdamW, "step", cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(with_drop, run=Run(tmp_path, every=5), average=0.9)
    monkeypatch.undo()
    resumed, _ = train(with_drop, run=Run(tmp_path, every=5), average=0.9)
    assert bits(resumed) == bits(whole)


def test_slices_do_not_change_what_is_dropped():
    model, _ = vit()
    task = Classify(model, drop_path=0.5)
    a, b = task.noise(6, 3, 0, np), task.noise(4, 3, 0, np)
    assert a.keys() == b.keys() == {"paths"} and len(a["paths"]) == 6
    assert (a["paths"][:4] == b["paths"]).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_cannot_be(rate):
    model, _ = vit()
    with refuses(f"drop_path: {rate}, expected 0 <= rate < 1"):
        Classify(model, drop_path=rate)
    with refuses(f"AdamW: average {rate}, expected 0 <= average < 1 or None"):
        AdamW(model.parameters(), average=rate)


def test_factors_in_eval_mode_are_refused_where_tokens_are_removed():
    model = MODELS["DynamicViT"]().eval()
    with pytest.raises(tt.InputError, match="paths or hard=False in eval mode"):
        model(np.ones((2, 3, 8, 8), "float32"), paths=np.ones((2, 3, 2), "float32"))
    assert Classify(model, drop_path=0.0).noise(2, 0, 0).keys() == {"noise"}
