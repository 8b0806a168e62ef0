"""DynamicViT (Rao et al. 2021, arXiv 2106.02034): score tokens, choose with Gumbel-softmax, train by masking, infer by removing.

Between some blocks a predictor scores the patch tokens. In training each score becomes a random 0/1 decision with a gradient
(Gumbel-softmax, straight-through); dropped tokens stay in the tensor and a mask hides them from the others' attention. At
inference the int(N * ratio) best tokens are gathered and the rest is gone. The masked softmax is exact (ops.attention), so
that for the same decisions both give the same class logits. Column 0 of a predictor's output is "keep", as in the official code.
"""
import dataclasses
import math

import numpy as np

from .. import nn, ops, random
from ..backend import array_module
from ..errors import expect
from ..tensor import Tensor
from .vit import Trace, ViT, of_block


@dataclasses.dataclass
class DynamicOutput:
    """What training needs. logits (B, K); tokens (B, N, D), final-norm patch tokens; decisions[s] (B, N), each times the earlier
    ones; keep (B, N), the last of them, detached."""
    logits: Tensor
    tokens: Tensor
    decisions: list
    keep: Tensor


class Predictor(nn.Module):
    """The prediction module (section 3.2): half the channels stay local, half become their mean over the kept tokens.
    x (B, n, dim), keep (B, n) or None for all -> log-probabilities (B, n, 2), column 0 = keep. Names as in the official code."""

    def __init__(self, dim):
        self.in_conv = [nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim)]
        self.out_conv = [nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)]

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


class DynamicViT(ViT):
    """A ViT with a class token that drops tokens before the blocks `prune_before`, down to int(N * keep_ratios[s]) of the N
    patches after stage s. Ratios are of the original N: 0 < ratio <= 1, not rising.

    train mode: images -> DynamicOutput; eval mode: images -> logits (B, K); with trace=True also a Trace.
    official: the official code's masked softmax in training, from the first block on (with ones before the first predictor).
    """

    def __init__(self, image_size=32, patch_size=4, dim=96, depth=6, heads=3, mlp_ratio=4, num_classes=10, *,
                 prune_before=(1, 3, 5), keep_ratios=(0.7, 0.49, 0.343), official=False, channels=3, qkv_bias=True):
        _check_stages(prune_before, keep_ratios, depth)
        expect(dim % 4 == 0, "DynamicViT", f"dim {dim}, expected a multiple of 4 (the predictor's last hidden width is dim / 4)")
        self.score_predictor = [Predictor(dim) for _ in prune_before]
        super().__init__(image_size, patch_size, dim, depth, heads, mlp_ratio, num_classes, channels=channels, qkv_bias=qkv_bias)
        del self.config["pool"]
        self.config.update(prune_before=tuple(prune_before), keep_ratios=tuple(keep_ratios), official=official)
        self.prune_before, self.keep_ratios, self.official = tuple(prune_before), tuple(keep_ratios), official
        self.counts = [int(self.num_patches * ratio) for ratio in keep_ratios]
        expect(self.counts[-1] > 0, "DynamicViT", f"keep ratio {keep_ratios[-1]} of {self.num_patches} tokens keeps none")
        self._start_at_ratios()

    def _start_at_ratios(self):
        """Bias the untrained predictors to the ratios that they are to reach. The official ones start at one half per stage,
        which costs a short fine-tuning most of its steps."""
        before = 1.0
        for predictor, ratio in zip(self.score_predictor, self.keep_ratios):
            keep = min(ratio / before, 0.99)
            predictor.out_conv[-1].bias.data[...] = math.log(keep), math.log(1 - keep)
            before = ratio

    def forward(self, images, noise=None, hard=True, keep=None, trace=False, paths=None):
        """noise: per stage, Gumbel draws (B, N, 2) added to the log-probabilities; None draws them. hard=False: decisions stay
        soft. paths: factors (B, depth, 2) of the residual branches (train.drop_paths). All three belong to train mode. keep: per
        stage, a mask (B, N) that replaces the decision; it holds by masking in train mode and by gathering in eval mode, where
        every image must keep the same number."""
        for name, given in (("noise", noise), ("keep", keep)):
            expect(given is None or len(given) == len(self.prune_before), "DynamicViT",
                   lambda: f"{len(given)} arrays of {name} for {len(self.prune_before)} stages")
        expect(self.training or noise is None and hard and paths is None, "DynamicViT",
               "noise, paths or hard=False in eval mode, where the best scores are kept and nothing is drawn: call .train() first")
        record = Trace()
        attention = record.attention if trace else None
        x = self.embed(images)
        out = self._masked(x, noise, hard, keep, attention, paths) if self.training else self._gathered(x, keep, attention, record)
        if not trace:
            return out if self.training else out[0]
        record.tokens = out.tokens if self.training else out[1]
        return (out if self.training else out[0]), record

    def _masked(self, x, noise, hard, keep, attention, paths):
        decisions, policy = [], self._policy(x, None) if self.official else None
        for i, block in enumerate(self.blocks):
            if i in self.prune_before:
                stage, previous = len(decisions), decisions[-1] if decisions else None
                if keep is None:
                    decision = self._decide(stage, self.patches(x), previous, noise, hard)
                else:
                    decision = _mask(keep[stage], x, self.num_patches)
                decisions.append(decision if previous is None else decision * previous)
                policy = self._policy(x, decisions[-1])
            x = block(x, policy, self.official, attention, of_block(paths, i))
        x = self.norm(x)
        return DynamicOutput(self.classify(x), self.patches(x), decisions, decisions[-1].detach())

    def _decide(self, stage, patches, previous, noise, hard):
        """The decisions (B, N) of one stage, before they are multiplied by the earlier ones."""
        shape = (*patches.shape[:2], 2)
        if previous is None:
            previous = Tensor(array_module(patches.data).ones(shape[:2], patches.dtype))
        log_probs = self.score_predictor[stage](patches, previous)
        draw = noise[stage] if noise is not None else random.gumbel(
            shape, site=f"score_predictor.{stage}", xp=array_module(patches.data))
        return ops.gumbel_softmax(log_probs, draw, hard=hard)[:, :, 0]

    def _policy(self, x, decision):
        """(B, N + 1): the class token is always kept; without a decision so is everything."""
        ones = array_module(x.data).ones(x.shape[:2], x.dtype)
        return Tensor(ones) if decision is None else ops.concat(ones[:, :1], decision, axis=1)

    def _gathered(self, x, keep, attention, record):
        xp = array_module(x.data)
        kept = xp.broadcast_to(xp.arange(self.num_patches), (len(x), self.num_patches))
        for i, block in enumerate(self.blocks):
            if i in self.prune_before:
                stage, patches = len(record.kept), self.patches(x)
                if keep is None:
                    places = ops.top_k(self.score_predictor[stage](patches)[:, :, 0], self.counts[stage])
                else:
                    mask = _mask(keep[stage], x, self.num_patches).data
                    places = _places(xp.take_along_axis(mask, kept, axis=1))
                kept = xp.take_along_axis(kept, places, axis=1)
                record.kept.append(kept)
                x = ops.take_tokens(x, xp.pad(places + 1, ((0, 0), (1, 0))))  # place 0: the class token
            x = block(x, trace=attention)
        x = self.norm(x)
        return self.classify(x), self.patches(x)


def _check_stages(prune_before, keep_ratios, depth):
    for name, given in (("prune_before", prune_before), ("keep_ratios", keep_ratios)):
        expect(isinstance(given, (tuple, list)), "DynamicViT", f"{name} {given!r}, expected one per stage: a tuple or list")
    expect(len(prune_before) == len(keep_ratios) > 0, "DynamicViT",
           f"{len(prune_before)} places to prune and {len(keep_ratios)} keep ratios")
    expect(all(isinstance(i, (int, np.integer)) for i in prune_before) and list(prune_before) == sorted(set(prune_before))
           and 0 <= prune_before[0] and prune_before[-1] < depth, "DynamicViT",
           f"prune_before {tuple(prune_before)}, expected rising block numbers from 0 to {depth - 1}")
    expect(all(0 < r <= 1 for r in keep_ratios), "DynamicViT", f"keep_ratios {tuple(keep_ratios)}, expected 0 < ratio <= 1")
    expect(list(keep_ratios) == sorted(keep_ratios, reverse=True), "DynamicViT",
           f"keep_ratios {tuple(keep_ratios)} rise; they are of the original number of tokens, so they cannot")


def _mask(keep, x, patches):
    """A forced decision as a Tensor (B, N) of the model's dtype."""
    expected = (len(x), patches)
    expect(tuple(keep.shape) == expected, "DynamicViT", lambda: f"keep {tuple(keep.shape)}, expected (B, N) = {expected}")
    return keep if isinstance(keep, Tensor) else Tensor(keep.astype(x.dtype))


def _places(mask):
    """The places of the ones in each row, ascending. Every row must have as many, or there is no array to gather into."""
    counts = {int(n) for n in (mask > 0.5).sum(axis=1)}
    expect(len(counts) == 1, "DynamicViT",
           lambda: f"forced decisions keep {min(counts)} to {max(counts)} tokens: in eval mode every image must keep as many")
    return ops.top_k(mask, counts.pop())


def dynamicvit_loss(out, targets, teacher_logits, teacher_tokens, keep_ratios, *, weights=(1, 2, 0.5, 0.5),
                    token_norm="pooled", smoothing=0.0):
    """The four losses of the paper -> (loss, parts). out: a DynamicOutput; teacher_logits (B, K) and teacher_tokens (B, N, D)
    from the dense network, detached; weights of (class, ratio, kl, token), the ratio's divided by the number of stages.

    class: cross-entropy. ratio: sum over stages of mean_b (mean_n D - r)^2 (eq. 15, per image as in the code). kl: KL(teacher ||
    student). token: mean squared difference over the tokens that the last decision keeps; token_norm="pooled" averages over all
    kept tokens of the batch (official), "image" over each image's and then over images, which a batch may be cut for.
    """
    expect(len(keep_ratios) == len(out.decisions), "dynamicvit_loss",
           f"{len(keep_ratios)} keep ratios for {len(out.decisions)} stages")
    expect(token_norm in ("pooled", "image"), "dynamicvit_loss", f"token_norm {token_norm!r}, expected pooled or image")
    expect(len(weights) == 4, "dynamicvit_loss", f"{len(weights)} weights, expected 4: class, ratio, kl, token")
    ratio = 0
    for decision, wanted in zip(out.decisions, keep_ratios):
        ratio = ratio + ((decision.mean(axis=1) - wanted) ** 2).mean()
    keep = (out.keep.data > 0.5).astype(out.tokens.dtype)
    errors = ops.mse(out.tokens, teacher_tokens, axis=2) * keep
    kept = keep.sum(axis=1) if token_norm == "image" else keep.sum().reshape(1)
    sums = errors.sum(axis=1) if token_norm == "image" else errors.sum().reshape(1)
    parts = {
        "class": ops.cross_entropy(out.logits, targets, smoothing=smoothing),
        "ratio": ratio,
        "kl": ops.kl_divergence(out.logits, teacher_logits),
        "token": (sums / (kept + (kept == 0))).mean(),
    }
    shares = (weights[0], weights[1] / len(keep_ratios), *weights[2:])
    loss = 0
    for share, part in zip(shares, parts.values()):
        loss = loss + part * share
    return loss, parts
