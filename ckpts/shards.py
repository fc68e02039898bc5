"""Locate the tensors of a Hugging Face folder, in one safetensors file or in indexed shards."""

from __future__ import annotations

import pathlib
import warnings

from jaxpersona.ckpts import tensorfile
from jaxpersona.ckpts.tensorfile import Entry

from jaxpersona.inputs import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_entries(folder: pathlib.Path, *,
                 warn: bool = True) -> tuple[dict[str, Entry], list[str]]:
    """Locate every tensor of a folder.

    As in transformers, the index is ignored if the folder contains a `model.safetensors` that the
    index does not list. If `warn` is true, a warning names any shards of the ignored index that
    exist.

    Returns:
      The tensor entries by name, and a list of the errors in the index and the files.
    """
    index = folder / INDEX
    if not index.exists() or _is_left_over(index, warn):
        if not (folder / SINGLE).exists():
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; convert the PyTorch file {other[0]} to safetensors" if other else ""
            return {}, [f"neither {SINGLE} nor {INDEX} exists{hint}"]
        entries, _, faults = tensorfile.read_header(folder / SINGLE)
        return entries, faults
    try:
        raw = read_json(index)
        table = raw["weight_map"]
        if not all(isinstance(v, str) and pathlib.PurePath(v).name == v for v in table.values()):
            raise TypeError
    except ValueError as error:
        return {}, [f"{INDEX}: corrupt ({error})"]
    except (TypeError, KeyError, AttributeError):
        return {}, [f"{INDEX}: corrupt (weight_map must map each tensor to a file name)"]
    entries, faults = {}, []
    for name in sorted(set(table.values())):
        named = {tensor for tensor, file in table.items() if file == name}
        if len(name.encode("utf-8", "replace")) > 255 or not (folder / name).exists():
            faults.append(f"{name}: missing; {INDEX} lists it for {some(named)}")
            continue
        held, _, wrong = tensorfile.read_header(folder / name)
        faults += wrong
        if not held:
            continue
        if absent := named - set(held):
            faults.append(f"{name}: does not contain {some(absent)}, which {INDEX} lists for it")
        if unnamed := set(held) - named:
            faults.append(f"{name}: contains {some(unnamed)}, which {INDEX} does not list for it")
        entries |= {tensor: held[tensor] for tensor in named & set(held)}
    return entries, faults


def _is_left_over(index: pathlib.Path, warn: bool) -> bool:
    """Return whether the folder has a `model.safetensors` that the index does not list.

    If shards that the index lists also exist and `warn` is true, issue a warning that names them.
    """
    if not (index.parent / SINGLE).exists():
        return False
    try:
        names = set(read_json(index)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        names = set()
    if SINGLE in names:
        return False
    present = {name for name in names if isinstance(name, str)
             and (index.parent / pathlib.PurePath(name).name).is_file()}
    if present and warn:
        warnings.warn(f"{index.parent}: contains both {SINGLE} and the shards of {INDEX} "
                      f"({some(present)}); {SINGLE} is read, as in transformers. Remove the "
                      "outdated files", UserWarning, stacklevel=5)
    return True


def some(names: set[str], limit: int = 6) -> str:
    """Join the first `limit` names in sorted order, followed by the number of remaining names."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
