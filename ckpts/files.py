"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxpersona.ckpts.tensorfile import READABLE, pieces, read_header, read_slice

from jaxpersona.inputs import parse_json, require_file


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary path beside `path`; flush and rename it when the block ends well.

    Raises:
      ValueError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file atomically: sorted keys, two spaces, one form for one value."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray],
                  metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content.

    Names and metadata are sorted; the library's own writer leaves their order to chance.
    """
    ordered = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    with atomic(path) as temporary, open(temporary, "wb") as file:
        shapes = {name: (value.dtype, value.shape) for name, value in ordered.items()}
        for piece in pieces(shapes, ordered.__getitem__, dict(sorted(metadata.items()))):
            file.write(piece)


def read_tensors(path: str | os.PathLike, limit: int | None = None,
                 ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a small safetensors file whole: its tensors and its metadata.

    Args:
      path: the file.
      limit: the largest size accepted, in bytes; None accepts any.

    Raises:
      ValueError: no such file, a larger one or not a readable one; the file is named.
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
    return {name: read_slice(entry) for name, entry in entries.items()}, metadata
