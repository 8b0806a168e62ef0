"""Kill ranks of a training at random moments: does everything end, and does the run go on to the same bits?

    python tests/benchmarks/kills.py [--kills N] [--ranks N] [--jobs N] [--minutes N] [--seed N]
                                     [--out FILE.json]

A kill: a training of 20 steps with a checkpoint every 4 is started under mpiexec, one of its ranks, drawn at
random, gets SIGKILL at a moment drawn from the time that an undisturbed run takes, its beginning included, and
all its processes have LIMIT seconds to end. Then the same command goes on, and its weights are compared with
the undisturbed run's, bit by bit. So many jobs go on at once; after so many minutes, or
on Ctrl-C, what was seen by then is counted.
"""
import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import signal
import sys
import tempfile
import time

import numpy as np
import tqdm

import ranked
from tinytoken.course.processes import descendants
from tinytoken.experiments.timing import machine
from tinytoken.files import check_target, write_json

LIMIT = 10  # seconds in which all processes of a run have to end
PAUSE = "0.2"  # seconds before each step: a step of so small a model would be over before it is hit
SLOWEST = 600  # seconds that a run may take on a busy machine


def rank_of(pid):
    """Which rank a process is, or None: what the launcher has told it."""
    try:
        words = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        told = dict(word.split(b"=", 1) for word in words if b"=" in word)
        return int(told[b"PMI_RANK"]) if b"python" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, KeyError, ValueError):
        return None


def kill(process, rank, moment):
    """Kill that rank so many seconds from now -> the seconds until all was ended; None where the run was over
    before."""
    time.sleep(moment)
    until = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < until:
        below = descendants(process.pid)
        victims = [pid for pid in below if rank_of(pid) == rank]
        if victims:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(victims[0], signal.SIGKILL)
            began = time.monotonic()
            for _ in range(int(LIMIT / 0.01)):  # turns, not a clock, which goes on while a machine is stopped
                if process.poll() is not None and not any(map(alive, below)):
                    return time.monotonic() - began
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return float("inf")
        time.sleep(0.01)
    return None


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def trial(count, rank, moment, folder, expected):
    """One kill, and the run that goes on after it."""
    folder.mkdir()
    process = ranked.started(count, "slow", folder, PAUSE)
    seconds = kill(process, rank, moment)
    ranked.ended(process, SLOWEST)
    steps = (folder / "history.jsonl").exists() and (folder / "history.jsonl").read_text().count("\n")
    code, _, err = ranked.ranks(count, "slow", folder, PAUSE, seconds=SLOWEST)
    same = code == 0 and (folder / "end.json").read_bytes() == expected
    return {"rank": rank, "moment": round(moment, 3), "logged": int(steps), "same_bits": same,
            "seconds_to_end": seconds and round(seconds, 2), **({} if same else {"said": err[-500:]})}


def undisturbed(count, folder):
    """A run that nobody kills -> its seconds."""
    folder.mkdir()
    began = time.monotonic()
    code, _, err = ranked.ranks(count, "slow", folder, PAUSE, seconds=SLOWEST)
    if code:
        sys.exit(err)
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=24 * 60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if ranked.missing():
        sys.exit(ranked.missing())
    if options.out:
        check_target(options.out, ".json")
    until = time.monotonic() + 60 * options.minutes
    rng, rows = np.random.default_rng(options.seed), []
    draws = [(int(rng.integers(options.ranks)), float(rng.uniform())) for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        spans = list(pool.map(undisturbed, [options.ranks] * options.jobs,
                              [pathlib.Path(name, f"whole-{i}") for i in range(options.jobs)]))
        span, expected = max(spans), pathlib.Path(name, "whole-0", "end.json").read_bytes()
        jobs = [pool.submit(trial, options.ranks, rank, share * span, pathlib.Path(name, str(i)), expected)
                for i, (rank, share) in enumerate(draws)]
        with contextlib.suppress(KeyboardInterrupt):
            for job in tqdm.tqdm(concurrent.futures.as_completed(jobs), total=len(jobs)):
                rows.append(job.result())
                if time.monotonic() > until:
                    break
        pool.shutdown(cancel_futures=True)
    hit = [row for row in rows if row["seconds_to_end"] is not None]
    found = {"kills": len(hit), "over_before": len(rows) - len(hit), "ranks": options.ranks,
             "jobs": options.jobs, "seed": options.seed,
             "hung": sum(row["seconds_to_end"] > LIMIT for row in hit),
             "other_bits": sum(not row["same_bits"] for row in rows),
             "longest_to_end": max((row["seconds_to_end"] for row in hit), default=None),
             "before_the_first_logged_step": sum(not row["logged"] for row in hit)}
    print(found)
    if options.out:
        write_json(options.out, found | {"machine": machine("cpu", here=False), "rows": rows})
    return int(found["hung"] or found["other_bits"])


if __name__ == "__main__":
    sys.exit(main())
