"""The constructor of gates: interventions that act only where a projection says so."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.interventions.bank import Bank, check_finite, numbers
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.gates import Gate, Over
from jaxpersona.interventions.table import Site, Table, traced
from jaxpersona.interventions.where import Where, as_where, encoded, everywhere, prompt
from jaxpersona.models.batch import GENERATED
from jaxpersona.runtime import own_rules


@own_rules()
def gate(
    interventions: Interventions,
    vector: Any,
    *,
    layer: int,
    above: Any = None,
    below: Any = None,
    over: Over = "prompt",
    within: bool = False,
    where: Where | str | None = None,
    site: Site = "residual",
) -> Interventions:
    """Let interventions act only where the projection on a direction lies within bounds.

    Source: conditional activation steering (Lee et al. 2024), with the projection as its measure.
    A gate that measured no token is shut.

    Args:
      interventions: of one chain; none of them gated already.
      vector: the direction, [D] or a named one; for a bank with `rows=` also one for each of its
        edits, [n, D] or a list.
      layer, site: where it is measured (after any edit there); before every layer it gates.
      above, below: the bounds, a number or for a bank [n]; at least one. −inf above and inf below
        are no bound.
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
    where = as_where(where)
    test = encoded(where)
    if over == "prompt" and where.need & GENERATED:
        raise ValueError("where is for generated tokens, of which a prompt has none; use "
                         "over='token' or another where")
    return Interventions(tuple(
        _gated(table, vector, layer, {"above": above, "below": below}, test, site, over, within)
        for table in interventions.edits))


def _gated(table: Table, vector: Any, layer: int, bounds: dict[str, Any], test: np.ndarray,
           site: Site, over: Over, within: bool) -> Table:
    """Put a gate before one table."""
    if table.gate is not None:
        raise ValueError("interventions has a gate already; gate each part once, then chain")
    bank = Bank(vector, [layer], None if table.index is None else [0], site)
    direction, size = bank.direction[0], table.entries
    # those that fill a table up have a test that no token passes
    real = size if traced(table.where) else int((np.asarray(table.where)[:, 0] >= 0).sum())
    if direction.shape[0] not in (1, real):
        raise ValueError(f"the gate has {direction.shape[0]} directions; the bank has {real} edits")
    lo, hi = (_spread(name, value, real) for name, value in bounds.items())
    if not traced(lo, hi) and (lo > hi).any():
        raise ValueError("above is greater than below; no projection lies between them")
    entry = np.array([*range(real), *[0] * (size - real)])
    xp: Any = jnp if traced(lo, hi) else np
    made = Gate(
        direction=jnp.asarray(direction[entry if len(direction) > 1 else 0 * entry], jnp.float32),
        bounds=jnp.asarray(xp.stack([lo, hi], -1)[entry], jnp.float32),
        where=jnp.asarray(np.broadcast_to(test, (size, test.size)), jnp.int32),
        origin=jnp.asarray(bank.origin[entry if len(bank.origin) > 1 else 0 * entry]),
        layer=bank.layers[0], site=site, over=over, within=within)
    if not made.precedes(table.layers[0], table.site):
        raise ValueError(f"the gate's layer {layer} ({site}) is not before layer "
                         f"{table.layers[0]} ({table.site}), which it gates")
    return table.replace(gate=made)  # pyright: ignore[reportAttributeAccessIssue]


def _spread(name: str, value: Any, count: int) -> Any:
    """Return a bound for each of `count` entries; None stands open."""
    if value is None:
        return np.full(count, -np.inf if name == "above" else np.inf)
    given = numbers(name, value)
    if not traced(given):
        check_finite(name, given)
    if given.shape not in ((), (1,), (count,)):
        raise ValueError(f"{name} has shape {given.shape}; it must be a number or [{count}], one "
                         "for each edit of the bank")
    return (jnp if traced(given) else np).broadcast_to(given.reshape(-1), (count,))
