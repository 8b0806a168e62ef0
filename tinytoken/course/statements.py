"""The statements at the top level of a file: which names each makes there, and which it looks up."""
import ast
import dataclasses
import symtable

COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement at the top level, and names of that level.

    binds: those that it gives a value, or whose value it changes. uses_now: those that it looks up when it is
    run. uses: also those that what it defines looks up when it is called.
    """
    node: ast.stmt
    binds: frozenset[str]
    uses_now: frozenset[str]
    uses: frozenset[str]


def read(tree: ast.Module) -> list[Statement]:
    """The statements of a file, without what only a script does (`if __name__ == "__main__"`)."""
    imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    return [_statement(node, imported) for node in tree.body
            if not (isinstance(node, ast.If) and "__name__" in _names(node.test))]


def defines(node: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class or a named lambda."""
    return (isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            or isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda))


def needed(statements: list[Statement], wanted: set[str]) -> set[str]:
    """The names `wanted`, with all that the statements behind them look up, and those behind these."""
    found = set(wanted)
    while more := set().union(*(each.uses for each in statements if each.binds & found)) - found:
        found |= more
    return found


def users(statements: list[Statement], names: set[str]) -> set[str]:
    """The names `names`, with all whose statements look one of them up, and those that look up these."""
    found = set(names)
    while more := set().union(*(each.binds for each in statements if each.uses & found)) - found:
        found |= more
    return found


def _statement(node, imported):
    # The symbol table knows which of a function's names are its own; it is made from text alone.
    table = symtable.symtable(ast.unparse(node), "submission", "exec")
    binds = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_assigned() or symbol.is_imported()}
    changed = set()
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        changed = set().union(*map(_changed, ast.walk(node))) - imported
    return Statement(node, frozenset(binds | changed), frozenset(_looked_up(table, True) | changed),
                     frozenset(_looked_up(table, False) | changed))


def _changed(node):
    """The name whose value n += 1, n[0] = 1 or n.a = 1 changes, or n.append(1) as a statement."""
    if isinstance(node, ast.AugAssign):
        return _root(node.target)
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        return _root(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _root(node.value.func) if isinstance(node.value.func, ast.Attribute) else set()
    return set()


def _looked_up(table, now):
    """Names of the top level that a scope and those in it look up; now: without the bodies of functions."""
    if now and table.get_type() == "function" and table.get_name() not in COMPREHENSIONS:
        return set()
    top = table.get_type() == "module"
    own = {symbol.get_name() for symbol in table.get_symbols()
           if symbol.is_referenced() and (top or symbol.is_global()) or symbol.is_declared_global()}
    return own.union(*(_looked_up(child, now) for child in table.get_children()))


def _root(node):
    """{"a"} of a.b[0].c; nothing where it does not begin with a name."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def _names(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
