"""What holds of every registered model: its name, its configuration, one output in every mode, its loss,
draws and panels."""
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest

import tinytoken as tt
from equations import Equations
from small import SMALL, gumbel, masks, pictures, refuses, same, shaken, softmax
from tinytoken import models, nn, ops
from tinytoken.cost import graph_text
from tinytoken.models import DynamicViT, LookupViT, Model, Output, ViT, dynamicvit_loss, lookupvit_loss
from tinytoken.models.lookupvit import PAPER
from tinytoken.models.controls import CentreTokens
from tinytoken.models.vit import ViTConfig
from tinytoken.registry import Registry
from tinytoken.tasks import task as tasks

DEEP = SMALL | dict(depth=6)  # so that every model's own options may stay as they are
SIZED = [name for name in models.names() if issubclass(models.model[name].Config, models.Sizes)]


def inputs(model, batch=2):
    """Pictures, or clips, as the model takes them."""
    return np.random.default_rng(0).standard_normal((batch, *model.config.input_shape))


def patches(model):
    return math.prod(model.patch_embed.grid)


def answered(model, batch):
    """The shape of its logits: a row for each picture, for each pixel, or for its one actor; of a mask one
    number for each pixel."""
    sides = model.config.input_shape[-2:]
    return (batch, *{"segment": (*sides, 5), "refer": sides, "actions": (1, 5)}.get(model.task, (5,)))


def right(model):
    """Labels of two pictures."""
    if model.task not in ("segment", "refer"):
        return RIGHT
    return np.random.default_rng(1).integers(0, 5 if model.task == "segment" else 2, answered(model, 2)[:3])


each_name = pytest.mark.parametrize("name", models.names())
each_sized = pytest.mark.parametrize("name", SIZED)
RIGHT = np.array([4, 1])


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


# Names

def test_the_papers_models_are_there():
    assert models.names()[:3] == ["vit", "dynamicvit", "lookupvit"] and isinstance(models.model, Registry)
    assert models.model.pick("lookupvit") is LookupViT
    with refuses(f"model: 'resnet', expected one of {', '.join(models.names())}"):
        models.create("resnet", dim=8)


@each_name
def test_a_model_is_called_by_its_class_and_has_a_task(name):
    kind = models.model[name]
    assert name == kind.__name__.lower() and getattr(models, kind.__name__) is kind
    assert issubclass(kind, Model)
    assert kind.task in tasks and dataclasses.is_dataclass(kind.Config)


def test_create_makes_the_model_that_its_class_makes():
    made, model = models.create("dynamicvit", **SMALL, prune_before=(1,), keep_ratios=(0.5,)), None
    tt.manual_seed(0)
    model = DynamicViT(**SMALL, prune_before=(1,), keep_ratios=(0.5,))
    assert type(made) is DynamicViT and made.config == model.config
    assert all(np.array_equal(array, model.state_dict()[name]) for name, array in made.state_dict().items())


# Configurations

@each_name
def test_an_unknown_option_is_refused_and_the_known_are_named(name):
    kind = models.model[name]
    with pytest.raises(tt.InputError) as error:
        models.create(name, registers=4)
    text = str(error.value)
    assert text.startswith(f"{kind.__name__}: got an unexpected keyword argument 'registers'; it takes (")
    assert all(field.name in text for field in dataclasses.fields(kind.Config))
    assert inspect.signature(kind) == inspect.signature(kind.Config)


def test_sizes_may_be_given_by_place_and_not_too_many():
    assert ViT(8, 2, 8, 2, 2, 3, 5).config == models.vit.ViTConfig(
        image_size=8, patch_size=2, dim=8, depth=2, heads=2, mlp_ratio=3, num_classes=5)
    with pytest.raises(tt.InputError, match="^ViT: takes from 1 to 8 positional arguments but 9 were given; "
                                            "it takes .image_size"):
        ViT(8, 2, 8, 2, 2, 3, 5, 3)


def test_a_mistake_inside_is_no_wrong_option():
    def broken(*_):
        raise TypeError("inside")
    config = dataclasses.dataclass(frozen=True)(type("Strict", (models.vit.ViTConfig,),
                                                     {"__post_init__": broken}))
    for parts in ({"build": broken}, {"Config": config}):
        with pytest.raises(TypeError, match="^inside$"):
            type("Broken", (ViT,), parts)(**SMALL)


@each_sized
def test_a_configuration_goes_through_json_and_cannot_be_changed(name):
    """Lists, which JSON makes of tuples, are tuples again."""
    model = models.create(name, **DEEP | dict(image_size=(8, 12)))
    written = json.dumps(dataclasses.asdict(model.config))
    again = models.create(name, **json.loads(written))
    assert again.config == model.config and again.config.image_size == (8, 12)
    assert not any(isinstance(value, list) for value in vars(again.config).values())
    assert again.load_state_dict(model.state_dict()) == ([], [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.dim = 16


@pytest.mark.parametrize("size, text", [
    ((8, 0), "image_size (8, 0), expected a positive whole number"),
    ((8, 8.5), "image_size (8, 8.5), expected a positive whole number"),
    ([8, "8"], "image_size [8, '8'], expected a positive whole number"),
    ((8,), "image_size (8,), expected H, or (H, W)"),
    ((8, 8, 8), "image_size (8, 8, 8), expected H, or (H, W)"),
], ids=str)
@each_sized
def test_sizes_of_pictures_that_cannot_be(name, size, text):
    with refuses(f"{models.model[name].Config.__name__.removesuffix('Config')}: {text}"):
        models.create(name, **DEEP | dict(image_size=size))


# One output

@each_sized
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trace", [True, False])
def test_every_call_returns_an_output(name, training, trace):
    model = shaken(models.create(name, **DEEP)).train(training)
    draws = model.noise(2, 3, 4)
    out = model(inputs(model), trace=trace, **(draws if training else {}))
    assert isinstance(out, Output) and isinstance(out.logits, tt.Tensor)
    assert out.logits.shape == answered(model, 2)
    assert isinstance(out.tokens, tt.Tensor) and out.tokens.shape[0::2] == (2, 8)
    assert len(out.attention) == (6 if trace else 0)
    for A in out.attention:
        assert A.shape[:2] == (2, 2) and not A.requires_grad
        same(A.data.sum(axis=-1), 1)
    if trace:
        again = model(inputs(model), **(draws if training else {}))
        assert type(again) is type(out)
        if name in ("dovit", "vltp"):  # traced, it hides what otherwise it does not compute
            same(again.logits.data, out.logits.data)
        else:
            assert np.array_equal(again.logits.data, out.logits.data)


@each_sized
def test_pictures_may_be_rectangular(name):
    model = shaken(models.create(name, **DEEP | dict(image_size=(8, 12))))
    images = inputs(model, 3)
    for training in (True, False):
        out = model.train(training)(images)
        assert out.logits.shape == answered(model, 3) and np.isfinite(out.logits.data).all()
    for title, panel in model.show(model.eval()(images, trace=True)):
        assert panel.shape == (3, patches(model)), title
    *before, height, width = images.shape[1:]
    expected = ", ".join(map(str, (*before, height, width)))
    with refuses(f"images: {(3, *before, width, height)}, expected (B, {expected})"):
        model(images.swapaxes(-1, -2))


# Rectangles, in numbers

RECTANGLE = SMALL | dict(image_size=(8, 12))


def wide(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 8, 12))


def test_a_rectangular_vits_positions_are_row_by_row():
    model = ViT(**RECTANGLE)
    table = nn.sincos_positions((4, 6), 8)
    np.testing.assert_allclose(model.pos_embed.data[0, 1:], 0.7 * table, rtol=0, atol=1e-6)
    images, embed = wide(), shaken(model).patch_embed
    for r, c in np.ndindex(4, 6):
        patch = images[:, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2].reshape(2, -1)
        token = 1 + 6 * r + c
        expected = patch @ embed.proj.weight.data.reshape(8, -1).T + embed.proj.bias.data
        same(model.embed(images).data[:, token], expected + model.pos_embed.data[:, token])


def test_a_rectangular_lookupvit_is_its_equations():
    model = shaken(LookupViT(**RECTANGLE | PAPER, compressed=(2, 3))).train()
    equations = Equations(model.state_dict(), 2, "probs", "qk")
    out, own = model(wide(), compressed=(3, 1)), (2, 3)
    logits, lookup = zip(*(equations(image, 2, 2, (3, 1), own) for image in wide()))
    same(out.logits.data, np.stack(logits))
    same(out.lookup_logits.data, np.stack(lookup))
    with refuses("LookupViT: compressed (5, 6), expected a grid from (1, 1) to the lookup grid (4, 6)"):
        model(wide(), compressed=(5, 6))


def test_masking_is_removing_in_a_rectangle_too():
    model = shaken(DynamicViT(**RECTANGLE | dict(depth=3), prune_before=(1, 2), keep_ratios=(0.5, 0.25)))
    assert model.num_patches == 24 and model.counts == [12, 6]
    keep = masks((11, 4), tokens=24)
    masked, gathered = (model.train(training)(wide(3), keep=keep) for training in (True, False))
    same(masked.logits.data, gathered.logits.data)
    assert [k.shape for k in gathered.kept] == [(3, 11), (3, 4)]


def test_the_centre_of_a_rectangle():
    model = CentreTokens(**RECTANGLE, prune_before=(1,), keep_ratios=(1 / 6,)).eval()
    # rows 1 and 2 of 4, columns 2 and 3 of 6
    assert model(wide().astype("float32")).kept[0].tolist() == [[8, 9, 14, 15]] * 2


# Losses

def formulas(out, teacher=None):
    """{part: value} of cross-entropy and KL(teacher || student)."""
    log_q = np.log(softmax(out.logits.data))
    parts = {"class": -log_q[np.arange(2), RIGHT].mean()}
    if teacher is not None:
        p = softmax(teacher.logits.data)
        parts["kl"] = (p * (np.log(p) - log_q)).sum(axis=1).mean()
    return parts


def values(parts):
    return {name: part.item() for name, part in parts.items()}


def teachers_output():
    return shaken(ViT(**SMALL), seed=5)(pictures())


def test_the_loss_of_a_vit():
    model = shaken(ViT(**SMALL))
    out, teacher = model(pictures()), teachers_output()
    loss, parts = model.loss(out, RIGHT)
    assert values(parts) == pytest.approx(formulas(out)) and loss is parts["class"]
    loss, parts = model.loss(out, RIGHT, teacher)
    expected = formulas(out, teacher)
    assert list(parts) == ["class", "kl"] and values(parts) == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected["class"] + 0.5 * expected["kl"])
    loss, _ = model.loss(out, RIGHT, teacher, weights=(3, 0.25))
    assert loss.item() == pytest.approx(3 * expected["class"] + 0.25 * expected["kl"])
    smooth = ops.cross_entropy(out.logits, RIGHT, smoothing=0.2).item()
    assert model.loss(out, RIGHT, smoothing=0.2)[0].item() == smooth


def test_the_loss_of_a_lookupvit():
    model = shaken(LookupViT(**SMALL | PAPER, compressed=(2, 2))).train()
    out, teacher = model(pictures()), teachers_output()
    expected, parts = lookupvit_loss(out, RIGHT, smoothing=0.1)
    loss, mine = model.loss(out, RIGHT, smoothing=0.1)
    assert loss.item() == expected.item() and values(mine) == values(parts)
    assert list(parts) == ["class", "lookup"]
    loss, mine = model.loss(out, RIGHT, teacher, smoothing=0.1)
    kl = formulas(out, teacher)["kl"]  # of the compressed head
    assert values(mine) == pytest.approx(values(parts) | {"kl": kl})
    assert loss.item() == pytest.approx(expected.item() + 0.5 * kl)
    loss, _ = model.loss(out, RIGHT, teacher, smoothing=0.1, weights=(2, 3))
    assert loss.item() == pytest.approx(2 * expected.item() + 3 * kl)


@pytest.mark.parametrize("weights", [None, (1.5, 3, 0.25, 0.75)])
def test_the_loss_of_a_dynamicvit(weights):
    model = shaken(DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4))).train()
    out, teacher = model(pictures(), noise=gumbel()), teachers_output()
    options = dict(smoothing=0.1, weights=weights or (1, 2, 0.5, 0.5))
    expected, parts = dynamicvit_loss(out, RIGHT, teacher.logits, teacher.tokens, (0.7, 0.4),
                                      token_norm="image", **options)
    loss, mine = model.loss(out, RIGHT, teacher, smoothing=0.1, weights=weights)
    assert loss.item() == expected.item() and values(mine) == values(parts)
    assert list(parts) == ["class", "ratio", "kl", "token"]
    pooled, _ = model.loss(out, RIGHT, teacher, smoothing=0.1, weights=weights, token_norm="pooled")
    assert pooled.item() != loss.item()
    alone, mine = model.loss(out, RIGHT, smoothing=0.1, weights=weights)  # without a teacher class and ratio
    of = values(mine)
    assert of == {name: values(parts)[name] for name in ("class", "ratio")}
    of_class, of_ratio, *_ = options["weights"]
    assert alone.item() == pytest.approx(of_class * of["class"] + of_ratio / 2 * of["ratio"])


@each_sized
def test_every_loss_is_a_scalar_with_parts_and_reaches_the_weights(name):
    model = shaken(models.create(name, **DEEP)).train()
    out = model(inputs(model), **model.noise(2, 0, 0))
    taught = [teachers_output()] if model.task not in ("segment", "refer", "actions") else []
    if name == "dovit":
        taught = [Output(tt.Tensor(np.zeros(answered(model, 2))), out.tokens.detach())]
    for teacher in (None, *taught):
        loss, parts = model.loss(out, right(model), teacher)
        assert loss.shape == () and all(part.shape == () for part in parts.values()) and "class" in parts
        assert ("kl" in parts) == (teacher is not None)
    assert "linear" in graph_text(loss)
    loss.backward()
    assert np.abs(model.patch_embed.proj.weight.grad).max() > 0


# What a step draws

@each_sized
def test_draws_are_by_image_and_by_step_and_arguments_of_the_call(name):
    model = models.create(name, **DEEP).train()
    whole, part, other, seed = (model.noise(*of) for of in ((6, 2, 1), (4, 2, 1), (6, 3, 1), (6, 2, 9)))
    for argument, array in whole.items():
        assert len(array) == 6 and array.dtype == "float32"
        assert argument in inspect.signature(model.forward).parameters
        assert np.array_equal(array[:4], part[argument])  # an image's draws do not depend on how many follow
        assert not np.array_equal(array, other[argument]) and not np.array_equal(array, seed[argument])
    first = [model(inputs(model, 6).astype("float32"), **whole).logits.data for _ in range(2)]
    assert np.array_equal(*first)  # and with them a pass draws nothing


def test_a_dynamicvits_draws():
    model = DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4)).train()
    noise = model.noise(3, 2, 1)["noise"]
    assert noise.shape == (3, 2, 16, 2)
    for stage in range(2):
        assert np.array_equal(noise[:, stage],
                              tt.random.gumbel((3, 16, 2), site=f"score_predictor.{stage}", step=2, seed=1))
    by_array, by_list = (model(pictures(3), noise=n) for n in (noise, [noise[:, 0], noise[:, 1]]))
    assert np.array_equal(by_array.logits.data, by_list.logits.data)
    with refuses("DynamicViT: 3 arrays of noise for 2 stages"):
        model(pictures(3), noise=np.zeros((3, 3, 16, 2)))


def test_a_pass_that_draws_by_itself_draws_from_the_same_place():
    """One stage: its first draw after a seed is that of step 0."""
    model = DynamicViT(**SMALL, prune_before=(1,), keep_ratios=(0.5,)).train()
    tt.manual_seed(7)
    alone = model(pictures(4))
    asked = model(pictures(4), **model.noise(4, 0, 7))
    assert np.array_equal(alone.decisions[0].data, asked.decisions[0].data)
    assert np.array_equal(alone.logits.data, asked.logits.data)


# What a model shows

def test_a_vit_has_nothing_to_show():
    model = ViT(**SMALL)
    assert model.show(model(pictures(), trace=True)) == []


def test_a_dynamicvit_shows_what_each_stage_keeps():
    model = shaken(DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4))).eval()
    out = model(pictures(3), trace=True)
    panels = model.show(out)
    assert [title for title, _ in panels] == ["DynamicViT keeps 11 of 16", "DynamicViT keeps 6 of 16"]
    for (_, mask), kept in zip(panels, out.kept):
        assert mask.dtype == bool and mask.shape == (3, 16)
        assert [np.flatnonzero(row).tolist() for row in mask] == kept.tolist()


def test_a_lookupvit_shows_what_is_gathered_and_its_most_peaked_token():
    model = shaken(LookupViT(**SMALL, compressed=(2, 2)), spread=20).eval()
    out = model(pictures(3), trace=True)
    (gathers, total), (peaked_title, peaked) = model.show(out)
    assert (gathers, peaked_title) == ("LookupViT gathers", "its most peaked token")
    for b in range(3):
        weights = out.attention[-1].data[b].mean(axis=0)  # of the last block, the mean over heads: (M, N)
        same(total[b], weights.sum(axis=0))
        same(peaked[b], weights[max(range(4), key=lambda m: weights[m].max())])


@each_sized
def test_panels_have_a_value_for_each_patch(name):
    model = shaken(models.create(name, **DEEP)).eval()
    titles = [title for title, _ in model.show(model(inputs(model, 3), trace=True))]
    assert len(set(titles)) == len(titles)
    for _, panel in model.show(model(inputs(model, 3), trace=True)):
        assert isinstance(panel, np.ndarray) and panel.shape == (3, patches(model)) and panel.dtype.kind in "bf"


def test_a_configs_choices_add_to_those_above():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MineConfig(ViTConfig):
        mode: str = "a"
        choices = {"mode": ("a", "b")}
    for option, text in ((dict(mode="c"), "Mine: mode 'c', expected a or b"),
                         (dict(pool="nonsense"), "Mine: pool 'nonsense', expected token or mean")):
        with refuses(text):
            MineConfig(**option)


def test_a_models_name_is_its_class_in_lower_case():
    class PatchDropout(ViT):
        pass
    with refuses("model: PatchDropout registered as 'patch-dropout', expected 'patchdropout'"):
        tt.models.model("patch-dropout")(PatchDropout)


@pytest.mark.parametrize("wrong", ["4", None, (4,)])
def test_a_ratio_that_is_no_number(wrong):
    with refuses(f"ViT: mlp_ratio {wrong!r}, expected a positive number"):
        ViT(**SMALL | {"mlp_ratio": wrong})
