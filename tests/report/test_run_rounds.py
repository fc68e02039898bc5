"""The precision of a run on its page, and simulated runs with a precision and without one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from unittest import mock

import made_runs
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona.extract import extract_axis
from jaxpersona.report.run_rounds import Curve
from jaxpersona.runs.rollouts import place_of_key
from jaxpersona.runs.run import Run

NAMES = [f"role{i}" for i in range(8)]
QUESTIONS = [Question(i, f"What is {i}?") for i in range(40)]
TARGET = 0.95


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_runs.many(tmp_path_factory.mktemp("rounds") / "run", NAMES, precision=0.8)


def test_the_page_shows_the_reliability_by_round_and_what_was_saved(folder):
    stored = json.loads((folder / "analysis.json").read_text())["precision"]
    found = made_runs.parse(jp.report.page(folder))
    data = found.data["rounds"]
    assert data["questions"] == [one["questions"] for one in stored["rounds"]]
    np.testing.assert_allclose([row[-1] for row in data["axis"]], stored["rounds"][-1]["axis"],
                               rtol=1e-4)
    assert data["target"] == 0.8 and data["layer"] == 4
    assert data["settled"][-1] == len(stored["settled"]) / 8
    assert "role5" in set(NAMES) - set(stored["settled"])  # it has no reply with score 3
    saved = stored["quota"] - stored["rollouts"]
    assert saved > 0 and f"rollouts saved {saved} of {stored['quota']}" in found.text
    assert "Roles that are not settled at the precision 0.8" in found.text
    assert "plot-rounds" in [about.get("id") for _, about in found.tags]
    for name, value in (("precision", "0.8"), ("rounds", "4, 6, 8, 12")):
        assert f"{name} {value}" in found.text


def test_the_page_of_fixed_quotas_has_no_rounds(tmp_path):
    found = made_runs.parse(jp.report.page(made_runs.many(tmp_path / "run", NAMES[:3])))
    assert found.data["rounds"] is None
    assert "plot-rounds" not in [about.get("id") for _, about in found.tags]
    assert "rollouts saved" not in found.text


@pytest.mark.parametrize("change", [
    lambda about: {}, lambda about: about | {"rounds": []}, lambda about: about | {"rollouts": 0},
    lambda about: about | {"rounds": [{**about["rounds"][0], "axis": [1, 2]}]},
    lambda about: about | {"asked": ["default"]}, lambda about: None])
def test_a_damaged_field_is_refused_in_one_line(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "run")
    about = json.loads((copy / "analysis.json").read_text())
    about["precision"] = change(about["precision"])
    (copy / "analysis.json").write_text(json.dumps(about))
    with pytest.raises(jp.UserError, match=r"analysis\.json is damaged") as error:
        jp.report.page(copy)
    assert "\n" not in str(error.value)


def simulated(folder, seed, effect, precision):
    """Extract an axis from drawn response means with a known effect of the questions."""
    def drawn(*key, size=(3, 32)):
        return np.random.default_rng(zlib.crc32(repr((seed, *key)).encode())).normal(size=size)

    spread = dict(zip(NAMES, np.linspace(0.3, 2.0, len(NAMES)), strict=True)) | {"default": 1.0}

    def mean(role, key):
        question = place_of_key(key)[0]
        return (2 * drawn("role", role) + effect * drawn("question", question)
                + spread[role] * drawn(role, key))

    roles = [Role("default", ("", "You are an AI."), ""),
             *(Role(name, (f"You are {name}.", f"Be {name}."), "") for name in NAMES)]
    settings = dataclasses.replace(made_runs.SETTINGS, seed=seed)
    with mock.patch("jaxpersona.persona.collect.Stream",
                    made_runs.given_stream(mean, lambda role, key: "Yes.")):
        return extract_axis(made_runs.model(3, "tiny"), roles, QUESTIONS, folder, judge=NoJudge(),
                            settings=settings, precision=precision)


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_stopped_axis_is_near_that_of_all_questions(tmp_path, seeds):
    """In 9 of 10 seeds, all cosines with the complete run are at least the target minus 0.01."""
    good, saved = 0, []
    for seed in range(seeds):
        found = simulated(tmp_path / str(seed), seed, 1.0, TARGET)
        saved.append(found.rounds.saved / found.rounds.quota)
        full = simulated(tmp_path / str(seed), seed, 1.0, None)
        one, two = (np.stack([run.role_means[name][1] for name in found.rounds.settled])
                    - run.analysis.vectors[:, 1].mean(0) for run in (found, full))
        near = [*cosines(one, two), *cosines(found.axis.values, full.axis.values)[1:2]]
        good += min(near) >= TARGET - 0.01
    assert good >= 0.9 * seeds
    assert min(saved) > 0.1


def test_the_correction_removes_the_effect_of_the_questions(tmp_path):
    """With large effects, corrected vectors are nearer to those of all questions than the means."""
    found = simulated(tmp_path / "run", 0, 3.0, TARGET)
    run = Run.read(tmp_path / "run")
    raw = {name: run.sums(name, "none").vectors({3: "pos_3"})["pos_3"][0] for name in NAMES}
    full = simulated(tmp_path / "run", 0, 3.0, None)
    early = [name for name in NAMES if found.rounds.asked[name] < 40]
    assert early and 0.7 < found.rounds.slope <= 1
    for name in early:
        far = [np.linalg.norm(value[1] - full.role_means[name][1])
               for value in (found.role_means[name], raw[name])]
        assert far[0] < 0.7 * far[1]


def test_the_roles_of_a_round_are_all_roles_with_their_last_known_reliability():
    """Settled roles, which later rounds do not measure, count too; null changes nothing."""
    def found(value):
        return None if value is None else [value, value - 0.1, value + 0.1]

    measured = [(None, {"a": None, "b": None, "c": None}, 0),
                (0.8, {"a": 0.95, "b": 0.5, "c": None}, 1), (0.9, {"b": 0.7, "c": 0.6}, 1),
                (None, {"b": 0.9, "c": None}, 2)]
    about = {"target": 0.9, "layer": 2, "asked": {"default": 16, "a": 6, "b": 16, "c": 16},
             "settled": ["a", "b"], "rollouts": 54, "quota": 72, "rounds": [
                 {"questions": 4 + 4 * i, "axis": found(axis), "settled": settled,
                  "roles": {name: found(value) for name, value in roles.items()}}
                 for i, (axis, roles, settled) in enumerate(measured)]}
    curve = Curve.read(about)
    wanted = [np.full(3, np.nan), *(np.percentile(some, [50, 25, 75]) for some in (
        [0.95, 0.5], [0.95, 0.7, 0.6], [0.95, 0.9, 0.6]))]
    np.testing.assert_allclose(curve.roles, np.transpose(wanted))
    np.testing.assert_allclose(curve.axis[0], [np.nan, 0.8, 0.9, np.nan])
    np.testing.assert_allclose(curve.settled, [0, 1 / 3, 1 / 3, 2 / 3])
    assert curve.questions == [4, 8, 12, 16] and curve.open == ["c"]
    assert curve.facts() == [("reliability of the axis at layer 2", "unknown"),
                             ("rollouts saved", "18 of 72 (25%)")]
    about["rounds"].pop()
    assert Curve.read(about).facts()[0][1] == "0.900 (0.800 to 1.000)"
