"""Control vectors in llama.cpp's GGUF format.

llama.cpp adds the tensor `direction.N` to the residual stream after block N (zero-based); this
package calls the same place layer N. The format cannot store layer 0, because llama.cpp rejects a
tensor `direction.0`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import struct
from typing import Any

import numpy as np
from jaxpersona.ckpts import gguf_header
from jaxpersona.ckpts.files import atomic, parse_field, scheme_of
from jaxpersona.ckpts.gguf_header import ARCHITECTURE_KEY, MAX_FIELDS, HeaderReader

from jaxpersona.errors import UserError
from jaxpersona.inputs import require_file
from jaxpersona.models.config import MAX_LAYERS
from jaxpersona.vectors.vector import CONTROL_VECTOR, Axis, Vector

ARCHITECTURE = "controlvector"
VECTOR_BYTES = 1 << 30  # maximum size of a vector file in bytes; about 8 MB for a 405B model
_MAX_ELEMENTS = 1 << 16  # maximum number of array elements in the metadata; `write` stores none
# metadata of a `Vector`, stored under the keys `jaxpersona.<name>`
_OURS = ("kind", "name", "model", "fingerprint", "fingerprint_scheme", "layers", "notes")


def read(path: str | os.PathLike) -> Vector:
    """Read a control vector; layers that are missing from the file are zero.

    The last layer is the highest one in the file or, if higher, the last layer of the direction
    that was passed to `write`. The result is an `Axis` if `write` stored an axis.

    Raises:
      UserError: the package gguf is not installed, or the file is missing, too large, damaged or
        not a control vector; the message names the file.
    """
    path = pathlib.Path(path)
    size = require_file(path)
    gguf = gguf_header.import_gguf(path)
    damaged = f"{path}: truncated or damaged, or not a GGUF file ({size} bytes)"
    try:
        check_bounds(path)
    except (struct.error, OSError, UnicodeDecodeError):
        raise UserError(damaged) from None
    except ValueError as error:
        raise UserError(f"{path}: invalid control vector ({error})") from None
    require_file(path, VECTOR_BYTES)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # gguf does not check bounds, so any NumPy error may occur
        raise UserError(damaged) from error
    try:
        return _build(gguf, reader, path.stem)
    except Exception as error:  # damaged fields raise many exception types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: invalid control vector ({reason})") from error


def check_bounds(path: pathlib.Path) -> None:
    """Check every count and length in the header before the gguf package parses the file.

    Raises:
      UserError: a count exceeds its limit, a field or the byte order is not supported, or the file
        is not a control vector.
      struct.error: the file is not a GGUF file, or its header declares more data than the file
        contains.
      UnicodeDecodeError: a string in the header is not UTF-8.
      OSError: the file cannot be read.
    """
    with gguf_header.mapped(path) as data:
        header = HeaderReader(data, _MAX_ELEMENTS)
        tensors, fields = header.n_tensors, header.n_fields
        excessive = tensors > MAX_LAYERS or fields > MAX_FIELDS
        read = header.read_fields(_check_architecture, keep=None, count=min(fields, MAX_FIELDS))
        _check_architecture(read.get(ARCHITECTURE_KEY))
        if excessive:
            raise UserError(f"the header declares {tensors} tensors and {fields} fields; the "
                            f"limits are {MAX_LAYERS} and {MAX_FIELDS}")
        header.read_tensors(VECTOR_BYTES // 4)


def _check_architecture(name: Any) -> None:
    if name != ARCHITECTURE:
        raise UserError(f"architecture is {name!r:.80}, not {ARCHITECTURE!r}")


def _build(gguf: Any, reader: Any, stem: str) -> Vector:
    def field(name: str) -> Any:
        entry = reader.get_field(name)
        return None if entry is None else entry.contents()

    _check_architecture(field(ARCHITECTURE_KEY))
    directions: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        number = re.fullmatch(r"direction\.([1-9]\d{0,8})", tensor.name)
        if number is None or int(number[1]) >= MAX_LAYERS:
            raise UserError(f"tensor {tensor.name!r} is not supported; the names of tensors "
                            f"must be direction.1 to direction.{MAX_LAYERS - 1}")
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if value.ndim != 1:
            raise UserError(f"{tensor.name} has {value.ndim} dimensions; it must be a vector")
        directions[int(number[1])] = value
    widths = {value.size for value in directions.values()}
    if len(widths) != 1 or 0 in widths:
        raise UserError("the file contains no direction" if not widths - {0} else
                        f"the directions have different widths {sorted(widths)}")
    ours = {name: field(f"jaxpersona.{name}") for name in _OURS}
    layers = max(*directions, int(ours["layers"] or 0) - 1) + 1
    if layers > MAX_LAYERS:
        raise UserError(f"jaxpersona.layers is {layers}; the maximum is {MAX_LAYERS}")
    values = np.zeros((layers, widths.pop()), np.float32)
    for number, value in directions.items():
        values[number] = value
    notes = parse_field(str(ours["notes"]), "jaxpersona.notes", dict) if ours["notes"] else {
        "source": CONTROL_VECTOR, "model_hint": str(field(f"{ARCHITECTURE}.model_hint"))}
    kind = Axis if ours["kind"] == "axis" else Vector
    return kind(values, str(ours["name"] or stem), str(ours["model"] or ""),
                str(ours["fingerprint"] or ""), notes=notes,
                fingerprint_scheme=scheme_of(ours["fingerprint"], ours["fingerprint_scheme"]))


def write(path: str | os.PathLike, vector: Vector) -> list[str]:
    """Write a direction as a control vector; the file is written atomically.

    Returns:
      Descriptions of the parts of the direction that GGUF cannot store.

    Raises:
      UserError: the package gguf is not installed, the direction was measured at a site other than
        "residual" or is zero at every layer above 0, or the file cannot be written.
    """
    path = pathlib.Path(path)
    vector.check_site("residual")
    chosen = [i for i, row in enumerate(vector.values) if i and row.any()]
    if not chosen:
        raise UserError(f"{path}: the direction is zero at every layer above 0, and GGUF cannot "
                        "store layer 0; write a .safetensors file instead")
    gguf = gguf_header.import_gguf(path)
    with atomic(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(chosen))
        ours = {"kind": vector.kind, "name": vector.name, "model": vector.model,
                "fingerprint": vector.fingerprint,
                "fingerprint_scheme": str(vector.fingerprint_scheme),
                "notes": json.dumps(dict(vector.notes), sort_keys=True)}
        for name, value in ours.items():
            writer.add_string(f"jaxpersona.{name}", value)
        writer.add_uint32("jaxpersona.layers", vector.n_layers)
        for layer in chosen:
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector.values[layer]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    lost = []
    if vector.values[0].any():
        lost.append("layer 0 (llama.cpp rejects direction.0)")
    if getattr(vector, "percentiles", None):
        lost.append("the thresholds")
    return lost
