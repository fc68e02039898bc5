"""Numbers, thresholds and texts of a run's progress, computed by hand."""

from __future__ import annotations

import json
import os
import socket

import pytest

from jaxpersona.runs import status as module
from jaxpersona.runs.compare import FORMAT, sealed
from jaxpersona.runs.status import Status, describe, read_status

FOUND = {"state": "running", "rollouts": 1234, "rollouts_total": 20_000, "verdicts": 1100,
         "verdicts_total": 18_000, "roles_complete": 3, "roles": 1010, "verdicts_failed": 0,
         "tokens": 5, "rollouts_per_second": 1234.567, "tokens_per_second": 98_765.4,
         "seconds_left": 99.4, "cost": 0.0, "updated": "now", "seconds": 5999, "process": 7,
         "host": "here"}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def test_every_line_has_its_own_numbers():
    """Thousands are separated; times are in seconds, minutes and hours."""
    assert describe(FOUND) == [
        "running: 1,234 of 20,000 rollouts, 1,100 of 18,000 verdicts, 3 of 1,010 roles complete",
        "rate: 1,234.57 rollouts/s, 98,765 tokens/s", "time left: about 99 s",
        "written now, 100 min after the start, by process 7 on here"]
    more = describe({**FOUND, "verdicts_failed": 1002, "cost": 1234.5, "tokens": 0,
                     "state": "stopped"})
    assert more[1:3] == ["replies on which the judge failed: 1,002 (judged again when the run is "
                         "resumed)", "cost of judging: $1,234.5000"] and len(more) == 4


@pytest.mark.parametrize(("seconds", "wanted"), [
    (0, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"),
    (36_000, "10.0 h")])
def test_a_duration_has_the_unit_of_its_size(seconds, wanted):
    """The limits are 100 s and 100 min."""
    assert module._duration(seconds) == wanted


def test_the_progress_is_written_after_exactly_five_seconds(tmp_path, clock):
    """Not before, and never if `write` is false."""
    status = Status(tmp_path, total=10, to_judge=8, roles=2)
    status.begin()
    for step, wanted in ((4.75, 0), (0.25, 3)):
        clock[0] += step
        status.done = 3
        status.update()
        assert json.loads((tmp_path / "status.json").read_text())["rollouts"] == wanted
    (tmp_path / "status.json").unlink()
    hidden = Status(tmp_path, total=10, to_judge=8, roles=2, write=False)
    hidden.begin()
    hidden.write("complete")
    assert not (tmp_path / "status.json").exists()


def test_the_progress_has_all_counts_of_the_run(tmp_path, clock):
    """Rates count from `begin`, the time from the start of the object."""
    status = Status(tmp_path, total=100, to_judge=80, roles=4)
    status.done, status.judged, status.tokens = 20, 10, 30
    clock[0] += 10
    status.begin()
    clock[0] += 4
    status.done, status.judged, status.failed, status.tokens = 32, 18, 2, 130
    status.closed, status.cost = 1, 0.12345678
    assert status.value("running") == {
        "state": "running", "process": os.getpid(), "host": socket.gethostname(),
        "started": "1970-01-01T00:16:40+00:00", "updated": "1970-01-01T00:16:54+00:00",
        "seconds": 14.0, "rollouts": 32, "rollouts_total": 100, "verdicts": 18,
        "verdicts_total": 80, "verdicts_failed": 2, "roles_complete": 1, "roles": 4, "tokens": 130,
        "rollouts_per_second": 3.0, "tokens_per_second": 25.0, "seconds_left": 31,
        "cost": 0.123457}  # 62 verdicts at 2 a second; 68 rollouts at 3
    status.judged = 80
    assert status.value("running")["seconds_left"] == 23  # only the rollouts are left
    status.done = 100
    assert status.value("running")["seconds_left"] == 0


@pytest.mark.parametrize("name", [
    "state", "process", "host", "rollouts", "rollouts_total", "verdicts", "verdicts_total",
    "verdicts_failed", "roles", "roles_complete", "updated", "seconds", "tokens",
    "tokens_per_second", "cost", "rollouts_per_second"])
def test_a_field_of_the_progress_that_is_missing_is_named(tmp_path, name):
    """Every field that is printed is needed."""
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT})))
    Status(tmp_path, total=1, to_judge=1, roles=1).write("stopped")
    path = tmp_path / "status.json"
    fields = json.loads(path.read_text())
    assert read_status(tmp_path) == fields
    path.write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
    with pytest.raises(ValueError, match=f"field {name!r} is missing or invalid"):
        read_status(tmp_path)
