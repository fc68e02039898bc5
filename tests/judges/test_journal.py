"""The file of calls and verdicts: cut anywhere, locked, and its counts."""

from __future__ import annotations

import json
import threading

import pytest

import jaxpersona as jp
from jaxpersona.judges.journal import Journal, key_of
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
                         (f'{lines[0]}{{"sent": "k", "cost": {10**400}}}\n', "line 2 is damaged"),
                         (f'{lines[0]}{{"sent": "k", "cost": NaN}}\n', "line 2 is damaged"),
                         ('{"question": "Who?"}\n', "not a journal")):
        path.write_text(text)
        with pytest.raises(jp.UserError, match=wanted):
            Journal(path)
        assert path.read_text() == text


def test_a_file_has_one_user(tmp_path):
    held = Journal(tmp_path / "v.jsonl")
    with pytest.raises(jp.UserError, match="in use by another process"):
        Journal(tmp_path / "v.jsonl")
    held.close()
    Journal(tmp_path / "v.jsonl").close()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "v.jsonl")
    with pytest.raises(jp.UserError, match="cannot be written"):
        Journal(tmp_path / "link.jsonl")
    with pytest.raises(jp.UserError, match="cannot be written"):
        Journal(tmp_path)


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
