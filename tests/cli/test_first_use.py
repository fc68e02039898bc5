"""What the commands show on first use: options with their defaults, costs, summaries, tables."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib

import jax
import pytest
import support as s
import typer

import jaxpersona as jp
from jaxpersona.cli import demo
from jaxpersona.cli.main import app
from jaxpersona.organism import demo as measured

ROOT = pathlib.Path(__file__).parents[2]
GROUP = typer.main.get_command(app)
COMMANDS = {" ".join(filter(None, (group, name))): command
            for group, found in GROUP.commands.items()
            for name, command in (getattr(found, "commands", None) or {"": found}).items()}


@pytest.fixture(scope="module")
def mini():
    return jp.load("mini")


def test_every_command_is_in_the_list():
    assert {"axis", "chat", "demo", "generate", "plan", "project", "report", "status",
            "runs export", "runs import", "vectors check", "data show"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_shows_its_default(name):
    context = typer.Context(COMMANDS[name], info_name=name)
    bare = []
    for parameter in COMMANDS[name].params:
        record = parameter.get_help_record(context)
        text = record[1] if record else ""
        shown = "[default:" in text or "required" in text or getattr(parameter, "is_flag", False)
        if parameter.name != "help" and not (text.split("[")[0].strip() and shown):
            bare.append(f"{parameter.name}: {text!r}")
    assert not bare, bare


def test_the_questions_of_mini_are_built_in_only_with_its_roles():
    context = typer.Context(COMMANDS["axis"], info_name="axis")
    (shown,) = [one.get_help_record(context)[1] for one in COMMANDS["axis"].params
                if one.name == "questions"]
    assert "[default: (the built-in ones for mini without --roles, otherwise `data`)]" in shown


def no_load(*_, **__):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(("more", "wanted"), [
    (["--judge", "self"], "the judge needs an eval_prompt, missing for "),
    (["--judge", "model:owner/name"], "the judge needs an eval_prompt, missing"),
    (["--min-count", "99"], "min_count is 99; the axis needs at least two roles"),
    (["--limit", "1", "--min-count", "1"], "roles has"),
    (["--judge-cost", "1"], "--judge-cost is 1.0; give the cost in USD of judging one reply"),
    (["--dry-run", "--judge-cost", "-1"], "--judge-cost is -1.0"),
])
def test_what_would_fail_later_is_refused_before_a_model_is_loaded(more, wanted, tmp_path,
                                                                   monkeypatch, capsys):
    monkeypatch.setattr("jaxpersona.ckpts.loading.load", no_load)
    out = tmp_path / "run"
    assert s.run_command(["axis", "--out", str(out), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {wanted}") and said.count("\n") == 1 and not out.exists()


def test_a_dry_run_states_the_cost_and_writes_nothing(mini, tmp_path, monkeypatch, capsys):
    """As lines and as JSON; a base model and a missing judge are told first."""
    base = dataclasses.replace(mini, template=False)
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: base)
    out = tmp_path / "run"
    command = ["axis", "--out", str(out), "--dry-run", "--sample-seconds", "0", "--limit", "4",
               "--judge", "none", "--judge-cost", "0.01"]
    assert s.run_command(command) == 0
    said = capsys.readouterr()
    assert "rollouts: 200" in said.out.splitlines()  # (4 roles + the default) · 5 prompts · 8
    assert "reply tokens: at most 12,800" in said.out.splitlines()
    assert "160 × $0.01 = $1.60" in said.out
    notes = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert len(notes) == 2 and "judge none: no reply was read" in notes[0]
    assert "mini has no chat template" in notes[1]
    assert s.run_command([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rollouts"] == found["missing"] == 200 and found["judge_cost"] == 1.6
    assert found["seconds"] is None and not out.exists()


def test_a_run_that_does_not_fit_its_disk_is_refused(mini, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: mini)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=10_000))
    assert s.run_command(["axis", "--out", str(tmp_path / "run"), "--dry-run", "--limit", "4",
                          "--sample-seconds", "0"]) == 2
    assert "its disk has too little free space" in capsys.readouterr().err


def test_a_base_model_is_refused_by_the_self_test_in_one_line(mini, monkeypatch, capsys):
    base = dataclasses.replace(mini, template=False)
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: base)
    assert s.run_command(["generate", "hi", "--cap", "mini"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "mini has no chat template (a base model)" in said
    assert "--no-check" in said


def test_an_axis_run_ends_in_a_summary_and_overwrite_starts_anew(mini, tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: mini)
    monkeypatch.setattr("jaxpersona.cli.support.draw_run", lambda *_: None)
    out = tmp_path / "run"
    command = ["axis", "--out", str(out), "--limit", "3", "--limit-questions", "1", "--min-count",
               "1", "--max-new-tokens", "6", "--batch-size", "8", "--judge", "none",
               "--temperature", "0"]
    assert s.run_command(command) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "Assistant Axis of mini: 2 of 3 roles, 20 rollouts, 8 layers"
    assert "held out: 1 (bard)" in lines
    assert lines[1].startswith("judge none: no reply was read")
    assert any(line.startswith("  nearest to farthest: ") for line in lines)
    assert f"  jaxpersona vectors check {out}/axis.safetensors" in lines
    (out / "notes.txt").write_text("mine")
    other = [*command, "--seed", "5"]
    assert s.run_command(other) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert s.run_command([*other, "--overwrite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rollouts"] == 20 and len(found["distances"]) == 3
    assert json.loads((out / "run.json").read_text())["arguments"]["seed"] == 5
    assert (out / "notes.txt").read_text() == "mine"


def test_the_demo_ends_in_a_table_and_two_conversations(capsys):
    """From the recorded figures of a whole demo."""
    figures = json.loads((ROOT / "bench/results/demo-cpu.json").read_text())["figures"]
    rows = measured.table(figures)
    assert rows[0][1:] == (f"{figures['leak_uncapped']:.2f}", f"{figures['leak_capped']:.2f}")
    assert rows[0][0].endswith(f"(n = {figures['leak_n']})")
    assert rows[4][1:] == (f"{figures['drift_uncapped']:.2f}", f"{figures['drift_capped']:.2f}")
    assert f"× {figures['capped_over_uncapped']:.3f}" in rows[-1][2]
    names = ("leak_{}", "leak_{}_sampled", "style_{}", "capability_{}", "drift_{}", "drift_leak_{}")
    made = figures | {name.format(arm): 10 * i + (arm == "capped") for i, name in enumerate(names)
                      for arm in ("uncapped", "capped")}
    assert [row[1:] for row in measured.table(made)[:-1]] == [
        (f"{10 * i}.00", f"{10 * i + 1}.00") for i in range(6)]
    speed = figures | {"tokens_per_second": 2000.0, "capped_over_uncapped": 0.5}
    assert measured.table(speed)[-1][1:] == ("2,000", "1,000 (× 0.500)")
    samples = [measured.Sample("a far role", [{"role": "user", "content": "The code?"}],
                               "It is 7.", "I cannot say."),
               measured.Sample("a drifting talk", [{"role": "user", "content": "[b]Who?"}],
                               "The void.", "An assistant.")]
    demo._show(measured.Demo(None, figures, {}, {}, samples))
    said = capsys.readouterr().out
    assert f"Spearman correlation of projection and known likeness " \
           f"{figures['spearman_truth']:.3f}" in said
    for text in ("  user: The code?", "  uncapped: It is 7.", "  capped:   I cannot say.",
                 "  user: [b]Who?", "  uncapped: The void."):
        assert text in said.splitlines()


def test_the_command_prints_its_version(capsys):
    assert s.run_command(["--version"]) == 0
    said = capsys.readouterr()
    assert said.out == f"jaxpersona {jp.__version__} (jax {jax.__version__})\n" and not said.err
    assert jp.__version__ == importlib.metadata.version("jaxpersona")
