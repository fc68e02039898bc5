"""A stream of conversations has the bits of `generate`, in any order, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.engine.generate import generate
from jaxpersona.engine.stream import Stream
from jaxpersona.interventions.where import response
from jaxpersona.models.batch import KINDS
from jaxpersona.text.chat import Row

MODEL = s.tiny_model(stop_ids=tuple(range(3, 12)))
LENGTHS = np.random.default_rng(0).integers(3, 90, 60)
PROMPTS = s.prompts(LENGTHS)
OPTIONS = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3,
           "capture": capture.mean(response)}


def replies(order, ahead=None, **options):
    stream = Stream(MODEL, ((i, PROMPTS[i], i) for i in order), **{**OPTIONS, "batch_size": 8,
                                                                    **options})
    if ahead is not None:
        stream._ahead = ahead
    return {tag: reply for found in stream for tag, reply in found}, stream


def test_replies_are_those_of_generate(tmp_path):
    out = generate(MODEL, PROMPTS, ids=range(60), batch_size=8, **OPTIONS)
    found, stream = replies(range(60))
    assert sorted(found) == list(range(60)) and stream.done
    for i in range(60):
        np.testing.assert_array_equal(found[i].tokens, out.tokens[i])
        assert found[i].captured["mean"].tobytes() == out.captured["mean"][i].tobytes()
        assert found[i].finish == out.finish[i]
    assert stream.tokens == sum(len(t) for t in out.tokens) + out.stopped.sum()
    assert {"stop", "length"} == set(out.finish)


@pytest.mark.parametrize("ahead", [8, 20, 1000])
def test_the_order_of_work_changes_no_bit(ahead):
    """Reversed, in windows of any length, with prompts of several shapes and cache sizes."""
    whole, _ = replies(range(60))
    found, _ = replies(reversed(range(60)), ahead)
    part, _ = replies(range(40, 60), ahead)
    for i in range(60):
        for other in (found, part) if i >= 40 else (found,):
            np.testing.assert_array_equal(other[i].tokens, whole[i].tokens)
            assert other[i].captured["mean"].tobytes() == whole[i].captured["mean"].tobytes()


def test_rows_never_wait_for_the_end_of_a_window():
    """In the middle of a stream, free rows are refilled: at most one prefill's rows are free."""
    asked = ((i, PROMPTS[0], i) for i in range(400))
    stream = Stream(MODEL, asked, **{**OPTIONS, "batch_size": 8})
    stream._ahead = 16
    most, taken = 0, 0
    while not stream.done:
        stream.step()
        taken = max(taken, len(stream._scheduler.waiting))
        if not stream._exhausted:
            most = max(most, *(lane.free for lane in stream._scheduler.lanes.values()))
    assert taken <= 48 and not stream._tags  # not all 400 are held at a time
    assert most < 8


def test_a_shared_prefix_is_that_of_generate():
    rng = np.random.default_rng(1)
    system, rows = rng.integers(12, 90, 20), []
    for i in range(6):
        own = rng.integers(12, 90, 5 + i)
        kind = [KINDS["system"]] * 20 + [KINDS["user"]] * own.size
        rows.append(Row(np.concatenate([system, own]).astype(np.int32),
                        np.array(kind, np.int32), np.zeros(20 + own.size, np.int32), ""))
    options = {**OPTIONS, "batch_size": 4, "share_prefix": True}
    out = generate(MODEL, rows, ids=range(6), **options)
    stream = Stream(MODEL, ((i, row, i) for i, row in enumerate(rows)), **options)
    for found in stream:
        for i, reply in found:
            np.testing.assert_array_equal(reply.tokens, out.tokens[i])
            assert reply.captured["mean"].tobytes() == out.captured["mean"][i].tobytes()


def test_mistakes_are_named():
    with pytest.raises(jp.UserError, match="batch_size is 0"):
        replies([0], batch_size=0)
    with pytest.raises(jp.UserError, match="prompt 0 has 600 tokens, but the model's context"):
        list(Stream(MODEL, [("x", [5] * 600, 0)]))
    assert list(Stream(MODEL, [])) == [[]]
