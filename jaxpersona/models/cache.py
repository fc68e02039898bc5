"""The key/value cache: one array a layer, and for every row the next free slot.

Rows fill their slots without holes, whatever the padding around them, so a row's cache depends on
that row alone. A slot knows the rotary position of what it holds; attention asks nothing else.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.distributed.sharding import of_each, on_cpu, place
from jaxpersona.models.batch import Batch
from jaxpersona.models.config import ModelConfig

KV_AXES = ("batch", "kv_heads", None, None)
ROW_AXES = (("batch", None), ("batch",))  # of `position` and `next`


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: for each layer [B, K, S, H].
      position: [B, S] int32, the rotary position in each slot; −1 where it is empty.
      next: [B] int32, the next free slot.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    position: Any
    next: Any

    @property
    def slots(self) -> int:
        """The number of slots S."""
        return self.position.shape[1]

    def spread(self, like: jax.Array) -> Cache:
        """Spread the cache over the mesh of an array, if that lies on one."""
        return Cache(*(jax.tree.map(lambda x, axes=axes: place(x, axes, like), part)
                       for part, axes in zip((self.k, self.v, self.position, self.next),
                                             (KV_AXES, KV_AXES, *ROW_AXES), strict=True)))


def kept_dtype(like: jax.Array) -> Any:
    """Return the dtype in which keys and values of a model with such a parameter are kept.

    It is the parameter's own, but on one CPU float32, of values rounded to the parameter's: XLA
    would turn a whole low-precision cache to float32 and back for every token written. That is
    twice the memory.
    """
    return jnp.float32 if on_cpu(like) else like.dtype


def init_cache(config: ModelConfig, rows: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """Make an empty cache for `rows` rows of `slots` tokens.

    Any dtype that holds the model's works; `kept_dtype` is the fastest.
    """
    shape = (rows, config.n_kv_heads, slots, config.head_dim)
    return Cache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        position=jnp.full((rows, slots), -1, jnp.int32),
        next=jnp.zeros((rows,), jnp.int32),
    )


def assign_slots(cache: Cache | None, batch: Batch) -> jax.Array:
    """Return the slot of every token [B, T]; one past the end for padding, so that it is dropped.

    Valid tokens of a row come first (right padding) and take the row's next slots in order.
    """
    rows, width = batch.tokens.shape
    steps = jnp.arange(width, dtype=jnp.int32)[None]
    start = jnp.zeros((rows, 1), jnp.int32) if cache is None else cache.next[:, None]
    end = width if cache is None else cache.slots
    return jnp.where(batch.valid, start + steps, end)


def advance(cache: Cache, batch: Batch, slots: jax.Array) -> Cache:
    """Enter the positions of a batch's tokens; keys and values follow layer by layer."""
    return cache.replace(  # pyright: ignore[reportAttributeAccessIssue]
        position=set_lines(cache.position, batch.position, slots, lines=1),
        next=cache.next + batch.length,
    )


def write(buffer: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """Write [B, T, K, H] into the slots [B, T] of a [B, K, S, H] buffer.

    One token a row is set in place, many are gathered (`by_slot`).
    """
    values = values.astype(buffer.dtype)
    if values.shape[1] == 1:
        slot = place(jnp.broadcast_to(slots, buffer.shape[:2]), KV_AXES[:2], buffer)
        return set_lines(buffer, values[:, 0], slot, lines=2)
    moved, taken = by_slot(values, slots, buffer.shape[2])
    return jnp.where(taken[:, None, :, None], jnp.moveaxis(moved, 1, 2), buffer)


def set_lines(buffer: jax.Array, values: jax.Array, slots: jax.Array, lines: int) -> jax.Array:
    """Set values in the slots of a buffer, whose axis S comes after `lines` others; beyond S they
    are dropped.

    Every line has slots of its own. With one index for all heads of a row TPUs would turn the
    buffer to have a row's heads beside each other before a loop of steps and back after it, and a
    CPU would copy that of a single row three times a step.
    """
    def enter(line: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
        return line.at[slot].set(value, mode="drop")

    for _ in range(lines):
        enter = jax.vmap(enter)
    return enter(buffer, values, slots)


def by_slot(values: jax.Array, slots: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Bring values [B, T, …] of tokens in slots [B, T] into the order of `count` slots.

    Every slot asks which token is its own, because setting many runs token by token on some back
    ends. A row's valid tokens come first and lie in slots that follow each other.

    Returns:
      moved: [B, S, …], of any token where there is none of that slot.
      taken: [B, S] bool, where there is one.
    """
    slot = jnp.arange(count, dtype=jnp.int32)[None]
    source = slot - slots[:, :1]
    inside = (source >= 0) & (source < slots.shape[1])
    source = jnp.where(inside, source, 0)
    return of_each(values, source), inside & (of_each(slots, source) == slot)
