"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxpersona.ckpts.tensorfile import READABLE, Entry, pieces, read_header, read_slice

from jaxpersona.inputs import parse_json, require_file
from jaxpersona.models.params import SCHEME

_TEMPORARY = re.compile(r"\.(.+)\.([0-9]{1,18})\.tmp")


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary path beside `path`; flush and rename it when the block ends well.

    Raises:
      ValueError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as `leftovers` reads it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # a parent that is no folder has been named above
            temporary.unlink(missing_ok=True)


def leftovers(folder: pathlib.Path) -> list[tuple[pathlib.Path, str, int]]:
    """List the temporary files of `atomic` in a folder, which a killed process leaves behind.

    Returns:
      For each: its path, the name of the file that it was to become, and the process that wrote it.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            parts = _TEMPORARY.fullmatch(entry.name)
            if parts is not None and entry.is_file(follow_symlinks=False):
                found.append((pathlib.Path(entry.path), parts[1], int(parts[2])))
    return found


def parse_field(text: str, field: str, kind: type) -> Any:
    """Return what the JSON text of a header's field holds, a `dict` or a `list`.

    Raises:
      ValueError: not JSON, nested too deeply to read, or something of another kind.
    """
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{field} is not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{field} is not JSON of ours ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{field} is {str(value)[:80]!r}; it must be a "
                         f"{'table' if kind is dict else 'list'}")
    return value


def scheme_of(fingerprint: Any, scheme: Any) -> int:
    """Return the scheme of a file's fingerprint from its header's text.

    A file that has a fingerprint and does not say its scheme is older than schemes: it is of 1.

    Raises:
      ValueError: text that is no positive integer.
    """
    if not fingerprint:
        return SCHEME
    if scheme in (None, ""):
        return 1
    if not re.fullmatch(r"[1-9][0-9]{0,5}", str(scheme)):
        raise ValueError(f"fingerprint_scheme is {str(scheme)[:40]!r}; it must be a positive "
                         "integer")
    return int(scheme)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def json_text(value: Any) -> str:
    """Return a JSON file's text: sorted keys, two spaces, one form for one value."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file atomically, in the form of `json_text`."""
    write_text(path, json_text(value))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray],
                  metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content.

    Names and metadata are sorted; the library's own writer leaves their order to chance.
    """
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)


def header_of(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
              metadata: Mapping[str, str]) -> bytes:
    """Return the bytes with which `write_tensors` begins a file of such dtypes and shapes."""
    ordered = {name: shapes[name] for name in sorted(shapes)}
    return next(pieces(ordered, lambda _: np.empty(0), dict(sorted(metadata.items()))))


def _pieces(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[Any]:
    ordered = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    shapes = {name: (value.dtype, value.shape) for name, value in ordered.items()}
    return pieces(shapes, ordered.__getitem__, dict(sorted(metadata.items())))


def read_tensors(path: str | os.PathLike, limit: int | None = None,
                 ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a small safetensors file whole: its tensors and its metadata.

    Args:
      path: the file.
      limit: the largest size accepted, in bytes; None accepts any.

    Raises:
      ValueError: no such file, a larger one or not a readable one; the file is named.
    """
    entries, metadata = read_entries(path, limit)
    return {name: read_slice(entry) for name, entry in entries.items()}, metadata


def read_entries(path: str | os.PathLike,
                 limit: int | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read where a safetensors file's tensors lie, and its metadata; of the tensors nothing.

    Raises:
      ValueError: as `read_tensors`.
    """
    path = pathlib.Path(path)
    require_file(path, limit)
    entries, metadata, faults = read_header(path)
    faults += [f"{name}: dtype {entry.dtype} is not read here" for name, entry in entries.items()
               if entry.dtype not in READABLE]
    if not all(isinstance(value, str) for value in metadata.values()):
        faults.append("corrupt header (its metadata are not texts)")
    if faults:
        raise ValueError(f"{path}: not a readable safetensors file ({'; '.join(faults)})")
    return entries, metadata
