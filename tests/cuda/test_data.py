"""Random bits and batches by kernels are those of the plain forms, bit by bit."""
import numpy as np
import pytest

import tinytoken as tt
from test_standin import SCENES
from tinytoken import random
from tinytoken.backend import module_for, to_device, to_numpy
from tinytoken.data import Batches


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5, 3), (300,), (0, 2)])
@pytest.mark.parametrize("seed, step", [(0, 0), (2**64 - 1, 2**32 - 1), (12345678901, 7)])
def test_bits(shape, seed, step, there):
    xp, expected = module_for("cuda"), random.bits(shape, site="here", step=step, seed=seed)
    found = random.bits(shape, site="here", step=step, seed=seed, xp=xp)
    assert found.dtype == "uint32" and np.array_equal(found.get(), expected)
    assert len(there) == (0 not in shape)
    there_too = random.bits(shape, site="here", step=xp.full(1, step, "uint32"), seed=seed, xp=xp)
    assert np.array_equal(there_too.get(), found.get())


def test_a_number_in_device_memory_is_not_for_the_host(there):
    with pytest.raises(tt.InputError, match="lies on a GPU"):
        random.bits(3, site="here", step=module_for("cuda").zeros(1, "uint32"), seed=0)


@pytest.mark.parametrize("options", [
    {}, {"pad": 4}, {"flip": True}, {"pad": 4, "flip": True},
    {"pad": 31, "flip": True, "erase": 0.5, "mixup": 0.2}, {"erase": 1.0}, {"cutmix": 1.0},
    {"mixup": 0.8, "cutmix": 1.0, "classes": 17}])
@pytest.mark.parametrize("number_on_device", [False, True])
def test_batches(options, number_on_device, there):
    def make(device):
        images, labels = (to_device(array, device) for array in (SCENES.images, SCENES.labels))
        return Batches(images, labels, 10, seed=3, **options)
    for step in (0, 1, 4, 5):
        mine = make("cuda")
        number = module_for("cuda").full(1, step, "uint32") if number_on_device else step
        for mine, plain in zip(mine.make(mine.chosen(step), number), make("cpu")(step)):
            assert mine.dtype == plain.dtype and np.array_equal(to_numpy(mine), plain)
    launched, mixes = [name for name, *_ in there], bool({"mixup", "cutmix"} & set(options))
    expected = {"gather_pictures": True, "erase_boxes": "erase" in options,
                "mix_pictures": mixes, "mix_labels": mixes}
    for kernel, wanted in expected.items():
        assert launched.count(kernel) == 4 * wanted


@pytest.mark.parametrize("pad", [0, 3])
def test_batches_of_clips_are_those_of_the_plain_form(pad, there):
    """The kernel is for pictures."""
    clips, labels = SCENES.images[:24].reshape(6, 4, 3, 32, 32), SCENES.labels[:6]
    mine, plain = (Batches(*(to_device(array, device) for array in (clips, labels)), 3, pad=pad)(1)
                   for device in ("cuda", "cpu"))
    assert all(np.array_equal(to_numpy(a), b) for a, b in zip(mine, plain))
    assert "gather_pictures" not in [name for name, *_ in there]


def test_a_draw_is_one_launch(there):
    random.gumbel((8, 5, 2), site="here", step=0, seed=0, xp=module_for("cuda"))
    assert [name for name, *_ in there] == ["random_bits"]
