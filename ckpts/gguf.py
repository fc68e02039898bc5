"""Control vectors as GGUF files, the form that llama.cpp adds to a model while it runs.

Tensor `direction.N` is added to the residual stream after block N, counted from zero: our layer N.
Layer 0 has no place in the format, and llama.cpp refuses a file that names it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

import numpy as np
from jaxpersona.ckpts.files import atomic, parse_field, require_file, scheme_of

from jaxpersona.config import MAX_LAYERS
from jaxpersona.vectors import CONTROL_VECTOR, Axis, Vector

ARCHITECTURE = "controlvector"
# keys `jaxpersona.<field>`
_OURS = ("kind", "name", "model", "fingerprint", "fingerprint_scheme", "layers", "notes")


def _package(path: pathlib.Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: GGUF needs the package gguf: pip install 'jaxpersona[gguf]'"
                         ) from None
    return gguf


def read(path: str | os.PathLike) -> Vector:
    """Read a control vector; layers that the file does not name are zero.

    Raises:
      ValueError: no such file, the package gguf is not installed, or a file that is damaged or
        holds something else; the file is named.
    """
    path = pathlib.Path(path)
    require_file(path)
    gguf = _package(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception:  # it slices without looking, and NumPy's words about that help nobody
        raise ValueError(f"{path}: truncated or damaged, or no GGUF file ({path.stat().st_size} "
                         "bytes)") from None
    try:
        return _build(gguf, reader, path.stem)
    except Exception as error:  # damaged fields raise almost any kind
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path}: not a readable control vector ({said})") from None


def _build(gguf: Any, reader: Any, stem: str) -> Vector:
    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(f"its architecture is {architecture!r}, not {ARCHITECTURE!r}")
    directions: dict[int, np.ndarray] = {}
    for tensor in reader.tensors:
        number = re.fullmatch(r"direction\.([1-9]\d{0,8})", tensor.name)
        if number is None or int(number[1]) >= MAX_LAYERS:
            raise ValueError(f"tensor {tensor.name!r} is not direction.1 to "
                             f"direction.{MAX_LAYERS - 1}")
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if value.ndim != 1:
            raise ValueError(f"{tensor.name} has {value.ndim} dimensions; it must have one")
        directions[int(number[1])] = value
    widths = {value.size for value in directions.values()}
    if len(widths) != 1 or 0 in widths:
        raise ValueError("it holds no direction" if not widths - {0} else
                         f"its directions have the widths {sorted(widths)}")
    ours = {name: field(f"jaxpersona.{name}") for name in _OURS}
    layers = max(*directions, int(ours["layers"] or 0) - 1) + 1
    if layers > MAX_LAYERS:
        raise ValueError(f"jaxpersona.layers is {layers}; no model has so many")
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
    """Write a direction as a control vector, atomically, and return what the format leaves out.

    Raises:
      ValueError: the package gguf is not installed, the direction is not one of the residual
        stream, or it is zero beyond layer 0.
    """
    path = pathlib.Path(path)
    vector.check_site("residual")
    chosen = [i for i, row in enumerate(vector.values) if i and row.any()]
    if not chosen:
        raise ValueError(f"{path}: the direction is zero beyond layer 0, and GGUF holds no layer 0")
    gguf = _package(path)
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
        lost.append("layer 0 (llama.cpp refuses a direction.0)")
    if getattr(vector, "percentiles", None):
        lost.append("the thresholds")
    return lost
