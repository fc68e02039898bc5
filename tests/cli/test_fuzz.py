"""Damaged input files cause a one-line error of the command, or no harm (see `fuzz.check`)."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from typing import Any

import fuzz
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf, orbax
from jaxpersona.ckpts.files import write_tensors
from jaxpersona.ckpts.vectors import save_vector

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.judges import human
from jaxpersona.judges.journal import Journal
from jaxpersona.persona import verdicts
from jaxpersona.runs.run import Run
from jaxpersona.text import chat
from jaxpersona.vectors.vector import Axis, Vector

LAYERS, WIDTH = 3, 32  # of the model from the fixture `checkpoint`
VALUES = np.random.default_rng(0).normal(size=(LAYERS, WIDTH)).astype(np.float32)
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}]
SPEC = [{"operator": "steer", "vector": "v.safetensors", "layers": 1, "scale": 2.0},
        {"operator": "cap", "vector": "a.safetensors", "layers": "1:3", "floor": "p25",
         "of": "default", "where": {"name": "generated", "turns": [0, 5]}, "first_token": False,
         "gate": {"vector": [0.5] * WIDTH, "layer": 1, "below": -3.0}},
        {"operator": "rotate", "plane": [[1.0] * WIDTH, "v.safetensors"], "layers": [0, 2],
         "by": 0.5}, {"operator": "restore_norm", "layers": "1"}]
ROLES = [Role("default", ("", "You are an AI assistant."), ""),
         Role("ghost", ("You are a ghost.",), ""), Role("tutor", ("You are a tutor.",), "")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint):
    """Return a folder with a valid file for every reader, and the model for the commands."""
    folder = tmp_path_factory.mktemp("fuzz")
    axis = Axis(VALUES, "assistant", "m", notes={"a": 1, "b": "c"},
                percentiles={"default": {"p25": np.zeros(LAYERS, np.float32)}})
    save_vector(folder / "a.safetensors", axis)
    save_vector(folder / "v.safetensors", Vector(VALUES, notes={"n": 1}))
    np.save(folder / "v.npy", VALUES)
    (folder / "talk.json").write_text(json.dumps(TALK))
    (folder / "spec.json").write_text(json.dumps(SPEC))
    header = {"format": "jaxpersona-vector", "kind": "caps", "layer_base": "0", "norm": "none",
              "sign": "+", "site": "residual", "layers": "[0, 2]", "labels": '["a", "b"]',
              "notes": '{"n": 1}'}
    write_tensors(folder / "c.safetensors", {"values": VALUES[:2], "floors": VALUES[0, :2]}, header)
    texts = folder / "texts"
    texts.mkdir()
    s.write_texts(texts, ROLES, [Question(i, f"Why {i}?") for i in range(3)])
    for name, value in (
        ("traits/kind.json", {"instruction": [{"pos": "Be so.", "neg": "Do not."}],
                              "questions": ["Why?"], "eval_prompt": "{question} {answer}"}),
        ("drift/coding.json", {"domain": "coding", "description": "d", "personas": [
            {"id": "p", "card": "c", "topics": [{"id": "t", "title": "t", "opening": "o"}]}]}),
        ("role_list.json", {"ghost": "A ghost."}),
    ):
        (texts / name).parent.mkdir(exist_ok=True)
        (texts / name).write_text(json.dumps(value))
    model = jp.load(str(checkpoint))
    shutil.copytree(checkpoint, folder / "model")
    (folder / "model" / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [257], "repetition_penalty": 1.1, "do_sample": True, "top_k": 20}))
    hf.save(folder / "shards", model.params, model.config, shard_bytes=40_000)
    orbax.save(folder / "orbax", model.params, model.config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "bias": "none", "use_dora": False,
         "rank_pattern": {"q_proj": 2}, "modules_to_save": None}))
    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    rows = model.config.n_heads * model.config.head_dim
    write_tensors(folder / "adapter" / "adapter_model.safetensors", {
        f"{query}A.weight": np.ones((2, WIDTH), np.float32),
        f"{query}B.weight": np.ones((rows, 2), np.float32)}, {"format": "pt"})
    assert s.run_command(s.axis_command(checkpoint, texts, folder / "run")) == 0
    line = {line: [0.5, 0.25] for line in ("style", "mean", "p25", "p75")}
    (folder / "run" / "drift.json").write_text(json.dumps(
        {"layer": 1, "floor": 0.5, "percentile": "p25", "arms": {
            "capped": {**line, "leak": 0.5, "conversations": 2}}}))
    journal = Journal(folder / "run" / "verdicts.jsonl")
    for key in "abc":
        journal.sent(key, 0.5)
        journal.answered(key, "3", 0.25, prompt_tokens=5)
    journal.close()
    (folder / "rubric.txt").write_text("Rate {answer} to {question}: 0 to 3.")
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in (
        {"messages": TALK[:2]}, {"messages": TALK[1:2]})))
    ghosts = verdicts.replies_of(Run.read(folder / "run")).values()
    human.write_rows(folder / "mine.csv", [{**human.row_of(one), "score": "3"} for one in ghosts])
    return folder, model


def _show(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["vectors", "show", str(path)]


def _convert(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    model = next(p for p in path.parents if p.parent == folder)
    return ["vectors", "convert", str(folder / "v.safetensors"), str(folder / "o.safetensors"),
            "--model", str(model)]


def _plan(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["plan", "--topology", "h200:1", "--context", "64", "--model",
            str(path.parent)]


def _check(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["data", "check", str(folder / "texts")]


def _spec(folder: pathlib.Path, path: pathlib.Path, model: Any) -> list[str]:
    return ["generate", "hi", "--spec", str(path), "--no-check", "--model", model.name]


def _project(folder: pathlib.Path, path: pathlib.Path, model: Any) -> list[str]:
    return ["project", str(path), "--on", str(folder / "v.safetensors"), "--model", model.name]


def _adapted(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["generate", "hi", "--model", str(folder / "model"), "--adapter", str(path.parent)]


def _prompts(folder: pathlib.Path, path: pathlib.Path, model: Any) -> list[str]:
    return ["generate", "--prompts", str(path), "--model", model.name]


def _status(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["status", str(path.parent)]


def _report(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["report", str(path.parent), "--out", str(folder / "page.html")]


def _agreement(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["judge", "agreement", str(folder / "run"), str(path)]


def _journal(folder: pathlib.Path, path: pathlib.Path, _: Any) -> list[str]:
    return ["judge", str(path.parent), "--judge", "http:m", "--judge-url", "http://localhost:1/v1",
            "--judge-rubric", str(folder / "rubric.txt"), "--roles", str(folder / "texts/roles")]


def _rubric(folder: pathlib.Path, path: pathlib.Path, model: Any) -> list[str]:
    return ["judge", str(folder / "run"), "--judge", "self", "--judge-rubric", str(path),
            "--roles", str(folder / "texts" / "roles"), "--model", model.name]


def _axis(folder: pathlib.Path, path: pathlib.Path, model: Any) -> list[str]:
    return s.axis_command(model.name, folder / "texts", folder / "run")


# the damaged file, the kind of damage, and the command that reads the file
READERS = {
    "v.safetensors": (fuzz.damaged_safetensors, _show),
    "a.safetensors": (fuzz.damaged_safetensors, _show),
    "c.safetensors": (fuzz.damaged_safetensors, _show),
    "v.npy": (fuzz.damage, _show),
    "spec.json": (fuzz.damaged_json, _spec),
    "talk.json": (fuzz.damaged_json, _project),
    "texts/roles/ghost.json": (fuzz.damaged_json, _check),
    "texts/role_list.json": (fuzz.damaged_json, _check),
    "texts/questions.jsonl": (fuzz.damaged_json, _check),
    "texts/traits/kind.json": (fuzz.damaged_json, _check),
    "texts/drift/coding.json": (fuzz.damaged_json, _check),
    "model/config.json": (fuzz.damaged_json, _convert),
    "shards/config.json": (fuzz.damaged_json, _plan),
    "model/generation_config.json": (fuzz.damaged_json, _convert),
    "model/tokenizer.json": (fuzz.damaged_json, _convert),
    "model/tokenizer_config.json": (fuzz.damaged_json, _convert),
    "model/model.safetensors": (fuzz.damaged_safetensors, _convert),
    "shards/model.safetensors.index.json": (fuzz.damaged_json, _convert),
    "shards/model-00002-of-00006.safetensors": (fuzz.damaged_safetensors, _convert),
    "adapter/adapter_config.json": (fuzz.damaged_json, _adapted),
    "adapter/adapter_model.safetensors": (fuzz.damaged_safetensors, _adapted),
    "orbax/config.json": (fuzz.damaged_json, _convert),
    "orbax/params/_METADATA": (fuzz.damaged_json, _convert),
    "prompts.jsonl": (fuzz.damaged_json, _prompts),
    "rubric.txt": (fuzz.damage, _rubric),
    "mine.csv": (fuzz.damage, _agreement),
    "run/status.json": (fuzz.damaged_json, _status),
    "run/analysis.json": (fuzz.damaged_json, _report),
    "run/drift.json": (fuzz.damaged_json, _report),
    "run/verdicts.jsonl": (fuzz.damaged_json, _journal),
    "run/run.json": (fuzz.damaged_json, _axis),
    "run/rollouts/ghost.jsonl": (fuzz.damaged_json, _axis),
    "run/scores/none/ghost.json": (fuzz.damaged_json, _axis),
    "run/samples/ghost.safetensors": (fuzz.damaged_safetensors, _axis),
    "run/sums/none/ghost.safetensors": (fuzz.damaged_safetensors, _axis),
}
PICKLES = {
    "capping_config.pt": lambda t: {
        "vectors": {"q": {"layer": 1, "vector": t.ones(3)}},
        "experiments": [{"id": "a-p0.25", "interventions": [{"vector": "q", "cap": 1.5}]}]},
    "axis.pt": lambda t: {"axis": t.ones(3, 4)},
    "role.pt": lambda t: {"vector": t.ones(3, 4), "type": "pos_3", "role": "ghost"},
}


def run(place: Any, name: str, make: Any, command: Any, count: int, capsys: Any,
        monkeypatch: Any) -> None:
    folder, model = place
    path, kept = folder / name, folder / "kept"
    # the damaged file is not part of the model
    if command in (_spec, _project, _axis, _prompts, _rubric):
        monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: model)
    generate = sys.modules["jaxpersona.engine.generate"]
    if command in (_spec, _prompts, _adapted):  # avoids compiling a program for each
        monkeypatch.setattr(generate, "generate", lambda *_, **__: sys.exit(0))
    if command is _project:  # avoids compiling a program for each length
        monkeypatch.setattr("jaxpersona.persona.talk.project_conversation",
                            lambda model, talk, _: chat.encode(model, [talk], reply=False) and [])
    if command in (_journal, _rubric):  # reads the judge's files, and sends no request
        pytest.importorskip("openai")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setattr("jaxpersona.persona.rejudge.judge_run", lambda _, __, judge, **___: (
            getattr(judge, "journal", None), sys.exit(0)))
    monkeypatch.setattr("jaxpersona.cli.support.draw_run", lambda *_: None)

    def restore():
        shutil.rmtree(folder / "run")
        shutil.copytree(kept, folder / "run")

    if command is _axis:
        shutil.copytree(folder / "run", kept)
    fuzz.check(path, folder, make, lambda: s.run_command(command(folder, path, model)), count,
               capsys, after=restore if command is _axis else lambda: None)
    shutil.rmtree(kept, ignore_errors=True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", READERS)
def test_damage_is_named_or_does_no_harm(place, name, count, capsys, monkeypatch):
    run(place, name, *READERS[name], count, capsys, monkeypatch)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", PICKLES)
def test_damage_to_a_pickle(place, name, count, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    value = PICKLES[name](torch)
    (place[0] / name).write_bytes(fuzz.pickled(value))
    run(place, name, fuzz.damaged_pickle(value), _show, count, capsys, monkeypatch)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_damage_to_a_control_vector(place, count, capsys, monkeypatch):
    pytest.importorskip("gguf")
    save_vector(place[0] / "v.gguf", Vector(VALUES, notes={"n": 1}))
    run(place, "v.gguf", fuzz.damage, _show, count, capsys, monkeypatch)
