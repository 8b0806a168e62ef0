"""The training loop."""
import time
from typing import Any

import numpy as np
import tqdm

from .. import nn
from ..backend import products_in
from ..errors import expect
from ..group import current
from ..tasks import Task
from .interrupt import Interrupt
from .optim import AdamW, warmup_cosine
from .run import Run, begun
from .step import Losses, Work, stepper


def fit(model: nn.Module, task: Task, batches: Any, *, steps: int, lr: float = 1e-3,
        weight_decay: float = 0.05, warmup: float = 0.1, clip: float | None = 1.0,
        average: float | None = None, micro: int | None = None, threads: int | None = None, seed: int = 0,
        offset: int = 0, run: Run | None = None, phase: str = "train", header: dict[str, Any] | None = None,
        log_every: int = 20, bar: bool = True, precision: str = "fp32") -> dict[str, Any]:
    """Train `model` with AdamW, warm-up and cosine decay -> {"seconds": of training, "loss": mean over the
    last logged steps, and its parts}. Frozen parameters stay as they are. The model is left in eval mode;
    with `average`, it has the running mean of its weights (see AdamW).

    task: as tasks.Task. batches(step) -> a tuple of arrays, a pure function of the step, which counts from
    `offset`; batches.batch_size is its size. micro: images of a slice (None: see `slice_size`; the task is
    then called once more, on one image, to count its multiply-adds). precision: as in `products_in`.

    run: a Run for the history (JSON lines) and the checkpoint `phase`.npz, written every run.every steps, at
    the end, and on Ctrl-C, which ends the run after the step it is in with KeyboardInterrupt. Training goes
    on from a checkpoint that exists, to the same bits as an uninterrupted run with as many threads. One with
    another model, recipe or header (JSON: what else a checkpoint is to say) is another run's, and refused.
    Busy is raised where another process is training the same phase in the same folder.
    """
    expect(isinstance(steps, int) and steps > 0, "fit", f"steps {steps!r}, expected a positive whole number")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr, weight_decay=weight_decay, clip=clip, average=average)
    recipe = dict(steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, clip=clip, micro=micro,
                  seed=seed, offset=offset)
    header = _header(recipe, task, batches, optimizer, precision) | (header or {})
    advice = f"of {phase}: try a learning rate below {lr}"
    advice += ". The last checkpoint is unharmed." if run else ""
    rates = [lr * warmup_cosine(step, steps, warmup) for step in range(steps)]
    work = Work(task, batches, optimizer, rates, seed, offset, micro, threads, advice)
    ranks, beginning = current(), begun(run, phase, model, optimizer, batches, header)
    with (beginning as (start, report, recent), products_in(precision, optimizer.params[0].device),
          Interrupt() as interrupt,
          tqdm.tqdm(total=steps, initial=start, desc=phase, disable=not bar or ranks.rank > 0) as progress):
        model.train()
        losses, take = Losses(recent, advice), stepper(work)
        began, on_cpu = time.perf_counter() - report["seconds"], work.xp is np
        for step in range(start, steps):
            losses.add(step, *take(step))
            progress.update()
            done, last = step + 1, step + 1 == steps
            asked = any(ranks.exchange("Ctrl-C", interrupt.asked))  # all ranks stop after the same step
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
            if run and save:
                run.save(phase, model, None if last else optimizer, step=done, result=report,
                         recent=losses.recent, **header)
            if asked:
                raise KeyboardInterrupt(f"{phase} stopped after step {done} of {steps}")
    model.eval()
    return report


def _header(recipe, task, batches, optimizer, precision):
    """What the run's checkpoints say besides their contents: all that its result depends on."""
    # frozen_steps only where there are any, as below
    groups = [segment[2:] if segment[4] else segment[2:4] for segment in optimizer.flat.segments]
    recipe = recipe | dict(batch=batches.batch_size, groups=groups, **task.settings)
    # the defaults are not named: a checkpoint from before an option existed is still the same run's
    recipe |= {} if optimizer.average is None else {"average": optimizer.average}
    recipe |= {} if precision == "fp32" else {"precision": precision}
    return {"recipe": recipe}
