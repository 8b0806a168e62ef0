# %% [markdown]
# # Lesson 04: A Vision Transformer
# After this lesson you can write a ViT with plain arrays, from patches to logits. You can train it, draw
# where it looks, and say what it costs.
#
# You need attention from lesson 03. A Vision Transformer (ViT) cuts a picture into patches and makes a token
# of each. Then the tokens exchange information several times, and the class is computed from one token.
# Everything that it needs besides attention is short, and this lesson has all of it.

# %%
import math
import tempfile

import numpy as np

import tinytoken as tt
from tinytoken import backend, bench, plot
from tinytoken.experiments import lesson

here = lesson.begin("04_vit")
rng = np.random.default_rng(here.seed)
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"

train, test = here.pictures(here.pick(512, 16000, 16000), here.pick(64, 2000, 10000))
mean, std = tt.data.batches.channel_statistics(train.images)
print(f"{len(train.images)} pictures to train with, {len(test.images)} to test: {train.images.shape[1:]} "
      f"{train.images.dtype}")
print("classes:", ", ".join(train.names))

# %% [markdown]
# The pictures are *scenes* (`tinytoken/data/scenes.py`), drawn from a seed: 32 x 32 pixels, clutter in the
# background, and one to three objects of one shape in front. The class is the shape. Since the program draws
# them, it knows which pixels are object, and we shall use that. (`--data cifar10` runs the lesson on
# CIFAR-10. With `--full` it is a recipe for a ViT from scratch on two CPU cores.) For each of the three
# colours, the mean of the training set is subtracted from the pixels, and the result is divided by the
# standard deviation. So the inputs of the model have mean 0 and variance 1.
#
# ## Patches
#
# A patch is a square of p x p pixels. With H x W pixels there are N = (H / p)(W / p) of them, counted row by
# row. A patch of C colours is C p p numbers, taken in the order colour, row, column. So pictures (B, C, H, W)
# become (B, N, C p p).

# %%
SIZES = dict(image_size=32, patch_size=4, dim=here.pick(24, 96, 96), depth=here.pick(2, 6, 6), heads=3,
             num_classes=len(train.names))
P, D, DEPTH, HEADS = SIZES["patch_size"], SIZES["dim"], SIZES["depth"], SIZES["heads"]
GRID = SIZES["image_size"] // P  # patches in a row of them
N, T = GRID * GRID, GRID * GRID + 1  # patches; tokens, with the class token that comes below


def cut(images):
    """(B, C, H, W) -> (B, N, C p p), patch by patch."""
    patches = []
    for row in range(GRID):
        for column in range(GRID):
            piece = images[:, :, row * P:(row + 1) * P, column * P:(column + 1) * P]  # (B, C, p, p)
            patches.append(piece.reshape(len(images), -1))
    return np.stack(patches, axis=1)


def paste(patches):
    """(B, N, C p p) -> (B, C, H, W): the way back. Split every axis, put each beside the one it belongs to,
    join."""
    return patches.reshape(-1, GRID, GRID, 3, P, P).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, GRID * P,
                                                                                        GRID * P)


images = tt.data.normalise(test.images[:4], mean, std).astype("float64")
patches = cut(images)
assert np.array_equal(paste(patches), images)
assert np.array_equal(tt.ops.patchify(images, patch=P).data, patches)
print(f"{images.shape} -> {patches.shape}")


def draw_patches(figure):
    scene, numbered, shuffled = figure.subplots(1, 3)
    mixed = paste(cut(test.images[:1])[:, np.random.default_rng(1).permutation(N)])
    for axis, picture, title in ((scene, test.images, f"a test picture: {test.names[test.labels[0]]}"),
                                 (numbered, test.images, f"{N} patches of {P} x {P} pixels"),
                                 (shuffled, mixed, "patches shuffled")):
        axis.imshow(picture[0].transpose(1, 2, 0))
        axis.set(title=title, xticks=[], yticks=[])
    for axis in (numbered, shuffled):
        for line in range(1, GRID):
            axis.axhline(line * P - 0.5, color="white", linewidth=0.8)
            axis.axvline(line * P - 0.5, color="white", linewidth=0.8)
    for n in range(N):
        numbered.text(n % GRID * P + 1.5, n // GRID * P + 1.5, n, color="white", ha="center", va="center",
                      fontsize=7)


here.picture("patches", draw_patches, height=3.4)

# %% [markdown]
# ## The embedding, the class token, the positions
#
# **Embedding.** Each patch is a row of C p p numbers. It goes through a linear layer, which is the same for
# all patches:
#
#     tokens = patches W^T + b        (N, C p p)(C p p, D) -> (N, D)
#
# Its matrix W has D rows of C p p numbers. The package keeps it as (D, C, p, p), because this is also a
# convolution whose window moves by p pixels at a time: number d of a token is the sum, over colour c, row i
# and column j of its patch, of W[d, c, i, j] times that pixel.
#
# We take a model of the package in float64, and follow a picture through it. We first change all weights a
# little: biases start at 0, and then we would not notice if we forgot one. `w` has the weights by name.

# %%
def shaken(model):
    """The model in float64, each weight moved by a random amount."""
    for p in model.astype("float64").parameters():
        p.data += 0.1 * rng.standard_normal(p.shape)
    return model


def agree(what, ours, theirs):
    """Print the largest difference, relative to the largest value; it must be rounding."""
    gap = np.abs(ours - theirs.data).max() / np.abs(ours).max()
    print(f"{what:<28} {str(ours.shape):<18} largest difference {gap:.0e}")
    assert ours.shape == theirs.shape and gap < 1e-12


vit = shaken(tt.models.ViT(**SIZES))
w = {name: p.data for name, p in vit.named_parameters()}


def linear(x, weight, bias):
    return x @ weight.T + bias


embedded = linear(patches, w["patch_embed.proj.weight"].reshape(D, -1), w["patch_embed.proj.bias"])
agree("patch embedding", embedded, vit.patch_embed(images))
corner = np.einsum("dcij,bcij->bd", w["patch_embed.proj.weight"],
                   images[:, :, :P, :P]) + w["patch_embed.proj.bias"]
assert np.allclose(corner, embedded[:, 0], rtol=0, atol=1e-12)  # the convolution at its first place

# %% [markdown]
# **Class token.** One more token is put in front, so there are T = N + 1 tokens. It consists of D learned
# numbers, the same for every picture, and has seen no pixel. In each block it can get information from all
# patches, and at the end the class is computed from this token alone.
#
# **Positions.** Attention does not know the order of the tokens (lesson 03). The other parts of a ViT do not
# know it either, since they treat each token separately. So a vector for each place is added to the tokens at
# the start, (T, D). These vectors are learned. With models and data of this size, it matters what they start
# from. Here it is a table of sines and cosines: for the patch in row r and column s, with D / 4 frequencies
# f_i = 10000^(-4 i / D),
#
#     0.7 x [sin(s f_i), cos(s f_i), sin(r f_i), cos(r f_i)]     for i = 0 ... D/4 - 1
#
# and zeros for the class token. Since sin a sin b + cos a cos b = cos(a - b), the dot product of two such
# positions depends only on how many rows and columns lie between them. The picture shows that patches close
# to each other have the most similar positions: the model need not learn what is near.

# %%
row, column = np.divmod(np.arange(N), GRID)
frequencies = 10000.0 ** (-4 * np.arange(D // 4) / D)
angles = [place[:, None] * frequencies for place in (column, row)]  # (N, D / 4) each
start = 0.7 * np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
fresh = tt.models.ViT(**SIZES).pos_embed.data[0]
assert np.allclose(fresh[1:], start, rtol=0, atol=1e-6) and not fresh[0].any()
apart = [np.subtract.outer(place, place)[..., None] * frequencies for place in (column, row)]  # (N, N, D / 4)
assert np.allclose(start @ start.T, 0.49 * sum(np.cos(a).sum(axis=2) for a in apart), rtol=0, atol=1e-9)


def draw_positions(figure):
    axes = figure.subplots(1, 3)
    for axis, patch in zip(axes, (0, N // 2 + GRID // 2, 2 * GRID - 1)):
        # all rows have the same length: this is the cosine
        likeness = start @ start[patch] / (start[patch] @ start[patch])
        image = axis.imshow(likeness.reshape(GRID, GRID), cmap="viridis", vmax=1)
        axis.plot(patch % GRID, patch // GRID, "x", color="black")
        axis.set(title=f"patch {patch} and all others", xlabel="column", ylabel="row")
        figure.colorbar(image, ax=axis, label="cosine", shrink=0.8)


here.picture("positions", draw_positions, width=11, height=3.2)

# %%
class_token = np.broadcast_to(w["cls_token"], (len(images), 1, D))
x = np.concatenate([class_token, embedded], axis=1) + w["pos_embed"]
agree("tokens with positions", x, vit.embed(images))

# %% [markdown]
# ## A block
#
# A block has two halves. In the first half the tokens exchange information. In the second half each token is
# processed separately:
#
# $$\begin{aligned}
# x &\leftarrow x + \mathrm{attention}(\mathrm{norm}_1(x)) \\
# x &\leftarrow x + \mathrm{MLP}(\mathrm{norm}_2(x))
# \end{aligned}$$
#
# **The sum.** Each half only adds something to x (a *residual connection*). The gradient of a sum goes to
# both terms unchanged. So it reaches the first layer without going through all the layers in between.
#
# **The norm.** Without it, the numbers would grow from block to block, since each block adds to them. Layer
# norm takes the D numbers of each token separately and brings them to mean 0 and variance 1. Then it
# multiplies by a learned vector w and adds another one, b:
#
# $$\mathrm{norm}(x)_d = \frac{x_d - \mu}{\sqrt{\sigma^2 + \varepsilon}} \, w_d + b_d, \quad
#   \mu = \frac{1}{D} \sum_d x_d, \quad \sigma^2 = \frac{1}{D} \sum_d (x_d - \mu)^2$$
#
# A small eps keeps the square root away from 0.
#
# **The MLP** (multi-layer perceptron) is two linear layers, D -> 4 D -> D, with a nonlinearity between them:
#
# $$\mathrm{GELU}(x) = x \, \Phi(x), \quad \Phi(x) = \frac{1 + \mathrm{erf}(x / \sqrt{2})}{2}$$
#
# where Φ(x) is the chance that a standard normal number is below x. For very negative x it is nearly 0, for
# large x it is nearly x: like max(x, 0), but smooth.

# %%
def layer_norm(x, weight, bias, eps=1e-6):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def self_attention(x, w):
    """Lesson 03, from tokens to tokens. x (B, T, D) -> (B, T, D)."""
    def split(part):  # (B, T, D) -> (B, H, T, d)
        return part.reshape(len(x), -1, HEADS, D // HEADS).transpose(0, 2, 1, 3)

    q, k, v = map(split, np.split(linear(x, w["attn.qkv.weight"], w["attn.qkv.bias"]), 3, axis=2))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // HEADS)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = e / e.sum(axis=-1, keepdims=True) @ v
    return linear(out.transpose(0, 2, 1, 3).reshape(x.shape), w["attn.proj.weight"], w["attn.proj.bias"])


def block(x, w):
    """w: the weights of this block by name. x (B, T, D) -> (B, T, D)."""
    x = x + self_attention(layer_norm(x, w["norm1.weight"], w["norm1.bias"]), w)
    hidden = gelu(linear(layer_norm(x, w["norm2.weight"], w["norm2.bias"]), w["mlp.fc1.weight"],
                         w["mlp.fc1.bias"]))
    return x + linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])


def of_block(w, number):
    """The weights of one block, by their names inside it."""
    start = f"blocks.{number}."
    return {name.removeprefix(start): array for name, array in w.items() if name.startswith(start)}


agree("layer norm", layer_norm(x, w["blocks.0.norm1.weight"], w["blocks.0.norm1.bias"]),
      vit.blocks[0].norm1(tt.Tensor(x)))
agree("GELU", gelu(x), tt.ops.gelu(x))
agree("attention", self_attention(x, of_block(w, 0)), vit.blocks[0].attn(tt.Tensor(x)))
agree("a block", block(x, of_block(w, 0)), vit.blocks[0](tt.Tensor(x)))

# %% [markdown]
# ## The head, and all of it
#
# After the last block there is one more norm, and then a linear layer from the D numbers of the class token
# to one number per class, the *logits*. These lines are the whole model:

# %%
def vit_by_hand(images, w):
    """images (B, C, H, W) -> logits (B, classes)"""
    x = linear(cut(images), w["patch_embed.proj.weight"].reshape(D, -1), w["patch_embed.proj.bias"])
    x = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, D)), x], axis=1) + w["pos_embed"]
    for number in range(DEPTH):
        x = block(x, of_block(w, number))
    x = layer_norm(x, w["norm.weight"], w["norm.bias"])
    return linear(x[:, 0], w["head.weight"], w["head.bias"])


agree("logits", vit_by_hand(images, w), vit(images).logits)

# %% [markdown]
# **Without positions the model knows nothing about places.** Shuffle the patches of a picture, as in the
# picture above. Without positions, the logits stay the same up to rounding. With positions, they change.

# %%
shuffled = paste(patches[:, rng.permutation(N)])
with_positions = np.abs(vit_by_hand(shuffled, w) - vit_by_hand(images, w)).max()
blind = w | {"pos_embed": np.zeros_like(w["pos_embed"])}
without_positions = np.abs(vit_by_hand(shuffled, blind) - vit_by_hand(images, blind)).max()
print(f"patches shuffled: logits change by {with_positions:.2f} with positions, by {without_positions:.0e} "
      f"without")
assert without_positions < 1e-11 < 1e-3 < with_positions

# %% [markdown]
# **The gradients** come from the tape. We check them with a small ViT, for all parameters at once: even if
# the gradient of each op is right, a model could still lose a gradient between the ops.

# %%
small = shaken(tt.models.ViT(image_size=8, patch_size=2, dim=8, depth=2, heads=2, num_classes=5))
small_images, labels = rng.standard_normal((2, 3, 8, 8)), np.array([0, 3])
names, parameters = zip(*small.named_parameters())
report = tt.gradcheck(lambda *_: tt.ops.cross_entropy(small(small_images).logits, labels), *parameters,
                      names=names, max_elements=here.pick(60, 300, 2000), seed=here.seed)
worst = max(report.inputs, key=lambda checked: checked.error / checked.allowed)
print(f"{len(report.inputs)} parameters of a small ViT agree with finite differences; nearest to its limit: "
      f"{worst}")

# %% [markdown]
# ## What it costs
#
# Costs are counted in multiply-adds (MACs). The product of (a, b) and (b, c) needs a b c of them. These are
# the costs of a block with T tokens of D numbers:
#
# | part | products | MACs |
# |---|---|---|
# | queries, keys, values | (T, D)(D, 3 D) | 3 T D^2 |
# | scores and answers, all heads | 2 x H x (T, d)(d, T) | 2 T^2 D |
# | projection of the heads | (T, D)(D, D) | T D^2 |
# | MLP | (T, D)(D, 4 D) and (T, 4 D)(4 D, D) | 8 T D^2 |
# | together | | **12 T D^2 + 2 T^2 D** |
#
# The embedding before the blocks adds N C p p D, and the head with K classes adds D K. Norms, softmax, GELU
# and sums are not counted, as is usual. Below we measure the time, and see whether that is fair. The package
# counts what its ops really multiply:

# %%
per_block = 12 * T * D**2 + 2 * T**2 * D
closed = N * 3 * P**2 * D + DEPTH * per_block + D * SIZES["num_classes"]
counted = tt.macs(vit, images)
print(f"counted {counted.total:,} MACs per picture; by the formula {closed:,}; by op {counted.by_op}")
assert counted.total == closed and counted.by_op["attention"] == DEPTH * 2 * T**2 * D
print(f"{'picture':>8}{'patches':>9}{'MACs of a block':>18}{'in attention':>15}{'with half the patches':>24}")
for side in (32, 64, 128, 224, 512):
    tokens, fewer = (side // P)**2 + 1, (side // P)**2 // 2 + 1
    of_attention, total = 2 * tokens**2 * D, 12 * tokens * D**2 + 2 * tokens**2 * D
    less = (12 * fewer * D**2 + 2 * fewer**2 * D) / total
    print(f"{side:>8}{tokens - 1:>9,}{total:>18,}{of_attention / total:>14.0%}{less:>23.0%}")
here.measured(macs=counted.total, macs_closed_form=closed, parameters=vit.parameter_count(), sizes=SIZES)

# %% [markdown]
# The two terms are equal for T = 6 D. For small pictures, nearly all the work is in the linear layers, and it
# grows in proportion to the number of tokens. For large pictures, attention has most of the work, and it
# grows with the square of the number of tokens. In both cases the cost depends on the tokens: without half of
# the patches, more than half of the cost is gone. And most patches of a scene are background.
#
# ## Training
#
# `Batches` shuffles and normalises the pictures. `Classify` is the loss of a classifier. `fit` is the
# training loop of lesson 03, with batches of 64, AdamW, and a learning rate that rises and then falls. It
# writes the loss into a history, from which we draw a picture. `infer` runs a model over many pictures, and
# `accuracy` compares its answers with the labels. Each weight matrix (out, in) starts uniform in +-sqrt(6 /
# (in + out)), which keeps the variance about the same in the forward and in the backward pass. The two layers
# of a block that end in a sum start at 0.3 times that, so that each block adds little at the start.

# %%
def prepare(pictures):
    """uint8 (B, 3, H, W) -> what the model takes."""
    return tt.data.normalise(backend.to_device(pictures, here.device), mean, std)


EVERY = here.pick(2, 5, 20)  # steps of a row of the history


def train_one(seed):
    """-> (the untrained model's weights, the trained model, its history: a row for every few steps,
    seconds)"""
    tt.manual_seed(seed)
    model = tt.models.ViT(**SIZES).to(here.device)
    before = model.state_dict()
    arrays = [backend.to_device(array, here.device) for array in (train.images, train.labels)]
    batches = tt.data.Batches(*arrays, 64, seed=seed, mean=mean, std=std, **train.moves)  # scenes have none
    with tempfile.TemporaryDirectory() as folder:
        # a full run is gone on with
        run = tt.train.Run(here.checkpoints / f"04_seed{seed}" if here.checkpoints else folder)
        result = tt.train.fit(model, tt.train.Classify(model), batches, steps=steps, lr=1e-3, seed=seed,
                              run=run, log_every=EVERY,
                              phase="vit")
        history = run.rows()
    return before, model, history, result["seconds"]


# In full: scenes for three seeds, or twelve times through CIFAR-10 for one
steps = here.pick(8, 300, 1500 if here.data == "scenes" else 12 * len(train.images) // 64)
seeds, runs = here.seeds, [train_one(seed) for seed in here.seeds]
before, vit, history, seconds = runs[0]
losses = [row["loss"] for row in history]  # each the mean of EVERY steps

# %%
logits = [tt.train.infer(model, test.images, prepare) for _, model, _, _ in runs]
reached = [tt.train.accuracy(rows, test.labels) for rows in logits]
seen = tt.train.accuracy(tt.train.infer(vit, train.images[:len(test.images)], prepare),
                         train.labels[:len(test.images)])
# of a share in so many independent pictures
error = math.sqrt(reached[0] * (1 - reached[0]) / len(test.images))
print(f"{steps} steps in {seconds:.0f} s; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print(f"right on new pictures: {', '.join(f'{100 * share:.1f}' for share in reached)} % (standard error "
      f"{100 * error:.1f}); "
      f"on pictures it was trained with: {100 * seen:.1f} %; by chance: {100 / SIZES['num_classes']:.0f} %")
confusion = np.zeros((SIZES["num_classes"],) * 2)
np.add.at(confusion, (test.labels, logits[0].argmax(axis=1)), 1)
confusion /= np.maximum(confusion.sum(axis=1, keepdims=True), 1)
wrong = np.where(np.eye(len(confusion), dtype=bool), 0, confusion)
a, b = np.unravel_index(wrong.argmax(), wrong.shape)
print(f"most often mistaken: {test.names[a]} for {test.names[b]}, {100 * wrong[a, b]:.0f} % of the time")
moved = np.linalg.norm(vit.state_dict()["pos_embed"]
                       - before["pos_embed"]) / np.linalg.norm(before["pos_embed"])
print(f"training moved the table of positions by {100 * moved:.0f} % of its length")
here.measured(steps=steps, seeds=seeds, train_seconds=seconds, test_pictures=len(test.images),
              accuracy=reached,
              accuracy_standard_error=error, accuracy_on_training_pictures=seen, loss_every=EVERY,
              losses=losses,
              positions_moved=float(moved), confusion={"names": list(test.names), "rows": confusion.tolist()})


def draw_training(figure):
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    left.plot([row["step"] + 1 for row in history], losses, color=BLUE, label=f"means of {EVERY} steps")
    left.axhline(math.log(SIZES["num_classes"]), color=GREY, linestyle=":", label=f"all alike: log "
                                                                                  f"{SIZES['num_classes']}")
    left.set(title="training", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    left.legend()
    right.imshow(confusion, cmap="Blues", vmin=0, vmax=1)
    for place in np.argwhere(confusion >= 0.03):
        right.text(*place[::-1], f"{100 * confusion[tuple(place)]:.0f}", ha="center", va="center", fontsize=7,
                   color="white" if confusion[tuple(place)] > 0.5 else "black")
    right.set(title="test pictures: % of each row", xlabel="the model says", ylabel="the picture is")
    right.set_xticks(range(len(test.names)), test.names, rotation=90)
    right.set_yticks(range(len(test.names)), test.names)


here.picture("training", draw_training, width=10, height=5)

# %% [markdown]
# ## Where it looks
#
# The weights A (B, H, T, T) of a block say for each token where it looked. Row 0 belongs to the class token.
# Leave out its weight on itself and divide the others by their sum, and you have a map over the patches. Here
# are the maps of all blocks, each the mean over the heads:

# %%
def class_attention(model, pictures, slice_size=128):
    """(blocks, B, H, N): the class token's weights on the patches, each map with sum 1."""
    maps = []
    for a in range(0, len(pictures), slice_size):
        with tt.no_grad():
            out = model.eval()(prepare(pictures[a:a + slice_size]), trace=True)
        maps.append(np.stack([backend.to_numpy(weights.data)[:, :, 0, 1:] for weights in out.attention]))
    maps = np.concatenate(maps, axis=1)
    return maps / maps.sum(axis=-1, keepdims=True)


untrained = tt.models.ViT(**SIZES).to(here.device)
untrained.load_state_dict(before)
some = test.images[:here.pick(64, 1000, 4000)]
maps, maps_before = class_attention(vit, some), class_attention(untrained, some)


def draw_attention(figure, count=6):
    axes = figure.subplots(count, DEPTH + 1)
    for b in range(count):
        picture = test.images[b].transpose(1, 2, 0)
        panels = [picture] + [plot.heat(picture, maps[number, b].mean(axis=0), P) for number in range(DEPTH)]
        for axis, panel in zip(axes[b], panels):
            axis.imshow(panel)
            axis.set(xticks=[], yticks=[])
        axes[b, 0].set_ylabel(test.names[test.labels[b]])
        said = test.names[logits[0][b].argmax()]
        axes[b, 0].set_xlabel("right" if said == test.names[test.labels[b]] else f"says {said}", fontsize=8)
    for axis, title in zip(axes[0], ["test picture", *(f"block {number}" for number in range(DEPTH))]):
        axis.set_title(title)
    figure.suptitle("where the class token looks (red: each map's largest weight)")


here.picture("attention", draw_attention, width=10, height=9.5)

# %% [markdown]
# A few pictures convince us too easily, so we count. How much of the class token's weight lies on the object?
# Each patch counts with the share of its pixels that are object. There are two comparisons. With equal
# weights (chance), the result is the share of the object in the whole picture. The other one is the untrained
# model, which is not at chance in every block.

# %%
def on_object(maps, share):
    """Mean over pictures and heads, for each block: the weight on the object, and its standard error."""
    each = (maps * share[None, :, None]).sum(axis=-1).mean(axis=2)  # (blocks, B)
    return each.mean(axis=1), each.std(axis=1) / math.sqrt(len(share))


if hasattr(test, "object_share"):
    share = test.object_share(P)[:len(some)]
    (trained_on, se), (before_on, _) = on_object(maps, share), on_object(maps_before, share)
    chance = float(share.mean())
    print(f"of the class token's weight on the object, by block (by chance {100 * chance:.1f} %):")
    for number in range(DEPTH):
        print(f"  block {number}: trained {100 * trained_on[number]:5.1f} ± {100 * se[number]:.1f} %, "
              f"untrained {100 * before_on[number]:5.1f} %")
    here.measured(weight_on_object={"pictures": len(some), "chance": chance, "trained": trained_on.tolist(),
                                    "standard_error": se.tolist(), "untrained": before_on.tolist()})

# %% [markdown]
# **Does the model use what it looks at?** A weight says how much of a token's value was taken, but not what
# for. So we test it: we paint over 16 of the 64 patches with the mean colour (0 after normalising). We choose
# these patches in several ways, and see how many pictures are still classified correctly.

# %%
HIDDEN = N // 4


def without(pictures, chosen):
    """Model input with the chosen patches (B, k) of each picture painted over."""
    images, covered = prepare(pictures), np.zeros((len(pictures), N), bool)
    np.put_along_axis(covered, chosen, True, axis=1)
    covered = np.kron(covered.reshape(-1, 1, GRID, GRID), np.ones((1, 1, P, P)))
    return images * backend.to_device((1 - covered).astype("float32"), here.device)


labels = test.labels[:len(some)]
# (B, N): over blocks and heads; over heads
mean_map, last_map = maps.mean(axis=(0, 2)), maps[-1].mean(axis=1)
ways = {"random patches": rng.permuted(np.tile(np.arange(N), (len(some), 1)), axis=1), "most weight, last "
                                                                                       "block": -last_map,
        "most weight, all blocks": -mean_map, "least weight, all blocks": mean_map}
if hasattr(test, "object_share"):
    ways["most object"] = -share
still_right = {"nothing": tt.train.accuracy(logits[0][:len(some)], labels)}
for name, order in ways.items():
    chosen = order.argsort(axis=1, kind="stable")[:, :HIDDEN]
    still_right[name] = tt.train.accuracy(tt.train.infer(vit, without(some, chosen)), labels)
for name, rate in still_right.items():
    print(f"painted over: {name:<26}{100 * rate:5.1f} % right (standard error "
          f"{100 * math.sqrt(rate * (1 - rate) / len(some)):.1f})")
here.measured(right_with_patches_hidden=still_right, hidden=HIDDEN)

# %% [markdown]
# In the default run, the maps do show what the model uses. Without the 16 patches that have most weight over
# all blocks, few pictures are still right, not many more than without the object itself. Without 16 random
# patches, most pictures are still right. Without the patches with least weight, hardly any picture is lost.
# The map of the last block alone says less. The class token has looked in every block, and a patch that it
# ignores in the last block may have given its information earlier, or to its neighbours.
#
# ## Where the time goes
#
# We can count multiply-adds, but we wait for seconds. The profiler of the package measures the time of every
# op, while it runs training steps, forward and backward, on one thread. (A backward pass has twice the
# multiply-adds of its forward pass: a product has two factors, and the gradient of each factor costs as much
# as the product.)

# %%
job = bench.Job("vit", batch=here.pick(8, 64, 64), dim=D, depth=DEPTH, heads=HEADS)
profile = bench.profile(job, rounds=here.pick(1, 5, 9))
print(bench.profile_text(profile))
total = profile["gradients"] + profile["adamw"]
times = {name: (row.forward + row.backward) / total for name, row in profile["ops"].items()}
all_macs = sum(row.macs for row in profile["ops"].values())
work = {name: row.macs / all_macs for name, row in profile["ops"].items()}
free = sum(time for name, time in times.items() if not work[name])
print(f"ops without a single counted multiply-add take {100 * free:.0f} % of the time")
here.measured(time_of_a_step={"ms": 1e3 * total, "batch": len(job.images), "threads": 1,
                              "share_by_op": times, "adamw":
                              profile["adamw"] / total, "uncounted_ops": free}, macs_share_by_op=work)


def draw_time(figure):
    axis = figure.subplots()
    parts = dict(sorted(times.items(), key=lambda item: -item[1])[:6])
    parts |= {"other ops": sum(times.values()) - sum(parts.values()), "AdamW": profile["adamw"] / total}
    parts["the graph, the rest"] = 1 - sum(parts.values())
    places = np.arange(len(parts))
    axis.barh(places - 0.2, [100 * share for share in parts.values()], 0.4, color=ORANGE, label="of the time")
    axis.barh(places + 0.2, [100 * work.get(name, 0) for name in parts], 0.4, color=BLUE,
              label="of the multiply-adds")
    axis.set(title="a training step: what is waited for, and what is counted", xlabel="%", yticks=places,
             yticklabels=parts)
    axis.invert_yaxis()
    axis.legend(loc="lower right")


here.picture("time", draw_time, height=4)

# %% [markdown]
# The linear layers are nearly as fast as a large matrix product. So their share of the time is smaller than
# their share of the multiply-adds. Attention is the opposite: its products are many and small, and its
# softmax, which is not counted, goes over T x T numbers per head. GELU and layer norm have no multiply-adds
# in this count, but take about a fifth of the time. So saving half of the multiply-adds does not save half of
# the time. Later lessons measure both.
#
# ## What was measured
#
# These are exact, and asserted in every run: each part against the package, the multiply-adds against the
# closed form, and that shuffled patches change nothing if there are no positions. The rest holds for the
# seeds and pictures that it was measured with, and the times are those of this machine.

# %%
said = (f"{steps} steps ({seconds:.0f} s) bring a ViT of {counted.total / 1e6:.1f} M MACs to "
        f"{100 * reached[0]:.1f} % of {len(test.images):,}")
if hasattr(test, "object_share"):
    here.says(f"{said} scenes. In the block where it is most, {100 * max(trained_on):.0f} % of the class "
              f"token's weight lies on the object ({100 * chance:.0f} % by chance; one seed).")
else:
    here.says(f"{said} pictures.")
if here.size == "full" and here.data != "scenes":
    here.claim("a ViT from scratch: % right", 100 * reached[0], low=70)
    here.claim("minutes it was trained", seconds / 60, high=60)

# %% [markdown]
# ## Exercises
#
# 1. Count the parameters of the model by hand, layer by layer, and compare with `vit.parameter_count()`.
# 2. Replace `cut` by `images.reshape(len(images), N, -1)`. Which pixels does token 0 have now? Why is there
#    no error about shapes? Which line above finds the mistake?
# 3. Derive the gradient of layer norm with respect to x, for weight 1 and bias 0: with y the output, s =
#    sqrt(var + eps) and g the upstream gradient, it is (g - mean(g) - y mean(g y)) / s. Make an `@tt.op` of
#    it and check it with `tt.gradcheck`.
# 4. Train without positions: set `model.pos_embed.data[...] = 0` and `model.pos_embed.requires_grad = False`
#    before `fit`. What can such a model still see of a shape? How many pictures does it get right?
# 5. One block's map says where a token looked in that block, but the tokens it looked at are mixtures
#    already. Follow the mixing: take A + I of each block (I for the residual connection), means over heads,
#    rows divided by their sum, and multiply the matrices of all blocks, the last one leftmost (Abnar &
#    Zuidema 2020, "attention rollout"). Is its row 0 better than the last block's map by the two measures
#    above, the weight on the object and painting over?
#
# ## The paper
#
# Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words" (arXiv 2010.11929), section 3.1, beside our lines
# in `tinytoken/models/vit.py`, and for eq. 2 and 3 in `tinytoken/nn/layers.py` (`scaled` does nothing unless
# branches are dropped). MSA is attention with several heads, LN layer norm, E the patch embedding, L depth:
#
# | paper | our line |
# |---|---|
# | eq. 1: z_0 = [x_class; x_1 E; ...; x_N E] + E_pos | `ops.concat(..., x, axis=1)`, `x + self.pos_embed` |
# | eq. 2: z'_l = MSA(LN(z_{l-1})) + z_{l-1} | `x + scaled(attn(norm(x), **options), factors)` |
# | eq. 3: z_l = MLP(LN(z'_l)) + z'_l | `x + scaled(mlp(norm(x)), factors)` |
# | eq. 4: y = LN(z_L^0) | `tokens.x = self.norm(tokens.x)`, then `pooled = x[:, 0]` and `self.head(pooled ...)` |
#
# In the paper, as here, positions are learned, but ours start as sines and cosines. The paper trains on
# millions of photographs of 224 x 224 pixels with patches of 16 x 16 (also 14 and 32). Our names and shapes
# are those of the timm library, so its weights can be loaded.

# %%
here.end()
