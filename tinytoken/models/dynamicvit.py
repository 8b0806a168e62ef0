"""DynamicViT (Rao et al. 2021, arXiv 2106.02034): score tokens, choose with Gumbel-softmax, train by masking,
infer by removing.

Between some blocks a predictor scores the patch tokens. In training each score becomes a random 0/1 decision
with a gradient (Gumbel-softmax, straight-through); dropped tokens stay in the tensor and a mask hides them
from the others' attention. At inference the int(N * ratio) best tokens are gathered and the rest is gone. The
masked softmax is exact (ops.attention), so that for the same decisions both give the same class logits.
Column 0 of a predictor's output is "keep", as in the official code.
"""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import nn, ops, random
from ..backend import Array, array_module, to_numpy
from ..errors import expect
from ..tensor import Tensor
from .base import Output, Sizes, model, weighted_sum
from .vit import Tokens, ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicViTConfig(Sizes):
    """prune_before: the blocks before which tokens are dropped; keep_ratios: the share of the N patches that
    is left after each, 0 < ratio <= 1, not rising. official: the official code's masked softmax in training,
    from the first block on (with ones before the first predictor)."""
    qkv_bias: bool = True
    prune_before: tuple[int, ...] = (1, 3, 5)
    keep_ratios: tuple[float, ...] = (0.7, 0.49, 0.343)
    official: bool = False
    pool = "token"  # no option: the class token is read

    def __post_init__(self):
        places, ratios = self.prune_before, self.keep_ratios
        for name, values in (("prune_before", places), ("keep_ratios", ratios)):
            expect(isinstance(values, (tuple, list)), self.where,
                   f"{name} {values!r}, expected one per stage: a tuple or list")
        expect(len(places) == len(ratios) > 0, self.where,
               f"{len(places)} places to prune and {len(ratios)} keep ratios")
        expect(all(isinstance(i, (int, np.integer)) for i in places) and list(places) == sorted(set(places))
               and 0 <= places[0] and places[-1] < self.depth, self.where,
               f"prune_before {tuple(places)}, expected rising block numbers from 0 to {self.depth - 1}")
        expect(all(0 < r <= 1 for r in ratios), self.where,
               f"keep_ratios {tuple(ratios)}, expected 0 < ratio <= 1")
        expect(list(ratios) == sorted(ratios, reverse=True), self.where,
               f"keep_ratios {tuple(ratios)} rise; they are of the original number of tokens, so they cannot")
        expect(self.dim % 4 == 0, self.where,
               f"dim {self.dim}, expected a multiple of 4 (the predictor's last hidden width is dim / 4)")
        super().__post_init__()


@dataclasses.dataclass
class DynamicOutput(Output):
    """kept[s], in eval mode: the numbers (B, k) of the patches kept by stage s, ascending. decisions[s], in
    train mode: (B, N), each times the earlier ones; keep (B, N): the last of them, detached; `tokens` are
    then all N."""
    kept: list[Array] = dataclasses.field(default_factory=list)
    decisions: list[Tensor] = dataclasses.field(default_factory=list)
    keep: Tensor | None = None


@dataclasses.dataclass
class DynamicTokens(Tokens):
    """noise, hard, forced: of the call. decisions, kept: of the stages so far."""
    noise: list | None = None
    hard: bool = True
    forced: list | None = None
    decisions: list = dataclasses.field(default_factory=list)
    kept: list = dataclasses.field(default_factory=list)


class Predictor(nn.Module):
    """The prediction module (section 3.2): half the channels stay local, half become their mean over the kept
    tokens. x (B, n, dim), keep (B, n) or None for all -> log-probabilities (B, n, 2), column 0 = keep. Names
    as in the official code."""

    def __init__(self, dim):
        self.in_conv = [nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim)]
        self.out_conv = [nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
                         nn.Linear(dim // 4, 2)]

    def forward(self, x, keep=None):
        for layer in self.in_conv:
            x = layer(x)
        x = ops.gelu(x)
        half = x.shape[2] // 2
        local, shared = x[:, :, :half], x[:, :, half:]
        if keep is None:
            mean = shared.mean(axis=1, keepdims=True)
        else:
            keep = _mask(keep, x, x.shape[1]).reshape(len(x), -1, 1)
            total = keep.sum(axis=1, keepdims=True)
            mean = (shared * keep).sum(axis=1, keepdims=True) / (total + (total.data == 0))
        x = ops.concat(local, ops.broadcast_to(mean, shape=local.shape), axis=2)
        for layer in self.out_conv:
            x = layer(x)
        return ops.log_softmax(x)


@model("dynamicvit")
class DynamicViT(ViT):
    """A ViT with a class token that drops tokens before the blocks `prune_before`, down to int(N *
    keep_ratios[s]) of the N patches after stage s. images (B, channels, H, W) -> DynamicOutput; in train mode
    by masking, in eval mode by removing."""
    Config: type[Sizes] = DynamicViTConfig
    task = "distil"
    loss_weights = (1, 2, 0.5, 0.5)  # of class, ratio, kl, token

    def build(self, c):
        self.prune_before, self.keep_ratios, self.official = c.prune_before, c.keep_ratios, c.official
        self.score_predictor = [Predictor(c.dim) for _ in c.prune_before]
        super().build(c)
        self.counts = [int(self.num_patches * ratio) for ratio in c.keep_ratios]
        expect(self.counts[-1] > 0, "DynamicViT",
               f"keep ratio {c.keep_ratios[-1]} of {self.num_patches} tokens keeps none")
        self._start_at_ratios()

    def _start_at_ratios(self):
        """Bias the untrained predictors to the ratios that they are to reach. The official ones start at one
        half per stage, which costs a short fine-tuning most of its steps."""
        before = 1.0
        for predictor, ratio in zip(self.score_predictor, self.keep_ratios):
            keep = min(ratio / before, 0.99)
            predictor.out_conv[-1].bias.data[...] = math.log(keep), math.log(1 - keep)
            before = ratio

    def forward(self, images: Tensor | Array, noise: Array | list | None = None, hard: bool = True,
                keep: list | None = None, trace: bool = False, paths: Array | None = None) -> DynamicOutput:
        """noise: Gumbel draws that are added to the log-probabilities, (B, N, 2) per stage or (B, S, N, 2)
        for all; None draws them. hard=False: decisions stay soft. paths: as of ViT. All three belong to train
        mode. keep: per stage, a mask (B, N) that replaces the decision; it holds by masking in train mode and
        by gathering in eval mode, where every image must keep the same number."""
        draws = per_stage(noise)
        for name, arrays in (("noise", draws), ("keep", keep)):
            expect(arrays is None or len(arrays) == len(self.prune_before), "DynamicViT",
                   f"{len(arrays or ())} arrays of {name} for {len(self.prune_before)} stages")
        expect(self.training or noise is None and hard and paths is None, "DynamicViT",
               "noise, paths or hard=False in eval mode, where the best scores are kept and nothing is "
               "drawn: call .train() first")
        tokens = self.start(images, trace, paths, DynamicTokens, official=self.official, noise=draws,
                            hard=hard, forced=keep)
        if self.training and self.official:
            tokens.keep = Tensor(array_module(tokens.x.data).ones(tokens.x.shape[:2], tokens.x.dtype))
        return self.read(self.encode(tokens))

    def before_block(self, i, tokens):
        if i in self.prune_before:
            (self.mask if self.training else self.remove)(self.prune_before.index(i), tokens)

    def mask(self, stage, tokens):
        """In training: decide, and hide what is dropped from the other tokens' attention."""
        previous = tokens.decisions[-1] if tokens.decisions else None
        if tokens.forced is None:
            decision = self.decide(stage, tokens, previous)
        else:
            decision = _mask(tokens.forced[stage], tokens.x, self.num_patches)
        tokens.decisions.append(decision if previous is None else decision * previous)
        # the class token is always kept
        ones = array_module(tokens.x.data).ones((len(tokens.x), 1), tokens.x.dtype)
        tokens.keep = ops.concat(ones, tokens.decisions[-1], axis=1)

    def decide(self, stage, tokens, previous):
        """The decisions (B, N) of one stage, before they are multiplied by the earlier ones."""
        patches, xp = tokens.patches, array_module(tokens.x.data)
        if previous is None:
            previous = Tensor(xp.ones(patches.shape[:2], patches.dtype))
        log_probs = self.score_predictor[stage](patches, previous)
        draw = self.draw(stage, len(patches), xp=xp) if tokens.noise is None else tokens.noise[stage]
        return ops.gumbel_softmax(log_probs, draw, hard=tokens.hard)[:, :, 0]

    def draw(self, stage, size, step=None, seed=None, xp=np):
        """Gumbel draws (size, N, 2) of one stage."""
        return random.gumbel((size, self.num_patches, 2), site=f"score_predictor.{stage}", step=step,
                             seed=seed, xp=xp)

    def noise(self, size, step, seed, xp=np):
        draws = [self.draw(stage, size, step, seed, xp) for stage in range(len(self.prune_before))]
        return {"noise": xp.stack(draws, axis=1)}

    def remove(self, stage, tokens):
        """At inference: go on with the tokens of the highest scores, or with those that are forced."""
        if tokens.forced is None:
            places = ops.top_k(self.score_predictor[stage](tokens.patches)[:, :, 0], self.counts[stage])
        else:
            mask = _mask(tokens.forced[stage], tokens.x, self.num_patches).data
            places = _places(array_module(mask).take_along_axis(mask, tokens.index, axis=1))
        tokens.take(places)
        tokens.kept.append(tokens.index)

    def read(self, tokens):
        out, keep = super().read(tokens), tokens.decisions[-1].detach() if tokens.decisions else None
        return DynamicOutput(**vars(out), kept=tokens.kept, decisions=tokens.decisions, keep=keep)

    def loss(self, out, targets, teacher=None, *, smoothing=0.0, weights=None, token_norm="image"):
        """The paper's four losses, see `dynamicvit_loss`; without a teacher class and ratio alone."""
        weights = weights or self.loss_weights
        taught = (None, None) if teacher is None else (teacher.logits, teacher.tokens)
        return dynamicvit_loss(out, targets, *taught, self.keep_ratios, weights=weights,
                               token_norm=token_norm,
                               smoothing=smoothing)

    def show(self, out):
        names = [f"{type(self).__name__} keeps {kept.shape[1]} of {self.num_patches}" for kept in out.kept]
        masks = [(to_numpy(kept)[:, :, None] == np.arange(self.num_patches)).any(axis=1) for kept in out.kept]
        return list(zip(names, masks))


def per_stage(noise: Any) -> list | None:
    """Draws as a list with an array per stage, from that or from one array (B, S, N, 2)."""
    return [noise[:, s] for s in range(noise.shape[1])] if hasattr(noise, "shape") else noise


def _mask(keep, x, patches):
    """A forced decision as a Tensor (B, N) of the model's dtype."""
    expected = (len(x), patches)
    expect(tuple(keep.shape) == expected, "DynamicViT",
           lambda: f"keep {tuple(keep.shape)}, expected (B, N) = {expected}")
    return keep if isinstance(keep, Tensor) else Tensor(keep.astype(x.dtype))


def _places(mask):
    """The places of the ones in each row, ascending. Every row must have as many, or there is no array to
    gather into."""
    counts = {int(n) for n in (mask > 0.5).sum(axis=1)}
    expect(len(counts) == 1, "DynamicViT",
           lambda: f"forced decisions keep {min(counts)} to {max(counts)} tokens: in eval mode every image "
                   f"must keep as many")
    return ops.top_k(mask, counts.pop())


def dynamicvit_loss(out, targets, teacher_logits, teacher_tokens, keep_ratios, *, weights=(1, 2, 0.5, 0.5),
                    token_norm="pooled", smoothing=0.0):
    """The four losses of the paper -> (loss, parts). out: a DynamicOutput of train mode; teacher_logits (B,
    K) and teacher_tokens (B, N, D) from the dense network, detached, or None and no such part; weights of
    (class, ratio, kl, token), the ratio's divided by the number of stages.

    class: cross-entropy. ratio: sum over stages of mean_b (mean_n D - r)^2 (eq. 15, per image as in the
    code). kl: KL(teacher || student). token: mean squared difference over the tokens that the last decision
    keeps; token_norm="pooled" averages over all kept tokens of the batch (official), "image" over each
    image's and then over images, which a batch may be cut for.
    """
    expect(len(keep_ratios) == len(out.decisions), "dynamicvit_loss",
           f"{len(keep_ratios)} keep ratios for {len(out.decisions)} stages")
    expect(token_norm in ("pooled", "image"), "dynamicvit_loss",
           f"token_norm {token_norm!r}, expected pooled or image")
    expect(len(weights) == 4, "dynamicvit_loss",
           f"{len(weights)} weights, expected 4: class, ratio, kl, token")
    ratio = 0
    for decision, wanted in zip(out.decisions, keep_ratios):
        ratio = ratio + ((decision.mean(axis=1) - wanted) ** 2).mean()
    parts = {"class": ops.cross_entropy(out.logits, targets, smoothing=smoothing), "ratio": ratio}
    if teacher_logits is not None:
        parts["kl"] = ops.kl_divergence(out.logits, teacher_logits)
        parts["token"] = _token_loss(out, teacher_tokens, token_norm)
    return weighted_sum((weights[0], weights[1] / len(keep_ratios), *weights[2:]), parts), parts


def _token_loss(out, teacher_tokens, token_norm):
    keep = (out.keep.data > 0.5).astype(out.tokens.dtype)
    errors = ops.mse(out.tokens, teacher_tokens, axis=2) * keep
    kept = keep.sum(axis=1) if token_norm == "image" else keep.sum().reshape(1)
    sums = errors.sum(axis=1) if token_norm == "image" else errors.sum().reshape(1)
    return (sums / (kept + (kept == 0))).mean()
