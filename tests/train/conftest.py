"""Runs that nothing disturbed, to compare with."""
import pytest

from tiny import bits, dynamicvit, history, train, vit
from tinytoken.train import Run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """{kind: (weights, report, history)} of runs that nothing disturbed."""
    found = {}
    for make in (vit, dynamicvit):
        folder = tmp_path_factory.mktemp(make.__name__)
        model, report = train(make, Run(folder, every=4))
        found[make] = bits(model), report, history(folder)
    return found
