"""What is said of readings that found no token, whose values are NaN."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

_LOG = logging.getLogger("jaxpersona")


def warn_of_empty(name: str, empty: Any) -> None:
    """Log a warning of rows of which a reading saw no token, where the values are known.

    Args:
      name: what the reading is called.
      empty: [B] bool.
    """
    if isinstance(empty, jax.core.Tracer) or not getattr(empty, "is_fully_addressable", True):
        return
    if (rows := np.flatnonzero(jax.device_get(empty))).size:
        _LOG.warning("%r %s", name, describe_empty(rows, len(empty), "rows"))


def describe_empty(numbers: Any, total: int, what: str) -> str:
    """Say of which rows or conversations a reading saw no token, and what to do."""
    some = ", ".join(map(str, list(numbers)[:5])) + (", …" if len(numbers) > 5 else "")
    return (f"read no token of {len(numbers)} of {total} {what} ({some}), so their values are NaN: "
            "no token there is one that its where= asks for (by default those of assistant "
            "messages); give them such tokens, or read others with where=")


def result_of(state: Any) -> Any:
    """Return a state's value; whoever calls this tells of missing tokens itself."""
    return state.result() if hasattr(state, "result") else state.value
