"""Random bits and batches by kernels are those of the plain forms, bit by bit."""
import numpy as np
import pytest

from test_standin import SCENES
from tinytoken import random
from tinytoken.backend import module_for, to_device, to_numpy
from tinytoken.data import Batches

@pytest.mark.parametrize("shape", [(), (1,), (4,), (5, 3), (300,), (0, 2)])
@pytest.mark.parametrize("seed, step", [(0, 0), (2**64 - 1, 2**32 - 1), (12345678901, 7)])
def test_bits(shape, seed, step, there):
    found = random.bits(shape, site="here", step=step, seed=seed, xp=module_for("cuda"))
    assert found.dtype == "uint32" and np.array_equal(found.get(), random.bits(shape, site="here", step=step, seed=seed))
    assert len(there) == (0 not in shape)


@pytest.mark.parametrize("options", [{}, {"pad": 4}, {"flip": True}, {"pad": 4, "flip": True}, {"pad": 31, "flip": True, "erase": 0.5, "mixup": 0.2}])
def test_batches(options, there):
    make = lambda device: Batches(to_device(SCENES.images, device), to_device(SCENES.labels, device), 10, seed=3, **options)
    for step in (0, 1, 5):
        for mine, plain in zip(make("cuda")(step), make("cpu")(step)):
            assert mine.dtype == plain.dtype and np.array_equal(to_numpy(mine), plain)
    assert [name for name, *_ in there].count("gather_pictures") == 3


def test_a_draw_is_one_launch(there):
    random.gumbel((8, 5, 2), site="here", step=0, seed=0, xp=module_for("cuda"))
    assert [name for name, *_ in there] == ["random_bits"]
