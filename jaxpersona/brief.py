"""One-line `repr` strings of at most 120 characters, and short forms of values for messages."""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Sequence
from typing import Any

LENGTH = 120  # maximum number of characters in a representation


def brief(self: Any) -> str:
    """Format a dataclass as `Name(field=…, …)`, truncated to `LENGTH` characters.

    Assign this function in the class body: `__repr__ = brief`. Arrays are shown as dtype[shape],
    and lists of objects as length and type. Fields that are None or declared with `repr=False` are
    omitted.
    """
    fields = [(f.name, getattr(self, f.name, None)) for f in dataclasses.fields(self) if f.repr]
    parts = [f"{name}={_part(held)}" for name, held in fields if held is not None]
    return line(type(self).__name__, *parts)


def line(name: str, *parts: str) -> str:
    """Return `name(part, part, …)` on one line, truncated to `LENGTH` characters.

    Empty parts are omitted.
    """
    return cut(f"{name}({', '.join(part for part in parts if part)})", "…)")


def cut(text: str, end: str = "…") -> str:
    """Return a text on one line; truncate it to `LENGTH` characters, including the suffix `end`."""
    text = " ".join(text.split())
    return text if len(text) <= LENGTH else text[: LENGTH - len(end)] + end


def count(number: int, noun: str) -> str:
    """Format a count with its noun (one with a plural in -s, or "reply"), such as "2 tokens"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun == "reply" else f"{number:,} {noun}s"


def named(names: Sequence[str], noun: str) -> str:
    """Format a count with the first five names, such as "1 role (pirate)"."""
    return (f"{count(len(names), noun)} ({', '.join(map(escaped, names[:5]))}"
            f"{', …' if len(names) > 5 else ''})")


def escaped(name: str) -> str:
    r"""Return a name for a message, with escape sequences for characters that cannot be printed.

    Examples:
      >>> from jaxpersona.brief import escaped
      >>> escaped("ghost"), escaped("a\nb")
      ('ghost', 'a\\nb')
    """
    return name if name.isprintable() else repr(name)[1:-1]


def shown(value: object, most: int = 40) -> str:
    """Return the repr of a value for a message, on one line and truncated to `most` characters.

    Examples:
      >>> from jaxpersona.brief import shown
      >>> shown(10**5000)
      'an int with too many digits'
      >>> import numpy as np
      >>> shown(np.zeros((2, 2)))
      'array([[0., 0.], [0., 0.]])'
    """
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python's limit, or a list of these
        name = type(value).__name__
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name} with too many digits"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def quoted(text: str, most: int = 40) -> str:
    """Truncate a text to `most` characters, including the ellipsis, and return its repr."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def _part(value: Any) -> str:
    """Format a field's value: dtype[shape] for an array, otherwise a short representation."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return repr(value.item())
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, str)):
        kinds = {type(item).__name__ for item in value}
        kind = kinds.pop() if len(kinds) == 1 else "values"
        return f"{len(value)} × {'array' if kind in ('ArrayImpl', 'ndarray') else kind}"
    if isinstance(value, dict):
        shown = [f"{key}: {_part(held)}" for key, held in itertools.islice(value.items(), 8)
                 if held is not value]
        return "{" + ", ".join(shown) + "}"
    return quoted(value) if isinstance(value, str) else reprlib.repr(value)
