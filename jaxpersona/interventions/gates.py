"""Gates: an intervention that acts only where a projection at an earlier layer says so.

Over the prompt, a row's mean projection opens or shuts the gate once, for the whole reply. Over
tokens, every token opens it for itself. Bounds and directions are data and may differ by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.interventions.table import ORDER, Site
from jaxpersona.interventions.where import holds
from jaxpersona.models.batch import GENERATED, LAST, Batch

Over = Literal["prompt", "token"]


@flax.struct.dataclass(kw_only=True)
class Gate:
    """What must hold before a table's entries act.

    Attributes:
      direction: v̂ [n, D] float32, unit length.
      bounds: (lo, hi) [n, 2] float32; open where lo ≤ ⟨h, v̂⟩ ≤ hi.
      where: encoded tests [n, 5] int32: the tokens that are measured.
      origin: [n] uint32, as in `Table`.
      layer, site: where in the model.
      over: "prompt", the mean of the prompt's tokens, or "token", each by itself.
      within: a gate over the prompt lets the table act on the prompt's own tokens.
    """

    direction: Any
    bounds: Any
    where: Any
    origin: Any
    layer: int = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False)
    over: Over = flax.struct.field(pytree_node=False)
    within: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def key(self) -> tuple:
        """The structure: two gates that share it can be entries of one table."""
        return (self.layer, self.site, self.over, self.within)

    @staticmethod
    def gather(gates: Sequence[Gate]) -> Gate:
        """Stack the first entries of gates that share a key."""
        return jax.tree.map(lambda *x: jnp.concatenate([y[:1] for y in x]), *gates)

    def precedes(self, layer: int, site: Site) -> bool:
        """Whether the gate is measured before a block's site is reached."""
        return (self.layer, ORDER[self.site]) < (layer, ORDER[site])

    def start(self, rows: int, before: jax.Array | None = None) -> GateState:
        """Return the measurements before any token.

        Args:
          before: [B] int32, tokens that a cache already holds. A row that has some was measured
            elsewhere, and that was not handed on: its gate stays shut.
        """
        zero = jnp.zeros((rows,), jnp.float32)
        lost = zero if before is None else jnp.where(before > 0, jnp.nan, 0.0).astype(jnp.float32)
        return GateState(zero + lost, zero)

    def measure(self, h: jax.Array, batch: Batch,
                state: GateState) -> tuple[jax.Array, GateState]:
        """Measure h [B, T, D].

        Returns:
          [B, T] bool: the tokens that the gate lets through; and the grown state.
        """
        wide = h.astype(jnp.float32)
        p = jnp.einsum("btd,btd->bt", wide, jnp.broadcast_to(self.direction[:, None], h.shape),
                       precision="highest")
        chosen = holds(self.where, batch)
        lo, hi = self.bounds[:, :1], self.bounds[:, 1:]
        if self.over == "token":
            return chosen & (p >= lo) & (p <= hi), state
        kind = batch.kind.astype(jnp.int32)
        weight = (chosen & ((kind & GENERATED) == 0)).astype(jnp.float32)
        state = GateState(state.total + (p * weight).sum(-1), state.count + weight.sum(-1))
        mean = (state.total / jnp.maximum(state.count, 1.0))[:, None]
        opened = (state.count[:, None] > 0) & (mean >= lo) & (mean <= hi)
        reach = (kind & (LAST | GENERATED)) != 0
        if self.within:  # the prompt's own tokens too, where all of it is here
            reach = reach | (kind & LAST).any(-1, keepdims=True)
        return opened & reach, state


@flax.struct.dataclass
class GateState:
    """A row's projections over its prompt so far: their sum [B] and their number [B], float32."""

    total: Any
    count: Any
