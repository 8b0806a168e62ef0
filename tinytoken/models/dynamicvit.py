"""DynamicViT (Rao et al. 2021, arXiv 2106.02034): drops tokens, by masking in training, by removing after it.

Between some blocks a predictor scores the patch tokens. In training each score becomes a random 0/1 decision
with a gradient (Gumbel-softmax, straight-through); dropped tokens stay in the tensor, and a mask hides them
from the others' attention. At inference the int(N * ratio) best tokens are gathered, and the rest is gone.
The masked softmax is exact (ops.attention), so for the same decisions both give the same class logits.
Column 0 of a predictor's output is "keep", as in the official code.
"""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import ops, random
from ..backend import Array, array_module, to_numpy
from ..errors import expect
from ..tensor import Tensor
from .base import Loss, Output, model
from .column import ColumnConfig
from .pruning import Predictor, dynamicvit_loss, mask_of
from .vit import Tokens, ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicViTConfig(ColumnConfig):
    """prune_before: the blocks before which tokens are dropped. keep_ratios: the share of the N patches that
    is left after each, 0 < ratio <= 1, not rising. official: the official code's masked softmax in training,
    from the first block on (with ones before the first predictor)."""
    prune_before: tuple[int, ...] = (1, 3, 5)
    keep_ratios: tuple[float, ...] = (0.7, 0.49, 0.343)
    official: bool = False

    def __post_init__(self):
        super().__post_init__()
        places, ratios = self.prune_before, self.keep_ratios
        for name, values in (("prune_before", places), ("keep_ratios", ratios)):
            self.check(isinstance(values, tuple),
                       f"{name} {values!r}, expected one per stage: a tuple or list")
        self.check(len(places) == len(ratios) > 0,
                   f"{len(places)} places to prune and {len(ratios)} keep ratios")
        in_range = all(isinstance(i, (int, np.integer)) and 0 <= i < self.depth for i in places)
        self.check(in_range and list(places) == sorted(set(places)),
                   f"prune_before {places}, expected rising block numbers from 0 to {self.depth - 1}")
        self.check(all(0 < r <= 1 for r in ratios), f"keep_ratios {ratios}, expected 0 < ratio <= 1")
        self.check(list(ratios) == sorted(ratios, reverse=True),
                   f"keep_ratios {ratios} rise; they are of the original number of tokens, so they cannot")
        self.check(self.dim % 4 == 0, f"dim {self.dim}, expected a multiple of 4 "
                                      f"(the predictor's last hidden width is dim / 4)")


@dataclasses.dataclass
class DynamicOutput(Output):
    """In eval mode, kept[s]: which patches stage s keeps, (B, k), ascending; tokens: those of the last stage.

    In train mode, decisions[s] (B, N): the decisions of stage s times the earlier ones; keep (B, N): the last
    of them, detached; tokens: all N."""
    kept: list[Array] = dataclasses.field(default_factory=list)
    decisions: list[Tensor] = dataclasses.field(default_factory=list)
    keep: Tensor | None = None


@dataclasses.dataclass
class DynamicTokens(Tokens):
    """noise, hard, forced: arguments of the call (forced: `keep`). decisions, kept: of the stages so far."""
    noise: list[Array] | None = None
    hard: bool = True
    forced: list[Any] | None = None
    decisions: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Array] = dataclasses.field(default_factory=list)


@model("dynamicvit")
class DynamicViT(ViT):
    """A ViT with a class token that drops patch tokens before the blocks `prune_before`.

    After stage s int(N * keep_ratios[s]) of the N patches are left. images (B, channels, H, W) ->
    DynamicOutput; in train mode by masking, in eval mode by removing. Of equal scores eval mode keeps those
    of the first places; the official code's sort leaves open which are kept.

    Another model with one column of tokens drops its own by class Dynamic...(DynamicViT, ThatModel)."""
    Config = DynamicViTConfig
    Output: type[DynamicOutput] = DynamicOutput
    task = "distil"
    loss_weights = (1, 2, 0.5, 0.5)  # of class, ratio, kl, token

    def build(self, c: Any) -> None:
        self.prune_before, self.keep_ratios = c.prune_before, c.keep_ratios
        self.official = c.official
        self.score_predictor: list[Any] = [Predictor(c.dim) for _ in c.prune_before]
        super().build(c)
        self.counts = [int(self.num_patches * ratio) for ratio in c.keep_ratios]
        expect(self.counts[-1] > 0, "DynamicViT",
               f"keep ratio {c.keep_ratios[-1]} of {self.num_patches} tokens keeps none")
        # The untrained predictors are biased to the ratios that they are to reach. The official ones start
        # at one half per stage, and a short fine-tuning spends most of its steps on the way from there.
        for predictor, ratio, before in zip(self.score_predictor, c.keep_ratios, (1.0, *c.keep_ratios)):
            share = min(ratio / before, 0.99)
            predictor.out_conv[-1].bias.data[...] = math.log(share), math.log(1 - share)

    def forward(self, images: Tensor | Array, noise: Any = None, hard: bool = True, keep: list | None = None,
                trace: bool = False, paths: Array | None = None) -> DynamicOutput:
        """keep: per stage, a mask (B, N) that replaces the decision. It acts by masking in train mode and by
        gathering in eval mode, where every image must keep as many patches.

        Only in train mode: noise, Gumbel draws that are added to the log-probabilities, (B, N, 2) per stage
        or (B, S, N, 2) for all; None draws them. hard=False: decisions stay soft. paths: as in ViT."""
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

    def before_block(self, i: int, tokens: DynamicTokens) -> None:
        if i in self.prune_before:
            (self.mask if self.training else self.remove)(self.prune_before.index(i), tokens)

    def mask(self, stage: int, tokens: DynamicTokens) -> None:
        """In training: decide, and hide what is dropped from the other tokens' attention."""
        previous = tokens.decisions[-1] if tokens.decisions else None
        decision = (self.decide(stage, tokens, previous) if tokens.forced is None
                    else mask_of(tokens.forced[stage], tokens.x, self.num_patches))
        tokens.decisions.append(decision if previous is None else decision * previous)
        # the class token, and what else is no patch, is always kept
        ones = array_module(tokens.x.data).ones((len(tokens.x), tokens.extra), tokens.x.dtype)
        tokens.keep = ops.concat(ones, tokens.decisions[-1], axis=1)

    def decide(self, stage: int, tokens: DynamicTokens, previous: Tensor | None) -> Tensor:
        """The decisions (B, N) of one stage, before they are multiplied by the earlier ones."""
        patches, xp = tokens.patches, array_module(tokens.x.data)
        if previous is None:
            previous = Tensor(xp.ones(patches.shape[:2], patches.dtype))
        log_probs = self.score_predictor[stage](patches, previous)
        draw = self.draw(stage, len(patches), xp=xp) if tokens.noise is None else tokens.noise[stage]
        return ops.gumbel_softmax(log_probs, draw, hard=tokens.hard)[:, :, 0]

    def draw(self, stage: int, size: int, **options: Any) -> Array:
        """Gumbel draws (size, N, 2) of one stage. options: step, seed and xp, as in random.gumbel."""
        return random.gumbel((size, self.num_patches, 2), site=f"score_predictor.{stage}", **options)

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        stages = range(len(self.prune_before))
        return {"noise": xp.stack([self.draw(s, size, step=step, seed=seed, xp=xp) for s in stages], axis=1)}

    def remove(self, stage: int, tokens: DynamicTokens) -> None:
        """At inference: go on with the tokens of the highest scores, or with those that are forced."""
        if tokens.forced is None:
            places = ops.top_k(self.score_predictor[stage](tokens.patches)[:, :, 0], self.counts[stage])
        else:
            mask = mask_of(tokens.forced[stage], tokens.x, self.num_patches).data
            places = _places(array_module(mask).take_along_axis(mask, tokens.index, axis=1))
        tokens.take(places)
        tokens.kept.append(tokens.index)

    def read(self, tokens: DynamicTokens) -> DynamicOutput:
        out = super().read(tokens)
        keep = tokens.decisions[-1].detach() if tokens.decisions else None
        return self.Output(**vars(out), kept=tokens.kept, decisions=tokens.decisions, keep=keep)

    def loss(self, out: DynamicOutput, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None, token_norm: str = "image", **options: str) -> Loss:
        """The paper's four losses, see `dynamicvit_loss`; without a teacher, only class and ratio."""
        logits, tokens = (None, None) if teacher is None else (teacher.logits, teacher.tokens)
        return dynamicvit_loss(out, targets, logits, tokens, self.keep_ratios, token_norm=token_norm,
                               weights=weights or self.loss_weights, smoothing=smoothing,
                               class_loss=self.class_loss, **options)

    def show(self, out: DynamicOutput) -> list[tuple[str, np.ndarray]]:
        patches = np.arange(self.num_patches)
        return [(f"{type(self).__name__} keeps {kept.shape[1]} of {len(patches)}",
                 (to_numpy(kept)[:, :, None] == patches).any(axis=1)) for kept in out.kept]


def per_stage(noise: Any) -> list[Array] | None:
    """Draws as a list with an array per stage, from such a list or from one array (B, S, N, 2)."""
    return [noise[:, s] for s in range(noise.shape[1])] if hasattr(noise, "shape") else noise


def _places(mask):
    """The places of the ones in each row, ascending: (B, k), so every row must have as many."""
    counts = {int(n) for n in (mask > 0.5).sum(axis=1)}
    expect(len(counts) == 1, "DynamicViT",
           lambda: f"forced decisions keep {min(counts)} to {max(counts)} tokens: in eval mode every image "
                   f"must keep as many")
    return ops.top_k(mask, counts.pop())
