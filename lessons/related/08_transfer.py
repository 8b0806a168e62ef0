# %% [markdown]
# # Lesson 08: Which errors move from one model to another
# After this lesson you can change pictures within a bound so that a model errs, measure how often other
# models err on them too, and say what a ViT's early blocks have to do with it.
#
# ## The idea
# Pictures that are changed a little, along the gradient of a model's loss, mislead this model. Do they
# mislead others, that nobody looked into? This is measured to know how robust models are. It is known that
# pictures made with a ViT mislead other models seldom. Naseer et al. (2022, arXiv 2106.04169) say why: the
# last class token is one classifier of many that a ViT has. Through the last norm and head, the class
# token of **each block** is a classifier. To mislead all of them is harder, but what does it depends less
# on this one model.
#
# The early blocks were never trained for that. So a small module for each block, **token refinement**, is
# trained first, while the ViT stays as it is.
#
# All models here are small and trained by this lesson on drawn scenes.

# %%
import dataclasses
import functools

import numpy as np

import tinytoken as tt
from tinytoken import backend
from tinytoken.experiments import Arm, Recipe, lesson, spread_text
from tinytoken.models import ATViT
from tinytoken.models.atvit import TokenRefinement
from tinytoken.tasks.attack import of_all_blocks, of_last, perturb

here = lesson.begin("related_transfer")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The mechanism by hand
# **Steps in a bound.** With momentum (MI-FGSM, Dong et al. 2018), gradients add up, each divided by its
# mean size, and a step goes along the sign of the sum. T steps of eps / T cannot leave the bound:
#
#     g = g + grad / mean|grad|        x = clip(x + eps / T sign(g)) to 0 ... 1
#
# For a linear objective w . x the gradient is always w, so the result is known: x + eps sign(w).

# %%
x, w = rng.uniform(0.2, 0.8, (2, 3, 8, 8)), rng.standard_normal((2, 3, 8, 8))
moved = perturb(lambda x: (x * w).sum(), x, 0.1)
assert np.allclose(moved, x + 0.1 * np.sign(w)) and np.abs(moved - x).max() <= 0.1 + 1e-12
print("a linear objective: every value moved by eps along the sign of its weight")

# %% [markdown]
# **Token refinement** of a block's tokens z, after the last norm: with p the patches as a map,
#
#     t = mean over the map of ReLU(p + BN(conv(ReLU(BN(conv p)))))  +  W z_class        answer: head(t)
#
# The official code gives both convolutions one name, so they are one; so are the two norms.


# %%
def refinement(z, module, grid):
    """By hand, in eval mode: the running statistics of the norm, a 3 x 3 convolution by loops."""
    w = module.state_dict()
    p = z[:, 1:].reshape(len(z), *grid, -1)

    def conv_and_norm(maps):
        wide = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = sum(wide[:, i:i + grid[0], j:j + grid[1]] @ w["conv.weight"][:, :, i, j].T
                  for i in range(3) for j in range(3))
        scale = w["bn.weight"] / np.sqrt(w["bn.running_var"] + 1e-5)
        return (out - w["bn.running_mean"]) * scale + w["bn.bias"]
    y = np.maximum(p + conv_and_norm(np.maximum(conv_and_norm(p), 0)), 0)
    return y.mean(axis=(1, 2)) + z[:, 0] @ w["token_fc.weight"].T + w["token_fc.bias"]


module = TokenRefinement(6).astype("float64").eval()
for p in module.parameters():
    p.data += 0.3 * rng.standard_normal(p.shape)
module.bn.running_mean.data += rng.standard_normal(6)
z = rng.standard_normal((2, 13, 6))
gap = np.abs(refinement(z, module, (3, 4)) - module(tt.Tensor(z), (3, 4)).data).max()
print(f"token refinement by hand and the package's: at most {gap:.0e} apart")
assert gap < 1e-12
tt.gradcheck(lambda z, *_: module(z, (3, 4)), z, *module.parameters(), seed=here.seed,
             max_elements=here.pick(10, 30, 300))

# %% [markdown]
# A block's module costs two convolutions and a linear layer. They are needed to change pictures, not to
# classify.

# %%
N, C, K = 64, 48, 10
sizes = dict(dim=C, heads=3, depth=6)
picture = np.zeros((1, 3, 32, 32), "float32")
vit, atvit = (tt.macs(kind(**sizes), picture).total for kind in (tt.models.ViT, ATViT))
assert atvit - vit == 5 * (2 * 9 * N * C * C + C * C + C * K)
print(f"a ViT {vit / 1e6:.1f} M multiply-adds, with all blocks answering {atvit / 1e6:.1f} M")

# %% [markdown]
# ## The experiment
# One ViT is the source. Four other models are the targets: a ViT of another seed, one with patches of 8
# pixels, a ConvNeXt, and a T2T-ViT. Only pictures that all five classify correctly are used. They are
# changed by MI-FGSM with ten steps, in three ways:
#
# - **last**: up the loss of the source's last class token;
# - **all blocks**: up the sum of the losses of all class tokens;
# - **all, refined**: the same through token refinement.
#
# The control is **noise**: every value moves by eps up or down at random. And the source itself must err
# about as often in all three ways. Otherwise the comparison is about strength.
#
# The bounds, set before the run, at eps = 16/255: the targets err more often by "all blocks" than by
# "last", and more often still by "all, refined"; the source errs in all three ways within 5 points.

# %%
DIM, STEPS, REFINE = here.pick((16, 3, 2), (48, 500, 150), (48, 1000, 300))
RECIPE = Recipe(data=here.data, smoothing=0.0, dim=DIM, depth=here.pick(2, 6, 6), heads=here.pick(2, 3, 3),
                lr=2e-3, batch=here.pick(8, 64, 64), train_pictures=here.pick(32, 8000, 16000),
                test_pictures=here.pick(64, 1000, 4000))
PICTURES, ALLOWED = here.pick(8, 200, 400), here.pick((16,), (8, 16), (4, 8, 16))
METHODS = here.pick(("mifgsm",), ("mifgsm",), ("mifgsm", "pgd", "dim", "ti"))
SOURCE, REFINED, SAME, LARGE = "ViT, the source", "refined", "ViT, another seed", "ViT, patches of 8"
CONV, T2T = "ConvNeXt", "T2T-ViT"
PYRAMID = dict(dims=here.pick((8, 8, 8), (24, 48, 96), (24, 48, 96)), depths=(1, 2, 1), layer_scale=1.0,
               patch_size=2)
ARMS = {SOURCE: Arm("vit", steps=STEPS, lr=RECIPE.lr), SAME: Arm("vit", steps=STEPS, lr=RECIPE.lr),
        LARGE: Arm("vit", dict(patch_size=8), steps=STEPS, lr=RECIPE.lr),
        CONV: Arm("convnext", PYRAMID, steps=STEPS, lr=RECIPE.lr),
        T2T: Arm("t2tvit", dict(token_dim=here.pick(8, 14, 14)), steps=STEPS, lr=RECIPE.lr),
        REFINED: Arm("atvit", start=SOURCE, steps=REFINE, lr=1e-2, start_lr_scale=0.0)}
ARMS = {name: dataclasses.replace(arm, phase=f"transfer {name} {STEPS}") for name, arm in ARMS.items()}
TARGETS, WAYS = (SAME, LARGE, CONV, T2T), ("last", "all blocks", "all, refined")


@functools.cache
def trial_of(seed):
    return here.trial(RECIPE, seed, ARMS)


def normalised(x, trial):
    """Pictures from 0 to 1 as the trial's models take them."""
    mean, std = (backend.to_device(np.array(v, "float32").reshape(3, 1, 1), here.device)
                 for v in (trial.batches.mean, trial.batches.std))
    return (x - mean) * (1 / std)


def answers(model, trial, x, batch=250):
    """The classes (B,) that a model gives to pictures from 0 to 1."""
    with tt.no_grad():
        logits = [model(normalised(x[i:i + batch], trial)).logits.numpy() for i in range(0, len(x), batch)]
    return np.concatenate(logits).argmax(axis=1)


def changed(source, way, trial, x, labels, eps, method, seed):
    """The pictures x, changed by the source's loss: of the last class token, or of all."""
    of, refined = (of_last if way == "last" else of_all_blocks), way == "all, refined"
    return perturb(lambda x: of(source(normalised(x, trial), refined=refined), labels), x, eps / 255, method,
                   seed=seed)


def measure(seed):
    """{method: {eps: {way: {model: share of the pictures on which it errs}}}}, and the blocks' accuracies."""
    trial, others = trial_of(seed), trial_of(seed + 100)  # whose source is the target "another seed"
    source, labels = trial.train(REFINED)[0].eval(), trial.test.labels
    models = {SOURCE: (source, trial), SAME: (others.train(SAME)[0].eval(), others)}
    models |= {name: (trial.train(name)[0].eval(), trial) for name in TARGETS[1:]}
    x = backend.to_device(trial.test.images.astype("float32") / 255, here.device)
    right = np.all([answers(*model, x) == labels for model in models.values()], axis=0)
    chosen = np.flatnonzero(right)[:PICTURES]
    if here.size == "smoke":  # nothing is learned in three steps
        chosen = np.arange(PICTURES)
    x, labels = x[chosen], labels[chosen]
    wanted = backend.to_device(labels, here.device)
    errs = lambda moved: {name: float((answers(*model, moved) != labels).mean())
                          for name, model in models.items()}
    found = {"noise": {str(eps): {"noise": errs(perturb(of_last, x, eps / 255, "noise", seed=seed))}
                       for eps in ALLOWED}}
    for method in METHODS:
        found[method] = {str(eps): {way: errs(changed(source, way, trial, x, wanted, eps, method, seed))
                                    for way in WAYS} for eps in ALLOWED}
    blocks = {}
    for refined in (False, True):
        with tt.no_grad():
            out = source(trial.prepare(trial.test.images[:500]), refined=refined)
        blocks["refined" if refined else "plain"] = [
            float((logits.numpy().argmax(axis=1) == trial.test.labels[:500]).mean())
            for logits in out.by_block]
    return {"pictures": len(chosen), "errors": found, "blocks": blocks}


# %% [markdown]
# ## What came out

# %%
SETTINGS = dataclasses.asdict(RECIPE) | dict(steps=STEPS, refine=REFINE, pictures=PICTURES)
done = here.each({f"seed {seed}": functools.partial(measure, seed) for seed in here.seeds},
                 SETTINGS)
rows = list(done.values())
for way, by_block in rows[0]["blocks"].items():
    shares = " ".join(f"{100 * share:.0f}" for share in by_block)
    print(f"accuracy of the blocks' class tokens, {way}: {shares} %")
print(f"pictures that all classify correctly: {rows[0]['pictures']} used")
heads = "".join(f"{name:>19}" for name in (SOURCE, *TARGETS, "mean of targets"))
print(f"{'errors, %':<26}{heads}")


def errors(method, eps, way, names):
    """For each seed the mean error of these models, in percent."""
    return [100 * float(np.mean([row["errors"][method][str(eps)][way][name] for name in names]))
            for row in rows]


for method in ("noise", *METHODS):
    for eps in ALLOWED:
        for way in rows[0]["errors"][method][str(eps)]:
            cells = [spread_text(errors(method, eps, way, names))
                     for names in (*([name] for name in (SOURCE, *TARGETS)), TARGETS)]
            print(f"{f'{method} {eps}/255 {way}':<26}" + "".join(f"{cell:>19}" for cell in cells))
mean = lambda way, names=TARGETS, method="mifgsm": float(np.mean(errors(method, 16, way, names)))
last, every, refined = map(mean, WAYS)
noise = mean("noise", method="noise")
sources = [mean(way, [SOURCE]) for way in WAYS]
here.claim("points by which the targets err more often, all blocks above the last", every - last, low=0)
here.claim("points by which the targets err more often, refined above all blocks", refined - every, low=0)
here.claim("points between the source's errors in the three ways", max(sources) - min(sources), high=5)
here.claim("points of the last above noise", last - noise, low=0)
here.says(f"At eps 16/255 the targets err on {last:.0f} % of the pictures that were changed by the source's "
          f"last class token, {every:.0f} % by all blocks, {refined:.0f} % by refined ones, {noise:.0f} % by "
          f"noise; the source on {sources[0]:.0f}, {sources[1]:.0f} and {sources[2]:.0f} % ({STEPS:,} steps, "
          f"seeds {here.seeds}).")
here.measured(rows=rows, recipe=SETTINGS)


def draw(figure):
    left, right = figure.subplots(1, 2)
    for way, colour in zip((*WAYS, "noise"), ("#0072b2", "#009e73", "#d55e00", "gray")):
        method = "noise" if way == "noise" else "mifgsm"
        left.plot(ALLOWED, [np.mean(errors(method, eps, way, TARGETS)) for eps in ALLOWED], "o-",
                  color=colour, label=way)
    left.set(xlabel="eps, of 255", ylabel="targets err on, % of the pictures",
             title="MI-FGSM, mean of four targets")
    left.legend()
    for way, colour in (("plain", "#009e73"), ("refined", "#d55e00")):
        by_block = 100 * np.mean([row["blocks"][way] for row in rows], axis=0)
        right.plot(range(1, len(by_block) + 1), by_block, "o-", color=colour, label=way)
    right.set(xlabel="block", ylabel="accuracy, %", title="What each block's class token knows")
    right.legend()


here.picture("errors", draw, 9, 3.8)

# %% [markdown]
# In the full run (three seeds, three quarters of an hour of one core) three of the four bounds held.
# Refinement takes the first block's class token from 34 to 49 % and the third from 70 to 86. What misleads
# all blocks moves to the targets no more than what misleads the last one (-0.3 points), and refined ones 5
# points more. All of this gain is with models built otherwise: patches of 8 pixels 11 to 18 %, ConvNeXt 23
# to 29, T2T-ViT 22 to 26, while the ViT of another seed errs about as often in all three ways (76 to 81 %).
# With PGD, which moves less, all blocks gain 4 points and refined ones 12; with DIM and TI refined ones
# gain 5 and 7 on the last. At 4 and 8 of 255 the ways of MI-FGSM are not of one strength, as the source
# itself errs less by all blocks, and none moves more.
#
# The default run has one seed, few steps and 200 pictures: a difference of less than about seven points
# says nothing there.
#
# ## What this does not show
# - The paper's sources and targets are models of ImageNet with up to 86 million weights. Ours are small
#   and see the same drawn pictures, so they may be more alike than models elsewhere.
# - The official code trains the modules one after another, an epoch each. They do not read one another, so
#   here all are trained at once, for as many steps.
# - How to make a model robust. For damage that is not aimed at a model, see lesson 11 of the course.
#
# The code: `tinytoken/models/atvit.py`, `tinytoken/tasks/attack.py`; that both agree with the official
# code is tested in `tests/models/test_atvit.py`.

# %%
here.end()
