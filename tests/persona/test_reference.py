"""Projections beside the default's own, the floor and the roles."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_axis, save_vector

from jaxpersona.errors import UserError
from jaxpersona.persona.reference import Reference, reference
from jaxpersona.vectors.vector import Axis, Vector

TABLE = {1.0: -2.0, 25.0: 1.0, 50.0: 2.0, 75.0: 3.0, 99.0: 6.0}
KNOWN = Reference(TABLE, {"ghost": -4.0, "tutor": 1.5, "pirate": -1.0})


@pytest.mark.parametrize(("value", "wanted"), [
    (-3.0, "below p1"), (-2.0, "p1–p25"), (1.0, "p25–p50"), (2.5, "p50–p75"), (6.0, "above p99")])
def test_a_value_lies_between_percentiles(value, wanted):
    assert KNOWN.place(value) == wanted


def test_distances_and_roles():
    """The quartiles 1 and 3 are those of a normal distribution of standard deviation 1.483."""
    assert KNOWN.floor == 1.0
    assert KNOWN.z(2.0) == 0 and KNOWN.z(2.0 - 1.48260222) == pytest.approx(-1)
    assert KNOWN.nearest(-2.4, 2) == ["pirate", "ghost"] and KNOWN.nearest(9.0, 1) == ["tutor"]
    assert KNOWN.nearest(-2.5) == ["ghost", "pirate", "tutor"]  # equally far: by name
    assert Reference({**TABLE, 75.0: 1.0}, {}).z(3.0) == pytest.approx(1e6)


def axis(layers=3):
    rows = {f"p{q:g}": np.full(layers, x) + np.arange(layers) for q, x in TABLE.items()}
    return Axis(np.ones((layers, 4)), percentiles={"default": rows})


def analysis(folder, layers=3, **change):
    value = {"layers": layers, "roles": {
        "default": {"mean_projection": [9.0] * layers},
        "ghost": {"mean_projection": [float(i) for i in range(layers)]}}} | change
    (folder / "analysis.json").write_text(json.dumps(value))
    (folder / "axis.safetensors").touch()
    (folder / "run.json").write_text(json.dumps({"model": {"fingerprint": ""}}))


def test_an_axis_brings_its_percentiles_and_its_run_the_roles(tmp_path):
    save_vector(tmp_path / "axis.safetensors", axis())
    file = tmp_path / "axis.safetensors"
    found = reference(load_axis(file), 2, file)
    assert dict(found.percentiles) == {q: x + 2 for q, x in TABLE.items()} and not found.roles
    analysis(tmp_path)
    assert reference(load_axis(file), 2, file).roles == {"ghost": 2.0}  # without the default
    silent = {"mean_projection": [0.0, 1.0, float("nan")]}
    analysis(tmp_path, roles={"silent": silent, "ghost": {"mean_projection": [3, 4, 5]}})
    assert reference(load_axis(file), 2, file).roles == {"ghost": 5.0}  # without empty roles
    assert reference(load_axis(file), 1, file).roles == {"silent": 1.0, "ghost": 4.0}
    analysis(tmp_path, roles={"ghost": {"mean_projection": [2**64] * 3}})
    assert reference(load_axis(file), 0, file).roles == {"ghost": 2.0**64}
    more = {**axis().percentiles["default"], "p2.5": np.arange(3.0), "mean": np.ones(3),
            "p0": -np.ones(3)}
    told = reference(Axis(np.ones((3, 4)), percentiles={"default": more}), 2).percentiles
    assert list(told) == [0, 1, 2.5, 25, 50, 75, 99] and told[2.5] == 2.0
    assert not reference(load_axis(file), 2).roles
    assert not reference(axis(), 2, tmp_path / "mini").roles  # a name, not a file of this folder
    (tmp_path / "run.json").write_text(json.dumps({"model": {"fingerprint": "0" * 16}}))
    assert not reference(load_axis(file), 2, file).roles  # the folder of another model's run
    assert reference(Vector(np.ones((3, 4))), 0) is None
    assert reference(Axis(np.ones((3, 4))), 0) is None


@pytest.mark.parametrize(("change", "wanted"), [
    ({"layers": 4}, "has 4 layers, but the axis in its folder has 3"),
    ({"roles": 5}, "field 'roles' is missing"),
    ({"roles": {"ghost": 5}}, "mean_projection of 'ghost' is missing"),
    ({"roles": {"ghost": {"mean_projection": [1.0]}}}, "mean_projection of 'ghost' is missing"),
    ({"roles": {"ghost": {"mean_projection": ["a"] * 3}}}, "mean_projection of 'ghost' is missing"),
    ({"roles": {"ghost": {"mean_projection": [10**400] * 3}}},
     "mean_projection of 'ghost' is missing"),
])
def test_a_damaged_analysis_is_named(tmp_path, change, wanted):
    analysis(tmp_path, **change)
    with pytest.raises(UserError, match=rf"analysis\.json.*{wanted}"):
        reference(axis(), 0, tmp_path / "axis.safetensors")


def test_project_compares_with_the_default(tmp_path, monkeypatch, capsys):
    """The command's table, JSON and figure, for projections that are given."""
    from types import SimpleNamespace

    from jaxpersona.persona.talk import TurnProjection

    save_vector(tmp_path / "axis.safetensors", axis())
    analysis(tmp_path)
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "hi"},
                                {"role": "assistant", "content": "so"}]))
    model = SimpleNamespace(config=SimpleNamespace(n_layers=3))
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: model)
    monkeypatch.setattr("jaxpersona.persona.check.fit", lambda _, vector: vector)
    monkeypatch.setattr("jaxpersona.persona.talk.project_conversation", lambda *_: [
        TurnProjection(1, 7, np.array([[0.0], [1.5], [0.0]], np.float32)),
        TurnProjection(3, 5, np.array([[0.0], [9.0], [0.0]], np.float32))])
    command = ["project", str(talk), "--on", str(tmp_path / "axis.safetensors")]
    assert s.run_command([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["assistant" if "assistant" in first else "vector"] == 1.5
    (told,) = first["compared"].values()  # layer 1: the floor is 2, the median 3
    assert told == {"z": pytest.approx((1.5 - 3) / 1.48260222, abs=1e-3), "default": "p1–p25",
                    "below_floor": True, "nearest": ["ghost"]}
    (told,) = second["compared"].values()
    assert told["default"] == "above p99" and not told["below_floor"]
    picture = tmp_path / "talk.png"
    assert s.run_command([*command, "--png", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "p25 2.000, p75 4.000, p1 -1.000, p99 7.000" in said
    assert "floor of --cap is p25, 2.000" in said and "above p99" in said and "ghost" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in picture.with_suffix(".svg").read_bytes()


def test_project_reads_layer_0_and_tells_two_directions_of_one_name_apart(tmp_path, monkeypatch,
                                                                          capsys):
    """The options of the model reach its loader, and a file of other tools is read."""
    from types import SimpleNamespace

    from jaxpersona.persona.talk import TurnProjection

    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_vector(file, Vector(np.ones((3, 4)), name="same"))
    talk, seen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}], []
    (tmp_path / "talk.json").write_text(json.dumps({"conversation": talk}))
    model = SimpleNamespace(config=SimpleNamespace(n_layers=3))
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: seen.append(a) or model)
    monkeypatch.setattr("jaxpersona.persona.check.fit", lambda _, vector: vector)
    monkeypatch.setattr("jaxpersona.persona.talk.project_conversation", lambda _, given, __: [
        TurnProjection(1, 7, np.array([[1.0, 2], [3, 4], [5, 6]], np.float32))] if (
            given == talk) else [])
    command = ["project", str(tmp_path / "talk.json"), "--on", str(files[0]), "--on",
               str(files[1]), "--model", "m", "--dtype", "float16", "--adapter", "lora"]
    for more, layer, values in (([], 1, [3, 4]), (["--layer", "0"], 0, [1, 2]),
                                (["--layer", "2"], 2, [5, 6])):
        assert s.run_command([*command, *more, "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found == {"turn": 1, "tokens": 7, "layer": layer, "compared": {},
                         **{f"same ({file})": value for file, value in
                            zip(files, values, strict=True)}}
    assert seen[0] == ("m", "float16", None, pathlib.Path("lora"))
    for wrong in ("3", "-1"):
        assert s.run_command([*command, "--layer", wrong]) == 2
        assert f"layer is {wrong}; the model has layers 0…2" in capsys.readouterr().err
