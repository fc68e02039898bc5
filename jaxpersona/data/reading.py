"""Read JSON data files and collect all errors before raising.

Readers append errors to a shared `Faults` list and continue, so one run reports every error in a
folder of several hundred files.
"""

from __future__ import annotations

import json
import pathlib
import re
from importlib.resources.abc import Traversable
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.inputs import parse_json, read_bytes


class Faults(list[str]):
    """A list of error messages, each of which gives the location of the error, such as a field."""

    def raise_if_any(self, what: object) -> None:
        """Raise one error that contains all collected errors, if there are any.

        The message has one line if there is one error; otherwise a heading and one line per error.

        Args:
          what: the file or folder that the message names.

        Raises:
          UserError: the list is not empty.
        """
        if len(self) == 1:
            raise UserError(self[0] if self[0].startswith(str(what)) else f"{what}: {self[0]}")
        if self:
            raise UserError("\n".join([f"{what}: {len(self)} errors",
                                       *(f"  - {fault}" for fault in self)]))


def folder_files(folder: Traversable, faults: Faults) -> list[Traversable]:
    """Return the `.json` files in a folder, except hidden files, sorted by name.

    If the folder is missing or contains none, the function records an error and returns [].
    """
    if not folder.is_dir():
        faults.append(f"{folder}: no such folder")
        return []
    # skip hidden files, which editors and operating systems create
    files = [f for f in folder.iterdir() if f.name.endswith(".json") and f.name[0] != "."]
    if not files:
        faults.append(f"{folder}: contains no .json file")
    return sorted(files, key=lambda f: f.name)


def read_text(file: Traversable, faults: Faults) -> str | None:
    """Return the text of a UTF-8 file, without a byte order mark.

    If the file cannot be read or decoded, the function records an error and returns None.
    """
    try:
        data = read_bytes(file) if isinstance(file, pathlib.Path) else file.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        faults.append(f"{file}: no such file")
    except UnicodeDecodeError as error:
        faults.append(f"{file}: invalid UTF-8 at byte {error.start}")
    except UserError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{file}: cannot be read ({error.strerror or error})")
    return None


def parse(text: str, where: str, faults: Faults) -> Any:
    """Parse JSON and return its value, or None if the JSON is invalid.

    Errors, including duplicate keys, are recorded in `faults`.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            faults.append(f"{where}: duplicate key {', '.join(map(repr, twice))}")
        return out

    try:
        return parse_json(text, table)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text.strip() else ""
        faults.append(f"{where}: invalid JSON ({error.msg}, {at}column {error.colno})")
    except ValueError as error:
        faults.append(f"{where}: cannot be parsed as JSON ({error})")
    return None


def read_table(file: Traversable, faults: Faults) -> dict[str, Any] | None:
    """Return the JSON object in a file.

    If the file cannot be read or contains no object, the function records an error and returns
    None.
    """
    text = read_text(file, faults)
    if text is None:
        return None
    before = len(faults)
    value = parse(text, str(file), faults)
    if isinstance(value, dict):
        return value
    if len(faults) == before:
        faults.append(f"{file}: contains {kind(value)}, not an object")
    return None


def kind(value: Any) -> str:
    """Return the JSON type of a parsed value, such as "an object" or "null"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def get_text(table: Any, field: str, where: str, faults: Faults, *, empty: bool = False,
             prefix: str = "") -> str:
    """Return a string field of a JSON object.

    If the field is missing, not a string, blank or not valid Unicode, the function records an error
    and returns "".

    Args:
      table: the object; a value of any other type is an error.
      field: the key.
      where: the file, and the line if necessary, for error messages.
      faults: the list to which an error is appended.
      empty: whether an empty string is allowed; a string of whitespace never is.
      prefix: the path of the object within the file, such as "instruction[2].".
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
        faults.append(f"{where}: {name} contains a lone surrogate, which is not valid UTF-8")
    else:
        return table[field]
    return ""


def get_list(table: dict[str, Any], field: str, where: str, faults: Faults, *,
             prefix: str = "") -> list[Any]:
    """Return a list field; if it is missing, empty or not a list, record an error and return []."""
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
    """Return the field `eval_prompt`, or "" if it is missing, blank or not a valid string.

    In these cases, and if it lacks {question} or {answer}, an error is appended to `faults`.
    """
    text = get_text(table, "eval_prompt", where, faults)
    missing = [p for p in ("{question}", "{answer}") if text and p not in text]
    if missing:
        faults.append(f"{where}: eval_prompt lacks {' and '.join(missing)}")
    return text


def fill(template: str, **values: str) -> str:
    """Replace placeholders such as {name} in a template with the values of the keyword arguments.

    Placeholders without a value are kept, and placeholders inside the values are not replaced.
    """
    pattern = "|".join(re.escape("{" + name + "}") for name in values)
    return re.sub(pattern, lambda m: values[m.group()[1:-1]], template) if values else template


def stem(file: Traversable) -> str:
    """Return a file's name without its extension."""
    return pathlib.PurePath(file.name).stem
