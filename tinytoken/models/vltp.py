"""VLTP (Chen et al. 2024, arXiv 2409.08464, "Vision-Language Guided Token Pruning for Task-Oriented
Segmentation"): a sentence says which object of a picture is meant, and only tokens that matter to it go
through the middle of the ViT.

A guidance token made of the sentence and the tokens of the picture read each other in a prune decoder, one
for all places at which tokens are dropped. What is dropped waits; before the last blocks all tokens are in
their places again ("reactivation"), and a second decoder draws the mask of the object.

The decoders are the official code's (guide.py). That code lacks the pruning itself. These are our choices:
where it happens, and that a share of the tokens goes on, not those above a threshold; that the 3 x 3
convolution of the second stage reads what a dropped token was when it was dropped; that dropped tokens come
back before the last block and not earlier; and the loss of the scores, which is on patches of which more than
a tenth is the object.
"""
import dataclasses
from typing import Any, ClassVar

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module, to_numpy
from ..data.captions import WORDS
from ..data.referring import LENGTH
from ..errors import expect, shape_of
from ..tensor import Tensor
from .base import Loss, Output, is_whole, model, weighted_sum
from .column import PlainConfig
from .guide import MaskDecoder, PruneDecoder, TextEncoder, start_guides
from .guided import Guided, GuidedTokens
from .mask_losses import dice_loss
from .masks import Embedding
from .options import check_ratios
from .pruning import check_stages

OBJECT = 0.1  # a patch is the object's, for the scores, if more than this share of it is


@dataclasses.dataclass(frozen=True)
class VLTPConfig(PlainConfig):
    """num_classes: how many words the vocabulary has; word 0 is <pad>. length: words of a sentence.

    prune_before: the blocks before which tokens are dropped. keep_ratios: the share of all N that goes on
    after each, rounded up; not rising. reactivate: the block before which all go on again; the depth: none,
    only the decoder sees all; None: the last one, if tokens are dropped before. width: of the decoders, None:
    half of dim.

    choose: which tokens go on. "sentence": the best by the prune decoder; "constant": by one that gets a
    learned token in place of the sentence's; "class": those that a class token reads most in the block that
    follows; "random"."""
    depth: int = 8
    num_classes: int = len(WORDS)
    _: dataclasses.KW_ONLY
    length: int = LENGTH
    prune_before: tuple[int, ...] = (2, 5)
    keep_ratios: tuple[float, ...] = (0.5, 0.25)
    reactivate: int | None = None
    width: int | None = None
    choose: str = "sentence"
    no_embed_class = True  # the class token has no position
    choices: ClassVar = {"choose": ("sentence", "constant", "class", "random")}
    positive = (*PlainConfig.positive, "length")

    def __post_init__(self):
        super().__post_init__()
        check_stages(self, self.depth)
        last, step = self.prune_before[-1], 2 * self.heads
        if self.reactivate is None:
            self.settle("reactivate", max(self.depth - 1, last + 1))
        self.check(is_whole(self.reactivate) and last < self.reactivate <= self.depth,
                   f"reactivate {self.reactivate!r}, expected a block from {last + 1} to {self.depth}")
        if self.width is None:
            self.settle("width", max(1, self.dim // 2 // step) * step)
        self.check(is_whole(self.width) and self.width > 0 and self.width % step == 0,
                   f"width {self.width!r}, expected a multiple of {step}, twice the heads")

    def shares(self, ratios: Any) -> tuple[float, ...]:
        """Keep ratios as they are. InputError unless there is one for each place, from 0 to 1, not rising."""
        self.check(isinstance(ratios, (tuple, list)) and len(ratios) == len(self.prune_before),
                   f"ratios {ratios!r}, expected one for each of {len(self.prune_before)} places")
        check_ratios(self, ratios)
        return tuple(ratios)

    @property
    def prefix(self) -> dict[str, int]:
        return {"cls_token": 1} if self.choose == "class" else {}


@dataclasses.dataclass
class VLTPOutput(Output):
    """logits (B, H, W): of each pixel, that the object is there. kept[s] (B, N): which patches go on after
    place s. scores[s] (B, N): of the prune decoder, as logits, where it was asked."""
    scores: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)


@model("vltp")
class VLTP(Guided):
    """A ViT that drops what a sentence does not speak of, and draws the mask of what it means. images (B,
    channels, H, W), words (B, length) -> VLTPOutput."""
    Config: Any = VLTPConfig
    norm: Any
    task = "refer"
    loss_weights = (2, 0.5, 1)  # of class, dice, scores; the first two are the official code's

    def build(self, c: Any) -> None:
        super().build(c)
        self.head: Any = None
        self.stops, grid = (*c.prune_before, c.reactivate), self.patch_embed.grid
        self.text = TextEncoder(c.num_classes, c.length, c.width, c.heads)
        self.constant = Embedding(1, c.width) if c.choose == "constant" else None
        asked = c.choose in ("sentence", "constant")
        self.prune_head = PruneDecoder(c.dim, c.width, c.heads, grid) if asked else None
        self.mask_decoder = MaskDecoder(c.dim, c.width, c.heads, grid, c.patch_size)
        for part in (self.text, self.prune_head, self.mask_decoder):
            if part is not None:
                nn.initialise(part)
        start_guides(self)

    def forward(self, images: Tensor | Array, words: Array | None = None, trace: bool = False,
                paths: Array | None = None, ratios: Any = None, keep: list | None = None,
                draw: Array | None = None) -> VLTPOutput:
        """words: the sentences; None: empty ones. ratios: in place of the model's, one for each place, or an
        array (B, places) with each picture's own. keep: for each place a mask (B, N) of what goes on, in
        place of the rule; what has been dropped stays so. draw: see `noise`.

        In eval mode what is dropped is not computed, and a place at which all go on costs nothing; in train
        mode and with trace=True it is hidden."""
        c, places = self.config, len(self.config.prune_before)
        given, shares = hasattr(ratios, "shape"), c.keep_ratios if ratios is None else ratios
        expect(not given or ratios.shape == (len(images), places), "VLTP",
               lambda: f"{shape_of('ratios', ratios)}, expected {(len(images), places)}")
        expect(keep is None or len(keep) == places, "VLTP", f"{len(keep or ())} masks for {places} places")
        tokens = self.start(images, trace, paths, GuidedTokens, forced=keep, draw=draw,
                            shares=shares.T if given else c.shares(shares))
        tokens.guide = self.text(self.checked(words, tokens.x))
        return self.read(self.encode(tokens) if self.training or trace else self.encode_kept(tokens))

    def checked(self, words: Any, x: Tensor) -> Array:
        """The words (B, length) of a batch with the tokens x; InputError for others."""
        c, xp = self.config, array_module(x.data)
        if words is None:
            return xp.zeros((len(x), c.length), "int64")
        expect(words.shape == (len(x), c.length) and words.dtype.kind in "iu", "VLTP",
               lambda: f"{shape_of('words', words)} {words.dtype}, expected {(len(x), c.length)} integers")
        fits = xp is not np or ((words >= 0) & (words < c.num_classes)).all()
        expect(fits, "VLTP", lambda: f"words from {words.min()} to {words.max()}, expected 0 to "
                                     f"{c.num_classes - 1}")
        return words.astype("int64")

    def read(self, tokens: GuidedTokens) -> VLTPOutput:
        tokens.x = self.norm(tokens.x)
        logits = self.mask_decoder(tokens.patches, tokens.guide)
        return VLTPOutput(logits, tokens.patches, tokens.attention or [], tokens.scores, tokens.kept)

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None) -> Loss:
        """targets (B, H, W): 1 for the pixels of the object, 0 for others. Binary cross-entropy and Dice loss
        of the pixels, and binary cross-entropy of the scores, the mean over the places. InputError for a
        teacher, or targets of another shape."""
        expect(teacher is None, "VLTP", "a teacher, expected none")
        expect(targets.shape == out.logits.shape, "VLTP",
               lambda: f"{shape_of('targets', targets)} for {shape_of('logits', out.logits)}, expected one "
                       f"shape")
        goal, (rows, columns) = targets.astype(out.logits.dtype), self.patch_embed.grid
        flat = goal.reshape(len(goal), -1, 1)
        parts: Any = {"class": ops.binary_cross_entropy(out.logits, goal * (1 - smoothing) + smoothing / 2),
                      "dice": dice_loss(out.logits.reshape(*flat.shape), flat).mean()}
        if out.scores:
            cells = goal.reshape(len(goal), rows, goal.shape[1] // rows, columns, -1).mean(axis=(2, 4))
            there = (cells.reshape(len(goal), -1) > OBJECT).astype(goal.dtype)
            parts["scores"] = sum(ops.binary_cross_entropy(each, there) for each in out.scores) * (
                1 / len(out.scores))
        return weighted_sum(weights or self.loss_weights, parts), parts

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        return [(f"VLTP: what goes on into block {i}", to_numpy(kept))
                for i, kept in zip(self.config.prune_before, out.kept)]
