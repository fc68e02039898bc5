"""Programs that write, join and read rows of pytrees; the batch axis may differ between leaves."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpersona.engine.compiled import program

T = TypeVar("T")


def axis_of_rows(one: Any, two: Any) -> int:
    """Return the index of a leaf's batch axis, or −1 if it has none.

    Args:
      one, two: the leaf for a batch of one row and for a batch of two rows; only `shape` is used.
    """
    sizes = enumerate(zip(one.shape, two.shape, strict=True))
    return next((axis for axis, (a, b) in sizes if a != b), -1)


@program(static=("axes",), donate=("target",), result=lambda target, **_: target)
def put_rows(target: T, source: T, rows: jax.Array, *, axes: tuple[int, ...]) -> T:
    """Replace rows of a pytree; a leaf without a batch axis is not changed.

    Args:
      target: the pytree (donated).
      source: a pytree of the same structure with the n new rows.
      rows: [n] int32, the indices of the rows to replace; out-of-range indices are ignored.
      axes: the result of `axis_of_rows` for each leaf.
    """
    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return old if axis < 0 else old.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")

    return jax.tree.map(put, target, source, jax.tree.unflatten(jax.tree.structure(target), axes))


@program(static=("axes",), result=lambda source, **_: source)
def take_rows(source: T, rows: jax.Array, *, axes: tuple[int, ...]) -> T:
    """Return copies of the rows of a pytree at the indices `rows`.

    A leaf without a batch axis is returned unchanged.

    Args:
      source: the pytree.
      rows: [n] int32, the indices, which may repeat.
      axes: the result of `axis_of_rows` for each leaf.
    """
    def take(value: jax.Array, axis: int) -> jax.Array:
        return value if axis < 0 else jnp.take(value, rows, axis, mode="clip")

    return jax.tree.map(take, source, jax.tree.unflatten(jax.tree.structure(source), axes))


@program(static=("axes",))
def side_by_side(pieces: tuple[T, ...], *, axes: tuple[int, ...]) -> T:
    """Concatenate the rows of pytrees that have the same structure.

    A leaf without a batch axis is taken from the first pytree.

    Args:
      pieces: the pytrees.
      axes: the result of `axis_of_rows` for each leaf.
    """
    def join(axis: int, *leaves: jax.Array) -> jax.Array:
        return leaves[0] if axis < 0 else jnp.concatenate(leaves, axis)

    return jax.tree.map(join, jax.tree.unflatten(jax.tree.structure(pieces[0]), axes), *pieces)


@program()
def take_row(values: jax.Array, row: jax.Array) -> jax.Array:
    """Return the values [L, …] of one row from [L, B, …]."""
    return jax.lax.dynamic_index_in_dim(values, row, 1, keepdims=False)
