"""Corruptions: what a draw depends on, each one against its definition, and two of them against Pillow."""
import io
import math

import numpy as np
import pytest

from tinytoken import random
from tinytoken.data import CORRUPTIONS, corrupt, corruptions, make_scenes
from tinytoken.errors import InputError

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
STRENGTHS = (1, 2, 3, 4, 5)


def at_strengths(setting, *values):
    """Each strength with its setting, written down here again: a change of either is a change of the
    results."""
    return pytest.mark.parametrize(f"strength, {setting}", list(zip(STRENGTHS, values)))


@pytest.fixture(scope="module")
def images():
    return make_scenes(80, seed=7).images  # to be looked at only


def flat(level, count=1, side=32):
    return np.full((count, 3, side, side), level, "uint8")


def draws(name, count, seed=0):
    return lambda kind, *shape: corruptions._draw(name, seed, range(count), kind, *shape)


def test_the_names():
    assert tuple(CORRUPTIONS) == ("gaussian_noise", "shot_noise", "motion_blur", "defocus_blur",
                                  "contrast", "brightness",
                                  "haze", "pixelate", "jpeg")
    assert all(len(settings) == 5 and function.__doc__ for function, settings in CORRUPTIONS.values())


@every_corruption
def test_shape_dtype_and_the_input_is_left_alone(name):
    for shape in ((3, 3, 32, 32), (2, 3, 8, 8), (1, 3, 9, 20), (2, 3, 45, 31)):
        images = random.integers(shape, 256, site="test", step=0, seed=1).astype("uint8")
        before = images.copy()
        for strength in (1, 5):
            out = corrupt(images, name, strength)
            assert out.shape == shape and out.dtype == "uint8" and (out != images).any()
            assert (images == before).all() and not np.shares_memory(out, images)


@every_corruption
@pytest.mark.parametrize("strength", (1, 4))
def test_a_slice_is_corrupted_as_in_the_whole(images, name, strength):
    """And so the same bits twice, alone or in company, wherever the chunks begin."""
    whole = corrupt(images, name, strength, seed=3, first=10)
    for start, stop in ((0, 80), (0, 1), (1, 70), (63, 65), (79, 80)):
        assert (corrupt(images[start:stop], name, strength, seed=3, first=10 + start)
                == whole[start:stop]).all()
    other = images.copy()
    other[5] = 255 - other[5]
    changed = (corrupt(other, name, strength, seed=3, first=10) != whole).any(axis=(1, 2, 3))
    assert changed.nonzero()[0].tolist() == [5]


@every_corruption
def test_chunks_change_nothing(images, name, monkeypatch):
    whole = corrupt(images[:50], name, 3)
    monkeypatch.setattr(corruptions, "CHUNK", 7)
    assert (corrupt(images[:50], name, 3) == whole).all()


@pytest.mark.parametrize("name", ("gaussian_noise", "shot_noise", "motion_blur", "haze"))
def test_seed_and_number_decide_the_draw(images, name):
    """Equal pictures, with other seeds or other numbers, are corrupted in other ways."""
    same = np.repeat(images[:1], 6, axis=0)
    one = corrupt(same, name, 3, seed=0)
    results = [*one, *corrupt(same, name, 3, seed=1), *corrupt(same, name, 3, seed=2**40),
               *corrupt(same, name, 3, first=6)]
    distinct = {picture.tobytes() for picture in results}
    # two angles may be nearly the same
    assert len(results) == 24 and len(distinct) >= (22 if name == "motion_blur" else 24)


@every_corruption
def test_strength_is_distance_from_the_clean_picture(images, name):
    error = [np.square(corrupt(images, name, strength) - images.astype(float)).mean()
             for strength in STRENGTHS]
    assert error[0] > 5 and all(weaker * 1.02 < stronger for weaker, stronger in zip(error, error[1:])), error


@at_strengths("std", 0.04, 0.06, 0.08, 0.09, 0.10)
def test_gaussian_noise_is_normal(strength, std):
    noise = (corrupt(flat(128, 60), "gaussian_noise", strength).astype(float) - 128) / 255
    assert abs(noise.mean()) < 5 * std / math.sqrt(noise.size)
    # the variance of the noise, and that of rounding to whole levels
    assert noise.var() == pytest.approx(std**2 + 1 / 12 / 255**2, rel=5 * math.sqrt(2 / noise.size))
    for sigmas, share in ((1, 0.6827), (2, 0.9545)):
        # levels are coarse: 10 to one std
        assert (abs(noise) < sigmas * std).mean() == pytest.approx(share, abs=0.02)
    for axis in range(4):  # no picture, channel, row or column repeats the one before
        assert abs((noise * np.roll(noise, 1, axis)).mean()) < 5 * noise.var() / math.sqrt(noise.size)


def test_gaussian_noise_is_the_draw_that_the_module_promises(images):
    """The one of the picture's number, at any strength."""
    for number, strength, std in ((0, 1, 0.04), (77, 1, 0.04), (77, 5, 0.1)):
        z = random.normal((3, 32, 32), site="tinytoken.data.corruptions.gaussian_noise", step=1000 + number,
                          seed=5)
        expected = np.rint(255 * np.clip(images[number].astype("float32") / 255 + std * z, 0, 1))
        assert (corrupt(images, "gaussian_noise", strength, seed=5, first=1000)[number] == expected).all()


@at_strengths("photons", 500, 250, 100, 75, 50)
def test_shot_noise_has_the_mean_and_variance_of_poisson(strength, photons):
    """Before rounding to whole levels, which can move the mean by half a level: a count is 255 / photons of
    them."""
    for level in (20, 128):
        x = flat(level, 60).astype("float32") / 255
        noisy = corruptions.shot_noise(x, photons, draws("shot_noise", 60))
        assert noisy.dtype == "float32"
        assert (np.rint(255 * noisy) == corrupt(flat(level, 60), "shot_noise", strength)).all()
        noisy, variance = noisy.astype(float), level / 255 / photons
        assert noisy.mean() == pytest.approx(level / 255, abs=5 * math.sqrt(variance / noisy.size))
        # of the variance of a Poisson sample, relative
        spread = math.sqrt((2 + 1 / (level / 255 * photons)) / noisy.size)
        assert noisy.var() == pytest.approx(variance, rel=5 * spread)


def test_shot_noise_inverts_the_poisson_distribution_function():
    """Each draw is the least count whose cdf, here from lgamma, is at least u; more photons than white has
    are white."""
    x = np.arange(256, dtype="float32").repeat(192).reshape(4, 3, 64, 64) / 255
    u = draws("shot_noise", 4)(random.uniform, 3, 64, 64).astype(float)
    for photons in (50, 500):
        found = corruptions.shot_noise(x, photons, draws("shot_noise", 4))
        count, k = np.rint(found * photons).astype(int), np.arange(photons + 1)
        log_factorial = np.array([math.lgamma(i + 1) for i in k])
        for level in (0, 1, 2, 60, 128, 254, 255):
            here, rate = x == np.float32(level / 255), max(level / 255 * photons, 1e-300)
            cdf = np.concatenate([[0], np.exp(k * math.log(rate) - rate - log_factorial).cumsum()])
            assert here.sum() == 192 and (cdf[count[here]] < u[here] + 1e-12).all()
            assert ((u[here] <= cdf[count[here] + 1] + 1e-12) | (count[here] == photons)).all()
        assert (count[x == 0] == 0).all() and (count[x == 1] == photons).any()


@pytest.mark.parametrize("name", ("motion_blur", "defocus_blur"))
@pytest.mark.parametrize("strength", STRENGTHS)
def test_blurs_keep_a_constant_picture_and_the_mean_of_an_impulse(name, strength):
    """The weights sum to one, at the border as well: a constant stays to the last level."""
    for level in (1, 128, 255):
        assert (corrupt(flat(level, 20), name, strength) == level).all()
    function, settings = CORRUPTIONS[name]
    impulse = np.zeros((20, 3, 33, 33), "float32")
    impulse[:, :, 16, 16] = 1
    out = function(impulse, settings[strength - 1], draws(name, 20))
    assert out.dtype == "float32" and (out >= 0).all()
    np.testing.assert_allclose(out.sum(axis=(2, 3)), 1, rtol=1e-5)


@at_strengths("std", 1, 1.5, 2, 2.25, 2.5)
def test_motion_blur_of_an_impulse_lies_on_a_line(strength, std):
    """Half a Gaussian along it, at an angle of its own for each picture, within 45 degrees of the
    horizontal."""
    impulse = np.zeros((40, 3, 33, 33), "float32")
    impulse[:, :, 16, 16] = 1
    out = corruptions.motion_blur(impulse, std, draws("motion_blur", 40))
    angle = math.pi / 4 * (2 * draws("motion_blur", 40)(random.uniform) - 1)
    assert angle.min() < -0.6 and angle.max() > 0.6
    for picture, turn in zip(out, angle):
        assert (picture == picture[0]).all()
        columns, rows = picture[0].T.nonzero()
        assert columns.tolist() == list(range(16, 16 - len(columns), -1))[::-1]
        assert len(columns) == 1 + math.ceil(4 * std)
        across, down = 16 - columns, 16 - rows  # where the pixels there look at the impulse
        assert abs(down - across * math.tan(turn)).max() <= 0.5001
        log_weight = np.log(picture[0][rows, columns])
        expected = -0.5 * (across / math.cos(turn) / std)**2
        np.testing.assert_allclose(log_weight - log_weight[-1], expected, rtol=1e-4, atol=1e-5)


def test_defocus_discs():
    """By hand: a plus and a square of nine, hardly softened; and a single pixel, spread by the three taps."""
    side = math.exp(-0.5 / 0.4**2) / (1 + 2 * math.exp(-0.5 / 0.4**2))
    taps = np.array([0, side, 1 - 2 * side, side, 0])
    np.testing.assert_allclose(corruptions._disc(0.3, 0.4), np.outer(taps, taps), rtol=1e-12, atol=1e-15)
    plus = np.zeros((5, 5))
    plus[2, 1:4] = plus[1:4, 2] = 0.2
    np.testing.assert_allclose(corruptions._disc(1, 0.2), plus, atol=1e-5)
    square = np.zeros((5, 5))
    square[1:4, 1:4] = 1 / 9
    np.testing.assert_allclose(corruptions._disc(1.5, 0.1), square, atol=1e-12)
    for setting in CORRUPTIONS["defocus_blur"][1]:
        kernel = corruptions._disc(*setting)
        assert kernel.sum() == pytest.approx(1, abs=1e-12) and (kernel >= 0).all()
        assert (kernel == kernel.T).all() and (kernel == kernel[::-1]).all()


def test_defocus_mirrors_the_border():
    picture = flat(0, side=8)
    # row -1 is row 1, column 8 is column 6; row 0 and column 7 have no twin
    picture[..., 0, 3] = picture[..., 1, 6] = 90
    out = corrupt(picture, "defocus_blur", 5)[0, 0]
    assert out[0].tolist() == [0, 0, 10, 10, 10, 20, 20, 40]
    assert out[2].tolist() == [0, 0, 0, 0, 0, 10, 10, 20]


@at_strengths("factor", 0.75, 0.5, 0.4, 0.3, 0.15)
def test_contrast_keeps_the_mean_and_scales_the_spread(images, strength, factor):
    clean, out = images.astype(float), corrupt(images, "contrast", strength).astype(float)
    np.testing.assert_allclose(out.mean(axis=(2, 3)), clean.mean(axis=(2, 3)), atol=0.5)
    mean = clean.mean(axis=(2, 3), keepdims=True)
    assert abs(out - (mean + factor * (clean - mean))).max() < 0.501


def test_brightness_by_hand():
    """Strength 4 adds 0.2 x 255 = 51 to the largest channel, and the others grow with it."""
    colours = {(0, 0, 0): (51, 51, 51), (100, 50, 0): (151, 75.5, 0), (17, 34, 51): (34, 68, 102),
               (230, 115, 23): (255, 127.5, 25.5), (255, 1, 128): (255, 1, 128)}
    for before, after in colours.items():
        picture = flat(0)
        picture[:] = np.array(before, "uint8")[:, None, None]
        assert abs(corrupt(picture, "brightness", 4)[0, :, 4, 9] - np.array(after)).max() <= 0.501, before


@at_strengths("amount", 0.2, 0.5, 0.75, 1, 1.5)
def test_haze_keeps_the_maximum_and_lays_one_fog_over_all_channels(strength, amount):
    """On one grey v it runs from v^2 / (v + amount), where there is no fog, to v, where it is thickest."""
    for level in (255, 128):
        out, v = corrupt(flat(level, 20), "haze", strength), level / 255
        assert (out == out[:, :1]).all() and (out.max(axis=(1, 2, 3)) == level).all()
        assert (out.min(axis=(1, 2, 3)) == round(255 * v * v / (v + amount))).all()


@pytest.mark.parametrize("amount, decay", CORRUPTIONS["haze"][1])
def test_the_fogs_waves_fall_as_the_docstring_says(amount, decay):
    fog = corruptions.haze(np.ones((200, 3, 32, 32), "float32"), (amount, decay), draws("haze", 200))[:, 0]
    frequency = np.hypot(np.fft.fftfreq(32, 1 / 32)[:, None], np.arange(17))
    low = (frequency > 0) & (frequency <= 8)
    waves = np.log2(abs(np.fft.rfft2(fog.astype(float))[:, low])).mean(axis=0)
    slope = np.polyfit(np.log2(frequency[low]), waves, 1)[0]
    assert slope == pytest.approx(-1 - 2 * math.log2(decay), abs=0.05)


@at_strengths("cells", 30, 28, 27, 24, 20)
def test_pixelate_blocks_are_constant_means(images, strength, cells):
    out = corrupt(images, "pixelate", strength)
    cell = (np.arange(32) + 0.5) * cells // 32
    edges = [0, *(np.flatnonzero(np.diff(cell)) + 1), 32]
    assert len(edges) == cells + 1
    for top, bottom in zip(edges, edges[1:]):
        for left, right in zip(edges, edges[1:]):
            block, clean = out[:, :, top:bottom, left:right], images[:, :, top:bottom, left:right]
            assert (block == block[:, :, :1, :1]).all()
            assert abs(block[:, :, 0, 0] - clean.mean(axis=(2, 3))).max() < 0.501


def test_pixelate_by_hand():
    """Eight pixels at strength 5: int(0.65 x 8) = 5 cells, of 2, 1, 2, 1, 2 pixels."""
    picture = flat(0, side=8)
    picture[0, 0] = [10, 20, 50, 70, 90, 11, 0, 200]
    expected = [15, 15, 50, 80, 80, 11, 100, 100]
    out = corrupt(picture, "pixelate", 5)
    assert (out[0, 0] == expected).all() and (out[0, 1:] == 0).all()
    assert (corrupt(picture.swapaxes(2, 3).copy(), "pixelate", 5) == out.swapaxes(2, 3)).all()


def test_the_cosine_transform_is_orthonormal():
    cosines = corruptions._cosines()
    np.testing.assert_allclose(cosines @ cosines.T, np.eye(8), atol=1e-14)
    block = np.cos(np.pi / 8 * 3 * (np.arange(8) + 0.5))  # a wave of frequency 3 is one coefficient
    np.testing.assert_allclose(cosines @ block, [0, 0, 0, 2, 0, 0, 0, 0], atol=1e-14)


def test_jpeg_with_steps_of_one_is_nearly_the_identity(images):
    out = corruptions._quantised(images.astype("float32"), np.ones((3, 8, 8)))
    assert out.dtype == "float32"
    # Y, Cb and Cr are each off by sqrt(1/12) = 0.29; on the way back to red, green and blue that grows by
    gain = math.sqrt(np.square(np.linalg.inv(corruptions.YCBCR)).sum() / 3)
    assert math.sqrt(np.square(out - images).mean()) == pytest.approx(gain * math.sqrt(1 / 12), rel=0.05)
    assert abs(out - images).max() < 4
    tiny = corruptions._quantised(images.astype("float32"), np.full((3, 8, 8), 1e-3))
    assert abs(tiny - images).max() < 0.02


@pytest.mark.parametrize("strength", STRENGTHS)
def test_jpeg_treats_each_block_by_itself(images, strength):
    whole = corrupt(images[:20], "jpeg", strength)
    for top in range(0, 32, 8):
        for left in range(0, 32, 8):
            block = np.ascontiguousarray(images[:20, :, top:top + 8, left:left + 8])
            assert abs(corrupt(block, "jpeg", strength)
                       - whole[:, :, top:top + 8, left:left + 8].astype(int)).max() <= 1


def test_jpeg_steps():
    """A wave in Y of 1.4 steps of its coefficient comes back as 1 step, one of 0.4 steps as nothing. At
    quality 50 the steps are the standard's tables; at 80 they are 0.4 and at 40 1.25 times that, rounded."""
    cosines = corruptions._cosines()
    for quality, step in ((50, 55), (80, 22), (40, 69)):  # row 5, column 2 of table K.1
        wave = np.outer(cosines[5], cosines[2])
        for steps, left in ((1.4, 1), (0.4, 0)):
            x = np.broadcast_to(128 + steps * step * wave, (1, 3, 8, 8)).astype("float32") / 255
            out = corruptions.jpeg(x, quality, None)
            np.testing.assert_allclose(255 * out, np.broadcast_to(128 + left * step * wave, out.shape),
                                       atol=1e-3)


def pillow(images, change):
    image = pytest.importorskip("PIL.Image")
    pictures = [change(image, image.fromarray(picture.transpose(1, 2, 0))) for picture in images]
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]).astype(int)


@at_strengths("quality", 80, 65, 58, 50, 40)
def test_jpeg_is_near_pillows_without_subsampling(images, strength, quality):
    """The same tables, and the same loss to 1 %. Where pixels differ, a coefficient was rounded the other
    way: Pillow's Y, Cb, Cr are whole."""
    def through_file(image, picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        picture = image.open(file)
        tables = [list(picture.quantization[number]) for number in (0, 1, 1)]
        assert corruptions._tables(quality).reshape(3, 64).tolist() == tables
        return picture
    theirs, ours = pillow(images, through_file), corrupt(images, "jpeg", strength).astype(int)
    assert np.square(ours - images).mean() == pytest.approx(np.square(theirs - images).mean(), rel=0.01)
    assert np.square(ours - theirs).mean() < 0.1 * np.square(theirs - images).mean()


@at_strengths("share", 0.95, 0.9, 0.85, 0.75, 0.65)
def test_pixelate_is_pillows_box_resize_twice(images, strength, share):
    def twice(image, picture):
        small = picture.resize((int(32 * share),) * 2, image.Resampling.BOX)
        return small.resize((32, 32), image.Resampling.BOX)
    assert abs(pillow(images, twice) - corrupt(images, "pixelate", strength)).max() <= 1


@pytest.mark.parametrize("change, message", [
    (dict(images=[[1]]), r"images is a list, expected a NumPy array"),
    (dict(images=np.zeros((1, 3, 9, 8))),
     r"images \(1, 3, 9, 8\) float64, expected \(B, 3, H, W\) uint8, H and W at least 8"),
    (dict(images=np.zeros((3, 32, 32), "uint8")), r"images \(3, 32, 32\) uint8, expected .*"),
    (dict(images=np.zeros((1, 32, 32, 3), "uint8")), r"images \(1, 32, 32, 3\) uint8, expected .*"),
    (dict(images=np.zeros((0, 3, 32, 32), "uint8")), r"images \(0, 3, 32, 32\) uint8, expected .*"),
    (dict(images=np.zeros((1, 3, 32, 7), "uint8")), r"images \(1, 3, 32, 7\) uint8, expected .*"),
    (dict(name="fog"), r"name is 'fog', expected one of gaussian_noise, .*, jpeg"),
    (dict(name=["jpeg"]), r"name is \['jpeg'\], expected one of .*"),
    (dict(strength=0), r"strength is 0, expected an int from 1 to 5"),
    (dict(strength=6), r"strength is 6, expected an int from 1 to 5"),
    (dict(strength=2.0), r"strength is 2.0, expected an int from 1 to 5"),
    (dict(seed=-1), r"seed is -1, expected 0 <= int < 2\*\*64"),
    (dict(seed=None), r"seed is None, expected 0 <= int < 2\*\*64"),
    (dict(first=-1), r"first is -1 with 1 images, expected an int from 0 to 2\*\*32 - 1"),
    (dict(first=2**32), r"first is 4294967296 with 1 images, expected an int from 0 to 2\*\*32 - 1"),
])
def test_bad_input_is_refused(change, message):
    call = dict(images=flat(0), name="contrast", strength=1, seed=0, first=0)
    with pytest.raises(InputError, match=f"^corrupt: {message}$"):
        corrupt(**{**call, **change})


def test_the_last_number_of_all():
    assert corrupt(flat(9), "gaussian_noise", 1, first=2**32 - 1).shape == (1, 3, 32, 32)
