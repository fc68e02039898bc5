"""A test of attention kernels before their first use: a comparison with NumPy on a small input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fault(name: str, attend: Callable[..., jax.Array], *, dtype: str, head_dim: int, groups: int,
          window: int | None, softcap: float | None, device: Any) -> str | None:
    """Run an attention function on a small input and compare the result with `definition`.

    Args:
      name: the name of the kernel, for the returned message.
      attend: a function with the arguments of `attention.flash` and, if `softcap` is not None,
        also `softcap`.
      dtype, head_dim: the dtype and the head dimension of the input.
      groups: the number of query heads per key/value head.
      window: sliding-window size in tokens, including the query itself, or None.
      softcap: the bound c of the soft-cap c·tanh(scores/c), or None.
      device: the device to run on, or None for JAX's default device.

    Returns:
      None if the kernel and NumPy agree, otherwise a description of the exception or deviation.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 64, n, head_dim)).astype(np.float32) for n in (2 * groups, 2, 2)]
    length, options = np.array([64, 37], np.int32), {} if softcap is None else {"softcap": softcap}
    try:
        # the caller may be tracing, and the default device may be a CPU
        with jax.ensure_compile_time_eval(), jax.default_device(device):
            q, k, v = (jnp.asarray(x, dtype) for x in arrays)
            got = np.asarray(attend(q, k, v, jnp.asarray(length), scale=head_dim**-0.5,
                                    window=window, **options), np.float32)
            q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    except Exception as error:  # compiler and driver errors have many types
        text = " ".join(str(error).split())[:160]
        return f"{name} failed its test ({type(error).__name__}: {text})"
    want = definition(q, np.repeat(k, groups, 2), np.repeat(v, groups, 2), length, window, softcap)
    worst = float(np.abs(got - want).max())
    # a tolerance for outputs of order 1 with a precision of at least eight bits
    return None if worst < 0.05 else f"{name} failed its test (max error {worst:.3g})"


def definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: np.ndarray,
               window: int | None, softcap: float | None = None) -> np.ndarray:
    """Compute softmax(q·kᵀ/√H)·v [B, T, N, H] in NumPy, with the masks of `attention.flash`.

    q, k and v are [B, T, N, H]; `length` and `window` are as for `attention.flash`. If `softcap` is
    not None, the scores are soft-capped before the softmax (see `fault`).
    """
    at = np.arange(q.shape[1])
    seen = (at <= at[:, None]) & (at[:, None] - at < (window or at.size))
    inside = at < length[:, None]
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen & inside[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)
    return out * inside[:, :, None, None]
