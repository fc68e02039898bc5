"""What the page of a run reads and computes: the analysis, the halves, the drift and the places."""

from __future__ import annotations

import json

import made_runs
import ml_dtypes
import numpy as np
import pytest
from test_run_values import contents

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.judges.protocol import Item
from jaxpersona.persona.talk import Talks
from jaxpersona.report import run_page
from jaxpersona.report.run_drift import read_drift, save_drift
from jaxpersona.report.run_halves import Halves
from jaxpersona.report.run_read import _analysis, _pick, read
from jaxpersona.report.run_values import Notes, coordinates, values
from jaxpersona.runs.sums import Sample

ROLE = {"mean_projection": [1, 2], "quartiles": [[3, 4], [5, 6]], "rollouts": 7, "kept_means": 8,
        "in_axis": True, "held_out": False}
ABOUT = {"roles": {"default": ROLE, "a": ROLE | {"in_axis": False, "held_out": True}},
         "thresholds": {"default": {"p25": {"value": [0, 0], "low": [1, 2], "high": [3, 4]}}},
         "variance_ratio": [[0.5, 0.25], [0.75]], "cos_pc1_axis": [0.25, 0.5]}


def test_the_analysis_of_a_run_is_read_by_field():
    """Every number at its place."""
    found = _analysis(ABOUT, 2)
    one, other = found.roles["default"], found.roles["a"]
    assert one.mean.tolist() == [1, 2] and one.quartiles.tolist() == [[3, 4], [5, 6]]
    assert (one.rollouts, one.stored, one.in_axis, one.held_out) == (7, 8, True, False)
    assert (other.in_axis, other.held_out) == (False, True)
    assert found.intervals["default"]["p25"].tolist() == [[1, 2], [3, 4]]
    assert [row.tolist() for row in found.variance] == [[0.5, 0.25], [0.75]]
    assert found.cos.tolist() == [0.25, 0.5] and found.rounds is None


@pytest.mark.parametrize(("change", "words"), [
    ({"roles": {"a": ROLE}}, "it has 2 layers and 1 roles; it must have all layers"),
    ({"variance_ratio": [[0.5]]}, "it has 1 layers and 2 roles"),
    ({"variance_ratio": [[0.5], 0.5]}, "must have a list of numbers for each layer"),
    ({"cos_pc1_axis": [0.5]}, "reshape")])
def test_an_analysis_with_a_part_missing_is_refused(change, words):
    """Such as the default persona or a layer."""
    with pytest.raises(ValueError, match=words):
        _analysis(ABOUT | change, 2)


def sample(*rows):
    values = np.array(rows, np.float32)[:, None].astype(ml_dtypes.bfloat16)
    return Sample([f"k{i}" for i in range(len(rows))], np.zeros((1, 2), np.float32), values)


def test_the_agreement_has_the_smallest_and_the_largest_number_of_replies():
    """And the lowest and the highest cosine over the splits."""
    halves = Halves((1, 2))
    assert halves.agreement() is None
    halves.add("default", sample((4, 1), (4, -1), (4, 3), (4, 0), (4, 2)), None)
    every = {f"k{i}": 3 for i in range(9)}
    halves.add("a", sample((0, 0), (0, 0)), every)
    assert halves.agreement() is None  # one role
    halves.add("b", sample(*[(0, 0)] * 5), every)
    halves.add("c", sample(*[(0, 0)] * 3), every)
    found = halves.agreement()
    assert (found.roles, found.replies, found.default) == (3, (2, 5), 5)
    assert found.low[0] < found.mean[0] < found.high[0] <= 1 + 1e-12
    # the means of two of the five replies and of the other three, over all splits
    cosines = []
    y = np.array([1.0, -1.0, 3.0, 0.0, 2.0])
    for i in range(5):
        for j in range(i):
            one, two = (y[i] + y[j]) / 2, (y.sum() - y[i] - y[j]) / 3
            cosines.append((16 + one * two) / np.sqrt((16 + one**2) * (16 + two**2)))
    for end in (found.low, found.high):
        assert min(np.abs(end[0] - cosines)) < 1e-6
    other = Halves((1, 2), seed=1)
    other.add("default", sample((4, 1), (4, -1), (4, 3), (4, 0), (4, 2)), None)
    for role in "ab":
        other.add(role, sample((0, 0), (0, 0)), every)
    assert other.agreement().mean[0] != found.mean[0]


def test_halves_without_the_default_persona_have_no_agreement():
    """It is the end of the axis."""
    halves = Halves((1, 2))
    for role in "ab":
        halves.add(role, sample((0, 1), (1, 0)), {"k0": 3, "k1": 3})
    halves.add("default", sample((0, 1)), None)
    assert halves.left_out == ["default"] and halves.agreement() is None


def test_drift_is_stored_with_its_percentile_and_six_digits(tmp_path):
    """Of the turns that have a behaviour, at one layer."""
    assert read_drift(tmp_path, 3) is None
    axis = jp.Axis(np.ones((3, 2)), percentiles={"default": {"p75": np.array([1.0, 2.5, 3.0])}})
    values = np.zeros((3, 4, 3)) + np.arange(3)
    values[:, 0, 1] = 1.0 / 3
    save_drift(tmp_path, {"capped": Talks([], values, values)}, axis, 1, floor="p75",
               behaviour={"capped": [1 / 3, 0.5]}, leak={"capped": 0.125})
    about = json.loads((tmp_path / "drift.json").read_text())
    assert about == {"layer": 1, "percentile": "p75", "floor": 2.5, "arms": {"capped": {
        "style": [0.333333, 0.5], "mean": [0.833333] * 2, "p25": [0.833333] * 2, "p75": [1.0] * 2,
        "leak": 0.125, "conversations": 4}}}
    found = read_drift(tmp_path, 2)
    assert (found.layer, found.floor, found.percentile) == (1, 2.5, "p75")
    assert found.arms == about["arms"]
    with pytest.raises(jp.UserError, match="layer is 1, but the number of layers is 1"):
        read_drift(tmp_path, 1)


def test_two_roles_have_one_component():
    """Their second coordinate is 0, and its share too; a single role has no components."""
    found = contents()
    for name in "cd":
        found.analysis.roles[name].__dict__["in_axis"] = False
    told = []
    shares, points = coordinates(found, lambda *step: told.append(step))
    assert shares.tolist() == [[1.0], [0.0]] and told == [("components", 0, 1, 0),
                                                         ("components", 1, 1, 0)]
    assert points["a"].tolist() == [[2.0], [0.0]] and points["c"][0].tolist() == [0.0]
    found.analysis.roles["b"].__dict__["in_axis"] = False
    assert coordinates(found) is None
    found.axis = None
    assert coordinates(found) is None


def test_the_scale_of_the_default_persona_is_that_of_its_quartiles():
    """Without them it is unknown, and a spread of zero is no scale."""
    found = contents()
    assert "median" not in values(found, Notes(), None)["default"]
    table = {"p25": np.array([1.0, 1.0]), "p50": np.array([2.0, 1.0]), "p75": np.array([4.0, 1.0])}
    found.axis = jp.Axis(np.ones((2, 3)), percentiles={"default": table})
    found.manifest["model"]["layers"] = 2
    found.analysis = None
    assert values(found, Notes(), None)["default"] == {"name": "default", "counts": None,
                                                       "answers": None}
    from jaxpersona.report.run_values import _scale

    told = _scale(found.axis, Notes())
    assert (told["median"], told["p25"], told["p75"]) == ([2.0, 1.0], [1.0, 1.0], [4.0, 1.0])
    assert told["spread"] == [pytest.approx(3 / 1.3489795, rel=1e-4), None]


def test_roles_that_are_closed_or_measured_are_on_the_page():
    """A role that is neither is not; a closed role has its number of rollouts and its counts."""
    found = contents(closed={"x"}, rollouts={"x": 9}, counts={"x": {"3": 2}})
    found.roles += ["x", "y"]
    data = values(found, Notes(), None)
    assert [role["name"] for role in data["roles"]] == ["a", "b", "c", "d", "h", "x"]
    assert data["roles"][5] == {"name": "x", "counts": {"3": 2}, "answers": 9}
    assert data["roles"][0]["answers"] == 4 and data["roles"][4]["heldOut"]
    assert (data["layers"], data["middle"], data["unread"]) == (1, 0, False)
    found.manifest["model"]["layers"] = 8
    found.axis = None
    assert values(found, Notes(), None)["middle"] == 4


def test_reading_a_run_is_reported_role_by_role(tmp_path):
    """Then the intervals and the components, layer by layer."""
    folder = made_runs.make(tmp_path / "run", ["a", "b", "c"],
                            lambda role, key: np.full((3, 32), float(ord(role[0]))) * np.arange(32)
                            * (1 + 0.1 * len(key) + (role == "a")), lambda role, key: "Ahoy.")
    told = []
    found = read(folder, report=lambda *step: told.append(step))
    assert told == [("roles", i, 4, 0) for i in range(5)]
    assert found.rollouts == {"default": 2, "a": 2, "b": 2, "c": 2} and found.folder == folder
    assert len(found.plain) == 2 and len(found.samples) == 3
    assert {item.role.name for item, _ in found.samples} == {"a", "b", "c"}
    told.clear()
    values = np.ones((2, 4, 3))
    save_drift(folder, {arm: Talks([], values, values) for arm in ("uncapped", "capped")},
               found.axis, 2, floor="p50", behaviour={"uncapped": [0.5, 1], "capped": [0.5, 1]},
               leak={"uncapped": 0.5, "capped": 0.25})
    path = jp.report.write_page(folder, report=lambda *step: told.append(step))
    assert path == folder / "report.html" and path.read_text().startswith("<!DOCTYPE html>")
    page = made_runs.parse(path.read_text())
    slider = next(about for tag, about in page.tags if tag == "input")
    assert [slider[name] for name in ("min", "max", "value")] == ["0", "2", "1"]
    assert "1 of 0–2" in page.text and "State of the run" not in page.text
    assert "with a cap at the p50 of the default persona." in page.text
    arms = "4 conversations (capped), 4 conversations (uncapped)"
    assert f"Projection at layer 2 of the replies of {arms}, measured" in page.text
    assert [step for step, *_ in told] == ["roles"] * 5 + ["intervals"] * 3 + ["components"] * 4


def test_the_replies_of_a_page_are_drawn_from_the_seed():
    """Three of nine, the same for the same seed."""
    items = [Item(f"pos_p0_q{i}", Role("a", ("",), ""), "", "") for i in range(9)]
    drawn = [tuple(item.key for item, _ in _pick(items, None, [seed, 1])) for seed in range(8)]
    assert len(set(drawn)) > 4 and all(len(set(keys)) == 3 for keys in drawn)
    assert [item.key for item, _ in _pick(items, None, [3, 1])] == list(drawn[3])
    assert [item.key for item, _ in _pick(items, None, [3, 2])] != list(drawn[3])


def test_scripts_have_the_line_ends_of_a_browser():
    """The digest is that of the script as the browser reads it."""
    assert run_page._script("a\r\nb\rc\n") == "a\nb\nc\n"
    with pytest.raises(jp.UserError, match="install another version of plotly"):
        run_page._script("a <!-- b")
    assert run_page._digest("alert(1)") == "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"
    assert run_page.clean("a\x1b\ud800") == "a\\x1b\\ud800"
    assert run_page._cleaned({"\x07": ["\x07", 1, None]}) == {"\\x07": ["\\x07", 1, None]}
