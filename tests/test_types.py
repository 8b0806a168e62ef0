"""Type hints: what is public has them, and a type checker finds them true."""
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import tinytoken

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = ("backend", "checking", "cost", "data", "errors", "experiments", "files", "graph", "models", "nn", "random",
          "registry", "tasks", "tensor", "train")


def public_functions():
    """(name, function) of all functions and methods without an underscore that these modules offer."""
    seen = set()
    for module in (tinytoken, *(importlib.import_module(f"tinytoken.{name}") for name in PUBLIC)):
        for name, thing in vars(module).items():
            if name.startswith("_") or not getattr(thing, "__module__", "").startswith("tinytoken"):
                continue
            for function in [thing] if inspect.isfunction(thing) else methods(thing):
                if function not in seen:
                    seen.add(function)
                    yield f"{function.__module__}.{function.__qualname__}", function


def methods(thing):
    members = vars(thing).items() if inspect.isclass(thing) else ()
    return [f for name, f in members if inspect.isfunction(f) and not name.startswith("_")]


def test_what_is_public_says_its_types():
    """At least one hint of an argument or the result: a function without any is not checked."""
    bare = [name for name, function in public_functions()
            if not inspect.unwrap(function).__annotations__ and not INSIDE & set(name.split("."))
            and "<lambda>" not in name]
    assert bare == []


# Hooks that the package calls itself: their arguments are described where they are called.
INSIDE = {"forward", "build", "before_block", "run_block", "encode", "start", "read", "embed", "mask",
          "decide", "draw", "remove", "reduce", "scores", "put_back", "sets", "classify", "take", "loss",
          "noise", "show", "merge", "merged_by", "attend", "gather", "infuse", "attention_branch",
          "mlp_branch", "column"}


def checked(what):
    return subprocess.run([sys.executable, "-m", "mypy", what], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_type_checker_agrees():
    run = checked("tinytoken")
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_a_users_mistake_is_seen(tmp_path):
    """The hints reach who uses the package."""
    script = tmp_path / "script.py"
    script.write_text("import tinytoken as tt\nvit = tt.models.create(3)\ntt.manual_seed('one')\n"
                      "x: int = tt.Tensor([1.0]) * 2\n")
    run = checked(str(script))
    assert run.stdout.count("script.py:") == 3, run.stdout
