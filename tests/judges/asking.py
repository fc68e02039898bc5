"""Replies to judge, and judges at a local endpoint, for tests of single and batched requests."""

from __future__ import annotations

import fake_endpoint as fake

from jaxpersona.data.texts import Role
from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.judges.http import HttpJudge
from jaxpersona.judges.limits import Batch
from jaxpersona.judges.protocol import Item, JudgeStopped

KEY = "sk-secret-0123456789"
ROLE = Role("ghost", ("You are a ghost.",), "Asked: {question} Said: {answer} Grade 0-3.")


def items(count, start=0, prefix="q"):
    return [Item(f"{prefix}{i}", ROLE, "Who?", f"Boo number {i}.") for i in range(start, count)]


def prompt(item):
    return f"Asked: {item.question} Said: {item.answer} Grade 0-3."


def batch_judge(server, path, *, size=50_000, poll=0.01, batch_price=None, **settings):
    return HttpJudge(Endpoint("judge-1", url=server.url), path, backoff=0.005,
                     batch=Batch(size, batch_price, poll), **settings)


def until_stopped(judge, asked):
    """The verdicts up to the stop, and its message ("" if there was none)."""
    found = []
    try:
        for verdict in judge.score(asked):
            found.append(verdict)
    except JudgeStopped as stop:
        return found, str(stop)
    return found, ""


def scored(verdicts, asked):
    """Check the scores of all verdicts."""
    assert [v.score for v in verdicts] == [fake.score(prompt(item)) for item in asked]
    assert all(v.error is None and v.refused == (v.score == 0) for v in verdicts)
