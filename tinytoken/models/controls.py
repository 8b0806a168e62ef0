"""Controls for DynamicViT: models that drop as many tokens in the same places, but choose them by a simpler
rule. What DynamicViT reaches beyond the best of them is what looking at the picture, and learning where to
look, is worth.

RandomTokens: any. ClassAttention: those that the class token attends to most. CentreTokens: the nearest to
the middle of the picture. LearnedTokens: a set that is learned, the same for every picture. PooledTokens:
none is dropped, neighbours are averaged.

All are called as DynamicViT is, and tasks.Distil trains them. LearnedTokens decides as DynamicViT does, with
all four losses. The others keep exact counts in training too, so that no ratio is left to reach: weights=(1,
0, 0.5, 0.5).
"""
import zlib

import numpy as np

from .. import nn, ops, random
from ..backend import array_module, to_numpy
from ..errors import expect
from ..tensor import Tensor
from .base import model
from .dynamicvit import DynamicTokens, DynamicViT, per_stage


class Control(DynamicViT):
    """DynamicViT's places and counts without its predictors; a subclass says which tokens stay. Tokens are
    gathered in train mode, too: the choice needs no gradient, and for a hard choice masking is removing.

    images -> DynamicOutput; in train mode its `tokens` are zero where a patch is gone. noise: as of
    DynamicViT.
    """
    needs_attention = False  # of the blocks before

    def build(self, c):
        super().build(c)
        self.score_predictor = []

    def forward(self, images, noise=None, trace=False, paths=None):
        tokens = self.start(images, trace or self.needs_attention, paths, DynamicTokens,
                            noise=per_stage(noise))
        out = self.read(self.encode(tokens))
        out.attention = out.attention if trace else []  # what was needed is not what was asked for
        return out

    def before_block(self, i, tokens):
        if i in self.prune_before:
            self.reduce(self.prune_before.index(i), tokens)

    def reduce(self, stage, tokens):
        """Go on with counts[stage] patch tokens."""
        tokens.take(ops.top_k(self.scores(stage, tokens), self.counts[stage]))
        tokens.kept.append(tokens.index)

    def scores(self, stage, tokens):
        """(B, n): of the patch tokens, the counts[stage] highest stay."""
        raise NotImplementedError

    def read(self, tokens):
        out = super().read(tokens)
        if self.training:
            self.put_back(out)
        return out

    def put_back(self, out):
        """What training needs: the choices as masks, and the tokens put back to where they came from."""
        ones = array_module(out.logits.data).ones
        out.decisions = [ops.put_tokens(ones((*kept.shape, 1), out.logits.dtype), kept,
                                        length=self.num_patches)[:, :, 0]
                         for kept in out.kept]
        out.tokens, out.keep = ops.put_tokens(out.tokens, out.kept[-1],
                                              length=self.num_patches), out.decisions[-1]


@model("randomtokens")
class RandomTokens(Control):
    """Other tokens for each picture, drawn evenly. Without noise the draw is a function of the batch's
    pictures: inference gives the same twice."""

    def scores(self, stage, tokens):
        xp = array_module(tokens.x.data)
        if tokens.noise is not None:
            return xp.take_along_axis(tokens.noise[stage][:, :, 0], tokens.index, axis=1)
        pictures = zlib.crc32(to_numpy(tokens.x.data).tobytes())
        return random.uniform(tokens.index.shape, site=f"random_tokens.{stage}", step=pictures, seed=0, xp=xp)


@model("classattention")
class ClassAttention(Control):
    """The tokens that the class token attends to most in the block before, on the mean over heads."""
    needs_attention = True

    def build(self, c):
        expect(c.prune_before[0] > 0, "ClassAttention",
               "prune_before 0: there is no block before it that attends")
        super().build(c)

    def scores(self, stage, tokens):
        return tokens.attention[-1].data[:, :, 0, 1:].mean(axis=1)


@model("centretokens")
class CentreTokens(Control):
    """The tokens nearest to the middle of the picture."""

    def scores(self, stage, tokens):
        rows, columns = self.patch_embed.grid
        row, column = tokens.index // columns, tokens.index % columns
        return -((row - (rows - 1) / 2) ** 2 + (column - (columns - 1) / 2) ** 2)


class PositionScores(nn.Module):
    """A Predictor that sees places only: a learned row of `scores` (N, 2) for each, at first `start` (2,).
    x (B, N, D) -> log-probabilities (B, N, 2), column 0 = keep."""

    def __init__(self, places, start):
        self.scores = nn.Parameter(np.tile(start, (places, 1)))

    def forward(self, x, keep=None):
        return ops.log_softmax(ops.broadcast_to(self.scores, shape=(len(x), *self.scores.shape)))


@model("learnedtokens")
class LearnedTokens(DynamicViT):
    """A DynamicViT whose predictors cannot see the picture: each position has learned scores of its own. At
    inference the highest stay, the same set for every picture. The scores are few and start equal: give them
    a large learning rate."""

    def build(self, c):
        super().build(c)
        starts = [predictor.out_conv[-1].bias.data for predictor in self.score_predictor]
        self.score_predictor = [PositionScores(self.num_patches, start) for start in starts]

    def sets(self):
        """Per stage the mask (N,) of the positions that stay."""
        left, masks = None, []
        for predictor, count in zip(self.score_predictor, self.counts):
            scores = predictor.scores.data[:, 0] - predictor.scores.data[:, 1]
            xp = array_module(scores)
            scores = scores if left is None else xp.where(left, scores, -xp.inf)
            left = (xp.arange(self.num_patches) == ops.top_k(scores[None], count)[0][:, None]).any(axis=0)
            masks.append(left)
        return masks

    def forward(self, images, noise=None, hard=True, keep=None, **options):
        if keep is None and not self.training:
            keep = [array_module(mask).broadcast_to(mask, (len(images), len(mask))) for mask in self.sets()]
        return super().forward(images, noise, hard, keep, **options)


@model("pooledtokens")
class PooledTokens(Control):
    """No patch is dropped: each token that goes on is the mean of an equal part of the tokens before. The
    parts are stretches of a curve that stays among neighbours (Morton's order), so that 64 -> 16 averages
    squares of 2 x 2; a token on the border of two parts is shared. In the output of train mode every position
    has its part's token, and is kept."""

    def build(self, c):
        super().build(c)
        before, self.pools = [self.num_patches, *self.counts], []
        for n, k in zip(before, before[1:]):
            self.pools.append(means_of_parts(n, k))
        self.pools[0] = self.pools[0][:, np.argsort(morton_order(*self.patch_embed.grid))]

    def reduce(self, stage, tokens):
        pool = array_module(tokens.x.data).asarray(self.pools[stage])
        tokens.x = ops.concat(tokens.x[:, :1], ops.matmul(pool, tokens.patches), axis=1)

    def put_back(self, out):
        logits = out.logits
        xp, shape = array_module(logits.data), (len(logits), self.num_patches)
        share = np.linalg.multi_dot(self.pools[::-1]) if len(self.pools) > 1 else self.pools[0]
        back = xp.asarray(share.T * (self.num_patches / len(share)))  # (N, k), rows sum to one
        out.decisions = [Tensor(xp.full(shape, count / self.num_patches, logits.dtype))
                         for count in self.counts]
        out.tokens, out.keep = ops.matmul(back, out.tokens), Tensor(xp.ones(shape, logits.dtype))


def means_of_parts(n, k):
    """(k, n): row j averages over the j-th of k equal parts of n places; a place on the border counts by its
    share."""
    edge = np.arange(k + 1)[:, None] * (n / k)
    place = np.arange(n)
    overlap = np.minimum(edge[1:], place + 1) - np.maximum(edge[:-1], place)
    return overlap.clip(0) * (k / n)


def morton_order(rows, columns):
    """The cells of a grid, numbered row by row, in Morton's order: by their row's and column's bits,
    interleaved."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    code = sum(((row >> bit & 1) << 2 * bit + 1) + ((column >> bit & 1) << 2 * bit) for bit in range(16))
    return np.argsort(code, kind="stable")


CONTROLS = {"random tokens": RandomTokens, "class attention": ClassAttention, "fixed centre": CentreTokens,
            "fixed, learned": LearnedTokens, "average pooling": PooledTokens}
