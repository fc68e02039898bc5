"""Read and write directions and caps, in this package's file format and three others.

| suffix | read | written |
|---|---|---|
| .safetensors | this package's vector, axis or caps | yes |
| .pt | Assistant Axis, Persona Vectors (`torchfile`) | no, because it is a pickle |
| .gguf | control vectors (`gguf`) | yes, without layer 0 and thresholds |
| .npy | a bare [L, D] array | yes, values only |

Reading never executes code from a file.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
import warnings
from typing import Any

import numpy as np
from jaxpersona.ckpts import gguf, torchfile
from jaxpersona.ckpts.files import atomic, parse_field, read_tensors, scheme_of, write_tensors
from jaxpersona.ckpts.gguf import VECTOR_BYTES

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.inputs import require_file
from jaxpersona.models.config import MAX_LAYERS
from jaxpersona.models.params import SCHEME
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.saved import Saved
from jaxpersona.vectors.vector import Axis, Vector

_FORMAT = "jaxpersona-vector"
_KINDS = {"vector": Vector, "axis": Axis}
_SUFFIXES = (".safetensors", ".pt", ".gguf", ".npy")


@checked_call
def save_vector(path: str | os.PathLike, vector: Vector | Caps) -> list[str]:
    """Write a direction or caps to a file atomically; the file's suffix selects the format.

    Args:
      path: the file to write, with the suffix .safetensors, .gguf or .npy.
      vector: the direction, or caps (only as .safetensors).

    Returns:
      Descriptions of the parts that the format cannot store; an empty list for .safetensors.

    Raises:
      UserError: an argument has the wrong type, the suffix is not supported, the format cannot
        store the direction or caps, the package gguf is needed but not installed, or the file
        cannot be written.

    Examples:
      >>> import jaxpersona as jp
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "axis.safetensors"
      >>> jp.save_vector(path, jp.load_axis("mini"))
      []
    """
    if isinstance(path, (Vector, Caps)):
        raise UserError(f"path is {shown(path, 60)}; the path comes first: jp.save_vector(path, "
                        "vector)")
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"path is {shown(path, 60)}; give the path of a file")
    if not isinstance(vector, (Vector, Caps)):
        raise UserError(f"vector is of type {type(vector).__name__}; give a Vector, an Axis or "
                        "Caps: jp.Vector(array) for an array [L, D]")
    suffix = pathlib.Path(path).suffix.lower()
    if suffix == ".safetensors":
        _write(path, vector)
        return []
    if isinstance(vector, Caps) or suffix not in (".gguf", ".npy"):
        what = "caps are" if isinstance(vector, Caps) else "directions are"
        forms = ".safetensors" if isinstance(vector, Caps) else ".safetensors, .gguf or .npy"
        raise UserError(f"{path}: {what} written as {forms}; the suffix is {suffix or 'missing'}")
    if suffix == ".gguf":
        return gguf.write(path, vector)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, vector.values, allow_pickle=False)
    lost = {f"the kind ({vector.kind})": vector.kind != "vector", "the name": True,
            "the model": vector.model, "the fingerprint": vector.fingerprint,
            f"the site ({vector.site})": vector.site != "residual",
            "the thresholds": getattr(vector, "percentiles", {}), "the notes": vector.notes}
    return [what for what, held in lost.items() if held]


def load_any(path: str | os.PathLike, kind: str | None = None) -> Vector | dict[str, Caps]:
    """Read a direction or caps; the suffix of the file selects the format.

    Args:
      path: the file, or "mini" for the axis of the model "mini".
      kind: the kind of a bare tensor in a .pt file, if it cannot be inferred from the file name
        (see `torchfile.read`).

    Returns:
      A direction, or caps by experiment id.

    Raises:
      UserError: `path` is not a path, its suffix is unknown, the file is missing, damaged or
        unsafe, has too many layers or uses an unsupported convention, `kind` is invalid or does not
        apply, or the file needs PyTorch or gguf, which is not installed; the message states the
        reason.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"path is {shown(path, 60)}; give the path of a file, or 'mini'")
    if os.fspath(path) == "mini":  # takes precedence over a file with this name, as in `load`
        held = importlib.resources.files("jaxpersona.ckpts") / "mini" / "axis.safetensors"
        with importlib.resources.as_file(held) as file:
            return load_any(file, kind)
    loaded = _read_any(path, kind)
    if isinstance(loaded, Vector) and loaded.n_layers > MAX_LAYERS:
        raise UserError(f"{path} has {loaded.n_layers} layers; the maximum is "
                        f"{MAX_LAYERS}")
    return loaded


def _read_any(path: str | os.PathLike, kind: str | None) -> Vector | dict[str, Caps]:
    suffix = pathlib.Path(path).suffix.lower()
    if os.path.isdir(path):
        axis = os.path.join(path, "axis.safetensors")  # run folders store their axis in this file
        hint = f"did you mean {axis}?" if os.path.isfile(axis) else "give a file"
        raise UserError(f"{path} is a folder; {hint}")
    if kind is not None and suffix != ".pt":
        raise UserError(f"{path}: kind is {kind!r}, but it applies only to .pt files; omit kind")
    if suffix == ".pt":
        return torchfile.read(path, kind)
    if suffix == ".gguf":
        return _dated(path, gguf.read(path))
    if suffix == ".npy":
        return _read_array(pathlib.Path(path))
    if suffix != ".safetensors":
        raise UserError(f"{path}: the suffix must be one of {', '.join(_SUFFIXES)}")
    tensors, header = read_tensors(path, VECTOR_BYTES)
    try:
        if header.get("kind") == "caps":
            caps = _dated(path, _build_caps(header, tensors))
            return {caps.name: caps}
        return _dated(path, _build(header, tensors))
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None
    # formatting a deeply nested value for a message can raise RecursionError
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error


@checked_call
def load_vector(path: str | os.PathLike, *, kind: str | None = None) -> Vector:
    """Read a direction in any supported format (see the module docstring).

    Args:
      path: the file, or "mini" for the axis of the model "mini".
      kind: the kind of a bare tensor in a .pt file (see `load_any`).

    Raises:
      UserError: as for `load_any`, or the file contains caps.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "happy.safetensors"
      >>> written = jp.save_vector(path, jp.Vector(np.ones((8, 128)), name="happy"))
      >>> jp.load_vector(path)
      Vector('happy', [8, 128])
    """
    loaded = load_any(path, kind)
    if isinstance(loaded, dict):
        raise UserError(f"{path}: contains caps ({', '.join(list(loaded)[:4])}); read the file "
                        "with load_caps or pass it to `generate --cap`")
    return loaded


@checked_call
def load_axis(path: str | os.PathLike, *, kind: str | None = None) -> Axis:
    """Read an assistant axis in any supported format (see the module docstring).

    Args:
      path: the file, or "mini" for the axis of the model "mini".
      kind: the kind of a bare tensor in a .pt file (see `load_any`).

    Raises:
      UserError: as for `load_vector`, or the direction is not an axis.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.load_axis("mini")
      Axis('assistant', [8, 128], of 'mini', percentiles: all 9, default 9)
    """
    loaded = load_vector(path, kind=kind)
    if not isinstance(loaded, Axis):
        raise UserError(f"{path}: contains a {loaded.kind}, not an axis")
    return loaded


@checked_call
def load_caps(path: str | os.PathLike) -> dict[str, Caps]:
    """Read a file of caps; return a dict from experiment id to `Caps`.

    For a result `caps`, `caps[id].interventions()` returns the interventions for `generate`.

    Raises:
      UserError: as for `load_any`, or the file contains a direction instead of caps.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np, pathlib, tempfile
      >>> caps = jp.Caps(np.ones((1, 128)), layers=(4,), floors=np.ones(1), labels=("a",))
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "caps.safetensors"
      >>> written = jp.save_vector(path, caps)
      >>> jp.load_caps(path)
      {'caps': Caps('caps', 1 floor, layers 4 to 4)}
    """
    loaded = load_any(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: contains a direction (kind: {loaded.kind}), not caps")
    return loaded


def _dated(path: str | os.PathLike, found: Any) -> Any:
    """Return `found`; warn if its fingerprint has a scheme other than `SCHEME`."""
    scheme = found.fingerprint_scheme
    if found.fingerprint and scheme != SCHEME:
        detail = ("computed from a sample of the weights, so not unique" if scheme == 1 else
                  "from a later version")
        warnings.warn(
            f"{path}: its fingerprint has scheme {scheme} ({detail}); this version uses scheme "
            f"{SCHEME}, so the model's weights are not checked. `jaxpersona vectors convert {path} "
            f"NEW --model {found.model or 'MODEL'}` writes a file with a new fingerprint",
            UserWarning, stacklevel=4)
    return found


def _read_array(path: pathlib.Path) -> Vector:
    require_file(path, VECTOR_BYTES)
    try:
        value = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many exception types for damaged headers
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: invalid .npy file ({reason})") from error
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
        what = (f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray)
                else "an archive")
        raise UserError(f"{path}: contains {what}; it must be an array [L, D] of real numbers, "
                        "with one entry per layer, from layer 0")
    try:
        return Vector(np.array(value), path.stem,
                      notes={"source": "bare .npy array; entry l is layer l"})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _write(path: str | os.PathLike, vector: Vector | Caps) -> None:
    tensors = {"values": np.ascontiguousarray(vector.values)}
    header = {
        "format": _FORMAT, "kind": vector.kind, "name": vector.name, "model": vector.model,
        "fingerprint": vector.fingerprint, "fingerprint_scheme": str(vector.fingerprint_scheme),
        "layer_base": "0", "norm": "none",
        "sign": "+assistant" if vector.kind == "axis" else "+",
        "notes": json.dumps(dict(vector.notes), sort_keys=True),
    }
    if isinstance(vector, Caps):
        tensors["floors"] = np.ascontiguousarray(vector.floors)
        header |= {"layers": json.dumps(list(vector.layers)), "site": "residual",
                   "labels": json.dumps(list(vector.labels))}
    else:
        header["site"] = vector.site
    if isinstance(vector, Axis):
        for population, table in vector.percentiles.items():
            for name, value in table.items():
                tensors[f"percentiles/{population}/{name}"] = np.ascontiguousarray(
                    value, np.float32
                )
    write_tensors(path, tensors, header)


def _check_header(header: dict[str, str], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Check the header fields shared by all kinds; return the notes."""
    if header.get("format") != _FORMAT or "values" not in tensors:
        raise UserError(f"not a jaxpersona vector file (no values, or format is not {_FORMAT!r})")
    notes = parse_field(header.get("notes", "{}"), "notes", dict)
    sign = "+assistant" if header.get("kind") == "axis" else "+"
    wanted = {"layer_base": "0", "sign": sign, "norm": "none"}
    for field, want in wanted.items():
        if header.get(field) != want:
            raise UserError(f"{field} is {header.get(field)!r}; only {want!r} is supported")
    return notes


def _build_caps(header: dict[str, str], tensors: dict[str, np.ndarray]) -> Caps:
    notes = _check_header(header, tensors)
    if header.get("site") != "residual":
        raise UserError(f"site is {header.get('site')!r}; the site of caps must be 'residual'")
    layers, labels = (tuple(parse_field(header[field], field, list))
                      for field in ("layers", "labels"))
    return Caps(tensors["values"], layers, tensors["floors"], labels, header.get("name", "caps"),
                header.get("model", ""), header.get("fingerprint", ""), notes,
                scheme_of(header.get("fingerprint"), header.get("fingerprint_scheme")))


def _build(header: dict[str, str], tensors: dict[str, np.ndarray]) -> Vector:
    kind = header.get("kind", "")
    notes = _check_header(header, tensors)
    if kind not in _KINDS:
        raise UserError(f"kind is {kind!r}; it must be one of {[*sorted(_KINDS), 'caps']}")
    fields: dict[str, Any] = {
        "values": tensors["values"], "name": header.get("name", kind),
        "model": header.get("model", ""), "fingerprint": header.get("fingerprint", ""),
        "fingerprint_scheme": scheme_of(header.get("fingerprint"),
                                        header.get("fingerprint_scheme")),
        "site": header.get("site", "residual"), "notes": notes,
    }
    if kind == "axis":
        percentiles: dict[str, dict[str, np.ndarray]] = {}
        for key, value in tensors.items():
            if key.startswith("percentiles/"):
                parts = key.split("/")
                if len(parts) != 3:
                    raise UserError(f"tensor {key!r} must be named percentiles/<population>/<name>")
                _, population, name = parts
                percentiles.setdefault(population, {})[name] = value
        fields["percentiles"] = percentiles
    return _KINDS[kind](**fields)


Saved.write = staticmethod(save_vector)
