# %% [markdown]
# # Lesson 09: LookupViT
# After this lesson you can build a LookupViT block by block and say what each part costs. You can also test
# whether the saving is worth its price.
#
# DynamicViT (lesson 07) removes tokens. LookupViT (Koner et al. 2024) keeps all tokens, but most of the work
# is done by other, fewer tokens. It has two sets of tokens. The N **lookup tokens** are the patches: they are
# many, and take a cheap path. The M **compressed tokens** are the same patches resized to a small grid: they
# are few, and take the expensive path. In each block the few tokens read from the many, are processed, and
# write their result back. Lesson 08 studied this reading and writing. In this lesson they become a network.
#
# **What is the paper's and what is ours.** We had only the abstract of the paper, and public programs that
# follow it in different ways. So this model is one reading of the abstract, and its results say something
# about our reading: they can neither confirm nor refute the figures of the paper. The last part lists each
# choice that is ours.

# %%
import dataclasses
import functools
import math
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import backend, nn, ops, plot
from tinytoken.experiments import (Arm, Recipe, difference, interval_text, lesson, packed, spread_text,
                                   unpacked)
from tinytoken.models import LookupViT, ViT
from tinytoken.models.lookupvit import PAPER
from tinytoken.tasks import Task

here = lesson.begin("09_lookupvit")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The block by hand
# F_l (B, N, D) are the lookup tokens and F_p (B, M, D) the compressed tokens. There are H heads with d = D /
# H channels each. A block has four parts, and each part adds to one of the two sets:
#
# $$\begin{aligned}
# \text{(a) gather} && Q &= \mathrm{norm}(F_p W_Q), \; K = \mathrm{norm}(F_l W_K), \; V = F_l W_V
#     && (B, H, M \text{ or } N, d) \\
# && A &= \mathrm{softmax}(Q K^T / \sqrt{d}) && (B, H, M, N) \\
# && F_p &\leftarrow F_p + [A V] \, W_O && (B, M, D) \\
# \text{(b) refine} && F_p &\leftarrow \mathrm{block}(F_p) && \text{as in lesson 04} \\
# \text{(c) infuse} && V' &= \mathrm{norm}(F_p) \, W_{V'} && (B, H, M, d) \\
# && F_l &\leftarrow F_l + [A^T V'] \, W_{O'} && (B, N, D) \\
# \text{(d) light} && F_l &\leftarrow F_l + \mathrm{MLP}(\mathrm{norm}(F_l)) && (B, N, D)
# \end{aligned}$$
#
# The softmax is over the N lookup tokens, (c) reads the same A backward, and [ ] puts the heads side by side.
# The hidden width of (d) is D / 2, that of the MLP in (b) 4 D. All matrices have biases, which are left out
# above. The norms of (a) come after the projection and before the split into heads.
#
# Most public programs read the paper in this way, so the package calls this reading `PAPER`. Its LookupViT
# differs by default: the norms of (a) come before the projections, (c) takes a new softmax of the scores, and
# there is one classifier. That learned better in short runs (`lessons/full/lookupvit_recipe.py`). All arms of
# this lesson are `PAPER` and its variations.


# %%
def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True)
                             + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def split(x, heads):  # (B, T, D) -> (B, H, T, d)
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge(x):  # (B, H, T, d) -> (B, T, D)
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def gather(F_l, F_p, w, heads):
    """(a) -> the new compressed tokens, and the weights A."""
    q, k = norm(linear(F_p, w, "gather_q"), w, "gather_norm_q"), norm(linear(F_l, w, "gather_k"), w,
                                                                      "gather_norm_k")
    q, k, v = (split(x, heads) for x in (q, k, linear(F_l, w, "gather_v")))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    A = np.exp(scores - scores.max(axis=-1, keepdims=True))
    A /= A.sum(axis=-1, keepdims=True)
    return F_p + linear(merge(A @ v), w, "gather_proj"), A


def infuse(F_l, F_p, A, w, heads):
    """(c) -> the new lookup tokens."""
    v = split(linear(norm(F_p, w, "infuse_norm"), w, "infuse_v"), heads)
    return F_l + linear(merge(A.swapaxes(-1, -2) @ v), w, "infuse_proj")


def light(F_l, w):
    """(d) -> the new lookup tokens."""
    return F_l + linear(gelu(linear(norm(F_l, w, "lookup_norm"), w, "lookup_mlp.fc1")), w, "lookup_mlp.fc2")


def shaken(model):
    """The model in float64, each weight moved by a random amount: zeros hide mistakes."""
    for p in model.astype("float64").parameters():
        p.data += 0.1 * rng.standard_normal(p.shape)
    return model


def off(ours, theirs):
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs.data).max() / np.abs(ours).max())


block = shaken(tt.models.lookupvit.LookupBlock(dim=12, heads=3, reuse="probs", norm="qk"))
w, F_l, F_p = block.state_dict(), rng.standard_normal((2, 16, 12)), rng.standard_normal((2, 4, 12))
lookup, compressed = block(tt.Tensor(F_l), tt.Tensor(F_p))
gathered, A = gather(F_l, F_p, w, 3)
refined = block.refine(tt.Tensor(gathered)).data  # lesson 04's block
written = light(infuse(F_l, refined, A, w, 3), w)
print(f"block by hand and the package's: compressed {off(refined, compressed):.0e}, lookup "
      f"{off(written, lookup):.0e} apart")
assert max(off(refined, compressed), off(written, lookup)) < 1e-12

# %% [markdown]
# ## The model by hand
# Both sets come from the same patches X (B, N, D). The resize matrix of lesson 08, here R (M, N), makes the
# compressed tokens. Each set has its own position embeddings P. There is no class token. At the end, each set
# goes through a layer norm, is averaged, and is classified by its own head. Both heads are trained, and the
# answer of the model is that of the compressed tokens.
#
#     F_l = X + P_l        F_p = R X + P_p        logits = mean over M of norm(F_p) W + b, and likewise for F_l


# %%
SMALL = PAPER | dict(image_size=16, patch_size=4, dim=12, depth=3, heads=3, compressed=(2, 2))
model = shaken(LookupViT(**SMALL))
w, images = model.state_dict(), rng.standard_normal((2, 3, 16, 16))


def lookupvit_by_hand(images, heads=3):
    """(B, C, H, W) -> logits of the compressed head and of the lookup head."""
    X = ops.patchify(images, patch=4).data @ w["patch_embed.proj.weight"].reshape(12, -1).T + w["patch_embed.proj.bias"]
    F_l, F_p = X + w["pos_embed"], ops.resize_matrix((4, 4), (2, 2)) @ X + w["pos_embed_compressed"]
    for i, block in enumerate(model.blocks):
        of_block = {name.removeprefix(f"blocks.{i}."): array for name, array in w.items()
                    if name.startswith(f"blocks.{i}.")}
        F_p, A = gather(F_l, F_p, of_block, heads)
        F_p = block.refine(tt.Tensor(F_p)).data
        F_l = light(infuse(F_l, F_p, A, of_block, heads), of_block)
    return linear(norm(F_p, w, "norm").mean(axis=1), w,
                  "head"), linear(norm(F_l, w, "lookup_norm").mean(axis=1), w, "lookup_head")


ours, theirs = lookupvit_by_hand(images), model.train()(images)
print(f"logits by hand and the package's: {off(ours[0], theirs.logits):.0e} and "
      f"{off(ours[1], theirs.lookup_logits):.0e} apart")
assert max(off(ours[0], theirs.logits), off(ours[1], theirs.lookup_logits)) < 1e-12
names, parameters = zip(*model.named_parameters())
labels = np.array([1, 7])
tt.gradcheck(lambda *_: tt.models.lookupvit_loss(model(images), labels)[0], *parameters, names=names,
             max_elements=here.pick(20, 60, 1000), seed=here.seed)
# In eval mode only the compressed head answers, and nobody would read what (c) and (d) of the last block
# write: they are skipped.
assert np.array_equal(model.eval()(images).logits.data, model.train()(images).logits.data)

# %% [markdown]
# ## What it costs
# These are the multiply-adds of a block with N lookup tokens and M compressed tokens:
#
# | part | for each lookup token | for each compressed token | products of the attention |
# |---|---|---|---|
# | (a) gather | K, V: 2 D^2 | Q, W_O: 2 D^2 | scores and A V: 2 N M D |
# | (b) refine | | 12 D^2 | 2 M^2 D |
# | (c) infuse | W_O': D^2 | W_V': D^2 | A^T V': N M D |
# | (d) light MLP | D^2 | | |
# | together | **4 N D^2** | **15 M D^2** | **(3 N M + 2 M^2) D** |
#
# The block of a ViT costs 12 N D^2 + 2 N^2 D. So even with a very small M, a LookupViT saves at most two
# thirds of the linear part. But the term with the square of N is gone. And the saving has a price: the block
# has 19 D^2 weights, while the block of a ViT has 12 D^2. **A LookupViT has 1.58 times the parameters of a
# ViT with the same width and depth.** It saves multiply-adds, never weights.

# %%
N, D, DEPTH, CLASSES = 64, 96, 6, 10
print(f"{'compressed':<12}{'M MACs':>8}{'of the ViT':>12}{'one head alone':>16}{'M parameters':>14}")
picture = np.zeros((1, 3, 32, 32), "float32")
vit_macs = tt.macs(ViT(), picture).total
for m in (2, 3, 4, 5):
    M, lookupvit = m * m, LookupViT(**PAPER, compressed=(m, m))
    per_block = 4 * N * D**2 + 15 * M * D**2 + (3 * N * M + 2 * M**2) * D
    closed = N * 48 * D + DEPTH * per_block + 2 * D * CLASSES
    unread = 2 * N * D**2 + M * D**2 + N * M * D + D * CLASSES  # (c), (d) and the lookup head
    both, alone = (tt.macs(lookupvit, picture, mean_of_heads=mean).total for mean in (True, False))
    assert both == closed and alone == closed - unread
    print(f"{m} x {m:<8}{both / 1e6:>8.2f}{both / vit_macs:>12.2f}{alone / vit_macs:>16.2f}{lookupvit.parameter_count() / 1e6:>14.2f}")
for kind, wanted in ((LookupViT, 19), (ViT, 12)):
    assert sum(p.data.size for p in kind().blocks[0].parameters() if p.data.ndim == 2) == wanted * D**2

# %% [markdown]
# ## The arms of the experiment
# All arms are trained from scratch, with the same pictures in the same order and the same number of steps of
# the same optimiser. If LookupViT is nearly as good as a ViT with twice its multiply-adds, that alone says
# little. Perhaps the ViT is larger than necessary, and a smaller ViT would be as good. So there are
# **controls**:
#
# - Two ViTs with the multiply-adds of LookupViT: one is narrower, one has half the depth.
# - A ViT that gets only the 3 x 3 resized patches. If it is as good, the lookup tokens are of no use.
# - A ViT with patches of 8 x 8 pixels: the simple way to have fewer tokens.
# - A ViT with as many parameters as LookupViT.
# - **No way back**: LookupViT without (c). The compressed tokens read from the lookup tokens, but write
#   nothing back. If this arm is as good, writing back is of no use.
#
# Then there are variations: other grids; the four ways to reuse the attention in (c), from lesson 08; one
# head; the norms of (a) before the projections; and 256 tokens, where there is more to save.
#
# The last arms were added after the first full run. It had shown that the model without a way back is better
# (see below). Is the second head the reason? Or do the lookup tokens memorise the 16,000 training pictures?
# To find out, both models are also trained with one head, and three arms never see a picture twice, all of
# them with all seeds.


# %%
class SmallGridViT(ViT):
    """A ViT on the patches, resized to 3 x 3, instead of all patches."""

    def build(self, config):
        super().build(config)
        grid, self.num_patches = self.patch_embed.grid, 9
        positions = ops.resize_matrix(grid, (3, 3)) @ nn.start_positions(grid, config.dim)
        # the class token's is 0
        self.pos_embed = nn.Parameter(np.pad(positions, ((1, 0), (0, 0)))[None].astype("float32"))

    def embed(self, images):
        x = ops.resize(self.patch_embed(images), grid=self.patch_embed.grid, size=(3, 3))
        return ops.concat(ops.broadcast_to(self.cls_token, shape=(len(x), 1, x.shape[2])), x,
                          axis=1) + self.pos_embed


VIT, LOOKUP, ONE_WAY, ONE_HEAD, NEITHER = "ViT", "LookupViT 3x3", "no way back", "one classifier", "no way back, one classifier"


# CIFAR: 20 epochs
STEPS, FINE = here.pick((4, 2), (150, 0), (3000, 1000) if here.data == "scenes" else (15620, 0))
NEW = here.pick(128, 16000, 192000)  # as many as are shown in all
RECIPE = Recipe(data=here.data, smoothing=0.0,
                train_pictures=here.pick(64, 16000, 16000),
                test_pictures=here.pick(128, 2000, 10000),
                **here.pick(dict(batch=8, dim=16, depth=2, heads=2, patch=8), {}, {}))


def arm(model="lookupvit", config=None, beside=(VIT, LOOKUP), **more):
    """An arm that is trained from scratch; a LookupViT's grid is 3 x 3 where config has no other."""
    grid = PAPER | dict(compressed=here.pick((2, 2), (3, 3), (3, 3))) if model == "lookupvit" else {}
    return Arm(model, grid | (config or {}), beside=beside, lr=RECIPE.lr, **dict(steps=STEPS) | more)


AT_256 = dict(steps=FINE, beside=("ViT, 256 tokens", "LookupViT 5x5, 256 tokens"))
UNSEEN = dict(pictures=NEW, beside=("ViT, new pictures", "LookupViT 3x3, new pictures"))
narrow = here.pick(dict(dim=8, heads=1), dict(dim=64, heads=2), dict(dim=64, heads=2))
one_way, one_head = dict(reuse="none"), dict(classifiers="compressed")
HEADLINE = {
    VIT: arm("vit"),
    LOOKUP: arm(),
    ONE_WAY: arm(config=one_way),
    "ViT, narrower": arm("vit", narrow),
    "ViT, half the depth": arm("vit", dict(depth=here.pick(1, 3, 3))),
}
ARMS = HEADLINE | {
    "ViT on 3x3 tokens": arm(SmallGridViT),
    "ViT, patch 8": arm("vit", dict(patch_size=here.pick(16, 8, 8))),
    "ViT of equal parameters": arm("vit", dict(dim=here.pick(20, 120, 120))),
    "ViT, mean of tokens": arm("vit", dict(pool="mean")),
    **{f"LookupViT {m}x{m}": arm(config=dict(compressed=(m, m)))
       for m in here.pick((2,), (2, 4, 5), (2, 4, 5))},
    **{f"reuse {name}": arm(config=dict(reuse=name)) for name in ("renorm", "resoftmax", "separate")},
    ONE_HEAD: arm(config=one_head),
    "norms before": arm(config=dict(norm="pre")),
    "ViT, 256 tokens": arm("vit", dict(patch_size=2), **AT_256),
    "LookupViT 5x5, 256 tokens": arm(config=dict(patch_size=2, compressed=(5, 5)), **AT_256),
    "no way back, 256 tokens": arm(config=dict(patch_size=2, compressed=(5, 5)) | one_way, **AT_256),
    NEITHER: arm(config=one_way | one_head, beside=(VIT, ONE_HEAD)),
    "ViT, new pictures": arm("vit", **UNSEEN),
    "LookupViT 3x3, new pictures": arm(**UNSEEN),
    "no way back, new pictures": arm(config=one_way, **UNSEEN),
}
# what lessons with the same --out train alike has the same files
ARMS = {name: dataclasses.replace(arm, phase=f"{name} {arm.steps}") for name, arm in ARMS.items()}
main_arms = [*HEADLINE, ONE_HEAD, NEITHER]
chosen = here.pick([name for name in ARMS if ARMS[name].steps == STEPS], [VIT, LOOKUP, ONE_WAY],
                   list(ARMS) if here.data == "scenes" else main_arms)
# these with all seeds, the others with the first
seeds, repeated = here.seeds, main_arms + [name for name in ARMS if ARMS[name].pictures]
SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS}


@functools.cache
def trial_of(seed, pictures=0):
    return here.trial(dataclasses.replace(RECIPE, train_pictures=pictures or RECIPE.train_pictures), seed,
                      ARMS)


def looked_at(trial, model):
    """What each compressed token of the last block reads in three pictures, mean over heads: (3, M, N)."""
    with tt.no_grad():
        out = model.eval()(trial.prepare(trial.test.images[:3]), trace=True)
    return backend.to_numpy(out.attention[-1].data).mean(axis=1).tolist()


def train(name, seed):
    """Train an arm -> what is noted of it. "right": a bit for each test picture, 1 where its answer is right,
    in hexadecimal."""
    trial = trial_of(seed, ARMS[name].pictures)
    model, report = trial.train(name)
    logits = trial.answers(model)
    row = trial.measure(model, report, logits) | {"steps": ARMS[name].steps}
    row["right"] = packed(logits.argmax(axis=1) == trial.test.labels)
    return row | ({"looks": looked_at(trial, model)} if (name, seed) == (LOOKUP, seeds[0]) else {})


wanted = [(name, seed) for seed in seeds for name in repeated if name in chosen]
wanted += [(name, seeds[0]) for name in chosen if name not in repeated]
done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed) for name, seed in wanted},
                 SETTINGS)
rows = {name: [done[key] for seed in seeds if (key := f"seed{seed} {name}") in done] for name in chosen}
pictures = len(trial_of(seeds[0]).test.labels)
answers = {name: [unpacked(row.pop("right"), pictures) for row in rows[name]] for name in chosen}
looks = np.array(rows[LOOKUP][0].pop("looks"))

# %% [markdown]
# ## Where does the way back pay?
# The class is computed from the compressed tokens. So the way back can help only indirectly: what is written
# to a lookup token in one block is read from it in the next. Now take a task whose answer is needed at the
# lookup tokens: **what share of this patch is object?** A patch of 4 x 4 pixels does not show that by itself,
# since the clutter has the same colours as the objects. The token needs information from the rest of the
# picture, and without (c) none of it can reach the token. A linear head on each patch token predicts the
# share. The loss is the squared error, and the measure is the share of the variance that is explained (R^2: 1
# is perfect, 0 is as good as a constant).


# %%
class Locator(nn.Module):
    """A ViT or LookupViT with a head on every patch token. images (B, C, H, W) -> Output, its logits the
    shares (B, N)."""

    def __init__(self, body):
        self.body, self.config, self.share_head = body, body.config, nn.Linear(body.config.dim, 1)
        self.noise = body.noise
        nn.initialise(self)

    def forward(self, images):
        looks_up = isinstance(self.body, LookupViT)
        # in eval mode a LookupViT finishes its lookup tokens only if it is asked for both heads
        out = self.body(images, **({"mean_of_heads": True} if looks_up and not self.training else {}))
        shares = self.share_head(out.lookup if looks_up else out.tokens)
        return tt.models.Output(shares.reshape(len(images), -1))


class Locate(Task):
    """Squared error of a Locator. The labels of its batches are the shares (B, N)."""

    def __init__(self, model):
        super().__init__(model)
        self.settings = {"task": "object share"}

    def __call__(self, images, shares):
        loss = ops.mse(self.model(images).logits, shares)
        return loss, {"squared error": loss}


def explained(shares, found):
    return float(1 - ((shares - found) ** 2).mean() / shares.var())


LOCATE_STEPS = here.pick(2, 60, 1000)


@functools.cache
def locating_trial(seed):
    """A trial whose labels are the object shares of the patches."""
    trial = here.trial(RECIPE, seed)
    trial.batches.labels = backend.to_device(trial.train_set.object_share(RECIPE.patch), here.device)
    return trial


def locate(name, seed):
    """Train a Locator on the arm's model -> the explained share of the test pictures, and its answers (5, N)
    for the first five."""
    trial, arm = locating_trial(seed), ARMS[name]
    model = Locator(trial.new(arm.model, **arm.config)).to(here.device)
    trial.fit(f"locate {name} {LOCATE_STEPS}", Locate(model), LOCATE_STEPS, trial.recipe.lr)
    found = trial.answers(model)
    return {"explained": explained(trial.test.object_share(RECIPE.patch), found), "first": found[:5].tolist()}


done = here.each({f"locate seed{seed} {name}": functools.partial(locate, name, seed) for seed in seeds
                  for name in (VIT, LOOKUP, ONE_WAY) if here.data == "scenes"},
                 SETTINGS | {"locate_steps": LOCATE_STEPS})
located = {name: [done[f"locate seed{seed} {name}"]["explained"] for seed in seeds if done]
           for name in (VIT, LOOKUP, ONE_WAY)}
maps = {name: done[f"locate seed{seeds[0]} {name}"]["first"] for name in located if done}

# %% [markdown]
# ## What was measured
# ± is the standard deviation over seeds. A difference is paired: both arms have the same seed, so the same
# pictures in the same order. Its 95 % interval is Student's over the seeds. Where there is only one seed, it
# is the normal interval over the test pictures, which does not tell how another seed would have come out.

# %%
differences = {}
print(f"{'arm':<28}{'accuracy, %':>12}{'M MACs':>9}{'M params':>9}{'steps':>7}{'above the ViT [95 %]':>26}{'above its LookupViT [95 %]':>30}")
for name in chosen:
    differences[name] = [None if name == other else difference(answers[name], answers[other])
                         for other in ARMS[name].beside]
    cells = [interval_text(*gap) if gap else "" for gap in differences[name]]
    row = rows[name][0]
    print(f"{name:<28}{spread_text([100 * r['accuracy'] for r in rows[name]]):>12}{row['macs'] / 1e6:>9.2f}"
          f"{row['parameters'] / 1e6:>9.2f}{row['steps']:>7}{cells[0]:>26}{cells[1]:>30}")
for name, found in located.items():
    if found:
        print(f"object share of each patch, {LOCATE_STEPS} steps, {name:<16} explained "
              f"{spread_text(found, '.3f')}")

# %% [markdown]
# Here are the claims. Their bounds were set before the first full run. A smaller run decides nothing.

# %%
here.claim("LookupViT 3x3: MACs, of the ViT's", rows[LOOKUP][0]["macs"] / rows[VIT][0]["macs"], high=0.5)
here.claim("LookupViT 3x3: lower end of the 95 % interval of points above the ViT",
           differences[LOOKUP][0][1], low=-1)
for name in (name for name in HEADLINE if name in chosen and name not in (VIT, LOOKUP)):
    here.claim(f"LookupViT 3x3: points above {name}", -differences[name][1][0], low=0)
if located[LOOKUP]:
    here.claim("object share of each patch: explained by LookupViT 3x3, above no way back",
               statistics.mean(located[LOOKUP]) - statistics.mean(located[ONE_WAY]), low=0)
here.says(f"LookupViT 3x3 at {rows[LOOKUP][0]['macs'] / rows[VIT][0]['macs']:.2f} of the ViT's multiply-adds "
          f"lies "
          f"{differences[LOOKUP][0][0]:+.1f} points from it, without its way back "
          f"{differences[ONE_WAY][0][0]:+.1f} "
          f"({STEPS:,} steps, {len(seeds)} seed{'s' * (len(seeds) > 1)}).")


def draw_arms(figure):
    """A row per arm, by cost: a dot per seed. The arms under other conditions stand below the line."""
    axis, elsewhere = figure.subplots(), {name for name in chosen if ARMS[name].steps != STEPS
                                          or ARMS[name].pictures}
    order = sorted(chosen, key=lambda name: (name in elsewhere, rows[name][0]["macs"]))
    for place, name in enumerate(order):
        colour = "#0072b2" if ARMS[name].model == "lookupvit" else "#d55e00"
        axis.plot([100 - 100 * row["accuracy"] for row in rows[name]], [place] * len(rows[name]), "o",
                  color=colour, alpha=0.7)
    low, high = axis.get_xlim()
    axis.set(xlabel=f"errors in {pictures:,} test pictures, %; a dot per seed", title="LookupViTs (blue) and "
                                                                                      "ViTs (orange), by "
                                                                                      "multiply-adds")
    if high > 3 * low:
        ticks = [tick for tick in (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 25, 30, 40, 50, 70, 90)
                 if low < tick < high]
        axis.set(xscale="log", xlabel=f"{axis.get_xlabel()} (logarithmic)")
        axis.set_xticks(ticks, map(str, ticks))
    axis.set_yticks(range(len(order)), [f"{name}   {rows[name][0]['macs'] / 1e6:.1f} M" for name in order])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if elsewhere:
        axis.axhline(len(order) - len(elsewhere) - 0.5, color="black", linewidth=0.8)
    axis.invert_yaxis()


def draw_looks(figure):
    shown = trial_of(seeds[0]).test
    axes = figure.subplots(len(looks), 1 + looks.shape[1])
    for b, row in enumerate(axes):
        picture = shown.images[b].transpose(1, 2, 0)
        for i, axis in enumerate(row):
            axis.imshow(picture if i == 0 else plot.heat(picture, looks[b, i - 1], RECIPE.patch),
                        interpolation="nearest")
            axis.set(xticks=[], yticks=[], ylabel="" if i else shown.names[shown.labels[b]])
            if b == 0:
                axis.set_title("picture" if i == 0 else f"token {i}", fontsize=9)
    figure.suptitle("What each compressed token of the last block reads (red: its largest weight)")


def draw_located(figure):
    side, shown = 32 // RECIPE.patch, trial_of(seeds[0]).test
    shares = shown.object_share(RECIPE.patch)
    axes = figure.subplots(5, 2 + len(maps))
    for b, row in enumerate(axes):
        panels = {"picture": shown.images[b].transpose(1, 2, 0),
                  "object share": shares[b].reshape(side, side)}
        panels |= {name: np.reshape(found[b], (side, side)) for name, found in maps.items()}
        for axis, (name, panel) in zip(row, panels.items()):
            axis.imshow(panel, **({} if name == "picture" else dict(cmap="viridis", vmin=0, vmax=1)))
            axis.set(xticks=[], yticks=[])
            if b == 0:
                axis.set_title(name, fontsize=9)
    figure.suptitle("Which share of each patch is object? The truth, and three answers")


here.picture("arms", draw_arms, 9, 1.6 + 0.24 * len(chosen))
here.picture("looks", draw_looks, 12, 4.2)
if maps:
    here.picture("located", draw_located, 7.5, 7.5)
here.measured(rows=rows, differences=differences, located=located, locate_steps=LOCATE_STEPS, seeds=seeds,
              recipe=SETTINGS)

# %% [markdown]
# This is what to look for. The figures are those of the full run on scenes (3,000 steps; 3 seeds where there
# is a ±, otherwise one; `lessons/results/09_lookupvit_full.json`). LookupViT 3x3 needs 0.45 of the ViT's
# multiply-adds and loses 1.1 points. That is more than the one point that we had allowed before the run. Its
# controls are not worse: the ViTs with its multiply-adds are 0.1 and 0.3 points better, and **the model
# without a way back is one point better**. It reaches 98.0 ± 0.1 %, as good as the ViT, with 0.37 of the
# ViT's multiply-adds. So it is worth its price that a few tokens read from many (a ViT reaches 45.9 % with
# the 9 resized patches alone, and 93.0 % with patches of 8 x 8 pixels). Writing back is not worth its price
# here, where the answer is a class.
#
# Why not? Compare the models with one classifier and with two. With one classifier the way back costs
# nothing: 97.6 ± 0.1 % with it, 97.4 ± 0.3 % without it. Both are half a point or more behind the ViT. The
# second classifier makes the difference, in opposite directions: the model with a way back loses 0.6 points
# with it, and the model without gains as much. The training losses ("trained" in the JSON) suggest a reason.
# Without a way back, a lookup token knows only its own patch, and the loss of its classifier stays above 0.1.
# So until the end of training, this loss demands of every patch what it can tell about the class, and that is
# what the compressed tokens read. With a way back, this loss falls below 0.001, like the other one: the
# answer is written to the lookup tokens, and the loss demands nothing of them any more. This is an
# explanation, not a proof. What the arms show is that the second classifier causes the difference.
#
# A part of the gap comes from memorising. The 16,000 pictures are shown twelve times, and all arms of 3,000
# steps except the one on 3 x 3 tokens end with a class loss of 0.001 or less. If no picture is shown twice
# ("new pictures"), the ViT reaches 99.0 ± 0.2 %, LookupViT 98.7 ± 0.1 %, and the model without a way back
# 99.0 ± 0.0 %. A third of the gap to the ViT is left: 0.4 points [-0.3, 1.0]. Also a third of the gap to the
# model without a way back is left: 0.3 points [0.05, 0.6]. So the gap becomes smaller, but it does not
# vanish.
#
# None of the variations stands out (they have one seed, and two seeds of LookupViT differ by up to 0.45
# points). 2 x 2 compressed tokens are as good as 5 x 5. The picture of what the tokens read suggests why: in
# the last block, nearly all nine tokens of the 3 x 3 grid read the same patches. With 256 tokens, after 1,000
# steps, the way back costs two points. But no arm has finished learning by then.
#
# **What it took.** The arms above learn their 16,000 pictures by heart. `lessons/full/lookupvit_headline.py
# --full` moves the pictures by up to 4 pixels, smooths the labels, and lets keys start as copies of the
# queries, for all arms, each of one classifier (3,000 steps, five seeds, 10,000 test pictures;
# `lessons/results/lookupvit_headline_full.json`). Then LookupViT errs no more than the ViT: 0.0 points
# [-0.1, 0.1] from its 99.1 %, and it is 0.5 points [0.2, 0.7] above the narrower ViT of its cost. Without
# its way back it loses 0.4 points, in the paper's reading 0.5 (one seed each). Its compressed tokens read
# more and more alike for some 700 steps, and then less so again, but for the last block
# (`lookupvit_headline_full_alike.png`).
#
# **Where the way back pays.** Here each patch must tell what share of it is object. Without a way back, 0.833
# ± 0.001 of the variance is explained; with it, 0.893 ± 0.005; by the ViT, 0.891 ± 0.002. What the patches
# need to know about each other reaches them through nine tokens as well as through the ViT's attention among
# all tokens, for half of the multiply-adds (0.48, since the lookup tokens of the last block are needed here,
# too).
#
# On CIFAR-10 (one seed, 20 epochs; `09_lookupvit_full_cifar10.json`) the ViT reaches 77.5 %, LookupViT 75.3
# %, the model without a way back 75.7 %, the narrower ViT 76.6 %, and the ViT with half the depth 76.0 %.
# Again the second classifier makes the model with a way back worse, by 0.9 points [0.2, 1.7], and the model
# without better, by 0.4 points, which may be chance. Its own loss ends at 0.56 and 0.94. With one classifier,
# LookupViT reaches 76.2 %, which is between the two ViTs with its multiply-adds, and the model without a way
# back 75.3 %. So here the way back gains 0.9 points [0.2, 1.6], but this is a single seed. LookupViT does not
# learn less than the smaller ViTs: all arms except the ViT end with a training loss of 0.55 to 0.58 for the
# class (the ViT with 0.47). With two classifiers, more of what it learns is useless for other pictures.

# %% [markdown]
# ## Exercises
# 1. For which M does the block of a LookupViT cost as much as the block of a ViT, with N = 64 and with N =
#    256 (D = 96)? Solve the formula, then check with `tt.macs`.
# 2. Let the compressed tokens start from learned vectors, the same for every picture, instead of the resized
#    patches (override `embed`). Train the model. What is lost besides accuracy? (Ask the model for another
#    grid.)
# 3. Average the answers of both heads at inference: `trial.answers(model, mean_of_heads=True)`. What does
#    this gain? What does it cost, according to `tt.macs(model, images, mean_of_heads=True)`?
# 4. Remove the light MLP, too, so that the lookup tokens never change. With which arm should you compare this
#    model? What does it cost?
# 5. Use the lookup tokens of a LookupViT without training it again: take the model that was trained for
#    classes, freeze all its weights, and train only the head of `Locator`. Do the tokens know where the
#    object is? Compare with the model without a way back.
#
# ## The paper
# Koner et al. 2024, "LookupViT: Compressing visual information to a limited number of tokens" (arXiv
# 2407.12753). There is no official code, we had the abstract of the paper but not its equations, and public
# programs differ. So the table has, for each step, our line, what `PAPER` is where the programs differ, and the
# test that checks it (in `tests/models/test_lookupvit.py`, unless another file is named).
#
# | step | our line (`models/lookupvit.py`) | `PAPER`, where readings differ | test |
# |---|---|---|---|
# | lookup tokens | `x + self.pos_embed` | no class token | `test_the_model_is_its_equations` |
# | compressed tokens | `ops.resize(x, ...) + ...` | antialiased; before positions; a table of their own | `test_the_compressed_tokens_are_...` |
# | (a) scores and weights | `out, A, logits = ops.lookup_gather(...)` | norms after the projections (`norm="pre"`: before) | `test_the_readings_of_reuse_and_norm_differ` |
# | (a) what is added | `compressed + nn.scaled(self.gather_proj(...), factors)` | an output projection | `test_the_model_is_its_equations` |
# | (b) | `self.refine(...)` | MLP of 4 D | `test_parameters_of_a_block` |
# | (c) values | `self.infuse_norm(compressed)`, then `self.infuse_v(compressed)` | normed first; a matrix of their own | `test_the_model_is_its_equations` |
# | (c) A read backward | `ops.lookup_infuse(A, logits, v, reuse=self.reuse)` | `probs`: A^T as it is, each head its own | `test_masses_of_the_attention_and_of_its_readings` |
# | A is used twice | the tape adds both gradients | | `test_the_gradient_of_the_attention_is_the_sum_...` |
# | (d) | `nn.mlp_branch(lookup, self.lookup_norm, self.lookup_mlp, ...)` | MLP of D / 2, normed input | `test_parameters_of_a_block` |
# | heads | `head`, `lookup_head` | two, equal weights; the compressed one answers | `test_the_loss_is_the_sum_of_both_heads` |
# | last block | `tail=False` | (c), (d) skipped where nobody reads them | `test_skipping_the_last_tail_leaves_...` |
# | multiply-adds | (3 N M + 2 M^2) D + (4 N + 15 M) D^2 | | above; `tests/test_cost.py` |

# %%
here.end()
