"""Export of results as HTML tables for notebooks, as pandas DataFrames and as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.extras import require
from jaxpersona.inputs import printable

if TYPE_CHECKING:
    import pandas

ROWS, CHARACTERS = 20, 400  # maximum number of table rows and of characters per cell in a notebook
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:44em"


class Table:
    """A result that can be shown as a table; subclasses define `records` and optionally `facts`."""

    def records(self) -> list[dict[str, Any]]:
        """Return one dict per table row; all dicts have the same keys."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return a dict of metadata of the whole result, such as array shapes."""
        return {}

    def to_frame(self) -> pandas.DataFrame:
        """Return the records as a pandas DataFrame.

        Raises:
          UserError: pandas is not installed, or its import fails.
        """
        return require("pandas", "to_frame needs pandas").DataFrame(self.records())

    def to_json(self) -> str:
        """Return a JSON string of an object with "kind" (the class name), the facts and "records".

        NaN and infinity become null, because JSON cannot represent them.
        """
        return json.dumps({"kind": type(self).__name__,
                           **others(plain(self.facts()), ("kind", "records")),
                           "records": plain(self.records())}, ensure_ascii=False, allow_nan=False)

    def _repr_html_(self) -> str:
        """Return the table as HTML for a notebook, with all text escaped."""
        records = self.records()
        rows = [{name: value for name, value in row.items() if not self._left_out(name)}
                for row in records[:ROWS]]
        return page(repr(self), self.facts(), rows, len(records))

    def _left_out(self, column: str) -> bool:
        """Return whether a column is omitted in notebooks."""
        return False


def others(found: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `found` whose entries can be added to a result with the given fields.

    A name that is also in `fields` gets the prefix "notes.", so that its entry cannot replace the
    field.

    Examples:
      >>> from jaxpersona.export import others
      >>> others({"judge": "none", "name": "mine"}, ["name"])
      {'judge': 'none', 'notes.name': 'mine'}
    """
    return {f"notes.{name}" if name in fields else name: value for name, value in found.items()}


def page(caption: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
         total: int) -> str:
    """Return HTML with the caption, the facts, a table of rows, and the number of rows not shown.

    The table contains `rows`, the first rows of a result with `total` rows.
    """
    parts = [f"<p><code>{_escaped(caption)}</code></p>"]
    if facts:
        parts.append("<p>" + "<br>".join(f"{_escaped(name)}: {_escaped(_shown(value))}"
                                         for name, value in facts.items()) + "</p>")
    if rows:
        head = "".join(f'<th style="text-align:left">{_escaped(name)}</th>' for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f'<td style="{_CELL}">{_escaped(_shown(value))}</td>'
                             for value in row.values()) + "</tr>" for row in rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if total > len(rows):
        parts.append(f"<p>… rows not shown: {total - len(rows):,}</p>")
    # these CSS classes stop notebooks from rendering text between dollar signs as a formula
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def shapes(captured: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict for `Table.facts` that describes captured values.

    Returns:
      {"captured": text}, where the text contains the name and the shape of each array; for a list,
      its length and the shape of its first array; and for other values, the type. Without captured
      values, {}.
    """
    found = {}
    for name, value in captured.items():
        several = isinstance(value, list)
        shape = getattr(value[0] if several and value else value, "shape", None)
        found[name] = type(value).__name__ if shape is None else (
            f"{len(value)} × {list(shape)}" if several else str(list(shape)))
    return {"captured": ", ".join(f"{name} {shape}" for name, shape in found.items())
            } if found else {}


def plain(value: Any) -> Any:
    """Convert a value to JSON types.

    Arrays become lists, NaN and infinity become None, and objects of other types become strings.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _shown(value: Any) -> str:
    """Format a cell's value; round floats to four significant digits and truncate long texts."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        value = ", ".join(map(_shown, value))
    text = "" if value is None else str(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"


def _escaped(text: object) -> str:
    """Escape the special characters of HTML, and control characters."""
    return html.escape(printable(text))
