"""The `sweep` operator, which steers each batch row with its own strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Layers
from jaxpersona.interventions.compose import Interventions, stack_rows
from jaxpersona.interventions.operators import steer
from jaxpersona.interventions.table import Site
from jaxpersona.interventions.where import Where, everywhere
from jaxpersona.runtime import own_rules


@checked_call
@own_rules()
def sweep(
    vector: Any,
    scales: Sequence[float],
    *,
    layers: Layers,
    where: Where | str = everywhere,
    site: Site = "residual",
) -> Interventions:
    """Steer batch row b with strength scales[b]: h ← h + scales[b]·v.

    Args:
      vector: one direction, in a form that `steer` accepts.
      scales: B strengths, one per batch row; a row with strength 0 is unchanged.
      layers, where, site: as for `steer`.

    Raises:
      UserError: `scales` is not a non-empty list of finite numbers, or an argument is invalid (see
        `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> model, axis = jp.load("mini"), jp.load_axis("mini")
      >>> rows = jp.sweep(axis, [-2, 0, 2], layers=4)
      >>> len(jp.generate(model, ["Who are you?"] * 3, interventions=rows, max_new_tokens=2).text)
      3
    """
    try:
        given = np.asarray(scales)
    except ValueError:  # NumPy rejects nested lists of different lengths
        given = np.zeros(0)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "fiu":
        raise UserError(f"scales is {shown(scales, 60)}; give a non-empty list of numbers, one "
                        "per row")
    rows = [steer(vector, layers=layers, scale=float(scale), where=where, site=site)
            for scale in given]
    return stack_rows([None if scale == 0 and given.any() else row
                       for scale, row in zip(given, rows, strict=True)])
