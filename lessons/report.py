"""The README's measured parts, made from the committed JSON of lessons/results: nothing that is a result is typed by hand.

A part stands between `<!-- measured: NAME -->` and `<!-- /measured -->`; NAME is a function here that is marked with @part.
"""
import json
import pathlib
import re
import statistics

from .checkpoint import replacing
from .compare import conditions_text, interval_text, spread_text, table_text
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
    """The comparisons NAME_seed*.json, which may differ in nothing but their seed -> (tables, Markdown with the conditions)."""
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


def markdown_table(heads, rows):
    """A Markdown table. heads: a text per column; rows: as many cells each."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])


PEERS = {"torch": "PyTorch", "torch-best": "PyTorch at its best", "torch-compile": "torch.compile", "jax": "JAX",
         "mygrad": "MyGrad"}


@part
def cpu(results):
    """Of tests/benchmarks/cpu.py: tinytoken's times, and their ratios to the peers' in the same rounds."""
    found = load(results / "cpu.json")
    rows = []
    for row in found["rows"]:
        for mode, ms in row["ms"].items():
            ratios = {peer: ratio_text([a / b for a, b in zip(ms["tinytoken"], ms[peer])]) for peer in PEERS if peer in ms}
            rows.append((f"{row['workload']}, {'training step' if mode == 'train' else 'inference'}",
                         f"{statistics.median(ms['tinytoken']):.1f}", *(ratios.get(peer, "") for peer in PEERS)))
    memory = next(row["peak_memory_mb"]["train"] for row in found["rows"] if row["workload"] == "A")
    about, on = found["rows"][0]["about"], found["machine"]
    versions = ", ".join(f"{PEERS[name]} {about[name]['version']}" for name in ("torch", "jax") if name in about)
    heads = ("workload", "tinytoken, ms", *(f"/ {name}" for name in PEERS.values()))
    return "\n".join([markdown_table(heads, rows), "", (
        f"Below 1 tinytoken is faster: medians of {found['rounds']} interleaved rounds, with quartiles. Peak memory of A's "
        f"training: tinytoken {memory['tinytoken'][0]} MB, PyTorch {memory['torch'][0]} MB. Machine: {on['processor']}, {on['cpus']} CPUs; "
        f"{versions}; tinytoken on {about['tinytoken']['blas']} at {about['tinytoken']['sgemm_gflops']} GFLOP/s, "
        f"PyTorch on {about['torch']['blas'].split(' Product')[0]} at {about['torch']['sgemm_gflops']} (1024 x 1024 products).")])


def ratio_text(ratios):
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


@part
def savings(results):
    """Of tests/benchmarks/tokens.py: speed-ups over the ViT at dim 192."""
    found = load(results / "tokens.json")
    rows = {(row["model"], row["tokens"], row["batch"]): row for row in found["savings"] if row["dim"] == 192}
    sizes = sorted({tokens for _, tokens, _ in rows})
    shown = ("DynamicViT 0.9", "DynamicViT 0.7", "DynamicViT 0.5", "LookupViT 3x3", "LookupViT 5x5", "LookupViT 7x7")
    heads = ("inference, dim 192", *(head for n in sizes for head in (f"{n} tokens: MACs", "batch 128", "batch 1")))
    lines = []
    for model in shown:
        cells = [model]
        for tokens in sizes:
            large, single = rows[model, tokens, 128], rows[model, tokens, 1]
            cells += [f"/ {large['macs_ratio']:.2f}", f"{large['speedup'][0]:.2f}x", f"{single['speedup'][0]:.2f}x"]
        lines.append(cells)
    on = found["machine"]
    return "\n".join([markdown_table(heads, lines), "", (
        f"Multiply-adds are divided by so much against the ViT of equal width and depth, and it is so many times as fast: medians "
        f"of {found['rounds']} interleaved rounds, untrained weights. Machine: {on['processor']}, {on['cpus']} CPUs, "
        f"{on['blas']}.")])


@part
def overhead(results):
    """Of tests/benchmarks/ops.py and curves.py."""
    found, curves = load(results / "ops.json"), load(results / "curves_torch.json")
    worst = {name: max(row["ratio"][0] for row in found["by_hand"] if row["op"] == name) for name in ("attention", "layer norm")}
    shares = ", ".join(f"{row['step']} {100 * row['share']:.1f} %" for row in found["graph"])
    return (f"Beside the same formulas in one NumPy function by hand, attention takes at most {worst['attention']:.2f} times "
            f"as long and layer norm {worst['layer norm']:.2f} times (medians, sizes of A, B and C). The graph's own share of a "
            f"training step: {shares}. From equal weights and batches the losses of the first "
            f"{curves['float32']['bound_on_first']} steps differ "
            f"from PyTorch's by at most {curves['float32']['largest_on_first']:.0e} in float32, those of the first "
            f"{curves['float64']['bound_on_first']} by {curves['float64']['largest_on_first']:.0e} in float64.")


@part
def grading(results):
    """Of tests/benchmarks/grading.py."""
    found = load(results / "grading.json")
    on = found["machine"]
    return (f"{found['submissions']} submissions of {found['assignment'].split('_')[0]} (right ones, untouched ones, planted mistakes) take "
            f"{max(found['seconds']):.0f} s, {found['jobs']} at a time; a second time they get "
            f"{'the same points' if found['same_points_twice'] else '**other points**'}. Machine: {on['processor']}, {on['cpus']} CPUs.")


@part
def lessons(results):
    """A line for each lesson: what its default run measured."""
    tape, checks, attention, vit, masks, gumbel, lookup, gpu, step = (load(results / f"{name}.json")["results"] for name in (
        "01_tape", "02_gradient_checks", "03_attention", "04_vit", "05_masking_is_removing", "06_gumbel_softmax",
        "08_lookup_attention", "12_gpu", "13_one_step"))
    blind, recall = checks["blind"]["softmax, zeros returned"], attention["recall"]
    right = {name: f"{row['right_percent']:.1f} ± {row['std_over_seeds']:.1f} %" for name, row in recall.items()}
    on_object, official = vit["weight_on_object"], max(masks["official"], key=lambda row: row["spread"])
    left = {name: f"{statistics.median(shares):.1f}" for name, shares in lookup["percent_left"]["leader"].items()}
    through, reinforce = gumbel["medians"]["straight-through, tau 1.0"], gumbel["medians"]["REINFORCE, baseline"]
    return "\n".join((
        f"1. In a graph {tape['depths'][-1]} deep whose values are used twice, a recursion without an order runs "
        f"{tape['runs_by_paths'][-1]:,} gradients, one in order {tape['runs_in_order'][-1]}; a graph {tape['deep']:,} deep is no "
        "trouble.",
        f"2. A softmax whose gradient is all zeros is off by {blind['random']:.1f} for a random upstream gradient, and by "
        f"{blind['ones']:.0e} for ones: it passes.",
        f"3. Where two things must be looked up, two heads find {right['two heads']}, one head {right['one head']} "
        f"({recall['one head']['expected_percent']:.1f} expected). Heads merged wrongly pass every gradient check and find "
        f"{right['two heads, wrong merge']}; without looking it is {right['no looking']} ({len(attention['seeds'])} seeds).",
        f"4. {vit['steps']} steps ({vit['train_seconds']:.0f} s) bring a ViT of {vit['macs'] / 1e6:.1f} M MACs to "
        f"{100 * vit['accuracy'][0]:.1f} % of {vit['test_pictures']:,} scenes. In the block where it is most, "
        f"{100 * max(on_object['trained']):.0f} % of the class token's weight lies on the object "
        f"({100 * on_object['chance']:.0f} % by chance; one seed).",
        f"5. Masked and gathered networks differ by at most {masks['largest_difference_model']:.0e}, gradients included. With the "
        f"official mask, at logits of standard deviation {official['spread']:.0f}, {100 * official['another_class']:.0f} % of "
        "pictures get another class.",
        f"6. In units of the exact gradient's length, straight-through at temperature 1 is off by {through['bias']:.2f} on average "
        f"and one draw is noisy by {through['noise']:.2f}; REINFORCE with a baseline by 0 and {reinforce['noise']:.1f} "
        f"(medians of {gumbel['problems']} problems of 8 tokens).",
        "7. See the table.",
        f"8. From 8 x 8 to 3 x 3 a plain bilinear resize never reads {lookup['never_read']['plain bilinear']['8 to 3']} of 64 patches. On an "
        f"errand that reads in one place and writes in others, one head of `probs` leaves {left['probs']} % of the error, `renorm` "
        f"{left['renorm']}, `resoftmax` {left['resoftmax']}, two heads of `probs` {left['probs, two heads']} (medians of "
        f"{len(lookup['seeds'])} seeds).",
        "9. See the table.", "10. See the table.", "11. See the table.",
        f"12. A ViT's training step is {sum(gpu['array_calls']['ViT'].values())} array calls, each a launch on a GPU or more, whatever the "
        f"batch. Rounded to bf16 the factors of a product cost {100 * gpu['product_errors']['bf16'][-1]:.2f} % of it; of starting weights, "
        f"{100 * gpu['updates_lost']['0.0001']:.0f} % would not feel a step of 1e-4.",
        f"13. Such a step is {step['all_launches'][0]} array calls as CuPy makes them, sums of gradients included, {step['all_launches'][1]} launches "
        f"with fused ops and {step['all_launches'][2]} with whole branches in bf16; for a picture it moves "
        f"{', '.join(f'{size / 1e6:.1f}' for size in step['bytes_per_picture'])} MB. A running sum of {step['sums']['terms'][-1]:,} bf16 "
        f"numbers is off by {100 * step['sums']['in bf16'][-1]:.0f} %. A graph that froze its learning rate or its step number is wrong from "
        f"step {step['frozen']['step number']['first_wrong']} on, and says nothing."))


@part
def dynamicvit(results):
    """Lesson 07 in full, on scenes: a row per arm, paired by seed with the ViT that got as many further steps."""
    found = load(results / "07_dynamicvit_full.json")
    return f"{arms_text(found)}\n\nWith bounds that were set before the run:\n\n{claims_text(found['results']['claims'])}"


@part
def dynamicvit_cifar10(results):
    """Lesson 07 in full on CIFAR-10: the headline arms, one seed."""
    found = load(results / "07_dynamicvit_full_cifar10.json")
    return f"{arms_text(found)}\n\n{claims_text(found['results']['claims'])}"


@part
def vit_cifar10(results):
    """Two ViTs from scratch: lesson 04's in full, within an hour, and the longer one that lesson 07 starts from."""
    short, long = (load(results / f"{name}_full_cifar10.json") for name in ("04_vit", "07_dynamicvit"))
    start, first = long["results"]["starts"][0], short["results"]
    return (f"`python lessons/04_vit.py --full --data cifar10` trains the ViT of this table for {first['steps']:,} steps and gets "
            f"{100 * first['accuracy'][0]:.1f} % of {first['test_pictures']:,} test pictures right, after "
            f"{first['train_seconds'] / 60:.0f} minutes of training; lesson 07 does it for {long['results']['recipe']['first_steps']:,} "
            f"steps, {start['trained']['seconds'] / 60:.0f} minutes, and gets {100 * start['accuracy']:.1f} % (one seed each: "
            f"{short['seed']}; batch {long['results']['recipe']['batch']}, AdamW at {long['results']['recipe']['lr']}, warm-up and "
            f"cosine decay, moved and mirrored pictures). {machine_text(short)}")


def arms_text(found):
    """The table of lesson 07's arms and its conditions. The share of object is a column where it is known."""
    rows, recipe, seeds = (found["results"][name] for name in ("rows", "recipe", "seeds"))
    reference, known = rows["ViT, further"], any(row.get("on_object") for arm in rows.values() for row in arm)
    whole = any("all_tokens" in row for arm in rows.values() for row in arm)
    heads = ["arm", "seeds", "accuracy", "minus ViT's, points", *["with all tokens"] * whole, "M MACs", *["object share, by stage"] * known,
             "tokens kept in training (target)"]
    lines = []
    for name, arm in rows.items():
        reached = [100 * row["accuracy"] for row in arm]
        gaps = [value - 100 * row["accuracy"] for value, row in zip(reached, reference)]
        seen = [row["on_object"] for row in arm if row.get("on_object")]
        shares = [statistics.mean(values) for values in zip(*([share / k["all"] for share in k["stages"]] for k in seen))]
        kept = [statistics.mean(values) for values in zip(*(row["ratios"] for row in arm if "ratios" in row))]
        unpruned = [100 * row["all_tokens"] for row in arm if "all_tokens" in row]
        cells = [name, len(arm), f"{spread_text(reached)} %", "" if arm is reference else spread_text(gaps, "+.1f"),
                 *[f"{spread_text(unpruned)} %" if unpruned else ""] * whole,
                 f"{arm[0]['macs'] / 1e6:.1f}", *[", ".join(f"{share:.2f}" for share in shares)] * known,
                 ", ".join(f"{k:.3f} ({target:.3f})" for k, target in zip(kept, arm[0].get("targets", ())))]
        lines.append(cells)
    start = spread_text([100 * row["accuracy"] for row in found["results"]["starts"]])
    spread = (f"± is the standard deviation over seeds ({', '.join(map(str, seeds))}); differences are paired by seed."
              if len(seeds) > 1 else f"One seed ({seeds[0]}): its spread is not known.")
    shares = "Object share: of the patches kept, over that of all patches (1 is chance)."
    return "\n".join([markdown_table(heads, lines), "", " ".join([spread, *[shares] * known, (
        f"All arms go on from a ViT of {recipe['first_steps']:,} steps "
        f"({start} %), each for {recipe['further_steps']:,} steps of {recipe['batch']} pictures at learning rate "
        f"{recipe['further_lr']}; tested on {recipe['test_pictures']:,} pictures. {machine_text(found)}")])])


def machine_text(found):
    """A sentence about the machine, or, of a run that was made on several, about each."""
    machines = found.get("machines_of_parts", [found["machine"]])
    texts = dict.fromkeys(f"{on['processor']}, {on['cpus']} CPU{'s' * (on['cpus'] > 1)}, NumPy {on['numpy']}, {on['blas']}" for on in machines)
    return f"Machine{'s' * (len(texts) > 1)}: {'; '.join(texts)}."


@part
def lookupvit(results):
    """Lesson 09 in full, on scenes."""
    found = load(results / "09_lookupvit_full.json")
    said = found["results"]
    shares = ", ".join(f"{name} {spread_text(values, '.3f')}" for name, values in said["located"].items())
    return (f"{lookup_arms_text(found)}\n\nShare of the variance that is explained where a head on each patch is asked how much of it is "
            f"object ({said['locate_steps']:,} steps, the same seeds): {shares}.\n\nWith bounds that were set before the run:\n\n"
            f"{claims_text(said['claims'])}")


@part
def lookupvit_cifar10(results):
    """Lesson 09 in full on CIFAR-10: the headline arms and those of one classifier, one seed."""
    found = load(results / "09_lookupvit_full_cifar10.json")
    return f"{lookup_arms_text(found)}\n\n{claims_text(found['results']['claims'])}"


def lookup_arms_text(found):
    """The table of lesson 09's arms and its conditions."""
    said, lines = found["results"], []
    for name, rows in said["rows"].items():
        gaps = [interval_text(*gap) if gap else "" for gap in said["differences"][name]]  # None: its own
        lines.append((name, len(rows), f"{spread_text([100 * row['accuracy'] for row in rows])} %", f"{rows[0]['macs'] / 1e6:.1f}",
                      f"{rows[0]['parameters'] / 1e6:.2f}", f"{rows[0]['steps']:,}", *gaps))
    heads = ("arm", "seeds", "accuracy", "M MACs", "M parameters", "steps", "above its ViT, points [95 %]", "above its LookupViT, points [95 %]")
    return "\n".join([markdown_table(heads, lines), "", (
        f"{said['recipe']['batch']} pictures a step, {tests_text(said)}. Intervals are Student's over paired seeds, or for one seed the "
        f"normal one over test pictures, which does not know how another seed would do. {machine_text(found)}")])


def tests_text(said):
    """How many pictures a lesson's models were tested on, and with which seeds."""
    seeds = said["seeds"]
    return f"{said['recipe']['test_pictures']:,} test pictures, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


@part
def budgets(results):
    """Lesson 10 in full, on scenes."""
    found = load(results / "10_one_model_many_budgets_full.json")
    said, rows, recipe = found["results"], found["results"]["rows"], found["results"]["recipe"]
    heads, lines = ("grid", "M MACs", "one model", "single-size model", "one model less single-size, points", "trained at 3x3 only"), []
    for grid, of_grid in rows["one model"][0].items():
        points = {name: [100 * row[grid]["accuracy"] for row in by_seed if grid in row] for name, by_seed in rows.items()}
        one, single = points["one model"], points.get(f"single {grid}", [])
        lines.append((f"{grid}{'' if grid in said['grids'] else ' (never trained)'}", f"{of_grid['macs'] / 1e6:.1f}", f"{spread_text(one)} %",
                      f"{spread_text(single)} %" if single else "",
                      spread_text([a - b for a, b in zip(one, single)], "+.1f") if single else "",
                      f"{spread_text(points['trained at 3x3 only'])} %"))
    return "\n".join([markdown_table(heads, lines), "", (
        f"Every model was trained for {recipe['steps']:,} steps of {recipe['batch']} pictures, the one model at a grid drawn for each step "
        f"from {', '.join(said['grids'])}; {tests_text(said)}, ± is the standard deviation over seeds. "
        f"{machine_text(found)}"), "", claims_text(said["claims"])])


@part
def robustness(results):
    """Lesson 11 in full, on scenes."""
    found = load(results / "11_robustness_full.json")
    said, recipe = found["results"], found["results"]["recipe"]
    heads = ("arm", "M MACs", "clean error, %", "error under damage, %", "mCE", "relative mCE", "above the curve of ViTs, points")
    lines = [(name, f"{row['macs'] / 1e6:.1f}", *(spread_text(row[key]) for key in ("clean_error", "error", "mce", "relative_mce")),
              spread_text(row["above_curve"], "+.1f")) for name, row in said["summary"].items()]
    return "\n".join([markdown_table(heads, lines), "", (
        f"Nine corruptions in five strengths, in the style of CIFAR-10-C; mCE is the error over the ViT's, in percent, mean over "
        f"corruptions; relative mCE the same of what damage adds. \"Above the curve\": accuracy under damage beyond that of ViTs of the "
        f"same clean accuracy, which were trained for fewer steps; not known where an arm is more accurate than the ViT of its seed, and "
        f"\"(2 of 3)\" says for how many seeds it is. {recipe['steps']:,} and {recipe['further']:,} steps, "
        f"{tests_text(said)}. {machine_text(found)}")])


def claims_text(claims):
    """A line per claim of a lesson, whether it holds or not."""
    lines = []
    for claim in claims:
        low, high = claim["bound"]
        bound = ", ".join(f"{word} {value:g}" for word, value in (("above", low), ("at most", high)) if value is not None)
        lines.append(f"- {'holds' if claim['holds'] else '**fails**'}: {claim['claim']}: {claim['measured']:.3g} ({bound})")
    return "\n".join(lines)
