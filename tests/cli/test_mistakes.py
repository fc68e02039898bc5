"""Faults a hostile reader found: each is refused before anything is written, or does no harm."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf
from jaxpersona.ckpts.files import write_tensors
from jaxpersona.ckpts.vectors import load_vector, save_vector

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.engine.sampling import choose, sampling
from jaxpersona.runs.run import Run
from jaxpersona.vectors.vector import Axis, Vector

ROLES = [Role(name, (f"You are {name}.",), "") for name in ("default", "ghost", "pirate")]
STRANGE = "Tell me\u2028about\x85the sea?"


def refused(capsys, arguments, wanted):
    """Run a command that must fail with one line that holds `wanted`."""
    assert s.run_command(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and wanted in lines[0], said


def test_any_separator_in_a_text_survives_and_leftovers_do_not_block(checkpoint, tmp_path, capsys):
    """Line separators other than newline come back; a killed writer's file does not stop a run."""
    texts = tmp_path / "texts"
    texts.mkdir()
    s.write_texts(texts, ROLES, [Question(0, STRANGE)])
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.999.tmp").write_text("{")
    for _ in range(2):  # made, then found whole
        assert s.run_command(s.axis_command(checkpoint, texts, out)) == 0
    assert not list(out.rglob(".*.tmp"))
    run = Run(out, json.loads((out / "run.json").read_text()))
    assert run.rollouts("ghost")[0]["question"] == STRANGE
    capsys.readouterr()
    for name, text, wanted in (("scores/ghost.json", "5", "damaged"),
                               ("rollouts/ghost.jsonl", "5\n", "damaged")):
        kept = (out / name).read_text()
        (out / name).write_text(text)
        refused(capsys, s.axis_command(checkpoint, texts, out), wanted)
        (out / name).write_text(kept)


@pytest.mark.parametrize("arguments", [
    ("axis", "--model", "mini", "--roles", "{}", "--out", "out"),
    ("axis", "--model", "mini", "--roles", "data", "--limit", "3", "--out", "{}"),
    ("data", "check", "{}"), ("data", "export", "{}"), ("generate", "hi", "--model", "{}"),
    ("generate", "hi", "--cap", "{}.safetensors"), ("generate", "hi", "--spec", "{}"),
    ("vectors", "show", "{}.pt"), ("plan", "--topology", "h200:1", "--model", "{}"),
])
def test_a_name_that_the_system_refuses_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = "x" * 300
    refused(capsys, [a.format(long) for a in arguments], long)


def test_a_run_that_cannot_end_well_is_refused_before_its_folder(checkpoint, tmp_path, capsys):
    """Too long prompts, too few roles and impossible settings leave no folder behind."""
    for name, questions in (("good", [Question(0, "Why?")]), ("long", [Question(0, "why " * 99)])):
        (tmp_path / name).mkdir()
        s.write_texts(tmp_path / name, ROLES, questions)
    out = tmp_path / "out"
    cases = (
        (s.axis_command(checkpoint, tmp_path / "long", out), "the context of 128 tokens must hold"),
        (s.axis_command(checkpoint, tmp_path / "good", out, "--limit", "0"), "needs two"),
        (s.axis_command(checkpoint, tmp_path / "good", out, "--min-count", "0"), "min_count"),
        (s.axis_command(checkpoint, tmp_path / "good", out, "--seed", "-1"), "seed"),
        (["axis", "--judge", "self", "--out", str(out)], "eval_prompt"),
        (["demo", "--seed", "-1", "--out", str(out)], "seed"),
        (["generate", "hi", "--cap-layers", "1:2", "--model", str(checkpoint)], "--cap"),
    )
    for arguments, wanted in cases:
        refused(capsys, arguments, wanted)
        assert not out.exists(), wanted


def test_markup_in_texts_is_text(checkpoint, tmp_path, capsys):
    """Brackets in prompts, names and notes are shown as they are."""
    model = jp.load(str(checkpoint))
    shape = (model.config.n_layers, model.config.d_model)
    axis = Axis(np.ones(shape), name="[/x]", notes={"[/y]": "[bold]"},
                percentiles={"default": {"p25": np.zeros(shape[0])}})
    save_vector(tmp_path / "a.safetensors", axis)
    file = str(tmp_path / "a.safetensors")
    assert s.run_command(["generate", "[/x] [bold]hi", "--cap", file, "--compare", "--no-check",
                          "--model", str(checkpoint), "--max-new-tokens", "2"]) == 0
    assert "[bold]" in capsys.readouterr().out
    assert s.run_command(["vectors", "show", file]) == 0
    assert "[/x]" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "tensors", "wanted"), [
    ({"notes": "5"}, {}, "notes"), ({"fingerprint": "zz" * 8}, {}, "fingerprint"),
    ({"fingerprint": "a" * 40}, {}, "fingerprint"), ({"site": "foo"}, {}, "site"),
    ({}, {"percentiles/x": np.zeros(3, np.float32)}, "percentiles"),
    ({}, {"percentiles/all/p1": np.zeros(2, np.float32)}, "one value a layer"),
])
def test_a_vector_file_that_lies_is_named(tmp_path, change, tensors, wanted):
    """Each field of a vector file is checked when it is read."""
    header = {"format": "jaxpersona-vector", "kind": "axis", "layer_base": "0", "norm": "none",
              "sign": "+assistant", **change}
    values = {"values": np.ones((3, 4), np.float32), **tensors}
    write_tensors(tmp_path / "v.safetensors", values, header)
    with pytest.raises(ValueError, match=rf"v\.safetensors.*{wanted}"):
        load_vector(tmp_path / "v.safetensors")


def test_files_without_tensors_are_faults(checkpoint, tmp_path):
    """An empty table of weights lacks every tensor, and says so."""
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for call in (hf.load, hf.verify):
        with pytest.raises(ValueError, match="embed_tokens"):
            call(tmp_path)


def test_extreme_settings_do_no_harm(checkpoint):
    """A tiny temperature is greedy, a huge limit is the model's own, inputs are not written to."""
    logits = jnp.asarray([[0.0, 3.0, 2.0]])
    how = sampling(1, temperature=1e-37)
    zero = jnp.zeros((1,), jnp.int32)
    assert int(choose(logits, how, zero.astype(jnp.uint32), zero)[0]) == 1
    model = jp.load(str(checkpoint))
    out = jp.generate(model, ["a"], max_new_tokens=10**9, batch_size=1)
    assert len(out.tokens[0]) < model.config.max_context
    kind = np.zeros(4, np.int32)
    jp.batch([[1, 2, 3, 4]], kind=[kind])
    assert not kind.any()
    for wrong, wanted in (("hey", "a single string"), ([None], "a conversation is None")):
        with pytest.raises(ValueError, match=wanted):
            jp.generate(model, wrong)
    other = Vector(np.ones((3, 4)), site="mlp")
    with pytest.raises(ValueError, match="measured at site"):
        jp.capture.projections(other)
