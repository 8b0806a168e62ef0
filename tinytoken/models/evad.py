"""EVAD (Chen et al. 2023, arXiv 2304.08451, "Efficient Video Action Detection with Token Dropout and Context
Refinement"): what each actor does in a clip, where boxes say where they are in one frame, the key frame.

The encoder (keyframe.py) keeps the key frame's tokens and drops others. For the decoder (refining.py) the
tokens that are left stand in their places again, and a learned token in the others. What lies in an actor's
box, grown a little, in all slots, becomes the actor's token. It reads the tokens that are left, and the other
actors, and answers. Names are the official ones.

The paper finds the boxes, too; here they are given. The official code puts the tokens that are left into one
another's places, since it takes them to be sorted by place and they are sorted by score: `official`.
"""
import dataclasses
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module, to_numpy
from ..errors import expect, shape_of
from ..tensor import Tensor
from .base import Loss, Output, is_whole, model, weighted_sum
from .keyframe import KeyFrameViT
from .keyrules import KeyFrameConfig, KeyTokens
from .refining import Refinement

@dataclasses.dataclass(frozen=True, kw_only=True)
class EVADConfig(KeyFrameConfig):
    """num_classes: the actions. decoder_dim, decoder_depth, decoder_heads: of the decoder, which has the
    encoder's mlp_ratio; of depth 0, it answers by what lies in the box alone. hidden: the width of the layer
    before the answers. official: see above."""
    decoder_dim: int = 48
    decoder_depth: int = 2
    decoder_heads: int = 4
    hidden: int = 48
    official: bool = False
    positive = (*KeyFrameConfig.positive, "decoder_dim", "decoder_heads", "hidden")

    def __post_init__(self):
        super().__post_init__()
        self.check(is_whole(self.decoder_depth) and self.decoder_depth >= 0,
                   f"decoder_depth {self.decoder_depth!r}, expected a whole number that is not negative")
        self.check(self.decoder_dim % self.decoder_heads == 0,
                   f"decoder_heads {self.decoder_heads} do not divide decoder_dim {self.decoder_dim}")


@dataclasses.dataclass
class EVADOutput(Output):
    """logits (B, P, K): of each actor. tokens (B, n, D): those that are left. answers: the logits after each
    block of the decoder, the last ones being `logits`. Of each block of prune_in, kept (B, k): which tokens
    of the clip are left, ascending. scores (B, n): where tokens were dropped, those of the ones that might
    be, in the order of their places without the key slot."""
    answers: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)
    scores: list[Array] = dataclasses.field(default_factory=list)


@model("evad")
class EVAD(KeyFrameViT):
    """An EVAD. clips (B, frames, channels, H, W), boxes (B, P, 4) -> EVADOutput."""
    Config: Any = EVADConfig
    norm: Any
    task = "actions"
    loss_weights = (1, 1)  # of class, aux

    def build(self, c: Any) -> None:
        super().build(c)
        self.det_head = Refinement(c, self.patch_embed.grid)
        nn.normal(self.det_head.mask_token, "det_head.mask_token", std=0.02)
        nn.initialise(self, keys_as_queries=c.keys_as_queries)

    def forward(self, clips: Tensor | Array, boxes: Array | None = None,  # type: ignore[override]
                trace: bool = False, paths: Array | None = None, noise: Array | None = None,
                hide: bool = False) -> EVADOutput:
        """boxes: of each actor in the key frame (left, top, right, bottom) in pixels; one without an area is
        of nobody, whom the others do not read. None: one actor, the whole picture. noise: draws of the rule
        "random". hide: tokens are not dropped, but hidden: the same answers, and nothing is saved."""
        expect(not (hide and self.config.official), "EVAD",
               "hide with official=True, whose order only tokens have that were dropped")
        boxes = self.checked(boxes, clips)
        tokens = self.encode(self.start(clips, trace, paths, noise=noise, hide=hide))
        x, places = self.norm(tokens.x), self.places(tokens)
        answers = self.det_head(x, self.exchanged(places, tokens), tokens.keep, boxes)
        if tokens.keep is not None:
            x = ops.take_tokens(x, ops.top_k(tokens.keep, self.counts[-1]))
        return EVADOutput(answers[-1], x, tokens.attention or [], answers, tokens.kept, tokens.scores)

    def checked(self, boxes: Any, clips: Any) -> Array:
        """The boxes as numbers of the weights' kind. InputError unless they fit the clips."""
        weight = self.norm.weight.data
        xp, (height, width) = array_module(weight), nn.both_sides(self.config.image_size)
        if boxes is None:
            whole = xp.asarray([[[0, 0, width, height]]], weight.dtype)
            return xp.broadcast_to(whole, (len(clips), 1, 4))
        boxes = boxes.data if isinstance(boxes, Tensor) else boxes
        expect(boxes.ndim == 3 and boxes.shape[::2] == (len(clips), 4) and boxes.shape[1], "EVAD",
               lambda: f"{shape_of('boxes', boxes)} for {len(clips)} clips, expected (B, P, 4)")
        return boxes.astype(weight.dtype)

    def exchanged(self, places: Array, tokens: KeyTokens) -> Array:
        """Where the decoder takes the tokens to stand: at their places; official: of those that might have
        been dropped, the one with the highest score at the first place, and so on."""
        if not self.config.official or tokens.rank is None:
            return places
        xp, extra = array_module(places), tokens.extra
        mixed = xp.take_along_axis(places[:, extra:], tokens.rank, axis=1)
        return xp.concatenate([places[:, :extra], mixed], axis=1)

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None) -> Loss:
        """Cross-entropy of the actions after each block of the decoder, "class" after the last, "aux" the sum
        of the others: the mean over a clip's actors, then over the clips. targets (B, P): an action's number,
        or -1 for nobody; (B,) where each clip has one. InputError for a teacher."""
        expect(teacher is None, "EVAD", "a teacher, expected none")
        B, P, K = out.logits.shape
        xp, given = array_module(out.logits.data), targets.reshape(B, -1)
        expect(targets.dtype.kind in "iu" and given.shape == (B, P), "EVAD",
               lambda: f"{shape_of('targets', targets)} {targets.dtype}, expected whole numbers {(B, P)}")
        wanted = (given[:, :, None] == xp.arange(K)).astype(out.logits.dtype)
        there = wanted.sum(axis=2, keepdims=True)
        share = there / xp.maximum(there.sum(axis=1, keepdims=True), 1) / B
        wanted = (wanted * (1 - smoothing) + smoothing / K) * share
        each = [-(ops.log_softmax(logits) * wanted).sum() for logits in out.answers]
        parts: Any = {"class": each[-1]}
        if len(each) > 1:
            parts["aux"] = sum(each[1:-1], each[0])
        return weighted_sum(weights or self.loss_weights, parts), parts

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        places, N = np.arange(self.num_patches), self.num_patches
        return [(f"EVAD: {kept.shape[1]} of {N} tokens after block {i}",
                 (to_numpy(kept)[:, :, None] == places).any(axis=1))
                for i, kept in zip(self.config.prune_in, out.kept)]
