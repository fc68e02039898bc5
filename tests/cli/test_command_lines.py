"""The lines and files of `demo`, `runs`, `project`, `plan` and `data`, for given results."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.cli import demo, plan, project
from jaxpersona.data import texts
from jaxpersona.errors import UserError
from jaxpersona.organism import method
from jaxpersona.persona.importing import Imported
from jaxpersona.persona.reference import Reference

LOADED = SimpleNamespace(name="m", config=SimpleNamespace(n_layers=5))


@pytest.fixture
def opened(monkeypatch):
    """The arguments of each call of `open_model`."""
    seen = []
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: seen.append(a) or LOADED)
    return seen


@pytest.mark.parametrize("drawn", [True, False])
def test_the_demo_writes_drift_and_figures_and_ends_in_json(opened, monkeypatch, tmp_path, capsys,
                                                            drawn):
    """The drift figure needs the others; decimal numbers have four decimals."""
    figures = {"drift_leak_uncapped": 0.5, "drift_leak_capped": 0.123456, "leak_n": 7}
    done = SimpleNamespace(extraction=SimpleNamespace(axis="axis"), figures=figures,
                           talks={"uncapped": 1, "capped": 2}, styles="styles")
    seen = []

    def note(name, result=None):
        return lambda *given, **named: seen.append((name, given, named)) or result

    monkeypatch.setattr("jaxpersona.organism.demo.run_demo", note("run", done))
    monkeypatch.setattr("jaxpersona.report.run_drift.save_drift", note("save"))
    monkeypatch.setattr("jaxpersona.cli.support.draw_run", note("draw", drawn))
    monkeypatch.setattr("jaxpersona.report.figures.drift", note("drift"))
    monkeypatch.setattr(demo, "_show", note("show"))
    times = iter([100.0, 112.34])
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    out = tmp_path / "run"
    assert s.run_command(["demo", "--out", str(out), "--seed", "7"]) == 0
    said = capsys.readouterr()
    assert said.err == f"wrote the run, with its axis and vectors, to {out}\n"
    assert json.loads(said.out) == {
        "run": str(out), "model": "m", "seconds": 12.3, "drift_leak_uncapped": 0.5,
        "drift_leak_capped": 0.1235, "leak_n": 7}
    assert opened == [("mini", None)] and seen[0][1] == (LOADED, out)
    assert seen[0][2]["seed"] == 7 and callable(seen[0][2]["report"])
    about = {"behaviour": "styles", "leak": {"uncapped": 0.5, "capped": 0.123456}}
    wanted = [("save", (out, done.talks, "axis", 2), about),
              ("draw", (out, done.extraction, 2, method.held_out()), {})]
    if drawn:
        wanted.append(("drift", (out / "drift.png", done.talks, "axis", 2), about))
    assert seen[1:] == [*wanted, ("show", (done,), {})]


def test_the_demo_needs_mini(opened, capsys):
    """Another model has no known ground truth."""
    assert s.run_command(["demo", "--model", "m"]) == 2
    assert "model is 'm'; the demo needs the known ground truth" in capsys.readouterr().err
    assert not opened


def test_an_imported_axis_is_drawn_and_its_next_commands_are_printed(opened, monkeypatch, tmp_path,
                                                                     capsys):
    """The figures are those of the middle layer, and names with spaces are quoted."""
    out = tmp_path / "my run"
    axis = SimpleNamespace(axis=SimpleNamespace(n_layers=7), analysis=SimpleNamespace(
        names=["a", "b"]))
    found = Imported(out, {"a": 1000, "b": 234}, {"a": 2000, "b": 1}, {"a": 1500, "b": 2}, axis,
                     ["one", "two"])
    drawn = []
    monkeypatch.setattr("jaxpersona.persona.importing.import_reference", lambda *_, **__: found)
    monkeypatch.setattr("jaxpersona.cli.support.draw_run", lambda *given: drawn.append(given))
    command = ["runs", "import", "source", str(out), "--held-out", "bee,,cat"]
    assert s.run_command([*command, "--model", "my model"]) == 0
    first = (f"{out}: 2 roles, 1,234 rollouts, 2,001 scores, 1,502 response means, axis of 2 "
             "roles")
    assert capsys.readouterr().out.splitlines() == [
        first, "  one", "  two", "next:",
        f"  jaxpersona vectors check '{out}/axis.safetensors' --model 'my model'",
        f"  jaxpersona judge sample '{out}' --score 3"]
    assert drawn == [(out, axis, 3, ["bee", "cat"])]
    assert s.run_command(command) == 0
    assert "axis.safetensors' --model MODEL\n" in capsys.readouterr().out
    assert s.run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": str(out), "roles": 2, "rollouts": 1234, "scores": 2001, "means": 1502,
        "roles_in_axis": ["a", "b"], "notes": ["one", "two"]}


@pytest.mark.parametrize(("more", "wanted"), [
    (["--roles", "data"], (None, "the model")),
    (["--roles", "r"], (pathlib.Path("r"), "the model")),
    (["--roles", "data", "--model", "owner/Some-7B:q4"], (None, "q4")),
    (["--roles", "data", "--model", "a/Some-7B/"], (None, "Some-7B"))])
def test_the_roles_of_an_import_have_the_name_of_its_model(opened, monkeypatch, more, wanted):
    """Without a model, the prompts say `the model`."""
    seen = []

    def load(path, *, model_name):
        seen.append((path, model_name))
        raise jp.UserError("enough")

    monkeypatch.setattr(texts, "load_roles", load)
    assert s.run_command(["runs", "import", "source", "run", *more]) == 2
    assert seen == [wanted] and not opened


def test_an_import_checks_its_options_first(tmp_path, capsys):
    """The run folder must not be a file."""
    (tmp_path / "file").touch()
    for more, wanted in ((["run", "--keep-means", "1"], "keep_means is 1; give an integer of at"),
                         (["run", "--temperature", "-1"], "temperature is -1.0"),
                         (["run", "--max-new-tokens", "0"], "max_new_tokens is 0"),
                         ([str(tmp_path / "file")], f"RUN is {tmp_path}/file, a file")):
        assert s.run_command(["runs", "import", "source", *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {wanted}")


def test_an_export_without_an_axis_does_not_mention_one(monkeypatch, tmp_path, capsys):
    """Nor notes, if there are none."""
    from jaxpersona.persona.exporting import Exported

    monkeypatch.setattr("jaxpersona.persona.exporting.export_reference",
                        lambda *_, **__: Exported(tmp_path, 5, 4000, 0, [], []))
    assert s.run_command(["runs", "export", "run", str(tmp_path / "new"), "--reference"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'new'}: 5 rollouts, 4,000 scores, 0 response means\n")


KNOWN = Reference({1.0: -2.0, 25.0: 1.0, 50.0: 2.0, 75.0: 3.0, 99.0: 6.0},
                  {"ghost": -4.0, "tutor": 1.5})


def test_a_projection_is_compared_with_its_floor():
    """The floor itself is not below the floor; without roles, there is no cell for them."""
    z = round((1.0 - 2.0) / 1.48260222, 4)
    assert project._compared(KNOWN, 1.0) == {
        "z": pytest.approx(z, abs=1e-4), "default": "p25–p50", "below_floor": False,
        "nearest": ["tutor", "ghost"]}
    assert project._compared(KNOWN, 0.9999)["below_floor"] is True
    assert project._cells(KNOWN, 3.4826) == ["3.483", "+1.0", "p75–p99", "tutor, ghost"]
    assert project._cells(Reference(KNOWN.percentiles, {}), -3.0) == ["-3.000", "-3.4", "below p1"]
    assert project._cells(None, 1.23456) == ["1.235"]


@pytest.fixture
def talk(opened, monkeypatch, tmp_path):
    """Two directions, the second of which has a reference, and projections of two messages."""
    from jaxpersona.persona.talk import TurnProjection

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    values = np.zeros((5, 2), np.float32)
    values[2], values[3] = (1.5, 0.5), (2.5, -3.0)
    vectors = {"a": jp.Vector(np.ones((5, 4)), name="a"), "b": jp.Vector(np.ones((5, 4)), name="b")}
    monkeypatch.setattr("jaxpersona.ckpts.vectors.load_vector", lambda file: vectors[str(file)])
    monkeypatch.setattr("jaxpersona.persona.check.fit", lambda _, vector: vector)
    monkeypatch.setattr("jaxpersona.persona.reference.reference", lambda vector, layer, file: (
        KNOWN if str(file) == "b" else None))
    monkeypatch.setattr("jaxpersona.persona.talk.project_conversation", lambda *_: [
        TurnProjection(1, 7, values), TurnProjection(3, 5, -values)])
    (tmp_path / "talk.json").write_text(json.dumps({"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]}))
    return ["project", "talk.json", "--on", "a", "--on", "b"]


def test_the_table_of_projections_has_columns_for_each_direction(talk, capsys):
    """A direction without a reference has one column."""
    assert s.run_command(talk) == 0
    text = capsys.readouterr().out
    said = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
            for line in text.splitlines() if "│" in line]
    assert said[0] == ["1", "7", "1.500", "0.500", "-1.0", "p1–p25", "tutor, ghost"]
    assert said[1] == ["3", "5", "-1.500", "-0.500", "-1.7", "p1–p25", "tutor, ghost"]
    last = "".join(text.splitlines()[-3:])
    assert "projections onto b: p25 1.000, p75 3.000, p1 -2.000, p99 6.000; the default" in last
    assert "projections onto a" not in text


def test_the_figure_of_projections_has_the_values_of_the_layer(talk, monkeypatch, capsys):
    """Messages by directions, with their names and references."""
    seen = []
    monkeypatch.setattr("jaxpersona.report.messages.messages", lambda *given: seen.append(given))
    assert s.run_command([*talk, "--layer", "3", "--png", "p.png", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "wrote p.png\n"
    ((path, turns, values, names, layer, references),) = seen
    assert (path, turns, names, layer) == (pathlib.Path("p.png"), [1, 3], ["a", "b"], 3)
    assert values.tolist() == [[2.5, -3.0], [-2.5, 3.0]] and references == [None, KNOWN]
    first, second = json.loads(said.out)
    assert (first["turn"], first["tokens"], first["layer"], first["a"], first["b"]) == (
        1, 7, 3, 2.5, -3.0)
    assert list(first["compared"]) == ["b"] and second["compared"]["b"]["default"] == "p75–p99"


@pytest.mark.parametrize(("text", "more", "wanted"), [
    ('{"turns": []}', [], "talk.json: must contain a list of messages with role and content"),
    ('"hi"', [], "talk.json: must contain a list"), ("[]", [], "talk.json: "),
    ("[]", ["--png", "."], "--png is ., a folder; give the name of a file")])
def test_a_file_without_messages_is_named(talk, capsys, text, more, wanted):
    """So is a folder in place of a figure."""
    pathlib.Path("talk.json").write_text(text)
    assert s.run_command([*talk, *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {wanted}")


def test_the_options_of_a_plan_reach_it(monkeypatch, capsys):
    """By default, 32 rows of 2,048 slots, bfloat16 and no cap; a cap has absolute layers."""
    seen = []
    monkeypatch.setattr("jaxpersona.planning.plan.plan",
                        lambda *given, **named: seen.append((given, named)) or {"ok": 1})
    assert s.run_command(["plan", "--topology", "h200:8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": 1}
    assert s.run_command(["plan", "--topology", "v5e:2x2", "--model", "random:qwen3-8b", "--batch",
                          "8", "--context", "64", "--cap", "-2:", "--mesh", "data=2,model=2",
                          "--dtype", "int8", "--json"]) == 0
    ((config, topology), named), ((other, chips), given) = seen
    assert (config.n_layers, topology) == (80, "h200:8")
    assert named == {"name": "random:llama-3.3-70b", "batch": 32, "context": 2048,
                     "cap_layers": (), "mesh": None, "dtype": "bfloat16"}
    assert (other.n_layers, chips, tuple(given.pop("cap_layers"))) == (36, "v5e:2x2", (34, 35))
    assert given == {"name": "random:qwen3-8b", "batch": 8, "context": 64,
                     "mesh": {"data": 2, "model": 2}, "dtype": "int8"}


def test_the_shape_of_a_plan_comes_from_a_file_or_a_folder(monkeypatch, tmp_path):
    """A folder may end in .gguf, and ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("jaxpersona.ckpts.gguf_model.open_checkpoint",
                        lambda path: SimpleNamespace(config=("file", path)))
    monkeypatch.setattr("jaxpersona.ckpts.hf.read_config", lambda folder: (("folder", folder), 0))
    (tmp_path / "f.gguf").mkdir()
    assert plan.read_shape("~/m.gguf") == ("file", tmp_path / "m.gguf")
    assert plan.read_shape("~/f.gguf") == ("folder", f"{tmp_path}/f.gguf")
    with pytest.raises(UserError, match="~/none: no such folder; give random:<preset>, a .gguf"):
        plan.read_shape("~/none")


def test_the_number_of_exported_texts_is_that_of_the_files(tmp_path, capsys):
    """Files of roles, questions, traits and drift."""
    folder = tmp_path / "new"
    assert s.run_command(["data", "export", str(folder)]) == 0
    count = sum(path.is_file() for path in folder.rglob("*"))
    assert capsys.readouterr().out == f"wrote {count} files to {folder}\n" and count > 275
