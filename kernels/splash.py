"""Attention for long prompts on TPUs: JAX's splash attention kernel.

The kernel computes the scores of a block of queries and keys in on-chip memory, without writing the
scores to device memory. Blocks that are fully masked by the causal mask or by a sliding window
are skipped. The XLA implementation (`nn.attention`) is the reference.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxpersona.kernels.probe import fault

LANES = 128  # the kernel requires blocks whose length is a multiple of this number of tokens
_BLOCKS = (512, 256, LANES)
_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"


def splash(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, length: jax.Array, *,
           scale: float, window: int | None = None, softcap: float | None = None,
           interpret: bool = False) -> jax.Array:
    """Compute causal attention among the tokens of each row with `splash_attention`.

    The tokens are padded to a multiple of 128. Padding has a different segment id from the valid
    tokens, so no valid token attends to padding. Queries are multiplied by `scale` and rounded to
    their dtype before the product, whereas the reference multiplies the float32 scores by `scale`.
    The function is differentiable.

    Args:
      q_btnh: queries [B, T, N, H], with N heads of dimension H.
      k_btkh, v_btkh: keys and values [B, T, K, H] of the same tokens, with K heads; K divides N.
      length: [B] int32, the number of valid tokens per row; the other tokens are padding.
      scale: the factor applied to q·k.
      window: sliding-window size in tokens, including the query itself, or None.
      softcap: the bound c of the soft-cap c·tanh(scores/c) (Gemma 2), or None.
      interpret: whether to emulate the kernel with JAX operations, on any device.

    Returns:
      The attention output of each query head, [B, T, N, H]; zero at padding.
    """
    kernels: Any = importlib.import_module(_MODULE)
    width, heads = q_btnh.shape[1], q_btnh.shape[2]
    padded = -(-width // LANES) * LANES
    inside = jnp.arange(padded, dtype=jnp.int32)[None] < length[:, None]
    scaled = (q_btnh.astype(jnp.float32) * scale).astype(q_btnh.dtype)
    q, k, v = (jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padded - width), (0, 0), (0, 0))), 2, 1)
               for x in (scaled, k_btkh, v_btkh))
    shape = (padded, padded)
    mask = (kernels.CausalMask(shape) if window is None or window >= width
            else kernels.LocalMask(shape, (window - 1, 0), 0))
    block = next(size for size in _BLOCKS if padded % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap, interpret=interpret)
    segment = inside.astype(jnp.int32)
    out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment, segment))
    out = jnp.where(inside[:, None, :, None], out, jnp.zeros((), out.dtype))
    return jnp.moveaxis(out, 1, 2)[:, :width]


def missing() -> str | None:
    """Return None if this version of JAX has splash attention, otherwise an error message."""
    try:
        importlib.import_module(_MODULE)
    except ImportError as error:
        return f"jax {jax.__version__} has no {_MODULE} ({error})"
    return None


@functools.lru_cache(maxsize=64)
def splash_fault(dtype: str, head_dim: int, groups: int, windowed: bool,
                 softcapped: bool) -> str | None:
    """Compare the kernel with NumPy on a small input; return a description of any error.

    The result is None if both agree. It is also None if this process has no TPU, because the
    program is then compiled for another machine. The arguments are the properties on which the
    kernel depends; each combination is tested once.
    """
    device = tpu()
    if device is None:
        return None
    return fault("splash attention", splash, dtype=dtype, head_dim=head_dim, groups=groups,
                 window=16 if windowed else None, softcap=5.0 if softcapped else None,
                 device=device)


def tpu() -> Any:
    """Return this process's first TPU, which may not be JAX's default device, or None."""
    try:
        return jax.local_devices(backend="tpu")[0]
    except RuntimeError:  # a program can be compiled for a TPU on a machine without one
        return None
