"""SegViT: its decoders against the official code, its losses and its shrinking block by hand, its cost."""

import numpy as np
import pytest

import tinytoken as tt
from small import comes_back, reference, refuses, same, shaken, softmax
from tinytoken import models
from tinytoken.backend import to_numpy
from tinytoken.checking import gradcheck
from tinytoken.data import Batches, load_pictures
from tinytoken.data.batches import IGNORE
from tinytoken.models import SegViT
from tinytoken.models.mask_losses import dice_loss, edge_patches, focal_loss, mask_loss, presence_loss
from tinytoken.models.masks import MaskDecoder, UpSampler
from tinytoken.tasks import Segment
from tinytoken.train import fit

# 24 patches
SMALL = dict(image_size=(16, 24), patch_size=4, dim=8, depth=3, heads=2, num_classes=3, layers=2)
SHRUNK = {"strided": 6, "edges": 9, "random": 9, "average": 6}  # and how many tokens are left
EXTRA = {"edges": dict(extra=3), "random": dict(extra=3)}


@pytest.fixture(scope="module")
def official():
    return reference("official_segvit.npz")


def pictures(batch=2):
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 24))


def labels(batch=2):
    """The second picture has two of the classes alone, and pixels without one."""
    out = np.random.default_rng(1).integers(0, 3, (batch, 16, 24)).astype("uint8")
    out[1, out[1] == 1], out[1, :5] = 2, IGNORE
    return out


# Parity

def check(arrays, prefix, parts, maps, steps, xp):
    """Steps, losses and gradients are the official ones."""
    steps_of = lambda name, masks: (arrays[f"{prefix}{name}_logits"], arrays[f"{prefix}{masks}"])
    expected = [steps_of(f"aux{i}", f"aux{i}_masks") for i in range(len(steps) - 1)]
    for (logits, masks), (wanted, wanted_masks) in zip(steps, expected):
        same(logits.numpy(), wanted)
        same(masks.numpy(), wanted_masks.reshape(2, 5, -1).swapaxes(1, 2))
    same(steps[-1][0].numpy(), arrays[f"{prefix}pred_logits"])
    large = tt.ops.resize(steps[-1][1], grid=(4, 4), size=(32, 32)).numpy()
    same(large.swapaxes(1, 2).reshape(2, 5, 32, 32), arrays[f"{prefix}pred_masks"], 1e-6)
    loss, found = mask_loss(steps, xp.asarray(arrays[f"{prefix}labels"][:, 0]), (4, 4))
    same(loss.numpy(), arrays[f"{prefix}loss"])
    for ours, theirs in (("class", "ce"), ("mask", "mask"), ("dice", "dice")):
        same(found[ours].numpy(), sum(arrays[f"{prefix}loss/loss_{theirs}{end}"]
                                      for end in ["", *(f"_{i}" for i in range(len(steps) - 1))]))
    loss.backward()
    leaves = {name: p for part in parts for name, p in part.items()} | maps
    gradients = {n.removeprefix(f"{prefix}g/"): g for n, g in arrays.items() if n.startswith(f"{prefix}g/")}
    assert len(gradients) >= 6
    for name, g in gradients.items():
        same(to_numpy(leaves[name].grad).reshape(g.shape), g, 1e-9)


def loaded(part, arrays, prefix, xp):
    weights = {n.removeprefix(prefix): a.astype("float64") for n, a in arrays.items() if n.startswith(prefix)}
    weights = {n: a for n, a in weights.items() if not n.startswith("atm.")}
    assert part.astype("float64").load_state_dict(weights) == ([], [])
    return part.to("cpu" if xp is np else "cuda")


def leaves_of(arrays, prefix, count, xp):
    return {f"f{i}": tt.Tensor(xp.asarray(arrays[f"{prefix}f{i}"].astype("float64")), requires_grad=True)
            for i in range(count)}


def test_attention_to_mask_is_the_official_one(official, xp):
    decoder = loaded(MaskDecoder(5, 16, 12, 3, 3, 2), official, "atm/w/", xp)
    maps = leaves_of(official, "atm/", 3, xp)
    steps = decoder([x.reshape(2, 16, 16).swapaxes(1, 2) for x in maps.values()])
    presence, masks = steps[-1][0].numpy(), tt.ops.resize(steps[-1][1], grid=(4, 4), size=(32, 32)).numpy()
    answers = (1 / (1 + np.exp(-masks))) @ softmax(presence)[:, :, :-1]
    same(answers.swapaxes(1, 2).reshape(2, 5, 32, 32), official["atm/pred"], 1e-6)
    check(official, "atm/", [dict(decoder.named_parameters())], maps, steps, xp)


def test_the_decoder_of_a_shrunk_encoder_is_the_official_one(official, xp):
    up = loaded(UpSampler(16, 12, 12, 3, 2, 2), official, "shrunk/w/", xp)
    decoder = loaded(MaskDecoder(5, None, 12, 3, 1, 2, each_layer=True), official, "shrunk/w/atm.", xp)
    maps = leaves_of(official, "shrunk/", 2, xp)
    read = up(list(maps.values()))
    same(read.numpy(), official["shrunk/up2"])
    named = {f"atm.{name}": p for name, p in decoder.named_parameters()}
    check(official, "shrunk/", [dict(up.named_parameters()), named], maps, decoder([read]), xp)


def test_a_placed_up_sampler_first_reads_what_is_near():
    """By tokens that are nothing but position embeddings: its scores fall with the distance in the grid."""
    config = dict(image_size=32, patch_size=4, dim=48, depth=3, heads=2, shrink="strided")
    models, found = [SegViT(**config, placed=placed) for placed in (True, False)], []
    grid = np.stack(np.divmod(np.arange(64), 8), axis=1)
    distances = np.linalg.norm(grid[:, None] - grid, axis=2)
    for model in models:
        up = model.up
        memory, queries = up.memory(1, model.backbone.pos_embed).data[0], up.q.weight.data
        queries = queries + memory if up.placed else queries
        q, k, _ = np.split(up.layers(1)[0].multihead_attn.in_proj_weight.data, 3)
        scores = (queries @ q.T) @ (memory @ k.T).T
        found.append(np.mean([np.corrcoef(scores[i], distances[i])[0, 1] for i in range(64)]))
    assert found[0] < -0.4 < -0.2 < found[1]
    maps = [tt.Tensor(np.random.default_rng(0).standard_normal((2, n, 48)).astype("float32"))
            for n in (64, 16)]
    placed, positions = models[0].up, models[0].backbone.pos_embed
    assert np.abs(placed(maps, positions).data - placed(maps, positions * 2 + 1).data).max() > 1e-3


# The losses, by their formulas

def test_losses_by_hand():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 7, 3)) * 3, rng.integers(0, 2, (2, 7, 3)).astype("float64")
    p = 1 / (1 + np.exp(-logits))
    right = np.where(targets, p, 1 - p)
    expected = -np.where(targets, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)
    same(focal_loss(tt.Tensor(logits), targets).data, expected.mean(axis=1))
    shared = (p * targets).sum(axis=1)
    same(dice_loss(tt.Tensor(logits), targets).data,
         1 - (2 * shared + 1) / (p.sum(axis=1) + targets.sum(axis=1) + 1))
    classes, there = rng.standard_normal((2, 3, 4)), np.array([[True, False, True], [False, False, True]])
    log_p, total, weights = np.log(softmax(classes)), 0, 0
    for b, k in np.ndindex(2, 3):
        weight, wanted = (1, k) if there[b, k] else (0.1, 3)
        total, weights = total - weight * log_p[b, k, wanted], weights + weight
    same(presence_loss(tt.Tensor(classes), there).data, total / weights)
    smoothed = presence_loss(tt.Tensor(classes), there, smoothing=0.2).data
    assert abs(smoothed - total / weights) > 0.01
    for loss in (focal_loss, dice_loss):
        far = tt.Tensor(np.full((1, 2, 1), 1e4), requires_grad=True)
        loss(far, np.array([[[0.0], [1]]])).sum().backward()
        assert np.isfinite(far.grad).all()


def test_a_class_that_no_picture_has_is_in_no_mask():
    steps = [(tt.Tensor(np.zeros((2, 3, 4))), tt.Tensor(np.zeros((2, 24, 3)), requires_grad=True))]
    y = labels()
    y[y == 1] = 0
    mask_loss(steps, y, (4, 6))[0].backward()
    assert (steps[0][1].grad[:, :, 1] == 0).all() and (steps[0][1].grad[:, :, 0] != 0).any()
    nothing = np.full((2, 16, 24), IGNORE, "uint8")
    loss, parts = mask_loss(steps, nothing, (4, 6))
    assert float(parts["mask"]) == float(parts["dice"]) == 0 and np.isfinite(float(loss))


def test_edges_are_patches_with_two_classes():
    y, found = labels(), np.zeros((2, 24), bool)
    y[0, :8, :12] = 2
    for b, r, c in np.ndindex(2, 4, 6):
        cell = y[b, 4 * r:4 * r + 4, 4 * c:4 * c + 4]
        found[b, 6 * r + c] = len(set(cell.reshape(-1).tolist()) - {IGNORE}) > 1
    assert found.any() and not found.all() and np.array_equal(edge_patches(y, (4, 6)), found)


# The encoder

def places_by_hand(model, x, name):
    grid = [6 * r + c for r in (0, 2) for c in (0, 2, 4)]
    if name == "strided":
        return np.array([grid, grid])
    scores = (x @ model.edge_head.weight.data.T + model.edge_head.bias.data)[:, :, 0]
    scores[:, grid] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :3]
    return np.sort(np.concatenate([np.array([grid, grid]), best], axis=1), axis=1)


@pytest.mark.parametrize("name", ["strided", "edges"])
def test_the_block_that_shrinks_gives_what_the_whole_block_gives_there(name):
    model = shaken(SegViT(**SMALL, shrink=name, **EXTRA.get(name, {}))).backbone
    state = model.start(pictures(), trace=True)
    model.run_block(0, state)
    x = state.x
    whole, places = model.blocks[1](x).data, places_by_hand(model, x.data, name)
    model.before_block(1, state)
    model.run_block(1, state)
    assert np.array_equal(state.index, places) and state.attention[1].shape == (2, 2, SHRUNK[name], 24)
    same(state.x.data, np.take_along_axis(whole, places[:, :, None], axis=1))
    assert np.array_equal(state.shown[0].data, x.data)


def test_averages_and_random_places():
    model = shaken(SegViT(**SMALL, shrink="average")).backbone
    state = model.start(pictures())
    x = state.x.data.reshape(2, 2, 2, 3, 2, 8)
    model.before_block(1, state)
    same(state.x.data, x.mean(axis=(2, 4)).reshape(2, 6, 8))
    model = SegViT(**SMALL, shrink="random", extra=3).backbone
    first, second = (model(pictures()[rows]).index for rows in ([0, 1], [1]))
    assert np.array_equal(first[1:], second) and len(set(first[0])) == 9
    assert set(first[0]) > {6 * r + c for r in (0, 2) for c in (0, 2, 4)}


@pytest.mark.parametrize("name", ["none", *SHRUNK])
@pytest.mark.parametrize("decoder", ["atm", "dot", "linear", "mlp"])
def test_macs(name, decoder):
    """An encoder's block of M queries and N keys has 10 M C^2 + 2 N C^2 + 2 M N C; a decoder's layer of K
    queries and N keys 14 K D^2 + 2 N D^2 + 2 K D (K + N)."""
    model = SegViT(**SMALL, shrink=name, decoder=decoder, **EXTRA.get(name, {}))
    N, C, D, K, L, M = 24, 8, 4, 3, 2, SHRUNK.get(name, 24)
    encoder_block = lambda m, n: 10 * m * C ** 2 + 2 * n * C ** 2 + 2 * m * n * C
    layer = lambda k, n: 14 * k * D ** 2 + 2 * n * D ** 2 + 2 * k * D * (k + n)
    keys = M if name == "average" else N
    expected = N * 48 * C + encoder_block(N, N) + encoder_block(M, keys) + encoder_block(M, M)
    stages, width = 3, C
    if name != "none":
        stages, width = 1, D
        expected += sum(n * C * D + L * layer(N, n) for n in (N, M)) + N * C * (name == "edges")
    if decoder in ("atm", "dot"):
        made = L if name != "none" else stages
        expected += stages * (N * C * D * (name == "none") + L * layer(K, N)) + made * K * D * (K + 1)
        expected += stages * L * (K * D * D + K * N * D) * (decoder == "dot") + 384 * K * K
    else:
        expected += N * (width * K if decoder == "linear" else width * D + D * K)
    assert tt.macs(model, pictures().astype("float32")).total == expected


# The whole

def test_answers_masks_and_what_is_shown():
    model = shaken(SegViT(**SMALL)).eval()
    out = model(pictures())
    assert out.logits.shape == (2, 16, 24, 3) and out.tokens.shape == (2, 24, 8) and len(out.steps) == 3
    presence, masks = out.steps[-1]
    large = tt.ops.resize_matrix((4, 6), (16, 24)) @ masks.data
    expected = (1 / (1 + np.exp(-large))) @ softmax(presence.data)[:, :, :3]
    same(out.logits.data, expected.reshape(2, 16, 24, 3))
    (title, panel), *_ = model.show(out)
    assert title == "SegViT: mask of class 0" and panel.shape == (2, 24)
    assert 0 <= panel.min() <= panel.max() <= 1
    other = SegViT(**SMALL, decoder="mlp")
    assert other.show(other(pictures())) == []
    with refuses("SegViT: a teacher, expected none: its pixels answer with no logits"):
        model.loss(out, labels(), out)


@pytest.mark.parametrize("more", [dict(decoder="dot", stages=2), dict(decoder="linear"), dict(decoder="mlp"),
                                  dict(new_classes=1), dict(shrink="strided", decoder="dot"),
                                  dict(shrink="edges", extra=3), dict(shrink="average", decoder="mlp"),
                                  dict(shrink="strided", placed=True)],
                         ids=str)
def test_gradients_of_the_whole_model(more):
    model = shaken(SegViT(**SMALL | dict(layers=1) | more)).train()
    names, parameters = zip(*model.named_parameters())
    paths = np.random.default_rng(2).uniform(0.5, 2, (2, 3, 2))
    gradcheck(lambda *_: model.loss(model(pictures(), paths=paths), labels(), smoothing=0.1)[0], *parameters,
              names=names, max_elements=6)


def test_new_classes_are_learned_beside_the_old_ones():
    """The old weights have their places, and the new class its own, before "absent"."""
    old = shaken(SegViT(**SMALL | dict(num_classes=2)))
    new = shaken(SegViT(**SMALL, new_classes=1))
    missing, unexpected = new.load_state_dict(old.state_dict(), strict=False)
    assert unexpected == [] and set(missing) == {"decoder.q_new.weight", "decoder.class_embed_new.weight",
                                                 "decoder.class_embed_new.bias"}
    decoder = new.decoder
    maps = [tt.Tensor(x) for x in np.random.default_rng(0).standard_normal((3, 2, 24, 8))]
    for (a, masks_a), (b, masks_b) in zip(old.decoder(maps), decoder(maps)):
        assert b.shape == (2, 3, 4) and masks_b.shape == (2, 24, 3)
    bias = decoder.class_embed_new.bias
    bias.data[:] += 100
    assert (decoder(maps)[-1][0].data.argmax(axis=2) == 2).all()  # "absent" is the last, the new one before


def test_configuration_checkpoint_and_training(tmp_path):
    train = load_pictures("pixel_scenes", train=24, test=8, seed=0)[0]
    model = models.create("segvit", dim=8, depth=3, heads=2, num_classes=11, shrink="edges", extra=4,
                          layers=1)
    assert model.config.read == (0, 1, 2) and model.config.width == 4
    assert SegViT(depth=12).config.read == (3, 7, 11) and SegViT().config.width == 48
    task = Segment(model)
    assert task.whole  # its loss counts the pairs of the batch
    found = fit(model, task, Batches(train.images, train.labels, 8), steps=4, log_every=1, bar=False)
    assert np.isfinite(found["loss"]) and found["edges"] > 0
    comes_back(model, tmp_path)


@pytest.mark.parametrize("config, text", [
    (dict(shrink="half"), "SegViT: shrink 'half', expected one of none, average, strided, edges, random"),
    (dict(shrink="strided", image_size=20), "SegViT: shrink 'strided' of 5 x 5 tokens and 3 blocks, expected "
                                            "an even number of rows and columns, and at least 2 blocks"),
    (dict(extra=1), "SegViT: extra 1 with shrink 'none', expected 0 to 0"),
    (dict(shrink="edges", extra=19), "SegViT: extra 19 with shrink 'edges', expected 0 to 18"),
    (dict(read=(0, 1)), "SegViT: read (0, 1) of 3 blocks, expected rising numbers of blocks, the last 2"),
    (dict(read=(2,), stages=2), "SegViT: stages 2 of the maps after the blocks (2,), expected 1 to 1"),
    (dict(width=5), "SegViT: width 5, expected a multiple of the 2 heads"),
    (dict(new_classes=1, decoder="mlp"), "SegViT: new_classes 1 of 3 with decoder 'mlp', expected 0 to 0"),
    (dict(placed=True), "SegViT: placed True with shrink 'none', expected True or False, and True only of an "
                        "encoder that shrinks"),
    (dict(decoder="deep"), "SegViT: decoder 'deep', expected one of atm, dot, linear, mlp")])
def test_what_it_refuses(config, text):
    with refuses(text):
        SegViT(**SMALL | config)
