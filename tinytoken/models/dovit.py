"""DoViT (Liu et al. 2023, arXiv 2308.01944, "Dynamic Token-Pass Transformers for Semantic Segmentation"): a
patch whose class an early layer is sure of stops there. It keeps its features, no other token reads it any
more, and at the end it stands in its place again for the decoder. So a picture costs what it needs.

What is sure is said by small heads between the blocks, which are trained with it. For each picture the same
tokens wait in training, where a mask hides them, and at inference, where they are not computed. The official
code lets all pictures of a batch go on with as many tokens, the floor of the mean: `official`.
"""
import dataclasses
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, to_numpy
from ..errors import expect
from ..tensor import Tensor
from .base import Loss, Output, is_number, is_whole, model, weighted_sum
from .column import PlainConfig
from .passing import Passing, PassingTokens
from .pixels import Decoder, pixel_targets, squares


@dataclasses.dataclass(frozen=True)
class DoViTConfig(PlainConfig):
    """num_classes: of a pixel, the background being one. exits: the blocks before which patches stop. tau:
    they do where the head's largest probability, its mean over the patch's pixels, is above tau: one number,
    or one for each exit. aggregate: where more than this share of the tokens waits, the class token becomes
    the mean of itself and of their mean. width: of the decoder. official: see above."""
    num_classes: int = 11
    _: dataclasses.KW_ONLY
    exits: tuple[int, ...] = (2, 4)
    tau: float | tuple[float, ...] = 0.95
    aggregate: float = 0.1
    width: int = 64
    official: bool = False
    positive = (*PlainConfig.positive, "width")
    pool = "token"

    def __post_init__(self):
        super().__post_init__()
        exits, depth = self.exits, self.depth
        self.check(isinstance(exits, tuple) and len(exits) and all(map(is_whole, exits))
                   and list(exits) == sorted(set(exits)) and 0 < exits[0] and exits[-1] < depth,
                   f"exits {exits!r}, expected rising numbers of blocks, from 1 to {depth - 1}")
        self.check(is_number(self.aggregate) and 0 <= self.aggregate <= 1,
                   f"aggregate {self.aggregate!r}, expected a share from 0 to 1")
        self.taus(self.tau)

    def taus(self, tau: Any) -> tuple[float, ...]:
        """One for each exit. InputError unless tau is that, or one number."""
        each = tau if isinstance(tau, (tuple, list)) else (tau,) * len(self.exits)
        self.check(len(each) == len(self.exits) and all(is_number(t) and t == t for t in each),
                   f"tau {tau!r}, expected a number, or one for each of {len(self.exits)} exits")
        return tuple(each)


@dataclasses.dataclass
class DoViTOutput(Output):
    """logits (B, H, W, K): of each pixel. Of each exit: aux, its head's logits (B, H, W, K); confidence (B,
    N); kept (B, N): whether a patch goes on."""
    aux: list[Tensor] = dataclasses.field(default_factory=list)
    confidence: list[Array] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)


@model("dovit")
class DoViT(Passing):
    """A ViT for segmentation whose patches stop where they are sure. images (B, channels, H, W) ->
    DoViTOutput. Its decoder is Segmenter's: each token answers for all pixels of its patch."""
    Config: Any = DoViTConfig
    norm: Any
    task = "segment"
    loss_weights = (1, 0.4, 1, 0.5)  # of class, aux, kl, token

    def build(self, c: Any) -> None:
        super().build(c)
        self.stops, self.head = c.exits, None  # type: Any, Any
        answers = c.patch_size ** 2 * c.num_classes
        self.auxiliary_head = [nn.Linear(c.dim, answers) for _ in c.exits]
        self.decoder = Decoder([c.dim], c.width, answers)
        nn.initialise(self.decoder)
        for i, head in enumerate(self.auxiliary_head):
            nn.xavier(head.weight, f"auxiliary_head.{i}.weight")

    def forward(self, images: Tensor | Array, trace: bool = False, paths: Array | None = None,
                tau: Any = None, keep: list | None = None, bucket: int = 8) -> DoViTOutput:
        """tau: instead of the model's. keep: for each exit a mask (B, N) of the patches that go on, instead
        of the rule; one that waits stays so. In eval mode pictures are computed together that go on with
        about as many tokens, rounded up to multiples of `bucket`; with trace=True nothing is left out, but
        hidden, as in train mode."""
        expect(keep is None or len(keep) == len(self.config.exits), "DoViT",
               lambda: f"{len(keep or ())} masks for {len(self.config.exits)} exits")
        expect(is_whole(bucket) and bucket > 0, "DoViT", lambda: f"bucket {bucket!r}, expected 1 or more")
        tokens = self.start(images, trace, paths, PassingTokens, forced=keep, bucket=bucket,
                            tau=self.config.taus(self.config.tau if tau is None else tau))
        return self.read(self.encode(tokens) if self.training or trace else self.encode_kept(tokens))

    def read(self, tokens: PassingTokens) -> DoViTOutput:
        tokens.x = self.norm(tokens.x)
        grid, cell = self.patch_embed.grid, (self.config.patch_size,) * 2
        logits = squares(self.decoder([tokens.patches], [grid]), grid, cell)
        return DoViTOutput(logits, tokens.patches, tokens.attention or [], tokens.aux, tokens.confidence,
                           tokens.kept)

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None) -> Loss:
        """Cross-entropy of the pixels (labels as `pixel_targets` takes them), of the answers and of each
        exit's head. teacher: the Output of a model that lets all go on; its answers and its tokens are
        learned, too."""
        goal = pixel_targets(targets, out.logits, smoothing)
        flat = lambda x: x.reshape(-1, x.shape[-1])
        parts: Any = {"class": ops.cross_entropy(flat(out.logits), goal), "aux": 0}
        for aux in out.aux:
            parts["aux"] = parts["aux"] + ops.cross_entropy(flat(aux), goal)
        if teacher is not None:
            parts["kl"] = ops.kl_divergence(flat(out.logits), flat(teacher.logits))
            parts["token"] = ops.mse(out.tokens, teacher.tokens)
        return weighted_sum(weights or self.loss_weights, parts), parts

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        return [(f"DoViT: what goes on into block {i}", to_numpy(kept))
                for i, kept in zip(self.config.exits, out.kept)]
