"""One test body for both array modules: the fixture `xp` is numpy, and cupy where it has a device."""
import collections
import gc

import numpy
import pytest

import standin
from tinytoken import backend, random


def pytest_addoption(parser):
    parser.addoption("--standin", action="store_true",
                     help="with -m gpu: run those tests on a stand-in for CuPy (tests/standin.py)")


def pytest_configure(config):
    if config.getoption("--standin"):
        pretended = standin.installed()
        pretended.__enter__()
        config.add_cleanup(lambda: pretended.__exit__(None, None, None))
    config.addinivalue_line("markers", "gpu: needs CuPy and a CUDA device")
    config.addinivalue_line("markers", "slow: more than a few seconds; .ci/run runs these too")


def pytest_collection_modifyitems(items):
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
