"""Interventions as one pytree: tables in order, composed along layers and across rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.interventions.bank import Layers, resolve_layers
from jaxpersona.interventions.edit import IDENTITY, Edit
from jaxpersona.interventions.gates import Gate
from jaxpersona.interventions.table import SITES, Site, Table, next_power, traced
from jaxpersona.interventions.where import NOWHERE
from jaxpersona.runtime import own_rules


@flax.struct.dataclass
class Interventions:
    """What is done to a forward pass: tables of edits, applied in order.

    A layer that no table names carries nothing at all in the compiled program.
    """

    edits: tuple[Table, ...] = ()

    def at(self, site: Site, layer: int) -> Iterator[tuple[int, Table]]:
        """Yield the tables that act at one place, with their numbers, in order."""
        for number, edit in enumerate(self.edits):
            if edit.site == site and layer in edit.layers:
                yield number, edit

    def gates_at(self, site: Site, layer: int) -> Iterator[tuple[int, Gate]]:
        """Yield the gates that are measured at one place, with their tables' numbers."""
        for number, edit in enumerate(self.edits):
            if edit.gate is not None and (edit.gate.site, edit.gate.layer) == (site, layer):
                yield number, edit.gate

    def ready(self, rows: int, like: Any) -> Interventions:
        """Do once, before a loop, what its steps would each do: gather every row's entries, spread
        them over the mesh of an array `like`, if that lies on one, and take the layers apart."""
        return Interventions(tuple(edit if edit.parts is not None else
                                   edit.by_row(rows).spread(like).apart(like)
                                   for edit in self.edits))

    @own_rules()
    def take(self, rows: Any) -> Interventions:
        """Choose rows: row i of the result is what row rows[i] was; −1 is a row without edits of
        its own (what is shared by all rows stays).

        Raises:
          ValueError: `rows` asks for a row that the interventions do not have.
        """
        rows = np.asarray(rows, np.int32)

        return Interventions(tuple(edit.take(rows) for edit in self.edits))

    @property
    def rows(self) -> int | None:
        """The number of rows they are for, or None when every row gets the same."""
        counts = {edit.index.shape[0] for edit in self.edits if edit.index is not None}
        if len(counts) > 1:
            raise ValueError(f"chained interventions are for different numbers of rows: {counts}")
        return counts.pop() if counts else None

    def check(self, *, layers: int, width: int, rows: int) -> None:
        """Refuse what does not fit a model of `layers` layers and `width` D, or `rows` rows.

        Raises:
          ValueError: with the field, its value and the mend.
        """
        for edit in self.edits:
            gate = edit.gate
            for found in (edit.width, None if gate is None else gate.direction.shape[-1]):
                if found not in (None, width):
                    raise ValueError(
                        f"a direction has width {found}; the model's residual stream has {width}: "
                        "it was made for another model"
                    )
            if edit.layers[-1] >= layers or edit.layers[0] < 0:
                raise ValueError(
                    f"layers {list(edit.layers)} reach beyond the model's layers 0…{layers - 1}"
                )
            if edit.site not in SITES:
                raise ValueError(f"site is {edit.site!r}; it must be one of {SITES}")
        if self.rows not in (None, rows):
            raise ValueError(
                f"interventions are for {self.rows} rows, the batch has {rows}: give `rows=` one "
                "entry a row, or none to treat all rows alike"
            )


def given(interventions: Interventions | None) -> Interventions:
    """Return interventions as they were given to a run; None is none.

    Raises:
      ValueError: something else.
    """
    _check_kind([interventions])
    return Interventions() if interventions is None else interventions


def chain(*parts: Interventions | None) -> Interventions:
    """Apply interventions one after another, in the listed order. None is no intervention.

    Raises:
      ValueError: a part is something else.
    """
    _check_kind(parts)
    return Interventions(tuple(edit for part in parts if part is not None for edit in part.edits))


def _check_kind(parts: Sequence[Any]) -> None:
    for part in parts:
        if part is not None and not isinstance(part, Interventions):
            raise ValueError(f"interventions are what steer, cap, … return, or None; a part is a "
                             f"{type(part).__name__}")


@own_rules()
def reserve(rows: int, width: int, layers: Layers, *, slots: int = 1,
            entries: int | None = None, site: Site = "residual") -> Interventions:
    """Make empty tables of fixed capacity, for `stack_rows(…, into=)` to fill again and again.

    Whatever rank-one edits fill them, the program stays the same one.

    Args:
      rows: the batch size B.
      width: the model's D.
      layers: all layers that an edit may name (a slice needs its stop).
      slots: the longest chain of a row.
      entries: the most distinct edits of a slot; B by default.

    Raises:
      ValueError: a size that is not positive, or layers that cannot be read.
    """
    sizes = {"rows": rows, "width": width, "slots": slots,
             "entries": rows if entries is None else entries}
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive whole number")
    if site not in SITES:
        raise ValueError(f"site is {site!r}; it must be one of {SITES}")
    chosen = resolve_layers(layers, None)
    size = next_power(sizes["entries"])
    unit = np.zeros((len(chosen), size, width), np.float32)
    unit[..., 0] = 1.0
    empty = Edit(
        direction=jnp.asarray(unit),
        coefficients=jnp.asarray(np.broadcast_to(np.array(IDENTITY, np.float32),
                                                 (len(chosen), size, 4))),
        where=jnp.asarray(np.broadcast_to(np.array(NOWHERE), (size, 5)), jnp.int32),
        origin=jnp.zeros(size, jnp.uint32), index=jnp.full(rows, -1, jnp.int32),
        layers=chosen, site=site, reserved=True)
    return Interventions((empty,) * slots)


@own_rules()
def stack_rows(parts: Sequence[Interventions | None], *,
               into: Interventions | None = None) -> Interventions:
    """Give every row its own interventions in one program: part b acts on row b alone.

    Tables of one kind and site are merged slot by slot, so the cost is that of the longest chain,
    however many rows differ. Parts of equal content share an entry. A layer that a row does not
    name gets an identity there.

    Args:
      parts: for each row interventions that treat all rows alike (no `rows=`), or None.
      into: what `reserve` made, filled or not: the result has its structure, and so its compiled
        program, and holds nothing but the parts.

    Raises:
      ValueError: no rows, a part that has rows of its own, or one that does not fit `into`.
    """
    if isinstance(parts, Interventions) or not isinstance(parts, Sequence):
        raise ValueError("parts must be a list with one Interventions or None a row")
    _check_kind(parts)
    if not parts:
        raise ValueError("stack_rows needs at least one row")
    for row, part in enumerate(parts):
        if part is not None and part.rows is not None:
            raise ValueError(f"row {row} already has rows of its own; stack rows that have none")
    if into is not None and into.rows != len(parts):
        raise ValueError(f"into is for {into.rows} rows; {len(parts)} parts were given")
    fixed = into.edits if into is not None else ()
    slots: list[tuple[tuple, dict[int, Table]]] = [(edit.key, {}) for edit in fixed]
    for row, part in enumerate(parts):  # a common supersequence of all rows' chains
        cursor = 0
        for edit in part.edits if part is not None else ():
            while cursor < len(slots) and slots[cursor][0] != edit.key:
                cursor += 1
            if cursor == len(slots):
                if into is not None:
                    raise ValueError(f"row {row} does not fit into the reserved tables: their "
                                     "slots hold rank-one edits at one site, without a gate or a "
                                     "push; reserve more slots, or stack without into=")
                slots.append((edit.key, {}))
            slots[cursor][1][row] = edit
            cursor += 1
    return Interventions(tuple(
        _merge(members, len(parts), fixed[i] if fixed else None)
        for i, (_, members) in enumerate(slots)
    ))


def _contents(edits: list[Table]) -> list[Any]:
    """Return for each table what tells it from tables of other content: structure and values.

    Equal tables share an entry, whichever objects they are. Traced values cannot be compared; a
    table of such has an entry of its own.
    """
    known = {i: edit for i, edit in enumerate(edits) if not traced(edit)}
    found: list[Any] = list(range(len(edits)))
    for i, edit in jax.device_get(known).items():
        leaves, structure = jax.tree.flatten(edit)
        values = tuple((x.shape, x.dtype.name, x.tobytes()) for x in map(np.asarray, leaves))
        found[i] = structure, values
    return found


def _merge(members: dict[int, Table], rows: int, into: Table | None) -> Table:
    """Put the shared entries of several tables into one, with an index a row."""
    if not members:
        assert into is not None  # a slot without members was reserved
        nobody = jnp.full(rows, -1, jnp.int32)
        return into.replace(index=nobody, origin=jnp.zeros_like(into.origin), parts=None)  # pyright: ignore
    layers = tuple(sorted({layer for edit in members.values() for layer in edit.layers}))
    entries: dict[Any, int] = {}
    unique: list[Table] = []
    index = np.full(rows, -1, np.int32)
    for (row, edit), content in zip(members.items(), _contents(list(members.values())),
                                    strict=True):
        if content not in entries:
            entries[content] = len(unique)
            unique.append(edit)
        index[row] = entries[content]
    size = next_power(len(unique))
    if into is not None:
        beyond = sorted(set(layers) - set(into.layers))
        if beyond or len(unique) > into.entries or unique[0].width != into.width:
            raise ValueError(
                f"{len(unique)} edits of width {unique[0].width} at layers {list(layers)} do not "
                f"fit the reserved {into.entries} of width {into.width} at {list(into.layers)}"
            )
        layers, size = into.layers, into.entries
    first = unique[0]
    payload = type(first).gather(unique, layers, size)
    spare = size - len(unique)
    gates = [edit.gate for edit in (*unique, *[first] * spare)]
    where = jnp.concatenate([*(edit.where[:1] for edit in unique),
                             jnp.asarray([NOWHERE] * spare, jnp.int32).reshape(-1, len(NOWHERE))])
    origin = jnp.concatenate([*(edit.origin[:1] for edit in unique), jnp.zeros(spare, jnp.uint32)])
    payload = {name: value if name == "params" else jnp.asarray(value, jnp.float32)
               for name, value in payload.items()}
    return first.replace(  # pyright: ignore[reportAttributeAccessIssue]
        **payload, parts=None, where=where, origin=origin, layers=layers, index=jnp.asarray(index),
        gate=None if first.gate is None else Gate.gather(gates), reserved=into is not None)
