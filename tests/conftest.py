"""One test body for both array modules: the fixture `xp` is numpy, and cupy where it has a device."""
import collections
import functools
import gc

import numpy
import pytest

import standin
from tinytoken import backend, plain, random


def pytest_addoption(parser):
    parser.addoption("--standin", action="store_true",
                     help="with -m gpu: run those tests on a stand-in for CuPy (tests/standin.py)")


    parser.addoption("--plain", action="store_true",
                     help="plain operations alone: nothing that is registered beside them runs")


    parser.addoption("--first", action="store_true",
                     help="of each test, the first of its cases alone, mostly the smallest")


def pytest_configure(config):
    for option, context in (("--standin", standin.installed), ("--plain", plain)):
        if config.getoption(option):
            entered = context()
            entered.__enter__()
            config.add_cleanup(functools.partial(entered.__exit__, None, None, None))
    config.addinivalue_line("markers", "gpu: needs CuPy and a CUDA device")
    config.addinivalue_line("markers", "slow: more than a few seconds; .ci/run runs these too")


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    if config.getoption("--first"):
        items[:] = {(item.path, item.originalname): item for item in reversed(items)}.values()
        items.reverse()
    ready, reason = backend.cuda_ready()
    if not ready:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"need a GPU: {reason}"))


def pytest_terminal_summary(terminalreporter):
    """A line for each reason why tests were skipped, and how many."""
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ")
                                  for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped: {count:,} ({reason})")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Each test, and its fixtures before it, start from the same random numbers, whatever ran before in its
    process."""
    random.manual_seed(0)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    return numpy if request.param == "numpy" else backend.module_for("cuda")


@pytest.fixture(scope="module")
def no_collector():
    """Off for a module's tests of lifetimes, with all older objects out of its sight: a collection then takes
    no time."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()
