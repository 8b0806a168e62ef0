"""Erasing and mixing: what happens to pixels and targets, the distributions of the choices, and that they
repeat."""
import numpy as np
import pytest

from tinytoken.data import Batches, mix
from tinytoken.errors import InputError

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)  # leaves pixel values as they are


def host(array):
    return array.get() if hasattr(array, "get") else array


def pictures(xp, count=64, size=16, dtype="float32"):
    """Picture i is i + 1 everywhere: so it shows whose pixel one is."""
    return xp.broadcast_to(xp.arange(1, count + 1, dtype=dtype)[:, None, None, None], (count, 3, size, size))


def rectangle(mask):
    """(height, width) of the ones in a mask (H, W), which must be a full rectangle; (0, 0) without any."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0
    assert mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_erased_rectangles(xp):
    found = []
    for step in range(8):
        images = pictures(xp, 200, 32)
        out = host(mix.erase(images, 0.5, step=step, seed=0))
        gone = out == 0
        assert (gone == gone[:, :1]).all()
        assert (out[~gone] == np.broadcast_to(host(images), out.shape)[~gone]).all()
        found += [rectangle(mask) for mask in gone[:, 0]]
    sides = np.array([sizes for sizes in found if sizes[0]])
    assert abs(len(sides) / len(found) - 0.5) < 0.04  # 3 standard errors of 1,600
    share, ratio = sides.prod(axis=1) / 32**2, sides[:, 0] / sides[:, 1]
    whole = (sides < 32).all(axis=1)  # not cut by the size of the picture
    assert 0.01 < share.min() and share.max() < 0.43 and 0.25 < ratio[whole].min() and ratio[whole].max() < 4
    assert abs(share.mean() - 0.21) < 0.015 and abs(np.log(ratio).mean()) < 0.08


def test_erasing_reaches_every_corner(xp):
    gone = host(mix.erase(pictures(xp, 500, 8), 1.0, step=0, seed=1))[:, 0] == 0
    assert gone.any(axis=0).all() and (~gone).any(axis=0).all()


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_the_table_of_beta_quantiles(alpha):
    u, x = mix.beta_quantiles(alpha)
    draws = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    levels = (np.arange(len(draws)) + 0.5) / len(draws)
    assert np.abs(np.interp(levels, u, x) - draws).max() < 0.01
    # 1.6 / sqrt(n): Kolmogorov and Smirnov at 1 %
    assert np.abs(np.interp(draws, x, u) - levels).max() < 0.004
    assert (u[0], x[0], u[-1], x[-1]) == (0, 0, 1, 1) and (np.diff(u) > 0).all() and (np.diff(x) >= 0).all()


def test_mixup_mixes_pictures_and_targets_alike(xp):
    targets = xp.eye(64, dtype="float32")
    images, mixed = mix.mixup(pictures(xp), targets, 0.8, step=3, seed=0)
    images, mixed = host(images), host(mixed)
    assert images.dtype == mixed.dtype == "float32" and np.ptp(images, axis=(1, 2, 3)).max() == 0
    kept = mixed[np.arange(64), np.arange(64)]
    np.testing.assert_allclose(mixed.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixed[np.arange(64), np.arange(64)[::-1]], 1 - kept, atol=1e-6)
    np.testing.assert_allclose(images[:, 0, 0, 0],
                               kept * np.arange(1, 65) + (1 - kept) * np.arange(64, 0, -1), rtol=1e-5)
    assert 0 <= kept.min() < 0.2 and 0.8 < kept.max() <= 1


def test_cutmix_pastes_a_rectangle_and_counts_its_area(xp):
    shares, cut = [], 0
    for step in range(6):
        images, mixed = mix.cutmix(pictures(xp), xp.eye(64, dtype="float32"), 1.0, step=step, seed=0)
        images, mixed = host(images), host(mixed)
        for i in range(64):
            pasted = images[i, 0] != i + 1
            assert (images[i][:, pasted] == 64 - i).all() and (images[i][:, ~pasted] == i + 1).all()
            height, width = rectangle(pasted)
            cut += height != width
            assert mixed[i, i] == pytest.approx(1 - pasted.mean(), abs=1e-6)
            assert mixed[i].sum() == pytest.approx(1)
            shares.append(pasted.mean())
    # half the area on average, less what lies beyond the border
    assert 0.2 < np.mean(shares) < 0.36 and cut > 50
    assert min(shares) == 0 or min(shares) < 0.01


def test_choices_depend_on_seed_and_step_only(xp):
    draw = lambda **at: host(mix.cutmix(pictures(xp), xp.eye(64, dtype="float32"), 1.0, **at)[0])
    assert (draw(step=1, seed=2) == draw(step=1, seed=2)).all()
    assert (draw(step=1, seed=2) != draw(step=2, seed=2)).any()
    assert (draw(step=1, seed=2) != draw(step=1, seed=3)).any()


def test_both_devices_make_the_same_choices(xp):
    for way in (mix.mixup, mix.cutmix):
        theirs = way(pictures(xp), xp.eye(64, dtype="float32"), 0.7, step=5, seed=9)
        ours = way(pictures(np), np.eye(64, dtype="float32"), 0.7, step=5, seed=9)
        for a, b in zip(theirs, ours):
            np.testing.assert_allclose(host(a), b, rtol=1e-6)


def sets(xp, count=40):
    pixels = np.random.default_rng(0).integers(1, 256, (count, 3, 8, 8), dtype="uint8")
    return xp.asarray(pixels), xp.arange(count) % 4


def test_batches_that_mix(xp):
    batches = Batches(*sets(xp), 20, mixup=0.8, cutmix=1.0, erase=0.25, pad=1, flip=True, classes=5, **PLAIN)
    ways = set()
    for step in range(12):
        images, targets = batches(step)
        assert images.shape == (20, 3, 8, 8) and targets.shape == (20, 5)
        assert targets.dtype == images.dtype == "float32"
        np.testing.assert_allclose(host(targets).sum(axis=1), 1, rtol=1e-6)
        again = batches(step)
        assert (host(again[0]) == host(images)).all() and (host(again[1]) == host(targets)).all()
        # the areas of an 8 x 8 picture are whole numbers of 64ths
        ways.add(bool((host(targets) * 64 % 1 == 0).all()))
    assert ways == {True, False}
    assert Batches(*sets(xp), 20, cutmix=1.0, **PLAIN)(0)[1].shape == (20, 4)
    assert Batches(*sets(xp), 20, erase=1.0, **PLAIN)(0)[1].shape == (20,)


def test_without_mixing_nothing_changes(xp):
    images, labels = Batches(*sets(xp), 20, **PLAIN)(3)
    other, same = Batches(*sets(xp), 20, erase=0.0, mixup=0.0, cutmix=0.0, **PLAIN)(3)
    assert (host(images) == host(other)).all() and (host(labels) == host(same)).all()


@pytest.mark.parametrize("wrong", [{"erase": 1.5}, {"mixup": -1.0}, {"cutmix": -0.1}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(InputError, match="a share from 0 to 1"):
        Batches(*sets(np), 20, **wrong)
