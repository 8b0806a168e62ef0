"""Tables, as Markdown and for the terminal."""
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .damage import corruption_error, mean_error
from .stats import interval_text, range_text, spread_text


def table_text(*tables: dict[str, Any]) -> str:
    """The table as Markdown. Of several, which differ in their seeds: mean and standard deviation of the
    accuracies, and the rest of the first."""
    table = tables[0]
    heads = "| model | accuracy | M MACs | of ViT's | parameters | images/s, batch 1 | images/s, batch 128 |"
    lines = [heads, "|---|---|---|---|---|---|---|"]
    for i, row in enumerate(table["rows"]):
        accuracies = [100 * t["rows"][i]["accuracy"] for t in tables]
        speed = row["images_per_second"]
        lines.append(f"| {row['model']} | {spread_text(accuracies)} % | {row['macs'] / 1e6:.2f} "
                     f"| {row['macs'] / table['rows'][0]['macs']:.2f} | {row['parameters']:,} "
                     f"| {range_text(speed['1'])} | {range_text(speed['128'])} |")
    lines += ["", f"{table['test_pictures']:,} test pictures; MACs are multiply-adds per image, "
                  f"counted by the engine; images/s are medians (lowest to highest round)."]
    if table["kept_on_object"]:
        stages = ", ".join(f"{100 * statistics.mean(shares):.1f} %"
                           for shares in zip(*(t["kept_on_object"]["stages"] for t in tables)))
        chance = statistics.mean(t["kept_on_object"]["all"] for t in tables)
        lines.append(f"Share of object in the patches that DynamicViT keeps, by stage: {stages}; "
                     f"in all patches (chance): {100 * chance:.1f} %.")
    return "\n".join(lines)


def conditions_text(*tables: dict[str, Any]) -> str:
    """What the results of table_text were measured with: recipe, seeds, machine."""
    recipe, on = tables[0]["recipe"], tables[0]["machine"]
    seeds = ", ".join(str(t["recipe"]["seed"]) for t in tables)
    whose = (f"One seed, {seeds}" if len(tables) == 1 else
             f"Seeds {seeds}: accuracies are mean and standard deviation, "
             f"speeds and times those of the first")
    minutes = {name: sum(part["seconds"] for phase, part in tables[0]["training"].items()
                         if phase.startswith(name)) / 60
               for name in ("vit", "dynamicvit", "lookupvit")}
    taught = tables[0]["training"]["vit-start"]["seconds"] / 60
    settings = " ".join(f"{k}={v}" for k, v in on["environment"].items()) or "no BLAS variables set"
    return (f"Recipe: {recipe['steps']:,} steps of {recipe['batch']} pictures, the last "
            f"{recipe['steps'] // 4:,} at learning rate {recipe['further_lr']} after {recipe['lr']}; "
            f"dim {recipe['dim']}, depth {recipe['depth']}, {recipe['heads']} heads, "
            f"patch {recipe['patch']}. {whose}. "
            f"Training: ViT {minutes['vit']:.1f} min, DynamicViT {minutes['dynamicvit']:.1f} min "
            f"after the ViT's first {taught:.1f}, LookupViT {minutes['lookupvit']:.1f} min. "
            f"Machine: {on['processor']}, {on['cpus']} CPUs, NumPy {on['numpy']}, {on['blas']}, {settings}"
            f"{compiled_text(on)}.")


def compiled_text(on: Mapping[str, Any]) -> str:
    """What is to be said of a machine whose ops ran compiled (compiled/); on: as `timing.machine` says it."""
    return ", ops compiled by Numba" if on.get("compiled") else ""


def arms_text(rows: Mapping[str, list[dict[str, Any]]], above: Mapping[str, Sequence[float]],
              which: str) -> str:
    """The arms of an experiment, for the terminal. rows: {arm: what Trial.measure notes of it, by seed}.
    above: {arm: how many points `which`, one of the arms, is above it}, as stats.difference returns it."""
    lines = [f"{'arm':<22}{'accuracy, %':>14}{'M MACs':>9}{'M params':>10}{f'{which} above it [95 %]':>28}"]
    for name, by_seed in rows.items():
        gap = interval_text(*above[name]) if name in above else ""
        lines.append(f"{name:<22}{spread_text([100 * row['accuracy'] for row in by_seed]):>14}"
                     f"{by_seed[0]['macs'] / 1e6:>9.2f}{by_seed[0]['parameters'] / 1e6:>10.2f}{gap:>28}")
    return "\n".join(lines)


def family_text(values: Mapping[str, Any]) -> str:
    """The table of lessons/full/family.py as Markdown, from its results: a row per method, the first of which
    the others are compared with. Speeds: the median, and in brackets how many times as fast as the first, by
    the rounds' median and quartiles."""
    first, metric, lines = next(iter(values["rows"])), values["metric"], []
    for name, by_seed in values["rows"].items():
        macs, memory = by_seed[0]["macs"], values["megabytes"].get(name)
        speeds = [f"{int(size) / statistics.median(taken[name]):,.0f} "
                  f"({faster_text(taken[first], taken[name])})" for size, taken in values["seconds"].items()]
        reached = spread_text([100 * row[metric] for row in by_seed])
        lines.append((name, values["thins"][name], f"{reached} %", f"{macs / 1e6:.1f}",
                      f"{macs / values['rows'][first][0]['macs']:.2f}",
                      f"{by_seed[0]['parameters'] / 1e6:.2f}", *speeds,
                      *(f"{memory[call]:.0f}" if memory else "" for call in ("step", "inference"))))
    heads = ("method", "it thins", metric, "M MACs", f"of {first}'s", "M parameters",
             *(f"images/s, batch {size} (of {first}'s)" for size in values["seconds"]), "a step, MB",
             "inference, MB")
    return markdown_table(heads, lines)


def headline_text(values: Mapping[str, Any]) -> str:
    """The table of lessons/full/lookupvit_headline.py as Markdown, from its results: a row per arm, with how
    it bears damage beside the ViT."""
    lines = []
    for name, by_seed in values["rows"].items():
        found, gap = values["damaged"][name], values["above"].get(name)
        over = [corruption_error(own, vit) for own, vit in zip(found, values["damaged"]["ViT"])]
        lines.append((name, len(by_seed), f"{spread_text([100 * row['accuracy'] for row in by_seed])} %",
                      f"{by_seed[0]['macs'] / 1e6:.1f}", f"{by_seed[0]['parameters'] / 1e6:.2f}",
                      interval_text(*gap) if gap else "",
                      spread_text([100 * mean_error(own) for own in found]), spread_text(over)))
    heads = ("arm", "seeds", "accuracy", "M MACs", "M parameters", "LookupViT above it, points [95 %]",
             "error under damage, %", "mCE")
    return markdown_table(heads, lines)


def recipe_text(rows: Mapping[str, dict[str, Any]]) -> str:
    """The table of lessons/full/lookupvit_recipe.py as Markdown, the best arm first."""
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        alike = [step[-1] for step in row["cosines"] if step]
        lines.append((name, f"{100 * row['accuracy']:.2f} %", f"{row['macs'] / 1e6:.1f}",
                      f"{row['trained']['class']:.2f}", f"{alike[-1]:.2f}" if alike else ""))
    heads = ("arm", "accuracy", "M MACs", "class loss in training", "how alike tokens read, last block")
    return markdown_table(heads, lines)


def faster_text(than: Sequence[float], own: Sequence[float]) -> str:
    """How many times as fast as another, '1.50 [1.40, 1.60]', from the seconds of both by round: median and
    quartiles of the ratios inside a round."""
    low, middle, high = statistics.quantiles([b / a for a, b in zip(own, than)], n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. heads: a text per column; rows: as many cells each."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])
