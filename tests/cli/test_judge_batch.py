"""`--judge-batch`: the replies of all roles are judged in one batch."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import sys

import pytest
import support as s

from jaxpersona.cli import judges, support
from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.interrupt import Stopped
from jaxpersona.runs.run import Run

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "judges"))
import fake_endpoint as fake  # noqa: E402

pytest.importorskip("openai")
KEY = "sk-secret-0123456789"
NAMES = ("ghost", "baker", "sage")
ROLES = [Role("default", ("",), ""), *(Role(name, (f"You are a {name}.",), "") for name in NAMES)]
QUESTIONS = [Question(i, f"Who {i}?") for i in range(8)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return s.write_texts(tmp_path_factory.mktemp("texts"), ROLES, QUESTIONS)


def check(run):
    """Check the scores of a run."""
    for role in NAMES:
        asked = [r["question"] + " " + r["conversation"][-1]["content"] + "?"
                 for r in run.rollouts(role)]
        assert list(run.scores(role).values()) == [fake.score(text) for text in asked]


def test_a_run_is_judged_in_one_batch_also_after_an_interruption(checkpoint, texts, tmp_path,
                                                                 capsys, monkeypatch):
    """The first command is stopped while it waits; the same command gets the same batch."""
    monkeypatch.setattr(support, "LOG_SECONDS", 0.1)
    with fake.serving() as server:
        command = s.axis_command(checkpoint, texts, tmp_path / "run", "--judge", "http:judge-1",
                                 "--judge-url", server.url, "--judge-batch")
        server.batches.polls = 10**6
        ticks = []

        def stop(*_):
            ticks.append(1)
            if len(ticks) > 6:
                raise Stopped(signal.SIGINT)

        monkeypatch.setattr("jaxpersona.interrupt.check", lambda: server.batches.batches and stop())
        monkeypatch.setattr("jaxpersona.judges.batch._FIRST_POLL", 0.01)
        assert s.run_command(command) == 130
        said = capsys.readouterr().err
        assert "run the same command to resume" in said
        assert re.search(r"judging 0/24, calls: \d+, batch batch_0: 0 of \d+ \(", said), said
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.batches.batches["batch_0"]["polls"] = server.batches.polls = 1
        assert s.run_command(command) == 0
        assert len(server.batches.sizes) == 1 and not server.times
        assert set(server.sold.values()) == {1}
        check(Run.read(tmp_path / "run"))
        # another judge of the same run: again one batch, for all roles
        assert s.run_command(["judge", str(tmp_path / "run"), "--judge", "http:judge-2", "--roles",
                              str(texts / "roles"), "--judge-url", server.url, "--judge-batch",
                              "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert sum(told["scores"].values()) == 24 and len(server.batches.sizes) == 2
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_an_endpoint_without_batches_ends_the_run_in_one_line(checkpoint, texts, tmp_path, capsys):
    with fake.serving() as server:
        server.batches.refused["/files"] = 404
        command = s.axis_command(checkpoint, texts, tmp_path / "run", "--judge", "http:judge-1",
                                 "--judge-url", server.url)
        assert s.run_command([*command, "--judge-batch"]) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and "Traceback" not in said
        assert "does not offer batches (HTTP 404); omit --judge-batch to send single" in said
        assert s.run_command(command) == 0
    check(Run.read(tmp_path / "run"))


@pytest.mark.parametrize(("more", "wanted"), [
    (["--judge", "http:m", "--judge-batch", "--judge-rpm", "5"],
     "--judge-rpm is given together with --judge-batch"),
    (["--judge", "http:m", "--judge-batch", "--judge-concurrency", "2"],
     "--judge-concurrency is given together with --judge-batch"),
    (["--judge", "http:m", "--judge-batch-size", "5"],
     "--judge-batch-size is given without --judge-batch; add it"),
    (["--judge", "http:m", "--judge-batch-price", "1,2"],
     "--judge-batch-price is given without --judge-batch; add it"),
    (["--judge", "self", "--judge-batch"], "--judge-batch is given, but the judge is 'self'"),
    (["--judge", "http:m", "--judge-url", "http://h/v1", "--judge-batch", "--judge-batch-size",
      "0"], "--judge-batch-size is 0; give 1 to 1000000"),
    (["--judge", "http:m", "--judge-url", "http://h/v1", "--judge-batch", "--judge-batch-price",
      "1"], "--judge-batch-price is '1'; give the prices"),
])
def test_a_mistake_is_one_line(more, wanted, texts, tmp_path, capsys):
    assert s.run_command(["axis", "--roles", str(texts / "roles"), "--out", str(tmp_path / "run"),
                          *more]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.startswith("error: ") and said.count("\n") == 1, said


def test_the_options_reach_the_judge(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("jaxpersona.judges.http.HttpJudge", lambda *a, **k: made.append(k))
    options = judges.JudgeOptions(url="http://h/v1", batch=True, batch_size=7, batch_price="1,2")
    judges.opened(judges.choose("http:m", options, own=False), tmp_path)
    found = made[0]["batch"]
    assert (found.size, found.price) == (7, (1.0, 2.0))
    plain = judges.choose("http:m", judges.JudgeOptions(url="http://h/v1"), own=False)
    judges.opened(plain, tmp_path)
    assert made[1]["batch"] is None
    monkeypatch.setattr("jaxpersona.distributed.processes.joined", lambda: True)
    with pytest.raises(UserError, match="--judge-batch is given, but the run has several proc"):
        judges.opened(judges.choose("http:m", options, own=False), tmp_path)
