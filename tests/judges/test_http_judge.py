"""The judge behind an endpoint, against one that fails at 30 % of the calls."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time

import asking
import fake_endpoint as fake
import pytest
from asking import KEY, ROLE, prompt, until_stopped

import jaxpersona as jp
from jaxpersona.judges import http
from jaxpersona.judges.limits import Budget
from jaxpersona.judges.protocol import Item, in_order

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


items = functools.partial(asking.items, prefix="pos_p0_q")
QUICK = tuple(kind for kind in fake.KINDS if kind != "slow")


def judge_of(server, path, *, timeout=20.0, **settings):
    settings = {"backoff": 0.005, "concurrency": 8} | settings
    from jaxpersona.judges.endpoint import Endpoint

    return http.HttpJudge(Endpoint("judge-1", url=server.url, timeout=timeout), path, **settings)


def test_every_reply_is_accounted_for_while_a_third_of_the_calls_fail(tmp_path, caplog, capfd):
    """Faults of eight kinds; the second run sends only what the first did not get."""
    caplog.set_level(logging.DEBUG)
    asked = items(120)
    with fake.serving(fake.some(0.3)) as server:
        server.slow = 8.0
        judge = judge_of(server, tmp_path / "verdicts.jsonl", timeout=3.0)
        found = in_order(judge, asked)
        judge.close()
        first = dict(server.asked)
        undecided = {prompt(i) for i in asked  # by the kind of the last request
                     if server.fault(prompt(i), first[prompt(i)] - 1) in ("talk", "range")}
        assert len(undecided) > 3
        for item, verdict in zip(asked, found, strict=True):
            text = prompt(item)
            if verdict.error is not None:
                assert verdict.score is None and first[text] == http.ATTEMPTS
            elif text in undecided:
                assert verdict.score is None and verdict.raw
            else:
                assert verdict.score == fake.score(text) == int(verdict.raw)
                assert verdict.refused == (verdict.score == 0)
        assert sum(first.values()) > 140  # many calls were repeated
        assert max(server.sold.values()) == 1
        calls = sum(first.values())

        again = judge_of(server, tmp_path / "verdicts.jsonl", timeout=3.0)
        second = in_order(again, asked)
        assert again.journal.calls == sum(server.asked.values())
        again.close()
        for before, after in zip(found, second, strict=True):
            assert after.score == before.score or before.error is not None
        resent = {text for text, n in server.asked.items() if n > first[text]}
        assert resent == {prompt(i) for i, v in zip(asked, found, strict=True) if v.error}
        assert max(server.sold.values()) == 1
        assert sum(server.asked.values()) >= calls
    assert server.keys == {KEY}
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    said = capfd.readouterr()
    for text in (written, caplog.text, said.out, said.err, repr(judge), repr(judge.endpoint),
                 "".join(map(repr, found))):
        assert KEY not in text
    assert "[key]" in written  # the endpoint did repeat it


def test_a_key_is_in_no_message_of_a_stop(tmp_path):
    with fake.serving(lambda *_: "401") as server:
        found, why = until_stopped(judge_of(server, tmp_path / "v.jsonl"), items(40))
    assert not found and "rejects the API key" in why and KEY not in why and "\n" not in why
    assert len(server.times) <= 8  # those that were under way


def test_too_many_failures_in_a_row_stop_the_run_and_keep_everything(tmp_path):
    """30 replies get verdicts; then the endpoint breaks."""
    asked = items(200)
    with fake.serving() as server:
        server.fault = lambda *_: "500" if sum(server.sold.values()) >= 30 else ""
        judge = judge_of(server, tmp_path / "v.jsonl")
        found, why = until_stopped(judge, asked)
        judge.close()
        good = [v for v in found if v.error is None]
        bad = [v for v in found if v.error is not None]
        assert 30 <= len(good) <= 38 and http.IN_A_ROW <= len(bad) <= http.IN_A_ROW + 8
        assert "in a row" in why and "HTTP 500" in why and str(tmp_path / "v.jsonl") in why
        server.fault = lambda *_: ""
        before = len(server.times)
        rest, why = until_stopped(judge_of(server, tmp_path / "v.jsonl"), asked)
    assert len(rest) == 200 and not why and all(v.error is None for v in rest)
    assert len(server.times) - before == 200 - len(good)
    assert max(server.sold.values()) == 1


@pytest.mark.parametrize(("settings", "wanted"), [
    ({"backoff": -1.0}, "backoff is -1.0"), ({"backoff": float("nan")}, "backoff is nan"),
    ({"price": (1.0, -2.0)}, "price is"), ({"price": (float("inf"), 1.0)}, "price is"),
    ({"concurrency": 0}, "concurrency is 0"),
])
def test_settings_out_of_range_are_refused(tmp_path, settings, wanted):
    with fake.serving() as server, pytest.raises(jp.UserError, match=wanted):
        judge_of(server, tmp_path / "v.jsonl", **settings)


def test_a_success_between_failures_does_not_stop_the_run(tmp_path):
    """Every third prompt fails on every attempt: 30 failures, never 20 in a row."""
    asked = items(90)
    bad = {prompt(item) for item in asked[::3]}
    with fake.serving(lambda text, _: "500" if text in bad else "") as server:
        judge = judge_of(server, tmp_path / "v.jsonl", concurrency=1)
        found, why = until_stopped(judge, asked)
        judge.close()
    assert not why and len(found) == 90
    assert sum(verdict.error is not None for verdict in found) == 30 > http.IN_A_ROW


def test_the_budget_in_calls_is_kept_over_all_runs(tmp_path):
    """Also by requests that fail; a larger budget goes on."""
    asked = items(60)
    with fake.serving(fake.some(0.3, QUICK)) as server:
        for limit in (40, 40, 55):
            judge = judge_of(server, tmp_path / "v.jsonl", budget=Budget(calls=limit))
            found, why = until_stopped(judge, asked)
            judge.close()
            assert len(server.times) == limit
            assert f"the budget of {limit} calls is used" in why and "--budget" in why
            assert len({v.key for v in found}) == len(found) >= sum(server.sold.values())
        judge = judge_of(server, tmp_path / "v.jsonl", budget=Budget(calls=10_000))
        found, why = until_stopped(judge, asked)
        assert len(found) == 60 and not why
        assert max(server.sold.values()) == 1
        assert judge.note().startswith(f"calls: {len(server.times):,}")


def test_the_budget_in_money_is_kept_and_used(tmp_path):
    """Bounds of the requests under way are reserved, and given back when they were cheaper."""
    asked = items(80)
    each = (len(prompt(asked[0])) // 4 * 1.0 + 1 * 2.0) / 1e6  # the endpoint's price
    with fake.serving(fake.some(0.1, ("500", "429", "talk"))) as server:
        judge = judge_of(server, tmp_path / "v.jsonl", budget=Budget(usd=30.5 * each),
                         price=server.price)
        found, why = until_stopped(judge, asked)
        assert server.spent <= 30.5 * each and "does not fit into the budget of $0.00" in why
        assert judge.journal.spent == pytest.approx(server.spent)
        assert sum(v.cost for v in found) == pytest.approx(server.spent)
        # the last bound did not fit: it is at most a few times the cost of a request
        assert server.spent > 30.5 * each - 12 * each
    with pytest.raises(jp.UserError, match="needs the price"):
        judge_of(server, tmp_path / "v.jsonl", budget=Budget(usd=1.0))


def test_a_retry_after_holds_all_requests(tmp_path):
    def fault(prompt, number):
        return "429" if "number 3." in prompt and number == 0 else ""

    with fake.serving(fault) as server:
        server.after = "0.5"
        judge = judge_of(server, tmp_path / "v.jsonl", concurrency=2)
        found = in_order(judge, items(20))
        at = sorted(server.times)
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
    assert all(v.error is None for v in found) and len(at) == 21
    assert max(gaps) >= 0.4 and at[-1] - at[0] >= 0.5
    with fake.serving(lambda *_: "429") as server:
        server.after = "86400"
        _, why = until_stopped(judge_of(server, tmp_path / "w.jsonl"), items(20))
        assert "requests a delay of 86,400 s" in why and len(server.times) <= 8


def test_the_rate_of_requests_is_kept_also_by_repeated_ones(tmp_path):
    with fake.serving(fake.some(0.3, ("500", "429"))) as server:
        server.after = "0.001"
        in_order(judge_of(server, tmp_path / "v.jsonl", rpm=1500), items(24))
        at = sorted(server.times)
    assert len(at) > 28
    assert at[-1] - at[0] >= (len(at) - 1) * 0.04 - 0.05


def test_equal_texts_are_paid_once_and_the_model_and_settings_matter(tmp_path):
    from jaxpersona.judges.endpoint import Endpoint

    twice = [Item("a", ROLE, "Who?", "Boo."), Item("b", ROLE, "Who?", "Boo.")]
    with fake.serving() as server:
        def ask(model="judge-1", **more):
            judge = http.HttpJudge(Endpoint(model, url=server.url, **more), tmp_path / "v.jsonl")
            found = in_order(judge, twice)
            judge.close()
            return found

        first = ask()
        assert [v.key for v in first] == ["a", "b"] and len(server.times) == 1
        assert ask() == first and len(server.times) == 1
        ask("judge-2")
        ask(temperature=1.0)
        assert len(server.times) == 3


def test_the_cost_of_an_answer_to_equal_texts_is_counted_once(tmp_path):
    twice = [Item("a", ROLE, "Who?", "Boo."), Item("b", ROLE, "Who?", "Boo.")]
    with fake.serving() as server:
        for _ in range(2):  # the second time, the answer comes from the journal
            judge = judge_of(server, tmp_path / "v.jsonl", price=(1.0, 2.0))
            first, second = in_order(judge, twice)
            spent = judge.journal.spent
            assert spent > 0 and (first.cost, second.cost) == (pytest.approx(spent), 0.0)
            judge.close()


def test_requests_run_at_the_same_time_and_an_abandoned_run_keeps_its_answers(tmp_path):
    """The consumer stops after one verdict; the answers under way are in the file."""
    with fake.serving() as server:
        server.pause = 0.2
        judge = judge_of(server, tmp_path / "v.jsonl")
        begun = time.monotonic()
        for _ in judge.score(items(40)):
            break
        assert time.monotonic() - begun < 3
        judge.close()
        sold = sum(server.sold.values())
        assert 8 <= sold <= 24
        again = judge_of(server, tmp_path / "v.jsonl")
        assert len(in_order(again, items(40))) == 40
        again.close()
    assert max(server.sold.values()) == 1
    assert not [t for t in threading.enumerate() if t.name == "judge"]


def test_closing_from_another_thread_waits_for_the_answers_under_way(tmp_path):
    """As an interrupted run does, whose judge works in a thread."""
    with fake.serving() as server:
        server.pause = 0.3
        judge, found = judge_of(server, tmp_path / "v.jsonl"), []
        worker = threading.Thread(target=lambda: found.extend(until_stopped(judge, items(40))))
        worker.start()
        while len(server.times) < 8:
            time.sleep(0.005)
        judge.close()
        worker.join(5)
        assert not worker.is_alive() and "was closed" in found[1]
        sold = sum(server.sold.values())
        assert 8 <= sold <= 16
        with pytest.raises(jp.UserError, match="was closed"):
            in_order(judge, items(40))
        again = judge_of(server, tmp_path / "v.jsonl")
        assert len(in_order(again, items(40))) == 40
        again.close()
    assert set(server.sold.values()) == {1}


def test_a_model_that_wants_another_name_of_the_limit_gets_it(tmp_path, monkeypatch):
    seen = []

    def post(self, kept=fake._Handler.do_POST):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        seen.append("max_tokens" in body)
        if "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            self._send(400, json.dumps({"error": {"message": text}}).encode(), {})
            return
        import io

        self.rfile = io.BytesIO(raw)
        kept(self)

    monkeypatch.setattr(fake._Handler, "do_POST", post)
    monkeypatch.setattr(fake._Handler, "protocol_version", "HTTP/1.0")
    with fake.serving() as server:
        found = in_order(judge_of(server, tmp_path / "v.jsonl"), items(20))
    assert all(v.error is None for v in found) and 1 <= sum(seen) <= 8


def test_an_answer_without_text_is_no_score(tmp_path):
    """An error names the option; it is not sent again in this run."""
    def post(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.times.append(0.0)
        value = {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}
        self._send(200, json.dumps(value).encode(), {})

    with fake.serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake._Handler, "do_POST", post)
        [verdict] = in_order(judge_of(server, tmp_path / "v.jsonl"), items(1))
    assert "--judge-max-tokens" in verdict.error and len(server.times) == 1


@pytest.mark.parametrize(("url", "wanted"), [
    ("ftp://host/v1", "not an HTTP URL"), ("nonsense", "not an HTTP URL"),
    ("http://user:secret@host/v1", "contains a user"), ("http://host/v1?key=secret", "a query"),
    ("http://host:99999999/v1", "not an HTTP URL"),
])
def test_an_address_with_a_secret_or_without_a_host_is_refused(url, wanted):
    from jaxpersona.judges.endpoint import Endpoint

    with pytest.raises(jp.UserError, match=wanted) as fault:
        Endpoint("m", url=url)
    assert "secret" not in str(fault.value)


def test_openai_needs_a_key_and_other_endpoints_do_not(monkeypatch):
    from jaxpersona.judges.endpoint import Endpoint

    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(jp.UserError, match="OPENAI_API_KEY is not set"):
        Endpoint("m")
    Endpoint("m", url="http://localhost:8000/v1").close()


def test_a_retry_after_is_a_number_or_a_date():
    from jaxpersona.judges.endpoint import retry_after

    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=40.0) == 60.0
    assert retry_after({"retry-after": "-5"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
    assert retry_after({"retry-after": "inf"}) is None
