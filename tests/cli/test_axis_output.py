"""What `axis` prints, draws and passes on, for results that are given."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.cli import axis, quota
from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.rubric import Rubric
from jaxpersona.persona import forecast, summary

LOADED = SimpleNamespace(name="m", template=True, config=SimpleNamespace(n_layers=5))
FOUND = SimpleNamespace(
    analysis=SimpleNamespace(names=["a", "b"], cos_pc1=np.array([0.1, 0.2, 0.33339, 0.4, 0.5])),
    rollouts=12, rounds=None)
TEXTS = ["--roles", "roles", "--questions", "questions.jsonl", "--min-count", "1", "--out", "out"]
RUN = ["axis", "--model", "m", *TEXTS]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A folder of texts, and the arguments of each call of `open_model`."""
    monkeypatch.chdir(tmp_path)
    s.write_texts(tmp_path, [Role(name, (f"Be {name}.",), "") for name in ("ant", "bee", "cat")],
                  [Question(i, f"Who {i}?") for i in range(4)])
    seen = []
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: seen.append(a) or LOADED)
    return seen


@pytest.fixture
def drawn(opened, monkeypatch):
    """An extraction that is given; return the arguments of the figures."""
    seen = []
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", lambda *_, **__: FOUND)
    monkeypatch.setattr("jaxpersona.cli.support.draw_run", lambda *given: seen.append(given))
    monkeypatch.setattr(summary, "distances", lambda found, layer: {"b": 1.23456, "a": -layer})
    return seen


def enough(*_, **__):
    raise jp.UserError("enough")


def test_the_json_of_a_run_has_its_numbers_at_the_middle_layer(drawn, monkeypatch, capsys):
    """Layer 2 of 5; numbers have four decimals, and a precision is there if it was asked for."""
    command = [*RUN, "--judge", "none", "--json", "--held-out", "bee"]
    assert s.run_command(command) == 0
    wanted = {"run": "out", "model": "m", "roles": 2, "rollouts": 12, "layers": 5, "judge": "none",
              "cos_pc1_axis_middle": 0.3334, "distances": {"b": 1.2346, "a": -2},
              "axis": "out/axis.safetensors"}
    assert json.loads(capsys.readouterr().out) == wanted
    assert drawn == [(pathlib.Path("out"), FOUND, 2, ["bee"])]
    rounds = SimpleNamespace(brief_value=lambda: {"reached": 0.97})
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", lambda *_, **__: SimpleNamespace(
        **{**vars(FOUND), "rounds": rounds}))
    assert s.run_command(command) == 0
    assert json.loads(capsys.readouterr().out) == wanted | {"precision": {"reached": 0.97}}


@pytest.mark.parametrize(("more", "options"), [
    (["--model", "m"], ["--model", "m"]), (["--model", "mini"], []),
    (["--model", "m", "--adapter", "lora", "--dtype", "float16"],
     ["--model", "m", "--adapter", "lora", "--dtype", "float16"]),
    (["--dtype", "int8"], ["--dtype", "int8"])])
def test_the_next_commands_have_the_options_of_the_model(drawn, monkeypatch, capsys, more, options):
    """`mini` is the default of these commands."""
    seen = []
    monkeypatch.setattr(summary, "summary",
                        lambda *given, **named: seen.append((given, named)) or ["one", "two"])
    assert s.run_command(["axis", *TEXTS, "--held-out", "bee", *more]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert seen == [((FOUND, pathlib.Path("out"), 2), {"held_out": ["bee"], "options": options})]


def test_only_the_first_process_prints_and_draws(drawn, monkeypatch, capsys):
    """Warnings, too, are printed once."""
    monkeypatch.setattr("jaxpersona.distributed.processes.first", lambda: False)
    monkeypatch.setattr("jaxpersona.persona.prepare.base_notice", lambda _: "a base model")
    assert s.run_command([*RUN, "--judge", "none", "--json"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err, drawn) == ("", "", [])


def test_several_processes_need_a_mesh(opened, monkeypatch, capsys):
    """The mistake is found before a model is loaded."""
    monkeypatch.setattr("jaxpersona.distributed.processes.many", lambda: True)
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", enough)
    assert s.run_command([*RUN, "--judge", "none"]) == 2
    assert "several processes need one mesh; give --mesh for" in capsys.readouterr().err
    assert not opened
    assert s.run_command([*RUN, "--judge", "none", "--mesh", "data=2"]) == 2
    assert opened == [("m", None, "data=2", None)]


@pytest.mark.parametrize(("more", "wanted"), [
    ([], []), (["--distributed"], [(None, None, None)]),
    (["--coordinator", "h:1", "--processes", "2", "--process", "1"], [("h:1", 2, 1)]),
    (["--process", "0"], [(None, None, 0)])])
def test_processes_are_joined_as_the_options_say(opened, monkeypatch, more, wanted):
    """Without these options, no other process is waited for."""
    seen = []
    monkeypatch.setattr("jaxpersona.distributed.processes.start", lambda *a: seen.append(a))
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", enough)
    assert s.run_command([*RUN, "--judge", "none", *more]) == 2
    assert seen == wanted


@pytest.mark.parametrize(("after", "before"), [(["--judge-after"], 0), ([], 1)])
def test_a_judge_that_is_loaded_later_is_checked_before_the_evaluated_model(
        opened, monkeypatch, after, before):
    """Otherwise, it is loaded after the evaluated model."""
    seen = []
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", enough)
    monkeypatch.setattr(axis, "of_model", lambda choice, load, target: seen.append(
        (choice.argument, choice.after, len(opened))) or NoJudge())
    assert s.run_command([*RUN, "--judge", "model:j", *after]) == 2
    assert seen == [("j", bool(after), before)] and len(opened) == 1


def test_the_judge_self_has_the_batch_size_and_the_rubric(opened, monkeypatch):
    """It judges with the evaluated model."""
    seen = []
    pathlib.Path("r.txt").write_text(" {question} {answer} 0-3?\n")
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", enough)
    monkeypatch.setattr("jaxpersona.judges.judges.SelfJudge",
                        lambda *given, **named: seen.append((given, named)) or NoJudge())
    assert s.run_command([*RUN, "--judge", "self", "--judge-rubric", "r.txt", "--batch-size",
                          "5"]) == 2
    assert seen == [((LOADED,), {"batch_size": 5,
                                 "rubric": Rubric(template="{question} {answer} 0-3?")})]


COST = forecast.Forecast(**{field.name: 1 for field in dataclasses.fields(forecast.Forecast)} | {
    "seconds": None, "pace": None, "llm_judge": True, "judge_calls": 8, "disk_bytes": 60,
    "live_bytes": 40, "free_bytes": 100})


def test_a_cache_is_opened_only_by_a_run(opened, monkeypatch):
    """A dry run writes nothing, not even into the file of --judge-cache."""
    seen = []
    monkeypatch.setattr(axis, "check_cache", seen.append)
    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", enough)
    monkeypatch.setattr(forecast, "forecast", enough)
    assert s.run_command([*RUN, "--judge", "none", "--dry-run"]) == 2 and not seen
    assert s.run_command([*RUN, "--judge", "none"]) == 2
    assert [type(judge) for judge in seen] == [NoJudge]


@pytest.mark.parametrize(("more", "told"), [
    ([], "for about 30 s"), (["--sample-seconds", "2.5"], "for about 2.5 s"),
    (["--sample-seconds", "0"], None), (["--json"], None)])
def test_a_dry_run_says_how_long_it_times(opened, monkeypatch, capsys, more, told):
    """The line is for a person only, and only if something is timed."""
    monkeypatch.setattr(forecast, "forecast", lambda *_, **__: COST)
    assert s.run_command([*RUN, "--judge", "none", "--dry-run", *more]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "timing" in line]
    assert lines == ([] if told is None else [f"timing a sample of the generation {told}"])


@pytest.mark.parametrize(("cost", "fine"), [("0", True), ("inf", False),
                                            ("nan", False)])
def test_the_cost_of_judging_is_finite_and_not_negative(opened, monkeypatch, capsys, cost, fine):
    """Nothing is a possible cost."""
    monkeypatch.setattr(forecast, "forecast", lambda *_, **__: COST)
    code = s.run_command([*RUN, "--judge", "none", "--dry-run", "--judge-cost", cost, "--json"])
    said = capsys.readouterr()
    assert code == (0 if fine else 2)
    if fine:
        assert json.loads(said.out)["judge_cost"] == 8 * float(cost)
    else:
        assert f"--judge-cost is {float(cost)}; give the cost in USD" in said.err


def test_a_forecast_is_described_with_the_judge_and_its_cost(monkeypatch, capsys):
    """A run that fills the disk exactly is possible, and one byte more is not."""
    seen, out = [], pathlib.Path("out")
    monkeypatch.setattr(forecast, "describe",
                        lambda *given, **named: seen.append((given, named)) or ["one", "two"])
    axis._show_forecast(COST, "self", 0.25, out, False)
    assert capsys.readouterr().out == "one\ntwo\n"
    assert seen == [((COST,), {"judge": "self", "cost": 0.25})]
    for name in ("disk_bytes", "live_bytes"):
        more = dataclasses.replace(COST, **{name: getattr(COST, name) + 1})
        with pytest.raises(UserError, match="--out is out; its disk has too little free space"):
            axis._show_forecast(more, "self", None, out, True)
        assert json.loads(capsys.readouterr().out)[name] == getattr(COST, name) + 1


@pytest.mark.parametrize(("more", "said"), [
    (["--roles", "x"], "--roles is x, but --paper sets it to data"),
    (["--questions", "x"], "--questions is x, but --paper sets it to data"),
    (["--roles-named", "a"], "--roles-named is a, but --paper omits it"),
    (["--limit-roles", "3"], "--limit-roles is 3, but --paper omits it"),
    (["--max-new-tokens", "9"], "--max-new-tokens is 9, but --paper sets it to 512"),
    (["--temperature", "0.5"], "--temperature is 0.5, but --paper sets it to 0.7"),
    (["--top-p", "0.5"], "--top-p is 0.5, but --paper sets it to 0.9"),
    (["--min-count", "9"], "--min-count is 9, but --paper sets it to 50")])
def test_each_setting_of_the_paper_is_compared_with_its_option(capsys, more, said):
    """An option with another value is a mistake."""
    assert s.run_command(["axis", "--paper", "--out", "out", *more]) == 2
    assert capsys.readouterr().err == f"error: {said}; omit one of the two\n"


def test_the_settings_of_the_paper_replace_defaults_but_not_given_values():
    """A default is replaced, unless the user typed it; the paper's own value may be typed."""
    given = {name: default for name, (_, default) in quota.PAPER.items()}
    fixed = {"roles": "data", "questions": "data", "roles_named": None, "limit_roles": None,
             "limit_questions": None, "samples": 1, "max_new_tokens": 512, "temperature": 0.7,
             "top_p": 0.9, "min_count": 50, "precision": None}
    assert quota.of_paper(given) == quota.of_paper(fixed, list(fixed)) == fixed
    with pytest.raises(UserError, match="--min-count is 10, but --paper sets it to 50"):
        quota.of_paper(given, ["min_count"])


@pytest.mark.parametrize(("text", "sizes"), [
    (None, None), (" 8 , 16", [8, 16]), ("999999999", [999999999]), ("9999999999", UserError),
    ("", UserError), ("8,", UserError), ("-8", UserError), ("8.5", UserError), ("٨", UserError)])
def test_the_sizes_of_rounds_are_whole_numbers(text, sizes):
    """Spaces are allowed; a number has at most nine digits."""
    options = quota.QuotaOptions(0.9, text)
    if sizes is UserError:
        with pytest.raises(UserError, match="--rounds is .*; give numbers of questions"):
            options.sizes()
    else:
        assert options.sizes() == sizes
