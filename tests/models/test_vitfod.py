"""ViT-FOD: against the official code, its parts by hand, what it costs, and the exchange of cells."""
import re

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, reference, refuses, same, shaken
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures, mix
from tinytoken.models import ViT, ViTFOD
from tinytoken.models.vitfod import rollout
from tinytoken.tasks.combine import Combine, cell_weights
from tinytoken.train import fit

SMALL = dict(image_size=(16, 24), patch_size=4, dim=8, depth=3, heads=2, num_classes=3)  # 24 patches
START, LAYERS = r"^transformer\.embeddings\.", r"^transformer\.encoder\."
NAMES = ((START + "position_embeddings", "pos_embed"), (START + "cls_token", "cls_token"),
         (START + "patch_embeddings", "patch_embed.proj"), (LAYERS + r"layer\.", "blocks."),
         (LAYERS + "aof", "aof"),
         ("attention_norm", "norm1"), ("ffn_norm", "norm2"), (r"\.ffn\.", ".mlp."),
         (r"attn\.out", "attn.proj"),
         (LAYERS + "norm10", "part_norms.0"), (LAYERS + "norm11", "part_norms.1"),
         (LAYERS + "norm12", "norm"),
         (LAYERS + "norm13", "aof_norm"), ("part_head10", "part_heads.0"), ("part_head11", "part_heads.1"),
         ("part_head12", "head"), ("part_head13", "aof_head"))


@pytest.fixture(scope="module")
def official():
    return reference("official_vitfod.npz")


def ours(name):
    for old, new in NAMES:
        name = re.sub(old, new, name)
    return name


def pictures(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 24))


# Parity

def loaded(official, xp):
    model = ViTFOD(32, 4, 12, 12, 2, 16 / 12, 6, alpha=0.5).astype("float64")
    state = {ours(name.removeprefix("p120/w/")): array.astype("float64") for name, array in official.items()
             if name.startswith("p120/w/")}
    for name in [name for name in state if "attn.query" in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = np.concatenate(parts)
    assert model.load_state_dict(state) == ([], [])
    return model.to("cpu" if xp is np else "cuda")


@pytest.mark.parametrize("case", ["p120", "p021"])
def test_answers_mixing_losses_and_gradients_are_the_official_ones(case, official, xp):
    model, expected = loaded(official, xp), lambda name: official[f"{case}/{name}"]
    images, labels = (xp.asarray(official[f"p120/{name}"]) for name in ("x", "labels"))
    images, partner = images.astype("float64"), xp.asarray(expected("rand_index"))
    out, heads = model(images), ("10", "11", "12", "F")
    same(to_numpy(out.rollout), official["p120/rollout_cls"][:, 1:])
    assert np.array_equal(to_numpy(out.critical) + 1, np.sort(official["p120/crf_idx"], axis=1))
    for head, logits in zip(heads, out.answers.values()):
        same(logits.numpy(), official[f"p120/logits{head}"])
    weights = cell_weights(out.rollout, (8, 8), 4)
    same(to_numpy(weights), official["p120/apc_cell_weight"])
    mixed, own, other = mix.exchange(images, weights, partner, weights)
    same(to_numpy(mixed), expected("image_new"), 1e-6)
    same(to_numpy(own), expected("lam_a"))
    same(to_numpy(other), expected("lam_b"))
    for head, logits in zip(heads, model(mixed).answers.values()):
        same(logits.numpy(), expected(f"mix_logits{head}"), 1e-6)
    loss, parts = Combine(model)(images, labels, partner=partner)
    same(loss.numpy(), expected("loss"))
    same([float(part) for part in parts.values()], expected("loss_parts"))
    loss.backward()
    named, checked = dict(model.named_parameters()), 0
    for name, g in official.items():
        if name.startswith(f"{case}/g/") and not name.endswith("/x"):
            parameter = named[ours(name.removeprefix(f"{case}/g/")).replace("query", "qkv")]
            same(to_numpy(parameter.grad)[:len(g)], g, 1e-9)  # queries are the first part of qkv
            checked += 1
    assert checked == {"p120": 7, "p021": 2}[case]


# Its parts

def test_rollout_is_a_row_of_the_product():
    model = shaken(ViTFOD(**SMALL)).eval()
    out = model(pictures(), trace=True)
    product = np.eye(25)
    for A in out.attention:
        joined = (A.data.mean(axis=1) + np.eye(25)) / 2
        product = joined / joined.sum(axis=2, keepdims=True) @ product
    same(out.rollout, product[:, 0, 1:])
    same(rollout(out.attention, 1), out.rollout)
    best = np.sort(np.argsort(-out.rollout, axis=1)[:, :4], axis=1)  # floor(0.2 24)
    assert np.array_equal(out.critical, best) and model(pictures()).attention == []
    assert model.show(out)[1][0] == "ViT-FOD: the 4 critical patches"
    same(out.logits.data, sum(logits.data for logits in out.answers.values()))


def test_the_extra_block_reads_what_goes_into_the_last_one_and_moves_nothing_before_it():
    model = shaken(ViTFOD(**SMALL))
    out, state = model(pictures()), model.start(pictures())
    for i in range(2):
        model.run_block(i, state)
    x = state.x.data
    chosen = np.take_along_axis(x, out.critical[:, :, None] + 1, axis=1)
    read = model.aof(tt.Tensor(np.concatenate([x[:, :1], chosen], axis=1)))
    same(out.answers["critical"].data, model.aof_head(model.aof_norm(read)[:, 0]).data)
    same(out.answers["late"].data, model.part_heads[1](model.part_norms[1](tt.Tensor(x)[:, 0])).data)
    names, params = zip(*model.named_parameters())
    grads = tt.grad(out.answers["critical"].sum(), params)
    assert {name for name, g in zip(names, grads) if abs(g).max() > 0} == {n for n in names if n[:3] == "aof"}


def test_weights_of_a_vit_start_the_extra_block_as_the_last_one():
    vit, model = shaken(ViT(**SMALL)), ViTFOD(**SMALL)
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    assert unexpected == [] and all(name.startswith(("part_", "aof_")) for name in missing)
    for name, p in model.aof.named_parameters():
        assert np.array_equal(p.data, dict(vit.blocks[2].named_parameters())[name].data)
    whole = model.state_dict()
    whole["aof.norm1.bias"] = whole["aof.norm1.bias"] + 1
    model.load_state_dict(whole)
    assert np.array_equal(model.aof.norm1.bias.data, whole["aof.norm1.bias"])


@pytest.mark.parametrize("more, extra", [({}, 12 * 5 * 64 + 2 * 25 * 8 + 3 * 24),
                                         (dict(critical="none"), 2 * 24), (dict(complementary=False, eta=0.5),
                                                                           12 * 13 * 64 + 2 * 169 * 8 + 24)])
def test_macs(more, extra):
    """A ViT's, an extra block of 1 + floor(eta N) tokens, and the heads."""
    images = pictures().astype("float32")
    assert tt.macs(ViTFOD(**SMALL | more), images).total == tt.macs(ViT(**SMALL), images).total + extra


def test_random_places_are_the_same_for_all_pictures():
    model = ViTFOD(**SMALL, critical="random", eta=0.5)
    first, second = model(pictures()).critical, model(pictures()[1:]).critical
    assert np.array_equal(first[0], first[1]) and np.array_equal(first[1:], second) and first.shape == (2, 12)


def test_gradients_of_the_whole_model():
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 3, 2))
    goal = np.array([[0.9, 0.3, 0], [0, 0.6, 0.7]])
    for more in (dict(critical="none", alpha=0.5), dict(critical="random"), {}):
        model = shaken(ViTFOD(**SMALL | more)).train()
        # differences see past the detached input of the extra block: beside it only its own are tried
        names, parameters = zip(*((name, p) for name, p in model.named_parameters()
                                  if model.aof is None or name.startswith("aof")))
        gradcheck(lambda *_: model.loss(model(pictures(), paths=paths), goal)[0], *parameters, names=names,
                  max_elements=6)


# The exchange of cells

def test_cells_by_hand():
    rng = np.random.default_rng(0)
    images, weights = rng.standard_normal((3, 2, 8, 8)), rng.uniform(0, 1, (3, 16))
    order, partner = rng.permuted(np.tile(np.arange(16.0), (3, 1)), axis=1), np.array([1, 2, 2])
    mixed, own, other = mix.exchange(images, weights, partner, order)
    cell = lambda picture, k: picture[:, k // 4 * 2:k // 4 * 2 + 2, k % 4 * 2:k % 4 * 2 + 2]
    for i in range(3):
        best, best_of_partner = np.argsort(-order[i]), np.argsort(-order[partner[i]])
        for rank in range(8):
            assert np.array_equal(cell(mixed[i], best[rank]), cell(images[i], best[rank]))
            assert np.array_equal(cell(mixed[i], best[8 + rank]),
                                  cell(images[partner[i]], best_of_partner[rank]))
        same(own[i], 1 - weights[i, best[8:]].sum())
        same(other[i], weights[partner[i], best_of_partner[:8]].sum())


@pytest.mark.parametrize("way", ["attention", "random", "cutmix"])
def test_the_task_draws_what_it_mixes_with(way):
    model = shaken(ViTFOD(**SMALL | dict(image_size=16)))
    task, images = Combine(model, mix=way, cells=2), np.random.default_rng(0).standard_normal((4, 3, 16, 16))
    draws, labels = task.noise(4, 7, 0), np.array([0, 1, 2, 0])
    assert task.whole and all(len(draw) == 4 for draw in draws.values())
    loss, parts = task(images, labels, **draws)
    out, goal = model(images), mix.one_hot(labels, 3, "float64")
    if way == "cutmix":
        mixed, goal = mix.cutmix(images, goal, 1.0, step=7, seed=0)
    else:
        weights = cell_weights(out.rollout, (4, 4), 2)
        mixed, own, other = mix.exchange(images, weights, draws["partner"],
                                         draws["order"] if way == "random" else weights)
        goal = own[:, None] * goal + other[:, None] * goal[draws["partner"]]
    same(loss.data, model.loss(out, labels)[0].data + model.loss(model(mixed), goal)[0].data)
    assert set(parts) == {*out.answers, *(f"mixed {name}" for name in out.answers)}


def test_configuration_checkpoint_and_training(tmp_path):
    train = load_pictures("fine_scenes", train=24, test=8, seed=0)[0]
    model = models.create("vitfod", dim=8, depth=3, heads=2, num_classes=6)
    batches = Batches(train.images, train.labels, 8)
    found = fit(model, Combine(model), batches, steps=4, log_every=1, bar=False)
    assert np.isfinite(found["loss"]) and found["mixed critical"] > 0
    comes_back(model, tmp_path)


def test_what_it_refuses():
    for config, text in ((dict(depth=2), "ViTFOD: complementary with depth 2, expected at least 3 blocks"),
                         (dict(eta=1.5), "ViTFOD: eta 1.5, expected a share, 0 to 1"),
                         (dict(critical="all"), "ViTFOD: critical 'all', expected one of rollout, random, "
                                                "none")):
        with refuses(text):
            ViTFOD(**SMALL | config)
    with refuses("Combine: mix 'all', expected one of attention, random, cutmix"):
        Combine(ViTFOD(**SMALL), mix="all")
    with refuses("Combine: cells 4 of 4 x 6 patches, expected an even number that divides both"):
        Combine(ViTFOD(**SMALL), cells=4)
