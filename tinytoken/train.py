"""Training: what each model minimises, `fit` with its history and checkpoints, and evaluation on all cores."""
import contextlib
import json
import math
import pathlib
import reprlib
import signal
import threading
import time

import numpy as np
import tqdm

from . import backend, checkpoint, models, ops, random
from .backend import array_module, cpu_count, module_for, out_of_memory, to_numpy
from .cost import recorded_macs
from .errors import InputError, expect
from .optim import AdamW, loss_and_grads, share_out, warmup_cosine
from .tensor import kernel, no_grad


# Objectives: called with a slice of the batch -> (loss, parts). `noise` makes what is drawn for a whole batch, by image number,
# before it is cut, so that micro-batches and threads change nothing. `settings` is what a checkpoint is to say of it.

class Classify:
    """Cross-entropy of a model's logits: ViT's, or both of LookupViT's. drop_path: see `drop_paths`."""

    def __init__(self, model, smoothing=0.0, drop_path=0.0):
        self.model, self.smoothing, self.drop_path = model, smoothing, check_rate(drop_path)
        self.settings = {"smoothing": smoothing} | ({"drop_path": drop_path} if drop_path else {})

    def noise(self, size, step, seed, xp):
        return (drop_paths(self.model, self.drop_path, size, step, seed, xp),) if self.drop_path else ()

    def __call__(self, images, labels, *paths):
        out = self.model(images, **dict(zip(("paths",), paths)))
        if isinstance(out, models.LookupOutput):
            return models.lookupvit_loss(out, labels, smoothing=self.smoothing)
        loss = ops.cross_entropy(out, labels, smoothing=self.smoothing)
        return loss, {"class": loss}


class Distil:
    """DynamicViT's four losses. teacher: the dense ViT it started from; it is run in eval mode and never changed. drop_path: of
    the model that learns, see `drop_paths`."""

    def __init__(self, model, teacher, smoothing=0.0, weights=(1, 2, 0.5, 0.5), drop_path=0.0):
        self.model, self.teacher, self.smoothing, self.weights = model, teacher.eval(), smoothing, weights
        self.drop_path = check_rate(drop_path)
        self.settings = {"smoothing": smoothing, "weights": weights} | ({"drop_path": drop_path} if drop_path else {})

    def noise(self, size, step, seed, xp):
        """Gumbel draws of all stages, (B, S, N, 2), and with drop path the factors of the branches."""
        draws = [random.gumbel((size, self.model.num_patches, 2), site=f"score_predictor.{s}", step=step, seed=seed, xp=xp)
                 for s in range(len(self.model.keep_ratios))]
        paths = (drop_paths(self.model, self.drop_path, size, step, seed, xp),) if self.drop_path else ()
        return (xp.stack(draws, axis=1), *paths)

    def __call__(self, images, labels, draws, *paths):
        with no_grad():
            tokens = self.teacher.features(images)
            logits = self.teacher.classify(tokens)
        out = self.model(images, noise=[draws[:, s] for s in range(draws.shape[1])], **dict(zip(("paths",), paths)))
        return models.dynamicvit_loss(out, labels, logits, self.teacher.patches(tokens), self.model.keep_ratios, weights=self.weights,
                                      token_norm="image", smoothing=self.smoothing)


def drop_paths(model, rate, size, step, seed, xp=np):
    """Factors (B, depth, branches) of the residual branches of model.blocks, for drop path (stochastic depth: Huang et al. 2016,
    section 3): 0 with a probability that rises evenly from 0 in the first block to `rate` in the last, else 1 / (1 - it), so that
    the mean is 1. Each branch of each image is drawn by itself."""
    depth, branches = len(model.blocks), model.blocks[0].branches
    dropped = (xp.arange(depth, dtype="float32") * (rate / max(1, depth - 1)))[:, None]
    draw = random.uniform((size, depth, branches), site="tinytoken.train.drop_paths", step=step, seed=seed, xp=xp)
    return (draw >= dropped) / (1 - dropped)


def check_rate(rate):
    """A drop-path rate, if it is one."""
    expect(0 <= rate < 1, "drop_path", f"{rate}, expected 0 <= rate < 1")
    return rate


class Run:
    """Where a training run keeps its files: history.jsonl, one line per logged step of any phase, and a checkpoint per phase."""

    def __init__(self, folder, every=200):
        expect(every >= 1, "Run", f"a checkpoint every {every} steps, expected at least 1")
        self.folder, self.every = pathlib.Path(folder), every
        self.history = self.folder / "history.jsonl"

    def checkpoint(self, phase):
        return self.folder / f"{phase}.npz"

    def log(self, **row):
        """Append one line to the history."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.history, "a") as file:
                file.write(json.dumps(row, default=checkpoint.plain_number) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.history}: {error.strerror}") from error

    def forget(self, phase, step):
        """Drop the history of `phase` from `step` on: what an interrupted run logged after its last checkpoint, and a last line
        cut off by a crash."""
        if self.history.exists():
            lines = self.history.read_text().splitlines()
            kept = [line for line in lines if _earlier(line, phase, step)]
            if len(kept) < len(lines):
                with checkpoint.replacing(self.history, "w") as file:
                    file.writelines(line + "\n" for line in kept)


def _earlier(line, phase, step):
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row.get("phase") != phase or row["step"] < step


def fit(model, objective, batches, *, steps, lr=1e-3, weight_decay=0.05, warmup=0.1, clip=1.0, average=None, micro=None,
        threads=None, seed=0, offset=0, run=None, phase="train", header=None, log_every=20, bar=True, precision="fp32"):
    """Train `model` for `steps` steps of AdamW with warm-up and cosine decay -> {"seconds": of training, "loss": mean over the
    last logged steps, and its parts}. Frozen parameters stay as they are. The model is left in eval mode, with `average` with the
    running mean of its weights (see AdamW).

    objective(*slice) -> (loss, parts) with .noise(size, step, seed, xp) and .settings, see Classify; batches(step) -> a tuple of
    arrays, a pure function of the step, counted from `offset`; batches.batch_size is its size. micro: images of a slice (None:
    see `slice_size`; the objective is then called once more, on one image, to count its multiply-adds). run: a Run for the
    history (JSON lines) and the checkpoint `phase`.npz, written every run.every steps, at the end, and on Ctrl-C, which ends the
    run after the step it is in with KeyboardInterrupt. A checkpoint that is there is gone on with, to the same bits as an
    uninterrupted run with as many threads; one that says another model, recipe or header (JSON: what else a checkpoint is to
    say) is another run's, and refused. precision: as of `products_in`.
    """
    expect(isinstance(steps, int) and steps > 0, "fit", f"steps {steps!r}, expected a positive whole number")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr, weight_decay=weight_decay, clip=clip, average=average)
    recipe = dict(steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, clip=clip, micro=micro, seed=seed, offset=offset,
                  batch=batches.batch_size, groups=[s[2:] for s in optimizer.flat.segments], **objective.settings)
    recipe |= {} if average is None else {"average": average}
    recipe |= {} if precision == "fp32" else {"precision": precision}
    header = header or {}
    start, result, recent = _resume(run, phase, model, optimizer, {"recipe": recipe, **header})
    advice = f"of {phase}: try a learning rate below {lr}" + (". The last checkpoint is unharmed." if run else "")
    unread = []  # (step, losses, gradient norm) that nobody has looked at yet: on a GPU a look waits for all work before it
    model.train()
    began, xp = time.perf_counter() - result["seconds"], array_module(params[0].data)
    rates = [lr * warmup_cosine(step, steps, warmup) for step in range(steps)]
    noise, rounding = lambda size, step: objective.noise(size, step, seed, xp), products_in(precision, params[0].device)
    with rounding, _Interrupt() as interrupt, tqdm.tqdm(total=steps, initial=start, desc=phase, disable=not bar) as progress:
        take = _stepper(objective, optimizer, batches, noise, rates, offset, micro, threads, advice)
        for step in range(start, steps):
            loss, parts, norm = take(step)
            unread.append((step, {"loss": loss, **parts}, norm))
            progress.update()
            done, last, asked = step + 1, step + 1 == steps, interrupt.asked
            log, save = done % log_every == 0 or last, run and (done % run.every == 0 or last or asked)
            if xp is np or log or save:
                recent += _read(unread, advice)
            result["seconds"] = round(time.perf_counter() - began, 3)
            if log:
                result.update({name: sum(row[name] for row in recent) / len(recent) for name in recent[0]})
                recent.clear()
                progress.set_postfix({name: f"{value:.3f}" for name, value in result.items() if name != "seconds"}, refresh=False)
                if run:
                    run.log(phase=phase, step=step, lr=rates[step], **result)
            if last and average is not None:
                optimizer.use_average()
            if save:
                checkpoint.save(run.checkpoint(phase), model, None if last else optimizer, phase=phase, step=done, recipe=recipe,
                                result=result, recent=recent, **header)
            if asked:
                raise KeyboardInterrupt(f"{phase} stopped after step {done} of {steps}")
    model.eval()
    return result


def products_in(precision, device):
    """Context: what products on the device round their factors to. "fp32": to nothing, the only one on a CPU; "tf32" and "bf16" are a
    GPU's, "bf16" also for whatever lies between the products of a block. Sums, parameters and gradients are float32 always.
    Raises InputError, when it is made, where there is no such precision."""
    fast = backend.kernel("precision", module_for(device))
    expect(precision == "fp32" or fast, "precision", f"{precision!r}: on the CPU and under plain() products are in fp32")
    return fast(precision) if fast else contextlib.nullcontext()


def _stepper(objective, optimizer, batches, noise, rates, offset, micro, threads, advice):
    """A function (number of the step) -> (loss, parts, the gradient's norm) that takes it, one step after another. rates: the learning
    rates of all steps; noise(size, step): the objective's."""
    params = optimizer.params
    captured = kernel("captured_run", params[0].data)
    if captured:
        return captured(lambda arrays: _gradients(objective, params, arrays, len(arrays[0]), 1), optimizer, batches, noise, rates, offset)

    def take(step):
        nonlocal micro
        arrays = batches(offset + step)
        arrays = (*arrays, *noise(len(arrays[0]), offset + step))
        if micro is None:
            on_cpu = array_module(arrays[0]) is np
            micro = slice_size(len(arrays[0]), threads, recorded_macs(objective, arrays)) if on_cpu else len(arrays[0])
        loss, parts = _gradients(objective, params, arrays, micro, threads)
        on_host = isinstance(loss, float)  # else nobody looks yet
        expect(not on_host or math.isfinite(loss), "fit", lambda: f"the loss is {loss} at step {optimizer.steps} {advice}")
        return loss, parts, optimizer.step(rates[step])
    return take


def _gradients(objective, params, arrays, micro, threads):
    """loss_and_grads. Where the batch does not fit into memory, InputError with the largest that does: by halving, tried."""
    size, said = len(arrays[0]), None
    while size:
        try:
            found = loss_and_grads(objective, params, tuple(array[:size] for array in arrays), min(micro, size), threads)
            expect(said is None, "fit", f"a batch of {len(arrays[0])} images does not fit into memory, one of {size} does ({said})")
            return found
        except Exception as error:
            if not out_of_memory(error):
                raise
            said = said or " ".join(str(error).split())
        size //= 2  # not in the except block: the exception's frames hold arrays
    raise InputError(f"fit: not even one image fits into memory ({said})")


def _read(unread, advice):
    """The losses of these steps as floats, and none left unread: one copy from the device. InputError for a loss or norm that is
    not a finite number."""
    xp = array_module(unread[0][2])
    values = iter(to_numpy(xp.stack([xp.asarray(value) for _, losses, norm in unread for value in (*losses.values(), norm)])).tolist())
    rows = []
    for step, losses, _ in unread:
        losses, norm = {name: next(values) for name in losses}, next(values)
        expect(math.isfinite(losses["loss"]), "fit", lambda: f"the loss is {losses['loss']} at step {step} {advice}")
        expect(math.isfinite(norm), "fit", lambda: f"the gradient's norm is {norm} at step {step} {advice}")
        rows.append(losses)
    unread.clear()
    return rows


def _resume(run, phase, model, optimizer, says):
    """(step to go on from, what fit had to report by then, the losses since the last logged step). A checkpoint that does not
    say what `says` says is refused: it is another run's."""
    fresh = 0, {"seconds": 0.0}, []
    if run is None:
        return fresh
    path = run.checkpoint(phase)
    if path.exists():
        header, _ = checkpoint.load(path)
        says = {"model": type(model).__name__, "config": model.config, **says}
        differences = ", ".join(_differences(header, checkpoint.as_json(says)))
        expect(not differences, "fit", f"{path} belongs to another run ({differences}): choose another --out, or delete it")
        checkpoint.restore(path, model, optimizer if header["step"] < says["recipe"]["steps"] else None)
        fresh = header["step"], header["result"], header["recent"]
    run.forget(phase, fresh[0])
    return fresh


def _differences(there, now):
    """What differs between two JSON objects, one text per name, as far as `now` has it."""
    for name, value in now.items():
        old = there.get(name)
        if isinstance(value, dict):
            yield from _differences(old or {}, value)
        elif old != value:
            yield f"{name} {reprlib.repr(old)} there, {reprlib.repr(value)} now"


class _Interrupt:
    """Context: Ctrl-C sets `asked` instead of raising, so that a step is never left half done. A second Ctrl-C raises. Only the
    main thread gets signals; elsewhere this does nothing."""
    asked = False

    def __enter__(self):
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


ENOUGH_MACS = 1.45e9  # recorded in the forward pass of a slice: beyond them what Python adds hardly shows


def slice_size(images, threads=None, macs=0):
    """Images of a slice. So many that each thread has one slice, since threads cannot share what Python does between the ops; at
    most 32, and halved, for the memory, as long as half of it still has enough to do. macs: multiply-adds of one image, as
    `cost.recorded_macs` counts them; 0 where nothing is recorded and slices need little memory."""
    size = max(1, min(32, -(-images // (threads or cpu_count()))))
    while size > 1 and macs * (size // 2) >= ENOUGH_MACS:
        size //= 2
    return size


WORTH_CAPTURING = 5  # slices: the first calls of what is captured are ordinary ones


def infer(model, images, prepare=lambda images: images, batch_size=None, threads=None, precision="fp32", **call):
    """Logits (B, K) in host memory of a model in eval mode, slice by slice on all cores. prepare: raw images -> model input.
    batch_size: images of a slice (None: `slice_size`, on a GPU 128). precision: as of `products_in`."""
    mode, first = model.training, model.parameters()[0]
    xp = array_module(first.data)
    batch_size = batch_size or (slice_size(len(images), threads) if xp is np else 128)
    cuts = [slice(a, a + batch_size) for a in range(0, len(images), batch_size)]
    model.eval()

    forward, captured = lambda arrays: model(*arrays, **call).data, kernel("captured", first)
    if captured and len(cuts) >= WORTH_CAPTURING:
        forward = captured(forward, "a forward pass")

    def logits(cut):
        with no_grad():
            return to_numpy(forward((prepare(images[cut]),)))
    try:
        with products_in(precision, first.device):
            return np.concatenate(share_out(logits, cuts, threads if xp is np else 1))
    finally:
        model.train(mode)


def accuracy(logits, labels):
    """The share of images whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == to_numpy(labels)).mean())
