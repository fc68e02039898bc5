"""The commands of `judge`: their judges, their lines and the options that reach them."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

from jaxpersona.cli import judge_agreement, judge_run
from jaxpersona.data import texts
from jaxpersona.data.texts import Role
from jaxpersona.judges.agreement import Agreement
from jaxpersona.judges.judges import NoJudge
from jaxpersona.judges.protocol import Item
from jaxpersona.judges.rubric import Rubric
from jaxpersona.organism import method
from jaxpersona.runs.run import Run

LOADED = SimpleNamespace(name="m", fingerprint="f")


@pytest.fixture
def opened(monkeypatch):
    """The arguments of each call of `open_model`."""
    seen = []
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: seen.append(a) or LOADED)
    return seen


ROLES = [Role("default", ("",), ""), Role("ghost", ("Be.",), "{question} {answer}?"),
         Role("baker", ("Be.",), "")]


@pytest.fixture
def run(opened, monkeypatch):
    """A run of the model m with two roles, and the arguments of its judging."""
    manifest = {"roles": {"default": 1, "ghost": 1}, "last": {"model": "m"},
                "model": {"fingerprint": "f"}}
    seen = []
    monkeypatch.setattr(Run, "read", lambda folder: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(texts, "load_roles", lambda path: seen.append(path) or ROLES)
    monkeypatch.setattr(method, "roles", lambda: ROLES[:2])
    monkeypatch.setattr("jaxpersona.persona.rejudge.judge_run", lambda folder, cast, judge, **_: (
        seen.append((folder, [role.name for role in cast], judge)) or ({"ghost": {"3": 2}}, 0.0)))
    return manifest, seen


def test_judging_a_run_ends_in_the_next_command(run, capsys):
    """Names with spaces are quoted, and a cost of 0 is not told."""
    assert s.run_command(["judge", "my run", "--judge", "none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "judge none: 2 with score 3",
        "to compute the axis from these verdicts, run jaxpersona axis with the options of the run, "
        "--judge none and --out 'my run'"]


@pytest.mark.parametrize(("name", "more", "path", "cast"), [
    ("m", [], None, 3), ("m", ["--roles", "data"], None, 3),
    ("m", ["--roles", "r"], pathlib.Path("r"), 3), ("mini", [], "not read", 2),
    ("mini", ["--roles", "data"], None, 3), ("m", ["--model", "mini"], "not read", 2)])
def test_a_run_is_judged_with_its_roles(run, name, more, path, cast):
    """Those of mini are built in; --model replaces the name in the run's files."""
    manifest, seen = run
    manifest["last"]["model"] = name
    assert s.run_command(["judge", "out", "--judge", "none", *more]) == 0
    *paths, (folder, names, judge) = seen
    assert paths == ([] if path == "not read" else [path]) and folder == pathlib.Path("out")
    assert len(names) == cast and isinstance(judge, NoJudge)


def test_a_run_without_a_name_of_its_model_can_be_judged(run):
    """Older files have no `last`."""
    manifest, _ = run
    del manifest["last"]
    assert s.run_command(["judge", "out", "--judge", "none"]) == 0


def test_another_model_judges_a_run_with_the_options_of_the_command(run, opened, monkeypatch):
    """The judge has the rubric, and is closed at the end."""
    seen, closed = [], []

    class Judge(NoJudge):
        name = "digits"

        def close(self):
            closed.append(1)

    monkeypatch.setattr(judge_run, "of_model", lambda choice, load, target: seen.append(
        (choice.argument, load())) or Judge())
    assert s.run_command(["judge", "out", "--judge", "model:owner/j", "--dtype", "int8"]) == 0
    assert opened == [("owner/j", "int8")] and seen == [("owner/j", LOADED)] and closed == [1]


def test_the_judge_self_of_a_run_has_the_rubric(run, monkeypatch, tmp_path):
    """One rubric for all roles replaces the missing prompts."""
    manifest, _ = run
    manifest["roles"]["baker"] = 1
    file, seen = tmp_path / "r.txt", []
    file.write_text("{question} {answer}")
    monkeypatch.setattr("jaxpersona.judges.judges.SelfJudge",
                        lambda *given, **named: seen.append((given, named)) or NoJudge())
    command = ["judge", "out", "--judge", "self"]
    assert s.run_command(command) == 2 and not seen
    assert s.run_command([*command, "--judge-rubric", str(file)]) == 0
    assert seen == [((LOADED,), {"batch_size": 32,
                                 "rubric": Rubric(template="{question} {answer}")})]


def test_a_cache_is_opened_before_a_run_is_judged(run, monkeypatch):
    """So that a damaged file is found before a model is loaded."""
    order = []
    monkeypatch.setattr(judge_run, "check_cache", lambda judge: order.append(judge))
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *a: order.append(a) or LOADED)
    monkeypatch.setattr(judge_run, "of_model", lambda *_: NoJudge())
    assert s.run_command(["judge", "out", "--judge", "model:j"]) == 0
    assert order == [None, ("j", None)]


@pytest.fixture
def sampled(monkeypatch):
    """Two replies that are drawn, and the arguments of the draw."""
    items = {f"{name}/k": Item("k", Role(name, ("Be.",), ""), "Who?", "I.", "Be.")
             for name in ("ghost", "baker")}
    seen = []
    monkeypatch.setattr(Run, "read", lambda _: None)
    monkeypatch.setattr("jaxpersona.persona.verdicts.replies_of", lambda _: items)
    monkeypatch.setattr("jaxpersona.persona.verdicts.scores_of",
                        lambda _: {"ghost/k": 3, "baker/k": 1})
    monkeypatch.setattr("jaxpersona.persona.verdicts.sample", lambda *given, **named: seen.append(
        (given, named)) or [(items["ghost/k"], 3), (items["baker/k"], 1)])
    return items, seen


def test_a_sample_has_the_count_and_seed_of_the_options(sampled, capsys):
    """By default, three replies for each score and seed 0; scores are filtered before the draw."""
    items, seen = sampled
    assert s.run_command(["judge", "sample", "run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "== score 3 ==", "", "[ghost/k]", "system: Be.", "user: Who?", "assistant: I.", "",
        "== score 1 ==", "", "[baker/k]", "system: Be.", "user: Who?", "assistant: I.", ""]
    assert s.run_command(["judge", "sample", "run", "--count", "1", "--seed", "5", "--score",
                          "1"]) == 0
    assert seen == [((items, {"ghost/k": 3, "baker/k": 1}, 3), {"seed": 0}),
                    ((items, {"baker/k": 1}, 1), {"seed": 5})]


def test_the_file_of_a_sample_is_announced_with_its_size(sampled, tmp_path, capsys):
    """The order depends on the seed only."""
    orders = set()
    for i, seed in enumerate([0, 0, 1, 2, 3, 4, 5]):
        file = tmp_path / f"{i}.csv"
        assert s.run_command(["judge", "sample", "run", "--csv", str(file), "--seed",
                              str(seed)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"wrote {file} (replies: 2); enter 0 to 3 or ? in the score column and run:",
            f"  jaxpersona judge agreement run {file}"]
        orders.add(file.read_text("utf-8-sig").splitlines()[1][:6])
    assert len(orders) == 2
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["sample", "run", "--seed", "-1"], "--count is 3 and --seed is -1; give a count of at least"),
    (["sample", "run", "--score", "None"], "--score is 'None'; give 0, 1, 2, 3 or none"),
    (["agreement", "a", "b", "--seed", "-1"], "--seed is -1; give 0 or more")])
def test_numbers_of_a_sample_out_of_range_are_refused(sampled, capsys, arguments, wanted):
    """Before any file is read."""
    assert s.run_command(["judge", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {wanted}") and not sampled[1]


FOUND = Agreement(("0–9", "100–109", "none"), np.array([[1, 2, 0], [0, 9, 3], [0, 0, 4]]), 12,
                  1 / 3, 2 / 3, (0.25, float("nan")), -1 / 7,
                  {"b": (3, 1.0, float("nan"), 0.0), "a": (1200, 2 / 3, 0.5, -0.5)}, (7, 1008))


def test_an_agreement_with_ranges_is_aligned():
    """The columns are as wide as the longest label."""
    lines = judge_agreement.lines(FOUND)
    assert lines[0] == "19 replies judged by both, 7 only by A, 1,008 only by B"
    assert lines[1:6] == [
        "rows: scores of A; columns: scores of B",
        "             0–9 100–109    none", "     0–9       1       2       0",
        " 100–109       0       9       3", "    none       0       0       4"]
    assert lines[6].startswith("of 12 replies that both scored: equal 33.3%, kappa (linear "
                               "weights) 0.667 with the 95 % confidence interval 0.250 to –, mean")
    assert lines[6].endswith("of A − B -0.143")
    assert lines[7:] == ["role                     replies   equal   kappa   A − B",
                         "a                          1,200     67%   0.500   -0.50",
                         "b                              3    100%       –   +0.00"]


def test_an_agreement_as_json_has_every_field():
    """Six decimals; undefined numbers are null."""
    assert judge_agreement._value(FOUND) == {
        "labels": ["0–9", "100–109", "none"], "table": [[1, 2, 0], [0, 9, 3], [0, 0, 4]],
        "both": 12, "only": [7, 1008], "equal": 0.333333, "kappa": 0.666667,
        "interval": [0.25, None], "difference": -0.142857, "roles": {
            "b": {"replies": 3, "equal": 1.0, "kappa": None, "difference": 0.0},
            "a": {"replies": 1200, "equal": 0.666667, "kappa": 0.5, "difference": -0.5}}}
