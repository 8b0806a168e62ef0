"""VLTP: nothing dropped is the plain ViT, masked is gathered; the choice, losses and cost by hand."""

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, refuses, same, shaken
from tinytoken import models
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures
from tinytoken.models import VLTP
from tinytoken.models.guided import GuidedTokens
from tinytoken.tasks.refer import Refer
from tinytoken.train import fit

# 24 patches: 12 go on before block 1, 6 before block 3; all before block 4
SMALL = dict(image_size=(16, 24), patch_size=4, dim=8, depth=5, heads=2, num_classes=9, prune_before=(1, 3),
             keep_ratios=(0.5, 0.25), width=8)
EVERY = ("sentence", "constant", "class", "random")
rng = np.random.default_rng(0)
PICTURES = rng.standard_normal((3, 3, 16, 24)) * 2
WORDS = np.array([[4, 5, 0, 0, 0], [6, 1, 3, 4, 8], [7, 4, 0, 0, 0]])
MASKS = rng.integers(0, 2, (3, 16, 24))


def made(**config):
    return shaken(VLTP(**SMALL | config))


# What goes on

@pytest.mark.parametrize("choose", EVERY)
def test_with_nothing_dropped_it_is_the_unpruned_model(choose):
    """To the bit, in all modes."""
    model = made(choose=choose)
    x = model.start(PICTURES).x
    for block in model.blocks:
        x = block(x)
    plain = model.mask_decoder(model.norm(x)[:, model.extra:], model.text(WORDS)).data
    for training, trace in ((True, False), (False, False), (False, True)):
        out = model.train(training)(PICTURES, WORDS, ratios=(1, 1.0), trace=trace)
        assert np.array_equal(out.logits.data, plain) and all(kept.all() for kept in out.kept)
        asked = choose in ("sentence", "constant") and (training or trace)
        assert len(out.scores) == (2 if asked else 0)  # at inference nobody is asked
    assert not np.allclose(model(PICTURES, WORDS).logits.data, plain)


@pytest.mark.parametrize("choose", EVERY)
@pytest.mark.parametrize("reactivate", [4, 5])
def test_masked_equals_gathered(choose, reactivate):
    """Logits, scores, and the gradients of all weights."""
    model = made(choose=choose, reactivate=reactivate)
    masked, gathered = (model.train(training)(PICTURES, WORDS) for training in (True, False))
    upstream, of_scores = rng.standard_normal((3, 16, 24)), rng.standard_normal((3, 24))
    for a, b in zip(masked.kept, gathered.kept):
        assert np.array_equal(a, b)
    for a, b in zip([masked.logits, *masked.scores], [gathered.logits, *gathered.scores]):
        same(a.data, b.data)
    sums = ((out.logits * upstream).sum() + sum((s * of_scores).sum() for s in out.scores)
            for out in (masked, gathered))
    names, params = zip(*model.named_parameters())
    for name, a, b in zip(names, *(tt.grad(each, params) for each in sums)):
        same(a, b)
        assert abs(a).max() > 0, name


def test_the_best_go_on_and_what_was_dropped_stays_so():
    model = made(keep_ratios=(0.4, 0.35))  # 9.6 and 8.4 of 24, rounded up
    out = model.eval()(PICTURES, WORDS, trace=True)
    assert [kept.sum(axis=1).tolist() for kept in out.kept] == [[10] * 3, [9] * 3]
    for b in range(3):
        first = np.argsort(-out.scores[0].data[b])[:10]
        assert set(first) == set(np.flatnonzero(out.kept[0][b]))
        second = sorted(first, key=lambda i: -out.scores[1].data[b, i])[:9]
        assert set(second) == set(np.flatnonzero(out.kept[1][b]))
    swapped = model(PICTURES, WORDS[[1, 2, 0]])  # other sentences, other scores of every picture
    assert (abs(out.scores[0].data - swapped.scores[0].data).max(axis=1) > 1e-3).all()
    assert [title for title, _ in model.show(out)] == [f"VLTP: what goes on into block {i}" for i in (1, 3)]


def test_a_picture_may_have_its_own_shares():
    model, ratios = made().train(), np.array([[0.5, 0.25], [1, 1], [0.75, 0.1]], "float32")
    out = model(PICTURES, WORDS, ratios=ratios)
    assert [kept.sum(axis=1).tolist() for kept in out.kept] == [[12, 24, 18], [6, 24, 3]]
    for b in range(3):
        alone = model(PICTURES[b:b + 1], WORDS[b:b + 1], ratios=tuple(ratios[b].tolist()))
        same(out.logits.data[b], alone.logits.data[0])
    same(model.eval()(PICTURES, WORDS, ratios=ratios).logits.data, out.logits.data)


@pytest.mark.parametrize("reactivate", [4, 5])
def test_what_waits_is_unchanged_until_all_come_back(reactivate):
    model = made(reactivate=reactivate)
    state = model.start(PICTURES, state=GuidedTokens, guide=model.text(WORDS), shares=(0.5, 0.25))
    for i in range(5):
        model.before_block(i, state)
        before, waits = state.x.data, None if state.keep is None else state.keep == 0
        model.run_block(i, state)
        changed = (state.x.data != before).any(axis=2)
        assert (changed == (True if waits is None else ~waits)).all()
        assert (waits is None) == (i == 0 or i >= reactivate)


def test_masks_that_are_forced():
    model = made()
    keep = [rng.random((3, 24)) < share for share in (0.6, 0.5)]
    masked, gathered = (model.train(training)(PICTURES, WORDS, keep=keep) for training in (True, False))
    same(masked.logits.data, gathered.logits.data)
    assert np.array_equal(masked.kept[1], keep[0] & keep[1])


def test_class_attention_by_hand():
    model = made(choose="class", prune_before=(1,), keep_ratios=(0.5,))
    out = model.eval()(PICTURES, WORDS)
    state = model.start(PICTURES)
    x = model.blocks[0](state.x)
    seen = []
    model.blocks[1](x, attention=seen)
    best = np.argsort(-seen[0].data[:, :, 0, 1:].mean(axis=1), axis=1)[:, :12]
    assert [set(row) for row in best] == [set(np.flatnonzero(kept)) for kept in out.kept[0]]


def test_random_tokens_are_drawn():
    model = made(choose="random").train()
    draw = model.noise(3, 2, 1)["draw"]
    assert draw.shape == (3, 2, 24)
    out, other = model(PICTURES, WORDS, draw=draw), model(PICTURES, WORDS)
    best = np.argsort(-draw[:, 0])[:, :12]
    assert [set(row) for row in best] == [set(np.flatnonzero(kept)) for kept in out.kept[0]]
    assert (out.kept[0] != other.kept[0]).any() and np.array_equal(model(PICTURES).kept[0], other.kept[0])


# Sentences

def test_padding_says_nothing_and_an_empty_sentence_is_one():
    model = made()
    model.text.word_embed.data[0] += 5  # what <pad> is, counts nowhere
    g = model.text(WORDS).data
    model.text.word_embed.data[0] -= 9
    same(model.text(WORDS).data, g)
    assert g.shape == (3, 1, 8) and (abs(g[0] - g[2]) > 1e-3).any()
    empty = model(PICTURES, np.zeros((3, 5), "uint8"))
    assert np.array_equal(model(PICTURES).logits.data, empty.logits.data)
    first, _, second = model.text.text_hidden_fcs[0].layers
    same(model.text(np.zeros((1, 5), int)).data[0, 0],
         np.maximum(first.bias.data, 0) @ second.weight.data.T + second.bias.data)


def test_a_constant_in_the_sentences_place():
    """It chooses, and knows no sentence; the mask does."""
    model = made(choose="constant").eval()
    one, other = (model(PICTURES, words) for words in (WORDS, WORDS[[1, 2, 0]]))
    assert np.array_equal(one.kept[0], other.kept[0]) and (one.logits.data != other.logits.data).any()


# The decoders

def test_names_are_the_official_ones():
    """Those of the prune decoder at HanningChen/VLTP 79d22b6, and of SAM's transformer in it."""
    attention = [f"{part}_proj.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    kinds = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    block = {f"{name}.{each}" for name in kinds for each in attention}
    block |= {f"{name}.{kind}" for name in ("norm1", "norm2", "norm3", "norm4", "mlp.lin1", "mlp.lin2")
              for kind in ("weight", "bias")}
    expected = {f"transformer.layers.{i}.{name}" for i in range(2) for name in block}
    expected |= {f"transformer.final_attn_token_to_image.{each}" for each in attention}
    expected |= {f"{name}.{kind}" for name in ("transformer.norm_final_attn", "input_neck.1", "input_neck.3")
                 for kind in ("weight", "bias")}
    expected |= {"input_neck.0.weight", "input_neck.2.weight", "mask_tokens.weight", "pe"}
    shapes = {name: p.shape for name, p in made().prune_head.named_parameters()}
    assert shapes.keys() == expected
    assert shapes["input_neck.0.weight"] == (8, 8, 1, 1) and shapes["input_neck.2.weight"] == (8, 8, 3, 3)
    assert shapes["mask_tokens.weight"] == (1, 8) and shapes["transformer.layers.0.mlp.lin1.weight"] == (64, 8)
    assert shapes["transformer.layers.1.cross_attn_token_to_image.q_proj.weight"] == (4, 8)
    text = {name for name, _ in made().text.named_parameters()}
    assert {"text_hidden_fcs.0.0.weight", "text_hidden_fcs.0.2.weight"} < text


def decoder_macs(N, C, D, t=2):
    """Neck, two blocks (SA, token to image, MLP, image to token), the last attention, the product."""
    half = D // 2
    attention = lambda q, k, inner: 2 * q * D * inner + 2 * k * D * inner + 2 * q * k * inner
    block = attention(t, t, D) + attention(t, N, half) + 2 * t * D * 8 * D + attention(N, t, half)
    return N * C * D + 9 * N * D * D + 2 * block + attention(t, N, half)


@pytest.mark.parametrize("choose", EVERY)
def test_macs_are_the_closed_form_of_what_goes_on(choose):
    N, C, D, L, first = 64, 96, 48, 5, choose == "class"
    model = models.create("vltp", heads=4, choose=choose)
    images, block = np.zeros((2, 3, 32, 32), "float32"), lambda n: 12 * n * C ** 2 + 2 * n ** 2 * C
    T, fixed = N + first, 48 * N * C
    text = 12 * L * D ** 2 + 2 * L ** 2 * D + 2 * D ** 2
    pixels = N * D * 16 * 8 + D * D + D * 8 + 32 * 32 * 8
    others = {"random": 0, "class": 3 * T * C ** 2 + 2 * T * C}
    scores = others.get(choose, decoder_macs(N, C, D) + N * D)
    blocks = 3 * block(T) + 3 * block(32 + first) + 2 * block(16 + first)
    assert tt.macs(model, images).total == fixed + text + pixels + decoder_macs(N, C, D) + blocks + 2 * scores
    unpruned = tt.macs(model, images, ratios=(1, 1)).total
    assert unpruned == fixed + text + pixels + decoder_macs(N, C, D) + 8 * block(T)
    if choose == "sentence":  # 0.69 of the blocks, two prune decoders of 2.5 M included
        assert (blocks + 2 * scores) / (8 * block(N)) == pytest.approx(0.69, abs=0.005)
        assert scores == pytest.approx(2.5e6, rel=0.05)


# Training

def test_losses_by_hand():
    model = made().train()
    out = model(PICTURES, WORDS)
    loss, parts = model.loss(out, MASKS, smoothing=0.1)
    p, t = 1 / (1 + np.exp(-out.logits.data)), MASKS * 0.9 + 0.05
    entropy = lambda p, t: -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = (1 - (2 * (p * MASKS).sum((1, 2)) + 1) / (p.sum((1, 2)) + MASKS.sum((1, 2)) + 1)).mean()
    there = MASKS.reshape(3, 4, 4, 6, 4).mean(axis=(2, 4)).reshape(3, 24) > 0.1
    scores = np.mean([entropy(1 / (1 + np.exp(-s.data)), there) for s in out.scores])
    for name, value in (("class", entropy(p, t)), ("dice", dice), ("scores", scores)):
        assert parts[name].item() == pytest.approx(value, rel=1e-9)
    assert loss.item() == pytest.approx(2 * entropy(p, t) + 0.5 * dice + scores)
    assert model.loss(out, MASKS, weights=(0, 0, 3))[0].item() == pytest.approx(3 * scores)


def test_gradients():
    """Of all weights, by random directions and elements, with random upstream gradients of the pixels and
    scores, at forced choices: these have no slope."""
    model = made(choose="constant").train()
    kept = [k.astype("float64") for k in model(PICTURES, WORDS).kept]
    paths = rng.uniform(0.5, 2, (3, 5, 2))
    call = lambda: model(PICTURES, WORDS, keep=kept, paths=paths)
    names, parameters = zip(*model.named_parameters())
    gradcheck(lambda *_: ((out := call()).logits, *out.scores), *parameters, names=names, max_elements=20)
    gradcheck(lambda *_: model.loss(call(), MASKS)[0], *parameters, names=names, max_elements=10)


def test_configuration_checkpoint_and_training(tmp_path):
    train = load_pictures("referring", train=24, test=8, seed=0)[0]
    for choose in EVERY:
        model = models.create("vltp", dim=8, depth=3, heads=2, prune_before=(0, 1), choose=choose)
        assert model.config.reactivate == 2 and model.config.width == 4
        batches = Batches(train.images, train.labels, 8)
        found = fit(model, Refer(model), batches, steps=3, log_every=1, bar=False)
        assert np.isfinite(found["loss"]) and ("scores" in found) == (choose in ("sentence", "constant"))
        comes_back(model, tmp_path)


RISE = "VLTP: keep_ratios (0.2, 0.5) rise; they are of the original number of tokens, so they cannot"


@pytest.mark.parametrize("config, text", [
    (dict(keep_ratios=(0.2, 0.5)), RISE),
    (dict(keep_ratios=(1.5, 0.5)), "VLTP: keep_ratios (1.5, 0.5), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(0.5, 0)), "VLTP: keep_ratios (0.5, 0), expected 0 < ratio <= 1"),
    (dict(keep_ratios=(0.5,)), "VLTP: 2 places to prune and 1 keep ratios"),
    (dict(prune_before=(3, 5)), "VLTP: prune_before (3, 5), expected rising block numbers from 0 to 4"),
    (dict(reactivate=3), "VLTP: reactivate 3, expected a block from 4 to 5"),
    (dict(width=6), "VLTP: width 6, expected a multiple of 4, twice the heads"),
    (dict(length=0), "VLTP: length 0, expected a positive whole number"),
    (dict(choose="best"), "VLTP: choose 'best', expected one of sentence, constant, class, random")])
def test_what_it_refuses(config, text):
    with refuses(text):
        VLTP(**SMALL | config)


@pytest.mark.parametrize("call, text", [
    (dict(words=WORDS + 1), "VLTP: words from 1 to 9, expected 0 to 8"),
    (dict(words=WORDS - 1), "VLTP: words from -1 to 7, expected 0 to 8"),
    (dict(words=WORDS[:, :4]), "VLTP: words (3, 4) int64, expected (3, 5) integers"),
    (dict(words=WORDS[:2]), "VLTP: words (2, 5) int64, expected (3, 5) integers"),
    (dict(words=WORDS / 2), "VLTP: words (3, 5) float64, expected (3, 5) integers"),
    (dict(ratios=(0.2, 0.5)), RISE),
    (dict(ratios=(0.5, -1)), "VLTP: keep_ratios (0.5, -1), expected 0 < ratio <= 1"),
    (dict(ratios=(0.5,)), "VLTP: ratios (0.5,), expected one for each of 2 places"),
    (dict(ratios=0.5), "VLTP: ratios 0.5, expected one for each of 2 places"),
    (dict(ratios=np.ones((3, 1))), "VLTP: ratios (3, 1), expected (3, 2)"),
    (dict(keep=[np.ones((3, 24))]), "VLTP: 1 masks for 2 places"),
    (dict(keep=[np.ones((3, 23))] * 2), "VLTP: keep (3, 23), expected (B, N) = (3, 24)")])
def test_calls_that_it_refuses(call, text):
    with refuses(text):
        made()(PICTURES, **{"words": WORDS} | call)


def test_losses_that_it_refuses():
    model = made()
    out = model(PICTURES, WORDS)
    with refuses("VLTP: a teacher, expected none"):
        model.loss(out, MASKS, out)
    with refuses("VLTP: targets (3, 16) for logits (3, 16, 24), expected one shape"):
        model.loss(out, MASKS[:, :, 0])
