"""Selection of the attention implementation for prefill, and cuDNN's flash attention.

The XLA implementation (`nn.attention`) is the reference and supports every case. cuDNN does not
write the scores to memory, so it is faster for long prompts, but it supports only some shapes and
attends only to the tokens of the current call. The selection happens at trace time; a fallback to
XLA on a GPU issues a warning.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.errors import UserError

Implementation = Literal["xla", "cudnn"]
Asked = Literal["auto", "xla", "cudnn"]
LONG = 127  # "auto" uses XLA up to this width; from 128 tokens on, cuDNN was faster on an H100


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
    """Choose the attention implementation: cuDNN for long batches if it is supported, else XLA.

    Args:
      config: the model configuration (reads `attn_softcap` and `head_dim`).
      platform: the devices' platform: "cpu", "gpu" or "tpu".
      dtype: the dtype of queries, keys and values.
      tokens: the number of queries per row, including padding.
      fresh: whether there are no earlier tokens, because there is no cache or it is new.
      capability: the GPU's compute capability.
      sharded: whether the arrays are sharded over a mesh.
      asked: the requested implementation, or "auto".

    Returns:
      The implementation, and the reason for it.

    Raises:
      UserError: cuDNN is requested but not supported; the message lists every reason.
    """
    if asked not in ("auto", "xla", "cudnn"):
        raise UserError(f"attention is {asked!r}; it must be auto, xla or cudnn")
    if asked == "xla":
        return "xla", "it was requested"
    limit = 256 if capability >= 9 else 128
    against = [reason for reason, holds in (
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
    if against and asked == "cudnn":
        raise UserError(f"attention is 'cudnn', but {', and '.join(against)}; use 'auto' or 'xla'")
    if against:
        return "xla", against[0]
    if tokens <= LONG and asked == "auto":
        return "xla", f"the batch has {tokens} tokens per row, at most {LONG}"
    return "cudnn", "it is supported"


def choose(config: Any, asked: Asked, *, dtype: Any, tokens: int, fresh: bool, sharded: bool,
           platform: str) -> Implementation:
    """Choose the attention implementation for the arrays' platform; warn about a fallback to XLA.

    Before its first use, cuDNN is tested (`cudnn_fault`).

    Raises:
      UserError: cuDNN is requested, but is not supported or fails its test.
    """
    capability = 0.0
    if platform == "gpu" and asked != "xla":
        # on AMD devices, this attribute is a name, not a number
        version = str(getattr(_gpu(), "compute_capability", ""))
        capability = float(version) if version.replace(".", "", 1).isdigit() else 0.0
    chosen, reason = attention_implementation(
        config, platform, dtype=dtype, tokens=tokens, fresh=fresh, capability=capability,
        sharded=sharded, asked=asked)
    if chosen == "cudnn":
        windowed = any(window is not None for window in config.windows)
        groups = config.n_heads // config.n_kv_heads
        fault = cudnn_fault(np.dtype(dtype).name, config.head_dim, groups, windowed)
        if fault is not None and asked == "cudnn":
            raise UserError(f"attention is 'cudnn', but {fault}; use 'auto' or 'xla'")
        chosen, reason = ("cudnn", reason) if fault is None else ("xla", fault)
    if chosen == "xla" and platform == "gpu" and asked == "auto" and fresh and tokens > LONG:
        _say_once(f"long prompts use XLA's attention instead of cuDNN's: {reason}")
    return chosen


def _gpu() -> Any:
    """Return this process's first GPU or None; it may differ from JAX's default device."""
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # a program can be compiled for a GPU on a machine without one
        return None


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@functools.lru_cache(maxsize=64)
def cudnn_fault(dtype: str, head_dim: int, groups: int, windowed: bool) -> str | None:
    """Compare cuDNN's attention with NumPy on a small input; return a description of the error.

    The result is None if they agree. The arguments are the properties by which cuDNN selects a
    kernel; each combination is tested once.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 64, n, head_dim)).astype(np.float32) for n in (2 * groups, 2, 2)]
    length, window = np.array([64, 37], np.int32), 16 if windowed else None
    try:
        # the caller may be tracing, and the default device may be a CPU
        with jax.ensure_compile_time_eval(), jax.default_device(_gpu()):
            q, k, v = (jnp.asarray(x, dtype) for x in arrays)
            got = np.asarray(flash(q, k, v, jnp.asarray(length), scale=head_dim**-0.5,
                                   window=window), np.float32)
            q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    except Exception as error:  # compiler and driver errors have many types
        text = " ".join(str(error).split())[:160]
        return f"cuDNN's attention failed its test ({type(error).__name__}: {text})"
    want = _definition(q, np.repeat(k, groups, 2), np.repeat(v, groups, 2), length, window)
    worst = float(np.abs(got - want).max())
    # outputs are of order 1 and have at least eight bits of precision
    return None if worst < 0.05 else f"cuDNN's attention failed its test (max error {worst:.3g})"


def _definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: np.ndarray,
                window: int | None) -> np.ndarray:
    """Compute softmax(q·kᵀ/√H)·v [B, T, N, H] in NumPy, with the masks of `flash`."""
    at = np.arange(q.shape[1])
    seen = (at <= at[:, None]) & (at[:, None] - at < (window or at.size))
    inside = at < length[:, None]
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(seen & inside[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)
    return out * inside[:, :, None, None]


def flash(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, length: jax.Array, *,
          scale: float, window: int | None = None,
          implementation: Implementation = "cudnn") -> jax.Array:
    """Compute causal attention among the tokens of each row (FlashAttention, Dao et al. 2022).

    Args:
      q_btnh: queries [B, T, N, H].
      k_btkh, v_btkh: keys and values [B, T, K, H] of the same tokens.
      length: [B] int32, the number of valid tokens per row; the other tokens are padding.
      scale: the factor applied to q·k.
      window: sliding-window size in tokens, including the query itself, or None.
      implementation: "cudnn", or "xla" for comparison.

    Returns:
      [B, T, N, H]; zero at padding.
    """
    out = jax.nn.dot_product_attention(
        q_btnh, k_btkh, v_btkh, scale=scale, is_causal=True, query_seq_lengths=length,
        key_value_seq_lengths=length,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    inside = jnp.arange(q_btnh.shape[1], dtype=jnp.int32)[None] < length[:, None]
    # cuDNN's output at padding is undefined, and a capture's zero weight does not remove a NaN
    return jnp.where(inside[:, :, None, None], out, jnp.zeros((), out.dtype))
