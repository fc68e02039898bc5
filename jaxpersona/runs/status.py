"""The file status.json: a run's progress, rate and time left, for users and other programs."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import socket
import time
from typing import Any

from jaxpersona.ckpts.files import write_text
from jaxpersona.errors import UserError
from jaxpersona.inputs import is_finite, read_json
from jaxpersona.runs.compare import manifest_of
from jaxpersona.runs.files import MANIFEST, STATUS, alive

SECONDS = 5.0  # `update` writes only if the last write was at least this many seconds ago


class Status:
    """The progress of a run, which is written to status.json.

    Attributes:
      folder: the run folder.
      total: the number of rollouts of the complete run.
      done: the number of rollouts that the folder contains.
      to_judge: the number of rollouts of the complete run that have to be judged.
      judged: the number of rollouts with a verdict; failures of the judge do not count.
      failed: the number of rollouts on which the judge failed since this object was created.
      tokens: the number of tokens that this call generated.
      cost: the cost of this call's verdicts in USD.
      roles: the number of roles in the run.
      closed: the number of closed roles, whose final files are complete (`runs.closing`).
    """

    def __init__(self, folder: pathlib.Path, *, total: int, to_judge: int, roles: int,
                 write: bool = True, before: Status | None = None) -> None:
        """Start the clock; if `write` is False, status.json is never written.

        `before` is the progress of an earlier round of the same call, from which the start time,
        tokens and cost are carried over.
        """
        self.folder, self.total, self.to_judge, self.roles = folder, total, to_judge, roles
        self.done = self.judged = self.failed = self.tokens = self.closed = 0
        self.cost = 0.0
        self._write = write
        self._begun, self._last = time.time(), 0.0
        self._first: tuple[float, int, int, int] | None = None
        if before is not None:
            self._begun, self.tokens, self.cost = before._begun, before.tokens, before.cost

    def begin(self) -> None:
        """Write the progress to status.json, and measure all rates from this call on."""
        self._first = (time.time(), self.done, self.tokens, self.judged)
        self.write("running")

    def update(self) -> None:
        """Write the progress to status.json if the last write was at least `SECONDS` ago."""
        if time.time() - self._last >= SECONDS:
            self.write("running")

    def write(self, state: str) -> None:
        """Write the progress to status.json; `state` is "running", "stopped" or "complete"."""
        self._last = time.time()
        if self._write:
            write_text(self.folder / STATUS, json.dumps(self.value(state), indent=2) + "\n")

    def value(self, state: str) -> dict[str, Any]:
        """Return the progress as a JSON object with the given state."""
        start, done, tokens, judged = self._first or (self._begun, self.done, self.tokens,
                                                      self.judged)
        spent = max(time.time() - start, 1e-9)
        rate, scored = (self.done - done) / spent, (self.judged - judged) / spent
        left = [count / speed for count, speed in (
            (self.total - self.done, rate), (self.to_judge - self.judged, scored))
            if count and speed]
        unknown = self.total > self.done and not rate
        return {
            "state": state, "process": os.getpid(), "host": socket.gethostname(),
            "started": _iso(self._begun), "updated": _iso(time.time()),
            "seconds": round(time.time() - self._begun, 1),
            "rollouts": self.done, "rollouts_total": self.total,
            "verdicts": self.judged, "verdicts_total": self.to_judge,
            "verdicts_failed": self.failed,
            "roles_complete": self.closed, "roles": self.roles,
            "tokens": self.tokens, "rollouts_per_second": round(rate, 3),
            "tokens_per_second": round((self.tokens - tokens) / spent, 1),
            "seconds_left": None if unknown or state != "running" else round(max(left, default=0)),
            "cost": round(self.cost, 6),
        }


def read_status(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a run's status.json.

    The returned state is "stopped" instead of "running" if the process of the run was started on
    this machine and has ended.

    Raises:
      UserError: the folder contains no run of this format, its manifest is damaged, or
        status.json is missing or damaged.
    """
    folder = pathlib.Path(folder)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: contains no run; give the folder that was passed to "
                        "`jaxpersona axis` as --out")
    manifest_of(folder)
    found = read_json(folder / STATUS)
    needed = {"state": str, "process": int, "host": str, "rollouts": int, "rollouts_total": int,
              "verdicts": int, "verdicts_total": int, "verdicts_failed": int, "roles": int,
              "roles_complete": int, "updated": str, "seconds": float,
              "tokens": int, "tokens_per_second": float, "cost": float,
              "rollouts_per_second": float}
    if isinstance(found, dict) and found.get("seconds_left") is not None:
        needed["seconds_left"] = float
    wrong = [name for name, kind in needed.items() if not isinstance(found, dict)
             or not (is_finite(found.get(name)) if kind is float
                     else isinstance(found.get(name), kind))]
    if wrong:
        raise UserError(f"{folder / STATUS}: field {wrong[0]!r} is missing or invalid; resume "
                        "the run with `jaxpersona axis` to write the file again")
    if found["state"] == "running" and found["host"] == socket.gethostname() and not alive(
            found["process"]):
        found["state"] = "stopped"
    return found


def kept(folder: pathlib.Path) -> tuple[int, int, int]:
    """Count the rollouts, live verdicts and closed roles in a folder, without verifying the files.

    A role with a rollouts file counts as closed, and its live rollouts are not counted. Pipes,
    folders and other files that are not regular are ignored.

    Returns:
      (number of rollouts, number of verdicts in live files, number of closed roles).
    """
    complete, live = ([p for p in (folder / part).glob("*.jsonl")
                       if p.name[0] != "." and p.is_file()] for part in ("rollouts", "live"))
    judged = [p for p in live if p.name.endswith(".verdicts.jsonl")]
    played = [p for p in live if p not in judged]
    closed = {p.name for p in complete}
    again = [p for p in played if p.name in closed]
    return (sum(map(_lines, complete)) + sum(_lines(p) - 1 for p in played if p not in again),
            sum(_lines(p) - 1 for p in judged), len(complete))


def _lines(path: pathlib.Path) -> int:
    count = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            count += piece.count(b"\n")
    return count


def describe(found: dict[str, Any]) -> list[str]:
    """Format the content of status.json as lines of text for the user."""
    left = found.get("seconds_left")
    lines = [f"{found['state']}: {found['rollouts']:,} of {found['rollouts_total']:,} rollouts, "
             f"{found['verdicts']:,} of {found['verdicts_total']:,} verdicts, "
             f"{found['roles_complete']:,} of {found['roles']:,} roles complete"]
    if found["verdicts_failed"]:
        lines.append(f"replies on which the judge failed: {found['verdicts_failed']:,} (judged "
                     "again when the run is resumed)")
    if found["tokens"]:
        lines.append(f"rate: {found['rollouts_per_second']:,.2f} rollouts/s, "
                     f"{found['tokens_per_second']:,.0f} tokens/s")
    if found["state"] == "running" and left is not None:
        lines.append(f"time left: about {_duration(left)}")
    if found["cost"]:
        lines.append(f"cost of judging: ${found['cost']:,.4f}")
    lines.append(f"written {found['updated']}, {_duration(found['seconds'])} after the start, by "
                 f"process {found['process']} on {found['host']}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
