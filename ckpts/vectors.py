"""Directions as files: safetensors whose header says what they are. Reading one runs no code."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from jaxpersona.ckpts.files import read_tensors, write_tensors

from jaxpersona.vectors import Axis, Vector

_FORMAT = "jaxpersona-vector"
_KINDS = {"vector": Vector, "axis": Axis}


def save_vector(path: str | os.PathLike, vector: Vector) -> None:
    """Write a direction, its percentiles and what it says of itself, atomically."""
    tensors = {"values": np.ascontiguousarray(vector.values)}
    if isinstance(vector, Axis):
        for population, table in vector.percentiles.items():
            for name, value in table.items():
                tensors[f"percentiles/{population}/{name}"] = np.ascontiguousarray(
                    value, np.float32
                )
    header = {
        "format": _FORMAT, "kind": vector.kind, "name": vector.name, "model": vector.model,
        "fingerprint": vector.fingerprint, "site": vector.site, "layer_base": "0",
        "sign": "+assistant" if vector.kind == "axis" else "+",
        "norm": "none", "notes": json.dumps(dict(vector.notes), sort_keys=True),
    }
    write_tensors(path, tensors, header)


def load_vector(path: str | os.PathLike) -> Vector:
    """Read a direction.

    Raises:
      ValueError: no such file, not a vector file, or one that says something this engine cannot
        follow (another sign, layer base or kind); the file is named.
    """
    tensors, header = read_tensors(path)
    try:
        return _build(header, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_axis(path: str | os.PathLike) -> Axis:
    """Read an Assistant Axis.

    Raises:
      ValueError: as `load_vector`, or the file holds another kind of direction.
    """
    found = load_vector(path)
    if not isinstance(found, Axis):
        raise ValueError(f"{path}: holds a {found.kind}, not an axis")
    return found


def _build(header: dict[str, str], tensors: dict[str, np.ndarray]) -> Vector:
    if header.get("format") != _FORMAT or "values" not in tensors:
        raise ValueError("not a jaxpersona vector file (its header does not say so)")
    kind = header.get("kind", "")
    notes = json.loads(header.get("notes", "{}"))
    if not isinstance(notes, dict):
        raise ValueError(f"notes is {notes!r}; it must be a table")
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {sorted(_KINDS)}")
    wanted = {"layer_base": "0", "sign": "+assistant" if kind == "axis" else "+"}
    for field, want in wanted.items():
        if header.get(field) != want:
            raise ValueError(f"{field} is {header.get(field)!r}; this engine reads {want!r}")
    fields: dict[str, Any] = {
        "values": tensors["values"], "name": header.get("name", kind),
        "model": header.get("model", ""), "fingerprint": header.get("fingerprint", ""),
        "site": header.get("site", "residual"), "notes": notes,
    }
    if kind == "axis":
        percentiles: dict[str, dict[str, np.ndarray]] = {}
        for key, value in tensors.items():
            if key.startswith("percentiles/"):
                parts = key.split("/")
                if len(parts) != 3:
                    raise ValueError(f"{key} is not percentiles/<population>/<name>")
                _, population, name = parts
                if value.shape != tensors["values"].shape[:1]:
                    raise ValueError(f"{key} has shape {value.shape}; it needs one value a layer")
                percentiles.setdefault(population, {})[name] = value
        fields["percentiles"] = percentiles
    return _KINDS[kind](**fields)
