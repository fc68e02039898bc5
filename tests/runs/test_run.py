"""End-to-end tests on a random checkpoint: resuming, identical bytes and user errors."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.files import write_tensors
from jaxpersona.ckpts.vectors import load_axis, load_vector, save_vector

from jaxpersona.data.texts import Question, Role
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.rollouts import Settings
from jaxpersona.vectors.vector import Axis, Vector

ROLES = [
    Role("default", ("", "You are an AI assistant."), ""),
    Role("ghost", ("You are a ghost.", "Act as a ghost."), ""),
    Role("pirate", ("You are a pirate.", "Act as a pirate."), ""),
    Role("tutor", ("You are a tutor.", "Act as a tutor."), ""),
]
QUESTIONS = [Question(0, "What is the sea?"), Question(1, "Tell me about light.")]
SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=6, batch_size=8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Return roles and questions in the layout of the reference project."""
    return s.write_texts(tmp_path_factory.mktemp("texts"), ROLES, QUESTIONS)


command, run = s.axis_command, s.run_command


def contents(folder):
    """Return the files of a run but for figures, and status.json, which has times."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "status.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.suffix != ".png"}


def contents_of_role(folder, name):
    """Return a role's rollouts as bytes."""
    return (folder / "rollouts" / f"{name}.jsonl").read_bytes()


def test_axis_runs_resumes_and_ends_in_the_same_bytes(checkpoint, texts, tmp_path, capsys):
    """An interrupted run keeps its complete roles and resumes to the same bytes."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(command(checkpoint, texts, whole)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["roles"] == 3 and summary["rollouts"] == 16
    expected = contents(whole)
    assert {"run.json", "axis.safetensors", "rollouts/ghost.jsonl", "scores/none/pirate.json",
            "sums/none/ghost.safetensors", "sums/default.safetensors", "samples/tutor.safetensors",
            "vectors/tutor.safetensors"} <= set(expected)
    record = json.loads((whole / "rollouts/ghost.jsonl").read_text().splitlines()[0])
    assert {"system_prompt", "prompt_index", "question_index", "question", "conversation",
            "label"} <= set(record)
    # as after a kill: two complete roles, one with its sample but without rollouts, no vectors
    shutil.copytree(whole, part)
    shutil.rmtree(part / "vectors")
    for name in ("axis.safetensors", "analysis.json", "scores/none/pirate.json",
                 "rollouts/pirate.jsonl", "sums/none/pirate.safetensors", "rollouts/tutor.jsonl",
                 "samples/tutor.safetensors", "scores/none/tutor.json",
                 "sums/none/tutor.safetensors"):
        (part / name).unlink()
    kept = part / "rollouts" / "ghost.jsonl"
    before = kept.stat().st_mtime_ns
    assert run(command(checkpoint, texts, part)) == 0
    assert kept.stat().st_mtime_ns == before
    assert contents(part) == expected
    assert len({contents_of_role(part, role.name) for role in ROLES}) == len(ROLES)
    records = [json.loads(line) for line in kept.read_text("utf-8").split("\n") if line]
    assert [(r["prompt_index"], r["question_index"]) for r in records] == [
        (0, 0), (1, 0), (0, 1), (1, 1)]  # question by question
    assert all(r["system_prompt"] == ROLES[1].prompts[r["prompt_index"]] for r in records)
    capsys.readouterr()
    assert run(command(checkpoint, texts, part)) == 0  # complete: generates and writes nothing
    assert kept.stat().st_mtime_ns == before and contents(part) == expected


def test_axis_equals_its_definition(checkpoint, tmp_path):
    """Axis, vectors and thresholds equal their definitions on the means that are kept."""
    import jaxpersona as jp
    from jaxpersona.runs.run import Run

    model = jp.load(str(checkpoint))
    found = extract_axis(model, ROLES, QUESTIONS, tmp_path / "run", judge=NoJudge(),
                         settings=SETTINGS, min_count=1, held_out=["tutor"], keep_means=None)
    kept = Run.read(tmp_path / "run")
    means = {role.name: kept.sample(role.name).means for role in ROLES}
    # the axis is from float32 means and these are stored with 8 bits
    rough = max(float(np.nanstd(value, 0).max()) for value in means.values()) * 2**-8
    vectors = {name: np.nanmean(value, 0) for name, value in means.items()}
    expected = vectors["default"] - (vectors["ghost"] + vectors["pirate"]) / 2
    np.testing.assert_allclose(found.axis.values, expected, rtol=0, atol=rough)
    unit = found.axis.values / np.linalg.norm(found.axis.values, axis=1, keepdims=True)
    projected = np.einsum("nld,ld->nl", means["default"], unit)
    projected = projected[np.isfinite(projected).all(1)]
    np.testing.assert_allclose(found.axis.thresholds("p25", of="default"),
                               np.percentile(projected, 25, axis=0), atol=1e-4)
    everyone = np.concatenate([means[name] for name in ("default", "ghost", "pirate")])
    projected = np.einsum("nld,ld->nl", everyone, unit)
    projected = projected[np.isfinite(projected).all(1)]
    np.testing.assert_allclose(found.axis.thresholds("p75", of="all"),
                               np.percentile(projected, 75, axis=0), atol=1e-4)
    again = load_axis(tmp_path / "run/axis.safetensors")
    np.testing.assert_array_equal(again.values, found.axis.values)
    assert again.fingerprint == model.fingerprint and set(again.percentiles) == {"default", "all"}
    jp.cap(again, layers=slice(1, 3), floor=again.thresholds("p25", of="default"))
    with pytest.raises(ValueError, match="of is 'rest'"):
        again.thresholds("p25", of="rest")


def test_science_on_arrays():
    """Role vectors are split by score, and axis and PC1 point toward the default."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(6, 2, 4))
    means[5] = np.nan
    found = science.role_vectors(means, [3, 3, 2, 0, None, 3])
    np.testing.assert_allclose(found["pos_3"][0], means[:2].mean(0), rtol=1e-6)
    assert found["pos_3"][1] == 2 and found["pos_2"][1] == 1 and found["mean"][1] == 5
    line = np.linspace(1, 5, 5)[:, None, None] * np.ones((5, 2, 4))
    line += rng.normal(size=(5, 2, 4)) / 50
    analysis = science.analyse(np.zeros((2, 4)), dict(zip("abcde", line, strict=True)))
    assert (analysis.axis < 0).all() and (analysis.cos_pc1 > 0.99).all()
    assert all(c.directions[0] @ analysis.axis[i] > 0 for i, c in enumerate(analysis.components))
    assert analysis.components[0].ratio[0] > 0.99
    assert science.project(means[:1], means[0])[0, 0] == pytest.approx(
        np.linalg.norm(means[0, 0]), rel=1e-6)
    with pytest.raises(ValueError, match="two"):
        science.principal_components(line[:1, 0], analysis.axis[0])


def test_vector_files_round_trip(tmp_path):
    """A vector file round-trips with its metadata; damaged or unrelated files raise an error."""
    values = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    vector = Vector(values, name="warm", model="m", fingerprint="ab" * 8, notes={"pairs": 3})
    save_vector(tmp_path / "v.safetensors", vector)
    found = load_vector(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(found.values, values)
    assert (found.name, found.fingerprint, dict(found.notes)) == ("warm", "ab" * 8, {"pairs": 3})
    with pytest.raises(ValueError, match="contains a vector"):
        load_axis(tmp_path / "v.safetensors")
    write_tensors(tmp_path / "x.safetensors", {"values": values}, {"format": "other"})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "v.safetensors").read_bytes()[:40])
    flipped = {"format": "jaxpersona-vector", "kind": "axis", "layer_base": "0",
               "sign": "-assistant"}
    write_tensors(tmp_path / "minus.safetensors", {"values": values}, flipped)
    for name, match in (("x", "not a jaxpersona"), ("cut", "this safetensors file cannot be read"),
                        ("minus", "sign"), ("none", "no such file")):
        with pytest.raises(ValueError, match=match):
            load_vector(tmp_path / f"{name}.safetensors")


def test_mistakes_are_one_line_and_leave_nothing(checkpoint, texts, tmp_path, capsys):
    """Each user error gives exit code 2, one line on standard error and no run folder."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("x")
    bad_roles = tmp_path / "bad_roles"
    bad_roles.mkdir()
    (bad_roles / "ghost.json").write_text('{"instruction": [{"pos": ""}]}')
    wide = Axis(np.ones((3, 7), np.float32), percentiles={"default": {"p25": np.zeros(3)}})
    other = Axis(np.ones((3, 32), np.float32), fingerprint="0123456789abcdef",
                 percentiles={"default": {"p25": np.zeros(3)}})
    save_vector(tmp_path / "wide.safetensors", wide)
    save_vector(tmp_path / "other.safetensors", other)
    save_vector(tmp_path / "fits.safetensors", dataclasses.replace(other, fingerprint=""))
    finished = tmp_path / "finished"
    assert run(command(checkpoint, texts, finished)) == 0
    whole = contents(finished)
    capsys.readouterr()
    out = tmp_path / "out"
    ask = ["generate", "hi", "--model", str(checkpoint), "--max-new-tokens", "4"]
    cases = {
        "no such folder": command(tmp_path / "nowhere", texts, out),
        "not a model folder": command(tmp_path / "plain", texts, out),
        "ghost.json": [*command(checkpoint, texts, out), "--roles", str(bad_roles)],
        "line 1": [*command(checkpoint, texts, out), "--questions", str(tmp_path / "file")],
        "temperature": command(checkpoint, texts, out, "--temperature", "-1"),
        "contains another run": command(checkpoint, texts, finished, "--seed", "5"),
        "cannot be written": command(checkpoint, texts, tmp_path / "file" / "run"),
        "no run.json": command(checkpoint, texts, texts),
        "width: 7)": [*ask, "--cap", str(tmp_path / "wide.safetensors")],
        "another model": [*ask, "--cap", str(tmp_path / "other.safetensors")],
        "out of range; layers must be in 0": [
            *ask, "--cap", str(tmp_path / "fits.safetensors"), "--cap-layers", "1:9"],
        "context": ["generate", "long " * 300, "--model", str(checkpoint)],
        "preset": ["generate", "hi", "--model", "random:nothing"],
    }
    for wanted, arguments in cases.items():
        assert run(arguments) == 2, wanted
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and wanted in lines[0], (wanted, said.err)
        assert "Traceback" not in said.err
        assert not out.exists()
    assert contents(finished) == whole  # the existing run is unchanged


def test_generate_and_project_commands(checkpoint, texts, tmp_path, capsys):
    """`generate --compare`, `project` and `vectors show` accept the output of `axis`."""
    assert run(command(checkpoint, texts, tmp_path / "run")) == 0
    axis = str(tmp_path / "run" / "axis.safetensors")
    capsys.readouterr()
    assert run(["generate", "hello", "--model", str(checkpoint), "--cap", axis, "--compare",
                "--max-new-tokens", "5", "--no-check"]) == 0
    said = capsys.readouterr()
    heads = said.out.splitlines()[1].replace("┃", " ").split()
    assert heads == ["prompt", "without", "with"]
    assert re.search(r"intervention 0: tokens selected: [1-9]\d*, activations changed: \d+, "
                     r"layers: 2", " ".join(said.err.split()))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"},
            {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    picture = tmp_path / "talk.png"
    assert run(["project", str(tmp_path / "talk.json"), "--on", axis, "--model", str(checkpoint),
                "--png", str(picture), "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)
    assert [t["turn"] for t in turns] == [1, 3] and [t["tokens"] for t in turns] == [11, 2]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run(["project", str(tmp_path / "talk.json"), "--on", axis, "--model", str(checkpoint),
                "--png", str(tmp_path)]) == 2
    assert f"--png is {tmp_path}, a folder" in " ".join(capsys.readouterr().err.split())
    assert run(["vectors", "show", axis]) == 0
    assert "assistant" in capsys.readouterr().out


def test_an_empty_system_prompt_is_not_a_missing_one(checkpoint, monkeypatch):
    module = sys.modules["jaxpersona.engine.generate"]
    talks, real = [], module.generate

    def told(model, given, **more):
        talks.append([[m["role"] for m in row.messages] for row in given])
        return real(model, given, **more)

    monkeypatch.setattr(module, "generate", told)
    for more in ((), ("--system", ""), ("--system", "Be brief.")):
        assert run(["generate", "hello", "--model", str(checkpoint), *more,
                    "--max-new-tokens", "2"]) == 0
    assert talks == [[["user"]], [["system", "user"]], [["system", "user"]]]


def test_options_of_the_population_and_of_held_out_roles_act(checkpoint, texts, tmp_path, capsys):
    """`--percentile` and `--of` select the floor; `--held-out` excludes roles from the axis."""
    for out, more in (("run", ()), ("held", ("--held-out", "tutor"))):
        assert run(command(checkpoint, texts, tmp_path / out, *more)) == 0
    held, whole = (load_axis(tmp_path / out / "axis.safetensors") for out in ("held", "run"))
    assert np.abs(held.values - whole.values).max() > 1e-3
    assert (held.notes["roles"], whole.notes["roles"]) == (2, 3)
    assert (held.notes["rollouts"], whole.notes["rollouts"]) == (12, 16)
    table = json.loads((tmp_path / "held" / "analysis.json").read_text())["roles"]
    assert [name for name, role in table.items() if role["held_out"]] == ["tutor"]
    assert [name for name, role in table.items() if role["in_axis"]] == ["ghost", "pirate"]
    # all replies project between these floors: the first never acts, the second always acts
    low, high = (np.full(whole.n_layers, x, np.float32) for x in (-1e6, 1e6))
    axis = dataclasses.replace(whole, percentiles={
        "default": {"p25": low, "p90": high}, "all": {"p25": high, "p90": low}})
    save_vector(tmp_path / "two.safetensors", axis)
    capsys.readouterr()

    def changes(*more):
        assert run(["generate", "hello", "--model", str(checkpoint), "--cap",
                    str(tmp_path / "two.safetensors"), "--no-check", "--max-new-tokens", "3",
                    *more]) == 0
        said = " ".join(capsys.readouterr().err.split())
        seen, changed = re.search(r"tokens selected: (\d+), activations changed: (\d+), "
                                  r"layers: 2", said).groups()
        return int(changed) / int(seen)

    assert changes() == changes("--percentile", "p25", "--of", "default") == 0
    assert changes("--percentile", "p90") == changes("--of", "all") == 2  # both capped layers
    assert changes("--percentile", "p90", "--of", "all") == 0


@pytest.mark.slow
def test_axis_runs_on_the_project_s_own_data(tmp_path, capsys):
    """Roles and questions of the package data, on a random model with a preset's shape."""
    assert run(["axis", "--model", "random:qwen3-mini", "--roles", "data", "--limit", "12",
                "--limit-questions", "1", "--max-new-tokens", "4", "--min-count", "1",
                "--out", str(tmp_path / "run"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["roles"] == 12 and summary["rollouts"] == 65 and summary["judge"] == "none"
