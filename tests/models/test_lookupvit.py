"""LookupViT: its equations once more (equations.py), properties that pin each part, every compressed grid,
overfitting."""
import copy
import dataclasses
import itertools

import numpy as np
import pytest

import small
import tinytoken as tt
from equations import Equations, resize_by_loops
from small import pictures, refuses, same, shaken, softmax
from tinytoken.checking import gradcheck
from tinytoken.models import LookupBlock, LookupOutput, LookupViT, lookupvit_loss
from tinytoken.models.lookupvit import PAPER

SMALL = small.SMALL | PAPER | dict(compressed=(2, 2))
REUSE = ("probs", "renorm", "resoftmax", "separate", "none")
VARIANTS = [dict(reuse=r, norm=n, classifiers=c)
            for r, n, c in itertools.product(REUSE, ("qk", "pre"), ("both", "compressed"))]
named = lambda options: "-".join(options.values())


@pytest.fixture(autouse=True)
def seeded():
    tt.manual_seed(0)


def sets(lookup=16, compressed=4, batch=2, dim=8, seed=4):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, lookup, dim)), rng.standard_normal((batch, compressed, dim))


# The equations

@pytest.mark.parametrize("options", VARIANTS, ids=named)
@pytest.mark.parametrize("size", [(2, 2), (3, 2)], ids=str)
def test_the_model_is_its_equations(options, size, xp):
    model, images = shaken(LookupViT(**SMALL | options)), pictures()
    equations = Equations(model.state_dict(), 2, options["reuse"], options["norm"])
    wanted, wanted_lookup = zip(*(equations(image, 2, 2, size, (2, 2)) for image in images))
    model.to("cpu" if xp is np else "cuda")
    out = model.train()(xp.asarray(images), compressed=size)
    same(out.logits.numpy(), np.stack(wanted))
    if options["classifiers"] == "both":
        same(out.lookup_logits.numpy(), np.stack(wanted_lookup))
        mean = model.eval()(xp.asarray(images), compressed=size, mean_of_heads=True)
        same(mean.logits.numpy(), (np.stack(wanted) + np.stack(wanted_lookup)) / 2)
    else:
        assert out.lookup_logits is None and wanted_lookup[0] is None
    same(model.eval()(xp.asarray(images), compressed=size).logits.numpy(), np.stack(wanted))


def test_the_readings_of_reuse_and_norm_differ():
    outs = {}
    for options in VARIANTS:
        model = LookupViT(**SMALL | options)
        # the same weights where the names are the same
        for name, p in model.astype("float64").named_parameters():
            p.data[...] = np.random.default_rng(list(name.encode())).standard_normal(p.shape)
        outs[named(options)] = model.eval()(pictures()).logits.data
    for a, b in itertools.combinations(outs, 2):
        only_the_head = a.split("-")[:2] == b.split("-")[:2]
        assert np.array_equal(outs[a], outs[b]) == only_the_head, (a, b)


# Gradients

@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_gradients_of_the_whole_model(options):
    model, images, targets = shaken(LookupViT(**SMALL | options)).train(), pictures(), np.array([4, 1])
    used = [p for name, p in model.named_parameters()
            if options["classifiers"] == "both" or not dead(name, 2)]

    def outputs(*parameters):
        out = model(images, compressed=(2, 3))
        loss, _ = lookupvit_loss(out, targets, smoothing=0.1)
        return (loss, out.logits) if out.lookup_logits is None else (loss, out.logits, out.lookup_logits)
    assert gradcheck(outputs, *used, max_elements=60).directions == 2


def dead(name, depth):
    """Parts of the last block that only lookup tokens see: without a lookup head nothing reads them."""
    return name.startswith((f"blocks.{depth - 1}.infuse", f"blocks.{depth - 1}.lookup"))


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_every_parameter_learns_unless_nothing_reads_it(options):
    model = shaken(LookupViT(**SMALL | options)).train()
    lookupvit_loss(model(pictures()), np.array([4, 1]))[0].backward()
    for name, p in model.named_parameters():
        unread = options["classifiers"] == "compressed" and dead(name, 2)
        assert (p.grad is None) == unread, name
        # A constant added to all keys moves no softmax over them, so that bias cannot learn (resoftmax reads
        # the other axis too).
        silent = name.endswith(("gather_k.bias", "gather_norm_k.bias", "infuse_k.bias"))
        assert unread or silent or np.abs(p.grad).max() > 1e-9, name


@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax"])
def test_the_gradient_of_the_attention_is_the_sum_of_its_two_uses(reuse):
    """A is read by the gather and by the infusion. The gradient of the queries' weights is that through one
    plus that through the other, and neither is nothing."""
    lookup, compressed = sets()
    block = shaken(LookupBlock(8, 2, reuse=reuse, norm="qk"))
    upstream = np.random.default_rng(9).standard_normal(lookup.shape)

    def gradient(detach_gather=False, detach_infusion=False):
        probe = copy.deepcopy(block)
        gather, infuse = probe.gather, probe.infuse

        def cut_gather(lookup, compressed, factors):
            out, A, logits = gather(lookup, compressed, factors)
            return out.detach() if detach_gather else out, A, logits

        def cut_infuse(lookup, compressed, A, logits, factors):
            A, logits = (A.detach(), logits.detach()) if detach_infusion else (A, logits)
            return infuse(lookup, compressed, A, logits, factors)
        probe.gather, probe.infuse = cut_gather, cut_infuse
        out, _ = probe(tt.Tensor(lookup), tt.Tensor(compressed))
        return tt.grad((out * upstream).sum(), [probe.gather_q.weight])[0]
    through_gather, through_infusion = gradient(detach_infusion=True), gradient(detach_gather=True)
    assert np.abs(through_gather).max() > 1e-4 and np.abs(through_infusion).max() > 1e-4
    same(through_gather + through_infusion, gradient())


# Properties of a block and of its tokens

@pytest.mark.parametrize("grid, size", [
    ((8, 8), (3, 3)), ((8, 8), (8, 8)), ((7, 5), (2, 4)), ((4, 4), (1, 1)), ((2, 3), (5, 7))], ids=str)
def test_the_resize_matrix(grid, size):
    R = tt.ops.resize_matrix(grid, size)
    same(R.sum(axis=1), np.ones(size[0] * size[1]))
    same(R, resize_by_loops(grid, size))
    # antialiased: every token is read
    assert (R >= 0).all() and (size[0] > grid[0] or (R.sum(axis=0) > 0).all())
    if size == grid:
        assert np.array_equal(R, np.eye(size[0] * size[1]))


def test_resizing_patches_and_projecting_commute():
    model, images = shaken(LookupViT(**SMALL)), pictures()
    raw = tt.ops.patchify(images, patch=2)
    small = tt.ops.resize(raw, grid=(4, 4), size=(3, 2))
    same(model.patch_embed.proj(small).data,
         tt.ops.resize(model.patch_embed(images), grid=(4, 4), size=(3, 2)).data)


def test_the_compressed_tokens_are_the_patches_without_lookup_positions():
    """Resized before positions are added, with a table of their own; on the lookup grid they are the patches
    themselves."""
    model, images = shaken(LookupViT(**SMALL | dict(compressed=(4, 4)))), pictures()
    lookup, compressed = model.embed(images, (4, 4))
    patches = model.patch_embed(images).data
    assert np.array_equal(lookup.data, patches + model.pos_embed.data)
    assert np.array_equal(compressed.data, patches + model.pos_embed_compressed.data)
    model.pos_embed.data += 1
    assert np.array_equal(model.embed(images, (4, 4))[1].data, compressed.data)


@pytest.mark.parametrize("reuse", REUSE)
@pytest.mark.parametrize("norm", ["qk", "pre"])
def test_permuting_the_lookup_tokens_permutes_what_comes_out(reuse, norm):
    block, (lookup, compressed) = shaken(LookupBlock(8, 2, reuse=reuse, norm=norm)), sets()
    order = np.random.default_rng(5).permutation(16)
    out, refined = block(tt.Tensor(lookup), tt.Tensor(compressed))
    permuted, refined_again = block(tt.Tensor(lookup[:, order]), tt.Tensor(compressed))
    same(refined_again.data, refined.data)
    same(permuted.data, out.data[:, order])
    # and the order of compressed tokens is nothing to the lookup tokens
    order = np.random.default_rng(6).permutation(4)
    again, permuted = block(tt.Tensor(lookup), tt.Tensor(compressed[:, order]))
    same(again.data, out.data)
    same(permuted.data, refined.data[:, order])


@pytest.mark.parametrize("reuse", REUSE)
def test_without_infusion_and_light_mlp_the_lookup_tokens_stay(reuse):
    block, (lookup, compressed) = shaken(LookupBlock(8, 2, reuse=reuse, norm="qk")), sets()
    ends = [block.lookup_mlp.fc2] if reuse == "none" else [block.lookup_mlp.fc2, block.infuse_proj]
    for end in ends:
        assert not np.array_equal(block(tt.Tensor(lookup), tt.Tensor(compressed))[0].data, lookup)
        end.weight.data[...] = end.bias.data[...] = 0
    out, refined = block(tt.Tensor(lookup), tt.Tensor(compressed))
    assert np.array_equal(out.data, lookup) and not np.array_equal(refined.data, compressed)


def test_masses_of_the_attention_and_of_its_readings():
    block, (lookup, compressed) = shaken(LookupBlock(8, 2, reuse="probs", norm="qk")), sets()
    _, A, logits = block.gather(tt.Tensor(lookup), tt.Tensor(compressed))
    same(A.data.sum(axis=3), np.ones((2, 2, 4)))               # rows
    same(A.data.sum(axis=(2, 3)), np.full((2, 2), 4.0))        # A^T hands out M in all
    ones = np.ones((2, 2, 4, 1))
    readings = ("probs", "renorm", "resoftmax")
    received = {reuse: tt.ops.lookup_infuse(A, logits, ones, reuse=reuse).data[..., 0] for reuse in readings}
    same(received["probs"], A.data.sum(axis=2))
    # gated by how attended a token is; the others are not
    assert np.ptp(received["probs"]) > 0.01
    same(received["renorm"], np.ones((2, 2, 16)))
    same(received["resoftmax"], np.ones((2, 2, 16)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reuse", REUSE)
def test_skipping_the_last_tail_leaves_the_compressed_logits_to_the_bit(reuse, dtype):
    model, images = shaken(LookupViT(**SMALL | dict(reuse=reuse))).astype(dtype), pictures(3)
    skipped = model.eval()(images).logits
    assert skipped.dtype == dtype and np.array_equal(skipped.data, model.train()(images).logits.data)
    for name, p in model.named_parameters():
        if dead(name, 2):
            p.data[...] = np.nan
    assert np.array_equal(model.eval()(images).logits.data, skipped.data)  # not merely unused: not computed
    assert np.isnan(model.eval()(images, mean_of_heads=True).logits.data).all()


def test_one_set_of_weights_serves_every_compressed_grid():
    model, images = shaken(LookupViT(**SMALL)).eval(), pictures()
    logits = {}
    for size in itertools.product(range(1, 5), repeat=2):
        out = model(images, compressed=size, trace=True)
        tokens, logits[size] = size[0] * size[1], out.logits.data
        assert out.logits.shape == (2, 5) and np.isfinite(logits[size]).all()
        assert out.tokens.shape == (2, tokens, 8)
        assert [A.shape for A in out.attention] == [(2, 2, tokens, 16)] * 2
    assert all(not np.array_equal(logits[a], logits[b]) for a, b in itertools.combinations(logits, 2))
    assert np.array_equal(logits[2, 2], model(images).logits.data)  # None is the model's own grid
    assert np.array_equal(logits[3, 2], model(images, compressed=[3, 2]).logits.data)
    assert np.array_equal(logits[3, 2], model(images, compressed=tuple(np.array([3, 2]))).logits.data)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean_of_heads", [True, False])
def test_the_output_and_its_trace_which_changes_nothing(training, mean_of_heads):
    model, images = shaken(LookupViT(**SMALL)).train(training), pictures(3)
    out, plain = (model(images, trace=trace, mean_of_heads=mean_of_heads) for trace in (True, False))
    assert type(out) is type(plain) is LookupOutput and plain.attention == []
    assert np.array_equal(out.logits.data, plain.logits.data)
    assert np.array_equal(out.tokens.data, plain.tokens.data)
    for of in (out, plain):
        assert of.tokens.shape == (3, 4, 8)
        assert (of.lookup is None) == (of.lookup_logits is None) == (not training and not mean_of_heads)
        assert of.lookup is None or of.lookup.shape == (3, 16, 8) and of.lookup_logits.shape == (3, 5)
    assert not training or np.array_equal(out.lookup_logits.data, plain.lookup_logits.data)
    assert [A.shape for A in out.attention] == [(3, 2, 4, 16)] * 2
    for A in out.attention:
        assert not A.requires_grad and (A.data >= 0).all()
        np.testing.assert_allclose(A.data.sum(axis=-1), 1, rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_meet():
    model, images = shaken(LookupViT(**SMALL)).eval(), pictures(3)
    same(model(images).logits.data, np.concatenate([model(images[i:i + 1]).logits.data for i in range(3)]))


# Parameters and losses

@pytest.mark.parametrize("dim, heads", [(8, 2), (24, 3)])
@pytest.mark.parametrize("reuse, matrices, biases, norms", [  # in D^2; in D; norms of 2 D
    ("probs", 19, 16.5, 6), ("renorm", 19, 16.5, 6), ("resoftmax", 19, 16.5, 6), ("separate", 21, 18.5, 7),
    ("none", 17, 14.5, 5)])
def test_parameters_of_a_block(dim, heads, reuse, matrices, biases, norms):
    """19 D^2: q, k, v and W_O of the gather 4, the refining block 12, W_V' and W_O' 2, the light MLP 1 (a ViT
    block has 12)."""
    block = LookupBlock(dim, heads, reuse=reuse)
    assert block.parameter_count() == matrices * dim ** 2 + biases * dim + norms * 2 * dim


def test_parameters_of_a_model():
    D, N, M, K = 8, 16, 4, 5
    block = 19 * D ** 2 + 16.5 * D + 6 * 2 * D
    # patches, positions, two heads with their norms
    ends = (2 * 2 * 3 + 1) * D + (N + M) * D + 2 * (2 * D + (D + 1) * K)
    assert LookupViT(**SMALL).parameter_count() == 2 * block + ends
    one = LookupViT(**SMALL | dict(classifiers="compressed")).parameter_count()
    assert one == 2 * block + ends - 2 * D - (D + 1) * K


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_sum_of_both_heads(smoothing):
    out, targets = shaken(LookupViT(**SMALL)).train()(pictures()), np.array([4, 1])
    loss, parts = lookupvit_loss(out, targets, smoothing=smoothing)
    smooth = (1 - smoothing) * np.eye(5)[targets] + smoothing / 5
    wanted = [-(smooth * np.log(softmax(t.data))).sum(axis=1).mean() for t in (out.logits, out.lookup_logits)]
    assert list(parts) == ["class", "lookup"]
    assert [p.item() for p in parts.values()] == pytest.approx(wanted, rel=1e-12)
    assert loss.item() == pytest.approx(sum(wanted), rel=1e-12)
    loss, parts = lookupvit_loss(LookupOutput(out.logits, None), targets, smoothing=smoothing)
    assert list(parts) == ["class"] and loss.item() == pytest.approx(wanted[0], rel=1e-12)


@pytest.mark.parametrize("reuse", REUSE)
def test_a_tiny_set_can_be_overfitted(reuse):
    """Eight noise pictures with labels of chance, Adam by hand (Kingma & Ba 2015, algorithm 1): both heads
    know them all."""
    model = LookupViT(**SMALL | dict(dim=16, reuse=reuse)).train()
    images, targets = pictures(8).astype("float32"), np.array([0, 1, 2, 3, 4, 0, 1, 2])
    params = model.parameters()
    m, v = ([np.zeros_like(p.data) for p in params] for _ in range(2))
    for step in range(1, 41):
        loss, _ = lookupvit_loss(model(images), targets)
        for i, (p, g) in enumerate(zip(params, tt.grad(loss, params))):
            m[i] += 0.1 * (g - m[i])
            v[i] += 0.01 * (g * g - v[i])
            p.data -= 0.01 * (m[i] / (1 - 0.9 ** step)) / (np.sqrt(v[i] / (1 - 0.99 ** step)) + 1e-8)
    out = model(images)
    assert lookupvit_loss(out, targets)[0].item() < 0.2
    for logits in (out.logits, out.lookup_logits):
        assert (logits.data.argmax(axis=1) == targets).all()


def test_the_configuration_makes_the_same_model_again():
    model = LookupViT(**SMALL | dict(reuse="separate", norm="pre", classifiers="compressed",
                                     lookup_mlp_ratio=1, mlp_ratio=2))
    again = LookupViT(**dataclasses.asdict(model.config))
    assert again.load_state_dict(model.state_dict()) == ([], [])
    assert np.array_equal(again.eval()(pictures()).logits.data, model.eval()(pictures()).logits.data)


# What it refuses

GRID = "expected a grid from (1, 1) to the lookup grid (4, 4)"


@pytest.mark.parametrize("grid, text", [
    ((5, 2), f"LookupViT: compressed (5, 2), {GRID}"),
    ((2, 5), f"LookupViT: compressed (2, 5), {GRID}"),
    ((0, 2), f"LookupViT: compressed (0, 2), {GRID}"),
    ((2, -1), f"LookupViT: compressed (2, -1), {GRID}"),
    (3, f"LookupViT: compressed 3, {GRID}"),
    ((2, 2, 2), f"LookupViT: compressed (2, 2, 2), {GRID}"),
    ((1.5, 2), f"LookupViT: compressed (1.5, 2), {GRID}"),
    ("22", f"LookupViT: compressed '22', {GRID}"),
], ids=str)
def test_compressed_grids_that_do_not_fit(grid, text):
    with refuses(text):
        LookupViT(**SMALL | dict(compressed=grid))
    with refuses(text):
        LookupViT(**SMALL)(pictures(), compressed=grid)


@pytest.mark.parametrize("options, text", [
    (dict(reuse="logits"),
     "LookupViT: reuse 'logits', expected one of probs, renorm, resoftmax, separate, none"),
    (dict(norm="post"), "LookupViT: norm 'post', expected qk or pre"),
    (dict(classifiers="lookup"), "LookupViT: classifiers 'lookup', expected both or compressed"),
    (dict(heads=3), "Attention: heads 3 do not divide dim 8"),
    (dict(depth=0), "LookupViT: depth 0, expected a positive whole number"),
    (dict(patch_size=3), "PatchEmbed: patch_size 3 does not divide image_size 8"),
    (dict(patch_size=0), "LookupViT: patch_size 0, expected a positive whole number"),
], ids=str)
def test_options_that_make_no_model(options, text):
    with refuses(text):
        LookupViT(**SMALL | options)


@pytest.mark.parametrize("images, text", [
    (np.zeros((2, 3, 16, 16)), "images: (2, 3, 16, 16), expected (B, 3, 8, 8)"),
    (np.zeros((2, 4, 8, 8)), "images: (2, 4, 8, 8), expected (B, 3, 8, 8)"),
    (np.zeros((2, 3, 8, 8), "uint8"),
     "images: dtype uint8, expected float32: normalise them first (tt.data.normalise)"),
], ids=["size", "channels", "uint8"])
def test_images_that_do_not_fit(images, text):
    with refuses(text):
        LookupViT(**SMALL)(images)


def test_labels_that_do_not_fit():
    with refuses("cross_entropy: labels from 1 to 5, expected 0 to 4"):
        lookupvit_loss(LookupViT(**SMALL)(pictures()), np.array([1, 5]))


def test_a_mean_of_heads_needs_two():
    with refuses("LookupViT: mean_of_heads asked of a model with classifiers='compressed'"):
        LookupViT(**SMALL | dict(classifiers="compressed")).eval()(pictures(), mean_of_heads=True)
