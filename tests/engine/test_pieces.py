"""Prompts and texts in pieces: the results of one pass, in any company, with few programs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.distributed.context import own_context
from jaxpersona.engine import lanes, pieces, prompts, texts
from jaxpersona.engine.compiled import KEPT
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.generate import stops_of
from jaxpersona.engine.nonfinite import NonfiniteWarning
from jaxpersona.engine.tasks import PIECE, Setting, piece_of, shape_of, shape_within
from jaxpersona.interventions import Interventions, cap, custom, gate, steer
from jaxpersona.interventions.where import everywhere, marked
from jaxpersona.models.batch import ASSISTANT, MARK, USER, batch
from jaxpersona.text.chat import Row

MODEL = s.tiny_model(stop_ids=())
# around the ends of pieces, and up to five pieces
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 70, 5, 12, 80, 3, 29)
ROWS = s.prompts(LENGTHS, seed=1)
IDS = np.arange(len(ROWS)) + 9
V, W = np.random.default_rng(2).normal(size=(2, 32))
READ = capture.mean(everywhere) | capture.last(everywhere) | s.READ
EDITS = cap(np.stack([V, W]), layers=[1, 2], floor=[0.4, 0.9], rows=np.arange(len(ROWS)) % 3 - 1)


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    monkeypatch.setattr(pieces, "LEAST_PARAMETERS", 0)


def go(rows=ROWS, ids=IDS, **changes):
    how = dict(capture=READ, max_new_tokens=9, batch_size=12, **changes)
    return jp.generate(MODEL, rows, ids=ids, **how)


def differences(a, i, b, j):
    """Return the fields in which reply i of a and reply j of b differ in any bit."""
    pairs = {"tokens": (a.tokens[i], b.tokens[j])}
    pairs |= {name: (a.captured[name][i], b.captured[name][j]) for name in a.captured}
    for n, (x, y) in enumerate(zip(a.applied, b.applied, strict=True)):
        pairs |= {f"seen{n}": (x.seen[i], y.seen[j]),
                  f"changed{n}": (x.changed[:, i], y.changed[:, j])}
    return [name for name, (x, y) in pairs.items() if not s.same_bits(x, y)]


def test_replies_and_captures_are_those_of_one_pass():
    """The reference is a full pass over prompt and reply, without a cache."""
    out = go(interventions=EDITS)
    whole = [[*row, *tokens.tolist()] for row, tokens in zip(ROWS, out.tokens, strict=True)]
    stream, logits = s.residuals(MODEL, batch(whole), EDITS)
    certain = 0
    for i, row in enumerate(ROWS):
        n, end = len(row), len(whole[i])
        assert out.tokens[i].size == 9
        sure = s.top2_margin(logits[i, n - 1 : end - 1]) > 1e-3
        certain += sure.sum()
        np.testing.assert_array_equal(logits[i, n - 1 : end - 1].argmax(-1)[sure],
                                      out.tokens[i][sure])
        mine = stream[i, :, :end]
        assert s.relative(out.captured["full"][i][None], mine[None]).max() < 1e-5
        assert s.rowwise(out.captured["mean"][i][None], mine.mean(1)[None]).max() < 1e-5
        assert s.rowwise(out.captured["last"][i][None], mine[:, -1][None]).max() < 1e-5
        assert out.applied[0].seen[i] == (end if i % 3 else 0)
    assert certain > 0.9 * 9 * len(ROWS) and out.applied[0].changed.any()


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_bits_do_not_depend_on_the_company(temperature):
    how = dict(temperature=temperature, seed=3)
    first = go(interventions=EDITS, **how)
    order = np.random.default_rng(4).permutation(len(ROWS))
    mixed = go([ROWS[i] for i in order], IDS[order], interventions=EDITS.take(order), **how)
    assert all(differences(mixed, at, first, i) == [] for at, i in enumerate(order))
    for i in (0, 4, 15):
        alone = go([ROWS[i]], [IDS[i]], interventions=EDITS.take([i]), **how)
        assert differences(alone, 0, first, i) == []
    waited = go(interventions=EDITS, refill=False, **how)
    assert all(differences(waited, i, first, i) == [] for i in range(len(ROWS)))
    assert differences(go(interventions=EDITS, temperature=1.0, seed=5), 0, first, 0) != []


def infinite(**how):
    """Return an edit that makes one value of the residual stream infinite, and so all keys NaN."""
    huge = steer(np.eye(1, 32), layers=[0], scale=[3e38], **{"rows": np.zeros(18, int), **how})
    return jp.chain(huge, huge)


@pytest.mark.parametrize("kind", ["overflow", pytest.param("replaced", marks=pytest.mark.slow)])
def test_a_prompt_that_is_not_finite_leaves_nothing_to_the_next_one(kind):
    """Every third prompt has NaN keys and values; the next prompts use the same rows."""
    rows = [Row(np.array(ids, np.int32),
                np.full(len(ids), USER | (MARK if i % 3 == 0 else 0), np.int32),
                np.zeros(len(ids), np.int32), "") for i, ids in enumerate(ROWS)]
    edits = infinite(where=marked)
    if kind == "replaced":  # the last layer is finite again, so the row counts as finite
        again = custom(lambda _, h: jnp.where(jnp.isfinite(h), h, 0.0), layers=[2])
        edits = jp.chain(edits, again)
    calls = dict(interventions=edits, capture=capture.mean(everywhere), max_new_tokens=4,
                 batch_size=12, on_nonfinite="warn")
    if kind == "overflow":
        with pytest.warns(NonfiniteWarning):
            mixed = jp.generate(MODEL, rows, ids=IDS, **calls)
        assert [f == "nonfinite" for f in mixed.finish] == [i % 3 == 0 for i in range(len(rows))]
    else:
        mixed = jp.generate(MODEL, rows, ids=IDS, **calls)
    kept = [i for i in range(len(rows)) if i % 3]
    calls["interventions"] = edits.take(kept)
    alone = jp.generate(MODEL, [rows[i] for i in kept], ids=IDS[kept], **calls)
    assert all(differences(alone, at, mixed, i) == [] for at, i in enumerate(kept))
    assert np.isfinite(alone.captured["mean"]).all()


def test_keys_that_an_edit_may_hide_are_cleared_although_the_rows_count_as_finite():
    """As where a custom edit makes the last layer finite, while earlier keys stay NaN."""
    edits = custom(lambda _, h: jnp.where(jnp.isfinite(h), h, 0.0), layers=[2])
    with own_context():
        setting = Setting(256, 256, True, capture.Capture(), stops_of(MODEL, False))
        lane = lanes.Lane(MODEL.config, MODEL.params, setting, SharedEdits(edits), 12, 3, PIECE)
        carry = lane.staging.carry
        keys = tuple(jnp.full_like(x, jnp.nan) for x in carry.cache.k)
        lane.staging = lane.staging.replace(
            carry=carry.replace(cache=carry.cache.replace(k=keys)))
        lane._clear(np.array([True, False, True]))  # the rows in which a prompt begins
    for layer in lane.staging.carry.cache.k:
        assert (np.asarray(layer) == 0).all((1, 2, 3)).tolist() == [True, False, True]


def test_each_conversation_may_have_its_own_limit():
    limits = [1 + i % 7 for i in range(len(ROWS))]
    out = jp.generate(MODEL, ROWS, ids=IDS, max_new_tokens=limits, batch_size=12)
    assert [t.size for t in out.tokens] == limits and set(out.finish) == {"length"}
    same = jp.generate(MODEL, ROWS, ids=IDS, max_new_tokens=np.array(limits), batch_size=12)
    assert all(map(np.array_equal, out.tokens, same.tokens))
    for i in (0, 6):
        (alone,) = jp.generate(MODEL, [ROWS[i]], ids=IDS[[i]], max_new_tokens=limits[i],
                               batch_size=12).tokens
        assert np.array_equal(alone, out.tokens[i])
    assert out.stats.live_steps == sum(limits)  # every token runs
    assert out.stats.prompt_tokens == sum(LENGTHS)
    assert out.stats.row_steps == 12 * out.stats.steps
    assert out.stats.padded_tokens % (3 * PIECE) == 0


@pytest.mark.parametrize(("limits", "message"), [
    ([4], "max_new_tokens has length 1, but the number of conversations is 2"),
    ([4, 0], r"max_new_tokens\[1\] is 0; it must be a positive integer"),
    ([4, 1.5], r"max_new_tokens\[1\] is 1.5"),
    ([[4], [4]], r"max_new_tokens\[0\] is \[4\]"),
])
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        jp.generate(MODEL, ROWS[:2], max_new_tokens=limits)


def test_role_prompts_fill_rows_and_calls():
    """The lengths of role prompts and limits of 8 to 128 tokens, with a very small model."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(67, 8, 270).round(), 52, 97).astype(int)
    limits = draw.integers(8, 129, 270)
    shapes = {shape_of(row(n), int(m), False, 8192, 32, PIECE) for n, m in
              zip(lengths, limits, strict=True)}
    assert shapes == {(0, PIECE, 256)}  # one lane
    KEPT.clear()
    model = s.tiny_model(stop_ids=(), n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, head_dim=4,
                         d_ff=8, vocab_size=16)
    out = jp.generate(model, s.prompts(lengths, vocabulary=16), max_new_tokens=limits.tolist())
    assert [t.size for t in out.tokens] == limits.tolist()
    assert out.stats.utilisation >= 0.9 and out.stats.prefill_efficiency >= 0.85, out.stats
    assert len(KEPT) == 4  # a piece, decoding, and moving rows in and out


def row(n):
    return Row(np.zeros(n, np.int32), np.full(n, USER, np.int32), np.zeros(n, np.int32), "")


def test_where_prompts_run_in_pieces():
    like, none = MODEL.params.like, Interventions()

    def piece(edits, rows=9, config=MODEL.config):
        return piece_of(config, like, edits, rows)

    assert piece(none) == PIECE and piece(none, 8) is None
    opened = gate(steer(V, layers=[2], scale=0.3), V, layer=0, above=0.0)
    whole = gate(steer(V, layers=[2], scale=0.3), V, layer=0, above=0.0, within=True)
    assert piece(opened) == PIECE and piece(whole) is None
    assert jp.generate(MODEL, ROWS[:3], interventions=whole, max_new_tokens=2,
                       batch_size=12).stats.padded_tokens == 3 * 32
    shape, limit = shape_within(row(100), 500, [128, 256], PIECE)
    assert shape == (0, PIECE, 256) and limit == 156
    with pytest.raises(ValueError, match="has 256 tokens, but .* cache is limited to 256 "):
        shape_within(row(256), 1, [128, 256], PIECE)


def test_small_models_run_in_calls_of_their_own_width(monkeypatch):
    """There a call has a fixed cost that is larger than that of padding."""
    in_pieces = jp.extract(MODEL, TALKS[:4], capture=MEANS).padded
    monkeypatch.undo()
    like = MODEL.params.like
    small, larger = jp.preset("qwen3-mini"), jp.preset("qwen2.5-0.5b")
    assert piece_of(small, like, Interventions(), 32) is None
    assert piece_of(larger, like, Interventions(), 32) == PIECE
    stats = go([ROWS[0]], IDS[:1]).stats
    assert stats.padded_tokens != PIECE and jp.extract(
        MODEL, TALKS[:4], capture=MEANS).padded != in_pieces


def test_an_engine_prefills_in_pieces_and_counts():
    engine = jp.Engine(MODEL, rows=12, sizes=[128])
    handles = [engine.submit(jp.Request(row, max_new_tokens=5, id=i))
               for i, row in zip(IDS.tolist(), ROWS, strict=True)]
    replies = [engine.result(handle) for handle in handles]
    assert engine.stats.live_steps == 5 * len(ROWS)
    assert engine.stats.prompt_tokens == sum(LENGTHS)
    again = jp.Engine(MODEL, rows=12, sizes=[128])
    for i in (15, 3, 4):
        reply = again.result(again.submit(jp.Request(ROWS[i], max_new_tokens=5, id=int(IDS[i]))))
        assert np.array_equal(reply.tokens, replies[i].tokens)
    assert engine._scheduler.idle


def test_a_prompt_that_has_not_run_is_not_complete(monkeypatch):
    """A staging row still has the reply of an earlier prompt, which is not that of an empty one."""
    engine = jp.Engine(MODEL, rows=12, sizes=[128])
    engine.result(engine.submit(jp.Request(ROWS[3], max_new_tokens=2)))
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "encode", lambda *_, **__: row(0))  # `encode` refuses such a row
        empty = engine.submit(jp.Request([5], max_new_tokens=2))
    with pytest.raises(jp.UserError, match="empty"):
        engine.result(empty)


def test_requests_may_be_cancelled_while_their_prompts_wait(monkeypatch):
    """Three rows are staged; one of them is cancelled before its prompt is complete."""
    engine = jp.Engine(MODEL, rows=12, sizes=[128])
    handles = [engine.submit(jp.Request(ROWS[12], max_new_tokens=5, id=i)) for i in range(3)]
    run, seen = lanes.Lane._run_piece, []

    def once(lane):
        run(lane)
        if not seen:
            seen.append(1)
            engine.cancel(handles[1])

    monkeypatch.setattr(lanes.Lane, "_run_piece", once)
    replies = [engine.result(handle) for handle in handles]
    while engine.step():
        pass
    assert [reply.finish for reply in replies] == ["length", "cancelled", "length"]
    assert engine._scheduler.idle and not engine._handles


def test_an_error_in_a_piece_fails_its_requests_only(monkeypatch):
    engine = jp.Engine(MODEL, rows=12, sizes=[128])

    def broken(*_, **__):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "prefill_piece", broken)
        handle = engine.submit(jp.Request(ROWS[3], max_new_tokens=2))
        with pytest.raises(RuntimeError, match="broken"):
            engine.result(handle)
    assert engine.result(engine.submit(jp.Request(ROWS[3], max_new_tokens=2))).tokens.size == 2


def test_a_schedule_runs_every_token_once_and_in_order():
    lengths = [int(n) for n in np.random.default_rng(5).integers(1, 90, 41)]
    at = dict.fromkeys(range(41), 0)
    calls = list(pieces.schedule(lengths, 8, 16))
    held = np.full(8, -1)
    for call in calls:
        for row, (i, start, stop, end) in enumerate(zip(*call, strict=True)):
            if i < 0:
                assert start == stop == 0 and not end
                continue
            assert start == at[i] and 0 < stop - start <= 16 and end == (stop == lengths[i])
            assert held[row] in (-1, i)  # a text stays in its row
            held[row], at[i] = (-1 if end else i), stop
    assert list(at.values()) == lengths
    assert sum(lengths) / (len(calls) * 8 * 16) > 0.75
    assert list(pieces.schedule([], 8, 16)) == []


TALKS = [Row(np.array(ids, np.int32),
             np.where(np.arange(len(ids)) < len(ids) // 3, USER, ASSISTANT).astype(np.int32),
             (np.arange(len(ids)) >= len(ids) // 3).astype(np.int32), "")
         for ids in s.prompts((*LENGTHS, 150, 300), seed=6)]
MEANS = capture.mean() | capture.last(everywhere, layers=[0, 1])


def test_extraction_in_pieces_reads_what_one_pass_reads():
    edits = cap(np.stack([V, W]), layers=[0], floor=0.5, rows=np.arange(20) % 3 - 1)
    KEPT.clear()
    out = jp.extract(MODEL, TALKS, capture=MEANS, interventions=edits)
    assert len(KEPT) == 3  # pieces with 256 and with 512 slots, and finished rows
    stream = s.residuals(MODEL, batch([r.tokens for r in TALKS], kind=[r.kind for r in TALKS]),
                         edits)[0]
    for i, talk in enumerate(TALKS):
        n = talk.tokens.size
        chosen = stream[i, :, :n][:, talk.kind == ASSISTANT]
        assert s.rowwise(out.captured["mean"][i][None], chosen.mean(1)[None]).max() < 1e-5
        assert s.rowwise(out.captured["last"][i][None], stream[i, :2, n - 1][None]).max() < 1e-5
        assert out.applied[0].seen[i] == (n if i % 3 else 0)
    assert out.tokens == sum(t.tokens.size for t in TALKS) and out.padded % 128 == 0


def test_bits_of_an_extraction_do_not_depend_on_the_company():
    first = jp.extract(MODEL, TALKS, capture=MEANS)
    order = np.random.default_rng(7).permutation(len(TALKS))
    mixed = jp.extract(MODEL, [TALKS[i] for i in order], capture=MEANS)
    assert all(s.same_bits(mixed.captured[name][at], first.captured[name][i])
               for at, i in enumerate(order) for name in first.captured)
    alone = jp.extract(MODEL, [TALKS[18]], capture=MEANS)
    assert all(s.same_bits(alone.captured[n][0], first.captured[n][18]) for n in first.captured)


def test_an_extraction_computes_no_layer_above_the_highest_that_is_read(monkeypatch):
    made = []

    def seen(*args, **named):
        made.append(blank(*args, **named))
        return made[-1]

    blank = pieces.blank_carry
    monkeypatch.setattr(texts, "blank_carry", seen)
    low = capture.mean(layers=[0])
    found = jp.extract(MODEL, TALKS, capture=low).captured["mean"]
    assert made and all(len(carry.cache.k) == 1 for carry in made)
    whole = jp.extract(MODEL, TALKS, capture=MEANS).captured["mean"]
    assert s.rowwise(found, whole[:, :1]).max() < 1e-5
    carry = jp.Carry(cache=made[0].cache)
    with pytest.raises(ValueError, match="of the cache is 1, but this call needs 2"):
        jp.forward(MODEL.params, MODEL.config, jp.batch(ROWS[1:2] * 4), carry=carry, logits=None,
                   capture=capture.mean(layers=[1]))


def test_a_conversation_that_is_not_finite_leaves_nothing_to_the_next_one():
    edits = infinite(rows=[0 if i % 3 == 0 else -1 for i in range(len(TALKS))])
    with pytest.warns(NonfiniteWarning):
        mixed = jp.extract(MODEL, TALKS, capture=MEANS, interventions=edits)
    assert mixed.nonfinite.tolist() == [i % 3 == 0 for i in range(len(TALKS))]
    kept = [i for i in range(len(TALKS)) if i % 3]
    alone = jp.extract(MODEL, [TALKS[i] for i in kept], capture=MEANS,
                       interventions=edits.take(kept))
    assert all(s.same_bits(alone.captured[name][at], mixed.captured[name][i])
               for at, i in enumerate(kept) for name in alone.captured)


def test_a_conversation_with_replaced_values_leaves_nothing_to_the_next_one():
    """A custom edit makes the last layer finite again, so the row counts as finite."""
    hidden = custom(lambda _, h: jnp.where(jnp.isfinite(h), h, 0.0), layers=[2])
    edits = jp.chain(infinite(rows=[0 if i % 3 == 0 else -1 for i in range(len(TALKS))]), hidden)
    read = capture.mean(layers=[2])
    mixed = jp.extract(MODEL, TALKS, capture=read, interventions=edits)
    assert not mixed.nonfinite.any()
    kept = [i for i in range(len(TALKS)) if i % 3]
    alone = jp.extract(MODEL, [TALKS[i] for i in kept], capture=read,
                       interventions=edits.take(kept))
    assert all(s.same_bits(alone.captured["mean"][at], mixed.captured["mean"][i])
               for at, i in enumerate(kept))


def test_scores_in_pieces_have_the_bits_of_scores_alone():
    talks = TALKS[:-1]  # one size of the cache
    found = jp.logprobs(MODEL, talks).logprobs
    chosen = jp.next_logprobs(MODEL, talks, [5, 9])
    logits = s.residuals(MODEL, batch([r.tokens for r in talks]))[1]
    for i, talk in enumerate(talks):
        n = talk.tokens.size
        full = logits[i, :n] - np.logaddexp.reduce(logits[i, :n], -1, keepdims=True)
        want = full[np.arange(n - 1), talk.tokens[1:]]
        np.testing.assert_allclose(found[i], want, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(chosen[i], full[-1, [5, 9]], rtol=2e-5, atol=2e-5)
    for i in (2, 4, 18):
        assert s.same_bits(jp.logprobs(MODEL, [TALKS[i]]).logprobs[0], found[i])
        assert s.same_bits(jp.next_logprobs(MODEL, [TALKS[i]], [5, 9])[0], chosen[i])
