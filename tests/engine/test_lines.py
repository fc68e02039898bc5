"""The one-line representations of results and handles, and the records of texts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine.request import Event, Handle
from jaxpersona.engine.stats import RunStats
from jaxpersona.models.batch import ASSISTANT, USER
from jaxpersona.models.model import Model
from jaxpersona.models.prepared import in_int8
from jaxpersona.text.chat import Row

MODEL = s.tiny_model()
MESSAGES = ({"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."})
KIND = np.array([USER, USER, ASSISTANT, ASSISTANT], np.int32)
ROW = Row(np.arange(4, dtype=np.int32), KIND, np.array([0, 0, 1, 1], np.int32), "Hi? Yes.",
          MESSAGES)
BARE = dataclasses.replace(ROW, messages=None)
REPLY = jp.Reply("So it is.", np.arange(3, dtype=np.int32), "stop", ROW, {}, ())
EXTRACTED = jp.Extracted({"a": np.zeros((2, 1, 3)), "b": []}, (), [ROW, BARE], 8, 64,
                         np.array([False, True]))


@pytest.mark.parametrize(("value", "text"), [
    (RunStats(1, 4, 3, 5, 8),
     "RunStats(1 decode step, utilisation 0.750, prefill efficiency 0.625)"),
    (RunStats(), "RunStats(0 decode steps, utilisation nan, prefill efficiency nan)"),
    (EXTRACTED, "Extracted(2 conversations, 8 tokens, captured: a, b)"),
    (REPLY, "Reply('So it is.', 3 tokens, stop)"),
    (Event("Hi", np.zeros(1, np.int32), {}), "Event('Hi', 1 token)"),
    (Event("", np.zeros(0, np.int32), {}, REPLY), "Event('', 0 tokens, stop)"),
    (dataclasses.replace(REPLY, text="x" * 61), f"Reply('{'x' * 59}…', 3 tokens, stop)"),
    (jp.Engine(MODEL, rows=2), "Engine('tiny', 2 rows)"),
    (MODEL.config, "ModelConfig(qwen3, 3 layers × 32, heads 4, key/value heads 2, vocabulary 97, "
                   "context 512)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_line_names_counts_and_states(value, text):
    """Counts have singular and plural, and texts are cut at 60 characters."""
    assert repr(value) == text


def test_the_line_of_a_handle_tells_how_far_its_request_is():
    """Unfinished with its number of tokens, finished with the reason, or failed."""
    handle = Handle(jp.Request([5]), 7)
    assert repr(handle) == "Handle(7: unfinished, streamed tokens: 0)"
    handle._grow(np.arange(2), {})
    assert repr(handle) == "Handle(7: unfinished, streamed tokens: 2)"
    handle._finish(REPLY)
    handle._grow(np.arange(5), {})  # too late
    assert repr(handle) == "Handle(7: stop)" and handle._look()[0].size == 2
    failed = Handle(jp.Request([5]), 8)
    failed._finish(None, KeyError("x"))
    assert repr(failed) == "Handle(8: failed: KeyError)" and failed.done


def test_the_line_of_a_model_has_its_weights_and_its_mesh():
    """The quantization comes before the dtype of the activations."""
    mesh = jp.make_mesh(2, 1, devices=jax.devices()[:2])
    made = Model(MODEL.config, in_int8(MODEL.params), None, mesh, "m", "", (), False)
    assert repr(made) == ("Model('m', qwen3, 3 layers × 32, int8 per channel, float32, mesh "
                          "{'data': 2, 'model': 1})")


def test_the_records_of_an_extraction_have_the_last_message_or_the_text():
    """A row of token ids has no messages."""
    assert EXTRACTED.records() == [{"text": "Yes.", "tokens": 4, "finite": True},
                                   {"text": "Hi? Yes.", "tokens": 4, "finite": False}]


def test_the_records_of_a_reply_have_one_number_per_table():
    """The number of changed tokens is the maximum over layers."""
    applied = (jp.Applied(np.int32(4), np.array([2, 3, 1], np.int32)),
               jp.Applied(np.int32(0), np.zeros(0, np.int32)))
    (found,) = dataclasses.replace(REPLY, applied=applied).records()
    assert (found["prompt"], found["reply"], found["tokens"]) == ("Yes.", "So it is.", 3)
    assert (found["seen"], found["changed"], found["ids"]) == ([4, 0], [3, 0], [0, 1, 2])
    (plain,) = dataclasses.replace(REPLY, row=BARE).records()
    assert plain["prompt"] == "Hi? Yes." and plain["messages"] == [] and "seen" not in plain


def test_the_records_of_scores_and_the_chosen_tokens():
    """Entry t of the log-probabilities belongs to token t + 1."""
    values = np.array([-1.0, -2.0, -3.0], np.float32)
    scored = jp.Scored([ROW, BARE], [values, values - 1])
    first, second = scored.records()
    assert (first["text"], second["text"]) == ("Yes.", "Hi? Yes.")
    assert first["logprob"] == -2.0 and second["logprob"] == -3.0
    assert first["perplexity"] == pytest.approx(np.exp(2)) and first["ids"] == [0, 1, 2, 3]
    assert [x.tolist() for x in scored.chosen("assistant")] == [[-2.0, -3.0], [-3.0, -4.0]]
    assert [x.tolist() for x in scored.chosen("user")] == [[-1.0], [-2.0]]
    assert [x.tolist() for x in scored.chosen(jp.everywhere.within(1))] == [[-2, -3], [-3, -4]]
    assert [x.tolist() for x in scored.chosen()] == [[-1, -2, -3], [-2, -3, -4]]
    assert scored.perplexity("user") == pytest.approx(np.exp(1.5))
    assert scored.perplexity() == pytest.approx(np.exp(2.5))
