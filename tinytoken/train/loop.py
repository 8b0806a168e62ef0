"""The training loop."""
import time

import numpy as np
import tqdm

from ..backend import products_in
from ..errors import expect
from . import checkpoint
from .interrupt import Interrupt
from .optim import AdamW, warmup_cosine
from .run import fresh
from .step import Losses, Work, stepper


def fit(model, task, batches, *, steps, lr=1e-3, weight_decay=0.05, warmup=0.1, clip=1.0, average=None,
        micro=None,
        threads=None, seed=0, offset=0, run=None, phase="train", header=None, log_every=20, bar=True,
        precision="fp32"):
    """Train `model` for `steps` steps of AdamW with warm-up and cosine decay -> {"seconds": of training,
    "loss": mean over the last logged steps, and its parts}. Frozen parameters stay as they are. The model is
    left in eval mode, with `average` with the running mean of its weights (see AdamW).

    task(*slice, **draws) -> (loss, parts) with .noise(size, step, seed, xp) -> draws and .settings, see
    tasks.Task; batches(step) -> a tuple of arrays, a pure function of the step, counted from `offset`;
    batches.batch_size is its size. micro: images of a slice (None: see `slice_size`; the task is then called
    once more, on one image, to count its multiply-adds). precision: as of `products_in`.

    run: a Run for the history (JSON lines) and the checkpoint `phase`.npz, written every run.every steps, at
    the end, and on Ctrl-C, which ends the run after the step it is in with KeyboardInterrupt. Training goes
    on from a checkpoint that exists, to the same bits as an uninterrupted run with as many threads; one that
    says another model, recipe or header (JSON: what else a checkpoint is to say) is another run's, and
    refused.
    """
    expect(isinstance(steps, int) and steps > 0, "fit", f"steps {steps!r}, expected a positive whole number")
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay,
                      clip=clip,
                      average=average)
    recipe = dict(steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, clip=clip, micro=micro,
                  seed=seed, offset=offset,
                  batch=batches.batch_size, groups=[s[2:] for s in optimizer.flat.segments], **task.settings)
    recipe |= {} if average is None else {"average": average}
    recipe |= {} if precision == "fp32" else {"precision": precision}
    header = {"recipe": recipe, **(header or {})}
    start, report, recent = run.resume(phase, model, optimizer, header) if run else fresh()
    advice = f"of {phase}: try a learning rate below {lr}" + (". The last checkpoint is unharmed." if run
                                                              else "")
    rates = [lr * warmup_cosine(step, steps, warmup) for step in range(steps)]
    work, losses = Work(task, batches, optimizer, rates, seed, offset, micro, threads,
                        advice), Losses(recent, advice)
    model.train()
    began, on_cpu = time.perf_counter() - report["seconds"], work.xp is np
    rounding = products_in(precision, optimizer.params[0].device)
    with rounding, Interrupt() as interrupt, tqdm.tqdm(total=steps, initial=start, desc=phase,
                                                       disable=not bar) as progress:
        take = stepper(work)
        for step in range(start, steps):
            losses.add(step, *take(step))
            progress.update()
            done, last, asked = step + 1, step + 1 == steps, interrupt.asked
            log, save = done % log_every == 0 or last, run and (done % run.every == 0 or last or asked)
            if on_cpu or log or save:
                losses.read()
            report["seconds"] = round(time.perf_counter() - began, 3)
            if log:
                means = losses.mean()
                report.update(means)
                progress.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
                if run:
                    run.log(phase=phase, step=step, lr=rates[step], **report)
            if last and average is not None:
                optimizer.use_average()
            if save:
                checkpoint.save(run.checkpoint(phase), model, None if last else optimizer, phase=phase,
                                step=done,
                                result=report, recent=losses.recent, **header)
            if asked:
                raise KeyboardInterrupt(f"{phase} stopped after step {done} of {steps}")
    model.eval()
    return report
