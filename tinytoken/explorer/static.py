"""The explorer as a folder for any web server: the page, this package, and recorded examples.

In the browser Pyodide runs the package, the models too; NumPy comes from Pyodide's distribution. What else
the package imports is pure Python, and is put beside it. Where Pyodide cannot be loaded, the page shows the
examples.
"""
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import zipfile
from typing import Any

from ..errors import InputError, expect
from ..files import FilePath, as_json, check_writable, kind_of, replacing
from ..reading import read_bytes, read_json
from . import page
from .look import WHERE, Explorer
from .models import KEEPS

VERSION = "0.27.7"  # of Pyodide: the one that the page was tried with; it brings NumPy 2.0.2
DISTRIBUTION = f"https://cdn.jsdelivr.net/pyodide/v{VERSION}/full/"
CORE = ("pyodide.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
PROGRAM = ("pyodide.asm.mjs", "pyodide.asm.js")  # the name changed; a version has one of them
BESIDE = ("threadpoolctl", "tqdm")  # the dependencies that are pure Python
LEFT_OUT = ("cuda", "compiled", "course", "site", "__pycache__")  # folders that a browser has no use for
RECORDED = (0, 1, 2, 3, 4, 5)  # numbers of scenes
ARCHIVE, EXAMPLES = "tinytoken.zip", "examples.json"


def write(out: FilePath, pyodide: FilePath | None = None, explorer: Explorer | None = None) -> list[str]:
    """Write the folder `out`, a new one or one that this has written before -> lines that say what is there.

    pyodide: a folder with Pyodide and its NumPy, which is copied; None: the page loads version VERSION from
    Pyodide's own distribution. InputError for a folder that lacks a file, or has one of another checksum."""
    out = pathlib.Path(out)
    expect(kind_of(out) in ("nothing", "a folder"), WHERE, f"{out} is {kind_of(out)}, expected a folder")
    ours = {"index.html", ARCHIVE, EXAMPLES, "pyodide"}
    others = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.exists() else []
    expect(not others, WHERE, f"{out} holds {others[:1]} and is no folder of the explorer: give a new one")
    files = None if pyodide is None else files_of(pathlib.Path(pyodide))
    check_writable(out)
    explorer = explorer or Explorer()
    out.mkdir(parents=True, exist_ok=True)
    text = page.html(form="pyodide", pyodide=DISTRIBUTION if files is None else "pyodide/", archive=ARCHIVE,
                     examples=EXAMPLES)
    recorded = json.dumps(examples(explorer), separators=(",", ":"))
    for name, content in (("index.html", text), (EXAMPLES, recorded)):
        with replacing(out / name, "w") as file:
            file.write(content)
    with replacing(out / ARCHIVE) as file:
        write_archive(file)
    if files is not None:
        (out / "pyodide").mkdir(exist_ok=True)
        for path in files:
            shutil.copyfile(path, out / "pyodide" / path.name)
    where = f"Pyodide {VERSION} from {DISTRIBUTION}" if files is None else f"Pyodide, copied from {pyodide}"
    return [f"{out / 'index.html'}: the page, for a web server (python -m http.server -d {out})", where]


def examples(explorer: Explorer) -> dict[str, Any]:
    """What the page shows without Python: some scenes, with every setting of the two first sliders."""
    scenes = {}
    for scene in RECORDED:
        seen = explorer.look(scene=scene)
        at = {f"{keep:.2f}": explorer.look(scene=scene, keep=keep)["models"]["dynamicvit"] for keep in KEEPS}
        grids = {f"{n}x{n}": explorer.look(scene=scene, grid=n)["models"]["lookupvit"]
                 for n in range(1, explorer.grid[0] + 1)}
        models = {"vit": seen["models"]["vit"], "dynamicvit": at, "lookupvit": grids}
        for model in (models["vit"], *at.values(), *grids.values()):
            del model["seconds"]  # of another machine
        scenes[str(scene)] = seen | {"models": models}
    return as_json({"setup": explorer.setup(), "scenes": scenes})


def write_archive(file: Any) -> None:
    """This package, its models and what it imports beside NumPy, as a zip that is the same each time."""
    package = pathlib.Path(__file__).parents[1]
    members = {f"{package.name}/{path.relative_to(package).as_posix()}": path for path in package.rglob("*")
               if path.is_file() and not {*path.relative_to(package).parts} & {*LEFT_OUT}}
    for name in BESIDE:
        files = importlib.metadata.files(name) or []
        expect(files, WHERE, f"{name} is installed in a way that does not say its files")
        members |= {path.as_posix(): pathlib.Path(str(path.locate())) for path in files
                    if path.suffix != ".pyc" and ".." not in path.parts}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as box:
        for name, path in sorted(members.items()):
            box.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder of Pyodide's that the page needs, NumPy's checked against the checksum that the
    folder's own list says."""
    lock = read_json(folder / "pyodide-lock.json", WHERE)
    program = [name for name in PROGRAM if (folder / name).exists()]
    found = [folder / name for name in (*CORE, *(program or PROGRAM[:1]))]
    try:
        wanted, packages = ["numpy"], lock["packages"]
        for name in wanted:
            wanted += [other for other in packages[name]["depends"] if other not in wanted]
        wheels = {packages[name]["file_name"]: packages[name]["sha256"] for name in wanted}
        plain = all(pathlib.PurePath(name).name == name for name in wheels)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{WHERE}: {folder / 'pyodide-lock.json'} does not list NumPy "
                         f"({error!r})") from error
    expect(plain, WHERE, f"{folder / 'pyodide-lock.json'} names a file outside of its folder")
    for name, digest in wheels.items():
        data = read_bytes(folder / name, WHERE)
        expect(hashlib.sha256(data).hexdigest() == digest, WHERE,
               f"{folder / name} is not the file that pyodide-lock.json lists: its checksum differs")
        found.append(folder / name)
    for path in found:
        expect(kind_of(path) == "a file", WHERE, f"{path} is {kind_of(path)}, expected a file of Pyodide's")
    return found
