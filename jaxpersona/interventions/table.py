"""The base classes of intervention tables: `Table`, and `Prepared`, which `forward` applies.

A `Table` has n entries, which are edits of one kind, for one site (a point in a block) and a set of
layers. The entries and the index of each batch row's entry are data, so rows may use different
entries, and new values do not trigger recompilation. The static structure includes the kind, the
site, the layers, the number of entries and whether there is a gate.

`Table.prepare` gathers the entries by row, shards them, and returns a `Prepared` table, which edits
activations. A decode loop prepares its tables once, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.errors import UserError
from jaxpersona.interventions.describe import call, layer_range, tests
from jaxpersona.interventions.where import NOWHERE, holds
from jaxpersona.models.batch import Batch
from jaxpersona.runtime import is_traced

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, UInt

    from jaxpersona.interventions.gates import Gate

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = ("residual", "attention", "mlp")
# the order of the sites in a block
ORDER: dict[Site, int] = {"attention": 0, "mlp": 1, "residual": 2}


class Prepared(flax.struct.PyTreeNode, kw_only=True):
    """The base class of tables that are ready to edit activations.

    Each array has one entry per row, or a single entry for all rows.

    Attributes:
      where: encoded token tests [B, 5] or [1, 5] int32.
      gate: the gate that must be open for the entries to apply, or None.
      layers, site: the layers and the site at which the table applies (static).
    """

    where: Int[Array, "B 5"]
    gate: Gate | None = None
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
    site: Site = flax.struct.field(pytree_node=False)

    def seen(self, batch: Batch) -> Bool[Array, "B T"]:
        """Return a mask [B, T] of the tokens that the table's `where` selects."""
        return holds(self.where, batch)

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Edit the active tokens of h [B, T, D] at one layer.

        Args:
          layer: the layer's index.
          h: the activations after the edits of the preceding tables.
          active: [B, T] bool, True for tokens to edit.
          before: [B, T, D], the activations at this site before all edits.

        Returns:
          The edited h, bitwise equal to `h` at unchanged tokens, and a mask [B, T] of the changed
          tokens.
        """
        raise NotImplementedError


class Table(flax.struct.PyTreeNode, kw_only=True):
    """The base class of tables of n edits (entries) of one kind, at one site of l layers.

    Without an `index`, a single entry applies to every row; if there are several entries, entry b
    applies to row b. With an `index`, entry index[b] applies to row b.

    Attributes:
      where: encoded token tests [n, 5] int32.
      origin: [n] uint32, for each entry, a hash of the weights of its direction's model
        (`params.origin`), or 0 if unknown.
      index: [B] int32, the index of each row's entry (−1 for no entry), or None.
      gate: the gate that must be open for the entries to apply, or None.
      layers, site: the layers and the site at which the table applies (static).
      reserved: whether the table was allocated by `compose.reserve`, so that its entries may be
        replaced (static).
    """

    # for each field of a subclass: its name → the position of the axis n in its arrays
    PAYLOAD: ClassVar[dict[str, int]] = {}

    where: Int[Array, "n 5"]
    origin: UInt[Array, " n"]
    index: Int[Array, " B"] | None = None
    gate: Gate | None = None
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    reserved: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def entries(self) -> int:
        """The number of entries n, including padding."""
        return self.where.shape[0]

    @property
    def rows(self) -> int | None:
        """The number of batch rows, or None if one entry applies to every row."""
        if self.index is not None:
            return self.index.shape[0]
        return None if self.entries == 1 else self.entries

    @property
    def width(self) -> int | None:
        """The width D that the model must have, or None if any width is valid."""
        return None

    @property
    def key(self) -> tuple:
        """The kind, the site and the gate's structure; tables with equal keys can be merged."""
        return (type(self).__name__, self.site, None if self.gate is None else self.gate.key)

    def prepare(self, rows: int, like: jax.Array) -> Prepared:
        """Gather the entries by row, shard them, and return the prepared table.

        A single entry for all rows is small and stays replicated.

        Args:
          rows: the number of rows B of the batch.
          like: an array on the devices where the table is used.

        Raises:
          UserError: the table is for a number of rows other than B.
        """
        if self.rows not in (None, rows):
            raise UserError(f"interventions are for batch size {self.rows}, but the batch size is "
                            f"{rows}; give `rows=` with one entry per row")
        table = self if self.index is None else self._gathered(self.index)
        return (table if table.entries == 1 else table._sharded(like))._prepared(like)

    def take(self, rows: np.ndarray) -> Self:
        """Select rows: row i of the result has the entry of row rows[i].

        If rows[i] is −1, row i of the result has no entry. A table with one entry for all rows is
        returned unchanged.

        Raises:
          UserError: an index is less than −1 or not less than the number of rows of `self`.
        """
        count = self.rows
        if count is None:
            return self
        bad = rows[(rows < -1) | (rows >= count)]
        if bad.size:
            raise UserError(
                f"row {int(bad[0])} is out of range; interventions are for batch size {count}, so "
                f"give rows in 0…{count - 1}, or −1 for no edit"
            )
        chosen = rows
        if self.index is not None:
            chosen = np.where(rows >= 0, np.asarray(self.index)[np.maximum(rows, 0)], -1)
        return self.replace(index=jnp.asarray(chosen, jnp.int32))

    def _gathered(self, index: jax.Array) -> Self:
        """Gather the entries by row: entry b of the result is entry index[b] of `self`.

        For a row without an entry (index −1), the result has arbitrary values and a token test that
        no token passes.
        """
        here = index >= 0
        chosen = jnp.where(here, index, 0)

        def pick(value: Any, axis: int) -> Any:
            at = (slice(None),) * axis + (chosen,)
            return jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), value)

        return self.replace(
            where=jnp.where(here[:, None], pick(self.where, 0), jnp.asarray([NOWHERE], jnp.int32)),
            origin=pick(self.origin, 0),
            gate=pick(self.gate, 0),
            index=None,
            **{name: pick(getattr(self, name), axis) for name, axis in self.PAYLOAD.items()},
        )

    def _sharded(self, like: jax.Array) -> Self:
        """Shard the entries of a table with one entry per row over the mesh of `like`."""
        axes = {"where": 0, "origin": 0, "gate": 0, **self.PAYLOAD}
        return self.replace(**{
            name: jax.tree.map(lambda x, axis=axis: spread_rows(x, axis, like), getattr(self, name))
            for name, axis in axes.items()
        })

    def _prepared(self, like: jax.Array) -> Prepared:
        """Convert the table, which must have no index, to a `Prepared` table."""
        raise NotImplementedError

    def gather(self, members: Sequence[Self], layers: tuple[int, ...],
               size: int) -> dict[str, Any]:
        """Merge single-entry tables with equal keys, and pad the result to `size` entries.

        Args:
          members: tables with one entry for all rows, including `self`.
          layers: the layers of the result, a superset of each member's layers. An entry leaves h
            unchanged at layers that its member does not edit.
          size: the number of entries of the result.

        Returns:
          The merged fields of `PAYLOAD`, by name.

        Raises:
          UserError: the members' directions have different widths.
        """
        if any(member.width != self.width for member in members):
            raise UserError("the rows' directions have different widths; use directions of the "
                            "same model")
        merged: dict[str, Any] = self.identities(len(layers), size)
        for name, axis in self.PAYLOAD.items():
            fields = [getattr(member, name) for member in members]
            if axis == 0:  # the field has no layer axis
                padded = fields + fields[:1] * (size - len(fields))
                merged[name] = jax.tree.map(lambda *x: jnp.concatenate([y[:1] for y in x]), *padded)
            elif name in merged:
                values = [field[:, 0] for field in fields]
                xp: Any = jnp if is_traced(values) else np
                table = xp.asarray(merged[name])
                for entry, (member, value) in enumerate(zip(members, values, strict=True)):
                    at = np.array([layers.index(layer) for layer in member.layers])
                    if xp is np:
                        table[at, entry] = np.asarray(value)
                    else:
                        table = table.at[at, entry].set(value)
                merged[name] = jnp.asarray(table, jnp.float32)
        return merged

    def identities(self, layers: int, size: int) -> dict[str, np.ndarray]:
        """Return entries [l, n, …] that leave h unchanged, for the fields with a layer axis.

        Args:
          layers, size: the number of layers l and the number of entries n.
        """
        raise NotImplementedError

    def operator(self) -> str:
        """Return the name of the operator that the table applies."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return a summary in the form of a call, such as `cap(response, layers 4–7, residual)`.

        The summary omits the vector and the coefficients.
        """
        rows = "" if self.rows is None else f"{self.rows} rows"
        edit = call(self.operator(), tests(self.where), layer_range(self.layers), self.site, rows)
        return edit if self.gate is None else call("gate", edit, self.gate.condition())


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def checked_index(index: Any, entries: int) -> np.ndarray | None:
    """Check a `rows=` argument and convert it to an array [B]; None stays None.

    Args:
      index: the index of each row's entry, or −1 for no entry.
      entries: the number of entries.

    Raises:
      UserError: `index` is not a list of integers, or an index is outside −1…entries−1.
    """
    if index is None:
        return None
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise UserError("rows must be a list of integers, one per batch row (−1 for no edit)")
    bad = sorted({int(i) for i in index if i >= entries or i < -1})
    if bad:
        raise UserError(f"rows contains {bad}, but the bank has entries 0…{entries - 1}; "
                        "use these indices, or −1 for no edit")
    return index


def one_origin(*origins: Any) -> np.ndarray:
    """Combine the origins (`Table.origin`) of directions that must belong to the same model.

    Args:
      *origins: arrays [n] or [1] uint32; 0 if unknown.

    Returns:
      [n] uint32, the origin that the directions have in common, or 0 if none is known.

    Raises:
      UserError: the directions belong to different models.
    """
    common_origin = np.zeros(max(len(origin) for origin in origins), np.uint32)
    for origin in origins:
        known = np.broadcast_to(np.asarray(origin, np.uint32), common_origin.shape)
        if ((common_origin != 0) & (known != 0) & (common_origin != known)).any():
            raise UserError("the directions were made for different models; use directions of the "
                            "same model")
        common_origin = np.where(common_origin == 0, known, common_origin)
    return common_origin


def common(where: Any, origin: Any, index: np.ndarray | None, size: int) -> dict[str, Any]:
    """Return a dict of the fields `where`, `origin` and `index` of a table with `size` entries.

    The arrays are strongly typed. Entries n…`size`−1 are padding and apply to no token.

    Args:
      where, origin, index: as in `Table`, with n ≤ `size` entries.
      size: the number of entries of the table.
    """
    extra = size - len(where)
    where = np.concatenate([where, np.broadcast_to(np.array([NOWHERE]), (extra, len(NOWHERE)))])
    origin = np.concatenate([origin, np.zeros(extra, np.uint32)])
    return {"where": jnp.asarray(where, jnp.int32), "origin": jnp.asarray(origin, jnp.uint32),
            "index": None if index is None else jnp.asarray(index, jnp.int32)}
