# %% [markdown]
# # Lesson 00: The family
# After this lesson you can say of any method of this course which part of a transformer's products it thins,
# how much that can save at most, and from how many tokens on. You have measured all of them side by side.
#
# ## The idea
# A block of a ViT on N tokens of width C makes three kinds of products. **Rows**: each token goes through
# the projections and the MLP, 12 N C^2 multiply-adds. **Keys**: each token is compared with N others, and
# reads N of them, 2 N^2 C. And before the first block the **input** became N tokens: why N? Every method
# thins one of the three:
#
# - **Rows**: tokens are removed (DynamicViT, EVAD around a key frame, DoViT when they are sure, VLTP by a
#   sentence, SegViTv2 every second one), averaged (ToMe), or few tokens work in place of many (LookupViT,
#   STViT, STViT-R). In DynamicConvNeXt and DynamicSwin all stay, but only some go through the MLP.
# - **Keys**: every token goes on, but reads fewer: merged ones (Shunted), meta tokens (LeMeViT), or those of
#   its window (Swin).
# - **Input**: fewer tokens from the start. A larger patch does this, and T2T-ViT in steps that lose less.
# - **Nothing**: ViT-FOD and SegViT's masks spend multiply-adds for answers. So does ATViT, which is for
#   attacks (lesson 08) and has no row here; `tinytoken/experiments/family.py` says of each model why.

# %%
import functools
import json
import pathlib
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import nn, ops
from tinytoken.backend import array_module
from tinytoken.errors import expect
from tinytoken.experiments import family, lesson, spread_text, timing
from tinytoken.train import infer

here = lesson.begin("related_family")
expect(here.data == "scenes", "family", f"--data {here.data}: the lesson has data of its own")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## The mechanism by hand
# One function is all three. x (N, C) are the tokens of a picture, `rows` the numbers of those that go on,
# and S (M, N) says of what each key is made: a row with a single 1 is a token that is a key, and a row of
# quarters is the mean of four. A full block has all rows, and S is the identity.


# %%
def norm(x, w, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def thin_block(x, w, rows, S):
    """A block with one head."""
    z = norm(x, w, "norm1")
    q = np.split(linear(z[rows], w, "attn.qkv"), 3, axis=1)[0]
    _, k, v = np.split(linear(S @ z, w, "attn.qkv"), 3, axis=1)
    A = np.exp(q @ k.T / np.sqrt(x.shape[1]))
    x = x[rows] + linear(A / A.sum(axis=1, keepdims=True) @ v, w, "attn.proj")
    hidden = linear(norm(x, w, "norm2"), w, "mlp.fc1")
    return x + linear(ops.gelu(hidden).data, w, "mlp.fc2")


def means_of_four(side):
    """S of 2 x 2 cells of side x side tokens."""
    cell = np.arange(side) // 2
    cells = (cell[:, None] * (side // 2) + cell).reshape(-1)
    return (cells == np.arange(side * side // 4)[:, None]) / 4


# %% [markdown]
# And the package's block in the same three ways, each with a quarter of what it thins. Removing rows of 16
# tokens leaves 4. Their keys go too: a removed token is not read, which is why masking it in training is the
# same (lesson 05). Thin keys leave all 16 tokens. A thin input is 4 tokens before any block: the same cost as
# removing rows, but nobody has looked at the picture yet.


# %%
class Thin(nn.Module):
    """A block that thins "rows", "keys", "input" or "nothing". x (B, N, C), N a square."""

    def __init__(self, thins, dim):
        self.thins, self.block = thins, nn.Block(dim, 1)

    def forward(self, x):
        (B, N, C), xp = x.shape, array_module(x.data)
        if self.thins == "rows":  # which ones, is a method's idea; here every fourth
            x = ops.take_tokens(x, xp.broadcast_to(xp.arange(0, N, 4), (B, N // 4)))
        if self.thins == "input":
            x = means(x)
        if self.thins != "keys":
            return self.block(x)
        attn, z = self.block.attn, self.block.norm1(x)
        w, b = attn.qkv.weight, attn.qkv.bias
        q = ops.linear(z, w[:C], b[:C]).reshape(B, 1, N, C)
        k, v = (ops.linear(means(z), w[i:i + C], b[i:i + C]).reshape(B, 1, N // 4, C) for i in (C, 2 * C))
        read = ops.attention(q, k, v, sees_itself=False).reshape(B, N, C)
        return self.block.second(x + attn.proj(read), None)


def means(x):
    """Of cells of 2 x 2 tokens. No products: a cell's four are added."""
    B, side, C = len(x), round(x.shape[1] ** 0.5), x.shape[2]
    return x.reshape(B, side // 2, 2, side // 2, 2, C).mean(axis=(2, 4)).reshape(B, side * side // 4, C)


N, C = 16, 6
x, all_rows, every, S = rng.standard_normal((1, N, C)), np.arange(N), np.eye(N), means_of_four(4)
for thins, tokens, rows, keys in (("nothing", x[0], all_rows, every),
                                  ("rows", x[0], all_rows[::4], every[::4]), ("keys", x[0], all_rows, S),
                                  ("input", S @ x[0], all_rows[:4], np.eye(4))):
    thin = Thin(thins, C).astype("float64")
    for p in thin.parameters():  # zeros hide mistakes
        p.data += 0.3 * rng.standard_normal(p.shape)
    gap = np.abs(thin_block(tokens, thin.block.state_dict(), rows, keys) - thin(tt.Tensor(x)).data[0]).max()
    print(f"{thins}: {len(rows)} rows, {len(keys)} keys; by hand and the package's at most {gap:.0e} apart")
    assert gap < 1e-12
    tt.gradcheck(lambda x, *_: thin(x), x, *thin.parameters(), seed=here.seed, max_elements=60)
    if thins == "rows":
        keep = (all_rows % 4 == 0).astype("float64")[None]
        masked = thin.block(tt.Tensor(x), keep=keep).data[0, ::4]
        assert np.abs(masked - thin(tt.Tensor(x)).data[0]).max() < 1e-12

# %% [markdown]
# The multiply-adds of such a block with n rows and M keys. (Queries, output and MLP belong to rows, 10 n C^2;
# what makes keys and values belongs to keys, 2 M C^2; each pair costs 2 C.)
#
#     10 n C^2 + 2 M C^2 + 2 n M C
#
# Rows thinned to a share s cost less than s of the block at any N. Keys thinned to s leave the 10 N C^2 of
# the rows: at N << C that is 5/6 of all, and only where N >> C is most of it saved.


# %%
def closed(n, M, C):
    return 10 * n * C**2 + 2 * M * C**2 + 2 * n * M * C


print(f"{'of a block of width 64':<24}" + "".join(f"{N:>14,} tokens" for N in (16, 64, 256, 1024)))
for thins in ("rows", "keys", "input"):
    shares = []
    for N in (16, 64, 256, 1024):
        counts = (N if thins == "keys" else N // 4, N // 4)
        counted = tt.macs(Thin(thins, 64), tt.Tensor(np.zeros((1, N, 64), "float32"))).total
        assert counted == closed(*counts, 64)
        shares.append(counted / closed(N, N, 64))
    print(f"{'a quarter of ' + thins:<24}" + "".join(f"{share:>21.2f}" for share in shares))

# %% [markdown]
# ## The experiment
# **All methods at 64 tokens.** Each has the width of the ViT (64) and six blocks; the models are not trained.
# We count multiply-adds, and take the clock in rounds in which every method has its turn, for 1 and for 128
# pictures. (DoViT cannot be sure before it has learned: here it costs the most it can.) Each is compared with
# its dense model: the ViT, or for the dynamic pyramids ConvNeXt and Swin. A method **shows** what it saves if
# its share of the time is its share of the multiply-adds.
#
# **Some at more tokens.** The same weights' shapes at pictures of 32, 64 and 128 pixels: 64, 256 and 1,024
# tokens, on one thread.
#
# **What they reach** takes a training, so it is read from committed results. `lessons/full/family.py --full`
# trains all by one recipe. Beside it stand the pairs (method, its dense model) of each method's own lesson,
# with its own recipe, so that these gaps cannot be compared with one another, but each with zero.
#
# The bounds, set before the run. At 64 tokens no method that thins keys is faster than the ViT, at 1,024
# Shunted and LeMeViT both are. Every method that saves 30 % or more by its rows is faster with 128 pictures;
# for one picture half of them are not. In the full results, a method that saves this much by its rows loses
# at most two points to its dense model.

# %%
SIZES = here.pick(dict(dim=24, heads=3), dict(dim=64, heads=2), dict(dim=64, heads=2))
ROUNDS = here.pick({"1": 1, "4": 1}, {"1": 11, "128": 5}, {"1": 31, "128": 15})  # by pictures at a time
ONE, MANY = ROUNDS
SIDES, TURNS = here.pick(((16, 32), 1), ((32, 64, 128), 5), ((32, 64, 128), 15))
RECIPES = {data: family.recipe_of(data, train_pictures=16, batch=16, test_pictures=int(MANY), **SIZES)
           for data in family.FACES}
METHODS = {data: of(RECIPES[data]) for data, (of, _) in family.FACES.items()}
GROWING = {name: METHODS["scenes"][name]
           for name in ("ViT", "DynamicViT .7", "LookupViT 3x3", "Shunted", "LeMeViT")}


def grown(side):
    """What GROWING cost with pictures of so many pixels a side, as family.beside_base reads it."""
    sizes = dict(image_size=side, patch_size=4, depth=6, num_classes=10, **SIZES)
    made = {name: tt.models.create(each.model, **sizes | each.config) for name, each in GROWING.items()}
    images = rng.standard_normal((max(1, 32768 // side**2), 3, side, side)).astype("float32")
    runs = {name: functools.partial(infer, model, images, threads=1) for name, model in made.items()}
    return {"macs": {name: tt.macs(model, images[:1]).total for name, model in made.items()},
            "seconds": {MANY: timing.interleaved(runs, TURNS)}, "megabytes": {}}


costs = {data: family.costs(here.trial(RECIPES[data], here.seed), methods, ROUNDS)
         for data, methods in METHODS.items()}
by_tokens = {(side // 4)**2: grown(side) for side in SIDES}

# %% [markdown]
# ## What came out

# %%
RESULTS = pathlib.Path(tt.__file__).parents[1] / "lessons" / "results"
# method: the file of its lesson's committed run, where in its results the dense arm and its own are. If there
# is a full run, it is read.
OWN = {"DynamicViT .7": ("07_dynamicvit_full", "rows/ViT, further", "rows/DynamicViT .7"),
       "LookupViT 3x3": ("09_lookupvit_full", "rows/ViT", "rows/LookupViT 3x3"),
       "DynamicConvNeXt .7": ("14_slow_and_fast_path", "rows/ConvNeXt, further", "rows/DynamicConvNeXt .7"),
       "T2T-ViT": ("related_t2t", "rows/patches/10000", "rows/T2T, Performer/10000"),
       "Shunted": ("related_shunted", "rows/(1, 1)", "rows/(4, 2)"),
       "LeMeViT": ("related_lemevit", "rows/read at the end", "rows/8 meta tokens"),
       "STViT 3x3": ("related_stvit", "rows/ViT", "rows/STViT, 9"),
       "STViT-R": ("related_stvit", "rows/dense", "rows/STViT-R"),
       "SegViT": ("related_segvit", "rows/linear", "rows/atm, 3 stages"),
       "SegViT, shrunk++": ("related_segvit", "rows/atm, 3 stages", "rows/edges"),
       "DoViT": ("related_dovit", "by_seed/*/rows/dense", "by_seed/*/rows/DoViT"),
       "ViT-FOD": ("related_vitfod", "rows/ViT", "rows/all three"),
       "VLTP 0.25": ("related_vltp", "by_seed/* sentence/1.0", "by_seed/* sentence/0.25")}


def results_of(*stems):
    """The results of the first of these runs that is committed, or None."""
    paths = (path for stem in stems if (path := RESULTS / f"{stem}.json").exists())
    return next((json.loads(path.read_text(encoding="utf-8"))["results"] for path in paths), None)


compared, points, own = {}, {}, {}  # by (data, method)
for data, methods in METHODS.items():
    metric = family.FACES[data][1]
    for name, (stem, *paths) in OWN.items():
        if name in methods and (results := results_of(f"{stem}_full", stem)) is not None:
            dense, reached = (family.reached(results, path, metric) for path in paths)
            own |= {(data, name): reached - dense} if reached == reached else {}  # NaN: of another metric
    compared |= {(data, name): row for name, row in family.beside_base(costs[data], methods).items()}
    stem = f"family_full{'' if data == 'scenes' else f'_{data}'}"
    if (results := results_of(stem)) is not None:
        points |= {(data, name): gaps for name, gaps in family.above_base(results, methods).items()}
    else:
        print(f"no {stem}.json yet: python lessons/full/family.py --full --data {data} --out lessons/results")
if (results := results_of("related_evad_full", "related_evad")) is not None:
    # it notes bits of answers, and this difference
    own["actor_clips", "EVAD 0.6"] = -results["claims"][0]["measured"]
print(f"{'beside its dense model:':<23}{'MACs':>6}{'memory':>8}{'faster, 1':>11}{MANY:>6}{'points':>13}"
      f"{'own lesson':>12}   it thins")
for (data, name), row in compared.items():
    gaps = spread_text(points[data, name], "+.1f") if (data, name) in points else ""
    gap = f"{own[data, name]:+.1f}" if (data, name) in own else ""
    print(f"{name:<23}{row['macs']:>6.2f}{row.get('memory', 1):>8.2f}{row[ONE]:>11.2f}{row[MANY]:>6.2f}"
          f"{gaps:>13}{gap:>12}   {METHODS[data][name].thins}")
larger = {tokens: family.beside_base(cost, GROWING) for tokens, cost in by_tokens.items()}
for tokens, rows in larger.items():
    print(f"{tokens:,} tokens, MACs (times as fast): "
          + ", ".join(f"{name} {row['macs']:.2f} ({row[MANY]:.2f})" for name, row in rows.items()))

kinds = {(data, name): METHODS[data][name].kind for data, name in compared}
saving = {at: row for at, row in compared.items() if kinds[at] == "rows" and row["macs"] <= 0.7}
keys = [row[MANY] for at, row in compared.items() if kinds[at] == "keys"]
most, many = max(larger), min(larger[max(larger)][name][MANY] for name in ("Shunted", "LeMeViT"))
of_rows, few = [row[MANY] for row in saving.values()], statistics.median(row[ONE] for row in saving.values())
here.claim("keys, 64 tokens: times as fast as the ViT, the fastest", max(keys), high=1)
here.claim(f"keys, {most:,} tokens: times as fast as the ViT, the slower of two", many, low=1)
here.claim("rows, many pictures: times as fast as the dense model, the slowest", min(of_rows), low=1)
here.claim("rows, one picture: times as fast as the dense model, the median", few, high=1)
if lost := [-statistics.mean(points[at]) for at in saving if at in points]:
    here.claim("rows, one recipe: points below the dense model, the most", max(lost), high=2)
here.says(f"At 64 tokens the {len(saving)} methods that save 30 % or more of their dense model's "
          f"multiply-adds by their rows are {min(of_rows):.2f} to {max(of_rows):.2f} times as fast with "
          f"{MANY} pictures, {few:.2f} times (the median) with one; the {len(keys)} that thin keys "
          f"{min(keys):.2f} to {max(keys):.2f} times. With {most:,} tokens Shunted and LeMeViT are at least "
          f"{many:.2f} times as fast (untrained, width {SIZES['dim']}).")
here.measured(costs=costs, by_tokens=by_tokens, recipe=SIZES, compared=[
    {"data": at[0], "method": at[1], **row, "points": points.get(at), "own lesson": own.get(at)}
    for at, row in compared.items()])
COLOURS = {"rows": "tab:blue", "keys": "tab:green", "input": "tab:red", "nothing": "tab:gray"}


def draw(figure):
    """What each method reaches over what it costs, beside its dense model."""
    axes = figure.subplots(2, 2, sharey=True).reshape(-1)
    shown = [at for at in compared if at in points or at in own]
    titles = {"macs": "multiply-adds", "memory": "memory of a training step",
              ONE: "times as fast with one picture", MANY: f"times as fast with {MANY} pictures"}
    for axis, (what, title) in zip(axes, titles.items()):
        for i, at in enumerate(shown, 1):
            style = dict(color=COLOURS[kinds[at]], marker=f"${i}$", linestyle="", markersize=7 * len(str(i)))
            cost = compared[at].get(what, 1)
            if at in own:
                axis.plot(cost, own[at], alpha=0.5, **style)
            if at in points:
                axis.plot(cost, statistics.mean(points[at]), **style)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"{title} (the dense model: 1)")
        axis.grid(alpha=0.3)
    figure.supylabel("points above the dense model")
    names = "\n".join(f"{i} {name}" for i, (_, name) in enumerate(shown, 1))
    figure.legend([], [], loc="outside right upper", title_fontsize=9, title="blue: rows, green: keys,\n"
                  f"red: input, grey: nothing\npale: its own lesson's gap\n\n{names}")


def draw_tokens(figure):
    """Multiply-adds and time over the number of tokens, of the ViT's."""
    axis = figure.subplots()
    for name, mark in zip(GROWING, "+osv^"):
        style = dict(color=COLOURS[GROWING[name].kind], marker=mark)
        axis.plot(list(larger), [row[name]["macs"] for row in larger.values()], linestyle="--", **style)
        axis.plot(list(larger), [1 / row[name][MANY] for row in larger.values()], label=name, **style)
    axis.set(xscale="log", xlabel="tokens", ylabel="of the ViT's", ylim=(0, None),
             title="Time (lines) and multiply-adds (dashed)")
    axis.minorticks_off()
    axis.set_xticks(list(larger), list(larger))
    axis.legend()


here.picture("costs", draw, 11, 7)
here.picture("tokens", draw_tokens, 6, 4)

# %% [markdown]
# The figures are those of the default run (two CPUs, `lessons/results/related_family.json`).
#
# - **Many pictures, 64 tokens**: rows. STViT and LookupViT halve the work, EVAD at .6 nearly so, and are 1.5,
#   1.4 and 1.4 times as fast, DynamicViT 1.1 times. One bound failed: ToMe saves 39 % and is slower (0.65),
#   since sorting pairs and moving tokens costs time, but no multiply-adds; VLTP's gain goes to its decoders
#   (0.68).
# - **One picture**: the ViT. A saving hardly shows where ops are small, and a method adds ops. Only EVAD is
#   as fast, for it adds few.
# - **More than some hundred tokens**: keys save, too. LeMeViT is faster than the ViT at 256, Shunted at
#   1,024. At 64 both are slower, and Swin is about as fast (in five runs 0.90, 1.14, 0.99, 0.92 and,
#   committed, 0.85 times: its bound is not decided). LookupViT stays in front: with nine tokens for any
#   picture it is 9.1 times as fast at 1,024 tokens. Whether nine are enough there was not asked.
# - **Memory in training**: STViT, EVAD at .6 and LookupViT need .5 to .6 of it. DynamicViT needs more than
#   the ViT: it masks tokens in training and has a teacher.
# - **A map of every position is wanted**: rows that come back (STViT-R, DoViT, LookupViT), or two paths.
#
# What each reaches by one recipe (pictures: 240 steps, three seeds; pixels, clips, sentences: 1,000 steps,
# one seed) says who learns early. LeMeViT, T2T-ViT and Shunted are 15 to 26 points above the ViT: all three
# have convolutions or overlapping windows. The last bound is broken by LookupViT (5.5 points, its seeds lie
# ten apart; pixels 6.6) and EVAD at .6 (5.1). Of LookupViT this was about the recipe: after longer
# trainings it is beside the ViT (lesson 9). EVAD lost more in its own lesson, where all tokens reach nearly
# twice as much. DoViT is sure of too little after so few steps, and saves nothing. The gaps of the own
# lessons are of short and full runs, with one to five seeds; LeMeViT's is above a control at equal steps,
# Shunted's above itself without merging.
#
# ## What this does not show
# Other machines (on a GPU one picture is launches), larger widths (there rows are a larger part of the
# work), trained speeds of DoViT, and recipes made for each method.

# %%
here.end()
