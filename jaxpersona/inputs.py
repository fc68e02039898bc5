"""Safe handling of untrusted files: checks of type, size and JSON depth, and escaped printing.

A path from a user may refer to a pipe, a device, a huge sparse file, or a JSON file nested beyond
Python's recursion limit. All readers in the package apply these checks first, so that a damaged or
malicious file causes an error and does not block the process or exhaust its memory.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
import sys
from collections.abc import Callable
from typing import Any

from jaxpersona.errors import UserError

TEXT_BYTES = 256 << 20  # maximum size of a text file; the largest known tokenizer file is 35 MB
MAX_DEPTH = 500  # maximum nesting depth of JSON: half of Python's default recursion limit, 1,000

# C0 controls (except tab and newline), DEL, C1 controls, and Unicode's bidirectional controls
# (except the marks U+200E and U+200F)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069]")
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def require_file(path: str | os.PathLike[str], limit: int | None = None) -> int:
    """Check that a path is a regular file; return its size in bytes.

    Args:
      path: the file; symbolic links are followed.
      limit: maximum size in bytes; None accepts any size.

    Raises:
      UserError: the file is missing, not regular or too large, or the path is invalid; the
        message names the path.
    """
    status = _stat(path)
    if status is None:
        raise UserError(f"{path}: no such file")
    kind = next((name for test, name in _KINDS if test(status.st_mode)), None)
    if kind is not None:
        raise UserError(f"{path}: cannot be read (it is {kind}; give a file)")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path} has {status.st_size} bytes; the limit is {limit}")
    return status.st_size


def require_folder(path: str | os.PathLike[str]) -> None:
    """Check that a path is a folder.

    Raises:
      UserError: the folder is missing or the path is invalid; the message names the path.
    """
    status = _stat(path)
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: no such folder")


def _stat(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # e.g. the name is too long or contains a null byte
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"
                        ) from None


def read_bytes(path: str | os.PathLike[str], limit: int = TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      UserError: as for `require_file`, or if reading fails; the message names the path.
    """
    size = require_file(path, limit)
    try:
        with open(path, "rb") as file:
            return file.read(min(max(size, 1 << 20), limit))  # files in /proc report size 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_json(text: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON with bounded nesting, so that recursive functions can process the value.

    Args:
      text: the JSON text.
      hook: passed to `json.loads` as `object_pairs_hook`.

    Raises:
      json.JSONDecodeError: the text is not valid JSON.
      UserError: nesting exceeds `MAX_DEPTH`, or an integer has more digits than Python's limit.
    """
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise UserError("nested too deeply") from None
    except (UserError, json.JSONDecodeError):
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise UserError(str(error)) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise UserError("nested too deeply")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
      UserError: as for `read_bytes`, or if the content is invalid JSON; the message names the path.
    """
    data = read_bytes(path)
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({error})") from None


def require_files(folder: pathlib.Path, suffixes: tuple[str, ...], limit: int = TEXT_BYTES) -> None:
    """Check a folder's files with the given suffixes before another library reads them.

    Raises:
      UserError: a file is not regular or is too large; the message names its path.
    """
    for path in sorted(folder.iterdir()):
        if path.name.endswith(suffixes) and not path.is_dir() and _stat(path) is not None:
            require_file(path, limit)


def printable(text: object) -> str:
    r"""Replace the control characters in `_CONTROL` with escape sequences such as \x1b.

    The pair \r\n becomes a newline. Text from a file can thus neither send control sequences to the
    terminal nor reorder the displayed characters.
    """
    plain = str(text).replace("\r\n", "\n")
    return _CONTROL.sub(lambda m: ascii(m.group())[1:-1], plain)


def is_finite(value: Any) -> bool:
    """Return whether a value is an int or a float within the range of finite Python floats."""
    largest = sys.float_info.max  # an integer of a JSON file may be larger
    return isinstance(value, (int, float)) and -largest <= value <= largest
