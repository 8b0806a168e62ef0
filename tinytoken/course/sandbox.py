"""The command that starts a submission's process in bubblewrap: Python and the system's libraries can be
read there, and nothing else; nothing can be written; there are no other processes and no network."""
import functools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")


def command(program: Sequence[str], shown: Sequence[pathlib.Path] = (),
            hidden: Sequence[pathlib.Path] = ()) -> list[str]:
    """The command line that runs `program`, Python and its arguments, in bubblewrap.

    shown: files and folders that it may read as well; hidden: folders that it may not, should they lie among
    what it reads, but for what is shown in them.
    """
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for name in SYSTEM:
        path = pathlib.Path(name)
        if path.is_symlink():  # /lib is usr/lib where systems are merged
            words += ["--symlink", os.readlink(path), name]
        elif path.exists():
            words += ["--ro-bind", name, name]
    own = [pathlib.Path(sys.base_prefix), pathlib.Path(sys.prefix), pathlib.Path(np.__file__).parents[1]]
    there = [pathlib.Path(name) for name in SYSTEM]
    for path in dict.fromkeys(own):
        if not any(path.is_relative_to(other) for other in there):
            words += ["--ro-bind", str(path), str(path)]
            there.append(path)
    for path in hidden:
        if any(path.is_relative_to(other) for other in there):
            words += ["--tmpfs", str(path)]
    for path in shown:
        words += ["--ro-bind", str(path), str(path)]
    return [*words, "--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/", *program]


@functools.cache
def missing() -> str:
    """Why there is no sandbox here: "bubblewrap is not installed", say; "" where it works, which is tried."""
    if sys.platform != "linux":
        return "bubblewrap is for Linux only"
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    try:
        tried = subprocess.run(command([sys.executable, "-I", "-c", "import numpy"]), capture_output=True,
                               encoding="utf-8", errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not work here: {error}"
    said = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return "" if tried.returncode == 0 else f"bubblewrap does not work here: {said}"
