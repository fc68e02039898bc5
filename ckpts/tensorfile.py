"""One safetensors file: its header read and checked, a tensor's slice read, a file written.

The format is eight bytes of header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the bytes. Reading it here rather than through a memory map of the whole file keeps
one tensor at a time in memory, and lets every fault of a file be said at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxpersona.inputs import parse_json, require_file

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
_HEADER_LIMIT = 100_000_000  # the format's own bound on a header, in bytes
_MOST_DIMENSIONS = 16  # of a tensor; NumPy's own bound is 64, and no model's exceeds 4
_PIECE = 1 << 20  # bytes read at one time where they are cast, so that they are still in the cache
_ALIGN = 64  # the alignment at which JAX takes a host buffer over without a copy


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, dtype name, shape, and first byte in the file."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str], list[str]]:
    """Read and check a file's header.

    Returns:
      The tensors by name, the metadata, and the file's faults, each a line that names the file.
    """
    try:
        require_file(path)  # opening a pipe would wait for a writer
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _HEADER_LIMIT):
                return {}, {}, [f"{path.name}: truncated or no safetensors file ({total} bytes, "
                                f"header of {length})"]
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
        return {}, {}, [f"{path.name}: corrupt header (no table of tensors)"]
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
        raise ValueError("a name appears twice")
    return table


def _entry(path: pathlib.Path, value: Any, base: int) -> Entry | str:
    """Check one tensor's description; a string says what is wrong with it."""
    try:
        dtype, shape = value["dtype"], value["shape"]
        begin, end = value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return "corrupt description"
    if isinstance(shape, list) and len(shape) > _MOST_DIMENSIONS:  # their product takes for ever
        return f"it claims {len(shape)} dimensions"
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or end < begin:
        return "corrupt shape or byte range"
    if not isinstance(dtype, str) or dtype not in {*DTYPES, *_WIDTHS}:
        return f"dtype {dtype!r} is unknown"
    width = DTYPES[dtype].itemsize if dtype in DTYPES else _WIDTHS[dtype]
    if math.prod(shape) * width != end - begin:
        return f"{end - begin} bytes do not hold {dtype} {shape}"
    return Entry(path, dtype, tuple(shape), base + begin, end - begin)


def _layout_faults(path: pathlib.Path, entries: Iterable[Entry], base: int,
                   total: int) -> list[str]:
    """Check that the tensors fill the file from end to end without a hole or an overlap."""
    at = base
    for entry in sorted(entries, key=lambda e: (e.start, e.size)):
        if entry.start != at:
            return [f"{path.name}: corrupt header (byte ranges overlap or leave a hole)"]
        at += entry.size
    if at > total:
        return [f"{path.name}: truncated ({total} bytes of {at})"]
    if at < total:
        return [f"{path.name}: {total - at} bytes more than its header describes"]
    return []


def read_slice(entry: Entry, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Read a tensor, or a slice of it by unit-step slices, into fresh memory.

    Whole rows are read straight into place; columns are copied through a map of this one tensor.

    Raises:
      ValueError: the file cannot be read, or is shorter than its header says.
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
            source = np.memmap(entry.path, dtype, "r", entry.start, entry.shape)
            np.copyto(out, source[tuple(slice(*b) for b in bounds)])
    except (OSError, EOFError) as error:
        raise ValueError(f"{entry.path}: reading stopped: {error}") from None
    return out


def read_pieces(entry: Entry) -> Iterator[np.ndarray]:
    """Read a tensor in order as flat pieces; tensors of one shape have pieces of one size.

    Raises:
      ValueError: the file cannot be read, or is shorter than its header says.
    """
    dtype, total = DTYPES[entry.dtype], math.prod(entry.shape)
    step = _PIECE // 4
    try:
        for at in range(0, total, step):
            part = np.empty(min(step, total - at), dtype)
            _read_into(entry.path, entry.start + at * dtype.itemsize, part)
            yield part
    except (OSError, EOFError) as error:
        raise ValueError(f"{entry.path}: reading stopped: {error}") from None


def read_bytes_of(entry: Entry) -> Iterator[bytes]:
    """Read a tensor's bytes in order, in pieces of 1 MB.

    Raises:
      ValueError: the file cannot be read, or is shorter than its header says.
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
        raise ValueError(f"{entry.path}: reading stopped: {error}") from None


def read_as(entry: Entry, dtype: np.dtype) -> np.ndarray:
    """Read a whole tensor in another dtype, through a small buffer: it is never held twice.

    Raises:
      ValueError: the file cannot be read, or is shorter than its header says.
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
        raise ValueError(f"{entry.path}: reading stopped: {error}") from None
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
    """Allocate an array that JAX on a CPU can take over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGN, np.uint8)
    offset = -memory.ctypes.data % _ALIGN
    return memory[offset : offset + size].view(dtype).reshape(shape)


def pieces(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
           values: Callable[[str], np.ndarray], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Yield a file's bytes, tensor by tensor.

    Args:
      tensors: dtype and shape by name, in the order in which they are written.
      values: returns a tensor's values when its turn comes.
      metadata: strings for the header.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
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
    """Write files to temporary names, flush them to the disk, and only then rename them all.

    Args:
      folder: made where it does not exist.
      files: the bytes of each, in the order of renaming.
      stale: names that are removed before the first is renamed.

    Raises:
      ValueError: the folder cannot be written to.
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
        raise ValueError(f"{at}: cannot be written ({error.strerror or error})") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
