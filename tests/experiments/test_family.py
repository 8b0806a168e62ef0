"""The table of all methods: each has a row, or a reason why not, and is compared with its dense model."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken.experiments import Trial, family

SIZES = dict(dim=24, heads=3, train_pictures=8, test_pictures=4, batch=8)
FACES = pytest.mark.parametrize("data", family.FACES)


def methods_of(data):
    return family.FACES[data][0](family.recipe_of(data, **SIZES))


def test_every_model_has_a_row_or_a_reason():
    rows = {method.model for data in family.FACES for method in methods_of(data).values()}
    assert not rows & family.ELSEWHERE.keys() and all(family.ELSEWHERE.values())
    assert rows | family.ELSEWHERE.keys() == set(tt.models.names())


@FACES
def test_every_method_names_what_it_thins_and_its_base(data):
    methods = methods_of(data)
    assert next(iter(methods)) == methods[family.ALL].base == family.ALL
    for name, method in methods.items():
        assert method.kind in ("rows", "keys", "input", "nothing"), name
        assert methods[method.base].dense == "", f"{name} is compared with a method"


@FACES
def test_every_model_has_64_tokens_to_begin_with(data):
    trial = Trial(family.recipe_of(data, **SIZES), bar=False)
    model = trial.new(methods_of(data)[family.ALL].model)
    vit = getattr(model, "backbone", model)
    assert np.prod(vit.patch_embed.grid) == 64


@pytest.mark.parametrize("data, questions", [("scenes", None), ("actor_clips", 1), ("referring", 2)])
def test_what_is_asked_beside_the_pictures(data, questions):
    """The answers to all test pictures are those to each alone, with its own boxes or words."""
    trial = Trial(family.recipe_of(data, **SIZES), bar=False)
    method = methods_of(data)[family.ALL]
    model = trial.new(method.model, **method.config)
    answers, images = family.answers(trial, model), trial.prepare(trial.test.images)
    assert len(family.asked(trial)) == (questions or 1) and len(answers) == 4
    for i in range(4):
        alone = [model.eval()(images[i:i + 1], **question).logits.data[0]
                 for question in family.questions(data, trial.test.labels[i:i + 1])]
        assert np.allclose(answers[i], np.stack(alone) if questions == 2 else alone[0], atol=1e-5)
    run = family.inference(trial, {"it": model}, 2)["it"]()
    assert np.allclose(run, answers[:2, 0] if questions == 2 else answers[:2], atol=1e-5)


def test_costs_are_those_beside_the_base():
    methods = {"ViT": family.Method("nothing", "vit"), "Swin": family.Method("keys: few", "swin"),
               "DynamicSwin": family.Method("rows of the MLP: few", "dynamicswin", dense="Swin")}
    cost = {"macs": {"ViT": 100, "Swin": 80, "DynamicSwin": 40},
            "seconds": {"1": {"ViT": [2.0, 4.0, 3.0], "Swin": [1.0, 1.0, 1.0],
                              "DynamicSwin": [2.0, 2.0, 0.5]}},
            "megabytes": {"ViT": {"step": 10.0}, "Swin": {"step": 5.0}, "DynamicSwin": {"step": 4.0}}}
    assert family.beside_base(cost, methods) == {
        "ViT": {"macs": 1, "1": 1, "memory": 1}, "Swin": {"macs": 0.8, "1": 3, "memory": 0.5},
        "DynamicSwin": {"macs": 0.5, "1": 0.5, "memory": 0.8}}
    assert "memory" not in family.beside_base(cost | {"megabytes": {}}, methods)["ViT"]
    rows = {"ViT": [{"mIoU": 0.5}], "Swin": [{"mIoU": 0.25}], "DynamicSwin": [{"mIoU": 0.5}]}
    results = {"metric": "mIoU", "rows": rows}
    assert family.above_base(results, methods) == {"Swin": [-25], "DynamicSwin": [25]}
    assert family.reached(results, "rows/Swin", "mIoU") == 25
    assert family.reached({"arms": {"a": {"mIoU": 30.5, "M macs": 2}}}, "arms/a", "mIoU") == 30.5
    assert np.isnan(family.reached(results, "rows/Swin", "accuracy"))
    by_seed = {"seed0 ViT": {"mIoU": 0.5}, "seed1 ViT": {"mIoU": 0.75}, "seed1 Swin": {"mIoU": 0.25}}
    assert family.reached({"by_seed": by_seed}, "by_seed/* ViT", "mIoU") == 62.5
    with refuses("family: no rows at 'by_seed/seed2 *'"):
        family.reached({"by_seed": by_seed}, "by_seed/seed2 *", "mIoU")
