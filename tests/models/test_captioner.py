"""The captioner: its equations, that no word sees a later one, that searching with a cache is searching."""
import math

import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same, shaken, softmax
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.models import Captioner, captioner

WORDS = ("<pad>", "<start>", "<end>", "a", "red", "disc", "star")
V, E, D, LENGTH = len(WORDS), 6, 8, 5
CAPTIONS = np.array([[1, 3, 4, 5, 2], [1, 6, 2, 0, 0], [1, 3, 6, 2, 0]])


def model(seed=0, depth=2):
    return shaken(Captioner(E, WORDS, D, depth, heads=2, length=LENGTH), seed)


def memory(batch=3, T=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, T, E))


def by_hand(weights, memory, words, depth=2, heads=2):
    """Logits (t, V) of one image's words, from the state dict: one head and one word at a time."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attend(q, k, v, seen):
        out, d = np.zeros_like(q), D // heads
        for word, head in np.ndindex(len(q), heads):
            part, keys = slice(head * d, (head + 1) * d), slice(0, seen(word))
            out[word, part] = softmax(q[word, part] @ k[keys, part].T / math.sqrt(d)) @ v[keys, part]
        return out
    x = weights["word_embed"][words] + weights["pos_embed"][:len(words)]
    for block in (f"blocks.{i}" for i in range(depth)):
        q, k, v = np.split(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, axis=1)
        x = x + linear(attend(q, k, v, lambda word: word + 1), f"{block}.attn.proj")
        q, cross = linear(norm(x, f"{block}.norm2"), f"{block}.cross_attn.q"), f"{block}.cross_attn"
        k, v = np.split(linear(memory, f"{cross}.kv"), 2, axis=1)
        x = x + linear(attend(q, k, v, lambda word: len(memory)), f"{cross}.proj")
        hidden = linear(norm(x, f"{block}.norm3"), f"{block}.mlp.fc1")
        gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(gelu, f"{block}.mlp.fc2")
    return linear(norm(x, "norm"), "head")


def test_the_decoder_is_its_equations(xp):
    decoder, read = model().to("cpu" if xp is np else "cuda"), memory()
    logits = to_numpy(decoder(xp.asarray(read), xp.asarray(CAPTIONS[:, :-1])).logits.data)
    assert logits.shape == (3, 4, V)
    for i, words in enumerate(CAPTIONS):
        same(logits[i], by_hand(decoder.state_dict(), read[i], words[:-1]), 1e-10)


def changes_no_earlier_logit(decoder):
    before = decoder(memory(), CAPTIONS).logits.data
    for place in range(1, LENGTH):
        words = CAPTIONS.copy()
        words[:, place] = (words[:, place] + 1) % V
        after = decoder(memory(), words).logits.data
        assert np.array_equal(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).any(axis=2).all()


def test_changing_a_later_word_changes_no_earlier_logit(monkeypatch):
    decoder = model()
    changes_no_earlier_logit(decoder)
    real = captioner.causal_attention
    everything = lambda q, k, v: tt.ops.attention(q, k, v)
    one_more = lambda q, k, v: real(tt.ops.concat(q[:, :, 1:], q[:, :, -1:], axis=2), k, v)
    for wrong in (everything, one_more):
        monkeypatch.setattr(captioner, "causal_attention", wrong)
        with pytest.raises(AssertionError):
            changes_no_earlier_logit(decoder)


def test_gradients_by_random_directions():
    decoder, read = model(), memory()
    names, parameters = zip(*decoder.named_parameters())
    paths = np.random.default_rng(1).uniform(0.5, 1.5, (3, 2, 3))
    words = CAPTIONS[:, :-1]
    report = gradcheck(lambda *_: decoder(read, words, paths=paths).logits, *parameters, names=names,
                       max_elements=60)
    assert report.directions == 2
    gradcheck(lambda read, *_: decoder.loss(decoder(read, words), CAPTIONS, smoothing=0.1)[0], read,
              *parameters, names=("memory", *names), max_elements=60)


def test_the_loss_is_a_mean_over_words_then_captions():
    decoder = model()
    out = decoder(memory(), CAPTIONS[:, :-1])
    log_q = np.log(softmax(out.logits.data))
    for smoothing in (0.0, 0.2):
        of_captions = []
        for i, words in enumerate(CAPTIONS):
            next_words = [(t, word) for t, word in enumerate(words[1:]) if word]
            of_captions.append(np.mean([-(1 - smoothing) * log_q[i, t, word] - smoothing * log_q[i, t].mean()
                                        for t, word in next_words]))
        loss, parts = decoder.loss(out, CAPTIONS, smoothing=smoothing)
        assert loss.item() == pytest.approx(np.mean(of_captions), rel=1e-12) and parts == {"words": loss}


# Searching

def searched(decoder, read, beam):
    """Beam search of one image by full passes, without a cache, with lists -> words."""
    beams = [(0.0, [1])]
    for _ in range(LENGTH - 1):
        found = []
        for score, words in beams:
            if words[-1] in (0, 2):
                found.append((score, [*words, 0]))
                continue
            logits = decoder(read[None], np.array([words])).logits.data[0, -1]
            found += [(score + value, [*words, word]) for word, value in enumerate(np.log(softmax(logits)))]
        beams = sorted(found, key=lambda one: -one[0])[:beam]
    return beams[0][1][1:]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_the_search_with_a_cache_is_the_search_without(seed, beam, xp):
    decoder, read = model(seed), 2 * memory(batch=6, seed=seed)
    decoder.head.bias.data[...] = 0  # so that captions differ
    found = to_numpy(decoder.to("cpu" if xp is np else "cuda").generate(xp.asarray(read), beam))
    decoder.to("cpu")
    assert found.shape == (6, LENGTH - 1) and found.dtype.kind == "i"
    assert found.tolist() == [searched(decoder, image, beam) for image in read]
    assert len({tuple(words) for words in found.tolist()}) > 1


def test_a_beam_of_1_is_greedy_and_a_wider_one_finds_likelier_captions():
    better, decoder, read = 0, model(3), 2 * memory(batch=40)
    words = np.ones((40, 1), int)
    for _ in range(LENGTH - 1):  # without a cache
        likeliest = decoder(read, words).logits.data[:, -1].argmax(axis=1)
        over = np.isin(words[:, -1], (0, 2))
        words = np.concatenate([words, np.where(over, 0, likeliest)[:, None]], axis=1)
    assert np.array_equal(decoder.generate(read, 1), words[:, 1:])

    def scores(found):
        log_q = np.log(softmax(decoder(read, np.insert(found, 0, 1, axis=1)[:, :-1]).logits.data))
        alive = np.cumsum(np.isin(np.insert(found, 0, 1, axis=1)[:, :-1], (0, 2)), axis=1) == 0
        return (np.take_along_axis(log_q, found[:, :, None], axis=2)[:, :, 0] * alive).sum(axis=1)
    greedy, wide = scores(words[:, 1:]), scores(decoder.generate(read, V))
    better = (wide > greedy + 1e-9).sum()
    assert better > 0 and (wide < greedy - 1e-9).sum() < better


def test_words_in_any_portions_have_the_same_logits():
    decoder, read = model(), memory()
    whole = decoder(read, CAPTIONS).logits.data
    for cuts in ((1, 2, 3, 4), (2,), (1, 4)):
        cache = decoder.start(read)
        parts = [decoder.step(cache, words).logits.data for words in np.split(CAPTIONS, cuts, axis=1)]
        same(np.concatenate(parts, axis=1), whole)
    with refuses("Captioner: words (3, 1) int64 after 5, expected (B, t) integers, at most 5 in all"):
        decoder.step(cache, CAPTIONS[:, :1])


def test_the_trace_is_how_words_read_the_memory():
    out = model()(memory(), CAPTIONS, trace=True)
    assert [A.shape for A in out.attention] == [(3, 2, 5, 4)] * 2
    for A in out.attention:
        same(A.data.sum(axis=-1), 1)
    assert model()(memory(), CAPTIONS).attention == []


def test_what_cannot_be():
    with refuses("Captioner: a vocabulary ('a', 'red'), expected <pad>, <start>, <end> and other words, "
                 "each once"):
        Captioner(E, ("a", "red"), D)
    with refuses("Captioner: memory (3, 4, 6), expected (B, T, 8)"):
        Captioner(8, WORDS, D, heads=2)(memory(), CAPTIONS)
    with refuses("Captioner: beam 8, expected 1 to 7, the words of the vocabulary"):
        model().generate(memory(), 8)
    with refuses("Captioner: encoder_dim 6, dim 8, depth 0, heads 3, length 16: expected at least 1, a "
                 "length of at least 2"):
        Captioner(E, WORDS, D, 0)
    with refuses("Attention: heads 3 do not divide dim 8"):
        Captioner(E, WORDS, D)
