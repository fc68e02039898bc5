"""Texts of the page of a run: results, gaps, provenance and captions, from values made by hand."""

from __future__ import annotations

import types

import numpy as np
import pytest
from test_run_values import contents

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.judges.protocol import Item
from jaxpersona.persona.bootstrap import PcaIntervals
from jaxpersona.report import run_about
from jaxpersona.report.run_halves import Agreement
from jaxpersona.report.run_rounds import Curve
from jaxpersona.report.run_values import Notes, values

NAN = float("nan")
CURVE = Curve(0.9, 2, [4, 8], np.array([[NAN, 0.95], [NAN, 0.9], [NAN, 0.99]]),
              np.array([[0.5, 0.75], [0.25, 0.5], [0.625, 0.875]]), np.array([0.0, 0.5]), ["b"],
              1_500, 4_000, np.array([0.95, 0.9, 0.99]))


def agreement(low=2, high=2, roles=4, default=1_234):
    one = np.array([0.5])
    found = Agreement(one, one, one, roles, (low, high), default)
    return types.SimpleNamespace(agreement=lambda: found, left_out=["d"])


def gaps(found, **more):
    return dict(run_about.gaps(found, values(found, Notes(), None), **more))


def test_a_complete_run_without_an_axis_says_why():
    """Unlike a run whose axis is not computed yet."""
    found = contents(closed={"a", "b"})
    found.axis = found.analysis = None
    part = "Components, ranking, values by layer and thresholds"
    for status, words in (({"state": "complete"}, "the last call ended without one"),
                          ({"state": "running"}, "the run has not computed its axis yet"),
                          (None, "the run has not computed its axis yet")):
        found.status = status
        told = gaps(found)
        assert words in told[part]
        assert told["Roles that are not complete yet"] == "default, c, d, h"
        assert told["Scores by role"] == "no role has all its verdicts yet"
        assert set(told) == {part, "Roles that are not complete yet", "Scores by role"}


def test_missing_parts_of_a_run_with_an_axis_are_named():
    """Halves, intervals, unsettled roles and roles with too few replies."""
    found = contents(closed=set("abcdh") | {"default"}, counts={"a": {"3": 1}})
    told = gaps(found)
    assert set(told) == {"Split-half agreement of the axis", "Intervals of the values by layer"}
    found.halves = agreement()
    assert gaps(found)["Roles that are not used for the split-half agreement"] == (
        "fewer than two stored replies with score 3: d")
    bars = PcaIntervals(np.zeros((2, 1)), np.zeros((2, 1, 4)), ("b", "c"))
    told = gaps(found, bars=bars)
    assert "fewer than two stored replies with score 3: b, c" in told.values()
    assert "Intervals of the values by layer" not in told and len(told) == 2
    assert len(gaps(found, bars=PcaIntervals(np.zeros((2, 1)), np.zeros((2, 1, 4))))) == 1
    found.roles.append("few")
    found.closed.add("few")
    found.analysis.roles["few"] = found.analysis.roles["h"].__class__(
        np.zeros(1), np.zeros((2, 1)), 1, 1, False, False)
    found.axis = jp.Axis([[1, 0.1, 0]], notes={"min_count": 7})
    few = "Roles with fewer than 7 fully played replies, which the axis leaves out"
    assert gaps(found)[few] == "few"
    found.analysis.__dict__["rounds"] = CURVE
    told = gaps(found)
    assert told["Roles that are not settled at the precision 0.9"] == "all questions were asked: b"
    del found.vectors["b"]
    assert gaps(found)["Role vectors on two components"] == "vectors are missing or not finite: b"
    found.judge = "none"
    assert gaps(found)["Scores by role"].startswith("judge none: no reply was read")


def test_the_main_results_have_their_intervals():
    """At the middle layer, of two layers."""
    found = contents(rollouts={"a": 1_000, "default": 500})
    found.judge = ""
    found.analysis.__dict__["rounds"] = CURVE
    data = values(found, Notes(), None)
    data["middle"] = 0
    bars = {"cos": {"low": [0.25], "high": [None]}, "variance": {"1": {"low": [0.4],
                                                                       "high": [0.6]}}}
    data["byLayer"]["bars"] = bars
    data["reliability"] = {"mean": [0.98765]}
    assert run_about.facts(found, data) == [
        ("roles in the axis", "4 of 5; 1 held out"), ("rollouts", "1,500"), ("judge", "unknown"),
        ("reliability of the axis at layer 2", "0.950 (0.900 to 0.990)"),
        ("rollouts saved", "2,500 of 4,000 (62%)"),
        ("|cos(PC1, axis)| at layer 0", "1.000 (95 % interval 0.250 to not finite)"),
        ("variance of PC1 at layer 0", "50 % (95 % interval 40 % to 60 %)"),
        ("split-half agreement at layer 0", "0.988"),
        ("most like the Assistant at layer 0", "h, a, c, b"),
        ("least like the Assistant at layer 0", "b, c, a, h")]
    found = contents()
    found.axis = found.analysis = None
    found.status = {"rollouts": 7}
    assert run_about.facts(found, values(found, Notes(), None)) == [("rollouts", "7"),
                                                                    ("judge", "test")]


def test_the_five_ends_of_a_ranking_are_named():
    """An underscore of a name is a space."""
    data = {"middle": 0, "byLayer": None, "reliability": None, "order": [[6, 5, 4, 3, 2, 1, 0]],
            "roles": [{"name": f"r_{i}"} for i in range(7)]}
    found = contents()
    found.analysis = None
    told = dict(run_about.facts(found, data))
    assert told["most like the Assistant at layer 0"] == "r 6, r 5, r 4, r 3, r 2"
    assert told["least like the Assistant at layer 0"] == "r 0, r 1, r 2, r 3, r 4"


def test_the_caption_of_the_halves_has_their_numbers():
    """A range only where the numbers of replies differ."""
    found = contents()
    assert run_about.halves(found) == ""
    found.halves = agreement(3, 3)
    assert "for each of 4 roles, 3 replies with score 3, and for the default persona, 1,234 " in (
        run_about.halves(found))
    found.halves = agreement(2, 16, roles=1_200)
    text = run_about.halves(found)
    assert "for each of 1,200 roles, 2 to 16 replies with score 3" in text
    assert "halves, 20 times" in text


def test_the_provenance_has_the_values_of_the_manifest():
    """Flags that are off and empty variables are left out."""
    found = contents(counts={"a": {"3": 1_000, "None": 2, "failed": 1}, "b": {"3": 500, "0": 4}})
    found.manifest |= {
        "model": {"layers": 1, "dtype": "bfloat16"}, "roles": {"a": 1},
        "questions": {"0": 1, "1": 2},
        "arguments": {"top_p": 0.9, "mesh": None, "stops": [1, 2]}, "judges": {"z": 1, "b": 2},
        "last": {"model": "m", "min_count": 3, "held_out": ["x"], "keep_means": 16, "other": 1,
                 "versions": {"jax": "0.7"}},
        "numerics": {"platform": "cpu", "devices": 2, "jax": {"x64": False, "prng": None, "f": 3},
                     "environment": {"A": "", "B": "1"}}}
    found.status = {"cost": 1234.5, "started": "s", "updated": "u", "seconds": 61.25,
                    "tokens": 12_345}
    rows = {group["title"]: dict(group["rows"]) for group in run_about.provenance(found, "3.1")}
    assert rows["Model"] == {"name": "m", "layers": "1", "dtype": "bfloat16"}
    assert rows["Prompts"]["roles"] == "5 and the default persona"
    assert rows["Prompts"]["questions"] == "2"
    assert rows["Sampling"] == {"top p": "0.9", "mesh": "none", "stops": "1, 2"}
    assert rows["Judge"] == {
        "judge of this page": "test", "judges of the run": "b, z", "replies with score 0": "4",
        "replies with score 3": "1,500", "replies undecided": "2",
        "replies without a verdict": "1", "cost of the last call's verdicts": "$1,234.5000"}
    assert rows["Axis"] == {"min count": "3", "held out": "h", "keep means": "16"}
    assert rows["Device"] == {"platform": "cpu", "devices": "2", "JAX settings": "f 3",
                              "environment": "B 1"}
    assert rows["Versions"] == {"jax": "0.7", "plotly.js (this page)": "3.1"}
    assert rows["Time"] == {"last call started": "s", "last written": "u",
                            "wall time of the last call": "61.2 s",
                            "tokens that the last call generated": "12,345"}
    bare = contents()
    bare.judge = "none"
    rows = {group["title"]: dict(group["rows"]) for group in run_about.provenance(bare, "")}
    assert rows["Judge"] == {"judge of this page": "none", "judges of the run": "none yet",
                             "cost of the last call's verdicts": "unknown"}
    assert set(rows["Time"].values()) == {"unknown"} and rows["Model"]["name"] == "unknown"
    assert rows["Device"] == {"JAX settings": "default",
                              "environment": "nothing that changes results"}


@pytest.mark.parametrize(("value", "wanted"), [
    ({}, "none"), ([], "none"), (None, "none"), (0, "0"), (False, "False"),
    ({"a": [1, {"b": None}], "c": 2}, "a 1, b none, c 2")])
def test_values_of_json_are_written_as_text(value, wanted):
    """Nested values on one line."""
    assert run_about._text(value) == wanted


def test_numbers_and_shares_are_rounded():
    """A value that is missing is named."""
    assert (run_about._number(0.98765), run_about._number(None)) == ("0.988", "not finite")
    assert (run_about._share(0.256), run_about._share(None)) == ("26 %", "not finite")
    assert run_about._ends({"low": [1, 0.25], "high": [1, 0.75]}, 1, run_about._share) == (
        " (95 % interval 25 % to 75 %)")


def test_dialogues_are_grouped_by_score():
    """In the order of the samples; the default persona comes last."""
    role = Role("a", ("x",), "")
    items = [Item(f"pos_p0_q{i}", role, f"Q{i}?", f"A{i}.", "Be a.") for i in range(4)]
    found = contents(samples=[(items[0], 3), (items[1], 3), (items[2], None)], plain=[items[3]])
    told = run_about.dialogues(found)
    assert [(group["title"], len(group["items"])) for group in told] == [
        ("Score 3", 2), ("Undecided", 1), ("Default persona (not judged)", 1)]
    assert told[0]["items"][1] == {"role": "a", "place": "prompt 0, question 1", "system": "Be a.",
                                   "question": "Q1?", "answer": "A1."}
    found.judge = "none"
    assert [group["title"] for group in run_about.dialogues(found)][0] == (
        "Replies of roles, without a score")
    assert run_about.dialogues(contents()) == []


def test_the_page_shows_the_parts_that_it_has():
    """With more than forty roles, the page says that not all of them are named."""
    found = contents(counts={"a": {"3": 1}})
    found.analysis.__dict__["rounds"] = CURVE
    data = values(found, Notes(), None)
    told = run_about.context(found, data, ["a note"], "3.1")
    assert told["title"] == "Assistant Axis of a model" and told["notes"] == ["a note"]
    assert told["shown"] == {"pca": True, "order": True, "byLayer": True, "thresholds": True,
                             "reliability": False, "rounds": True, "drift": False}
    assert told["scored"] and not told["many"]
    assert told["bars"] == "" and not told["intervals"]
    assert told["rounds"] == ("The target is 0.9, at layer 2. The run needed 1,500 of 4,000 "
                              "rollouts.")
    found.manifest["last"] = {"model": "qwen"}
    found.judge = "none"
    bars = PcaIntervals(np.zeros((2, 1)), np.zeros((2, 1, 4)))
    for count, many in ((40, False), (41, True)):
        more = data | {"roles": [{"name": "x"}] * count, "order": None, "thresholds": {
            "all": {"p25": {"value": [1.0], "low": [0.5]}}}}
        told = run_about.context(found, more, [], "", bars)
        assert (told["many"], told["scored"], told["intervals"]) == (many, False, True)
        assert told["title"] == "Assistant Axis of qwen"
        assert told["bars"].startswith(" Band: 95 % bootstrap interval over the replies.")


def test_the_figure_of_the_rounds_has_the_curves_and_names_the_gaps():
    """Rounds are counted from 1 in the notes."""
    notes = Notes()
    assert CURVE.value(notes) == {
        "target": 0.9, "layer": 2, "questions": [4, 8],
        "axis": [[None, 0.95], [None, 0.9], [None, 0.99]],
        "roles": [[0.5, 0.75], [0.25, 0.5], [0.625, 0.875]], "settled": [0.0, 0.5]}
    assert notes.lines == ["reliability of the axis: not finite at round 1, and not drawn there"]


@pytest.mark.parametrize(("change", "words"), [
    ({"rollouts": 73}, "at most `quota` rollouts"), ({"asked": {"default": 3}}, "contains no role"),
    ({"rounds": []}, "at least one round")])
def test_a_precision_without_its_rounds_is_refused(change, words):
    """The quota itself may be reached, and the reliability of all rollouts may be stored apart."""
    about = {"target": 0.9, "layer": 2, "asked": {"default": 6, "b": 6, "a": 6}, "settled": ["a"],
             "rollouts": 72, "quota": 72, "axis": [0.9, 0.8, 0.95], "rounds": [
                 {"questions": 4, "axis": None, "settled": 1, "roles": {"a": None, "b": None}}]}
    curve = Curve.read(about)
    assert curve.final.tolist() == [0.9, 0.8, 0.95] and curve.open == ["b"]
    assert (curve.rollouts, curve.quota, curve.target, curve.layer) == (72, 72, 0.9, 2)
    assert curve.settled.tolist() == [0.5] and np.isnan(curve.roles).all()
    with pytest.raises(ValueError, match=words):
        Curve.read(about | change)
