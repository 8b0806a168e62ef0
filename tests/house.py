"""Reads the sources of tinytoken: counts lines and imports. `python tests/house.py` prints the table."""
import ast
import dataclasses
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tinytoken"

# The sizes to aim at (design.md section 1), in lines of code: without blanks, comments and docstrings.
AIMS = {"tensor.py": 250, "tensor.py and ops/": 700, "a model file": 200, "without cuda/ and course/": 3500}

# A file imports only from floors below, and without circles from its own.
FLOORS = (("errors",), ("backend",), ("random",), ("tensor",), ("ops",), ("cuda",),
          ("checking", "diagnosis", "differences", "cost"), ("nn",), ("models",), ("optim", "train", "checkpoint", "data", "plot"),
          ("compare", "predict", "doctor", "bench", "lesson", "report", "trial"), ("course",), ("__init__", "__main__"))


@dataclasses.dataclass
class File:
    path: pathlib.Path

    def __post_init__(self):
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.parts = self.path.relative_to(PACKAGE).with_suffix("").parts

    @property
    def name(self):
        return "/".join(self.path.relative_to(PACKAGE).parts)

    @property
    def module(self):
        """Dotted, without the package: 'ops.norm', and 'ops' for ops/__init__.py; the package itself is '__init__'."""
        parts = self.parts[:-1] if self.parts[-1] == "__init__" and len(self.parts) > 1 else self.parts
        return ".".join(parts)

    def lines(self):
        """Lines that are not blank."""
        return sum(bool(line.strip()) for line in self.text.splitlines())

    def code_lines(self):
        """Lines that hold a token which is not a comment, outside docstrings."""
        empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in empty:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
                lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return len(lines)

    def functions(self):
        """(name, lines) of every function, with decorators and docstring."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        return [(f.name, f.end_lineno - min([f.lineno, *(d.lineno for d in f.decorator_list)]) + 1) for f in found]

    def imports(self, inside=True):
        """(modules of this package, others) that the file imports: dotted names. inside=False: only at its top level."""
        own, others = set(), set()
        for node in ast.walk(self.tree) if inside else self.tree.body:
            if isinstance(node, ast.Import):
                others.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                others.add(node.module)
            elif isinstance(node, ast.ImportFrom):
                base = self.parts[:len(self.parts) - node.level] + tuple((node.module or "").split(".") if node.module else ())
                for alias in node.names:
                    own.add(".".join(base + (alias.name,)) if exists(base + (alias.name,)) else ".".join(base) or "__init__")
        for name in [name for name in others if name.split(".")[0] == PACKAGE.name]:
            others.remove(name)
            own.add(name.partition(".")[2] or "__init__")
        return own, others


def exists(parts):
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def floor_of(module):
    """The number of the module's floor; None if no floor was given to it."""
    return next((i for i, names in enumerate(FLOORS) if module.split(".")[0] in names), None)


def files():
    return [File(path) for path in sorted(PACKAGE.rglob("*.py"))]


def sizes(count):
    """Lines of code as AIMS names them, from those of each file."""
    def under(*starts):
        return sum(n for name, n in count.items() if name.startswith(starts))
    return {"tensor.py": count["tensor.py"], "tensor.py and ops/": under("tensor.py", "ops/"),
            "a model file": max(n for name, n in count.items() if name.startswith("models/")),
            "without cuda/ and course/": sum(count.values()) - under("cuda/", "course/")}


def table():
    rows, count = [f"{'file':<24}{'code':>6}{'all':>6}   longest function"], {}
    for file in files():
        count[file.name] = file.code_lines()
        longest = max(file.functions(), key=lambda f: f[1], default=("", 0))
        rows.append(f"{file.name:<24}{count[file.name]:>6}{file.lines():>6}   {longest[0]} {longest[1]}")
    rows += [f"{name:<28}{n:>6} of {AIMS[name]} lines of code" for name, n in sizes(count).items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
