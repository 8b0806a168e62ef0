"""Ends processes with all that they have started, also what has left their group."""
import os
import pathlib
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def adopt_orphans() -> None:
    """Linux: whatever a child of this process leaves behind becomes its child, and so a descendant.

    No effect elsewhere.
    """
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """The living processes that `pid` has started, and those that they have; none where there is no /proc."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it has just ended
            continue
        if state not in "ZX":
            parents[int(path.parent.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def end_tree(process: subprocess.Popen, root: int, seconds: float = 5.0) -> None:
    """End all descendants of the process id `root`, then `process`, which leads a group, and that group.

    While they start others faster than these are ended, it tries for so many seconds.
    """
    until, empty = time.monotonic() + seconds, 0
    # One look at /proc may miss a process: its parent was gone already, and itself not yet there. The next
    # one sees it.
    while empty < 2 and time.monotonic() < until:
        below = descendants(root)
        empty = 0 if below else empty + 1
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # gone already
                pass
        time.sleep(0.01)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):  # gone already; Windows has no groups
        process.kill()
