"""Random bits and batches by kernels are those of the plain forms, bit by bit."""
import numpy as np
import pytest

import standin
import tinytoken as tt
from emulate import Emulator, compiler
from test_standin import SCENES
from tinytoken import random
from tinytoken.backend import to_device, to_numpy
from tinytoken.cuda import launcher
from tinytoken.data import Batches

pytestmark = pytest.mark.skipif(compiler is None, reason="no C++ compiler to run the kernels with")


@pytest.fixture(autouse=True)
def emulator():
    with standin.installed(kernels=True), launcher.running_on(Emulator()) as found:
        tt._kernels()
        yield found


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5, 3), (300,), (0, 2)])
@pytest.mark.parametrize("seed, step", [(0, 0), (2**64 - 1, 2**32 - 1), (12345678901, 7)])
def test_bits(shape, seed, step, emulator):
    xp = standin.modules()["cupy"]
    found = random.bits(shape, site="here", step=step, seed=seed, xp=xp)
    assert found.dtype == "uint32" and np.array_equal(found.get(), random.bits(shape, site="here", step=step, seed=seed))
    assert len(emulator.launches) == (0 not in shape)


@pytest.mark.parametrize("options", [{}, {"pad": 4}, {"flip": True}, {"pad": 4, "flip": True}, {"pad": 31, "flip": True, "erase": 0.5, "mixup": 0.2}])
def test_batches(options, emulator):
    make = lambda device: Batches(to_device(SCENES.images, device), to_device(SCENES.labels, device), 10, seed=3, **options)
    for step in (0, 1, 5):
        for mine, plain in zip(make("cuda")(step), make("cpu")(step)):
            assert mine.dtype == plain.dtype and np.array_equal(to_numpy(mine), plain)
    assert [name for name, *_ in emulator.launches].count("gather_pictures") == 3


def test_a_draw_is_one_launch(emulator):
    random.gumbel((8, 5, 2), site="here", step=0, seed=0, xp=standin.modules()["cupy"])
    assert [name for name, *_ in emulator.launches] == ["random_bits"]
