"""The rounds of a run with a precision as text and as JSON, and the arguments that give them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxpersona.data.texts import Question
from jaxpersona.errors import UserError
from jaxpersona.persona.precision import Cells, Reliability, measure
from jaxpersona.persona.rounds import Round, Rounds, measured, rounds_and_quota, shown

NONE = Reliability(math.nan, math.nan, math.nan)
GOOD = Reliability(0.95123456, 0.9, 0.97)


def made(names=("b",), **more):
    """Two rounds of the role a, which is settled in the first, and of `names`, which are not."""
    rounds = [Round(4, NONE, {"a": GOOD, **dict.fromkeys(names, NONE)}, 0),
              Round(6, GOOD, dict.fromkeys(names, Reliability(0.5, 0.25, 0.75)), 1)]
    return Rounds(**{"target": 0.9, "layer": 2, "rounds": rounds,
                     "asked": {"a": 4, **dict.fromkeys(names, 6), "default": 6}, "settled": ["a"],
                     "rollouts": 30, "quota": 48, "slope": 0.12345678, "axis": GOOD, **more})


def test_the_result_in_words():
    """Numbers of rounds, of settled roles and of saved rollouts."""
    assert made().lines() == [
        "precision 0.9 at layer 2: the axis has reliability 0.951 (0.900 to 0.970) after 2 rounds; "
        "1 of 2 roles are settled", "rollouts saved: 18 of 48 (38%)",
        "not settled after all questions: 1 (b)"]
    many = [f"r{i}" for i in range(9)]
    assert made(many).lines()[-1] == (
        "not settled after all questions: 9 (r0, r1, r2, r3, r4, r5, r6, r7, …)")
    assert made(many[:8]).lines()[-1].endswith("8 (r0, r1, r2, r3, r4, r5, r6, r7)")
    assert len(made(settled=["a", "b"]).lines()) == 2
    assert "has reliability unknown after" in made(axis=NONE).lines()[0]
    assert shown(Reliability(0.5, 0.25, 1.0)) == "0.500 (0.250 to 1.000)"


def test_the_result_as_json():
    """A reliability is [value, low, high] with six digits, or null."""
    good, half = [0.951235, 0.9, 0.97], [0.5, 0.25, 0.75]
    assert made().value() == {
        "target": 0.9, "layer": 2, "rollouts": 30, "quota": 48, "slope": 0.123457,
        "asked": {"a": 4, "b": 6, "default": 6}, "settled": ["a"], "axis": good, "rounds": [
            {"questions": 4, "axis": None, "settled": 0, "roles": {"a": good, "b": None}},
            {"questions": 6, "axis": good, "settled": 1, "roles": {"b": half}}]}
    assert made().brief_value() == {
        "target": 0.9, "layer": 2, "axis": good, "rounds": 2, "settled": 1, "roles": 2,
        "rollouts_saved": 18, "quota": 48}
    assert made().last() == {"a": GOOD, "b": Reliability(0.5, 0.25, 0.75)}
    assert made(axis=Reliability(0.5, math.nan, 1.0)).value()["axis"] is None


def test_the_rounds_are_recorded_with_the_target():
    """Without a precision, nothing is recorded."""
    questions = [Question(i, "Why?") for i in range(7)]
    assert rounds_and_quota(None, None, questions, True) == ([], {})
    assert rounds_and_quota(0.5, None, questions, False) == (
        [4, 6, 7], {"precision": 0.5, "rounds": [4, 6, 7]})
    assert rounds_and_quota(0.5, [6], questions, False)[0] == [6, 7]
    for given, wanted in (((None, [4], questions, False), "precision is None; give both or omit"),
                          ((0.5, None, questions, True), "omit one of the two"),
                          ((0.5, None, questions[:3], False), "at least 4 questions")):
        with pytest.raises(UserError, match=wanted):
            rounds_and_quota(*given)


def test_the_reliability_of_all_averaged_rollouts_replaces_that_of_the_last_round():
    """With the slope of the correction, and the roles of the axis only."""
    rng = np.random.default_rng(0)
    cells = {name: Cells(rng.normal(size=(8, 5)).astype(np.float32) + shift, np.ones(8, int))
             for name, shift in (("default", 0), ("a", 3), ("b", 4), ("c", -9))}
    cells["b"] = cells["b"].within(np.arange(8) < 4)  # so that the slope of the correction counts
    asked = {"default": {0: 2, 1: 2}, "a": {0: 1}, "b": {0: 3, 5: 1}, "c": {}}
    found = measured(made(), asked, cells, ["b", "a"], 0.25)
    roles = {name: cells[name] for name in "abc"}
    assert found.axis == measure(cells["default"], roles, ["a", "b"], 0.25)[0]
    for used, slope in ((["a", "b", "c"], 0.25), (["a", "b"], None)):
        assert found.axis != measure(cells["default"], roles, used, slope)[0]
    assert (found.rollouts, found.slope, found.quota, found.settled) == (9, 0.25, 48, ["a"])


def test_a_target_that_is_just_reached_is_reached():
    """The lower end of the interval counts, not the value."""
    assert Reliability(0.99, 0.95, 1.0).reached(0.95)
    assert not Reliability(0.99, 0.949, 1.0).reached(0.95)
