"""The layers of a convolutional stem. Class and parameter names follow PyTorch."""
from collections.abc import Iterator

from .. import ops
from ..backend import array_module
from ..errors import expect
from ..tensor import Tensor
from .module import Buffer, Module, Parameter, zeros

Pair = int | tuple[int, int]  # one number for both axes, or (down, across)


class Conv2d(Module):
    """ops.conv2d with a learned weight (out, in / groups, kh, kw), and a bias (out,) if there is to be one.
    x (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, channels: int, out_channels: int, kernel: Pair, stride: Pair = 1, padding: Pair = 0,
                 groups: int = 1, bias: bool = True) -> None:
        expect(channels % groups == 0 == out_channels % groups, "Conv2d",
               f"groups {groups} do not divide channels {channels} and {out_channels}")
        self.stride, self.padding, self.groups = stride, padding, groups
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.weight = Parameter(zeros(out_channels, channels // groups, *sides), decay=True)
        self.bias = Parameter(zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding,
                          groups=self.groups)


class Sequential(Module):
    """Layers, one after the other. Each is named by its number; None only takes a number."""

    def __init__(self, *layers: Module | None) -> None:
        self.layers = layers

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(i), layer) for i, layer in enumerate(self.layers) if layer is not None)

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.children():
            x = layer(x)
        return x


class BatchNorm2d(Module):
    """Batch norm of each channel (Ioffe & Szegedy 2015, arXiv 1502.03167). x (B, channels, H, W) -> the same.

    In train mode by the statistics of the batch, n = B H W values per channel. The buffers running_mean and
    running_var move by `momentum` of the way to them, to the variance times n / (n - 1): its estimate without
    bias. In eval mode by the running ones. So what train mode computes for an image depends on the others;
    where a batch is cut into slices, on those of its slice, and then the running statistics move once per
    batch (train.loss_and_grads). A mean of the weights over the steps (fit's `average`) leaves them as the
    last step did.

    Published weights also hold num_batches_tracked, a count that nothing reads: load_weights leaves it out.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = Parameter(zeros(channels) + 1), Parameter(zeros(channels))
        self.running_mean, self.running_var = Buffer(zeros(channels)), Buffer(zeros(channels) + 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            xp = array_module(x.data)
            scale = self.weight / xp.sqrt(self.running_var.data + self.eps)
            shift = self.bias - scale * self.running_mean.data
            return x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        out, mean, var = ops.batch_norm(x, self.weight, self.bias, eps=self.eps)
        count = x.size // len(var)
        expect(count > 1, "BatchNorm2d", "one value per channel in train mode, which has no variance")
        self.running_mean.follow(mean.data, self.momentum)
        self.running_var.follow(var.data * (count / (count - 1)), self.momentum)
        return out
