"""tinytoken: LookupViT and DynamicViT from scratch, on a tiny autograd engine over NumPy or CuPy arrays."""
import importlib.util

from . import backend, data, models, nn, ops, random, tasks, train
from .checking import gradcheck
from .cost import explain, macs
from .errors import GradientError, GraphError, InputError
from .random import manual_seed
from .tensor import Tensor, checked, fused, grad, no_grad, op, plain
from .train import checkpoint, optim

__version__ = "0.4.0"


def _kernels():
    """Load the fused kernels; runs when a CUDA device is first used, since nothing else needs them.

    Where the folder cuda/ was deleted, the plain ops run.
    """
    if importlib.util.find_spec(f"{__name__}.cuda"):
        from . import cuda  # importing it registers the kernels
        cuda.nccl.one_device_each()


backend.at_first_cuda.append(_kernels)
if importlib.util.find_spec("numba") and importlib.util.find_spec(f"{__name__}.compiled"):
    from . import compiled  # noqa: F401: registers what Numba compiles for NumPy's arrays, and is light
