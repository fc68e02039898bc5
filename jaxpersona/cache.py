"""The key/value cache: one array a layer, and for every row the next free slot.

Rows fill their slots without holes, whatever the padding around them, so a row's cache depends on
that row alone. A slot knows the rotary position of what it holds; attention asks nothing else.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.batch import Batch
from jaxpersona.config import ModelConfig
from jaxpersona.sharding import of_each, on_cpu, place

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
    enter = jax.vmap(lambda row, slots, values: row.at[slots].set(values, mode="drop"))
    return cache.replace(  # pyright: ignore[reportAttributeAccessIssue]
        position=enter(cache.position, slots, batch.position),
        next=cache.next + batch.length,
    )


def write(buffer: jax.Array, values: jax.Array, slots: jax.Array, start: jax.Array) -> jax.Array:
    """Write [B, T, K, H] into the slots of a [B, K, S, H] buffer.

    One token a row is scattered in place. Many are gathered instead, every slot asking which token
    is its own, because a scatter runs token by token on some back ends.
    """
    values = values.astype(buffer.dtype)
    rows, width, heads, _ = values.shape
    if width == 1:
        # a slot for each row and head: with one for all heads of a row, TPUs would turn the buffer
        # to have a row's heads beside each other before a loop of steps and back after it, and a
        # CPU would copy that of a single row three times a step
        enter = jax.vmap(jax.vmap(lambda line, slot, value: line.at[slot].set(value, mode="drop")))
        slot = place(jnp.broadcast_to(slots, (rows, heads)), KV_AXES[:2], buffer)
        return enter(buffer, slot, values[:, 0])
    slot = jnp.arange(buffer.shape[2], dtype=jnp.int32)[None]
    source = slot - start[:, None]  # [B, S]: which token of this call belongs in each slot
    inside = (source >= 0) & (source < width)
    source = jnp.where(inside, source, 0)
    taken = of_each(slots, source) == slot
    moved = of_each(values, source)
    return jnp.where((inside & taken)[:, None, :, None], jnp.moveaxis(moved, 1, 2), buffer)
