"""Gates, which apply an intervention only if a projection at an earlier site is within bounds.

A prompt gate tests the mean projection over a row's prompt, and applies to the prompt's last token
(with `within`, to all its tokens) and the whole reply. A token gate is evaluated for every token.
Bounds and directions are data and may differ between rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.interventions.table import ORDER, Site
from jaxpersona.interventions.where import holds
from jaxpersona.models.batch import GENERATED, LAST, Batch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt

Over = Literal["prompt", "token"]


class Gate(flax.struct.PyTreeNode, kw_only=True, repr=False):
    """The gates of a table's n entries.

    Attributes:
      direction: v̂ [n, D] float32, unit length.
      bounds: (lo, hi) [n, 2] float32; the gate is open if the projection p satisfies lo ≤ p ≤ hi.
      where: encoded token tests [n, 5] int32, which select the tokens whose projections are
        measured.
      origin: [n] uint32, as in `Table`.
      layer, site: the layer and the site at which the projection is measured.
      over: "prompt" to test the mean projection over the prompt, "token" to test every token's
        projection.
      within: whether a prompt gate applies to all tokens of the prompt, not only to the last.
    """

    direction: Float[Array, "n D"]
    bounds: Float[Array, "n 2"]
    where: Int[Array, "n 5"]
    origin: UInt[Array, " n"]
    layer: int = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False)
    over: Over = flax.struct.field(pytree_node=False)
    within: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def key(self) -> tuple:
        """The gate's structure; entries whose gates have equal keys can be in one table."""
        return (self.layer, self.site, self.over, self.within)

    @staticmethod
    def gather(gates: Sequence[Gate]) -> Gate:
        """Concatenate the first entry of each gate; all gates must have equal keys."""
        return jax.tree.map(lambda *x: jnp.concatenate([y[:1] for y in x]), *gates)

    def condition(self) -> str:
        """Return the layer, the site (if not "residual") and `over`, as in "layer 2, prompt"."""
        site = "" if self.site == "residual" else f"{self.site}, "
        return f"layer {self.layer}, {site}{self.over}"

    def __repr__(self) -> str:
        """Return the condition as a call, such as `Gate(layer 2, prompt)`."""
        return f"Gate({self.condition()})"

    def precedes(self, layer: int, site: Site) -> bool:
        """Return whether the gate is evaluated before the edits at `site` of `layer`."""
        return (self.layer, ORDER[self.site]) < (layer, ORDER[site])

    def init(self, rows: int, before: jax.Array | None = None) -> GateState:
        """Return the initial state of the gate.

        Args:
          rows: the number of rows B.
          before: [B] int32, the number of tokens in the cache of each row, or None for an empty
            cache. The projections of cached tokens are unknown, so the prompt gate of a row with
            cached tokens stays closed: its sum is NaN, which is within no bounds.
        """
        zero = jnp.zeros((rows,), jnp.float32)
        missing = (zero if before is None else
                   jnp.where(before > 0, jnp.nan, 0.0).astype(jnp.float32))
        return GateState(zero + missing, zero)

    def measure(self, h: jax.Array, batch: Batch,
                state: GateState) -> tuple[jax.Array, GateState]:
        """Measure the projections of h [B, T, D] and evaluate the gate.

        Returns:
          [B, T] bool, True for tokens at which the gate is open, and the state after this call,
          which is unchanged for a token gate.
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
        gated = (kind & (LAST | GENERATED)) != 0
        if self.within:  # gate all prompt tokens if this call contains the last prompt token
            gated = gated | (kind & LAST).any(-1, keepdims=True)
        return opened & gated, state


class GateState(flax.struct.PyTreeNode):
    """The sum and the number of each row's measured prompt projections, each [B] float32."""

    total: Float[Array, " B"]
    count: Float[Array, " B"]
