"""The generator against the published answers of its authors, and the properties that the rest relies on."""
import math
import zlib

import numpy as np
import pytest

from tinytoken import random
from tinytoken.errors import InputError

# kat_vectors of Random123 1.14: philox4x32, 10 rounds. Counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),  # the digits of pi
]
DRAWS = {"uniform": random.uniform, "normal": random.normal, "gumbel": random.gumbel}
EULER_GAMMA = 0.5772156649015329


def host(array):
    return array.get() if hasattr(array, "get") else array


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(xp, counter, key, answer):
    words = random.philox4x32([xp.full(2, word, dtype="uint32") for word in counter], key)
    for word, expected in zip(words, answer):
        assert word.dtype == "uint32"
        assert host(word).tolist() == [expected, expected]


def test_a_site_need_not_be_text():
    """Folders may be called what no encoding can write; other sites draw as they did."""
    assert (random.bits(3, site="caf\udce9", step=0, seed=0) != random.bits(3, site="caf", step=0, seed=0)).all()
    word = zlib.crc32(b"caf\xc3\xa9")
    assert random.bits(1, site="café", step=0, seed=0) == random.bits(1, site=word, step=0, seed=0)


def test_bits_are_the_blocks_of_counter_element_site_step(xp):
    seed, site, step = 0x299F31D0A4093822, 7, 9
    drawn = host(random.bits(10, site=site, step=step, seed=seed, xp=xp))
    for block in range(3):
        counter = [np.array([word], "uint32") for word in (block, site, step, 0)]
        words = np.concatenate(random.philox4x32(counter, (0xA4093822, 0x299F31D0)))
        assert drawn[4 * block:4 * block + 4].tolist() == words[:len(drawn) - 4 * block].tolist()


def test_both_array_modules_give_the_same_integers(xp):
    stream = dict(site="a", step=3, seed=11)
    for draw, shape, dtype in ((random.bits, (5, 7), "uint32"), (random.permutation, 99, "int64")):
        drawn = draw(shape, xp=xp, **stream)
        assert drawn.dtype == dtype and (host(drawn) == draw(shape, **stream)).all()


# Means to five standard errors, Kolmogorov-Smirnov at a level of 1e-6 (2.69 / sqrt(n)).
@pytest.mark.parametrize("name, mean, variance, cdf", [
    ("uniform", 0.5, 1 / 12, lambda x: x),
    ("normal", 0.0, 1.0, normal_cdf),
    ("gumbel", EULER_GAMMA, math.pi**2 / 6, lambda x: np.exp(-np.exp(-x))),
])
def test_distributions(xp, name, mean, variance, cdf):
    n = 40_000
    x = np.sort(host(DRAWS[name](n, site="moments", step=0, seed=5, xp=xp)).astype("float64"))
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / n)
    assert abs(x.var() - variance) < 0.05 * variance
    rank = np.arange(n + 1) / n
    expected = cdf(x)
    distance = max(np.abs(expected - rank[1:]).max(), np.abs(expected - rank[:-1]).max())
    assert distance < 2.69 / math.sqrt(n)


def test_neighbouring_draws_are_uncorrelated():
    n = 40_000
    x = random.normal(n, site="lag", step=0, seed=1).astype("float64")
    for other in (x[1:], random.normal(n, site="lag", step=1, seed=1)[1:],
                  random.normal(n, site="lag", step=0, seed=2)[1:]):
        assert abs((x[:-1] * other).mean()) < 5 / math.sqrt(n)


def test_uniform_never_reaches_its_ends(monkeypatch, xp):
    words = xp.asarray(np.array([0, 2**32 - 1, 511, 512], "uint32"))
    monkeypatch.setattr(random, "bits", lambda *args, **kwargs: words)
    for dtype in ("float32", "float64"):
        x = random.uniform(4, site="ends", dtype=dtype, xp=xp)
        assert x.dtype == dtype and 0 < x.min() and x.max() < 1
        assert x.tolist() == [2.0**-24, 1 - 2.0**-24, 2.0**-24, 3 * 2.0**-24]
        assert xp.isfinite(random.gumbel(4, site="ends", dtype=dtype, xp=xp)).all()


@pytest.mark.parametrize("draw", [*DRAWS.values(), random.bits])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(draw):
    whole = draw((50, 7), site="prefix", step=2, seed=3)
    for rows in (1, 3, 49):
        assert (draw((rows, 7), site="prefix", step=2, seed=3) == whole[:rows]).all()
    assert (draw(11, site="prefix", step=2, seed=3) == whole.reshape(-1)[:11]).all()


def test_seed_site_and_step_each_make_another_stream():
    streams = [dict(site=site, step=step, seed=seed) for site in ("a", "b") for step in (0, 1)
               for seed in (0, 1, 2**32, 2**63)]
    drawn = [random.bits(64, **stream) for stream in streams]
    for i, one in enumerate(drawn):
        assert (one == random.bits(64, **streams[i])).all()
        for other in drawn[:i]:
            assert (one == other).mean() < 0.1


def test_a_seed_of_numpy_is_the_same_seed():
    plain, numpys = (random.bits(5, site="a", step=1, seed=seed) for seed in (7, np.int64(7)))
    assert numpys.dtype == "uint32" and (plain == numpys).all()


def test_manual_seed_starts_the_draws_without_a_step_again():
    random.manual_seed(4)
    first, second = random.bits(8, site="s"), random.bits(8, site="s")
    assert (first != second).any()
    assert (first == random.bits(8, site="s", step=0, seed=4)).all()
    assert (second == random.bits(8, site="s", step=1, seed=4)).all()
    random.manual_seed(4)
    assert (random.bits(8, site="s") == first).all()
    random.manual_seed(0)


@pytest.mark.parametrize("draw", DRAWS.values())
def test_dtypes_are_kept(xp, draw):
    single, double = (draw((4, 5), site="d", step=0, seed=0, xp=xp, dtype=dtype)
                      for dtype in ("float32", "float64"))
    assert single.dtype == "float32" and double.dtype == "float64" and single.shape == (4, 5)
    assert host(abs(single - double)).max() < 1e-5


def test_integers_cover_their_range_evenly(xp):
    drawn = host(random.integers(60_000, 6, site="dice", step=0, seed=0, xp=xp))
    assert drawn.dtype == "int64" and drawn.min() == 0 and drawn.max() == 5
    assert (abs(np.bincount(drawn) - 10_000) < 5 * math.sqrt(10_000 * 5 / 6)).all()
    same = dict(site="dice", step=0, seed=0)
    assert random.integers(3, 2**32, **same).tolist() == random.bits(3, **same).tolist()


def test_permutation_is_one_and_differs_by_step(xp):
    orders = [host(random.permutation(1000, site="order", step=step, seed=0, xp=xp)) for step in (0, 1)]
    for order in orders:
        assert order.dtype == "int64" and sorted(order.tolist()) == list(range(1000))
    assert (orders[0] == orders[1]).mean() < 0.02
    places = np.mean([random.permutation(20, site="order", step=step, seed=0) for step in range(600)], axis=0)
    assert (abs(places - 9.5) < 5 * math.sqrt(399 / 12 / 600)).all()


@pytest.mark.parametrize("call, message", [
    (lambda: random.manual_seed(-1), "random: seed -1, expected 0 <= int < 2**64"),
    (lambda: random.manual_seed("now"), "random: seed 'now', expected 0 <= int < 2**64"),
    (lambda: random.bits(3, site="s", step=0, seed=2**64),
     f"random: seed {2**64}, expected 0 <= int < 2**64"),
    (lambda: random.bits(3, site="s", step=-1), "random: site .* and step -1 must fit in 32 bits"),
    (lambda: random.bits(3, site=2**32, step=0), "random: site 4294967296 and step 0 must fit in 32 bits"),
    (lambda: random.integers(3, 0, site="s", step=0), "random.integers: high is 0, expected 1 to 2**32"),
    (lambda: random.integers(3, 2**32 + 1, site="s", step=0),
     "random.integers: high is 4294967297, expected 1 to 2**32"),
])
def test_errors(call, message):
    message = message.replace("**", r"\*\*")
    with pytest.raises(InputError, match=f"^{message}$"):
        call()
