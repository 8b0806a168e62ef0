"""Reads the sources of tinytoken: counts lines and imports. `python tests/house.py` prints the table."""
import ast
import dataclasses
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tinytoken"

# Budgets in lines of code: without blanks, comments and docstrings. The sitting path is what a student reads
# in one sitting.
SITTING = ("graph.py", "tensor.py", "ops/", "nn/layers.py", "models/vit.py", "models/dynamicvit.py",
           "models/pruning.py", "models/lookupvit.py", "train/loop.py")
BESIDE = ("ops/conv.py", "ops/roi.py", "ops/window.py")  # what neither of the two papers' models has
PYRAMIDS = ("models/convnext.py", "models/lemevit.py", "models/shunted.py", "models/stvitr.py", "models/swin.py")
BUDGETS = {"the sitting path": 1800, "a model": 120, "a pyramid": 180, "a task": 60, "an op": 40, "a model's tests": 150,
           "columns": 110}

# A file imports only from floors below, and without circles from its own. cuda/ and compiled/ stand near the top:
# they implement what is defined below them, and nothing below knows them.
FLOORS = (("errors",), ("registry", "files", "program", "reading", "backend", "threads", "group"), ("random", "graph"),
          ("tensor",), ("ops",), ("cost", "checking"), ("nn",),
          ("models", "data"), ("tasks",), ("train",), ("cuda", "compiled"), ("plot",),
          ("experiments", "predict", "doctor", "bench"),
          ("course", "explorer"), ("site", "__init__", "__main__"))

# Files that name a model, task or data set, beside its own: whatever lists them reads the registries, so a
# new one needs no line here, and adding it touches its own file and its test.
EXPLORER = ("explorer/look.py", "explorer/models.py", "explorer/static.py")  # whose page shows these three
NAMED_IN = {"vit": {"bench.py", "__main__.py", "experiments/compare.py", "experiments/tables.py",
                    "models/segmenter.py", *EXPLORER},
            "dynamicvit": {"models/controls.py", "models/lvvit.py", "models/segmenter.py",
                           "experiments/compare.py", "experiments/tables.py", *EXPLORER},
            "lookupvit": {"cuda/mixed_lookup.py", "models/segmenter.py", "models/videolookupvit.py",
                          "experiments/compare.py", "experiments/tables.py", *EXPLORER},
            "convnext": {"models/segmenter.py"}, "swin": {"models/segmenter.py", "models/stvitr.py"},
            "dynamicconvnext": {"models/map_controls.py"}, "stvitr": {"models/segmenter.py"},
            "segment": {"models/dovit.py", "models/segmenter.py", "models/segvit.py"},
            "segment_taught": {"models/segmenter.py"}, "refer": {"models/vltp.py"},
            "actions": {"models/evad.py"},
            "classify": {"models/base.py", "tasks/combine.py", "tasks/distil.py", "tasks/segment.py"},
            "distil": {"models/pruning.py", "tasks/segment.py"},
            "scenes": {"__main__.py", "experiments/arm.py", "experiments/lesson.py", "explorer/look.py",
                       "explorer/static.py"},
            "cifar10": {"experiments/lesson.py"}}
FAMILY = "experiments/family.py"  # the table of all methods: tests/experiments/test_family.py asks for each
EXPORTS = ("models/__init__.py", "tasks/__init__.py", "train/__init__.py", "data/__init__.py")


@dataclasses.dataclass
class File:
    path: pathlib.Path

    def __post_init__(self):
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.parts = self.path.relative_to(PACKAGE if self.path.is_relative_to(PACKAGE)
                                           else ROOT).with_suffix("").parts

    @property
    def name(self):
        return "/".join(self.path.relative_to(PACKAGE).parts)

    @property
    def module(self):
        """Dotted, without the package: 'ops.norm', and 'ops' for ops/__init__.py; the package itself is
        '__init__'."""
        parts = self.parts[:-1] if self.parts[-1] == "__init__" and len(self.parts) > 1 else self.parts
        return ".".join(parts)

    def lines(self):
        """Lines that are not blank."""
        return sum(bool(line.strip()) for line in self.text.splitlines())

    def code_lines(self):
        """Lines that hold a token which is not a comment, outside docstrings."""
        return code_lines_of(self.text)

    def names(self):
        """What the code, not its comments, calls by name: (identifiers, texts)."""
        identifiers, texts = set(), set()
        for node in ast.walk(self.tree):
            identifiers |= {word for key in ("id", "attr", "name")
                            if isinstance(word := getattr(node, key, None), str)}
            texts |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
        return identifiers, texts

    def functions(self):
        """(name, lines) of every function, with decorators and docstring."""
        found = [node for node in ast.walk(self.tree)
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        return [(f.name, f.end_lineno - min([f.lineno, *(d.lineno for d in f.decorator_list)]) + 1)
                for f in found]

    def imports(self, inside=True):
        """(modules of this package, others) that the file imports: dotted names. inside=False: only at its
        top level."""
        own, others = set(), set()
        for node in ast.walk(self.tree) if inside else self.tree.body:
            if isinstance(node, ast.Import):
                others.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                others.add(node.module)
            elif isinstance(node, ast.ImportFrom):
                base = self.parts[:len(self.parts) - node.level] + tuple((node.module or "").split(".")
                                                                         if node.module else ())
                for alias in node.names:
                    own.add(".".join(base + (alias.name,)) if exists(base + (alias.name,))
                            else ".".join(base) or "__init__")
        for name in [name for name in others if name.split(".")[0] == PACKAGE.name]:
            others.remove(name)
            own.add(name.partition(".")[2] or "__init__")
        return own, others


def code_lines_of(text):
    """The lines of code of a file's or function's text."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef,
                             ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def exists(parts):
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def floor_of(module):
    """The number of the module's floor; None if no floor was given to it."""
    return next((i for i, names in enumerate(FLOORS) if module.split(".")[0] in names), None)


def files():
    return [File(path) for path in sorted(PACKAGE.rglob("*.py"))]


def ops_lines():
    """{name of an op: its lines of code}, of ops/."""
    lines = {}
    for file in files():
        if file.name.startswith("ops/"):
            for node in file.tree.body:
                if isinstance(node, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "op"
                                                             for d in node.decorator_list):
                    lines[node.name] = code_lines_of(ast.get_source_segment(file.text, node))
    return lines


def sizes():
    """{what: lines of code, the largest of its sort}, as BUDGETS names them."""
    count = {file.name: file.code_lines() for file in files()}

    def largest(folder, *beside):
        return max(n for name, n in count.items() if name.startswith(folder) and name not in beside)
    tests = max(File(path).code_lines() for path in (ROOT / "tests" / "models").glob("test_*.py"))
    widest = max(len(line) for file in files() for line in file.text.splitlines())
    return {"the sitting path": sum(n for name, n in count.items() if name.startswith(SITTING) and name not in BESIDE),
            "a model": largest("models/", "models/controls.py", *PYRAMIDS),
            "a pyramid": max(count[name] for name in PYRAMIDS), "a task": largest("tasks/"),
            "an op": max(ops_lines().values()),
            "a model's tests": tests, "columns": widest}


def table():
    rows = [f"{'file':<26}{'code':>6}{'all':>6}   longest function"]
    for file in files():
        longest = max(file.functions(), key=lambda f: f[1], default=("", 0))
        rows.append(f"{file.name:<26}{file.code_lines():>6}{file.lines():>6}   {longest[0]} {longest[1]}")
    rows += [f"{name:<28}{n:>6} of {BUDGETS[name]}" for name, n in sizes().items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
