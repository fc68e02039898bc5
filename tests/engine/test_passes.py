"""Passes over complete texts: their sizes, their counts, and captures that select no token."""

from __future__ import annotations

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.interventions import Interventions
from jaxpersona.models.batch import ASSISTANT, USER
from jaxpersona.text.chat import Row

extraction, scoring = (importlib.import_module(f"jaxpersona.engine.{name}")
                       for name in ("extract", "scoring"))
pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = s.tiny_model()
IDS = s.prompts((5, 9, 40, 7))


class Asked(Exception):
    """Raised instead of a pass."""


@pytest.mark.parametrize(("place", "given", "extracted", "scored"), [
    ("cpu", None, 1024, 1024), ("gpu", None, 16_384, 4096), ("tpu", None, 16_384, 4096),
    ("gpu", 77, 77, 77)])
def test_a_pass_has_so_many_tokens_on_each_platform(monkeypatch, place, given, extracted, scored):
    """On an accelerator, scoring needs memory for the logits of all tokens."""
    def asked(rows, tokens, ways):
        raise Asked(len(rows), tokens, ways)

    for module, wanted, calls in (
            (extraction, extracted, [lambda: jp.extract(MODEL, IDS, batch_tokens=given,
                                                        capture=capture.last())]),
            (scoring, scored, [lambda: jp.logprobs(MODEL, IDS, batch_tokens=given),
                               lambda: jp.next_logprobs(MODEL, IDS, [5], batch_tokens=given)])):
        monkeypatch.setattr(module, "batches", asked)
        monkeypatch.setattr(module, "platform", lambda *_: place)
        for call in calls:
            with pytest.raises(Asked) as found:
                call()
            assert found.value.args == (4, wanted, 1)


@pytest.mark.parametrize(("given", "together"), [(None, 4), (128, 4), (127, 3), (5, 1), (64, 2)])
def test_texts_in_pieces_use_so_many_rows_and_layers(monkeypatch, given, together):
    """A piece has 32 tokens; layers above the last read or edited one are omitted."""
    asked = []
    for module in (extraction, scoring):
        monkeypatch.setattr(module, "in_pieces", lambda *_, **how: asked.append(
            (how["together"], how["layers"])) or iter(()))
    low = capture.mean(layers=[0]) | capture.last(layers=[0, 1])
    edits = jp.steer(np.ones(32), layers=[2])
    for edit, read in ((Interventions(), low), (edits, low), (Interventions(), capture.mean()),
                       (Interventions(), capture.Capture())):
        assert list(extraction._in_pieces(MODEL, [], edit, read, given)) == []
    assert list(scoring._in_pieces(MODEL, [], Interventions(), given, None)) == []
    assert asked == [(together, layers) for layers in (2, 3, 3, 0, 3)]


def test_counts_and_values_belong_to_their_conversations_in_every_batch():
    """Rows 0, 2 and 3 are edited; batches have one or two rows."""
    edits = jp.steer(np.ones((2, 32)), layers=[0, 2], rows=[0, -1, 1, 0], where=jp.everywhere)
    told = []
    out = jp.extract(MODEL, IDS, capture=capture.last(layers=[0]), interventions=edits,
                     batch_tokens=64, progress=lambda *numbers: told.append(numbers))
    assert told == [(1, 4, 64), (3, 4, 128), (4, 4, 192)]  # finished, all, padded tokens
    (applied,) = out.applied
    assert applied.seen.tolist() == [5, 0, 40, 7]
    assert applied.changed.tolist() == [[5, 0, 40, 7]] * 2
    assert out.tokens == 61 and out.padded == 2 * 2 * 32 + 64
    assert [row.tokens.tolist() for row in out.rows] == IDS


def talk(kinds):
    kind = np.array(kinds, np.int32)
    return Row(np.arange(5, 5 + kind.size, dtype=np.int32), kind, np.zeros(kind.size, np.int32), "")


def test_a_capture_that_selects_no_token_is_named_with_its_conversations(caplog):
    """Each conversation is tested with the test of its row; norms need no token."""
    rows = [talk([USER] * 3), talk([USER, ASSISTANT]), talk([USER])]
    extraction._check_tokens(rows, capture.mean(name="m") | capture.norms("system")
                             | capture.last("user"))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(
        "capture 'm' selects no token in conversations 0, 2 (2 of 3), so their values are NaN; ")
    with pytest.raises(ValueError, match=r"^capture 'x' selects no token in conversations 0, 1, 2 "
                                         r"\(3 of 3\); add tokens .*, such as where=jp.user$"):
        extraction._check_tokens(rows, capture.moments(np.eye(32)[:1], "system", name="x"))
    own = capture.last()
    (reading,) = own.readings.values()
    tests = jnp.asarray(np.stack([jp.user.encode(), jp.assistant.encode(), jp.assistant.encode()]))
    caplog.clear()
    extraction._check_tokens(rows, own.replace(readings={"own": reading.replace(where=tests)}))
    (record,) = caplog.records
    assert "capture 'own' selects no token in conversation 2 (1 of 3)" in record.getMessage()
