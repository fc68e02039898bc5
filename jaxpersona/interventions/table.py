"""The base class of intervention tables: the entry of each row, the token selection and the gate.

A table has n entries of one kind for one site of some layers. The entry of each row is data, so
the rows of a batch may use different entries and change them without recompiling. The static
structure is the kind, the site, the layers, the number of entries and whether there is a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.errors import UserError
from jaxpersona.interventions.where import NOWHERE, holds
from jaxpersona.models.batch import Batch

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = ("residual", "attention", "mlp")
ORDER = {"attention": 0, "mlp": 1, "residual": 2}  # the order of the sites in a block


class Table(flax.struct.PyTreeNode, kw_only=True):
    """The base class of tables: n entries of one kind at one site of l layers.

    Attributes:
      where: encoded tests [n, 5] int32.
      origin: [n] uint32, half of the model's fingerprint; 0 if unknown.
      index: [B] int32, the entry of each row, −1 for none; None: entry 0 for every row.
      gate: the condition for the entries to apply, or None.
      parts: the per-layer data of a table split by `apart`, else None.
      layers, site: where the table applies (static).
      each: whether entry b belongs to row b (after `by_row`).
      reserved: whether the entries may be replaced (`compose.reserve`).
    """

    PAYLOAD: ClassVar[dict[str, int]] = {}  # the kind's own fields -> the axis of their entries

    where: Any
    origin: Any
    index: Any = None
    gate: Any = None
    parts: Any = None
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    each: bool = flax.struct.field(pytree_node=False, default=False)
    reserved: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def entries(self) -> int:
        """The number of entries n, including padding."""
        return self.where.shape[0]

    @property
    def width(self) -> int | None:
        """The required width D of the model, or None for any."""
        return None

    @property
    def key(self) -> tuple:
        """The table's structure; tables with equal keys can be merged."""
        return (type(self).__name__, self.site, None if self.gate is None else self.gate.key)

    def by_row(self, rows: int) -> Self:
        """Gather the entries by row once, so that a decode loop need not: entry b is row b's.

        A table shared by all rows is returned unchanged. A row without an entry gets arbitrary
        numbers and a test that no token passes.
        """
        return self if self.index is None or self.each else self._gathered(self.index)

    def take(self, rows: np.ndarray) -> Self:
        """Select rows, −1 for a row without an entry; a table shared by all rows is unchanged.

        Raises:
          UserError: an index beyond the table's rows.
        """
        if self.index is None:
            return self
        count = self.index.shape[0]
        if rows.size and rows.max() >= count:
            raise UserError(
                f"interventions are for {count} rows; row {int(rows.max())} is out of range"
            )
        if self.each:
            return self._gathered(jnp.asarray(rows, jnp.int32)).replace(
                index=jnp.asarray(rows, jnp.int32))
        chosen = np.where(rows >= 0, np.asarray(self.index)[np.maximum(rows, 0)], -1)
        return self.replace(index=jnp.asarray(chosen, jnp.int32))

    def _gathered(self, index: jax.Array) -> Self:
        here = index >= 0
        chosen = jnp.where(here, index, 0)

        def pick(value: Any, axis: int) -> Any:
            at = (slice(None),) * axis + (chosen,)
            return jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), value)

        return self.replace(
            where=jnp.where(here[:, None], pick(self.where, 0), jnp.asarray([NOWHERE], jnp.int32)),
            origin=pick(self.origin, 0),
            gate=pick(self.gate, 0),
            parts=None,
            each=True,
            **{name: pick(getattr(self, name), axis) for name, axis in self.PAYLOAD.items()},
        )

    def spread(self, like: jax.Array) -> Self:
        """Shard the entries of a table gathered by row (`by_row`) over the mesh of `like`.

        A shared table is small and stays replicated.
        """
        if not self.each:
            return self
        axes = {"where": 0, "origin": 0, "gate": 0, **self.PAYLOAD}
        return self.replace(**{
            name: jax.tree.map(lambda x, axis=axis: spread_rows(x, axis, like), getattr(self, name))
            for name, axis in axes.items()
        })

    def apart(self, like: jax.Array) -> Self:
        """Split the table by layer (see `parts`), so that a decode loop need not at every step.

        Args:
          like: an array on the devices that will use the table.
        """
        return self

    def seen(self, batch: Batch) -> jax.Array:
        """Return [B, T] bool: the tokens that the table's tests select."""
        return holds(self.where, batch)

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Edit h [B, T, D] at `layer` where `active` [B, T].

        Args:
          layer: the layer's index.
          h: the activation after the preceding tables.
          active: [B, T] bool, the tokens to edit.
          before: the activation at this site before any table.

        Returns:
          The edited h, bit for bit equal to `h` where unchanged, and [B, T] bool: where it changed.
        """
        raise NotImplementedError

    @classmethod
    def gather(cls, members: Sequence[Self], layers: tuple[int, ...], size: int) -> dict[str, Any]:
        """Merge one entry of each of several tables with equal keys, padded with identities.

        Args:
          members: tables with one entry for all rows.
          layers: the layers of the result, including all of the members'; an entry is an identity
            at the layers that its table does not have.
          size: the number of entries of the result.
        """
        out: dict[str, Any] = cls.identities(len(layers), size, members[0])
        if any(member.width != members[0].width for member in members):
            raise UserError("the rows' directions have different widths; use directions of one "
                             "model")
        for name in out:
            values = [getattr(member, name)[:, 0] for member in members]
            xp: Any = jnp if traced(values) else np
            table = xp.asarray(out[name])
            for entry, (member, value) in enumerate(zip(members, values, strict=True)):
                at = np.array([layers.index(layer) for layer in member.layers])
                if xp is np:
                    table[at, entry] = np.asarray(value)
                else:
                    table = table.at[at, entry].set(value)
            out[name] = table
        return out

    @classmethod
    def identities(cls, layers: int, size: int, like: Self) -> dict[str, np.ndarray]:
        """Return identity entries [l, n, …] for a table with the structure of `like`."""
        raise NotImplementedError


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def checked_index(index: Any, entries: int) -> np.ndarray | None:
    """Return the entry of each row as an array.

    Raises:
      UserError: an index outside −1…entries−1.
    """
    if index is None:
        return None
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise UserError("rows must be a list of integers, one per batch row (−1: no edit)")
    bad = sorted({int(i) for i in index if i >= entries or i < -1})
    if bad:
        raise UserError(f"rows has {bad}; the bank has entries 0…{entries - 1} (−1: no edit)")
    return index


def traced(*values: Any) -> bool:
    """Return whether a value is traced (by jit, grad or vmap), so that NumPy cannot read it."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def one_origin(*origins: Any) -> np.ndarray:
    """Return the common origin of directions that are used together, [n] uint32 (0: unknown).

    Raises:
      UserError: the directions are of different models.
    """
    common_origin = np.zeros(max(len(origin) for origin in origins), np.uint32)
    for origin in origins:
        known = np.broadcast_to(np.asarray(origin, np.uint32), common_origin.shape)
        if ((common_origin != 0) & (known != 0) & (common_origin != known)).any():
            raise UserError("the directions were made for different models; use directions of one")
        common_origin = np.where(common_origin == 0, known, common_origin)
    return common_origin


def common(where: Any, origin: Any, index: np.ndarray | None, size: int) -> dict[str, Any]:
    """Return the fields shared by all kinds, strongly typed and padded to `size` entries."""
    extra = size - len(where)
    where = np.concatenate([where, np.broadcast_to(np.array([NOWHERE]), (extra, len(NOWHERE)))])
    origin = np.concatenate([origin, np.zeros(extra, np.uint32)])
    return {"where": jnp.asarray(where, jnp.int32), "origin": jnp.asarray(origin, jnp.uint32),
            "index": None if index is None else jnp.asarray(index, jnp.int32)}
