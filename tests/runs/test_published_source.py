"""Checks of a published folder across its files, and what an import records about its origin."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from published_folder import L, torch, write

import jaxpersona as jp
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.persona.exporting import Exported, export_reference
from jaxpersona.persona.importing import import_reference
from jaxpersona.persona.source import Source
from jaxpersona.runs.published import published_key
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run
from jaxpersona.runs.seal import digest


def source(folder, given=None):
    return Source(folder, given, None, None)


def test_all_roles_have_the_same_questions(tmp_path):
    """A question index with another text is an error in the second role."""
    folder = write(tmp_path / "in")
    path = folder / "responses" / "b.jsonl"
    path.write_text(path.read_text().replace('"question": "Why 2?"', '"question": "Who?"'))
    with pytest.raises(UserError, match="b.jsonl: the question with question_index 2 differs from "
                                        "the question with this index of another role"):
        source(folder)


def test_the_first_five_prompts_that_differ_are_named(tmp_path):
    """A given role may have more prompts than the responses."""
    folder = write(tmp_path / "in", names=("a",))
    path = folder / "responses" / "a.jsonl"
    line = json.loads(path.read_text().split("\n")[0])
    path.write_text("".join(json.dumps(line | {"prompt_index": i, "system_prompt": f"x{i}"}) + "\n"
                            for i in range(7)))
    for part in ("scores", "activations"):
        next((folder / part).glob("a.*")).unlink()
    default = Role("default", ("", "You are default1.", "more"), "")
    roles = {"default": default, "a": Role("a", ("x0", "y", "x2", "y", "y", "y", "y"), "")}
    with pytest.raises(UserError, match="prompts with prompt_index 1, 3, 4, 5, 6 differ from the"):
        source(folder, roles)
    roles["a"] = Role("a", ("y",) * 6, "")
    with pytest.raises(UserError, match="prompts with prompt_index 0, 1, 2, 3, 4 differ from"):
        source(folder, roles)
    roles["a"] = Role("a", tuple(f"x{i}" for i in range(9)), "")
    found = source(folder, roles)
    assert found.roles == roles and list(found.roles) == ["a", "default"]
    assert found.gaps == [] and found.rollouts == {"a": 7, "default": 8}


def test_empty_activations_are_named_and_the_default_persona_is_read_first(tmp_path):
    """Its means give the shape, if there are any."""
    folder = write(tmp_path / "in")
    assert source(folder).shape == (3, 4) and source(folder).distance is None
    torch.save({}, folder / "activations" / "default.pt")
    with pytest.raises(UserError, match=r"default\.pt is empty; delete it"):
        source(folder)
    (folder / "activations" / "default.pt").unlink()
    assert source(folder).shape == (3, 4)


def test_the_manifest_of_an_unknown_model_has_what_the_folder_contains(tmp_path):
    """A role without all its prompts has a digest that no role can have."""
    folder = write(tmp_path / "in", names=("a", "b"))
    path = folder / "responses" / "b.jsonl"
    kept = [line for line in path.read_text().split("\n") if '"prompt_index": 1' in line]
    path.write_text("\n".join(kept) + "\n")
    for part, name in (("scores", "b.json"), ("activations", "b.pt")):
        (folder / part / name).unlink()
    found = source(folder)
    value = found.manifest("people", Settings(seed=5), min_count=3)
    assert value["model"] == {"fingerprint": "", "fingerprint_scheme": value["model"][
        "fingerprint_scheme"], "dtype": "", "layers": 3, "width": 4, "stop_ids": []}
    assert value["arguments"]["seed"] == 5 and value["judges"] == {"people": {}}
    assert value["questions"] == {str(i): digest([f"Why {i}?"]) for i in range(4)}
    assert value["roles"] == {
        "a": digest([["You are a0.", "You are a1."]]), "b": digest(["gaps", ["You are b1."]]),
        "default": digest([["", "You are default1."]])}
    assert value["last"] == {"model": "", "judge": "people", "min_count": 3, "versions": {}}
    assert value["imported"] == {"folder": str(folder), "distance": None, "rollouts": 20}
    assert (found.gaps, found.questions[3], found.axis) == (["b"], "Why 3?", None)
    (folder / "jaxpersona.json").write_text("[1]")
    assert found.origin() == {}
    (folder / "jaxpersona.json").write_text('{"model": "tiny"}')
    assert found.origin() == {"model": "tiny"}


def test_the_model_of_an_exported_run_is_named_when_it_is_not_given(tmp_path):
    """The limits of an import without a model are a note; the defaults are those of the paper."""
    folder = write(tmp_path / "in")
    found = import_reference(folder, tmp_path / "run")
    (note,) = [note for note in found.notes if note.startswith("the model is unknown")]
    assert note.endswith("import it with the model (--model)")
    (note,) = [note for note in found.notes if note.startswith("no axis was computed")]
    assert note == ("no axis was computed: roles with at least 50 rollouts with score 3 that have "
                    "a response mean: 0; the axis needs at least two such roles and the default "
                    "persona's response means")
    (folder / "jaxpersona.json").write_text(json.dumps({"model": "tiny"}))
    torch.save({"axis": torch.ones(L, 4)}, folder / "axis.pt")
    found = import_reference(folder, tmp_path / "two", min_count=5, judge="people", keep_means=3)
    (note,) = [note for note in found.notes if note.startswith("the model is unknown")]
    assert note.endswith("(--model; the exported run had the model 'tiny')")
    far = np.linalg.norm(found.extraction.axis.values - 1) / np.linalg.norm(np.ones((L, 4)))
    assert f"relative distance of the axis from that in axis.pt: {far:.1e}" in found.notes
    assert found.run == tmp_path / "two" and found.scores == {"a": 8, "b": 8, "c": 8, "default": 0}
    run = Run.read(tmp_path / "two")
    last = run.manifest["last"]
    assert (last["judge"], last["min_count"], last["held_out"], last["keep_means"]) == (
        "people", 5, [], 3)
    assert len(run.sample("a")) == 3 and len(run.sample("default")) == 8
    assert found.extraction.axis.notes["judge"] == "people"
    for options, wanted in (({"settings": Settings(samples=2)}, "settings.samples is 2; the pub"),
                            ({"keep_means": 1}, "keep_means is 1"), ({"judge": 5}, "judge is 5;")):
        with pytest.raises(UserError, match=wanted):
            import_reference(folder, tmp_path / "three", **options)


def test_an_import_needs_a_folder_and_a_tokenizer_of_the_model(tmp_path):
    """Both are found before the source is read."""
    (tmp_path / "file").touch()
    bare = dataclasses.replace(jp.load("mini"), tokenizer=None)
    for target, options, wanted in (
            ("file", {}, "file is a file; give a folder"),
            ("run", {"model": bare}, "mini has no tokenizer; the comparison of response means"),
            ("run", {}, "contains no file responses/<role>.jsonl; give the output folder")):
        with pytest.raises(UserError, match=wanted):
            import_reference(tmp_path, tmp_path / target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_says_what_the_published_scripts_need(tmp_path):
    """Notes on sampled and missing means, on the judge none and on min_count."""
    folder = write(tmp_path / "in")
    import_reference(folder, tmp_path / "run", min_count=5, keep_means=None, judge="none")
    found = export_reference(tmp_path / "run", tmp_path / "out")
    assert isinstance(found, Exported) and found.folder == tmp_path / "out"
    assert found.notes == [
        "the run stores each response mean as its difference from the role's average, with eight "
        "significant bits; the averages by score are exact",
        "the judge 'none' gave score 3 to every reply without reading it; delete scores to judge "
        "the replies with 3_judge.py", "4_vectors.py needs --min_count 5 to use the same roles"]
    axis = torch.load(tmp_path / "out" / "axis.pt", weights_only=True)
    assert axis["n_roles"] == 3 and axis["n_default"] == 1
    np.testing.assert_allclose(axis["default_mean"] - axis["role_mean"], axis["axis"], atol=1e-6)
    none = export_reference(tmp_path / "run", tmp_path / "none", activations="none", min_count=6)
    assert none.notes[:3] == [
        "3 roles (a, b, c): fewer than 6 rollouts with score 3, therefore no vector",
        "axis.pt was not written; the axis needs the sums of all roles and at least two roles with "
        "a vector", "the response means were not exported; 2_activations.py computes them again"]
    record = {"prompt_index": 3, "question_index": 7, "label": "default"}
    assert published_key(record) == "pos_p3_q7"
    assert jp.load_axis(tmp_path / "out" / "axis.pt").n_layers == 3
