"""Contents of other projects' files, without the files: kinds, signs, and faults by name."""

from __future__ import annotations

import numpy as np
import pytest
from jaxpersona.ckpts import torchfile
from jaxpersona.ckpts.vectors import load_any, load_caps, load_vector, save_vector

import jaxpersona as jp

V = np.arange(1, 5, dtype=np.float32)
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4) + 1


def table(**changes):
    """Return capping experiments with one cap; `changes` replace parts of it."""
    item = {"vector": "a", "cap": 0.5} | changes.pop("item", {})
    one = {"id": "e", "interventions": [item]} | changes.pop("one", {})
    return {"vectors": {"a": {"vector": V, "layer": 1}}, "experiments": [one]} | changes


def test_a_ceiling_away_from_the_assistant_is_a_floor_towards_it():
    """Directions and caps are negated; an id may be a number."""
    found = torchfile.capping(table(one={"id": 5}))
    assert list(found) == ["5"]
    caps = found["5"]
    assert (caps.values.tolist(), caps.floors.tolist()) == ([(-V).tolist()], [-0.5])
    assert (caps.layers, caps.labels, caps.name) == ((1,), ("a",), "5")


@pytest.mark.parametrize(("changes", "words"), [
    ({"experiments": {}}, "^experiments must be a list$"), ({"experiments": []}, "^experiments is"),
    ({"vectors": [1]}, "^vectors is of type list; it must be a dict$"),
    ({"experiments": [5]}, r"^experiments\[0\] is of type int; it must be a dict$"),
    ({"one": {"id": []}}, r"^experiments\[0\].id is of type list; it must be a string$"),
    ({"one": {"interventions": {}}}, "^experiment 'e': interventions must be a list$"),
    ({"one": {"interventions": []}}, "^experiment 'e' has no caps, or vectors of different widths"),
    ({"one": {"interventions": [5]}}, "^experiment 'e': an intervention is of type int"),
    ({"item": {"vector": "b"}}, "^experiment 'e' uses the vector 'b', which is not in vectors$"),
    ({"item": {"cap": True}}, "^experiment 'e': cap is True; it must be a number$"),
    ({"item": {"cap": V}}, "^experiment 'e': cap is a tensor; it must be a number$"),
    ({"vectors": {"a": [1]}}, "^vector 'a' is of type list; it must be a dict with the keys"),
    ({"vectors": {"a": {"vector": ROWS, "layer": 1}}}, "^vector 'a' is invalid: 'vector' must be"),
    ({"vectors": {"a": {"vector": V.astype(float), "layer": 1}}}, "^vector 'a' is invalid"),
    ({"vectors": {"a": {"vector": V, "layer": 1.0}}}, "^vector 'a' is invalid"),
    ({"experiments": table()["experiments"] * 2}, "^experiments contains 'e' twice; experiment"),
], ids=str)
def test_a_fault_in_capping_experiments_is_named_with_its_place(changes, words):
    """Each fault has its own message."""
    with pytest.raises(ValueError, match=words):
        torchfile.capping(table(**changes))


@pytest.mark.parametrize(("name", "along"), [
    ("layers_1-p0.25", "p0.25 of the file is the 75th"), ("p.9", "p.9 of the file is the 10th"),
    ("p0.255_x", "p0.255 of the file is the 74.5th"), ("p25", None), ("plain", None)])
def test_a_percentile_of_the_file_is_counted_from_the_other_end(name, along):
    """The name of an experiment has the percentile as a fraction."""
    note = torchfile._sign(name)
    assert note.startswith("the file's vectors point away from the assistant")
    assert note.endswith(f"{along} percentile along +axis" if along else "its cap is a floor")


@pytest.mark.parametrize(("stem", "kind", "wanted"), [
    ("assistant_axis", None, ("axis", "assistant", 3)), ("AxisV2", None, ("axis", "assistant", 3)),
    ("default_vector", None, ("vector", "default", 3)), ("default", None, ("vector", "default", 3)),
    ("mood_prompt_avg_diff", None, ("vector", "mood", 2)),
    ("a_b_response_avg_diff", None, ("vector", "a_b", 2)),
    ("maxis", None, None), ("my_default", None, None), ("mood_diff", None, None),
    ("ghost_vector", "role", ("vector", "ghost", 3)), ("x", "persona", ("vector", "x", 2)),
    ("x", "axis", ("axis", "assistant", 3)),
], ids=str)
def test_the_name_of_a_file_suggests_the_kind_of_a_tensor(stem, kind, wanted):
    """Kind, name and number of layers of the direction; words are compared as a whole."""
    if wanted is None:
        with pytest.raises(ValueError, match="its kind cannot be inferred from the file name; set"):
            torchfile._interpret(stem, ROWS, kind)
    else:
        found = torchfile._interpret(stem, ROWS, kind)
        assert (found.kind, found.name, found.n_layers) == wanted


@pytest.mark.parametrize(("value", "kind", "words"), [
    ({"axis": ROWS}, "role", "^kind is 'role', but the kind of the file is 'axis'; omit kind$"),
    ({"vector": ROWS, "role": "x"}, "axis", "but the kind of the file is 'role'"),
    ({"other": ROWS}, None, "contains a dict without any of the keys axis, vector or experiments"),
    ({"axis": V}, None, r"^axis is \[4\]; it must be a tensor of shape \[L, D\]$"),
    ({"axis": [1]}, None, "^axis is list; it must be a tensor"),
    ({"vector": ROWS, "role": ["x"]}, None, "^role is of type list; it must be a string$"),
    (ROWS[:2], "persona", r"has shape \[2, 4\]; a persona vector has shape \[L \+ 1, D\] with at"),
], ids=str)
def test_a_content_of_another_form_is_named(value, kind, words):
    """Dicts are known by their keys, tensors by their shape."""
    with pytest.raises(ValueError, match=words):
        torchfile._interpret("x", value, kind)


def test_an_entry_of_a_persona_vector_is_one_layer_below():
    """The first and the last entry are dropped, and the last layer is zero."""
    found = torchfile._interpret("mood_prompt_last_diff", ROWS, None)
    np.testing.assert_array_equal(found.values, [ROWS[1], [0] * 4])
    assert found.notes["pool"] == "prompt_last" and "layer 1 is zero" in found.notes["re-based"]


def test_directions_and_caps_are_told_apart(tmp_path):
    """At most four experiments are listed; a file has at most 1,024 layers."""
    np.save(tmp_path / "v.npy", ROWS)
    with pytest.raises(ValueError, match=r"v.npy: contains a direction \(kind: vector\), not caps"):
        load_caps(tmp_path / "v.npy")
    with pytest.raises(ValueError, match=r"contains a direction \(kind: axis\), not caps"):
        load_caps("mini")
    caps = jp.Caps(ROWS[:1], (1,), np.ones(1), ("a",), name="e")
    assert save_vector(tmp_path / "c.safetensors", caps) == []
    with pytest.raises(ValueError, match=r"contains caps \(e\); read the file with load_caps"):
        load_vector(tmp_path / "c.safetensors")
    for layers, good in ((1024, True), (1025, False)):
        np.save(tmp_path / "v.npy", np.ones((layers, 2), np.float32))
        if good:
            assert load_any(tmp_path / "v.npy").n_layers == layers
        else:
            with pytest.raises(ValueError, match="v.npy has 1025 layers; the maximum is 1024"):
                load_any(tmp_path / "v.npy")


@pytest.mark.parametrize(("call", "words"), [
    (lambda path: load_any(5), "^path is 5; give the path of a file, or 'mini'$"),
    (lambda path: save_vector(5, jp.Vector(ROWS)), "^path is 5; give the path of a file$"),
    (lambda path: save_vector(path / "x.npy", ROWS), "^vector is of type ndarray; give a V"),
    (lambda path: save_vector(path / "x", jp.Vector(ROWS)), "the suffix is missing$"),
    (lambda path: save_vector(path / "x.PT", jp.Vector(ROWS)), "the suffix is .pt$"),
    (lambda path: load_any(path / "x.bin"), "the suffix must be one of .safetensors, .pt, .gguf, "),
    (lambda path: load_any(path / "x.npy", "axis"), "kind is 'axis', but it applies only to .pt f"),
    (lambda path: load_any(path), " is a folder; give a file$"),
    (lambda path: torchfile.read(path / "x.pt", "other"),
     "^kind is .other.; it must be one"),
], ids=["path", "saved path", "array", "no suffix", "suffix", "other suffix", "kind", "folder",
        "unknown kind"])
def test_a_wrong_argument_is_named_before_a_file_is_read(call, words, tmp_path):
    """None of the files exists."""
    with pytest.raises(ValueError, match=words):
        call(tmp_path)


def test_the_axis_of_a_run_is_suggested_for_its_folder(tmp_path):
    """Run folders have a file axis.safetensors."""
    (tmp_path / "axis.safetensors").write_text("")
    with pytest.raises(ValueError, match=f"is a folder; did you mean {tmp_path}/axis.safetensors"):
        load_any(tmp_path)


def test_a_direction_is_saved_whatever_the_case_of_the_suffix(tmp_path):
    """The name of the file stays as given."""
    axis = jp.Axis(ROWS, "n", "m", percentiles={"all": {"p5": np.arange(3.0)}}, notes={"k": 1})
    assert save_vector(tmp_path / "A.SafeTensors", axis) == []
    again = load_vector(tmp_path / "A.SafeTensors")
    assert (again.name, again.model, dict(again.notes)) == ("n", "m", {"k": 1})
    assert again.percentiles["all"]["p5"].tolist() == [0, 1, 2] and again.kind == "axis"
