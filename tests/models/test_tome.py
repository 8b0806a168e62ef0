"""ToMe: the paper's matching, averages by size, and what must not change when nothing or only equal tokens
merge."""
import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, pictures, refuses, same, shaken, softmax
from tinytoken.checking import gradcheck
from tinytoken.models import ToMe, ViT
from tinytoken.models.tome import matching


def model(seed=0, **config):
    return shaken(ToMe(**SMALL | config), seed)


def matched_by_hand(keys, r, class_token):
    """The pseudo-code of the paper's appendix D, image by image, with lists -> for each group that is left
    its members."""
    groups = []
    for metric in keys / np.linalg.norm(keys, axis=2, keepdims=True):
        first, second = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
        joins = [(-np.inf if class_token and a == 0 else max(metric[a] @ metric[b] for b in second), a,
                  max(second, key=lambda b: metric[a] @ metric[b])) for a in first]
        strongest = sorted(joins, key=lambda join: -join[0])[:r]
        partner = {a: b for _, a, b in strongest}
        left = [[a] for a in first if a not in partner]
        groups.append(left + [[b, *(a for a in partner if partner[a] == b)] for b in second])
    return groups


@pytest.mark.parametrize("T, r, class_token",
                         [(17, 5, 1), (17, 8, 1), (16, 3, 0), (9, 1, 1), (4, 1, 0), (2, 1, 0)])
def test_the_matching_is_the_papers(T, r, class_token):
    keys = np.random.default_rng(T + r).standard_normal((3, T, 4))
    for target, groups in zip(matching(keys, r, class_token), matched_by_hand(keys, r, class_token)):
        assert len(groups) == T - r
        for place, members in enumerate(groups):
            assert sorted(members) == np.flatnonzero(target == place).tolist()
        assert not class_token or target[0] == 0 and (target == 0).sum() == 1


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_r_0_is_the_vit_to_the_bit(pool, training):
    tt.manual_seed(4)
    merging, vit = ToMe(**SMALL, r=0, pool=pool).train(training), ViT(**SMALL, pool=pool).train(training)
    images, labels = pictures().astype("float32"), np.array([0, 3])
    merging.load_state_dict(vit.state_dict())
    ours, theirs = merging(images, trace=True), vit(images, trace=True)
    for a, b in ((ours.logits, theirs.logits), (ours.tokens, theirs.tokens),
                 *zip(ours.attention, theirs.attention)):
        assert np.array_equal(a.data, b.data)
    for m, out in ((merging, ours), (vit, theirs)):
        m.loss(out, labels)[0].backward()
    assert all(np.array_equal(p.grad, q.grad) for p, q in zip(merging.parameters(), vit.parameters()))
    assert np.array_equal(ours.size, np.ones((2, 16))) and np.array_equal(ours.source, [range(16)] * 2)


@pytest.mark.parametrize("r", [1, 3, (5, 0), (0, 4), 99])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_sizes_sum_to_the_patches_and_sources_say_whose(r, pool):
    out = model(r=r, pool=pool)(pictures(3))
    assert np.array_equal(out.size.sum(axis=1), [16, 16, 16]) and out.size.min() >= 1
    counts = np.stack([np.bincount(source, minlength=out.size.shape[1]) for source in out.source])
    assert np.array_equal(counts, out.size) and out.tokens.shape[:2] == out.size.shape


def test_a_merge_is_the_mean_over_patches():
    """Two merges in a row: a token that stands for three patches is the mean of all three, not of two and
    one."""
    merging = model(r=3, pool="mean", depth=1)
    tokens = merging.start(pictures())
    before, rng = tokens.x.data.copy(), np.random.default_rng(0)
    for r in (6, 4):
        merging.merge(tokens, matching(rng.standard_normal((2, tokens.x.shape[1], 4)), r, 0), r)
    assert tokens.size.max() > 2
    for b in range(2):
        for place in range(6):
            same(tokens.x.data[b, place], before[b][tokens.source[b] == place].mean(axis=0))


def test_the_model_is_its_equations():
    """Two blocks by hand: softmax(q k / sqrt d + log size), the merge by keys that are means over heads, the
    MLP."""
    merging, r, (H, D) = model(r=(3, 2)), (3, 2), (SMALL["heads"], SMALL["dim"])
    x = merging.start(pictures()).x.data
    size = np.ones(x.shape[:2])
    for block, merged in zip(merging.blocks, r):
        q, k, v = (part.data for part in block.attn.project(block.norm1(x)))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(D // H) + np.log(size)[:, None, None, :]
        out = softmax(scores) @ v
        x = x + block.attn.proj(out.transpose(0, 2, 1, 3).reshape(x.shape)).data
        groups = matched_by_hand(k.mean(axis=1), merged, True)
        weighted = lambda b, members: (x[b, members] * size[b, members, None]).sum(axis=0) / size[b, members].sum()
        x, size = (np.array([[weighted(b, members) for members in groups[b]] for b in range(2)]),
                   np.array([[size[b, members].sum() for members in groups[b]] for b in range(2)]))
        x = x + block.mlp(block.norm2(x)).data
    out = merging(pictures())
    same(out.tokens.data, merging.norm(x).data[:, 1:])
    same(out.logits.data, merging.head(merging.norm(x)[:, 0]).data)
    assert np.array_equal(out.size, size[:, 1:]) and size.max() > 2


def test_equal_tokens_merge_without_a_trace():
    """Attention that counts a merged token as often as it stands for patches cannot tell it from its
    parts."""
    merging, vit = model(r=4), shaken(ViT(**SMALL))
    for m in (merging, vit):
        m.pos_embed.data[...] = 0
    flat = np.broadcast_to(np.random.default_rng(0).standard_normal((2, 3, 1, 1)), (2, 3, 8, 8))
    ours = merging(flat)
    assert ours.tokens.shape[1] == 8
    same(ours.logits.data, vit(flat).logits.data)
    labels = np.array([0, 3])
    gradients = [tt.grad(m.loss(m(flat), labels)[0], m.parameters()) for m in (merging, vit)]
    for a, b in zip(*gradients):
        same(a, b, 1e-10)


@pytest.mark.parametrize("config", [dict(r=3), dict(r=(4, 2), pool="mean")])
def test_gradients(config):
    merging = model(**config)
    names, parameters = zip(*merging.named_parameters())
    gradcheck(lambda *_: merging.loss(merging(pictures()), np.array([0, 3]))[0], *parameters, names=names,
              max_elements=60)
    gradcheck(lambda images: (merging(images).logits, merging(images).tokens), pictures(), max_elements=40)


@pytest.mark.parametrize("r", [2, (5, 1), 0])
def test_multiply_adds(r):
    D, d, T, total = SMALL["dim"], SMALL["dim"] // SMALL["heads"], 17, 16 * 12 * SMALL["dim"] + SMALL["dim"] * 5
    for merged in r if isinstance(r, tuple) else (r, r):
        match = (T + 1) // 2 * (T // 2) * d if merged else 0
        total += 4 * T * D**2 + 2 * T**2 * D + match + 8 * (T - merged) * D**2
        T -= merged
    assert tt.macs(ToMe(**SMALL, r=r), pictures().astype("float32")).total == total


def test_what_it_shows_and_draws():
    merging = model(r=5).eval()
    out = merging(pictures(), trace=True)
    (title, weights), = merging.show(out)
    assert title == "ToMe: 6 of 16 tokens, red: merged most" and weights.shape == (2, 16)
    assert np.array_equal(weights[1], out.size[1][out.source[1]])
    assert [a.shape[2] for a in out.attention] == [17, 12]
    assert merging.noise(2, 0, 0) == {}


def test_drop_path_reaches_both_branches():
    merging = model(r=4).train()
    paths = np.ones((2, 2, 2))
    expected = merging(pictures()).logits.data
    same(merging(pictures(), paths=paths).logits.data, expected)
    for branch in (0, 1):
        changed = paths.copy()
        changed[0, 1, branch] = 0
        found = merging(pictures(), paths=changed).logits.data
        assert not np.allclose(found[0], expected[0]) and np.allclose(found[1], expected[1], rtol=1e-12)


def test_a_teacher_and_a_start_from_a_vit():
    vit = ViT(**SMALL)
    merging = ToMe(**SMALL, r=4)
    assert merging.load_state_dict(vit.state_dict()) == ([], [])
    task = tt.tasks.Distil(merging, vit)
    loss, parts = task(pictures().astype("float32"), np.array([0, 3]))
    assert list(parts) == ["class", "kl"] and parts["kl"].item() > 0
    assert loss.item() == pytest.approx(parts["class"].item() + 0.5 * parts["kl"].item())


def test_refused():
    for r in (-1, 2.5, (1, 2, 3), "8"):
        with refuses(f"ToMe: r {r!r}, expected a whole number that is not negative, or one per block (2)"):
            ToMe(**SMALL, r=r)
