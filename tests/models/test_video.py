"""VideoViT and VideoLookupViT: tubelets by loops, the image models that they are of one tubelet in time,
gradients, any grid at call time, counted multiply-adds."""
import itertools
import math

import numpy as np
import pytest

import tinytoken as tt
from equations import Equations
from small import refuses, same, shaken
from tinytoken import nn, ops
from tinytoken.checking import gradcheck
from tinytoken.models import LookupViT, VideoLookupViT, VideoViT, ViT, lookupvit_loss
from tinytoken.models.lookupvit import PAPER

SMALL = dict(frames=6, image_size=(8, 12), tubelet=(2, 4, 4), dim=12, depth=2, heads=2, num_classes=5)
GRID = (3, 2, 3)
MODELS = {"VideoViT": lambda **more: VideoViT(**SMALL | more),
          "VideoLookupViT": lambda **more: VideoLookupViT(**SMALL | dict(compressed=(2, 1, 2)) | more)}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def clips(batch=2, seed=0, frames=6, size=(8, 12)):
    return np.random.default_rng(seed).standard_normal((batch, frames, 3, *size))


# Tubelets

@each_model
def test_tokens_are_the_tubelets_in_order_of_time_row_and_column(make):
    model, x = shaken(make()), clips()
    tokens, proj = model.patch_embed(x).data, model.patch_embed.proj
    assert model.patch_embed.grid == GRID and proj.weight.shape == (12, 3, 2, 4, 4)
    for n, (t, r, c) in enumerate(itertools.product(*map(range, GRID))):
        box = x[:, 2 * t:2 * t + 2, :, 4 * r:4 * r + 4, 4 * c:4 * c + 4]
        same(tokens[:, n], np.einsum("btchw,dcthw->bd", box, proj.weight.data) + proj.bias.data)
    same(model.patch_embed(tt.Tensor(x)).data, tokens)


def test_positions_start_as_sines_and_cosines_of_column_row_and_time():
    table = nn.sincos_positions(GRID, 14)
    assert table.shape == (18, 14) and table.dtype == "float32" and (table[:, 12:] == 0).all()
    for n, (t, r, c) in enumerate(itertools.product(*map(range, GRID))):
        for i, place in enumerate((c, r, t)):
            for k in range(2):
                wanted = [wave(place * 100.0 ** -k) for wave in (math.sin, math.cos)]
                np.testing.assert_allclose(table[n, [4 * i + k, 4 * i + 2 + k]], wanted, atol=1e-6)
    model = VideoViT(**SMALL)
    np.testing.assert_allclose(model.pos_embed.data[0, 1:], 0.7 * nn.sincos_positions(GRID, 12), atol=1e-6)
    assert len(np.unique(model.pos_embed.data[0], axis=0)) == 19


def test_attention_is_over_space_and_time_together():
    """A change of one tubelet reaches all tokens in the first block."""
    model, x = shaken(VideoViT(**SMALL | dict(depth=1, pool="mean"))).eval(), clips(1)
    other = x.copy()
    other[:, :2, :, :4, :4] += 1
    assert (np.abs(model(x).tokens.data - model(other).tokens.data).max(axis=(0, 2)) > 1e-9).all()
    assert model(x, trace=True).attention[0].shape == (1, 2, 18, 18)


@each_model
def test_the_order_of_frames_is_seen_between_tubelets_and_inside_of_one(make):
    model, x = shaken(make()).eval(), clips()
    logits = [model(x[:, order]).logits.data
              for order in ([0, 1, 2, 3, 4, 5], [4, 5, 2, 3, 0, 1], [1, 0, 2, 3, 4, 5])]
    assert all(np.abs(a - b).max() > 1e-6 for a, b in itertools.combinations(logits, 2))


# Of one tubelet in time they are the image models

@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("video, image, grid", [(VideoViT, ViT, {}),
                                                (VideoLookupViT, LookupViT, {"compressed": (1, 2, 2)})])
def test_one_tubelet_in_time_is_a_picture(video, image, grid, span):
    """To the bit: its channels are those of all frames."""
    model = shaken(video(**SMALL | grid | dict(frames=span, tubelet=(span, 4, 4)))).eval()
    sizes = {name: value for name, value in SMALL.items() if name not in ("frames", "tubelet")}
    flat = image(**sizes, patch_size=4, channels=3 * span, **{name: g[1:] for name, g in grid.items()})
    state = model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(12, 3 * span, 4, 4)
    flat.load_state_dict(state)
    x = clips(frames=span)
    picture = x.swapaxes(1, 2).reshape(2, 3 * span, 8, 12)  # colour by colour, in each the frames
    out, expected = model(x), flat.eval()(picture)
    assert np.array_equal(out.logits.data, expected.logits.data)
    assert np.array_equal(out.tokens.data, expected.tokens.data)
    tt.manual_seed(0)  # and they start as these
    again = {name: array.reshape(-1) for name, array in type(model)(model.config.frames, **{
        name: value for name, value in vars(model.config).items() if name != "frames"}).state_dict().items()}
    tt.manual_seed(0)
    start = image(**sizes, patch_size=4, channels=3 * span, **{name: g[1:] for name, g in grid.items()})
    assert all(np.array_equal(again[name], array.reshape(-1)) for name, array in start.state_dict().items()
               if not name.startswith("pos_embed"))


# Resizing in time and space

@pytest.mark.parametrize("grid, size", [
    ((3, 2, 3), (2, 1, 2)), ((4, 4, 4), (4, 2, 3)), ((2, 3, 4), (1, 1, 1))], ids=str)
def test_the_resize_is_separable(grid, size):
    """First in time and then in space, or the other way round; each row sums to 1."""
    x = np.random.default_rng(0).standard_normal((2, math.prod(grid), 5))
    found = ops.resize(x, grid=grid, size=size).data
    (t, *space), (t_new, *space_new) = grid, size
    in_time = ops.resize_matrix((t, 1), (t_new, 1))
    in_space = ops.resize_matrix(space, space_new)
    expected = np.einsum("st,mn,btnd->bsmd", in_time, in_space, x.reshape(2, t, -1, 5))
    same(found.reshape(2, t_new, -1, 5), expected)
    matrix = ops.resize_matrix(grid, size)
    same(matrix.sum(axis=1), np.ones(len(matrix)))
    assert (matrix.sum(axis=0) > 0).all()
    assert gradcheck(lambda x: ops.resize(x, grid=grid, size=size), x)


def test_the_identity_grid_is_the_identity():
    x = clips().reshape(2, 36, 48)
    assert np.array_equal(ops.resize(x, grid=(4, 3, 3), size=(4, 3, 3)).data, x)
    model = shaken(VideoLookupViT(**SMALL, compressed=GRID))
    lookup, compressed = model.embed(clips(), GRID)
    tokens = model.patch_embed(clips()).data
    assert np.array_equal(lookup.data, tokens + model.pos_embed.data)
    assert np.array_equal(compressed.data, tokens + model.pos_embed_compressed.data)


def test_one_set_of_weights_serves_every_grid():
    model, x, seen = shaken(VideoLookupViT(**SMALL, compressed=(2, 1, 2))).eval(), clips(), []
    for size in itertools.product(*(range(1, n + 1) for n in GRID)):
        out = model(x, compressed=size, trace=True)
        tokens = math.prod(size)
        assert out.tokens.shape == (2, tokens, 12) and out.attention[1].shape == (2, 2, tokens, 18)
        seen.append(out.logits.data)
    assert all(np.abs(a - b).max() > 1e-9 for a, b in itertools.combinations(seen, 2)) and len(seen) == 18
    assert np.array_equal(model(x).logits.data, model(x, compressed=[2, 1, 2]).logits.data)
    shown = model.show(model(x, trace=True))
    assert [panel.shape for _, panel in shown] == [(2, 18)] * 2


@pytest.mark.parametrize("options", [PAPER, dict(reuse="none")], ids=str)
def test_the_blocks_are_lookupvits_equations(options):
    model = shaken(VideoLookupViT(**SMALL | options, compressed=(2, 1, 2))).eval()
    config, x = model.config, clips()
    equations = Equations(model.state_dict(), 2, config.reuse, config.norm)
    for i in range(2):
        l, p = (tokens.data[i] for tokens in model.embed(x, (3, 1, 2)))
        for b in range(2):
            l, p = equations.block(f"blocks.{b}.", l, p)
        same(model(x, compressed=(3, 1, 2)).logits.data[i],
             equations.linear("head", equations.ln("norm", p).mean(axis=0)))


# Gradients and multiply-adds

@pytest.mark.parametrize("options", [dict(), dict(pool="mean"), dict(reg_tokens=2, no_embed_class=True)],
                         ids=str)
def test_gradients_of_a_videovit(options):
    model = shaken(VideoViT(**SMALL | options)).train()

    def outputs(*parameters):
        out = model(clips())
        return tt.ops.cross_entropy(out.logits, np.array([4, 1])), out.logits
    assert gradcheck(outputs, *model.parameters(), max_elements=60).directions == 2


@pytest.mark.parametrize("options", [dict(), PAPER], ids=str)
def test_gradients_of_a_videolookupvit(options):
    model = shaken(VideoLookupViT(**SMALL | options, compressed=(2, 2, 2))).train()
    unread = ("blocks.1.infuse", "blocks.1.lookup") if not options else ("none",)

    def outputs(*parameters):
        out = model(clips(), compressed=(3, 1, 2))
        return lookupvit_loss(out, np.array([4, 1]))[0], out.logits
    used = [p for name, p in model.named_parameters() if not name.startswith(unread)]
    assert gradcheck(outputs, *used, max_elements=60).directions == 2


def test_a_wrong_order_of_the_tubelets_values_is_seen():
    """The gradient check would find a vjp that does not undo the folding."""
    model = shaken(VideoViT(**SMALL | dict(depth=1)))
    upstream = np.random.default_rng(1).standard_normal((2, 18, 12))
    x = tt.Tensor(clips(), requires_grad=True)
    (model.patch_embed(x) * upstream).sum().backward()
    t, r, c, v = 1, 1, 2, model.patch_embed.proj.weight.data
    expected = np.einsum("bd,dcthw->btchw", upstream[:, (t * 2 + r) * 3 + c], v)
    same(x.grad[:, 2:4, :, 4:8, 8:12], expected)


@pytest.mark.parametrize("frames, tubelet, size", [
    (8, (2, 4, 4), 32), (6, (3, 2, 2), 8), (4, (1, 4, 4), (8, 12))], ids=str)
@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 2, 1)], ids=str)
def test_counted_multiply_adds(frames, tubelet, size, grid):
    D, L, K = 12, 3, 7
    height, width = nn.both_sides(size)
    N = frames // tubelet[0] * (height // tubelet[1]) * (width // tubelet[2])
    ends = N * 3 * math.prod(tubelet) * D + D * K
    sizes = dict(frames=frames, image_size=size, tubelet=tubelet, dim=D, depth=L, heads=2, num_classes=K)
    x = np.zeros((2, frames, 3, height, width), "float32")
    for pool, T in (("token", N + 1), ("mean", N)):
        expected = ends + L * (12 * T * D ** 2 + 2 * T ** 2 * D)
        assert tt.macs(VideoViT(**sizes, pool=pool), x).total == expected
    M = math.prod(grid)
    block = (3 * N * M + 2 * M ** 2) * D + (4 * N + 15 * M) * D ** 2
    tail = (M + 2 * N) * D ** 2 + N * M * D  # of the last block, which nothing reads
    model = VideoLookupViT(**sizes, compressed=(1, 1, 1))
    assert tt.macs(model, x, compressed=grid).total == ends + L * block - tail


# What is refused

@pytest.mark.parametrize("options, text", [
    (dict(frames=0), "frames 0, expected a positive whole number"),
    (dict(frames=2.0), "frames 2.0, expected a positive whole number"),
    (dict(tubelet=(2, 4)), "tubelet (2, 4), expected (t, p, p), positive whole numbers"),
    (dict(tubelet=4), "tubelet 4, expected (t, p, p), positive whole numbers"),
    (dict(tubelet=(2, 4, 2)), "tubelet (2, 4, 2), expected (t, p, p), positive whole numbers"),
    (dict(tubelet=(0, 4, 4)), "tubelet (0, 4, 4), expected (t, p, p), positive whole numbers"),
    (dict(image_size=(8, 0)), "image_size (8, 0), expected a positive whole number")], ids=str)
@each_model
def test_sizes_that_make_no_model(make, options, text):
    name = type(make()).__name__
    with refuses(f"{name}: {text}"):
        make(**options)


@each_model
def test_tubelets_that_do_not_divide_the_clip(make):
    with refuses("TubeletEmbed: tubelets of 4 frames do not divide 6"):
        make(tubelet=(4, 4, 4))
    with refuses("PatchEmbed: patch_size 8 does not divide image_size (8, 12)"):
        make(tubelet=(2, 8, 8))


@each_model
def test_clips_that_do_not_fit(make):
    model = make()
    for x, found in ((clips(frames=8), "(2, 8, 3, 8, 12)"), (clips()[:, 0], "(2, 3, 8, 12)"),
                     (clips(0), "(0, 6, 3, 8, 12)"), (clips().swapaxes(1, 2), "(2, 3, 6, 8, 12)"),
                     ([1], "a list")):
        with refuses(f"images: {found}, expected (B, 6, 3, 8, 12)"):
            model(x)
    with refuses("images: dtype uint8, expected float32: normalise them first (tt.data.normalise)"):
        model(clips().astype("uint8"))


@pytest.mark.parametrize("grid", [(2, 2), (4, 1, 1), (0, 1, 1), (1, 1.0, 1), 2], ids=str)
def test_grids_that_do_not_fit(grid):
    text = f"VideoLookupViT: compressed {grid!r}, expected a grid from (1, 1, 1) to the lookup grid (3, 2, 3)"
    with refuses(text):
        VideoLookupViT(**SMALL, compressed=grid)
    with refuses(text):
        MODELS["VideoLookupViT"]()(clips(), compressed=grid)


def test_sizes_by_place_and_by_patch_size():
    model = VideoViT(4, 16, (2, 8, 8), dim=8, depth=1, heads=2)
    assert (model.config.frames, model.config.image_size, model.config.patch_size) == (4, 16, 8)
    model = VideoLookupViT(4, 16, patch_size=8, dim=8, depth=1, heads=2, compressed=(1, 1, 1))
    assert model.config.tubelet == (2, 8, 8) and model.config.input_shape == (4, 3, 16, 16)
    assert VideoViT(dim=8, heads=2, depth=1).config.tubelet == (2, 4, 4)
