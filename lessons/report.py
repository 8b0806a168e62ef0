"""Writes the measured parts of README.md and lessons/RESULTS.md from the JSON in lessons/results.

    python lessons/report.py

A part stands between `<!-- measured: NAME -->` and `<!-- /measured -->`. The function of that name in `parts`
makes its text: nothing that is a result there is typed by hand.
"""
import json
import pathlib
import re
import statistics
import sys
import textwrap

from tinytoken.errors import InputError, expect
from tinytoken.experiments import interval_text, over_chance, range_text, spread_text
from tinytoken.experiments.stats import bounds_text
from tinytoken.experiments.tables import (compiled_text, conditions_text, family_text, headline_text,
                                          markdown_table, recipe_text, table_text)
from tinytoken.files import replacing

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", "lessons/RESULTS.md")
PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)", re.DOTALL)
parts = {}


def part(function):
    """Decorator: enter a function from the folder of results to Markdown, under its name."""
    parts[function.__name__] = function
    return function


def write(root):
    """Rewrite the pages under `root` -> the names of those that changed. InputError for a page, a part or a
    result that is not there; then none is written."""
    changed = {}
    for page in PAGES:
        path = root / page
        expect(path.exists(), "report", f"no {path}: it writes the pages of a checkout")
        before = path.read_text(encoding="utf-8")
        after = render(before, root / "lessons" / "results")
        if after != before:
            changed[page] = after
    for page, text in changed.items():
        with replacing(root / page, "w") as file:
            file.write(text)
    return list(changed)


def render(text, results):
    """The text with each measured part made anew from the folder `results`."""
    def made(match):
        begin, name, end = match.groups()
        expect(name in parts, "report", f"unknown part {name!r}, expected one of {', '.join(parts)}")
        return f"{begin}{parts[name](results).strip()}\n{end}"
    return PART.sub(made, text)


def load(path):
    """A result's JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"report: cannot read the result {path}: {error}") from error


# Words that several parts share

def plural(count, word):
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def seeds_text(seeds):
    """'seeds 0, 1, 2'."""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def processor_text(on):
    return f"{on['processor']}, {plural(on['cpus'], 'CPU')}"


def machine_text(saved):
    """A sentence about the machine of a lesson's run, or, of a run that was made on several, about each."""
    machines = saved.get("machines_of_parts", [saved["machine"]])
    texts = dict.fromkeys(f"{processor_text(on)}, NumPy {on['numpy']}, {on['blas']}" for on in machines)
    return f"Machine{'' if len(texts) == 1 else 's'}: {'; '.join(texts)}."


def tests_text(values):
    """How many pictures the models of a lesson were tested on, and their seeds. values: its results."""
    return f"{values['recipe']['test_pictures']:,} test pictures, {seeds_text(values['seeds'])}"


def claims_text(claims):
    """A line per claim of a lesson, whether it holds or not."""
    lines = []
    for claim in claims:
        verdict = "holds" if claim["holds"] else "**fails**"
        lines.append(f"- {verdict}: {claim['claim']}: {claim['measured']:.3g} "
                     f"({bounds_text(*claim['bound'])})")
    return "\n".join(lines)


# The main job

def comparisons(results, name):
    """The tables NAME_seed*.json of `compare`, which may differ in nothing but their seed."""
    tables = [load(path) for path in sorted(results.glob(f"{name}_seed*.json"))]
    expect(tables, "report", f"no {name}_seed*.json in {results}")
    same = all(table["recipe"] | {"seed": 0} == tables[0]["recipe"] | {"seed": 0} for table in tables)
    expect(same, "report", f"the recipes of {name}_seed*.json differ in more than their seed")
    return tables


def command_text(tables):
    """What the whole command took."""
    seconds = [table["this_call"]["seconds"] for table in tables]
    megabytes = [table["this_call"]["peak_memory_mb"] for table in tables]
    return (f"The whole command took {min(seconds):.0f} to {max(seconds):.0f} s there and at most "
            f"{max(megabytes)} MB of memory.")


@part
def scenes(results):
    """README's table: without the conditions, which stand in RESULTS.md."""
    tables = comparisons(results, "compare_scenes")
    rows, _ = table_text(*tables).split("\n\n", 1)
    seeds = seeds_text([table["recipe"]["seed"] for table in tables])
    return (f"{rows}\n\nAccuracy on {tables[0]['test_pictures']:,} test pictures, mean and standard "
            f"deviation of {seeds}; images/s: medians (lowest to highest round), of the first seed; M MACs: "
            f"millions of multiply-adds for a picture. Machine: "
            f"{processor_text(tables[0]['machine'])}{compiled_text(tables[0]['machine'])}. {command_text(tables)}")


@part
def scenes_full(results):
    tables = comparisons(results, "compare_scenes")
    return f"{table_text(*tables)}\n\n{conditions_text(*tables)}\n{command_text(tables)}"


@part
def cifar10(results):
    tables = comparisons(results, "compare_cifar10")
    return f"{table_text(*tables)}\n\n{conditions_text(*tables)}"


@part
def longer(results):
    """README's sentences on longer trainings: of scenes, and on CIFAR-10."""
    saved = load(results / "lookupvit_headline_full.json")["results"]
    rows, lookup = saved["rows"], "LookupViT 3x3"
    points = lambda name: spread_text([100 * row["accuracy"] for row in rows[name]])
    of_vits = rows[lookup][0]["macs"] / rows["ViT"][0]["macs"]
    low, high = (f"{end:+.1f}" for end in saved["above"]["ViT"][1:])
    tables = comparisons(results, "compare_cifar10")
    reached = [f"{row['model']} {spread_text([100 * table['rows'][i]['accuracy'] for table in tables])} %"
               for i, row in enumerate(tables[0]["rows"][:3])]
    return (f"On scenes that move, after {saved['recipe']['steps']:,} steps ({seeds_text(saved['seeds'])}): ViT "
            f"{points('ViT')} %, LookupViT {points(lookup)} % at {of_vits:.2f} of its multiply-adds ({low} to {high} "
            f"points from it), a ViT of as many multiply-adds as LookupViT {points('ViT, narrower')} %. "
            f"On CIFAR-10, after {tables[0]['recipe']['steps']:,} steps ("
            f"{seeds_text([table['recipe']['seed'] for table in tables])}): {', '.join(reached)}.")


@part
def vit_cifar10(results):
    """Two ViTs from scratch: lesson 04's in full, and the longer one that lesson 07 starts from."""
    short, long = (load(results / f"{name}_full_cifar10.json") for name in ("04_vit", "07_dynamicvit"))
    first, recipe, start = short["results"], long["results"]["recipe"], long["results"]["starts"][0]
    return (f"Lesson 4 trains the ViT of this table for {first['steps']:,} steps "
            f"({first['train_seconds'] / 60:.0f} minutes) and gets {100 * first['accuracy'][0]:.1f} % of "
            f"{first['test_pictures']:,} test pictures right. Lesson 7 trains it for "
            f"{recipe['first_steps']:,} steps ({start['trained']['seconds'] / 60:.0f} minutes) and gets "
            f"{100 * start['accuracy']:.1f} %. One seed each: {short['seed']}; batch {recipe['batch']}, "
            f"AdamW at {recipe['lr']}. {machine_text(short)}")


# Speed

PEERS = {"plain": "plain ops", "torch": "PyTorch", "torch-malloc": "PyTorch, kept memory",
         "torch-best": "PyTorch at its best", "torch-compile": "torch.compile", "jax": "JAX",
         "mygrad": "MyGrad"}
MODES = {"train": "training step", "infer": "inference"}


def times_text(ms, peers):
    """tinytoken's median time with its lowest and highest, and median and quartiles of its ratios to each peer
    in the same rounds, or nothing where the peer was not timed."""
    own = ms["tinytoken"]
    cells = [range_text([statistics.median(own), min(own), max(own)], ".1f")]
    for peer in peers:
        ratios = [own / other for own, other in zip(ms["tinytoken"], ms.get(peer, ()))]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if ratios else ()
        cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*quartiles) if ratios else "")
    return cells


@part
def speed(results):
    """README's table, of tests/benchmarks/targets.py: the models of width 192, compiled, beside PyTorch."""
    saved, peer = load(results / "targets.json"), "torch-best"
    cpus = max(row["cpus"] for row in saved["rows"])
    rows = [row for row in saved["rows"] if row["config"]["dim"] == 192 and row["batch"] > 1
            and row["cpus"] == cpus]
    lines = [[row["kind"]] for row in rows]
    for line, row in zip(lines, rows):
        for mode in MODES:
            line += times_text(row["ms"][mode], [peer])
    beside = f"/ {PEERS[peer]} [quartiles]"
    heads = ("model", "training step, ms", beside, "inference, ms", beside)
    config, version = rows[0]["config"], rows[0]["about"][peer]["version"]
    return (f"{markdown_table(heads, lines)}\n\nBelow 1 tinytoken is faster. Width {config['dim']}, depth "
            f"{config['depth']}, {rows[0]['batch']} pictures at a time; medians of {saved['rounds']} rounds, times (lowest to highest), "
            f"compiled by Numba, beside PyTorch {version} with its fastest settings. Machine: "
            f"{processor_text(saved['machine'])}.")


@part
def cpu(results):
    """Of tests/benchmarks/cpu.py: tinytoken's times, and their ratios to the peers'."""
    saved = load(results / "cpu.json")
    peers = [peer for peer in PEERS if any(peer in ms for row in saved["rows"] for ms in row["ms"].values())]
    several = len({row.get("cpus") for row in saved["rows"]}) > 1
    name_of = lambda row: row["workload"] + (f", CPUs: {row['cpus']}" if several else "")
    lines = [(f"{name_of(row)}, {MODES[mode]}", *times_text(ms, peers))
             for row in saved["rows"] for mode, ms in row["ms"].items()]
    memory = next(row["peak_memory_mb"]["train"] for row in saved["rows"] if row["workload"] == "A")
    about = saved["rows"][0]["about"]  # of each contender
    own, torch = about["tinytoken"], about["torch"]
    heads = ("workload", "tinytoken, ms", *(f"/ {PEERS[peer]}" for peer in peers))
    versions = [f"{PEERS[peer]} {about[peer]['version']}" for peer in ("torch", "jax") if peer in about]
    return (f"{markdown_table(heads, lines)}\n\nMedians of {saved['rounds']} interleaved rounds, times "
            f"(lowest to highest), ratios [quartiles]. Peak memory of A's training: tinytoken {memory['tinytoken'][0]} MB, PyTorch "
            f"{memory['torch'][0]} MB. Machine: {processor_text(saved['machine'])}; {', '.join(versions)}; "
            f"tinytoken on {own['blas']} at {own['sgemm_gflops']} GFLOP/s, PyTorch on "
            f"{torch['blas'].split(' Product')[0]} at {torch['sgemm_gflops']} (products of 1024 x 1024).")


@part
def targets(results):
    """Of tests/benchmarks/targets.py: the compiled ops beside the plain ones and PyTorch, on one and two CPUs."""
    saved, peers, lines = load(results / "targets.json"), ("plain", "torch-best"), {}
    for row in saved["rows"]:
        for mode, ms in row["ms"].items():
            lines.setdefault(f"{row['workload']}, {MODES[mode]}", []).extend(times_text(ms, peers))
    heads = ["workload"]
    for cpus in sorted({row["cpus"] for row in saved["rows"]}):
        heads += [f"{cpus} CPU{'s' * (cpus > 1)}, ms", *(f"/ {PEERS[peer]}" for peer in peers)]
    shares = ", ".join(f"{row['model']} {row['realised']:.2f} at {row['tokens']} tokens" for row in saved["savings"]
                       if row["realised"] and row["batch"] == 128)
    return (f"{markdown_table(heads, [(name, *cells) for name, cells in lines.items()])}\n\nMedians of "
            f"{saved['rounds']} interleaved rounds, times (lowest to highest), ratios [quartiles]. Of the multiply-adds "
            f"that a method saves, such a share is saved in time (128 pictures, 2 CPUs): {shares}. Machine: "
            f"{processor_text(saved['machine'])}, {saved['machine']['blas']}.")


@part
def savings(results):
    """Of tests/benchmarks/tokens.py: speed-ups over the ViT at width 192."""
    saved = load(results / "tokens.json")
    rows = {(row["model"], row["tokens"], row["batch"]): row for row in saved["savings"] if row["dim"] == 192}
    sizes = sorted({tokens for _, tokens, _ in rows})
    models = [*(f"DynamicViT 0.{k}" for k in (9, 7, 5)), *(f"LookupViT {m}x{m}" for m in (3, 5, 7))]
    heads, lines = ["inference, dim 192"], [[model] for model in models]
    for tokens in sizes:
        heads += [f"{tokens} tokens: MACs", "batch 128", "batch 1"]
        for line in lines:
            both = [rows[line[0], tokens, batch] for batch in (128, 1)]
            line += [f"/ {both[0]['macs_ratio']:.2f}",
                     *("{:.2f}x [{:.2f}, {:.2f}]".format(*row["speedup"]) for row in both)]
    return (f"{markdown_table(heads, lines)}\n\nMedians [quartiles] of {saved['rounds']} interleaved rounds, "
            f"untrained weights. Machine: {processor_text(saved['machine'])}, {saved['machine']['blas']}.")


@part
def overhead(results):
    """Of tests/benchmarks/ops.py and curves.py."""
    saved, curves = load(results / "ops.json"), load(results / "curves_torch.json")
    slowest = {op: "{:.2f} [{:.2f}, {:.2f}]".format(*max(row["ratio"] for row in saved["by_hand"]
                                                         if row["op"] == op))
               for op in ("attention", "layer norm")}
    shares = ", ".join(f"{row['step']} {100 * row['share']:.1f} %" for row in saved["graph"])
    single, double = curves["float32"], curves["float64"]
    return (f"Beside the same formulas in one NumPy function by hand, attention takes at most "
            f"{slowest['attention']} times as long and layer norm {slowest['layer norm']} times "
            f"(medians [quartiles], sizes of A, B and C). The graph's own share of a training step: {shares}. From "
            f"equal weights and batches the losses of the first {single['bound_on_first']} steps differ "
            f"from PyTorch's by at most {single['largest_on_first']:.0e} in float32, those of the first "
            f"{double['bound_on_first']} by {double['largest_on_first']:.0e} in float64.")


@part
def likeness(results):
    """Of tests/benchmarks/likeness.py."""
    found = load(results / "likeness.json")["outside"]
    lines = [(kind, f"{row['pictures']:,}", *(f"{100 * rows[kind]['outside']:.1f} %" for rows in found.values()))
             for kind, row in next(iter(found.values())).items()]
    return markdown_table(("pictures", "how many", *(f"trained on {name}" for name in found)), lines)


@part
def grading(results):
    """Of tests/benchmarks/grading.py."""
    saved = load(results / "grading.json")
    again = "the same points" if saved["same_points_twice"] else "**other points**"
    return (f"{saved['submissions']} submissions of {saved['assignment'].split('_')[0]} (right ones, "
            f"untouched ones, planted mistakes) take {max(saved['seconds']):.0f} s, {saved['jobs']} at a "
            f"time; a second time they get {again}. Machine: {processor_text(saved['machine'])}.")


@part
def explorer(results):
    """Of tests/benchmarks/explorer.py."""
    saved = load(results / "explorer.json")
    words = {"native": "the models on this machine", "pyodide": "the models in the browser, by Pyodide"}
    sliders = {"keep": "keep ratio", "grid": "compressed grid"}
    lines = [(words[form], sliders[name], str(at["steps"]), f"{at['median']:.0f} [{at['quartiles'][0]:.0f}, "
              f"{at['quartiles'][1]:.0f}]", f"{at['lowest']:.0f} to {at['highest']:.0f}")
             for form, found in saved["forms"].items() if found for name in sliders for at in (found[name],)]
    there = saved["forms"]["pyodide"]
    start = (f"Pyodide {there['version']}, from a folder beside the page, answered "
             f"{there['seconds_to_start']:.0f} s after the page was opened." if there
             else "Pyodide: not measured.")
    holds = "holds" if saved["slowest_native"] < saved["limit"] else "**fails**"
    heads = ("form", "slider", "steps", "ms, median [quartiles]", "ms, lowest to highest")
    return (f"{markdown_table(heads, lines)}\n\nThe bound of {saved['limit']} ms for the models on this machine "
            f"{holds}. {start} Chromium {saved['chromium'].split('.')[0]}. Machine: "
            f"{processor_text(saved['machine'])}.")


# Lessons

def scripts(results):
    """{a lesson's file: what it calls itself, with which the names of its results begin}."""
    course, related = (sorted(results.parent.glob(f"{folder}[0-9][0-9]*_*.py")) for folder in ("", "related/"))
    return ({script: script.stem for script in course}
            | {script: f"related_{script.stem.partition('_')[2]}" for script in related})


def headlines(results):
    """{a lesson's file: the headline of its default run, or None if the committed run has none}."""
    return {script: load(results / f"{name}.json").get("headline") for script, name in scripts(results).items()}


def lesson_line(results, script, headline):
    """An item of a list: number and title of a lesson, and its headline."""
    title = script.read_text(encoding="utf-8").splitlines()[1].partition(": ")[2]  # "# # Lesson 07: DynamicViT"
    name = script.relative_to(results.parent).as_posix()
    headline = headline or f"no headline; `python lessons/{name} --out lessons/results` notes one."
    return f"- {name.partition('_')[0]} [{title}]({name}): {headline}"


@part
def lessons(results):
    """A line for each lesson: its title, and the headline of its default run."""
    return "\n".join(lesson_line(results, *each) for each in headlines(results).items())


@part
def related_full(results):
    """The headline of each related lesson's full run, how many of its bounds hold, and those that fail."""
    lines = []
    for script, name in scripts(results).items():
        if name.startswith("related_") and (path := results / f"{name}_full.json").exists():
            saved = load(path)
            claims = saved["results"]["claims"]
            failing = [claim for claim in claims if not claim["holds"]]
            lines.append(f"{lesson_line(results, script, saved['headline'])} {len(claims) - len(failing)} of "
                         f"{plural(len(claims), 'bound')} hold.")
            if failing:
                lines.append(textwrap.indent(claims_text(failing), "  "))
    return "\n".join(lines)


@part
def located(results):
    """Lesson 09 in full: how well each patch says which share of it is object."""
    values = load(results / "09_lookupvit_full.json")["results"]
    shares = [f"{name} {spread_text(explained, '.3f')}" for name, explained in values["located"].items()]
    return (f"Share of the variance that is explained ({values['locate_steps']:,} steps, "
            f"{seeds_text(values['seeds'])}): {', '.join(shares)}.")


def family_arms_text(saved):
    """Of lessons/full/family.py."""
    values = saved["results"]
    recipe = values["recipe"]
    return (f"{family_text(values)}\n\n{recipe['steps']:,} steps of {recipe['batch']} pictures, width "
            f"{recipe['dim']}, {recipe['depth']} blocks; {tests_text(values)}; speeds: medians, and in brackets how "
            f"many times the first row's, median [quartiles] of the rounds. {machine_text(saved)}")


def arms_text(saved, dense="ViT"):
    """Lessons 07 and 14: the table of their arms. A column that no arm fills is left out. dense: the model
    that all start from."""
    values, recipe = saved["results"], saved["results"]["recipe"]
    reference = values["rows"][f"{dense}, further"]
    table = [arm_cells(name, arm, reference, dense) for name, arm in values["rows"].items()]
    heads = [head for head in table[0] if any(cells[head] for cells in table)]
    lines = [[cells[head] for head in heads] for cells in table]
    start = spread_text([100 * row["accuracy"] for row in values["starts"]])
    return (f"{markdown_table(heads, lines)}\n\nAll arms go on from a {dense} of {recipe['first_steps']:,} "
            f"steps ({start} %), each for {recipe['further_steps']:,} steps of {recipe['batch']} pictures "
            f"at learning rate {recipe['further_lr']}; {tests_text(values)}. {machine_text(saved)}")


def arm_cells(name, arm, reference, dense):
    """A row of that table: {column: text}. arm: what was noted of each seed; reference: the same of the dense
    model that got as many further steps, of at least as many seeds."""
    points = [100 * row["accuracy"] for row in arm]
    gaps = [own - 100 * row["accuracy"] for own, row in zip(points, reference)]
    unpruned = [100 * row["all_tokens"] for row in arm if "all_tokens" in row]
    reached = zip(*(row["ratios"] for row in arm if "ratios" in row))
    kept = zip(map(statistics.mean, reached), arm[0].get("targets", ()))
    return {"arm": name, "seeds": len(arm), "accuracy": f"{spread_text(points)} %",
            f"minus {dense}'s, points": "" if arm is reference else spread_text(gaps, "+.1f"),
            "with all tokens": f"{spread_text(unpruned)} %" if unpruned else "",
            "M MACs": f"{arm[0]['macs'] / 1e6:.1f}",
            "object share, by stage": ", ".join(f"{share:.2f}" for share in over_chance(arm)),
            "tokens kept in training (target)": ", ".join(f"{k:.3f} ({target:.3f})" for k, target in kept)}


def lookup_arms_text(saved):
    """Lesson 09: the table of its arms."""
    values, lines = saved["results"], []
    for name, rows in values["rows"].items():
        first, points = rows[0], [100 * row["accuracy"] for row in rows]
        gaps = [interval_text(*gap) if gap else "" for gap in values["differences"][name]]  # None: to itself
        lines.append((name, len(rows), f"{spread_text(points)} %", f"{first['macs'] / 1e6:.1f}",
                      f"{first['parameters'] / 1e6:.2f}", f"{first['steps']:,}", *gaps))
    heads = ("arm", "seeds", "accuracy", "M MACs", "M parameters", "steps", "above its ViT, points [95 %]",
             "above its LookupViT, points [95 %]")
    return (f"{markdown_table(heads, lines)}\n\n{values['recipe']['batch']} pictures a step, "
            f"{tests_text(values)}. {machine_text(saved)}")


def recipe_arms_text(saved):
    """Of lessons/full/lookupvit_recipe.py."""
    values, recipe = saved["results"], saved["results"]["recipe"]
    return (f"{recipe_text(values['rows'])}\n\n{recipe['steps']:,} steps of {recipe['batch']} pictures unless said, "
            f"{recipe['held_out']:,} pictures that were held out, seed {values['seed']}. {machine_text(saved)}")


def headline_arms_text(saved):
    """Of lessons/full/lookupvit_headline.py."""
    values, recipe = saved["results"], saved["results"]["recipe"]
    return (f"{headline_text(values)}\n\n{recipe['steps']:,} steps of {recipe['batch']} pictures, "
            f"{tests_text(values)}. {machine_text(saved)}")


def grids_text(saved):
    """Lesson 10: the table of its grids."""
    values, recipe = saved["results"], saved["results"]["recipe"]
    heads = ("grid", "M MACs", "one model", "single-size model", "one model less single-size, points",
             "trained at 3x3 only")
    lines = [grid_cells(grid, values) for grid in values["rows"]["one model"][0]]
    return (f"{markdown_table(heads, lines)}\n\nEvery model was trained for {recipe['steps']:,} steps of "
            f"{recipe['batch']} pictures, the one model at a grid drawn for each step from "
            f"{', '.join(values['grids'])}; {tests_text(values)}. {machine_text(saved)}")


def grid_cells(grid, values):
    """A row of that table."""
    points = {name: [100 * row[grid]["accuracy"] for row in by_seed if grid in row]
              for name, by_seed in values["rows"].items()}
    one, single = points["one model"], points.get(f"single {grid}", [])
    gaps = [a - b for a, b in zip(one, single)]
    return (grid if grid in values["grids"] else f"{grid} (never trained)",
            f"{values['rows']['one model'][0][grid]['macs'] / 1e6:.1f}", f"{spread_text(one)} %",
            f"{spread_text(single)} %" if single else "", spread_text(gaps, "+.1f") if single else "",
            f"{spread_text(points['trained at 3x3 only'])} %")


def damage_text(saved):
    """Lesson 11: the table of its arms."""
    values, recipe, lines = saved["results"], saved["results"]["recipe"], []
    for name, row in values["summary"].items():
        spreads = [spread_text(row[key]) for key in ("clean_error", "error", "mce", "relative_mce")]
        lines.append((name, f"{row['macs'] / 1e6:.1f}", *spreads, spread_text(row["above_curve"], "+.1f")))
    heads = ("arm", "M MACs", "clean error, %", "error under damage, %", "mCE", "relative mCE",
             "above the curve of ViTs, points")
    return (f"{markdown_table(heads, lines)}\n\n{recipe['steps']:,} and {recipe['further']:,} steps, "
            f"{tests_text(values)}. {machine_text(saved)}")


# {lesson: the function from one of its runs to its table}
lesson_tables = {"07_dynamicvit": arms_text, "09_lookupvit": lookup_arms_text,
                 "10_one_model_many_budgets": grids_text, "11_robustness": damage_text,
                 "14_slow_and_fast_path": lambda saved: arms_text(saved, "ConvNeXt")}


def lesson_part(result, table_of):
    """The part of a lesson's full run, once there was one: its table, and what became of its claims."""
    def text(results):
        path = results / f"{result}.json"
        if not path.exists():
            return "This has not been run yet."
        saved = load(path)
        table, claims = table_of(saved), saved["results"].get("claims")
        return f"{table}\n\nBounds set before the run:\n\n{claims_text(claims)}" if claims else table
    return text


parts |= {"dynamicvit": lesson_part("07_dynamicvit_full", arms_text),
          "dynamicvit_cifar10": lesson_part("07_dynamicvit_full_cifar10", arms_text),
          "lookupvit": lesson_part("09_lookupvit_full", lookup_arms_text),
          "lookupvit_cifar10": lesson_part("09_lookupvit_full_cifar10", lookup_arms_text),
          "lookup_recipe": lesson_part("lookupvit_recipe_full", recipe_arms_text),
          "lookup_recipe_cifar10": lesson_part("lookupvit_recipe_full_cifar10", recipe_arms_text),
          "lookup_headline": lesson_part("lookupvit_headline_full", headline_arms_text),
          "lookup_headline_cifar10": lesson_part("lookupvit_headline_full_cifar10", headline_arms_text),
          "family": lesson_part("family_full", family_arms_text),
          "family_pixels": lesson_part("family_full_pixel_scenes", family_arms_text),
          "family_clips": lesson_part("family_full_actor_clips", family_arms_text),
          "family_sentences": lesson_part("family_full_referring", family_arms_text),
          "budgets": lesson_part("10_one_model_many_budgets_full", grids_text),
          "robustness": lesson_part("11_robustness_full", damage_text),
          "two_paths": lesson_part("14_slow_and_fast_path", lesson_tables["14_slow_and_fast_path"])}


def main(root=ROOT):
    try:
        changed = write(root)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"rewritten: {', '.join(changed)}" if changed else f"as the results say: {', '.join(PAGES)}")
    unsaid = [script.name for script, text in headlines(root / "lessons" / "results").items() if not text]
    if unsaid:
        sys.exit(f"error: no headline in the committed results of {', '.join(unsaid)}")


if __name__ == "__main__":
    main()
