"""Interventions and captures from JSON: the same tables as from Python, and all errors reported."""

from __future__ import annotations

import json

import chex
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.interventions import spec_forms, specs
from jaxpersona.interventions.where import generated, response

MODEL = s.tiny_model()
RNG = np.random.default_rng(2)
V, W = RNG.normal(size=(2, 32)).round(3)
A = [float(x) for x in V]
EACH = RNG.normal(size=(2, 32)).round(3)
AXIS = jp.Axis(RNG.normal(size=(3, 32)), fingerprint=MODEL.fingerprint, percentiles={
    "default": {"p25": np.float32([1.0, 2.0, 3.0]), "p75": np.float32([4.0, 5.0, 6.0])}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors")
    jp.save_vector(path / "axis.safetensors", AXIS)
    jp.save_vector(path / "v.safetensors", jp.Vector(RNG.normal(size=(3, 32))))
    return path


SAME = [
    ({"operator": "steer", "vector": A, "layers": 1, "scale": 2, "where": "generated"},
     jp.steer(V, layers=1, scale=2, where=generated)),
    ({"operator": "steer", "vector": EACH.tolist(), "layers": "0:2", "scale": [1, 2]},
     jp.steer(EACH[None], layers=[0, 1], scale=[1, 2])),
    ({"operator": "cap", "vector": "axis.safetensors", "layers": "1:", "floor": "p25",
      "of": "default", "first_token": False},
     jp.cap(AXIS, layers=[1, 2], floor=[2, 3], where=jp.everywhere.without("first"))),
    ({"operator": "cap", "vector": A, "layers": [0, 2], "floor": -1, "ceiling": [1, 2.5]},
     jp.cap(V, layers=[0, 2], floor=-1, ceiling=[1, 2.5])),
    ({"operator": "ablate", "vector": A, "layers": 0, "site": "mlp", "coefficient": 0.5},
     jp.ablate(V, layers=0, site="mlp", coefficient=0.5)),
    ({"operator": "mean_ablate", "vector": A, "mean": [float(x) for x in W], "layers": "0,2"},
     jp.mean_ablate(V, W, layers=[0, 2])),
    ({"operator": "scale", "vector": A, "factor": -1, "layers": 0}, jp.scale(V, -1, layers=0)),
    ({"operator": "set_projection", "vector": A, "value": 3, "layers": 0,
      "where": {"name": "response", "without": ["code"], "turns": [1, 4]}},
     jp.set_projection(V, 3, layers=0, where=response.without("code").within(1, 4))),
    ({"operator": "rotate", "plane": [A, [float(x) for x in W]], "to": 0.5, "layers": 2},
     jp.rotate(V, W, to=0.5, layers=2)),
    ({"operator": "restore_norm", "layers": "2"}, jp.restore_norm(layers=2)),
    ({"operator": "steer", "vector": A, "layers": 2, "gate": {
        "vector": "axis.safetensors", "layer": 1, "below": 1.5, "over": "token"}},
     jp.gate(jp.steer(V, layers=2), AXIS, layer=1, below=1.5, over="token")),
    ({"operator": "steer", "vector": A, "layers": 2, "gate": {
        "vector": A, "layer": 1, "above": -1, "below": 1.5, "within": True, "site": "mlp",
        "where": "user", "first_token": True}},
     jp.gate(jp.steer(V, layers=2), V, layer=1, above=-1, below=1.5, within=True, site="mlp",
             where=jp.user)),
    ({"operator": "steer", "vector": A, "layers": 2, "gate": {
        "vector": A, "layer": 1, "above": 0, "first_token": True}},
     jp.gate(jp.steer(V, layers=2), V, layer=1, above=0, where=jp.prompt)),
    ({"operator": "cap", "vector": A, "layers": 2, "floor": 1, "push": EACH[0].tolist()},
     jp.cap(V, layers=2, floor=1, push=EACH[0])),
    ({"operator": "cap", "vector": "axis.safetensors", "layers": [0, 2], "floor": 0.5,
      "ceiling": "p75", "of": "default"}, jp.cap(AXIS, layers=[0, 2], floor=0.5, ceiling=[4, 6])),
    ({"operator": "rotate", "plane": [A, W.tolist()], "by": [0.5, 1], "layers": [0, 2],
      "where": "user", "site": "attention"},
     jp.rotate(V, W, by=[0.5, 1], layers=[0, 2], where=jp.user, site="attention")),
    ({"operator": "steer", "vector": A, "layers": 2, "gate": {
        "vector": A, "layer": 1, "above": 0, "over": "token", "first_token": True}},
     jp.gate(jp.steer(V, layers=2), V, layer=1, above=0, over="token", where=jp.everywhere)),
    ({"operator": "steer", "vector": A, "layers": 2, "gate": {
        "vector": A, "layer": 1, "above": 0, "where": "user"}},
     jp.gate(jp.steer(V, layers=2), V, layer=1, above=0, where=jp.user.without("first"))),
]


@pytest.mark.parametrize(("spec", "wanted"), SAME, ids=lambda x: None)
def test_gives_the_tables_that_code_gives(spec, wanted, folder):
    spec = json.loads(json.dumps(spec))
    found = specs.interventions(spec, MODEL, folder=folder)
    chex.assert_trees_all_equal_structs(found, wanted)
    assert s.same_bits(found, wanted)
    pair = specs.interventions([spec, SAME[0][0]], MODEL, folder=folder)
    assert s.same_bits(pair, jp.chain(wanted, SAME[0][1]))


def test_captures(folder):
    spec = [
        {"reading": "mean", "where": "generated", "layers": "1:3", "turns": 2},
        {"reading": "last", "site": "mlp", "name": "end"}, {"reading": "norms"},
        {"reading": "projections", "directions": [A], "layers": 0},
        {"reading": "moments", "directions": ["axis.safetensors"]},
        {"reading": "histogram", "directions": [A], "edges": [-1, 0, 1], "first_token": False},
        {"reading": "last", "first_token": False, "name": "a"},
        {"reading": "projections", "directions": [A], "first_token": False, "name": "b"},
        {"reading": "mean", "first_token": False, "name": "c"},
        {"reading": "full", "where": {"name": "user", "without": ["code"], "turns": [1, 2]},
         "first_token": False, "layers": 1, "site": "attention"},
    ]
    wanted = (
        capture.mean(generated, layers=[1, 2], turns=2)
        | capture.last(site="mlp", name="end") | capture.norms()
        | capture.projections([V], layers=0) | capture.moments(AXIS)
        | capture.histogram([V], [-1, 0, 1], response.without("first"))
        | capture.last(jp.everywhere.without("first"), name="a")
        | capture.projections([V], jp.everywhere.without("first"), name="b")
        | capture.mean(response.without("first"), name="c")
        | capture.full(jp.user.without("code", "first").within(1, 2), layers=1, site="attention"))
    found = specs.captures(spec, MODEL, folder=folder)
    chex.assert_trees_all_equal_structs(found, wanted)
    assert s.same_bits(found, wanted)


def steer(**changes):
    return {"operator": "steer", "vector": A, "layers": 1} | changes


REFUSED = [
    (steer(scal=1), "interventions.scal is unknown; did you mean 'scale'"),
    (steer(colour="red"), "colour is unknown; known keys: layers, where"),
    (steer(scale="much"), "interventions.scale is 'much'"),
    (steer(scale=float("nan")), "scale is nan"),
    ({"operator": "steer", "vector": A}, "interventions.layers: field required"),
    ({"operator": "melt"}, "operator is 'melt'; choose from steer, cap"),
    ([steer(), steer(layers=9)], r"interventions\[1\]: layers is 9, which is out of range"),
    (steer(layers="9:12"), "out of range; layers must be in 0…"),
    (steer(layers="a:b"), "layers is 'a:b': must be an integer, a list"),
    (steer(layers=True), "layers is True: must be an integer"),
    (steer(vector=[1.0, 2.0]), "width 2, but the model's residual stream has width 32"),
    (steer(vector=[[1.0], [1.0, 2.0]]), "lists of the same length"),
    (steer(firstToken=False), "firstToken is unknown; did you mean 'first_token'"),
    (steer(Scale=1), "Scale is unknown"), ([], "empty list"), ({}, "operator is missing"),
    ({"operator": [1]}, r"operator is \[1\]; choose"),
    (steer(vector=[0.5] * 5119 + ["x"]), r"^.{20,200}$"),
    (steer(gate={"vector": A, "layer": 0, "aboveX": 2}), "gate.aboveX is unknown; did you mean"),
    (steer(where={"turns": [3, 1]}), "contains no message"),
    ({"operator": "cap", "vector": A, "layers": 1, "floor": 1, "of": "all"},
     '"of" selects the population of a percent'),
    ({"operator": "cap", "vector": A, "layers": 1, "floor": 1e39}, "infinite in float32"),
    (steer(vector="x" * 300 + ".safetensors"), "xxx"),
    (steer(vector="absent.safetensors"), "absent.safetensors"),
    (steer(where="nowhere"), "where is 'nowhere'; choose from"),
    (steer(where={"name": "response", "wihtout": []}), "wihtout is unknown; did you mean 'with"),
    (steer(gate={"vector": A, "layer": 1, "above": 0}), "not before layer 1"),
    (steer(gate={"vector": A, "layer": 0, "abov": 0}), "abov is unknown; did you mean 'above'"),
    ({"operator": "rotate", "plane": [A, [2 * x for x in A]], "to": 1, "layers": 1},
     "are collinear at layer "),
    ({"operator": "rotate", "plane": [A], "to": 1, "layers": 1}, "plane"),
    ({"operator": "cap", "vector": A, "layers": 1, "floor": "p25"}, "only an axis has percentiles"),
    ({"operator": "cap", "vector": "axis.safetensors", "layers": 1, "floor": "p25"},
     "give the population of the percentile"),
    (steer(scale=True), "scale is True: must be a finite number"),
    (steer(scale=[1, [True]]), "must be a finite number"),
    (steer(scale=[]), r"scale is \[\]: must be a finite number"),
    (steer(scale=10**400), "must be a finite number"),
    (steer(vector=[]), r"vector is \[\]: must be a finite number, or a non-empty"),
    (steer(vector=5), "vector is 5: must be the name of a vector file"),
    (steer(layers=[]), r"layers is \[\]: must be an integer, a list"),
    (steer(layers=[1, True]), "must be an integer, a list"),
    (steer(where={"turns": [-1, 2]}), "where.turns.0 is -1: input should be greater"),
    ("cap", "interventions is 'cap'"),
    ([steer(scal=1), steer(scale="x")], r"\[0\].scal.*\[1\].scale"),  # all errors at once
]


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_refused_before_anything_compiles(spec, message, folder):
    with pytest.raises(ValueError, match=message):
        specs.interventions(spec, MODEL, folder=folder)


@pytest.mark.parametrize(("spec", "message"), [
    ({"reading": "mean", "edges": [1]}, "mean does not accept edges"),
    ({"reading": "histogram", "directions": [A]}, "histogram requires edges"),
    ({"reading": "projections"}, "projections requires directions"),
    ({"reading": "last", "turns": 2}, "last does not accept turns"),
    ({"reading": "mean", "layers": 7}, "out of range|reads layer 7"),
    ({"reading": "mean", "laers": 1}, "did you mean 'layers'"),
    ([{"reading": "mean"}, {"reading": "mean"}], "two captures"),
    ({"reading": "projections", "directions": ["axis.safetensors", A]}, "both file names and"),
    ({"reading": "mean", "operator": [1]}, "operator is unknown"),
    ({"reading": "mean", "directions": [A]}, "mean does not accept directions"),
    ({"reading": "moments", "directions": [A], "edges": [1]}, "moments does not accept edges"),
    ({"reading": "moments", "directions": [[1.0, 2.0]]},
     "capture: directions have width 2, but the model's"),
    ({"reading": "moments", "directions": [A, [0.0] * 32]}, "contains a zero vector"),
])
def test_captures_refused(spec, message, folder):
    with pytest.raises(ValueError, match=message):
        specs.captures(spec, MODEL, folder=folder)


def fits(value, schema, whole):
    """Return whether a value matches a JSON schema; supports only the keywords in our schema."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
             "integer": int, "number": (int, float)}
    # check the type first
    for key, want in sorted(schema.items(), key=lambda pair: pair[0] != "type"):
        if key == "$ref":
            ok = fits(value, whole["$defs"][want.removeprefix("#/$defs/")], whole)
        elif key in ("anyOf", "oneOf"):
            ok = any(fits(value, one, whole) for one in want)
        elif key == "type":
            ok = isinstance(value, kinds[want]) and (want == "boolean"
                                                     or not isinstance(value, bool))
        elif key == "const":
            ok = value == want
        elif key == "enum":
            ok = value in want
        elif key == "items":
            ok = all(fits(one, want, whole) for one in value)
        elif key in ("minimum", "maximum"):
            ok = value >= want if key == "minimum" else value <= want
        elif key == "exclusiveMaximum":
            ok = value < want
        elif key in ("minItems", "maxItems"):
            ok = len(value) >= want if key == "minItems" else len(value) <= want
        elif key == "required":
            ok = set(want) <= set(value)
        elif key == "properties":
            ok = all(fits(one, want[name], whole) for name, one in value.items() if name in want)
        elif key == "additionalProperties":
            ok = set(value) <= set(schema["properties"])
        else:
            assert key in ("$defs", "title", "default", "description", "discriminator"), key
            ok = True
        if not ok:
            return False
    return True


def test_the_schema_takes_what_is_read_and_refuses_other_forms():
    """Every valid spec matches the schema, and invalid ones do not."""
    schema = json.loads(json.dumps(specs.schema()))
    assert schema["type"] == "array"
    for spec, _ in SAME:
        assert fits(json.loads(json.dumps([spec])), schema, schema), spec
    named = {spec["operator"] for spec, _ in SAME}
    known = {x["properties"]["operator"]["const"] for x in schema["$defs"].values()
             if "operator" in x.get("properties", {})}
    assert known == named
    for spec in (steer(scal=1), {"operator": "melt"}, {"operator": "steer", "vector": A}, steer(
            vector=None), steer(layers=True), steer(layers={}), steer(site="head"), steer(
            gate={"vector": A}), steer(gate={"vector": A, "layer": -1}), steer(
            gate={"vector": A, "layer": 0, "over": "row"}), steer(gate={"vector": A, "layer": 0,
                                                                     "abov": 0}),
            steer(where={"turns": [1]}), steer(where="nowhere"), steer(
                where={"name": "nowhere"}), {"operator": "rotate", "plane": [A], "layers": 1},
            {"operator": "cap", "vector": A, "layers": 1, "of": 3}):
        assert not fits([spec], schema, schema), spec


def test_a_form_without_a_case_builds_no_other_operator(tmp_path):
    class Melt(spec_forms._Act):
        operator: str = "melt"

    with pytest.raises(NotImplementedError, match="Melt has no case in specs._build; add one"):
        specs._build(Melt(layers=1), MODEL, tmp_path)


def test_from_the_command_line(tmp_path, capsys):
    rows = [{"operator": "steer", "vector": [0.5] * 128, "layers": 3, "where": "generated"}]
    (tmp_path / "edits.json").write_text(json.dumps(rows))
    from jaxpersona.cli.main import main

    arguments = ["generate", "Hello.", "--max-new-tokens", "4", "--spec"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, str(tmp_path / "edits.json")])
    assert not stop.value.code
    assert "tokens selected: 4, activations changed: 4, layers: 1" in capsys.readouterr().err
    (tmp_path / "edits.json").write_text(json.dumps([{**rows[0], "layers": 99}]))
    assert s.run_command([*arguments, str(tmp_path / "edits.json")]) == 2
    assert "interventions[0]: layers is 99, which is out of range" in capsys.readouterr().err
    (tmp_path / "edits.json").write_text("{")
    assert s.run_command([*arguments, str(tmp_path / "edits.json")]) == 2
    assert "invalid JSON" in capsys.readouterr().err


def test_a_file_that_holds_null_is_refused(tmp_path, capsys):
    (tmp_path / "spec.json").write_text("null")
    assert s.run_command(["generate", "hi", "--spec", str(tmp_path / "spec.json")]) == 2
    assert f"{tmp_path / 'spec.json'}: contains null" in capsys.readouterr().err
