"""What may be read off an activation, always as a reduction inside the program.

A capture is a pytree that says what to read; its state is a monoid: prefill, every chunk and every
decode step add to it, so a mean over a finished text costs no second pass and no `[L, B, T, D]`
array. Captures combine with `|` and share one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.batch import Batch
from jaxpersona.config import ModelConfig
from jaxpersona.interventions.bank import Layers, resolve_layers
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.interventions.where import Where, everywhere, holds, response

F32 = jnp.float32


@flax.struct.dataclass
class MeanState:
    """A sum of activations and how many tokens are in it; `value` is their mean."""

    total: Any  # [L, B, D], by turn [L, B, M, D], float32
    count: Any  # [B], by turn [B, M], float32

    @property
    def value(self) -> Any:
        """[B, L, D], by turn [B, L, M, D]; NaN where there was no token."""
        count = self.count[None, ..., None]
        xp: Any = np if isinstance(self.total, np.ndarray) else jnp
        mean = xp.where(count > 0, self.total / xp.maximum(count, 1.0), xp.nan)
        return xp.moveaxis(mean, 0, 1)


@flax.struct.dataclass
class LastState:
    """The activation of the last token seen; `value` is [B, L, D], NaN where there was none."""

    latest: Any  # [L, B, D] float32
    position: Any  # [B] int32, −1 before the first

    @property
    def value(self) -> Any:
        """[B, L, D]."""
        xp: Any = np if isinstance(self.latest, np.ndarray) else jnp
        seen = (self.position >= 0)[None, :, None]
        return xp.moveaxis(xp.where(seen, self.latest, xp.nan), 0, 1)


@flax.struct.dataclass
class TokenState:
    """One value a token and slot; `value` is [B, L, S, …], NaN where nothing was read."""

    values: Any  # [L, B, S, …] float32

    @property
    def value(self) -> Any:
        """[B, L, S, …]: entry s is the token in slot s of the cache."""
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return xp.moveaxis(self.values, 0, 1)


@flax.struct.dataclass
class Mean:
    """Sum activations over the tokens that `where` chooses, by message if `turns` is given."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    turns: int | None = flax.struct.field(pytree_node=False, default=None)

    def start(self, layers: int, rows: int, slots: int, width: int) -> MeanState:
        """Return the empty sum."""
        shape = (rows,) if self.turns is None else (rows, self.turns)
        return MeanState(jnp.zeros((layers, *shape, width), F32), jnp.zeros(shape, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """[B, T] or [B, M, T] float32: how much every token counts."""
        chosen = holds(self.where, batch)
        if self.turns is not None:
            turn = jnp.arange(self.turns, dtype=jnp.int32)
            chosen = chosen[:, None] & (batch.turn[:, None] == turn[None, :, None])
        return chosen.astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Reduce one layer's h [B, T, D]."""
        form = "btd,bt->bd" if self.turns is None else "btd,bmt->bmd"
        return jnp.einsum(form, h.astype(F32), weights)

    def add(self, state: MeanState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> MeanState:
        """Add one call's parts [L, …] to the sum."""
        return MeanState(state.total + parts, state.count + weights.sum(-1))


@flax.struct.dataclass
class Last:
    """Keep the activation of the last token that `where` chooses."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> LastState:
        """Return the state before any token."""
        return LastState(jnp.zeros((layers, rows, width), F32), jnp.full((rows,), -1, jnp.int32))

    def weights(self, batch: Batch) -> jax.Array:
        """[B, T] float32: 1 at the last chosen token of the call, else 0."""
        at = jnp.where(holds(self.where, batch), batch.position, -1)
        top = at.max(-1, keepdims=True)
        return ((at == top) & (top >= 0)).astype(F32)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Reduce one layer's h [B, T, D]."""
        return jnp.einsum("btd,bt->bd", h.astype(F32), weights)

    def add(self, state: LastState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> LastState:
        """Replace the kept activation where the call saw a later one."""
        found = weights.sum(-1) > 0
        position = (weights.astype(jnp.int32) * batch.position).sum(-1)
        return LastState(
            jnp.where(found[None, :, None], parts, state.latest),
            jnp.where(found, position, state.position),
        )


@flax.struct.dataclass
class Projections:
    """Project every token that `where` chooses on K directions a layer."""

    where: Any
    directions: Any  # [L or 1, K, D] float32, unit length
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Return the table before any token: NaN [L, B, S, K]."""
        count = self.directions.shape[1]
        return TokenState(jnp.full((layers, rows, slots, count), jnp.nan, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """[B, T] bool."""
        return holds(self.where, batch)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Project one layer's h [B, T, D] on its directions: [B, T, K]."""
        table = self.directions[index if self.directions.shape[0] > 1 else 0]
        found = jnp.einsum("btd,kd->btk", h.astype(F32), table)
        return jnp.where(weights[..., None], found, jnp.nan)

    def add(self, state: TokenState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> TokenState:
        """Write one call's values into the slots of its tokens."""
        return TokenState(write_slots(state.values, parts, slots))


@flax.struct.dataclass
class Full:
    """Keep every activation that `where` chooses: `[L, B, S, D]`, the size of a cache and more."""

    where: Any
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False, default="residual")

    def start(self, layers: int, rows: int, slots: int, width: int) -> TokenState:
        """Return the table before any token: NaN [L, B, S, D]."""
        return TokenState(jnp.full((layers, rows, slots, width), jnp.nan, F32))

    def weights(self, batch: Batch) -> jax.Array:
        """[B, T] bool."""
        return holds(self.where, batch)

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Keep one layer's h [B, T, D] where it is chosen."""
        return jnp.where(weights[..., None], h.astype(F32), jnp.nan)

    def add(self, state: TokenState, parts: jax.Array, weights: jax.Array, batch: Batch,
            slots: jax.Array) -> TokenState:
        """Write one call's values into the slots of its tokens."""
        return TokenState(write_slots(state.values, parts, slots))


@flax.struct.dataclass
class Capture:
    """Named readings that share one pass; `a | b` is both."""

    parts: Mapping[str, Any] = flax.struct.field(default_factory=dict)

    def __or__(self, other: Capture) -> Capture:
        twice = sorted(set(self.parts) & set(other.parts))
        if twice:
            raise ValueError(f"two captures are called {twice}; name one of them with `name=`")
        return Capture({**self.parts, **other.parts})

    def start(self, config: ModelConfig, rows: int, slots: int) -> dict[str, Any]:
        """Return the empty state for `rows` rows of `slots` slots."""
        return {
            name: part.start(len(chosen_layers(part, config)), rows, slots, config.d_model)
            for name, part in self.parts.items()
        }


def chosen_layers(part: Any, config: ModelConfig) -> tuple[int, ...]:
    """Return the layers a capture reads, all if it names none.

    Raises:
      ValueError: a layer that the model does not have, or directions of another shape.
    """
    if part.site not in SITES:
        raise ValueError(f"site is {part.site!r}; it must be one of {SITES}")
    layers = part.layers if part.layers is not None else tuple(range(config.n_layers))
    if layers[-1] >= config.n_layers:
        raise ValueError(
            f"a capture reads layer {layers[-1]}; the model has layers 0…{config.n_layers - 1}"
        )
    if isinstance(part, Projections):
        count, _, width = part.directions.shape
        if count not in (1, len(layers)):  # else the last set would serve all layers beyond it
            raise ValueError(
                f"directions are for {count} layers, but {len(layers)} are read: {list(layers)}"
            )
        if width != config.d_model:
            raise ValueError(
                f"directions have width {width}; the model's residual stream has {config.d_model}"
            )
    return layers


def write_slots(buffer: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """Write values [L, B, T, …] into a buffer [L, B, S, …] at slots [B, T]; beyond S is dropped."""
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    return buffer.at[:, rows, slots].set(values, mode="drop")


def _pick(layers: Layers | None) -> tuple[int, ...] | None:
    return None if layers is None else resolve_layers(layers, None)


def mean(where: Where = response, *, layers: Layers | None = None, site: Site = "residual",
         turns: int | None = None, name: str = "mean") -> Capture:
    """Average activations over tokens; with `turns=M`, over each of the first M messages apart.

    Result: [B, L, D], or [B, L, M, D].
    """
    if turns is not None and turns < 1:
        raise ValueError(f"turns is {turns}; it must be positive")
    return Capture({name: Mean(jnp.asarray(where.encode()), _pick(layers), site, turns)})


def last(where: Where = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "last") -> Capture:
    """Keep the activation of the last chosen token. Result: [B, L, D]."""
    return Capture({name: Last(jnp.asarray(where.encode()), _pick(layers), site)})


def projections(directions: Any, where: Where = everywhere, *, layers: Layers | None = None,
                site: Site = "residual", name: str = "projections") -> Capture:
    """Project every chosen token on directions, normalised here to unit length.

    Args:
      directions: [K, D] at every layer, [l, K, D] one set for each chosen layer, or a named
        direction (`Axis`, `Vector`), whose own layers are used.

    Returns:
      A capture with result [B, L, S, K]; NaN at tokens that were not chosen.
    """
    if hasattr(directions, "at_layers"):
        directions.check_site(site)
        chosen = resolve_layers(slice(None) if layers is None else layers, directions.n_layers)
        value, picked = directions.at_layers(chosen)[:, None], chosen
    else:
        value, picked = np.asarray(directions, np.float64), _pick(layers)
        value = value[None] if value.ndim == 2 else value
    if value.ndim != 3:
        raise ValueError(f"directions has shape {value.shape}; it must be [K, D] or [l, K, D]")
    norm = np.linalg.norm(value, axis=-1, keepdims=True)
    if not np.isfinite(norm).all() or (norm == 0).any():
        raise ValueError("directions holds a zero or a value that is not finite")
    unit = jnp.asarray(value / norm, F32)
    return Capture({name: Projections(jnp.asarray(where.encode()), unit, picked, site)})


def full(where: Where = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "full") -> Capture:
    """Keep every chosen activation. Result: [B, L, S, D] float32; 4·B·L·S·D bytes."""
    return Capture({name: Full(jnp.asarray(where.encode()), _pick(layers), site)})
