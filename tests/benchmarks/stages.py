"""All that needs a GPU, in stages of at most 8 minutes, the most valuable first.

    python tests/benchmarks/stages.py --list           # what is done, and what is left
    python tests/benchmarks/stages.py a b              # these stages; without a name: all that are left
    python tests/benchmarks/stages.py a --out FOLDER   # default: lessons/results/gpu

A stage is some commands, its parts. A part that fails, or that runs out of its time, does not end the stage.
STAGE.json says how each part ended and STAGE.log has what it printed; both are written after every part. The
same command goes on with what is not done. What takes longer than a stage, the benchmark and the recipe, goes
on where it was stopped in the next call.
"""
import argparse
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import tqdm

from tinytoken.files import write_json
from tinytoken.reading import read_json

ROOT = pathlib.Path(__file__).parents[2]
MINUTES = 8  # of a stage at most
TESTS = "-m pytest -q -p no:cacheprovider -m gpu"


@dataclasses.dataclass(frozen=True)
class Part:
    """A command, python's arguments with {out} for the folder of results, and the minutes that it may take.
    program: another one than python."""
    command: str
    minutes: float = 2
    program: str = sys.executable

    def arguments(self, out):
        return [self.program, *(word.format(out=out) for word in self.command.split())]


SANITIZED = " ".join(f"tests/cuda/test_{name}.py" for name in ("kernels", "bf16", "bf16_lookup", "data"))
STAGES = {
    "a": ("the environment; plain operations on CuPy", {
        "driver": Part("", 0.5, "nvidia-smi"),
        "doctor": Part("-m tinytoken doctor", 1),
        "plain operations": Part(f"{TESTS} --plain --ignore tests/cuda", 6.5)}),
    "b": ("kernels against plain operations, a step of each model, captured steps", {
        "a step of each model": Part(f"{TESTS} tests/cuda/test_models.py", 2),
        "captured steps": Part(f"{TESTS} tests/cuda/test_capture.py", 2),
        "kernels": Part(f"{TESTS} tests/cuda --ignore tests/cuda/test_models.py "
                        "--ignore tests/cuda/test_capture.py", 4)}),
    "c": ("compute-sanitizer on the kernels' tests, the first case of each", {
        tool: Part(f"--tool {tool} --error-exitcode 1 {sys.executable} {TESTS} --first {SANITIZED}", minutes,
                   "compute-sanitizer") for tool, minutes in (("memcheck", 5), ("racecheck", 3))}),
    "d": ("training and inference beside PyTorch", {
        "steps": Part("tests/benchmarks/gpu.py --only steps --minutes 5 --out {out}/steps.json", 5.5),
        "inference": Part("tests/benchmarks/gpu.py --only inference --minutes 2 --out {out}/inference.json",
                          2.5)}),
    "e": ("CIFAR-10, arm by arm and seed by seed", {
        "the recipe": Part("lessons/full/cifar10.py --full --device cuda --out {out}", MINUTES)}),
    "f": ("each kernel beside what the device can do", {
        "kernels": Part("tests/benchmarks/gpu.py --only kernels --minutes 7.5 --out {out}/kernels.json",
                        MINUTES)}),
    "g": ("lessons that have a GPU's part", {
        name: Part(f"lessons/{name}.py --device cuda --out {{out}}", 4)
        for name in ("12_gpu", "13_one_step")}),
    "h": ("NCCL: one process; two, where there are two devices", {
        "a sum of gradients": Part(f"{TESTS} tests/train/test_nccl.py", 2),
        "a group of processes": Part(f"{TESTS} tests/cuda/test_ranks.py", 4)}),
}


class Stage:
    """The files of a stage, and what they say of its parts."""

    def __init__(self, name, out):
        self.name, self.out = name, out
        self.title, self.parts = STAGES[name]
        self.file, self.log = out / f"{name}.json", out / f"{name}.log"
        self.ended = read_json(self.file, "stages")["parts"] if self.file.exists() else {}

    def left(self):
        """Names of the parts that are not done."""
        return [name for name in self.parts if self.ended.get(name, {}).get("end") != "done"]

    def run(self):
        """Run what is left; a part gets what others have not used of the stage's minutes, too."""
        began = time.monotonic()
        for name in tqdm.tqdm(left := self.left(), desc=f"stage {self.name}", unit="part"):
            others = sum(self.parts[other].minutes for other in left[left.index(name) + 1:])
            minutes = max(self.parts[name].minutes, MINUTES - others - (time.monotonic() - began) / 60)
            self.ended[name] = self.run_part(name, minutes)
            write_json(self.file, {"stage": self.name, "title": self.title, "parts": self.ended})

    def run_part(self, name, minutes):
        """-> how it ended."""
        arguments, began = self.parts[name].arguments(self.out), time.monotonic()
        program = "python" if arguments[0] == sys.executable else arguments[0]
        about = {"command": " ".join([program, *arguments[1:]])}
        if shutil.which(arguments[0]) is None:
            return about | {"end": f"there is no {arguments[0]}", "seconds": 0.0, "said": []}
        with self.log.open("ab") as log:
            log.write(f"\n=== {name}: {about['command']}\n".encode())
            log.flush()
            start = log.tell()
            code = call(arguments, log, 60 * minutes)
        with self.log.open("rb") as log:
            log.seek(start)
            said = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        end = {0: "done", None: f"out of its {minutes:.1f} minutes"}.get(code, f"failed, exit status {code}")
        return about | {"end": end, "seconds": round(time.monotonic() - began, 1),
                        "said": [line for line in said if line.strip()][-30:]}


def call(arguments, log, seconds):
    """The exit status of a command, or None where its time ran out; with all that it started it is ended."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                               cwd=ROOT, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"})
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)  # to write what it has
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def table(out):
    """What is done and what is left, a line per part."""
    lines = []
    for name in STAGES:
        stage = Stage(name, out)
        lines.append(f"{name}  {stage.title}")
        for part, about in stage.parts.items():
            ended = stage.ended.get(part, {"end": "not run yet", "seconds": 0})
            took = f"  ({ended['seconds']:.0f} s)" if ended["seconds"] else ""
            lines.append(f"     {part}, at most {about.minutes:g} minutes: {ended['end']}{took}")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE",
                        help=f"{', '.join(STAGES)} (default: all that are left)")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and end")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "lessons" / "results" / "gpu")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if not options.list:
        out.mkdir(parents=True, exist_ok=True)
        for name in options.stages or STAGES:
            Stage(name, out).run()
    print(table(out))


if __name__ == "__main__":
    main()
