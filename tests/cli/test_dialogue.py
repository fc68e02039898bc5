"""`jaxpersona chat`: at a terminal in one subprocess, from a pipe in this process."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import support as s

import jaxpersona as jp
from jaxpersona import interrupt
from jaxpersona.cli.dialogue import Dialogue
from jaxpersona.engine import programs
from jaxpersona.persona.monitor import EditCount, Monitor
from jaxpersona.persona.session import Piece, Session, Turn
from jaxpersona.text.chat import answered

MODEL, AXIS = jp.load("mini"), jp.load_axis("mini")
SYSTEM, ASKED = "You are a pirate. Stay in character.", "Who are you really, under the mask?"
PROMPT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_new_tokens": 40}
OPTIONS = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "40"]

# runs the command; while a file exists, a reply stops after its first piece of text
HELD = """
import fcntl, os, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the terminal sends SIGINT
from jaxpersona.engine.engine import Engine
hold, sys.argv = sys.argv[1], ["jaxpersona", *sys.argv[2:]]
stream = Engine.stream
def held(engine, handle):
    for event in stream(engine, handle):
        yield event
        while event.text and os.path.exists(hold):
            time.sleep(0.01)
Engine.stream = held
from jaxpersona.cli.main import main
main()
"""


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, code, *arguments):
        self.main, side = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "TERM": "dumb", "COLUMNS": "400", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdin=side, stdout=side,
            stderr=side, env=env, start_new_session=True)
        os.close(side)
        self.said = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.main)

    def until(self, pattern, seconds=240, press=b""):
        """Return the text up to a match of a pattern and remove it; fail if it does not come.

        While it does not come, `press` is pressed: a Ctrl-C between the prompt and the wait for
        keys is only seen at the next one.
        """
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            ready, _, _ = select.select([self.main], [], [], 0.2)
            if ready:
                try:
                    data = os.read(self.main, 65536)
                except OSError:  # the process has closed the terminal
                    data = b""
                if not data:
                    raise AssertionError(f"ended without {pattern!r}: {self.said}")
                self.said += data.decode().replace("\r\n", "\n")
            elif press:
                os.write(self.main, press)
            assert time.monotonic() < end, f"no {pattern!r} in {self.said!r}"
        text, self.said = self.said[: found.end()], self.said[found.end() :]
        return text

    def ask(self, line):
        """Write a line at the prompt, and read its echo."""
        self.until("you> ")
        os.write(self.main, f"{line}\n".encode())
        self.until(re.escape(f"{line}\n"))


NOTE = r"\n  \[projection [^\n]*\]\n"


def test_at_a_terminal(tmp_path):
    hold, saved = tmp_path / "hold", tmp_path / "talk.json"
    hold.touch()
    with Terminal(HELD, hold, "chat", "--cap", "mini:4:8:p25", "--no-check", "--system", SYSTEM,
                  "--max-new-tokens", "40") as at:
        assert "replies have projections of +18.93 to +21.19 at layer 4" in at.until("/help lists")
        at.ask(ASKED)
        first = at.until("[A-Za-z]{2}")
        assert "[projection" not in first + at.said  # the rest of the reply is held
        os.write(at.main, b"\x03")
        hold.unlink()
        at.until(r"\(cancelled; the message is not kept\)\n")
        at.ask(ASKED)
        reply = at.until(NOTE).split("\n  [")[0].strip()
        at.ask("/compare")
        at.until("without interventions:\n")
        assert reply not in at.until("\nwith interventions:\n")
        assert reply in at.until(NOTE)
        at.ask("/undo")
        at.until("removed: Who are you really")
        at.ask("/compare")
        at.until("error: there is no reply to compare yet; send a message first\n")
        at.ask("What is 2 plus 3?")
        answer = at.until(NOTE).split("\n  [")[0].strip()
        at.ask(f"/save {saved}")
        at.until("wrote [^\n]*: 1 turn\n")
        at.until("you> ")
        at.until(r"\(press Ctrl-D or type /quit to leave\)\n", press=b"no\x03")  # gives the line up
        at.ask("/quit")
        assert at.process.wait(60) == 0
    talk = json.loads(saved.read_text())
    assert [m["content"] for m in talk["messages"]] == [SYSTEM, "What is 2 plus 3?", answer]
    assert talk["replies"][0]["edited"] and talk["model"]["fingerprint"] == MODEL.fingerprint


def chat(monkeypatch, capsys, lines, *options):
    """Run the command on lines of a pipe; return exit code, standard output and error."""
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: MODEL)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    code = s.run_command(["chat", *options])
    return code, *capsys.readouterr()


def test_from_a_pipe(monkeypatch, capsys, tmp_path):
    """Replies equal those of `generate`; projections equal those of a second pass."""
    s.KEPT.clear()
    code, out, err = chat(monkeypatch, capsys, [
        ASKED, "/compare", f"/save {tmp_path}/on.json", "/edits off", "/undo", "", ASKED,
        f"/save {tmp_path}/off.json", "/quit", "not read"],
        "--cap", "mini:4:8:p25", "--no-check", "--system", SYSTEM, *OPTIONS)
    assert code == 0, err
    assert s.compiled(programs.decode) == 1  # with and without share one program
    cap = jp.cap(AXIS, layers=slice(4, 8), floor="p25")
    rows = jp.stack_rows([cap, None])
    number = jp.encode(MODEL, [PROMPT]).row_id[0]
    wanted = jp.generate(MODEL, [PROMPT] * 2, interventions=rows, batch_size=2,
                         ids=[number, number], **SAMPLED)
    capped, plain = wanted.text
    assert capped != plain and out == f"{capped}\n{plain}\n{capped}\n{plain}\n"
    for name, text, index in (("on", capped, 0), ("off", plain, 1)):
        talk = json.loads((tmp_path / f"{name}.json").read_text())
        said = [*PROMPT, {"role": "assistant", "content": text}]
        assert talk["messages"] == said and talk["settings"] == SAMPLED
        kept = talk["replies"][0]
        assert kept["edited"] == (name == "on") and kept["tokens"] == len(wanted.tokens[index])
        # no cap is below layer 4, so the values before the caps are those of an unedited pass
        row = answered(MODEL.tokenizer, wanted.rows[index], wanted.tokens[index])
        found = jp.extract(MODEL, [row]).captured["mean"][0, 4] @ AXIS.unit[4]
        assert list(kept["projections"]) == ["4"]
        assert abs(kept["projections"]["4"] - found) <= 1e-4
        assert f"projection {kept['projections']['4']:+.2f} at layer 4" in err
    (counts,) = json.loads((tmp_path / "on.json").read_text())["replies"][0]["edits"]
    assert counts["seen"] == wanted.applied[0].seen[0]
    assert counts["changed"] == wanted.applied[0].changed[:, 0].tolist()
    assert counts["edit"] == "cap(everywhere, layers 4–7, residual)" and sum(counts["changed"])


@pytest.fixture
def session():
    return Session(MODEL, interventions=jp.cap(AXIS, layers=[4], floor=0.0),
                   monitor=Monitor(MODEL, AXIS))


def run(monkeypatch, session, *lines):
    """Run a dialogue on lines of a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    Dialogue(session).run()


TURNS = [Turn("Hi.", "Hello.", "stop", 2, 12, True, {4: 1.5}), Turn("And you?", "Fine.")]


def test_commands_change_the_conversation(monkeypatch, session, capsys):
    session.turns = list(TURNS)
    run(monkeypatch, session, "/undo", "/system  Be kind. ", "/edits off", "/help")
    assert session.turns == TURNS[:1] and session.system == "Be kind." and not session.edited
    err = capsys.readouterr().err
    assert "removed: And you?" in err and "/compare" in err
    run(monkeypatch, session, "/reset", "/system", "/cap on")
    assert session.turns == [] and session.system is None and session.edited


@pytest.mark.parametrize(("line", "wanted"), [
    ("/undo", "there is no turn to remove"), ("/compare", "there is no reply to compare yet"),
    ("/edits maybe", "'maybe' is neither on nor off"), ("/edits", "/edits needs a value"),
    ("/save", "/save needs a value: /save FILE"), ("/save .", ". is a folder"),
    ("/save ~nobody-here/x", "'~nobody-here/x': the home folder is unknown; give the path without"),
    ("/load ~nobody-here/x", "the home folder is unknown"), ("/save ~a\0b/x", "folder is unknown"),
    ("/load none.json", "none.json: no such file"), ("/undo 2", "/undo takes no value"),
    ("/nothing", "/nothing is unknown"), ("/nothing 2", "/nothing is unknown"),
    ("/load bad.json", "bad.json: messages must alternate"),
    ("a\ud800b", "lone surrogate"),
])
def test_a_mistake_is_named(monkeypatch, tmp_path, session, line, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('[{"role": "user", "content": "Hi."}]')
    with pytest.raises(jp.UserError, match=wanted):
        run(monkeypatch, session, line)
    assert session.turns == []


def test_a_switch_needs_interventions(monkeypatch):
    plain = Session(MODEL)
    plain.turns = list(TURNS)
    for line in ("/edits on", "/compare"):
        with pytest.raises(jp.UserError, match="interventions"):
            run(monkeypatch, plain, line)


def test_a_full_context_is_one_line(monkeypatch, session):
    session.turns = [Turn("Tell me more. " * 300, "Yes.")]
    with pytest.raises(jp.UserError, match=r"mini is limited to 1,024.*\(/undo, /reset\)"):
        run(monkeypatch, session, "Hi.")
    assert len(session.turns) == 1


def test_a_mistake_at_a_terminal_does_not_end_the_dialogue(monkeypatch, session, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    dialogue = Dialogue(session)
    dialogue.interactive = True
    lines = iter(["/undo", "/load missing", "/save no/such/\0", "/save ~nobody-here/x",
                  KeyboardInterrupt(), EOFError()])

    def ask(_):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", ask)
    dialogue.run()
    out, err = capsys.readouterr()
    assert [line[:6] for line in err.splitlines()[-4:]] == ["error:"] * 4
    assert "press Ctrl-D or type /quit to leave" in out and not list(tmp_path.iterdir())


def test_control_characters_of_a_reply_are_escaped(monkeypatch, session, capsys):
    turn = Turn("Hi.", "\x1b[2J\u202eok\x07", "length", 40, 1024)
    monkeypatch.setattr(session, "reply", lambda *_: iter([
        Piece("\x1b[2J\u202e", {}), Piece("ok\x07", {}, turn)]))
    run(monkeypatch, session, "Hi.")
    out, err = capsys.readouterr()
    assert out == "\\x1b[2J\\u202eok\\x07\n"
    assert err.splitlines()[-1] == ("  [no projection: the reply has no token to project; 40 "
                                    "tokens, ended because the context is full; interventions off; "
                                    "context 1,024 of 1,024]")


def test_a_message_may_begin_with_a_slash_and_its_reply_is_described(monkeypatch, session, capsys):
    """Of 7 selected tokens at two layers, 3 + 4 activations changed; another edit adds 2 of 5."""
    asked = []
    edits = [EditCount("cap", [2, 3], 7, [3, 4]), EditCount("steer", [5], 5, [2])]
    turn = Turn("", "So.", "length", 1, 34, True, {4: 1.5}, edits)
    monkeypatch.setattr(session, "reply", lambda text, _: asked.append(text) or iter([
        Piece("So.", {}, turn)]))
    run(monkeypatch, session, "//quit  now ", "  /help", "Hi.")
    assert asked == ["/quit  now", "Hi."]
    assert capsys.readouterr().err.splitlines()[-1] == (
        "  [projection +1.50 at layer 4; 1 token, ended by --max-new-tokens; 9 of 19 activations "
        "changed; context 34 of 1,024]")
    long = "a " * 40
    session.turns = [Turn(long, "b"), Turn("x" * 60, "y")]
    run(monkeypatch, session, "/undo", "/undo")
    assert [line for line in capsys.readouterr().err.splitlines() if "removed" in line] == [
        f"removed: {'x' * 60}", f"removed: {long[:57]}…"]


def test_a_loaded_conversation_says_whether_its_projections_are_kept(monkeypatch, session, capsys,
                                                                     tmp_path):
    file = tmp_path / "talk.json"
    session.turns = list(TURNS)
    run(monkeypatch, session, f"/save {file}", "/reset", f"/load {file}")
    assert session.turns == TURNS
    assert capsys.readouterr().err.splitlines()[-1] == f"read {file}: 2 turns"
    file.write_text(json.dumps([{"role": "user", "content": "Hi."},
                                {"role": "assistant", "content": "Yes."}]))
    run(monkeypatch, session, f"/load {file}")
    assert capsys.readouterr().err.splitlines()[-1].startswith(
        f"read {file}: 1 turn; its projections were not restored")


def test_bytes_that_are_no_text_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: MODEL)
    broken = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", broken)
    assert s.run_command(["chat"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: standard input is not valid utf-8 (invalid start byte); give text in that encoding")


class Zeros(io.RawIOBase):
    """The first 256 MiB of /dev/zero."""

    left = 256 << 20

    def readable(self):
        return True

    def readinto(self, buffer):
        assert self.left > 0, "the line is read without a limit"
        self.left -= len(buffer)
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def test_a_line_of_standard_input_has_a_limit(monkeypatch, session):
    endless = io.TextIOWrapper(io.BufferedReader(Zeros(), 1 << 20), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", endless)
    with pytest.raises(jp.UserError, match="standard input has a line of more than 16,777,216 "
                                           "characters; give shorter lines"):
        Dialogue(session).run()
    monkeypatch.setattr("jaxpersona.cli.dialogue.LONGEST_LINE", 12)
    run(monkeypatch, session, "/system abc")  # 12 characters with the end of the line
    assert session.system == "abc"
    with pytest.raises(jp.UserError, match="more than 12 characters"):
        run(monkeypatch, session, "/system abcd")


def test_ctrl_c_is_intercepted_within_a_block_only():
    before, pressed = signal.getsignal(signal.SIGINT), []
    with interrupt.intercepted(lambda: pressed.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert pressed == [1] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("options", "wanted"), [
    (["--cap", "mini:4:8", "--cap-layers", "2:3"],
     "--cap is mini:4:8, and --cap-layers is also given"),
    (["--cap", "mini:4:8:p25", "--percentile", "p50"],
     "--cap is mini:4:8:p25, and --percentile is also given"),
    (["--cap", "mini:4:8:p3"], "percentile is 'p3'; this axis has"),
    (["--axis-layers", "2"], "--axis-layers needs --axis"),
    (["--where", "user"], "--where needs --cap or --steer"),
    (["--cap", "mini", "--where", "here"], "where is 'here'"),
    (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    (["--axis", "none.npy"], "none.npy: no such file"),
])
def test_options_are_checked_before_a_model_is_loaded(monkeypatch, capsys, options, wanted):
    def no_load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("jaxpersona.cli.support.open_model", no_load)
    assert s.run_command(["chat", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and wanted in err and err.count("\n") == 1
