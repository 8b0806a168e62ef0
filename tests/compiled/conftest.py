"""For tests in which the kernels take arrays of any size."""
import pytest


@pytest.fixture
def any_size(monkeypatch):
    from tinytoken.compiled import launcher
    monkeypatch.setattr(launcher, "LEAST", 0)
    assert launcher.why_not() == ""
