"""The options of ViTs that published weights have: timm's outputs from timm's weights, and every method with
the tokens that are no patches."""
import numpy as np
import pytest

import small
import tinytoken as tt
from small import STAGES, VARIANTS, gumbel, masks, pictures, refuses, same, same_logits_and_gradients, shaken
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.models import DynamicViT, ToMe, ViT
from tinytoken.models.controls import CONTROLS, LearnedTokens
from tinytoken.models.tome import matching

SIZES = dict(image_size=(12, 8), patch_size=4, dim=8, depth=2, heads=2, mlp_ratio=2, num_classes=5)
each_case = pytest.mark.parametrize("case", VARIANTS)
SMALL = small.SMALL | dict(depth=3)
# of methods that read the class token: the tokens before the patches, and all options together
EXTRA = {"distilled": dict(distilled=True), "registers": dict(reg_tokens=3),
         "all": dict(distilled=True, reg_tokens=2, no_embed_class=True, layer_scale=0.5, qk_norm=True,
                     pre_norm=True, eps=0.1)}
COUNTS = {"distilled": 2, "registers": 4, "all": 4}  # tokens before the patches
each_extra = pytest.mark.parametrize("extra", EXTRA)
each_control = pytest.mark.parametrize("kind", CONTROLS.values(), ids=CONTROLS)


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def weights_of(timm, case):
    start = f"{case}/weights/"
    return {name.removeprefix(start): array.astype("float64") for name, array in timm.items()
            if name.startswith(start)}


# Parity with timm

def test_every_case_of_the_file_is_tried(timm):
    others = {"versions", "about", "images", "labels", "resized"}
    assert {name.split("/")[0] for name in timm} == others | set(VARIANTS)


@each_case
def test_timms_logits_features_and_gradient(timm, case, xp):
    model = ViT(**SIZES | VARIANTS[case])
    assert model.load_state_dict(weights_of(timm, case)) == ([], [])
    out = model.to("cpu" if xp is np else "cuda")(xp.asarray(timm["images"]))
    features = timm[f"{case}/features"][:, sum(model.config.prefix.values()):]
    np.testing.assert_allclose(out.logits.numpy(), timm[f"{case}/logits"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(out.tokens.numpy(), features, rtol=0, atol=1e-9)
    loss, _ = model.loss(out, xp.asarray(timm["labels"]))
    [gradient] = tt.grad(loss, [model.patch_embed.proj.weight])
    np.testing.assert_allclose(to_numpy(gradient), timm[f"{case}/gradient"], rtol=0, atol=1e-9)


def test_eps_is_large_enough_to_be_seen(timm):
    model = ViT(**SIZES).astype("float64")
    model.load_state_dict(weights_of(timm, "eps"))
    assert np.abs(model(timm["images"]).logits.data - timm["eps/logits"]).max() > 0.01


# Gradients

@each_case
def test_gradients_of_the_whole_model(case):
    model = shaken(ViT(**small.SMALL | VARIANTS[case]))
    images, targets = pictures(), np.array([4, 1])

    def outputs(*parameters):
        out = model(images)
        return tt.ops.cross_entropy(out.logits, targets), out.tokens
    names = [name for name, _ in model.named_parameters()]
    gradcheck(outputs, *model.parameters(), names=names, max_elements=60)


# What the options are

def test_the_tokens_before_the_patches_and_their_start():
    model = ViT(**small.SMALL, distilled=True, reg_tokens=3)
    assert list(model.config.prefix.items()) == [("cls_token", 1), ("dist_token", 1), ("reg_token", 3)]
    assert model.pos_embed.shape == (1, 21, 8) and (model.pos_embed.data[:, :5] == 0).all()
    assert ViT(**small.SMALL, reg_tokens=3, no_embed_class=True).pos_embed.shape == (1, 16, 8)
    x = model.start(pictures().astype("float32"))
    assert x.extra == 5 and x.patches.shape == (2, 16, 8)
    tokens = np.concatenate([model.cls_token.data, model.dist_token.data, model.reg_token.data], axis=1)
    assert np.array_equal(x.x.data[1:, :5], tokens) and 0.01 < tokens.std() < 0.03
    scaled = ViT(**small.SMALL, layer_scale=0.25)
    assert all((block.ls1.gamma.data == 0.25).all() and (block.ls2.gamma.data == 0.25).all()
               for block in scaled.blocks)
    assert ViT(**small.SMALL, pre_norm=True).patch_embed.proj.bias is None


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_of_a_distilled_model_are_the_mean_of_both_heads_in_either_mode(training):
    model = shaken(ViT(**small.SMALL, distilled=True)).train(training)
    x = model.norm(model.encode(model.start(pictures())).x)
    same(model(pictures()).logits.data, (model.head(x[:, 0]).data + model.head_dist(x[:, 1]).data) / 2)


def test_gammas_of_one_are_the_plain_model():
    plain, scaled = shaken(ViT(**small.SMALL)), ViT(**small.SMALL, layer_scale=1.0).astype("float64")
    missing, unexpected = scaled.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and missing == [f"blocks.{i}.ls{k}.gamma" for i in (0, 1) for k in (1, 2)]
    assert np.array_equal(scaled(pictures()).logits.data, plain(pictures()).logits.data)


def test_registers_are_within_the_bounds_of_a_file():
    with tt.nn.at_most(10_000), pytest.raises(tt.InputError, match="^parameters: 8,000,000,000 more are "):
        ViT(**small.SMALL, reg_tokens=10**9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_keeps_the_options(variant, tmp_path):
    model = shaken(ViT(**small.SMALL | VARIANTS[variant]))
    tt.train.checkpoint.save(tmp_path / "c.npz", model)
    again, _ = tt.train.checkpoint.load_model(tmp_path / "c.npz")
    assert again.config == model.config
    assert np.array_equal(again(pictures()).logits.data, model(pictures()).logits.data)


def test_a_configuration_without_the_options_is_the_plain_vits():
    """What a checkpoint of before these options says."""
    sizes = small.SMALL | dict(mlp_ratio=4, channels=3, qkv_bias=True)
    description = tt.train.checkpoint.description(ViT(**sizes))
    older = {"model": "ViT", "config": sizes | {"pool": "token"}}
    assert set(description["config"]) - set(older["config"]) == {
        "distilled", "reg_tokens", "no_embed_class", "qk_norm", "layer_scale", "pre_norm", "eps",
        "class_token", "final_norm", "keys_as_queries"}
    assert tt.train.checkpoint.same_model(older, description)


@pytest.mark.parametrize("options, text", [
    (dict(reg_tokens=-1), "reg_tokens -1, expected a whole number that is not negative"),
    (dict(reg_tokens=1.5), "reg_tokens 1.5, expected a whole number that is not negative"),
    (dict(eps=0), "eps 0, expected a positive number"),
    (dict(eps="small"), "eps 'small', expected a positive number"),
    (dict(eps=float("nan")), "eps nan, expected a positive number"),
    (dict(layer_scale=None), "layer_scale None, expected a number"),
    (dict(layer_scale=float("inf")), "layer_scale inf, expected a number"),
    (dict(distilled="yes"), "distilled 'yes', expected True or False"),
    (dict(qk_norm=None), "qk_norm None, expected True or False"),
    (dict(class_token="no"), "class_token 'no', expected True, False or None"),
    (dict(class_token=False), "pool 'token' reads a class token, and class_token is False"),
    (dict(dim=True, heads=1), "dim True, expected a positive whole number"),
    (dict(reg_tokens=True), "reg_tokens True, expected a whole number that is not negative"),
    (dict(mlp_ratio=float("inf")), "mlp_ratio inf, expected a positive number"),
    (dict(qk_norm=np.array([1, 0])), "qk_norm array([1, 0]), expected True or False"),
    (dict(pool=np.array(["token"])), "pool array(['token'], dtype='<U5'), expected token or mean"),
    (dict(class_token=np.array([1, 0])), "class_token array([1, 0]), expected True, False or None"),
    (dict(final_norm="last"), "final_norm 'last', expected one of tokens, pooled, none"),
    *[(dict(distilled=True) | more, "distilled: its heads read the normed class and distillation tokens, so "
                                    "pool must be 'token', and final_norm not 'pooled'")
      for more in (dict(pool="mean"), dict(final_norm="pooled"))],
], ids=str)
def test_options_that_make_no_model(options, text):
    with refuses(f"ViT: {text}"):
        ViT(**small.SMALL | options)


# Methods: what is no patch is never pruned and never merged

@each_extra
@pytest.mark.parametrize("counts", [(11, 7, 5), (9, 1, 1), (5, 2, 0)], ids=str)
@pytest.mark.parametrize("spread", [1, 20])
def test_masked_equals_gathered(extra, counts, spread, xp):
    model = shaken(DynamicViT(**SMALL | EXTRA[extra] | dict(depth=4), prune_before=(1, 2, 3),
                              keep_ratios=(0.7, 0.49, 0.343)), spread=spread)
    model.to("cpu" if xp is np else "cuda")
    images, keep = xp.asarray(pictures(3)), [xp.asarray(m) for m in masks(counts)]
    upstream = xp.asarray(np.random.default_rng(1).standard_normal((3, 5)))
    masked, gathered = (model.train(training)(images, keep=keep, trace=True) for training in (True, False))
    assert [A.shape[2] for A in gathered.attention] == [COUNTS[extra] + n for n in (16, *counts)]
    same_logits_and_gradients(model, masked, gathered, upstream)


@each_extra
def test_a_dynamicvit_that_keeps_all_is_the_vit(extra):
    vit = shaken(ViT(**SMALL | EXTRA[extra]))
    model = DynamicViT(**SMALL | EXTRA[extra], prune_before=(1,), keep_ratios=(1.0,)).astype("float64").eval()
    assert model.load_state_dict(vit.state_dict(), strict=False)[1] == []
    assert np.array_equal(model(pictures()).logits.data, vit(pictures()).logits.data)


@each_extra
def test_gradients_of_a_dynamicvit_with_soft_decisions(extra):
    model = shaken(DynamicViT(**small.SMALL | EXTRA[extra], prune_before=(1,), keep_ratios=(0.5,),
                              official=extra == "registers"))
    images, noise = pictures(), gumbel(1)

    def outputs(*parameters):
        out = model(images, noise=noise, hard=False)
        return out.logits, out.tokens, *out.decisions
    gradcheck(outputs, *model.parameters(), max_elements=60)


@each_extra
@each_control
def test_controls_keep_what_is_no_patch(kind, extra):
    """Training equals inference, and the kept patches are those by the control's rule, whatever stands
    before them."""
    model, images = shaken(kind(**SMALL | EXTRA[extra], **STAGES)), pictures(3)
    out = model.eval()(images, trace=True)
    assert [A.shape[2] for A in out.attention] == [COUNTS[extra] + n for n in (16, 11, 6)]
    assert out.tokens.shape == (3, 6, 8)
    if kind is not LearnedTokens:  # it draws in training
        same(model.train()(images).logits.data, out.logits.data)
    if kind is CONTROLS["class attention"]:
        to_patches = out.attention[0].data.mean(axis=1)[:, 0, COUNTS[extra]:]
        assert np.array_equal(out.kept[0], np.sort(np.argsort(to_patches, axis=1)[:, -11:], axis=1))


@pytest.mark.parametrize("name", ["random tokens", "class attention", "fixed centre"])
def test_a_controls_choice_is_dynamicvits_with_these_decisions(name):
    kind = CONTROLS[name]
    control, dynamic = (k(**SMALL | EXTRA["all"], **STAGES) for k in (kind, DynamicViT))
    shaken(control)
    dynamic.astype("float64").load_state_dict(control.state_dict(), strict=False)
    kept = control.eval()(pictures(3)).kept
    keep = [(k[:, :, None] == np.arange(16)).any(axis=1) for k in kept]
    same(control(pictures(3)).logits.data, dynamic.eval()(pictures(3), keep=keep).logits.data)


@pytest.mark.parametrize("extra", range(6))
@pytest.mark.parametrize("T, r", [(17, 5), (16, 3), (12, 3)])
def test_the_prefix_neither_merges_nor_moves(extra, T, r):
    """Bipartite matching by hand, image by image, and the prefix first and in order."""
    r, keys = min(r, (T - extra) // 2), np.random.default_rng(T + extra).standard_normal((3, T, 4))
    unit = keys / np.linalg.norm(keys, axis=2, keepdims=True)
    for b, target in enumerate(matching(keys, r, extra)):
        assert target[:extra].tolist() == list(range(extra)) and (np.bincount(target)[:extra] == 1).all()
        assert sorted(set(target)) == list(range(T - r))
        first, second = ([i for i in range(start, T, 2) if i >= extra] for start in (0, 1))
        best = {i: max((unit[b, i] @ unit[b, j], j) for j in second) for i in first}
        merged = sorted(first, key=lambda i: -best[i][0])[:r]
        for i in first:
            assert (target[i] == target[best[i][1]]) == (i in merged)
        left = [i for i in first if i not in merged]
        assert [target[i] for i in left + second] == list(range(extra, T - r))


@each_extra
@pytest.mark.parametrize("r", [0, 3, (5, 0, 99)])
def test_tome_with_tokens_that_are_no_patches(extra, r):
    merging = shaken(ToMe(**SMALL | EXTRA[extra], r=r))
    out = merging(pictures(3), trace=True)
    assert np.array_equal(out.size.sum(axis=1), [16] * 3) and out.source.min() == 0
    counts = np.stack([np.bincount(source, minlength=out.size.shape[1]) for source in out.source])
    assert np.array_equal(counts, out.size)
    if r == 0:
        vit = ViT(**SMALL | EXTRA[extra]).astype("float64")
        vit.load_state_dict(merging.state_dict())
        assert np.array_equal(vit(pictures(3)).logits.data, out.logits.data)


@each_extra
def test_equal_patches_merge_without_a_trace(extra):
    """The prefix stays apart from them, and a merged token counts as often as it stands for patches."""
    merging, vit = (shaken(m) for m in (ToMe(**SMALL | EXTRA[extra], r=4), ViT(**SMALL | EXTRA[extra])))
    for m in (merging, vit):
        patches = slice(0 if m.config.no_embed_class else COUNTS[extra], None)
        m.pos_embed.data[:, patches] = 0
    flat = np.broadcast_to(np.random.default_rng(0).standard_normal((2, 3, 1, 1)), (2, 3, 8, 8))
    ours = merging(flat)
    assert ours.tokens.shape[1] == 4
    same(ours.logits.data, vit(flat).logits.data)
    gradients = [tt.grad(m.loss(m(flat), np.array([0, 3]))[0], m.parameters()) for m in (merging, vit)]
    for a, b in zip(*gradients):
        same(a, b, 1e-10)


def test_gradients_of_tome_with_all_options():
    merging = shaken(ToMe(**small.SMALL | EXTRA["all"], r=3))
    gradcheck(lambda *_: merging.loss(merging(pictures()), np.array([0, 3]))[0], *merging.parameters(),
              max_elements=60)
