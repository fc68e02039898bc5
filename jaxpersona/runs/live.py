"""Live files: rollouts, response means and verdicts of a role, collected until it is closed.

    live/<role>.jsonl            one line per rollout, in the order in which the rollouts finished
    live/<role>.means            the response means of the n rollouts, [n, L, D] float32, no header
    live/<role>.verdicts.jsonl   one line per verdict of a judge

The first line of a JSONL file contains the role and its binding (`Run.binding`). Each new rollout
or verdict is appended as one line with a checksum. The checksum of a rollout also covers its
response mean. If a process is killed at any time, all complete lines stay valid, and an incomplete
line is ignored or, if `repair` is true, removed when the files are opened again. The same applies
to a line with a wrong checksum or without a rollout or verdict, and to all lines after it. A
symbolic link raises an error, because a repair would change or create files outside the run.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxpersona.ckpts.files import atomic
from jaxpersona.errors import UserError
from jaxpersona.inputs import is_finite, parse_json, require_file
from jaxpersona.runs.names import file_stem
from jaxpersona.runs.rollouts import is_rollout, rollout_key

FOLDER = "live"
SUFFIXES = (".jsonl", ".means", ".verdicts.jsonl")


class Live:
    """The live files of one role.

    Attributes:
      records: key → rollout, in the order in which the rollouts finished.
      verdicts: judge → key → verdict (a JSON object). A judge is given here and in all methods as
        "<name>/<digest of the rubric>".
      shape: (L, D), the shape of a response mean.
    """

    def __init__(self, folder: pathlib.Path, role: str, binding: str,
                 shape: tuple[int, int], *, repair: bool = True) -> None:
        """Read the files that exist, and remove invalid data from them if `repair` is true.

        Args:
          folder: the run folder.
          role: the name of the role.
          binding: the digest of the data that determine the role's rollouts (`Run.binding`); files
            with another binding are not valid.
          shape: (L, D), the shape of a response mean.
          repair: whether to remove invalid data from the files. If false, such data is ignored.

        Raises:
          UserError: a file cannot be read or written, or is a symbolic link or otherwise not a
            regular file.
        """
        stem = folder / FOLDER / file_stem(role)
        self._lines, self._means, self._judged = (
            stem.with_name(stem.name + suffix) for suffix in SUFFIXES)
        self._head = {"role": role, "binding": binding}
        self.shape, self._bytes = shape, 4 * shape[0] * shape[1]
        self.records: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, int] = {}
        self.verdicts: dict[str, dict[str, dict[str, Any]]] = {}
        try:
            self._read(repair)
        except OSError as error:
            raise UserError(f"{error.filename or self._lines}: cannot be read "
                            f"({error.strerror or error})") from None

    def add(self, record: Mapping[str, Any], mean: np.ndarray) -> None:
        """Append a rollout and its response mean [L, D] to the files, without fsync."""
        data = np.ascontiguousarray(mean, np.float32).tobytes()
        if not self.records:
            self._means.parent.mkdir(exist_ok=True)
            _write(self._means, b"", "wb")
            _write(self._lines, _line(self._head, b""), "wb")
        _write(self._means, data)  # before the line, whose checksum covers the mean
        _write(self._lines, _line(record, data))
        key = rollout_key(record)
        self._rows[key] = len(self.records)
        self.records[key] = dict(record)

    def judge(self, judge: str, verdicts: Mapping[str, Mapping[str, Any]]) -> None:
        """Append a judge's verdicts, a dict from key to verdict, to the live files."""
        if not self._judged.exists():
            self._judged.parent.mkdir(exist_ok=True)
            _write(self._judged, _line(self._head, b""), "wb")
        _write(self._judged, b"".join(_line({"judge": judge, "key": key, "verdict": verdict}, b"")
                                      for key, verdict in verdicts.items()))
        self.verdicts.setdefault(judge, {}).update(
            {key: dict(verdict) for key, verdict in verdicts.items()})

    def forget(self, judge: str) -> None:
        """Remove all verdicts of a judge from the live files."""
        self.verdicts.pop(judge, None)
        if not self.verdicts:
            self._judged.unlink(missing_ok=True)
            return
        with atomic(self._judged) as temporary:
            temporary.write_bytes(b"".join([_line(self._head, b""), *(
                _line({"judge": name, "key": key, "verdict": verdict}, b"")
                for name, verdicts in self.verdicts.items()
                for key, verdict in verdicts.items())]))

    def has_mean(self, key: str) -> bool:
        """Return whether the files contain the response mean of a rollout."""
        return key in self._rows

    def mean(self, key: str) -> np.ndarray:
        """Return the response mean of a rollout, [L, D] float32."""
        with open(self._means, "rb", opener=_no_link) as file:
            file.seek(self._rows[key] * self._bytes)
            return np.frombuffer(file.read(self._bytes), np.float32).reshape(self.shape)

    def keep_only(self, keys: set[str]) -> None:
        """Remove all verdicts, and all rollouts except those with the given keys."""
        kept = [(self.records[key], self.mean(key)) for key in self.records if key in keys]
        for path in (self._lines, self._means, self._judged):
            path.unlink(missing_ok=True)
        self.records, self._rows, self.verdicts = {}, {}, {}
        for record, mean in kept:
            self.add(record, mean)

    def _read(self, repair: bool) -> None:
        played, held, judged = (_size(p) for p in (self._lines, self._means, self._judged))
        if played is None:
            if repair:  # a process killed in `add` or `keep_only` may leave the means file behind
                self._means.unlink(missing_ok=True)
        else:
            valid, row = 0, -1
            means = self._lines if held is None else self._means
            with (open(self._lines, "rb", opener=_no_link) as lines,
                  open(means, "rb", opener=_no_link) as file):
                for line, value in _values(lines, file, self._bytes):
                    if value != self._head if row < 0 else not is_rollout(value):
                        break
                    if row >= 0:
                        key = rollout_key(value)
                        self._rows[key], self.records[key] = row, value
                    row, valid = row + 1, valid + len(line)
            if not repair:
                pass
            elif row <= 0:
                self._lines.unlink()
                self._means.unlink(missing_ok=True)
            elif valid < played or held != row * self._bytes:
                _cut(self._lines, valid)
                _cut(self._means, row * self._bytes)
        if judged is not None:
            valid, first = 0, True
            with open(self._judged, "rb", opener=_no_link) as lines:
                for line, value in _values(lines):
                    if value != self._head if first else not _is_verdict(value):
                        break
                    if not first:
                        by_key = self.verdicts.setdefault(value["judge"], {})
                        by_key[value["key"]] = value["verdict"]
                    first, valid = False, valid + len(line)
            if repair and not valid:
                self._judged.unlink()
            elif repair and valid < judged:
                _cut(self._judged, valid)


def _size(path: pathlib.Path) -> int | None:
    """Return the size of a live file, or None if it does not exist.

    Raises:
      UserError: the path is a symbolic link (even to no file), or not a regular file.
    """
    if path.is_symlink():
        raise UserError(f"{path}: cannot be read (it is a symbolic link; remove it, or replace it "
                        "with a copy of its target)")
    return require_file(path) if path.exists() else None


def _no_link(path: str, flags: int) -> int:
    """The `opener` of `open`; raises an OSError if `path` has become a link since `_size`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _cut(path: pathlib.Path, size: int) -> None:
    """Truncate a file to `size` bytes."""
    with open(path, "r+b", opener=_no_link) as file:
        file.truncate(size)


def _write(path: pathlib.Path, data: bytes, mode: str = "ab") -> None:
    try:
        with open(path, mode, opener=_no_link) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _line(value: Mapping[str, Any], data: bytes) -> bytes:
    """Return a line with a JSON value and a checksum of the value and of `data`."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    return b"%08x %s\n" % (zlib.crc32(data, zlib.crc32(text)), text)


def _values(lines: BinaryIO, means: BinaryIO | None = None,
            size: int = 0) -> Iterator[tuple[bytes, Any]]:
    """Yield each line of a file and its JSON value; stop at the first line that is not valid.

    Args:
      lines: the JSONL file, opened in binary mode.
      means: the file of response means, with one mean for each line after the first, or None.
      size: the number of bytes per mean.
    """
    for i, line in enumerate(lines):
        text, data = line[9:-1], means.read(size) if means is not None and i else b""
        if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(data, zlib.crc32(text)):
            return
        try:
            value = parse_json(text.decode("utf-8", "surrogatepass"))
        except ValueError:
            return
        yield line, value


def _is_verdict(value: Any) -> bool:
    """Return whether a JSON value is {"judge", "key", "verdict"}, with a valid verdict.

    See `closing.PLAIN` for the fields of a verdict.
    """
    if not isinstance(value, dict) or set(value) != {"judge", "key", "verdict"}:
        return False
    verdict = value["verdict"]
    if not isinstance(verdict, dict) or "score" not in verdict:
        return False
    score, refused = verdict["score"], verdict.get("refused", False)
    numbers = [verdict[name] for name in ("expected", "mass") if verdict.get(name) is not None]
    texts = [value["judge"], value["key"], verdict.get("raw", ""), verdict.get("error") or ""]
    return ((score is None or (type(score) is int and abs(score) < 2**53))
            and isinstance(refused, bool) and all(isinstance(text, str) for text in texts)
            and all(is_finite(x) for x in numbers))
