"""Warnings for readings that selected no token and are therefore NaN."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

_LOG = logging.getLogger("jaxpersona")


def warn_of_empty(name: str, empty: Any) -> None:
    """Log a warning that lists the rows in which a reading selected no token.

    Does nothing while tracing, or if this process cannot read the values.

    Args:
      name: the reading's name.
      empty: [B] bool, True for rows without a selected token.
    """
    if isinstance(empty, jax.core.Tracer) or not getattr(empty, "is_fully_addressable", True):
        return
    if (rows := np.flatnonzero(jax.device_get(empty))).size:
        _LOG.warning("%r %s", name, describe_empty(rows, len(empty), "rows"))


def describe_empty(numbers: Any, total: int, what: str) -> str:
    """Describe the rows or conversations without a selected token, and the remedy."""
    some = ", ".join(map(str, list(numbers)[:5])) + (", …" if len(numbers) > 5 else "")
    return (f"read no token of {len(numbers)} of {total} {what} ({some}), so their values are NaN: "
            "no token matches its where= (by default, those of assistant messages); add such "
            "tokens, or select others with where=")


def result_of(state: Any) -> Any:
    """Return a state's value without a warning of missing tokens; the caller gives it."""
    return state.result() if hasattr(state, "result") else state.value
