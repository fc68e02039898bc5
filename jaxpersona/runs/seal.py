"""Sealed files: files of tensors or JSON that contain a digest of their own content.

A sealed file also contains the name of its role, and the digest of the data that determine the
role's rollouts (`Run.binding`). The functions that read sealed files therefore reject files that
were edited, damaged, or copied from another role or run.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxpersona.ckpts.files import header_of, json_text, read_entries, write_json, write_tensors
from jaxpersona.ckpts.tensorfile import READABLE, read_bytes_of, read_slice
from jaxpersona.errors import UserError
from jaxpersona.inputs import TEXT_BYTES, read_bytes
from jaxpersona.runs.damage import Damaged

_CHANGED = "differs from the content that the run wrote"


def sha256(data: bytes) -> str:
    """Return the SHA-256 digest of bytes as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of a JSON value's SHA-256 digest."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass"))[:16]


def write_sealed(path: pathlib.Path, tensors: Mapping[str, np.ndarray],
                 about: Mapping[str, str]) -> None:
    """Write tensors and metadata to a file, with a digest of both.

    The metadata `about` must have the keys `role` and `binding`.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    sealed = _digest(about, {name: (x.dtype, x.shape) for name, x in arrays.items()},
                     lambda name: [arrays[name].reshape(-1).view(np.uint8).data])
    write_tensors(path, arrays, {**about, "digest": sealed})


def read_sealed(path: pathlib.Path, role: str, binding: str,
                ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors by name, and the metadata without the digest, of a sealed tensor file.

    The digest is verified before any tensor is loaded into memory.

    Raises:
      Damaged: the file is missing, was changed, or belongs to another role or run.
    """
    try:
        entries, about = read_entries(path)
        shapes = {name: (READABLE[e.dtype], e.shape) for name, e in entries.items()}
        with open(path, "rb") as file:
            header = header_of(shapes, about)
            same = file.read(len(header)) == header
    except (ValueError, OSError, KeyError) as error:  # KeyError: unknown dtype
        raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
    stored = about.pop("digest", "")
    if about.get("binding") != binding or about.get("role") != role:
        raise Damaged(role, path, "belongs to another role or run")
    try:
        if not same or stored != _digest(about, shapes, lambda name: read_bytes_of(entries[name])):
            raise Damaged(role, path, _CHANGED)
        tensors = {name: read_slice(entry) for name, entry in entries.items()}
    except Damaged:
        raise
    except ValueError as error:  # a disk error, or the file was truncated
        raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
    return tensors, about


def write_sealed_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, which must have the fields `role` and `binding`, and add its digest."""
    write_json(path, {**value, "digest": sha256(json_text(dict(value)).encode())})


def read_sealed_json(path: pathlib.Path, role: str, binding: str) -> dict[str, Any]:
    """Return the JSON object in a file that `write_sealed_json` wrote, without the digest.

    Raises:
      Damaged: the file is missing, was changed, or belongs to another role or run.
    """
    try:
        data = read_bytes(path, TEXT_BYTES)
    except UserError as error:
        raise Damaged(role, path, str(error).removeprefix(f"{path}: ")) from None
    try:
        value = json.loads(data)
        stored = value.pop("digest")
        text = json_text(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(role, path, "not a JSON object with a digest") from None
    if value.get("role") != role or value.get("binding") != binding:
        raise Damaged(role, path, "belongs to another role or run")
    whole = json_text({**value, "digest": stored}).encode("utf-8", "surrogatepass")
    if stored != sha256(text.encode("utf-8", "surrogatepass")) or data != whole:
        raise Damaged(role, path, _CHANGED)
    return value


def _digest(about: Mapping[str, str], shapes: Mapping[str, tuple[Any, tuple[int, ...]]],
            parts: Callable[[str], Iterable[Any]]) -> str:
    """Return the digest of a file's metadata and tensors; `parts(name)` yields a tensor's bytes."""
    total = hashlib.sha256(json_text(dict(about)).encode())
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        total.update(f"{name} {dtype.str} {shape}\n".encode())
        for part in parts(name):
            total.update(part)
    return total.hexdigest()
