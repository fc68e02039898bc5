"""`jaxpersona status RUN` and `jaxpersona judge RUN --judge …`."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.persona.verdicts import scores_of
from jaxpersona.runs.compare import FORMAT, sealed
from jaxpersona.runs.run import Run
from jaxpersona.runs.status import Status, describe, kept, read_status

ROLES = [Role("default", ("",), ""), *(Role(name, (f"You are a {name}.", f"Be a {name}."), "")
                                       for name in ("ghost", "baker"))]
QUESTIONS = [Question(i, f"Who {i}?") for i in range(3)]


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """A finished run with the judge none, its texts and its command."""
    folder = tmp_path_factory.mktemp("made")
    texts = s.write_texts(folder, ROLES, QUESTIONS)
    command = s.axis_command(checkpoint, texts, folder / "run")
    assert s.run_command(command) == 0
    return folder / "run", texts, command


def fill(path, score):
    """Enter `score(row)` in every row of a person's file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(row | {"score": score(row)} for row in rows)
    path.write_bytes(text.getvalue().encode())


def test_the_status_of_a_finished_run(made, capsys):
    run, _, _ = made
    assert s.run_command(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("complete: 15 of 15 rollouts, 12 of 12 verdicts, 3 of 3 roles complete")
    assert "tokens/s" in said and "time left" not in said
    assert s.run_command(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "complete" and found["seconds_left"] is None
    assert found["rollouts_per_second"] > 0 and found["tokens"] > 0


def test_the_status_of_a_running_run_has_rate_and_time_left(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("jaxpersona.runs.status.time.time", lambda: clock[0])
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT})))
    status = Status(tmp_path, total=100, to_judge=80, roles=4)
    status.done, status.judged = 10, 8
    status.begin()
    clock[0] += 2
    status.done += 5
    status.update()
    assert read_status(tmp_path)["rollouts"] == 10  # written every five seconds
    clock[0] += 8
    status.done, status.judged, status.tokens, status.cost = 30, 18, 400, 0.5
    status.update()
    found = read_status(tmp_path)
    assert found["state"] == "running" and found["rollouts_per_second"] == 2
    assert found["tokens_per_second"] == 40
    assert found["seconds_left"] == 62  # 62 verdicts at one a second; 70 rollouts at two
    lines = describe(found)
    assert "time left: about 62 s" in lines and "cost of judging: $0.5000" in lines
    other = {**found, "process": 2**22 + 5}
    (tmp_path / "status.json").write_text(json.dumps(other))
    assert read_status(tmp_path)["state"] == "stopped"
    (tmp_path / "status.json").write_text(json.dumps({**other, "host": "elsewhere"}))
    assert read_status(tmp_path)["state"] == "running"
    for name, value in (("seconds", 10**400), ("tokens_per_second", float("nan")),
                        ("seconds_left", "soon"), ("cost", float("inf"))):
        (tmp_path / "status.json").write_text(json.dumps({**found, name: value}))
        with pytest.raises(UserError, match=f"field {name!r} is missing or invalid"):
            read_status(tmp_path)


def test_a_further_round_carries_on_the_start_the_tokens_and_the_cost(tmp_path, monkeypatch):
    """The rates are those of the round."""
    clock = [1000.0]
    monkeypatch.setattr("jaxpersona.runs.status.time.time", lambda: clock[0])
    one = Status(tmp_path, total=10, to_judge=8, roles=2)
    one.begin()
    clock[0] += 50
    one.tokens, one.cost, one.done = 400, 0.5, 10
    two = Status(tmp_path, total=20, to_judge=16, roles=2, before=one)
    two.done = 10
    two.begin()
    clock[0] += 10
    two.tokens += 100
    two.cost += 0.25
    two.done += 5
    found = two.value("running")
    assert found["started"] == one.value("running")["started"] and found["seconds"] == 60
    assert found["tokens"] == 500 and found["cost"] == 0.75
    assert found["tokens_per_second"] == 10 and found["rollouts_per_second"] == 0.5


@pytest.mark.parametrize(("name", "text", "wanted"), [
    ("status.json", "[]", "field 'state' is"), ("status.json", '{"state": 5}', "field 'state' is"),
    ("status.json", None, "no such file"), ("run.json", None, "contains no run"),
    ("run.json", '{"format": "jaxpersona-run 1"}', "resume with the version")])
def test_a_status_that_cannot_be_read_is_one_line(made, tmp_path, capsys, name, text, wanted):
    for file in ("run.json", "status.json"):
        (tmp_path / file).write_bytes((made[0] / file).read_bytes())
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    assert s.run_command(["status", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said


@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "NaN", "Infinity", "1e999", '"x"',
                                   "[]"])
@pytest.mark.parametrize("name", ["seconds", "seconds_left", "cost", "rollouts_per_second",
                                  "tokens_per_second"])
def test_a_number_of_the_status_that_cannot_be_printed_is_damage(tmp_path, name, value):
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT})))
    status = Status(tmp_path, total=100, to_judge=80, roles=4)
    status.done, status.tokens, status.cost = 1, 1, 0.5
    status.write("running")
    path = tmp_path / "status.json"
    fields = json.loads(path.read_text())
    assert describe(read_status(tmp_path))
    path.write_text(json.dumps({**fields, name: "HERE"}).replace('"HERE"', value))
    with pytest.raises(UserError, match=rf"status\.json: field '{name}' is missing or invalid"):
        read_status(tmp_path)


@pytest.mark.parametrize("value", [None, 0, 10 ** 300, 12.5])
def test_a_number_of_the_status_that_can_be_printed_is_read(tmp_path, value):
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT})))
    status = Status(tmp_path, total=100, to_judge=80, roles=4)
    fields = {**status.value("running"), "seconds_left": value, "cost": value or 0}
    (tmp_path / "status.json").write_text(json.dumps(fields))
    said = "\n".join(describe(read_status(tmp_path)))
    assert ("time left" in said) == (value is not None)
    assert ("cost of judging" in said) == bool(value)


def test_what_a_stopped_run_contains_is_counted_without_waiting_for_pipes(tmp_path):
    for part in ("rollouts", "live"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "folder.jsonl").mkdir()
        (tmp_path / part / "gone.jsonl").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / part / "pipe.jsonl")
    os.mkfifo(tmp_path / "live/pipe.verdicts.jsonl")
    (tmp_path / "rollouts/ghost.jsonl").write_text("1\n2\n3\n")
    (tmp_path / "live/baker.jsonl").write_text("head\n1\n2\n")
    (tmp_path / "live/baker.verdicts.jsonl").write_text("head\n1\n")

    def late(*_):
        raise TimeoutError("a pipe was opened")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        assert kept(tmp_path) == (5, 1, 1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_person_s_verdicts_are_stored_beside_the_others(made, tmp_path, capsys):
    """`judge RUN` leaves the axis; `axis` with the judge uses the verdicts."""
    run, texts, command = made
    out, mine = tmp_path / "run", tmp_path / "mine.csv"
    shutil.copytree(run, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    judge = ["judge", str(out), "--judge", f"human:{mine}", "--roles", str(texts / "roles")]
    assert s.run_command(judge) == 0
    assert "12 without a verdict" in capsys.readouterr().out
    # the second question of each role is not scored yet
    fill(mine, lambda row: "" if row["item"].endswith("q1") else "3")
    assert s.run_command([*judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == {"0": 0, "1": 0, "2": 0, "3": 8, "None": 0, "failed": 4}
    changed = {p.relative_to(out).parts[0] for p, data in before.items()
               if p.exists() and p.read_bytes() != data}
    assert changed == {"run.json"} and not list((out / "live").iterdir())
    name = found["judge"]
    assert set(Run.read(out).scores("ghost", name).values()) == {3}
    assert len(Run.read(out).scores("ghost", name)) == 4
    assert len(Run.read(out).scores("ghost")) == 6  # of the judge none, still the axis's
    fill(mine, lambda row: row["score"] or "2")
    again = command[:command.index("--out") + 1] + [str(out)] + command[
        command.index("--out") + 2:] + ["--judge", f"human:{mine}"]
    assert s.run_command(again) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rollouts"] == 15 and set(scores_of(out).values()) == {2, 3}
    assert Run.read(out).sums("ghost").count("3") == 4


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["{run}"], "--judge is missing"), (["{run}", "--judge", "nobody"], "judge is 'nobody'"),
    (["none", "--judge", "none"], "none/run.json: no such file"),
    (["{run}", "--judge", "rules"], "rules supports only the roles of mini"),
    (["{run}", "--judge", "none", "--roles", "data"], "the run's roles baker are missing from")])
def test_a_mistake_is_one_line(made, capsys, arguments, wanted):
    assert s.run_command(["judge", *(a.format(run=made[0]) for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1, said


def test_another_model_is_not_the_judge_self(made, capsys):
    run, texts, _ = made
    assert s.run_command(["judge", str(run), "--judge", "self", "--model", "mini", "--roles",
                          str(texts / "roles")]) == 2
    assert "which is not the model of" in capsys.readouterr().err


def test_a_run_in_use_is_not_judged(made):
    run, texts, _ = made
    code = ("import fcntl, os, sys, subprocess\n"
            "handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
            "fcntl.flock(handle, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()\n")
    held = subprocess.Popen([sys.executable, "-S", "-c", code, str(run / ".lock")], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert held.stdout.readline() == "held\n"
        assert s.run_command(["judge", str(run), "--judge", "none", "--roles",
                              str(texts / "roles")]) == 2
    finally:
        held.communicate("")
        os.path.exists(run / ".lock") and os.unlink(run / ".lock")


def test_the_verdicts_of_all_roles_are_counted_and_their_cost_told(made, monkeypatch, capsys):
    run, texts, _ = made
    counts = {"ghost": {"3": 1200, "None": 1, "0": 0}, "baker": {"3": 34, "failed": 2}}
    monkeypatch.setattr("jaxpersona.persona.rejudge.judge_run", lambda *_, **__: (counts, 0.5))
    command = ["judge", str(run), "--judge", "none", "--roles", str(texts / "roles")]
    assert s.run_command(command) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "judge none: 1,234 with score 3, 1 undecided, 2 without a verdict", "cost: $0.5000"]
    assert s.run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": str(run), "judge": "none", "cost": 0.5, "roles": counts,
        "scores": {"3": 1234, "None": 1, "0": 0, "failed": 2}}


def test_only_the_roles_of_the_run_need_a_prompt_for_the_judge(made, tmp_path, monkeypatch,
                                                               capsys):
    """The judge self is given the options, and the name of the model in the run's files."""
    run, texts, _ = made
    roles = shutil.copytree(texts / "roles", tmp_path / "roles")
    bare = json.dumps({"instruction": [{"pos": "Be."}]})
    (roles / "extra.json").write_text(bare)
    manifest, seen = Run.read(run).manifest, []

    def load(*given):
        seen.append(given)
        return SimpleNamespace(fingerprint=manifest["model"]["fingerprint"])

    monkeypatch.setattr("jaxpersona.cli.support.open_model", load)
    monkeypatch.setattr("jaxpersona.judges.judges.SelfJudge", lambda *a, **k: seen.append(k) or
                        SimpleNamespace(name="self"))
    monkeypatch.setattr("jaxpersona.persona.rejudge.judge_run", lambda *_, **__: ({}, None))
    command = ["judge", str(run), "--judge", "self", "--roles", str(roles), "--batch-size", "5",
               "--dtype", "float16"]
    assert s.run_command(command) == 0
    assert seen[0] == (manifest["last"]["model"], "float16") and seen[1]["batch_size"] == 5
    assert s.run_command([*command, "--model", "other"]) == 0
    assert seen[2] == ("other", "float16")
    (roles / "baker.json").write_text(bare)
    capsys.readouterr()
    assert s.run_command(command) == 2
    err = capsys.readouterr().err
    assert "missing for 1 role (baker); add one to each, or give one rubric" in err
