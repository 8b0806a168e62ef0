"""The options of every model with one column of tokens: ViT's variants, as published weights have them. Names
follow timm."""
import dataclasses
import math
from typing import ClassVar

from .base import Sizes, is_number, is_whole, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnConfig(Sizes):
    """What every model with one column of tokens may have. The defaults are the plain ViT; published weights
    need the others.

    distilled: DeiT's second token and head; the logits are the mean of both heads', in training too.
    reg_tokens: how many registers there are, tokens that no head reads (Darcet et al. 2024). no_embed_class:
    only patches have positions, the tokens before them have none. qk_norm: queries and keys are normed.
    layer_scale: the start of LayerScale's gammas; 0: there are none. pre_norm: a norm before the first
    block, and no bias in the patch embedding. eps: of all layer norms."""
    qkv_bias: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    qk_norm: bool = False
    layer_scale: float = 0.0
    pre_norm: bool = False
    eps: float = 1e-6
    # fixed here; ViTConfig and LVViTConfig make options of them
    pool = "token"
    class_token = None  # type: bool | None
    final_norm = "tokens"
    skip_lam = 1  # type: float

    def __post_init__(self):
        super().__post_init__()
        self.check(is_whole(self.reg_tokens) and self.reg_tokens >= 0,
                   f"reg_tokens {self.reg_tokens!r}, expected a whole number that is not negative")
        self.check(is_number(self.eps) and 0 < self.eps < math.inf,
                   f"eps {self.eps!r}, expected a positive number")
        self.check(is_number(self.layer_scale) and math.isfinite(self.layer_scale),
                   f"layer_scale {self.layer_scale!r}, expected a number")
        self.check(one_of(self.class_token, None, True, False),
                   f"class_token {self.class_token!r}, expected True, False or None")
        self.check(self.pool == "mean" or self.class_token in (None, True),
                   "pool 'token' reads a class token, and class_token is False")
        self.check(not self.distilled or self.pool == "token" and self.final_norm != "pooled",
                   "distilled: its heads read the normed class and distillation tokens, so pool must be "
                   "'token', and final_norm not 'pooled'")

    @property
    def prefix(self) -> dict[str, int]:
        """{parameter: how many tokens} of the tokens before the patches, in their order."""
        class_token = self.pool == "token" if self.class_token is None else self.class_token
        counts = {"cls_token": int(class_token), "dist_token": int(self.distilled),
                  "reg_token": self.reg_tokens}
        return {name: n for name, n in counts.items() if n}


@dataclasses.dataclass(frozen=True)
class PlainConfig(Sizes):
    """The options of a model that is made of a ViT without its variants; with pool = "token" it has a class
    token."""
    pool: ClassVar[str] = "mean"
    final_norm, eps, layer_scale, skip_lam, qkv_bias = "tokens", 1e-6, 0.0, 1, True
    pre_norm = no_embed_class = distilled = qk_norm = False

    @property
    def prefix(self) -> dict[str, int]:
        """As of ColumnConfig."""
        return {"cls_token": 1} if self.pool == "token" else {}
