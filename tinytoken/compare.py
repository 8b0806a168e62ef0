"""The main job: a ViT, a DynamicViT and a LookupViT trained side by side, a table of what they cost and reach, a picture of what
they looked at.

All get the same number of steps of the same optimiser, in two parts: three quarters of the steps, then the last quarter with a
smaller learning rate. DynamicViT has no first part of its own. It starts from the ViT's, which is also its teacher, and
learns in the last quarter what to drop, while ViT and LookupViT simply go on: nobody wins by training longer.
"""
import dataclasses
import pathlib
import platform
import statistics
import time

import numpy as np

from . import backend, checkpoint, models, plot, random
from .cost import macs
from .data import Batches, find_data, load_cifar, make_scenes, normalise
from .errors import expect
from .tensor import no_grad
from .train import Classify, Distil, Run, accuracy, fit, infer, products_in


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a comparison's accuracies. steps: of each model, both parts together."""
    data: str = "scenes"
    steps: int = 500
    batch: int = 64
    seed: int = 0
    dim: int = 96
    depth: int = 6
    heads: int = 3
    patch: int = 4
    prune_before: tuple = (1, 3, 5)
    keep_ratios: tuple = (0.7, 0.49, 0.343)
    compressed: tuple = (3, 3)
    lr: float = 1e-3
    further_lr: float = 3e-4
    predictor_lr_scale: float = 3.0  # DynamicViT's predictors are new, the rest of it is trained already
    weight_decay: float = 0.05
    smoothing: float = 0.0
    train_pictures: int = 16000  # of scenes; CIFAR has 50,000
    test_pictures: int = 2000  # of scenes; CIFAR has 10,000
    precision: str = "fp32"  # of products in training, see train.products_in

    @property
    def moves(self):
        """Options of Batches: photographs stay what they are when moved or mirrored, scenes are drawn everywhere already."""
        return {} if self.data == "scenes" else {"pad": 4, "flip": True}

    @property
    def further(self):
        """The steps of the second part."""
        return self.steps // 4

    def model(self, kind, **more):
        return kind(32, self.patch, self.dim, self.depth, self.heads, **more)


def run(recipe, out, device="auto", every=200, threads=None, bar=True):
    """Run the comparison: writes the checkpoints, history.jsonl, table.json and tokens.png into the folder `out` -> (table, a
    line that says where the picture is). What an interrupted run has finished there is not done again."""
    began, out, device = time.perf_counter(), pathlib.Path(out), backend.choose_device(device)
    expect(recipe.steps >= 4, "compare", f"{recipe.steps} steps, expected at least 4")
    expect(threads is None or threads >= 1, "compare", f"{threads} threads, expected at least 1")
    products_in(recipe.precision, device)  # refuses now what training would
    random.manual_seed(recipe.seed)  # refuses a bad one before any work
    check_writable(out)
    train, test = load_pictures(recipe)
    batches = Batches(backend.to_device(train.images, device), backend.to_device(train.labels, device), recipe.batch,
                      seed=recipe.seed, **recipe.moves)
    trained, training = train_all(recipe, batches, train.names, Run(out, every), device, threads, bar)
    prepare = lambda images: normalise(backend.to_device(images, device), batches.mean, batches.std)
    table = measure(recipe, trained, test, prepare, device, threads)
    table |= {"training": training,
              "this_call": {"seconds": round(time.perf_counter() - began, 1), "peak_memory_mb": peak_memory()}}
    checkpoint.write_json(out / "table.json", table)
    return table, draw(recipe, trained, test, prepare, out / "tokens.png")


def load_pictures(recipe):
    """(train, test) pictures that recipe.data names: scenes, cifar10, or a folder with CIFAR's binary files."""
    if recipe.data == "scenes":
        return (make_scenes(recipe.train_pictures, seed=recipe.seed, split="train"),
                make_scenes(recipe.test_pictures, seed=recipe.seed, split="test"))
    return load_cifar(*find_data(recipe.data))


def check_writable(folder):
    """Find out before the work, not after it: by a file in the folder, or in the nearest one above it that is there."""
    probe = next(place for place in (folder, *folder.absolute().parents) if place.exists()) / ".tinytoken-writable"
    with checkpoint.replacing(probe) as file:
        file.write(b"\0" * 65536)
    probe.unlink()


def train_all(recipe, batches, names, run, device, threads=None, bar=True):
    """({name: trained model}, {phase: what fit reported})."""
    random.manual_seed(recipe.seed)
    first, results = recipe.steps - recipe.further, {}
    header = {"classes": list(names), "mean": batches.mean, "std": batches.std, "data": recipe.data}

    def part(phase, model, objective, steps, lr, offset):
        results[phase] = fit(model, objective, batches, steps=steps, lr=lr, weight_decay=recipe.weight_decay,
                             seed=recipe.seed, offset=offset, threads=threads, run=run, phase=phase, header=header, bar=bar,
                             precision=recipe.precision)

    vit, teacher = recipe.model(models.ViT).to(device), recipe.model(models.ViT).to(device)
    part("vit-start", vit, Classify(vit, recipe.smoothing), first, recipe.lr, 0)
    teacher.load_state_dict(vit.state_dict())
    part("vit", vit, Classify(vit, recipe.smoothing), recipe.further, recipe.further_lr, first)

    dynamic = recipe.model(models.DynamicViT, prune_before=recipe.prune_before, keep_ratios=recipe.keep_ratios).to(device)
    dynamic.load_state_dict(teacher.state_dict(), strict=False)
    for predictor in dynamic.score_predictor:
        for p in predictor.parameters():
            p.lr_scale = recipe.predictor_lr_scale
    part("dynamicvit", dynamic, Distil(dynamic, teacher, recipe.smoothing), recipe.further, recipe.further_lr, first)

    lookup = recipe.model(models.LookupViT, compressed=recipe.compressed).to(device)
    part("lookupvit-start", lookup, Classify(lookup, recipe.smoothing), first, recipe.lr, 0)
    part("lookupvit", lookup, Classify(lookup, recipe.smoothing), recipe.further, recipe.further_lr, first)
    return {"ViT": vit, "DynamicViT": dynamic, "LookupViT": lookup}, results


def measure(recipe, trained, test, prepare, device, threads=None):
    """The table: a row per way to run a trained model, and what it was measured on."""
    ways = {name: (model, {}) for name, model in trained.items()}
    ways["LookupViT, both heads"] = (trained["LookupViT"], {"mean_of_heads": True})
    sample = prepare(test.images[:128])
    speeds = {size: images_per_second(ways, sample[:size], threads if device == "cpu" else 1) for size in (1, 128)}
    rows = []
    for name, (model, call) in ways.items():
        logits = infer(model, test.images, prepare, threads=threads, **call)
        rows.append({"model": name, "accuracy": accuracy(logits, test.labels), "macs": macs(model, sample[:1], **call).total,
                     "parameters": model.parameter_count(),
                     "images_per_second": {str(size): speeds[size][name] for size in speeds}})
    return {"rows": rows, "test_pictures": len(test.images), "recipe": dataclasses.asdict(recipe), "machine": machine(device),
            "kept_on_object": kept_on_object(trained["DynamicViT"], test, prepare, recipe.patch)}


def images_per_second(ways, images, threads=None, rounds=9):
    """{name: [median, lowest, highest]} over interleaved rounds, so that whatever else the machine does meets all alike."""
    rates = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (model, call) in ways.items():
            began = time.perf_counter()
            infer(model, images, threads=threads, **call)
            if turn:  # the first is for warming up
                rates[name].append(len(images) / (time.perf_counter() - began))
    return {name: [round(f(r), 1) for f in (statistics.median, min, max)] for name, r in rates.items()}


def kept_on_object(dynamic, test, prepare, patch, most=2000):
    """Scenes only: the mean share of object in the patches that each stage keeps, beside that of all patches (chance)."""
    if not hasattr(test, "object_share"):
        return None
    shares, sums = test.object_share(patch)[:most], []
    for a in range(0, len(shares), 128):
        with no_grad():
            _, trace = dynamic.eval()(prepare(test.images[a:min(a + 128, most)]), trace=True)
        sums.append([np.take_along_axis(shares[a:a + 128], backend.to_numpy(kept), axis=1).mean(axis=1).sum()
                     for kept in trace.kept])
    return {"all": float(shares.mean()), "stages": [float(s) / len(shares) for s in np.sum(sums, axis=0)]}


def machine(device):
    """What the numbers were measured on."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor() or platform.machine(), "cpus": backend.cpu_count(),
            "blas": backend.blas_description(), "environment": backend.blas_environment(),
            "python": platform.python_version(), "numpy": np.__version__, "system": platform.platform(), "device": device}


def peak_memory():
    """The most memory this process ever held, in MB (10**6 bytes), or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def draw(recipe, trained, test, prepare, path, count=6):
    """Write tokens.png -> a line that says so, or how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ("no tokens.png: matplotlib is not installed (pip install 'tinytoken-vit[plot]'); "
                "run the command again for it, nothing is trained twice")
    images = prepare(test.images[:count])
    with no_grad():
        logits = {name: backend.to_numpy(model.eval()(images).data) for name, model in trained.items()}
        _, dynamic = trained["DynamicViT"](images, trace=True)
        _, lookup = trained["LookupViT"](images, trace=True)
    plot.tokens(path, test.images[:count], [test.names[k] for k in test.labels[:count]],
                {name: [test.names[k] for k in rows.argmax(axis=1)] for name, rows in logits.items()},
                [backend.to_numpy(kept) for kept in dynamic.kept], backend.to_numpy(lookup.attention[-1].data), recipe.patch)
    return f"picture: {path}"


def table_text(*tables):
    """The table as Markdown. Of several, which differ in their seeds: mean and standard deviation of the accuracies, and the rest
    of the first."""
    table = tables[0]
    lines = ["| model | accuracy | M MACs | of ViT's | parameters | images/s, batch 1 | images/s, batch 128 |",
             "|---|---|---|---|---|---|---|"]
    for i, row in enumerate(table["rows"]):
        speed, reached = row["images_per_second"], [100 * t["rows"][i]["accuracy"] for t in tables]
        lines.append(f"| {row['model']} | {spread_text(reached)} % | {row['macs'] / 1e6:.2f} "
                     f"| {row['macs'] / table['rows'][0]['macs']:.2f} | {row['parameters']:,} "
                     f"| {speed['1'][0]:.0f} | {speed['128'][0]:.0f} |")
    lines += ["", f"{table['test_pictures']:,} test pictures; MACs are multiply-adds per image, counted by the engine; "
                  "images/s are medians."]
    if table["kept_on_object"]:
        stages = ", ".join(f"{100 * statistics.mean(shares):.1f} %"
                           for shares in zip(*(t["kept_on_object"]["stages"] for t in tables)))
        chance = statistics.mean(t["kept_on_object"]["all"] for t in tables)
        lines.append(f"Share of object in the patches that DynamicViT keeps, by stage: {stages}; "
                     f"in all patches (chance): {100 * chance:.1f} %.")
    return "\n".join(lines)


def spread_text(values, form=".1f"):
    """Mean, and standard deviation where there are several. None, a value that is not known, is left out, and said."""
    known = [value for value in values if value is not None]
    if not known:
        return "not known"
    spread = f" ± {statistics.stdev(known):{form.removeprefix('+')}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}" + f" ({len(known)} of {len(values)})" * (len(known) < len(values))


def interval_text(middle, low, high):
    """A difference in points with the ends of its interval, as trial.difference gives them."""
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def conditions_text(*tables):
    """What the numbers of table_text were measured with: recipe, seeds, machine."""
    recipe, on = tables[0]["recipe"], tables[0]["machine"]
    seeds = [t["recipe"]["seed"] for t in tables]
    minutes = {name: sum(part["seconds"] for phase, part in tables[0]["training"].items() if phase.startswith(name)) / 60
               for name in ("vit", "dynamicvit", "lookupvit")}
    taught = tables[0]["training"]["vit-start"]["seconds"] / 60
    settings = " ".join(f"{k}={v}" for k, v in on["environment"].items()) or "no BLAS variables set"
    seeds = (f"One seed, {seeds[0]}" if len(seeds) == 1 else
             f"Seeds {', '.join(map(str, seeds))}: accuracies are mean and standard deviation, speeds and times those of the "
             "first")
    return (f"Recipe: {recipe['steps']:,} steps of {recipe['batch']} pictures, the last {recipe['steps'] // 4:,} "
            f"at learning rate {recipe['further_lr']} after {recipe['lr']}; dim {recipe['dim']}, depth {recipe['depth']}, "
            f"{recipe['heads']} heads, patch {recipe['patch']}. {seeds}. "
            f"Training: ViT {minutes['vit']:.1f} min, DynamicViT {minutes['dynamicvit']:.1f} min "
            f"after the ViT's first {taught:.1f}, LookupViT {minutes['lookupvit']:.1f} min. "
            f"Machine: {on['processor']}, {on['cpus']} CPUs, NumPy {on['numpy']}, {on['blas']}, {settings}.")
