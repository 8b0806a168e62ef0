"""Makes the sample pictures that come with the package, for `tinytoken predict`.

    python tests/make_samples.py

Three scenes that no training sees (split "val"), of three classes, with 1, 2 and 3 objects. Each is called
after its class.
"""
import numpy as np
from PIL import Image

from tinytoken.data.scenes import make_scenes
from tinytoken.predict import SAMPLES

CHOSEN = {"triangle": 1, "star": 2, "ring": 3}  # class: objects


def samples():
    """{class: picture (32, 32, 3) uint8}: the first scene of each class with so many objects."""
    scenes = make_scenes(256, seed=0, split="val")
    objects = scenes.instances.max(axis=(1, 2))
    names = np.array(scenes.names)[scenes.labels]
    first = {name: np.flatnonzero((names == name) & (objects == count))[0] for name, count in CHOSEN.items()}
    return {name: scenes.images[b].transpose(1, 2, 0) for name, b in first.items()}


if __name__ == "__main__":
    SAMPLES.mkdir(exist_ok=True)
    for name, picture in samples().items():
        Image.fromarray(picture).save(SAMPLES / f"{name}.png", optimize=True)
        print(SAMPLES / f"{name}.png")
