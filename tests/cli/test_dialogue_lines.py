"""The lines that a dialogue prints, and how it reads, cancels and saves."""

from __future__ import annotations

import dataclasses
import io
import signal
import sys
from types import SimpleNamespace

import pytest

import jaxpersona as jp
from jaxpersona import interrupt
from jaxpersona.cli.dialogue import HELP, Dialogue
from jaxpersona.persona.session import Piece, Turn

TURN = Turn("Hi.", "So.", "stop", 3, 1234)


class Talk:
    """A session whose replies are given; it has no model."""

    def __init__(self, pieces=(), edits=(), monitor=None):
        self.model = SimpleNamespace(config=SimpleNamespace(max_context=4096))
        self.edits = SimpleNamespace(edits=list(edits))
        self.turns, self.system, self.edited, self.monitor = [], "Be kind.", True, monitor
        self.pieces = list(pieces)

    def reply(self, text, cancelled):
        yield from self.pieces

    def compare(self, cancelled):
        yield from self.pieces


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a dialogue on lines of a pipe, and returns the printed lines."""
    def use(talk, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        Dialogue(talk).run()
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines()[1:]  # without the model

    return use


def test_each_command_says_what_it_did(run):
    """/reset keeps the system prompt, and the text of /system may have several words."""
    talk = Talk(edits=["a cap"])
    talk.turns = [TURN]
    _, said = run(talk, "/reset", "/edits off")
    assert talk.turns == [] and talk.system == "Be kind." and not talk.edited
    assert said[-2:] == ["the conversation is empty",
                         "the next replies are generated without the interventions"]
    _, said = run(talk, "/cap on", "/system  Be very  brief. ")
    assert talk.edited and talk.system == "Be very  brief."
    assert said[-2:] == ["the next replies are generated with the interventions",
                         "the system prompt is set"]
    _, said = run(talk, "/system", "/help")
    assert talk.system is None and said == [
        said[0], "there is no system prompt", *HELP.splitlines()]


@pytest.mark.parametrize(("line", "wanted"), [
    ("/quit now", "/quit takes no value; to send a message that begins with /, type //"),
    ("/reset all", "/reset takes no value"), ("/help me", "/help takes no value"),
    ("/compare x", "/compare takes no value"), ("/load", "/load needs a value: /load FILE"),
    ("/cap", "/cap needs a value: /cap on or off"), ("/" + "x" * 50, f"/{'x' * 39} is unknown"),
    ("/edits on", "there are no interventions: start the chat with --cap, --steer or --spec")])
def test_a_command_is_refused_with_its_form(run, line, wanted):
    """An unknown name is shortened to 40 characters."""
    with pytest.raises(jp.UserError) as caught:
        run(Talk(), line)
    assert str(caught.value).startswith(wanted)


def test_the_greeting_names_what_the_session_has(run):
    """A session without interventions and directions has the line of the model only."""
    assert run(Talk())[1] == []
    monitor = SimpleNamespace(sentence="onto 'v'", usual={2: (-1.0, 2.5), 3: (0.0, 1.0)})
    assert run(Talk(edits=["a"], monitor=monitor))[1] == [
        "interventions: namespace(edits=['a'])", "projection: onto 'v'",
        "half of the default persona's replies have projections of -1.00 to +2.50 at layer 2, "
        "+0.00 to +1.00 at layer 3"]
    monitor.usual = {}
    assert run(Talk(monitor=monitor))[1] == ["projection: onto 'v'"]


@pytest.mark.parametrize(("turn", "wanted"), [
    (TURN, "3 tokens; context 1,234 of 4,096"),
    (dataclasses.replace(TURN, finish="length", tokens=1),
     "1 token, ended by --max-new-tokens; context 1,234 of 4,096"),
    (dataclasses.replace(TURN, finish="length", context=4095),
     "3 tokens, ended by --max-new-tokens; context 4,095 of 4,096"),
    (dataclasses.replace(TURN, finish="length", context=4096),
     "3 tokens, ended because the context is full; context 4,096 of 4,096"),
    (dataclasses.replace(TURN, context=4096), "3 tokens; context 4,096 of 4,096")])
def test_a_reply_is_described_by_its_length_and_end(run, turn, wanted):
    """A session without interventions does not mention them."""
    out, said = run(Talk([Piece("So", {}), Piece(".", {}, turn)]), "Hi.")
    assert out == ["So."] and said == [f"  [{wanted}]"]


def test_a_cancelled_reply_is_not_described(run):
    """Its text so far was printed."""
    out, said = run(Talk([Piece("So", {})]), "Hi.")
    assert out == ["So"] and said == ["(cancelled; the message is not kept)"]


def test_a_comparison_prints_the_reply_without_interventions_first(run):
    """If it is cancelled, the other reply is not generated."""
    both = [(False, Piece("Pl", {})), (False, Piece("ain.", {}, TURN)),
            (True, Piece("Held.", {}, dataclasses.replace(TURN, tokens=9)))]
    out, said = run(Talk(both), "/compare")
    assert out == ["Plain.", "Held."]
    assert said == ["without interventions:", "  [3 tokens; context 1,234 of 4,096]",
                    "with interventions:", "  [9 tokens; context 1,234 of 4,096]"]
    out, said = run(Talk(both[:1]), "/compare")
    assert out == ["Pl"] and said == ["without interventions:", "(cancelled)"]


def test_ctrl_c_cancels_a_reply_or_the_line():
    """While a line is read, it raises; the next reply is not cancelled in advance."""
    dialogue = Dialogue(Talk([Piece("So.", {}, TURN)]))
    dialogue._interrupt()
    assert dialogue._is_cancelled()
    dialogue._reply("Hi.")
    assert not dialogue._is_cancelled()
    dialogue._interrupt()
    dialogue.session.pieces = [(False, Piece("a", {}, TURN)), (True, Piece("b", {}, TURN))]
    dialogue._compare()
    assert not dialogue._is_cancelled()
    dialogue.reading = True
    with pytest.raises(KeyboardInterrupt):
        dialogue._interrupt()
    assert not dialogue._is_cancelled()


@pytest.mark.parametrize(("keys", "screen"), [(True, False), (False, True), (True, True)])
def test_a_dialogue_needs_a_terminal_on_both_sides(monkeypatch, capsys, keys, screen):
    """Otherwise, the first mistake ends it, and the greeting does not mention /help."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: keys))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: screen, raising=False)
    dialogue = Dialogue(Talk())
    assert dialogue.interactive == (keys and screen)
    dialogue._greet()
    last = capsys.readouterr().err.splitlines()[-1]
    assert (last == "/help lists the commands; press Ctrl-D to leave") == (keys and screen)


def test_a_line_that_is_no_text_does_not_end_a_dialogue_at_a_terminal(monkeypatch, capsys):
    """The prompt is shown again; afterwards, Ctrl-C does not discard a line."""
    asked = []

    def ask(prompt):
        asked.append((prompt, dialogue.reading))
        if len(asked) == 1:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")
        return "/quit"

    dialogue = Dialogue(Talk())
    dialogue.interactive = True
    monkeypatch.setattr("builtins.input", ask)
    dialogue.run()
    assert asked == [("you> ", True)] * 2 and not dialogue.reading
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the line is not valid utf-8; type it again")


def test_a_stopped_dialogue_names_the_saved_file(monkeypatch, tmp_path, capsys):
    """Before the first /save, nothing was written."""
    def stop(*_):
        raise interrupt.Stopped(signal.SIGTERM)

    monkeypatch.setattr("jaxpersona.persona.transcript.record", lambda session: {"a": 1})
    file = tmp_path / "talk.json"
    for lines, kept in ((["Hi."], "nothing was written"),
                        ([f"/save {file}", "Hi."], f"{file} was written")):
        talk = Talk()
        talk.reply = stop
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(interrupt.Stopped) as stopped:
            Dialogue(talk).run()
        assert stopped.value.kept == kept
    assert file.read_text() == '{\n "a": 1\n}\n'
    assert capsys.readouterr().err.splitlines()[-1] == f"wrote {file}: 0 turns"


def test_a_path_with_a_tilde_is_in_the_home_folder(monkeypatch, tmp_path, run):
    """Both /save and /load replace it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("jaxpersona.persona.transcript.record", lambda session: [])
    monkeypatch.setattr("jaxpersona.persona.transcript.restore", lambda session, value: True)
    _, said = run(Talk(), "/save ~/a talk.json", "/load ~/a talk.json")
    assert said == [f"wrote {tmp_path}/a talk.json: 0 turns", f"read {tmp_path}/a talk.json: "
                    "0 turns"]
