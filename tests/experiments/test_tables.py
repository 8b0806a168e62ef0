"""Tables as Markdown, and what their numbers were measured with."""
import dataclasses

from tiny import RECIPE
from tinytoken.experiments.tables import conditions_text, markdown_table, table_text


def row(name, accuracy, macs, parameters, one, many):
    return {"model": name, "accuracy": accuracy, "macs": macs, "parameters": parameters,
            "images_per_second": {"1": [one, 1, 9], "128": [many, 3.4, 5000.6]}}


def test_table_text():
    table = {"rows": [row("ViT", 0.9375, 50_000_000, 690_000, 123.4, 1234.5),
                      row("DynamicViT", 0.5, 25_500_000, 1_700_000, 99.6, 2000)],
             "test_pictures": 2000, "kept_on_object": {"all": 0.15, "stages": [0.2, 0.34567]}}
    lines = ["| model | accuracy | M MACs | of ViT's | parameters | images/s, batch 1 "
             "| images/s, batch 128 |",
             "|---|---|---|---|---|---|---|",
             "| ViT | 93.8 % | 50.00 | 1.00 | 690,000 | 123 (1 to 9) | 1234 (3 to 5001) |",
             "| DynamicViT | 50.0 % | 25.50 | 0.51 | 1,700,000 | 100 (1 to 9) | 2000 (3 to 5001) |",
             "",
             "2,000 test pictures; MACs are multiply-adds per image, counted by the engine; images/s are "
             "medians (lowest to highest round).",
             "Share of object in the patches that DynamicViT keeps, by stage: 20.0 %, 34.6 %; in all patches "
             "(chance): 15.0 %."]
    assert table_text(table) == "\n".join(lines)
    assert table_text(table | {"kept_on_object": None}) == "\n".join(lines[:-1])
    other = {"rows": [row("ViT", 0.9175, 1, 1, 1, 1), row("DynamicViT", 0.54, 1, 1, 1, 1)],
             "test_pictures": 2000,
             "kept_on_object": {"all": 0.17, "stages": [0.3, 0.34567]}}
    lines[2:4] = ["| ViT | 92.8 ± 1.4 % | 50.00 | 1.00 | 690,000 | 123 (1 to 9) | 1234 (3 to 5001) |",
                  "| DynamicViT | 52.0 ± 2.8 % | 25.50 | 0.51 | 1,700,000 | 100 (1 to 9) "
                  "| 2000 (3 to 5001) |"]
    lines[-1] = ("Share of object in the patches that DynamicViT keeps, by stage: 25.0 %, 34.6 %; in all "
                 "patches (chance): 16.0 %.")
    assert table_text(table, other) == "\n".join(lines)


def test_conditions_text():
    seconds = {"vit-start": 90, "vit": 30, "dynamicvit": 60, "lookupvit-start": 150, "lookupvit": 60}
    table = {"recipe": dataclasses.asdict(RECIPE) | {"steps": 6000},
             "training": {k: {"seconds": v} for k, v in seconds.items()},
             "machine": {"processor": "An EPYC", "cpus": 2, "numpy": "2.4", "blas": "OpenBLAS Zen, 2 threads",
                         "environment": {}}}
    text = ("Recipe: 6,000 steps of 8 pictures, the last 1,500 at learning rate 0.0003 after 0.001; dim 16, "
            "depth 2, 2 heads, "
            "patch 8. One seed, 0. Training: ViT 2.0 min, DynamicViT 1.0 min after the ViT's first 1.5, "
            "LookupViT 3.5 min. "
            "Machine: An EPYC, 2 CPUs, NumPy 2.4, OpenBLAS Zen, 2 threads, no BLAS variables set.")
    assert conditions_text(table) == text
    other = table | {"recipe": table["recipe"] | {"seed": 5}}
    several = "Seeds 0, 5: accuracies are mean and standard deviation, speeds and times those of the first."
    assert conditions_text(table, other) == text.replace("One seed, 0.", several)
    table["machine"]["environment"] = {"OMP_NUM_THREADS": "2", "MALLOC_X": "1"}
    assert conditions_text(table).endswith(", OMP_NUM_THREADS=2 MALLOC_X=1.")
    table["machine"]["compiled"] = True
    assert conditions_text(table).endswith(", OMP_NUM_THREADS=2 MALLOC_X=1, ops compiled by Numba.")


def test_markdown_table():
    assert markdown_table(["arm", "points"], [["ViT", 1.5], ["none", None]]) == (
        "| arm | points |\n|---|---|\n| ViT | 1.5 |\n| none | None |")
