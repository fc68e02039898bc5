"""The journal of an endpoint judge: an append-only file of all requests and answers.

Answers in the journal are reused, so no answer is paid for twice.

The first line identifies the file format. Each further line is a JSON object of one of three kinds:

    {"sent": key, "cost": c}                     a request before it is sent, and its maximum cost
    {"key": key, "said": text, "cost": c, …}     an answer and its cost
    {"failed": key, "error": text, "cost": c}    a failed request and its possible cost

All costs are in USD. If the outcome of a request is not recorded, its maximum cost is counted. A
key is a digest of the judge's model, its settings and the prompt. If a process is killed, the last
line may be incomplete; it is removed when the journal is opened again. No line is longer than
`LINE_BYTES`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import stat
import threading
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.inputs import is_finite

FORMAT = {"format": "jaxpersona-verdicts 1"}
LINE_BYTES = 1 << 20  # maximum size of a line; the client keeps 160 characters of an answer
_FIRST = json.dumps(FORMAT).encode() + b"\n"


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
      UserError: the file is not a regular file, cannot be written, is used by another process, or
        is damaged.
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
            # O_NONBLOCK: neither a pipe nor a device may block; it has no effect on regular files
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                                 | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self._release()
            raise UserError(f"{self.path}: is not a regular file; choose another file")
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
        """Append one line with a single `os.write` call, to avoid incomplete lines.

        Raises:
          UserError: the cost is invalid, the line is too long, or writing fails.
        """
        line = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        try:
            _cost(value)  # before the line is written, because `_read` refuses an invalid cost
        except UserError as error:
            raise UserError(f"{self.path}: cannot be written ({error})") from None
        if len(line) > LINE_BYTES:
            raise UserError(f"{self.path}: cannot be written (a line has {len(line)} bytes; the "
                            f"limit is {LINE_BYTES}); choose an endpoint with shorter answers")
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("only part of the line was written")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        self._count(value)

    def _count(self, value: dict[str, Any]) -> None:
        cost = _cost(value)
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
        """Read the file and remove an incomplete last line; in a new file, write the first line.

        Raises:
          UserError: a line is damaged or too long, or its cost is invalid.
        """
        end = number = 0
        with open(self._file, "rb", closefd=False) as file:
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                whole = line.endswith(b"\n")
                if number == 1 and not whole and not _FIRST.startswith(line):
                    raise self._damaged(number)
                if len(line) > LINE_BYTES:
                    raise UserError(f"{self.path}: line {number} has more than {LINE_BYTES} bytes; "
                                    "delete this line")
                if not whole:
                    os.ftruncate(self._file, end)
                    break
                try:
                    value = json.loads(line)
                    if number > 1:
                        self._count(value)
                    elif value != FORMAT:
                        raise ValueError
                except UserError as error:
                    raise UserError(f"{self.path}: line {number}: {error}, or delete this line"
                                    ) from None
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise self._damaged(number) from None
                end += len(line)
        if not end:
            os.write(self._file, _FIRST)

    def _damaged(self, number: int) -> UserError:
        """Return the error for a damaged line."""
        return UserError(f"{self.path}: line {number} is damaged; "
                         + ("the file is not a journal of a judge: choose another file"
                            if number == 1 else "delete this line"))


def _cost(value: dict[str, Any]) -> float:
    """Return the cost of a line in USD.

    A budget would not limit the cost if NaN or a negative number were accepted.

    Raises:
      UserError: the cost is not a finite number, or is negative.
      TypeError, KeyError: the line has no cost.
    """
    cost = value["cost"]
    if isinstance(cost, bool) or not is_finite(cost) or cost < 0:
        raise UserError(f"cost is {cost!r:.40}; give a finite number, at least 0")
    return float(cost)
