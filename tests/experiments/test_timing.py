"""Speeds in turns, and the machine that they were measured on."""
import sys
import types

import numpy as np
import pytest

from tinytoken.experiments import timing


def test_machine_names_the_settings_that_decide_speed(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.setenv("SECRET", "x")
    found = timing.machine("cpu")
    assert found["environment"]["OPENBLAS_NUM_THREADS"] == "7" and "SECRET" not in found["environment"]
    monkeypatch.setitem(sys.modules, "tinytoken.compiled.kernels", None)
    assert timing.machine("cpu")["compiled"]
    monkeypatch.delitem(sys.modules, "tinytoken.compiled.kernels")
    assert not timing.machine("cpu")["compiled"]
    monkeypatch.setattr(timing.pathlib.Path, "exists", lambda self: False)
    assert "compiled" not in timing.machine("cpu", here=False)
    assert timing.machine("cpu")["processor"]  # a system without /proc/cpuinfo


def test_peak_memory_is_in_megabytes_everywhere(monkeypatch):
    assert 20 < timing.peak_memory() < 5000
    usage = types.SimpleNamespace(RUSAGE_SELF=0,
                                  getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3_000_000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for system, megabytes in (("Linux", 3072), ("Darwin", 3)):  # kilobytes here, bytes there
        monkeypatch.setattr(timing.platform, "system", lambda system=system: system)
        assert timing.peak_memory() == megabytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert timing.peak_memory() is None


def test_peak_of_arrays_is_beyond_what_was_there():
    there = np.ones(2_000_000)
    for size in (0, 250_000, 1_000_000):
        assert timing.peak_of_arrays(lambda: there[:size] + 1) - 8e-6 * size == pytest.approx(0, abs=0.1)


def test_images_per_second_takes_turns_and_leaves_out_the_first(monkeypatch):
    clock, calls = [0.0], []
    durations = {"slow": iter([100, 2, 4, 8]), "fast": iter([100, 1, 0.5, 0.25])}

    def fake(model, images, threads, **call):
        calls.append((model, len(images), threads, call))
        clock[0] += next(durations[model])
    monkeypatch.setattr(timing, "infer", fake)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    ways = {"a": ("slow", {}), "b": ("fast", {"mean_of_heads": True})}
    found = timing.images_per_second(ways, np.zeros((10, 3)), threads=4, rounds=3)
    assert found == {"a": [2.5, 1.2, 5.0], "b": [20.0, 10.0, 40.0]}
    assert calls == [("slow", 10, 4, {}), ("fast", 10, 4, {"mean_of_heads": True})] * 4
