"""Which statements of a submission are run: what a right solution may need, and not what it tries out."""
import ast
import builtins
import types

import numpy as np
import pytest

from tinytoken.course import assignment, rules, statements

A1 = assignment.find("a1")
SOLVED = (A1.folder / A1.script).read_text(encoding="utf-8")


def run_for(number, source):
    """The names after the statements that are run for an exercise."""
    assert rules.breaches(source, A1) == {}
    nodes, _ = rules.taken(statements.read(ast.parse(source)), A1, number)

    def known(module, *rest):
        if module.split(".")[0] not in ("numpy", "math", "__future__"):
            raise ModuleNotFoundError(module)
        return __import__(module, *rest)
    space = {"__name__": "submission", "__builtins__": vars(builtins) | {"__import__": known}}
    exec(compile(ast.Module(nodes, []), "submission", "exec", dont_inherit=True), space)
    return types.SimpleNamespace(**space)


# what stands above, and an expression for a number that comes out as 1e-12 or less
RIGHT = {
    "annotated": ("EPS: float = 1e-12", "EPS"),
    "computed": ("EPS = 10**-12", "EPS"),
    "from two constants": ("DIGITS = 12\nEPS = 10.0**-DIGITS", "EPS"),
    "a call": ("EPS = np.finfo(float).eps", "EPS"),
    "a generator of numbers": ("RNG = np.random.default_rng(0)", "1e-13 * RNG.random()"),
    "a generator expression": ("PARTS = tuple(1e-13 * i for i in range(3))", "PARTS[1]"),
    "a generator function": ("def parts():\n    yield 1e-13", "next(parts())"),
    "an alias of NumPy": ("total = np.sum", "1e-13 * total(np.ones(3))"),
    "an alias of a function": ("def half(x):\n    return x / 2\nsmaller = half", "smaller(1e-12)"),
    "an alias of a class": ("class Box:\n    eps = 1e-12\nThing = Box", "Thing().eps"),
    "an own function's table": ("def table(n):\n    return [1e-13] * n\nTABLE = table(3)", "TABLE[2]"),
    "a table of a table": ("def table(n):\n    return [1e-13] * n\nA = table(3)\nB = table(2) + A\n"
                           "C = table(1) + B", "C[5]"),
    "a list that grows": ("TABLE = []\nTABLE.append(1)\nfor i in range(3):\n    TABLE.append(i * 1e-13)",
                          "TABLE[2]"),
    "an own function's list": ("def table(n):\n    return [1e-13] * n\nTABLE = table(0)\n"
                               "TABLE.extend(table(2))", "TABLE[1]"),
    "a function's attribute": ("def small():\n    small.calls += 1\n    return 1e-13\nsmall.calls = 0",
                               "small()"),
    "a table filled in a loop": ("TABLE = {}\nfor i in range(3):\n    TABLE[i] = 1e-13 * i", "TABLE[1]"),
    "a table filled at its places": ("TABLE = np.ones(3)\nTABLE[1] = 1e-13", "TABLE[1]"),
    "in steps": ("EPS = 1e-6\nEPS *= 1e-6", "EPS"),
    "one of several": ("EPS, BIG = 1e-12, 10**6", "EPS"),
    "by a condition": ("if np.finfo(float).bits == 64:\n    EPS = 1e-12\nelse:\n    EPS = 1e-6", "EPS"),
    "within a context": ("with np.errstate(all='ignore'):\n    EPS = np.exp(-30.0)", "EPS"),
    "a default": ("EPS = 1e-6 ** 2\ndef small(x, eps=EPS):\n    return eps", "small(3)"),
    "a class's own": ("EPS = 1e-6 ** 2\nclass Box:\n    eps = EPS", "Box.eps"),
    "a decorator": ("def twice(f):\n    return lambda x: f(f(x))\nwrap = twice\n@wrap\ndef small(x):\n"
                    "    return 1e-6 * x", "small(1)"),
    "a walrus": ("PAIR = (EPS := 1e-12, 1)", "EPS"),
    "a try for an import": ("try:\n    import numpy as xp\nexcept ImportError:\n    xp = None",
                            "1e-13 * xp.ones(1)[0]"),
    "a try for what is not allowed": ("try:\n    import torch\nexcept ImportError:\n    torch = None",
                                      "1e-13 if torch is None else 1"),
    "a try within a function": ("def small():\n    try:\n        from scipy import special\n    except "
                                "(ImportError, OSError):\n        return 1e-13", "small()"),
    "a lambda": ("small = lambda x: 1e-13 * x", "small(1)"),
    "an annotated lambda": ("small: object = lambda x: 1e-13 * x", "small(1)"),
    "a global counter": ("CALLS = 0\ndef count():\n    global CALLS\n    CALLS += 1\n    return CALLS",
                         "1e-13 * count()"),
    "a counter that is not read": ("def zero():\n    return 0\nCALLS = zero()\ndef count():\n"
                                   "    global CALLS\n    CALLS += 1\n    return 1e-13", "count()"),
    "names in Greek": ("ε = 10**-12", "ε"),
}


@pytest.mark.parametrize("above, small", RIGHT.values(), ids=RIGHT.keys())
def test_a_right_solution_gets_what_it_needs(above, small):
    head = "def softmax_vjp(p, g):\n"
    source = SOLVED.replace(head, f"{above}\n\n\n{head}    added = {small}\n")
    source = source.replace("return p * (g -", "return added + p * (g -")
    p, g = np.array([0.25, 0.75]), np.array([1.0, 0.0])
    found = run_for("1.6", source).softmax_vjp(p, g)
    assert np.abs(found - p * (g - 0.25)).max() <= 1e-11 and found[0] != p[0] * 0.75
    run_for("1.1", source)


def test_annotations_may_be_postponed():
    annotated = SOLVED.replace("def softmax_vjp(p, g):", "def softmax_vjp(p: Array, g: Array) -> Array:")
    source = f"from __future__ import annotations\n{annotated}"
    assert run_for("1.6", source).softmax_vjp(np.array([1.0]), np.array([2.0])) == 0


TRIED_OUT = """
weights = Node(softmax(np.ones(3)))
learned = train(weights, None)
data = open("scenes.txt").read()
table = np.load("scenes.npy")
later = learned + 1
count = train(1, 2)
count += 1
def show():
    return weights, learned, data, table, later, count
for step in range(10):
    learned = train(learned, step)
if learned:
    import torch
try:
    import jax
except ImportError:
    raise SystemExit("no jax")
np.core = None
np.random.dump("scenes")
x = matmul_vjp(weights, weights, weights)
print(x)
x.sum()
if __name__ == "__main__":
    import tinytoken
"""


def test_what_is_tried_out_is_not_run_and_costs_nothing():
    for number in ("1.1", "1.6", None):
        assert not vars(run_for(number, SOLVED + TRIED_OUT)).keys() & {
            "weights", "learned", "data", "table", "later", "step", "count", "torch", "jax", "x", "tinytoken"}


def test_what_a_test_may_ask_for_is_there_though_the_exercise_does_not_need_it():
    source = SOLVED.replace("dtype=float", "dtype=FLOAT") + "BYTES = 8\nFLOAT = np.dtype(f'f{BYTES}')\n"
    ready = run_for("1.4", source + "first = lambda x: x\nsecond: object = lambda x: x\n")
    assert not hasattr(run_for("1.4", source + "from math import floor as order\n"), "order")
    assert ready.Node([1, 2]).value.dtype == np.float64 and ready.first(1) == ready.second(1)


def test_what_saves_a_constant_is_no_part_of_it():
    above = "import math\nimport numpy as np\nEPS = np.full(3, 1e-5)\nEPS.dump('x')\n"
    source = SOLVED.replace("eps=1e-5", "eps=EPS[0]").replace("import math\n", above)
    assert run_for("1.7", source).layer_norm(np.array([1.0, 3.0]))[1] > 0.99


def test_what_an_exercise_needs_is_run_for_it_alone():
    source = SOLVED.replace("    return p * (g -", "    return scale * p * (g -")
    source += "scale = unbroadcast(np.ones(3), (1,))\n"
    assert not hasattr(run_for("1.1", source), "scale")
    nodes, others = rules.taken(statements.read(ast.parse(source)), A1, "1.6")
    assert any(ast.unparse(node).startswith("scale =") for node in nodes)
    assert "unbroadcast" in others and not any(getattr(node, "name", "") == "unbroadcast" for node in nodes)


@pytest.mark.parametrize("name, numbers", [("softmax_vjp", ["1.6"]), ("softmax", [])])
def test_what_the_rules_refuse_costs_who_needs_it(name, numbers):
    source = SOLVED.replace(f"def {name}(", f"def {name}(*_, table=None):\n    return TABLE\ndef unused(", 1)
    refused = rules.breaches(source + "TABLE = np.load('x')\n", A1)
    assert list(refused) == numbers
    refused = rules.breaches(source + "import torch as TABLE\n", A1)
    assert list(refused) == numbers


# what stands in the file, and breaks the rules or seems to; no exercise needs it
UNNEEDED = {
    "a plot": "import matplotlib.pyplot as plt\nfrom time import time\nplt.plot([1])\n",
    "a function that plots": "def plot(x):\n    import matplotlib.pyplot as plt\n    plt.plot(open(x))\n",
    "a function that uses what was imported": "import torch\ndef f(x):\n    return torch.tensor(x)\n",
    "a decorator": "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n",
    "an own decorator": ("import torch\ndef wrap(f):\n    return torch.compile(f)\n"
                         "@wrap\ndef f():\n    pass\n"),
    "a default of a default": ("import torch\nX = torch.zeros(1)\ndef f(x=X):\n    pass\n"
                               "def g(x=f()):\n    pass\n"),
    "a name from Python's insides": (
        "class Sub(Node):\n    def copy(self):\n        return self.__class__(1)\n"),
}


@pytest.mark.parametrize("text", UNNEEDED.values(), ids=UNNEEDED.keys())
def test_what_breaks_the_rules_and_is_not_needed_costs_nothing(text):
    for number in ("1.1", "1.6", None):
        assert "softmax" in vars(run_for(number, SOLVED + text))


@pytest.mark.parametrize("text", ["softmax_vjp, unbroadcast = made()\n",
                                  "if math.pi:\n    softmax_vjp, unbroadcast = made()\n"])
def test_a_statement_that_solves_two_exercises_is_run_for_both(text):
    source = SOLVED.replace("def softmax_vjp(", "def old(").replace("def unbroadcast(", "def older(")
    source += f"def made():\n    return old, older\n{text}"
    for number, name in (("1.6", "softmax_vjp"), ("1.4", "unbroadcast")):
        assert callable(vars(run_for(number, source))[name])
    assert not hasattr(run_for("1.1", source), "softmax_vjp")


def test_a_missing_name_may_be_one_that_breaks_the_rules():
    source = SOLVED.replace("class Node:\n", "class Node:\n    kind = open\n")
    assert list(rules.breaches(source, A1)) == ["1.1"]
    assert not any(getattr(node, "name", "") == "Node"
                   for node in rules.taken(statements.read(ast.parse(source)), A1, "1.2")[0])


# right code that only looks as if it broke the rules
HARMLESS = {
    "arguments and variables named like builtins": (
        "def total(input, *dir, **vars):\n    help = input.sum()\n    return help + len(dir)\n"),
    "a loop's and a comprehension's": (
        "def f(x):\n    for exit in x:\n        pass\n    return [dir for dir in x]\n"),
    "a class's private names": ("class Walk:\n    def __init__(self):\n        self.__done = 0\n"
                                "    def __next(self):\n        return self.__done\n"),
    "names that begin like a frame's": "class Norm:\n    def f(self, x):\n        self.f_mean = x.co_std\n",
    "operators by their names": (
        "Node.__radd__ = lambda a, b: a\ndef f(a, b):\n    return a.__matmul__(b).__sub__(a)\n"),
    "a text with braces and a name": 'def f():\n    """Like __init__: \\\\frac{a}{b}, {1, 2}."""\n',
    "parts of NumPy": ("import numpy.typing as npt\nfrom numpy.linalg import norm\n"
                       "import numpy.random\ndef f(x: npt.NDArray):\n    return norm(x)\n"),
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_only_looks_forbidden_is_allowed(text):
    nodes, _ = rules.taken(statements.read(ast.parse(SOLVED + text)), A1, "1.6")
    taken = set(map(ast.dump, nodes))
    assert all(ast.dump(node) in taken for node in ast.parse(text).body)
    head = "def softmax_vjp(p, g):\n"
    first = next(name for node in ast.parse(text).body for name in [getattr(node, "name", "Node")]
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    assert rules.breaches(SOLVED.replace(head, f"{head}    {first}\n") + text, A1) == {}


@pytest.mark.parametrize("text, said", [
    ("def f(x, input):\n    return open(x)\n", "may not use open"),
    ("def f(x, __builtins__=1):\n    return __builtins__\n", "may not use __builtins__"),
    ("def f(x):\n    return x.f_globals\n", "may not use .f_globals"),
    ("def f(x):\n    return x.gi_frame.f_back\n", "may not use .f_back"),
    ("def f(x):\n    return x.__init__.__globals__\n", "may not use .__globals__"),
    ("def f(x):\n    return '{0[0]:{1.__class__}}'.format(x)\n", "may not format"),
    ("import numpy.testing as f\n", "may not import numpy.testing")])
def test_what_leads_out_is_refused_still(text, said):
    head = "def softmax_vjp(p, g):\n"
    refused = rules.breaches(SOLVED.replace(head, f"{head}    f\n") + text, A1)
    assert list(refused) == ["1.6"] and said in "".join(refused["1.6"])


@pytest.mark.parametrize("text, said", [
    ("try:\n    import numpy.lib as small\nexcept ImportError:\n    small = 1\n", "may not import numpy.lib"),
    ("try:\n    import torch as small\nexcept KeyError:\n    small = 1\n", "may not import torch"),
    ("try:\n    small = 1\nexcept ImportError:\n    import torch as small\n", "may not import torch"),
    ("try:\n    from numpy import testing as small\nexcept:\n    small = 1\n",
     "may not import numpy.testing")])
def test_a_try_allows_no_import_that_would_be_found(text, said):
    source = SOLVED.replace("def softmax_vjp(p, g):\n", f"{text}\ndef softmax_vjp(p, g):\n    small\n")
    assert said in rules.breaches(source, A1)["1.6"][0]


@pytest.mark.parametrize("source, said", [
    ("a = 1\nreturn a\n", "line 2: 'return' outside function"),
    ("def f(a, a):\n    pass\n", "line 1: duplicate argument 'a' in function definition")])
def test_what_only_the_compiler_refuses_has_its_line(source, said):
    assert rules.breaches(source, A1) == {None: [said]}
