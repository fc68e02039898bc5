"""An `axis` command killed at ten points resumes to the same bytes as an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import support as s

from jaxpersona.data.texts import Question, Role

ROLES = [Role("default", ("", "You are an AI assistant."), ""),
         *(Role(name, (f"You are a {name}.", f"Act as a {name}."), "")
           for name in ("ghost", "pirate", "tutor", "sage", "clown", "nurse"))]
QUESTIONS = [Question(i, f"What is thing {i}?") for i in range(4)]
KILLS = 10


def start(arguments, log):
    code = "import sys; from jaxpersona.cli.main import main; main()"
    with log.open("wb") as sink:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=sink, stderr=sink,
                                env={**os.environ, "JAX_PLATFORMS": "cpu"})


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in files(folder)
            if p.suffix != ".png"}


@pytest.mark.slow
def test_ten_kills_at_any_moment_lose_nothing(checkpoint, tmp_path):
    """Kill the command after a number of written files, not after a time."""
    texts, log = s.write_texts(tmp_path, ROLES, QUESTIONS), tmp_path / "log"

    def command(name):
        return s.axis_command(checkpoint, texts, tmp_path / name)

    assert start(command("whole"), log).wait(600) == 0, log.read_text()
    whole, count = contents(tmp_path / "whole"), len(files(tmp_path / "whole"))
    rng = np.random.default_rng(0)
    killed = 0
    for i, wanted in enumerate(np.linspace(1, count - 1, KILLS).astype(int)):
        folder, end = tmp_path / f"killed{i}", time.monotonic() + 600
        process = start(command(folder.name), log)
        while len(files(folder)) < wanted and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        killed += process.wait(60) == -signal.SIGKILL
        assert start(command(folder.name), log).wait(600) == 0, log.read_text()
        assert contents(folder) == whole, f"killed at {wanted} of {count} files"
    assert killed == KILLS
