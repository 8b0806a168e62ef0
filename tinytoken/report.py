"""The README's measured parts, made from the committed JSON of lessons/results: nothing that is a result is typed by hand.

A part stands between `<!-- measured: NAME -->` and `<!-- /measured -->`; NAME is a function here that is marked with @part.
"""
import json
import pathlib
import re

from .checkpoint import replacing
from .compare import conditions_text, table_text
from .errors import InputError, expect

PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)", re.DOTALL)
parts = {}


def part(function):
    """Decorator: a function from the folder of results to Markdown, by its name."""
    parts[function.__name__] = function
    return function


def write(root):
    """Rewrite README.md under `root` -> whether anything changed. Errors: InputError for a part or a result that is not there."""
    path = pathlib.Path(root) / "README.md"
    expect(path.exists(), "report", f"no {path}: run it in a checkout, or give its folder")
    before = path.read_text()
    after = render(before, path.parent / "lessons" / "results")
    if after != before:
        with replacing(path, "w") as file:
            file.write(after)
    return after != before


def render(text, results):
    """The text with each measured part made anew from the folder `results`."""
    def made(found):
        opened, name, closed = found.groups()
        expect(name in parts, "report", f"unknown part {name!r}, expected one of {', '.join(parts)}")
        return f"{opened}{parts[name](pathlib.Path(results)).strip()}\n{closed}"
    return PART.sub(made, text)


def load(path):
    """A result's JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"report: cannot read the result {path}: {error}") from error


def comparison(results, name):
    """The comparisons NAME_seed*.json, which may differ in nothing but their seed -> (their tables, as Markdown with conditions)."""
    tables = [load(path) for path in sorted(results.glob(f"{name}_seed*.json"))]
    expect(tables, "report", f"no {name}_seed*.json in {results}")
    expect(all(t["recipe"] | {"seed": 0} == tables[0]["recipe"] | {"seed": 0} for t in tables), "report",
           f"the recipes of {name}_seed*.json differ in more than their seed")
    return tables, f"{table_text(*tables)}\n\n{conditions_text(*tables)}"


@part
def scenes(results):
    tables, text = comparison(results, "compare_scenes")
    seconds, megabytes = ([t["this_call"][key] for t in tables] for key in ("seconds", "peak_memory_mb"))
    return (f"{text}\nThe whole command took {min(seconds):.0f} to {max(seconds):.0f} s there "
            f"and at most {max(megabytes)} MB of memory.")


@part
def cifar10(results):
    return comparison(results, "compare_cifar10")[1]


@part
def longer(results):
    table = load(results / "scenes_1500_steps.json")
    vit, dynamic, lookup = (f"{100 * row['accuracy']:.1f}" for row in table["rows"][:3])
    recipe = table["recipe"]
    return (f"LookupViT is behind the ViT here because it learns later: with three times the steps (`--steps {recipe['steps']}`, "
            f"seed {recipe['seed']} alone) ViT, DynamicViT and LookupViT reach {vit}, {dynamic} and {lookup} %.")
