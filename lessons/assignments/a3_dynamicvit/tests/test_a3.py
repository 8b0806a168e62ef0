"""Each case is given `student`, the functions of the submission. What they are compared with is the
package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.points(1, number="3.1", hint="-log(-log(u))")
def test_gumbel_numbers(student):
    u = np.array([[0.1, 0.5], [1 / np.e, 0.9]])
    close(student.gumbel(u), np.array([[-0.834032445, 0.366512921], [0.0, 2.250367327]]), 1e-8)


@pytest.mark.points(1, number="3.1", hint="one-hot, of the largest logit + noise")
def test_draws_are_one_hot(student):
    logits, noise = normal(2, 5, 3), 3 * normal(2, 5, 3, seed=1)
    found = student.draw(logits, noise)
    close(found, ((logits + noise) == (logits + noise).max(axis=-1, keepdims=True)).astype(float))


@pytest.mark.points(1, number="3.1", visibility="hidden", hint="a token kept with probability 0.7 is kept in "
                                                               "70 % of many draws")
def test_draws_have_their_probabilities(student):
    logits = np.log(np.array([0.7, 0.2, 0.1]))
    u = np.random.default_rng(0).uniform(1e-12, 1, (20000, 3))
    found = student.draw(np.broadcast_to(logits, u.shape), student.gumbel(u)).mean(axis=0)
    assert np.abs(found - np.exp(logits)).max() < 0.02, f"found {found.round(3)}, expected 0.7, 0.2, 0.1"


def soft(logits, noise, tau):
    z = np.exp((logits + noise) / tau)
    return z / z.sum(axis=-1, keepdims=True)


@pytest.mark.points(1, number="3.2", hint="the value is the hard draw at every temperature")
def test_the_value_is_hard(student):
    logits, noise = normal(4, 6, 2), normal(4, 6, 2, seed=1)
    for tau in (0.3, 1.0, 4.0):
        close(student.straight_through(logits, noise, tau)[0], (soft(logits, noise, tau) > 0.5).astype(float))


@pytest.mark.points(2, number="3.2", hint="s (g - sum(s g)), over the last axis")
def test_the_gradient_is_soft(student):
    logits, noise, g = normal(4, 6, 2), normal(4, 6, 2, seed=1), normal(4, 6, 2, seed=2)
    s = soft(logits, noise, 1.0)
    _, vjp = refuse_changes(lambda logits, noise: student.straight_through(logits, noise, 1.0), logits, noise)
    close(vjp(g), s * (g - (s * g).sum(axis=-1, keepdims=True)))


@pytest.mark.points(1, number="3.2", hint="the division by tau has a derivative too")
def test_the_temperature(student):
    logits, noise, g = normal(5, 3), normal(5, 3, seed=1), normal(5, 3, seed=2)
    for tau in (0.5, 2.0):
        s = soft(logits, noise, tau)
        close(student.straight_through(logits, noise, tau)[1](g),
              s * (g - (s * g).sum(axis=-1, keepdims=True)) / tau)


def weights(D):
    shapes = {"in": (D, D), "out1": (D // 2, D), "out2": (D // 4, D // 2), "out3": (2, D // 4)}
    w = {name: normal(*shape, seed=s) / 2 for s, (name, shape) in enumerate(shapes.items())}
    return w | {f"{name}_bias": normal(shape[0], seed=9 + s) for s,
                (name, shape) in enumerate(shapes.items())}


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
def test_scores_of_all_tokens(student):
    x, w, keep = normal(2, 5, 8, seed=20), weights(8), np.ones((2, 5))
    close(refuse_changes(lambda x, keep: student.predictor(x, keep, w), x, keep),
          packages_scores(x, keep, w), 1e-6)


@pytest.mark.points(1, number="3.3", hint="the mean is over the kept tokens, divided by their number")
def test_scores_of_what_is_left(student):
    x, w, keep = normal(2, 5, 8, seed=20), weights(8), np.array([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0.0]])
    close(student.predictor(x, keep, w), packages_scores(x, keep, w), 1e-6)


@pytest.mark.points(1, number="3.3", visibility="hidden", hint="a dropped token changes nothing for the "
                                                               "others")
def test_what_is_dropped_has_no_say(student):
    x, w, keep = normal(1, 5, 8, seed=20), weights(8), np.array([[1, 1, 0, 1, 1.0]])
    other = x.copy()
    other[0, 2] += 100
    close(student.predictor(x, keep, w)[0, [0, 1, 3, 4]], student.predictor(other, keep, w)[0, [0, 1, 3, 4]])


@pytest.mark.points(1, number="3.4", hint="what is gone stays gone")
def test_decisions_of_each_stage(student):
    draws = (normal(3, 4, 9) > -0.5).astype(float)
    found = student.stages(draws)
    for stage in range(3):
        close(found[stage], draws[:stage + 1].min(axis=0))


@pytest.mark.points(1, number="3.4", hint="mean over patches first, then the square")
def test_the_ratio_loss_by_hand(student):
    decisions = np.array([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0.0]]])
    close(student.ratio_loss(decisions, (0.5, 0.25)), (0.0 + 0.25) / 2 + 0.0)


@pytest.mark.points(1, number="3.4", visibility="hidden", hint="a sum over stages, a mean over pictures")
def test_the_ratio_loss_against_the_package(student):
    decisions, targets = np.cumprod(normal(3, 5, 8) > -0.4, axis=0).astype(float), (0.7, 0.4, 0.2)
    expected = sum(((d.mean(axis=1) - t) ** 2).mean() for d, t in zip(decisions, targets))
    close(student.ratio_loss(decisions, targets), expected)


def losses(student, seed=0, kept=None):
    z, z_t = 2 * normal(3, 5, seed=seed), 2 * normal(3, 5, seed=seed + 1)
    f, f_t = normal(3, 6, 4, seed=seed + 2), normal(3, 6, 4, seed=seed + 3)
    keep = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0.0]]) if kept is None else kept
    return z, z_t, f, f_t, keep, student.distillation(z, z_t, f, f_t, keep)


@pytest.mark.points(2, number="3.5", hint="the teacher's probabilities stand in front; the mean is over "
                                          "pictures")
def test_the_kl_divergence(student):
    z, z_t, _, _, _, (kl, _) = losses(student)
    p, p_t = (np.exp(a) / np.exp(a).sum(axis=1, keepdims=True) for a in (z, z_t))
    close(kl, (p_t * np.log(p_t / p)).sum(axis=1).mean())


@pytest.mark.points(1, number="3.5", hint="each picture's mean is over its own kept tokens")
def test_the_token_loss(student):
    _, _, f, f_t, keep, (_, token) = losses(student)
    close(token, np.mean([((f[b] - f_t[b]) ** 2)[keep[b] == 1].mean() for b in range(3)]))


@pytest.mark.points(1, number="3.5", visibility="hidden", hint="a picture that kept none counts 0, and is "
                                                               "counted")
def test_a_picture_without_tokens(student):
    keep = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    _, _, f, f_t, keep, (_, token) = losses(student, kept=keep)
    gaps = ((f - f_t) ** 2).mean(axis=2)
    close(token, (gaps[0, :2].mean() + gaps[2, 5]) / 3)


@pytest.mark.points(2, number="3.6", hint="the highest scores, in the order in which the tokens stood; the "
                                          "class token in front")
def test_the_best_stay_in_order(student):
    x, scores = normal(3, 8, 4), normal(3, 7, seed=1)
    found, places = refuse_changes(lambda x, scores: student.keep_best(x, scores, 3), x, scores)
    wanted = tt.ops.top_k(scores, 3)
    close(places, wanted)
    for b in range(3):
        close(found[b], np.concatenate([x[b, :1], x[b, 1 + wanted[b]]]))


@pytest.mark.points(1, number="3.6", hint="of equal scores the earlier ones stay")
def test_equal_scores(student):
    _, places = student.keep_best(normal(1, 7, 2), np.array([[1, 2, 1, 2, 1, 1.0]]), 4)
    close(places, np.array([[0, 1, 2, 3]]))


@pytest.mark.points(1, number="3.6", visibility="hidden", hint="all may stay")
def test_all_stay(student):
    x = normal(2, 6, 3)
    found, places = student.keep_best(x, normal(2, 5, seed=1), 5)
    close(found, x)
    close(places, np.tile(np.arange(5), (2, 1)))


def counted(dim, depth, prune_before, rho):
    ratios = tuple(rho ** (s + 1) for s in range(len(prune_before)))
    model = tt.models.DynamicViT(32, 4, dim, depth, 3, prune_before=prune_before, keep_ratios=ratios)
    return tt.macs(model, np.zeros((1, 3, 32, 32), "float32")).total


@pytest.mark.points(1, number="3.7", hint="count it on paper for two blocks and one stage first")
def test_one_stage(student):
    close(student.multiply_adds(64, 48, 24, 10, 2, (1,), 0.5), counted(24, 2, (1,), 0.5))


@pytest.mark.points(1, number="3.7", hint="the predictor works on what is left before it; the class token is "
                                          "a token of each block")
def test_three_stages(student):
    close(student.multiply_adds(64, 48, 96, 10, 6, (1, 3, 5), 0.7), counted(96, 6, (1, 3, 5), 0.7))


@pytest.mark.points(1, number="3.7", visibility="hidden", hint="other ratios: int, not round")
def test_other_ratios(student):
    for rho in (0.9, 0.6, 1.0):
        close(student.multiply_adds(64, 48, 48, 10, 4, (1, 2), rho), counted(48, 4, (1, 2), rho))
