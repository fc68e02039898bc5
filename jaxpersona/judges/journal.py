"""The journal of an endpoint judge: an append-only file of all requests and answers.

Answers in the journal are reused, so no answer is paid for twice.

The first line identifies the file format. Each further line is a JSON object of one of three kinds:

    {"sent": key, "cost": c}                     a request before it is sent, and its maximum cost
    {"key": key, "said": text, "cost": c, …}     an answer and its cost
    {"failed": key, "error": text, "cost": c}    a failed request and its possible cost

All costs are in USD. If the outcome of a request is not recorded, its maximum cost is counted. A
key is a digest of the judge's model, its settings and the prompt. If a process is killed, the last
line may be incomplete; it is removed when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pathlib
import threading
from typing import Any

from jaxpersona.errors import UserError

FORMAT = {"format": "jaxpersona-verdicts 1"}


def key_of(identity: str, prompt: str) -> str:
    """Return the key of a request: 32 hexadecimal digits.

    Args:
      identity: the judge's model and settings, as text.
      prompt: the prompt.
    """
    text = json.dumps([identity, prompt]).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


class Journal:
    """An open journal, locked against other processes; its methods are thread-safe.

    Args:
      path: the file; it is created, with its folder, if it is missing.

    Attributes:
      calls: the number of requests in the journal.
      spent: the total cost of these requests in USD.

    Raises:
      UserError: the file cannot be written, is used by another process, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.calls, self.spent = 0, 0.0
        self._lock = threading.Lock()
        self._said: dict[str, tuple[str, float]] = {}
        self._open: dict[str, list[float]] = {}  # key → cost bounds of requests without an outcome
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: the code below must not truncate the target of a symbolic link
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
        """Return the answer for a key and its cost in USD, or None if there is no answer."""
        with self._lock:
            return self._said.get(key)

    def sent(self, key: str, bound: float) -> None:
        """Record a request that costs at most `bound` USD, before it is sent."""
        with self._lock:
            self._append({"sent": key, "cost": bound})

    def answered(self, key: str, said: str, cost: float, **about: Any) -> None:
        """Record the answer to a request, its cost in USD, and any further fields in `about`."""
        with self._lock:
            self._append({"key": key, "said": said, "cost": cost, **about})

    def failed(self, key: str, error: str, cost: float) -> None:
        """Record a failed request and its possible cost in USD."""
        with self._lock:
            self._append({"failed": key, "error": error, "cost": cost})

    def close(self) -> None:
        """Flush the file to disk, close it and unlock it."""
        with self._lock:
            if self._file >= 0:
                os.fsync(self._file)
                self._release()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self._release()

    def _release(self) -> None:
        """Close the file descriptor, which also unlocks the file."""
        file, self._file = self._file, -1
        os.close(file)

    def _append(self, value: dict[str, Any]) -> None:
        """Append one line with a single `os.write` call, to avoid incomplete lines."""
        line = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("only part of the line was written")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        self._count(value)

    def _count(self, value: dict[str, Any]) -> None:
        cost = float(value["cost"])
        if not math.isfinite(cost):
            raise ValueError("the cost is not finite")
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
        """Read the file and remove an incomplete last line; in a new file, write the first line."""
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
                except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
                    fine = False
                if not fine:
                    raise UserError(f"{self.path}: line {number} is damaged; "
                                    + ("the file is not a journal of a judge: choose another file"
                                       if number == 1 else "delete this line"))
                end += len(line)
        if not end:
            os.write(self._file, json.dumps(FORMAT).encode() + b"\n")
