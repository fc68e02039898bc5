"""Read JSON texts and collect every fault before raising any.

Mending a folder of three hundred files one error at a time takes three hundred runs. A `Faults` is
handed down while a folder is read, each reader notes what is wrong and goes on, and the whole list
is raised once.
"""

from __future__ import annotations

import json
import pathlib
import re
from importlib.resources.abc import Traversable
from typing import Any

from jaxpersona.inputs import parse_json, read_bytes


class Faults(list[str]):
    """A list of faults, each naming its file and field."""

    def raise_if_any(self, what: object) -> None:
        """Raise all faults as one error.

        Raises:
          ValueError: there is a fault; every one is listed.
        """
        if self:
            count = f"{len(self)} fault{'s' if len(self) > 1 else ''}"
            raise ValueError(f"{what}: {count}\n" + "\n".join(f"  - {fault}" for fault in self))


def folder_files(folder: Traversable, faults: Faults) -> list[Traversable]:
    """Return the `.json` files of a folder by name; note a missing or an empty folder."""
    if not folder.is_dir():
        faults.append(f"{folder}: no such folder")
        return []
    # a leading dot is an editor's or an operating system's own file
    files = [f for f in folder.iterdir() if f.name.endswith(".json") and f.name[0] != "."]
    if not files:
        faults.append(f"{folder}: holds no .json file")
    return sorted(files, key=lambda f: f.name)


def read_text(file: Traversable, faults: Faults) -> str | None:
    """Return a file's text (UTF-8, with or without a byte order mark), or None with a fault."""
    try:
        data = read_bytes(file) if isinstance(file, pathlib.Path) else file.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        faults.append(f"{file}: no such file")
    except UnicodeDecodeError as error:
        faults.append(f"{file}: invalid UTF-8 at byte {error.start}")
    except ValueError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{file}: cannot be read ({error.strerror or error})")
    return None


def parse(text: str, where: str, faults: Faults) -> Any:
    """Return what a JSON text holds, or None with a fault; a key may not occur twice."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            faults.append(f"{where}: {', '.join(map(repr, twice))} is given more than once")
        return out

    try:
        return parse_json(text, table)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text.strip() else ""
        faults.append(f"{where}: not JSON ({error.msg}, {at}column {error.colno})")
    except ValueError as error:
        faults.append(f"{where}: not JSON of ours ({error})")
    return None


def read_table(file: Traversable, faults: Faults) -> dict[str, Any] | None:
    """Return the JSON object of a file, or None with a fault."""
    text = read_text(file, faults)
    if text is None:
        return None
    before = len(faults)
    value = parse(text, str(file), faults)
    if isinstance(value, dict):
        return value
    if len(faults) == before:
        faults.append(f"{file}: holds {kind(value)}, not an object")
    return None


def kind(value: Any) -> str:
    """Name a JSON value's type as JSON does."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def get_text(table: Any, field: str, where: str, faults: Faults, *, empty: bool = False,
             prefix: str = "") -> str:
    """Return a text field of a JSON object; note a missing, empty or unusable one.

    Args:
      table: the object (anything else is a fault).
      field: the key.
      where: the file.
      faults: takes the fault; "" is returned with one.
      empty: whether an empty text is allowed.
      prefix: where in the file the object is, such as "instruction[2].".
    """
    name = prefix + field
    if not isinstance(table, dict):
        faults.append(f"{where}: {prefix.rstrip('.')} is {kind(table)}, not an object")
    elif field not in table:
        faults.append(f"{where}: {name} is missing")
    elif not isinstance(table[field], str):
        faults.append(f"{where}: {name} is {kind(table[field])}, not a string")
    elif not table[field].strip() and not (empty and table[field] == ""):
        faults.append(f"{where}: {name} is empty")
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in table[field]):
        faults.append(f"{where}: {name} holds half a surrogate pair, which is not valid UTF-8")
    else:
        return table[field]
    return ""


def get_list(table: dict[str, Any], field: str, where: str, faults: Faults, *,
             prefix: str = "") -> list[Any]:
    """Return a list field of a JSON object; note a missing, empty or ill-typed one."""
    name = prefix + field
    if field not in table:
        faults.append(f"{where}: {name} is missing")
    elif not isinstance(table[field], list):
        faults.append(f"{where}: {name} is {kind(table[field])}, not a list")
    elif not table[field]:
        faults.append(f"{where}: {name} is empty")
    else:
        return table[field]
    return []


def get_eval_prompt(table: dict[str, Any], where: str, faults: Faults) -> str:
    """Return `eval_prompt`, which must hold `{question}` and `{answer}`."""
    text = get_text(table, "eval_prompt", where, faults)
    missing = [p for p in ("{question}", "{answer}") if text and p not in text]
    if missing:
        faults.append(f"{where}: eval_prompt lacks {' and '.join(missing)}")
    return text


def fill(template: str, **values: str) -> str:
    """Put values in for `{name}` placeholders, in one pass: a value's own braces stay as they are.

    A placeholder that no value is given for stays too.
    """
    pattern = "|".join(re.escape("{" + name + "}") for name in values)
    return re.sub(pattern, lambda m: values[m.group()[1:-1]], template) if values else template


def stem(file: Traversable) -> str:
    """Return a file's name without its extension."""
    return pathlib.PurePath(file.name).stem
