"""The constructor of gates: interventions that act only where a projection says so."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.interventions.bank import Bank
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.gates import Gate, Over
from jaxpersona.interventions.table import Site
from jaxpersona.interventions.where import Where, everywhere, prompt


def gate(
    interventions: Interventions,
    vector: Any,
    *,
    layer: int,
    above: Any = None,
    below: Any = None,
    over: Over = "prompt",
    within: bool = False,
    where: Where | None = None,
    site: Site = "residual",
) -> Interventions:
    """Let interventions act only where the projection on a direction lies within bounds.

    Source: conditional activation steering (Lee et al. 2024), with the projection as its measure.
    A gate that measured no token is shut.

    Args:
      interventions: of one chain; none of them gated already.
      vector: the direction, [D] or a named one; for a bank with `rows=` also one for each entry,
        [n, D] or a list.
      layer, site: where it is measured (after any edit there); before every layer it gates.
      above, below: the bounds, a number or for a bank [n]; at least one.
      over: "prompt": a row's mean over its prompt decides for the row, from its prompt's last token
        on. "token": every token decides for itself.
      within: with "prompt", act on the whole prompt too. It must then be run in one piece.
      where: the tokens that are measured; by default all but the first, an attention sink.

    Raises:
      ValueError: no bound, a layer that is not before what it gates, a second gate, or a direction
        that does not fit; field, value and mend.
    """
    if above is None and below is None:
        raise ValueError("gate needs a bound: above, below or both")
    if over not in ("prompt", "token"):
        raise ValueError(f"over is {over!r}; it must be 'prompt' or 'token'")
    if within and over == "token":
        raise ValueError("within is for over='prompt'; a gate over tokens acts within it already")
    if not interventions.edits:
        raise ValueError("interventions is empty; there is nothing to gate")
    if where is None:
        where = (prompt if over == "prompt" else everywhere).without("first")
    gated = []
    for table in interventions.edits:
        if table.gate is not None:
            raise ValueError("interventions has a gate already; gate each part once, then chain")
        bank = Bank(vector, [layer], [0] if table.index is None else table.index, site)
        lo = bank.spread("above", -np.inf if above is None else above)[0]
        hi = bank.spread("below", np.inf if below is None else below)[0]
        if (lo > hi).any():
            raise ValueError("above is greater than below; no projection lies between them")
        n, size = len(lo), table.entries
        if n not in (1, size) and not n <= size < 2 * n:
            raise ValueError(f"the gate has {n} directions; the bank has {size} entries")
        spread = [*range(n), *[n - 1] * (size - n)]
        made = Gate(
            direction=jnp.asarray(bank.direction[0][spread], jnp.float32),
            bounds=jnp.asarray(np.stack([lo, hi], -1)[spread], jnp.float32),
            where=jnp.asarray(np.broadcast_to(where.encode(), (size, 5)), jnp.int32),
            origin=jnp.asarray(bank.origin[spread]),
            layer=bank.layers[0], site=site, over=over, within=within)
        if not made.precedes(table.layers[0], table.site):
            raise ValueError(f"the gate's layer {layer} ({site}) is not before layer "
                             f"{table.layers[0]} ({table.site}), which it gates")
        gated.append(table.replace(gate=made))
    return Interventions(tuple(gated))
