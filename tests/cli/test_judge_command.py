"""`axis --judge` with an endpoint and a person, and the commands of `jaxpersona judge`."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import sys

import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.persona.verdicts import scores_of
from jaxpersona.runs.run import Run

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "judges"))
import fake_endpoint as fake  # noqa: E402

ROLES = [Role("default", ("",), ""), *(Role(name, (f"You are a {name}.", f"Be a {name}."), "")
                                       for name in ("ghost", "baker", "sage"))]
QUESTIONS = [Question(i, f"Who {i}?") for i in range(8)]
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return s.write_texts(tmp_path_factory.mktemp("texts"), ROLES, QUESTIONS)


@pytest.fixture(scope="module")
def judged(checkpoint, texts, tmp_path_factory):
    """A run judged by an endpoint, the endpoint's counts, and its url."""
    pytest.importorskip("openai")
    out = tmp_path_factory.mktemp("judged") / "run"
    with fake.serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        command = s.axis_command(checkpoint, texts, out, "--judge", "http:judge-1", "--judge-url",
                                 server.url)
        code = s.run_command(command)
    return out, server, code


def test_a_run_is_judged_by_an_endpoint(judged):
    """Every role's replies have the endpoint's scores, and equal texts were sent once."""
    out, server, code = judged
    assert code == 0
    run, sent = Run.read(out), set()
    for role in ("ghost", "baker", "sage"):
        records = run.rollouts(role)
        texts = [r["question"] + " " + r["conversation"][-1]["content"] + "?" for r in records]
        assert list(run.scores(role).values()) == [fake.score(text) for text in texts]
        sent |= set(texts)
    assert set(server.asked) == sent and set(server.asked.values()) == {1}
    assert server.keys == {KEY}
    for path in out.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert "http judge-1 rubric" in json.dumps(run.manifest)


def test_a_run_that_uses_its_budget_ends_in_one_line_and_goes_on(checkpoint, texts, tmp_path,
                                                                 capsys, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with fake.serving() as server:
        command = s.axis_command(checkpoint, texts, tmp_path / "run", "--judge", "http:judge-1",
                                 "--judge-url", server.url, "--judge-price", "1,2")
        assert s.run_command([*command, "--budget", "20calls"]) == 2
        said = capsys.readouterr().err
        assert len(server.times) == 20 and said.count("error:") == 1
        assert "the budget of 20 calls is used" in said and "Traceback" not in said
        assert s.run_command([*command, "--budget", "1usd"]) == 0
    assert set(server.asked.values()) == {1}


def test_replies_without_a_score_are_told_and_judged_again(checkpoint, texts, tmp_path, capsys,
                                                           monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("jaxpersona.judges.http._BACKOFF", 0.001)
    with _quiet(), fake.serving(lambda text, _: "500" if "Who 3?" in text else "") as server:
        command = s.axis_command(checkpoint, texts, tmp_path / "run", "--judge", "http:judge-1",
                                 "--judge-url", server.url)
        assert s.run_command(command) == 0
        assert "replies on which the judge failed: 6 (HTTP 500" in capsys.readouterr().err
        server.fault = lambda *_: ""
        sold = sum(server.sold.values())
        assert s.run_command(command) == 0
        assert "not scored" not in capsys.readouterr().err
    assert sum(server.sold.values()) > sold and set(server.sold.values()) == {1}
    run = Run.read(tmp_path / "run")
    assert None not in [v for role in ("ghost", "baker", "sage")
                        for v in run.scores(role).values()]


def _quiet():
    """Let the command print warnings, as outside of tests."""
    import warnings

    return warnings.catch_warnings(action="default")


def fill(path, score):
    """Enter `score(row)` in every row of a file."""
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(row | {"score": score(row)} for row in rows)
    path.write_bytes(text.getvalue().encode())
    return rows


def test_a_person_judges_a_run_in_two_calls(checkpoint, texts, tmp_path, capsys):
    mine = tmp_path / "mine.csv"
    command = s.axis_command(checkpoint, texts, tmp_path / "run", "--judge", f"human:{mine}")
    with _quiet():
        assert s.run_command(command) == 2  # no role has a score yet
    said = capsys.readouterr().err
    assert "replies on which the judge failed: 48 (not scored yet in mine.csv)" in said
    rows = fill(mine, lambda row: "3" if row["role"] != "sage" else "?")
    assert len(rows) == 48
    assert s.run_command(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["roles"] == 2
    assert set(scores_of(tmp_path / "run").values()) == {3, None}


def test_a_sample_is_printed_by_score(judged, capsys):
    out, _, _ = judged
    scores = scores_of(out)
    assert s.run_command(["judge", "sample", str(out), "--count", "2"]) == 0
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if line.startswith("== ")]
    assert heads == [f"== score {n} ==" for n in (3, 2, 1, 0)]
    assert said.count("assistant: ") == 8
    command = ["judge", "sample", str(out), "--score", "3", "--role", "sage", "--count", "99"]
    assert s.run_command([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["item"] for row in rows} == {
        key for key, value in scores.items() if value == 3 and key.startswith("sage/")}


def test_a_file_for_a_person_is_blind_and_gives_the_agreement(judged, tmp_path, capsys):
    out, _, _ = judged
    mine = tmp_path / "mine.csv"
    command = ["judge", "sample", str(out), "--count", "4", "--csv", str(mine)]
    assert s.run_command(command) == 0
    assert f"jaxpersona judge agreement {out} {mine}" in capsys.readouterr().out
    scores = scores_of(out)
    rows = fill(mine, lambda row: str(min(3, scores[row["item"]] + 1)))
    assert len(rows) == 16 and {row["score"] for row in rows} == {""}
    order = [scores[row["item"]] for row in rows]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    assert s.run_command(["judge", "agreement", str(out), str(mine), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"] == [[0, 4, 0, 0, 0], [0, 0, 4, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 4, 0],
                              [0] * 5]
    assert found["both"] == 16 and found["equal"] == 0.25 and found["difference"] == -0.75
    assert found["kappa"] == pytest.approx(1 - 0.75 / (20 / 16), abs=0.2)
    assert s.run_command(["judge", "agreement", str(out), str(mine)]) == 0
    text = capsys.readouterr().out
    assert "kappa (linear weights)" in text and "ghost" in text
    other = mine.with_name("other.csv")
    other.write_text("item,score,digest\nx/0,3,00000000\n")
    assert s.run_command(["judge", "agreement", str(out), str(other)]) == 2
    assert f"{out} and {other} have no reply in common" in capsys.readouterr().err
    assert s.run_command(command) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["axis", "--judge", "nobody"], "judge is 'nobody'; choose rules, self, model:NAME, http:"),
    (["axis", "--judge", "http:"], "judge is 'http:'"),
    (["axis", "--judge", "rules:x"], "judge is 'rules:x'"),
    (["axis", "--judge-url", "http://h/v1"], "--judge-url is given, but the judge is 'rules'"),
    (["axis", "--budget", "5usd", "--judge", "none"], "--budget is given, but the judge is 'none'"),
    (["axis", "--judge", "self", "--judge-after"],
     "--judge-after is given, but the judge is 'self'"),
    (["axis", "--judge", "human:x.txt"], "give the name of a .csv file"),
    (["axis", "--judge", "http:m"], "the judge needs an eval_prompt"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC"], "OPENAI_API_KEY is not set"),
    (["axis", "--judge", "http:m", "--judge-rubric", "none.txt"], "none.txt: no such file"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "x"], "judge-url is"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "http://h/v1",
      "--budget", "5"], "budget is '5'; give calls or USD"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "http://h/v1",
      "--judge-price", "1"], "--judge-price is '1'"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "http://h/v1",
      "--budget", "5usd"], "needs the price"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "http://h/v1",
      "--judge-rpm", "0"], "rpm is 0"),
    (["axis", "--judge", "http:m", "--judge-rubric", "RUBRIC", "--judge-url", "http://h/v1",
      "--judge-temperature", "-1"], "--judge-temperature is -1"),
    (["axis", "--judge", "http:m", "--judge-rubric", "blank.txt"],
     "blank.txt: the rubric lacks {question} and {answer}"),
    (["judge", "agreement", "none", "none"], "none/run.json: no such file"),
    (["judge", "sample", "none"], "none/run.json: no such file"),
    (["judge", "sample", "none", "--count", "0"], "--count is 0"),
    (["judge", "sample", "none", "--score", "5"], "--score is '5'"),
])
def test_a_mistake_is_one_line_before_a_model_is_loaded(arguments, wanted, tmp_path, monkeypatch,
                                                        capsys):
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    pathlib.Path("rubric.txt").write_text("{question} {answer} 0-3?")
    pathlib.Path("blank.txt").write_text("0-3?")

    def no_load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("jaxpersona.ckpts.loading.load", no_load)
    assert s.run_command([a.replace("RUBRIC", "rubric.txt") for a in arguments]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blank.txt", "rubric.txt"]


@pytest.fixture
def scored(monkeypatch):
    """Four replies of two roles, with the scores 3, 0 and twice undecided."""
    from jaxpersona.judges.protocol import Item

    items = {f"{role}/k{i}": Item(f"k{i}", Role(role, ("Be.",), ""), f"Who {i}?", f"I, {role} {i}.",
                                  "Be.") for role in ("ghost", "baker") for i in range(2)}
    scores = {"ghost/k0": 3, "ghost/k1": None, "baker/k0": 0, "baker/k1": None}
    monkeypatch.setattr(Run, "read", lambda _: None)
    monkeypatch.setattr("jaxpersona.persona.verdicts.replies_of", lambda _: items)
    monkeypatch.setattr("jaxpersona.persona.verdicts.scores_of", lambda _: scores)


def test_undecided_replies_and_those_of_a_role_are_drawn_alone(scored, capsys):
    def drawn(*more):
        assert s.run_command(["judge", "sample", "run", *more]) == 0
        return [line for line in capsys.readouterr().out.splitlines()
                if line.startswith(("==", "["))]

    assert drawn() == ["== score 3 ==", "[ghost/k0]", "== score 0 ==", "[baker/k0]",
                       "== score none ==", *drawn("--score", "none")[1:]]
    assert sorted(drawn("--score", "none")) == ["== score none ==", "[baker/k1]", "[ghost/k1]"]
    assert drawn("--score", "0") == ["== score 0 ==", "[baker/k0]"]
    assert drawn("--role", "ghost") == ["== score 3 ==", "[ghost/k0]", "== score none ==",
                                        "[ghost/k1]"]
    assert drawn("--role", "ghost", "--score", "none") == ["== score none ==", "[ghost/k1]"]
    assert len(drawn("--score", "none", "--count", "1")) == 2
    for more, wanted in ((["--role", "sage"], "--role is 'sage'; give the name of a role"),
                         (["--role", "ghost", "--score", "0"], "contains no matching reply"),
                         (["--csv", "x.txt"], "--csv is x.txt; give the name of a .csv file")):
        assert s.run_command(["judge", "sample", "run", *more]) == 2
        assert wanted in capsys.readouterr().err


def test_an_agreement_is_printed_with_its_counts(monkeypatch, capsys):
    import numpy as np

    from jaxpersona.judges.agreement import Agreement

    nan, seen = float("nan"), []
    found = Agreement(("0", "3", "none"), np.array([[1, 2, 0], [0, 1200, 3], [0, 0, 4]]), 1203,
                      0.9983, 0.5, (0.25, nan), -0.0049,
                      {"sage": (3, 1.0, nan, 0.0), "ghost": (1200, 0.998, 0.5, -0.5)}, (7, 8))
    monkeypatch.setattr("jaxpersona.judges.agreement.agreement",
                        lambda *a, **k: seen.append((a, k)) or found)
    monkeypatch.setattr("jaxpersona.persona.verdicts.scores_of", lambda name: f"of {name}")
    assert s.run_command(["judge", "agreement", "a", "b", "--seed", "5"]) == 0
    assert seen == [(("of a", "of b"), {"seed": 5})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1,210 replies judged by both, 7 only by A, 8 only by B"
    assert [line.split() for line in lines[2:6]] == [
        ["0", "3", "none"], ["0", "1", "2", "0"], ["3", "0", "1,200", "3"], ["none", "0", "0", "4"]]
    assert lines[6] == ("of 1,203 replies that both scored: equal 99.8%, kappa (linear weights) "
                        "0.500 with the 95 % confidence interval 0.250 to –, mean of A − B -0.005")
    assert [line.split() for line in lines[8:]] == [["ghost", "1,200", "100%", "0.500", "-0.50"],
                                                    ["sage", "3", "100%", "–", "+0.00"]]
    assert s.run_command(["judge", "agreement", "a", "b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["only"], told["interval"], told["roles"]["sage"]) == (
        [7, 8], [0.25, None], {"replies": 3, "equal": 1.0, "kappa": None, "difference": 0.0})
