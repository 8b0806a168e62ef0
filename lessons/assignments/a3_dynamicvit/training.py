"""Your draw, decisions and removal take the place of the package's in a DynamicViT, which is trained on
scenes."""
import numpy as np

import tinytoken as tt
from tinytoken.data import Batches, make_scenes, normalise
from tinytoken.experiments import kept_on_object
from tinytoken.models import DynamicViT, ViT
from tinytoken.train import Classify, Distil, accuracy, fit, infer


def run(student, steps=(200, 100), pictures=(6000, 1000)):
    """Train a ViT, then the DynamicViT that starts from it -> what a leaderboard shows: (name, value, which
    end is better)."""
    @tt.op
    def yours(log_probs, noise, *, tau=1.0, hard=True):
        choice, vjp = student.straight_through(log_probs, noise, tau)
        return choice.astype(log_probs.dtype), lambda g: (vjp(g), None)  # no gradient for the noise

    def removed(x, places):
        scores = np.zeros((len(x.data), x.shape[1] - 1))
        np.put_along_axis(scores, places[:, 1:] - 1, 1.0, axis=1)
        return tt.Tensor(student.keep_best(x.data, scores, places.shape[1] - 1)[0])

    theirs = tt.ops.gumbel_softmax, tt.ops.take_tokens
    tt.ops.gumbel_softmax = yours
    try:
        sizes = dict(image_size=32, patch_size=4, dim=48, depth=3, heads=3)
        train, test = make_scenes(pictures[0]), make_scenes(pictures[1], split="test")
        batches = Batches(train.images, train.labels, 64)
        tt.manual_seed(0)
        vit = ViT(**sizes)
        fit(vit, Classify(vit), batches, steps=steps[0], lr=2e-3, phase="ViT")
        dynamic = DynamicViT(**sizes, prune_before=(1, 2), keep_ratios=(0.5, 0.25))
        dynamic.load_state_dict(vit.state_dict(), strict=False)
        fit(dynamic, Distil(dynamic, vit), batches, steps=steps[1], lr=5e-4, phase="DynamicViT")
        tt.ops.take_tokens = removed
        prepare = lambda images: normalise(images, batches.mean, batches.std)
        right = [100 * accuracy(infer(model, test.images, prepare, threads=1), test.labels)
                 for model in (vit, dynamic)]
        kept = kept_on_object(dynamic, test, prepare, 4)
        counted = tt.macs(dynamic, prepare(test.images[:1])).total
    finally:
        tt.ops.gumbel_softmax, tt.ops.take_tokens = theirs
    print(f"right: ViT {right[0]:.1f} %, DynamicViT {right[1]:.1f} %")
    print(f"object share of all patches {kept['all']:.3f}, of those kept at each stage",
          ", ".join(f"{share:.3f}" for share in kept["stages"]))
    print(f"multiply-adds: {counted:,} counted, {student.multiply_adds(64, 48, 48, 10, 3, (1, 2), 0.5):,} by "
          f"your formula")
    return [("accuracy, %", round(right[1], 1), "desc"), ("M multiply-adds", round(counted / 1e6, 2), "asc")]
