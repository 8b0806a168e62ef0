"""What DynamicViT and every method like it is trained by: the predictor of decisions, and the losses (Rao et
al. 2021, arXiv 2106.02034, sections 3.2 and 3.3)."""
import math
from typing import Any

import numpy as np

from .. import nn, ops, random
from ..backend import Array, array_module, to_numpy
from ..errors import expect
from ..tensor import Tensor, tensor_like
from .base import Loss, Model, cross_entropy_of, is_whole, one_of, weighted_sum
from .options import check_ratios


class Predictor(nn.Module):
    """The prediction module (section 3.2). x (B, n, dim) -> log-probabilities (B, n, 2), column 0 = keep.

    Half the channels stay local, half become their mean over the kept tokens: keep (B, n), None for all.
    Names as in the official code."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        self.in_conv = [nn.LayerNorm(dim, eps), nn.Linear(dim, dim)]
        self.out_conv = [nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
                         nn.Linear(dim // 4, 2)]

    def forward(self, x: Tensor, keep: Tensor | Array | None = None) -> Tensor:
        norm, linear = self.in_conv
        x = ops.gelu(linear(norm(x)))
        half = x.shape[2] // 2
        local, shared = x[:, :, :half], x[:, :, half:]
        if keep is None:
            mean = shared.mean(axis=1, keepdims=True)
        else:
            keep = mask_of(keep, x, x.shape[1]).reshape(len(x), -1, 1)
            total = keep.sum(axis=1, keepdims=True)
            mean = (shared * keep).sum(axis=1, keepdims=True) / (total + (total.data == 0))
        x = ops.concat(local, ops.broadcast_to(mean, shape=local.shape), axis=2)
        for layer in self.out_conv:
            x = layer(x)
        return ops.log_softmax(x)


def mask_of(keep: Tensor | Array, x: Tensor, patches: int, where: str = "DynamicViT") -> Tensor:
    """A mask of the patches as a Tensor (B, N) of x's dtype. InputError in the name of `where` for another
    shape."""
    keep = tensor_like(x, keep)
    expect(tuple(keep.shape) == (len(x), patches), where,
           lambda: f"keep {tuple(keep.shape)}, expected (B, N) = {(len(x), patches)}")
    return keep


def places_of(mask: Array) -> Array:
    """The places of the ones in each row of a mask, ascending: (B, k), so every row must have as many."""
    counts = {int(n) for n in (mask > 0.5).sum(axis=1)}
    expect(len(counts) == 1, "DynamicViT",
           lambda: f"forced decisions keep {min(counts)} to {max(counts)} tokens: in eval mode every image "
                   f"must keep as many")
    return ops.top_k(mask, counts.pop())


def mask_at(places: Array, x: Tensor, patches: int) -> Tensor:
    """The mask (B, N) with ones at `places` (B, k), of x's dtype."""
    ones = array_module(places).ones((*places.shape, 1), x.dtype)
    return ops.put_tokens(ones, places, length=patches)[:, :, 0]


def check_stages(c: Any, blocks: int, D: int = 0, falling: bool = True) -> None:
    """InputError unless the configuration's prune_before and keep_ratios are places among so many blocks, and
    the share to keep at each. D: the width there, of a model with predictors. falling: of `check_ratios`."""
    places, ratios = c.prune_before, c.keep_ratios
    for name, values in (("prune_before", places), ("keep_ratios", ratios)):
        c.check(isinstance(values, tuple), f"{name} {values!r}, expected one per stage: a tuple or list")
    c.check(len(places) == len(ratios) > 0, f"{len(places)} places to prune and {len(ratios)} keep ratios")
    c.check(all(is_whole(i) and 0 <= i < blocks for i in places) and list(places) == sorted(set(places)),
            f"prune_before {places}, expected rising block numbers from 0 to {blocks - 1}")
    check_ratios(c, ratios, falling)
    c.check(D % 4 == 0, f"dim {D}, expected a multiple of 4 (the predictor's last hidden width is dim / 4)")


class Deciding(Model):
    """A model that decides about patches, or positions of a map, before the blocks prune_before; a class
    names it before the model that it is a form of."""
    task = "distil"
    loss_weights = (1, 2, 0.5, 0.5)  # of class, ratio, kl, token

    def decide_by(self, predictors: list[Any], shares: list[float], positions: int) -> None:
        """The last part of `build`. shares: how much of what it sees each predictor is to keep."""
        self.prune_before, self.keep_ratios = self.config.prune_before, self.config.keep_ratios
        self.num_patches, self.counts = positions, [int(positions * ratio) for ratio in self.keep_ratios]
        expect(min(self.counts) > 0, type(self).__name__,
               f"keep ratio {min(self.keep_ratios)} of {positions} tokens keeps none")
        # The untrained predictors are biased to the ratios that they are to reach. The official ones start
        # at one half per stage, and a short fine-tuning spends most of its steps on the way from there.
        for predictor, share in zip(predictors, (min(share, 0.99) for share in shares)):
            predictor.out_conv[-1].bias.data[...] = math.log(share), math.log(1 - share)

    def draws_of(self, noise: Any, hard: bool, keep: Any, paths: Any) -> list[Array] | None:
        """A call's noise by stage; InputError for arguments that do not fit the model or its mode."""
        for name, arrays in (("noise", draws := per_stage(noise)), ("keep", keep)):
            expect(arrays is None or len(arrays) == len(self.prune_before), type(self).__name__,
                   f"{len(arrays or ())} arrays of {name} for {len(self.prune_before)} stages")
        expect(self.training or noise is None and hard and paths is None, type(self).__name__,
               "noise, paths or hard=False in eval mode, where the best scores are kept and nothing is "
               "drawn: call .train() first")
        return draws

    def draw(self, stage: int, size: int, **options: Any) -> Array:
        """Gumbel draws (size, N, 2) of one stage. options: step, seed and xp, as in random.gumbel."""
        return random.gumbel((size, self.num_patches, 2), site=f"score_predictor.{stage}", **options)

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        stages = range(len(self.prune_before))
        return {"noise": xp.stack([self.draw(s, size, step=step, seed=seed, xp=xp) for s in stages], axis=1)}

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None, token_norm: str = "image", **options: Any) -> Loss:
        """The paper's four losses, see `dynamicvit_loss`; without a teacher, only class and ratio."""
        logits, tokens = (None, None) if teacher is None else (teacher.logits, teacher.tokens)
        return dynamicvit_loss(out, targets, logits, tokens, self.keep_ratios, token_norm=token_norm,
                               weights=weights or self.loss_weights, smoothing=smoothing,
                               class_loss=self.class_loss, **options)

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        patches = np.arange(self.num_patches)
        return [(f"{type(self).__name__} keeps {kept.shape[1]} of {len(patches)}",
                 (to_numpy(kept)[:, :, None] == patches).any(axis=1)) for kept in out.kept]


def per_stage(noise: Any) -> list[Array] | None:
    """Draws as a list with an array per stage, from such a list or from one array (B, S, N, 2)."""
    return [noise[:, s] for s in range(noise.shape[1])] if hasattr(noise, "shape") else noise


TOKEN_NORMS, RATIO_NORMS, TOKEN_LOSSES = ("pooled", "image"), ("image", "pooled"), ("mse", "kl")


def dynamicvit_loss(out: Any, targets: Array, teacher_logits: Any, teacher_tokens: Any,
                    keep_ratios: tuple[float, ...], *, weights: tuple[float, ...] = (1, 2, 0.5, 0.5),
                    token_norm: str = "pooled", ratio_norm: str = "image", token_loss: str = "mse",
                    smoothing: float = 0.0, class_loss: Any = cross_entropy_of) -> Loss:
    """The four losses of the paper -> (loss, parts).

    out: a DynamicOutput of train mode. teacher_logits (B, K) and teacher_tokens (B, N, D): those of the dense
    network, detached; None leaves out kl and token, or token alone. weights: of (class, ratio, kl, token);
    the ratio's is divided by the count of stages.

    class: cross-entropy, or what class_loss(out, targets, smoothing=) -> (loss, parts) makes of the targets.
    ratio: sum over stages of mean_b (mean_n D - r)^2 (eq. 15), so that each image keeps its share; with
    ratio_norm="pooled" of (mean_bn D - r)^2, and easy images may keep less than others (the official option
    "dynamic"). kl: KL(teacher || student). token: between the tokens that the last decision
    keeps and the teacher's, token_loss="mse", the mean squared difference of their channels, or "kl", the
    divergence of the softmax over their channels. token_norm="pooled" averages it over all kept tokens of the
    batch (official); "image" over those of each image, then over the images.

    A loss with something "pooled" is no mean over the images: a batch must not be cut into slices for it.
    """
    where, stages = "dynamicvit_loss", len(out.decisions)
    expect(len(keep_ratios) == stages, where, f"{len(keep_ratios)} keep ratios for {stages} stages")
    for name, given, known in (("token_norm", token_norm, TOKEN_NORMS),
                               ("ratio_norm", ratio_norm, RATIO_NORMS),
                               ("token_loss", token_loss, TOKEN_LOSSES)):
        expect(one_of(given, *known), where, f"{name} {given!r}, expected {' or '.join(known)}")
    expect(len(weights) == 4, where, f"{len(weights)} weights, expected 4: class, ratio, kl, token")
    shares = [d.mean(axis=1) if ratio_norm == "image" else d.mean().reshape(1) for d in out.decisions]
    ratio = sum(((share - wanted) ** 2).mean() for share, wanted in zip(shares, keep_ratios))
    of_class, parts = class_loss(out, targets, smoothing=smoothing)
    summed = {"class": of_class, "ratio": ratio}
    if teacher_logits is not None:
        summed["kl"] = ops.kl_divergence(out.logits, teacher_logits)
        if teacher_tokens is not None:
            summed["token"] = _token_loss(out, teacher_tokens, token_norm, token_loss)
    return weighted_sum((weights[0], weights[1] / stages, *weights[2:]), summed), summed | parts


def _token_loss(out, teacher, token_norm, token_loss):
    keep = (out.keep.data > 0.5).astype(out.tokens.dtype)
    if token_loss == "mse":
        errors = ops.mse(out.tokens, teacher, axis=2)
    else:
        wanted = ops.log_softmax(tensor_like(out.tokens, teacher))
        errors = (ops.exp(wanted) * (wanted - ops.log_softmax(out.tokens))).sum(axis=2)
    errors = errors * keep
    kept, sums = (a.sum(axis=1) if token_norm == "image" else a.sum().reshape(1) for a in (keep, errors))
    return (sums / (kept + (kept == 0))).mean()
