"""Counted multiply-adds against closed forms, exactly; what may not be left uncounted."""
import re

import numpy as np
import pytest

import tinytoken as tt
from tinytoken import cost, tensor
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.models.lookupvit import PAPER

# (image, patch, dim, depth, heads, mlp_ratio, classes, channels): no two sizes of one row alike
SIZES = [(8, 2, 12, 2, 3, 4, 5, 3), (12, 4, 8, 3, 2, 2, 7, 1), (20, 2, 24, 4, 6, 3, 10, 3)]
NAMES = ("image_size", "patch_size", "dim", "depth", "heads", "mlp_ratio", "num_classes", "channels")
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def config(size):
    return dict(zip(NAMES, size))


def pictures(size, batch=2):
    return np.zeros((batch, size[7], size[0], size[0]), "float32")


def vit_block(tokens, dim, ratio=4):
    """12 N D^2 + 2 N^2 D at the usual ratio: q, k, v and the output 4, the MLP 2 x ratio."""
    return (4 + 2 * ratio) * tokens * dim ** 2 + 2 * tokens ** 2 * dim


def ends(size, heads=1):
    """(patches, patch embedding + classifiers)."""
    image, patch, dim, _, _, _, classes, channels = size
    patches = (image // patch) ** 2
    return patches, patches * channels * patch ** 2 * dim + heads * dim * classes


# Closed forms

@sizes
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit(size, pool):
    patches, expected = ends(size)
    tokens = patches + (pool == "token")
    expected += size[3] * vit_block(tokens, size[2], size[5])
    counted = tt.macs(ViT(**config(size), pool=pool), pictures(size))
    assert int(counted) == counted.total == expected


def test_vit_at_the_default_size():
    counted = tt.macs(ViT(), np.zeros((1, 3, 32, 32), "float32"))
    assert counted.total == 6 * (12 * 65 * 96 ** 2 + 2 * 65 ** 2 * 96) + 64 * 48 * 96 + 96 * 10


@sizes
@pytest.mark.parametrize("stages, ratios", [((1,), (0.5,)), ((0, 1), (0.7, 0.33)), ((0, 1), (1, 1))], ids=str)
def test_dynamicvit(size, stages, ratios):
    dim, depth = size[2:4]
    patches, expected = ends(size)
    alive = patches
    for block in range(depth):
        if block in stages:
            # the predictor, on what the stages before it left
            expected += 1.625 * alive * dim ** 2 + alive * dim / 2
            alive = int(patches * ratios[stages.index(block)])
        expected += vit_block(alive + 1, dim, size[5])
    model = DynamicViT(**config(size), prune_before=stages, keep_ratios=ratios)
    assert tt.macs(model, pictures(size)).total == expected


def test_dynamicvit_with_forced_decisions_runs_no_predictor():
    size = SIZES[0]
    patches, expected = ends(size)
    model = DynamicViT(**config(size), prune_before=(1,), keep_ratios=(0.5,))
    keep = [np.arange(16) < np.array([[3], [3]])]
    assert tt.macs(model, pictures(size), keep=keep).total == expected + vit_block(17, 12) + vit_block(4, 12)


def lookup_block(N, M, D, p, r, reuse):
    """(3NM + 2M^2) D + (4N + 15M) D^2 at the usual ratios and reuse; in general form."""
    expected = (3 * N * M + 2 * M ** 2) * D + (N * (2 + 1 + 2 * r) + M * (1 + 1 + 4 + 2 * p + 1)) * D ** 2
    if reuse == "separate":
        expected += (N + M) * D ** 2 + N * M * D
    if reuse == "none":
        expected -= (N + M) * D ** 2 + N * M * D
    return expected


def lookup_tail(N, M, D, r, reuse):
    """What the last block leaves out: (M + 2N) D^2 + N M D at the usual ratio and reuse."""
    infusion = (M + N) * D ** 2 + N * M * D
    return 2 * r * N * D ** 2 + infusion * {"none": 0, "separate": 2}.get(reuse, 1)


@sizes
@pytest.mark.parametrize("reuse", ["probs", "renorm", "resoftmax", "separate", "none"])
@pytest.mark.parametrize("grid, light", [((2, 2), 0.5), ((3, 1), 1)], ids=str)
def test_lookupvit(size, reuse, grid, light):
    D, depth, p, classes = size[2], size[3], size[5], size[6]
    N, embedding_and_head = ends(size)
    M = grid[0] * grid[1]
    blocks = depth * lookup_block(N, M, D, p, light, reuse)
    call = dict(compressed=grid)
    for classifiers in ("both", "compressed"):
        model = LookupViT(**config(size), compressed=(1, 2), lookup_mlp_ratio=light, reuse=reuse,
                          classifiers=classifiers)
        expected = embedding_and_head + blocks - lookup_tail(N, M, D, light, reuse)
        assert tt.macs(model, pictures(size), **call).total == expected
        if classifiers == "both":
            both = tt.macs(model, pictures(size), **call, mean_of_heads=True).total
            assert both == embedding_and_head + blocks + D * classes


def test_lookupvit_at_the_default_size():
    N, M, D = 64, 9, 96
    blocks = 6 * ((3 * N * M + 2 * M ** 2) * D + (4 * N + 15 * M) * D ** 2) - (M + 2 * N) * D ** 2 - N * M * D
    assert tt.macs(LookupViT(), np.zeros((1, 3, 32, 32), "float32")).total == blocks + N * 48 * D + D * 10


def test_lookupvit_beside_a_vit():
    """D = 192, L = 6, N = 64, patch embedding included, head not; the ViT has no class token."""
    images, options = np.zeros((1, 3, 32, 32), "float32"), dict(dim=192)
    assert round((tt.macs(ViT(**options, pool="mean"), images).total - 1920) / 1e6, 1) == 179.9
    model = LookupViT(**options | PAPER)
    for m, with_tail in ((2, 71.4), (3, 89.3), (4, 114.4), (5, 147.1), (6, 187.6)):
        both = tt.macs(model, images, compressed=(m, m), mean_of_heads=True).total
        assert round((both - 2 * 1920) / 1e6, 1) == with_tail


def test_a_published_size():
    """DynamicViT on DeiT-256 at 224, keep rate 0.7: 1.38 G measured on the official model, norms included,
    which count nothing here."""
    model = DynamicViT(224, 16, 256, 12, 4, num_classes=1000, prune_before=(3, 6, 9),
                       keep_ratios=(0.7, 0.49, 0.343))
    assert tt.macs(model, np.zeros((1, 3, 224, 224), "float32")).total / 1e9 == pytest.approx(1.38, abs=0.01)


# What a count says

def test_by_module_and_by_op_add_up():
    size = SIZES[0]
    _, _, D, depth, *_ = size
    counted = tt.macs(ViT(**config(size)), pictures(size))
    assert sum(counted.by_module.values()) == sum(counted.by_op.values()) == counted.total
    assert set(counted.by_op) == {"linear", "attention"}
    assert counted.by_op["attention"] == depth * 2 * 17 ** 2 * D
    assert counted.by_module["head"] == D * 5 and counted.by_module["blocks.1.mlp.fc1"] == 17 * D * 4 * D
    assert counted.by_module["patch_embed.proj"] == 16 * 12 * D
    assert counted.by_module["blocks.0.attn"] == 2 * 17 ** 2 * D
    *rows, last = str(counted).splitlines()
    assert len(rows) == len(counted.by_module)
    assert last.split() == ["total", "MACs", "per", "image", f"{counted.total:,}"]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_count_is_per_image(batch):
    size = SIZES[0]
    model = DynamicViT(**config(size), prune_before=(1,), keep_ratios=(0.5,))
    assert tt.macs(model, pictures(size, batch)) == tt.macs(model, pictures(size, 2))


def test_a_pass_that_traces_costs_the_same():
    size = SIZES[0]
    model = LookupViT(**config(size), compressed=(2, 2))
    assert tt.macs(model, pictures(size), trace=True) == tt.macs(model, pictures(size))


def test_explain_counts_the_same_pass():
    size = SIZES[0]
    model = ViT(**config(size))
    last = cost.graph_text(model(pictures(size, 1)).logits).splitlines()[-1]
    assert last.endswith(f" {tt.macs(model, pictures(size, 1)).total:,} multiply-adds (MACs)")


# What a count leaves alone

def test_training_modes_are_restored_and_nothing_is_recorded():
    size = SIZES[0]
    model = LookupViT(**config(size), compressed=(2, 2)).train()
    model.blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    outputs = []
    forward, model.forward = model.forward, lambda images: outputs.append((model.training, forward(images)))
    tt.macs(model, pictures(size))
    (training, out), = outputs
    assert not training and out.logits.node is None and not out.logits.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert all(p.grad is None for p in model.parameters())


def test_modes_and_the_observer_are_restored_after_an_error():
    size = SIZES[0]
    model = ViT(**config(size)).train()
    with pytest.raises(tt.InputError):
        tt.macs(model, np.zeros((1, 3, 4, 4), "float32"))
    assert model.training and model.head.training and tensor._mode.around is None and tensor._mode.recording
    assert model(pictures(size)).logits.requires_grad and tt.cost.innermost() is None


# Nothing uncounted

def test_an_op_that_says_nothing_about_its_cost_fails_the_count():
    @tt.op
    def unheard_of(x):
        return x * 2, lambda g: g * 2

    class Model(tt.nn.Module):
        def __init__(self):
            self.head = tt.nn.Linear(3, 2)

        def forward(self, x):
            return unheard_of(self.head(x))
    try:
        text = "macs: op unheard_of neither declares its multiply-adds nor stands in cost.FREE"
        with pytest.raises(tt.GraphError, match=f"^{re.escape(text)}$"):
            tt.macs(Model(), np.zeros((1, 3), "float32"))
        unheard_of.macs(lambda x: x[0] * x[1])
        assert tt.macs(Model(), np.zeros((1, 3), "float32")).by_op == {"linear": 6, "unheard_of": 2}
    finally:
        del tensor.registry[unheard_of.module, unheard_of.name]


def test_every_op_declares_its_macs_or_is_free_and_not_both():
    ops = {name: op for (module, name), op in tensor.registry.items() if module.startswith("tinytoken.ops.")}
    assert len(ops) > 35
    declared = {name for name, op in ops.items() if op.shapes_to_macs is not None}
    assert not set(ops) - declared - cost.FREE   # neither
    assert not cost.FREE - set(ops)              # FREE names what is no op
    assert not declared & cost.FREE              # both


@pytest.mark.parametrize("call, expected", [
    (lambda o: o.matmul(np.ones((2, 3, 4)), np.ones((4, 5))), 2 * 3 * 4 * 5),
    (lambda o: o.matmul(np.ones((2, 1, 3, 4)), np.ones((6, 4, 5))), 2 * 6 * 3 * 4 * 5),
    (lambda o: o.linear(np.ones((2, 3, 4)), np.ones((5, 4)), np.ones(5)), 2 * 3 * 4 * 5),
    (lambda o: o.attention(np.ones((2, 3, 4, 5)), np.ones((2, 3, 7, 5)), np.ones((2, 3, 7, 5))),
     2 * (2 * 3 * 4 * 5 * 7)),
    (lambda o: o.attention(*np.ones((3, 2, 3, 4, 5)), np.ones((2, 4))), 2 * (2 * 3 * 4 * 5 * 4)),
    (lambda o: o.lookup_gather(np.ones((2, 3, 4, 5)), *np.ones((2, 2, 3, 7, 5))), 2 * (2 * 3 * 4 * 5 * 7)),
    (lambda o: o.lookup_infuse(*np.ones((2, 2, 3, 4, 7)), np.ones((2, 3, 4, 5)), reuse="probs"),
     2 * 3 * 4 * 7 * 5),
])
def test_macs_of_single_ops(call, expected):
    class Model(tt.nn.Module):
        def forward(self, one):
            return call(tt.ops)
    counted = tt.macs(Model(), np.zeros(1))
    assert counted.total == expected and counted.by_module == {"(model)": expected}
