"""The page of a run: its numbers, escaped texts, no external resource, partial runs and errors."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import operator
import os
import re
import shutil
import socket
import sys

import made_runs
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.report import run_page, sources
from jaxpersona.report.run_drift import read_drift, save_drift
from jaxpersona.runs.files import PAGE

EVIL = "</script><script>alert(1)</script>"
ODD = "🦜 \"q\" & <img src=x onerror=alert(2)>"
LONG = "x" * 200
NEAR = ("roles", "near", "mean_projection")  # a place in analysis.json
# role → projection of each of its two replies at layer 0; layer 1 exchanges near and far
PLACE = {"default": (9.0, 11.0), "near": (8.0, 8.0), "far": (2.0, 2.0), "kept": (6.0, 6.0),
         ODD: (1.0, 1.0), LONG: (4.0, 5.0), "silent": (5.0, 5.0)}
SIDE = {"near": 1.0, "far": -1.0}
SCORES = {"near": (3, 3), "far": (3, 3), "kept": (3, 3), ODD: (3, None), LONG: (3, 1),
          "silent": (2, 0)}


def mean(role, key):
    """On three of 32 channels: the projection, a second component, and a part of the default."""
    reply = int(key.endswith("q1"))
    swap = {"near": "far", "far": "near"}
    out = np.zeros((3, 32))
    for layer in range(3):
        name = swap.get(role, role) if layer == 1 else role
        # at layer 2 everything is mirrored, so that the axis points the other way
        out[layer, 0] = PLACE[name][reply] * (-1 if layer == 2 else 1)
        out[layer, 1] = SIDE.get(role, 0.0)
        if role == "default":
            out[layer, 2] = -1.0 if reply else 1.0
    return out


def text(role, key):
    return f"{EVIL} \u202e\x1b[1m $x$ %{{y}} from {role}, {key}"


def score(role, key):
    return SCORES[role][int(key.endswith("q1"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with six roles, of which near and far define the axis."""
    return made_runs.make(tmp_path_factory.mktemp("page") / "run", list(PLACE)[1:], mean, text,
                          judge=s.Scored(score), held_out=["kept"])


@pytest.fixture(scope="module")
def html(run):
    return jp.report.page(run)


@pytest.fixture(scope="module")
def parsed(html):
    return made_runs.parse(html)


@pytest.fixture(scope="module")
def roles(parsed):
    return {role["name"]: role for role in parsed.data["roles"]}


def names(data, layer):
    return [data["roles"][i]["name"] for i in data["order"][layer]]


def test_the_ranking_is_that_of_the_projections_at_each_layer(parsed, roles):
    """Most Assistant-like first; at layer 2 the axis points along the negative channel."""
    assert names(parsed.data, 0) == ["near", "kept", "silent", LONG, "far", ODD]
    assert names(parsed.data, 1) == ["far", "kept", "silent", LONG, "near", ODD]
    assert names(parsed.data, 2) == names(parsed.data, 0)
    assert roles["near"]["mean"] == [8.0, 2.0, 8.0] and roles["far"]["mean"] == [2.0, 8.0, 2.0]
    assert roles[LONG]["mean"] == [4.5] * 3 and roles[LONG]["p25"] == [4.25] * 3
    own = parsed.data["default"]
    assert own["mean"] == [10.0] * 3 and own["median"] == [10.0] * 3
    # quartiles 9.5 and 10.5 are 1.349 standard deviations of a normal distribution apart
    assert own["spread"] == [pytest.approx(1 / 1.3489795, rel=1e-4)] * 3
    assert parsed.data["middle"] == 1 and parsed.data["layers"] == 3


def test_components_are_those_of_the_roles_in_the_axis(parsed, roles):
    """Vectors (8, 1) and (2, −1), default (10, 0): PC1 is (6, 2) / √40, and the axis (5, 0)."""
    step = 40**0.5
    assert parsed.data["byLayer"]["cos"] == [pytest.approx(6 / step, rel=1e-4)] * 3
    assert parsed.data["byLayer"]["variance"]["1"] == [pytest.approx(1.0)] * 3
    assert roles["near"]["x"] == [pytest.approx(x, rel=1e-4) for x in
                                  (step / 2, -step / 2, step / 2)]
    assert roles["far"]["x"][0] == pytest.approx(-step / 2, rel=1e-4)
    assert parsed.data["default"]["x"] == [pytest.approx(30 / step, rel=1e-4)] * 3
    assert roles["kept"]["x"][0] == pytest.approx(6 / step, rel=1e-4)  # (6, 0) − (5, 0)
    assert "x" in roles[ODD] and "x" not in roles["silent"]  # one reply with score 3; none
    assert {name for name, role in roles.items() if role["inAxis"]} == {"near", "far"}
    assert roles["kept"]["heldOut"] and not roles["silent"]["heldOut"]


def test_the_figures_of_a_folder_have_the_numbers_of_its_run(run, tmp_path):
    found = sources.places(run, 1)
    assert found.names == [ODD, "near", LONG, "silent", "kept", "far"]
    assert found.means.tolist() == [1.0, 2.0, 4.5, 5.0, 6.0, 8.0] and found.layer == 1
    assert found.quartiles[2].tolist() == [4.25, 4.75]
    assert found.default == (10.0, 9.5, 10.5) and found.held_out == {"kept"}
    read = sources.parts(str(run), 0)  # far and near are used for the axis
    assert read.names == ["far", "near"] and read.cosine == pytest.approx(6 / 40**0.5)
    assert read.default[0] == pytest.approx(30 / 40**0.5, rel=1e-4)
    values, layer = sources.ratios(run, 2)
    assert values[0] == pytest.approx(1.0) and layer == 2
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "analysis.json").unlink()
    with pytest.raises(jp.UserError, match="the run is not complete; finish it with"):
        sources.places(tmp_path / "run", 1)
    shutil.copy(run / "analysis.json", tmp_path / "run")
    spoil(tmp_path / "run", [1, 10**400, 1], *NEAR)
    with pytest.raises(jp.UserError, match=r"analysis\.json is damaged \(OverflowError"):
        sources.places(tmp_path / "run", 1)


def test_the_main_results_are_those_of_the_middle_layer(parsed):
    for line in ("roles in the axis 2 of 6; 1 held out", "rollouts 14", "judge test",
                 "|cos(PC1, axis)| at layer 1 0.949", "variance of PC1 at layer 1 100 %",
                 "split-half agreement at layer 1 0.917",
                 f"most like the Assistant at layer 1 far, kept, silent, {'x' * 59}…, near",
                 f"least like the Assistant at layer 1 {ODD}, near, {'x' * 59}…, silent, kept",
                 "Roles with fewer than 2 fully played replies, which the axis leaves out silent, "
                 f"{'x' * 59}…, {ODD}"):
        assert line in parsed.text, line


def test_thresholds_have_their_intervals(parsed, run):
    about = json.loads((run / "analysis.json").read_text())["thresholds"]
    table = parsed.data["thresholds"]
    assert set(table) == {"default", "all"} and len(table["default"]) == 9
    assert table["default"]["p25"]["value"] == [9.5] * 3
    assert table["default"]["p75"]["value"] == [10.5] * 3
    for of, layer in (("default", 0), ("all", 2)):
        for end in ("low", "high"):
            assert table[of]["p25"][end][layer] == pytest.approx(
                about[of]["p25"][end][layer], rel=1e-4)
    assert table["default"]["p25"]["low"] == [9.0] * 3


def test_halves_agree_as_computed_by_hand(parsed):
    """The default's replies (9, 1) and (11, −1) minus the roles' mean 5: (4, 1) and (6, −1)."""
    wanted = 23 / (17**0.5 * 37**0.5)
    for line in ("mean", "low", "high"):
        assert parsed.data["reliability"][line] == [pytest.approx(wanted, rel=1e-4)] * 3
    assert ("for each of 2 roles, 2 replies with score 3, and for the default persona, 2 replies."
            ) in parsed.text


def test_scores_and_replies_are_those_of_the_role(parsed, roles):
    assert roles["near"]["counts"] == {"0": 0, "1": 0, "2": 0, "3": 2, "None": 0}
    assert roles["silent"]["counts"] == {"0": 1, "1": 0, "2": 1, "3": 0, "None": 0}
    assert roles[ODD]["counts"]["None"] == 1 and roles[LONG]["counts"]["1"] == 1
    assert roles["silent"]["score"] == 2 and "from silent, pos_p0_q0" in roles["silent"]["reply"]
    for title in ("Score 3 (3)", "Score 2 (1)", "Score 1 (1)", "Score 0 (1)", "Undecided (1)",
                  "Default persona (not judged) (2)"):
        assert title in parsed.text, title
    assert f"replies with score 3 {8}" in parsed.text
    assert "score-3" not in parsed.text and "split-half agreement at layer 1" in parsed.text


def test_texts_of_the_run_are_escaped(html, parsed, roles):
    """In HTML and in the data; control characters are written as escapes."""
    assert len(parsed.scripts) == 3 and not any(tag == "img" for tag, _ in parsed.tags)
    assert ODD in roles and EVIL in roles["near"]["reply"] and EVIL in parsed.text
    assert html.count("</script>") == 3 and "onerror=alert(2)>" not in html
    assert "\\x1b[1m" in parsed.text and "\\u202e" in parsed.text
    assert not any(mark in html for mark in ("\x1b", "\u202e"))
    for mark in "<>&":
        assert mark not in parsed.scripts[0]
    assert "What is 0 < 1?" in parsed.text
    policies = [a["content"] for tag, a in parsed.tags if "http-equiv" in a]
    for script in parsed.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policies[0]
    assert "unsafe-inline" not in policies[0].split("style-src")[0]


def test_the_page_loads_nothing(html, parsed):
    """No element refers to another file, and the policy of the page forbids every request."""
    loads = [(tag, name, value) for tag, attributes in parsed.tags
             for name, value in attributes.items()
             if name in ("src", "srcset", "href", "action", "data", "poster", "background", "ping")]
    assert loads and all(value.startswith("#") or value == "data:," for _, _, value in loads)
    targets = {value[1:] for _, _, value in loads if value.startswith("#")}
    assert targets <= {attributes.get("id") for _, attributes in parsed.tags}
    own = html.replace(parsed.scripts[1], "")  # without plotly.js, which names addresses of maps
    assert "http:" not in own and "https:" not in own
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", own)
    policy = next(a["content"] for _, a in parsed.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_provenance_is_that_of_the_manifest(parsed, run):
    manifest = json.loads((run / "run.json").read_text())
    said = parsed.text
    for value in (manifest["model"]["fingerprint"], "tiny <b>&", "float32", "judge of this page",
                  "test", manifest["last"]["versions"]["jax"], manifest["numerics"]["device"],
                  "max new tokens 8", "min count 2", "held out kept", "plotly.js (this page)",
                  "cost of the last call's verdicts $0.0000"):
        assert str(value) in said, value
    assert re.search(r"wall time of the last call [\d,.]+ s", said)


def test_equal_runs_give_equal_pages(run, html):
    assert jp.report.page(run) == html


def changed(run, folder, **files):
    """Copy a run, and change the JSON files by functions of their content."""
    shutil.copytree(run, folder)
    for name, change in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def test_values_that_are_not_finite_are_named_and_not_drawn(run, tmp_path):
    def spoil(about):
        about["roles"]["near"]["mean_projection"] = [float("nan"), 2.0, float("inf")]
        about["cos_pc1_axis"][2] = float("nan")
        about["thresholds"]["default"]["p25"]["low"][0] = float("nan")
        return about

    found = made_runs.parse(jp.report.page(changed(run, tmp_path / "run", analysis=spoil)))
    role = next(one for one in found.data["roles"] if one["name"] == "near")
    assert role["mean"] == [None, 2.0, None] and "near" not in names(found.data, 0)
    assert "near" in names(found.data, 1)
    for line in ("projection of 'near': not finite at layers 0, 2, and not drawn there",
                 "|cos(PC1, axis)|: not finite at layer 2", "interval of p25 of default (low): not "
                 "finite at layer 0"):
        assert line in found.text, line


def test_a_run_of_the_judge_none_has_no_scores(tmp_path):
    folder = made_runs.make(tmp_path / "run", ["near", "far"], mean, lambda role, key: "Ahoy.")
    found = made_runs.parse(jp.report.page(folder))
    assert found.data["unread"] and found.data["order"][0] == [1, 0]  # near, far
    assert "judge none: no reply was read" in found.text
    assert "Replies of roles, without a score" in found.text
    assert "replies with score 3 4" not in found.text and "Score 3" not in found.text
    assert not any(attributes.get("id") == "scores" for _, attributes in found.tags)
    assert all("score" not in role or role["score"] is None for role in found.data["roles"])


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_run_in_progress_says_so(run, tmp_path, state):
    def status(about):
        return {**about, "state": state, "process": os.getpid(), "host": socket.gethostname()}

    folder = changed(run, tmp_path / "run", status=status)
    for name in ("axis.safetensors", "analysis.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "vectors")
    for path in folder.rglob("near.*"):
        path.unlink()
    found = made_runs.parse(jp.report.page(folder))
    assert f"State of the run: {state}" in found.text
    assert {"running": "This run is in progress", "stopped": "This run was stopped before its end",
            }[state] in found.text
    assert "6 of 7 roles (including the default persona) are complete" in found.text
    assert "the run has not computed its axis yet" in found.text
    assert "Roles that are not complete yet near" in found.text
    assert found.data["order"] is None and found.data["pca"] is None
    assert {role["name"] for role in found.data["roles"]} == set(PLACE) - {"default", "near"}
    assert "Score 3 (3)" in found.text
    ids = {attributes.get("id") for _, attributes in found.tags}
    assert "scores" in ids and not ids & {"ranking", "layers", "thresholds", "components", "layer"}


def test_a_role_of_the_axis_that_is_generated_again_leaves_the_components_out(run, tmp_path):
    folder = changed(run, tmp_path / "run")
    for path in folder.rglob("near.*"):
        path.unlink()
    found = made_runs.parse(jp.report.page(folder))
    assert found.data["pca"] is None and "vectors are missing or not finite: near" in found.text
    assert found.data["order"] is not None and found.data["reliability"] is None


def test_the_page_has_no_drift_without_its_file(run, tmp_path, parsed):
    assert parsed.data["drift"] is None and "Persona drift" not in parsed.text
    from jaxpersona.ckpts.vectors import load_axis

    from jaxpersona.persona.talk import Talks
    folder = changed(run, tmp_path / "run")
    read = np.arange(24, dtype=np.float32).reshape(2, 4, 3)  # 2 turns, 4 conversations, 3 layers
    read[1, 0] = np.nan
    save_drift(folder, {"uncapped": Talks([], read, read)}, load_axis(folder / "axis.safetensors"),
               1, behaviour={"uncapped": [0.25, 0.5]}, leak={"uncapped": 0.75})
    found = made_runs.parse(jp.report.page(folder))
    arm = found.data["drift"]["arms"]["uncapped"]
    assert arm["mean"] == [5.5, 19.0] and arm["p25"] == [3.25, 17.5]  # 1, 4, 7, 10; 16, 19, 22
    assert arm["style"] == [0.25, 0.5] and arm["leak"] == 0.75 and arm["conversations"] == 4
    assert found.data["drift"]["floor"] == 9.5 and found.data["drift"]["layer"] == 1
    assert "Persona drift over turns" in found.text
    kept = json.loads((folder / "drift.json").read_text())
    assert read_drift(folder, 2).arms["uncapped"]["conversations"] == 4
    for change in ({"layer": 3}, {"layer": -1}, {"floor": 10**400}, *({"arms": {"a": arm | new}}
                   for new in ({"p75": [1.0]}, {"conversations": float("inf")}))):
        (folder / "drift.json").write_text(json.dumps(kept | change))
        with pytest.raises(jp.UserError, match="drift.json is damaged"):
            read_drift(folder, 3)
    (folder / "drift.json").write_text('{"arms": {"a": {}}}')
    with pytest.raises(jp.UserError, match="drift.json is damaged .*jaxpersona demo"):
        jp.report.page(folder)


def test_the_command_writes_the_page_and_its_size(run, tmp_path, capsys):
    out = tmp_path / "sub" / "page.html"
    assert s.run_command(["report", str(run), "--out", str(out)]) == 0
    size = out.stat().st_size
    assert capsys.readouterr().out == (f"wrote {out} ({size / 1e6:.1f} MB, one file that needs no "
                                       "network); open it in a browser\n")
    folder = changed(run, tmp_path / "run")
    (folder / PAGE).write_text("old")
    assert s.run_command(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(folder / PAGE) and found["bytes"] == (folder / PAGE).stat().st_size
    assert (folder / PAGE).read_text().startswith("<!DOCTYPE html>")
    assert not list(folder.glob(".*.tmp"))


def spoil(folder, value, *keys):
    about = json.loads((folder / "analysis.json").read_text())
    functools.reduce(operator.getitem, keys[:-1], about)[keys[-1]] = value
    (folder / "analysis.json").write_text(json.dumps(about))


@pytest.mark.parametrize(("spoil", "wanted"), [
    (lambda folder: shutil.rmtree(folder), "contains no run; give the folder that `jaxpersona"),
    (lambda folder: (folder / "run.json").write_text("{}"), "is not the manifest of a run"),
    (lambda folder: (folder / "analysis.json").write_text('{"roles": {}}'),
     "analysis.json is damaged"),
    (lambda folder: spoil(folder, [10**400, 1, 1], *NEAR), "json is damaged (OverflowError: int"),
    (lambda folder: spoil(folder, float("inf"), *NEAR[:2], "rollouts"), "(OverflowError: cannot"),
    (lambda folder: spoil(folder, 0.5, "variance_ratio", 0), "variance_ratio must have a list"),
    (lambda folder: (folder / "analysis.json").write_text("["), "analysis.json: invalid JSON"),
    (lambda folder: (folder / "rollouts" / "far.jsonl").write_text("{}\n"),
     "far.jsonl: damaged (differs from"),
    (lambda folder: (folder / "status.json").write_text("[]"), "json: field 'state' is missing"),
    (lambda folder: (folder / PAGE).mkdir(), "report.html, a folder; give the name of a file"),
])
def test_what_cannot_be_reported_is_one_line(run, tmp_path, capsys, spoil, wanted):
    folder = changed(run, tmp_path / "run")
    spoil(folder)
    assert s.run_command(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    assert not (folder / PAGE).is_file()


def test_an_axis_of_another_model_is_refused(run, tmp_path):
    from jaxpersona.ckpts.vectors import save_vector

    folder = changed(run, tmp_path / "run")
    save_vector(folder / "axis.safetensors", jp.load_axis("mini"))
    with pytest.raises(jp.UserError, match="is the axis of another model, not of"):
        jp.report.page(folder)


def test_a_missing_plotly_is_named_before_the_run_is_read(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(run_page, "read", None)
    assert s.run_command(["report", str(run)]) == 2
    assert capsys.readouterr().err == ("error: the page of a run needs plotly: pip install "
                                       "'jaxpersona[report]'\n")


@pytest.mark.parametrize("call", [
    lambda: jp.report.page(3), lambda: jp.report.write_page("x", 3), lambda: jp.report.page()])
def test_a_wrong_argument_is_one_line(call):
    with pytest.raises(jp.UserError, match="run is 3|out is 3|needs run"):
        call()


def test_a_script_that_would_end_its_element_is_refused():
    with pytest.raises(jp.UserError, match="install another version of plotly"):
        run_page._script("x = '</SCRIPT>'")
