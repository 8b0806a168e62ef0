"""The main job at a small size, from pictures to table: the models learn, and what they drop and keep makes
sense."""
import numpy as np
import pytest

from tinytoken.experiments import Recipe, compare


@pytest.mark.slow
def test_all_three_models_learn_the_scenes(tmp_path):
    recipe = Recipe(steps=480, batch=32, dim=48, depth=4, prune_before=(1, 2, 3), train_pictures=4000,
                    test_pictures=500)
    table, _ = compare.run(recipe, tmp_path, device="cpu", bar=False)
    reached = {row["model"]: row["accuracy"] for row in table["rows"]}
    macs = {row["model"]: row["macs"] for row in table["rows"]}
    assert reached["ViT"] > 0.4 and reached["LookupViT"] > 0.4, "chance is 0.1"
    assert reached["DynamicViT"] > reached["ViT"] - 0.1
    assert macs["DynamicViT"] < 0.7 * macs["ViT"] and macs["LookupViT"] < 0.6 * macs["ViT"]
    kept = table["kept_on_object"]
    more = np.diff([kept["all"], *kept["stages"]])
    assert np.all(more > 0), "more object than chance, and than in the stage before"
