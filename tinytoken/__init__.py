"""tinytoken: LookupViT and DynamicViT from scratch, on a tiny autograd engine over NumPy or CuPy arrays."""
from . import backend, data, models, nn, ops, random
from .cost import macs
from .errors import GradientError, GraphError, InputError
from .random import manual_seed
from .tensor import Tensor, explain, fused, grad, no_grad, op, plain
