"""The two parts of a transformer block: attention and the MLP.

Most layers of a model have the same operations and differ only in their parameters. While a program
of the engine is traced, each part is therefore a nested `jax.jit` function, so that layers with the
same operations share one trace. XLA inlines these functions before other optimizations, so the
compiled program is the same as without nested functions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxpersona.distributed.sharding import by_shard, in_program
from jaxpersona.kernels.attention import Implementation, flash
from jaxpersona.kernels.splash import splash
from jaxpersona.models import nn
from jaxpersona.models.batch import Batch
from jaxpersona.models.cache import write
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Layer
from jaxpersona.models.weight import dot, dots

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Bool, Float, Int

_Q_AXES = ("batch", None, "heads", None)
_KV_AXES = ("batch", None, "kv_heads", None)
Held = tuple[jax.Array, jax.Array]  # one layer's keys and values in the cache, each [B, K, S, H]


class Parts(NamedTuple):
    """The two parts of a block as functions for one forward pass.

    Attributes:
      attend: the function `attend` with `config` and `attention` bound.
      transform: the function `transform` with `config` bound.
    """

    attend: Callable[..., tuple[jax.Array, Held | None]]
    transform: Callable[[Layer, jax.Array], jax.Array]


def parts(config: ModelConfig, attention: Implementation) -> Parts:
    """Return the parts of a block, as nested `jax.jit` functions while the engine traces a program.

    Otherwise, the parts are plain functions, because each call of `parts` creates new functions,
    which `jax.jit` would compile again in every eager forward pass.

    Args:
      config: the model configuration.
      attention: "xla", "cudnn" or "splash" (see `forward`).
    """
    made = Parts(functools.partial(attend, config, attention),
                 functools.partial(transform, config))
    if not in_program():
        return made
    return Parts(jax.jit(made.attend, static_argnames=("window",)), jax.jit(made.transform))


def attend(config: ModelConfig, attention: Implementation, layer: Layer, x: Float[Array, "B T D"],
           angle: tuple[jax.Array, jax.Array], batch: Batch, positions: Int[Array, "B S"],
           slots: Int[Array, "B T"], held: Held | None, known: Bool[Array, "B T"] | None,
           normed: Float[Array, "B T D"] | None = None, *,
           window: int | None) -> tuple[jax.Array, Held | None]:
    """Run the attention part of a block, including its norms, projections and cache write.

    Args:
      config: the model configuration.
      attention: "xla", "cudnn" or "splash" (see `forward`).
      layer: the parameters of the block.
      x: the residual stream [B, T, D].
      angle: the rotary cosines and sines of the tokens, each [B, T, 1, H/2] (`nn.rotary`).
      batch: the tokens of this call.
      positions: [B, S] int32, the position of each key; −1 at padding and in empty slots.
      slots: [B, T] int32, the cache slot of each token.
      held: the block's keys and values in the cache, each [B, K, S, H]; None without a cache.
      known: [B, T] bool, False at tokens whose result must be NaN; None means all True. Ignored if
        `normed` is given.
      normed: x after the block's first norm if `Trace.finish` has computed it, otherwise None.
      window: the sliding-window size in positions, or None for full attention.

    Returns:
      The output [B, T, D] to add to the residual stream, and the updated `held`.
    """
    if normed is None:
        normed = nn.rms_norm(x, layer.attn_norm_d, config.norm_eps, config.norm_offset, known=known)
    q, k, v = _project(layer, config, normed, angle)
    own = k, v  # this call's keys and values, [B, T, K, H]
    if held is None:
        k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
    else:
        k = write(held[0], _kept(k, held[0]), slots)
        v = write(held[1], _kept(v, held[1]), slots)
        if attention != "xla":
            # With the barrier, XLA writes the cache before attention. The attention kernels do not
            # read the cache, so without the barrier, XLA would delay the writes of all layers and
            # keep their new keys and values in memory until the end of the program.
            k, v, own = jax.lax.optimization_barrier((k, v, own))
        held = k, v
    if attention == "cudnn":
        mixed = flash(q, own[0], own[1], batch.length, scale=config.attn_scale, window=window)
    elif attention == "splash":
        mixed = by_shard(
            functools.partial(splash, scale=config.attn_scale, window=window,
                              softcap=config.attn_softcap),
            (_Q_AXES, _KV_AXES, _KV_AXES, ("batch",)), _Q_AXES)(
                q, own[0], own[1], batch.length)
    else:
        mixed = nn.attention(q, k, v, batch.position, positions, scale=config.attn_scale,
                             softcap=config.attn_softcap, window=window)
    out = dot(mixed, layer.wo_dnh, inner=2, axes=("batch", None, None))
    out = nn.add_bias(out, layer.bo_d)
    if config.post_norms:
        out = nn.rms_norm(out, layer.attn_post_norm_d, config.norm_eps, config.norm_offset)
    return out, held


def transform(config: ModelConfig, layer: Layer, x: Float[Array, "B T D"]) -> jax.Array:
    """Return a block's MLP output [B, T, D] for the residual stream x; the caller adds it to x."""
    eps, offset = config.norm_eps, config.norm_offset
    y = nn.mlp(nn.rms_norm(x, layer.mlp_norm_d, eps, offset), layer, config.activation)
    if config.post_norms:
        y = nn.rms_norm(y, layer.mlp_post_norm_d, eps, offset)
    return y


def _project(layer: Layer, config: ModelConfig, normed: jax.Array,
             angle: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries [B, T, N, H] and keys [B, T, K, H], both rotated, and values [B, T, K, H]."""
    q, k, v = dots(normed, layer.qkv)
    q = nn.add_bias(q, layer.bq_nh)
    k = nn.add_bias(k, layer.bk_kh)
    v = nn.add_bias(v, layer.bv_kh)
    if config.qk_norm:
        q = nn.rms_norm(q, layer.q_norm_h, config.norm_eps, config.norm_offset)
        k = nn.rms_norm(k, layer.k_norm_h, config.norm_eps, config.norm_offset)
    return nn.rotate(q, *angle), nn.rotate(k, *angle), v


def _kept(x: jax.Array, buffer: jax.Array) -> jax.Array:
    """Round x to the precision of its dtype if it is stored in a buffer of a wider dtype.

    Without this rounding, XLA may store the values in the higher precision used inside a fusion.
    """
    return x if x.dtype == buffer.dtype else nn.round_residual(x)
