"""Which rollouts are read again, summed or judged when a role is closed, by small tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jaxpersona.persona import unequal
from jaxpersona.persona.precision import Cells
from jaxpersona.runs.closing import PLAIN, State, needed, save_verdicts, summed
from jaxpersona.runs.sums import Sample, Sums


def record(prompt, question):
    return {"label": "pos", "prompt_index": prompt, "question_index": question, "sample": 0}


def key(prompt, question):
    return f"pos_p{prompt}_q{question}"


def state(groups, scores, live=(), layer=None, verdicts=None):
    """Return the state of a role with two prompts and two questions, in another order."""
    records = {key(p, q): record(p, q) for p, q in ((1, 1), (0, 1), (1, 0), (0, 0))}
    held = SimpleNamespace(has_mean=lambda one: one in live, records=dict.fromkeys(live, {}),
                           verdicts={} if verdicts is None else verdicts)
    return State(records, held, {one: {"score": score} for one, score in scores.items()},
                 Sums({}, groups, layer), False)


THREE = dict.fromkeys((key(0, 0), key(1, 0), key(0, 1)), 3)


@pytest.mark.parametrize(("groups", "live", "options", "wanted"), [
    ({}, (), {}, ["p0_q0", "p1_q0", "p0_q1"]),  # by question, then by prompt
    ({}, (), {"unjudged": True}, ["p0_q0", "p1_q0", "p0_q1", "p1_q1"]),
    ({key(0, 0): "3"}, (), {}, ["p1_q0", "p0_q1"]),
    ({key(0, 0): "empty"}, (key(0, 1),), {}, ["p1_q0"]),
    ({key(0, 0): "2"}, (), {}, ["p0_q0", "p1_q0", "p0_q1"]),  # the score has changed
    ({key(0, 0): "3"}, (), {"layer": 2}, ["p1_q0", "p0_q1"]),
    ({key(0, 0): "3"}, (), {"layer": 1}, ["p0_q0", "p1_q0", "p0_q1"])])
def test_means_that_neither_sums_nor_live_files_have_are_read_again(groups, live, options, wanted):
    """Sums of other scores, or without sums per question at the layer, count as empty."""
    found = needed(state(groups, THREE, live, layer=2), "ghost", **options)
    assert [f"p{r['prompt_index']}_q{r['question_index']}" for r in found] == wanted


def test_the_default_persona_needs_no_verdicts():
    """All its rollouts are read again, and none is judged."""
    one = state({}, {})
    assert len(needed(one, "default")) == 4 and needed(one, "ghost") == []
    assert one.unjudged("default") == []
    assert one.unjudged("ghost") == [key(1, 1), key(0, 1), key(1, 0), key(0, 0)]
    assert state({}, THREE).unjudged("ghost") == [key(1, 1)]


@pytest.mark.parametrize(("keys", "live", "verdicts", "layer", "wanted"), [
    ({key(0, 0), key(1, 0)}, (), None, 2, True), ({key(0, 0), key(0, 1)}, (), None, 2, False),
    ({key(0, 0)}, (key(0, 0),), None, 2, False), ({key(0, 0)}, (key(1, 1),), None, 2, True),
    ({key(0, 0)}, (), {"j": {key(0, 0): {}}}, 2, False), ({key(0, 0)}, (), None, 1, False)])
def test_a_role_is_summed_if_its_sums_have_the_rollouts_and_no_live_file_does(
        keys, live, verdicts, layer, wanted):
    """Other rollouts in the live files do not matter."""
    groups = {key(0, 0): "3", key(1, 0): "3"}
    found = state(groups, THREE, live, layer=2, verdicts=verdicts)
    assert summed(found, "ghost", keys, layer) == wanted


def test_a_scores_file_has_only_the_details_that_differ_from_a_plain_verdict():
    """Failed replies are in the file, but not in the returned scores."""
    told = []
    run = SimpleNamespace(save_verdicts=lambda *given: told.append(given))
    one = state({}, {})
    one.verdicts = {key(0, 0): {**PLAIN, "score": 3, "raw": "3"}, key(1, 1): {"score": 2},
                    key(1, 0): {**PLAIN, "error": "busy"}, "gone": {"score": 1},
                    key(0, 1): {**PLAIN, "refused": True, "expected": 0.5, "mass": 1.0}}
    assert save_verdicts(run, "ghost", one, "j", "r") == {
        key(1, 1): 2, key(0, 1): None, key(0, 0): 3}
    (given,) = told
    assert given[:3] == ("ghost", "j", "r")
    assert list(given[3].items()) == [(key(1, 1), 2), (key(0, 1), None), (key(1, 0), None),
                                      (key(0, 0), 3)]
    assert given[4] == {key(1, 1): {}, key(0, 1): {"refused": True, "expected": 0.5, "mass": 1.0},
                        key(1, 0): {"error": "busy"}, key(0, 0): {"raw": "3"}}


def filled():
    """Sums at layer 1 of replies to questions 0 and 2; one reply is empty."""
    sums = Sums({}, {}, layer=1)
    for i, (name, score) in enumerate((("pos_p0_q0", 3), ("pos_p1_q0", 3), ("pos_p0_q2", 3),
                                       ("pos_p1_q2", 0), ("pos_p2_q2", None))):
        sums.add(name, score, np.array([[0.0, 0.0], [i + 1.0, 10.0 * i]], np.float32))
    sums.add("pos_p3_q0", 3, np.full((2, 2), np.nan, np.float32))
    return sums


def test_sums_per_question_have_the_replies_of_a_group_or_of_all():
    """Sums at the layer in the order of the questions; unknown questions have none."""
    for sums in (filled(), Sums.read(*filled().stored())):
        assert (sums.layer, sums.count("3"), sums.count("empty")) == (1, 3, 1)
        for group, order, totals, counts in (
                ("3", [2, 0, 5], [[3, 20], [3, 10], [0, 0]], [1, 2, 0]),
                (None, [0, 2], [[3, 10], [12, 90]], [2, 3]), ("0", [2], [[4, 30]], [1])):
            found = sums.by_question(group, order)
            assert found[0].tolist() == totals and found[1].tolist() == counts
            assert found[0].dtype == np.float32
    tensors, about = filled().stored()
    assert about["layer"] == "1"
    assert set(tensors) == {"3", "0", "none", "3/0", "3/2", "0/2", "none/2"}
    assert Sums({}, {}, 1).by_question("3", [0])[0].shape == (1, 0)


def test_cells_are_those_of_score_3_and_for_the_default_persona_of_all_replies():
    """A role that was not asked a question has a mask."""
    assert unequal.cells_of(Sums({}, {}), "ghost", [0]) is None
    ghost = unequal.cells_of(filled(), "ghost", [2, 0])
    assert ghost.totals.tolist() == [[3, 20], [3, 10]] and ghost.counts.tolist() == [1, 2]
    assert ghost.asked is None
    own = unequal.cells_of(filled(), "default", [2, 0], {0: 9})
    assert own.counts.tolist() == [3, 2] and own.asked.tolist() == [False, True]
    empty = Cells(np.zeros((2, 0), np.float32), np.zeros(2, int))
    merged = unequal.merged_cells({"a": ghost, "b": empty})
    assert merged["b"].totals.shape == (2, 2) and merged["a"] is ghost
    assert unequal.merged_cells({"a": ghost, "b": None}) is None


def test_questions_are_counted_in_the_scores_or_in_the_sums_and_ordered_by_the_seed():
    """The default persona has no scores file."""
    run = SimpleNamespace(verdicts=lambda name, judge: None if name == "default" else {
        "scores": {"pos_p0_q4": 3, "pos_p1_q4": None}})
    assert unequal.questions_of(run, "ghost", "j", filled()) == {4: 2}
    assert unequal.questions_of(run, "default", "j", filled()) == {0: 3, 2: 3}
    asked = {"a": [1, 3], "b": {0: 1, 2: 5, 3: 1}, "c": [4, 5]}
    assert unequal.order_of(asked, 0) == [2, 5, 3, 1, 0, 4]  # as in `precision.ordered`


def cells(rows):
    return Cells(np.array(rows, np.float32), np.ones(len(rows), int))


def test_a_role_with_other_questions_is_corrected_by_the_default_persona_s_means():
    """Means 1 and 5 of questions 0 and 1; a role with question 0 alone is moved by b · 2."""
    means = np.array([[[1.0]], [[5.0]], [[np.nan]]], np.float32)
    sample = Sample(["default_p0_q0", "default_p0_q1", "default_p1_q1"],
                    np.full((1, 1), 7, np.float32), means)
    run = SimpleNamespace(sample=lambda name: sample if name == "default" else None)
    own, half = cells([[1], [5]]), cells([[0], [2]])  # slope: (2 · 1) / (2 · 2)
    asked = {"default": [0, 1], "all": [1, 0], "few": [0], "other": [1, 9]}
    found = unequal.correction(run, asked, {"default": own, "all": half})
    assert found.slope == 0.5 and {name: move.tolist() for name, move in found.shifts.items()} == {
        "few": [[1.0]], "other": [[-1.0]]}
    assert found.problem.startswith("1 role (other): has rollouts of questions that the default")
    del asked["other"]
    assert unequal.correction(run, asked, {"default": own, "all": half}).problem == ""
    none = unequal.correction(run, asked, None)
    assert (none.slope, none.shifts) == (None, {})
    assert none.problem.startswith("1 role (few): asked other questions than the default persona; ")
    same = unequal.correction(run, {"default": [0, 1], "all": [0, 1]}, {"default": own, "a": half})
    assert (same.slope, same.shifts, same.problem) == (0.5, {}, "")
    vectors = {"pos_3": (np.ones((1, 1), np.float32), 4), "mean": (np.zeros((1, 1)), 6)}
    assert unequal.corrected(vectors, None) == vectors
    moved = unequal.corrected(vectors, np.array([[0.5]]))
    assert {name: (value.tolist(), n) for name, (value, n) in moved.items()} == {
        "pos_3": ([[1.5]], 4), "mean": ([[0.5]], 6)}
    assert moved["mean"][0].dtype == np.float32
