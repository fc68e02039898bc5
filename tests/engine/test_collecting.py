"""What `generate` makes of finished rows, and the stop tokens that it asks for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures.capture import Capture
from jaxpersona.engine import lanes
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.generate import _Collector, stops_of
from jaxpersona.engine.replies import Finished
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.stats import RunStats, Stats
from jaxpersona.engine.tasks import Setting, Shape, Task
from jaxpersona.models.batch import SYSTEM, USER
from jaxpersona.text.chat import Row

MODEL = s.tiny_model(stop_ids=(3, 9))


def finished(tokens, value, empty=(), nonfinite=False):
    """Return a finished row whose captures and counts contain `value`."""
    captured = {"mean": np.full((3, 2), value), "full": np.full((3, int(value), 2), value)}
    applied = (jp.Applied(np.int32(value), np.array([value, value + 1], np.int32)),)
    return Finished(np.array(tokens, np.int32), captured, frozenset({"full"}), frozenset(empty),
                    applied, nonfinite, False)


def test_replies_are_in_the_order_of_the_conversations_without_their_stop_tokens(caplog):
    """Four replies that finish in another order, of which two are empty."""
    rows = [f"row {i}" for i in range(4)]
    made = _Collector(4)
    made.done = {2: finished([5, 3, 9], 3), 0: finished([5, 6], 1), 3: finished([3], 4, ["mean"]),
                 1: finished([], 2, ["mean"], nonfinite=True)}
    stats = RunStats(steps=7)
    out = made.finish(MODEL, rows, stats)
    assert [t.tolist() for t in out.tokens] == [[5, 6], [], [5, 3], []]
    assert out.stopped.tolist() == [False, False, True, True]
    assert out.finish == ["length", "nonfinite", "stop", "stop"] and out.text == [""] * 4
    assert out.rows is rows and out.stats is stats
    assert out.captured["mean"][:, 0, 0].tolist() == [1, 2, 3, 4]
    assert [x.shape for x in out.captured["full"]] == [(3, n, 2) for n in (1, 2, 3, 4)]
    (applied,) = out.applied
    assert applied.seen.tolist() == [1, 2, 3, 4]
    assert applied.changed.tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]
    (record,) = caplog.records
    assert record.getMessage().startswith("capture 'mean' selects no token in conversations 1, 3 "
                                          "(2 of 4), so their values are NaN")


def test_a_row_that_ends_with_a_stop_token_and_is_not_finite_counts_as_not_finite():
    """Its captures must be discarded."""
    made = _Collector(1)
    made.done = {0: finished([5, 3], 1, nonfinite=True)}
    assert made.finish(MODEL, ["row"], RunStats()).finish == ["nonfinite"]


@pytest.mark.parametrize(("stops", "wanted"), [
    ((), [-1] * 4), ((5, 6), [5, 6, -1, -1]), ((5, 6, 7, 8), [5, 6, 7, 8]),
    ((5, 6, 7, 8, 9), [5, 6, 7, 8, 9, -1, -1, -1]),
], ids=str)
def test_stop_tokens_are_padded_to_a_multiple_of_four(stops, wanted):
    """The padding is −1, which is no token id."""
    made = stops_of(dataclasses.replace(MODEL, stop_ids=stops), True)
    assert made.ids.tolist() == wanted and made.ids.dtype == np.int32
    assert made.think.tolist() == [-1, -1]
    assert made.fences is made.strings is made.accepting is None  # there is no tokenizer


def test_the_tables_of_code_and_the_tags_of_thinking_are_those_of_the_tokenizer():
    """The table of code is made only on request."""
    tokenizer = s.byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model = dataclasses.replace(s.tiny_model(vocab_size=260), tokenizer=tokenizer)
    plain, code = (stops_of(model, on) for on in (False, True))
    assert plain.think.tolist() == tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert plain.fences is None and code.fences.shape[0] == 260


def test_a_shared_prefix_is_counted_once_with_its_padding(monkeypatch):
    """A prefix of 20 tokens is padded to 64, and each prompt of 5 tokens to 32."""
    kind = np.array([SYSTEM] * 20 + [USER] * 5, np.int32)
    row = Row(np.arange(25, dtype=np.int32) + 4, kind, np.zeros(25, np.int32), "")
    for name in ("prefill", "prefill_prefix", "side_by_side"):
        monkeypatch.setattr(lanes, name, lambda *_, **__: None)
    stats = Stats()
    lane = lanes.Lane(MODEL.config, MODEL.params, Setting(128, 128, True, Capture(), stops_of(
        MODEL, False)), SharedEdits(jp.Interventions()), 4, 1, None, stats)
    shape = Shape(64, 32, 128)
    for number in range(2):
        lane._prefill([Task(number, row, 0, 9, sampling(1), shape, 128)], shape, jp.Interventions())
    found = stats.snapshot()
    assert (found.prompt_tokens, found.padded_tokens) == (20 + 2 * 5, 64 + 2 * 32)
