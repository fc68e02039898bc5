"""Progress: shown by default after three seconds, and the values of `progress=`."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

import jaxpersona as jp
from jaxpersona import progress
from jaxpersona.calls import checked_call


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
