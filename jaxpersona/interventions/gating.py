"""The `gate` operator, which makes interventions conditional on a projection."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Bank, check_finite, numbers
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.gates import Gate, Over
from jaxpersona.interventions.table import Site, Table
from jaxpersona.interventions.where import Where, as_where, encoded, everywhere, prompt
from jaxpersona.models.batch import GENERATED
from jaxpersona.runtime import is_traced, own_rules


@checked_call
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
    """Apply interventions only if the projection onto a direction is within bounds.

    A prompt gate is closed if no token of the prompt is measured. A token gate is closed at tokens
    that are not measured. Source: conditional activation steering (Lee et al. 2024), with the
    projection as the condition.

    Args:
      interventions: the interventions to gate, which must not have gates already.
      vector: the direction, as an array [D] or a named direction. If the interventions have a bank
        of n directions (`rows=`), `vector` may also contain n directions, one per direction of the
        bank, as an array [n, D] or a list.
      layer, site: the layer and the site at which the projection is measured, after the edits at
        that site. This site must precede all gated sites.
      above, below: the lower and the upper bound (inclusive), each a number or, for a bank, an
        array [n]. At least one is required; −inf for `above` and inf for `below` mean no bound.
      over: with "prompt", each row has one gate, which tests the mean projection over the prompt
        and applies to the prompt's last token and all later tokens. With "token", the gate is
        evaluated for each token.
      within: whether a prompt gate also applies to the other tokens of the prompt. The whole prompt
        must then be processed in one call of `forward`.
      where: the tokens whose projections are measured. By default, these are all tokens (of the
        prompt, for over="prompt") except the first token of a row, which is often an attention
        sink.

    Raises:
      UserError: both bounds are missing, the gate's site does not precede all gated sites, the
        interventions are empty or already have a gate, or another argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> axis = jp.load_axis("mini")
      >>> jp.gate(jp.cap(axis, layers=4, floor="p25"), axis, layer=2, below=3.0)
      gate(cap(everywhere, layer 4, residual), layer 2, prompt)
    """
    if above is None and below is None:
        raise UserError("gate needs a bound; give above=, below= or both")
    if over not in ("prompt", "token"):
        raise UserError(f"over is {over!r}; it must be 'prompt' or 'token'")
    if within and over == "token":
        raise UserError("within=True is only for over='prompt'; omit it, because a token gate is "
                        "evaluated for each token")
    if interventions is None or not given(interventions).edits:
        raise UserError("interventions is empty; give interventions to gate")
    if where is None:
        where = (prompt if over == "prompt" else everywhere).without("first")
    where = as_where(where)
    test = encoded(where)
    if over == "prompt" and where.need & GENERATED:
        raise UserError("where= selects generated tokens, which a prompt does not contain; use "
                        "over='token' or a different value of where=")
    return Interventions(tuple(
        _gated(table, vector, layer, {"above": above, "below": below}, test, site, over, within)
        for table in interventions.edits))


def _gated(table: Table, vector: Any, layer: int, bounds: dict[str, Any], test: np.ndarray,
           site: Site, over: Over, within: bool) -> Table:
    """Return a copy of a table with the gate that the other arguments describe.

    Raises:
      UserError: the table already has a gate, or the gate is invalid for the table.
    """
    if table.gate is not None:
        raise UserError("interventions already have a gate; call gate once for each intervention, "
                        "then chain the results")
    bank = Bank(vector, [layer], None if table.index is None else [0], site)
    direction, size = bank.direction[0], table.entries
    # padding has the token test NOWHERE, which starts with a negative number
    real = size if is_traced(table.where) else int((np.asarray(table.where)[:, 0] >= 0).sum())
    if direction.shape[0] not in (1, real):
        raise UserError(f"the gate has {direction.shape[0]} directions, but the number of edits "
                        f"in the bank is {real}; give one direction, or one per edit")
    lo, hi = (_spread(name, value, real) for name, value in bounds.items())
    if not is_traced(lo, hi) and (lo > hi).any():
        raise UserError("above= is greater than below=, so no projection satisfies both; lower "
                        "above= or raise below=")
    entry = np.array([*range(real), *[0] * (size - real)])
    xp: Any = jnp if is_traced(lo, hi) else np
    made = Gate(
        direction=jnp.asarray(direction[entry if len(direction) > 1 else 0 * entry], jnp.float32),
        bounds=jnp.asarray(xp.stack([lo, hi], -1)[entry], jnp.float32),
        where=jnp.asarray(np.broadcast_to(test, (size, test.size)), jnp.int32),
        origin=jnp.asarray(bank.origin[entry if len(bank.origin) > 1 else 0 * entry]),
        layer=bank.layers[0], site=site, over=over, within=within)
    if not made.precedes(table.layers[0], table.site):
        raise UserError(f"the gate's layer {layer} ({site}) is not before layer "
                        f"{table.layers[0]} ({table.site}), which it gates; use an earlier layer")
    return table.replace(gate=made)


def _spread(name: str, value: Any, count: int) -> Any:
    """Broadcast the bound `name` ("above" or "below") to an array [count]; None means no bound.

    Raises:
      UserError: the bound is not numeric, `check_finite` rejects it, or its shape is invalid.
    """
    if value is None:
        return np.full(count, -np.inf if name == "above" else np.inf)
    given = numbers(name, value)
    if not is_traced(given):
        check_finite(name, given)
    if given.shape not in ((), (1,), (count,)):
        raise UserError(f"{name} has shape {given.shape}; it must be a number or an array "
                        f"[{count}] with one number per edit of the bank")
    return (jnp if is_traced(given) else np).broadcast_to(given.reshape(-1), (count,))
