"""Folders of a run that are symbolic links: nothing outside the run is read, written or deleted."""

from __future__ import annotations

import os

import pytest

from jaxpersona.errors import UserError
from jaxpersona.persona.importing import _check_target
from jaxpersona.runs.files import delete_run, path_of, remove_leftovers
from jaxpersona.runs.names import judge_folder
from jaxpersona.runs.run import Run

MANIFEST = {"roles": {"ghost": {}, "default": {}}, "questions": {}, "judges": {"my judge": {}},
            "last": {"judge": "my judge"}}
JUDGE = judge_folder("my judge")
PARTS = ["live", "rollouts", "samples", "vectors", "scores", "sums", "means", f"scores/{JUDGE}",
         f"sums/{JUDGE}"]
NAMES = ("ghost.jsonl", "ghost.means", "ghost.verdicts.jsonl", "ghost.safetensors", "ghost.json",
         f".ghost.jsonl.{2**22}.tmp", f".ghost.json.{2**22}.tmp", f".ghost.safetensors.{2**22}.tmp")


def opened(folder, **options):
    with Run.open(folder, MANIFEST, **options):
        pass


@pytest.mark.parametrize("kind", ["full", "empty", "missing"])
@pytest.mark.parametrize("part", PARTS)
def test_a_linked_folder_is_refused_by_name(tmp_path, part, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    opened(run)
    if kind != "missing":
        outside.mkdir()
    for name in NAMES if kind == "full" else ():
        (outside / name).write_text("mine")
    place = run / part
    if place.is_dir():
        for child in sorted(place.rglob("*"), reverse=True):
            child.rmdir()
        place.rmdir()
    place.symlink_to(outside)
    for act in (lambda: opened(run), lambda: opened(run, overwrite=True), lambda: Run.read(run),
                lambda: delete_run(run, MANIFEST["roles"], MANIFEST["judges"]),
                lambda: _check_target(run, True), None, lambda: opened(run),
                lambda: _check_target(run, False)):
        if act is None:
            (run / "run.json").unlink()
            continue
        with pytest.raises(UserError) as error:
            act()
        assert str(error.value).startswith(f"{place} is a symbolic link; ")
        assert "\n" not in str(error.value)
    remove_leftovers(run, MANIFEST["roles"], MANIFEST["judges"])
    if kind == "missing":
        assert not outside.exists()
    else:
        assert {path.name: path.read_text() for path in outside.iterdir()} == (
            dict.fromkeys(NAMES, "mine") if kind == "full" else {})


def test_links_to_files_and_a_link_to_the_run_itself_stay_possible(tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    opened(run)
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(run)
    path_of(run, "scores", "default").symlink_to(mine)
    opened(tmp_path / "link")
    opened(tmp_path / "link", overwrite=True)  # it removes the link, not its target
    assert mine.read_text() == "mine"
    assert not os.path.lexists(path_of(run, "scores", "default"))
