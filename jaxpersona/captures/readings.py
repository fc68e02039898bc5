"""Readings: the reductions of captures, and their states.

Every reading has four methods: `start` returns the initial state, `weights` selects the tokens,
`read` reduces the activations of one layer, and `add` adds the results of a call to the state. The
`value` of a state is the result.
"""

from __future__ import annotations

import logging
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.missing import warn_of_empty
from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.interventions.table import Site
from jaxpersona.interventions.where import holds
from jaxpersona.models.batch import Batch
from jaxpersona.models.cache import by_slot, set_lines

F32 = jnp.float32
LARGE = 1e9  # bytes of full activations from which their size is logged as a warning
_LOG = logging.getLogger("jaxpersona")


class MeanState(flax.struct.PyTreeNode):
    """The sum of activations and the number of tokens; `value` is the mean."""

    total: Any  # [L, B, D], with `turns` [L, B, M, D], float32
    count: Any  # [B], with `turns` [B, M], float32
    rows = (1, 0)  # the batch axis of each field

    @property
    def value(self) -> Any:
        """[B, L, D], with `turns` [B, L, M, D]; NaN, with a warning, for rows without a token."""
        warn_of_empty("mean", self.empty)
        return self.result()

    @property
    def empty(self) -> Any:
        """[B] bool: True for rows without a token in any message."""
        return (self.count == 0).reshape(self.count.shape[0], -1).all(-1)

    def result(self) -> Any:
        """Return `value` without a warning."""
        count = self.count[None, ..., None]
        xp: Any = np if isinstance(self.total, np.ndarray) else jnp
        mean = xp.where(count > 0, self.total / xp.maximum(count, 1.0), xp.nan)
        return xp.moveaxis(mean, 0, 1)


class LastState(flax.struct.PyTreeNode):
    """The activation of the last selected token so far."""

    latest: Any  # [L, B, D] float32
    position: Any  # [B] int32, −1 before the first selected token
    rows = (1, 0)

    @property
    def value(self) -> Any:
        """[B, L, D]; NaN, with a warning, for rows without a token."""
        warn_of_empty("last", self.empty)
        return self.result()

    @property
    def empty(self) -> Any:
        """[B] bool: True for rows without a token."""
        return self.position < 0

    def result(self) -> Any:
        """Return `value` without a warning."""
        xp: Any = np if isinstance(self.latest, np.ndarray) else jnp
        seen = (self.position >= 0)[None, :, None]
        return xp.moveaxis(xp.where(seen, self.latest, xp.nan), 0, 1)


class TokenState(flax.struct.PyTreeNode):
    """One value per cache slot; `value` is [B, L, S, …], NaN for tokens not selected."""

    values: Any  # [L, B, S, …] float32
    rows = (1,)

    @property
    def value(self) -> Any:
        """[B, L, S, …]: entry s belongs to the token in cache slot s."""
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return xp.moveaxis(self.values, 0, 1)


class ProjectionState(TokenState):
    """A `TokenState` of K directions, stored [L, B, K, S]: TPUs pad small minor dimensions."""

    @property
    def value(self) -> Any:
        """[B, L, S, K]: entry s belongs to the token in cache slot s."""
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return xp.transpose(self.values, (1, 0, 3, 2))


class Moments(flax.struct.PyTreeNode):
    """Count, mean and variance of each row's projections.

    Attributes:
      count: [B] float32, the number of tokens.
      mean: [B, L, K] float32; NaN for rows without a token.
      variance: [B, L, K] float32, the population variance; NaN for rows without a token.
    """

    count: Any
    mean: Any
    variance: Any


class MomentState(flax.struct.PyTreeNode):
    """Running moments (Welford 1962; merged as in Chan et al. 1983); `value` is `Moments`."""

    count: Any  # [B] float32
    mean: Any  # [L, B, K] float32
    spread: Any  # [L, B, K] float32, the sum of squared deviations from the mean
    rows = (0, 1, 1)

    @property
    def value(self) -> Moments:
        """The moments of every row; NaN, with a warning, for rows without a token."""
        warn_of_empty("moments", self.empty)
        return self.result()

    @property
    def empty(self) -> Any:
        """[B] bool: True for rows without a token."""
        return self.count == 0

    def result(self) -> Moments:
        """Return `value` without a warning."""
        xp: Any = np if isinstance(self.mean, np.ndarray) else jnp
        count = self.count[None, :, None]
        seen = count > 0
        mean = xp.where(seen, self.mean, xp.nan)
        variance = xp.where(seen, self.spread / xp.maximum(count, 1.0), xp.nan)
        return Moments(self.count, xp.moveaxis(mean, 0, 1), xp.moveaxis(variance, 0, 1))


class CountState(flax.struct.PyTreeNode):
    """Histogram counts; `value` is [B, L, K, E + 1]."""

    counts: Any  # [L, B, K, E + 1] int32
    rows = (1,)

    @property
    def value(self) -> Any:
        """[B, L, K, E + 1] int32."""
        xp = np if isinstance(self.counts, np.ndarray) else jnp
        return xp.moveaxis(self.counts, 0, 1)


class Mean(flax.struct.PyTreeNode):
    """The mean activation of the tokens selected by `where`, per message if `turns` is given."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    turns: int | None = flax.struct.field(pytree_node=False, default=None)

    def start(self, layers: int, rows: int, slots: int, width: int) -> MeanState:
        """Return a sum of zeros."""
        shape = (rows,) if self.turns is None else (rows, self.turns)
        return MeanState(jnp.zeros((layers, *shape, width), F32), jnp.zeros(shape, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """Return [B, T] or [B, M, T] float32: 1 for selected tokens, else 0."""
        chosen = holds(self.where, batch)
        if self.turns is not None:
            turn = jnp.arange(self.turns, dtype=jnp.int32)
            chosen = chosen[:, None] & (batch.turn[:, None] == turn[None, :, None])
        return chosen.astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Sum h [B, T, D] of one layer: [B, D] or [B, M, D]."""
        form = "btd,bt->bd" if self.turns is None else "btd,bmt->bmd"
        return jnp.einsum(form, h.astype(F32), weights, precision="highest")

    def add(self, state: MeanState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> MeanState:
        """Add the sums [L, …] of one call."""
        return MeanState(state.total + parts, state.count + weights.sum(-1))


class Last(flax.struct.PyTreeNode):
    """The activation of the last token selected by `where`."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> LastState:
        """Return the state without a token."""
        return LastState(jnp.zeros((layers, rows, width), F32), jnp.full((rows,), -1, jnp.int32))

    def weights(self, batch: Batch) -> jax.Array:
        """Return [B, T] float32: 1 at the last selected token of the call, else 0."""
        at = jnp.where(holds(self.where, batch), batch.position, -1)
        top = at.max(-1, keepdims=True)
        return ((at == top) & (top >= 0)).astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Select the activation [B, D] from h [B, T, D] of one layer."""
        return jnp.einsum("btd,bt->bd", h.astype(F32), weights, precision="highest")

    def add(self, state: LastState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> LastState:
        """Replace the activations of rows with a selected token in this call."""
        selected = weights.sum(-1) > 0
        position = (weights.astype(jnp.int32) * batch.position).sum(-1)
        return LastState(
            jnp.where(selected[None, :, None], parts, state.latest),
            jnp.where(selected, position, state.position),
        )


class Projections(flax.struct.PyTreeNode):
    """The projections of the tokens selected by `where` on K directions per layer."""

    where: Any
    directions: Any  # [L or 1, K, D] float32, unit length
    origin: Any  # [1] uint32, as in `interventions.table.Table`
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> Any:
        """Return an array of NaN [L, B, K, S]."""
        count = self.directions.shape[1]
        return ProjectionState(jnp.full((layers, rows, count, slots), jnp.nan, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """Return [B, T] bool: the selected tokens."""
        return holds(self.where, batch)

    def project(self, h: jax.Array, index: int) -> jax.Array:
        """Project h [B, T, D] of one layer on its directions: [B, T, K]."""
        table = self.directions[index if self.directions.shape[0] > 1 else 0]
        return jnp.einsum("btd,kd->btk", h.astype(F32), table, precision="highest")

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> Any:
        """Project h [B, T, D] of one layer: [B, T, K], NaN for tokens not selected."""
        return jnp.where(weights[..., None], self.project(h, index), jnp.nan)

    def add(self, state: Any, parts: Any, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> Any:
        """Write the values of one call into the slots of its tokens."""
        return ProjectionState(write_slots(state.values, parts, slots, axis=3))


class ProjectionMoments(Projections):
    """The count, mean and variance of each row's projections."""

    def start(self, layers: int, rows: int, slots: int, width: int) -> MomentState:
        """Return the moments of zero tokens."""
        zero = jnp.zeros((layers, rows, self.directions.shape[1]), F32)
        return MomentState(jnp.zeros((rows,), F32), zero, zero)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> Any:
        """Return the mean and the sum of squared deviations for h [B, T, D], each [B, K]."""
        p, w = self.project(h, index), weights[..., None].astype(F32)
        count = jnp.maximum(w.sum(1), 1.0)
        mean = (p * w).sum(1) / count
        return mean, (w * (p - mean[:, None]) ** 2).sum(1)

    def add(self, state: MomentState, parts: Any, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> MomentState:
        """Merge the moments of one call into the state (Chan et al. 1983)."""
        fresh = weights.sum(-1, dtype=F32)
        total = state.count + fresh
        share = (fresh / jnp.maximum(total, 1.0))[None, :, None]
        apart = parts[0] - state.mean
        spread = state.spread + parts[1] + apart**2 * state.count[None, :, None] * share
        return MomentState(total, state.mean + apart * share, spread)


class Histogram(Projections):
    """A histogram of each row's projections with fixed bin edges; the outer bins are open."""

    edges: Any = None  # [L or 1, K or 1, E] float32, ascending

    def start(self, layers: int, rows: int, slots: int, width: int) -> CountState:
        """Return zeros [L, B, K, E + 1]."""
        shape = (layers, rows, self.directions.shape[1], self.edges.shape[-1] + 1)
        return CountState(jnp.zeros(shape, jnp.int32))

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Count the projections of h [B, T, D] per bin: [B, K, E + 1] int32."""
        edges = self.edges[index if self.edges.shape[0] > 1 else 0]
        place = (self.project(h, index)[..., None] >= edges[None, None]).sum(-1, dtype=jnp.int32)
        bins = jnp.arange(edges.shape[-1] + 1, dtype=jnp.int32)
        inside = (place[..., None] == bins[None, None, None]) & weights[..., None, None]
        return inside.sum(1, dtype=jnp.int32)

    def add(self, state: CountState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> CountState:
        """Add the counts of one call."""
        return CountState(state.counts + parts)


class Norms(flax.struct.PyTreeNode):
    """The norms of the activations selected by `where`."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Return an array of NaN [L, B, S]."""
        return TokenState(jnp.full((layers, rows, slots), jnp.nan, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """Return [B, T] bool: the selected tokens."""
        return holds(self.where, batch)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return the norms of h [B, T, D]: [B, T], NaN for tokens not selected."""
        return jnp.where(weights, jnp.linalg.norm(h.astype(F32), axis=-1), jnp.nan)

    def add(self, state: TokenState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> TokenState:
        """Write one call's values into the slots of its tokens."""
        return TokenState(write_slots(state.values, parts, slots))


class Full(flax.struct.PyTreeNode):
    """All activations selected by `where`: [L, B, S, D], larger than a key/value cache."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Return an array of NaN [L, B, S, D]; log its size first."""
        size = 4 * layers * rows * slots * width
        _LOG.log(logging.WARNING if size >= LARGE else logging.INFO,
                 "a capture of full activations takes %.3g GB: %d layers, %d rows, %d slots, "
                 "width %d, float32", size / 1e9, layers, rows, slots, width)
        return TokenState(jnp.full((layers, rows, slots, width), jnp.nan, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """Return [B, T] bool: the selected tokens."""
        return holds(self.where, batch)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return h [B, T, D] of one layer in float32, NaN for tokens not selected."""
        return jnp.where(weights[..., None], h.astype(F32), jnp.nan)

    def add(self, state: TokenState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> TokenState:
        """Write one call's values into the slots of its tokens."""
        return TokenState(write_slots(state.values, parts, slots))


def write_slots(buffer: jax.Array, values: jax.Array, slots: jax.Array,
                axis: int = 2) -> jax.Array:
    """Write values [L, B, T, …] into the slots [B, T] of a buffer [L, B, …] with slot axis `axis`.

    Values whose slot is S or beyond are dropped. As in `cache.write`, one token per row uses a
    scatter, several use a gather.
    """
    rows, width = slots.shape
    if width == 1:
        lines = buffer.shape[:axis]
        slot = jnp.broadcast_to(slots.reshape(rows, *(1,) * (axis - 2)), lines)
        return set_lines(buffer, values[:, :, 0], spread_rows(slot, 1, buffer), len(lines))
    moved, taken = jax.vmap(lambda x: by_slot(x, slots, buffer.shape[axis]),
                            out_axes=(0, None))(values)
    taken = jnp.expand_dims(taken, tuple(i for i in range(buffer.ndim) if i not in (1, axis)))
    return jnp.where(taken, jnp.moveaxis(moved, 2, axis), buffer)


def spread_states(states: dict[str, Any], like: jax.Array) -> dict[str, Any]:
    """Shard the rows of captures' states over the mesh of `like`, if there is one."""
    return {
        name: tree.unflatten([spread_rows(x, at, like)
                              for x, at in zip(leaves, state.rows, strict=True)])
        for name, state in states.items()
        for leaves, tree in [jax.tree.flatten(state)]
    }
