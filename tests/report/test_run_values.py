"""The values of a page: places, components, halves and notes, against values made by hand."""

from __future__ import annotations

import json
import types

import made_runs
import ml_dtypes
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item
from jaxpersona.report import run_about, run_page
from jaxpersona.report.run_drift import Drift
from jaxpersona.report.run_halves import Halves
from jaxpersona.report.run_read import Analysis, Contents, Measured, _pick, _read_role, read
from jaxpersona.report.run_values import Notes, _cut, order, unplaced, values
from jaxpersona.runs.sums import Sample


def contents(**more):
    """Six roles at one layer, of which a to d define the axis."""
    vectors = {"a": (2, 0, 0), "b": (-2, 0, 0), "c": (0, 1, 0), "d": (0, -1, 0), "h": (1, -2, 7),
               "default": (5, 3, 0)}
    means = {"a": 2.0, "b": 1.0, "c": 2.0, "d": np.nan, "h": 3.0, "default": 9.0}
    measured = {name: Measured(np.array([value]), np.zeros((2, 1)), 4, 4, name in "abcd",
                               name == "h") for name, value in means.items()}
    analysis = Analysis(np.ones(1), [np.array([0.5, 0.25, 0.125, 0.0625])], {}, measured)
    return Contents(None, {"model": {"layers": 1}}, "test", None, jp.Axis([[1, 0.1, 0]]), analysis,
                    ["a", "b", "c", "d", "h"],
                    vectors={name: np.array([v], float) + [10, 20, 30] for name, v in
                             vectors.items()}, **more)


def test_places_of_roles_are_those_computed_by_hand():
    """The variance is 8 along the first channel and 2 along the second, signed as the axis."""
    found, notes = contents(), Notes()
    data = values(found, notes, None)
    assert data["pca"]["ratio"] == [[0.8], [0.2]]
    at = {one["name"]: (one["x"][0], one["y"][0]) for one in [*data["roles"], data["default"]]}
    assert at == {name: pytest.approx(place, abs=1e-6) for name, place in {
        "a": (2, 0), "b": (-2, 0), "c": (0, 1), "d": (0, -1), "h": (1, -2), "default": (5, 3)
    }.items()}
    assert data["byLayer"]["variance"] == {"1": [0.5], "2": [0.75], "3": [0.875], "10": [0.9375]}
    assert [data["roles"][i]["name"] for i in data["order"][0]] == ["h", "a", "c", "b"]
    ties = [{"name": name, "mean": [mean]} for name, mean in (("b", 1.0), ("c", 2.0), ("a", 1.0))]
    assert order(ties, 1) == [[1, 2, 0]]
    assert notes.lines == ["projection of 'd': not finite at every layer, and not drawn there"]
    # a vector that is not used for the axis may be missing; one that is may not
    del found.vectors["h"]
    assert values(found, Notes(), None)["pca"] is not None and not unplaced(found)
    found.vectors["b"] = np.array([[np.inf, 0, 0]])
    del found.vectors["default"]
    assert sorted(unplaced(found)) == ["b", "default"]
    assert values(found, Notes(), None)["pca"] is None


def test_notes_name_the_places_that_are_not_finite():
    notes, nan = Notes(), float("nan")
    assert notes.series("a", [1.234567, nan, -np.inf]) == [1.2346, None, None]
    for _ in range(2):
        assert notes.series("b", [nan, 2], "turn", 1) == [None, 2.0]
    assert (notes.number("c", nan), notes.number("d", 123456.7)) == (None, 123460.0)
    assert notes.lines == ["a: not finite at layers 1, 2, and not drawn there",
                           "b: not finite at turn 1, and not drawn there",
                           "c: not finite, and not drawn"]


def test_failed_verdicts_are_not_scores():
    details = {"k0": {}, "k1": {"error": "HTTP 500"}, "k2": {}}
    given = {"scores": {"k0": 3, "k1": None, "k2": None}, "details": details}
    found = contents()
    found.analysis = None
    for name in ("a", "b"):
        assert _read_role(types.SimpleNamespace(verdicts=lambda *_: given), name, found) == {
            "k0": 3, "k2": None}
    assert found.closed == {"a", "b"}
    assert found.counts["a"] == {"0": 0, "1": 0, "2": 0, "3": 1, "None": 1, "failed": 1}
    assert _read_role(types.SimpleNamespace(verdicts=lambda *_: None), "c", found) == {}
    items = [Item(f"pos_p{i % 2}_q{i}_s{i}", Role("a", ("",), ""), "", "") for i in range(9)]
    scores = {item.key: 3 if i < 5 else 0 for i, item in enumerate(items[:7])}
    for seed in range(4):  # three of five, both of two, and none without a score
        picked = _pick(items, scores, [seed])
        assert sorted(score for _, score in picked) == [0, 0, 3, 3, 3]
        assert len({item.key for item, _ in picked} & set(scores)) == 5
        assert len({item.key for item, _ in _pick(items, None, [seed])}) == 3
    assert [run_about._dialogue(items[i])["place"] for i in (0, 3)] == [
        "prompt 0, question 0", "prompt 1, question 3, sample 3"]


def stops(role, key):
    raise UserError("the budget is used")


@pytest.mark.parametrize(("score", "words"), [
    (stops, "^the budget is used$"),
    (lambda role, key: 3 if key.endswith("q1") else 2,
     r"^too few roles have at least 2 rollouts with score 3 from the judge .an.*: 0 of 3; "),
], ids=["stopped", "too few roles"])
def test_after_a_call_without_an_axis_a_page_is_that_of_the_earlier_axis(tmp_path, score, words):
    """Its judge, scores, vectors, held-out roles and min_count are those of the axis."""
    rng = np.random.default_rng(0)
    place = {(role, key): rng.normal(size=(3, 32)) for role in ("default", "a", "b", "c")
             for key in ("q0", "q1")}
    given = (["a", "b", "c"], lambda role, key: place[role, key[-2:]], lambda role, key: "Ahoy.")
    folder = made_runs.make(tmp_path / "run", *given, judge=s.Scored(lambda role, key: 3),
                            min_count=1)
    before = read(folder)
    with pytest.raises(UserError, match=words):
        made_runs.make(folder, *given, judge=s.Scored(score, "another"), held_out=["c"])
    found = read(folder)
    assert found.manifest["last"]["judge"] == "another" and found.judge == before.judge == "test"
    assert found.closed == {"default", "a", "b", "c"} and found.counts == before.counts
    assert found.counts["a"]["3"] == 2 and found.halves.agreement().roles == 3
    for name, vector in before.vectors.items():
        np.testing.assert_array_equal(found.vectors[name], vector, err_msg=name)
    rows = {group["title"]: dict(group["rows"]) for group in run_about.provenance(found, "")}
    assert rows["Axis"] == {"min count": "1", "held out": "none", "keep means": "16"}
    assert rows["Judge"]["judge of this page"] == "test"
    for name in ("axis.safetensors", "analysis.json"):
        (folder / name).unlink()
    found = read(folder)  # without an axis, it is the judge of the last call
    assert found.judge == "another" and ("a" in found.counts) == (score is not stops)


def test_a_ranking_of_a_folder_has_open_circles_for_the_roles_held_out_of_its_run(tmp_path):
    place = {"default": 9.0, "a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0}
    folder = made_runs.make(tmp_path / "run", ["a", "b", "c", "d"],
                            lambda role, key: np.full((3, 32), place[role]),
                            lambda role, key: "Ahoy.", held_out=["c"])
    for more, wanted in (((), "c"), (["a"], "ac")):
        ax = jp.plot.ranking(folder, held_out=more)
        names = [tick.get_text() for tick in ax.get_yticklabels()]
        assert names[:4] == ["b", "a", "c", "d"]
        assert {names[int(dot.get_ydata()[0])]: dot.get_fillstyle() for dot in ax.lines
                if dot.get_marker() == "o"} == {
            name: "none" if name in wanted else "full" for name in "abcd"}


@pytest.mark.parametrize(("status", "closed", "axis", "complete", "wanted"), [
    (None, "abcdh", True, False, "no status.json, so the state of the run is unknown; 5 of 6"),
    ("complete", "abcdh_", True, True, None),
    ("complete", "abcdh", True, False, "The last call of this run ended, but"),
    ("complete", "abcdh_", False, False, "The last call of this run ended, but"),
    ("running", "abcdh_", True, False, "This run is in progress"),
    ("odd", "a", True, False, "The state of this run is 'odd'")])
def test_a_run_is_complete_with_all_its_roles_and_its_axis(monkeypatch, status, closed, axis,
                                                           complete, wanted):
    monkeypatch.setattr(run_about, "describe", lambda _: ["progress", "machine"])
    found = contents(closed=set(closed))
    found.status = status and {"state": status}
    found.axis = found.axis if axis else None
    told = run_about.state(found)
    assert told["complete"] == complete and "machine" not in told["lines"]
    assert told["name"] == (status or "unknown")
    if complete:
        assert told["lines"] == ["progress"]
        return
    assert wanted in told["lines"][0]
    if status:
        assert told["lines"][2].startswith(f"On this page: {len(closed)} of 6 roles")
        assert (len(told["lines"]) == 4) == axis  # the axis may be older than the rest


def test_long_lists_and_texts_are_shortened():
    assert run_about._names(["a"] * 12) == ", ".join(["a"] * 12)
    assert run_about._names(["a"] * 13).endswith("a and 1 more role")
    assert run_about._names(["b" * 60, "c" * 61]) == f"{'b' * 60}, {'c' * 59}…"
    assert _cut("d" * 280) == "d" * 280 and _cut("d " * 141) == "d " * 139 + "d…"



def test_halves_have_only_finite_replies_of_score_3():
    """Two roles at 0, the default at (1, ±1); a reply of score 2 and an empty one do not count."""
    def sample(*rows):
        return Sample([f"k{i}" for i in range(len(rows))], np.full((1, 2), 0.5, np.float32),
                      np.array(rows, np.float32)[:, None].astype(ml_dtypes.bfloat16) - 0.5)

    halves = Halves((1, 2))
    halves.add("default", sample((1, 1), (1, -1), (np.nan, np.nan)), None)
    for role in ("a", "b"):
        halves.add(role, sample((0, 0), (64, 0), (0, 0)), {"k0": 3, "k1": 2, "k2": 3})
    halves.add("c", sample((9, 9), (9, 9)), {"k0": 3, "k1": None})
    found = halves.agreement()
    assert found.mean.tolist() == found.low.tolist() == [0.0]  # (1, 1) and (1, −1)
    assert (found.roles, found.replies, found.default) == (2, (2, 2), 2)
    assert halves.left_out == ["c"]


def test_halves_of_an_odd_number_of_replies_are_averages():
    """Each half averages its own replies: with equal replies, the halves agree exactly."""
    def sample(rows, value):
        return Sample([f"k{i}" for i in range(rows)], np.full((1, 2), 8, np.float32),
                      np.full((rows, 1, 2), value, np.float32).astype(ml_dtypes.bfloat16))

    for rows in (2, 3, 5):
        halves = Halves((1, 2))
        halves.add("default", Sample(["k0", "k1"], np.zeros((1, 2), np.float32), np.array(
            [[[1, 0]], [[1, 0]]], np.float32).astype(ml_dtypes.bfloat16)), None)
        for role in ("a", "b"):
            halves.add(role, sample(rows, [1, -3]), {f"k{i}": 3 for i in range(rows)})
        found = halves.agreement()
        np.testing.assert_allclose([found.low, found.high], 1, rtol=1e-12)



def test_a_leak_or_floor_that_is_not_finite_is_one_value():
    nan, notes = float("nan"), Notes()
    lines = {"style": [0.1, nan], "mean": [1, 2], "p25": [1, 2], "p75": [1, 2]}
    found = Drift(2, float("inf"), "p25", {"capped": {**lines, "leak": nan, "conversations": 4}})
    told = found.value(notes)
    assert (told["layer"], told["floor"], told["percentile"]) == (2, None, "p25")
    assert told["arms"]["capped"] == {**lines, "style": [0.1, None], "leak": None,
                                      "conversations": 4}
    assert notes.lines == ["drift, 'capped', style: not finite at turn 2, and not drawn there",
                           "drift, 'capped', leak: not finite, and not drawn",
                           "drift, floor of the cap at layer 2: not finite, and not drawn"]



def test_lone_surrogates_are_written_as_escapes():
    """JSON of a run may have them, and UTF-8 cannot encode them."""
    data = run_page.embedded({"a\ud800": ["<\udfff>\u2028", 1.5, None]})
    assert data.isascii() and not set("<>&") & set(data)
    assert json.loads(data) == {"a\\ud800": ["<\\udfff>\u2028", 1.5, None]}
    with pytest.raises(ValueError):
        run_page.embedded([float("nan")])


def test_a_role_is_shown_with_a_reply_of_its_highest_score(tmp_path):
    """A reply on which the judge was undecided comes last, whatever the order of the replies."""
    scores = {"a": (3, None), "b": (None, 0), "c": (1, 2), "d": (3, 3), "e": (3, 3),
              "f": (None, None)}
    folder = made_runs.make(
        tmp_path / "run", list(scores), lambda role, key: np.full((3, 32), len(key) + ord(role[0])),
        lambda role, key: f"{role} {key}",
        judge=s.Scored(lambda role, key: scores[role][int(key.endswith("q1"))]))
    shown = {name: (item.answer[-2:], score) for name, (item, score) in read(folder).replies.items()
             if name in "abcf"}
    best = {"a": ("q0", 3), "b": ("q1", 0), "c": ("q1", 2)}
    assert shown == {**best, "f": (shown["f"][0], None)}
