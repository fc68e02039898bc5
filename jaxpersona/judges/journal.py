"""The append-only file of a paid judge: every call and every verdict, so that none is paid twice.

Each line is a JSON object. `{"sent": key, "cost": c}` is written before a request is sent, with an
upper bound of its cost. `{"key": key, "said": text, "cost": c, …}` is its answer, and `{"failed":
key, "error": text, "cost": c}` a request without one. A key is a digest of the judge's rubric,
model and prompt. After `kill -9` the last line may be incomplete; it is removed when the file is
opened. A request without an outcome counts with its bound.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import threading
from typing import Any

from jaxpersona.errors import UserError

FORMAT = {"format": "jaxpersona-verdicts 1"}


def key_of(identity: str, prompt: str) -> str:
    """Return 32 hexadecimal digits that identify a judge and a prompt."""
    text = json.dumps([identity, prompt]).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


class Journal:
    """An open journal, locked against other processes; its methods may be called by any thread.

    Args:
      path: the file; it is created, with its folder, if it is missing.

    Attributes:
      calls: the number of requests that were sent, in this process and before.
      spent: the cost of all of them in USD.

    Raises:
      UserError: the file cannot be written, is in use, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.calls, self.spent = 0, 0.0
        self._lock = threading.Lock()
        self._said: dict[str, tuple[str, float]] = {}
        self._open: dict[str, list[float]] = {}  # key → bounds of requests without an outcome
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: the code below may cut the file
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                                 | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise UserError(f"{self.path}: is in use by another process; wait until it ends, or "
                            "choose another file") from None
        try:
            self._read()
        except BaseException:
            self._release()
            raise

    def get(self, key: str) -> tuple[str, float] | None:
        """Return an answer and what it cost, or None if there is none."""
        with self._lock:
            return self._said.get(key)

    def sent(self, key: str, bound: float) -> None:
        """Record that a request is about to be sent that costs at most `bound` USD."""
        with self._lock:
            self._append({"sent": key, "cost": bound})

    def answered(self, key: str, said: str, cost: float, **about: Any) -> None:
        """Record the answer to a request that was sent, and its cost in USD."""
        with self._lock:
            self._append({"key": key, "said": said, "cost": cost, **about})

    def failed(self, key: str, error: str, cost: float) -> None:
        """Record a request without an answer, and what it may have cost in USD."""
        with self._lock:
            self._append({"failed": key, "error": error, "cost": cost})

    def close(self) -> None:
        """Write the file to the disk and unlock it."""
        with self._lock:
            if self._file >= 0:
                os.fsync(self._file)
                self._release()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self._release()

    def _release(self) -> None:
        """Close the file, which also unlocks it; a number is closed once."""
        file, self._file = self._file, -1
        os.close(file)

    def _append(self, value: dict[str, Any]) -> None:
        """Write one line with one call, so that a killed process leaves whole lines."""
        line = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("the line was written in part")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        self._count(value)

    def _count(self, value: dict[str, Any]) -> None:
        cost = float(value["cost"])
        if "sent" in value:
            self.calls += 1
            self._open.setdefault(value["sent"], []).append(cost)
        else:
            key = value["key"] if "key" in value else value["failed"]
            if bounds := self._open.get(key):
                self.spent -= bounds.pop()
            if "key" in value:
                self._said[key] = str(value["said"]), cost
        self.spent += cost

    def _read(self) -> None:
        """Read the file, and cut an incomplete last line."""
        with open(self.path, "rb") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, end)
                    break
                try:
                    value = json.loads(line)
                    if number == 1:
                        fine = value == FORMAT
                    else:
                        self._count(value)
                        fine = True
                except (ValueError, TypeError, KeyError, RecursionError):
                    fine = False
                if not fine:
                    raise UserError(f"{self.path}: line {number} is damaged; "
                                    + ("it is not a file of verdicts: choose another"
                                       if number == 1 else "delete this line"))
                end += len(line)
        if not end:
            os.write(self._file, json.dumps(FORMAT).encode() + b"\n")
