"""Read files of unknown origin: bounded in kind, size and depth, and printed without effects.

A path that a user names may be a pipe, a device, a sparse file of any size or a JSON text nested
beyond what Python functions can walk. Every reader of the package goes through the checks here
before it reads, so that a damaged or hostile file costs an error message and nothing else.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
from collections.abc import Callable
from typing import Any

TEXT_BYTES = 256 << 20  # the largest text file read; tokenizers' files, the largest, have 35 MB
MAX_DEPTH = 500  # of nested JSON: half of Python's limit on recursion, which readers depend on

# C0 and C1 controls without tab and newline, and the marks that reorder a line's characters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069]")
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def require_file(path: str | os.PathLike[str], limit: int | None = None) -> int:
    """Check that there is a regular file at a path, and return its size in bytes.

    Args:
      path: the file; symbolic links are followed.
      limit: the largest size accepted, in bytes; None accepts any.

    Raises:
      ValueError: no such file, something else than a regular file, a larger one, or a name that
        the system refuses; the path is named.
    """
    found = _stat(path)
    if found is None:
        raise ValueError(f"{path}: no such file")
    kind = next((name for test, name in _KINDS if test(found.st_mode)), None)
    if kind is not None:
        raise ValueError(f"{path}: cannot be read (it is {kind}; give a file)")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{path}: has {found.st_size} bytes; at most {limit} are read here")
    return found.st_size


def require_folder(path: str | os.PathLike[str]) -> None:
    """Check that there is a folder at a path.

    Raises:
      ValueError: no such folder, or a name that the system refuses; the path is named.
    """
    found = _stat(path)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path}: no such folder")


def _stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # too long a name, a folder that is closed, a null byte
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"
                         ) from None


def read_bytes(path: str | os.PathLike[str], limit: int = TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      ValueError: as `require_file`, or the file cannot be read; the path is named.
    """
    size = require_file(path, limit)
    try:
        with open(path, "rb") as file:
            return file.read(max(size, 1 << 20))  # a file in /proc reports no size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_json(text: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse a JSON text whose nesting every function of the package can walk.

    Args:
      text: the text.
      hook: makes an object from its pairs, as `json.loads` takes it.

    Raises:
      json.JSONDecodeError: not JSON.
      ValueError: nested more than `MAX_DEPTH` deep, or a number of more digits than Python parses.
    """
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for item in level if isinstance(item, (dict, list))
                 for part in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
      ValueError: as `read_bytes`, or the content is not JSON; the path is named.
    """
    data = read_bytes(path)
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def require_files(folder: pathlib.Path, suffixes: tuple[str, ...], limit: int = TEXT_BYTES) -> None:
    """Check a folder's files of some suffixes before another library reads them.

    Raises:
      ValueError: one of them is no regular file or is too large; it is named.
    """
    for path in sorted(folder.iterdir()):
        if path.name.endswith(suffixes) and not path.is_dir() and _stat(path) is not None:
            require_file(path, limit)


def printable(text: object) -> str:
    r"""Return a text with every control character but tab and newline written out, as \x1b.

    A terminal then shows a name or a note from a file and obeys nothing in it.
    """
    plain = str(text).replace("\r\n", "\n")
    return _CONTROL.sub(lambda m: ascii(m.group())[1:-1], plain)
