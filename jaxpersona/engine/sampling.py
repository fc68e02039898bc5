"""Selection of the next token: greedy, or inverse-CDF sampling with one uniform draw per row.

The vocabulary is never sorted. The nucleus (the tokens that top-p keeps) is computed among the
`CANDIDATES` most probable tokens. For a larger nucleus, its probability threshold is computed by
bisection. The method used for a row depends only on that row, so a row's tokens do not depend on
other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import shown
from jaxpersona.distributed.sharding import mesh_of, of_each, on_cpu, place, spread_rows
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32, UInt32

F32 = jnp.float32
CANDIDATES = 256
_BISECTIONS = 30
_BLOCK = 512
_LANES = 128
_TOP_BLOCK = 32
PRNG = "threefry2x32"  # the PRNG of `uniforms`; this name is recorded with every run
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Sampling(flax.struct.PyTreeNode):
    """Per-row sampling settings, stored as arrays so that new values do not cause recompilation.

    Attributes:
      temperature: [B] float32; 0 selects the most probable token (greedy).
      top_p: [B] float32 in (0, 1]; keeps the smallest set of most probable tokens whose share of
        the probability mass kept by `top_k` is at least this value. If the set has more than
        `CANDIDATES` tokens, tokens tied with its least probable token are also kept, and tokens
        at most 2⁻³⁰ less probable may be.
      top_k: [B] int32, the number of most probable tokens to keep, at most `CANDIDATES`; 0 keeps
        all tokens.
      seed: [B] uint32, the seed of the random draws.
    """

    temperature: Float32[Array | np.ndarray, " B"]
    top_p: Float32[Array | np.ndarray, " B"]
    top_k: Int32[Array | np.ndarray, " B"]
    seed: UInt32[Array | np.ndarray, " B"]

    def take(self, rows: Any) -> Sampling:
        """Select rows on the host; the index −1 (padding) selects row 0."""
        rows = np.maximum(np.asarray(rows, np.int32), 0)
        return jax.tree.map(lambda x: np.asarray(x)[rows], self)


def sampling(rows: int, *, temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = 0,
             seed: Any = 0) -> Sampling:
    """Check the settings and broadcast them to `rows` rows.

    Args:
      rows: the number of rows B.
      temperature, top_p, top_k, seed: see `Sampling`; each is a number or an array [B].

    Raises:
      UserError: a temperature is negative or not finite in float32, top_p is outside (0, 1], top_k
        is not an integer in 0…`CANDIDATES`, a seed is not an integer in 0…2³²−1, or a setting is
        neither a number nor an array [B].
    """
    def spread(name: str, value: Any, dtype: Any, ok: Any, want: str) -> jax.Array:
        try:
            given = np.asarray(value)
        except TypeError:  # a key of JAX's random generator
            raise UserError(f"{name} is {shown(value, 60)}; give a number"
                            + (" such as seed=0, not a key" if name == "seed" else "")) from None
        if given.ndim > 1 or (given.ndim == 1 and given.size != rows):
            raise UserError(f"{name} has shape {given.shape}; it must be a number or have shape "
                            f"[{rows}]")
        if given.dtype.kind not in "iuf" or not np.all(ok(given)):
            raise UserError(f"{name} is {shown(given.tolist(), 60)}; it must be {want}")
        return jnp.asarray(np.broadcast_to(given, (rows,)), dtype)

    return Sampling(
        temperature=spread("temperature", temperature, F32,
                           lambda x: (x >= 0) & (x <= jnp.finfo(F32).max),
                           "at least 0, and finite in float32"),
        top_p=spread("top_p", top_p, F32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
        top_k=spread("top_k", top_k, jnp.int32, lambda x: (x >= 0) & (x <= CANDIDATES)
                     & (x == np.floor(x)), f"an integer in 0…{CANDIDATES} (0: no limit)"),
        seed=spread("seed", seed, jnp.uint32, lambda x: (x >= 0) & (x < 2**32)
                    & (x == np.floor(x)), "an integer in 0…2³²−1"),
    )


def uniforms(seed: jax.Array, row_id: jax.Array, position: jax.Array) -> jax.Array:
    """Return one uniform random number in [0, 1) per row, [B] float32.

    The number depends only on the row's arguments. The generator is Threefry-2x32 with 20 rounds.
    The implementation is part of this package, so that the bits do not depend on JAX's version or
    flags (`jax_default_prng_impl`, `jax_threefry_partitionable`). The bits equal those of
    `jax.random` with the default flags of JAX 0.10.

    Args:
      seed, row_id: [B] uint32, the seeds and the ids of the rows.
      position: [B] int32, the position of the new token.
    """
    zero = jnp.zeros_like(seed)
    key = zero, seed
    for fold in (row_id, position, zero):
        key = _threefry(key, (zero, fold.astype(jnp.uint32)))
    mantissa = (key[0] ^ key[1]) >> jnp.uint32(9)
    one = jax.lax.bitcast_convert_type(mantissa | jnp.uint32(0x3F800000), F32)  # in [1, 2)
    return one - 1.0


def _threefry(key: tuple[jax.Array, jax.Array],
              count: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Encrypt a 64-bit counter with Threefry-2x32-20 (Salmon et al. 2011, Random123).

    Args:
      key, count: two words [B] uint32 each.
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = count[0] + words[0], count[1] + words[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))) ^ x
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def choose(logits: jax.Array, settings: Sampling, row_id: jax.Array,
           position: jax.Array) -> jax.Array:
    """Select one token per row.

    Args:
      logits: [B, V] float32.
      settings: the sampling settings of the B rows.
      row_id: [B] uint32, the ids that seed the random draws together with `settings.seed`.
      position: [B] int32, the position of the new token.

    Returns:
      [B] int32, the selected tokens; at temperature 0, the index of the first largest logit.
    """
    logits = place(logits, ("batch", None))  # `lax.top_k` needs an unsharded vocabulary axis
    greedy = most_likely(logits)
    warm = settings.temperature > 0
    top = logits.max(-1, keepdims=True)  # subtracted so that the division cannot yield +inf
    scaled = (logits - top) / jnp.where(warm, settings.temperature, 1.0)[:, None]
    probability = jax.nn.softmax(scaled, -1)
    seed = place(jnp.asarray(settings.seed), ("batch",), logits)
    draw = uniforms(seed, row_id, position)
    count = min(CANDIDATES, logits.shape[-1])
    top, tokens = most_probable(probability, count)
    rank = jnp.arange(count, dtype=jnp.int32)
    limited = (settings.top_k[:, None] == 0) | (rank[None] < settings.top_k[:, None])
    top = jnp.where(limited, top, 0.0)
    reach = jnp.where(settings.top_k > 0, top.sum(-1), 1.0)  # the mass to which `top_p` is relative
    before = jnp.cumsum(top, -1) - top
    kept = jnp.where(before < (settings.top_p * reach)[:, None], top, 0.0)
    near = of_each(tokens, _inverse(kept, draw))
    wide = (warm & (settings.top_k == 0) & (top.sum(-1) < settings.top_p)
            & (count < logits.shape[-1]))

    def bisect() -> jax.Array:
        return _wide(probability, jnp.asarray(settings.top_p), draw)

    far = jax.lax.cond(wide.any(), bisect, lambda: greedy)
    return jnp.where(warm, jnp.where(wide, far, near.astype(jnp.int32)), greedy)


def most_likely(logits: jax.Array) -> jax.Array:
    """Return the index of the first largest logit per row, [B] int32; NaN counts as the largest."""
    rows, vocabulary = logits.shape
    if not on_cpu(logits) or vocabulary % _LANES or vocabulary < _LANES**2:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    # XLA's CPU backend vectorizes `max` but not `argmax`
    blocks = logits.reshape(rows, -1, _LANES)
    block = jnp.argmax(blocks.max(-1), -1)
    inner = jnp.argmax(of_each(blocks, block), -1)
    return (block * _LANES + inner).astype(jnp.int32)


def most_probable(probability: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest values per row and their indices, as `lax.top_k` does.

    `lax.top_k` is used on a CPU, and on any device if V ≤ 64·k. Otherwise `top_in_blocks` is used,
    because on a GPU, XLA compiles `lax.top_k` to a sort of the whole row.

    Args:
      probability: [B, V] float32.
      count: the number of values k, at most V.

    Returns:
      The values in descending order, [B, k], and their indices, [B, k] int32.
    """
    if on_cpu(probability) or probability.shape[-1] <= 2 * count * _TOP_BLOCK:
        return jax.lax.top_k(probability, count)
    return top_in_blocks(probability, count)


def top_in_blocks(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the result of `lax.top_k(values, count)`, without sorting all values of a row.

    The values are divided into blocks of 32. The k blocks with the largest maxima contain the
    result, so only the V/32 maxima and the 32·k values of these blocks are sorted. As in
    `lax.top_k`, the first of equal values is returned, because the first of several blocks with
    equal maxima is selected, and the selected blocks keep their order.

    Args:
      values: [B, V] float32, with V > 32·k.
      count: the number of values k.
    """
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[-1] % _TOP_BLOCK)),
                     constant_values=-jnp.inf)
    blocks = spread_rows(padded.reshape(len(padded), -1, _TOP_BLOCK), 0, values)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(-1), count)[1], -1)
    part = of_each(blocks, chosen).reshape(len(padded), -1)
    top, at = jax.lax.top_k(spread_rows(part, 0, values), count)
    return top, of_each(chosen, at // _TOP_BLOCK) * _TOP_BLOCK + at % _TOP_BLOCK


def finite(logits: jax.Array, token: jax.Array | None = None) -> jax.Array:
    """Return whether the largest logit in each row is finite, [B] bool.

    The largest logit is NaN if any logit is NaN, and infinite if any is +inf or all are −inf.

    Args:
      logits: [B, V] float32.
      token: [B] int32, the result of `most_likely` for these logits; not used on a mesh. If None,
        `most_likely` is called here; the compiler merges this call with the call in `choose`.
    """
    if mesh_of(logits) is None:
        return jnp.isfinite(of_each(logits, most_likely(logits) if token is None else token))
    return jnp.isfinite(logits.max(-1))


def _inverse(weights: jax.Array, draw: jax.Array) -> jax.Array:
    """Return the first index with weight > 0 and cumulative weight > draw · total, [B] int32."""
    cumulative = jnp.cumsum(weights, -1)
    target = draw[:, None] * cumulative[:, -1:]
    return jnp.argmax((cumulative > target) & (weights > 0), -1).astype(jnp.int32)


def _wide(probability: jax.Array, top_p: jax.Array, draw: jax.Array) -> jax.Array:
    """Sample from a nucleus of any size: bisect its threshold, then use a two-level inverse CDF."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The tokens with p ≥ `low` have a total probability of at least top_p, and those with
        # p ≥ `high` have less.
        low, high = bounds
        middle = (low + high) / 2
        mass = jnp.where(probability >= middle[:, None], probability, 0.0).sum(-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    zero = jnp.zeros_like(top_p)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (zero, zero + 1.0))
    low = jnp.where(top_p >= 1.0, 0.0, low)
    kept = jnp.where(probability >= low[:, None], probability, 0.0)
    rows, vocabulary = kept.shape
    blocks = -(-vocabulary // _BLOCK)
    kept = jnp.pad(kept, ((0, 0), (0, blocks * _BLOCK - vocabulary)))
    kept = spread_rows(kept.reshape(rows, blocks, _BLOCK), 0, probability)
    mass = kept.sum(-1)
    cumulative = jnp.cumsum(mass, -1)
    target = draw * cumulative[:, -1]
    block = jnp.argmax((cumulative > target[:, None]) & (mass > 0), -1)
    chosen = of_each(kept, block)
    total = of_each(mass, block)
    start = of_each(cumulative, block) - total
    inner = jnp.clip((target - start) / total, 0.0, 1.0 - 2.0**-24)
    return (block.astype(jnp.int32) * _BLOCK + _inverse(chosen, inner)).astype(jnp.int32)
