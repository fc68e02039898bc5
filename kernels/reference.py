"""The rank-one edit: its equation and its implementation in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpersona.errors import UserError

Implementation = Literal["xla"]


def rank_one_edit(
    h: jax.Array,
    direction: jax.Array,
    coefficients: Sequence[jax.Array],
    active: jax.Array,
    push: jax.Array | None = None,
    columns: jax.Array | None = None,
    *,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Edit activations along one direction per row.

    With p = ⟨h, v̂⟩ in float32: δ = clip((s − 1)·p + c, lo − p, hi − p), h ← h + δ·v̂.

    Args:
      h: activations [B, T, D].
      direction: v̂, unit vectors [B, D] or [1, D] float32.
      coefficients: s, c, lo and hi, each [B] or [1] float32.
      active: [B, T] bool, True at the tokens to edit.
      push: û, with the shape of `direction`, or None. If given, h moves along û instead of v̂.
      columns: `twice(direction)` if it is already computed, otherwise None.
      implementation: "xla", the only implementation available.

    Returns:
      The edited h in its original dtype, and a mask [B, T] bool, True where the edit is active and
      δ ≠ 0. Elsewhere, h is bitwise equal to the input.

    Raises:
      UserError: the implementation is unknown.
    """
    if implementation != "xla":
        raise UserError(f"implementation is {implementation!r}; only 'xla' is available")
    s, c, lo, hi = (number[:, None] for number in coefficients)
    wide = h.astype(jnp.float32)
    p = project(wide, direction) if columns is None else _by_product(wide, columns)
    # s·p − p is exactly 0 at s = 1. The equivalent (s − 1)·p is avoided, because XLA would hoist
    # s − 1 out of the decode loop for every layer.
    delta = jnp.clip(s * p - p + c, lo - p, hi - p)
    changed = active & (delta != 0)
    along = direction if push is None else push
    edited = (wide + delta[..., None] * along[:, None, :]).astype(h.dtype)
    return jnp.where(changed[..., None], edited, h), changed


def round_residual(x: jax.Array) -> jax.Array:
    """Round x to the precision of its dtype, even inside a fusion.

    XLA may keep a bfloat16 sum in float32 inside a fusion. Without this rounding, values that an
    edit does not change could have another precision than in a program without the edit.
    """
    if x.dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if x.dtype == jnp.float16:
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return x


def project(h: jax.Array, direction: jax.Array) -> jax.Array:
    """Return projections ⟨h, v̂⟩ [B, T] of h [B, T, D] float32 onto v̂ [B, D] or [1, D]."""

    def by_product(h: jax.Array, direction: jax.Array) -> jax.Array:
        return _by_product(h, twice(direction))

    return jax.lax.platform_dependent(h, direction, cpu=by_product, default=_by_sum)


def twice(direction: jax.Array) -> jax.Array:
    """Stack two copies of v̂, [B or 1, D], into [B or 1, 2, D], for products on a CPU.

    XLA compiles a product with a single column to three kernels that multiply and reduce, but a
    product with two columns to a single kernel.
    """
    return jnp.stack([direction, direction], 1)


def _by_sum(h: jax.Array, direction: jax.Array) -> jax.Array:
    return jnp.einsum("btd,btd->bt", h, jnp.broadcast_to(direction[:, None], h.shape),
                      precision="highest")


def _by_product(h: jax.Array, columns: jax.Array) -> jax.Array:
    if columns.shape[0] == 1:
        return jnp.einsum("btd,kd->btk", h, columns[0], precision="highest")[..., 0]
    return jnp.einsum("btd,bkd->btk", h, columns, precision="highest")[..., 0]
