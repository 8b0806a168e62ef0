"""What the engine asks of every op, besides right gradients: it writes into nothing that is not its own,
keeps nothing alive, and gives the same result however it is called."""
import gc
import weakref

import numpy as np
import pytest

from cases import CASES, IDS
from tinytoken import Tensor, no_grad
from tinytoken.backend import is_array, to_numpy

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def upstream_of(outputs, xp):
    rng = np.random.default_rng(0)
    return [xp.asarray(rng.standard_normal(o.shape).astype(o.dtype)) for o in outputs]


def run(case, wanted=None, xp=np):
    """(output arrays, gradients of the wanted inputs): one backward pass for the sum of all outputs times
    random numbers."""
    arrays = case.arrays(xp=xp)
    positions = case.moving(arrays)
    wanted = positions if wanted is None else wanted
    inputs = [Tensor(arrays[i], requires_grad=i in wanted) for i in positions]
    outputs = outputs_of(case.function(arrays)(*inputs))
    total = 0
    for out, g in zip(outputs, upstream_of(outputs, xp)):
        total = (out * g).sum() + total
    if wanted:
        total.backward()
    return [o.data for o in outputs], {i: t.grad for i, t in zip(positions, inputs) if i in wanted}


def same(a, b):
    return a is b is None or np.array_equal(to_numpy(a), to_numpy(b))


@every_case
def test_writes_into_nothing_it_was_given(case):
    """Inputs, outputs and upstream gradients are write-protected, so that a write would raise; and vjp can be
    run twice."""
    arrays = case.arrays()
    for a in arrays:
        if is_array(a):
            a.flags.writeable = False
    out, vjp = case.op.function(*arrays, **case.settings)
    upstream = []
    for o in outputs_of(out):
        if is_array(o):
            o.flags.writeable = False
        upstream.append(np.random.default_rng(0).standard_normal(o.shape))
        upstream[-1].flags.writeable = False
    runs = []
    for _ in range(2):
        entries = vjp(*upstream)
        runs.append([e() if callable(e) else e
                     for e in (entries if isinstance(entries, tuple) else (entries,))])
    assert all(map(same, *runs))


@every_case
def test_keeps_nothing_alive(case, no_collector):
    """Everything dies when the last reference to it goes, used by a backward pass or not: there are no
    reference cycles."""
    run(case)  # fills caches
    gc.collect()
    run(case)
    assert gc.collect() == 0
    arrays = case.arrays()
    inputs = [Tensor(arrays[i], requires_grad=True) for i in case.moving(arrays)]
    out = outputs_of(case.function(arrays)(*inputs))[0]
    gone = [weakref.ref(out), weakref.ref(inputs[0])]
    del out, inputs
    assert all(ref() is None for ref in gone)


@every_case
def test_same_gradient_when_the_other_inputs_are_frozen(case, xp):
    values, gradients = run(case, xp=xp)
    for i, g in gradients.items():
        values_alone, alone = run(case, [i], xp=xp)
        assert all(map(same, values, values_alone)) and same(g, alone[i])


@every_case
def test_same_values_however_it_is_called(case, xp):
    values, _ = run(case, xp=xp)
    arrays = case.arrays(xp=xp)
    positions = case.moving(arrays)
    with no_grad():
        unrecorded = outputs_of(case.function(arrays)(*[Tensor(arrays[i], requires_grad=True)
                                                        for i in positions]))
    calls = [unrecorded, outputs_of(case.function(arrays)(*[arrays[i] for i in positions]))]
    if not case.op.variadic:
        calls.append(outputs_of(case.op(**dict(zip(case.op.arrays, arrays)), **case.settings_for(arrays))))
    for outputs in calls:
        assert all(isinstance(o, Tensor) and not o.requires_grad and o.node is None for o in outputs)
        assert all(map(same, values, [o.data for o in outputs]))


@every_case
def test_says_what_it_is(case):
    assert case.op.__doc__ and case.op.__doc__.strip()
