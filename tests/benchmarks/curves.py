"""Loss curves of tinytoken and PyTorch from equal weights and equal batches: does the engine train as PyTorch
does?

    python tests/benchmarks/curves.py [--quick] [--threads 1] [--out FILE.json] [--png FILE.png]

A small ViT on scenes, with fit's recipe (AdamW, warm-up and cosine, clip 1). Both begin with the same weights
and differ by rounding, and float32's GELU by 4e-6; training makes such differences grow. The bounds: in
float32 the first 30 losses agree to 1e-3, in float64 the first 100 to 1e-6, relative to the loss.
"""
import argparse
import pathlib

import numpy as np
import torch

import peers_torch
import tinytoken as tt
from tinytoken.data import Batches, make_scenes
from tinytoken.experiments import machine
from tinytoken.files import check_target, replacing, write_json
from tinytoken.train import AdamW, Classify, loss_and_grads
from tinytoken.train.optim import warmup_cosine

SIZES = dict(image_size=32, patch_size=4, dim=48, depth=4, heads=3, num_classes=10)
RECIPE = {"lr": 1e-3, "weight_decay": 0.05}
BATCH, CLIP, STEPS = 32, 1.0, 200
BOUNDS = {"float32": (30, 1e-3), "float64": (100, 1e-6)}  # so many steps agree to so much
# The plot's colours keep apart for colour-blind readers.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"


def tinytoken_losses(weights, batches, steps, threads):
    """The loss of each step, before its update. The weights' dtype is the model's."""
    model = tt.models.ViT(**SIZES)
    model.load_state_dict(weights)
    params = model.train().parameters()
    task, optimizer, losses = Classify(model), AdamW(params, **RECIPE, clip=CLIP), []
    for step in range(steps):
        loss, _ = loss_and_grads(task, params, batches(step), threads=threads)
        optimizer.step(RECIPE["lr"] * warmup_cosine(step, STEPS))
        losses.append(loss)
    return losses


def torch_losses(weights, batches, steps, threads):
    """The same in PyTorch."""
    torch.set_num_threads(threads)
    dtype = torch.from_numpy(next(iter(weights.values()))).dtype
    model = peers_torch.ViT(**SIZES).to(dtype)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    optimizer, losses = peers_torch.adamw(model, **RECIPE), []
    for step in range(steps):
        images, labels = (torch.from_numpy(array) for array in batches(step))
        loss = model.loss(images.to(dtype), labels)
        optimizer.zero_grad()
        loss.backward()
        # clip_grad_norm_ by hand: it adds 1e-6 to the norm, which float64 would show.
        grads = [p.grad for p in model.parameters()]
        torch._foreach_mul_(grads, (CLIP / (torch.nn.utils.get_total_norm(grads) + 1e-12)).clamp(max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = RECIPE["lr"] * warmup_cosine(step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(dtype, steps, threads):
    """Both curves in that dtype, and how far apart they are."""
    tt.manual_seed(0)
    weights = tt.models.ViT(**SIZES).astype(dtype).state_dict()
    scenes = make_scenes(2000)
    batches = Batches(scenes.images, scenes.labels, BATCH)
    a, b = (losses(weights, batches, steps, threads) for losses in (tinytoken_losses, torch_losses))
    gap = np.abs(np.array(a) / np.array(b) - 1)
    within, bound = min(BOUNDS[dtype][0], steps), BOUNDS[dtype][1]
    largest = float(gap[:within].max())
    print(f"{dtype}: loss {a[0]:.3f} to {a[-1]:.3f} in {steps} steps; largest relative difference of the "
          f"first {within}: "
          f"{largest:.1e} (bound {bound:g}: {'holds' if largest <= bound else 'MISSED'}); of all: "
          f"{gap.max():.1e}", flush=True)
    return {"tinytoken": a, "torch": b, "relative_difference": gap.tolist(), "steps": steps, "bound": bound,
            "bound_on_first": within, "largest_on_first": largest, "largest": float(gap.max()),
            "holds": largest <= bound}


def draw(path, found):
    """Both float32 curves above, all differences below with their bounds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, below) = plt.subplots(2, 1, figsize=(7.5, 6.5), sharex=True, layout="constrained")
    single = found["float32"]
    top.plot(single["torch"], color=ORANGE, linewidth=3.5, label=f"PyTorch {torch.__version__}")
    top.plot(single["tinytoken"], color=BLUE, linewidth=1.2, label="tinytoken")
    top.set_ylabel("cross-entropy of the step's batch")
    top.set_title(f"A small ViT on scenes from equal weights and batches, float32, {single['steps']} steps",
                  fontsize=11)
    top.legend(frameon=False)
    for (dtype, one), colour in zip(found.items(), (BLUE, GREY)):
        gap = np.array(one["relative_difference"])
        below.semilogy(np.where(gap > 0, gap, np.nan), ".", color=colour, markersize=4,
                       label=f"difference in {dtype}")
        below.hlines(one["bound"], 0, one["bound_on_first"] - 1, color=colour, linestyle="dashed",
                     label=f"bound on the first {one['bound_on_first']} steps")
    below.set(xlabel="step", ylabel="relative difference of the losses")
    below.legend(frameon=False, fontsize=9, loc="lower right",
                 title="not drawn: steps without any difference", title_fontsize=9)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 steps: does it run?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    parser.add_argument("--png", type=pathlib.Path, help="draw the curves")
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    if options.png:
        check_target(options.png, ".png")
    steps = {"float32": 5, "float64": 5} if options.quick else {"float32": STEPS,
                                                                "float64": BOUNDS["float64"][0]}
    found = {dtype: curves(dtype, count, options.threads) for dtype, count in steps.items()}
    if options.png:
        draw(options.png, found)
    if options.out:
        said = {"model": "ViT", "config": SIZES, "batch": BATCH, "recipe": RECIPE | {"clip": CLIP},
                "data": "2,000 scenes, seed 0", "threads": options.threads, "torch": torch.__version__,
                "machine": machine("cpu")}
        write_json(options.out, said | found)


if __name__ == "__main__":
    main()
