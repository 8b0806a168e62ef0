"""The kernels of tinytoken/cuda, and the products of a ViT's step, beside the device's roofline: a part of
gpu.py.

Training steps are run once with every launch noted; of each kernel the launch that moves most bytes is then
repeated as it was, on copies of its arrays that together are larger than the L2 cache, in one CUDA graph. Its
roofline is the time of its bytes at the rate of a copy, or of its operations at the rate of a large product,
whichever is longer; both rates are measured in the same round.

Bytes: every array once, and twice those that are read and written over; of an array that is read in part,
that part. Operations: two for each multiply-add that the formula needs (not for those that a kernel does
again to save memory), one for each other addition, multiplication, comparison, rounding or function of an
element.
"""
import contextlib
import dataclasses
import functools
import gc
import math

import numpy as np

import tinytoken as tt
from cpu import RECIPE, arrays_of
from gpu_tinytoken import TinyToken
from timing import quartiles
from tinytoken import random
from tinytoken.backend import array_module, is_array, module_for, products_in, to_device
from tinytoken.cuda import gemm, launcher, weights
from tinytoken.models.lookupvit import PAPER
from tinytoken.train import AdamW, Classify

TARGET = 0.7  # of the roofline
NAMES = {"uint16": "bf16", "float32": "float32"}  # of what lies in arrays
LARGER, MOST = 3, 64  # times the L2 cache that the copies of a kernel's arrays have together; copies at most


# What a launch does. `g` is what a kernel was given, by the names of its declaration.

def attention(products):
    """So many products of the scores' size, and six operations for each score."""
    def count(g):
        tokens, d = int(g["tokens"]), int(g.get("d") or g["HEAD_DIM"])
        return g["blocks"] * int(g.get("queries", tokens)) * tokens * (2 * products * d + 6)
    return count


def lookup(products, more):
    """Of LookupViT's two directions: so many products, and so many operations for each score."""
    return lambda g: g["blocks"] * int(g["M"]) * int(g["N"]) * (2 * products * 2 * int(g["pairs"]) + more)


def infusion(g):
    """One product: (N, M) times (M, d), for each head."""
    return 2 * math.prod(int(g[name]) for name in ("heads", "M", "N", "d"))


OPERATIONS = {  # a function, or (operations of an element, the array whose elements count)
    "gelu_forward": (5, "x"), "gelu_backward": (11, "x"), "bf16_gelu_forward": (5, "x"),
              "bf16_gelu_backward": (12, "x"),
    "layer_norm_forward": (8, "x"), "layer_norm_backward": (13, "x"), "layer_norm_parameters": (5, "x"),
    "bf16_norm_forward": (8, "x"), "bf16_norm_backward": (14, "x"), "bf16_norm_parameters": (5, "x"),
    "bf16_qk_norm_forward": (8, "x"), "bf16_qk_norm_backward": (13, "x"), "bf16_qk_norm_parameters": (5, "x"),
    "lookup_gather_forward": lookup(2, 5), "lookup_gather_backward": lookup(4, 5),
    "lookup_infuse_forward": lookup(1, 0), "lookup_infuse_backward": lookup(2, 0),
    "bf16_round": (1, "x"), "bf16_round_and_sum": (3, "g"), "bf16_sum": (1, "values"),
              "bf16_add_branch": (2, "x"),
    "column_parts": (1, "values"), "sum_parts": lambda g: int(g["count"]) * int(g["size"]),
              "mean_of": (1, "values"), "squares": (2, "values"),
    "clip_factor": (1, "parts"), "set_rates": (0, "rates"), "adamw": (18, "g"),
    "cross_entropy_forward": (10, "logits"), "cross_entropy_backward": (10, "logits"),
    "log_softmax_forward": (6, "x"), "log_softmax_backward": (4, "g"), "row_mse_forward": (3, "x"),
              "row_mse_backward": (4, "x"), "kl_forward": (4, "student"), "kl_backward": (8, "student"),
    "gumbel_forward": (10, "soft"), "gumbel_backward": (5, "soft"),
    "attention_forward": attention(2), "attention_backward_queries": attention(3),
              "attention_backward_keys": attention(4),
    "bf16_attention_forward": attention(2), "bf16_attention_backward": attention(5),
    "infuse_weights": (6, "R"), "infuse_out": infusion, "infuse_values": infusion,
              "infuse_scores": lambda g: infusion(g) + 4 * g["R"].size,
    "mix_tokens": lambda g: 2 * g["out"].size * int(g["from"]),
              "top_k": lambda g: 4 * g["scores"].size * int(g["tokens"]), "take_rows": (0, "out"),
              "put_rows": lambda g: g["out"].size * int(g["k"]),
    "random_bits": (20, "out"), "gather_pictures": (2, "out"), "erase_boxes": (4, "out"),
              "mix_pictures": (4, "out"),
    "mix_labels": (3, "targets"), "patchify": (0, "to"), "count_step": (1, "clock")}
BYTES = {  # where it is not every array once
    "adamw": lambda g: once(g)
         + sum(g[name].nbytes for name in ("weight", "g", "m", "v", "mean") if g[name] is not None),
    # one array may be given as both
    "sum_parts": lambda g: 4 * int(g["size"]) * (int(g["count"]) + (2 if g["add"] else 1)),
    "take_rows": lambda g: 2 * g["out"].nbytes + g["index"].nbytes,
    "gather_pictures": lambda g: g["out"].nbytes + g["out"].size + g["chosen"].nbytes}  # pictures are uint8
BF16 = ("bf16_attention_forward", "bf16_attention_backward")  # the kernels that multiply on tensor cores


def once(g):
    """Of `parts` only a block's row of sums is written, one or two for each column of what is summed."""
    whole = sum(value.nbytes for name, value in g.items() if is_array(value) and name != "parts")
    return whole + (4 * g["blocks"] * int(g.get("width", 1)) * (2 if "mean" in g else 1) if "parts" in g
                    else 0)


@dataclasses.dataclass
class Launch:
    """A launch as the launcher's runner gets it."""
    kernel: launcher.Kernel
    blocks: int
    threads: int
    arguments: list
    shared: int

    @property
    def given(self):
        return {name: value for (name, *_),
                value in zip(self.kernel.parameters, self.arguments)} | dict(self.kernel.constants) | {
            "blocks": self.blocks}

    @property
    def bytes(self):
        return BYTES.get(self.kernel.name, once)(self.given)

    @property
    def operations(self):
        count = OPERATIONS[self.kernel.name]
        return int(count(self.given) if callable(count) else count[0] * self.given[count[1]].size)


class Notes:
    """What ran meanwhile: of each kernel the launch that moves most, and each product with how often it
    ran."""

    def __init__(self, launch, multiply):
        self.launch, self.multiply, self.launches, self.products = launch, multiply, {}, {}

    @contextlib.contextmanager
    def taken(self):
        """Context: launches and products run as they would, and are noted."""
        with launcher.running_on(self.on_launch), gemm.running_on(self.on_product):
            yield

    def on_launch(self, *what):
        self.keep(Launch(*what))
        self.launch(*what)

    def keep(self, one):
        name = one.kernel.name
        if name not in self.launches or one.bytes > self.launches[name].bytes:
            self.launches[name] = one

    def on_product(self, plan, *arrays):
        self.products.setdefault(plan, [arrays, 0])[1] += 1
        self.multiply(plan, *arrays)


def note_steps(works, launch, multiply):
    """(notes of everything, notes of the ViT's step in bf16)."""
    everything, vit = Notes(launch, multiply), Notes(launch, multiply)
    for one in works:
        arrays, _ = arrays_of(one)
        for precision in ("bf16", "fp32"):
            step = TinyToken(precision, captured=False).train(one, arrays, RECIPE)
            notes = vit if one.kind == "ViT" and precision == "bf16" else everything
            with notes.taken():
                step()
            del step
            gc.collect()
    with everything.taken():
        what_steps_leave_out(next(one for one in works if one.kind == "LookupViT"))
    for one in vit.launches.values():
        everything.keep(one)
    return everything, vit


def what_steps_leave_out(one):
    """The kernels that those steps do not need: what makes a batch, drop path, another way to infuse, an
    optimiser that is told its rate, gathered tokens."""
    drawn, side, count = np.random.default_rng(0), one.config["image_size"], 2 * one.batch
    pictures, labels = drawn.integers(0, 256, (count, 3, side,
                                               side)).astype("uint8"), drawn.integers(0, one.config["num_classes"], count)
    batches = tt.data.Batches(to_device(pictures, "cuda"), to_device(labels, "cuda"), one.batch, seed=0,
                              pad=4, flip=True, erase=0.5,
                              mixup=0.2, cutmix=1.0)
    images, labels = batches.make(batches.chosen(0), module_for("cuda").zeros(1, "uint32"))
    task = Classify(tt.models.LookupViT(**one.config | PAPER | dict(reuse="resoftmax")).to("cuda").train(),
                    drop_path=0.1)
    optimizer = AdamW(task.model.parameters())
    with products_in("bf16", "cuda"):
        loss, _ = task(images, labels, **task.noise(one.batch, 0, 0, array_module(images)))
        loss.backward()
        optimizer.step()
    tokens = (side // one.config["patch_size"]) ** 2
    x = tt.Tensor(random.normal((one.batch, tokens, one.config["dim"]), site="x", step=0,
                                xp=array_module(images)), requires_grad=True)
    tt.ops.take_tokens(x, tt.ops.top_k(array_module(images).ascontiguousarray(x.data[:, :, 0]),
                                       int(0.7 * tokens))).sum().backward()


# Repeating one

def twin(array):
    """A copy that lies in memory as the array does: kernels are told its strides."""
    xp = array_module(array)
    flat = xp.empty(1 + sum((n - 1) * stride for n,
                            stride in zip(array.shape, array.strides)) // array.itemsize, array.dtype)
    out = xp.lib.stride_tricks.as_strided(flat, array.shape, array.strides)
    out[...] = array
    return out


def twins(arguments):
    """The arguments with a copy of each array; one that is given twice stays one."""
    made = {}
    for value in arguments:
        if is_array(value) and id(value) not in made:
            made[id(value)] = twin(value)
    return [made.get(id(value), value) for value in arguments]


def repeated(run, arguments, copies):
    """A function that does run(*arguments) once on each of so many copies: one CUDA graph, which holds no
    memory by itself."""
    cupy, sets = module_for("cuda"), [twins(arguments) for _ in range(copies)]
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        run(*sets[0])  # a product times its algorithms
        stream.begin_capture()
        try:
            for given in sets:
                run(*given)
        finally:
            graph = stream.end_capture()
    return functools.partial(lambda graph, sets: graph.launch(), graph, sets)


class Ceilings:
    """What the device reaches: a copy in its memory (bytes read and written), a product of size^3 in bf16,
    and one of half the size in float32 (operations)."""

    def __init__(self, size, copied):
        xp = module_for("cuda")
        half, small = size // 2, random.normal((size // 2,) * 2, site="small", step=0, xp=xp)
        large, out = weights.rounded_alone(random.normal((size, size), site="large", step=0,
                                                         xp=xp)), xp.empty((size, size), "uint16")
        out32 = xp.empty((half, half), "float32")
        source, target = (xp.zeros(copied, "uint8") for _ in range(2))
        self.calls = {"bytes": (2 * copied, lambda: xp.copyto(target, source)),
                      "bf16": (2 * size ** 3, lambda: gemm.product(large, large, out=out, dtype="uint16")),
                      "fp32": (2 * half ** 3, lambda: gemm.product(small, small, out=out32))}

    def rate(self, name, clock):
        work, call = self.calls[name]
        return work / clock(call, 1)


class Kernels:
    """The rows. clock(call, repeats) -> seconds of a call; l2: bytes of the cache. size and copied: of
    Ceilings."""

    def __init__(self, works, clock, rounds, l2, size=8192, copied=1 << 29, launch=launcher.on_device,
                 multiply=gemm.on_device):
        self.works, self.clock, self.rounds, self.l2 = works, clock, rounds, l2
        self.launch, self.multiply, self.sizes = launch, multiply, (size, copied)

    @functools.cached_property
    def notes(self):
        return note_steps(self.works, self.launch, self.multiply)

    @functools.cached_property
    def ceilings(self):
        return Ceilings(*self.sizes)

    @functools.cached_property
    def gap(self):
        """Seconds that the least launch of a graph takes: what is shorter than a few of them cannot come near
        its roofline."""
        one = self.notes[0].launches["set_rates"]
        call = repeated(self.again(one), one.arguments, MOST)
        return min(self.clock(call, 5) for _ in range(self.rounds)) / MOST

    def again(self, one):
        """A function that launches it with other arguments."""
        return lambda *arguments: self.launch(one.kernel, one.blocks, one.threads, list(arguments),
                                              one.shared)

    def kernel(self, name):
        """The row of a kernel."""
        one = self.notes[0].launches[name]
        rate = "bf16" if name in BF16 else "fp32"
        return {"kernel": name, "grid": [one.blocks, one.threads],
                **self.measured(self.again(one), one.arguments, one.bytes, one.operations, rate)}

    def products(self):
        """The row with all products of the ViT's step."""
        rows = []
        for plan, (arrays, times) in self.notes[1].products.items():
            a, b, out, bias, add = arrays
            moved = sum(one.nbytes for one in (a, b, out, bias, add) if one is not None)
            text = f"{a.shape} {b.shape}" + " + bias" * (bias is not None) + " + what is there" * (add is not None)
            rows.append({"product": f"{text}, {NAMES[a.dtype.name]} to {NAMES[out.dtype.name]}",
                         "sizes": plan.sizes, "times": times,
                         **self.measured(functools.partial(self.multiply, plan), arrays, moved,
                                         2 * math.prod(plan.sizes), "bf16")})
        return {"products": rows}

    def measured(self, run, arguments, moved, operations, rate):
        """Times and shares of the roofline in the same round, medians and quartiles."""
        copies = min(MOST, max(2, -(-LARGER * self.l2 // moved)))
        call, us, shares, bounds = repeated(run, arguments, copies), [], [], []
        for _ in range(self.rounds):
            times = {"bytes": moved / self.ceilings.rate("bytes", self.clock),
                     rate: operations / self.ceilings.rate(rate, self.clock)}
            took, bound = self.clock(call, 5) / copies, max(times, key=times.get)
            us.append(1e6 * took)
            shares.append(times[bound] / took)
            bounds.append((times[bound], bound))
        least, bound = min(bounds)
        share = quartiles(shares)
        judged = least / (least + self.gap) > TARGET  # else the launch alone takes too long
        return {"bytes": int(moved), "operations": int(operations), "copies": copies, "bound": bound,
                "roofline_us": 1e6 * least,
                "us": quartiles(us), "share": share, "met": share[0] >= TARGET if judged else None}


def kernels_text(rows):
    """Markdown: a line per kernel, then one per product."""
    lines = ["| kernel | MB | M operations | bound by | roofline us | us, median [quartiles] | share of the "
             "roofline | at least 70 % |",
             "|---" * 8 + "|"]
    for row in [one for row in rows for one in row.get("products", [row])]:
        met = {None: "too short to tell", True: "yes", False: "NO"}[row["met"]]
        lines.append(f"| {row.get('kernel') or row['product']} | {row['bytes'] / 1e6:.2f} | "
                     f"{row['operations'] / 1e6:.1f} | "
                     f"{row['bound']} | {row['roofline_us']:.1f} | "
                     f"{'{:.1f} [{:.1f}, {:.1f}]'.format(*row['us'])} | "
                     f"{'{:.2f} [{:.2f}, {:.2f}]'.format(*row['share'])} | {met} |")
    return "\n".join(lines)
