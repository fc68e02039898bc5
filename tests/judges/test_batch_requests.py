"""Batches of requests with an endpoint in memory: their sizes, delays, notes and records."""

from __future__ import annotations

import json

import pytest

from jaxpersona.judges import batch as module
from jaxpersona.judges.batch import Batches
from jaxpersona.judges.endpoint import BatchState, Failure, Reply
from jaxpersona.judges.journal import LINE_BYTES, Journal
from jaxpersona.judges.limits import Batch, Budget, Tariff
from jaxpersona.judges.waiting import Waiting


class Memory:
    """An endpoint whose batches end after `polls` requests for their state.

    Attributes:
      faults: failures of the next requests for a state.
      said: key → outcome of its request; others are answered with "3".
    """

    url, length = "http://h/v1", "max_tokens"

    def __init__(self, polls=1):
        self.polls, self.faults, self.said, self.files, self.left = polls, [], {}, {}, {}

    def request(self, key, prompt):
        return f"{key}\n".encode()

    def upload(self, name, lines):
        self.files[name] = lines
        return name

    def submit(self, name, file):
        self.left[name] = self.polls
        return BatchState(name, "validating", total=self.files[name].count(b"\n"))

    def batch(self, name):
        if self.faults:
            raise self.faults.pop(0)
        self.left[name] -= 1
        if self.left[name] > 0:
            return BatchState(name, "in_progress")
        return BatchState(name, "completed", files=(name,))

    def download(self, file):
        return self.files[file]

    def outcome(self, line):
        key = line.decode()
        return key, self.said.get(key, Reply("3", 10, 1))


@pytest.fixture
def waits(monkeypatch):
    """The delays between requests for the states."""
    seen = []
    monkeypatch.setattr(Waiting, "wait", lambda self, seconds: seen.append(seconds))
    return seen


def send(tmp_path, endpoint, keys, *, budget=None, name="v.jsonl", **settings):
    """Send requests in batches; return the batches and the closed journal."""
    sender = Batches(Batch(**settings), endpoint, Tariff((1.0, 2.0), 10), budget or Budget(), 0.5)
    journal = Journal(tmp_path / name)
    sender.run(journal, lambda: [(key, f"prompt {key}") for key in keys])
    journal.close()
    return sender, journal


@pytest.mark.parametrize(("polls", "poll", "wanted"), [
    (1, 60.0, []), (6, 60.0, [5.0, 7.5, 11.25, 16.875, 25.3125]), (5, 8.0, [5.0, 7.5, 8.0, 8.0]),
    (3, 2.0, [2.0, 2.0])])
def test_the_delays_between_polls_grow_up_to_their_limit(tmp_path, waits, polls, poll, wanted):
    """The first is five seconds or the limit."""
    _, journal = send(tmp_path, Memory(polls), ["a"], poll=poll)
    assert waits == wanted and journal.get("a") == ("3", 12e-6)


def test_a_delay_that_the_endpoint_requests_is_kept(tmp_path, waits):
    """Ten minutes are the longest; the next delay is the usual one."""
    endpoint = Memory(1)
    endpoint.faults = [Failure("busy", again=True, after=600.0), Failure("busy", again=True)]
    sender, journal = send(tmp_path, endpoint, ["a"])
    assert waits == [600.0, 7.5] and not sender.why and journal.get("a") is not None
    endpoint.faults = [Failure("busy", again=True, after=600.5)]
    sender, _ = send(tmp_path, endpoint, ["b"], name="w.jsonl")
    assert sender.why.startswith("the endpoint does not return the batch ") and "busy" in sender.why


@pytest.mark.parametrize("failure", [Failure("gone"), Failure("key", again=True, fatal=True)])
def test_a_permanent_failure_ends_the_wait_at_once(tmp_path, waits, failure):
    """The batch stays in the journal for the next call."""
    endpoint = Memory(1)
    endpoint.faults = [failure]
    sender, journal = send(tmp_path, endpoint, ["a"])
    assert f"({failure}); check the endpoint" in sender.why and not waits
    assert len(journal.batches) == 1


@pytest.mark.parametrize(("largest", "sizes"), [(8, [4, 3]), (7, [3, 3, 1]), (2, [1] * 7),
                                                (1, [1] * 7)])
def test_a_file_with_requests_has_a_limited_size(tmp_path, waits, monkeypatch, largest, sizes):
    """Seven lines of two bytes; a line that is too long has its own file."""
    monkeypatch.setattr(module, "FILE_BYTES", largest)
    endpoint = Memory()
    send(tmp_path, endpoint, "abcdefg")
    assert [lines.count(b"\n") for lines in endpoint.files.values()] == sizes
    assert module.Batch().size == 50_000


def test_the_number_of_requests_in_a_batch_is_limited(tmp_path, waits):
    """Equal keys are sent once."""
    endpoint = Memory()
    _, journal = send(tmp_path, endpoint, "abacdcbefg", size=3)
    assert list(endpoint.files.values()) == [b"a\nb\nc\n", b"d\ne\nf\n", b"g\n"]
    assert journal.calls == 7


def test_the_note_sums_all_outstanding_batches(tmp_path):
    """One batch has its identifier, and the statuses are listed once."""
    sender = Batches(Batch(), Memory(), Tariff(None, 10), Budget(), 0.5)
    assert sender.note() == ""
    sender._states = {"x": BatchState("b1", "validating", 0, 1000)}
    assert sender.note() == "batch b1: 0 of 1,000 (validating)"
    sender._states |= {"y": BatchState("b2", "in_progress", 1234, 2000),
                       "z": BatchState("b3", "in_progress", 1, 1)}
    assert sender.note() == "3 batches: 1,235 of 3,001 (in_progress, validating)"


def test_a_failed_request_is_recorded_at_its_bound_if_it_may_be_paid(tmp_path, waits):
    """A result that is missing in a completed batch may be paid, too."""
    endpoint = Memory()
    endpoint.said = {"a": Failure("no"), "b": Failure("lost", maybe_paid=True), "c": Reply("2")}
    endpoint.download = lambda file: b"a\nb\nc\nunknown\n\n"
    sender, journal = send(tmp_path, endpoint, "abcd")
    bound = (len("prompt b") + 64 + 2 * 10) / 1e6
    assert journal.calls == 4 and journal.spent == pytest.approx(3 * bound)  # b, c and d
    missing = "the batch has no result for this reply (status: completed)"
    assert sender.failures == {"a": "no", "b": "lost", "d": missing} and not sender.why
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [line["unsent"] for line in lines if "ended" in line] == [0]


def test_a_request_with_a_failure_is_not_sent_again_in_a_call(tmp_path, waits):
    """A later batch of the same call does not contain it."""
    endpoint = Memory()
    endpoint.said = {"a": Failure("no")}
    sender, _ = send(tmp_path, endpoint, "ab")
    journal = Journal(tmp_path / "v.jsonl")
    sender.run(journal, lambda: [("a", "p"), ("c", "p")])
    journal.close()
    assert list(endpoint.files.values()) == [b"a\nb\n", b"c\n"]


def test_a_budget_counts_the_requests_of_the_batch_that_is_filled(tmp_path, waits):
    """Three bounds fit; what they did not cost allows one more request, and so on."""
    endpoint = Memory()
    bound = (len("prompt a") + 64 + 20) / 1e6
    sender, journal = send(tmp_path, endpoint, "abcdefgh", budget=Budget(usd=3 * bound))
    assert list(endpoint.files.values())[0] == b"a\nb\nc\n"
    assert journal.spent == pytest.approx(8 * 12e-6) and not sender.why  # all were sent
    sender, journal = send(tmp_path, endpoint, "abc", budget=Budget(calls=2), name="w.jsonl")
    assert journal.calls == 2 and "the budget of 2 calls is used up (calls: 2" in sender.why


def test_a_journal_knows_the_batch_of_each_open_request(tmp_path):
    """An answer or the end of the batch removes a request from it; a reader finds the same."""
    held = Journal(tmp_path / "v.jsonl")
    held.intended("b", "u")
    held.sent("k1", 0.5, "b")
    held.sent("k2", 0.25, "b")
    held.sent("k3", 1.0)
    one = held.batch_of("k1")
    assert (one.name, one.id, one.url, one.members) == ("b", "", "u", {"k1", "k2"})
    assert one.open == {"k1": 0.5, "k2": 0.25} and held.batch_of("k3") is None
    held.accepted("b", "id-1", "u2")
    held.answered("k1", "3", 0.125)
    assert held.batch_of("k1") is None and one.open == {"k2": 0.25}
    held.close()
    held = Journal(tmp_path / "v.jsonl")
    one = held.batch_of("k2")
    assert (one.id, one.url, one.open, one.members) == ("id-1", "u2", {"k2": 0.25}, {"k1", "k2"})
    assert (held.calls, held.spent) == (3, 0.125 + 0.25 + 1.0)
    held.ended("b", "expired", 1)
    assert held.batch_of("k2") is None and not held.batches and held.calls == 2
    held.close()


def test_a_line_of_a_journal_may_have_the_largest_size(tmp_path):
    """It is written and read."""
    held = Journal(tmp_path / "new" / "folder" / "v.jsonl")
    frame = len(json.dumps({"key": "k", "said": "", "cost": 0.0})) + 1
    held.answered("k", "3" * (LINE_BYTES - frame), 0.0)
    held.close()
    held = Journal(held.path)
    assert len(held.get("k")[0]) == LINE_BYTES - frame
    held.close()
