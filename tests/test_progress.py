"""Progress: shown by default after three seconds, and the values of `progress=`."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import types

import pytest

import jaxpersona as jp
from jaxpersona import progress
from jaxpersona.calls import checked_call

DELAYS = (progress.SECONDS, progress.EVERY)  # the fixture below replaces them


@checked_call
@progress.shows(progress.tokens("work"))
def work(steps, *, progress=None):
    for done in range(steps):
        time.sleep(0.05)
        if callable(progress):
            progress(done + 1, steps, 10 * done)
    return progress


@checked_call
@progress.shows(progress.steps, "report")
def outer(*, report=None):
    return work(6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(progress, "_REWRITE", 0.02)


@pytest.mark.parametrize("given", [{}, {"progress": None}, {"progress": True}])
def test_lines_appear_where_stderr_is_no_terminal(given, capfd):
    work(8, **given)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) > 2 and "\r" not in err
    assert lines[0].startswith("work ") and any("/8, " in line for line in lines)
    assert any(line.endswith("s left") for line in lines)


def test_the_time_left_of_a_resumed_step_is_that_of_its_new_part(monkeypatch):
    clock = iter([100.0, 100.0, 110.0, 110.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    shown = progress._Display("run", progress.steps)
    shown._start = 40.0
    shown.tell("rollouts", 9_000, 10_000, 0)
    assert "left" not in shown._text()
    shown.tell("rollouts", 9_010, 10_000, 0)
    assert shown._text() == "rollouts 9,010/10,000, 70 s, about 990 s left"


def test_a_terminal_shows_one_line_that_is_cleared(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    work(8)
    text = screen.getvalue()
    assert "\n" not in text and text.count("\r") > 2 and "work 2/8" in text
    assert text.endswith("\r") and not text.split("\r")[-2].strip()


def test_a_fast_call_shows_nothing(monkeypatch, capfd):
    monkeypatch.setattr(progress, "SECONDS", 3.0)
    work(2)
    assert capfd.readouterr() == ("", "")


def test_false_shows_nothing_and_a_function_gets_the_numbers(capfd):
    calls = []
    assert work(4, progress=False) is None
    assert work(2, progress=lambda *numbers: calls.append(numbers)) is not None
    assert calls == [(1, 2, 0), (2, 2, 10)] and capfd.readouterr() == ("", "")


def test_only_the_outermost_function_shows_its_progress(capfd):
    outer(report=False)
    with progress.muted():
        outer()
    assert capfd.readouterr().err == ""
    outer()
    err = capfd.readouterr().err
    assert "outer is running" in err and "work" not in err


def test_another_value_is_one_line():
    with pytest.raises(jp.UserError, match="progress is 5; give True .*, False .* or a function"):
        work(1, progress=5)


def test_a_display_ends_with_an_error(capfd):
    def broken(*numbers):
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        work(4, progress=broken)
    with pytest.raises(TypeError):
        work("8")
    time.sleep(0.1)
    assert capfd.readouterr().err.count("\n") <= 1
    work(4)
    assert capfd.readouterr().err  # the next call is shown


def test_the_public_functions_accept_true_and_false():
    model = jp.load("mini", progress=False)
    for given in (True, False):
        out = jp.generate(model, ["a"], max_new_tokens=2, progress=given)
        assert len(out.text) == 1
    with pytest.raises(jp.UserError, match="no run"):
        jp.report.page("none", report=False)


@pytest.mark.parametrize("screen", [None, "closed", "bare"])
def test_a_missing_or_closed_standard_error_ends_no_thread(monkeypatch, screen):
    closed = io.StringIO()
    closed.close()
    bare = type("Bare", (), {"write": lambda self, text: None})()
    errors = []
    monkeypatch.setattr("threading.excepthook", lambda found: errors.append(found.exc_value))
    monkeypatch.setattr("sys.stderr", {None: None, "closed": closed, "bare": bare}[screen])
    assert callable(work(4)) and not errors


def test_a_display_initializes_no_backend_and_a_forked_child_has_its_own_lock():
    """The lock may be held by a thread of the parent."""
    code = """
import os, time
from jax.extend import backend
from jaxpersona import progress
from jax._src import xla_bridge
progress.SECONDS = 0.01
@progress.shows(progress.steps, "report")
def slow(*, report=None):
    time.sleep(0.3)
slow()
assert not xla_bridge.backends_are_initialized()
progress._lock.acquire()
child = os.fork()
if not child:
    slow()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                           text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "slow is running" in found.stderr


class Notebook:
    """A shell whose class has the name of Jupyter's shell."""


Notebook.__name__ = "ZMQInteractiveShell"


@pytest.mark.parametrize(("screen", "shell", "wanted"), [
    (Terminal(), None, True), (io.StringIO(), None, False), (io.StringIO(), Notebook(), True),
    (io.StringIO(), object(), False)])
def test_a_line_is_rewritten_in_a_terminal_and_in_a_notebook(monkeypatch, screen, shell, wanted):
    """A pipe gets separate lines, also from a plain IPython shell."""
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress._rewrites() is wanted


def test_a_line_has_the_step_the_numbers_the_note_and_the_time(monkeypatch):
    """The time left is shown after the first report of a step and before its last item."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = progress._Display("run", progress.steps)
    shown._start = 40.4
    assert shown._text() == "run is running, 60 s"
    shown.tell("rollouts", 0, 3_000, 0)
    now[0] = 130.0
    shown.tell("rollouts", 1_000, 3_000, 12_345)
    assert shown._text() == "rollouts 1,000/3,000, 12,345 tokens, 90 s, about 60 s left"
    shown.tell("rollouts", 3_000, 3_000, 0)
    assert shown._text() == "rollouts 3,000/3,000, 90 s"
    shown.tell("judge", 5, 10, 0)  # a step that has only begun has no rate
    assert shown._text() == "judge 5/10, 90 s"
    now[0] = 131.0
    shown.tell("judge", 6, 10, 0)
    assert shown._text() == "judge 6/10, 91 s, about 4 s left"


def test_a_display_without_a_total_shows_its_note(monkeypatch):
    """Such as the turn of `grow`, whose number of replies is unknown."""
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 52.0)
    shown = progress._Display("grow", lambda turn: ("turn", 0, 0, f"turn {turn}"))
    shown._start = 40.0
    shown.tell(3)
    assert shown._text() == "grow is running, 12 s, turn 3"


def test_a_shorter_line_covers_the_longer_one_before_it(monkeypatch):
    """On a terminal; elsewhere each text is a line."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    shown = progress._Display("run", progress.steps)
    shown._write("a longer text", True)
    shown._write("short", True)
    assert screen.getvalue() == "\ra longer text\rshort        "
    shown._write("line", False)
    assert screen.getvalue().endswith("line\n")


def test_numbers_are_read_with_their_units():
    """Bytes become whole megabytes, with a total of at least one; no tokens are no note."""
    assert progress.megabytes(2_999_999, 16_000_000) == ("load (MB)", 2, 16, "")
    assert progress.megabytes(5, 10) == ("load (MB)", 0, 1, "")
    assert progress.tokens("reply")(1, 4, 0) == ("reply", 1, 4, "")
    assert progress.tokens("reply")(2, 4, 1_500) == ("reply", 2, 4, "1,500 tokens")
    assert progress.steps("a", 2, 3, 7_000) == ("a", 2, 3, "7,000 tokens")
    assert DELAYS == (3.0, 30.0)  # seconds before the first line, and between two lines


@pytest.mark.parametrize(("joined", "first", "wanted"), [
    (True, False, False), (True, True, True), (False, False, True)])
def test_only_the_first_of_several_processes_shows_progress(monkeypatch, capfd, joined, first,
                                                            wanted):
    """A single process shows it without asking for its place."""
    from jaxpersona.distributed import processes

    monkeypatch.setattr(processes, "joined", lambda: joined)
    monkeypatch.setattr(processes, "first", lambda: first)
    work(4)
    assert bool(capfd.readouterr().err) is wanted
