"""ViT-FOD (Zhang et al. 2022, arXiv 2203.12816): a ViT for classes that differ in a tiny part, and on busy
ground. Its attention, rolled out over all blocks, says what the class token comes from, which is used twice:
an extra block reads the critical patches once more (CRF), and in training cells of pictures are exchanged by
it (tasks.Combine). The class tokens of the last three blocks answer, each through a head of its own (CTI).
"""
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from .. import nn, ops, random
from ..backend import Array, array_module, to_numpy
from ..tensor import Tensor
from .base import Loss, Output, is_number, model, weighted_sum
from .column import PlainConfig
from .vit import Tokens, ViT

EARLY = ("early", "late")  # the heads of the two blocks before the last


@dataclasses.dataclass(frozen=True)
class ViTFODConfig(PlainConfig):
    """complementary: whether the class tokens of the two blocks before the last answer, too; alpha: the
    weight of their losses. critical: what the extra block reads, the share eta of the patches: those of the
    highest "rollout", "random" ones (the same for all pictures), or "none": there is no such block."""
    _: dataclasses.KW_ONLY
    complementary: bool = True
    alpha: float = 1.0
    critical: str = "rollout"
    eta: float = 0.2
    choices: ClassVar = {"critical": ("rollout", "random", "none")}
    pool = "token"

    def __post_init__(self):
        super().__post_init__()
        self.check(not self.complementary or self.depth > 2,
                   f"complementary with depth {self.depth}, expected at least 3 blocks")
        self.check(is_number(self.eta) and 0 <= self.eta <= 1, f"eta {self.eta!r}, expected a share, 0 to 1")
        self.check(is_number(self.alpha) and math.isfinite(self.alpha),
                   f"alpha {self.alpha!r}, expected a number")


@dataclasses.dataclass
class ViTFODOutput(Output):
    """logits: the sum of all heads'. answers: {head: its logits (B, K)}, "early" and "late" of the two blocks
    before the last, "class", "critical". rollout (B, N): how much of the class token comes from each patch.
    critical (B, k): the patches that the extra block reads."""
    answers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rollout: Array | None = None
    critical: Array | None = None


@model("vitfod")
class ViTFOD(ViT):
    """A ViT with a class token, up to four heads. images (B, channels, H, W) -> ViTFODOutput.

    Weights of a plain ViT can be loaded (strict=False): then the extra block starts as the last one."""
    Config: Any = ViTFODConfig
    aof_norm: Any
    aof_head: Any

    def build(self, c: Any) -> None:
        count = 2 if c.complementary else 0
        self.part_norms = [nn.LayerNorm(c.dim, c.eps) for _ in range(count)]
        self.part_heads = [nn.Linear(c.dim, c.num_classes) for _ in range(count)]
        extra = c.critical != "none"
        self.aof = nn.Block(c.dim, c.heads, c.mlp_ratio, eps=c.eps) if extra else None
        self.aof_norm = nn.LayerNorm(c.dim, c.eps) if extra else None
        self.aof_head = nn.Linear(c.dim, c.num_classes) if extra else None
        super().build(c)

    def load_state_dict(self, state: Any, strict: bool = True) -> tuple[list[str], list[str]]:
        last = f"blocks.{self.config.depth - 1}."
        if not strict and self.aof is not None and not any(name.startswith("aof.") for name in state):
            state = state | {f"aof.{name.removeprefix(last)}": array for name, array in state.items()
                             if name.startswith(last)}
        return super().load_state_dict(state, strict)

    def forward(self, images: Tensor | Array, trace: bool = False,
                paths: Array | None = None) -> ViTFODOutput:
        tokens = self.start(images, True, paths)
        tokens.ends = [tokens.x]  # and of each block
        ends, answers, critical = self.encode(tokens).ends, {}, None
        rolled = rollout(tokens.attention or [], tokens.extra)
        for name, x, norm, head in zip(EARLY, ends[-3:], self.part_norms, self.part_heads):
            answers[name] = head(norm(x[:, 0]))
        out = self.read(tokens)
        answers["class"] = out.logits
        if self.aof is not None:
            critical = self.critical(rolled)
            few = Tokens(ends[-2].detach(), tokens.extra)
            few.take(critical)
            answers["critical"] = self.aof_head(self.aof_norm(self.aof(few.x)[:, 0]))
        first, *others = answers.values()
        total = sum(others, start=first)
        return ViTFODOutput(total, out.tokens, out.attention if trace else [], answers, rolled, critical)

    def critical(self, rolled: Array) -> Array:
        """The places (B, k) of the patches that the extra block reads, k = floor(eta N), ascending."""
        xp, (batch, count) = array_module(rolled), rolled.shape
        if self.config.critical == "random":
            drawn = random.uniform((1, count), site="vitfod.critical", step=0, seed=0, xp=xp)
            rolled = xp.repeat(drawn, batch, axis=0)
        return ops.top_k(rolled, math.floor(self.config.eta * count))

    def class_loss(self, out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
        """The sum of the heads' cross-entropies, those of the two blocks before the last times alpha.
        targets (B, K) need not sum to 1."""
        parts = {name: ops.cross_entropy(logits, targets, smoothing=smoothing)
                 for name, logits in out.answers.items()}
        return weighted_sum(tuple(self.config.alpha if name in EARLY else 1 for name in parts), parts), parts

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        panels = [("ViT-FOD: where the class token comes from", to_numpy(out.rollout))]
        if out.critical is not None:
            patches = np.arange(self.num_patches)
            panels.append((f"ViT-FOD: the {out.critical.shape[1]} critical patches",
                           (to_numpy(out.critical)[:, :, None] == patches).any(axis=1)))
        return panels


def rollout(attention: list[Tensor], extra: int) -> Array:
    """Attention rolled out to the class token (Abnar & Zuidema 2020, arXiv 2005.00928): its row of the
    product of (A + I) / 2 over the blocks, A being the mean of the heads' weights, without the `extra` tokens
    that are no patches. attention: of each block, (B, H, T, T) -> (B, N). It has no gradient."""
    xp, (batch, _, count, _) = array_module(attention[0].data), attention[0].shape
    row = xp.zeros((batch, count), attention[0].dtype)
    row[:, 0] = 1
    for A in attention[::-1]:
        row = (row + (row[:, None] @ A.data.mean(axis=1))[:, 0]) / 2
    return row[:, extra:]
