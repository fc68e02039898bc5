"""Warnings about captures whose values are NaN because no token was selected."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from jaxpersona.interventions.describe import host_array

_LOG = logging.getLogger("jaxpersona")
# what to do if a capture selects no token
FIX = ("add tokens that where= selects (by default, the content of assistant messages; for last, "
       "any token), or select other tokens with where=")


def warn_of_empty(name: str, empty: Any) -> None:
    """Log a warning about the rows in which a capture selected no token.

    Nothing is logged while tracing, or if some rows are on devices of other processes.

    Args:
      name: the capture's name.
      empty: [B] bool, True for rows in which the capture selected no token.
    """
    values = host_array(empty)
    if values is not None and (rows := np.flatnonzero(values)).size:
        _LOG.warning("capture %r %s", name, describe_empty(rows, len(values), "row"))


def describe_empty(numbers: Any, total: int, what: str) -> str:
    """Return a message about the rows or conversations in which a capture selected no token.

    Args:
      numbers: the indices of these rows or conversations, at least one.
      total: the number of rows or conversations.
      what: "row" or "conversation".

    Returns:
      The part of the message that follows the name of the capture, ending with the fix.
    """
    values_are = "their values are" if len(numbers) > 1 else "its value is"
    return f"{no_token(numbers, total, what)}, so {values_are} NaN; {FIX}"


def no_token(numbers: Any, total: int, what: str) -> str:
    """Return the start of `describe_empty`'s message, e.g. "selects no token in row 0 (1 of 2)"."""
    some = ", ".join(map(str, list(numbers)[:5])) + (", …" if len(numbers) > 5 else "")
    plural = "s" if len(numbers) > 1 else ""
    return f"selects no token in {what}{plural} {some} ({len(numbers)} of {total})"
