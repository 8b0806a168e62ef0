"""Registries: what is offered under a name, in the order of registration, and who reads them."""
import pytest

import tinytoken as tt
from small import refuses
from tinytoken import bench, data, models, tasks
from tinytoken.__main__ import parser
from tinytoken.registry import Registry


def test_entries_are_registered_in_order_and_stay_what_they_are():
    shape = Registry("shape")

    @shape("square")
    class Square:
        pass

    @shape("disc")
    def disc():
        return "round"
    assert list(shape) == ["square", "disc"] and shape.pick("square") is Square
    assert shape.pick("disc")() == "round"
    with refuses("shape: 'cube', expected one of square, disc"):
        shape.pick("cube")
    with refuses("shape: None, expected one of square, disc"):
        shape.pick(None)


def test_a_later_entry_takes_the_place_of_an_earlier_and_registries_are_apart():
    one, other = Registry("one"), Registry("other")
    one("a")(1)
    one("b")(2)
    one("a")(3)
    assert dict(one) == {"a": 3, "b": 2} and list(one) == ["a", "b"] and not other


def test_the_package_registers_all_that_its_folders_hold():
    assert {"vit", "dynamicvit", "lookupvit", "randomtokens"} <= models.model.keys()
    assert {"classify", "distil"} <= tasks.task.keys()
    assert {"scenes", "pixel_scenes", "cifar10", "cifar100"} <= data.dataset.keys()
    assert all(isinstance(registry, Registry) for registry in (models.model, tasks.task, data.dataset))


def test_the_command_line_offers_what_is_registered(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["bench", "--model", "resnet"])
    error = capsys.readouterr().err
    assert all(name in error for name in models.names())
    with pytest.raises(SystemExit):
        parser().parse_args(["compare", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in data.dataset)
    for name in models.names():
        assert parser().parse_args(["bench", "--model", name]).model == name


def test_a_model_of_ones_own_is_offered_like_the_others(tmp_path):
    @models.model("bright")
    class Bright(models.ViT):
        """A class needs no more than its name to be made, timed, saved and loaded."""
    try:
        assert "bright" in models.names()
        model = models.create("bright", image_size=8, dim=8, depth=1, heads=2)
        tt.checkpoint.save(tmp_path / "m.npz", model)
        again, header = tt.checkpoint.load_model(tmp_path / "m.npz")
        assert type(again) is Bright and header["model"] == "Bright"
        assert type(bench.Job("bright", batch=2, image_size=8, dim=8, depth=1, heads=2).model) is Bright
    finally:
        del models.model["bright"]
    with refuses(f"checkpoint: {tmp_path / 'm.npz'} holds a 'Bright', expected one of "
                 f"{', '.join(models.names())}"):
        tt.checkpoint.load_model(tmp_path / "m.npz")
