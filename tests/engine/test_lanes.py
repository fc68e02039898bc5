"""Refilled rows and shared prefixes: the same bits whatever the packing, with few programs."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine import lanes, programs
from jaxpersona.engine.generate import generate
from jaxpersona.engine.lanes import prefix_length, shape_of
from jaxpersona.interventions import cap, gate, steer
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.batch import SYSTEM, USER
from jaxpersona.text.chat import Row

MODEL = s.tiny_model(stop_ids=(3, 7, 11, 19))
READ = capture.mean(everywhere) | capture.last(everywhere) | s.READ
ROWS = s.prompts(np.random.default_rng(0).integers(2, 31, 40), seed=3)
IDS = np.arange(40) + 50
HOW = dict(capture=READ, max_new_tokens=24, batch_size=16, temperature=1.0, seed=5)


def go(rows=ROWS, ids=IDS, **changes):
    return generate(MODEL, rows, ids=ids, **{**HOW, **changes})


def differences(a, i, b, j):
    """The fields in which reply i of a and reply j of b differ in any bit."""
    pairs = {"tokens": (a.tokens[i], b.tokens[j]), "stopped": (a.stopped[i], b.stopped[j])}
    pairs |= {name: (a.captured[name][i], b.captured[name][j]) for name in a.captured}
    for n, (x, y) in enumerate(zip(a.applied, b.applied, strict=True)):
        pairs |= {f"seen{n}": (x.seen[i], y.seen[j]),
                  f"changed{n}": (x.changed[:, i], y.changed[:, j])}
    return [name for name, (x, y) in pairs.items() if not s.same_bits(x, y)]


def bank():
    v = np.random.default_rng(1).normal(size=(4, 32))
    return cap(v, layers=[1, 2], floor=[0.5, 1.0, 1.5, 2.0], rows=np.arange(40) % 5 - 1)


def test_refilled_rows_have_the_bits_of_rows_alone():
    edits = bank()
    first = go(interventions=edits)
    lengths = [len(t) for t in first.tokens]
    assert len(set(lengths)) > 5 and min(lengths) < 5  # rows leave at different times
    assert any((x.changed > 0).any() for x in first.applied)
    for i in range(0, 40, 13):
        alone = go([ROWS[i]], [IDS[i]], interventions=edits.take([i]))
        assert differences(alone, 0, first, i) == []
    order = np.random.default_rng(2).permutation(40)
    mixed = go([ROWS[i] for i in order], IDS[order], interventions=edits.take(order))
    assert all(differences(mixed, at, first, i) == [] for at, i in enumerate(order))
    other = go(ids=IDS + 1, interventions=edits)
    assert differences(other, 0, first, 0) != []  # the comparison tells


def steps_of(refill, rows, monkeypatch):
    """The decode steps of a run, and its replies."""
    taken, run = [], lanes.decode

    def counted(params, config, state, *args, **more):
        before = int(state.step)
        state = run(params, config, state, *args, **more)
        taken.append(int(state.step) - before)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "decode", counted)
        out = go(rows, refill=refill, capture=None)
    return sum(taken), out


def test_refill_takes_fewer_steps_and_no_program_more(monkeypatch):
    few, out = steps_of(True, ROWS, monkeypatch)
    before = (dict(programs.TRACES), s.compiled(programs.decode), s.compiled(programs.prefill))
    few, out = steps_of(True, ROWS[::-1], monkeypatch)
    assert before == (dict(programs.TRACES), s.compiled(programs.decode),
                      s.compiled(programs.prefill))
    many, static = steps_of(False, ROWS[::-1], monkeypatch)
    same = sum(np.array_equal(a, b) for a, b in zip(out.tokens, static.tokens, strict=True))
    assert same >= 38  # a near tie may fall otherwise
    assert few < 0.8 * many, f"{few} steps against {many}"


@pytest.mark.parametrize("size", (9, 16))
def test_waiting_for_the_whole_batch_changes_no_bit(size):
    edits = bank().take(np.arange(24) % 40)
    how = dict(interventions=edits, batch_size=size, capture=capture.mean(everywhere))
    rows = [*ROWS[:23], *s.prompts((40,), seed=4)]  # of two widths
    refilled, waited = (go(rows, np.arange(24), refill=refill, **how) for refill in (True, False))
    assert len({len(t) for t in refilled.tokens}) > 5
    assert all(differences(refilled, i, waited, i) == [] for i in range(24))


def with_system(rows, length=20):
    """Prompts of which three share a system message of `length` tokens, by turns two of them."""
    heads = s.prompts((length, length), seed=9)
    out = []
    for i, row in enumerate(rows):
        head = heads[i % 2]
        kind = np.r_[np.full(len(head), SYSTEM), np.full(len(row), USER)].astype(np.int32)
        turn = np.r_[np.zeros(len(head)), np.ones(len(row))].astype(np.int32)
        out.append(Row(np.array([*head, *row], np.int32), kind, turn, ""))
    return out


@pytest.mark.parametrize("kind", ["shared", "bank"])
def test_a_shared_prefix_is_computed_once_and_changes_rounding_alone(kind):
    v = np.random.default_rng(4).normal(size=32)
    edits = bank() if kind == "bank" else steer(v, layers=[0], scale=0.3)
    rows = with_system(ROWS)
    how = dict(interventions=edits, temperature=0.0, max_new_tokens=8)
    calls, run = [], programs.prefill_prefix

    def counted(*args, **more):
        calls.append(1)
        return run(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "prefill_prefix", counted)
        shared = go(rows, share_prefix=True, **how)
    assert len(calls) == (10 if kind == "bank" else 2)  # two heads, and five settings
    whole = go(rows, **how)
    same = sum(np.array_equal(a, b) for a, b in zip(shared.tokens, whole.tokens, strict=True))
    assert same >= 38  # a near tie may fall otherwise
    for i in range(40):
        if np.array_equal(shared.tokens[i], whole.tokens[i]):
            for name in ("mean", "last"):
                assert s.rowwise(shared.captured[name][i][None], whole.captured[name][i][None]
                                 ).max() < 1e-5
            assert s.relative(shared.captured["full"][i][None], whole.captured["full"][i][None]
                              ).max() < 1e-5
            for a, b in zip(shared.applied, whole.applied, strict=True):
                assert a.seen[i] == b.seen[i]
    part = [3, 30, 17]
    few = go([rows[i] for i in part], IDS[part], share_prefix=True, temperature=0.0,
             max_new_tokens=8, interventions=edits.take(part) if kind == "bank" else edits)
    assert all(differences(few, at, shared, i) == [] for at, i in enumerate(part))


def test_a_gate_within_the_prompt_refuses_a_shared_prefix():
    v = np.random.default_rng(4).normal(size=32)
    edits = gate(steer(v, layers=[2], scale=0.3), v, layer=0, above=0.0, within=True)
    with pytest.raises(ValueError, match="within"):
        go(with_system(ROWS), interventions=edits, share_prefix=True)


def test_shapes_are_functions_of_the_row_alone():
    row = with_system(ROWS[:1], 20)[0]
    assert prefix_length(row) == 20 and prefix_length(with_system(ROWS[:1], 15)[0]) == 0
    assert shape_of(row, 24, False).prefix == 0
    shape = shape_of(row, 24, True)
    assert (shape.prefix, shape.width) == (32, 32) and shape.slots == 128
