"""Safetensors files: header validation, reading of tensors and slices, and writing.

A file consists of an 8-byte header length, a JSON header with each tensor's dtype, shape and byte
range, and the data. A read loads only the requested tensor or slice; the whole file is never mapped
into memory. The errors in all entries of a header are reported together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.inputs import parse_json, require_file

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
READABLE = DTYPES | {name: np.dtype(kind) for name, kind in {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F64": np.float64,
}.items()}
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4,
           "I32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
_HEADER_LIMIT = 100_000_000  # maximum header size in bytes, as in the safetensors library
_MOST_DIMENSIONS = 16  # maximum number of dimensions; models need at most 4
_PIECE = 1 << 20  # maximum size of a read buffer in bytes, chosen to fit in the CPU cache
_ALIGN = 64  # alignment in bytes with which JAX can use a host buffer without copying it


@dataclasses.dataclass(frozen=True)
class Entry:
    """The dtype, shape and location of one tensor.

    Attributes:
      path: the file that contains the tensor.
      dtype: the dtype's name in the format, such as "BF16".
      shape: the tensor's shape.
      start: the offset of the tensor's first byte in the file.
      size: the size in bytes.
    """

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Convert the dtype of weights, given as a name or a type, to a NumPy dtype.

    Args:
      dtype: "float32", "bfloat16" or "float16", or the corresponding NumPy or JAX dtype.

    Raises:
      UserError: `dtype` is not one of these.
    """
    if isinstance(dtype, str):
        parsed = next((known for known in DTYPES.values() if known.name == dtype), None)
    else:
        try:
            parsed = np.dtype(dtype)
        except (TypeError, ValueError):
            parsed = None
    if parsed is None or parsed not in DTYPES.values():
        shown = repr(dtype) if parsed is None else parsed.name
        raise UserError(f"dtype is {shown}; it must be one of float32, bfloat16, float16")
    return parsed


def read_header(path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str], list[str]]:
    """Read and validate the header of a safetensors file.

    Returns:
      The tensor entries by name, the metadata (whose values are not checked), and a list of error
      messages, each of which begins with the file's name.
    """
    try:
        require_file(path)  # opening a pipe would block
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _HEADER_LIMIT):
                return {}, {}, [f"{path.name}: truncated or not a safetensors file ({total} "
                                f"bytes, header length {length})"]
            text = file.read(length)
    except OSError as error:
        return {}, {}, [f"{path.name}: not readable ({error.strerror})"]
    except ValueError as error:
        return {}, {}, [str(error).replace(str(path), path.name)]
    try:
        raw = parse_json(text.decode("utf-8"), _no_twice)
    except ValueError as error:
        return {}, {}, [f"{path.name}: corrupt header ({error})"]
    if not isinstance(raw, dict):
        return {}, {}, [f"{path.name}: corrupt header (not a JSON object)"]
    metadata = raw.pop("__metadata__", {})
    metadata = metadata if isinstance(metadata, dict) else {}
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    for name, value in raw.items():
        entry = _entry(path, value, 8 + length)
        if isinstance(entry, str):
            faults.append(f"{path.name}: {name}: {entry}")
        else:
            entries[name] = entry
    if not faults:
        faults = _layout_faults(path, entries.values(), 8 + length, total)
    return entries, metadata, faults


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise UserError("duplicate name")
    return table


def _entry(path: pathlib.Path, value: Any, base: int) -> Entry | str:
    """Validate a tensor's header entry; return an `Entry`, or an error message if it is invalid."""
    try:
        dtype, shape = value["dtype"], value["shape"]
        begin, end = value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return "corrupt header entry"
    if isinstance(shape, list) and len(shape) > _MOST_DIMENSIONS:  # `math.prod` could be very slow
        return f"declares {len(shape)} dimensions; at most {_MOST_DIMENSIONS} are supported"
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or end < begin:
        return "corrupt shape or byte range"
    if not isinstance(dtype, str) or dtype not in {*DTYPES, *_WIDTHS}:
        return f"unknown dtype {dtype!r}"
    width = DTYPES[dtype].itemsize if dtype in DTYPES else _WIDTHS[dtype]
    if math.prod(shape) * width != end - begin:
        return f"{dtype} {shape} does not match its byte range (size in bytes: {end - begin})"
    return Entry(path, dtype, tuple(shape), base + begin, end - begin)


def _layout_faults(path: pathlib.Path, entries: Iterable[Entry], base: int,
                   total: int) -> list[str]:
    """Check that the tensors fill the data section without gaps or overlaps; return any errors."""
    at = base
    for entry in sorted(entries, key=lambda e: (e.start, e.size)):
        if entry.start != at:
            return [f"{path.name}: corrupt header (byte ranges overlap or leave a gap)"]
        at += entry.size
    if at > total:
        return [f"{path.name}: truncated ({total} of {at} bytes)"]
    if at < total:
        return [f"{path.name}: bytes after the last tensor: {total - at}"]
    return []


def read_slice(entry: Entry, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Read a tensor, or the part of it selected by unit-step slices, into a new array.

    `index` contains a slice for each leading dimension; the remaining dimensions are read whole. If
    only the first dimension is sliced, the data are read directly into the result. Otherwise, they
    are copied from a memory map of this tensor.

    Raises:
      UserError: the file cannot be read, or is shorter than its header declares.
    """
    dtype = READABLE[entry.dtype]
    bounds = [s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=False)]
    bounds += [(0, n) for n in entry.shape[len(bounds):]]
    shape = tuple(stop - start for start, stop in bounds)
    out = aligned(shape, dtype)
    if out.size == 0:
        return out
    try:
        if bounds[1:] == [(0, n) for n in entry.shape[1:]]:
            row = math.prod(entry.shape[1:]) * dtype.itemsize
            first = bounds[0][0] * row if bounds else 0
            _read_into(entry.path, entry.start + first, out)
        else:
            if (end := os.stat(entry.path).st_size) < entry.start + entry.size:
                raise EOFError(f"the file ends at byte {end}")  # np.memmap raises a ValueError
            source = np.memmap(entry.path, dtype, "r", entry.start, entry.shape)
            np.copyto(out, source[tuple(slice(*b) for b in bounds)])
    except (OSError, EOFError) as error:
        raise UserError(f"{entry.path}: cannot be read ({error})") from None
    return out


def read_pieces(entry: Entry) -> Iterator[np.ndarray]:
    """Yield a tensor's values in order, as 1-D arrays of at most 2¹⁸ elements each.

    The number of elements per array does not depend on the dtype, so that two tensors of the same
    shape and different dtypes can be compared array by array.

    Raises:
      UserError: the file cannot be read, or is shorter than its header declares.
    """
    dtype, total = DTYPES[entry.dtype], math.prod(entry.shape)
    step = _PIECE // 4
    try:
        for at in range(0, total, step):
            part = np.empty(min(step, total - at), dtype)
            _read_into(entry.path, entry.start + at * dtype.itemsize, part)
            yield part
    except (OSError, EOFError) as error:
        raise UserError(f"{entry.path}: cannot be read ({error})") from None


def read_bytes_of(entry: Entry) -> Iterator[bytes]:
    """Yield a tensor's bytes in order, in pieces of at most 1 MiB.

    Raises:
      UserError: the file cannot be read, or is shorter than its header declares.
    """
    try:
        with open(entry.path, "rb") as file:
            file.seek(entry.start)
            for at in range(0, entry.size, _PIECE):
                size = min(_PIECE, entry.size - at)
                part = file.read(size)
                if len(part) < size:
                    raise EOFError(f"the file ends at byte {entry.start + at + len(part)}")
                yield part
    except (OSError, EOFError) as error:
        raise UserError(f"{entry.path}: cannot be read ({error})") from None


def read_as(entry: Entry, dtype: np.dtype) -> np.ndarray:
    """Read a whole tensor and cast it to `dtype`.

    The values are cast through a buffer of at most 1 MiB, so no second array of the tensor's
    size is allocated.

    Raises:
      UserError: the file cannot be read, or is shorter than its header declares.
    """
    source = DTYPES[entry.dtype]
    if source == dtype:
        return read_slice(entry)
    out = aligned(entry.shape, dtype)
    flat = out.reshape(-1)
    buffer = np.empty(min(flat.size, _PIECE // source.itemsize), source)
    try:
        for at in range(0, flat.size, max(buffer.size, 1)):
            part = buffer[: flat.size - at]
            _read_into(entry.path, entry.start + at * source.itemsize, part)
            np.copyto(flat[at : at + part.size], part, casting="unsafe")
    except (OSError, EOFError) as error:
        raise UserError(f"{entry.path}: cannot be read ({error})") from None
    return out


def _read_into(path: pathlib.Path, start: int, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise EOFError(f"the file ends at byte {start + done}")
            done += count


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an uninitialized array that JAX can use on a CPU without copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGN, np.uint8)
    offset = -memory.ctypes.data % _ALIGN
    return memory[offset : offset + size].view(dtype).reshape(shape)


def pieces(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
           values: Callable[[str], np.ndarray], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file: the header, then each tensor.

    Args:
      tensors: the dtype and shape of each tensor by name, in file order.
      values: a function from a tensor's name to its values, called just before the tensor is
        yielded.
      metadata: the file's metadata, by key.
    """
    names = {dtype: name for name, dtype in READABLE.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, (dtype, shape) in tensors.items():
        value = np.ascontiguousarray(values(name), dtype).reshape(shape)
        yield value.reshape(-1).view(np.uint8).data


def replace_files(folder: pathlib.Path, files: Mapping[str, Iterable[Any]],
                  stale: Iterable[str] = ()) -> None:
    """Write and fsync all files under temporary names, then rename them to their final names.

    Args:
      folder: the folder to write; created if missing.
      files: the content of each file as chunks of bytes, by file name. The files are renamed in the
        order of this mapping.
      stale: the names of files to remove before the first rename.

    Raises:
      UserError: a file cannot be written, renamed or removed.
    """
    at, temporary = folder, {n: folder / f".{n}.{os.getpid()}.tmp" for n in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in files.items():
            at = folder / name
            with open(temporary[name], "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for name, source in temporary.items():
            os.replace(source, folder / name)
    except OSError as error:
        raise UserError(f"{at}: cannot be written ({error.strerror or error})") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
