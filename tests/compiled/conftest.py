"""The kernels take arrays of any size here; without Numba these tests are skipped."""
import pytest

pytest.importorskip("numba", exc_type=ImportError)


@pytest.fixture
def any_size(monkeypatch):
    from tinytoken.compiled import launcher
    monkeypatch.setattr(launcher, "LEAST", 0)
    assert launcher.why_not() == ""
