# %% [markdown]
# # Lesson 17: Many processes
# After this lesson you can train one model on several processes so that it comes out as on one. You know
# what they have to add up, why sums in another order differ in their last bits, and what must not depend
# on how many processes there are. And you can predict from two measured numbers up to how many of them it
# pays.
#
# `mpiexec -n 4 python -m tinytoken compare` starts a program four times. Each of the four processes has a
# number, its **rank**. All do the same, but each takes other pictures of a batch; after the backward pass
# they add up their gradients, and each updates its own copy of the weights. This is **data parallel**
# training. MPI carries the messages. `tinytoken/group.py` is our side of it, and `train/step.py` has the
# one place where it matters.
#
# Where there are many models to train, as in a full lesson, one rank can train a whole model by itself, and
# there is nothing to add up. `Lesson.each` does so from three models a rank on.
#
# `mpiexec -hosts a,b -n 2` starts the ranks on two machines, which need the same code and the same Python at
# the same place. We tried it on two network namespaces of one machine, each with a host name and an address
# of its own (`tests/train/test_hosts.py`), and not on two machines.

# %%
import json
import math
import statistics
import subprocess
import sys
import textwrap

import numpy as np

import tinytoken as tt
from tinytoken import backend, group
from tinytoken.data import Batches
from tinytoken.experiments import lesson
from tinytoken.experiments.timing import seconds
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import AdamW, Classify, Distil, accuracy, fit, infer, loss_and_grads

here = lesson.begin("17_many_processes")
rng = np.random.default_rng(here.seed)
TINY = dict(image_size=16, patch_size=4, dim=24, depth=2, heads=3)

# %% [markdown]
# ## What is added up
# The loss of a batch is the mean over its B pictures. So is its gradient. Rank r has B_r of the pictures,
# and computes g_r, the gradient of the mean over *its* pictures. Then
#
# $$g = \sum_r \frac{B_r}{B} \, g_r$$
#
# The weights B_r / B are easily forgotten, since they do not matter as long as all ranks have equally many
# pictures. Here 16 pictures go to three ranks. The wrong way is to average the ranks' gradients.


# %%
def pictures_and_labels(count):
    return rng.standard_normal((count, 3, 16, 16)), rng.integers(0, 10, count)


def gradient(task, batch, rows=slice(None), draws=None):
    """The gradient of the loss of some rows of a batch, all parameters in one array. draws: for these rows."""
    params = task.model.parameters()
    loss_and_grads(task, params, tuple(array[rows] for array in batch), threads=1, draws=draws)
    return tt.nn.flatten(params).grad.copy()


tt.manual_seed(here.seed)
task, batch = Classify(ViT(**TINY).astype("float64").train()), pictures_and_labels(16)
whole = gradient(task, batch)
cuts = [slice(0, 6), slice(6, 12), slice(12, 16)]
parts = [gradient(task, batch, cut) for cut in cuts]
shares = [(cut.stop - cut.start) / 16 for cut in cuts]
off = lambda g: float(np.abs(g - whole).max() / np.abs(whole).max())
weighted, averaged = sum(s * g for s, g in zip(shares, parts)), sum(parts) / 3
print(f"gradient from three ranks, off by: {off(weighted):.0e}; averaged without weights: "
      f"{off(averaged):.0e}")
assert off(weighted) < 1e-14 and off(averaged) > 1e-3

# %% [markdown]
# ## Sums in another order
# Floating-point sums are rounded after every addition, so (a + b) + c is not always a + (b + c). Four
# ranks can add their gradients one after the other, in pairs, or around a ring, in which each rank begins
# with another part of the array. All are right, and all differ in their last bits. In float32 a difference
# of 1e-7 looks like nothing, but training makes it larger: after some hundred steps the weights of two
# runs differ visibly. So the same bits need the same order, and **the same number of ranks**.


# %%
def one_after_the_other(parts):
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def in_pairs(parts):
    while len(parts) > 1:
        parts = [sum(parts[i + 1:i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def around_a_ring(parts):
    """Ring all-reduce, by hand: the array is cut into as many chunks as there are ranks. In p - 1 turns each
    rank sends a chunk to the next one, which adds its own; then each has one chunk of the sum. In p - 1
    further turns the finished chunks go around."""
    p, held = len(parts), [np.array_split(part.copy(), len(parts)) for part in parts]
    for turn in range(p - 1):
        for rank in range(p):  # what rank sends in this turn: the chunk that it has just added to
            chunk = (rank - turn) % p
            held[(rank + 1) % p][chunk] = held[rank][chunk] + held[(rank + 1) % p][chunk]
    for turn in range(p - 1):
        for rank in range(p):
            chunk = (rank + 1 - turn) % p
            held[(rank + 1) % p][chunk] = held[rank][chunk]
    assert all(np.array_equal(np.concatenate(mine), np.concatenate(held[0])) for mine in held)
    return np.concatenate(held[0])


ORDERS = {"one after the other": one_after_the_other, "in pairs": in_pairs, "around a ring": around_a_ring}
by_order = {}
for dtype in ("float64", "float32"):
    four = [part.astype(dtype) for part in (rng.standard_normal((4, 10_000)))]
    sums = {name: order(four) for name, order in ORDERS.items()}
    first = sums["one after the other"]
    by_order[dtype] = {name: float(np.abs(total - first).max() / np.abs(first).max()) for name, total in
                       sums.items()}
    print(f"{dtype}: " + ", ".join(f"{name} off by {gap:.0e}"
                                   for name, gap in by_order[dtype].items() if gap))
    assert max(by_order[dtype].values()) < 10 * np.finfo(dtype).eps

# %% [markdown]
# ## What must not depend on the rank
# A batch is drawn, cropped and mirrored at random; DynamicViT draws Gumbel noise, drop path draws which
# branches to skip. If each rank drew its own numbers, training on four ranks would be another training
# than on one. So in tinytoken a draw is a function of the seed, the step, and the number of the picture in
# its batch. Each rank draws for the *whole* batch, and takes its rows of it. This costs little, and the
# run does not depend on how many ranks there are. `Group.rows` says which rows.

# %%
tt.manual_seed(here.seed)
pruned = DynamicViT(**TINY, prune_before=(1,), keep_ratios=(0.5,)).astype("float64")
task = Distil(pruned.train(), ViT(**TINY).astype("float64"))
draws = task.noise(16, 3, here.seed)


def three_ranks(draws_of):
    """Three ranks' gradients, added up. draws_of(rows, rank): what the rank draws for its rows."""
    return sum(share * gradient(task, batch, rows, draws_of(rows, rank))
               for rank, (rows, share) in enumerate(zip(cuts, shares)))


whole = gradient(task, batch, draws=draws)
rows_of_all = three_ranks(lambda rows, rank: {name: d[rows] for name, d in draws.items()})
by_rank = three_ranks(lambda rows, rank: task.noise(rows.stop - rows.start, 3, here.seed + rank))
print(f"DynamicViT's gradient from three ranks, rows of what is drawn for all: off by "
      f"{off(rows_of_all):.0e}; drawn by each rank for itself: {off(by_rank):.0e}")
assert off(rows_of_all) < 1e-12 and off(by_rank) > 1e-3

# %% [markdown]
# ## Real processes
# Now the same with MPI: 20 steps of AdamW, in float64, on 1, 2 and 4 processes. The program is a few
# lines; that it runs on several ranks is nowhere in it. (Keys' biases are left out: they add the same to
# all scores of a query, their gradient is 0 but for rounding, and AdamW divides that by its own size.)

# %%
PROGRAM = textwrap.dedent("""
    import sys
    import numpy as np
    import tinytoken as tt
    from tinytoken.models import DynamicViT, LookupViT, ViT
    from tinytoken.train import Classify, Distil, fit

    name, dtype, steps, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    tt.manual_seed(0)
    sizes, rng = dict(image_size=16, patch_size=4, dim=24, depth=2, heads=3), np.random.default_rng(0)
    model = {"ViT": lambda: ViT(**sizes), "LookupViT": lambda: LookupViT(**sizes, compressed=(2, 2)),
             "DynamicViT": lambda: DynamicViT(**sizes, prune_before=(1,), keep_ratios=(0.5,))}[name]()
    model = model.astype(dtype)
    task = Distil(model, ViT(**sizes).astype(dtype)) if name == "DynamicViT" else Classify(model)
    images = rng.integers(0, 256, (64, 3, 16, 16)).astype("uint8")
    batches = tt.data.Batches(images, rng.integers(0, 10, 64), 16, seed=0)
    fit(model, task, batches, steps=steps, bar=False, micro=4, threads=1)
    if tt.group.current().rank == 0:
        np.savez(path, **{name: p.data for name, p in model.named_parameters()})
""")
MPIEXEC = group.launcher()
try:
    import mpi4py  # noqa: F401
    LACKING = "" if MPIEXEC else "no mpiexec is found"
except ImportError:
    LACKING = "mpi4py is not installed"
if LACKING:
    print(f"not run: real processes ({LACKING}; `pip install mpi4py mpich`)")


def started(ranks, program, *words):
    """Run a program on so many ranks -> what it printed."""
    launcher = [MPIEXEC, "-n", str(ranks)] if ranks > 1 else []
    done = subprocess.run([*launcher, sys.executable, "-c", program, *map(str, words)], capture_output=True,
                          encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights_after(ranks, name, dtype, steps, turn=0):
    path = here.out / f"weights-{name}-{dtype}-{ranks}-{turn}.npz"
    started(ranks, PROGRAM, name, dtype, steps, path)
    with np.load(path) as file:
        found = {key: file[key] for key in file}
    path.unlink()
    for key in found:
        if key.endswith("qkv.bias"):
            q, _, v = np.split(found[key], 3)
            found[key] = np.concatenate([q, v])
    return {key: array for key, array in found.items() if not key.endswith("gather_k.bias")}


def apart(a, b):
    return max(float(np.abs(a[key] - b[key]).max() / max(1.0, np.abs(a[key]).max())) for key in a)


agreement, same_bits = {}, True
if not LACKING:
    here.out.mkdir(parents=True, exist_ok=True)
    for name in here.pick(("ViT",), *[("ViT", "DynamicViT", "LookupViT")] * 2):
        for dtype in here.pick(("float64",), *[("float64", "float32")] * 2):
            alone = weights_after(1, name, dtype, here.pick(3, 20, 20))
            for ranks in here.pick((2,), (2, 4), (2, 4)):
                several = weights_after(ranks, name, dtype, here.pick(3, 20, 20))
                agreement[f"{name}, {dtype}, {ranks} ranks"] = apart(alone, several)
        again = weights_after(2, name, "float64", here.pick(3, 20, 20), turn=1)
        once = weights_after(2, name, "float64", here.pick(3, 20, 20), turn=2)
        same_bits &= all(np.array_equal(again[key], once[key]) for key in again)
    for what, gap in agreement.items():
        print(f"{what}: weights are {gap:.0e} from those of one process")
    print(f"two ranks twice: the same bits: {same_bits}")

# %% [markdown]
# ## What a message costs
# A message of n bytes takes about alpha + beta n seconds: alpha until anything arrives, and beta for each
# byte. For p ranks an all-reduce around a ring has 2 (p - 1) turns, in each of which a rank sends n / p
# bytes:
#
# $$T_{\mathrm{sum}}(p) = 2 (p - 1) \left( \alpha + \frac{\beta n}{p} \right)$$
#
# As p grows, the second part goes to 2 beta n: twice the time for the whole gradient, however many ranks
# there are. The first part grows without end. We measure sums on two ranks and fit alpha and beta.

# %%
SUMS = textwrap.dedent("""
    import json, sys, time
    import numpy as np
    from tinytoken.group import current
    group, found = current(), {}
    for size in json.loads(sys.argv[1]):
        array, times = np.ones(size, "float32"), []
        for turn in range(int(sys.argv[2])):
            group.exchange("a turn")
            began = time.perf_counter()
            group.all_reduce(array)
            times.append(time.perf_counter() - began)
        found[size] = float(np.median(times))
    if group.rank == 0:
        print(json.dumps(found))
""")
sum_seconds, alpha, beta = {}, 0.0, 0.0
if not LACKING:
    sizes = [2 ** k for k in here.pick((8, 12), range(8, 23, 2), range(8, 23))]
    sum_seconds = {int(size): t for size, t in json.loads(started(2, SUMS, json.dumps(sizes),
                                                                  here.pick(3, 50, 200))).items()}
    # 2 turns of alpha + beta n / 2 each; small sums say alpha, large ones beta
    alpha = min(sum_seconds.values()) / 2
    largest = max(sum_seconds)
    beta = max(sum_seconds[largest] - 2 * alpha, 0.0) / (4 * largest)
    print(f"alpha {1e6 * alpha:.0f} microseconds, beta {1e9 * beta:.2f} ns a byte "
          f"({1e-9 / max(beta, 1e-12):.1f} GB/s)")

# %% [markdown]
# ## Up to how many ranks it pays
# A step has a part that is shared out, the gradients of the pictures, and a part that every rank does for
# itself: drawing the batch, the update, what Python does in between. This is Amdahl's law, with the sum as
# a third part:
#
# $$T(p) = \frac{t_{\mathrm{pictures}} \, B}{p} + t_{\mathrm{alone}} + T_{\mathrm{sum}}(p)$$
#
# The two times are measured: a step of B pictures and one of B / 4 give a line. The **simulated cluster**
# has as many ranks as we like, each on a core of its own, with the message times from above.


# %%
def step_seconds(make, pictures, rounds):
    """Of a training step on one thread, a median."""
    tt.manual_seed(here.seed)
    task = make()
    optimizer, taken = AdamW(task.model.parameters(), clip=1.0), []
    images = rng.integers(0, 256, (pictures, 3, 32, 32)).astype("uint8")
    batches = Batches(images, rng.integers(0, 10, pictures), pictures, seed=0)

    def step():
        batch = batches(0)
        loss_and_grads(task, optimizer.params, batch, 16, 1, task.noise(pictures, 0, 0))
        optimizer.step()
    for _ in range(rounds + 1):
        taken.append(seconds(step))
    return statistics.median(taken[1:]), int(optimizer.flat.grad.nbytes)


SIZES = here.pick(dict(patch_size=8, dim=24, depth=2), {}, {})
STAGES = here.pick(dict(prune_before=(1,), keep_ratios=(0.5,)),
                   *[dict(prune_before=(1, 3, 5), keep_ratios=(0.7, 0.49, 0.343))] * 2)
MODELS = {"ViT": lambda: Classify(ViT(**SIZES).train()),
          "DynamicViT": lambda: Distil(DynamicViT(**SIZES, **STAGES).train(), ViT(**SIZES)),
          "LookupViT": lambda: Classify(LookupViT(**SIZES, compressed=(2, 2) if SIZES else (3, 3)).train())}
BATCH, RANKS = here.pick(8, 64, 64), (1, 2, 4, 8, 16, 32, 64)
parts_of = {}
for name, make in MODELS.items():
    (full, size), (quarter, _) = (step_seconds(make, n, here.pick(1, 5, 15)) for n in (BATCH, BATCH // 4))
    each = (full - quarter) / (BATCH - BATCH // 4)
    parts_of[name] = {"picture": each, "alone": max(full - BATCH * each, 0.0), "bytes": size}


def time_of_sum(p, size):
    return 2 * (p - 1) * (alpha + beta * size / p)


def speedup(part, p, pictures=BATCH):
    """Of p ranks over one: pictures of a batch that all ranks share."""
    one = part["picture"] * pictures + part["alone"]
    return one / (part["picture"] * math.ceil(pictures / p) + part["alone"] + time_of_sum(p, part["bytes"]))


predicted = {name: {p: speedup(part, p) for p in RANKS} for name, part in parts_of.items()}
weak = {name: {p: speedup(part, p, p * BATCH) for p in RANKS} for name, part in parts_of.items()}
print(f"{'':<12}{'ms a picture':>14}{'ms alone':>10}{'MB of gradient':>16}   times as fast with so many "
      f"ranks, a batch of {BATCH}\n{'':<52}" + "".join(f"{p:>7}" for p in RANKS))
for name, part in parts_of.items():
    print(f"{name:<12}{1e3 * part['picture']:>14.2f}{1e3 * part['alone']:>10.2f}"
          f"{part['bytes'] / 1e6:>16.2f}" + "".join(f"{predicted[name][p]:>7.2f}" for p in RANKS))

# %% [markdown]
# A prediction is worth what it predicts. With two ranks on two cores it can be checked: the same step,
# timed on two ranks of one thread each.

# %%
STEPS = textwrap.dedent("""
    import json, sys, time
    import numpy as np
    import tinytoken as tt
    from tinytoken.group import current
    from tinytoken.models import DynamicViT, LookupViT, ViT
    from tinytoken.train import AdamW, Classify, Distil
    from tinytoken.train.step import Work, stepper
    name, pictures, rounds, sizes, stages = json.loads(sys.argv[1])
    tt.manual_seed(0)
    stages = {key: tuple(value) for key, value in stages.items()}
    task = {"ViT": lambda: Classify(ViT(**sizes)),
            "DynamicViT": lambda: Distil(DynamicViT(**sizes, **stages), ViT(**sizes)),
            "LookupViT": lambda: Classify(LookupViT(**sizes, compressed=(2, 2) if sizes else (3, 3)))}[name]()
    task.model.train()
    rng = np.random.default_rng(0)
    batches = tt.data.Batches(rng.integers(0, 256, (pictures, 3, 32, 32)).astype("uint8"),
                              rng.integers(0, 10, pictures), pictures, seed=0)
    optimizer = AdamW(task.model.parameters(), clip=1.0)
    take, times = stepper(Work(task, batches, optimizer, [1e-3] * (rounds + 3), micro=16, threads=1)), []
    for step in range(rounds + 3):
        current().exchange("a step begins")
        began = time.perf_counter()
        take(step)
        times.append(time.perf_counter() - began)
    if current().rank == 0:
        print(json.dumps(float(np.median(times[3:]))))
""")
found_speedup = {}
if not LACKING and backend.cpu_count() > 1:
    for name in MODELS:
        words = json.dumps([name, BATCH, here.pick(2, 15, 40), SIZES, STAGES])
        one, two = (json.loads(started(ranks, STEPS, words)) for ranks in (1, 2))
        found_speedup[name] = one / two
        print(f"{name}: two ranks are {found_speedup[name]:.2f} times as fast as one, predicted "
              f"{predicted[name][2]:.2f}")
else:
    print(f"not run: two ranks on the clock ({LACKING or 'one CPU'})")

# %% [markdown]
# ## A larger batch, a larger rate
# The other way to use more ranks is to give each as many pictures as before. Then the batch grows, and
# there are fewer steps for the same pictures. A step of a batch that is k times as large has about the
# same gradient as k small steps together had, if the weights moved little between them. So its learning
# rate should be k times as large: **linear scaling** (Goyal et al. 2017). It is a rule for SGD. AdamW
# divides the gradient by its own size, so for it the square root of k is often better. Try: as many
# pictures for each arm, in steps of 64 or of 256.

# %%
train, test = here.pictures(here.pick(64, 8000, 16000), here.pick(64, 2000, 10000))
SMALL = here.pick(dict(patch_size=8, dim=16, depth=1, heads=2), *[dict(dim=48, depth=4, heads=3)] * 2)
FEW = here.pick(4, 400, 1500)
ARMS = {"64 pictures, rate x 1": (64, 1)}
ARMS |= {f"256 pictures, rate x {rate}": (256, rate) for rate in (1, 2, 4)}
reached = {}
for name, (size, rate) in ARMS.items():
    for seed in here.seeds:
        tt.manual_seed(seed)
        model = ViT(**SMALL)
        batches = Batches(train.images, train.labels, min(size, len(train.images)), seed=seed)
        fit(model, Classify(model), batches, steps=FEW // (size // 64), lr=1e-3 * rate, seed=seed,
            bar=here.size != "smoke", phase=name)
        prepare = lambda images: tt.data.normalise(images, batches.mean, batches.std)
        reached.setdefault(name, []).append(accuracy(infer(model, test.images, prepare), test.labels))
for name, shares_right in reached.items():
    print(f"{name:<28}{100 * statistics.mean(shares_right):>7.1f} % right of {len(test.labels):,}")

# %% [markdown]
# ## What was measured
# The bounds were set before the first run. A smoke run decides nothing.

# %%
if agreement:
    for dtype, most in (("float64", 1e-12), ("float32", 1e-5)):
        gaps = [gap for what, gap in agreement.items() if dtype in what]
        if gaps:
            here.claim(f"{dtype}: weights after 20 steps, times 1 / {most:g}", max(gaps) / most, high=1)
for name, ratio in found_speedup.items():
    here.claim(f"{name}: two ranks, measured over predicted speed-up", ratio / predicted[name][2], low=0.8,
               high=1.2)
best = max(RANKS, key=lambda p: predicted["ViT"][p])
here.says(("Weights of 1, 2 and 4 ranks are at most "
           f"{max(gap for what, gap in agreement.items() if 'float64' in what):.0e} apart in float64. "
           if agreement else "No MPI: real processes were not run. ")
          + f"For a batch of {BATCH}, a ViT is predicted to be {predicted['ViT'][4]:.1f} times as fast on 4 "
          f"ranks and {predicted['ViT'][best]:.1f} times on {best}"
          + (f"; on 2 it was {found_speedup['ViT']:.2f} times as fast, predicted {predicted['ViT'][2]:.2f}."
             if found_speedup else "."))


def draw_cluster(figure):
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (name, line) in zip(axes, predicted.items()):
        axis.plot(RANKS, RANKS, ":", color="#999999", label="p times")
        axis.plot(RANKS, line.values(), "o-", color="#0072b2", label=f"a batch of {BATCH}, shared")
        axis.plot(RANKS, weak[name].values(), "s--", color="#009e73", label=f"{BATCH} pictures for each rank")
        if name in found_speedup:
            axis.plot([2], [found_speedup[name]], "x", color="#d55e00", markersize=9, label="measured")
        axis.set(xscale="log", yscale="log", title=name, xlabel="ranks")
        axis.grid(alpha=0.3)
        axis.set_xticks(RANKS, map(str, RANKS))
        axis.minorticks_off()
    axes[0].set_ylabel("times as many pictures a second")
    axes[0].legend(fontsize=7)


here.picture("cluster", draw_cluster, 11, 3.6)
here.measured(agreement=agreement, same_bits=same_bits, by_order=by_order, sum_seconds=sum_seconds,
              alpha=alpha, beta=beta, parts=parts_of, predicted=predicted, found=found_speedup,
              reached=reached, lacking=LACKING, cpus=backend.cpu_count())

# %% [markdown]
# This is what to look for. The figures are those of the committed run
# (`lessons/results/17_many_processes.json`; two cores of an AMD EPYC, one seed for the batches).
#
# **One, two and four ranks train the same model.** After 20 steps in float64 the weights differ by 2e-16,
# in float32 by 1e-7. Two ranks twice give the same bits. Forgotten weights of the sum, or draws of each
# rank for itself, are no matter of last bits: the gradient is off by 40 and by 100 percent of its largest
# value.
#
# **The prediction holds for two ranks:** the ViT is 1.93 times as fast (predicted 1.97), DynamicViT 1.86
# (1.94), LookupViT 1.81 (1.89). LookupViT gains least. Its pictures are cheap, and it has 1.58 times the
# weights of the ViT, so what is added up is more and what is shared out is less. On 64 ranks of the
# simulated cluster it would be 13 times as fast, the ViT 32 times. With 64 pictures for *each* rank the
# lines stay near the diagonal. (The messages of the simulation are those of two processes in one memory,
# 1.6 GB/s. Between machines alpha is larger, so real clusters bend earlier.)
#
# **Ranks or threads?** On one machine the threads of one process share a batch as well. Two ranks of
# one thread are 1.00 times as fast [1.00, 1.01] as two threads for the ViT, 0.98 for DynamicViT and
# 1.13 [1.11, 1.17] for LookupViT, whose many small ops keep threads waiting for one another. We had
# hoped for 1.25 there. But two threads were 1.64 times as fast as one (the median of the rounds), so
# two ranks would be 1.22 times as fast as the threads if adding up took no time; it takes 1.4, 0.9
# and 3.1 % of a step (`lessons/results/ranks.json`, by `tests/benchmarks/ranks.py`;
# `ranks_plain.json` is of ops that are not compiled). So ranks are for where one machine is not
# enough. A whole model for each rank pays where there are many: with 6 models for two ranks it is
# 1.08 times as fast [1.03, 1.11] as all ranks for each, with 4 models 0.94 (`ranks_arms.json`).
#
# **A larger batch is no free gift.** For as many pictures, steps of 256 reach 43.6 % at the old learning
# rate, 53.1 % at twice and 65.6 % at four times the rate, and steps of 64 reach 72.4 %. So scaling the
# rate recovers most of the loss, and the linear rule does better than the root here, but 100 steps are too
# few for any rate.
#
# ## Exercises
# 1. Batch norm computes its statistics from the pictures that one slice has. What changes when 64 pictures
#    are on 4 ranks? What would the ranks have to exchange so that nothing does?
# 2. Give the ring all-reduce five ranks, one of which is twice as slow as the others. How long does the
#    sum take? And the step?
# 3. A gradient could be added up while the backward pass still computes the rest of it, layer by layer.
#    What could that hide at most, according to the table? From how many ranks on would it be worth the
#    code?
# 4. Send the gradient in float16: how many bytes are saved, and what happens to the agreement of the
#    weights?
# 5. Start four ranks on two cores. What does the prediction say, and what do you measure?
#
# ## The paper
# Goyal et al. 2017, "Accurate, large minibatch SGD: training ImageNet in 1 hour" (arXiv 1706.02677).
# Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (JPDC 69,
# 2).
#
# | paper | our line |
# |---|---|
# | Goyal, eq. 3 and 4: k small steps, or one large one with k times the rate | `lr=1e-3 * rate` |
# | Goyal, section 3: the loss of a worker is divided by the size of the whole batch | `flat.grad *= share` (`train/parallel.py`) |
# | Patarasuk & Yuan: a ring, bytes 2 (p - 1) n / p | `return 2 * (p - 1) * (alpha + beta * size / p)` |

# %%
here.end()
