"""Write files atomically, read and write small safetensors files, and parse header fields."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxpersona.ckpts.tensorfile import READABLE, Entry, pieces, read_header, read_slice

from jaxpersona.errors import UserError
from jaxpersona.inputs import parse_json, require_file
from jaxpersona.models.params import SCHEME

_TEMPORARY = re.compile(r"\.(.+)\.([0-9]{1,18})\.tmp")


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path; if the block succeeds, fsync the file and rename it to `path`.

    Missing parent folders are created. If the block fails, the temporary file is removed.

    Raises:
      UserError: the file cannot be written, or the block raises an OSError.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # `leftovers` parses this name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # with an invalid parent folder, `unlink` fails too
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a new temporary folder; if the block succeeds, rename it to `folder`.

    Missing parent folders are created. If the block fails, the temporary folder is removed.

    Args:
      folder: an absolute path that does not exist or is an empty folder.

    Raises:
      UserError: `folder` is a file, is not empty or cannot be written, or the block raises an
        OSError.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; give a new folder")
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(folder: pathlib.Path) -> list[tuple[pathlib.Path, str, int]]:
    """List the temporary files in a folder that `atomic` created and has not yet removed.

    A process that is killed while it writes a file leaves its temporary file.

    Returns:
      For each temporary file, a tuple of its path, the name of its target file, and the id of the
      process that wrote it.
    """
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and entry.is_file(follow_symlinks=False):
                files.append((pathlib.Path(entry.path), match[1], int(match[2])))
    return files


def parse_field(text: str, field: str, kind: type) -> Any:
    """Parse a header field as JSON, check the type of the value and return it.

    Args:
      text: the text of the field.
      field: the name of the field, for error messages.
      kind: the type that the value must have, `dict` or `list`.

    Raises:
      UserError: the text is invalid JSON, is nested too deeply, contains an integer with too many
        digits, or has the wrong JSON type.
    """
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{field} is invalid JSON ({error})") from None
    except ValueError as error:
        raise UserError(f"{field} cannot be parsed ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{field} is {str(value)[:80]!r}; it must be a "
                        f"{'JSON object' if kind is dict else 'list'}")
    return value


def scheme_of(fingerprint: Any, scheme: Any) -> int:
    """Return the version of the algorithm that computed a file's fingerprint.

    The version is 1 if the file has a fingerprint but no scheme, because files of the first version
    do not store a scheme. It is the current `SCHEME` if the file has no fingerprint.

    Raises:
      UserError: the file has a fingerprint, and `scheme` is not a positive integer below a million.
    """
    if not fingerprint:
        return SCHEME
    if scheme in (None, ""):
        return 1
    if not re.fullmatch(r"[1-9][0-9]{0,5}", str(scheme)):
        raise UserError(f"fingerprint_scheme is {str(scheme)[:40]!r}; it must be a positive "
                        "integer below a million")
    return int(scheme)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


def json_text(value: Any) -> str:
    """Serialize a value as JSON with sorted keys, two-space indentation and a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value to a file atomically, as JSON (`json_text`)."""
    write_text(path, json_text(value))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray],
                  metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal content always produces equal bytes.

    Tensors and metadata are sorted by name, because the safetensors library does not guarantee an
    order.
    """
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)


def header_of(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
              metadata: Mapping[str, str]) -> bytes:
    """Return the header that `write_tensors` writes, preceded by its length in 8 bytes.

    Args:
      shapes: the dtype and shape of each tensor, by name.
      metadata: the file's metadata, by key.
    """
    ordered = {name: shapes[name] for name in sorted(shapes)}
    return next(pieces(ordered, lambda _: np.empty(0), dict(sorted(metadata.items()))))


def _pieces(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[Any]:
    ordered = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    shapes = {name: (value.dtype, value.shape) for name, value in ordered.items()}
    return pieces(shapes, ordered.__getitem__, dict(sorted(metadata.items())))


def read_tensors(path: str | os.PathLike, limit: int | None = None,
                 ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all tensors and the metadata of a small safetensors file.

    Args:
      path: the file.
      limit: the maximum file size in bytes; None accepts any size.

    Returns:
      The arrays by tensor name, and the metadata.

    Raises:
      UserError: the file is missing, too large or invalid; the message names the file.
    """
    entries, metadata = read_entries(path, limit)
    return {name: read_slice(entry) for name, entry in entries.items()}, metadata


def read_entries(path: str | os.PathLike,
                 limit: int | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read a safetensors file's header; return the tensor entries by name, and the metadata.

    The arguments are as for `read_tensors`.

    Raises:
      UserError: as for `read_tensors`.
    """
    path = pathlib.Path(path)
    require_file(path, limit)
    entries, metadata, faults = read_header(path)
    faults += [f"{name}: dtype {entry.dtype} is not supported" for name, entry in entries.items()
               if entry.dtype not in READABLE]
    if not all(isinstance(value, str) for value in metadata.values()):
        faults.append("corrupt header (metadata values must be strings)")
    if faults:
        raise UserError(f"{path}: this safetensors file cannot be read ({'; '.join(faults)})")
    return entries, metadata
