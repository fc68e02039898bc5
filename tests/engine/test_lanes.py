"""Refilled rows and shared prefixes: bit-identical in any packing, with few programs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine import lanes, programs
from jaxpersona.engine.generate import generate
from jaxpersona.engine.stats import RunStats, Stats
from jaxpersona.engine.tasks import cache_size, prefix_length, shape_of
from jaxpersona.interventions import cap, chain, gate, steer
from jaxpersona.interventions.where import everywhere, marked, system
from jaxpersona.models.batch import MARK, SYSTEM, USER
from jaxpersona.text.chat import Row

MODEL = s.tiny_model(stop_ids=(3, 7, 11, 19))
READ = capture.mean(everywhere) | capture.last(everywhere) | s.READ
ROWS = s.prompts(np.random.default_rng(0).integers(2, 31, 40), seed=3)
IDS = np.arange(40) + 50
HOW = dict(capture=READ, max_new_tokens=24, batch_size=16, temperature=1.0, seed=5)


def go(rows=ROWS, ids=IDS, **changes):
    return generate(MODEL, rows, ids=ids, **{**HOW, **changes})


def differences(a, i, b, j):
    """Return the fields in which reply i of a and reply j of b differ in any bit."""
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
    assert len(set(lengths)) > 5 and min(lengths) < 5  # rows finish at different times
    assert any((x.changed > 0).any() for x in first.applied)
    for i in range(0, 40, 13):
        alone = go([ROWS[i]], [IDS[i]], interventions=edits.take([i]))
        assert differences(alone, 0, first, i) == []
    order = np.random.default_rng(2).permutation(40)
    mixed = go([ROWS[i] for i in order], IDS[order], interventions=edits.take(order))
    assert all(differences(mixed, at, first, i) == [] for at, i in enumerate(order))
    other = go(ids=IDS + 1, interventions=edits)
    assert differences(other, 0, first, 0) != []  # the comparison can detect differences


def steps_of(refill, rows, monkeypatch):
    """Return the number of decode steps of a run, and its replies."""
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
    s.KEPT.clear()
    few, out = steps_of(True, ROWS, monkeypatch)
    before = (dict(programs.TRACES), s.compiled(programs.decode), s.compiled(programs.prefill))
    few, out = steps_of(True, ROWS[::-1], monkeypatch)
    assert before == (dict(programs.TRACES), s.compiled(programs.decode),
                      s.compiled(programs.prefill))
    many, static = steps_of(False, ROWS[::-1], monkeypatch)
    same = sum(np.array_equal(a, b) for a, b in zip(out.tokens, static.tokens, strict=True))
    assert same >= 38  # near-ties may be decided differently
    assert few < 0.8 * many, f"{few} steps against {many}"


@pytest.mark.parametrize("size", (9, pytest.param(16, marks=pytest.mark.slow)))
def test_waiting_for_the_whole_batch_changes_no_bit(size):
    edits = bank().take(np.arange(24) % 40)
    how = dict(interventions=edits, batch_size=size, capture=capture.mean(everywhere))
    rows = [*ROWS[:23], *s.prompts((40,), seed=4)]  # of two lengths
    refilled, waited = (go(rows, np.arange(24), refill=refill, **how) for refill in (True, False))
    assert len({len(t) for t in refilled.tokens}) > 5
    assert all(differences(refilled, i, waited, i) == [] for i in range(24))


def with_system(rows, length=20):
    """Return prompts that alternate between two system messages of `length` tokens."""
    heads = s.prompts((length, length), seed=9)
    return [joined(heads[i % 2], row) for i, row in enumerate(rows)]


def joined(head, tail, kind=SYSTEM):
    """Join a system message and a user message into one prompt."""
    kinds = np.r_[np.full(len(head), kind), np.full(len(tail), USER)].astype(np.int32)
    turn = np.r_[np.zeros(len(head)), np.ones(len(tail))].astype(np.int32)
    return Row(np.array([*head, *tail], np.int32), kinds, turn, "")


@pytest.mark.parametrize("kind", [pytest.param("shared", marks=pytest.mark.slow), "bank"])
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
    # two system messages, with five settings each for the bank
    assert len(calls) == (10 if kind == "bank" else 2)
    assert shared.stats.prompt_tokens == 20 * len(calls) + sum(map(len, ROWS))
    whole = go(rows, **how)
    same = sum(np.array_equal(a, b) for a, b in zip(shared.tokens, whole.tokens, strict=True))
    assert same >= 38  # near-ties may be decided differently
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
    assert [prefix_length(with_system(ROWS[:1], n)[0]) for n in (15, 16, 20)] == [0, 16, 20]
    assert shape_of(row, 24, False, 512, 32).prefix == 0
    shape = shape_of(row, 24, True, 512, 32)
    assert (shape.prefix, shape.width) == (32, 32) and shape.slots == 128


def test_counts_of_lanes_add_up():
    stats = Stats()
    for steps, live in ((2, 5), (1, 2)):
        stats.decoded(steps, 4, live)
    stats.prefilled(10, 16), stats.prefilled(2, 16)
    found = stats.snapshot()
    assert found == RunStats(steps=3, row_steps=12, live_steps=7, prompt_tokens=12,
                             padded_tokens=32)
    assert found.utilisation == 7 / 12 and found.prefill_efficiency == 12 / 32
    assert np.isnan([RunStats().utilisation, RunStats().prefill_efficiency]).all()


HEAD, TAIL = s.prompts((20, 5), seed=9)
C, V = np.random.default_rng(9).normal(size=(2, 32))


def after_prefix(rows, edits):
    """Generate greedy replies to prompts with a shared prefix that is computed once."""
    return go(rows, np.ones(len(rows), int), interventions=edits, share_prefix=True,
              max_new_tokens=4, temperature=0.0, capture=capture.mean(everywhere))


def test_a_gate_measures_the_shared_prefix():
    """If the prefix's measurement were lost, the gate would remain closed."""
    opened = gate(steer(V, layers=[1]), C, layer=0, above=-1e9)
    assert after_prefix([joined(HEAD, TAIL)], opened).applied[0].changed.sum() > 0


def test_changes_in_a_shared_prefix_are_counted():
    """An addition changes every selected token, including those in the prefix."""
    out = after_prefix([joined(HEAD, TAIL)], steer(V, layers=[0]))
    np.testing.assert_array_equal(out.applied[0].changed[0], out.applied[0].seen)


def test_prompts_with_equal_ids_and_different_kinds_share_no_prefix():
    rows = [joined(HEAD, TAIL, kind) for kind in (SYSTEM, SYSTEM | MARK)]
    out = after_prefix(rows, steer(V, layers=[0], scale=3.0, where=marked))
    assert out.applied[0].seen.tolist() == [0, 20]


def test_prompts_with_equal_ids_and_different_turns_share_no_prefix():
    first = joined(HEAD, TAIL)
    rows = [first, dataclasses.replace(first, turn=first.turn + 1)]
    out = after_prefix(rows, steer(V, layers=[0], scale=3.0, where=system.within(1)))
    assert out.applied[0].seen.tolist() == [0, 20]


def test_rows_with_different_entries_of_any_table_share_no_prefix():
    """The two rows have the same entry in the first table and different entries in the second."""
    rows = [joined(HEAD, TAIL)] * 2
    edits = chain(steer(np.stack([C]), layers=[0], rows=[0, 0]),
                  steer(np.stack([V, -V]), layers=[1], scale=3.0, rows=[0, 1]))
    both = after_prefix(rows, edits)
    for i in range(2):
        alone = after_prefix(rows[:1], edits.take([i]))
        assert s.same_bits(alone.captured["mean"][0], both.captured["mean"][i])


def test_prompts_of_mixed_lengths_share_few_cache_sizes():
    sizes = [cache_size(n, 10**6) for n in range(1, 20_000)]
    assert all(size >= n and size == cache_size(size, 10**6) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 20
    assert all(size < 2 * n for n, size in enumerate(sizes, 1) if n > 64)
    assert all(size <= 1.5 * n + 1 for n, size in enumerate(sizes, 1) if n > 512)
    # cache sizes do not exceed the context by much
    assert [cache_size(n, 2048) for n in (1100, 2000, 2084)] == [1536, 2048, 2112]
    rows = [Row(np.zeros(n, np.int32), np.full(n, USER, np.int32), np.zeros(n, np.int32), "")
            for n in range(20, 129)]  # lengths of role prompts
    assert {shape_of(row, 64, False, 2048, 32).slots for row in rows} == {128, 256}
    assert {shape_of(row, 512, False, 2048, 32).slots for row in rows} == {768}
