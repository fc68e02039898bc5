"""Functions that format the one-line representations of interventions and captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpersona.interventions.where import WIDTH, decoded
from jaxpersona.runtime import is_traced


def call(name: str, *arguments: str) -> str:
    """Format a call as `name(a, b)`, omitting empty arguments."""
    return f"{name}({', '.join(filter(None, arguments))})"


def layer_range(layers: Sequence[int]) -> str:
    """Format layers as "layer 4", "layers 4–7" (inclusive) or, if there are gaps, "layers 0, 2"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}–{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def host_array(x: Any) -> np.ndarray | None:
    """Return an array's values as a NumPy array, or None if they cannot be read.

    The values of a traced array, of an array with shards in other processes, and of a donated
    array cannot be read.
    """
    if isinstance(x, np.ndarray):
        return x
    if is_traced(x) or not isinstance(x, jax.Array):
        return None
    return jax.device_get(x) if x.is_fully_addressable and not x.is_deleted() else None


def tests(code: Any) -> str:
    """Return a short description of encoded token tests [5] or [n, 5].

    Padding entries, whose test no token passes, are ignored.

    Returns:
      The representation of the test if all entries have the same test; "k selections" for k
      different tests; "nowhere" if all entries are padding; "traced" if the values cannot be read
      or the array has another shape.
    """
    values = host_array(code)
    if values is None or values.ndim > 2 or values.shape[-1:] != (WIDTH,):
        return "traced"
    distinct = dict.fromkeys(decoded(row) for row in values.reshape(-1, WIDTH) if row[0] >= 0)
    if len(distinct) == 1:
        return repr(next(iter(distinct)))
    return f"{len(distinct)} selections" if distinct else "nowhere"
