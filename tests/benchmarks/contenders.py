"""The measuring side of cpu.py: its contenders' processes, which answer requests over a pipe, one JSON line
each."""
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading

LIMIT = 900  # seconds a contender may take for one answer, compiling included


class Dropped(Exception):
    """Why a contender is left out: absent, crashed, refuses, or computes something else."""


@contextlib.contextmanager
def held_to(cpus):
    """Context: this process, and those that it starts, run on so many of its CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Contender:
    """A contender's process, on so many `cpus`. environment: what is special in it."""

    def __init__(self, command, cpus, environment):
        self.errors = tempfile.TemporaryFile()
        with held_to(cpus):
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=self.errors, text=True, env=os.environ | environment)

    def read(self):
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise Dropped(f"ended with status {self.process.returncode}" + (f": {said[-1]}" if said else ""))
        got = json.loads(line)
        if "error" in got:
            raise Dropped(got["error"])
        return got

    def ask(self, **request):
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.read()

    def close(self):
        try:
            self.process.communicate(timeout=10)  # closes its stdin, at which it ends
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.errors.close()


class Field:
    """The contenders of one workload. One that is dropped stays out, with its reason."""

    def __init__(self, skipped):
        self.running, self.skipped = {}, skipped

    def each(self, names, request):
        """{name: request(contender)} of those that answer."""
        answers = {}
        for name in names:
            if name in self.running:
                try:
                    answers[name] = request(self.running[name])
                except Dropped as reason:
                    self.drop(name, str(reason))
        return answers

    def drop(self, name, reason):
        self.skipped[name] = reason
        print(f"  {name} skipped: {reason}", flush=True)
        self.running.pop(name).close()

    def close(self):
        for contender in self.running.values():
            contender.close()


def avx512_for_mkl(folder):
    """(path of a library to preload, or None, and why). MKL keeps to AVX2 on processors that are not Intel's,
    unless it is told that this is one. An experiment, to see PyTorch at its best."""
    info, compiler = pathlib.Path("/proc/cpuinfo"), shutil.which("cc")
    text = info.read_text() if info.exists() else ""
    reason = ("this processor has no AVX-512" if "avx512f" not in text else
              "MKL uses AVX-512 here by itself" if "GenuineIntel" in text else
              "no C compiler for the library to preload" if compiler is None else None)
    if reason:
        return None, reason
    library, source = folder / "intel.so", "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
    failed = subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source,
                            text=True).returncode
    return (None, "the C compiler fails") if failed else (str(library), "MKL is told that this is an Intel "
                                                                        "processor")
