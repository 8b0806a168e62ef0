"""Controls for DynamicViT: models that drop as many tokens, before the same blocks, by a simpler rule.

What DynamicViT reaches beyond the best of them is what it is worth to look at the picture, and to learn where
to look. Which tokens they keep:

RandomTokens: any. ClassAttention: those that the class token attends to most. CentreTokens: those nearest to
the middle of the picture. LearnedTokens: a set that is learned, the same for every picture. PooledTokens
drops none: it averages neighbours.

All are called as DynamicViT is, and tasks.Distil trains them. LearnedTokens decides as DynamicViT does, with
all four losses. The others keep exact counts in training, too, so that there is no ratio to learn:
weights=(1, 0, 0.5, 0.5).
"""
from typing import Any

import numpy as np

from .. import nn, ops, random
from ..backend import Array, array_module
from ..errors import expect
from ..tensor import Tensor
from .base import model
from .dynamicvit import DynamicOutput, DynamicTokens, DynamicViT
from .pruning import mask_at, per_stage


class Control(DynamicViT):
    """DynamicViT's places and counts without its predictors; a subclass says which tokens stay.

    Tokens are gathered in train mode, too: the choice needs no gradient, and for a hard choice masking is
    removing.

    images -> DynamicOutput; in train mode its `tokens` are zero where a patch is gone. noise: DynamicViT's.
    """
    needs_attention = False  # whether `scores` reads the attention of the blocks before

    def build(self, c: Any) -> None:
        super().build(c)
        self.score_predictor = []

    def forward(self, images: Tensor | Array, noise: Any = None, trace: bool = False,
                paths: Array | None = None) -> DynamicOutput:
        tokens = self.start(images, trace or self.needs_attention, paths, DynamicTokens,
                            noise=per_stage(noise))
        out = self.read(self.encode(tokens))
        if not trace:
            out.attention = []  # it was kept for `scores`, not for the caller
        return out

    def before_block(self, i: int, tokens: DynamicTokens) -> None:
        if i in self.prune_before:
            self.reduce(self.prune_before.index(i), tokens)

    def reduce(self, stage: int, tokens: DynamicTokens) -> None:
        """Go on with counts[stage] patch tokens."""
        tokens.take(ops.top_k(self.scores(stage, tokens), self.counts[stage]))
        tokens.kept.append(tokens.index)

    def scores(self, stage: int, tokens: DynamicTokens) -> Array:
        """(B, n): a score for each patch token; those with the counts[stage] highest stay."""
        raise NotImplementedError

    def read(self, tokens: DynamicTokens) -> DynamicOutput:
        out = super().read(tokens)
        if self.training:
            self.put_back(out)
        return out

    def put_back(self, out: DynamicOutput) -> None:
        """What training needs: the choices as masks, and the tokens put back to where they came from."""
        out.decisions = [mask_at(kept, out.logits, self.num_patches) for kept in out.kept]
        out.tokens = ops.put_tokens(out.tokens, out.kept[-1], length=self.num_patches)
        out.keep = out.decisions[-1]


@model("randomtokens")
class RandomTokens(Control):
    """Tokens drawn evenly, anew for each picture.

    Without noise the draw is a function of the batch's pictures, so inference gives the same twice."""

    def scores(self, stage: int, tokens: DynamicTokens) -> Array:
        if tokens.noise is not None:
            xp = array_module(tokens.x.data)
            return xp.take_along_axis(tokens.noise[stage][:, :, 0], tokens.index, axis=1)
        return random.uniform_of(tokens.x.data, tokens.index.shape, site=f"random_tokens.{stage}")


@model("classattention")
class ClassAttention(Control):
    """The tokens that the class token attends to most in the block before, on the mean over heads."""
    needs_attention = True

    def build(self, c: Any) -> None:
        expect(c.prune_before[0] > 0, "ClassAttention",
               "prune_before 0: there is no block before it that attends")
        super().build(c)

    def scores(self, stage: int, tokens: Any) -> Array:
        return tokens.attention[-1].data[:, :, 0, tokens.extra:].mean(axis=1)


@model("centretokens")
class CentreTokens(Control):
    """The tokens nearest to the middle of the picture."""

    def scores(self, stage: int, tokens: DynamicTokens) -> Array:
        rows, columns = self.patch_embed.grid
        row, column = tokens.index // columns, tokens.index % columns
        return -((row - (rows - 1) / 2) ** 2 + (column - (columns - 1) / 2) ** 2)


class PositionScores(nn.Module):
    """A Predictor that sees places only: each has a learned row of `scores` (N, 2), which begins as `start`.

    x (B, N, D) -> log-probabilities (B, N, 2), column 0 = keep. start (2,)."""

    def __init__(self, places: int, start: Array) -> None:
        self.scores = nn.Parameter(np.tile(start, (places, 1)))

    def forward(self, x: Tensor, keep: Any = None) -> Tensor:
        return ops.log_softmax(ops.broadcast_to(self.scores, shape=(len(x), *self.scores.shape)))


@model("learnedtokens")
class LearnedTokens(DynamicViT):
    """A DynamicViT whose predictors cannot see the picture: each position has learned scores of its own.

    At inference the positions with the highest scores stay, the same set for every picture. The scores are
    few and start equal: give them a large learning rate."""

    def build(self, c: Any) -> None:
        super().build(c)
        starts = [predictor.out_conv[-1].bias.data for predictor in self.score_predictor]
        self.score_predictor = [PositionScores(self.num_patches, start) for start in starts]

    def sets(self) -> list[Array]:
        """The mask (N,) of the positions that stay, for each stage."""
        left: Any = None
        masks = []
        for predictor, count in zip(self.score_predictor, self.counts):
            scores = predictor.scores.data[:, 0] - predictor.scores.data[:, 1]
            xp = array_module(scores)
            scores = scores if left is None else xp.where(left, scores, -xp.inf)
            left = (xp.arange(self.num_patches) == ops.top_k(scores[None], count)[0][:, None]).any(axis=0)
            masks.append(left)
        return masks

    def forward(self, images: Tensor | Array, noise: Any = None, hard: bool = True, keep: list | None = None,
                **options: Any) -> DynamicOutput:
        if keep is None and not self.training:
            keep = [array_module(mask).broadcast_to(mask, (len(images), len(mask))) for mask in self.sets()]
        return super().forward(images, noise, hard, keep, **options)


@model("pooledtokens")
class PooledTokens(Control):
    """No patch is dropped: each token that goes on is the mean of an equal part of the tokens before.

    The parts are stretches of a curve that stays among neighbours (Morton's order), so that 64 -> 16 averages
    squares of 2 x 2; a token on the border of two parts is shared between them. In the output of train mode
    every position is kept, and has the token of its part."""

    def build(self, c: Any) -> None:
        super().build(c)
        counts = [self.num_patches, *self.counts]
        self.pools = [means_of_parts(n, k) for n, k in zip(counts, counts[1:])]
        self.pools[0] = self.pools[0][:, np.argsort(morton_order(*self.patch_embed.grid))]

    def reduce(self, stage: int, tokens: DynamicTokens) -> None:
        pool = array_module(tokens.x.data).asarray(self.pools[stage])
        tokens.x = ops.concat(tokens.x[:, :tokens.extra], ops.matmul(pool, tokens.patches), axis=1)

    def put_back(self, out: DynamicOutput) -> None:
        logits, n = out.logits, self.num_patches
        xp, shape = array_module(logits.data), (len(logits), n)
        share = np.linalg.multi_dot(self.pools[::-1]) if len(self.pools) > 1 else self.pools[0]
        back = xp.asarray(share.T * (n / len(share)))  # (N, k), rows sum to one
        out.decisions = [Tensor(xp.full(shape, count / n, logits.dtype)) for count in self.counts]
        out.tokens, out.keep = ops.matmul(back, out.tokens), Tensor(xp.ones(shape, logits.dtype))


def means_of_parts(n: int, k: int) -> np.ndarray:
    """(k, n): row j averages over the j-th of k equal parts of n places.

    A place on the border of two parts counts in each by its share."""
    edge = np.arange(k + 1)[:, None] * (n / k)
    place = np.arange(n)
    overlap = np.minimum(edge[1:], place + 1) - np.maximum(edge[:-1], place)
    return overlap.clip(0) * (k / n)


def morton_order(rows: int, columns: int) -> np.ndarray:
    """The cells of a grid, counted row by row, in Morton's order: by their row's and column's bits,
    interleaved."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    code = sum(((row >> bit & 1) << 2 * bit + 1) + ((column >> bit & 1) << 2 * bit) for bit in range(16))
    return np.argsort(code, kind="stable")


CONTROLS = {"random tokens": RandomTokens, "class attention": ClassAttention, "fixed centre": CentreTokens,
            "fixed, learned": LearnedTokens, "average pooling": PooledTokens}
