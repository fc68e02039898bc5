"""The key/value cache: keys and values per layer, and the index of each row's next free slot.

The valid tokens of a row fill consecutive slots. Padding uses no slots, so a row's cache does not
depend on the other rows. The cache also stores the rotary position of the token in each slot;
attention computes its mask from these positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.brief import brief
from jaxpersona.calls import checked_call
from jaxpersona.distributed.sharding import of_each, on_cpu, place
from jaxpersona.models.batch import Batch
from jaxpersona.models.config import ModelConfig

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int32

KV_AXES = ("batch", "kv_heads", None, None)
_SHORT = 8  # on a CPU, `write` scatters T > 1 tokens per row if there are at least _SHORT · T slots
ROW_AXES = (("batch", None), ("batch",))  # logical axes of `position` and `next`


class Cache(flax.struct.PyTreeNode):
    """The keys and values of the tokens processed so far.

    Attributes:
      k, v: the keys and values, one array [B, K, S, H] per layer.
      position: [B, S] int32, the rotary position of the token in each slot; −1 in empty slots.
      next: [B] int32, the index of each row's next free slot.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.init_cache(jp.load("mini").config, rows=2, slots=64).slots
      64
    """

    __repr__ = brief

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    position: Int32[Array, "B S"]
    next: Int32[Array, " B"]

    @property
    def slots(self) -> int:
        """The number of slots S."""
        return self.position.shape[1]

    def spread(self, like: jax.Array) -> Cache:
        """Shard the cache over the mesh of `like`; without a mesh, return the cache unchanged."""
        return Cache(*(jax.tree.map(lambda x, axes=axes: place(x, axes, like), part)
                       for part, axes in zip((self.k, self.v, self.position, self.next),
                                             (KV_AXES, KV_AXES, *ROW_AXES), strict=True)))


def kept_dtype(like: jax.Array) -> DTypeLike:
    """Return the fastest dtype of the cache for a model with the parameter array `like`.

    The result is the dtype of `like`, except on a CPU without a mesh, where it is float32 (keys and
    values are still rounded to the dtype of `like`). XLA's CPU backend would convert a whole 16-bit
    cache to float32 and back whenever a token is written. A float32 cache uses twice as much memory
    as a 16-bit cache.
    """
    return jnp.float32 if on_cpu(like) else like.dtype


@checked_call
def init_cache(config: ModelConfig, rows: int, slots: int, dtype: DTypeLike = "float32",
               ) -> Cache:
    """Allocate an empty cache of `rows` rows with `slots` slots each.

    Any dtype that can represent the keys and values is valid; `kept_dtype` returns the fastest one.

    Examples:
      >>> import jaxpersona as jp
      >>> cache = jp.init_cache(jp.load("mini").config, rows=2, slots=64)
      >>> cache.position.shape
      (2, 64)
    """
    shape = (rows, config.n_kv_heads, slots, config.head_dim)
    return Cache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)),
        position=jnp.full((rows, slots), -1, jnp.int32),
        next=jnp.zeros((rows,), jnp.int32),
    )


def assign_slots(cache: Cache | None, batch: Batch) -> jax.Array:
    """Return the slot of each token, [B, T] int32; padding has the out-of-range slot S.

    In each row, the valid tokens precede the padding and fill the next free slots in order. Padding
    is not stored. Without a cache, S is T.
    """
    rows, width = batch.tokens.shape
    steps = jnp.arange(width, dtype=jnp.int32)[None]
    start = jnp.zeros((rows, 1), jnp.int32) if cache is None else cache.next[:, None]
    end = width if cache is None else cache.slots
    return jnp.where(batch.valid, start + steps, end)


def advance(cache: Cache, batch: Batch, slots: jax.Array) -> Cache:
    """Return the cache with `position` and `next` updated; `write` stores the keys and values."""
    return cache.replace(
        position=set_lines(cache.position, batch.position, slots, lines=1),
        next=cache.next + batch.length,
    )


def write(buffer: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """Return a buffer [B, K, S, H] with the values [B, T, K, H] written into the slots [B, T].

    A single token per row is written by a scatter (`set_lines`). Several tokens are written by a
    gather (`by_slot`), which copies the whole buffer, or, on a CPU, by a scatter if S is at least
    `_SHORT` times T.
    """
    values = values.astype(buffer.dtype)
    if 1 < values.shape[1] <= buffer.shape[2] // _SHORT and on_cpu(buffer):
        at = jnp.broadcast_to(slots[:, None], (*buffer.shape[:2], values.shape[1]))
        return set_lines(buffer, jnp.moveaxis(values, 2, 1), at, lines=2)
    if values.shape[1] == 1:
        slot = place(jnp.broadcast_to(slots, buffer.shape[:2]), KV_AXES[:2], buffer)
        return set_lines(buffer, values[:, 0], slot, lines=2)
    moved, taken = by_slot(values, slots, buffer.shape[2])
    return jnp.where(taken[:, None, :, None], jnp.moveaxis(moved, 1, 2), buffer)


def set_lines(buffer: jax.Array, values: jax.Array, slots: jax.Array, lines: int) -> jax.Array:
    """Return a buffer with values scattered along its slot axis, which follows `lines` batch axes.

    Values with a slot index of S or more are dropped. The scatter is mapped over the batch axes
    with `jax.vmap`, so each head has its own index. With one index for all heads of a row, XLA
    would transpose the buffer before and after a decode loop on TPUs, and copy a one-row buffer
    three times per step on CPUs.
    """
    def enter(line: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
        return line.at[slot].set(value, mode="drop")

    for _ in range(lines):
        enter = jax.vmap(enter)
    return enter(buffer, values, slots)


def by_slot(values: jax.Array, slots: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Reorder per-token values [B, T, …] by slot, given the tokens' slots [B, T].

    The values are gathered, because some backends execute a scatter one token at a time. In each
    row, the valid tokens must precede the padding and have consecutive slots.

    Returns:
      moved: [B, S, …] with S = `count`; arbitrary values in slots without a token.
      taken: [B, S] bool, True in slots with a token.
    """
    slot = jnp.arange(count, dtype=jnp.int32)[None]
    source = slot - slots[:, :1]
    inside = (source >= 0) & (source < slots.shape[1])
    source = jnp.where(inside, source, 0)
    return of_each(values, source), inside & (of_each(slots, source) == slot)
