"""What the page asks: a picture and its sliders' settings -> what the three models make of it, as JSON.

`Explorer.answer` takes and gives text, so that a server and Pyodide can call it alike; it runs the package's
models, with NumPy alone, so that both give the same numbers.
"""
import base64
import binascii
import functools
import json
import threading
import time
from typing import Any

import numpy as np

from .. import cost
from ..backend import blas_threads
from ..data import likeness, make_scenes, normalise
from ..errors import InputError, expect
from ..files import FilePath, as_json
from ..ops import softmax
from ..reading import finite
from ..tensor import no_grad, plain
from .models import HERE, KEEPS, keeping, load

SCENES = 100  # of the test split, so that no model was trained on them
WHERE = "explore"


class Explorer:
    """The models of `folder`, asked about one picture at a time. Calls from several threads take turns."""

    def __init__(self, folder: FilePath = HERE) -> None:
        self.models, self.about = load(folder)
        c = self.models["vit"].config
        self.size, self.patch, self.depth = c.image_size, c.patch_size, c.depth
        self.grid = self.models["vit"].patch_embed.grid
        self.scenes = make_scenes(SCENES, seed=self.about["seed"], split="test", size=self.size)
        self.turn = threading.Lock()

    def answer(self, text: str) -> str:
        """JSON -> JSON: `setup` for {"want": "setup"}, else `look`. InputError says what is wrong with it."""
        try:
            request = json.loads(text)
        except (ValueError, RecursionError) as error:
            request = error
        expect(isinstance(request, dict), WHERE, f"a request that is no JSON object ({request!r:.80})")
        reply = self.setup() if request.get("want") == "setup" else self.look(**request)
        return json.dumps(as_json(reply), separators=(",", ":"))

    def setup(self) -> dict[str, Any]:
        """What the page needs before the first picture: sizes, the sliders' settings, what was measured."""
        known = {name: {key: values[key] for key in ("at", "parameters") if key in values}
                 for name, values in self.about["models"].items()}
        return {"classes": self.about["classes"], "size": self.size, "patch": self.patch, "grid": self.grid,
                "depth": self.depth, "keeps": KEEPS, "scenes": self.scenes.labels.tolist(), "models": known,
                "test_pictures": self.about["test_pictures"]}

    def look(self, /, scene: Any = None, pixels: Any = None, keep: Any = 0.7, grid: Any = 3,
             block: Any = None, token: Any = None, **unknown: Any) -> dict[str, Any]:
        """One picture through the three models.

        scene: the number of a scene that is made here; or pixels: base64 of the bytes of a picture, red,
        green and blue of each pixel, row by row. keep: one of KEEPS, the share of tokens that each stage of
        DynamicViT leaves. grid: the side of LookupViT's compressed grid. block: whose attention is shown,
        counted from 1; None: the last. token: the compressed token whose attention is shown; None: the most
        peaked one. InputError for other values."""
        expect(not unknown, WHERE, f"asked with {', '.join(unknown)}, which is not known")
        block = self.depth if block is None else block
        side = self.grid[0]
        for name, value, low, high in (("grid", grid, 1, side), ("block", block, 1, self.depth)):
            expect(type(value) is int and low <= value <= high, WHERE,
                   f"{name} {value!r}, expected a whole number from {low} to {high}")
        expect(token is None or type(token) is int and 0 <= token < grid * grid, WHERE,
               f"token {token!r}, expected null, or a whole number from 0 to {grid * grid - 1}")
        share = next((k for k in KEEPS if finite(keep) and abs(k - keep) < 1e-6), None)
        if share is None:
            raise InputError(f"{WHERE}: keep {keep!r}, expected one of {', '.join(map(str, KEEPS))}")
        image = self.picture(scene, pixels)
        with self.turn, no_grad(), plain(), blas_threads(1):
            seen = {"vit": self.vit(image, block), "dynamicvit": self.dynamicvit(image, block, share),
                    "lookupvit": self.lookupvit(image, block, grid, token)}
        reply = {"pixels": encoded(image), "models": seen, "label": None,
                 "unlike": likeness.outside(image, self.about["bounds"])}
        if scene is not None:
            reply["label"] = self.scenes.labels[scene]
            self.on_object(seen["dynamicvit"], scene)
        return reply

    def picture(self, scene: Any, pixels: Any) -> np.ndarray:
        """(3, S, S) uint8 of a request."""
        expect((scene is None) != (pixels is None), WHERE, "expected either a scene or pixels")
        if scene is not None:
            expect(type(scene) is int and 0 <= scene < SCENES, WHERE,
                   f"scene {scene!r}, expected a whole number from 0 to {SCENES - 1}")
            return self.scenes.images[scene]
        try:
            data = base64.b64decode(pixels, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            data = b""
            expect(False, WHERE, f"pixels are not base64 ({error})")
        wanted = 3 * self.size ** 2
        expect(len(data) == wanted, WHERE, f"pixels of {len(data):,} bytes, expected {wanted:,}")
        return np.frombuffer(data, "uint8").reshape(self.size, self.size, 3).transpose(2, 0, 1)

    def run(self, name: str, image: np.ndarray, setting: str, **call: Any) -> tuple[dict[str, Any], Any]:
        """A model's answer and cost -> (what is said of every model, its Output). setting: as the JSON calls
        what the model was asked with."""
        model = self.models[name]
        images = normalise(image[None], tuple(self.about["mean"]), tuple(self.about["std"]))
        began = time.perf_counter()
        out = model(images, trace=True, **call)
        seconds = time.perf_counter() - began
        probabilities = softmax(out.logits).data[0]
        expect(np.isfinite(probabilities).all(), WHERE, f"{name} gives numbers that are not finite")
        known = self.about["models"][name].get("at", {}).get(setting, {})
        return {"probabilities": [round(float(p), 6) for p in probabilities], "seconds": seconds,
                "macs": self.macs(name, setting, **call), "accuracy": known.get("accuracy")}, out

    @functools.cached_property
    def counted(self) -> dict[tuple[str, str], int]:
        """Multiply-adds that were counted already: they depend on shapes alone."""
        return {}

    def macs(self, name: str, setting: str, **call: Any) -> int:
        """Multiply-adds of a picture, counted by the engine from the ops that run."""
        if (name, setting) not in self.counted:
            images = np.zeros((1, 3, self.size, self.size), "float32")
            self.counted[name, setting] = cost.macs(self.models[name], images, **call).total
        return self.counted[name, setting]

    def vit(self, image: np.ndarray, block: int) -> dict[str, Any]:
        """Everything is kept; the class token's attention."""
        seen, out = self.run("vit", image, "")
        return seen | {"attention": listed(out.attention[block - 1].data[0].mean(axis=0)[0, 1:])}

    def dynamicvit(self, image: np.ndarray, block: int, share: float) -> dict[str, Any]:
        """The patches that each stage keeps; the class token's attention to those that are left, null for the
        others."""
        model = self.models["dynamicvit"]
        with keeping(model, share):
            seen, out = self.run("dynamicvit", image, f"{share:.2f}")
        kept = [places[0].tolist() for places in out.kept]
        stages = [{"before": before + 1, "kept": places} for before, places in zip(model.prune_before, kept)]
        left = [places for before, places in zip(model.prune_before, kept) if before < block]
        there = left[-1] if left else range(model.num_patches)
        attention: list[float | None] = [None] * model.num_patches
        row = out.attention[block - 1].data[0].mean(axis=0)[0, 1:]
        for place, weight in zip(there, listed(row)):
            attention[place] = weight
        return seen | {"stages": stages, "attention": attention}

    def lookupvit(self, image: np.ndarray, block: int, grid: int, token: int | None) -> dict[str, Any]:
        """Where the compressed tokens look: all together, and one of them."""
        seen, out = self.run("lookupvit", image, f"{grid}x{grid}", compressed=(grid, grid))
        weights = out.attention[block - 1].data[0].mean(axis=0)  # (M, N)
        token = int(weights.max(axis=1).argmax()) if token is None else token
        return seen | {"grid": [grid, grid], "token": token, "attention": listed(weights.sum(axis=0)),
                       "token_attention": listed(weights[token])}

    def on_object(self, seen: dict[str, Any], scene: int) -> None:
        """Note how much of the patches that DynamicViT keeps is object, and of all of them, in a scene."""
        shares = self.scenes.object_share(self.patch)[scene]
        seen["object"] = round(float(shares.mean()), 4)
        for stage in seen["stages"]:
            stage["object"] = round(float(shares[stage["kept"]].mean()), 4)


def listed(weights: np.ndarray) -> list[float]:
    """Weights as numbers of three digits: a picture shows no more."""
    return [float(f"{w:.3g}") for w in weights]


def encoded(image: np.ndarray) -> str:
    """A picture (3, S, S) uint8 as `pixels` of a request."""
    return base64.b64encode(np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes()).decode()
