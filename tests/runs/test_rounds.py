"""Runs with a precision: rounds, settled roles, resumption, and the axis of unequal questions."""
# ruff: noqa: F811 (fixtures of another module are imported and then named as arguments)

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import support as s
from test_damages import SETTINGS, Killed, contents
from test_extend import played  # noqa: F401
from test_interrupted import Ends

from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.forecast import describe, forecast
from jaxpersona.persona.precision import Cells, measure, ordered
from jaxpersona.persona.summary import summary
from jaxpersona.runs.rollouts import place_of_key
from jaxpersona.runs.run import Run

NAMES = ("ghost", "pirate", "sage", "tutor")
ROLES = [Role("default", ("You are an AI assistant, made to help.",), ""),
         *(Role(name, (f"You are a {name}. " * 3,), "{question} {answer}?") for name in NAMES)]
QUESTIONS = [Question(i, f"Thing {i}?") for i in range(8)]
ORDER = [one.id for one in ordered(QUESTIONS, 0)]
# nearly greedy replies of two tokens, so that the random weights give reliable vectors
MODEL = dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(257,)),
                            tokenizer=s.byte_tokenizer())
SHORT = dataclasses.replace(SETTINGS, max_new_tokens=2, temperature=0.01)
JUDGE = s.Scored(lambda role, key: 3)
TARGET = 0.85


def extract(folder, **changes):
    options = {"judge": JUDGE, "settings": SHORT, "min_count": 2, "precision": TARGET, **changes}
    return extract_axis(MODEL, ROLES, QUESTIONS, folder, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return a folder with a run with a precision ("stopped") and one without ("full")."""
    folder = tmp_path_factory.mktemp("rounds")
    said = []
    found = extract(folder / "stopped", notice=said.append)
    return folder, found, extract(folder / "full", precision=None), said


def test_settled_roles_get_no_more_questions(done):
    folder, found, full, said = done
    rounds = found.rounds
    assert [one.questions for one in rounds.rounds] == [4, 6, 8]
    assert rounds.asked == {"default": 8, "ghost": 8, "pirate": 6, "sage": 6, "tutor": 6}
    assert rounds.settled == ["pirate", "sage", "tutor"] == sorted(
        set(NAMES) - set(rounds.rounds[2].roles))
    assert (rounds.rollouts, rounds.quota, rounds.saved) == (34, 40, 6)
    assert rounds.axis == rounds.rounds[-1].axis
    assert found.rollouts == 34 and full.rollouts == 40 and full.rounds is None
    run = Run.read(folder / "stopped")
    for name, n in rounds.asked.items():
        assert {one["question_index"] for one in run.rollouts(name)} == set(ORDER[:n])
    assert len(said) == 3
    assert said[1].startswith("round 2, 6 questions: the axis has reliability 0.")
    assert said[1].endswith("3 of 4 roles are settled")
    stored = json.loads((folder / "stopped" / "analysis.json").read_text())
    assert stored["precision"] == json.loads(json.dumps(rounds.value()))
    assert stored["roles"]["sage"]["rollouts"] == 6
    assert run.manifest["last"]["precision"] == TARGET
    assert run.manifest["last"]["rounds"] == [4, 6, 8]
    assert "precision" not in Run.read(folder / "full").manifest["last"]
    assert "precision" not in json.loads((folder / "full" / "analysis.json").read_text())


def test_the_measurements_are_those_of_the_stored_means(done):
    """Sums per question equal those of the stored sample, which contains all rollouts here."""
    folder, found, *_ = done
    run, layer = Run.read(folder / "stopped"), found.rounds.layer
    assert layer == 1 and found.rounds.last()["ghost"] == found.rounds.rounds[2].roles["ghost"]
    cells = {}
    for role in ROLES:
        sample = run.sample(role.name)
        of = [place_of_key(key)[0] for key in sample.keys]
        means = sample.means[:, layer]
        order = ORDER[: found.rounds.asked[role.name]]
        cells[role.name] = Cells(np.stack([means[of.index(i)] for i in order]), np.ones(len(order)))
    for one in found.rounds.rounds:
        axis, roles = measure(cells["default"].first(one.questions), {
            name: cells[name].first(one.questions) for name in NAMES}, NAMES)
        assert axis.value == pytest.approx(one.axis.value, abs=0.002)  # bfloat16 differences
        for name, own in one.roles.items():
            assert roles[name].value == pytest.approx(own.value, abs=0.01)


def test_vectors_are_corrected_for_questions_that_were_not_asked(done):
    folder, found, full, _ = done
    run = Run.read(folder / "stopped")
    sample = run.sample("default")
    inside = np.isin([place_of_key(key)[0] for key in sample.keys], ORDER[:6])
    shift = found.rounds.slope * (sample.means.mean(0) - sample.means[inside].mean(0))
    assert 0.1 < found.rounds.slope < 1
    for name in ("pirate", "sage", "tutor"):
        raw = run.sums(name, "test").vectors({3: "pos_3"})["pos_3"][0]
        assert s.relative(found.role_means[name], raw + shift) <= 1e-5
        np.testing.assert_array_equal(run.vectors(name)["pos_3"], found.role_means[name])
    assert s.relative(found.role_means["ghost"], full.role_means["ghost"]) <= 1e-6
    a, b = found.axis.values[1], full.axis.values[1]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > TARGET - 0.01


def test_the_summary_and_the_forecast_name_the_precision(done, tmp_path):
    folder, found, full, _ = done
    said = summary(found, folder / "stopped", 1)
    assert "rollouts saved: 6 of 40 (15%)" in said
    assert any(line.startswith("precision 0.85 at layer 1: the axis has reliability 0.99")
               and line.endswith("after 3 rounds; 3 of 4 roles are settled") for line in said)
    assert not any("precision" in line for line in summary(full, folder / "full", 1))
    brief = found.rounds.brief_value()
    assert (brief["settled"], brief["roles"], brief["rollouts_saved"]) == (3, 4, 6)
    options = {"judge": JUDGE, "settings": SHORT, "min_count": 2, "sample_seconds": 0}
    most = forecast(MODEL, ROLES, QUESTIONS, tmp_path / "new", precision=TARGET, **options)
    plain = forecast(MODEL, ROLES, QUESTIONS, tmp_path / "new", **options)
    assert most.rollouts == most.missing == 40 and most.disk_bytes > plain.disk_bytes
    assert any("are upper bounds, for a run of all questions" in line
               for line in describe(most, judge="test"))
    assert not any("precision" in line for line in describe(plain, judge="test"))
    with pytest.raises(UserError, match="rounds contains 3"):
        forecast(MODEL, ROLES, QUESTIONS, tmp_path / "new", precision=TARGET, rounds=[3], **options)


def test_a_complete_run_makes_the_same_decisions_without_generating(done, tmp_path, played):
    """The sums per question are read again; rollouts beyond a round do not change its decision."""
    folder, found, full, _ = done
    copy = shutil.copytree(folder / "full", tmp_path / "run")
    again = extract(copy)
    assert not played and again.rounds.asked == found.rounds.asked
    for one, two in zip(again.rounds.rounds, found.rounds.rounds, strict=True):
        assert one.axis.value == pytest.approx(two.axis.value, abs=1e-4)
    # all rollouts in the folder are used, so no role needs a correction
    np.testing.assert_allclose(again.axis.values, full.axis.values, atol=1e-4)


def test_a_call_without_precision_completes_the_quota(done, tmp_path, played):
    folder, found, full, _ = done
    copy = shutil.copytree(folder / "stopped", tmp_path / "run")
    again = extract(copy, precision=None)
    assert len(played) == 6 and again.rounds is None and again.rollouts == 40
    np.testing.assert_allclose(again.axis.values, full.axis.values, rtol=1e-5, atol=1e-6)
    assert "precision" not in json.loads((copy / "analysis.json").read_text())
    before = contents(copy)
    last = extract(copy).rounds  # the sums continued
    assert (last.rounds, last.asked) == (found.rounds.rounds, found.rounds.asked)
    # the vectors average all rollouts in the folder
    assert (last.rollouts, last.saved, last.quota) == (40, 0, 40)
    del played[:]
    after = contents(copy)
    assert {name for name in before if before[name] != after[name]} == {
        "run.json", "analysis.json"}


def test_another_target_and_other_rounds_reuse_the_rollouts(done, tmp_path, played):
    folder, *_ = done
    copy = shutil.copytree(folder / "stopped", tmp_path / "run")
    found = extract(copy, precision=0.5, rounds=[8])
    assert [one.questions for one in found.rounds.rounds] == [8] and len(played) == 6
    del played[:]
    assert extract(copy).rounds.asked["sage"] == 6 and not played


def test_a_role_that_is_not_played_gets_all_questions(tmp_path):
    judge = s.Scored(lambda role, key: 0 if role == "sage" else 3)
    found = extract(tmp_path / "run", judge=judge)
    assert found.rounds.asked["sage"] == 8 and "sage" not in found.rounds.settled
    assert found.rounds.value()["rounds"][0]["roles"]["sage"] is None
    assert any("not settled after all questions" in line and "sage" in line
               for line in found.rounds.lines())


@pytest.mark.parametrize("step", [121, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_ends_at_any_change_resumes_to_the_same_bytes(done, tmp_path, monkeypatch,
                                                                 step):
    folder, *_ = done
    expected = contents(folder / "stopped")
    ends = Ends(monkeypatch, ("rename", "remove", "append"))
    ends.left = 10**9
    extract(tmp_path / "whole")
    count = 10**9 - ends.left
    assert contents(tmp_path / "whole") == expected and count > 200
    for at in range(step // 2, count, step):
        ends.left = at
        with pytest.raises(Killed):
            extract(tmp_path / str(at))
        ends.left = 10**9
        extract(tmp_path / str(at))
        assert contents(tmp_path / str(at)) == expected, at


def test_mistakes_are_found_before_the_first_rollout(tmp_path, played):
    later = s.Scored(lambda role, key: 3)
    later.after = True
    for changes, said in (
            ({"precision": 1.5}, "precision is 1.5; give a reliability between 0 and 1"),
            ({"precision": None, "rounds": [4]}, "rounds is [4], but precision is None"),
            ({"rounds": [3]}, "rounds contains 3; give even numbers of questions from 4 to 8"),
            ({"judge": later}, "judge scores only after all rollouts (--judge-after)")):
        with pytest.raises(UserError) as error:
            extract(tmp_path / "run", **changes)
        assert said in str(error.value) and "\n" not in str(error.value)
    assert not played and not (tmp_path / "run").exists()
