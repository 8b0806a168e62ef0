"""How often `predict` warns of a picture that is unlike the training ones (tinytoken/data/likeness.py).

    python tests/benchmarks/likeness.py --data DIR [--out FILE.json]

DIR holds CIFAR-10. For the bounds of scenes and of CIFAR-10's training part: the share of pictures outside,
of new scenes (also large ones, scaled down), of CIFAR-10's test part, and of plain drawings.
"""
import argparse
import pathlib
import tempfile

import numpy as np
from PIL import Image

from tinytoken.data import likeness, load_pictures, scenes
from tinytoken.data.folder import read_image
from tinytoken.experiments.tables import markdown_table
from tinytoken.files import check_target, write_json

GROUNDS = {"white": (255, 255), "black": (0, 0), "dark": (20, 50), "any grey": (0, 255)}


def drawings(ground, count=2000, seed=0, side=128):
    """One of the ten shapes, filled or outlined, alone on a ground of one grey (count, 3, 32, 32) uint8."""
    rng, low_high = np.random.default_rng(seed), GROUNDS[ground]
    pixel = (np.arange(side) + 0.5) / side
    pictures = np.empty((count, 3, 32, 32), "uint8")
    for i in range(count):
        radius = rng.uniform(0.18, 0.4)
        x, y = (rng.uniform(radius, 1 - radius, 2)[:, None] - pixel) / radius
        distance = radius * scenes.SHAPES[i % len(scenes.SHAPES)](x[None, :], y[:, None])
        distance = abs(distance) - 0.02 if rng.random() < 0.3 else distance
        inside = np.clip(0.5 - side * distance, 0, 1)
        colours = [*scenes.PALETTE, [255 * (low_high[0] < 128)] * 3]
        grey = rng.integers(low_high[0], low_high[1] + 1)
        drawn = grey + inside * (np.array(colours[rng.integers(len(colours))])[:, None, None] - grey)
        pictures[i] = np.rint(drawn.reshape(3, 32, side // 32, 32, side // 32).mean(axis=(2, 4)))
    return pictures


def scaled(pictures, size=(32, 32)):
    """Pictures as predict reads them from files."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = pathlib.Path(folder) / "x.png", []
        for picture in pictures:
            Image.fromarray(picture.transpose(1, 2, 0)).save(path)
            out.append(read_image(path, size))
    return np.stack(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with CIFAR-10")
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    photographs = load_pictures(options.data)
    large = scenes.make_scenes(1000, seed=2, split="test", size=256)
    tests = {"new scenes": scenes.make_scenes(10000, seed=1, split="test").images,
             "new scenes of 256 x 256": scaled(large.images),
             "CIFAR-10, test part": photographs[1].images,
             **{f"drawings on {ground}": drawings(ground) for ground in GROUNDS}}
    found, bounds = {}, {}
    for name, train in (("scenes", scenes.make_scenes(16000).images), ("CIFAR-10", photographs[0].images)):
        bounds[name] = likeness.bounds(train)
        low, high = np.array(list(bounds[name].values())).T
        found[name] = {}
        for kind, pictures in tests.items():
            values = np.concatenate([likeness.measures(part) for part in np.array_split(pictures, 40)])
            outside = ((values < low) | (values > high)).any(axis=1)
            found[name][kind] = {"pictures": len(pictures), "outside": float(outside.mean())}
    print("% outside of the bounds of", " and of ".join(found))
    print(markdown_table(["pictures", *found], [
        (kind, *(f"{100 * rows[kind]['outside']:.1f}" for rows in found.values())) for kind in tests]))
    if options.out:
        write_json(options.out, {"outside": found, "bounds": bounds, "tail": likeness.TAIL})


if __name__ == "__main__":
    main()
