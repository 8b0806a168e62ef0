"""What DynamicViT and every method like it is trained by: the predictor of decisions, and the losses (Rao et
al. 2021, arXiv 2106.02034, sections 3.2 and 3.3)."""
from typing import Any

from .. import nn, ops
from ..backend import Array
from ..errors import expect
from ..tensor import Tensor, tensor_like
from .base import Loss, cross_entropy_of, one_of, weighted_sum


class Predictor(nn.Module):
    """The prediction module (section 3.2). x (B, n, dim) -> log-probabilities (B, n, 2), column 0 = keep.

    Half the channels stay local, half become their mean over the kept tokens: keep (B, n), None for all.
    Names as in the official code."""

    def __init__(self, dim: int) -> None:
        self.in_conv = [nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim)]
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


def mask_of(keep: Tensor | Array, x: Tensor, patches: int) -> Tensor:
    """A mask of the patches as a Tensor (B, N) of x's dtype."""
    keep = tensor_like(x, keep)
    expect(tuple(keep.shape) == (len(x), patches), "DynamicViT",
           lambda: f"keep {tuple(keep.shape)}, expected (B, N) = {(len(x), patches)}")
    return keep


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
