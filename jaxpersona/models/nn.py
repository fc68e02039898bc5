"""Layers as functions of arrays: norm, rotary positions, attention, MLP.

Einsum letters are the README's: b batch, t query, s cache, d model, f feed-forward, n heads,
k key/value heads, g = n/k, h head dimension, v vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import Axes, gather_weight, on_cpu, out_sharding, place
from jaxpersona.models.config import Activation, Rope
from jaxpersona.models.params import InOut

F32 = jnp.float32
QUERY_CHUNK = 512  # queries whose scores exist at one time in a long prefill
_MASKED = -1e30  # finite, so that a row with nothing to see stays free of NaN


def contract(equation: str, x: jax.Array, w: jax.Array | InOut,
             axes: Axes | None = None) -> jax.Array:
    """Multiply activations by weights, accumulating in float32 and returning x's dtype.

    `axes` names the result's logical axes where a sharded contraction leaves them open.
    """
    if isinstance(w, InOut) or jax.typeof(w).sharding.mesh.empty:
        return product(equation, x, w).astype(x.dtype)
    w = gather_weight(w)
    placed = out_sharding(axes, x, w) if axes else None
    y = jnp.einsum(equation, x, w, preferred_element_type=F32, out_sharding=placed).astype(x.dtype)
    return y if placed is not None or axes is None else place(y, axes, x, w)


def product(equation: str, x: jax.Array, w: jax.Array | InOut) -> jax.Array:
    """Contract on one device as a 2-D product; float32. As it stands, XLA's CPU back end would
    transpose a weight of three dimensions anew at every step."""
    left, right = equation.split("->")[0].split(",")
    rows = x.shape[: sum(letter not in right for letter in left)]
    if isinstance(w, InOut):
        y = jnp.einsum("rd,df->rf", x.reshape(-1, w.value.shape[0]), w.value,
                       preferred_element_type=F32)
        return y.reshape(*rows, *w.out)
    out = w.shape[: sum(letter not in left for letter in right)]
    inner = math.prod(w.shape[len(out) :])
    x = x.reshape(-1, inner)
    alone = x.shape[0] == 1 and x.dtype == jnp.bfloat16 and on_cpu(w)
    if alone:  # XLA's CPU back end has a fast bfloat16 product for two rows, none for one
        x = jnp.concatenate([x, x])
    y = jnp.einsum("rd,fd->rf", x, w.reshape(-1, inner), preferred_element_type=F32)
    return (y[:1] if alone else y).reshape(*rows, *out)


def round_residual(x: jax.Array) -> jax.Array:
    """Round to the dtype's own precision, so that a fusion cannot carry more.

    XLA may keep a bfloat16 sum in float32 inside a fusion; whether an edit follows it would then
    change values that the edit leaves alone.
    """
    if x.dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if x.dtype == jnp.float16:
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return x


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float, *,
             overflow_to_nan: bool = False, known: jax.Array | None = None) -> jax.Array:
    """Divide by the root mean square over the last axis and scale, in float32 (Zhang 2019).

    Where the mean square exceeds float32 (numbers beyond 1.8e19) the quotient is 0; with
    `overflow_to_nan` it is NaN, so that the overflow shows in whatever is computed from it. It is
    NaN too where `known`, of x's shape without the last axis, is False.
    """
    y = x.astype(F32)
    factor = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    if overflow_to_nan:  # asked of the factor alone, which keeps it one kernel
        factor = jnp.where(factor > 0, factor, jnp.nan)
    if known is not None:
        factor = jnp.where(known[..., None], factor, jnp.nan)
    y = y * factor
    return (y * aligned(weight.astype(F32) + offset, y)).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the H/2 angular frequencies in radians a position, float32."""
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
    """Return cosine and sine of every position's angles, each [B, T, 1, H/2] float32 (Su 2021)."""
    frequency = rope_frequencies(rope, head_dim)[None, None, None]
    angle = position[..., None, None].astype(F32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the halves of every head of x [B, T, N, H] by its position's angles."""
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
    """Attend causally by position; queries beyond `QUERY_CHUNK` are taken in chunks.

    On a mesh the rows and heads of queries and keys are spread alike.

    Args:
      q_btnh: queries [B, T, N, H].
      k_bksh, v_bksh: keys and values [B, K, S, H].
      q_position: [B, T] int32.
      k_position: [B, S] int32; -1 where a slot holds nothing.
      softcap: scores become softcap·tanh(scores/softcap) (Gemma 2), or None.
      window: a query sees only the last `window` positions, or None.

    Returns:
      [B, T, N, H].
    """
    t = q_btnh.shape[1]

    def part(q: jax.Array, position: jax.Array) -> jax.Array:
        return _attend(q, k_bksh, v_bksh, position, k_position, scale, softcap, window)

    if t <= QUERY_CHUNK:
        return part(q_btnh, q_position)
    chunks = -(-t // QUERY_CHUNK)
    extra = chunks * QUERY_CHUNK - t
    q = jnp.pad(q_btnh, ((0, 0), (0, extra), (0, 0), (0, 0)))
    position = jnp.pad(q_position, ((0, 0), (0, extra)))

    def one(i: jax.Array, rows: jax.Array) -> jax.Array:
        start = i * QUERY_CHUNK
        piece = jax.lax.dynamic_slice_in_dim(rows, start, QUERY_CHUNK, 1)
        where = jax.lax.dynamic_slice_in_dim(position, start, QUERY_CHUNK, 1)
        mixed = jax.checkpoint(part)(piece, where)
        return jax.lax.dynamic_update_slice_in_dim(rows, mixed, start, 1)

    # what a chunk gives takes its queries' place: for results stacked by `map`, XLA made the
    # empty buffers of all layers at one time, 51 GB for 64 layers of 32 × 1536 tokens on a GPU
    return jax.lax.fori_loop(0, chunks, one, q)[:, :t]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, q_position: jax.Array, k_position: jax.Array,
            scale: float, softcap: float | None, window: int | None) -> jax.Array:
    b, t, n, h = q.shape
    groups = k.shape[1]
    # said, because a single key/value head leaves JAX to guess which of the two is spread
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
    # the first order is three times as fast on a CPU; TPUs held gigabytes more with it in a prefill
    if t == 1 or on_cpu(v):
        out = jnp.moveaxis(_product("bkgts,bksh->bkgth", weights.astype(q.dtype), v), 3, 1)
    else:
        out = _product("bkgts,bksh->btkgh", weights.astype(q.dtype), v)
    joined = out_sharding(("batch", None, "heads", None), q)
    return jnp.reshape(out, (b, t, n, h), out_sharding=joined).astype(q.dtype)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contract with float32 accumulation; on CPU low precision is widened first (XLA has no
    batched bfloat16 product with a float32 result there)."""

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=F32)

    def wide(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x.astype(F32), y.astype(F32))

    if y.dtype == F32:
        return wide(x, y)
    return jax.lax.platform_dependent(x, y, cpu=wide, default=plain)


def mlp(x: jax.Array, layer: Any, activation: Activation) -> jax.Array:
    """Apply the gated MLP, down(act(gate(x)) · up(x)) (Shazeer 2020), to x [B, T, D]."""
    gate = add_bias(contract("btd,fd->btf", x, layer.w_gate_fd), layer.b_gate_f)
    up = add_bias(contract("btd,fd->btf", x, layer.w_up_fd), layer.b_up_f)
    wide = gate.astype(F32)  # rounded once, after the product
    act = jax.nn.silu(wide) if activation == "silu" else jax.nn.gelu(wide, approximate=True)
    inner = (act * up.astype(F32)).astype(x.dtype)
    out = contract("btf,df->btd", inner, layer.w_down_df, ("batch", None, None))
    return add_bias(out, layer.b_down_d)


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add a bias where there is one."""
    return x if bias is None else x + aligned(bias, x)


def aligned(w: jax.Array, x: jax.Array) -> jax.Array:
    """Give w as many dimensions as x by new leading ones, so that no rank is promoted unseen."""
    return jax.lax.expand_dims(w, tuple(range(x.ndim - w.ndim)))
