"""A judging process that is killed pays for no verdict twice, and ends in the same scores."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fake_endpoint as fake
import judging
import numpy as np
import pytest

from jaxpersona.judges.rubric import ROLES

pytest.importorskip("openai")


def start(url, folder):
    with (folder / "log").open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, judging.__file__, url, str(folder / "v.jsonl"),
             str(folder / "out.json")],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENAI_API_KEY": "sk-1"}, stdout=sink,
            stderr=sink)


def unanswered(path: pathlib.Path) -> int:
    """The number of requests in a journal without an outcome."""
    sent: dict[str, int] = {}
    for line in path.read_bytes().split(b"\n")[1:-1]:
        value = json.loads(line)
        key = value.get("sent") or value.get("key") or value["failed"]
        sent[key] = sent.get(key, 0) + (1 if "sent" in value else -1)
    return sum(sent.values())


def killed(tmp_path, moments):
    """Kill a process at each number of requests, then let it finish; return what was repeated."""
    with fake.serving(fake.some(0.15, ("500", "429", "cut"))) as server:
        server.pause = 0.02
        lost = kills = 0
        rng = np.random.default_rng(0)
        for moment in moments:
            process = start(server.url, tmp_path)
            end = time.monotonic() + 300
            while len(server.times) < moment and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            kills += process.wait(60) == -signal.SIGKILL
            if (tmp_path / "v.jsonl").exists():
                before, lost = lost, unanswered(tmp_path / "v.jsonl")
                assert lost - before <= 8  # the requests under way
        assert start(server.url, tmp_path).wait(300) == 0, (tmp_path / "log").read_text()
        return server, kills, lost


def check(tmp_path, moments):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with fake.serving() as server:
        judging.main(server.url, str(whole / "v.jsonl"), str(whole / "out.json"))
    server, kills, lost = killed(broken, moments)
    assert kills == len(moments)
    assert (broken / "out.json").read_bytes() == (whole / "out.json").read_bytes()
    found = json.loads((whole / "out.json").read_text())
    assert [score for _, score, _ in found] == [
        fake.score(ROLES.prompt(item)) for item in judging.ITEMS]
    twice = sum(n - 1 for n in server.sold.values())
    assert len(server.sold) == judging.COUNT and twice <= lost
    return twice, lost


def test_a_killed_judge_pays_for_no_verdict_twice(tmp_path):
    """But for the requests that were under way, which the file lists."""
    check(tmp_path, [100])


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    rng = np.random.default_rng(1)
    print(check(tmp_path, sorted(rng.integers(1, 215, 20).tolist())))
