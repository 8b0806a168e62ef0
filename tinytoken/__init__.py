"""tinytoken: LookupViT and DynamicViT from scratch, on a tiny autograd engine over NumPy or CuPy arrays."""
from . import backend, checkpoint, data, models, nn, optim, ops, random, train
from .checking import gradcheck
from .cost import explain, macs
from .errors import GradientError, GraphError, InputError
from .random import manual_seed
from .tensor import Tensor, fused, grad, no_grad, op, plain


def _kernels():
    """The fused kernels, where a CUDA device is used: not before, since they need one, and nothing else needs them."""
    from . import cuda
    cuda.register()


backend.at_first_cuda.append(_kernels)
