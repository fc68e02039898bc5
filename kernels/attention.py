"""Selection of the attention implementation for prefill, and cuDNN's flash attention.

The XLA implementation (`nn.attention`) is the reference and supports all models. cuDNN on GPUs and
splash attention on TPUs do not write the scores to device memory, so these kernels are faster for
long prompts. However, the kernels support only some shapes and dtypes, and attend only to the
tokens of the current call. The selection happens at trace time. A requested implementation is never
replaced by another. If "auto" falls back to XLA for a long prompt on a GPU or TPU, although the
cache contains no earlier tokens, a warning gives the reason.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxpersona.kernels.probe import fault
from jaxpersona.kernels.splash import missing, splash_fault

from jaxpersona.errors import UserError

Implementation = Literal["xla", "cudnn", "splash"]
Asked = Literal["auto", "xla", "cudnn", "splash"]
# the longest batches, in tokens per row, for which "auto" always uses XLA on a GPU and on a TPU
LONG = 127  # measured: from 128 tokens on, cuDNN was faster on an H100
LONG_TPU = 2047  # estimated, not measured
_KERNELS: dict[str, Implementation] = {"gpu": "cudnn", "tpu": "splash"}  # used by "auto"
_NAMES = {"cudnn": "cuDNN's", "splash": "splash attention"}


def attention_implementation(
    config: Any,
    platform: str,
    *,
    dtype: Any,
    tokens: int,
    fresh: bool,
    capability: float = 0.0,
    sharded: bool = False,
    asked: Asked = "auto",
) -> tuple[Implementation, str]:
    """Choose the attention implementation; "auto" uses a supported kernel for long batches.

    Args:
      config: the model configuration, of which `attn_softcap` and `head_dim` are used.
      platform: the devices' platform: "cpu", "gpu" or "tpu".
      dtype: the dtype of queries, keys and values.
      tokens: the number of queries per row, including padding.
      fresh: whether there are no earlier tokens, because the cache is new or there is no cache.
      capability: the GPU's compute capability, such as 9.0 for an H100; 0 if it is unknown.
      sharded: whether the arrays are sharded over a mesh.
      asked: the requested implementation, or "auto".

    Returns:
      The implementation, and the reason for this choice. For "auto", the implementation is "xla" if
      the kernel is not supported or the batch is not long.

    Raises:
      UserError: `asked` is unknown, or a kernel is requested but not supported; the message lists
        every reason.
    """
    if asked not in get_args(Asked):
        raise UserError(f"attention is {asked!r}; it must be auto, xla, cudnn or splash")
    if asked == "xla":
        return "xla", "it was requested"
    kernel = _KERNELS.get(platform, "cudnn") if asked == "auto" else asked
    against = (_against_cudnn(config, platform, dtype, fresh, capability, sharded)
               if kernel == "cudnn" else _against_splash(config, platform, dtype, fresh))
    if against and asked != "auto":
        raise UserError(f"attention is {asked!r}, but {', and '.join(against)}; use 'auto' or "
                        "'xla'")
    if against:
        return "xla", against[0]
    least = LONG if kernel == "cudnn" else LONG_TPU
    if tokens <= least and asked == "auto":
        return "xla", f"the batch has {tokens} tokens per row; 'auto' uses XLA up to {least}"
    return kernel, "it is supported"


def _against_cudnn(config: Any, platform: str, dtype: Any, fresh: bool, capability: float,
                   sharded: bool) -> list[str]:
    """Return the reasons why cuDNN cannot compute the attention of a call."""
    limit = 256 if capability >= 9 else 128
    return [reason for reason, holds in (
        (f"the platform is {platform}", platform != "gpu"),
        (f"compute capability {capability:g} is below 8", platform == "gpu" and capability < 8),
        ("the model soft-caps its attention scores", config.attn_softcap is not None),
        (f"the dtype is {np.dtype(dtype).name}, not bfloat16 or float16",
         np.dtype(dtype).name not in ("bfloat16", "float16")),
        (f"the head dimension {config.head_dim} is not a multiple of 8 up to {limit}",
         config.head_dim % 8 != 0 or config.head_dim > limit),
        ("the cache may hold earlier tokens", not fresh),
        ("the arrays are sharded over a mesh", sharded),
    ) if holds]


def _against_splash(config: Any, platform: str, dtype: Any, fresh: bool) -> list[str]:
    """Return the reasons why splash attention cannot compute the attention of a call."""
    absent = missing()
    return [reason for reason, holds in (
        (f"the platform is {platform}", platform != "tpu"),
        (absent or "", absent is not None),
        (f"the dtype is {np.dtype(dtype).name}, not bfloat16 or float32",
         np.dtype(dtype).name not in ("bfloat16", "float32")),
        (f"the head dimension {config.head_dim} is not a multiple of 8 up to 256",
         config.head_dim % 8 != 0 or config.head_dim > 256),
        ("the cache may hold earlier tokens", not fresh),
    ) if holds]


def choose(config: Any, asked: Asked, *, dtype: Any, tokens: int, fresh: bool, sharded: bool,
           platform: str) -> Implementation:
    """Choose the attention implementation for a platform, and test a kernel before its first use.

    The tests are `cudnn_fault` and `splash_fault`. The function warns if "auto" falls back to
    XLA for a long prompt on a GPU or TPU, although the cache contains no earlier tokens. The
    arguments are as for `attention_implementation`.

    Raises:
      UserError: `asked` is unknown, or a kernel is requested but not supported or fails its test.
    """
    capability = 0.0
    if platform == "gpu" and asked != "xla":
        # on AMD GPUs, the compute capability is a name such as gfx90a, not a number
        version = str(getattr(_gpu(), "compute_capability", ""))
        capability = float(version) if version.replace(".", "", 1).isdigit() else 0.0
    chosen, reason = attention_implementation(
        config, platform, dtype=dtype, tokens=tokens, fresh=fresh, capability=capability,
        sharded=sharded, asked=asked)
    if chosen != "xla":
        windowed = any(window is not None for window in config.windows)
        case = np.dtype(dtype).name, config.head_dim, config.n_heads // config.n_kv_heads, windowed
        found = (cudnn_fault(*case) if chosen == "cudnn" else
                 splash_fault(*case, config.attn_softcap is not None))
        if found is not None and asked != "auto":
            raise UserError(f"attention is {asked!r}, but {found}; use 'auto' or 'xla'")
        chosen, reason = (chosen, reason) if found is None else ("xla", found)
    if chosen == "xla" and asked == "auto" and fresh and platform in _KERNELS:
        kernel = _KERNELS[platform]
        if tokens > (LONG if kernel == "cudnn" else LONG_TPU):
            _say_once(f"long prompts use XLA's attention instead of {_NAMES[kernel]}: {reason}")
    return chosen


def _gpu() -> Any:
    """Return this process's first GPU, which may not be JAX's default device, or None."""
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # a program can be compiled for a GPU on a machine without one
        return None


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@functools.lru_cache(maxsize=64)
def cudnn_fault(dtype: str, head_dim: int, groups: int, windowed: bool) -> str | None:
    """Compare cuDNN's attention with NumPy on a small input; return a description of any error.

    The result is None if both agree. The arguments are properties by which cuDNN selects a kernel;
    each combination is tested once.
    """
    return fault("cuDNN's attention", flash, dtype=dtype, head_dim=head_dim, groups=groups,
                 window=16 if windowed else None, softcap=None, device=_gpu())


def flash(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, length: jax.Array, *,
          scale: float, window: int | None = None,
          implementation: Literal["xla", "cudnn"] = "cudnn") -> jax.Array:
    """Compute causal attention among the tokens of each row (FlashAttention, Dao et al. 2022).

    Args:
      q_btnh: queries [B, T, N, H], with N heads of dimension H.
      k_btkh, v_btkh: keys and values [B, T, K, H] of the same tokens, with K heads; K divides N.
      length: [B] int32, the number of valid tokens per row; the other tokens are padding.
      scale: the factor applied to q·k.
      window: sliding-window size in tokens, including the query itself, or None.
      implementation: "cudnn", or "xla" for comparison.

    Returns:
      The attention output of each query head, [B, T, N, H]; zero at padding.
    """
    out = jax.nn.dot_product_attention(
        q_btnh, k_btkh, v_btkh, scale=scale, is_causal=True, query_seq_lengths=length,
        key_value_seq_lengths=length,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    inside = jnp.arange(q_btnh.shape[1], dtype=jnp.int32)[None] < length[:, None]
    # cuDNN's output at padding is undefined and may be NaN; a product with zero would stay NaN
    return jnp.where(inside[:, :, None, None], out, jnp.zeros((), out.dtype))
