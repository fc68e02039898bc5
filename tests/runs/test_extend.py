"""A run is extended by questions, roles, another judge, min_count and held-out roles."""
# ruff: noqa: F811 (fixtures of another module are imported and then named as arguments)

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from test_damages import (  # noqa: F401
    MODEL,
    QUESTIONS,
    ROLES,
    SETTINGS,
    contents,
    finished,
    resume,
    run,
)

from jaxpersona.data.texts import Question, Role
from jaxpersona.engine import stream
from jaxpersona.errors import UserError
from jaxpersona.models.model import release
from jaxpersona.persona import rejudge
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.rejudge import judge_run
from jaxpersona.persona.thresholds import percentiles_of
from jaxpersona.runs.compare import sealed
from jaxpersona.runs.run import Run

MORE = [*QUESTIONS, Question(2, "What?"), Question(7, "Who?")]
OTHER = s.Scored(lambda role, key: 3 if "_p0_" in key else None, "another")


def extend(folder, roles=ROLES, questions=QUESTIONS, **changes):
    said = []
    options = {"judge": s.Scored(lambda role, key: 2 if key == "pos_p1_q1" else 3),
               "settings": SETTINGS, "min_count": 2, "notice": said.append, **changes}
    return extract_axis(MODEL, roles, questions, folder, **options), said


@pytest.fixture
def played(monkeypatch):
    """Return the list of rollouts that are generated, as (role, prompt, question)."""
    made = []
    task = stream.Stream._task

    def counted(self, tag, *rest):
        made.append((tag[0], tag[1]["prompt_index"], tag[1]["question_index"]))
        return task(self, tag, *rest)

    monkeypatch.setattr(stream.Stream, "_task", counted)
    return made


def test_more_questions_give_the_bytes_of_a_run_with_all_of_them(run, tmp_path, played):
    """Only the rollouts of new questions are generated, and sums continue in their order."""
    found, said = extend(run, questions=MORE)
    assert {question for *_, question in played} == {2, 7} and len(played) == 16
    assert "the run is extended; new questions (2): 2, 7" in said
    whole, _ = extend(tmp_path / "whole", questions=MORE)
    np.testing.assert_array_equal(found.axis.values, whole.axis.values)
    assert found.counts == whole.counts and found.rollouts == whole.rollouts == 32
    one, two = contents(run), contents(tmp_path / "whole")
    assert set(one) == set(two)
    same = [name for name in one if name.split("/")[0] in ("rollouts", "scores", "sums", "vectors")]
    assert len(same) == 15 and all(one[name] == two[name] for name in [*same, "run.json"])
    for role in ROLES:  # only the base of the stored differences is another one
        a, b = (Run.read(folder).sample(role.name) for folder in (run, tmp_path / "whole"))
        assert a.keys == b.keys
        np.testing.assert_allclose(a.means, b.means, atol=0.04)  # two roundings to 8 bits
    del played[:]
    extend(run, questions=MORE[:1])  # fewer questions: what is there stays and is used
    assert not played and len(Run.read(run).rollouts("ghost")) == 8


def test_more_roles_leave_the_others_files(run, played):
    before = contents(run)
    sage = Role("sage", ("You are a sage.",), "{question} {answer}?")
    found, said = extend(run, roles=[*ROLES, sage], min_count=1)
    assert {role for role, *_ in played} == {"sage"} and "sage" in found.counts
    assert any(line.startswith("the run is extended; new roles (1): sage") for line in said)
    after = contents(run)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"run.json", "axis.safetensors", "analysis.json"}
    found, _ = extend(run)  # without it, its files stay
    assert "sage" not in found.counts and "rollouts/sage.jsonl" in contents(run)


def test_another_judge_reads_the_rollouts_that_are_there(run, played):
    """The means are read again in a forward pass; both judges' scores and sums are kept."""
    run_before = Run.read(run)
    means = {role.name: run_before.sample(role.name) for role in ROLES}
    before = contents(run)
    found, said = extend(run, judge=OTHER)
    assert not played and any(line.startswith('judge was "test", now "another"') for line in said)
    assert found.counts["ghost"] == {"0": 0, "1": 0, "2": 0, "3": 2, "None": 2}
    for name in ("ghost", "pirate", "tutor"):  # [n, L, D] of the first prompt's rollouts
        kept = [i for i, key in enumerate(means[name].keys) if "_p0_" in key]
        expected = means[name].means[kept].mean(0)
        assert s.relative(found.role_means[name], expected) <= 2e-3  # bfloat16 differences
    after = contents(run)
    assert all(after[name] == before[name] for name in before
               if name.split("/")[0] in ("rollouts", "samples", "scores", "sums"))
    again, _ = extend(run)
    assert not played and contents(run)["axis.safetensors"] == before["axis.safetensors"]
    assert again.axis.notes["judge"] == "test"


def test_what_is_read_again_is_what_generation_read(tmp_path):
    """Sums from a second pass equal those of the first to the rounding of float32."""
    extend(tmp_path / "run")
    extend(tmp_path / "run", judge=like_the_first("again"))
    found = Run.read(tmp_path / "run")
    for role in ROLES[1:]:
        one, two = found.sums(role.name, "test"), found.sums(role.name, "again")
        assert one.groups == two.groups
        for group, total in one.totals.items():
            assert s.relative(two.totals[group], total) <= 1e-5


def test_the_percentiles_count_replies_that_are_not_empty(run):
    found, _ = extend(run)
    groups = {role.name: Run.read(run).sums(role.name, "test").groups for role in ROLES}
    sizes = {name: len(of) - list(of.values()).count("empty") for name, of in groups.items()}
    assert min(sizes.values()) < 4 and max(sizes.values()) == 4
    wanted, between = percentiles_of(found.projections, sizes)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found.axis.percentiles["all"][name], value)
        np.testing.assert_array_equal(found.intervals["all"][name], between[name])


def like_the_first(name):
    return s.Scored(lambda role, key: 2 if key == "pos_p1_q1" else 3, name)


def test_sums_that_are_gone_are_read_again(run, played):
    before = Run.read(run).sums("ghost", "test")
    (run / "sums" / "test" / "ghost.safetensors").unlink()
    extend(run)
    after = Run.read(run).sums("ghost", "test")
    assert not played and before.groups == after.groups
    assert s.relative(after.totals["3"], before.totals["3"]) <= 1e-5


def test_min_count_and_held_out_roles_take_no_generation(run, played):
    found, said = extend(run, min_count=3, held_out=["tutor"])
    assert not played and found.analysis.names == ["ghost", "pirate"]
    assert any(line.startswith("held_out was [], now [\"tutor\"]") for line in said)
    assert any(line.startswith("min_count was 2, now 3") for line in said)


def test_another_rubric_is_another_verdict(run):
    """A role whose `eval_prompt` changed is judged again; others are not.

    Its sums are then those of the new scores.
    """
    before = Run.read(run).sums("pirate", "test")
    asked = []
    judge = s.Scored(lambda role, key: asked.append(role) or 3)
    roles = [ROLES[0], dataclasses.replace(ROLES[1], eval_prompt="{question} {answer}!"),
             *ROLES[2:]]
    found, _ = extend(run, roles=roles, judge=judge)
    assert set(asked) == {"ghost"} and found.counts["ghost"]["3"] == 4
    assert found.counts["pirate"] == {"0": 0, "1": 0, "2": 1, "3": 3, "None": 0}
    kept = Run.read(run)
    assert set(kept.sums("ghost", "test").groups.values()) == {"3"}
    assert kept.sums("pirate", "test").groups == before.groups
    # the vector of score 3 includes the reply that had score 2; bfloat16 differences
    assert s.relative(found.role_means["ghost"], kept.sample("ghost").means.mean(0)) <= 2e-3


def test_a_role_that_is_being_extended_keeps_the_verdicts_of_another_judge(run):
    """Its scores file is written when the new rollouts have the verdicts of this judge too."""
    def stops(role, key):
        raise UserError("the budget is used")

    with pytest.raises(UserError, match="the budget is used"):
        extend(run, questions=MORE, judge=s.Scored(stops))
    found = Run.read(run)
    shape = MODEL.config.n_layers, MODEL.config.d_model
    new = {role.name: set(found.live(role.name, shape, repair=False).records)
           for role in ROLES[1:]}
    assert any(new.values())
    counts, _ = judge_run(run, ROLES, OTHER)
    assert {role: sum(count.values()) for role, count in counts.items()} == {
        role: 0 if keys else 4 for role, keys in new.items()}
    asked = []
    result, _ = extend(run, questions=MORE, judge=s.Scored(
        lambda role, key: asked.append((role, key)) or OTHER._score(role, key), "another"))
    assert result.counts["ghost"]["3"] == result.counts["ghost"]["None"] == 4
    assert len(asked) == 12 - sum(map(len, new.values()))


def test_verdicts_of_a_killed_call_are_saved_by_the_next(run, monkeypatch):
    """The process ends between the last verdict of a role and the file of its scores."""
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rejudge, "save_verdicts", dies)
        with pytest.raises(KeyboardInterrupt):
            judge_run(run, ROLES, OTHER)
    counts, _ = judge_run(run, ROLES, OTHER)
    assert all(count["3"] == count["None"] == 2 for count in counts.values())
    found = Run.read(run)
    assert all(found.scores(role.name, OTHER.name) for role in ROLES[1:])
    assert judge_run(run, ROLES, OTHER)[0] == counts


class Last(s.Scored):
    """A judge whose model is loaded in place of the evaluated one, as with `--judge-after`."""

    after = together = True

    def __init__(self, model, *given):
        super().__init__(*given)
        self._model = model

    def score(self, items):
        release(self._model)
        yield from super().score(items)


def own_model():
    """Return `MODEL` with arrays of its own, which may be deleted."""
    return dataclasses.replace(MODEL, params=jax.tree.map(jnp.copy, MODEL.params))


@pytest.mark.parametrize("name", ["test", "another"])
def test_means_are_read_again_before_the_model_is_released(run, played, name):
    """All means of a role are needed if its rubric changed, or if it had another judge."""
    model = own_model()
    roles = [ROLES[0], dataclasses.replace(ROLES[1], eval_prompt="{question} {answer}!"),
             *ROLES[2:]]
    found = extract_axis(model, roles, QUESTIONS, run, settings=SETTINGS, min_count=2,
                         judge=Last(model, lambda role, key: 3, name))
    assert model.params.like.is_deleted() and not played
    assert found.counts["ghost"]["3"] == 4
    assert set(Run.read(run).sums("ghost", name).groups.values()) == {"3"}


def test_failed_verdicts_are_counted_and_asked_for_again(tmp_path):
    asked = []

    def busy(role, key):
        asked.append((role, key))
        return OSError("busy") if key.endswith("q1") else 3

    with pytest.warns(UserWarning, match=r"judge failed: 6 \(busy\)"):
        found, _ = extend(tmp_path / "run", judge=s.Scored(busy), min_count=1)
    assert found.counts["ghost"]["failed"] == 2 and found.counts["ghost"]["3"] == 2
    assert len(asked) == 12
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert state["verdicts_failed"] == 6 and state["verdicts"] == 6
    del asked[:]
    found, _ = extend(tmp_path / "run", min_count=1)  # warnings are errors in tests
    assert found.counts["ghost"] == {"0": 0, "1": 0, "2": 1, "3": 3, "None": 0}
    assert not [p for p in (tmp_path / "run" / "live").iterdir()]
    found, _ = extend(tmp_path / "run", judge=s.Scored(busy), min_count=1)
    assert not asked  # every reply has a verdict


def test_a_judge_that_stops_keeps_what_it_said(tmp_path):
    """Verdicts before the error are not asked for again, and no rollout is generated again."""
    asked = []

    def stops(role, key):
        asked.append((role, key))
        if len(asked) == 7:
            raise UserError("the budget is used")
        return 3

    with pytest.raises(UserError, match="the budget is used"):
        extend(tmp_path / "run", judge=s.Scored(stops))
    before = asked[:6]
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert state["state"] == "stopped"
    del asked[:]
    asked += [None] * 10  # the second judge does not stop
    found, _ = extend(tmp_path / "run", judge=s.Scored(stops))
    assert not set(before) & set(asked[10:]) and len(asked) == 16
    assert found.counts["ghost"]["3"] == 4


def test_versions_and_names_may_change(run, played):
    """Another NumPy, or another spelling of the model's path, is noted and not refused."""
    manifest = json.loads((run / "run.json").read_text())
    manifest["last"]["versions"]["numpy"] = "1.0"
    manifest["last"]["model"] = "./elsewhere/tiny"
    (run / "run.json").write_text(json.dumps(sealed(manifest)))
    _, said = extend(run)
    assert not played and any(line.startswith("versions was") for line in said)
    assert any(line.startswith('model was "./elsewhere/tiny", now "tiny"') for line in said)


@pytest.mark.parametrize("keep", [2, 3, None])
def test_the_number_of_kept_means(tmp_path, keep):
    found, _ = extend(tmp_path / "run", keep_means=keep)
    sizes = {name: len(value) for name, value in found.projections.items()}
    assert sizes == {"default": 4, **dict.fromkeys(("ghost", "pirate", "tutor"), keep or 4)}
    with pytest.raises(UserError, match="keep_means is 1"):
        extend(tmp_path / "no", keep_means=1)
    assert not (tmp_path / "no").exists()
