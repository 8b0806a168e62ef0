"""What a submission may contain: checked in its syntax before any of it runs, and again while it runs.

An exercise needs arithmetic, arrays and functions of its own. It needs no files, no processes, no code made
from text and none of Python's internals: with those it could read the tests, or change what checks it. These
rules stop honest mistakes and simple tricks, no more: strangers' code belongs in the sandbox (sandbox.py).
"""
import ast
import builtins
import re
import types
from collections.abc import Callable
from typing import Any

from . import statements
from .assignment import Assignment

# Builtins that read or make files, code, or names that are only known at run time.
FORBIDDEN = {"open", "input", "exec", "eval", "compile", "breakpoint", "memoryview",
             "globals", "locals", "vars", "dir", "getattr", "setattr", "delattr",
             "help", "exit", "quit", "copyright", "credits", "license",
             "__import__", "__builtins__", "__loader__", "__spec__"}
# Attributes that lead from a value to files, memory, other modules or the interpreter.
OUTSIDE = {"os", "sys", "subprocess", "ctypes", "ctypeslib",
           "testing", "lib", "f2py", "distutils", "core", "_core",
           "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "DataSource",
           "save", "savez", "savez_compressed", "savetxt", "tofile", "dump", "dumps",
           "format_map", "setflags", "data_as"}
# Those of frames, code, tracebacks and generators: frame.f_globals; a student's own f_mean is none of them.
INSIDE = {name for kind in (types.FrameType, types.CodeType, types.TracebackType, types.GeneratorType,
                            types.CoroutineType, types.AsyncGeneratorType)
          for name in dir(kind) if name.startswith(("f_", "co_", "tb_", "gi_", "cr_", "ag_"))}
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
# Names of Python's own that a submission may use all the same.
DUNDERS = {"__init__", "__call__", "__name__", "__doc__", "__len__", "__getitem__", "__setitem__", "__iter__",
           "__contains__", "__repr__", "__str__", "__float__", "__neg__", "__abs__", "__eq__", "__ne__",
           "__lt__", "__le__", "__gt__", "__ge__", "__hash__",
           *(f"__{side}{name}__" for name in OPERATORS for side in ("", "r", "i"))}
# A field that reads a name of Python's own: "{0.__class__}".
FIELD = re.compile(r"\{[^}]*__")
# What catches the error of a missing module.
MISSING = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


def breaches(source: str, assignment: Assignment,
             place: Callable[[int], str] = "line {}".format) -> dict[str | None, list[str]]:
    """Why a submission, or some of its exercises, is refused: {exercise number: ["line 3: ...", ...]}.

    Under None is what concerns the whole file: a syntax error, and what is run for every exercise.
    place: how a line of the source is named.
    """
    try:
        tree = ast.parse(source)
        compile(tree, assignment.script, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError as error:
        return {None: [f"{place(error.lineno or 1)}: {error.msg}"]}
    except ValueError as error:  # a null byte
        return {None: [f"the file cannot be read: {error}"]}
    parts = statements.read(tree)
    numbers = [exercise.number for exercise in assignment.exercises]
    runs = {number: set(map(id, taken(parts, assignment, number)[0])) for number in numbers}
    nodes, _ = taken(parts, assignment, None)
    modules = _modules(nodes)
    lines: dict[str | None, list[str]] = {}
    for statement in nodes:
        users: list[str | None] = [number for number in numbers if id(statement) in runs[number]]
        for line, reason in _refusals(statement, modules, assignment):
            for number in users if 0 < len(users) < len(numbers) else [None]:
                lines.setdefault(number, []).append(f"{place(line)}: {reason}")
    return lines


def taken(parts: list[statements.Statement], assignment: Assignment,
          number: str | None) -> tuple[list[ast.stmt], set[str]]:
    """(what is run for exercise `number`, the names that solve the others); None: for all exercises together.

    A submission is a student's file as it is: beside the solutions it may train, print and try things out,
    and none of that may cost a point. What solves other exercises, and nothing of this one, is not run.
    Imports, functions, classes and lambdas are, but for those that break the rules and that the exercise does
    not need: a plot may import what it likes. Any other statement (EPS = np.finfo(float).eps, a try with
    imports, a loop that fills a table) is run if the exercise needs it: if it binds a name that its functions
    look up, or what these call. So is a constant of any function that keeps the rules and is made without the
    submission's own functions. weights = train() is run for an exercise that uses these weights, else not.
    """
    solving = {name for exercise in assignment.exercises if number in (None, exercise.number)
               for name in exercise.names}
    others = {name for exercise in assignment.exercises for name in exercise.names} - solving
    parts = [each for each in parts if each.binds & solving or not each.binds & others]
    modules = _modules([each.node for each in parts])
    refused = {id(each) for each in parts if _refusals(each.node, modules, assignment)}
    broken = statements.users(parts, set().union(*(
        each.binds for each in parts if id(each) in refused and not isinstance(each.node, ast.Expr))))
    needed = statements.needed(parts, solving)
    # what binds nothing is import *: no one knows who needs it
    definitions = [each for each in parts if statements.defines(each.node)
                   and (each.binds & needed or not each.binds
                        or id(each) not in refused and not each.uses_now & broken)]
    needed = statements.needed(parts, solving.union(*(each.uses_now for each in definitions)))
    used = statements.needed(parts, set().union(*(each.uses for each in definitions)))
    kept = set(map(id, definitions))
    known = set(dir(builtins))  # names with a value that no function of the submission has made
    nodes = []
    for each in parts:
        wanted = bool(each.binds & needed)
        constant = (not statements.defines(each.node) and each.uses <= known and each.binds & used
                    and id(each) not in refused)
        if isinstance(each.node, ast.Expr) and not constant:  # x.append(1) may be needed, x.dump("x") is not
            wanted = wanted and id(each) not in refused
        if id(each) in kept or constant or wanted:
            nodes.append(each.node)
            if constant or isinstance(each.node, (ast.Import, ast.ImportFrom)):
                known |= each.binds
    return nodes, others


def _modules(nodes):
    """{name: dotted name} of all that is imported in these statements."""
    return {name: dotted for each in nodes for node in ast.walk(each) for name, dotted, _ in _imported(node)}


def _refusals(statement, modules, assignment):
    """[(line, why it is refused)] of a statement."""
    excused, own = _excused(statement), _own_names(statement)
    return sorted({(node.lineno, reason) for node in ast.walk(statement)
                   for reason in (*_import_reasons(node, assignment, node in excused),
                                  *_reasons(node, modules, assignment, own))})


def _own_names(statement):
    """The arguments and variables of a statement, which may be called `input` or `dir` like a builtin. If one
    is not set where it is read, there is no such name: the submission does not have these builtins."""
    return {node.arg if isinstance(node, ast.arg) else node.id for node in ast.walk(statement)
            if isinstance(node, ast.arg) or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _imported(node):
    """(name here, its dotted name, alias) of each name that an import brings; nothing for other nodes."""
    for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
        first = alias.name.split(".")[0]
        if isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, f"{'.' * node.level}{node.module or ''}.{alias.name}", alias
        elif alias.asname:
            yield alias.asname, alias.name, alias
        else:
            yield first, first, alias


def _import_reasons(node, assignment, excused):
    for _, dotted, alias in _imported(node):
        fails = excused and dotted.split(".")[0] not in roots(assignment)
        if not importable(node, alias, assignment) and not fails:
            yield f"may not import {alias.name if isinstance(node, ast.Import) else dotted}"


def _excused(statement):
    """The imports that a file can do without: those in a `try` that catches what a missing module raises."""
    def catches(handler):
        return handler.type is None or MISSING & {name.id for name in ast.walk(handler.type)
                                                  if isinstance(name, ast.Name)}
    return {node for each in ast.walk(statement) if isinstance(each, ast.Try)
            and any(map(catches, each.handlers)) for inner in each.body for node in ast.walk(inner)
            if isinstance(node, (ast.Import, ast.ImportFrom))}


def roots(assignment: Assignment) -> list[str]:
    """The packages that a submission may import from, by their first names."""
    names = {"__future__", *(name.split(".")[0] for name in assignment.imports)}
    return sorted(names | {"tinytoken"} if assignment.tinytoken else names)


def importable(node: ast.Import | ast.ImportFrom, alias: ast.alias, assignment: Assignment) -> bool:
    """Whether the assignment allows one name of an import statement."""
    if isinstance(node, ast.ImportFrom):
        if node.level or alias.name == "*" or alias.name in OUTSIDE:
            return False
        return (node.module in ("__future__", *assignment.imports)
                or allowed(f"{node.module}.{alias.name}", assignment))
    return alias.name in assignment.imports or (alias.name == "tinytoken" and bool(assignment.tinytoken))


def allowed(dotted: str, assignment: Assignment) -> bool:
    """Whether a dotted name of the package is one that the assignment lists, leads to one, or lies in one."""
    return any(dotted == name or name.startswith(dotted + ".") or dotted.startswith(name + ".")
               for name in (f"tinytoken.{name}" for name in assignment.tinytoken))


def _reasons(node, modules, assignment, own):
    if isinstance(node, ast.Name) and node.id in FORBIDDEN and (node.id not in own
                                                                 or node.id.startswith("__")):
        yield f"may not use {node.id}"
    if isinstance(node, ast.Attribute):
        if _leads_out(node.attr):
            yield f"may not use .{node.attr}"
        root, dot, rest = (_chain(node) or "").partition(".")
        if root in modules:
            whole = modules[root] + dot + rest
            if whole.startswith("tinytoken") and not allowed(whole, assignment):
                yield f"may not use {whole}"
            if isinstance(node.ctx, (ast.Store, ast.Del)):
                yield f"may not change {whole}"
    if isinstance(node, ast.MatchClass):  # case X(name=y) reads an attribute as well
        yield from (f"may not use .{name}" for name in node.kwd_attrs if _leads_out(name))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and FIELD.search(node.value):
        yield "may not format a text with names of Python's own"


def _leads_out(name):
    pythons = name.startswith("__") and name.endswith("__")  # __private is a student's own
    return name in OUTSIDE or name in INSIDE or pythons and name not in DUNDERS


def _chain(node):
    """"a.b.c" of nested attributes of a name, None of others."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None
