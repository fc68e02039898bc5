"""The readings `Mean`, `Last`, `Norms` and `Full` of the activations of selected tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.brief import brief
from jaxpersona.captures.reading import (
    F32,
    Reading,
    State,
    TokenState,
    numpy_of,
    write_slots,
)
from jaxpersona.interventions.where import holds
from jaxpersona.models.batch import Batch

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

LARGE = 1e9  # `Full` logs a warning if its array has at least this size in bytes
_LOG = logging.getLogger("jaxpersona")


class Mean(Reading, kw_only=True, repr=False):
    """The mean activation of the selected tokens, per message if `turns` is given.

    Attributes:
      turns: the number M of leading messages, each of which is averaged separately, or None for
        one mean over all selected tokens.
    """

    needs_token: ClassVar[bool] = True

    turns: int | None = flax.struct.field(pytree_node=False, default=None)

    def init(self, layers: int, rows: int, slots: int, width: int) -> MeanState:
        """Return the initial state, before any token is read."""
        shape = (rows,) if self.turns is None else (rows, self.turns)
        return MeanState(jnp.zeros((layers, *shape, width), F32), jnp.zeros(shape, F32))

    def weights(self, batch: Batch) -> Float[Array, "B ... T"]:
        """Return float32 weights [B, T] or, with `turns`, [B, M, T]: 1 if selected, else 0."""
        chosen = holds(self.where, batch)
        if self.turns is not None:
            turn = jnp.arange(self.turns, dtype=jnp.int32)
            chosen = chosen[:, None] & (batch.turn[:, None] == turn[None, :, None])
        return chosen.astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return the sum of h [B, T, D] over selected tokens, [B, D], or [B, M, D] with `turns`."""
        form = "btd,bt->bd" if self.turns is None else "btd,bmt->bmd"
        return jnp.einsum(form, h.astype(F32), weights, precision="highest")

    def update(self, state: MeanState, reductions: jax.Array, weights: jax.Array, batch: Batch,
               slots: jax.Array) -> MeanState:
        """Add the sums [L, …] and the token counts of one call of `forward` to the state."""
        return MeanState(state.total + reductions, state.count + weights.sum(-1))

    def details(self) -> list[str]:
        """Return ["turns=M"] if messages are averaged separately, else an empty list."""
        return [] if self.turns is None else [f"turns={self.turns}"]


class MeanState(State):
    """The sum of the selected tokens' activations and the number of these tokens.

    Attributes:
      total: [L, B, D] float32, or [L, B, M, D] with `turns`.
      count: [B] float32, or [B, M] with `turns`.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]] = (1, 0)
    label: ClassVar[str] = "mean"

    total: Float[Array, "L B ..."]
    count: Float[Array, "B ..."]

    def result(self) -> Any:
        """Return means [B, L, D], or [B, L, M, D] with `turns`; NaN where no token was selected."""
        count, xp = self.count[None, ..., None], numpy_of(self.total)
        mean = xp.where(count > 0, self.total / xp.maximum(count, 1.0), xp.nan)
        return xp.moveaxis(mean, 0, 1)

    @property
    def empty(self) -> Bool[Array, " B"]:
        """[B] bool: True for rows in which no token was selected."""
        return (self.count == 0).reshape(self.count.shape[0], -1).all(-1)


class Last(Reading, kw_only=True, repr=False):
    """The activation of the last selected token."""

    needs_token: ClassVar[bool] = True

    def init(self, layers: int, rows: int, slots: int, width: int) -> LastState:
        """Return the initial state, before any token is read."""
        return LastState(jnp.zeros((layers, rows, width), F32), jnp.full((rows,), -1, jnp.int32))

    def weights(self, batch: Batch) -> Float[Array, "B T"]:
        """Return float32 weights [B, T]: 1 for each row's last selected token, else 0."""
        at = jnp.where(holds(self.where, batch), batch.position, -1)
        top = at.max(-1, keepdims=True)
        return ((at == top) & (top >= 0)).astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return h [B, T, D] at each row's last selected token, [B, D]; 0 if a row has none."""
        return jnp.einsum("btd,bt->bd", h.astype(F32), weights, precision="highest")

    def update(self, state: LastState, reductions: jax.Array, weights: jax.Array, batch: Batch,
               slots: jax.Array) -> LastState:
        """Replace the stored activations of the rows that have a selected token in this call."""
        selected = weights.sum(-1) > 0
        position = (weights.astype(jnp.int32) * batch.position).sum(-1)
        return LastState(
            jnp.where(selected[None, :, None], reductions, state.latest),
            jnp.where(selected, position, state.position),
        )


class LastState(State):
    """The activation of the last selected token so far.

    Attributes:
      latest: [L, B, D] float32.
      position: [B] int32, the position of this token; −1 before the first selected token.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]] = (1, 0)
    label: ClassVar[str] = "last"

    latest: Float[Array, "L B D"]
    position: Int[Array, " B"]

    def result(self) -> Any:
        """Return the activations [B, L, D]; NaN for rows in which no token was selected."""
        seen, xp = (self.position >= 0)[None, :, None], numpy_of(self.latest)
        return xp.moveaxis(xp.where(seen, self.latest, xp.nan), 0, 1)

    @property
    def empty(self) -> Bool[Array, " B"]:
        """[B] bool: True for rows in which no token was selected."""
        return self.position < 0


class Norms(Reading, kw_only=True, repr=False):
    """The norm ‖h‖ of each selected token's activation."""

    def init(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Return a state with an array [L, B, S] of NaN."""
        return TokenState(jnp.full((layers, rows, slots), jnp.nan, F32))

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return the norms [B, T] of h [B, T, D]; NaN for tokens that are not selected."""
        return jnp.where(weights, jnp.linalg.norm(h.astype(F32), axis=-1), jnp.nan)

    def update(self, state: TokenState, reductions: jax.Array, weights: jax.Array, batch: Batch,
               slots: jax.Array) -> TokenState:
        """Write the values of one call into the slots of its tokens."""
        return TokenState(write_slots(state.values, reductions, slots))


class Full(Reading, kw_only=True, repr=False):
    """The activations of all selected tokens."""

    def init(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Log the size of the state; return a state with an array [L, B, S, D] of NaN."""
        size = 4 * layers * rows * slots * width
        _LOG.log(logging.WARNING if size >= LARGE else logging.INFO,
                 "a capture of full activations takes %.3g GB (layers: %d, rows: %d, slots: %d, "
                 "width: %d, dtype: float32)", size / 1e9, layers, rows, slots, width)
        return TokenState(jnp.full((layers, rows, slots, width), jnp.nan, F32))

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return h [B, T, D] of one layer in float32; NaN for tokens that are not selected."""
        return jnp.where(weights[..., None], h.astype(F32), jnp.nan)

    def update(self, state: TokenState, reductions: jax.Array, weights: jax.Array, batch: Batch,
               slots: jax.Array) -> TokenState:
        """Write the values of one call into the slots of its tokens."""
        return TokenState(write_slots(state.values, reductions, slots))
