"""Attention patch combination (ViT-FOD: Zhang et al. 2022, arXiv 2203.12816, section 3.2): half of a
picture's cells, those that matter least to the model, give way to the cells of another picture that matter
most."""
from typing import Any

import numpy as np

from .. import nn, random
from ..backend import Array
from ..data import mix
from ..errors import expect
from ..models.base import Loss
from .base import task
from .classify import Classify

MIXES = ("attention", "random", "cutmix")
SITE = "tinytoken.tasks.combine"


@task("combine")
class Combine(Classify):
    """The model's loss of the pictures, and of pictures that are mixed in pairs; a second pass through it.

    mix: "attention": cells by the model's rollout (ViTFOD); "random": cells at random; "cutmix": a rectangle
    (data.mix.cutmix). cells: rows, and columns, of cells."""
    whole = True

    def __init__(self, model: Any, smoothing: float = 0.0, drop_path: float = 0.0, mix: str = "attention",
                 cells: int = 4) -> None:
        super().__init__(model, smoothing, drop_path)
        expect(mix in MIXES, "Combine", f"mix {mix!r}, expected one of {', '.join(MIXES)}")
        grid = model.patch_embed.grid
        expect(isinstance(cells, int) and cells > 1 and cells % 2 == 0 and not any(n % cells for n in grid),
               "Combine", f"cells {cells!r} of {grid[0]} x {grid[1]} patches, expected an even number that "
                          f"divides both")
        self.mix, self.cells = mix, cells
        self.settings |= {"mix": mix, "cells": cells}

    def noise(self, size: int, step: int, seed: int, xp: Any = np) -> dict[str, Array]:
        draws = super().noise(size, step, seed, xp)
        if self.mix == "cutmix":
            pictures = xp.empty((size, 1, *nn.both_sides(self.model.config.image_size)), "float32")
            return draws | {"boxes": mix.cutmix_boxes(pictures, 1.0, step, seed).T}
        partner = random.permutation(size, site=f"{SITE}.partner", step=step, seed=seed, xp=xp)
        order = random.uniform((size, self.cells ** 2), site=f"{SITE}.order", step=step, seed=seed, xp=xp)
        return draws | {"partner": partner, "order": order}

    def __call__(self, images: Array, labels: Array, *, boxes: Any = None, partner: Any = None,
                 order: Any = None, **draws: Array) -> Loss:
        out = self.model(images, **draws)
        loss, parts = self.model.loss(out, labels, smoothing=self.smoothing)
        goal = mix.one_hot(labels, out.logits.shape[1], out.logits.dtype)
        if self.mix == "cutmix":
            mixed, goal = mix.paste(images, goal, boxes.T)
        else:
            weights = cell_weights(out.rollout, self.model.patch_embed.grid, self.cells)
            order = order if self.mix == "random" else weights
            mixed, own, other = mix.exchange(images, weights, partner, order)
            goal = own[:, None] * goal + other[:, None] * goal[partner]
        again, parts_of_mixed = self.model.loss(self.model(mixed, **draws), goal, smoothing=self.smoothing)
        return loss + again, parts | {f"mixed {name}": part for name, part in parts_of_mixed.items()}


def cell_weights(rollout: Array, grid: tuple[int, int], cells: int) -> Array:
    """The mean rollout (B, N) in each of cells x cells parts of the grid, of 1 in all: (B, cells cells)."""
    batch, (rows, columns) = len(rollout), (side // cells for side in grid)
    parts = rollout.reshape(batch, cells, rows, cells, columns).mean(axis=(2, 4)).reshape(batch, -1)
    return parts / parts.sum(axis=1, keepdims=True)
