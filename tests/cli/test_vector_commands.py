"""The tables and lines of `jaxpersona vectors`, with values that are given."""

from __future__ import annotations

import contextlib
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_any, save_vector

from jaxpersona.cli import support, vectors
from jaxpersona.persona import check as module
from jaxpersona.persona.check import Check
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

PRINT = "0123456789abcdef"
CAPS = Caps(np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), (3, 1, 3), np.array([1.5, -2.0, 0.25]),
            ("up", "down", "more"), "first", notes={"source": "here"})
OTHER = Caps(np.ones((1, 2)), (2,), np.zeros(1), ("x",), "second", "m", PRINT)


def rows(text):
    """Return the cells of the lines of a table."""
    return [[cell.strip() for cell in line.strip()[1:-1].replace("┃", "│").split("│")]
            for line in text.splitlines() if "│" in line or "┃" in line]


def run(capsys, *arguments):
    """Run a command of `vectors`; return its lines on standard output."""
    assert s.run_command(["vectors", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_an_axis_is_shown_with_its_norms_and_thresholds(tmp_path, capsys):
    """Norms 5 and 2; a population without p25 has empty cells."""
    file = tmp_path / "a.safetensors"
    save_vector(file, Axis(
        np.array([[3.0, 4.0], [0.0, 2.0]]), name="helper", model="m", fingerprint=PRINT,
        notes={"judge": "none", "shape": "mine"}, percentiles={
            "default": {"p25": np.array([1.5, -2.0])}, "all": {"p50": np.zeros(2)}}))
    said = rows(run(capsys, "show", file))
    scheme = load_any(file).fingerprint_scheme
    facts = {row[0]: row[1] for row in said if len(row) == 2}
    assert facts == {
        "kind": "axis", "name": "helper", "model": "m",
        "fingerprint": f"{PRINT} (scheme {scheme})", "site": "residual",
        "layers": "zero-based, after the block", "shape": "[2 layers, width 2]", "judge": "none",
        "notes.shape": "mine"}
    (head, *numbers) = [row for row in said if len(row) == 4]
    order = [head.index("default p25"), head.index("all p25")]
    assert head[:2] == ["layer", "norm"] and sorted(order) == [2, 3]
    assert [[row[0], row[1], *(row[i] for i in order)] for row in numbers] == [
        ["0", "5", "1.5", ""], ["1", "2", "-2", ""]]


def test_a_vector_of_another_site_without_a_model_is_shown(tmp_path, capsys):
    """The unknown model and fingerprint are named, and there are no thresholds."""
    save_vector(tmp_path / "v.safetensors", Vector(np.array([[6.0, 8.0]]), site="mlp"))
    said = rows(run(capsys, "show", tmp_path / "v.safetensors"))
    for row in (["kind", "vector"], ["name", "vector"], ["model", "unknown"],
                ["fingerprint", "unknown"], ["site", "mlp"], ["shape", "[1 layers, width 2]"],
                ["layer", "norm"], ["0", "10"]):
        assert row in said


def test_caps_are_shown_in_their_order_and_other_experiments_in_one_line(monkeypatch, capsys):
    """The first experiment is shown in full."""
    monkeypatch.setattr("jaxpersona.ckpts.vectors.load_any",
                        lambda file, kind: {"first": CAPS, "second": OTHER})
    text = run(capsys, "show", "caps.safetensors")
    said = rows(text)
    assert [row for row in said if len(row) == 4] == [
        ["order", "layer", "vector", "floor"], ["0", "3", "up", "1.5"], ["1", "1", "down", "-2"],
        ["2", "3", "more", "0.25"]]
    for row in (["kind", "caps"], ["name", "first"], ["site", "residual"],
                ["shape", "[3 caps, width 2]"], ["source", "here"]):
        assert row in said
    assert text.splitlines()[-1] == "also caps 'second'; number: 1; layers: 2; width: 2"


def test_a_kind_reaches_the_reader(monkeypatch, capsys):
    """Both commands that read any file pass it on."""
    seen = []
    monkeypatch.setattr("jaxpersona.ckpts.vectors.load_any",
                        lambda file, kind: seen.append((file, kind)) or Vector(np.ones((1, 2))))
    monkeypatch.setattr("jaxpersona.ckpts.vectors.save_vector", lambda *_: [])
    run(capsys, "show", "a.pt", "--kind", "role")
    run(capsys, "convert", "a.pt", "b.npy", "--kind", "persona")
    assert seen == [(pathlib.Path("a.pt"), "role"), (pathlib.Path("a.pt"), "persona")]


def test_converted_caps_are_described_with_their_notes(tmp_path, capsys):
    """A new name is written; the missing fingerprint is told."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_vector(source, CAPS)
    assert run(capsys, "convert", source, target, "--name", "new").splitlines() == [
        f"{target}: caps 'new'; number: 3; layers: 1, 3; width: 2", "  source: here",
        "  the file does not contain the fingerprint of a model; add it with --model NAME"]
    (found,) = load_any(target).values()
    assert (found.name, found.layers, found.labels) == ("new", (3, 1, 3), ("up", "down", "more"))
    save_vector(source, OTHER)
    assert run(capsys, "convert", source, target).splitlines() == [
        f"{target}: caps 'second'; number: 1; layers: 2; width: 2"]


def test_a_converted_direction_is_described(tmp_path, capsys):
    """With numbers of layers and width; a bare array has its shape only."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_vector(source, Axis(np.ones((3, 2)), name="helper", model="m", fingerprint=PRINT))
    assert run(capsys, "convert", source, target) == (
        f"{target}: axis 'helper', 3 layers, width 2\n")
    bare = tmp_path / "c.NPY"
    assert run(capsys, "convert", source, bare).splitlines() == [
        f"{bare}: values only, 3 × 2",
        "  omitted, because .NPY files cannot store this data: the kind (axis), the name, the "
        "model, the fingerprint"]


@pytest.mark.parametrize(("held", "given", "wanted"), [
    ([CAPS, OTHER], ["--experiment", "second"], "caps 'second'; number: 1"),
    ([CAPS], [], "caps 'first'; number: 3"),
    ([CAPS, OTHER], [], "contains 2 experiments; choose one with --experiment: first, second"),
    ([CAPS], ["--experiment", "x"], "--experiment is 'x'; the experiments in a.pt are first")])
def test_an_experiment_is_chosen_by_its_id(tmp_path, monkeypatch, capsys, held, given, wanted):
    """The only experiment needs no id."""
    monkeypatch.setattr("jaxpersona.ckpts.vectors.load_any",
                        lambda *_: {one.name: one for one in held})
    code = s.run_command(["vectors", "convert", "a.pt", str(tmp_path / "b.safetensors"), *given])
    said = capsys.readouterr()
    assert wanted in (said.err if code else said.out)
    assert (tmp_path / "b.safetensors").exists() == (code == 0)


def found(**changes):
    """A result of the self-test."""
    fields = {"ok": True, "faults": (), "sentences": ("sign: fine", "layers: fine"),
              "layers": (4, 5), "default": np.array([10.0, 20.0]), "roles": np.array([4.0, 2.0]),
              "shift": 1, "spread": np.array([2.0, 4.0]), "floors": np.array([9.0, 22.00006])}
    return Check(**fields | changes)


def test_a_check_as_json_has_every_row():
    """Four decimals; without floors, their rows are null."""
    wanted = {"ok": True, "sentences": ["sign: fine", "layers: fine"], "layers": [4, 5], "shift": 1,
              "default": [10.0, 20.0], "roles": [4.0, 2.0], "spread": [2.0, 4.0],
              "z_roles": [-3.0, -4.5], "floors": [9.0, 22.0001], "z_floors": [-0.5, 0.5]}
    assert vectors._of_check(found()) == wanted
    assert vectors._of_check(found(ok=False, floors=None, shift=None)) == wanted | {
        "ok": False, "floors": None, "z_floors": None, "shift": None}


def test_a_check_as_a_table_names_its_columns(capsys):
    """Without floors, their columns are empty; the unit of z is explained."""
    vectors._show_check(found())
    said = capsys.readouterr().out
    assert rows(said) == [
        ["layer", "default", "± spread", "roles", "roles, z", "floor", "floor, z"],
        ["4", "10", "2", "4", "-3.0", "9", "-0.5"], ["5", "20", "4", "2", "-4.5", "22", "+0.5"]]
    assert said.splitlines()[-3:] == [
        "z: distance from the default persona's mean projection, in standard deviations (spread)",
        "sign: fine", "layers: fine"]
    vectors._show_check(found(floors=None))
    assert rows(capsys.readouterr().out)[1] == ["4", "10", "2", "4", "-3.0", "", ""]


def test_caps_are_checked_with_their_own_layers_and_floors(tmp_path, monkeypatch):
    """The model's options reach its loader, and the replies are counted in the display."""
    save_vector(tmp_path / "c.safetensors", CAPS)
    opened, seen, shown = [], [], []

    def check(model, held, *, progress, **options):
        progress(2, 6, 77)
        seen.append((model, type(held), held.name, options))
        return found()

    @contextlib.contextmanager
    def display(log=False, note=None):
        yield lambda *given: shown.append(given)

    monkeypatch.setattr(module, "check", check)
    monkeypatch.setattr(support, "progress", display)
    monkeypatch.setattr(support, "open_model", lambda *a: opened.append(a) or "model")
    assert s.run_command(["vectors", "check", str(tmp_path / "c.safetensors"), "--model", "m",
                          "--dtype", "int8", "--adapter", "lora", "--experiment", "first"]) == 0
    assert opened == [("m", "int8", None, pathlib.Path("lora"))]
    assert seen == [("model", Caps, "first", {})] and shown == [("check", 2, 6, 77)]


def test_failed_tests_are_listed_after_the_json(monkeypatch, tmp_path, capsys):
    """One line with all faults, and exit code 2."""
    save_vector(tmp_path / "c.safetensors", CAPS)
    monkeypatch.setattr(support, "open_model", lambda *_: SimpleNamespace())
    monkeypatch.setattr(module, "check", lambda *_, **__: found(ok=False, faults=("a", "b")))
    assert s.run_command(["vectors", "check", str(tmp_path / "c.safetensors"), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] is False
    assert said.err == f"error: {tmp_path / 'c.safetensors'}: a; b\n"
