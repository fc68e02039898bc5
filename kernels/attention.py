"""Which implementation attends a prompt, and cuDNN's flash attention for those it fits.

XLA's form (`nn.attention`) is the reference and serves every case. cuDNN's never writes the scores
to memory, which pays on long prompts, but it covers only some shapes and sees only the tokens of
this call. The choice is made while a program is traced; on a GPU, not getting cuDNN is said aloud.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal["xla", "cudnn"]
Asked = Literal["auto", "xla", "cudnn"]
LONG = 127  # tokens up to which XLA's attention is used: from 128 on cuDNN's was faster on an H100


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
    """Choose how a call's tokens attend: "cudnn" where it fits, else "xla", with the reason.

    Args:
      config: the model's shape (its `attn_softcap` and `head_dim` are read).
      platform: of the devices: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      tokens: queries a row, padding included.
      fresh: whether no earlier token can be seen: there is no cache, or this call makes it.
      capability: the GPU's compute capability.
      sharded: whether the arrays are spread over a mesh.
      asked: "auto", or the one that must be used.

    Raises:
      ValueError: cuDNN was asked for and does not fit; every reason is named.
    """
    if asked not in ("auto", "xla", "cudnn"):
        raise ValueError(f"attention is {asked!r}; it must be auto, xla or cudnn")
    if asked == "xla":
        return "xla", "it was asked for"
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
        ("the arrays are spread over a mesh", sharded),
    ) if holds]
    if against and asked == "cudnn":
        raise ValueError(f"attention is 'cudnn', but {', and '.join(against)}; use 'auto' or 'xla'")
    if against:
        return "xla", against[0]
    if tokens <= LONG and asked == "auto":
        return "xla", f"{tokens} tokens are few"
    return "cudnn", "it fits"


def choose(config: Any, asked: Asked, *, dtype: Any, tokens: int, fresh: bool, sharded: bool,
           platform: str) -> Implementation:
    """Choose for the platform on which the arrays lie, test cuDNN once, and say what stands
    against it.

    Raises:
      ValueError: cuDNN was asked for, and does not fit or fails its test.
    """
    capability = 0.0
    if platform == "gpu" and asked != "xla":
        # AMD's devices have names here, not numbers
        said = str(getattr(_gpu(), "compute_capability", ""))
        capability = float(said) if said.replace(".", "", 1).isdigit() else 0.0
    found, reason = attention_implementation(
        config, platform, dtype=dtype, tokens=tokens, fresh=fresh, capability=capability,
        sharded=sharded, asked=asked)
    if found == "cudnn":
        windowed = any(window is not None for window in config.windows)
        groups = config.n_heads // config.n_kv_heads
        fault = cudnn_fault(np.dtype(dtype).name, config.head_dim, groups, windowed)
        if fault is not None and asked == "cudnn":
            raise ValueError(f"attention is 'cudnn', but {fault}; use 'auto' or 'xla'")
        found, reason = ("cudnn", reason) if fault is None else ("xla", fault)
    if found == "xla" and platform == "gpu" and asked == "auto" and fresh and tokens > LONG:
        _say_once(f"long prompts attend through XLA, not cuDNN: {reason}")
    return found


def _gpu() -> Any:
    """Return this process's first GPU, which need not be JAX's default device, or None."""
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # programs may be compiled for a GPU where there is none
        return None


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@functools.lru_cache(maxsize=64)
def cudnn_fault(dtype: str, head_dim: int, groups: int, windowed: bool) -> str | None:
    """Run cuDNN's attention on a small case and compare it with the definition; None: they agree.

    The arguments are what cuDNN's choice of a kernel depends on; each case is tried once.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 64, n, head_dim)).astype(np.float32) for n in (2 * groups, 2, 2)]
    length, window = np.array([64, 37], np.int32), 16 if windowed else None
    try:
        # the caller may be in the midst of a trace, and the default device a CPU
        with jax.ensure_compile_time_eval(), jax.default_device(_gpu()):
            q, k, v = (jnp.asarray(x, dtype) for x in arrays)
            got = np.asarray(flash(q, k, v, jnp.asarray(length), scale=head_dim**-0.5,
                                   window=window), np.float32)
            q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    except Exception as error:  # the compiler's and the driver's errors have many types
        said = " ".join(str(error).split())[:160]
        return f"cuDNN's attention failed its test ({type(error).__name__}: {said})"
    want = _definition(q, np.repeat(k, groups, 2), np.repeat(v, groups, 2), length, window)
    worst = float(np.abs(got - want).max())
    # outputs are of size 1 and rounded to eight bits or more
    return None if worst < 0.05 else f"cuDNN's attention failed its test (it is off by {worst:.3g})"


def _definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: np.ndarray,
                window: int | None) -> np.ndarray:
    """Compute softmax(q·kᵀ/√H)·v [B, T, N, H] as `flash` masks it, in NumPy."""
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
    """Attend causally within each row's own tokens (Dao et al. 2022, FlashAttention).

    Args:
      q_btnh: queries [B, T, N, H].
      k_btkh, v_btkh: keys and values [B, T, K, H] of the same tokens.
      length: [B] int32, the row's tokens; those after them are padding.
      scale: of the scores.
      window: a query sees only the last `window` tokens, itself included, or None.
      implementation: "cudnn"; "xla" is the same function by its definition, to compare with.

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
    # cuDNN leaves padding undefined, and NaN there would survive a capture's zero weight
    return jnp.where(inside[:, :, None, None], out, jnp.zeros((), out.dtype))
