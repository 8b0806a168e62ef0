"""What the tests start under mpiexec: small trainings, and what can go wrong on one rank.

    mpiexec -n 2 python tests/ranked.py JOB FOLDER [WORD ...]
"""
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

import tinytoken as tt
from tiny import SIZES, batches, python
from tinytoken import group, nn, program
from tinytoken.backend import to_device
from tinytoken.experiments import Arm, Recipe, lesson
from tinytoken.files import write_json
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import Classify, Distil, Run, fit, infer

BIAS_OF_KEYS = ("qkv.bias", "gather_k.bias")
MPIEXEC = group.launcher()
MPICH = os.path.exists(f"{MPIEXEC}.hydra")  # its launcher passes Ctrl-C on; Open MPI's kills the ranks
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # what its launcher refuses otherwise


def missing():
    """Why nothing can run under mpiexec here, or nothing."""
    if os.name != "posix":
        return "no mpiexec on this system"
    if not MPIEXEC:
        return "no mpiexec: pip install mpi4py mpich"
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return "mpi4py is not installed"
    return ""


def started(ranks, *arguments, program=__file__):
    """mpiexec with so many ranks of this file, or another one -> Popen. Ranks=0: that alone, without
    mpiexec."""
    words = [sys.executable, program, *map(str, arguments)]
    return session(*([MPIEXEC, "-n", str(ranks)] if ranks else []), *words)


def session(*words):
    """A command in a session of its own, with what Open MPI wants of root and for many ranks -> Popen."""
    code = f"import os, sys; os.environ.update({OPEN_MPI}); os.execvp(sys.argv[1], sys.argv[1:])"
    return python("-c", code, *words, start_new_session=True)


def ended(process, seconds=120):
    """(exit code, stdout, stderr) of what `started` has started; it is ended after so many seconds."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it hangs: {out}{err}") from None
    return process.returncode, out, err


def ranks(count, *arguments, seconds=120):
    return ended(started(count, *arguments), seconds)


def arrays(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def without_biases_of_keys(weights):
    """A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding; AdamW
    divides that by its own size, and moves the bias by chance. It changes no answer."""
    def cut(name, array):
        if name.endswith("qkv.bias"):
            q, k, v = np.split(array, 3)
            return np.concatenate([q, v])
        return array[:0] if name.endswith(BIAS_OF_KEYS) else array
    return {name: cut(name, array) for name, array in weights.items()}


def vit(dtype):
    return _task(ViT(**SIZES), dtype)


def lookupvit(dtype):
    return _task(LookupViT(**SIZES, compressed=(1, 1), classifiers="both"), dtype)


def dynamicvit(dtype, options=None):
    model = DynamicViT(**SIZES | {"depth": 2}, prune_before=(0, 1), keep_ratios=(0.7, 0.5)).astype(dtype)
    return model, Distil(model, ViT(**SIZES | {"depth": 2}).astype(dtype), drop_path=0.2, options=options)


def pooled(dtype):
    """Its loss is of the whole batch."""
    return dynamicvit(dtype, {"ratio_norm": "pooled"})


class Normed(nn.Module):
    """With batch norm, whose running statistics follow the batch."""
    whole = False

    def __init__(self):
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        for p in self.parameters():
            p.data += np.random.default_rng(0).standard_normal(p.shape)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).mean(axis=(2, 3)))

    def noise(self, *_):
        return {}


class OfLogits(Classify):
    """The task of a model that returns logits alone."""

    def __call__(self, images, labels):
        return tt.ops.cross_entropy(self.model(images), labels)


def normed(dtype):
    model = Normed().astype(dtype)
    return model, OfLogits(model)


def _task(model, dtype):
    return model, Classify(model.astype(dtype), smoothing=0.1, drop_path=0.2)


def trained(kind, dtype="float32", at_step=lambda step: None, steps=20, batch=8, **more):
    """A training of so many steps; at_step(step) is called before each batch."""
    tt.manual_seed(3)
    model, task = globals()[kind](dtype)
    given = batches(batch)

    class Given:
        batch_size, images, labels = given.batch_size, given.images, given.labels

        def __call__(self, step):
            at_step(step)
            images, labels = given(step)
            return images.astype(dtype), labels
    settings = dict(steps=steps, lr=0.01, threads=1, seed=5, log_every=3, bar=False)
    report = fit(model, task, Given(), **settings | more)
    return model, report


def weights(folder, kind, dtype, name, micro=""):
    """Train, and write the weights to FOLDER/NAME-RANK.npz."""
    model, report = trained(kind, dtype, **{"micro": int(micro)} if micro else {})
    np.savez(f"{folder}/{name}-{group.current().rank}.npz", loss=report["loss"], **model.state_dict())


class Narrow(Classify):
    """It has room for a few images alone, from the moment on that a rank says so."""
    most = 1000

    def __call__(self, images, labels, **draws):
        if len(images) > Narrow.most:
            raise MemoryError("no room")
        return super().__call__(images, labels, **draws)


def narrow(dtype):
    model = ViT(**SIZES)
    return model, Narrow(model, smoothing=0.1, drop_path=0.2)


def on_gpu(folder, kind, name):
    """`weights` on the GPUs."""
    tt.manual_seed(3)
    model, task = globals()[kind]("float32")
    given = batches(8)
    given.images, given.labels = (to_device(array, "cuda") for array in (given.images, given.labels))
    for each in (model, getattr(task, "teacher", model)):
        each.to("cuda")
    report = fit(model, task, given, steps=20, lr=0.01, seed=5, bar=False)
    np.savez(f"{folder}/{name}-{group.current().rank}.npz", loss=report["loss"], **model.state_dict())


def run(folder, *faults, every="4", phase="train"):
    """Train with checkpoints. faults: RANK:STEP:WHAT, what happens on a rank at a step."""
    def at_step(step):
        for fault in faults:
            rank, at, what = fault.split(":")
            if (group.current().rank, step) == (int(rank), int(at)):
                FAULTS[what]()
    model, _ = trained("narrow", at_step=at_step, run=Run(folder, int(every)), phase=phase)
    write_json(pathlib.Path(folder) / "end.json", {"weights": group.digest(*model.state_dict().values())})


def slow(folder, seconds):
    """Train with a pause before each step, for tests that interrupt it."""
    pathlib.Path(folder, f"pid-{group.current().rank}").write_text(str(os.getpid()))
    model, _ = trained("vit", at_step=lambda step: time.sleep(float(seconds)), run=Run(folder, 4), steps=20)
    write_json(pathlib.Path(folder) / "end.json", {"weights": group.digest(*model.state_dict().values())})


def _fails(error):
    def raise_it():
        raise error
    return raise_it


def _drift():
    """One rank's weights are no longer the others'."""
    import gc
    for model in [each for each in gc.get_objects() if isinstance(each, ViT)]:
        model.head.weight.data[0, 0] += 1


FAULTS = {"input": _fails(tt.InputError("this picture cannot be used")), "bug": _fails(KeyError("a mistake")),
          "memory": lambda: setattr(Narrow, "most", 2), "exit": lambda: sys.exit(0), "drift": _drift,
          "long": lambda: time.sleep(100),
          "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
          "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT)}


class Pictures:
    """Those of `batches`, for a trial."""
    names, moves = ("red", "green", "blue"), {"pad": 1, "flip": True}
    images, labels = batches().images, batches().labels


class Paused:
    """Batches with a pause before each."""

    def __init__(self, of, seconds):
        self.of, self.seconds = of, seconds

    def __getattr__(self, name):
        return getattr(self.of, name)

    def __call__(self, step):
        time.sleep(self.seconds)
        return self.of(step)


def jobs(folder, count, pause, *faults):
    """A full lesson of so many jobs, each of which trains an arm, all from the same start; then all ranks
    want the last arm. pause: seconds before a step, on rank 1 three times as many. faults: RANK:WHAT, what
    happens on a rank in a job."""
    ranks, here = group.current(), lesson.begin("00", ["--full", "--device", "cpu", "--out", folder])
    recipe = Recipe(batch=6, patch=4, dim=8, depth=1, heads=2)
    arms = {f"arm {i}": Arm("vit", start="start", steps=4, lr=0.01 * (i + 1)) for i in range(int(count))}
    trial = here.trial(recipe, 0, {"start": Arm("vit", steps=2), **arms}, pictures=(Pictures, Pictures),
                       threads=1)
    trial.bar, trial.batches = False, Paused(trial.batches, float(pause) * (1 + 2 * ranks.rank))

    def job(name):
        for fault in faults:
            rank, what = fault.split(":")
            if ranks.rank == int(rank):
                FAULTS[what]()
        weights = group.digest(*trial.train(name)[0].state_dict().values())
        pathlib.Path(folder, f"{name} by {ranks.rank}").touch()
        return weights
    found = here.each({name: functools.partial(job, name) for name in arms}, {})
    model, _ = trial.train([*arms][-1])
    ranks.same("the last arm", weights=group.digest(*model.state_dict().values()))
    write_json(pathlib.Path(folder) / "end.json", found)


def inference(folder, kind, count, batch_size=""):
    """Write the answers to so many pictures to FOLDER/answers-RANK.npy."""
    tt.manual_seed(3)
    model = globals()[kind]("float64")[0].eval()
    images = np.random.default_rng(1).standard_normal((int(count), 3, 8, 8))
    answers = infer(model, images, threads=1, **{"batch_size": int(batch_size)} if batch_size else {})
    np.save(f"{folder}/answers-{group.current().rank}.npy", answers)


def other(folder, what):
    """A rank has something else than the others."""
    rank = group.current().rank
    given = batches(8, seed=rank if what == "order" else 0)
    if what == "picture":
        given.images = given.images.copy()
        given.images[-1, 0, 0, 0] ^= rank
    model = ViT(**SIZES | {"depth": 1 + (what == "model") * rank})
    fit(model, Classify(model), given, steps=2, lr=0.01 * (1 + (what == "rate") * rank), bar=False)


def same_start(folder):
    """Ranks that start from other weights train from rank 0's."""
    tt.manual_seed(3 + group.current().rank)
    model = ViT(**SIZES)
    fit(model, Classify(model), batches(8), steps=2, bar=False)
    group.current().same("test", weights=group.digest(*model.state_dict().values()))
    print("the same")


def says(folder):
    """What a rank prints, and how many CPUs it takes."""
    print(f"rank {group.current().rank} prints")
    print(f"{len(os.sched_getaffinity(0))} {tt.backend.cpu_count()}")
    write_json(pathlib.Path(folder) / f"by-rank-{group.current().rank}.json", {})


def children(folder):
    """A process that a rank starts is a group of one."""
    code = "from tinytoken import group; print(group.current().size)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())


def main():
    try:
        program.prepare_streams()
        job, folder, *words = sys.argv[1:]
        globals()[job](folder, *words)
    except program.ENDS as error:
        return program.ended(error)


if __name__ == "__main__":
    sys.exit(main())
