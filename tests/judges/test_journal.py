"""The file of calls and verdicts: cut anywhere, locked, and its counts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import threading

import pytest

import jaxpersona as jp
from jaxpersona.judges.journal import LINE_BYTES, Journal, key_of
from jaxpersona.judges.limits import Budget, Pace


def filled(path):
    held = Journal(path)
    for i in range(4):
        held.sent(f"k{i}", 0.5)
        if i == 1:
            held.failed("k1", "HTTP 500", 0.0)
            held.sent("k1", 0.5)
        if i < 3:
            held.answered(f"k{i}", str(i), 0.2)
    return held


def test_what_was_written_is_read_and_counted(tmp_path):
    held = filled(tmp_path / "v.jsonl")
    assert held.calls == 5 and held.spent == pytest.approx(3 * 0.2 + 0.5)  # k3 has no outcome
    held.close()
    again = Journal(tmp_path / "v.jsonl")
    assert (again.calls, again.spent) == (held.calls, pytest.approx(held.spent))
    assert again.get("k2") == ("2", 0.2) and again.get("k3") is None
    again.failed("k3", "no answer in time", 0.5)
    assert again.spent == pytest.approx(1.1)
    again.close()


def test_a_file_cut_at_any_byte_loses_its_last_line_only(tmp_path):
    path = tmp_path / "v.jsonl"
    filled(path).close()
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        held = Journal(path)
        whole = data[:size].count(b"\n")
        answers = sum(b'"said"' in line for line in data.splitlines()[:whole])
        assert sum(held.get(f"k{i}") is not None for i in range(4)) == answers
        held.sent("new", 0.0)
        held.answered("new", "3", 0.0)
        held.close()
        for line in path.read_text().splitlines():
            json.loads(line)
        held = Journal(path)
        assert held.get("new") == ("3", 0.0)
        held.close()


def test_a_damaged_or_foreign_file_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "v.jsonl"
    filled(path).close()
    lines = path.read_text().splitlines(keepends=True)
    for text, wanted in (("".join([lines[0], "{}\n", *lines[1:]]), "line 2 is damaged"),
                         ("".join([*lines[:3], "5\n"]), "line 4 is damaged"),
                         ('{"question": "Who?"}\n', "not a journal"),
                         ('{"question": "Who?"}', "not a journal"),
                         (lines[0] + "x" * (LINE_BYTES + 1), "line 2 has more than 1048576 bytes"),
                         ("x" * (LINE_BYTES + 1), "not a journal")):
        path.write_text(text)
        with pytest.raises(jp.UserError, match=wanted):
            Journal(path)
        assert path.read_text() == text


@pytest.mark.parametrize("cost", ["NaN", "Infinity", "-Infinity", "-0.5", "1" + "0" * 400, "true",
                                  '"1"', "null", "[1]"])
@pytest.mark.parametrize("line", ['{"sent": "k9", "cost": COST}', '{"failed": "k3", "cost": COST}',
                                  '{"key": "k3", "said": "3", "cost": COST}'])
def test_a_cost_in_a_file_is_a_finite_number(tmp_path, cost, line):
    path = tmp_path / "v.jsonl"
    filled(path).close()
    text = path.read_text() + line.replace("COST", cost) + "\n"
    path.write_text(text)
    with pytest.raises(jp.UserError, match=r"v\.jsonl: line 11: cost is .*; give a finite number, "
                                           "at least 0, or delete this line") as said:
        Journal(path)
    assert path.read_text() == text and len(str(said.value)) < 160 + len(str(path))


def test_a_cost_or_a_line_that_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "v.jsonl"
    held = filled(path)
    before, spent = path.read_bytes(), held.spent
    for cost in (float("nan"), float("inf"), -1.0, 10**400):
        for write in (lambda c: held.sent("k9", c), lambda c: held.failed("k3", "", c),
                      lambda c: held.answered("k3", "3", c)):
            with pytest.raises(jp.UserError, match="v.jsonl: cannot be written .cost is "):
                write(cost)
    with pytest.raises(jp.UserError, match=r"has 10486\d\d bytes; the limit is 1048576"):
        held.answered("k3", "3" * LINE_BYTES, 0.1)
    assert (path.read_bytes(), held.calls, held.spent) == (before, 5, spent)
    assert held.get("k3") is None
    held.close()


@contextlib.contextmanager
def bounded():
    """Within the block, the process may run for 10 more seconds and allocate 1 GiB more."""
    def late(*_):
        raise AssertionError("no answer within 10 seconds")

    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def test_a_pipe_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with bounded(), pytest.raises(jp.UserError, match=f"{path} is not a regular file"):
            Journal(path)


def test_a_file_has_one_user(tmp_path):
    held = Journal(tmp_path / "v.jsonl")
    with pytest.raises(jp.UserError, match="in use by another judge or process"):
        Journal(tmp_path / "v.jsonl")
    held.close()
    Journal(tmp_path / "v.jsonl").close()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "v.jsonl")
    with pytest.raises(jp.UserError, match="cannot be written"):
        Journal(tmp_path / "link.jsonl")
    with pytest.raises(jp.UserError, match="cannot be written"):
        Journal(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "write", "ftruncate"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, call):
    """Also where the file is opened, flushed and closed; a failed close releases the file."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "v.jsonl"
    message = r"v.jsonl: cannot be written \(No space left on device\)"
    if call == "fsync":
        held = Journal(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            for act in (held.flush, held.close):
                with pytest.raises(jp.UserError, match=message):
                    act()
    else:
        if call == "ftruncate":  # the last line is incomplete
            Journal(path).close()
            path.write_text(path.read_text() + '{"key": ')
        with monkeypatch.context() as patch, pytest.raises(jp.UserError, match=message):
            patch.setattr(os, call, full)
            Journal(path)
    Journal(path).close()


def test_the_key_covers_judge_and_text():
    keys = {key_of(*pair) for pair in (("m", "p"), ("m", "q"), ("n", "p"), ("mp", ""), ("", "mp"))}
    assert len(keys) == 5 and key_of("m", "\ud800")  # a reply may hold half a pair


@pytest.mark.parametrize(("text", "wanted"), [
    ("500calls", Budget(calls=500)), ("1,000 calls", Budget(calls=1000)), ("1call", Budget(1)),
    ("5usd", Budget(usd=5.0)), ("$2.5", Budget(usd=2.5)), ("0.01 USD", Budget(usd=0.01)),
])
def test_a_budget_is_in_calls_or_usd(text, wanted):
    assert Budget.parse(text) == wanted
    for wrong in ("500", "five usd", "-1calls", "1e9usd", "", "5eur", "1.5calls"):
        with pytest.raises(jp.UserError, match="give calls or USD"):
            Budget.parse(wrong)


class Clock:
    """A clock that waiting advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def is_set(self):
        return False

    def wait(self, seconds):
        self.now += seconds
        return False


def test_no_minute_has_more_requests_or_tokens_than_allowed():
    clock = Clock()
    pace = Pace(requests=30, clock=clock)
    at = [clock.now for _ in range(70) if pace.wait(100, clock)]
    assert max(sum(a <= t < a + 60 for t in at) for a in at) == 30
    clock = Clock()
    pace, at = Pace(tokens=6000, clock=clock), []
    for _ in range(70):
        assert pace.wait(200, clock)
        at.append(clock.now)
        pace.settle(200, 300)  # the estimate was too low
    assert max(sum(300 for t in at if a <= t < a + 60) for a in at) <= 6000
    assert at[-1] == pytest.approx(69 * 3.0)


def test_a_hold_delays_and_a_stop_ends_the_wait():
    clock = Clock()
    pace = Pace(clock=clock)
    pace.hold(7.0)
    pace.hold(3.0)  # a shorter one does not end a longer one
    assert pace.wait(1, clock) and clock.now == pytest.approx(7.0)
    pace.hold(1.0)
    assert pace.wait(1, clock) and clock.now == pytest.approx(8.0)  # from now on
    both = Pace(requests=60, tokens=600, clock=clock)  # a second per request, and per ten tokens
    at = [clock.now for tokens in (5, 30, 5) if both.wait(tokens, clock)]
    assert at == pytest.approx([8.0, 9.0, 12.0])
    stopped = threading.Event()
    stopped.set()
    assert not Pace(requests=1).wait(1, stopped)
    for rates in ({"requests": 0}, {"tokens": -1}, {"requests": float("nan")}):
        with pytest.raises(jp.UserError, match="must be positive"):
            Pace(**rates)
