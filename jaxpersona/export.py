"""Results as tables: HTML in notebooks, a pandas frame, and JSON."""

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

ROWS, CHARACTERS = 20, 400  # of a table in a notebook; more are left out
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:44em"


class Table:
    """A result that is a table of records; subclasses define `records` and perhaps `facts`."""

    def records(self) -> list[dict[str, Any]]:
        """Return one dict of plain values per row, all with the same keys."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what belongs to the result as a whole."""
        return {}

    def to_frame(self) -> pandas.DataFrame:
        """Return the records as a pandas DataFrame.

        Raises:
          UserError: pandas is not installed.
        """
        return require("pandas", "to_frame needs pandas").DataFrame(self.records())

    def to_json(self) -> str:
        """Return the facts and the records as JSON: {"kind", …, "records": […]}.

        Numbers that JSON lacks, NaN and infinity, become null.
        """
        return json.dumps({"kind": type(self).__name__, **plain(self.facts()),
                           "records": plain(self.records())}, ensure_ascii=False, allow_nan=False)

    def _repr_html_(self) -> str:
        """Return the table for a notebook, with every text escaped."""
        records = self.records()
        rows = [{name: value for name, value in row.items() if not self._left_out(name)}
                for row in records[:ROWS]]
        return page(repr(self), self.facts(), rows, len(records))

    def _left_out(self, column: str) -> bool:
        """Return whether notebooks leave a column out."""
        return False


def page(caption: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
         total: int) -> str:
    """Return an HTML table of the first of `total` rows, below the facts."""
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
        parts.append(f"<p>… {total - len(rows):,} more rows</p>")
    # the classes keep notebooks from typesetting text between dollar signs as a formula
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def shapes(captured: Mapping[str, Any]) -> dict[str, str]:
    """Return the shapes of captured arrays by name, for `facts`; the arrays are not exported."""
    found = {}
    for name, value in captured.items():
        several = isinstance(value, list)
        shape = getattr(value[0] if several and value else value, "shape", None)
        found[name] = type(value).__name__ if shape is None else (
            f"{len(value)} × {list(shape)}" if several else str(list(shape)))
    return {"captured": ", ".join(f"{name} {shape}" for name, shape in found.items())
            } if found else {}


def plain(value: Any) -> Any:
    """Return a value as JSON types: arrays as lists, numbers that JSON lacks as None."""
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
    """Return a value of a cell: four digits of a number, the beginning of a long text."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        value = ", ".join(map(_shown, value))
    text = "" if value is None else str(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} …"


def _escaped(text: object) -> str:
    """Escape HTML and control characters."""
    return html.escape(printable(text))
