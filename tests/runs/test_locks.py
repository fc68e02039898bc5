"""Locks: one writer per run folder, and safe removal of leftover files."""
# ruff: noqa: F811 (fixtures of another module are imported and then named as arguments)

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from test_damages import SETTINGS, contents, finished, refused, resume, run  # noqa: F401

from jaxpersona.runs.run import Run

HOLD = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.write(handle, b"process 77 on elsewhere")
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("name", [".lock", ".lock.3"])
def test_a_second_process_is_refused_until_the_first_has_ended(finished, run, name):
    """Any process of the first run blocks the second; a killed process does not."""
    first = subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(run / name)], text=True,
                             stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == "held\n"
        refused(run, f"{run} is in use by process 77 on elsewhere", "wait until")
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    resume(run)
    assert contents(run) == contents(finished / "run")


def test_one_process_holds_a_folder_once(run):
    manifest = json.loads((run / "run.json").read_text())
    with Run.open(run, manifest):
        with pytest.raises(ValueError, match="in use by process "
                           f"{os.getpid()} on {re.escape(socket.gethostname())}"):
            resume(run)
        # reading does not need the lock
        assert Run.read(run).sample("ghost").means.shape == (4, 3, 32)
    resume(run)


def test_only_the_run_s_own_leftovers_are_removed(finished, run, tmp_path):
    mine = [".run.json.999999999.tmp", "rollouts/.ghost.jsonl.999999999.tmp",
            "samples/.default.safetensors.1.tmp", "scores/test/.tutor.json.5.tmp",
            "sums/.default.safetensors.5.tmp", ".status.json.8.tmp",
            ".axis.safetensors.7.tmp", ".roles.png.999999999.tmp"]
    kept = [".notes.tmp", "rollouts/.draft.5.tmp", "rollouts/.nobody.jsonl.5.tmp", ".x.y.5.tmp",
            f".pca.png.{os.getpid()}.tmp", "sub/.ghost.jsonl.5.tmp",
            "scores/test/.ghost.jsonl.5.tmp", "scores/mine/.ghost.json.5.tmp"]
    for name in (*mine, *kept):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (run / ".folder.5.tmp").mkdir()
    before = contents(run)
    refused(run, "contains another run", settings=dataclasses.replace(SETTINGS, seed=9))
    assert contents(run) == before
    resume(run)
    assert set(contents(run)) == set(contents(finished / "run")) | set(kept)
    assert (run / ".folder.5.tmp").is_dir()


def test_a_lock_file_is_never_another_file_of_the_user(run, tmp_path):
    """Link targets are not truncated, and files with similar names are kept."""
    mine = tmp_path / "mine.txt"
    mine.write_text("keep me")
    notes = run / ".lock.notes"
    notes.write_text("keep me too")
    resume(run)
    assert notes.read_text() == "keep me too" and not (run / ".lock").exists()
    (run / ".lock").symlink_to(mine)
    with pytest.raises(ValueError, match=r"\.lock: cannot be written"):
        resume(run)
    assert mine.read_text() == "keep me"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(ValueError, match=r"\.lock: cannot be written \(it is not a regular file"):
        resume(run)
