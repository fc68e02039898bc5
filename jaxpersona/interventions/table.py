"""What every kind of intervention shares: which entry each row uses, on which tokens, behind which
gate.

A table holds n entries of one kind for one site of some layers. Which entry a row uses is data, so
a batch may mix entries freely and change them without another program. Structure, which compiles,
is the kind, the site, the layers, the number of entries and whether there is a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.interventions.where import NOWHERE, holds
from jaxpersona.models.batch import Batch

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = ("residual", "attention", "mlp")
ORDER = {"attention": 0, "mlp": 1, "residual": 2}  # in which a block comes to its sites


@flax.struct.dataclass(kw_only=True)
class Table:
    """n entries of one kind at one site of l layers; a base for the kinds.

    Attributes:
      where: encoded tests [n, 5] int32.
      origin: [n] uint32, half a model's fingerprint; 0 where a direction does not say.
      index: [B] int32, the entry of each row, −1 for none; None: entry 0 for every row.
      gate: what must hold for a row or a token before the entry acts, or None.
      parts: what each layer needs, once a table has been taken `apart`; None before.
      layers, site: the structure.
      each: True once entry b belongs to row b (`by_row`).
      reserved: whether entries may come and go (`compose.reserve`).
    """

    PAYLOAD: ClassVar[dict[str, int]] = {}  # the kind's own fields, and their axis of entries

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
        """The number of entries n, padding included."""
        return self.where.shape[0]

    @property
    def width(self) -> int | None:
        """The width D that a model must have, or None where any will do."""
        return None

    @property
    def key(self) -> tuple:
        """What two tables must share for their entries to become one table's."""
        return (type(self).__name__, self.site, None if self.gate is None else self.gate.key)

    def by_row(self, rows: int) -> Self:
        """Give row b its own entry b, so that a loop need not gather again.

        A shared table stays shared: it has nothing to gather. A row without an entry keeps some
        entry's numbers, with a test that no token passes.
        """
        return self if self.index is None or self.each else self._gathered(self.index)

    def take(self, rows: np.ndarray) -> Self:
        """Choose rows, −1 for one without an entry; what all rows share stays.

        Raises:
          ValueError: `rows` asks for a row that the table does not have.
        """
        if self.index is None:
            return self
        count = self.index.shape[0]
        if rows.size and rows.max() >= count:
            raise ValueError(
                f"interventions are for {count} rows; row {int(rows.max())} was asked for"
            )
        if self.each:
            return self._gathered(jnp.asarray(rows, jnp.int32)).replace(  # pyright: ignore
                index=jnp.asarray(rows, jnp.int32))
        chosen = np.where(rows >= 0, np.asarray(self.index)[np.maximum(rows, 0)], -1)
        return self.replace(index=jnp.asarray(chosen, jnp.int32))  # pyright: ignore

    def _gathered(self, index: jax.Array) -> Self:
        here = index >= 0
        chosen = jnp.where(here, index, 0)

        def pick(value: Any, axis: int) -> Any:
            at = (slice(None),) * axis + (chosen,)
            return jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), value)

        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            where=jnp.where(here[:, None], pick(self.where, 0), jnp.asarray([NOWHERE], jnp.int32)),
            origin=pick(self.origin, 0),
            gate=pick(self.gate, 0),
            parts=None,
            each=True,
            **{name: pick(getattr(self, name), axis) for name, axis in self.PAYLOAD.items()},
        )

    def spread(self, like: jax.Array) -> Self:
        """Spread the entries over the mesh of an array as its rows are, once each row has its own.

        A shared table is small and stays whole on every device.
        """
        if not self.each:
            return self
        axes = {"where": 0, "origin": 0, "gate": 0, **self.PAYLOAD}
        return self.replace(**{  # pyright: ignore[reportAttributeAccessIssue]
            name: jax.tree.map(lambda x, axis=axis: spread_rows(x, axis, like), getattr(self, name))
            for name, axis in axes.items()
        })

    def apart(self, like: jax.Array) -> Self:
        """Make ready what each layer needs, so that a loop need not cut it from the table at every
        step.

        Args:
          like: an array that lies where the table is to be used.
        """
        return self

    def seen(self, batch: Batch) -> jax.Array:
        """[B, T] bool: the tokens on which the table may act."""
        return holds(self.where, batch)

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Change h [B, T, D] at `layer` where `active` [B, T].

        Args:
          before: what h was when it came to this site, before any table.

        Returns:
          The new h, bit for bit the old one where nothing changed, and [B, T] bool: where it did.
        """
        raise NotImplementedError

    @classmethod
    def gather(cls, members: Sequence[Self], layers: tuple[int, ...], size: int) -> dict[str, Any]:
        """Collect one entry of each of several tables of one key, with identities to fill up.

        Args:
          members: tables that have one entry for all rows.
          layers: at least those of the members; an entry does nothing at the others.
          size: the number of entries wanted.
        """
        out: dict[str, Any] = cls.identities(len(layers), size, members[0])
        if any(member.width != members[0].width for member in members):
            raise ValueError("the rows' directions have different widths: they are for one model "
                             "each")
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
        """Make entries [l, n, …] that do nothing, for a table like another."""
        raise NotImplementedError


def next_power(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def checked_index(index: Any, entries: int) -> np.ndarray | None:
    """Return the entry of each row as an array.

    Raises:
      ValueError: an index that is not one of the entries (or −1 for none).
    """
    if index is None:
        return None
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError("rows must be a list of integers, one a row (−1: no edit)")
    bad = sorted({int(i) for i in index if i >= entries or i < -1})
    if bad:
        raise ValueError(f"rows has {bad}; the bank has entries 0…{entries - 1} (−1: no edit)")
    return index


def traced(*values: Any) -> bool:
    """Whether a value is being traced (by jit, grad or vmap), so that NumPy cannot look at it."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def one_origin(*origins: Any) -> np.ndarray:
    """Return the model that directions used together come from, [n] uint32 (0: not known).

    Raises:
      ValueError: they come from different models.
    """
    found = np.zeros(max(len(origin) for origin in origins), np.uint32)
    for origin in origins:
        known = np.broadcast_to(np.asarray(origin, np.uint32), found.shape)
        if ((found != 0) & (known != 0) & (found != known)).any():
            raise ValueError("the directions were made for different models; use those of one")
        found = np.where(found == 0, known, found)
    return found


def common(where: Any, origin: Any, index: np.ndarray | None, size: int) -> dict[str, Any]:
    """Make the fields that all kinds share, of strong types, padded to `size` entries."""
    extra = size - len(where)
    where = np.concatenate([where, np.broadcast_to(np.array([NOWHERE]), (extra, len(NOWHERE)))])
    origin = np.concatenate([origin, np.zeros(extra, np.uint32)])
    return {"where": jnp.asarray(where, jnp.int32), "origin": jnp.asarray(origin, jnp.uint32),
            "index": None if index is None else jnp.asarray(index, jnp.int32)}
