"""The batch interface of an endpoint: outcomes, faults, budgets and the journal."""

from __future__ import annotations

import json
import threading
import time

import fake_batches
import fake_endpoint as fake
import pytest
from asking import KEY, ROLE, batch_judge, items, prompt, scored, until_stopped

import jaxpersona as jp
from jaxpersona.cli.judges import check_cache
from jaxpersona.data.texts import Role
from jaxpersona.judges import endpoint, http
from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.judges.journal import Journal
from jaxpersona.judges.limits import Batch, Budget
from jaxpersona.judges.protocol import Item, in_order
from jaxpersona.persona.judging import Judging

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_verdicts_are_those_of_single_requests_and_are_paid_once(tmp_path):
    asked = [*items(50), Item("again", ROLE, "Who?", "Boo number 3.")]
    with fake.serving() as server:
        judge = batch_judge(server, tmp_path / "v.jsonl", size=20, price=(1.0, 2.0))
        found = in_order(judge, asked)
        scored(found, asked)
        assert server.batches.sizes == [20, 20, 10] and not server.times
        assert judge.journal.calls == 50 and judge.journal.spent == pytest.approx(server.spent)
        assert sum(v.cost for v in found) == pytest.approx(server.spent)
        assert judge.note() == f"calls: 50, cost: ${server.spent:,.4g}"
        judge.close()
        single = http.HttpJudge(Endpoint("judge-1", url=server.url), tmp_path / "v.jsonl",
                                price=(1.0, 2.0))
        assert single.name == judge.name and in_order(single, asked) == found
        single.close()
        again = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        assert in_order(again, asked) == found
        assert set(server.sold.values()) == {1} and not server.times
        scored(in_order(again, items(60, 50)), items(60, 50))  # only the new ones
        assert server.batches.sizes[3:] == [10]
    assert server.keys == {KEY}


def test_each_fault_of_a_result_is_handled_as_that_of_a_single_request(tmp_path):
    """Failed items get an error and are sent again in the next call; undecided ones are not."""
    asked = items(60)
    kinds = dict(zip(map(prompt, asked), [*fake_batches.KINDS, "", ""] * 6, strict=False))
    with fake.serving() as server:
        server.batches.fault = lambda text: kinds.get(text, "")
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        found = in_order(judge, asked)
        wanted = {"400": "HTTP 400: request of [key]", "500": "HTTP 500: request of [key]",
                  "shape": "is not a chat completion", "garbage": "no result for this reply",
                  "missing": "no result for this reply", "unknown": "no result for this reply",
                  "nameless": "no result for this reply"}
        spent = 0.0
        for item, verdict in zip(asked, found, strict=True):
            text, kind = prompt(item), kinds.get(prompt(item), "")
            paid = (len(text) // 4 + 2) / 1e6
            if kind in wanted:
                assert wanted[kind] in verdict.error and verdict.score is None
                # a request without a readable result may be paid: it counts with its bound
                spent += 0.0 if kind.isdigit() else (len(text) + 64 + 20) / 1e6
            elif kind in ("talk", "range"):
                assert verdict.error is None and verdict.score is None and verdict.raw
                spent += paid
            else:
                assert verdict.score == fake.score(text)
                spent += paid
        assert judge.journal.spent == pytest.approx(spent) and judge.journal.calls == 60
        assert judge.failed == sum(kind in wanted for kind in kinds.values())
        server.batches.fault = lambda _: ""
        second = in_order(judge, asked)  # the same judge
        judge.close()
    for before, after in zip(found, second, strict=True):
        assert after == before or before.error is not None
    assert all(v.error is None for v in second)
    assert server.batches.sizes == [60, sum(kind in wanted for kind in kinds.values())]
    text = (tmp_path / "v.jsonl").read_text()
    assert KEY not in text + repr(found) and "[key]" in text


def test_the_first_of_two_results_counts(tmp_path):
    with fake.serving() as server:
        server.batches.double = True
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
    assert (tmp_path / "v.jsonl").read_text().count('"said"') == 30


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_the_rest_of_a_batch_that_ended_early_is_sent_in_the_next_call(tmp_path, status):
    with fake.serving() as server:
        server.batches.status, server.batches.processed = status, 7
        judge = batch_judge(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
        found = in_order(judge, items(30))
        scored(found[:7], items(7))
        assert all(("batch_expired" if status == "expired" else "status: cancelled") in v.error
                   for v in found[7:])
        assert judge.journal.spent == pytest.approx(server.spent)  # the others cost nothing
        judge.close()
        server.batches.status = "completed"
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
    assert server.batches.sizes == [30, 23] and set(server.sold.values()) == {1}


def test_a_refused_batch_stops_the_judge_and_does_not_count(tmp_path):
    with fake.serving() as server:
        server.batches.status = "failed"
        judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=30))
        found, why = until_stopped(judge, items(30))
        assert "the batch batch_0 failed (invalid_request: [key] is not allowed)" in why
        assert not found and judge.journal.calls == 0
        judge.close()
        server.batches.status = "completed"
        again = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=30))
        scored(in_order(again, items(30)), items(30))


def test_a_batch_without_any_answer_stops_the_judge(tmp_path):
    with fake.serving() as server:
        server.batches.fault = lambda _: "400"
        found, why = until_stopped(batch_judge(server, tmp_path / "v.jsonl"), items(20))
        assert not found and "all requests of the batch batch_0 failed (last error: HTTP 400" in why
        found = in_order(batch_judge(server, tmp_path / "w.jsonl"), items(19))
        assert all("HTTP 400" in verdict.error for verdict in found)


def test_a_batch_that_exceeds_the_queue_of_the_endpoint_waits_for_the_others(tmp_path, monkeypatch):
    """The endpoint refuses a second batch while the first one is unfinished."""
    kept = fake_batches.Batches._process

    def process(self, server, batch):
        first = min(self.batches.values(), key=lambda one: one["status"] != "in_progress")
        self.status = "completed" if first is batch else "failed"
        kept(self, server, batch)

    monkeypatch.setattr(fake_batches.Batches, "_process", process)
    with fake.serving() as server:
        server.batches.problem = "token_limit_exceeded"
        judge = batch_judge(server, tmp_path / "v.jsonl", size=10)
        polled = server.batches._polled
        # the second batch is processed before the first one
        monkeypatch.setattr(server.batches, "_polled", lambda s, batch: polled(
            s, batch | {"polls": 5} if batch["id"] == "batch_0" and batch["polls"] > 3 else batch))
        scored(in_order(judge, items(20)), items(20))
        judge.close()
    with fake.serving() as server:
        server.batches.problem = "token_limit_exceeded"
        monkeypatch.setattr(fake_batches.Batches, "_process", kept)
        server.batches.status = "failed"
        _, why = until_stopped(batch_judge(server, tmp_path / "w.jsonl"), items(20))
        assert "give a smaller --judge-batch-size" in why


def test_a_model_that_wants_another_field_of_the_limit_gets_it(tmp_path):
    with fake.serving() as server:
        server.batches.wants_other_length = True
        judge = batch_judge(server, tmp_path / "v.jsonl", size=20, budget=Budget(calls=30))
        scored(in_order(judge, items(30)), items(30))
        assert judge.journal.calls == 30  # the refused requests are no calls
        judge.close()
        assert Journal(tmp_path / "v.jsonl").calls == 30
        assert server.batches.sizes == [20, 10, 20, 10]
        assert all(b"max_completion_tokens" in server.batches.files[
            server.batches.batches[f"batch_{i}"]["input_file_id"]] for i in (2, 3))


@pytest.mark.parametrize(("path", "status"), [("/files", 404), ("/batches", 404), ("/files", 405)])
def test_an_endpoint_without_batches_is_named_with_the_fix(tmp_path, path, status):
    with fake.serving() as server:
        server.batches.refused[path] = status
        judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=30))
        found, why = until_stopped(judge, items(30))
        assert not found and f"does not offer batches (HTTP {status}); omit --judge-batch" in why
        assert "\n" not in why and KEY not in why and judge.journal.calls == 0
        judge.close()
        single = http.HttpJudge(Endpoint("judge-1", url=server.url), tmp_path / "v.jsonl",
                                budget=Budget(calls=30))
        scored(in_order(single, items(30)), items(30))


def test_a_budget_in_calls_is_checked_before_a_batch_is_sent(tmp_path):
    with fake.serving() as server:
        for limit, sizes in ((12, [12]), (12, [12]), (20, [12, 8])):
            judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=limit))
            found, why = until_stopped(judge, items(30))
            judge.close()
            assert f"the budget of {limit} calls is used up (calls: {limit})" in why
            assert len(found) == limit and server.batches.sizes == sizes
        judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(calls=30))
        scored(in_order(judge, items(30)), items(30))
    assert set(server.sold.values()) == {1}


def test_a_budget_in_money_is_used_in_several_batches(tmp_path):
    """The bounds of a batch are reserved; what its answers did not cost is used afterwards."""
    asked = items(80)
    with fake.serving() as server:
        server.price = (0.5, 1.0)
        each = (len(prompt(asked[0])) // 4 * 0.5 + 1.0) / 1e6
        judge = batch_judge(server, tmp_path / "v.jsonl", budget=Budget(usd=40.5 * each),
                         price=(1.0, 2.0), batch_price=(0.5, 1.0))
        found, why = until_stopped(judge, asked)
        assert "does not fit into the budget" in why and len(server.batches.sizes) > 2
        assert 40.5 * each >= server.spent == pytest.approx(judge.journal.spent)
        assert server.spent > 25 * each and len(found) == sum(server.sold.values())
    with pytest.raises(jp.UserError, match="needs the price"):
        batch_judge(server, tmp_path / "w.jsonl", budget=Budget(usd=1.0))


@pytest.mark.parametrize(("settings", "wanted"), [
    ({"size": 0}, "size is 0; give"), ({"size": True}, "size is True"),
    ({"poll": 0.0}, "poll is 0.0"), ({"poll": float("nan")}, "poll is nan"),
    ({"price": (1.0, float("nan"))}, "price is"), ({"price": (-1.0, 0.0)}, "price is")])
def test_settings_out_of_range_are_refused(settings, wanted):
    with pytest.raises(jp.UserError, match=wanted):
        Batch(**settings)


def test_the_items_of_all_roles_share_their_batches(tmp_path):
    """`prepare` is called with the items of all roles, and ticks; `score` sends nothing more."""
    other = Role("baker", ("Be a baker.",), ROLE.eval_prompt)
    more = [Item(item.key, other, "Who?", item.answer + "!") for item in items(20)]
    ticks = []
    with fake.serving() as server:
        server.batches.polls = 4
        server.batches.fault = lambda text: "400" if "number 7" in text else ""
        judge = batch_judge(server, tmp_path / "v.jsonl")
        judge.prepare(lambda: iter([*items(20), *more]), lambda: ticks.append(judge.note()))
        assert server.batches.sizes == [40] and len(ticks) >= 4
        assert any("batch batch_0: 0 of 40 (in_progress)" in note for note in ticks)
        for asked in (items(20), more):
            found = in_order(judge, asked)
            assert [v.error is not None for v in found] == [i == 7 for i in range(20)]
        assert server.batches.sizes == [40] and judge.note() == "calls: 40, failed: 2"


def test_a_journal_in_use_is_noticed_before_anything_is_generated(tmp_path):
    held = Journal(tmp_path / "v.jsonl")
    with fake.serving() as server:
        judge = batch_judge(server, tmp_path / "v.jsonl")
        with pytest.raises(jp.UserError, match="is in use by another judge or process"):
            Judging(judge, alone=True)
        with pytest.raises(jp.UserError, match="is in use by another judge or process"):
            check_cache(judge)
        held.close()
        check_cache(judge)
        judge.close()
        new = batch_judge(server, tmp_path / "new.jsonl")
        check_cache(new)
        assert not new.path.exists()  # a new file would be in the folder of the run
        Judging(new, alone=True)
        assert new.path.exists()
        new.close()


def test_a_file_with_results_has_a_limited_size(tmp_path, monkeypatch):
    with fake.serving() as server:
        monkeypatch.setattr(endpoint, "RESULT_BYTES", 1000)
        found, why = until_stopped(batch_judge(server, tmp_path / "v.jsonl"), items(30))
        assert not found and "a file with results has more than 1,000 bytes; give a smaller" in why
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(30)), items(30))
    assert server.batches.sizes == [30]


def test_verdicts_are_those_of_a_model_at_any_url(tmp_path):
    """The key of a request omits the URL: a model keeps its verdicts if its server moves."""
    with fake.serving() as one, fake.serving() as two:
        first = batch_judge(one, tmp_path / "v.jsonl")
        found = in_order(first, items(5))
        first.close()
        again = batch_judge(two, tmp_path / "v.jsonl")
        assert in_order(again, items(5)) == found and not two.batches.sizes


def test_closing_ends_the_wait_and_the_batch_stays_in_the_journal(tmp_path):
    with fake.serving() as server:
        server.batches.polls = 10**6
        judge = batch_judge(server, tmp_path / "v.jsonl", poll=0.05)
        out = []
        thread = threading.Thread(target=lambda: out.append(until_stopped(judge, items(5))))
        thread.start()
        while not any(path == "/batches/batch_0" for _, path in server.batches.asked):
            time.sleep(0.005)
        judge.close()
        thread.join(20)
        assert out[0][0] == [] and "it was closed before" in out[0][1]
        held = Journal(tmp_path / "v.jsonl")
        assert [one.id for one in held.batches.values()] == ["batch_0"] and held.calls == 5
        held.close()
        single = http.HttpJudge(Endpoint("judge-1", url=server.url), tmp_path / "v.jsonl")
        found, why = until_stopped(single, items(5))  # a request of a batch is not sent singly
        assert not found and "the unfinished batch batch_0; add --judge-batch" in why
        assert not server.times
        single.close()
        server.batches.batches["batch_0"]["polls"] = 1
        scored(in_order(batch_judge(server, tmp_path / "v.jsonl"), items(5)), items(5))
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert lines[1]["id"] == "" and lines[-1]["ended"] == "completed"
