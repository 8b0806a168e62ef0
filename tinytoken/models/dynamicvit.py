"""DynamicViT (Rao et al. 2021, arXiv 2106.02034): drops tokens, by masking in training, by removing after it.

Between some blocks a predictor scores the patch tokens. In training each score becomes a random 0/1 decision
with a gradient (Gumbel-softmax, straight-through); dropped tokens stay in the tensor, and a mask hides them
from the others' attention. At inference the int(N * ratio) best tokens are gathered, and the rest is gone.
The masked softmax is exact (ops.attention), so for the same decisions both give the same class logits.
Column 0 of a predictor's output is "keep", as in the official code.
"""
import dataclasses
from typing import Any

from .. import ops
from ..backend import Array, array_module
from ..tensor import Tensor
from .base import Output, model
from .column import ColumnConfig
from .pruning import Deciding, Predictor, check_stages, mask_of, places_of
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
        check_stages(self, self.depth, self.dim)


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
class DynamicViT(Deciding, ViT):
    """A ViT with a class token that drops patch tokens before the blocks `prune_before`.

    After stage s int(N * keep_ratios[s]) of the N patches are left. images (B, channels, H, W) ->
    DynamicOutput; in train mode by masking, in eval mode by removing. Of equal scores eval mode keeps those
    of the first places; the official code's sort leaves open which are kept.

    Another model with one column of tokens drops its own by class Dynamic...(DynamicViT, ThatModel)."""
    Config = DynamicViTConfig
    Output: type[DynamicOutput] = DynamicOutput

    def build(self, c: Any) -> None:
        self.score_predictor: list[Any] = [Predictor(c.dim) for _ in c.prune_before]
        super().build(c)
        shares = [ratio / before for ratio, before in zip(c.keep_ratios, (1.0, *c.keep_ratios))]
        self.decide_by(self.score_predictor, shares, self.num_patches)

    def forward(self, images: Tensor | Array, noise: Any = None, hard: bool = True, keep: list | None = None,
                trace: bool = False, paths: Array | None = None) -> DynamicOutput:
        """keep: per stage, a mask (B, N) that replaces the decision. It acts by masking in train mode and by
        gathering in eval mode, where every image must keep as many patches.

        Only in train mode: noise, Gumbel draws that are added to the log-probabilities, (B, N, 2) per stage
        or (B, S, N, 2) for all; None draws them. hard=False: decisions stay soft. paths: as in ViT."""
        tokens = self.start(images, trace, paths, DynamicTokens, official=self.config.official, hard=hard,
                            forced=keep, noise=self.draws_of(noise, hard, keep, paths))
        if self.training and tokens.official:
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

    def remove(self, stage: int, tokens: DynamicTokens) -> None:
        """At inference: go on with the tokens of the highest scores, or with those that are forced."""
        if tokens.forced is None:
            places = ops.top_k(self.score_predictor[stage](tokens.patches)[:, :, 0], self.counts[stage])
        else:
            mask = mask_of(tokens.forced[stage], tokens.x, self.num_patches).data
            places = places_of(array_module(mask).take_along_axis(mask, tokens.index, axis=1))
        tokens.take(places)
        tokens.kept.append(tokens.index)

    def read(self, tokens: DynamicTokens) -> DynamicOutput:
        out = super().read(tokens)
        keep = tokens.decisions[-1].detach() if tokens.decisions else None
        return self.Output(**vars(out), kept=tokens.kept, decisions=tokens.decisions, keep=keep)
