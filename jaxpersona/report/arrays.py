"""The values of curves: validation, quartiles and confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import numbers

MOST = 14  # maximum number of curves, so that all differ in colour, marker or line style


def half_width(values: np.ndarray) -> float:
    """Return 1.96 standard errors of the mean; NaN for fewer than two values."""
    return 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means and the 25th and 75th percentiles [M] of the rows of `values` [M, N].

    Non-finite values are ignored; the results are NaN for a row without finite values.
    """
    table = np.full((3, len(values)), np.nan)
    for i, row in enumerate(values):
        known = row[np.isfinite(row)]
        if known.size:
            table[:, i] = known.mean(), *np.percentile(known, [25, 75])
    return table[0], table[1], table[2]


def curves_of(given: Any, dims: tuple[int, ...] = (1, 2)) -> dict[str, np.ndarray]:
    """Validate curves and return them as float64 arrays [M] or [M, N].

    Args:
      given: name → values.
      dims: the allowed numbers of dimensions.

    Raises:
      UserError: there are no curves or more than `MOST`, their lengths differ, or a curve is not
        numeric, has a number of dimensions not in `dims`, or has no finite value.
    """
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"curves is {shown(given, 60)}; give a dict of arrays by name")
    if len(given) > MOST:
        raise UserError(f"curves has {len(given)} entries; give at most {MOST}, because more "
                        "curves cannot be distinguished")
    found = {}
    for name, value in given.items():
        array = numbers(f"curves[{name!r}]", value)
        if array.ndim not in dims or not np.isfinite(array).any():
            shapes = " or ".join({1: "[M]", 2: "[M, N]"}[n] for n in dims)
            raise UserError(f"curves[{name!r}] is {shown(value, 60)}; give an array {shapes} "
                            "with at least one finite number")
        found[str(name)] = array
    if len({len(array) for array in found.values()}) > 1:
        raise UserError("curves differ in length: "
                        + ", ".join(f"{name} {len(array)}" for name, array in found.items()))
    return found
