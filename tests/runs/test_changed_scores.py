"""Scores that a person changes after a run has used them, and empty replies with a score."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil

import numpy as np
import pytest
from test_rounds import MODEL, QUESTIONS, ROLES, SHORT

from jaxpersona.judges.human import HumanJudge, write_rows
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona import collect
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.forecast import forecast
from jaxpersona.persona.rejudge import judge_run
from jaxpersona.report import run_read
from jaxpersona.runs.run import Run

FEW = QUESTIONS[:2]


def fill(path, score):
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))))
    write_rows(path, [{**row, "score": score(row)} for row in rows])


def extract(folder, path):
    found = extract_axis(MODEL, ROLES, FEW, folder, judge=HumanJudge(path), settings=SHORT,
                         min_count=2)
    return {name: [score for score, n in some.items() if n] for name, some in found.counts.items()}


@pytest.mark.filterwarnings("ignore:replies on which the judge failed")
def test_a_score_that_differs_from_the_file_is_read_again(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path, other, run = tmp_path / "a" / "x.csv", tmp_path / "b" / "x.csv", tmp_path / "run"
    with pytest.raises(ValueError, match="too few roles"):
        extract(run, path)
    fill(path, lambda row: "3")
    names = ("ghost", "pirate", "sage", "tutor")
    assert extract(run, path) == {name: ["3"] for name in names}
    before = Run.read(run).vectors("pirate")
    fill(path, lambda row: "0" if row["role"] == "pirate" else "3")
    ahead = forecast(MODEL, ROLES, FEW, run, judge=HumanJudge(path), settings=SHORT, min_count=2,
                     sample_seconds=0)
    assert ahead.judged == 8 and ahead.missing == 0
    assert extract(run, path) == {name: ["0" if name == "pirate" else "3"] for name in names}
    assert set(Run.read(run).vectors("pirate")) != set(before)

    shutil.copy(path, other)  # another person, the same file name
    fill(other, lambda row: "1" if row["role"] == "sage" else "3")
    assert extract(run, other) == {name: ["1" if name == "sage" else "3"] for name in names}
    counts, _ = judge_run(run, ROLES, HumanJudge(path))
    assert (counts["sage"]["3"], counts["pirate"]["0"], counts["pirate"]["3"]) == (2, 2, 0)
    assert extract(run, path)["sage"] == ["3"]
    # a row that is emptied or deleted has no score any more
    fill(path, lambda row: "" if row["role"] == "sage" else "3")
    assert extract(run, path)["sage"] == ["failed"]


def test_the_file_is_read_once_per_change(tmp_path, monkeypatch):
    from jaxpersona.judges import human
    from jaxpersona.judges.protocol import Item

    read = []
    monkeypatch.setattr(human, "read_rows", lambda path, of=human.read_rows: read.append(path)
                        or of(path))
    judge, role = HumanJudge(tmp_path / "x.csv"), ROLES[1]
    items = [Item("a", role, "Who?", "Boo."), Item("b", role, "Why?", "So.")]
    assert judge.outdated(items, {"a": 3}) == {"a"} and not read  # no file
    list(judge.score(items))
    fill(judge.path, lambda row: "3")
    del read[:]
    assert not judge.outdated(items, {"a": 3, "b": 3}) and not judge.outdated(items, {})
    assert judge.outdated(items, {"a": 3, "b": None}) == {"b"} and len(read) == 1
    other = [dataclasses.replace(items[0], answer="Another.")]
    assert judge.outdated(other, {"a": 3}) == {"a"}
    fill(judge.path, lambda row: "?")
    assert not judge.outdated(items, {"a": None}) and len(read) == 2


def test_the_page_counts_the_replies_that_a_vector_averages(tmp_path, monkeypatch):
    """Empty replies may have score 3, but no response mean."""
    played, seen = collect.Collection._played, []

    def some_empty(self, judging, name, record, reply):
        seen.append(name)
        if name == "pirate" and seen.count(name) % 2:
            reply = dataclasses.replace(reply, text="", tokens=reply.tokens[:0], captured={
                "mean": np.full_like(reply.captured["mean"], np.nan)})
        return played(self, judging, name, record, reply)

    monkeypatch.setattr(collect.Collection, "_played", some_empty)
    extract_axis(MODEL, ROLES, QUESTIONS[:4], tmp_path, judge=NoJudge(), settings=SHORT,
                 min_count=2)
    found = run_read.read(tmp_path)
    assert found.averaged["pirate"] == 2 == len(found.stored["pirate"])
    assert found.averaged["ghost"] == 4 == len(found.stored["ghost"])
