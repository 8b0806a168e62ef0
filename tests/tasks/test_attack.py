"""Pictures changed within a bound: each method by its formula, on an objective whose gradient is known."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses, same
from tinytoken.tasks.attack import METHODS, SMALLEST, blur, moved, perturb

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 1, (3, 2, 8, 8))
W = RNG.standard_normal((3, 2, 8, 8))
CURVED = lambda x: ((x * W).sum() + ((x - 0.5) ** 2 * W[::-1]).sum())
SLOPE = lambda x: W + 2 * (x - 0.5) * W[::-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [0, 4 / 255, 16 / 255])
def test_what_changes_stays_in_the_bound_and_is_a_picture(method, eps):
    found = perturb(CURVED, IMAGES.astype("float32"), eps, method)
    assert found.dtype == "float32" and 0 <= found.min() and found.max() <= 1
    assert abs(found - IMAGES).max() <= eps + 1e-6
    assert (found != IMAGES.astype("float32")).mean() > 0.9 or not eps
    if method != "noise" and eps:
        assert CURVED(tt.Tensor(found)).data > CURVED(tt.Tensor(IMAGES)).data + 0.1


def test_each_by_its_formula():
    eps, inside = 0.1, IMAGES * 0.5 + 0.25  # far from 0 and 1
    same(perturb(CURVED, inside, eps, "fgsm"), inside + eps * np.sign(SLOPE(inside)))
    x, total, pgd = inside, 0, inside
    for _ in range(5):
        pgd = np.clip(pgd + 0.04 * np.sign(SLOPE(pgd)), inside - eps, inside + eps)
        g = SLOPE(x)
        total = 0.9 * total + g / abs(g).mean(axis=(1, 2, 3), keepdims=True)
        x = x + eps / 5 * np.sign(total)
    same(perturb(CURVED, inside, eps, "pgd", steps=5, pgd_step=0.04), pgd)
    same(perturb(CURVED, inside, eps, "mifgsm", steps=5, decay=0.9), x)
    found = perturb(CURVED, inside, eps, "noise", seed=1)
    assert set(np.unique(np.round((found - inside) / eps, 6))) == {-1, 1}
    assert 0.4 < (found > inside).mean() < 0.6
    assert not np.array_equal(found, perturb(CURVED, inside, eps, "noise", seed=2))


def test_blurred_gradients():
    K = blur(8)
    weights = np.exp(-0.5 * (1.5 * np.arange(-2, 3)) ** 2)
    same(K[4, 2:7], weights / weights.sum())
    assert K[4, 1] == K[4, 7] == 0 and K[0].sum() < 1
    wide = np.pad(W, ((0, 0), (0, 0), (2, 2), (2, 2)))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    smooth = sum(kernel[r, c] * wide[:, :, r:r + 8, c:c + 8] for r in range(5) for c in range(5))
    inside = IMAGES * 0.5 + 0.25
    found = perturb(lambda x: (x * W).sum(), inside, 0.1, "ti", steps=1)
    same(found, inside + 0.1 * np.sign(smooth))


def test_moved_pictures_are_smaller_and_in_place():
    images = np.ones((1, 1, 32, 32))
    seen = [moved(tt.Tensor(images), step, 0).data[0, 0] for step in range(60)]
    whole = [picture.all() for picture in seen]
    assert 15 < sum(whole) < 45
    corners = set()
    for picture in (picture for picture, all_of in zip(seen, whole) if not all_of):
        rows, columns = (np.flatnonzero(picture.any(axis=axis)) for axis in (1, 0))
        assert len(rows) == len(columns) >= 32 * SMALLEST and len(rows) < 32 or len(rows) == 32
        same(picture[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], np.ones((len(rows), len(columns))))
        corners.add((rows[0], columns[0]))
    assert len(corners) > 4
    tt.gradcheck(lambda x: moved(x, next(s for s, w in enumerate(whole) if not w), 0), IMAGES[:1, :1])


def test_what_it_refuses():
    with refuses("perturb: method 'best', expected one of fgsm, pgd, mifgsm, dim, ti, noise"):
        perturb(CURVED, IMAGES, 0.1, "best")
    with refuses("perturb: eps -0.1, steps 10: expected eps >= 0 and at least one step"):
        perturb(CURVED, IMAGES, -0.1)
    with pytest.raises(tt.InputError, match=r"^perturb: images .*, expected \(B, C, H, W\) floats from 0"):
        perturb(CURVED, IMAGES * 255, 0.1)
    with pytest.raises(tt.InputError, match="uint8"):
        perturb(CURVED, (IMAGES * 255).astype("uint8"), 0.1)
