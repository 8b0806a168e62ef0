"""ATViT: against the official code, its module by hand, what it costs, what is trained."""

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, reference, same, shaken
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures
from tinytoken.experiments import Arm, Recipe
from tinytoken.experiments.trial import Trial
from tinytoken.models import ATViT, ViT
from tinytoken.models.atvit import TokenRefinement
from tinytoken.tasks import Classify
from tinytoken.tasks.attack import of_all_blocks, of_last, perturb
from tinytoken.train import fit

SMALL = dict(image_size=(16, 24), patch_size=4, dim=8, depth=3, heads=2, num_classes=3)  # 24 patches
MEAN, STD = (np.reshape(v, (3, 1, 1)) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(scope="module")
def official():
    return reference("official_atvit.npz")


def pictures(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 24))


def under(arrays, prefix):
    return {name.removeprefix(prefix): a.astype("float64") for name, a in arrays.items()
            if name.startswith(prefix)}


# Parity

def loaded(official, xp):
    model = ATViT(28, 2, 12, 12, 2, 1, 6).astype("float64").eval()
    assert model.load_state_dict(under(official, "model/w/")) == ([], [])
    return model.to("cpu" if xp is np else "cuda")


def test_all_blocks_answer_as_the_official_ones(official, xp):
    model, labels = loaded(official, xp), xp.asarray(official["model/labels"])
    images = xp.asarray(official["model/x"].astype("float64"))
    plain = [logits.numpy() for logits in model(images, refined=False).by_block]
    same(np.stack(plain), official["model/plain_logits"])
    x = tt.Tensor(images, requires_grad=True)
    out = model(x)
    same(np.stack([logits.numpy() for logits in out.by_block]), official["model/logits"])
    loss, _ = model.loss(out, labels)
    same(loss.numpy(), official["model/loss"])
    loss.backward()
    leaves, gradients = dict(model.named_parameters()) | {"x": x}, under(official, "model/g/")
    assert len(gradients) == 7
    for name, g in gradients.items():
        same(to_numpy(leaves[name].grad), g, 1e-9 if name != "x" else 1e-6)


@pytest.mark.parametrize("method", ["mifgsm", "pgd"])
@pytest.mark.parametrize("of", ["all", "last"])
def test_pictures_are_changed_as_by_the_official_code(method, of, official, xp):
    model, labels = loaded(official, xp), xp.asarray(official["model/labels"])
    objective, mean, std = {"all": of_all_blocks, "last": of_last}[of], xp.asarray(MEAN), xp.asarray(STD)
    images = xp.asarray(official["model/img"].astype("float64"))
    found = perturb(lambda x: objective(model((x - mean) / std), labels), images, 16 / 255, method, steps=3)
    same(to_numpy(found), official[f"model/adv_{method}_{of}"], 1e-6)


@pytest.mark.parametrize("mode", ["trm", "trm_train"])
def test_the_module_is_the_official_one(mode, official, xp):
    module = TokenRefinement(12).astype("float64").train(mode == "trm_train")
    assert module.load_state_dict(under(official, "trm/w/")) == ([], [])
    module.to("cpu" if xp is np else "cuda")
    x = tt.Tensor(xp.asarray(official["trm/x"].astype("float64")), requires_grad=True)
    out = module(x, (14, 14))
    same(out.numpy(), official[f"{mode}/out"])
    (out * xp.asarray(official["trm/up"].astype("float64"))).sum().backward()
    leaves = dict(module.named_parameters()) | {"x": x}
    for name, g in under(official, f"{mode}/g/").items():
        same(to_numpy(leaves[name].grad), g, 1e-9)
    if mode == "trm_train":  # the norm sees two batches in one pass, and moves twice
        same(to_numpy(module.bn.running_mean.data), official["trm_train/running_mean_after"])
        same(to_numpy(module.bn.running_var.data), official["trm_train/running_var_after"])


# By hand

def test_plain_answers_are_the_vits_through_norm_and_head():
    model, vit = shaken(ATViT(**SMALL)).eval(), ViT(**SMALL)
    assert set(model.load_state_dict(vit.state_dict(), strict=False)[0]) == {
        n for n in model.state_dict() if n.startswith("transformerheads")}
    out, x = model(pictures(), refined=False), vit.embed(pictures())
    for block, logits in zip(vit.blocks, out.by_block):
        x = block(x)
        same(logits.data, vit.head(vit.norm(x)[:, 0]).data, 1e-6)
    assert out.logits is out.by_block[-1] and len(out.by_block) == 3
    same(model(pictures()).logits.data, out.logits.data)


def test_macs():
    """A ViT's; for each block but the last two convolutions, a layer of the class token, and a head."""
    images = pictures().astype("float32")
    extra = 2 * (2 * 24 * 9 * 64 + 64 + 8 * 3)
    assert tt.macs(ATViT(**SMALL), images).total == tt.macs(ViT(**SMALL), images).total + extra


def test_gradients_of_the_whole_model():
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 3, 2))
    for train in (True, False):
        model = shaken(ATViT(**SMALL)).train(train)
        names, parameters = zip(*model.named_parameters())
        gradcheck(lambda *_: model.loss(model(pictures(), paths=paths), np.array([0, 2]), smoothing=0.1)[0],
                  *parameters, names=names, max_elements=6)


def test_training_the_modules_leaves_the_vit_as_it_was(tmp_path):
    recipe = Recipe(steps=4, batch=8, dim=8, depth=3, heads=2, patch=8, train_pictures=24, test_pictures=8)
    arms = {"ViT": Arm("vit", steps=4, lr=1e-3),
            "refined": Arm("atvit", start="ViT", steps=6, lr=1e-2, start_lr_scale=0.0)}
    trial = Trial(recipe, arms, bar=False)
    model, report = trial.train("refined")
    before = trial.train("ViT")[0].state_dict()
    assert report["early"] > 0
    assert all(np.array_equal(array, model.state_dict()[name]) for name, array in before.items())
    fresh = trial.new("atvit").state_dict()
    assert all(not np.array_equal(array, model.state_dict()[name]) for name, array in fresh.items()
               if name.startswith("transformerheads") and name.endswith("weight"))


def test_configuration_checkpoint_and_training(tmp_path):
    train = load_pictures("scenes", train=24, test=8, seed=0)[0]
    model = models.create("atvit", dim=8, depth=2, heads=2)
    fit(model, Classify(model), Batches(train.images, train.labels, 8), steps=4, bar=False)
    for a, b in zip(*(out.by_block for out in comes_back(model, tmp_path))):
        assert np.array_equal(a.data, b.data)
    assert len(ATViT(**SMALL | dict(depth=1))(pictures()).by_block) == 1
