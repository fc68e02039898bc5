"""Waits, repetitions and limits of an endpoint judge, with a given clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import jaxpersona as jp
from jaxpersona.judges import waiting
from jaxpersona.judges.endpoint import Failure
from jaxpersona.judges.limits import Batch, Budget, Tariff
from jaxpersona.judges.waiting import Ended, Waiting


class Clock:
    """A clock and an event, whose waits advance the clock."""

    def __init__(self, stop_after=10**9):
        self.now, self.waits, self.left = 100.0, [], stop_after

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(("seconds", "waits"), [
    (2.5, [1.0, 1.0, 0.5]), (1.0, [1.0]), (0.25, [0.25]), (0.0, [0.0])])
def test_a_wait_ticks_at_least_once_per_second(monkeypatch, seconds, waits):
    """A tick precedes each part of the wait."""
    clock, ticks = Clock(), []
    monkeypatch.setattr(waiting, "time", clock)
    Waiting(1.0, lambda: ticks.append(clock.now), clock).wait(seconds)
    assert clock.waits == waits and ticks == [100.0 + i for i in range(len(waits))]


def test_a_stop_ends_a_wait(monkeypatch):
    """In its second part here."""
    clock = Clock(stop_after=1)
    monkeypatch.setattr(waiting, "time", clock)
    with pytest.raises(Ended):
        Waiting(1.0, stopped=clock).wait(5.0)
    assert clock.waits == [1.0, 1.0]


def tried(monkeypatch, *outcomes, backoff=0.5):
    """Repeat a request with given outcomes, the last one repeatedly; return result and waits."""
    waits, left, asked = [], list(outcomes), []
    monkeypatch.setattr(Waiting, "wait", lambda self, seconds: waits.append(seconds))

    def ask():
        asked.append(1)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Failure):
            raise found
        return found

    try:
        return Waiting(backoff).tried(ask), waits, len(asked)
    except Failure as failure:
        return failure, waits, len(asked)


BUSY = Failure("busy", again=True)


def test_a_request_is_sent_at_most_six_times_with_doubled_delays(monkeypatch):
    """A success ends the repetitions."""
    assert tried(monkeypatch, BUSY) == (BUSY, [0.5, 1.0, 2.0, 4.0, 8.0], 6)
    assert tried(monkeypatch, BUSY, BUSY, "done") == ("done", [0.5, 1.0], 3)
    assert tried(monkeypatch, "done") == ("done", [], 1)


@pytest.mark.parametrize(("failure", "waits"), [
    (Failure("no"), []), (Failure("no", again=True, status=404), []),
    (Failure("no", again=True, status=405), []), (Failure("no", again=True, status=501), []),
    (Failure("no", again=True, status=503), [0.5, 1.0, 2.0, 4.0, 8.0]),
    (Failure("no", again=True, after=600.5), []),
    (Failure("no", again=True, after=3.0), [3.0, 3.0, 3.0, 4.0, 8.0]),
    (Failure("no", again=True, after=600.0), [600.0] * 5)])
def test_a_failure_is_repeated_if_it_may_succeed_soon(monkeypatch, failure, waits):
    """The endpoint's delay counts if it is longer, up to ten minutes."""
    assert tried(monkeypatch, failure) == (failure, waits, len(waits) + 1)


def test_a_delay_is_doubled_up_to_thirty_seconds():
    """The first repetition waits for the first delay."""
    assert [waiting.pause(0.5, n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert waiting.pause(0.0, 3) == 0.0


def test_threads_are_joined_for_ten_seconds_in_total(monkeypatch):
    """Later threads get the time that is left."""
    clock, given = Clock(), []
    monkeypatch.setattr(waiting, "time", clock)

    def thread(used):
        def join(seconds):
            given.append(seconds)
            clock.now += used

        return SimpleNamespace(join=join)

    waiting.join([thread(used) for used in (3.0, 8.0, 0.0)])
    assert given == [10.0, 7.0, 0.0]


@pytest.mark.parametrize(("text", "wanted"), [
    ("5$", Budget(usd=5.0)), ("$ 1,000.50", Budget(usd=1000.5)), ("0calls", Budget(calls=0)),
    (" 7 CALLS ", Budget(calls=7)), ("999999999999calls", Budget(calls=999999999999)),
    ("1000000000000 0calls", None), ("1234567890usd", None), ("$5usd", None), ("usd", None),
    ("5.usd", None)])
def test_a_budget_has_a_number_and_a_unit(text, wanted):
    """Commas and spaces are allowed, and numbers have a limited length."""
    if wanted is None:
        with pytest.raises(jp.UserError, match="give calls or USD, such as 500calls or 5usd"):
            Budget.parse(text)
    else:
        assert Budget.parse(text) == wanted


def test_a_budget_names_every_limit():
    texts = [str(Budget(calls=1000)), str(Budget(usd=5)), str(Budget(1000, 5.5)), str(Budget())]
    assert texts == ["1,000 calls", "$5.00", "1,000 calls and $5.50", "no limit"]


@pytest.mark.parametrize(("budget", "calls", "usd", "fine"), [
    (Budget(calls=5), 5, 1e9, True), (Budget(calls=5), 6, 0.0, False),
    (Budget(usd=0.3), 10**9, 0.1 + 0.2, True), (Budget(usd=0.3), 1, 0.3001, False),
    (Budget(calls=0), 1, 0.0, False), (Budget(), 10**9, 1e9, True)])
def test_a_budget_allows_its_own_amount(budget, calls, usd, fine):
    """A rounding error does not exceed it."""
    assert budget.allows(calls, usd) == fine


def test_the_settings_of_a_batch_include_their_ends():
    """One request, a million, and an hour between polls."""
    assert Batch(1).size == 1 and Batch(1_000_000).size == 1_000_000
    assert Batch(poll=3600).poll == 3600 and Batch(price=(0.0, 0.0)).price == (0.0, 0.0)
    for wrong, wanted in (({"size": 1_000_001}, "size is 1000001; give the maximum number"),
                          ({"poll": 3600.5}, "poll is 3600.5; give a number of seconds above 0"),
                          ({"price": (1.0, float("inf"))}, "price is")):
        with pytest.raises(jp.UserError, match=wanted):
            Batch(**wrong)


def test_an_unknown_price_costs_nothing():
    """A known one is in USD per million tokens."""
    assert Tariff(None, 10).bound("abc") == Tariff(None, 10).usd(5, 5) == 0.0
    assert Tariff((2.0, 3.0), 10).usd(1_000_000, 500_000) == 3.5
    # two bytes for é and three for a lone surrogate, 64 of the template, 10 of the answer
    assert Tariff((2.0, 3.0), 10).bound("é\ud800") == pytest.approx((69 * 2 + 30) / 1e6)
