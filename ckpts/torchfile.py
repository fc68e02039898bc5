"""Read directions from `.pt` files of other projects without executing code.

A `.pt` file is a pickle, and unpickling can call arbitrary functions. All reads go through
`torch.load(weights_only=True)`, whose unpickler rejects everything except tensors and plain values.
"""

from __future__ import annotations

import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxpersona.ckpts.gguf import VECTOR_BYTES

from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import MAX_DEPTH, require_file
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

KINDS = ("axis", "role", "persona")
_PERSONA = re.compile(r"(.+)_(prompt_avg|response_avg|prompt_last)_diff")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # a word in a snake_case or CamelCase file name
# the kind of a dict, by the key that identifies it
_TABLES = {"experiments": "caps", "axis": "axis", "vector": "role"}
_PERCENTILE = re.compile(r"p(0?\.\d+)(?!\d)")


def read_pickle(path: str | os.PathLike, limit: int = VECTOR_BYTES, *, convert: bool = True) -> Any:
    """Read a `.pt` file of tensors and plain values; convert the tensors to float32 arrays.

    Args:
      path: the file.
      limit: the maximum size of the file in bytes.
      convert: whether to convert the tensors; otherwise they are returned as PyTorch tensors, and
        the caller must check their numbers of elements before copying them.

    Returns:
      The content of the file. With `convert`, tuples are also converted, to lists.

    Raises:
      UserError: the file is missing, too large or damaged, PyTorch is not installed, or the pickle
        contains anything except tensors and plain values. With `convert`, also if a tensor is not
        floating-point or has more elements than the file has bytes, or the nesting is too deep.
    """
    path = pathlib.Path(path)
    size = require_file(path, limit)
    _check_archive(path, size)
    torch = require("torch", f"{path}: .pt files need PyTorch",
                    "or convert the file to .safetensors on another machine")
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
        return _Plain(torch, size)(value) if convert else value
    except Exception as error:  # a damaged archive raises many exception types
        message = " ".join(str(error).split())
        call = re.search(r"GLOBAL ([\w.]+)", message)
        if call:
            raise UserError(f"{path}: unsafe pickle (it would call {call[1]}); ask the file's "
                            "author for a file that contains only tensors") from error
        reason = message.split("WeightsUnpickler error: ")[-1].split(". ")[0]
        reason = reason.split(" Check the documentation")[0][:120]
        raise UserError(f"{path}: invalid .pt file ({reason or type(error).__name__})"
                        ) from error


def _check_archive(path: pathlib.Path, size: int) -> None:
    """Check the sizes declared in a `.pt` file's ZIP archive before it is unpacked.

    PyTorch stores entries uncompressed, so they cannot be larger than the file. A compressed entry
    could expand to a thousand times the size of the file.

    Raises:
      UserError: the file cannot be read, an entry is compressed, the entries declare more bytes
        than the file has, or the archive is damaged; the message names the file.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                return  # the legacy format (PyTorch < 1.6), or not a .pt file
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive raises several exception types
        raise UserError(f"{path}: invalid .pt file (the ZIP archive is damaged: {error})"
                        ) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path}: invalid .pt file (it contains a compressed entry, which "
                        "PyTorch never writes; save it again with torch.save)")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise UserError(f"{path}: invalid .pt file (its entries declare {claimed} bytes, but "
                        f"the file has {size})")


class _Plain:
    """A callable that converts the tensors in a nested structure to float32 arrays.

    Each object is converted once, because a pickle can reference the same object many times.
    Without memoization, a file of one kilobyte could expand beyond the available memory.
    """

    def __init__(self, torch: Any, size: int) -> None:
        self.torch, self.size = torch, size
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if not isinstance(value, (self.torch.Tensor, dict, list, tuple)):
            return value
        if id(value) not in self.done:  # `value` outlives the conversion, so its id stays unique
            if depth > MAX_DEPTH:
                raise UserError("nested too deeply")
            self.done[id(value)] = self._convert(value, depth + 1)
        return self.done[id(value)]

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, self.torch.Tensor):
            return self._array(value)
        if isinstance(value, dict):
            return {key: self(item, depth) for key, item in value.items()}
        return [self(item, depth) for item in value]

    def _array(self, value: Any) -> np.ndarray:
        if not value.is_floating_point():
            raise TypeError(f"it contains {value.dtype} values; use float tensors")
        if value.numel() > self.size:  # possible for an expanded view of a small storage
            raise UserError(f"a tensor declares {value.numel()} elements, but the file has "
                            f"{self.size} bytes")
        return value.detach().to(self.torch.float32).numpy()


def read(path: str | os.PathLike, kind: str | None = None) -> Vector | dict[str, Caps]:
    """Read a `.pt` file of the Assistant Axis (Lu et al. 2026) or Persona Vectors project.

    The kind of a dict is inferred from its keys: `{"axis": [L, D]}`, `{"vector": [L, D], "type",
    "role"}`, or `{"vectors", "experiments"}` for capping experiments. The kind of a bare tensor is
    inferred from the file name: a name with the word "axis" denotes an axis, a name that begins
    with the word "default" (such as `default_vector.pt`) denotes a role vector, and
    `<trait>_<pool>_diff.pt` denotes a persona vector, where <pool> is prompt_avg, response_avg or
    prompt_last.

    The tensor of a persona vector has shape [L + 1, D] and begins with the embeddings. Entry i
    becomes layer i − 1. Entry 0 (the embeddings) and the last entry (taken after the final norm, so
    not in the residual stream) are dropped. Layer L − 1 is therefore zero. The vector's notes
    record this conversion.

    Args:
      path: the file.
      kind: the kind of a bare tensor, "axis", "role" or "persona"; None infers the kind from the
        file name. For a dict, `kind` must be None or match the dict's kind.

    Returns:
      A direction, or the caps of each capping experiment by id (see `capping`).

    Raises:
      UserError: as for `read_pickle`, or the content has none of these forms, `kind` is unknown or
        does not match the content, or the kind of a bare tensor cannot be inferred.
    """
    path = pathlib.Path(path)
    if kind not in (None, *KINDS):
        raise UserError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    value = read_pickle(path)
    try:
        return _interpret(path.stem, value, kind)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}") from error


def _interpret(stem: str, value: Any, kind: str | None) -> Vector | dict[str, Caps]:
    if isinstance(value, dict):
        own = next((name for key, name in _TABLES.items() if key in value), None)
        if own is not None and kind not in (None, own):
            raise UserError(f"kind is {kind!r}, but the kind of the file is '{own}'; omit kind")
        if own == "caps":
            return capping(value)
        if own == "axis":
            return _axis(_matrix(value["axis"], "axis"))
        if own == "role":
            role, score = _text(value["role"], "role"), _text(value.get("type", ""), "type")
            notes = {"source": "Assistant Axis project, role vector", "type": score}
            return Vector(_matrix(value["vector"], "vector"), role, notes=notes)
        raise UserError("contains a dict without any of the keys axis, vector or experiments")
    array = _matrix(value, "the tensor")
    persona = _PERSONA.fullmatch(stem)
    words = [word.lower() for word in _WORD.findall(stem)]
    kind = kind or ("persona" if persona else "axis" if "axis" in words else
                    "role" if words[:1] == ["default"] else None)
    if kind is None:
        raise UserError("contains a bare tensor, and its kind cannot be inferred from the file "
                        f"name; set kind to one of {', '.join(KINDS)}")
    if kind == "axis":
        return _axis(array)
    if kind == "role":
        return Vector(array, stem.removesuffix("_vector"),
                      notes={"source": "Assistant Axis project, role vector"})
    trait, pool = persona.groups() if persona else (stem, "unknown")
    return _persona(array, trait, pool)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{what} is of type {type(value).__name__}; it must be a string")
    return str(value)


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} is of type {type(value).__name__}; it must be a dict")
    return value


def _matrix(value: Any, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or not value.size:
        shape = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{what} is {shape}; it must be a tensor of shape [L, D]")
    return value


def _axis(array: np.ndarray) -> Axis:
    return Axis(array, "assistant", notes={
        "source": "Assistant Axis project", "thresholds": "none in the file; calibrate the axis, "
        "or read them from a capping_config.pt"})


def _persona(array: np.ndarray, trait: str, pool: str) -> Vector:
    if len(array) < 3:
        raise UserError(f"the tensor has shape {list(array.shape)}; a persona vector has shape "
                        "[L + 1, D] with at least 3 rows, of which row 0 is for the embeddings")
    values = np.zeros((len(array) - 1, array.shape[1]), np.float32)
    values[:-1] = array[1:-1]
    return Vector(values, trait, notes={
        "source": "Persona Vectors project", "pool": pool,
        "re-based": "entry i of the file is layer i - 1; entry 0 (the embeddings) and the last "
                    f"entry (taken after the final norm) are dropped, so layer {len(values) - 1} "
                    "is zero"})


def capping(table: Mapping[str, Any]) -> dict[str, Caps]:
    """Convert capping experiments to floors along the assistant direction.

    The unit vectors û in the file point away from the assistant, and the caps bound the projection
    from above: h ← h − û·max(⟨h, û⟩ − τ, 0). With v̂ = −û, this is a floor at −τ:
    h ← h + v̂·max(−τ − ⟨h, v̂⟩, 0) (Lu et al. 2026, §5). Percentile p in the file corresponds to
    percentile 100 − p along v̂.

    Args:
      table: the content of the file, a dict with the keys "vectors" and "experiments".

    Returns:
      The caps of each experiment by id, in file order.

    Raises:
      UserError: the content is malformed, for example because an experiment has no caps.
      KeyError: a field is missing.
    """
    vectors, out = _table(table["vectors"], "vectors"), {}
    if not isinstance(table["experiments"], list):
        raise UserError("experiments must be a list")
    for i, experiment in enumerate(table["experiments"]):
        name = _text(_table(experiment, f"experiments[{i}]")["id"], f"experiments[{i}].id")
        labels, layers, floors, values = [], [], [], []
        if not isinstance(experiment["interventions"], list):
            raise UserError(f"experiment {name!r}: interventions must be a list")
        for item in experiment["interventions"]:
            item = _table(item, f"experiment {name!r}: an intervention")
            label = _text(item["vector"], f"experiment {name!r}: vector")
            if label not in vectors:
                raise UserError(f"experiment {name!r} uses the vector {label!r}, which is not in "
                                "vectors")
            entry = vectors[label]
            if not isinstance(entry, dict):
                raise UserError(f"vector {label!r} is of type {type(entry).__name__}; it must be a "
                                "dict with the keys 'vector' (a tensor [D]) and 'layer' (an int)")
            vector, layer = np.asarray(entry["vector"]), entry["layer"]
            if vector.ndim != 1 or vector.dtype != np.float32 or type(layer) is not int:
                raise UserError(f"vector {label!r} is invalid: 'vector' must be a float32 tensor "
                                "[D], and 'layer' an int")
            if isinstance(item["cap"], bool) or not isinstance(item["cap"], (int, float)):
                cap = "a tensor" if isinstance(item["cap"], np.ndarray) else f"{item['cap']!r:.80}"
                raise UserError(f"experiment {name!r}: cap is {cap}; it must be a number")
            labels.append(label)
            layers.append(layer)
            floors.append(-item["cap"])
            values.append(-vector)
        if not values or len({len(value) for value in values}) > 1:
            raise UserError(f"experiment {name!r} has no caps, or vectors of different widths")
        if name in out:
            raise UserError(f"experiments contains {name!r} twice; experiment ids must be unique")
        notes = {"source": "Assistant Axis project, capping experiment", "sign": _sign(name)}
        out[name] = Caps(np.stack(values), tuple(layers), np.array(floors), tuple(labels), name,
                           notes=notes)
    if not out:
        raise UserError("experiments is empty")
    return out


def _sign(name: str) -> str:
    note = ("the file's vectors point away from the assistant and its caps are ceilings; here each "
            "vector is negated and its cap is a floor")
    percentile = _PERCENTILE.search(name)
    if percentile is None:
        return note
    along = 100 - 100 * float(percentile[1])
    return f"{note}: {percentile[0]} of the file is the {along:g}th percentile along +axis"
