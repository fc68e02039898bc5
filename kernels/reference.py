"""The reference form of the rank-one edit: the equation, in the order it is written."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def rank_one_edit(
    h: jax.Array,
    direction: jax.Array,
    coefficients: Sequence[jax.Array],
    active: jax.Array,
    push: jax.Array | None = None,
    columns: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Edit activations along one direction a row.

    With p = ⟨h, v̂⟩ in float32: δ = clip((s − 1)·p + c, lo − p, hi − p), h ← h + δ·v̂.

    Args:
      h: activations [B, T, D].
      direction: v̂, unit vectors [B, D] or [1, D] float32.
      coefficients: s, c, lo and hi, each [B] or [1] float32.
      active: [B, T] bool, where the edit may act.
      push: û like `direction`, what h moves along instead of v̂; None for v̂ itself.
      columns: what `twice` makes of v̂, where it is at hand.

    Returns:
      The edited h in its own dtype, and [B, T] bool: where δ ≠ 0. Where δ = 0 or the edit is not
      active, h comes back bit for bit.
    """
    s, c, lo, hi = (number[:, None] for number in coefficients)
    wide = h.astype(jnp.float32)
    p = project(wide, direction) if columns is None else _by_product(wide, columns)
    # s·p − p is exactly 0 at s = 1, like (s − 1)·p, and leaves XLA no difference to hoist by layer
    delta = jnp.clip(s * p - p + c, lo - p, hi - p)
    changed = active & (delta != 0)
    along = direction if push is None else push
    edited = (wide + delta[..., None] * along[:, None, :]).astype(h.dtype)
    return jnp.where(changed[..., None], edited, h), changed


def project(h: jax.Array, direction: jax.Array) -> jax.Array:
    """Return p = ⟨h, v̂⟩ [B, T] of activations [B, T, D] float32 on v̂ [B, D] or [1, D]."""

    def by_product(h: jax.Array, direction: jax.Array) -> jax.Array:
        return _by_product(h, twice(direction))

    return jax.lax.platform_dependent(h, direction, cpu=by_product, default=_by_sum)


def twice(direction: jax.Array) -> jax.Array:
    """Set v̂ [B, D] twice side by side, [B, 2, D], for products on a CPU.

    XLA turns a product with one column into a multiplication and a sum in steps, three kernels
    where a product with two equal columns is one.
    """
    return jnp.stack([direction, direction], 1)


def _by_sum(h: jax.Array, direction: jax.Array) -> jax.Array:
    return jnp.einsum("btd,btd->bt", h, jnp.broadcast_to(direction[:, None], h.shape),
                      precision="highest")


def _by_product(h: jax.Array, columns: jax.Array) -> jax.Array:
    if columns.shape[0] == 1:
        return jnp.einsum("btd,kd->btk", h, columns[0], precision="highest")[..., 0]
    return jnp.einsum("btd,bkd->btk", h, columns, precision="highest")[..., 0]
