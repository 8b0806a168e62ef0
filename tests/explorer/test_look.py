"""What the page is told of a picture, and what it may not ask."""
import base64
import json

import numpy as np
import pytest

import tinytoken as tt
from tinytoken.data import make_scenes, normalise
from tinytoken.errors import InputError
from tinytoken.explorer import models
from tinytoken.explorer.look import SCENES, Explorer


@pytest.fixture(scope="module")
def explorer():
    return Explorer()


def prepared(explorer, image):
    return normalise(image[None], tuple(explorer.about["mean"]), tuple(explorer.about["std"]))


def test_it_answers_as_the_models_do(explorer):
    """The models by themselves, on the same scene, with the defaults of the sliders."""
    image = make_scenes(8, split="test").images[7]
    seen = json.loads(explorer.answer('{"scene": 7}'))["models"]
    by_itself, calls = models.load()[0], {"lookupvit": {"compressed": (3, 3)}}
    for name in models.NAMES:
        with tt.no_grad(), models.keeping(by_itself["dynamicvit"], 0.7):
            images, call = prepared(explorer, image), calls.get(name, {})
            wanted = tt.ops.softmax(by_itself[name](images, **call).logits).data[0]
            macs = tt.macs(by_itself[name], images, **call).total
        assert np.abs(wanted - seen[name]["probabilities"]).max() < 1e-4
        assert seen[name]["macs"] == macs


def test_a_picture_is_the_scene_that_it_was_made_of(explorer):
    first = explorer.look(scene=3)
    again = explorer.look(pixels=first["pixels"])
    assert again["pixels"] == first["pixels"] and again["label"] is None
    for name in models.NAMES:
        assert again["models"][name]["probabilities"] == first["models"][name]["probabilities"]


def test_the_share_sets_what_is_kept_and_what_it_costs(explorer):
    counts, costs = [], []
    for keep in models.KEEPS:
        seen = explorer.look(scene=1, keep=keep)["models"]["dynamicvit"]
        stages = [stage["kept"] for stage in seen["stages"]]
        assert all(set(after) <= set(before) for before, after in zip(stages, stages[1:]))
        left = [weight is not None for weight in seen["attention"]]
        assert np.flatnonzero(left).tolist() == stages[-1]
        counts.append([len(places) for places in stages])
        costs.append(seen["macs"])
    assert counts == sorted(counts) and counts[-1] == [64, 64, 64] and counts[8] == [44, 31, 21]
    assert costs == sorted(set(costs))


def test_what_is_kept_is_as_much_object_as_is_said(explorer):
    shares = make_scenes(3, split="test").object_share(4)[2]
    seen = explorer.look(scene=2)["models"]["dynamicvit"]
    assert seen["object"] == pytest.approx(shares.mean(), abs=1e-4)
    for stage in seen["stages"]:
        assert stage["object"] == pytest.approx(shares[stage["kept"]].mean(), abs=1e-4)


@pytest.mark.parametrize("grid, token", [(1, 0), (2, 3), (8, None)])
def test_the_grid_and_the_token(explorer, grid, token):
    seen = explorer.look(scene=0, grid=grid, token=token)["models"]["lookupvit"]
    assert sum(seen["attention"]) == pytest.approx(grid * grid, rel=0.01)
    assert sum(seen["token_attention"]) == pytest.approx(1, rel=0.01)
    assert seen["token"] == token if token is not None else 0 <= seen["token"] < grid * grid


def test_attention_of_an_early_block_is_before_the_stages(explorer):
    first, last = (explorer.look(scene=0, block=block)["models"] for block in (1, 6))
    assert None not in first["dynamicvit"]["attention"] and None in last["dynamicvit"]["attention"]
    assert first["vit"]["attention"] != last["vit"]["attention"]


def test_a_picture_of_another_kind_is_said_to_be_one(explorer):
    white = base64.b64encode(b"\xff" * 3072).decode()
    assert "mean of red" in explorer.look(pixels=white)["unlike"][0]
    assert explorer.look(scene=0)["unlike"] == []


def test_the_models_are_small_and_say_how_good_they_are(explorer):
    assert (models.HERE / models.WEIGHTS).stat().st_size <= 1_500_000
    known = explorer.setup()["models"]
    assert set(known["dynamicvit"]["at"]) == {f"{keep:.2f}" for keep in models.KEEPS}
    assert set(known["lookupvit"]["at"]) == {f"{n}x{n}" for n in range(1, 9)}
    for values in known.values():
        assert all(set(row) == {"accuracy", "macs"} for row in values["at"].values())


@pytest.mark.slow
def test_the_accuracies_are_those_of_the_models(explorer):
    """On a quarter of the test pictures."""
    test = make_scenes(500, split="test")
    for name, setting, call in (("vit", "", {}), ("lookupvit", "3x3", {"compressed": (3, 3)})):
        images = normalise(test.images, tuple(explorer.about["mean"]), tuple(explorer.about["std"]))
        with tt.no_grad():
            right = explorer.models[name](images, **call).logits.data.argmax(axis=1) == test.labels
        known = explorer.about["models"][name]["at"][setting]["accuracy"]
        assert right.mean() == pytest.approx(known, abs=0.05)


BAD = {
    "no JSON": ("{", "a request that is no JSON object (JSONDecodeError"), "a list": ("[]", "no JSON object"),
    "unknown": ('{"scene": 1, "self": 2}', "asked with self, which is not known"),
    "nothing": ("{}", "expected either a scene or pixels"),
    "both": ('{"scene": 1, "pixels": ""}', "expected either a scene or pixels"),
    "scene": (f'{{"scene": {SCENES}}}', "scene 100, expected a whole number from 0 to 99"),
    "no number": ('{"scene": true}', "scene True, expected"),
    "base64": ('{"pixels": "###"}', "pixels are not base64"),
    "pixels": ('{"pixels": 3}', "pixels are not base64"),
    "few": ('{"pixels": "aaaa"}', "pixels of 3 bytes, expected 3,072"),
    "keep": ('{"scene": 1, "keep": 0.72}', "keep 0.72, expected one of 0.3, 0.35,"),
    "huge": ('{"scene": 1, "keep": 1' + 400 * "0" + "}", "expected one of"),
    "NaN": ('{"scene": 1, "keep": NaN}', "keep nan"), "text": ('{"scene": 1, "keep": "1"}', "keep '1'"),
    "grid": ('{"scene": 1, "grid": 9}', "grid 9, expected a whole number from 1 to 8"),
    "block": ('{"scene": 1, "block": 0}', "block 0, expected a whole number from 1 to 6"),
    "token": ('{"scene": 1, "grid": 2, "token": 4}', "token 4, expected null, or a whole number from 0 to 3")}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_what_is_refused(explorer, text, message):
    with pytest.raises(InputError) as error:
        explorer.answer(text)
    assert str(error.value).startswith("explore: ") and message in str(error.value)
