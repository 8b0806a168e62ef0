"""Every op's gradients against finite differences, and every op's check against gradients that were damaged
on purpose."""
import copy

import numpy as np
import pytest

from cases import CASES, IDS, REGISTERED
from tinytoken import GradientError, backend, checking, tensor

SMOOTH = [c for c in CASES if c.smooth]
SMOOTH_IDS = [c.id for c in SMOOTH]


def check(case, op=None, xp=np):
    arrays = case.arrays(xp=xp)
    positions = case.moving(arrays)
    return checking.gradcheck(case.function(arrays, op), *[arrays[i] for i in positions], rtol=1e-6,
                              names=case.names(positions))


def test_every_op_has_a_case_and_every_case_an_op():
    assert REGISTERED.keys() == {c.name for c in CASES}
    assert REGISTERED.keys() == {c.name for c in SMOOTH}
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("case", SMOOTH, ids=SMOOTH_IDS)
def test_gradients_equal_finite_differences(case, xp):
    check(case, xp=xp)


# The check itself is checked: each damage below must be refused for each input of each op.

def times_1_01(g):
    return g * 1.01


def sign(g):
    return -g


def one_entry_zeroed(g):
    """The middle one in size: an entry of ordinary weight."""
    g = g.copy()
    places = np.flatnonzero(g)
    g.flat[places[np.argsort(np.abs(g.flat[places]))[len(places) // 2]]] = 0
    return g


def missing(g):
    return None


def rows_rolled(g):
    rows = g.reshape(-1, g.shape[-1]) if g.ndim > 1 else g
    return np.roll(rows, 1, axis=0).reshape(g.shape)


DAMAGES = (times_1_01, sign, one_entry_zeroed, missing, rows_rolled)


def damaged(op, input, damage):
    """A copy of the op, outside the registry, with the gradient of one input damaged."""
    def function(*arrays, **settings):
        out, vjp = op.function(*arrays, **settings)

        def wrong(*gs):
            entries = vjp(*gs)
            entries = list(entries) if isinstance(entries, tuple) else [entries]
            g = entries[input]() if callable(entries[input]) else entries[input]
            if g is not None:
                entries[input] = damage(backend.unbroadcast(g, arrays[input].shape))
            return tuple(entries)
        return out, wrong
    twin = copy.copy(op)
    twin.function, twin.implementations = function, {}
    return twin


def gradients_of(case):
    """The op's gradients for a random upstream gradient, per array argument: an array or None."""
    arrays = case.arrays()
    out, vjp = case.op.function(*arrays, **case.settings)
    rng = np.random.default_rng(0)
    entries = vjp(*[rng.standard_normal(o.shape) for o in (out if isinstance(out, tuple) else (out,))])
    entries = entries if isinstance(entries, tuple) else (entries,)
    entries = [e() if callable(e) else e for e in entries]
    return [e if e is None else backend.unbroadcast(e, np.shape(a)) for e, a in zip(entries, arrays)]


def changes(damage, g):
    after = damage(g)
    return after is None or not np.allclose(g, after, rtol=1e-4)


@pytest.mark.parametrize("case", SMOOTH, ids=SMOOTH_IDS)
def test_damaged_gradients_are_refused(case):
    gradients = gradients_of(case)
    refused = 0
    for input in case.moving(case.arrays()):
        if gradients[input] is None:  # an argument that this setting does not read
            continue
        for damage in DAMAGES:
            if not changes(damage, gradients[input]):
                assert damage is rows_rolled, f"{damage.__name__} leaves the gradient as it is"
                continue
            try:
                check(case, damaged(case.op, input, damage))
            except GradientError:
                refused += 1
            else:
                pytest.fail(f"{case.id}: {damage.__name__} of {case.names([input])[0]} passed the check")
    assert refused >= len(DAMAGES) - 1


def test_the_damage_alone_makes_it_fail():
    before = dict(tensor.registry)
    for case in {c.name: c for c in SMOOTH}.values():
        check(case, damaged(case.op, case.moving(case.arrays())[0], lambda g: g))
    assert tensor.registry == before
