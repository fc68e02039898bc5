"""Layers as pure functions of arrays: normalization, rotary embedding, attention, MLP.

Einsum letters: b (batch row), t (query token), s (cache slot), d (model width), f (feed-forward
width), n (heads), k (key/value heads), g = n/k, h (head dimension), v (vocabulary).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import on_cpu, out_sharding
from jaxpersona.kernels.reference import round_residual as round_residual
from jaxpersona.models.config import Activation, Rope
from jaxpersona.models.weight import dot, dots

F32 = jnp.float32
QUERY_CHUNK = 512  # number of queries per chunk of attention scores in a long prefill
_MASKED = -1e30  # finite, so that the softmax of a fully masked query is not NaN


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float, *,
             overflow_to_nan: bool = False, known: jax.Array | None = None) -> jax.Array:
    """Apply RMSNorm over the last axis, in float32 (Zhang and Sennrich 2019).

    The normalized values are multiplied by weight + offset. If the sum of squares overflows float32
    (for example, if a value exceeds 1.8e19), the result is 0, or NaN with `overflow_to_nan`. The
    boolean array `known` has the shape of x without the last axis; the result is NaN where `known`
    is False.
    """
    y = x.astype(F32)
    factor = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    if overflow_to_nan:  # only the factor is tested, so that XLA compiles a single kernel
        factor = jnp.where(factor > 0, factor, jnp.nan)
    if known is not None:
        factor = jnp.where(known[..., None], factor, jnp.nan)
    y = y * factor
    return (y * aligned(weight.astype(F32) + offset, y)).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the rotary frequencies, [H/2] float32, in radians per position; H is `head_dim`."""
    inverse = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    if rope.kind == "llama3":
        wave = 2 * math.pi / inverse
        low, high = rope.low_freq_factor, rope.high_freq_factor
        ratio = (rope.original_context / wave - low) / (high - low)
        blend = np.clip(ratio, 0.0, 1.0)
        inverse = (1 - blend) * inverse / rope.factor + blend * inverse
    return inverse.astype(np.float32)


def rotary(position: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return the rotary cosines and sines, each [B, T, 1, H/2] float32 (Su et al. 2021)."""
    frequency = rope_frequencies(rope, head_dim)[None, None, None]
    angle = position[..., None, None].astype(F32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply the rotary embedding to x [B, T, N, H]; dimension i is paired with i + H/2."""
    a, b = jnp.split(x.astype(F32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(
    q_btnh: jax.Array,
    k_bksh: jax.Array,
    v_bksh: jax.Array,
    q_position: jax.Array,
    k_position: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Compute causal attention with a mask from positions, in chunks of `QUERY_CHUNK` queries.

    On a mesh, queries and keys must have the same sharding over batch rows and heads.

    Args:
      q_btnh: queries [B, T, N, H].
      k_bksh, v_bksh: keys and values [B, K, S, H].
      q_position: [B, T] int32, the position of each query.
      k_position: [B, S] int32, the position of each key; −1 at padding and in empty slots, which
        are masked.
      scale: the factor applied to q·k.
      softcap: the bound c of the soft-cap c·tanh(scores/c) (Gemma 2), or None.
      window: the sliding-window size in positions, or None for full attention.

    Returns:
      The attention output of each query head, [B, T, N, H].
    """
    t = q_btnh.shape[1]

    def attend(q: jax.Array, position: jax.Array) -> jax.Array:
        return _attend(q, k_bksh, v_bksh, position, k_position, scale, softcap, window)

    if t <= QUERY_CHUNK:
        return attend(q_btnh, q_position)
    chunks = -(-t // QUERY_CHUNK)
    extra = chunks * QUERY_CHUNK - t
    q = jnp.pad(q_btnh, ((0, 0), (0, extra), (0, 0), (0, 0)))
    position = jnp.pad(q_position, ((0, 0), (0, extra)))

    def one(i: jax.Array, rows: jax.Array) -> jax.Array:
        start = i * QUERY_CHUNK
        piece = jax.lax.dynamic_slice_in_dim(rows, start, QUERY_CHUNK, 1)
        where = jax.lax.dynamic_slice_in_dim(position, start, QUERY_CHUNK, 1)
        mixed = jax.checkpoint(attend)(piece, where)
        return jax.lax.dynamic_update_slice_in_dim(rows, mixed, start, 1)

    # Each chunk's result overwrites its queries. With `jax.lax.map` instead, XLA allocated result
    # buffers for all layers at once: 51 GB for 64 layers and 32 × 1536 tokens on a GPU.
    return jax.lax.fori_loop(0, chunks, one, q)[:, :t]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, q_position: jax.Array, k_position: jax.Array,
            scale: float, softcap: float | None, window: int | None) -> jax.Array:
    b, t, n, h = q.shape
    groups = k.shape[1]
    # The reshape has an explicit sharding, because JAX cannot infer it for a single key/value head.
    apart = out_sharding(("batch", None, "kv_heads", "kv_group", None), q)
    q_btkgh = jnp.reshape(q, (b, t, groups, n // groups, h), out_sharding=apart)
    scores = _product("btkgh,bksh->bkgts", q_btkgh, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    query, key = q_position[:, None, None, :, None], k_position[:, None, None, None, :]
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen &= query - key < window
    weights = jax.nn.softmax(jnp.where(seen, scores, _MASKED), axis=-1)
    # On a CPU, the axis order "bkgth" is three times as fast as "btkgh"; in a TPU prefill, it would
    # need gigabytes more memory.
    if t == 1 or on_cpu(v):
        out = jnp.moveaxis(_product("bkgts,bksh->bkgth", weights.astype(q.dtype), v), 3, 1)
    else:
        out = _product("bkgts,bksh->btkgh", weights.astype(q.dtype), v)
    joined = out_sharding(("batch", None, "heads", None), q)
    return jnp.reshape(out, (b, t, n, h), out_sharding=joined).astype(q.dtype)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute an einsum with float32 accumulation; on CPUs, convert 16-bit inputs to float32 first.

    XLA's CPU backend does not support batched bfloat16 products with a float32 result.
    """

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=F32)

    def wide(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x.astype(F32), y.astype(F32))

    if y.dtype == F32:
        return wide(x, y)
    return jax.lax.platform_dependent(x, y, cpu=wide, default=plain)


def mlp(x: jax.Array, layer: Any, activation: Activation) -> jax.Array:
    """Apply the gated MLP, down(act(gate(x)) · up(x)) (Shazeer 2020), to x [B, T, D]."""
    gate, up = dots(x, layer.gate_up)
    gate, up = add_bias(gate, layer.b_gate_f), add_bias(up, layer.b_up_f)
    wide = gate.astype(F32)  # in float32, so that values are rounded only once, after the product
    act = jax.nn.silu(wide) if activation == "silu" else jax.nn.gelu(wide, approximate=True)
    inner = (act * up.astype(F32)).astype(x.dtype)
    out = dot(inner, layer.w_down_df, axes=("batch", None, None))
    return add_bias(out, layer.b_down_d)


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return x plus the bias, or x if the bias is None."""
    return x if bias is None else x + aligned(bias, x)


def aligned(w: jax.Array, x: jax.Array) -> jax.Array:
    """Add leading dimensions of size 1 to w, so that it has the rank of x.

    Explicit dimensions are needed if the user has set `jax_numpy_rank_promotion` to "raise".
    """
    return jax.lax.expand_dims(w, tuple(range(x.ndim - w.ndim)))
