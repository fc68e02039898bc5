"""Vectors of roles with rollouts of different questions: every route gives the same axis."""
# ruff: noqa: F811 (fixtures of another module are imported and then named as arguments)

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_axis
from published_folder import torch
from test_extend import played  # noqa: F401
from test_rounds import JUDGE, MODEL, ORDER, QUESTIONS, ROLES, SHORT, done, extract  # noqa: F401

from jaxpersona.persona.exporting import export_reference
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.importing import import_reference
from jaxpersona.persona.unequal import cells_of
from jaxpersona.runs.run import Run

EARLY = ("pirate", "sage", "tutor")  # settled after six of eight questions


def plain(folder, questions, **changes):
    return extract_axis(MODEL, ROLES, questions, folder, judge=JUDGE, settings=SHORT, min_count=2,
                        **changes)


def raw(run, name):
    label = "mean" if name == "default" else "pos_3"
    return run.sums(name, "test").vectors({3: "pos_3"})[label][0]


def raw_axis(run):
    return raw(run, "default") - np.mean([raw(run, name) for name in ("ghost", *EARLY)], 0)


def test_an_export_has_the_corrected_vectors_and_an_import_corrects_them_again(done, tmp_path):
    folder, found, full, _ = done
    exported = export_reference(folder / "stopped", tmp_path / "out")
    stored = torch.load(tmp_path / "out" / "axis.pt", weights_only=True)
    np.testing.assert_array_equal(stored["axis"].numpy(), found.axis.values)
    own = load_axis(folder / "stopped" / "axis.safetensors")
    np.testing.assert_array_equal(stored["axis"].numpy(), own.values)
    for name in ("ghost", *EARLY):
        vector = torch.load(tmp_path / "out" / "vectors" / f"{name}.pt", weights_only=True)
        np.testing.assert_array_equal(vector["vector"].numpy(), found.role_means[name])
    (note,) = [note for note in exported.notes if "5_axis.py" in note]
    assert note.startswith("3 roles (pirate, sage, tutor): asked other questions than the default")
    about = json.loads((tmp_path / "out" / "jaxpersona.json").read_text())
    assert about["question_slope"] == found.rounds.slope
    again = import_reference(tmp_path / "out", tmp_path / "run", min_count=2).extraction
    wrong = s.relative(raw_axis(Run.read(folder / "stopped")), found.axis.values)
    assert s.relative(again.axis.values, found.axis.values) < 0.02 * wrong

    export_reference(folder / "full", tmp_path / "equal", activations="none")
    about = json.loads((tmp_path / "equal" / "jaxpersona.json").read_text())
    assert about["question_slope"] is None
    # without the slope, the folder is like any other: as published, and a note
    path = tmp_path / "out" / "jaxpersona.json"
    path.unlink()
    other = import_reference(tmp_path / "out", tmp_path / "two", min_count=2)
    assert any("the vectors are not corrected" in note for note in other.notes)
    assert s.relative(other.extraction.axis.values, found.axis.values) > 0.9 * wrong


def test_a_call_without_precision_or_with_a_lower_one_keeps_the_correction(done, tmp_path, played):
    folder, found, *_ = done
    copy = shutil.copytree(folder / "stopped", tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = plain(copy, [one for one in QUESTIONS if one.id in ORDER[:4]])
        low = extract(copy, precision=0.01)
    assert not played
    for one in (again, low):
        np.testing.assert_array_equal(one.axis.values, found.axis.values)
    assert low.rounds.asked["sage"] == 4 and low.rounds.slope == found.rounds.slope
    assert low.rounds.rollouts == low.rollouts == 34 and low.rounds.saved == 6
    assert low.rounds.axis == found.rounds.axis  # that of the averaged rollouts
    assert low.rounds.axis != low.rounds.rounds[-1].axis
    stored = json.loads((copy / "analysis.json").read_text())["precision"]
    assert stored["rollouts"] == 34 and stored["axis"][0] == pytest.approx(
        low.rounds.axis.value, abs=1e-6)


def test_the_default_persona_gets_all_questions_of_the_roles(done, tmp_path, played):
    folder, _, full, _ = done
    copy = shutil.copytree(folder / "full", tmp_path / "run")
    found = extract(copy, precision=0.01, redo=["default"])
    assert len(played) == 8 and {name for name, *_ in played} == {"default"}
    assert found.rounds.asked["default"] == 8 and found.rounds.asked["sage"] == 4
    assert found.rounds.rollouts == 40 == found.rollouts
    np.testing.assert_allclose(found.axis.values, full.axis.values, rtol=1e-4, atol=1e-5)


def test_roles_that_cannot_be_corrected_are_named(done, tmp_path):
    folder, *_ = done
    copy = shutil.copytree(folder / "full", tmp_path / "run")
    few = [one for one in QUESTIONS if one.id in ORDER[:4]]
    run = Run.read(copy)
    assert cells_of(run.sums("sage", "test"), "sage", [0]) is None
    with pytest.warns(UserWarning, match=r"^4 roles \(ghost, pirate, sage, tutor\): asked other "
                      "questions than the default persona; the run keeps no sums"):
        found = plain(copy, few, redo=["default"])
    np.testing.assert_array_equal(found.role_means["sage"], raw(run, "sage"))
    copy = shutil.copytree(folder / "stopped", tmp_path / "two")
    with pytest.warns(UserWarning, match="has rollouts of questions that the default persona was "
                      "not asked; the vectors are not corrected for these; give all questions"):
        extract_axis(MODEL, ROLES, few, copy, judge=JUDGE, settings=SHORT, min_count=2,
                     precision=0.01, redo=["default"])
