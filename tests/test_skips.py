"""The last lines of a test run: how many tests were skipped, and why."""
import subprocess
import sys

from tiny import ROOT

TESTS = """import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_kernels(number):
    raise AssertionError("not skipped")

def test_one_more():
    pytest.skip("no compiler")

def test_other():
    pass
"""


def test_a_line_for_each_reason(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text()
                                          + "\nbackend.cuda_ready = lambda: (False, 'none here')\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    for workers in ("0", "2"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers,
                   "-o", f"pythonpath={ROOT} {ROOT / 'tests'}", "-c", "/dev/null",
                   f"--rootdir={tmp_path}", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        lines = [line for line in done.stdout.splitlines() if line.startswith("skipped:")]
        assert lines == ["skipped: 3 (need a GPU: none here)", "skipped: 1 (no compiler)"], done.stdout
        assert done.returncode == 0
