"""Costs, stops and estimates of the judge behind an endpoint, for answers that are given."""

from __future__ import annotations

import pytest

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.judges import http
from jaxpersona.judges.endpoint import Failure, Reply
from jaxpersona.judges.limits import Budget
from jaxpersona.judges.protocol import Item, JudgeStopped

ROLE = Role("ghost", ("You are a ghost.",), "{question} {answer} Grade 0-3.")
SIZE = 21  # bytes of "Who? Bü 0 Grade 0-3."
BOUND = (SIZE + 64 + 2 * 10) / 1e6  # at 1 and 2 USD per million tokens, for 10 tokens of answer
BUSY, LOST = Failure("HTTP 500", again=True), Failure("no answer", again=True, maybe_paid=True)


class Given:
    """An endpoint that gives one answer or failure after the other, the last one repeatedly."""

    model, temperature, max_tokens = "judge-1", 0.0, 10

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, prompt):
        self.asked.append(prompt)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        """There is no connection."""


class Recorded:
    """A pace that never waits, and records what it is told."""

    def __init__(self):
        self.told = []

    def wait(self, tokens, stopped):
        self.told.append(("wait", tokens))
        return True

    def settle(self, estimated, actual):
        self.told.append(("settle", estimated, actual))

    def hold(self, seconds):
        self.told.append(("hold", seconds))


def items(count):
    return [Item(f"q{i}", ROLE, "Who?", f"Bü {i}") for i in range(count)]


def judged(tmp_path, *answers, count=1, price=(1.0, 2.0), **settings):
    """Judge items one by one; return the judge, the verdicts and the message of a stop."""
    judge = http.HttpJudge(Given(*answers), tmp_path / "v.jsonl", concurrency=1, backoff=0.0,
                           price=price, **settings)
    judge._pace, found, why = Recorded(), [], ""
    try:
        for verdict in judge.score(items(count)):
            found.append(verdict)
    except JudgeStopped as stop:
        why = str(stop)
    return judge, found, why


@pytest.mark.parametrize(("reply", "cost"), [
    (Reply("3", 100, 4), 108e-6), (Reply("3", 100, 0), 100e-6), (Reply("3", 100, None), BOUND),
    (Reply("3", None, 4), BOUND), (Reply("3"), BOUND), (Reply("3", 100, 4, usd=0.5), 0.5),
    (Reply("3", 100, 4, usd=0.0), 0.0)])
def test_an_answer_costs_what_the_endpoint_says_or_its_tokens_or_the_bound(tmp_path, reply, cost):
    judge, [verdict], _ = judged(tmp_path, reply)
    assert verdict.cost == pytest.approx(cost) == judge.journal.spent and verdict.score == 3
    assert judge.note() == f"calls: 1, cost: ${cost:,.4g}"


def test_without_a_price_the_cost_is_unknown_unless_the_endpoint_says_it(tmp_path):
    judge, [verdict], _ = judged(tmp_path / "a", Reply("3", 100, 4), price=None)
    assert verdict.cost is None and judge.note() == "calls: 1"
    judge, [verdict], _ = judged(tmp_path / "b", Reply("3", 100, 4, usd=0.25), price=None)
    assert verdict.cost == 0.25 and judge.note() == "calls: 1, cost: $0.25"


def test_a_failed_request_that_may_be_paid_counts_at_its_bound(tmp_path):
    judge, [verdict], _ = judged(tmp_path, LOST, BUSY, Reply("2", 100, 4))
    assert verdict.score == 2 and len(judge.endpoint.asked) == judge.journal.calls == 3
    assert judge.journal.spent == pytest.approx(BOUND + 108e-6)
    assert verdict.cost == pytest.approx(108e-6)
    judge.close()
    judge, found, why = judged(tmp_path / "b", Failure("HTTP 400"), count=2)
    assert [v.error for v in found] == ["HTTP 400"] * 2 and not why
    assert len(judge.endpoint.asked) == 2  # such a request is not sent again
    assert judge.failed == 2 and judge.note() == "calls: 2, cost: $0, failed: 2"


@pytest.mark.parametrize(("budget", "reply", "sent", "wanted"), [
    (Budget(usd=100e-6), Reply("3", 1, 1), 0, r"the next request, which may cost up to \$0.000105, "
     r"does not fit into the budget of \$0.00 \(calls: 0\)"),
    (Budget(usd=110e-6), Reply("3", 4, 1), 1, "does not fit .* of .*calls: 1, cost: .0.0000"),
    (Budget(usd=1.0), Reply("3", usd=2.0), 1,
     r"the budget of \$1.00 is used up \(calls: 1, cost: \$2.0000\)"),
    (Budget(calls=2), Reply("3", 4, 1), 2, r"the budget of 2 calls is used up \(calls: 2, cost"),
])
def test_a_budget_that_is_used_up_is_not_one_that_is_too_small(tmp_path, budget, reply, sent,
                                                               wanted):
    judge, found, why = judged(tmp_path, reply, count=4, budget=budget)
    assert len(found) == len(judge.endpoint.asked) == sent
    with pytest.raises(JudgeStopped, match=wanted):
        raise JudgeStopped(why)
    assert "give a larger --budget" in why


def test_a_bound_that_fits_exactly_is_sent(tmp_path):
    _, found, why = judged(tmp_path, Reply("3", 4, 1), budget=Budget(usd=BOUND))
    assert len(found) == 1 and not why


def test_the_twentieth_failed_prompt_in_a_row_stops_the_judge(tmp_path):
    wrong = Failure("HTTP 400")
    _, found, why = judged(tmp_path / "a", wrong, count=30)
    assert len(found) == 20 and "20 prompts in a row failed" in why and "HTTP 400" in why
    many = [*[wrong] * 19, Reply("1", 5, 1), *[wrong] * 19, Reply("1", 5, 1)]
    _, found, why = judged(tmp_path / "b", *many, count=40)
    assert len(found) == 40 and not why


@pytest.mark.parametrize(("seconds", "stops"), [(600.0, False), (600.5, True)])
def test_a_delay_of_ten_minutes_is_the_longest(tmp_path, seconds, stops):
    judge, found, why = judged(tmp_path, Failure("HTTP 429", after=seconds))
    assert ("requests a delay of" in why) == stops and len(found) == (not stops)
    assert (("hold", seconds) in judge._pace.told) == (not stops)


def test_the_tokens_of_a_request_are_estimated_from_the_most_that_were_seen(tmp_path):
    """At first half a token per byte, then the largest share of an answer, and 10 for the answer.

    The estimate is corrected after each request; one that is not paid has no tokens.
    """
    judge, _, _ = judged(tmp_path, BUSY, LOST, Reply("1", 7, 2), Reply("1", 14, 2),
                         Reply("1", 7, None), Reply("1"), count=4)
    first, second, third = (SIZE * share + 10 for share in (1 / 2, 1 / 3, 2 / 3))
    wanted = [("wait", first), ("settle", first, 0.0), ("wait", first), ("settle", first, first),
              ("wait", first), ("settle", first, 9), ("wait", second), ("settle", second, 16),
              ("wait", third), ("settle", third, 17), ("wait", third)]
    assert len(judge._pace.told) == len(wanted)
    for (name, *numbers), (known, *values) in zip(judge._pace.told, wanted, strict=True):
        assert name == known and numbers == pytest.approx(values)


def endpoint(monkeypatch, answer=None, **settings):
    """An endpoint whose client calls `answer` with the fields of a request."""
    from types import SimpleNamespace as Space

    pytest.importorskip("openai")
    from jaxpersona.judges.endpoint import Endpoint

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    found = Endpoint("judge-1", **{"url": "http://localhost:8000/v1", **settings})
    if answer is not None:
        found._client.close()
        found._client = Space(chat=Space(completions=Space(create=answer)), close=lambda: None)
    return found


def completion(text="3", refusal=None, finish="stop", **usage):
    from types import SimpleNamespace as Space

    return Space(choices=[Space(message=Space(content=text, refusal=refusal),
                                finish_reason=finish)], usage=Space(**usage) if usage else None)


def test_a_request_has_the_settings_of_its_endpoint(monkeypatch):
    asked = []
    found = endpoint(monkeypatch, lambda **fields: asked.append(fields) or completion(),
                     max_tokens=17, temperature=0.5)
    assert found.ask("Who?") == Reply("3")
    assert asked == [{"model": "judge-1", "messages": [{"role": "user", "content": "Who?"}],
                      "temperature": 0.5, "max_tokens": 17}]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere:9/v1")
    held = endpoint(monkeypatch, url=None, timeout=7.5)
    assert held.url == "http://elsewhere:9/v1" and held._client.timeout == 7.5
    assert held._client.max_retries == 0  # the judge repeats and counts requests itself
    assert endpoint(monkeypatch).url == "http://localhost:8000/v1"


@pytest.mark.parametrize(("said", "wanted"), [
    (completion("2", prompt_tokens=7, completion_tokens=1), Reply("2", 7, 1)),
    (completion("2", prompt_tokens=0, completion_tokens=-1), Reply("2", 0, None)),
    (completion("2", prompt_tokens="7", completion_tokens=1), Reply("2", None, 1)),
    (completion("2", prompt_tokens=7, completion_tokens=1, cost=0.5), Reply("2", 7, 1, 0.5)),
    (completion("2", cost=0), Reply("2", usd=0)), (completion("2", cost=True), Reply("2")),
    (completion("2", cost=-1.0), Reply("2")), (completion("2", cost=float("inf")), Reply("2")),
    (completion("2", cost=float("nan")), Reply("2")), (completion("2", cost="1"), Reply("2")),
    (completion("2", cost=10**400), Reply("2")), (completion("2", cost=1e6), Reply("2", usd=1e6)),
    (completion("2", cost=1000001), Reply("2")),
    (completion("2", prompt_tokens=10**400, completion_tokens=10**9), Reply("2", None, 10**9)),
    (completion(None, "I refuse."), Reply("I refuse.")), (completion(None), Reply("")),
    (completion("", finish="stop"), Reply("")), (completion("2", finish="length"), Reply("2")),
    (completion("a\nb sk-secret-0123456789 " + "x" * 200), Reply("a b [key] " + "x" * 150)),
])
def test_an_answer_is_read_with_its_tokens_and_cost(monkeypatch, said, wanted):
    assert endpoint(monkeypatch, lambda **_: said).ask("Who?") == wanted


@pytest.mark.parametrize(("status", "code", "fatal", "again", "wanted"), [
    (401, "", True, False, "rejects the API key"), (402, "", True, False, "requires payment"),
    (404, "", True, False, "no such model or URL"), (400, "", False, False, "HTTP 400: it failed"),
    (429, "insufficient_quota", True, False, "the quota is used up"), (429, "", False, True, "429"),
    (408, "", False, True, "HTTP 408"), (409, "", False, True, "HTTP 409"),
    (499, "", False, False, "HTTP 499"), (500, "", False, True, "HTTP 500")])
def test_an_http_error_ends_the_prompt_or_the_judge_or_is_tried_again(monkeypatch, status, code,
                                                                      fatal, again, wanted):
    from types import SimpleNamespace as Space

    openai = pytest.importorskip("openai")

    def refuse(**_):
        raise openai.APIStatusError("it failed", body={"code": code}, response=Space(
            status_code=status, headers={"retry-after": "3"}, request=None))

    with pytest.raises(Failure, match=wanted) as found:
        endpoint(monkeypatch, refuse).ask("Who?")
    assert (found.value.fatal, found.value.again) == (fatal, again)
    assert found.value.after == (None if fatal else 3.0) and not found.value.maybe_paid


def test_a_share_of_a_budget_is_never_more_than_the_budget():
    assert Budget(calls=7).part(2) == Budget(calls=3) and Budget(calls=7).part(1).calls == 7
    assert Budget(usd=5.0).part(4) == Budget(usd=1.25)
    assert str(Budget(calls=1500)) == "1,500 calls" and str(Budget(usd=2.5)) == "$2.50"
    with pytest.raises(jp.UserError, match="concurrency is 1025"):
        http.HttpJudge(Given(BUSY), "v.jsonl", concurrency=1025)


def test_the_progress_of_a_batch_includes_the_requests_that_failed(monkeypatch):
    """Numbers that are missing or invalid are 0, and only files that exist are named."""
    from types import SimpleNamespace as Space

    found = endpoint(monkeypatch)
    found._client.close()

    def state(**fields):
        value = Space(id="b", status="In_Progress", **fields)
        found._client = Space(batches=Space(retrieve=lambda name: value), close=lambda: None)
        return found.batch("b")

    counts = Space(completed=3, failed=2, total=10)
    read = state(request_counts=counts, output_file_id="good", error_file_id="bad")
    assert (read.status, read.done, read.total, read.files, read.ended) == (
        "in_progress", 5, 10, ("good", "bad"), False)
    read = state(request_counts=Space(completed="3", failed=2, total=-1), output_file_id=None,
                 error_file_id="bad")
    assert (read.done, read.total, read.files) == (2, 0, ("bad",))
    read = state()
    assert (read.done, read.total, read.files, read.problems) == (0, 0, (), "")
