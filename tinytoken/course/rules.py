"""What a submission may contain: checked in its syntax before any of it runs, and again while it runs.

An exercise needs arithmetic, arrays and functions of its own. It needs no files, no processes, no code made
from text and none of Python's internals: with those it could read the tests, or change what checks it. These
rules stop honest mistakes and simple tricks, no more: strangers' code belongs in the sandbox (sandbox.py).
"""
import ast
from collections.abc import Collection
from typing import Any

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
FRAMES = ("__", "tb_", "gi_", "cr_", "ag_", "f_", "co_")  # how the names of the interpreter's internals begin
DUNDERS = {"__init__", "__call__", "__name__", "__doc__", "__len__", "__getitem__", "__add__", "__mul__",
           "__neg__"}  # those that a submission may use all the same


def breaches(source: str, assignment: Assignment) -> dict[str | None, list[str]]:
    """Why a submission, or some of its exercises, is refused: {exercise number: ["line 3: ...", ...]}.

    Under None is what concerns the whole file: a syntax error, and what lies in no exercise's function.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return {None: [f"line {error.lineno}: {error.msg}"]}
    except ValueError as error:  # a null byte
        return {None: [f"the file cannot be read: {error}"]}
    solves = {name: exercise.number for exercise in assignment.exercises for name in exercise.names}
    taken = [statement for statement in tree.body if is_taken(statement)]
    modules = {name: dotted for statement in taken for node in ast.walk(statement)
               for name, dotted, _ in _imported(node)}
    lines: dict[str | None, list[str]] = {}
    for reasons_of in (_import_reasons, _reasons):
        for statement in taken:
            nodes: Any = ast.walk(statement)
            reasons = {(node.lineno, reason) for node in nodes
                       for reason in reasons_of(node, modules, assignment)}
            exercise = solves.get(getattr(statement, "name", ""))
            for line, reason in sorted(reasons):
                lines.setdefault(exercise, []).append(f"line {line}: {reason}")
    return lines


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


def _import_reasons(node, modules, assignment):
    for _, dotted, alias in _imported(node):
        if not importable(node, alias, assignment):
            yield f"may not import {alias.name if isinstance(node, ast.Import) else dotted}"


def is_taken(node: ast.stmt, others: Collection[str] = ()) -> bool:
    """Whether the grader runs this statement at the top level of a submission.

    It runs imports, functions, classes, and assignments of lambdas and constants, unless they define one of
    the names `others`. It does not run what trains or prints.
    """
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name not in others
    if isinstance(node, ast.Assign) and all(isinstance(target, (ast.Name, ast.Tuple))
                                            for target in node.targets):
        stored = {name.id for name in ast.walk(node)
                  if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        if stored & set(others):
            return False
        if isinstance(node.value, ast.Lambda):
            return True
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return isinstance(node, (ast.Import, ast.ImportFrom))


def importable(node: ast.Import | ast.ImportFrom, alias: ast.alias, assignment: Assignment) -> bool:
    """Whether the assignment allows one name of an import statement."""
    if isinstance(node, ast.ImportFrom):
        if node.level or alias.name == "*" or alias.name in OUTSIDE:
            return False
        return node.module in assignment.imports or allowed(f"{node.module}.{alias.name}", assignment)
    return alias.name in assignment.imports or (alias.name == "tinytoken" and bool(assignment.tinytoken))


def allowed(dotted: str, assignment: Assignment) -> bool:
    """Whether a dotted name of the package is one that the assignment lists, leads to one, or lies in one."""
    return any(dotted == name or name.startswith(dotted + ".") or dotted.startswith(name + ".")
               for name in (f"tinytoken.{name}" for name in assignment.tinytoken))


def _reasons(node, modules, assignment):
    if isinstance(node, ast.Name) and node.id in FORBIDDEN:
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
    if (isinstance(node, ast.Constant) and isinstance(node.value, str)
            and "__" in node.value and "{" in node.value):
        yield "may not format a text with names of Python's own"


def _leads_out(name):
    return name in OUTSIDE or name.startswith(FRAMES) and name not in DUNDERS


def _chain(node):
    """"a.b.c" of nested attributes of a name, None of others."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def roots(assignment: Assignment) -> list[str]:
    """The packages that a submission may import from, by their first names."""
    names = {name.split(".")[0] for name in assignment.imports}
    return sorted(names | {"tinytoken"} if assignment.tinytoken else names)
