"""LV-ViT (Jiang et al. 2021, arXiv 2104.10858, "All Tokens Matter"), and the form of it that drops tokens as
DynamicViT does. Names of parameters are the official ones.

It is a ViT with a convolutional stem before the patches, residual branches that are divided by skip_lam, and
a second head, which classifies every patch token: so the picture's label can be joined by one for each token.
"""
import dataclasses
from typing import Any, ClassVar

from .. import nn, ops
from ..backend import Array
from ..errors import expect
from ..tensor import Tensor, tensor_like
from .base import Loss, Output, is_number, is_whole, model, weighted_sum
from .column import ColumnConfig
from .dynamicvit import DynamicOutput, DynamicViT, DynamicViTConfig
from .vit import ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class LVViTConfig(ColumnConfig):
    """skip_lam: what the residual branches are divided by. stem_dim: channels of the stem; the official
    "4_2" has 64, "4_2_128" 128. The other defaults are LV-ViT's own, too: mlp_ratio, qkv_bias, eps."""
    mlp_ratio: float = dataclasses.field(default=3, kw_only=False)
    qkv_bias: bool = False
    eps: float = 1e-5
    skip_lam: float = 2.0
    stem_dim: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.check(is_number(self.skip_lam) and 0 < self.skip_lam < float("inf"),
                   f"skip_lam {self.skip_lam!r}, expected a positive number")
        self.check(is_whole(self.stem_dim) and self.stem_dim > 0,
                   f"stem_dim {self.stem_dim!r}, expected a positive whole number")
        self.check(self.patch_size % 2 == 0,
                   f"patch_size {self.patch_size}, expected an even number: the stem halves pictures first")


class Stem(nn.PatchEmbed):
    """The official "4_2": three convolutions, the first of stride 2, each with batch norm and ReLU, then the
    projection of patches of patch_size / 2. images (B, C, H, W) -> (B, N, dim)."""

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, dim: int, channels: int,
                 bias: bool, width: int) -> None:
        inner = nn.Projection(dim, width, patch_size // 2, bias)
        super().__init__(image_size, patch_size, dim, channels, proj=inner)
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(width) for _ in range(3))

    def features(self, images: Any) -> Tensor:
        x = ops.relu(self.bn1(self.conv1(images)))
        x = ops.relu(self.bn2(self.conv2(x)))
        return ops.relu(self.bn3(self.conv3(x)))


@dataclasses.dataclass
class LVOutput(Output):
    """class_logits (B, K): of the class token. token_logits (B, n, K): of each patch token that is left.
    logits: in train mode class_logits, in eval mode those + 0.5 x the largest of token_logits, by class."""
    class_logits: Tensor | None = None
    token_logits: Tensor | None = None


@model("lvvit")
class LVViT(ViT):
    """images (B, channels, H, W) -> LVOutput.

    Its batch norms make what train mode computes for an image depend on the others: see nn.BatchNorm2d."""
    Config = LVViTConfig
    token_weight: ClassVar[float] = 0.5  # of the tokens' labels, and of their logits in the answer

    def build(self, c: Any) -> None:
        self.aux_head = nn.Linear(c.dim, c.num_classes)
        super().build(c)

    def embedding(self, c: Any) -> nn.PatchEmbed:
        return Stem(c.image_size, c.patch_size, c.dim, c.channels, not c.pre_norm, c.stem_dim)

    def read(self, tokens: Any) -> Any:
        out = super().read(tokens)
        answer, by_token = out.logits, self.aux_head(tokens.patches)
        if not self.training and by_token.shape[1]:
            answer = answer + by_token.max(axis=1) * self.token_weight
        return LVOutput(**vars(out) | {"logits": answer}, class_logits=out.logits, token_logits=by_token)

    def class_loss(self, out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
        """Cross-entropy of class_logits -> (loss, parts). targets: (B,) labels or (B, K) probabilities; or
        (B, 1 + N, K), whose row 0 is the picture's, the others the patches': then 0.5 x the mean
        cross-entropy of all N token_logits is added, "token_label" (section 3.2 of the paper)."""
        whole = dataclasses.replace(out, logits=out.class_logits)
        if len(targets.shape) != 3:
            return super().class_loss(whole, targets, smoothing=smoothing)
        B, N, K = out.token_logits.shape
        expect(tuple(targets.shape) == (B, 1 + N, K), "LVViT",
               lambda: f"targets {tuple(targets.shape)}, expected (B, 1 + N, K) = {(B, 1 + N, K)}")
        targets = tensor_like(out.logits, targets).data
        _, parts = super().class_loss(whole, targets[:, 0], smoothing=smoothing)
        parts["token_label"] = ops.cross_entropy(out.token_logits.reshape(B * N, K),
                                                 targets[:, 1:].reshape(B * N, K), smoothing=smoothing)
        return weighted_sum((1, self.token_weight), parts), parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicLVViTConfig(LVViTConfig, DynamicViTConfig):
    """Those of both."""


@dataclasses.dataclass
class DynamicLVOutput(DynamicOutput, LVOutput):
    """That of both."""


@model("dynamiclvvit")
class DynamicLVViT(DynamicViT, LVViT):
    """An LVViT that drops patch tokens. images (B, channels, H, W) -> DynamicLVOutput."""
    Config = DynamicLVViTConfig
    Output = DynamicLVOutput

    def loss(self, out: Any, targets: Array, teacher: Any = None, **options: Any) -> Loss:
        """DynamicViT's four losses: of the class token's logits, and token by token of the patches' logits.

        targets: as in LVViT.class_loss. teacher: the Output of an LVViT; that of a model without token_logits
        leaves out the part "token"."""
        out = dataclasses.replace(out, logits=out.class_logits, tokens=out.token_logits)
        if teacher is not None:
            logits = getattr(teacher, "class_logits", teacher.logits)
            teacher = Output(logits, getattr(teacher, "token_logits", None))
        return super().loss(out, targets, teacher, **{"token_loss": "kl"} | options)
