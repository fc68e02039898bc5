"""The `Interventions` pytree, and functions that reserve, combine and prepare its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import cut, shown
from jaxpersona.calls import checked_call, is_integer
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Layers, resolve_layers
from jaxpersona.interventions.describe import call
from jaxpersona.interventions.edit import IDENTITY, Edit
from jaxpersona.interventions.gates import Gate
from jaxpersona.interventions.table import SITES, Prepared, Site, Table, next_power
from jaxpersona.interventions.where import NOWHERE
from jaxpersona.runtime import is_traced, own_rules


class Interventions(flax.struct.PyTreeNode):
    """The edits of a forward pass, stored as tables (`table.Table`) that are applied in order.

    A table contains edits of one kind, for one site and a set of layers. The compiled program
    contains no additional operations at layers without an edit or a gate.

    Attributes:
      edits: the tables.

    Examples:
      >>> import jaxpersona as jp
      >>> axis = jp.load_axis("mini")
      >>> jp.chain(jp.steer(axis, layers=4, scale=0.5), jp.cap(axis, layers=5, floor="p25"))
      chain(steer(everywhere, layer 4, residual), cap(everywhere, layer 5, residual))
    """

    edits: tuple[Table, ...] = ()

    def prepare(self, rows: int, like: Any) -> PreparedInterventions:
        """Prepare the tables for a batch (`Table.prepare`).

        The entries of each table are gathered by row, and sharded if `like` is on a mesh. Tables of
        rank-one edits are also split by layer. A decode loop prepares the tables once, before the
        first step.

        Args:
          rows: the number of rows B of the batch.
          like: an array on the devices where the tables are used.

        Raises:
          UserError: the interventions are for a number of rows other than B.
        """
        return PreparedInterventions(tuple(edit.prepare(rows, like) for edit in self.edits))

    @own_rules()
    def take(self, rows: Any) -> Interventions:
        """Select rows: row i of the result is row rows[i] of `self`, for a list `rows` of integers.

        If rows[i] is −1, no table with entries per row edits row i of the result. A table with one
        entry for all rows is returned unchanged, so it still edits row i.

        Raises:
          UserError: an index is not an integer or, with entries per row, is less than −1 or not
            less than the number of rows of `self`.
        """
        chosen = np.asarray(rows)
        if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
            raise UserError(f"rows is {shown(rows, 60)}; it must be a list of integers")
        chosen = chosen.astype(np.int32)
        return Interventions(tuple(edit.take(chosen) for edit in self.edits))

    @property
    def rows(self) -> int | None:
        """The number of batch rows, or None if all rows share the same edits.

        Raises:
          UserError: the tables have different numbers of rows.
        """
        counts = {edit.rows for edit in self.edits} - {None}
        if len(counts) > 1:
            raise UserError(f"chained interventions have different numbers of rows: {counts}; "
                            "create all of them for the same number of rows")
        return counts.pop() if counts else None

    def check(self, *, layers: int, width: int, rows: int) -> None:
        """Check that the interventions fit a model and a batch.

        Args:
          layers: the number of layers of the model.
          width: the width D of the model's residual stream.
          rows: the number of rows B of the batch.

        Raises:
          UserError: the interventions do not fit; the message gives the field, its value and the
            fix.
        """
        for edit in self.edits:
            gate = edit.gate
            for given_width in (edit.width, None if gate is None else gate.direction.shape[-1]):
                if given_width not in (None, width):
                    raise UserError(
                        f"a direction has width {given_width}, but the model's residual stream has "
                        f"width {width}, so the direction was made for another model; use a "
                        "direction of this model"
                    )
            if edit.layers[-1] >= layers or edit.layers[0] < 0:
                raise UserError(
                    f"layers is {list(edit.layers)}; the model has layers 0…{layers - 1}"
                )
            if edit.site not in SITES:
                raise UserError(f"site is {edit.site!r}; it must be one of {SITES}")
        if self.rows not in (None, rows):
            raise UserError(
                f"interventions are for batch size {self.rows}, but the batch size is {rows}; give "
                f"{self.rows} conversations, one per row (repeat one for a sweep: [prompt] * "
                f"{self.rows}), or interventions for {rows}"
            )

    def __repr__(self) -> str:
        """Return a summary in the form of calls, such as `cap(response, layer 4, residual)`."""
        calls = [repr(edit) for edit in self.edits] or ["Interventions()"]
        return cut(calls[0] if len(calls) == 1 else call("chain", *calls))


class PreparedInterventions(flax.struct.PyTreeNode):
    """Interventions for the rows of one batch, ready to edit activations.

    `Interventions.prepare` creates them, and `forward` applies them without further preparation.
    """

    edits: tuple[Prepared, ...] = ()

    def at(self, site: Site, layer: int) -> Iterator[tuple[int, Prepared]]:
        """Yield (index, table) for each table at one site of one layer, in order."""
        for number, edit in enumerate(self.edits):
            if edit.site == site and layer in edit.layers:
                yield number, edit

    def gates_at(self, site: Site, layer: int) -> Iterator[tuple[int, Gate]]:
        """Yield (index of the table, gate) for each gate evaluated at one site of one layer."""
        for number, edit in enumerate(self.edits):
            if edit.gate is not None and (edit.gate.site, edit.gate.layer) == (site, layer):
                yield number, edit.gate


def prepared(interventions: Interventions | PreparedInterventions | None, *, layers: int,
             width: int, rows: int, like: jax.Array) -> PreparedInterventions:
    """Check interventions against a model and a batch, and prepare them.

    Args:
      interventions: the interventions, or None for no edits. If they are already prepared, only
        their rows and layers are checked, and they are returned unchanged.
      layers, width, rows: as for `Interventions.check`.
      like: as for `Interventions.prepare`.

    Raises:
      UserError: the interventions have the wrong type, or do not fit the model or the batch.
    """
    if isinstance(interventions, PreparedInterventions):
        for edit in interventions.edits:
            if edit.where.shape[0] not in (1, rows):
                raise UserError("interventions were prepared for batch size "
                                f"{edit.where.shape[0]}, but the batch size is {rows}; prepare "
                                "them again for this batch")
            if edit.layers[-1] >= layers:
                raise UserError(f"interventions edit layer {edit.layers[-1]}, but the model has "
                                f"layers 0…{layers - 1}; choose layers of this model and prepare "
                                "them again")
        return interventions
    edits = given(interventions)
    edits.check(layers=layers, width=width, rows=rows)
    return edits.prepare(rows, like)


def given(interventions: Interventions | None) -> Interventions:
    """Return `interventions`, or empty interventions for None.

    Raises:
      UserError: the argument has the wrong type.
    """
    _check_type([interventions])
    return Interventions() if interventions is None else interventions


@checked_call
def chain(*interventions: Interventions | None) -> Interventions:
    """Combine interventions so that they apply in the given order; None is skipped.

    Raises:
      UserError: an argument has the wrong type.

    Examples:
      >>> import jaxpersona as jp
      >>> axis = jp.load_axis("mini")
      >>> jp.chain(jp.steer(axis, layers=4, scale=0.5), None, jp.cap(axis, layers=4, floor=1.0))
      chain(steer(everywhere, layer 4, residual), cap(everywhere, layer 4, residual))
    """
    _check_type(interventions)
    return Interventions(tuple(edit for one in interventions if one is not None
                               for edit in one.edits))


def _check_type(interventions: Sequence[Any]) -> None:
    for one in interventions:
        if one is not None and not isinstance(one, Interventions):
            several = isinstance(one, Mapping) and len(one) > 1
            fix = ("call its method .interventions()" if hasattr(one, "interventions") else
                   "give .interventions() of one of its items" +
                   (", or jp.chain(…) of several" if several else "")
                   if isinstance(one, Mapping) else
                   "chain its items with jp.chain(a, b, …), or apply one item per row with "
                   "jp.stack_rows"
                   if isinstance(one, (list, tuple)) else
                   "give the result of jp.steer, jp.cap, …, or None")
            article = "an" if type(one).__name__[0] in "AEIOaeio" else "a"
            raise UserError(f"interventions is {article} {type(one).__name__}; {fix}")


@checked_call
@own_rules()
def reserve(rows: int, width: int, layers: Layers, *, slots: int = 1,
            entries: int | None = None, site: Site = "residual") -> Interventions:
    """Allocate empty tables of fixed capacity, to be filled by `stack_rows(…, into=)`.

    The tables accept rank-one edits without a gate or a push direction. Replacing their edits does
    not trigger recompilation.

    Args:
      rows: the batch size B.
      width: the width D of the model's residual stream.
      layers: all layers at which an edit may apply; a slice must have a stop.
      slots: the maximum number of chained edits per row, which is also the number of tables.
      entries: the maximum number of distinct edits per table, by default B. It is rounded up to a
        power of two.
      site: the site of the edits.

    Raises:
      UserError: a size is not a positive integer, or the layers or the site are invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> free = jp.reserve(8, 128, slice(4, 8))
      >>> free
      reserve(nowhere, layers 4–7, residual, 8 rows)
    """
    sizes = {"rows": rows, "width": width, "slots": slots,
             "entries": rows if entries is None else entries}
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise UserError(f"{name} is {shown(size)}; it must be a positive integer")
    if site not in SITES:
        raise UserError(f"site is {site!r}; it must be one of {SITES}")
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


@checked_call
@own_rules()
def stack_rows(interventions: Sequence[Interventions | None], *,
               into: Interventions | None = None) -> Interventions:
    """Combine a list of interventions so that item b applies only to batch row b.

    Tables of the same kind, site and gate structure are merged, so the number of tables does not
    grow with the number of rows that have different edits. Tables with equal content share an
    entry. At a layer that a row does not edit, the row's entry has no effect.

    Args:
      interventions: one item per row, either interventions created without `rows=` or None for no
        edits.
      into: the tables to fill, from `reserve` or from an earlier call with `into=`. The result has
        the same structure as `into`, so the compiled program is reused. The edits of an earlier
        call are discarded.

    Raises:
      UserError: `interventions` is not a list or is empty, an item has the wrong type or was
        created with `rows=`, `into` has the wrong type or another number of rows, or the items do
        not fit the tables of `into`.

    Examples:
      >>> import jaxpersona as jp
      >>> cap = jp.cap(jp.load_axis("mini"), layers=4, floor="p25")
      >>> jp.stack_rows([cap, None, cap]).rows
      3
    """
    if isinstance(interventions, Interventions) or not isinstance(interventions, Sequence):
        raise UserError("interventions must be a list with an Interventions object or None for "
                        "each row")
    _check_type(interventions)
    if not interventions:
        raise UserError("interventions is an empty list; stack_rows needs at least one row")
    count = len(interventions)
    for row, own in enumerate(interventions):
        if own is not None and own.rows is not None:
            raise UserError(f"the interventions of row {row} were made with rows=; stack "
                            "interventions made without rows=")
    if into is not None and not isinstance(into, Interventions):
        raise UserError(f"into is {shown(into)}; give the result of jp.reserve")
    if into is not None and into.rows != count:
        raise UserError(f"into= is for batch size {into.rows}, but the number of interventions is "
                        f"{count}; give one item per row")
    fixed = into.edits if into is not None else ()
    slots: list[tuple[tuple, dict[int, Table]]] = [(edit.key, {}) for edit in fixed]
    for row, own in enumerate(interventions):  # build a common supersequence of all rows' chains
        cursor = 0
        for edit in own.edits if own is not None else ():
            while cursor < len(slots) and slots[cursor][0] != edit.key:
                cursor += 1
            if cursor == len(slots):
                if into is not None:
                    raise UserError(f"the interventions of row {row} do not fit the reserved "
                                    "tables, which accept rank-one edits at one site, without a "
                                    "gate or a push direction; reserve more tables (slots=), or "
                                    "stack without into=")
                slots.append((edit.key, {}))
            slots[cursor][1][row] = edit
            cursor += 1
    return Interventions(tuple(
        _merge(members, count, fixed[i] if fixed else None)
        for i, (_, members) in enumerate(slots)
    ))


def _contents(edits: list[Table]) -> list[Any]:
    """Return a hashable key for the content (structure and values) of each table.

    Tables with equal keys share an entry. Traced values cannot be compared, so each traced table
    has its own entry.
    """
    known = {i: edit for i, edit in enumerate(edits) if not is_traced(edit)}
    contents: list[Any] = list(range(len(edits)))
    for i, edit in jax.device_get(known).items():
        leaves, structure = jax.tree.flatten(edit)
        values = tuple((x.shape, x.dtype.name, x.tobytes()) for x in map(np.asarray, leaves))
        contents[i] = structure, values
    return contents


def _merge(members: dict[int, Table], rows: int, into: Table | None) -> Table:
    """Merge single-entry tables into one table that is indexed by row.

    Args:
      members: a dict from rows to their tables; all other rows have no entry.
      rows: the number of rows B.
      into: the reserved table to fill, or None to build a new table.

    Raises:
      UserError: the members do not fit the reserved table.
    """
    if not members:
        assert into is not None  # only a reserved table can have no members
        no_entry = jnp.full(rows, -1, jnp.int32)
        return into.replace(index=no_entry, origin=jnp.zeros_like(into.origin))
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
            raise UserError(
                f"the edits (distinct: {len(unique)}, width: {unique[0].width}, layers: "
                f"{list(layers)}) do not fit the reserved table (entries: {into.entries}, width: "
                f"{into.width}, layers: {list(into.layers)}); reserve tables that fit these edits"
            )
        layers, size = into.layers, into.entries
    first = unique[0]
    payload = first.gather(unique, layers, size)
    spare = size - len(unique)
    gates = [edit.gate for edit in (*unique, *[first] * spare) if edit.gate is not None]
    where = jnp.concatenate([*(edit.where[:1] for edit in unique),
                             jnp.asarray([NOWHERE] * spare, jnp.int32).reshape(-1, len(NOWHERE))])
    origin = jnp.concatenate([*(edit.origin[:1] for edit in unique), jnp.zeros(spare, jnp.uint32)])
    return first.replace(
        **payload, where=where, origin=origin, layers=layers, index=jnp.asarray(index),
        gate=Gate.gather(gates) if gates else None, reserved=into is not None)
