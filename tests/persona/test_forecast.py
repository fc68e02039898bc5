"""`forecast` predicts what `extract_axis` does, and the summary states what it did."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

from jaxpersona.cli.axis import _of_forecast
from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge, SelfJudge
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.forecast import _disk_bytes, _live_bytes, describe, forecast, hours, size
from jaxpersona.persona.prepare import base_notice
from jaxpersona.persona.summary import distances, summary
from jaxpersona.runs.rollouts import Settings

NAMES = [f"role{i}" for i in range(12)]
ROLES = [Role("default", ("", "You are an AI."), "")] + [
    Role(name, (f"You are {name}.",), "") for name in NAMES]
QUESTIONS = [Question(0, "Why?"), Question(1, "How?")]
SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=6, batch_size=8)
MODEL = dataclasses.replace(
    s.tiny_model(vocab_size=258, stop_ids=tuple(range(60, 100))), tokenizer=s.byte_tokenizer())


def predict(folder, roles=ROLES, judge=None, **options):
    return forecast(MODEL, roles, QUESTIONS, folder, judge=judge or NoJudge(),
                    **{"settings": SETTINGS, "min_count": 1, "sample_seconds": 0, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A forecast with a timed sample of a whole run, and then the run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    said = predict(folder, held_out=["role3"], sample_seconds=600)
    assert not folder.exists()
    found = extract_axis(MODEL, ROLES, QUESTIONS, folder, judge=NoJudge(), settings=SETTINGS,
                         min_count=1, held_out=["role3"])
    return folder, said, found


def test_a_sample_of_the_whole_run_predicts_its_tokens(made):
    folder, said, found = made
    assert (said.roles, said.prompts, said.questions, said.samples) == (12, 14, 2, 1)
    assert said.rollouts == said.missing == found.rollouts == 28
    assert said.judged == 24 and said.judge_calls == 0 and not said.llm_judge
    assert said.pace.complete and said.reply_tokens == found.tokens
    assert said.seconds == pytest.approx(said.pace.seconds)
    assert said.live_bytes == 22 * 4 * 3 * 32  # the default's four rollouts and nine roles' two
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size / 4 < said.disk_bytes < size  # headers and figures are small only in large runs


def test_the_rest_of_a_run_is_what_is_missing(made):
    folder, _, _ = made
    done = predict(folder, held_out=["role3"])
    assert done.missing == 0 and done.rollouts == 28 and done.reply_tokens == 0
    some = predict(folder, held_out=["role3"], redo=["role1", "default"])
    assert some.missing == 6 and some.reply_tokens == 6 * 6
    assert "of which the folder contains 22" in describe(some, judge="none")[2]
    again = predict(folder, held_out=["role3"], overwrite=True)
    assert again.missing == 28 and (folder / "axis.safetensors").exists()
    for redo, calls in ((["role1"], 2), ([], 0)):  # as if an LLM had given the run's verdicts
        judge = NoJudge()
        judge.rubric = None
        told = predict(folder, held_out=["role3"], redo=redo, judge=judge)
        assert (told.judged, told.judge_calls) == (24, calls)


def test_the_live_files_of_waiting_roles_are_counted():
    """Nine roles that wait for a judge in its thread and one in play; all for a later judge."""
    more = {f"role{i}": 10 * (i + 1) for i in range(12)}  # 120, 110, … rollouts
    for about, rollouts in (({}, 750), ({"together": True}, 230), ({"after": True}, 780),
                            ({"together": True, "after": True}, 780)):
        assert _live_bytes(MODEL, more, SimpleNamespace(**about)) == rollouts * 4 * 3 * 32
    assert _live_bytes(MODEL, {"a": 7}, SimpleNamespace(after=True)) == 7 * 4 * 3 * 32


def test_the_disk_holds_sums_samples_and_vectors():
    """Numbers of a state [3, 32]: the axis, and for a role its base, sums, vectors and means."""
    state = 3 * 32
    for more, keep, numbers in (
            ({}, 4, 4), ({"default": 100}, 4, 4 + 2 * 100 + 4 + 8 + 4),
            ({"ghost": 100}, 4, 4 + 2 * 4 + 4 + 8 * 3 + 4 * 3),
            ({"ghost": 100}, None, 4 + 2 * 100 + 4 + 8 * 3 + 4 * 3),
            ({"ghost": 2}, 4, 4 + 2 * 2 + 4 + 8 * 2 + 4 * 3)):
        assert _disk_bytes(MODEL, more, keep, 1000.0) == 1000 + numbers * state


@pytest.mark.parametrize(("seconds", "wanted"), [
    (599, "0.166 hours (599 s)"), (600, "0.2 hours (10 min)"), (7199, "2.0 hours (120 min)"),
    (7200, "2.0 hours"), (7.2e6, "2,000.0 hours"), (float("inf"), "? hours (unknown, because")])
def test_a_duration_has_the_precision_of_its_size(seconds, wanted):
    assert hours(seconds).startswith(wanted) and (wanted[0] == "?") == (hours(seconds) != wanted)
    assert size(999_999_999) == "1,000.0 MB" and size(1e9) == "1.0 GB" and size(2.5e5) == "0.2 MB"


def test_what_would_fail_later_is_refused_and_nothing_is_written(made, tmp_path):
    out, (folder, _, _) = tmp_path / "out", made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for call, wanted in (
        (lambda: predict(out, min_count=3), "min_count is 3"),
        (lambda: predict(out, roles=ROLES[:2]), "roles has 1 role besides .* needs at least two"),
        (lambda: predict(out, judge=SelfJudge(MODEL)),
         r"needs an eval_prompt, missing for \d+ roles \(role0, .*…\); .*give one rubric"),
        (lambda: predict(folder, settings=dataclasses.replace(SETTINGS, seed=1)),
         "contains another run"),
        (lambda: predict(tmp_path / "full"), "has no run.json"),
        (lambda: predict(out, sample_seconds=-1), "sample_seconds is -1"),
    ):
        with pytest.raises(UserError, match=wanted):
            call()
    assert not out.exists()


def test_a_forecast_in_words(tmp_path):
    roles = [dataclasses.replace(role, eval_prompt="{question} {answer}?") for role in ROLES]
    found = predict(tmp_path / "run", roles=roles, judge=SelfJudge(MODEL))
    lines = describe(found, judge="self", cost=0.25)
    assert lines[0] == "roles: 12 besides the default persona, system prompts: 14"
    assert lines[2] == "rollouts: 28" and "reply tokens: at most 168" in lines
    assert "time: not measured" in lines
    assert ("judging: the judge self scores 24 of the replies; the time above does not include "
            "judging") in lines
    assert "cost of judging: 24 × $0.25 = $6.00" in lines
    free = describe(dataclasses.replace(
        found, judge_calls=0, missing=0, llm_judge=False), judge="none", cost=0.25)
    assert "judging: no model is called (judge none); the time above does not include judging" in (
        free) and "time: nothing to generate" in free
    assert ("cost of judging all replies of the roles with another judge: 24 × $0.25 = $6.00"
            in free)
    # a judge that has scored every reply costs nothing more; another judge never does
    scored = dataclasses.replace(found, judge_calls=0)
    assert "cost of judging: 0 × $0.25 = $0.00" in describe(scored, judge="self", cost=0.25)
    other = dataclasses.replace(scored, llm_judge=False)
    assert ("cost of judging all replies of the roles with another judge: 24 × $0.25 = $6.00"
            ) in describe(other, judge="none", cost=0.25)
    assert [_of_forecast(one, 0.25)["judge_cost"] for one in (found, scored, other)] == [6, 0, 6]
    timed = dataclasses.replace(
        found, seconds=7200.0 * 5, pace=s_pace([3, 5], [4]))
    assert _of_forecast(timed, None)["sample"] == {
        "finished": 2, "unfinished": 1, "tokens": 12, "seconds": 2.0, "compile_seconds": 9.0}
    never = _of_forecast(dataclasses.replace(timed, seconds=float("inf")), None)
    assert never["seconds"] is None and "judge_cost" not in never  # JSON has no infinity
    (line,) = [x for x in describe(timed, judge="none") if x.startswith("time")]
    assert line.startswith("time of generation: about 10.0 hours (replies in the sample: "
                           "2 finished, 1 unfinished; 6 tokens/s over 2.0 s, after 9 s of "
                           "compilation")
    bound = dataclasses.replace(timed, pace=s_pace([], [4]))
    assert any(x.startswith("time of generation: at most") for x in describe(bound, judge="none"))


def s_pace(finished, unfinished):
    from jaxpersona.engine.pace import Pace

    return Pace(np.array(finished, int), np.array(unfinished, int), 1, np.array([1]), 2.0, 9.0, 6,
                8)


def test_the_summary_ranks_roles_by_distance(made):
    folder, _, found = made
    own = found.projections["default"][:, 1]
    places = {name: found.mean_projection(name)[1] for name in NAMES}
    for name in NAMES:  # of two replies, whose means are all kept
        assert places[name] == pytest.approx(np.nanmean(found.projections[name][:, 1]), abs=0.01)
    order = sorted(NAMES, key=lambda name: -places[name])
    told = distances(found, 1)
    assert list(told) == order
    for name in NAMES:
        wanted = (places[name] - found.mean_projection("default")[1]) / np.nanstd(own)
        assert told[name] == pytest.approx(wanted, rel=1e-4)
    lines = summary(found, folder, 1, held_out=["role3"], options=["--model", "a b"])
    assert lines[0] == "Assistant Axis of tiny: 11 of 12 roles, 28 rollouts, 3 layers"
    assert lines[1].startswith("judge none: no reply was read")
    assert "held out: 1 (role3)" in lines
    near, = [x for x in lines if x.startswith("  nearest:")]
    far, = [x for x in lines if x.startswith("  farthest:")]
    assert [x.split()[0] for x in near.removeprefix("  nearest: ").split(", ")] == order[:5]
    assert [x.split()[0] for x in far.removeprefix("  farthest: ").split(", ")] == order[:-6:-1]
    assert any(x.startswith("  axis.safetensors") for x in lines)
    assert not any("roles.png" in x for x in lines)  # no figure was drawn
    assert f"  jaxpersona vectors check {folder}/axis.safetensors --model 'a b'" in lines
    assert lines[-1].startswith('  jaxpersona generate "Who are you?" --cap')


def test_scores_and_roles_left_out_are_named(made):
    folder, _, found = made
    counts = {name: {"0": 0, "1": 0, "2": 0, "3": 2, "None": 0} for name in NAMES}
    counts["role5"] = {"0": 1, "1": 0, "2": 0, "3": 0, "None": 1}
    means = {name: value for name, value in found.role_means.items() if name != "role5"}
    notes = {**found.axis.notes, "judge": "digits"}
    judged = dataclasses.replace(found, counts=counts, role_means=means,
                                 axis=dataclasses.replace(found.axis, notes=notes))
    lines = summary(judged, folder, 1)
    assert lines[1] == "judge digits: 1 undecided, 22 with score 3, 1 with score 0"
    assert "left out, with fewer than 1 reply with score 3: 1 (role5)" in lines


@pytest.mark.parametrize("count", [10, 11])
def test_a_short_ranking_is_printed_whole_and_empty_roles_are_not_in_it(count):
    """Role i lies i standard deviations below the default persona, whose replies are −1 and 1."""
    names = [f"r{i:02}" for i in range(count)]
    means = {name: np.array([0.0, -float(i)]) for i, name in enumerate(names)}
    means |= {"default": np.zeros(2), "silent": np.full(2, np.nan)}
    own = np.array([[5.0, -1.0], [7.0, 1.0], [np.nan, np.nan]])
    found = SimpleNamespace(
        rounds=None, pca=None,
        projections={name: own if name == "default" else own[:1] for name in means},
        mean_projection=means.__getitem__, rollouts=99, role_means=dict.fromkeys(names),
        counts={name: {"3": 2} for name in [*names, "silent"]},
        axis=SimpleNamespace(model="tiny", n_layers=2, notes={"min_count": 2, "judge": "rules"}),
        analysis=SimpleNamespace(names=names, cos_pc1=[0.1, 0.25],
                                 components=[SimpleNamespace(ratio=[0.3]),
                                             SimpleNamespace(ratio=[0.5])]))
    assert distances(found, 1) == {name: -float(i) for i, name in enumerate(names)}
    lines = summary(found, "a b", 1, held_out=names[:9])
    assert ("  nearest to farthest: " in "".join(lines)) == (count == 10)
    assert "left out, with fewer than 2 replies with score 3: 1 (silent)" in lines
    assert f"held out: 9 ({', '.join(names[:8])}, …)" in lines
    assert ("|cos(PC1, axis)| at layer 1: 0.250; PC1 explains 50% of the role vectors' variance"
            in lines)
    assert "mean 0 and standard deviation 1;" in " ".join(lines)
    assert "  jaxpersona report 'a b'" in lines and "judge rules: 22 with score 3" in (
        lines[1] if count == 10 else "judge rules: 22 with score 3")


def test_a_base_model_is_told():
    assert base_notice(SimpleNamespace(name="x", template=True)) is None
    assert "x has no chat template" in base_notice(SimpleNamespace(name="x", template=False))
