"""NCCL as CuPy offers it, in one process: what several processes will add up their gradients with."""
import numpy as np
import pytest

import standin
from tinytoken import nn
from tinytoken.backend import module_for, to_numpy
from tinytoken.models import ViT

pytestmark = pytest.mark.gpu


def test_a_flat_gradient_is_summed_in_place():
    if standin.in_place_of_cupy():
        pytest.skip("the stand-in has no NCCL")
    cupy = module_for("cuda")
    nccl = pytest.importorskip("cupy.cuda.nccl")
    alone = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    flat = nn.flatten(ViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2).to("cuda").parameters())
    flat.grad[...] = cupy.arange(flat.grad.size, dtype="float32")
    place, stream = flat.grad.data.ptr, cupy.cuda.get_current_stream()
    alone.allReduce(place, place, flat.grad.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.ptr)
    stream.synchronize()
    np.testing.assert_array_equal(to_numpy(flat.grad), np.arange(flat.grad.size, dtype="float32"))
