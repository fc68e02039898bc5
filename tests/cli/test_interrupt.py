"""Signals end the command with one line about the written files, and no console output is lost."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import support as s

import jaxpersona.interrupt as interrupt
from jaxpersona.cli import support
from jaxpersona.data.texts import Question, Role

ROLES = [Role("default", ("", "You are an AI assistant."), ""),
         *(Role(name, (f"You are a {name}.",), "") for name in ("ghost", "tutor", "pirate"))]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def start(*arguments, **variables):
    """Start the command in a subprocess and capture its output."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    code = "import sys; sys.argv[0] = 'jaxpersona'; from jaxpersona.cli.main import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# runs the command and pauses for half a minute during the import of a given module
WAITING = """
import sys, time
where, sys.argv = sys.argv[1], ["jaxpersona", *sys.argv[2:]]
class Wait:
    def find_spec(self, name, *rest):
        if name == where:
            sys.meta_path.remove(self)
            print("importing", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Wait())
from jaxpersona.cli.main import main
main()
"""


@pytest.mark.parametrize("where", ["jax", "jaxpersona.ckpts.loading", "typer"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_importing_is_one_line(number, where):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", WAITING, where, "plan", "--topology", "h200:1"]
    process = subprocess.Popen(command, text=True, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "stopped; nothing was written\n"
    assert not out


def test_the_package_leaves_the_signals_of_other_programs_alone():
    code = ("import signal; before = [signal.getsignal(n) for n in (2, 15)]; import jaxpersona; "
            "assert before == [signal.getsignal(n) for n in (2, 15)]")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not interrupt.is_command()


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    return s.write_texts(tmp_path / "texts", ROLES, [Question(0, "Why?")])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_a_run_says_what_is_kept(checkpoint, texts, tmp_path, capsys, monkeypatch,
                                                 number):
    """The exit code is 128 + signal, the line names the saved files, and the run can be resumed."""
    from jaxpersona.runs import live

    out, saved = tmp_path / "out", []
    keep = live.Live.add

    def save(self, *given):
        keep(self, *given)
        saved.append(given)
        if len(saved) == 3:
            os.kill(os.getpid(), number)
            time.sleep(5)  # the handler runs before the call returns

    monkeypatch.setattr(live.Live, "add", save)
    before = [signal.getsignal(n) for n in SIGNALS]
    command = s.axis_command(checkpoint, texts, out)
    assert s.run_command(command) == 128 + number
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"stopped; {out} contains 3 rollouts")
    assert said.endswith("; run the same command to resume")
    assert [signal.getsignal(n) for n in SIGNALS] == before
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(live.Live, "add", lambda self, *given: made.append(given) or keep(
        self, *given))
    assert s.run_command(command) == 0
    assert len(made) == 5 - 3  # every rollout that finished was kept
    assert s.run_command(command) == 0


def test_a_signal_before_anything_is_written_says_so(checkpoint, texts, tmp_path, capsys,
                                                     monkeypatch):
    def load(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("jaxpersona.cli.support.open_model", load)
    assert s.run_command(s.axis_command(checkpoint, texts, tmp_path / "out")) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped; nothing was written"


@pytest.mark.parametrize("log", [True, False])
def test_a_signal_whose_exception_is_discarded_stops_at_the_next_report(log):
    """Python discards what a signal handler raises during a finalizer, for example."""
    reached = []
    with pytest.raises(interrupt.Stopped) as stop, interrupt.raised(), \
            support.progress(log=log) as report:
        with contextlib.suppress(interrupt.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        reached.append("before")
        report("step", 1, 2, 0)
        reached.append("after")
    assert reached == ["before"] and stop.value.code == 130
    with interrupt.raised(), support.progress(log=log) as report:
        report("step", 1, 2, 0)  # the next command is not affected


def test_a_signal_whose_exception_is_discarded_sets_the_exit_code():
    with pytest.raises(interrupt.Stopped), interrupt.raised(), \
            contextlib.suppress(interrupt.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_second_signal_ends_the_command_at_once():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(interrupt.Stopped) as stop, interrupt.raised():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            held = [signal.getsignal(n) for n in SIGNALS]
    assert held == [interrupt._leave_at_once] * 2 and stop.value.code == 143
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_ignored():
    """As in a background job of a shell script."""
    pressed, before = [], signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.raised(), interrupt.intercepted(lambda: pressed.append(1)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert signal.getsignal(signal.SIGTERM) is interrupt._stop
        assert not pressed and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_not_stopped():
    done = []

    def work():
        with interrupt.intercepted(lambda: None):
            interrupt.check()
        done.append(1)

    with pytest.raises(interrupt.Stopped), interrupt.raised():
        with contextlib.suppress(interrupt.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert done == [1]


@pytest.mark.parametrize(("original", "argv", "wanted"), [
    (["python", "-m", "jaxpersona.cli", "plan"], ["/x/cli/__main__.py", "plan"], True),
    (["python", "/bin/jaxpersona"], ["/bin/jaxpersona"], True),
    (["jaxpersona.exe"], ["jaxpersona.exe", "plan"], True),
    (["python", "jaxpersona.cli", "-m"], ["jaxpersona_notes.py"], False),
    (["python", "-m", "pytest"], ["/x/pytest/__main__.py", "jaxpersona"], False), ([], [], False),
])
def test_the_command_is_known_by_its_arguments(monkeypatch, original, argv, wanted):
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", argv)
    assert interrupt.is_command() is wanted


@pytest.mark.slow
def test_a_killed_command_of_its_own_process_is_one_line(checkpoint, texts, tmp_path):
    """A signal at any point ends the command cleanly."""
    process = start(*s.axis_command(checkpoint, texts, tmp_path / "out", "--samples", "2000"))
    deadline = time.monotonic() + 90
    while not (tmp_path / "out" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(r"^stopped; .*out contains .*; run the same command to resume$", err, re.M)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_reply_is_lost_to_the_encoding_of_the_console(monkeypatch, encoding, tmp_path):
    """Unencodable characters and lone surrogates are printed as escapes."""
    from jaxpersona.cli import output

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with output.prepared():
        output.say("caf\u00e9 \u4e16 \U0001f600", "half \ud800", "last")
        output.console().print(output.cell("\u4e16 \ud83d"))
    out.flush()
    lines = out.buffer.getvalue().decode(encoding).splitlines()
    wanted = {"ascii": "caf\\xe9 \\u4e16 \\U0001f600", "cp1252": "caf\u00e9 \\u4e16 \\U0001f600",
              "utf-8": "caf\u00e9 \u4e16 \U0001f600"}[encoding]
    world = "\u4e16" if encoding == "utf-8" else "\\u4e16"
    assert lines == [wanted, "half \\ud800", "last", f"{world} \\ud83d"]


def test_a_console_of_seven_bits_shows_every_reply(checkpoint, tmp_path, monkeypatch):
    """End to end: random-byte replies, a prompt and a table that the encoding cannot represent."""
    from jaxpersona.ckpts.vectors import save_vector

    from jaxpersona.vectors.vector import Vector

    save_vector(tmp_path / "v.safetensors", Vector([[1.0] * 32] * 3, name="\u4e16\u754c"))
    for more in ((), ("--steer", str(tmp_path / "v.safetensors"), "--compare")):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        code = s.run_command(["generate", "caf\u00e9", "\u4e16", "--model", str(checkpoint),
                              "--temperature", "1", "--max-new-tokens", "12", *more])
        out.flush()
        said = out.buffer.getvalue()
        assert code == 0 and said.isascii() and len(said.splitlines()) >= 2
        assert b"\\u" in said or b"\\x" in said


def test_nothing_is_claimed_of_a_folder_that_cannot_be_read():
    def describe():
        raise PermissionError(13, "no")

    with pytest.raises(interrupt.Stopped) as stopped, interrupt.keeping(describe):
        raise interrupt.Stopped(signal.SIGINT)
    assert stopped.value.kept == "the state of the output files is unknown"
    with pytest.raises(interrupt.Stopped) as stopped, interrupt.keeping(lambda: "two files"):
        raise interrupt.Stopped(signal.SIGTERM)
    assert stopped.value.kept == "two files" and stopped.value.code == 143


def test_the_handlers_of_the_imports_are_replaced_after_a_command():
    """Their line would claim that nothing was written."""
    before = signal.signal(signal.SIGINT, interrupt._leave)
    try:
        with interrupt.raised():
            assert signal.getsignal(signal.SIGINT) is interrupt._stop
        assert signal.getsignal(signal.SIGINT) is interrupt._leave_at_once
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_action_on_ctrl_c_leaves_the_other_signal_alone():
    """The action replaces the handler of SIGINT in the block."""
    pressed, before = [], [signal.getsignal(n) for n in SIGNALS]
    with interrupt.intercepted(lambda: pressed.append(1)):
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert pressed == [1] * count
        assert signal.getsignal(signal.SIGTERM) is before[1]
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_stop_is_named_by_its_signal():
    """Before a command knows its files, nothing was written."""
    stop = interrupt.Stopped(signal.SIGTERM)
    assert (str(stop), stop.code, stop.kept) == ("SIGTERM", 143, "nothing was written")
    assert not isinstance(stop, Exception)
