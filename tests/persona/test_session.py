"""Monitors choose layers and average; transcripts keep a session and refuse what is not one."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine import programs
from jaxpersona.persona import session as module
from jaxpersona.persona.monitor import NAME, EditCount, Monitor, edit_counts
from jaxpersona.persona.session import Session, Turn
from jaxpersona.persona.transcript import record, restore

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL, AXIS = jp.load("mini"), jp.load_axis("mini")
CAP = jp.cap(AXIS, layers=slice(4, 8), floor="p25", where=jp.response.without("code"))
EDIT = {"edit": "cap(everywhere, layer 4, residual)", "layers": [4], "seen": 9, "changed": [5]}


def axis_at(*layers):
    """The axis, zero but at some layers."""
    values = np.zeros_like(AXIS.values)
    values[list(layers)] = AXIS.values[list(layers)]
    return jp.Vector(values, name="part", fingerprint=MODEL.fingerprint)


def test_a_monitor_reads_the_middle_layer_or_one_that_is_known():
    assert Monitor(MODEL, AXIS).layers == (4,)
    assert Monitor(MODEL, AXIS, "2:4").layers == (2, 3)
    assert Monitor(MODEL, axis_at(5, 6, 7)).layers == (6,)
    low, high = Monitor(MODEL, AXIS).usual[4]
    assert (low, high) == (AXIS.thresholds("p25")[4], AXIS.thresholds("p75")[4]) and low < high
    assert Monitor(MODEL, axis_at(5)).usual == {}
    assert repr(Monitor(MODEL, AXIS)) == "Monitor('assistant', layer 4)"


@pytest.mark.parametrize(("vector", "layers", "wanted"), [
    (jp.Vector(np.zeros((8, 128))), None, "zero at every layer"),
    (axis_at(5), 4, "'part' is zero at layer 4; choose other layers"),
    (axis_at(5), 8, "layers is 8, which is out of range"),
    (jp.Vector(np.ones((3, 4))), None, "layers: 3, width: 4"),
    (jp.Vector(np.ones((8, 128)), site="mlp"), None, "measured at site"),
], ids=["empty", "zero", "beyond", "another model", "another site"])
def test_a_direction_that_cannot_be_monitored_is_refused(vector, layers, wanted):
    with pytest.raises(jp.UserError, match=wanted):
        Monitor(MODEL, vector, layers)


def test_a_mean_leaves_out_tokens_without_a_value():
    monitor = Monitor(MODEL, AXIS, "2:4")
    values = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 8.0]], np.float32)[..., None]
    assert monitor.mean(values) == {2: 2.0, 3: 5.0}
    assert monitor.mean(values[1:2]) == {} == monitor.mean(values[:0])
    assert monitor.words({2: 2.0, 3: -5.0}) == "projection +2.00 at layer 2, -5.00 at layer 3"
    whole = np.moveaxis(values, 0, 1)  # [L, T, K], the first token is the prompt's
    assert monitor.of_reply(whole, 1) == {2: 3.0, 3: 8.0}


def test_the_edits_of_one_conversation_are_counted():
    """Of a batch [l, N], or of a single reply [l]."""
    changed = np.arange(8).reshape(4, 2)
    for index in (0, 1):
        (found,) = edit_counts(CAP, [SimpleNamespace(seen=np.array([3, 9]), changed=changed)],
                               index)
        assert (found.layers, found.seen) == ([4, 5, 6, 7], [3, 9][index])
        assert found.changed == [index, 2 + index, 4 + index, 6 + index]
    (found,) = edit_counts(CAP, [SimpleNamespace(seen=np.array(9), changed=changed[:, 1])])
    assert found.seen == 9 and found.changed == [1, 3, 5, 7] and found.edit.startswith("cap(")


def test_a_reply_is_read_without_its_prompt():
    """An earlier reply in the prompt does not count; the values are those of every token."""
    monitor = Monitor(MODEL, AXIS)
    session = Session(MODEL, monitor=monitor, max_new_tokens=8)
    session.turns = [Turn("What is 2 plus 3?", "I haunt thee.")]
    pieces = list(session.reply("And you?"))
    turn = session.turns[1]
    assert turn is pieces[-1].turn and "".join(piece.text for piece in pieces) == turn.reply
    assert len(pieces) > 1 and all(piece.turn is None for piece in pieces[:-1])
    assert turn.finish == "length" and turn.tokens == 8 and not turn.edited
    row = jp.encode(MODEL, [session.messages[:-1]])
    handle = session._engine.submit(jp.Request(session.messages[:-1], capture=monitor.capture,
                                               max_new_tokens=8))
    reply = session._engine.result(handle)
    values = reply.captured[NAME][0, :, 0]
    assert np.isnan(values[: row.tokens.shape[1]]).all()
    assert turn.projections[4] == pytest.approx(values[row.tokens.shape[1] :].mean(), abs=1e-5)
    assert turn.context == row.tokens.shape[1] + 8


def test_a_cancelled_reply_is_not_kept():
    """The function is asked before the first piece of text, and no turn is added."""
    session, asked = Session(MODEL, monitor=Monitor(MODEL, AXIS), max_new_tokens=8), []
    session.turns = [Turn("What is 2 plus 3?", "I haunt thee.")]
    assert list(session.reply("And you?", lambda: asked.append(1) or True)) == []
    assert len(session.turns) == 1 and asked == [1]


def test_interventions_that_are_off_have_the_structure_of_those_that_are_on():
    """Also where their tests select code, which the program must track."""
    s.KEPT.clear()
    session = Session(MODEL, interventions=CAP)
    session.turns = [Turn("Hi.", "Hello.")]
    on, off = (session._engine._task(jp.Request("Hi.", interventions=edits))
               for edits in (CAP, session._off))
    assert on.lane == off.lane and on.lane.code
    batch = jp.encode(MODEL, [[{"role": "user", "content": "Hi."},
                               {"role": "assistant", "content": "Hello there."}]], reply=False)
    out = s.run(MODEL.params, MODEL.config, batch, interventions=session._off)
    assert int(out.applied[0].seen[0]) == 0 and int(out.applied[0].changed.sum()) == 0
    before = s.compiled(programs.decode)
    handle = session._engine.submit(jp.Request("Hi."))
    session._engine.cancel(handle)
    assert s.compiled(programs.decode) == before


def made():
    session = Session(MODEL, interventions=CAP, monitor=Monitor(MODEL, AXIS), system="Be kind.")
    session.turns = [
        Turn("Hi.", "Hello.", "stop", 2, 12, True, {4: 1.5}),
        Turn("And you?", "Fine.", "length", 3, 30, False, {})]
    return session


def test_a_transcript_restores_the_session():
    session, other = made(), made()
    other.turns, other.system = [], None
    text = json.dumps(record(session))
    assert restore(other, json.loads(text))
    assert other.turns == session.turns and other.system == "Be kind."
    assert json.dumps(record(other)) == text
    session.system = ""  # not the same as none
    assert session.messages[0] == {"role": "system", "content": ""}
    assert restore(other, json.loads(json.dumps(record(session)))) and other.system == ""
    session.monitor = other.monitor = None
    assert record(session)["axis"] is None and restore(other, record(session))
    assert not restore(other, []) and (other.turns, other.messages) == ([], [])
    table = json.loads(text)
    other.monitor = made().monitor
    table["replies"][0]["edits"] = [EDIT]
    assert restore(other, table) and dataclasses.asdict(other.turns[0])["edits"] == [EDIT]


def test_a_transcript_has_the_settings_and_the_numbers_of_each_reply():
    """Its messages are a conversation, and its axis is known by the values at the layers."""
    session = Session(MODEL, interventions=CAP, monitor=Monitor(MODEL, AXIS), system="Be kind.",
                      max_new_tokens=9, temperature=0.5, top_p=0.75, seed=4)
    session.turns = [Turn("Hi.", "Hello.", "stop", 2, 12, True, {4: 1.5},
                          [EditCount(**EDIT)])]
    found = record(session)
    digest = hashlib.sha256(AXIS.values[[4]].tobytes()).hexdigest()[:16]
    assert found == {
        "format": "jaxpersona-chat 1",
        "model": {"name": "mini", "fingerprint": MODEL.fingerprint},
        "settings": {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.75, "seed": 4},
        "interventions": [repr(CAP.edits[0])],
        "axis": {"name": "assistant", "layers": [4], "digest": digest,
                 "projections": session.monitor.sentence},
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."},
                     {"role": "assistant", "content": "Hello."}],
        "replies": [{"finish": "stop", "tokens": 2, "context": 12, "edited": True,
                     "projections": {4: 1.5}, "edits": [EDIT]}]}


@pytest.mark.parametrize(("size", "edited"), [(1023, True), (1023, False), (1024, True)])
def test_a_conversation_needs_room_for_one_token_of_the_reply(monkeypatch, size, edited):
    """The context has 1,024 tokens; a request has the settings and the chosen interventions."""
    session = Session(MODEL, interventions=CAP, monitor=Monitor(MODEL, AXIS), max_new_tokens=9,
                      seed=4)
    row = SimpleNamespace(tokens=np.zeros(size, np.int32))
    monkeypatch.setattr(module.prompts, "encode", lambda *_: row)
    monkeypatch.setattr(module, "Request", lambda *given, **options: (*given, options))
    monkeypatch.setattr(session._engine, "submit", lambda request: request)
    if size == 1024:
        with pytest.raises(module.ContextFull, match="has 1,024 tokens with this message"):
            session._submit([], "Hi.", edited)
        return
    given, options = session._submit([], "Hi.", edited)
    assert given is row and options == {
        "interventions": session.edits if edited else session._off, "max_new_tokens": 9, "seed": 4,
        "capture": session.monitor.capture, "temperature": 0.0, "top_p": 1.0}


def test_projections_of_another_model_or_axis_are_dropped():
    table, other = json.loads(json.dumps(record(made()))), made()
    for change in ({"model": {"fingerprint": "0" * 16}}, {"axis": None},
                   {"axis": {**table["axis"], "digest": "0" * 16}}):
        assert not restore(other, table | change)
        assert [turn.projections for turn in other.turns] == [{}, {}]
        assert [turn.tokens for turn in other.turns] == [2, 3]


def test_messages_of_another_program_are_a_conversation():
    other, talk = made(), made().messages
    for value in (talk, {"messages": talk, "model": "x"}, {"conversation": talk}):
        assert not restore(other, value)
        assert other.messages == talk and other.turns[0] == Turn("Hi.", "Hello.")
    assert not restore(other, talk[1:]) and other.system is None


def broken(change):
    table = json.loads(json.dumps(record(made())))
    change(table)
    return table


@pytest.mark.parametrize(("value", "wanted"), [
    (5, "messages is 5; give a list of messages"), ({}, "messages is None; give a list of"),
    ([{"role": "user"}], "message 0 has no 'content'"),
    ([{"role": "user", "content": "Hi."}], "must alternate"),
    ([{"role": "assistant", "content": "Hi."}], "must alternate"),
    (broken(lambda t: t["replies"].pop()), "replies has 1 entries for 2"),
    (broken(lambda t: t.pop("replies")), "replies is None"),
    (broken(lambda t: t["replies"][1].update(tokens=-1)), r"replies\[1\]\.tokens is -1"),
    (broken(lambda t: t["replies"][0].update(projections={"x": 1.0})), r"replies\[0\]\.projectio"),
    (broken(lambda t: t["replies"][0]["projections"].update({"4": float("nan")})),
     r"replies\[0\]\.projections\.4 is nan"),
    (broken(lambda t: t["replies"][0].update(edits=[5])), r"replies\[0\]\.edits\[0\] is 5"),
], ids=range(11))
def test_what_is_no_transcript_is_refused_and_changes_nothing(value, wanted):
    session = made()
    before = copy.deepcopy(session.turns)
    with pytest.raises(jp.UserError, match=wanted):
        restore(session, value)
    assert session.turns == before and session.system == "Be kind."


def test_a_session_needs_a_tokenizer_and_valid_settings():
    with pytest.raises(jp.UserError, match="has no tokenizer"):
        Session(dataclasses.replace(MODEL, tokenizer=None))
    for wrong, wanted in (({"temperature": -1}, "temperature is -1"), ({"seed": -1}, "seed"),
                          ({"max_new_tokens": 0}, "max_new_tokens is 0")):
        with pytest.raises(jp.UserError, match=wanted):
            Session(MODEL, **wrong)


def test_nothing_to_compare_or_remove_is_named():
    empty, plain = Session(MODEL, interventions=CAP), Session(MODEL)
    plain.turns = [Turn("Hi.", "Hello.")]
    for call, wanted in ((empty.undo, "no turn to remove"), (empty.compare, "no reply to compare"),
                         (plain.compare, "has no interventions")):
        with pytest.raises(jp.UserError, match=wanted):
            call()
    assert plain.undo().message == "Hi." and repr(plain) == "Session('mini', 0 turns)"
