"""`overwrite` deletes the files of a run, by name, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.runs.run import Run

OLD = {"roles": {"default": "a", "ghost": "b"}, "seed": 0}
NEW = {"roles": {"default": "a", "pirate": "c"}, "seed": 1}
RECORD = {"label": "pos", "prompt_index": 0, "question_index": 0}


@pytest.fixture
def folder(tmp_path):
    """A finished run, with files that it did not write."""
    folder = tmp_path / "run"
    with Run.open(folder, OLD) as run:
        for role in OLD["roles"]:
            run.save_rollouts(role, [RECORD], np.zeros((1, 2, 3)))
            run.save_scores(role, {"pos_p0_q0": 3})
            run.save_vectors(role, {"mean": (np.zeros((2, 3), np.float32), 1)})
    for name in ("axis.safetensors", "analysis.json", "roles.png"):
        (folder / name).write_text("x")
    for name in ("notes.txt", "rollouts/other.jsonl", "means/notes.txt"):
        (folder / name).write_text("mine")
    return folder


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("manifest", [OLD, NEW], ids=["this run", "another run"])
def test_the_run_s_files_are_deleted_and_others_stay(folder, manifest):
    with Run.open(folder, manifest, overwrite=True) as run:
        assert names(folder) == [".lock", "means/notes.txt", "notes.txt", "rollouts/other.jsonl",
                                 "run.json"]
        assert not any(run.is_whole(role) for role in manifest["roles"])
        run.save_rollouts("default", [RECORD], np.ones((1, 2, 3)))
    assert json.loads((folder / "run.json").read_text())["seed"] == manifest["seed"]
    with Run.open(folder, manifest) as run:  # without it, the new run resumes
        assert run.is_whole("default")


def test_without_it_another_run_is_refused_with_the_remedy(folder):
    before = names(folder)
    with pytest.raises(UserError, match=r"seed was 0, now 1\).*--overwrite"), \
            Run.open(folder, NEW):
        pass
    assert names(folder) == before


@pytest.mark.parametrize("manifest", [None, "{}", '{"format": "other 1"}', "["])
def test_a_folder_that_is_no_run_is_refused(tmp_path, manifest):
    (tmp_path / "thesis.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "run.json").write_text(manifest)
    before = names(tmp_path)
    with pytest.raises(UserError), Run.open(tmp_path, NEW, overwrite=True):
        pass
    assert set(names(tmp_path)) <= {*before, ".lock"} and (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("roles", [["ghost"], 5, {"": "x"}, {"x" * 300: "y"}])
def test_a_damaged_list_of_roles_deletes_nothing(folder, roles):
    stored = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(stored | {"roles": roles}))
    before = names(folder)
    with pytest.raises(UserError), Run.open(folder, NEW, overwrite=True):
        pass
    assert names(folder) == before


def test_names_of_roles_cannot_lead_out_of_the_folder(folder):
    outside = folder.parent / "secret.jsonl"
    outside.write_text("mine")
    stored = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(stored | {"roles": {"../../secret": "x"}}))
    with Run.open(folder, NEW, overwrite=True):
        assert outside.exists()
