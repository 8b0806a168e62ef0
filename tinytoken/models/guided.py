"""How VLTP chooses the tokens that go on: by a prune decoder, or by the rules that it is compared with."""
import dataclasses
import math
from typing import Any

import numpy as np

from .. import ops, random
from ..backend import Array, array_module
from ..tensor import Tensor
from .passing import Waiting, WaitingTokens
from .pruning import mask_of


@dataclasses.dataclass
class GuidedTokens(WaitingTokens):
    """guide (B, 1, width): the guidance token. shares: of the call, one for each place. draw (B, places, N):
    of the call. scores: so far."""
    guide: Any = None
    shares: Any = ()
    draw: Array | None = None
    scores: list[Tensor] = dataclasses.field(default_factory=list)


class Guided(Waiting):
    """A ViT of which the share of tokens that a call asks for goes on after each of its places, and all at
    the last stop."""
    prune_head: Any
    constant: Any

    def decide(self, stop: int, tokens: GuidedTokens) -> None:
        """Which tokens go on; at the last stop all of them."""
        if stop == len(self.config.prune_before):
            tokens.keep = None
            return
        xp, N, share = array_module(tokens.x.data), self.num_patches, tokens.shares[stop]
        before = tokens.kept[-1] if tokens.kept else xp.ones((len(tokens.x), N), bool)
        given = hasattr(share, "shape")
        everything = not given and tokens.forced is None and share == 1
        if everything and not self.training and tokens.attention is None:
            tokens.kept.append(before)
            return
        scores = self.scores(stop, tokens)
        if tokens.forced is not None:
            going = before & (mask_of(tokens.forced[stop], tokens.x, N, "VLTP").data > 0.5)
        else:
            count = xp.ceil(share * N - 1e-4)[:, None] if given else math.ceil(share * N - 1e-4)
            order = xp.argsort(xp.where(before, -scores, math.inf), axis=1, kind="stable")
            going = before & (xp.argsort(order, axis=1) < count)
        tokens.kept.append(going)
        if not everything:
            first = xp.ones((len(going), tokens.extra), tokens.x.dtype)
            tokens.keep = xp.concatenate([first, going.astype(tokens.x.dtype)], axis=1)

    def scores(self, stop: int, tokens: GuidedTokens) -> Array:
        """What the tokens are chosen by, (B, N); no gradient goes through the choice."""
        x, c = tokens.x, self.config
        if self.prune_head is not None:
            guide = tokens.guide if self.constant is None else self.constant.rows(len(x))
            tokens.scores.append(self.prune_head(tokens.patches, guide))
            return tokens.scores[-1].data
        if c.choose == "class":
            block = self.blocks[c.prune_before[stop]]
            q, k, _ = block.attn.project(block.norm1(x.detach()))
            _, A = ops.attention(q[:, :, :1], k, k, tokens.keep, sees_itself=False, weights=True)
            return A.data[:, :, 0, 1:].mean(axis=1)
        if tokens.draw is not None:
            return tokens.draw[:, stop]
        return random.uniform((len(x), self.num_patches), site=f"vltp.{stop}", step=0, seed=0,
                              xp=array_module(x.data))

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        """For tokens at random: draw (size, places, N)."""
        if self.config.choose != "random":
            return {}
        shape = (size, len(self.config.prune_before), self.num_patches)
        return {"draw": random.uniform(shape, site="vltp.draw", step=step, seed=seed, xp=xp)}
