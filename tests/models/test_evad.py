"""EVAD: against the official code, hidden against dropped, its rules, its decoder and its cost by hand."""
import math

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, reference, refuses, same, shaken
from tinytoken import models, ops
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures
from tinytoken.models import EVAD
from tinytoken.models.keyrules import spread_out
from tinytoken.tasks.actions import Actions
from tinytoken.train import fit

# 4 slots of 24 tokens
SMALL = dict(frames=8, image_size=(16, 24), tubelet=(2, 4, 4), dim=8, depth=4, heads=2, num_classes=3,
             prune_in=(1, 2), keep_rates=(0.7, 0.6), decoder_dim=6, decoder_depth=2, decoder_heads=2,
             hidden=5)
RULES = ("key", "random", "frames", "global")
OFFICIAL = dict(frames=8, image_size=16, tubelet=(2, 4, 4), dim=16, depth=4, heads=2, mlp_ratio=2,
                num_classes=6, prune_in=(1, 3), decoder_dim=12, decoder_depth=2, decoder_heads=3, hidden=10)
CASES = {"w4": dict(keep_rates=(0.7, 0.6), key_weight=4.0), "w1": dict(keep_rates=(0.7, 0.6)),
         "all": dict(keep_rates=1.0)}


@pytest.fixture(scope="module")
def official():
    return reference("official_evad.npz")


def clips(batch=3):
    return np.random.default_rng(0).standard_normal((batch, 8, 3, 16, 24))


def boxes(batch=3):
    """Of the last clip the second actor is not there."""
    rng = np.random.default_rng(1)
    found = np.array([[[2, 3, 10, 9], [11, 1, 21, 14]]] * batch) + rng.uniform(-1, 1, (batch, 2, 4))
    found[-1, 1] = 0
    return found


def summed(out, up):
    return sum(((k + 1) * answer * up).sum() for k, answer in enumerate(out.answers))


# Parity

@pytest.mark.parametrize("case", CASES)
def test_answers_and_gradients_are_the_official_ones(case, official, xp):
    model = EVAD(**OFFICIAL, **CASES[case], official=True).astype("float64")
    state = {n[5:]: array.astype("float64") for n, array in official.items() if n.startswith("w4/w/")}
    assert model.load_state_dict(state) == ([], [])
    model.to("cpu" if xp is np else "cuda")
    expected = lambda name: official[f"{case}/{name}"]
    x = official["w4/x"].astype("float64").transpose(0, 2, 1, 3, 4)
    x = tt.Tensor(xp.asarray(x), requires_grad=True)
    out = model(x, boxes=xp.asarray(official["w4/boxes"]))
    same(out.logits.numpy(), expected("out"), 1e-10)
    if case == "w4":
        for k, answer in enumerate(out.answers):
            same(answer.numpy(), expected(f"dec{k}_action_logits"), 1e-10)
    loss = summed(out, xp.asarray(official["w4/up"].astype("float64")))
    same(loss.numpy(), expected("loss"), 1e-10)
    loss.backward()
    same(to_numpy(x.grad).transpose(0, 2, 1, 3, 4), expected("g/x"), 1e-6)  # stored as float32
    named, gradients = dict(model.named_parameters()), [n for n in official if n.startswith(f"{case}/g/")]
    for name in gradients:
        if not name.endswith("/x"):
            same(to_numpy(named[name.removeprefix(f"{case}/g/")].grad), official[name], 1e-8)
    assert len(gradients) == {"w4": 8, "w1": 2, "all": 1}[case]
    for stage, block in enumerate((1, 3) if case != "all" else ()):
        found, there = (np.sort(a, axis=1) for a in (to_numpy(out.scores[stage]),
                                                     expected(f"prune{stage}_score")))
        same(found, there, 1e-10)  # theirs are in another order
        kept = to_numpy(out.kept[stage])
        others = np.array([row[(row < 32) | (row >= 48)] for row in kept])
        counted = np.where(others < 32, others, others - 16)  # theirs leave out the key slot's
        assert np.array_equal(counted, np.sort(expected(f"block{block}_idx"), axis=1))


def test_the_parts_of_the_official_decoder(official):
    model = EVAD(**OFFICIAL).astype("float64")
    head, given = model.det_head, official["w4/boxes"].astype("float64")
    same(head.grown(given), official["w4/ext_boxes"], 1e-12)
    full = official["w4/x_full"].astype("float64")[:, :, 0].reshape(2, 12, 16).swapaxes(1, 2)
    found = ops.roi_align(full, official["w4/ext_boxes"] / 4, grid=(4, 4)).data
    same(found.swapaxes(2, 3).reshape(6, 12, 7, 7), official["w4/roi_slot0"], 1e-6)
    same(models.keyframe.positions_on(np, (4, 4, 4), 16, "float64")[16:], np.delete(
        official["w4/pos_embed"][0], np.s_[32:48], axis=0), 1e-6)


def test_our_default_puts_each_token_in_its_place_and_the_official_code_does_not():
    model, other = (shaken(EVAD(**SMALL, official=official)) for official in (False, True))
    out, exchanged = model(clips(), boxes()), other(clips(), boxes())
    same(out.tokens.data, exchanged.tokens.data)
    assert np.abs(out.logits.data - exchanged.logits.data).max() > 0.01 * np.ptp(out.logits.data)
    head, N = model.det_head, model.num_patches
    seen, real = [], head.refilled
    head.refilled = lambda *args: seen.append((args, real(*args))) or seen[-1][1]
    out = model(clips(), boxes())
    head.refilled = real
    (x, places, _), full = seen[0]
    in_clip = np.where(places < 24, places + 48, np.where(places < 72, places - 24, places))
    assert np.array_equal(np.sort(in_clip, axis=1), out.kept[-1])
    for b in range(3):
        for place in range(N):
            rows = np.flatnonzero(places[b] == place)
            expected = x.data[b, rows[0]] if len(rows) else head.mask_token.data[0, 0]
            same(full.data[b, place], expected)


# What is dropped

@pytest.mark.parametrize("rule", RULES)
def test_hidden_equals_dropped(rule):
    """Answers of all blocks, what is left, and the gradients of all weights."""
    model = shaken(EVAD(**SMALL, rule=rule, key_weight=3.0))
    draws = {name: draw.astype("float64") for name, draw in model.noise(3, 0, 0).items()}
    dropped, hidden = (model.train(mode)(clips(), boxes(), hide=hide, **draws)
                       for mode, hide in ((False, False), (True, True)))
    assert [kept.shape[1] for kept in dropped.kept] == [68, 41] == model.counts
    for a, b in zip([*hidden.answers, hidden.tokens], [*dropped.answers, dropped.tokens]):
        same(a.data, b.data)
    for a, b in zip(hidden.kept, dropped.kept):
        assert np.array_equal(a, b)
    up = np.random.default_rng(2).standard_normal(dropped.logits.shape)
    for a, b in zip(*(tt.grad(summed(out, up), model.parameters()) for out in (hidden, dropped))):
        same(a, b)
        assert abs(a).max() > 0


def test_rates_of_one_drop_nothing():
    plain, ones = (shaken(EVAD(**SMALL | change)) for change in (dict(prune_in=(), keep_rates=0.5),
                                                                 dict(keep_rates=1.0, key_weight=4.0)))
    out, same_out = plain(clips(), boxes()), ones(clips(), boxes())
    assert np.array_equal(out.logits.data, same_out.logits.data) and out.kept == []
    assert all(np.array_equal(kept, np.tile(np.arange(96), (3, 1))) for kept in same_out.kept)


@pytest.mark.parametrize("rule", RULES)
def test_the_rules(rule):
    model = shaken(EVAD(**SMALL, rule=rule, key_weight=3.0)).eval()
    out = model(clips(), boxes(), trace=True)
    first, second = out.kept
    assert all(np.isin(later, earlier).all() for later, earlier in zip(second, first))
    key = (first >= 48) & (first < 72)
    assert (key.sum(axis=1) == 24).all() or rule == "global"
    assert np.array_equal(model(clips(), boxes()).logits.data, out.logits.data)
    if rule in ("key", "global"):
        A = out.attention[1].data.mean(axis=1)
        weights = np.where(np.arange(96) < 24, 3.0, 1.0)
        importance = (weights[:, None] * A).mean(axis=1)
        same(out.scores[0], importance[:, 24 if rule == "key" else 0:])
        if rule == "key":
            importance[:, :24] = math.inf
        best = np.sort(np.argsort(-importance, axis=1)[:, :68], axis=1)
        in_clip = np.where(best < 24, best + 48, np.where(best < 72, best - 24, best))
        assert np.array_equal(np.sort(in_clip, axis=1), first)
    if rule == "frames":
        slots = (first[0][:, None] // 24 == np.arange(4)).sum(axis=0)
        assert slots.tolist() == [24, 0, 24, 20] and (first == first[0]).all()
    if rule == "random":
        assert not np.array_equal(first[0], first[1])


def test_frames_are_spread_out():
    order = spread_out((8, 2, 3)).reshape(7, 6)
    slots = [0, 1, 2, 3, 5, 6, 7]  # the key slot is 4
    assert [slots[i] for i in order.min(axis=1).argsort()] == [0, 7, 2, 6, 5, 3, 1]
    assert sorted(order.reshape(-1)) == list(range(42))
    assert len(spread_out((1, 2, 3))) == 0


def test_macs_are_those_of_the_closed_form():
    """At 256 tokens, 8 blocks, and prunings in three of them, the rates .8, .7 and .6 cost 0.73, 0.64 and
    0.56 of the whole encoder."""
    found = {}
    for rate in (1.0, 0.8, 0.7, 0.6):
        model = EVAD(image_size=32, dim=96, depth=8, heads=4, prune_in=(2, 4, 6), keep_rates=rate,
                     num_classes=11)
        clip = np.zeros((1, 8, 3, 32, 32), "float32")
        left, blocks, C, D = 256, 0, 96, 48
        for i in range(8):
            after = max(64, math.ceil(rate * left)) if i in (2, 4, 6) else left
            blocks += 4 * left * C**2 + 2 * left**2 * C + 8 * after * C**2
            left = after
        T = left + 2
        decoder = left * C * D + 2 * (12 * T * D**2 + 2 * T**2 * D) + 2 * 2 * 48 * (D + 11)
        whole = tt.macs(model, clip, boxes=np.array([[[1, 2, 9, 9], [3, 3, 20, 30]]])).total
        assert whole == 256 * 96 * C + blocks + decoder
        found[rate] = blocks
    assert [round(found[rate] / found[1.0], 2) for rate in (0.8, 0.7, 0.6)] == [0.73, 0.64, 0.56]


# Actors

def test_who_is_not_there_changes_nothing_for_the_others():
    model = shaken(EVAD(**SMALL)).eval()
    both, alone = model(clips(), boxes()), model(clips()[2:], boxes()[2:, :1])
    same(both.logits.data[2, 0], alone.logits.data[0, 0])
    swapped = model(clips(), boxes()[:, ::-1])
    same(swapped.logits.data[:, ::-1], both.logits.data)
    moved = boxes()
    moved[0, 1] += 3
    assert np.abs(model(clips(), moved).logits.data[0, 0] - both.logits.data[0, 0]).max() > 1e-6
    without = shaken(EVAD(**SMALL | dict(decoder_depth=0))).eval()  # then actors do not read each other
    same(without(clips(), moved).logits.data[0, 0], without(clips(), boxes()).logits.data[0, 0])
    whole = np.tile([[[0, 0, 24, 16]]], (3, 1, 1))
    same(model(clips()).logits.data, model(clips(), whole).logits.data)


def test_the_loss_by_hand_and_its_gradients():
    model, actions = shaken(EVAD(**SMALL)).train(), np.array([[0, 2], [1, 1], [2, -1]])
    out = model(clips(), boxes())
    loss, parts = model.loss(out, actions, smoothing=0.1)
    each = []
    for answer in out.answers:
        log_p = np.log(np.exp(answer.data) / np.exp(answer.data).sum(axis=2, keepdims=True))
        of = lambda b, p: -(0.9 * log_p[b, p, actions[b, p]] + 0.1 * log_p[b, p].mean())
        each.append(((of(0, 0) + of(0, 1)) / 2 + (of(1, 0) + of(1, 1)) / 2 + of(2, 0)) / 3)
    same(parts["class"].data, each[1])
    same(parts["aux"].data, each[0])
    same(loss.data, sum(each))
    slices = [model.loss(model(clips()[rows], boxes()[rows]), actions[rows], smoothing=0.1)[0].item()
              for rows in (slice(0, 1), slice(1, 2), slice(2, 3))]
    same(np.mean(slices), loss.data)  # so a batch may be cut
    names, parameters = zip(*model.named_parameters())
    gradcheck(lambda *_: model.loss(model(clips(), boxes()), actions)[0], *parameters, names=names,
              max_elements=4)


def test_task_checkpoint_and_training(tmp_path):
    train, test = load_pictures("actor_clips", train=12, test=8, seed=0)
    model = models.create("evad", patch_size=8, dim=8, depth=2, heads=2, num_classes=11, prune_in=(0,),
                          keep_rates=0.6, decoder_dim=8, decoder_heads=2)
    batches = Batches(train.images, train.labels, 6)
    found = fit(model, Actions(model), batches, steps=3, log_every=1, bar=False)
    assert np.isfinite(found["loss"]) and found["aux"] > 0
    comes_back(model, tmp_path)
    answers = np.zeros((8, 2, 11))
    answers[:, :, 4] = 1
    there = test.labels[:, :, 4][test.labels[:, :, 4] >= 0]
    assert Actions.metrics(answers, test.labels) == {"accuracy": (there == 4).mean()}
    assert Actions(model).labels(13)[12, 0].tolist() == [0, 0, 32, 32, 1]


@pytest.mark.parametrize("config, text", [
    (dict(prune_in=(2, 1)), "EVAD: prune_in (2, 1), expected rising numbers of blocks, from 0 to 3"),
    (dict(prune_in=(4,)), "EVAD: prune_in (4,), expected rising numbers of blocks, from 0 to 3"),
    (dict(keep_rates=(0.7,)), "EVAD: keep_rates (0.7,), expected 0 < rate <= 1, one number, or one for each "
                              "of 2 blocks"),
    (dict(keep_rates=1.2), "EVAD: keep_rates 1.2, expected 0 < rate <= 1, one number, or one for each of "
                           "2 blocks"),
    (dict(key_weight=0), "EVAD: key_weight 0, expected a positive number"),
    (dict(rule="best"), "EVAD: rule 'best', expected one of key, random, frames, global"),
    (dict(decoder_depth=-1), "EVAD: decoder_depth -1, expected a whole number that is not negative"),
    (dict(decoder_heads=4), "EVAD: decoder_heads 4 do not divide decoder_dim 6")])
def test_what_it_refuses(config, text):
    with refuses(text):
        EVAD(**SMALL | config)


def test_calls_that_it_refuses():
    model = EVAD(**SMALL)
    for wrong in (boxes()[0], boxes(2), boxes()[:, :, :3], boxes()[:, :0]):
        with refuses(f"EVAD: boxes {wrong.shape} for 3 clips, expected (B, P, 4)"):
            model(clips(), wrong)
    out = model(clips().astype("float32"), boxes())
    with refuses("EVAD: targets (3,) int64, expected whole numbers (3, 2)"):
        model.loss(out, np.zeros(3, "int64"))
    with refuses("EVAD: a teacher, expected none"):
        model.loss(out, np.zeros((3, 2), "int64"), out)
    with refuses("EVAD: hide with official=True, whose order only tokens have that were dropped"):
        EVAD(**SMALL, official=True)(clips(), boxes(), hide=True)
