"""A process that is killed with an outstanding batch continues it, and pays for nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import fake_endpoint as fake
import judging
import numpy as np
import pytest
from asking import ROLE, batch_judge, items, scored, until_stopped

from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.judges.journal import Journal
from jaxpersona.judges.limits import Budget
from jaxpersona.judges.protocol import in_order

pytest.importorskip("openai")
assert ROLE.eval_prompt


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")


class Killed(BaseException):
    """Stands for the end of the process."""


def dies(*_args, **_kwargs):
    raise Killed


def killed(server, path, monkeypatch, owner, name, count=30):
    """Judge until a method is called, which ends the process."""
    judge = batch_judge(server, path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            in_order(judge, items(count))
    judge.close()


@pytest.mark.parametrize(("owner", "name", "sizes"), [
    (Endpoint, "upload", [35]), (Endpoint, "submit", [35]), (Journal, "accepted", [30, 5]),
    (Endpoint, "batch", [30, 5]), (Endpoint, "download", [30, 5]), (Journal, "answered", [30, 5]),
    (Journal, "ended", [30, 5])])
def test_a_batch_is_found_again_after_a_kill_at_any_step(tmp_path, monkeypatch, owner, name, sizes):
    with fake.serving() as server:
        for _ in range(1 if name == "ended" else 2):
            killed(server, tmp_path / "v.jsonl", monkeypatch, owner, name)
        judge = batch_judge(server, tmp_path / "v.jsonl")
        scored(in_order(judge, items(35)), items(35))
        assert judge.journal.calls == 35 and not judge.journal.batches
    assert set(server.sold.values()) == {1} and server.batches.sizes == sizes


def test_a_kill_between_two_records_of_outcomes_loses_none(tmp_path, monkeypatch):
    kept, left = Journal.answered, [11]

    def answered(self, *args, **about):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        kept(self, *args, **about)

    with fake.serving() as server:
        server.batches.fault = lambda text: "400" if "number 2." in text else ""
        judge = batch_judge(server, tmp_path / "v.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "answered", answered)
            with pytest.raises(Killed):
                in_order(judge, items(30))
        judge.close()
        server.batches.fault = lambda _: ""
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
    # the failed request was recorded before the kill, and is sent again in the next call
    assert server.batches.sizes == [30, 1] and set(server.sold.values()) == {1}


def test_a_batch_whose_acceptance_is_unknown_is_searched_by_its_name(tmp_path):
    with fake.serving() as server:
        server.batches.lost = 1  # the endpoint accepts the batch and answers with status 500
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
        assert server.batches.sizes == [30]


def test_a_lost_batch_of_an_endpoint_that_does_not_list_counts_with_its_bound(tmp_path,
                                                                              monkeypatch):
    with fake.serving() as server:
        server.batches.lost = 1
        server.batches.refused["!/batches"] = 500  # GET
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        found, why = until_stopped(judge, items(30))
        assert not found and "it is unknown whether the endpoint accepted a batch" in why
        bound = judge.journal.spent
        judge.close()
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        found, why = until_stopped(judge, items(30))
        assert not found and "did not list its batches" in why and server.batches.sizes == [30]
        judge.close()
        monkeypatch.setattr(Endpoint, "find_batch", lambda self, name: _absent())
        server.batches.refused.clear()
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        scored(in_order(judge, items(30)), items(30))
        assert judge.journal.calls == 60 and bound > 0
        assert judge.journal.spent == pytest.approx(bound + server.spent)
    assert server.batches.sizes == [30, 30]


def _absent():
    from jaxpersona.judges.endpoint import Failure

    raise Failure("HTTP 404", status=404)


def test_a_batch_of_another_endpoint_or_key_is_not_sent_again(tmp_path, monkeypatch):
    with fake.serving() as server, fake.serving() as other:
        killed(server, tmp_path / "v.jsonl", monkeypatch, Endpoint, "batch")
        found, why = until_stopped(batch_judge(other, tmp_path / "v.jsonl"), items(30))
        assert not found and f"batch_0 was sent to {server.url}; give this URL with" in why
        kept = server.batches.batches.copy()
        server.batches.batches.clear()
        found, why = until_stopped(batch_judge(server, tmp_path / "v.jsonl"), items(30))
        assert not found and "does not return the batch batch_0" in why and "--judge-cache" in why
        server.batches.batches |= kept
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
    assert server.batches.sizes == [30] and not other.batches.sizes


def test_an_outstanding_batch_is_continued_although_the_budget_is_used_up(tmp_path, monkeypatch):
    with fake.serving() as server:
        killed(server, tmp_path / "v.jsonl", monkeypatch, Endpoint, "batch", 10)
        judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=10))
        found, why = until_stopped(judge, [*items(12, 10), *items(10)])
        scored(found, items(10))
        assert "the budget of 10 calls is used up" in why and server.batches.sizes == [10]


def test_files_that_the_endpoint_deleted_are_failures(tmp_path, monkeypatch):
    with fake.serving() as server:
        killed(server, tmp_path / "v.jsonl", monkeypatch, Endpoint, "download", 10)
        server.batches.deleted = True
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        found = in_order(judge, items(10))
        assert all("no result for this reply" in v.error for v in found)
        server.batches.deleted = False
        scored(in_order(judge, items(10)), items(10))


def test_a_busy_endpoint_is_asked_again(tmp_path, monkeypatch):
    from jaxpersona.judges import batch

    with fake.serving() as server:
        server.batches.polls = 3
        kept, asked = server.batches._polled, []

        def polled(of, one):
            asked.append(one)
            if len(asked) == 2:
                server.batches.refused["!/batches"] = 503
                raise ConnectionResetError
            return kept(of, one)

        monkeypatch.setattr(server.batches, "_polled", polled)
        monkeypatch.setattr(batch, "IN_A_ROW", 4)
        found, why = until_stopped(batch_judge(server, tmp_path / "v.jsonl"), items(5))
        assert not found and "does not return the batch batch_0 (HTTP 503" in why
        server.batches.refused.clear()
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(5)), items(5))
    assert server.batches.sizes == [5]


def test_only_failures_in_a_row_end_the_wait_for_a_batch(tmp_path, monkeypatch):
    from jaxpersona.judges import batch

    with fake.serving() as server:
        server.batches.polls = 4
        kept, asked = server.batches._polled, []

        def polled(of, one):
            asked.append(one)
            if len(asked) % 3:  # two of three requests fail
                raise ConnectionResetError
            return kept(of, one)

        monkeypatch.setattr(server.batches, "_polled", polled)
        monkeypatch.setattr(batch, "IN_A_ROW", 3)
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(5)), items(5))
    assert len(asked) == 12 and server.batches.sizes == [5]


@pytest.mark.parametrize("line", [
    '{"batch": "", "id": "x", "url": "u"}', '{"batch": 5, "id": "x", "url": "u"}',
    '{"batch": "a", "id": 5, "url": "u"}', '{"batch": "a", "id": "x"}', '{"batch": "a"}',
    '{"batch": "a", "ended": "x", "unsent": -1}', '{"batch": "a", "ended": "x", "unsent": 2.5}',
    '{"batch": "a", "ended": "x", "unsent": 99}', '{"sent": "k", "cost": 0, "batch": []}'])
def test_a_damaged_line_about_a_batch_is_refused(tmp_path, line):
    import jaxpersona as jp

    Journal(tmp_path / "v.jsonl").close()
    with (tmp_path / "v.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(jp.UserError, match="line 2 is damaged; delete this line"):
        Journal(tmp_path / "v.jsonl")


def start(url, folder):
    with (folder / "log").open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, judging.__file__, url, str(folder / "v.jsonl"),
             str(folder / "out.json"), "50"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENAI_API_KEY": "sk-1"}, stdout=sink,
            stderr=sink)


def check(tmp_path, moments):
    """Kill a process at each number of requests, then let it finish."""
    rng = np.random.default_rng(0)
    with fake.serving() as server:
        server.batches.polls = 10
        for moment in moments:
            process = start(server.url, tmp_path)
            end = time.monotonic() + 300
            while len(server.batches.asked) < moment and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        assert start(server.url, tmp_path).wait(300) == 0, (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "out.json").read_text())
    scores = [score for _, score, _ in found]
    assert scores == [fake.score(f"Asked: Who? Said: Boo number {i}. Grade 0-3.")
                      for i in range(judging.COUNT)]
    assert len(server.sold) == judging.COUNT and set(server.sold.values()) == {1}
    assert sum(server.batches.sizes) == judging.COUNT and not server.times


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    rng = np.random.default_rng(1)
    check(tmp_path, sorted(rng.integers(1, 60, 20).tolist()))
