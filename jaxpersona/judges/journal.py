"""The journal of an endpoint judge: an append-only file of all requests and answers.

Answers in the journal are reused, so no answer is paid for twice.

The first line identifies the file format. Each further line is a JSON object of one of these kinds:

    {"sent": key, "cost": c}                     a request before it is sent, and its maximum cost
    {"key": key, "said": text, "cost": c, …}     an answer and its cost
    {"failed": key, "error": text, "cost": c}    a failed request and its possible cost
    {"batch": name, "id": "", "url": url}        a batch before it is submitted
    {"batch": name, "id": id, "url": url}        a batch that the endpoint accepted
    {"batch": name, "ended": status, "unsent": n}    the end of a batch

A request of a batch also has the batch's name, {"sent": key, "cost": c, "batch": name}. These lines
are written before the batch is submitted, so that no request is submitted in two batches. After the
end of a batch, each of its requests has an outcome. `unsent` is the number of requests of the batch
that the endpoint did not process, or refused because it expects another name of the field for the
maximum length of an answer; these requests do not count as calls.

All costs are in USD. If the outcome of a request is not recorded, its maximum cost is counted. A
key is a digest of the judge's model, its settings and the prompt. If a process is killed, the last
line may be incomplete; it is removed when the journal is opened again. No line is longer than
`LINE_BYTES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import stat
import threading
from collections.abc import Iterator
from typing import Any

from jaxpersona.brief import brief
from jaxpersona.errors import UserError
from jaxpersona.inputs import is_finite

FORMAT = {"format": "jaxpersona-verdicts 1"}
LINE_BYTES = 1 << 20  # maximum size of a line in bytes; only 160 characters of an answer are kept
_FIRST = json.dumps(FORMAT).encode() + b"\n"


@dataclasses.dataclass
class Outstanding:
    """A batch that has not ended.

    Attributes:
      name: the name that the judge gave to the batch.
      id: the endpoint's identifier; "" if no acceptance by the endpoint is recorded.
      url: the base URL of the endpoint.
      members: the keys of all requests in the batch.
      open: key → maximum cost in USD, for each of these requests that has no outcome.
    """

    __repr__ = brief

    name: str
    id: str = ""
    url: str = ""
    members: set[str] = dataclasses.field(default_factory=set)
    open: dict[str, float] = dataclasses.field(default_factory=dict)


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
      path: the path of the file.
      calls: the number of requests in the journal, including failed ones, without `unsent` ones.
      spent: the total cost in USD; a request without an outcome counts with its maximum cost.
      batches: name → `Outstanding`, for each batch that has not ended.

    Raises:
      UserError: the file is not a regular file, cannot be written, is used by another process, or
        is damaged, or a line is too long or has an invalid cost.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.calls, self.spent = 0, 0.0
        self._lock = threading.Lock()
        self._said: dict[str, tuple[str, float]] = {}
        self._open: dict[str, list[float]] = {}  # key → cost bounds of requests without an outcome
        self.batches: dict[str, Outstanding] = {}
        self._within: dict[str, str] = {}  # key → name of the outstanding batch that contains it
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: the code below must not truncate the target of a symbolic link
            # O_NONBLOCK: opening a pipe or a device must not block
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                                 | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self._release()
            raise UserError(f"{self.path} is not a regular file; choose another file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise UserError(f"{self.path} is in use by another judge or process; wait "
                            "until it ends, or choose another file") from None
        try:
            self._read()
        except BaseException:
            self._release()
            raise

    def get(self, key: str) -> tuple[str, float] | None:
        """Return (answer, cost in USD) for a request's key, or None if it has no answer."""
        with self._lock:
            return self._said.get(key)

    def batch_of(self, key: str) -> Outstanding | None:
        """Return the outstanding batch in which a key's request has no outcome yet, or None."""
        with self._lock:
            return self.batches.get(self._within.get(key, ""))

    def sent(self, key: str, bound: float, batch: str = "") -> None:
        """Record a request before it is sent.

        Args:
          key: the key of the request.
          bound: the maximum cost of the request in USD.
          batch: the name of the batch that contains the request; "" for a single request.
        """
        with self._lock:
            self._append({"sent": key, "cost": bound, **({"batch": batch} if batch else {})})

    def intended(self, batch: str, url: str) -> None:
        """Record that a batch will be submitted to the endpoint at `url`."""
        with self._lock:
            self._append({"batch": batch, "id": "", "url": url})

    def accepted(self, batch: str, identifier: str, url: str) -> None:
        """Record that the endpoint at `url` accepted a batch, with the endpoint's identifier."""
        with self._lock:
            self._append({"batch": batch, "id": identifier, "url": url})

    def ended(self, batch: str, status: str, unsent: int = 0) -> None:
        """Record a batch's end and its number of requests that do not count as calls (`unsent`)."""
        with self._lock:
            self._append({"batch": batch, "ended": status, "unsent": unsent})

    def flush(self) -> None:
        """Write the file to disk.

        Raises:
          UserError: writing fails.
        """
        with self._lock:
            self._sync()

    def answered(self, key: str, said: str, cost: float, **about: Any) -> None:
        """Record the answer to a request, its cost in USD, and any further fields in `about`."""
        with self._lock:
            self._append({"key": key, "said": said, "cost": cost, **about})

    def failed(self, key: str, error: str, cost: float) -> None:
        """Record a failed request and its possible cost in USD."""
        with self._lock:
            self._append({"failed": key, "error": error, "cost": cost})

    def close(self) -> None:
        """Flush the file to disk, close it and unlock it.

        Raises:
          UserError: writing fails; the file is closed and unlocked all the same.
        """
        with self._lock:
            if self._file >= 0:
                try:
                    self._sync()
                finally:
                    self._release()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self._release()

    def _sync(self) -> None:
        """Write the file to disk."""
        with self._writing():
            os.fsync(self._file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise a UserError for an operating system error while the file is written."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None

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
            if _is_request(value):  # `_read` raises an error for an invalid cost
                _cost(value)
        except UserError as error:
            raise UserError(f"{self.path}: cannot be written ({error})") from None
        if len(line) > LINE_BYTES:
            raise UserError(f"{self.path}: cannot be written (a line has {len(line)} bytes; the "
                            f"limit is {LINE_BYTES}); choose an endpoint with shorter answers")
        with self._writing():
            if os.write(self._file, line) != len(line):
                raise OSError("only part of the line was written")
        self._count(value)

    def _count(self, value: dict[str, Any]) -> None:
        if not _is_request(value):
            self._count_batch(value)
            return
        cost = _cost(value)
        if "sent" in value:
            self.calls += 1
            key = value["sent"]
            self._open.setdefault(key, []).append(cost)
            if "batch" in value:
                held = self._batch(value)
                held.members.add(key)
                held.open[key], self._within[key] = cost, held.name
        else:
            key = value["key"] if "key" in value else value["failed"]
            if bounds := self._open.get(key):
                self.spent -= bounds.pop()
            if (name := self._within.pop(key, None)) is not None:
                self.batches[name].open.pop(key, None)
            if "key" in value:
                self._said[key] = str(value["said"]), cost
        self.spent += cost

    def _count_batch(self, value: dict[str, Any]) -> None:
        """Count a line about a batch.

        Raises:
          KeyError, ValueError, TypeError: the line is damaged.
        """
        if "ended" not in value:
            held = self._batch(value)
            held.id, held.url = value["id"] and _text(value["id"]), _text(value["url"])
            return
        unsent = value["unsent"]
        if type(unsent) is not int or not 0 <= unsent <= self.calls:
            raise ValueError
        self.calls -= unsent
        held = self.batches.pop(_text(value["batch"]), None)
        for key in () if held is None else held.open:
            self._within.pop(key, None)

    def _batch(self, value: dict[str, Any]) -> Outstanding:
        name = _text(value["batch"])
        return self.batches.setdefault(name, Outstanding(name))

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
                    with self._writing():
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
            with self._writing():
                os.write(self._file, _FIRST)

    def _damaged(self, number: int) -> UserError:
        """Return the error for the damaged line `number`, counted from 1."""
        return UserError(f"{self.path}: line {number} is damaged; "
                         + ("the file is not a journal of a judge: choose another file"
                            if number == 1 else "delete this line"))


def _is_request(value: dict[str, Any]) -> bool:
    """Return whether a line is about a single request and has a cost, instead of about a batch."""
    return "sent" in value or "key" in value or "failed" in value


def _text(value: Any) -> str:
    """Return a value if it is non-empty text.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _cost(value: dict[str, Any]) -> float:
    """Return the cost in USD that a line of the journal records.

    NaN and negative costs are errors, because they could hide that the budget is exceeded.

    Raises:
      UserError: the cost is not a finite number, or is negative.
      TypeError, KeyError: the line has no cost.
    """
    cost = value["cost"]
    if isinstance(cost, bool) or not is_finite(cost) or cost < 0:
        raise UserError(f"cost is {cost!r:.40}; give a finite number, at least 0")
    return float(cost)
