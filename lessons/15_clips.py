# %% [markdown]
# # Lesson 15: Clips
# After this lesson you can turn a clip into tokens, say why a ViT becomes expensive when time is added, and
# give a LookupViT compressed tokens that lie in time and space. You can also show that a model of clips
# reads time, and not only pictures.
#
# LookupViT (Koner et al. 2024) was tried on clips, too. A clip is where many tokens hurt most: the number
# of tokens grows with the number of frames, and attention grows with its square. In this lesson we build
# both models by hand, count what they cost, and train them on short clips in which an object does
# something.
#
# **What is the paper's and what is ours.** We had only the abstract of the paper. It says that there were
# results on clips (Kinetics400 and Something-Something V2), and not how the model was made: which video ViT
# it was, how the compressed tokens were laid out, how many frames there were. Our choice is the simplest:
# all tubelets are lookup tokens, and the compressed tokens are the same features, resized in time and
# space. Our clips are small and made by a program. So the results here can neither confirm nor refute those
# of the paper.

# %%
import dataclasses
import functools
import math

import numpy as np

import tinytoken as tt
from tinytoken import backend, nn, ops, plot
from tinytoken.data.clips import OPPOSITES
from tinytoken.errors import expect
from tinytoken.experiments import (Arm, Recipe, arms_text, difference, interval_text, lesson, packed,
                                   told_apart, unpacked)
from tinytoken.models import VideoLookupViT, VideoViT
from tinytoken.train import infer

here = lesson.begin("15_clips")
expect(here.data == "scenes", "lesson 15", f"--data {here.data}: the clips are made, expected no --data")
expect(here.size != "full", "lesson 15", "its full run is a script of its own: lessons/full/clips.py --full")
rng = np.random.default_rng(here.seed)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"

# %% [markdown]
# ## A clip as tokens
# A clip is an array (B, T, C, H, W): B clips of T frames. We cut it into **tubelets** (Arnab et al. 2021):
# boxes of t frames and p x p pixels. Each tubelet is written as one row of C t p p numbers, and one linear
# layer makes a token of it. There are
#
#     N = (T / t) (H / p) (W / p)
#
# tokens: those of the first t frames first, row by row. With t = 1 these are the patches of each frame. The
# weight has the shape (D, C, t, p, p): it is a convolution in time and space whose stride is its size.

# %%
def tubelets_by_hand(clips, t, p):
    """(B, T, C, H, W) -> (B, N, C t p p)."""
    B, T, C, H, W = clips.shape
    boxes = clips.reshape(B, T // t, t, C, H // p, p, W // p, p)  # cut T, H and W in two axes each
    return boxes.transpose(0, 1, 4, 6, 3, 2, 5, 7).reshape(B, -1, C * t * p * p)


embed = nn.TubeletEmbed(frames=6, image_size=(8, 12), tubelet=(2, 4, 4), dim=5).astype("float64")
for p in embed.parameters():
    p.data[...] = rng.standard_normal(p.shape)
clips = rng.standard_normal((2, 6, 3, 8, 12))
tokens = tubelets_by_hand(clips, 2, 4) @ embed.proj.weight.data.reshape(5, -1).T + embed.proj.bias.data
gap = np.abs(tokens - embed(clips).data).max()
print(f"tokens {tokens.shape} by hand and the package's: {gap:.0e} apart")
assert tokens.shape == (2, 3 * 2 * 3, 5) and gap < 1e-12
tt.gradcheck(lambda clips, *_: embed(clips), clips, *embed.parameters(), max_elements=here.pick(20, 60, 60),
             seed=here.seed)

# %% [markdown]
# **Who tells the order of time?** Inside a tubelet it is the weight: it has a number of its own for each
# frame, so it can take differences between neighbouring frames. Between tubelets only the positions tell
# it. Here the tubelets of a clip are put in another order in time. Without positions, the logits of a ViT
# that takes the mean of its tokens stay the same.

# %%
SMALL = dict(frames=6, image_size=(8, 12), tubelet=(2, 4, 4), dim=12, depth=2, heads=2, num_classes=5)


def shaken(model):
    """The model in float64, each weight moved by a random amount: zeros hide mistakes."""
    for p in model.astype("float64").parameters():
        p.data += 0.1 * rng.standard_normal(p.shape)
    return model


vit = shaken(VideoViT(**SMALL, pool="mean")).eval()
orders = {"tubelets moved": [4, 5, 0, 1, 2, 3], "frames exchanged in each tubelet": [1, 0, 3, 2, 5, 4]}
for positions in (True, False):
    vit.pos_embed.data *= positions
    moved = {name: np.abs(vit(clips[:, order]).logits.data - vit(clips).logits.data).max()
             for name, order in orders.items()}
    print(f"{'with' if positions else 'without'} positions, the logits change by "
          + ", ".join(f"{change:.0e} ({name})" for name, change in moved.items()))
    assert (moved["tubelets moved"] > 1e-6) == positions and moved["frames exchanged in each tubelet"] > 1e-6

# %% [markdown]
# ## Few tokens in time and space
# The compressed tokens of a LookupViT start as the patches, resized to a smaller grid (lesson 08). The
# tubelets lie on a grid (T / t, h, w), and they can be resized in the same way along three axes. With a
# matrix F for each axis, whose rows sum to 1,
#
#     R = kron(F_t, kron(F_h, F_w))        (M, N),  M = m_t m_h m_w
#
# and all else is as before: R makes the compressed tokens from the tubelets X, and positions are a table of
# their own that is resized to the grid that we ask for. M stands in no shape of a weight, so one set of
# weights serves every grid (m_t, m_h, m_w), as in lesson 10.

# %%
look = shaken(VideoLookupViT(**SMALL, compressed=(2, 1, 2), classifiers="both"))
X, w, grid = look.patch_embed(clips).data, look.state_dict(), look.patch_embed.grid


def resize_by_hand(grid, size):
    F_t, F_h, F_w = (ops.resize_matrix((a, 1), (b, 1)) for a, b in zip(grid, size))
    return np.kron(F_t, np.kron(F_h, F_w))


for size in ((1, 1, 1), (1, 2, 3), (3, 1, 1), (2, 1, 2), grid):
    by_hand = resize_by_hand(grid, size) @ X + resize_by_hand((2, 1, 2), size) @ w["pos_embed_compressed"]
    gap = np.abs(by_hand - look.embed(clips, size)[1].data).max()
    out = look.eval()(clips, compressed=size)
    print(f"{size}: compressed tokens {by_hand.shape}, {gap:.0e} apart; logits {out.logits.shape}")
    assert gap < 1e-12
assert np.array_equal(resize_by_hand(grid, grid), np.eye(18))

# %% [markdown]
# With m_t = 1, a compressed token starts as a mean over all frames, so it does not know when something was
# there. It can still read that: the gather reads lookup tokens, which have positions in time. The blocks
# are those of lesson 09, with no change.
#
# The gradients of both models, by finite differences along random directions and in some random elements:

# %%
labels = np.array([4, 1])
for model in (shaken(VideoViT(**SMALL)), look):
    names, parameters = zip(*model.train().named_parameters())
    report = tt.gradcheck(lambda *_: model.loss(model(clips), labels)[0], *parameters, names=names,
                          max_elements=here.pick(20, 60, 60), seed=here.seed)
    assert report.directions == 2
    print(f"{type(model).__name__}: {report.directions} random directions over {len(parameters)} parameters "
          "checked")

# %% [markdown]
# ## What time costs
# A block of a ViT costs 12 N D^2 + 2 N^2 D multiply-adds. For a picture of 64 patches and D = 64, the
# second term is a seventh of the whole. But N = (T / t) h w: twice the frames are twice the tokens, and
# four times the second term. A block of a LookupViT costs
#
# $$(3 N M + 2 M^2) D + (4 N + 15 M) D^2$$
#
# which is linear in N **if M stays**. If M grows with the number of frames (a small grid for each step of
# time), 3 N M is a square, too, but a smaller one. We count both ways, with tubelets of 2 x 4 x 4. Of the
# last block, what only lookup tokens would read is left out; without a way back (lesson 09), infusion is
# left out of all blocks. The counted numbers are those of the formulas, exactly.

# %%
D, DEPTH, CLASSES = 64, 4, 11
FRAMES = here.pick((2, 4, 8), (2, 4, 8, 16, 32), (2, 4, 8, 16, 32))


def closed(N, M=None, values=3 * 2 * 4 * 4, back=True):
    """Multiply-adds of a clip with N tubelets of so many values; M: of a LookupViT, with one classifier."""
    if M is None:
        blocks = DEPTH * (12 * (N + 1) * D**2 + 2 * (N + 1) ** 2 * D)  # the class token, too
    elif back:
        blocks = DEPTH * ((3 * N * M + 2 * M**2) * D + (4 * N + 15 * M) * D**2)
        blocks -= (2 * N + M) * D**2 + N * M * D  # the last block's (c) and (d)
    else:
        blocks = DEPTH * ((2 * N * M + 2 * M**2) * D + (3 * N + 14 * M) * D**2) - N * D**2
    return N * values * D + blocks + D * CLASSES


SCALED = {"VideoViT": lambda times: (VideoViT, {}),
          "LookupViT, 9 for each time": lambda times: (VideoLookupViT, dict(compressed=(times, 3, 3))),
          "LookupViT, 36 in all": lambda times: (VideoLookupViT, dict(compressed=(1, 6, 6)))}
grown = {name: [] for name in SCALED}
for frames in FRAMES:
    clip, N = np.zeros((1, frames, 3, 32, 32), "float32"), 32 * frames
    for name, of in SCALED.items():
        kind, config = of(frames // 2)
        model = kind(frames, dim=D, depth=DEPTH, heads=2, num_classes=CLASSES, **config)
        counted = tt.macs(model, clip).total
        assert counted == closed(N, math.prod(config["compressed"]) if config else None)
        grown[name].append(counted)
slopes = {name: math.log2(counts[-1] / counts[-2]) for name, counts in grown.items()}
print(f"{'frames':<30}" + "".join(f"{frames:>9}" for frames in FRAMES) + f"{'slope':>8}")
for name, counts in grown.items():
    print(f"{name:<30}" + "".join(f"{n / 1e6:>9.1f}" for n in counts) + f"{slopes[name]:>8.2f}")
squares = [DEPTH * 2 * (32 * frames + 1) ** 2 * D / n for frames, n in zip(FRAMES, grown["VideoViT"])]
print("share of N^2 in the ViT's: " + ", ".join(f"{share:.2f}" for share in squares))


def draw_growth(figure):
    axes, tubelets = figure.subplots(1, 2), [32 * frames for frames in FRAMES]
    for (name, counts), colour, mark in zip(grown.items(), (ORANGE, GREEN, BLUE), "os^"):
        axes[0].loglog(tubelets, np.array(counts) / 1e6, color=colour, marker=mark,
                       label=f"{name}: slope {slopes[name]:.2f}")
        axes[1].semilogx(tubelets, np.array(counts) / grown["VideoViT"], color=colour, marker=mark)
    axes[0].set(title="M multiply-adds of a clip", xlabel="tubelets (2 x 4 x 4)")
    axes[1].set(title="of the VideoViT's", xlabel="tubelets (2 x 4 x 4)", ylim=(0, 1.05))
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.set_xticks(tubelets, tubelets)
        axis.minorticks_off()
        axis.grid(alpha=0.3)


here.picture("growth", draw_growth)

# %% [markdown]
# These are multiply-adds, not seconds: lessons 09 and 12 show why the two differ.
#
# ## One frame does not tell
# In our clips (`tinytoken/data/clips.py`) there are a disc, which stays where it is, and another object
# that does one of eleven things: it goes left, right, up or down, grows, shrinks, spins, blinks, stays
# still, approaches the disc or flees from it. Such a data set can be too easy: if whoever goes right were
# mostly on the left at the start, a single frame would tell. So every quantity moves around a cycle (what
# leaves at the right comes back at the left), and starts anywhere on it. Then each single frame looks alike
# for all actions. Here we ask the exact boxes of the objects: is it "left" or "right"?

# %%
STEPS = here.pick(4, 600, None)
LR, PAD = 2e-3, 2
RECIPE = Recipe(data="clips", dim=64, depth=4, heads=2, patch=8, seed=here.seed,
                train_pictures=here.pick(32, 8000, None), test_pictures=here.pick(64, 2000, None),
                **here.pick(dict(batch=8), {}, None))
VIT, LOOKUP, ONE_WAY, KEY = "VideoViT", "VideoLookupViT 2x2x2", "no way back", "key frame"
NARROWER, GRID = "VideoViT, narrower", (2, 2, 2)  # narrower: of LookupViT's multiply-adds


def arm(model, **config):
    return Arm(model, config, steps=STEPS, lr=LR)


ARMS = {VIT: arm("videovit"), LOOKUP: arm("videolookupvit", compressed=GRID),
        NARROWER: arm("videovit", dim=42),
        ONE_WAY: arm("videolookupvit", compressed=GRID, reuse="none"), KEY: arm("vit")}
trial = here.trial(RECIPE, here.seed, ARMS, pad=PAD)
test = trial.test
right_ways = test.labels == test.names.index("right")
asked = right_ways | (test.labels == test.names.index("left"))
boxes = test.boxes[asked, :, 0]  # (clips, T, 4), of the actor
column, goes_right = (boxes[:, :, 0] + boxes[:, :, 2]) / 2, right_ways[asked]
by_place = [float(((column[:, frame] > 16) == goes_right).mean()) for frame in range(column.shape[1])]
by_change = float(((np.median(np.diff(column, axis=1), axis=1) > 0) == goes_right).mean())
print("right, by the place in one frame: " + ", ".join(f"{100 * share:.0f} %" for share in by_place)
      + f"; by the middle one of the changes from frame to frame: {100 * by_change:.0f} %")
assert by_change > 0.99

# %% [markdown]
# ## The arms of the experiment
# All arms are trained from scratch with the same clips in the same order, moved by up to 2 pixels (all
# frames of a clip alike), and the same number of steps. A clip has 8 frames of 32 x 32 pixels, and tubelets
# of 2 x 8 x 8: 64 tokens.
#
# - **VideoViT** and **VideoLookupViT** with 2 x 2 x 2 compressed tokens, with the defaults of the package
#   (one classifier, a new softmax for the way back).
# - **VideoViT, narrower**: of width 42, so that its multiply-adds are those of LookupViT, or a little more.
# - **No way back**: LookupViT without infusion.
# - **Key frame**: a ViT that sees one frame of each clip. It has to stay at chance, or the clips give the
#   action away.
# - **Shuffled time**: the test clips again, the frames of each in a random order. Played backward, left is
#   right, and so it is with the other pairs of opposites. All orders of the frames are equally likely, so
#   that no model can tell opposites apart in shuffled clips: whatever is above 50 % would be a leak.
#
# The bounds below were set before the run. Those on the other arms are the bounds of the full script,
# `lessons/full/clips.py`, which trains for 5,000 steps with 3 seeds. That opposites are told apart in 75 %
# of the clips is a low bound, for few steps. Chance is 1 / 11 for all actions and 1 / 2 for opposites, and
# the bounds around it are 2.5 standard deviations of as many coin tosses as there are clips. The number of
# steps was chosen by one run of the VideoViT with another seed (7).


# %%
def asks(logits, clips):
    """{pair of opposites: right or not, for each of its clips}."""
    return {" or ".join(pair): told_apart(logits, clips, *pair) for pair in OPPOSITES}


def shares(told):
    return {pair: float(right.mean()) for pair, right in told.items()} | {
        "all pairs": float(np.concatenate([*told.values()]).mean())}


def train(name):
    """Train an arm -> what is noted of it. "right": a bit for each test clip, 1 where its answer is right, in
    hexadecimal."""
    pictures = trial.train_set.key_frames(), test.key_frames()
    of = trial if name != KEY else here.trial(RECIPE, here.seed, ARMS, pad=PAD, pictures=pictures)
    model, report = of.train(name)
    logits = of.answers(model)
    right = logits.argmax(axis=1) == test.labels
    row = of.measure(model, report, logits)
    row |= {"right": packed(right), "opposites": shares(asks(logits, test))}
    row["by_action"] = {action: float(right[test.labels == k].mean()) for k, action in enumerate(test.names)}
    if name != KEY:
        mixed = test.shuffled(here.seed)
        logits = infer(model, mixed.images, trial.prepare, threads=trial.threads)
        row["shuffled"] = {"accuracy": float((logits.argmax(axis=1) == test.labels).mean()),
                           "opposites": shares(asks(logits, mixed))}
    return row


SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS, "lr": LR, "pad": PAD}
rows = here.each({name: functools.partial(train, name) for name in ARMS}, SETTINGS)
answers = {name: [unpacked(row.pop("right"), len(test))] for name, row in rows.items()}
above = {name: difference(answers[LOOKUP], answers[name]) for name in ARMS if name != LOOKUP}

# %% [markdown]
# ## What was measured
# One seed. A difference is paired: both arms answer the same test clips. Its 95 % interval is the normal
# one over these clips; it does not tell how another seed would have come out.

# %%
print(arms_text({name: [row] for name, row in rows.items()}, above, "LookupViT"))
for name, row in rows.items():
    texts = [f"{pair} {100 * share:.0f} %" for pair, share in row["opposites"].items()]
    if name != KEY:
        texts.append(f"shuffled: all pairs {100 * row['shuffled']['opposites']['all pairs']:.1f} %")
    print(f"{name}: {', '.join(texts)}")
N, M, VALUES = 64, math.prod(GRID), 3 * 2 * 8 * 8
for name, expected in ((VIT, closed(N, None, VALUES)), (LOOKUP, closed(N, M, VALUES)),
                       (ONE_WAY, closed(N, M, VALUES, back=False))):
    assert rows[name]["macs"] == expected
coins = lambda chance, count: 250 * math.sqrt(chance * (1 - chance) / count)  # 2.5 deviations, in %
pairs = sum(len(right) for right in asks(np.zeros((len(test), CLASSES)), test).values())
here.claim(f"{LOOKUP}: MACs, of the VideoViT's", rows[LOOKUP]["macs"] / rows[VIT]["macs"], high=0.5)
here.claim(f"{NARROWER}: MACs, of LookupViT's", rows[NARROWER]["macs"] / rows[LOOKUP]["macs"],
           low=1, high=1.1)
for name, low in ((VIT, -1), (NARROWER, 0), (ONE_WAY, 0)):
    here.claim(f"{LOOKUP}: points above {name}", above[name][0], low=low)
here.claim("key frame alone: accuracy, %", 100 * rows[KEY]["accuracy"],
           low=100 / 11 - coins(1 / 11, len(test)), high=100 / 11 + coins(1 / 11, len(test)))
for name in (VIT, LOOKUP):
    here.claim(f"{name}: opposites told apart, %", 100 * rows[name]["opposites"]["all pairs"], low=75)
    here.claim(f"{name}: the same of shuffled frames, %",
               100 * rows[name]["shuffled"]["opposites"]["all pairs"],
               low=50 - coins(0.5, pairs), high=50 + coins(0.5, pairs))
here.claim("LookupViT, 36 in all: slope of MACs over tubelets", slopes["LookupViT, 36 in all"], high=1.05)

# %% [markdown]
# ## What the compressed tokens read
# A is (M, N): for each compressed token, how much it reads from each tubelet. M and N are both grids in
# time and space. The four compressed tokens of the first half start as means over the first 4 frames, those
# of the second half as means over the last 4. Do they go on reading their own half? And do they read where
# the actor is? (Weights of the last block, mean over the heads.)

# %%
model = trial.train(LOOKUP)[0]
seen = here.pick(8, 200, None)
with tt.no_grad():
    traced = model.eval()(trial.prepare(test.images[:seen]), trace=True)
A = backend.to_numpy(traced.attention[-1].data).mean(axis=1)  # (clips, M, N)
T, side = 4, 4  # steps of time; tubelets across and down
in_time = A.reshape(seen, 2, M // 2, T, side * side).sum(axis=4).mean(axis=(0, 2))  # (half, T)
own_half = float((in_time[0, :2].sum() + in_time[1, 2:].sum()) / 2)
actor = (test.instances[:seen] == 1).reshape(seen, T, 2, side, 8, side, 8)  # tubelets of 2 x 8 x 8
actor = actor.mean(axis=(2, 4, 6)).reshape(seen, 1, N)
on_actor = float(((A * actor).sum(axis=2) / actor.mean(axis=2)).mean())
print(f"weight on the own half of time {own_half:.2f} (chance 0.50); on the actor {on_actor:.2f} times "
      "chance")


def draw_looks(figure):
    """A clip is one wide picture, frame beside frame, so that red is relative to its largest weight."""
    kinds = test.labels[:seen]
    chosen = [int(np.flatnonzero(kinds == kind)[0]) for kind in dict.fromkeys(kinds)][:3]
    axes = figure.subplots(3 * len(chosen), 1, subplot_kw={"xticks": [], "yticks": []})
    for number, (what, axis) in enumerate(zip(("", "first half", "second half") * len(chosen), axes)):
        b, half = chosen[number // 3], number % 3 - 1
        strip = np.concatenate([*test.images[b].transpose(0, 2, 3, 1)], axis=1)  # (32, 8 x 32, 3)
        if half >= 0:
            weights = A[b].reshape(2, M // 2, T, side, side).mean(axis=1)[half].repeat(2, axis=0)
            strip = plot.heat(strip, weights.transpose(1, 0, 2).reshape(-1), 8)
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(test.names[test.labels[b]] if half < 0 else what, fontsize=8)
        for edge in range(32, 256, 32):
            axis.axvline(edge - 0.5, color="white", linewidth=1)
    figure.suptitle("What the compressed tokens of each half of time read in the last block "
                    "(a tubelet: 2 frames)")


def draw_actions(figure):
    axis = figure.subplots()
    for place, (name, colour) in enumerate(zip(ARMS, (ORANGE, BLUE, "#E69F00", GREEN, "#999999"))):
        heights = [100 * share for share in rows[name]["by_action"].values()]
        axis.bar(np.arange(CLASSES) + 0.16 * (place - 2), heights, 0.15, color=colour,
                 label=f"{name}, {rows[name]['macs'] / 1e6:.1f} M")
    axis.axhline(100 / 11, color="black", linewidth=0.8)
    axis.set_xticks(range(CLASSES), test.names)
    axis.set(ylabel="right, %", title=f"By action, after {STEPS} steps (line: chance)")
    axis.legend(fontsize=7)


here.picture("looks", draw_looks, 9, 11)
here.picture("actions", draw_actions, 10, 4)
of_cost = rows[LOOKUP]["macs"] / rows[VIT]["macs"]
of_vit, of_look = (grown[name][-1] / grown[name][-2] for name in ("VideoViT", "LookupViT, 36 in all"))
here.says(f"A VideoLookupViT with {M} compressed tokens, at {of_cost:.2f} of the "
          f"VideoViT's multiply-adds, is {interval_text(*above[VIT])} points from it and "
          f"{interval_text(*above[NARROWER])} from a VideoViT of its cost; a key frame alone gets "
          f"{100 * rows[KEY]['accuracy']:.1f} % (chance 9.1 %). From {FRAMES[-2]} to {FRAMES[-1]} frames the "
          f"ViT's multiply-adds grow {of_vit:.1f} times, LookupViT's {of_look:.1f} times ({STEPS} steps, one "
          f"seed).")
here.measured(rows=rows, above=above, seeds=here.seeds, recipe=SETTINGS, grown=grown, slopes=slopes,
              frames=FRAMES, share_of_squares=squares, by_place=by_place, by_change=by_change,
              own_half=own_half, on_actor=on_actor)

# %% [markdown]
# This is what to look for. The figures are those of the default run (600 steps, seed 0, 2,000 test clips;
# `lessons/results/15_clips.json`).
#
# **Time is read.** The key frame alone gets 8.85 %, which is chance (9.1 %). The models of clips get 47 to
# 51 %, and tell left from right in 98 or 99 % of the clips. If the frames are shuffled, they tell opposites
# apart in 48.6 to 50.7 % of the clips, which is chance again. So what they know of the opposites is the
# order. Other things are seen without the order, too: whether something moves across or down, or not at
# all. So all eleven actions together are right in 22 to 24 % of the shuffled clips.
#
# **What costs, and how it grows.** From 2 to 32 frames, the share of the N^2 term in the ViT grows from
# 0.14 to 0.72. From 16 to 32 frames the ViT's multiply-adds grow 3.1 times, those of a LookupViT with 9
# compressed tokens for each step of time 2.7 times, and with 36 in all 1.8 times: less than twice, since
# the 36 tokens cost the same in long clips. With 2 frames these 36 save nothing (0.98 of the ViT), with 32
# frames they leave 0.13.
#
# **The arms.** LookupViT has 0.46 of the VideoViT's multiply-adds and is 0.8 points below it [-2.9, +1.3].
# It is 1.5 points above the narrower ViT of its own cost [-0.7, +3.7]. Both bounds hold, but both intervals
# contain 0. The third bound fails: **without a way back the model is 1.9 points better**, at 0.40 of the
# ViT's multiply-adds (its interval, -0.01 to 3.8, just contains 0). That is what lesson 09 found for the
# classes of pictures, too.
#
# **What few steps of one seed can show, and what not.** Directions are learned first (75 to 93 % right),
# then sizes. Approaching and fleeing are not learned after 600 steps (2 to 11 %), spinning and blinking
# hardly (2 to 36 %; the VideoViT 11 and 2 %). So the arms are compared on half of the actions, and early.
# Differences of two points may come out otherwise with another seed, and at the end of a longer training:
# that is for the full script. What does not depend on this are the counted costs, and that a key frame and
# shuffled frames leave only chance.
#
# **What the compressed tokens read.** They look at the actor 4.9 times as much as at an average place. On
# the own half of time lies a weight of 0.50, a mean over both halves: as much as if the tokens of both
# halves read alike, and in the picture their rows are alike. They started as means over different frames,
# and in the last block they read the same tubelets, as the nine tokens of lesson 09 do.
#
# ## Exercises
# 1. Clips of T frames give 32 T tubelets of 2 x 4 x 4. From the two formulas, at which T does a block of
#    the ViT cost three times a block of a LookupViT with M = 36, and at which T ten times (D = 64)? Check
#    with `tt.macs`.
# 2. Train the VideoViT on shuffled clips: `here.trial(RECIPE, here.seed, ARMS,
#    pictures=(trial.train_set.shuffled(1), test.shuffled(2)))`. Which actions can still be learned, and
#    which cannot? Say so before you run it.
# 3. Take tubelets of 1 x 8 x 8: twice the tokens, and no token sees a change. Which part of the model has
#    to find the changes now? What does it cost, and what does the model reach?
# 4. Run the trained LookupViT at other grids: `trial.answers(model, compressed=(4, 1, 1))` and (1, 2, 2).
#    Which of them loses more, and with which actions? Then train with a random grid per step, as in lesson
#    10.
# 5. ViViT's factorised encoder first lets the tubelets of one step of time attend to each other, then the
#    steps of time. Write its multiply-adds as a formula of T / t, h w and D. Is it ever cheaper than a
#    LookupViT with 9 compressed tokens for each step of time?
#
# ## The paper
# Koner et al. 2024, "LookupViT: Compressing visual information to a limited number of tokens" (arXiv
# 2407.12753), with clips after Arnab et al. 2021, "ViViT: A video vision transformer" (arXiv 2103.15691,
# model 1). We had the abstract of the first, so all of this is our choice: one set of blocks for time and
# space, the grid of the compressed tokens, the position tables, how long clips are and how they are
# sampled. The blocks are lesson 09's, and so is what we do not know of them. The tests are in
# `tests/models/test_video.py`, unless another file is named.
#
# | step | our line | test |
# |---|---|---|
# | tubelets | `folded = clips.reshape(-1, self.span, channels, *sides).swapaxes(1, 2)` (`nn/tubelet.py`) | `test_tokens_are_the_tubelets_in_order_of_time_row_and_column` |
# | attention over space and time together | `class VideoViT(ClipModel, ViT)` | `test_attention_is_over_space_and_time_together` |
# | who tells the order | `tokens.reshape(len(clips), -1, tokens.shape[2])` and positions | `test_the_order_of_frames_is_seen_between_tubelets_and_inside_of_one` |
# | all tubelets are lookup tokens | `class VideoLookupViT(ClipModel, LookupViT)` | `test_the_blocks_are_lookupvits_equations` |
# | compressed tokens | `ops.resize(x, grid=self.patch_embed.grid, size=grid) + positions` | `test_the_resize_is_separable` |
# | any grid (t, m, n) at call time | `ops.resize(self.pos_embed_compressed, grid=self.compressed, size=grid)` | `test_one_set_of_weights_serves_every_grid` |
# | multiply-adds | `closed` above | `test_counted_multiply_adds` |
# | no frame tells the action | `Clips.key_frames` | `test_an_action_moves_one_quantity_around_its_cycle` (`tests/data/test_clips.py`) |
# | shuffled time | `Clips.shuffled` | `test_shuffled_clips_have_their_frames_in_an_order_of_their_own` (the same) |

# %%
here.end()
