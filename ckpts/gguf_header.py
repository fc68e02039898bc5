"""Read the headers of GGUF files (metadata fields and tensor infos) with bounds checks.

A header contains counts, fields (key, type, value) and one tensor info per tensor (name,
dimensions, type, offset). The gguf package allocates an object per declared array element without
checking the file size, so every count and length is checked here first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.extras import require

ARCHITECTURE_KEY = "general.architecture"
MAX_FIELDS = 1 << 16
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# the `struct` format character for each GGUF type id
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The declaration of one tensor in a GGUF header.

    Attributes:
      name: the tensor's name.
      shape: the shape in C order (the last dimension is contiguous).
      kind: the id of the ggml type.
      offset: the offset of the tensor's data in bytes, from the start of the data section.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def import_gguf(path: pathlib.Path) -> Any:
    """Import and return the optional package gguf; `path` is the file that needs it.

    Raises:
      UserError: the package is not installed; the message names the file.
    """
    return require("gguf", f"{path}: GGUF files need the package gguf")


@contextlib.contextmanager
def mapped(path: pathlib.Path) -> Iterator[mmap.mmap]:
    """Yield a read-only memory map of a GGUF file.

    Raises:
      struct.error: the file is too short for a GGUF header.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise struct.error("shorter than a GGUF header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


class HeaderReader:
    """A sequential reader of a header that never reads beyond the end of the file.

    Every method raises `struct.error` if the header declares more data than the file contains, and
    `UnicodeDecodeError` if a string is not UTF-8.

    Attributes:
      version: the format version.
      n_tensors, n_fields: the declared numbers of tensors and fields.
      at: the offset of the next read in the file, in bytes.
    """

    def __init__(self, data: mmap.mmap, max_elements: int) -> None:
        """Read the version and the numbers of tensors and fields.

        Args:
          data: the memory map of the file.
          max_elements: the maximum total number of elements in all metadata arrays.

        Raises:
          struct.error: the file is not a GGUF file.
          UserError: the file is in big-endian byte order.
        """
        self._data, self._size = data, len(data)
        self._max_elements, self._elements = max_elements, 0
        self.at = 4
        if data[:4] != b"GGUF":
            raise struct.error("not a GGUF file")
        self.version = self._number("I")
        if self.version & 0xFFFF == 0:  # a small version number in big-endian byte order
            raise UserError("big-endian byte order is not supported; convert the file to "
                            "little-endian")
        self.n_tensors, self.n_fields = self._number("Q"), self._number("Q")

    def read_fields(self, check_architecture: Callable[[str], None], *,
                    keep: Collection[str] | None = (), count: int | None = None) -> dict[str, Any]:
        """Read the metadata fields.

        Args:
          check_architecture: a function that is called with the architecture as soon as it is read;
            the function must raise an error if the architecture is not supported.
          keep: the keys of the string arrays to return. If None, only the field
            `general.architecture` is returned.
          count: the number of fields to read; None reads all.

        Returns:
          The values by key: numbers, booleans, strings, NumPy arrays, and lists of strings.

        Raises:
          UserError: a count exceeds its limit, a type is not supported, or a returned field is
            declared twice.
        """
        fields: dict[str, Any] = {}
        for _ in range(self.n_fields if count is None else count):
            key, kind = self._text(), self._number("I")
            if kind == _STRING:
                value: Any = self._text()
            elif kind == _ARRAY:
                value = self._array(keep is not None and key in keep)
            elif kind in _SCALARS:
                value = self._number(_SCALARS[kind])
            else:
                raise UserError(f"a field has the unknown type {kind}")
            if key == ARCHITECTURE_KEY and kind == _STRING:
                check_architecture(value)
            if value is not None and (keep is not None or key == ARCHITECTURE_KEY):
                if key in fields:
                    raise UserError(f"field {key!r:.80} is declared twice")
                fields[key] = value
        return fields

    def read_tensors(self, max_elements: int | None = None) -> list[TensorInfo]:
        """Read the tensor infos, which follow the metadata fields; return them in file order.

        Args:
          max_elements: the maximum total number of elements in all tensors; None sets no limit.

        Raises:
          UserError: a tensor has too many dimensions, or the tensors have too many elements.
        """
        infos, elements = [], 0
        for _ in range(self.n_tensors):
            name, dimensions = self._text(), self._number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise UserError(f"a tensor declares {dimensions} dimensions; the limit is "
                                f"{_MAX_DIMENSIONS}")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            elements += math.prod(shape)
            infos.append(TensorInfo(name, shape, self._number("I"), self._number("Q")))
        if max_elements is not None and elements > max_elements:
            raise UserError(f"the tensors declare {elements} elements; the limit is "
                            f"{max_elements}")
        return infos

    def _array(self, keep: bool) -> Any:
        """Read an array of numbers (as a NumPy array) or of strings (as a list).

        Unless `keep` is true, an array of strings is skipped, and the result is None.
        """
        kind, count = self._number("I"), self._number("Q")
        if count > self._max_elements:
            raise UserError(f"an array declares {count} elements; the limit is "
                            f"{self._max_elements}")
        self._elements += count
        if self._elements > self._max_elements:  # the gguf package would allocate this many objects
            raise UserError(f"the arrays declare at least {self._elements} elements; the limit is "
                            f"{self._max_elements}")
        if kind == _ARRAY:
            raise UserError("nested arrays are not supported")
        if kind == _STRING:
            if keep:
                return [self._text() for _ in range(count)]
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        if kind not in _SCALARS:
            raise UserError(f"an array has elements of the unknown type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        start = self.at
        self._skip(count * dtype.itemsize)
        return np.frombuffer(self._data[start : self.at], dtype)

    def _number(self, form: str) -> Any:
        value = struct.unpack_from("<" + form, self._data, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return value

    def _text(self) -> str:
        start = self.at + 8
        self._skip(self._number("Q"))
        return self._data[start : self.at].decode("utf-8")

    def _skip(self, size: int) -> None:
        if size > self._size - self.at:
            raise struct.error("past the end of the file")
        self.at += size
