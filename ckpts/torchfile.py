"""Directions in `.pt` files of other projects, read as tensors and never as code.

A `.pt` file is a pickle, and a pickle may call anything while it is read. PyTorch's restricted
reader (`weights_only=True`) refuses every call but the making of tensors; there is no other way in.
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

from jaxpersona.inputs import MAX_DEPTH, require_file
from jaxpersona.vectors.vector import Axis, Caps, Vector

KINDS = ("axis", "role", "persona")
_PERSONA = re.compile(r"(.+)_(prompt_avg|response_avg|prompt_last)_diff")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of a file's name: snake_case and CamelCase alike
_TABLES = {"experiments": "caps", "axis": "axis", "vector": "role"}  # what a table's key makes it
_PERCENTILE = re.compile(r"p(0?\.\d+)(?!\d)")


def read_pickle(path: str | os.PathLike) -> Any:
    """Read a `.pt` file: its tables, lists, strings and numbers, tensors as float32 arrays.

    Raises:
      ValueError: no such file, PyTorch is not installed, the file is damaged, or it holds more than
        tensors and plain values (reading it would run code; nothing of it is run).
    """
    path = pathlib.Path(path)
    size = require_file(path, VECTOR_BYTES)
    _check_archive(path, size)
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: reading .pt needs PyTorch: pip install 'jaxpersona[torch]', or "
                         "convert the file to .safetensors where it is installed") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
        return _Plain(torch, size)(value)
    except Exception as error:  # a damaged archive raises almost any kind
        said = " ".join(str(error).split())
        call = re.search(r"GLOBAL ([\w.]+)", said)
        if call:
            raise ValueError(f"{path}: refused, for it asks to run {call[1]}, and a vector file "
                             "needs no code; ask for one that holds tensors alone") from None
        reason = said.split("WeightsUnpickler error: ")[-1].split(". ")[0]
        reason = reason.split(" Check the documentation")[0][:120]
        raise ValueError(f"{path}: not a readable .pt file ({reason or type(error).__name__})"
                         ) from None


def _check_archive(path: pathlib.Path, size: int) -> None:
    """Check what the archive in a `.pt` file claims before anything is unpacked.

    PyTorch stores its entries as they are, so none of them is larger than the file. A compressed
    entry of a few kilobytes can claim any size.

    Raises:
      ValueError: a compressed entry, entries that claim more than the file holds, or no archive
        where the file begins as one; the file is named.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":
                return  # a file of PyTorch before 1.6, or none at all
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive raises several kinds
        raise ValueError(f"{path}: not a readable .pt file (the archive is damaged: {error})"
                         ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path}: not a readable .pt file (it holds a compressed entry, which "
                         "PyTorch never writes; save it again with torch.save)")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise ValueError(f"{path}: not a readable .pt file (its entries claim {claimed} bytes, the "
                         f"file has {size})")


class _Plain:
    """Replaces the tensors of a nest by arrays, every shared part once.

    A pickle may refer to one part many times: walked part by part, a file of a kilobyte can hold
    more than any memory.
    """

    def __init__(self, torch: Any, size: int) -> None:
        self.torch, self.size = torch, size
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if not isinstance(value, (self.torch.Tensor, dict, list, tuple)):
            return value
        if id(value) not in self.done:  # `value` lives as long as the walk, so its id is its own
            if depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
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
            raise TypeError(f"it holds a tensor of {value.dtype}; directions are real numbers")
        if value.numel() > self.size:  # a view that repeats its few numbers
            raise ValueError(f"a tensor claims {value.numel()} numbers, the file has {self.size} "
                             "bytes")
        return value.detach().to(self.torch.float32).numpy()


def read(path: str | os.PathLike, kind: str | None = None) -> Vector | dict[str, Caps]:
    """Read a `.pt` file of the Assistant Axis project (Lu et al. 2026) or of Persona Vectors.

    Which it is shows in the file: `{"axis": [L, D]}`, `{"vector": [L, D], "type", "role"}`, or
    `{"vectors", "experiments"}` for capping experiments. A bare tensor is known by its name:
    one with the word axis in it is an axis, `default_vector.pt` a role, `<trait>_<pool>_diff.pt` a
    persona vector.

    A persona vector's file is [L + 1, D] and counts from the embeddings. It is re-based here, and
    its notes say so: entry i becomes layer i − 1, entry 0 (the embeddings) is dropped, and so is
    the last entry, because transformers reads it after the final norm, where no block's residual
    stream is. Layer L − 1 is therefore zero, and no operator will act with it.

    Args:
      path: the file.
      kind: "axis", "role" or "persona", what a bare tensor is; None: by the file's name. A table
        says it itself, and must say the same.

    Returns:
      A direction, or experiments by their id (see `capping`).

    Raises:
      ValueError: as `read_pickle`, or a content that is none of these; the file is named.
    """
    path = pathlib.Path(path)
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    value = read_pickle(path)
    try:
        return _interpret(path.stem, value, kind)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {reason}") from None


def _interpret(stem: str, value: Any, kind: str | None) -> Vector | dict[str, Caps]:
    if isinstance(value, dict):
        own = next((found for key, found in _TABLES.items() if key in value), None)
        if own is not None and kind not in (None, own):
            raise ValueError(f"kind is {kind!r}, but the file itself says {own}; leave kind out")
        if own == "caps":
            return capping(value)
        if own == "axis":
            return _axis(_matrix(value["axis"], "axis"))
        if own == "role":
            role, score = _text(value["role"], "role"), _text(value.get("type", ""), "type")
            notes = {"source": "Assistant Axis project, role vector", "type": score}
            return Vector(_matrix(value["vector"], "vector"), role, notes=notes)
        raise ValueError("holds a table with none of axis, vector and experiments")
    array = _matrix(value, "the tensor")
    persona = _PERSONA.fullmatch(stem)
    words = [word.lower() for word in _WORD.findall(stem)]
    kind = kind or ("persona" if persona else "axis" if "axis" in words else
                    "role" if words[:1] == ["default"] else None)
    if kind is None:
        raise ValueError("a bare tensor, and the file's name does not say of what; give its kind: "
                         f"{', '.join(KINDS)}")
    if kind == "axis":
        return _axis(array)
    if kind == "role":
        return Vector(array, stem.removesuffix("_vector"),
                      notes={"source": "Assistant Axis project, role vector"})
    trait, pool = persona.groups() if persona else (stem, "not said")
    return _persona(array, trait, pool)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{what} is a {type(value).__name__}; it must be text")
    return str(value)


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}; it must be a table")
    return value


def _matrix(value: Any, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or not value.size:
        shape = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{what} is {shape}; it must be a tensor [L, D]")
    return value


def _axis(array: np.ndarray) -> Axis:
    return Axis(array, "assistant", notes={
        "source": "Assistant Axis project", "thresholds": "none in the file; calibrate the axis, "
        "or take them from a capping_config.pt"})


def _persona(array: np.ndarray, trait: str, pool: str) -> Vector:
    if len(array) < 3:
        raise ValueError(f"the tensor is {list(array.shape)}; a persona vector is [L + 1, D], the "
                         "embeddings first")
    values = np.zeros((len(array) - 1, array.shape[1]), np.float32)
    values[:-1] = array[1:-1]
    return Vector(values, trait, notes={
        "source": "Persona Vectors project", "pool": pool,
        "re-based": "entry i of the file is layer i - 1 here; its entry 0 is the embeddings' and "
                    f"was dropped, and so was the last one, which is taken after the final norm: "
                    f"layer {len(values) - 1} is zero"})


def capping(table: Mapping[str, Any]) -> dict[str, Caps]:
    """Turn capping experiments into floors on the Assistant's side.

    The file's vectors û point away from the Assistant and its caps bound them from above,
    h ← h − û·max(⟨h, û⟩ − τ, 0). With v̂ = −û that is a floor at −τ,
    h ← h + v̂·max(−τ − ⟨h, v̂⟩, 0) (Lu et al. 2026, §5), so a percentile p of the file is the
    (100 − p)th along v̂.

    Returns:
      Each experiment's floors by its id, in the order in which they are listed.

    Raises:
      ValueError: a vector that is not there or not [D], or a cap or layer that is no number.
    """
    vectors, found = _table(table["vectors"], "vectors"), {}
    if not isinstance(table["experiments"], list):
        raise ValueError("experiments must be a list")
    for i, experiment in enumerate(table["experiments"]):
        name = _text(_table(experiment, f"experiments[{i}]")["id"], f"experiments[{i}].id")
        labels, layers, floors, values = [], [], [], []
        if not isinstance(experiment["interventions"], list):
            raise ValueError(f"experiment {name!r}: interventions must be a list")
        for item in experiment["interventions"]:
            item = _table(item, f"experiment {name!r}: an intervention")
            label = _text(item["vector"], f"experiment {name!r}: vector")
            if label not in vectors:
                raise ValueError(f"experiment {name!r} names {label!r}, which is not in vectors")
            entry = vectors[label]
            if not isinstance(entry, dict):
                raise ValueError(f"vector {label!r} is a {type(entry).__name__}; it must be a "
                                 "table of vector [D] and layer")
            vector, layer = np.asarray(entry["vector"]), entry["layer"]
            if vector.ndim != 1 or vector.dtype != np.float32 or type(layer) is not int:
                raise ValueError(f"vector {label!r} must be a tensor [D] with an integer layer")
            if isinstance(item["cap"], bool) or not isinstance(item["cap"], (int, float)):
                said = "a tensor" if isinstance(item["cap"], np.ndarray) else f"{item['cap']!r:.80}"
                raise ValueError(f"experiment {name!r}: cap is {said}, not a number")
            labels.append(label)
            layers.append(layer)
            floors.append(-item["cap"])
            values.append(-vector)
        if not values or len({len(value) for value in values}) > 1:
            raise ValueError(f"experiment {name!r} holds no cap, or vectors of several widths")
        if name in found:
            raise ValueError(f"experiment {name!r} is there twice")
        notes = {"source": "Assistant Axis project, capping experiment", "sign": _sign(name)}
        found[name] = Caps(np.stack(values), tuple(layers), np.array(floors), tuple(labels), name,
                           notes=notes)
    if not found:
        raise ValueError("experiments is empty")
    return found


def _sign(name: str) -> str:
    said = ("the file caps vectors that point away from the Assistant from above; here each is "
            "reversed and its cap is a floor")
    percentile = _PERCENTILE.search(name)
    if percentile is None:
        return said
    along = 100 - 100 * float(percentile[1])
    return f"{said}: {percentile[0]} there is the {along:g}th percentile along +axis"
