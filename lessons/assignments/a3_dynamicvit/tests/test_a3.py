"""Each case is given `student`, the functions of the submission, and `rng`, which draws its inputs: for each
submission others. What it returns is compared with the package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def sizes(rng, count):
    return tuple(map(int, rng.integers(2, 6, count)))


@pytest.mark.points(1, number="3.1", hint="-log(-log(u))")
def test_gumbel_numbers(student, rng):
    u = np.array([[0.1, 0.5], [1 / np.e, 0.9]])
    close(student.gumbel(u), np.array([[-0.834032445, 0.366512921], [0.0, 2.250367327]]), 1e-8)
    g = rng.uniform(-1.5, 4, sizes(rng, 3))
    close(student.gumbel(np.exp(-np.exp(-g))), g)


@pytest.mark.points(1, number="3.1", hint="one-hot, of the largest logit + noise")
def test_draws_are_one_hot(student, rng):
    for shape in ((2, 5, 3), sizes(rng, 2), sizes(rng, 3)):
        logits, noise = rng.standard_normal(shape), 3 * rng.standard_normal(shape)
        found = student.draw(logits, noise)
        close(found, ((logits + noise) == (logits + noise).max(axis=-1, keepdims=True)).astype(float))


@pytest.mark.points(1, number="3.1", visibility="hidden", hint="a token kept with probability 0.7 is kept in "
                                                               "70 % of many draws")
def test_draws_have_their_probabilities(student, rng):
    for p in (np.array([0.7, 0.2, 0.1]), rng.dirichlet(np.full(4, 2.0))):
        logits, u = np.log(p), rng.uniform(1e-12, 1, (20000, len(p)))
        found = student.draw(np.broadcast_to(logits, u.shape), student.gumbel(u)).mean(axis=0)
        assert np.abs(found - p).max() < 0.02, f"found {found.round(3)}, expected {p.round(3)}"


def soft(logits, noise, tau):
    z = np.exp((logits + noise) / tau)
    return z / z.sum(axis=-1, keepdims=True)


@pytest.mark.points(1, number="3.2", hint="the value is the hard draw at every temperature")
def test_the_value_is_hard(student, rng):
    for tau in (0.3, 1.0, 4.0):
        logits, noise = rng.standard_normal((2, *sizes(rng, 2), 3))
        close(student.straight_through(logits, noise, tau)[0], np.eye(3)[(logits + noise).argmax(axis=-1)])


@pytest.mark.points(2, number="3.2", hint="s (g - sum(s g)), over the last axis")
def test_the_gradient_is_soft(student, rng):
    for shape in ((4, 6, 2), sizes(rng, 2), sizes(rng, 3)):
        logits, noise, g = rng.standard_normal((3, *shape))
        s = soft(logits, noise, 1.0)
        _, vjp = refuse_changes(lambda *arrays: student.straight_through(*arrays, 1.0), logits, noise)
        close(vjp(g), s * (g - (s * g).sum(axis=-1, keepdims=True)))


@pytest.mark.points(1, number="3.2", hint="the division by tau has a derivative too")
def test_the_temperature(student, rng):
    for tau in (0.5, 2.0, float(rng.uniform(0.3, 3.0))):
        logits, noise, g = rng.standard_normal((3, 5, 3))
        s = soft(logits, noise, tau)
        close(student.straight_through(logits, noise, tau)[1](g),
              s * (g - (s * g).sum(axis=-1, keepdims=True)) / tau)


def weights(rng, D):
    shapes = {"in": (D, D), "out1": (D // 2, D), "out2": (D // 4, D // 2), "out3": (2, D // 4)}
    return ({name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}
            | {f"{name}_bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()})


def packages_scores(x, keep, w):
    made = tt.models.Predictor(x.shape[2]).astype("float64")
    names = {"in_conv.1": "in", "out_conv.0": "out1", "out_conv.2": "out2", "out_conv.4": "out3"}
    for name, p in made.named_parameters():
        layer, what = name.rsplit(".", 1)
        p.data[...] = (w[names[layer] + ("_bias" if what == "bias" else "")] if layer in names
                       else float(what == "weight"))
    return made(tt.Tensor(x), keep).data


@pytest.mark.points(2, number="3.3", hint="halves of z; the mean goes to every token; three layers, two with "
                                          "gelu")
def test_scores_of_all_tokens(student, rng):
    for B, N, D in ((2, 5, 8), (*sizes(rng, 2), 12)):
        x, w, keep = rng.standard_normal((B, N, D)), weights(rng, D), np.ones((B, N))
        close(refuse_changes(lambda x, keep: student.predictor(x, keep, w), x, keep),
              packages_scores(x, keep, w), 1e-6)


@pytest.mark.points(1, number="3.3", hint="the mean is over the kept tokens, divided by their number")
def test_scores_of_what_is_left(student, rng):
    keep = np.array([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0.0]])
    for _ in range(2):
        x, w, keep = rng.standard_normal((2, 5, 8)), weights(rng, 8), rng.permuted(keep, axis=1)
        close(student.predictor(x, keep, w), packages_scores(x, keep, w), 1e-6)


@pytest.mark.points(1, number="3.3", visibility="hidden", hint="a dropped token changes nothing for the "
                                                               "others")
def test_what_is_dropped_has_no_say(student, rng):
    for _ in range(2):
        x, w, dropped = rng.standard_normal((1, 5, 8)), weights(rng, 8), int(rng.integers(5))
        keep, other, left = np.ones((1, 5)), x.copy(), np.delete(np.arange(5), dropped)
        keep[0, dropped] = 0
        other[0, dropped] += 100
        expected = packages_scores(x, keep, w)[0, left]
        close(student.predictor(x, keep, w)[0, left], expected, 1e-6)
        close(student.predictor(other, keep, w)[0, left], expected, 1e-6)


@pytest.mark.points(1, number="3.4", hint="what is gone stays gone")
def test_decisions_of_each_stage(student, rng):
    for S, B, N in ((3, 4, 9), sizes(rng, 3)):
        draws = (rng.standard_normal((S, B, N)) > -0.5).astype(float)
        close(student.stages(draws), np.stack([draws[:stage + 1].min(axis=0) for stage in range(S)]))


@pytest.mark.points(1, number="3.4", hint="mean over patches first, then the square")
def test_the_ratio_loss_by_hand(student, rng):
    decisions = np.array([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0.0]]])
    close(student.ratio_loss(decisions, (0.5, 0.25)), (0.0 + 0.25) / 2 + 0.0)
    for _ in range(2):
        first, second = map(float, rng.uniform(0.1, 0.9, 2))
        close(student.ratio_loss(decisions, (first, second)),
              ((0.5 - first)**2 + (1 - first)**2) / 2 + (0.25 - second)**2)


@pytest.mark.points(1, number="3.4", visibility="hidden", hint="a sum over stages, a mean over pictures")
def test_the_ratio_loss_against_the_package(student, rng):
    for S, B, N in ((3, 5, 8), sizes(rng, 3)):
        decisions = np.cumprod(rng.standard_normal((S, B, N)) > -0.4, axis=0).astype(float)
        targets = tuple(map(float, rng.uniform(0.1, 0.9, S)))
        expected = sum(((d.mean(axis=1) - t) ** 2).mean() for d, t in zip(decisions, targets))
        close(student.ratio_loss(decisions, targets), expected)


def inputs(rng, kept):
    """Logits, the teacher's, tokens, the teacher's, and `kept` with each picture's decisions shuffled."""
    B, N = kept.shape
    return (*(2 * rng.standard_normal((2, B, 5))), *rng.standard_normal((2, B, N, 4)),
            rng.permuted(kept, axis=1))


KEPT = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0.0]])


@pytest.mark.points(2, number="3.5", hint="the teacher's probabilities stand in front; the mean is over "
                                          "pictures")
def test_the_kl_divergence(student, rng):
    for _ in range(3):
        z, z_t, *others = inputs(rng, KEPT)
        p, p_t = (np.exp(a) / np.exp(a).sum(axis=1, keepdims=True) for a in (z, z_t))
        close(student.distillation(z, z_t, *others)[0], (p_t * np.log(p_t / p)).sum(axis=1).mean())


@pytest.mark.points(1, number="3.5", hint="each picture's mean is over its own kept tokens")
def test_the_token_loss(student, rng):
    for _ in range(3):
        z, z_t, f, f_t, keep = inputs(rng, KEPT)
        expected = np.mean([((f[b] - f_t[b]) ** 2)[keep[b] == 1].mean() for b in range(3)])
        close(student.distillation(z, z_t, f, f_t, keep)[1], expected)


@pytest.mark.points(1, number="3.5", visibility="hidden", hint="a picture that kept none counts 0, and is "
                                                               "counted")
def test_a_picture_without_tokens(student, rng):
    for _ in range(3):
        z, z_t, f, f_t, keep = inputs(rng, np.array([[1, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 1.0]]))
        gaps = ((f - f_t) ** 2).mean(axis=2)
        close(student.distillation(z, z_t, f, f_t, keep)[1],
              (gaps[0, keep[0] == 1].mean() + gaps[2, keep[2] == 1].mean()) / 3)


@pytest.mark.points(2, number="3.6", hint="the highest scores, in the order in which the tokens stood; the "
                                          "class token in front")
def test_the_best_stay_in_order(student, rng):
    for B, N, count in ((3, 7, 3), (2, 9, int(rng.integers(2, 8)))):
        x, scores = rng.standard_normal((B, 1 + N, 4)), rng.standard_normal((B, N))
        wanted = np.array([sorted(sorted(range(N), key=lambda i: -row[i])[:count]) for row in scores])
        found, places = refuse_changes(lambda x, scores: student.keep_best(x, scores, count), x, scores)
        close(places, wanted)
        close(found, np.stack([np.concatenate([x[b, :1], x[b, 1 + wanted[b]]]) for b in range(B)]))


@pytest.mark.points(1, number="3.6", hint="of equal scores the earlier ones stay")
def test_equal_scores(student, rng):
    _, places = student.keep_best(rng.standard_normal((1, 7, 2)), np.array([[1, 2, 1, 2, 1, 1.0]]), 4)
    close(places, np.array([[0, 1, 2, 3]]))
    for _ in range(3):
        high = np.sort(rng.permutation(9)[:3])
        scores = np.isin(np.arange(9), high)[None].astype(float)
        low = [i for i in range(9) if i not in high][:2]
        close(student.keep_best(rng.standard_normal((1, 10, 2)), scores, 5)[1], np.sort([*high, *low])[None])


@pytest.mark.points(1, number="3.6", visibility="hidden", hint="all may stay")
def test_all_stay(student, rng):
    for B, N in ((2, 5), sizes(rng, 2)):
        x = rng.standard_normal((B, 1 + N, 3))
        found, places = student.keep_best(x, rng.standard_normal((B, N)), N)
        close(found, x)
        close(places, np.tile(np.arange(N), (B, 1)))


def counted(dim, depth, prune_before, rho):
    ratios = tuple(rho ** (s + 1) for s in range(len(prune_before)))
    model = tt.models.DynamicViT(32, 4, dim, depth, 3, prune_before=prune_before, keep_ratios=ratios)
    return tt.macs(model, np.zeros((1, 3, 32, 32), "float32")).total


@pytest.mark.points(1, number="3.7", hint="count it on paper for two blocks and one stage first")
def test_one_stage(student, rng):
    for dim in (24, *(12 * rng.integers(1, 5, 2))):
        dim, before, rho = int(dim), (int(rng.integers(0, 2)),), float(rng.choice([0.3, 0.5, 0.7]))
        close(student.multiply_adds(64, 48, dim, 10, 2, before, rho), counted(dim, 2, before, rho))


@pytest.mark.points(1, number="3.7", hint="the predictor works on what is left before it; the class token is "
                                          "a token of each block")
def test_three_stages(student, rng):
    for dim, depth, rho in ((96, 6, 0.7), (int(12 * rng.integers(1, 5)), 7, float(rng.choice([0.6, 0.8])))):
        close(student.multiply_adds(64, 48, dim, 10, depth, (1, 3, 5), rho),
              counted(dim, depth, (1, 3, 5), rho))


@pytest.mark.points(1, number="3.7", visibility="hidden", hint="other ratios: int, not round")
def test_other_ratios(student, rng):
    for rho in (0.9, 0.6, 1.0):
        dim = int(12 * rng.integers(2, 5))
        close(student.multiply_adds(64, 48, dim, 10, 4, (1, 2), rho), counted(dim, 4, (1, 2), rho))
