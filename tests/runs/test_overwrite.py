"""`overwrite` deletes the files of a run, by name, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.runs.closing import close, state_of
from jaxpersona.runs.run import Run

REST = {"model": {}, "numerics": {}, "questions": {"0": "q"}, "judges": {"a/b": {}},
        "last": {"judge": "a/b"}}
OLD = {"roles": {"default": "a", "ghost": "b"}, "arguments": {"seed": 0}, **REST}
NEW = {"roles": {"default": "a", "pirate": "c"}, "arguments": {"seed": 1}, **REST}
RECORD = {"label": "pos", "prompt_index": 0, "question_index": 0, "sample": 0, "system_prompt": "",
          "question": "Why?", "conversation": [{"role": "assistant", "content": "So."}]}


def play(run, role, closed=True):
    """Write a rollout of a role, and a verdict."""
    state = state_of(run, role, "a/b", "", (2, 3))
    state.live.add(RECORD, np.zeros((2, 3)))
    state.live.judge("a/b/", {"pos_p0_q0": {"score": 3, "error": None}})
    if closed:
        close(run, role, state_of(run, role, "a/b", "", (2, 3)), judge="a/b", rubric="",
              keep=None, seed=0, reread=lambda records: iter(()))


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def folder(tmp_path):
    """A finished run, with files that it did not write."""
    folder = tmp_path / "run"
    with Run.open(folder, OLD) as run:
        for role in OLD["roles"]:
            play(run, role)
            run.save_vectors(role, {"mean": (np.zeros((2, 3), np.float32), 1)})
        play(run, "ghost", closed=False)
    assert {"live/ghost.jsonl", "live/ghost.means", "live/ghost.verdicts.jsonl",
            "scores/a%2Fb/ghost.json", "sums/a%2Fb/ghost.safetensors",
            "sums/default.safetensors"} <= set(names(folder))
    for name in ("axis.safetensors", "analysis.json", "roles.png", "status.json"):
        (folder / name).write_text("x")
    for name in ("notes.txt", "rollouts/other.jsonl", "samples/notes.txt", "live/notes.txt"):
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("manifest", [OLD, NEW], ids=["this run", "another run"])
def test_the_run_s_files_are_deleted_and_others_stay(folder, manifest):
    with Run.open(folder, manifest, overwrite=True) as run:
        assert names(folder) == [".lock", "live/notes.txt", "notes.txt", "rollouts/other.jsonl",
                                 "run.json", "samples/notes.txt"]
        assert not any(run.rollouts(role) for role in manifest["roles"])
        play(run, "default")
    assert json.loads((folder / "run.json").read_text())["arguments"] == manifest["arguments"]
    with Run.open(folder, manifest) as run:  # without it, the new run resumes
        assert run.rollouts("default") == [RECORD]


def test_without_it_another_run_is_refused_with_the_remedy(folder):
    before = names(folder)
    with pytest.raises(UserError, match=r"arguments.seed was 0, now 1\).*--overwrite"), \
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
