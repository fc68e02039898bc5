"""Invalid inputs are rejected before anything is written, or cause no harm."""

import json
import os
import subprocess
import sys

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
    """Run a command that must fail with a one-line error that contains `wanted`."""
    assert s.run_command(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and wanted in lines[0], said


def test_any_separator_in_a_text_survives_and_leftovers_do_not_block(checkpoint, tmp_path, capsys):
    """Line separators other than newline survive; leftover temporary files do not block a run."""
    texts = tmp_path / "texts"
    texts.mkdir()
    s.write_texts(texts, ROLES, [Question(0, STRANGE)])
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.999.tmp").write_text("{")
    for _ in range(2):  # the first run creates the files; the second finds them complete
        assert s.run_command(s.axis_command(checkpoint, texts, out)) == 0
    assert not list(out.rglob(".*.tmp"))
    run = Run(out, json.loads((out / "run.json").read_text()))
    assert run.rollouts("ghost")[0]["question"] == STRANGE
    capsys.readouterr()
    for name, text, wanted in (("scores/none/ghost.json", "5", "damaged"),
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
    """Long prompts, too few roles and invalid settings raise errors before a folder is created."""
    for name, questions in (("good", [Question(0, "Why?")]), ("long", [Question(0, "why " * 99)])):
        (tmp_path / name).mkdir()
        s.write_texts(tmp_path / name, ROLES, questions)
    out = tmp_path / "out"
    cases = (
        (s.axis_command(checkpoint, tmp_path / "long", out),
         "must fit into the context length of 256 tokens"),
        (s.axis_command(checkpoint, tmp_path / "good", out, "--limit", "0"),
         "needs at least two"),
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
    """Brackets in prompts, names and notes are printed verbatim, not interpreted as markup."""
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
    ({}, {"percentiles/all/p1": np.zeros(2, np.float32)}, "one value per layer"),
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
    """A file without tensors raises an error about the missing tensors."""
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for call in (hf.load, hf.verify):
        with pytest.raises(ValueError, match="embed_tokens"):
            call(tmp_path)


def test_extreme_settings_do_no_harm(checkpoint):
    """Test a tiny temperature (greedy), a huge limit (the model's own), and read-only inputs."""
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
    for wrong, wanted in (("hey", "a single string"), ([None], "conversation 0 is None")):
        with pytest.raises(ValueError, match=wanted):
            jp.generate(model, wrong)
    other = Vector(np.ones((3, 4)), site="mlp")
    with pytest.raises(ValueError, match="measured at site"):
        jp.capture.projections(other)


WITHOUT_TORCH = ("import sys; sys.modules['torch'] = None; sys.argv[0] = 'jaxpersona'; "
                 "from jaxpersona.cli.main import main; main()")


@pytest.mark.parametrize(("arguments", "wanted"), [
    # an axis of a different model is only detected after mini is loaded with transformers
    (["--cap", "other.npy"], "error: other.npy: contains a vector, not an axis"),
    (["--steer", "other.npy"], "error: vector 'other', made for another model (layers: 2, w"),
])
def test_a_mistake_is_exactly_one_line_of_a_process(tmp_path, arguments, wanted):
    """Advice by transformers to install PyTorch and progress displays add no lines."""
    np.save(tmp_path / "other.npy", np.ones((2, 3), np.float32))
    env = {k: v for k, v in os.environ.items()
           if k not in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY")}
    env["JAX_PLATFORMS"] = "cpu"  # without a TPU, libtpu writes warnings
    out = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "generate", "Hi", *arguments],
                         capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert out.returncode == 2 and not out.stdout
    assert out.stderr.count("\n") == 1 and out.stderr.startswith(wanted), out.stderr


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be a positive integer"),
    (["--temperature", "-1"], "temperature is -1.0; it must be at least 0, and finite in float32"),
    (["--top-p", "0"], "top_p is 0.0; it must be in (0, 1]"),
    (["--seed", "-1"], "seed is -1; it must be an integer in 0…2³²−1"),
    (["--scale", "nan"], "--scale is nan; it must be finite"),
    (["--steer", "v.npy", "--steer-layers", "x"],
     "layers is 'x'; give text such as 46:54 (half-open), 16 or 3,5"),
    (["--experiment", "X"], "--experiment needs --cap"),
    (["--of", "all", "--percentile", "p25"], "--percentile, --of need --cap"),
    (["--cap-layers", "1:2"], "--cap-layers needs --cap"),
    (["--steer-layers", "1:2"], "--steer-layers needs --steer"),
    (["--of", "all", "--steer-layers", "2"], "--of needs --cap, and --steer-layers needs --steer"),
    (["--cap", "run"], "run is a folder; did you mean run/axis.safetensors?"),
    (["--cap", "empty"], "empty is a folder; give a file"),
    (["--cap", "run/axis.safetensors", "--percentile", "25"],
     "percentile is '25' (write p25); this axis has p5, p25, p50"),
])
def test_settings_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, arguments,
                                                       wanted):
    """The error names only the invalid setting."""
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", np.ones((2, 3), np.float32))
    os.mkdir("run")
    os.mkdir("empty")
    save_vector("run/axis.safetensors", Axis(np.ones((2, 3)), percentiles={
        "default": {name: np.zeros(2) for name in ("p25", "p5", "p50")}}))
    monkeypatch.setattr("jaxpersona.ckpts.loading.load", no_load)
    assert s.run_command(["generate", "Hi", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {wanted}\n"


def no_load(*_, **__):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["generate", ""], "prompt is ''; give a prompt that is not blank"),
    (["generate", "Hi", " \n"], "prompt is ' \\n'; give a prompt that is not blank"),
    (["axis", "--out", "file"], "--out is file, a file; give a folder"),
    (["demo", "--out", "file"], "--out is file, a file; give a folder"),
    (["axis", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be positive"),
    (["axis", "--min-count", "0"], "min_count is 0; it must be a positive integer"),
    (["axis", "--judge", "gpt4"], "judge is 'gpt4'; choose rules, self, model:NAME, http:MODEL, "
                                  "human:FILE.csv or none"),
    (["axis", "--roles", "data", "--judge", "gpt4"],
     "judge is 'gpt4'; choose self, model:NAME, http:MODEL, human:FILE.csv or none"),
    (["project", "talk.json", "--on", "a.npy", "--png", "no/drift.png"],
     "--png is no/drift.png; the folder no does not exist: create it first"),
])
def test_arguments_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, arguments,
                                                        wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("jaxpersona.ckpts.loading.load", no_load)
    assert s.run_command(arguments) == 2
    assert capsys.readouterr().err == f"error: {wanted}\n"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-small"])
def test_a_name_that_is_no_model_is_answered_with_what_is(name):
    with pytest.raises(ValueError) as caught:
        jp.load(name)
    assert str(caught.value) == (f"{name}: no such folder; a model is a folder, a .gguf file, "
                                 "owner/name on the Hugging Face Hub (Llama, Qwen 2.5 and 3, "
                                 "Gemma 2 and 3, Mistral), mini or random:<preset>")


def test_project_says_that_it_wrote_a_figure(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = jp.load(str(checkpoint)).config
    np.save("v.npy", np.ones((config.n_layers, config.d_model), np.float32))
    (tmp_path / "talk.json").write_text(json.dumps([
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]))
    assert s.run_command(["project", "talk.json", "--on", "v.npy", "--model", str(checkpoint),
                          "--png", "drift.png", "--json"]) == 0
    said = capsys.readouterr()
    assert "wrote drift.png" in said.err.splitlines() and (tmp_path / "drift.png").exists()
    assert json.loads(said.out)[0]["turn"] == 1
