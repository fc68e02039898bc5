"""An `axis` command killed at random moments resumes to the same bytes as an unbroken run."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import support as s

from jaxpersona.data.texts import Question, Role

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "judges"))
import fake_endpoint as fake  # noqa: E402

ROLES = [Role("default", ("", "You are an AI assistant."), ""),
         *(Role(name, (f"You are a {name}.", f"Act as a {name}."), "")
           for name in ("ghost", "pirate", "tutor", "sage", "clown", "nurse"))]
QUESTIONS = [Question(i, f"What is thing {i}?") for i in range(4)]
KILLS = 20
CONCURRENCY = 4


def start(arguments, log):
    code = "import sys; from jaxpersona.cli.main import main; main()"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENAI_API_KEY": "sk-test"}
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=sink, stderr=sink,
                                env=env)


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []


def contents(folder):
    """Return the files of a run but for figures, status.json and the journal of requests."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in files(folder)
            if p.suffix not in (".png", ".svg") and p.name not in ("status.json", "verdicts.jsonl")}


def size(folder):
    total = 0
    for path in files(folder):
        if path.parent.name == "live" or path.suffix in (".json", ".jsonl", ".safetensors"):
            with contextlib.suppress(FileNotFoundError):  # the command may remove it meanwhile
                total += path.stat().st_size
    return total


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(checkpoint, tmp_path):
    """Kill after a number of written bytes; the endpoint counts what it is asked again."""
    pytest.importorskip("openai")
    texts, log = s.write_texts(tmp_path, ROLES, QUESTIONS), tmp_path / "log"
    rng = np.random.default_rng(0)
    with fake.serving() as server:
        server.pause = 0.02

        def command(name):
            return s.axis_command(checkpoint, texts, tmp_path / name, "--judge", "http:judge-1",
                                  "--judge-url", server.url, "--judge-concurrency",
                                  str(CONCURRENCY))

        assert start(command("whole"), log).wait(600) == 0, log.read_text()
        whole, most = contents(tmp_path / "whole"), size(tmp_path / "whole")
        assert set(server.sold.values()) == {1}
        killed, again = 0, 0
        for i, share in enumerate(rng.permutation(np.linspace(0.02, 0.98, KILLS))):
            folder, end = tmp_path / f"killed{i}", time.monotonic() + 600
            server.sold = collections.Counter()
            process = start(command(folder.name), log)
            while size(folder) < share * most and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            killed += process.wait(60) == -signal.SIGKILL
            assert start(command(folder.name), log).wait(600) == 0, log.read_text()
            assert contents(folder) == whole, f"killed at {share:.0%}"
            assert not files(folder / "live")
            # a request that was under way is the only one that may be sent again
            assert sum(server.sold.values()) - len(server.sold) <= CONCURRENCY
            again += sum(server.sold.values()) - len(server.sold)
            sent = [json.loads(x) for x in (folder / "verdicts.jsonl").read_text().splitlines()]
            assert len(sent) >= len(server.sold)
    assert killed >= KILLS - 2
    print(f"{killed} kills, {again} requests under way sent again")
