"""Every kernel compiles for the GPUs of three generations, without spilling registers and without an
instruction of doubles."""
import re

import pytest

import nvrtc
from tinytoken.cuda import launcher

pytestmark = pytest.mark.skipif(nvrtc.library() is None,
                                reason="no NVRTC: pip install 'nvidia-cuda-nvrtc>=13'")
REGISTERS = 64 * 1024  # of a multiprocessor, so the most that a block may have
THREADS = {"bf16_attention": 256, "select": 1024}  # the most that a launch of this family has; of others 512


@pytest.mark.parametrize("family, constants", launcher.families())
@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
def test_compiles_without_spills_and_doubles(family, constants, architecture):
    log, ptx, size = nvrtc.compile_family(family, architecture, constants)
    assert size > 1000 and nvrtc.spills(log) == 0, log
    assert re.findall(r".*\.f64.*", ptx) == []
    assert max(nvrtc.registers(log).values()) * THREADS.get(family, 512) <= REGISTERS
    for kernel in launcher.kernels().values():
        assert kernel.family != family or f".entry {kernel.name}(" in ptx


def test_the_checks_see_doubles_and_errors(monkeypatch):
    text = launcher.source("activation").replace("0.5f * x[i]", "0.5 * x[i]")
    monkeypatch.setattr(launcher, "source", lambda *_: text)
    assert ".f64" in nvrtc.compile_family("activation", "sm_90")[1]
    monkeypatch.setattr(launcher, "source", lambda *_: text.replace("erff", "errf"))
    with pytest.raises(AssertionError, match="errf"):
        nvrtc.compile_family("activation", "sm_90")
    assert nvrtc.spills("24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads") == 48
