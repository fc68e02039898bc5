"""Runs of `extract_axis` with given replies and response means, whose numbers are known."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.protocol import Item, Verdict
from jaxpersona.persona import rejudge, verdicts
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.forecast import forecast
from jaxpersona.persona.judging import Judging
from jaxpersona.runs.run import Run

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "report"))
import made_runs  # noqa: E402

QUESTIONS = [Question(i, f"Who {i}?") for i in range(4)]
NAMES = ("ghost", "pirate", "sage", "silent")
ROLES = [Role("default", ("",), ""), *(Role(name, (f"Be {name}.",), "") for name in NAMES)]
PLACE = {"default": 4.0, "ghost": 1.0, "pirate": -1.0, "sage": -6.0, "silent": np.nan}


def mean(role, key):
    """The means of a role differ by its question: −1, 0, 0 and 1 along the first channel."""
    out = np.zeros((3, 32))
    out[:, 0] = PLACE[role] + (-1, 0, 0, 1)[int(key[-1])]
    return out if role != "silent" else np.full((3, 32), np.nan)


def extract(folder, monkeypatch, score=lambda role, key: 3, text=lambda role, key: "Yes.",
            questions=QUESTIONS, **more):
    monkeypatch.setattr("jaxpersona.persona.collect.Stream", made_runs.given_stream(mean, text))
    return extract_axis(made_runs.model(3, "tiny"), ROLES, questions, folder, **{
        "judge": s.Scored(score), "settings": made_runs.SETTINGS, "min_count": 2,
        "held_out": ["sage"], **more})


def test_the_axis_its_notes_and_its_projections(tmp_path, monkeypatch):
    """The axis is 4 − (1 − 1) / 2 along one channel; sage is held out, silent has no words."""
    told = []
    found = extract(tmp_path / "run", monkeypatch, report=lambda *step: told.append(step),
                    text=lambda role, key: "" if role == "silent" else "Yes.")
    wanted = np.zeros((3, 32))
    wanted[:, 0] = 4
    np.testing.assert_allclose(found.axis.values, wanted, atol=1e-6)
    assert dict(found.axis.notes) == {"judge": "test", "roles": 2, "min_count": 2,
                                      "default_rollouts": 4, "rollouts": 16}
    assert (found.axis.name, found.axis.model) == ("assistant", "tiny")
    assert found.axis.fingerprint == made_runs.model(3, "tiny").fingerprint
    assert found.analysis.names == ["ghost", "pirate"]
    assert set(found.role_means) == {"ghost", "pirate", "sage"}
    assert (found.rollouts, found.tokens) == (20, 16 * 4) and set(found.sizes.values()) == {4}
    for name, place in PLACE.items():
        np.testing.assert_allclose(found.mean_projection(name), np.full(3, place), atol=1e-5)
    assert found.counts["silent"] == {"0": 0, "1": 0, "2": 0, "3": 4, "None": 0}
    assert "default" not in found.counts
    np.testing.assert_allclose(found.axis.thresholds("p50"), 4, atol=0.02)
    np.testing.assert_allclose(found.axis.thresholds("p50", of="all"), 1, atol=0.02)  # of twelve
    assert told[0] == ("rollouts", 0, 20, 0) and told[-1] == ("judging", 16, 16, 0)
    assert ("rollouts", 20, 20, 64) in told
    first = next(i for i, step in enumerate(told) if step[0] == "judging")
    assert told[first - 1] == ("rollouts", 20, 20, 64)  # not before the first verdict
    stored = json.loads((tmp_path / "run" / "analysis.json").read_text())["roles"]
    assert stored["sage"]["held_out"] and not stored["sage"]["in_axis"]
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (state["state"], state["rollouts"], state["verdicts"], state["tokens"],
            state["roles_complete"]) == ("complete", 20, 16, 64, 5)
    last = Run.read(tmp_path / "run").manifest["last"]
    assert (last["min_count"], last["held_out"], last["keep_means"]) == (2, ["sage"], 16)


def test_too_few_roles_are_counted_and_nothing_is_overwritten(tmp_path, monkeypatch):
    """The message has the number of roles that reach min_count and are not held out."""
    strict = s.Scored(lambda role, key: 2 if role == "pirate" and key[-1] in "01" else 3, "strict")
    with pytest.raises(UserError) as error:
        extract(tmp_path / "run", monkeypatch, min_count=3, judge=strict)
    assert str(error.value).startswith(
        "too few roles have at least 3 rollouts with score 3 from the judge 'strict' and are not "
        f"held out: 1 of 4; the axis needs at least two such roles. {tmp_path / 'run'} keeps all")
    assert not (tmp_path / "run" / "axis.safetensors").exists()
    found = extract(tmp_path / "run", monkeypatch, min_count=2, judge=strict)
    assert found.tokens == 0 and found.analysis.names == ["ghost", "pirate"]


def test_a_default_persona_without_words_has_no_axis(tmp_path, monkeypatch):
    """All its response means are unknown."""
    monkeypatch.setitem(PLACE, "default", np.nan)
    empty = lambda role, key: mean("silent" if role == "default" else role, key)  # noqa: E731
    monkeypatch.setattr("jaxpersona.persona.collect.Stream", made_runs.given_stream(
        empty, lambda role, key: "" if role == "default" else "Yes."))
    with pytest.raises(UserError, match="every reply of the default persona is empty"):
        extract_axis(made_runs.model(3, "tiny"), ROLES, QUESTIONS, tmp_path / "run",
                     judge=NoJudge(), settings=made_runs.SETTINGS, min_count=2)


def test_the_error_of_a_judge_is_shortened_and_its_replies_are_in_no_vector(tmp_path, monkeypatch):
    """Seven replies of 16 failed; failed replies count as rollouts of their role."""
    def score(role, key):
        return RuntimeError("x" * 200) if key[-1] in "01" and role != "silent" else 3

    monkeypatch.setattr("jaxpersona.persona.extract.weights_note", lambda _: {"weights": "int8"})
    with pytest.warns(UserWarning) as found:
        made = extract(tmp_path / "run", monkeypatch, score)
    assert [str(one.message) for one in found] == [
        f"replies on which the judge failed: 6 ({'x' * 120}); no vector includes these replies; "
        "run the same command again to judge them"]
    assert made.counts["ghost"] == {"0": 0, "1": 0, "2": 0, "3": 2, "None": 0, "failed": 2}
    assert made.axis.notes["weights"] == "int8"  # how the weights are stored
    assert made.sizes["ghost"] == 4 and made.rollouts == 20
    np.testing.assert_allclose(made.role_means["ghost"][:, 0], 1.5, atol=1e-6)  # (1 + 2) / 2
    assert Run.read(tmp_path / "run").sums("ghost").count("3") == 2


class Paid(s.Scored):
    """A judge whose verdicts cost 0.25 USD."""

    def score(self, items):
        for one in items:
            yield Verdict(one.key, 3, cost=0.25)


def test_the_progress_counts_costs_and_the_rollouts_of_earlier_questions(tmp_path, monkeypatch):
    """A call with two of four questions uses and counts all rollouts of the folder."""
    def state():
        found = json.loads((tmp_path / "run" / "status.json").read_text())
        return [found[name] for name in ("rollouts", "rollouts_total", "verdicts",
                                         "verdicts_total", "roles_complete", "roles", "cost")]

    extract(tmp_path / "run", monkeypatch, questions=QUESTIONS[:2], judge=Paid(name="paid"))
    assert state() == [10, 10, 8, 8, 5, 5, 2.0]
    extract(tmp_path / "run", monkeypatch, judge=Paid(name="paid"))
    assert state() == [20, 20, 16, 16, 5, 5, 2.0]
    told = []
    found = extract(tmp_path / "run", monkeypatch, questions=QUESTIONS[:2],
                    judge=Paid(name="paid"), report=lambda *step: told.append(step))
    assert state() == [20, 20, 16, 16, 5, 5, 0.0] and found.rollouts == 20
    assert told[:2] == [("rollouts", 20, 20, 0), ("judging", 16, 16, 0)]


def test_a_forecast_of_another_rubric_changes_no_file(tmp_path, monkeypatch):
    """The scores of one role are outdated, but only a run deletes them."""
    extract(tmp_path / "run", monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    roles = [dataclasses.replace(role, eval_prompt="{question}" * (role.name == "ghost"))
             for role in ROLES]
    judge = s.Scored()
    judge.rubric = None  # as a judge that calls a model
    found = forecast(made_runs.model(3, "tiny"), roles, QUESTIONS, tmp_path / "run", judge=judge,
                     settings=made_runs.SETTINGS, min_count=2, sample_seconds=0)
    assert (found.missing, found.judged, found.judge_calls) == (0, 16, 4)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*")
                      if path.is_file()}


def test_a_judge_is_begun_and_prepared_with_the_items_of_the_run():
    """Both methods are optional."""
    told = []
    item = Item("a", ROLES[1], "Who?", "Boo.")
    judge = s.Scored()
    judge.begin = lambda: told.append("begin")
    judge.prepare = lambda items, tick: told.extend([list(items()), tick()])
    Judging(judge, alone=False).prepare(lambda: [item], lambda: "tick")
    assert told == ["begin", [item], "tick"]
    Judging(s.Scored(), alone=False).prepare(lambda: [item], lambda: told.append("no"))
    assert told[3:] == []


@pytest.mark.parametrize(("count", "said"), [
    (5, "r0, r1, r2, r3, r4 are missing from roles"),
    (6, "r0, r1, r2, r3, r4 … are missing from roles")])
def test_five_of_the_roles_that_a_judge_lacks_are_named(monkeypatch, count, said):
    """The default persona is not judged."""
    roles = {f"r{i}": "" for i in range(count)} | {"default": ""}
    monkeypatch.setattr(rejudge.Run, "read", lambda folder: SimpleNamespace(
        manifest={"roles": roles}))
    with pytest.raises(UserError, match=f"runs/x: the run's roles {said}"):
        rejudge.judge_run("runs/x", [], NoJudge())


def test_the_scores_of_a_run_are_those_of_its_last_judge(monkeypatch):
    """Roles that were not judged, and the default persona, have none."""
    scores = {"ghost": {"a": 3, "b": None}, "sage": None}
    monkeypatch.setattr(verdicts.Run, "read", lambda path: SimpleNamespace(
        manifest={"roles": ["default", *scores]}, scores=scores.__getitem__))
    assert verdicts.scores_of("runs/x") == {"ghost/a": 3, "ghost/b": None}
    scores["ghost"] = {}
    with pytest.raises(UserError, match="runs/x: contains no scores; judge the run first"):
        verdicts.scores_of("runs/x")
