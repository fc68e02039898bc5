"""Interventions as one pytree: tables in order, composed along layers and across rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from jaxpersona.interventions.edit import IDENTITY, SITES, Edit, Site, table


@flax.struct.dataclass
class Interventions:
    """What is done to a forward pass: tables of edits, applied in order.

    A layer that no table names carries nothing at all in the compiled program.
    """

    edits: tuple[Edit, ...] = ()

    def at(self, site: Site, layer: int) -> Iterator[tuple[int, Edit]]:
        """Yield the tables that act at one place, with their numbers, in order."""
        for number, edit in enumerate(self.edits):
            if edit.site == site and layer in edit.layers:
                yield number, edit

    def by_row(self, rows: int) -> Interventions:
        """Gather every row's entries once, before a loop."""
        return Interventions(tuple(edit.by_row(rows) for edit in self.edits))

    def take(self, rows: Any) -> Interventions:
        """Choose rows: row i of the result is what row rows[i] was; −1 is a row without edits of
        its own (what is shared by all rows stays).

        Raises:
          ValueError: `rows` asks for a row that the interventions do not have.
        """
        rows = np.asarray(rows, np.int32)

        def pick(edit: Edit) -> Edit:
            if edit.index is None:
                return edit
            index = np.asarray(edit.index)
            if rows.size and rows.max() >= index.size:
                raise ValueError(
                    f"interventions are for {index.size} rows; row {int(rows.max())} was asked for"
                )
            chosen = np.where(rows >= 0, index[np.maximum(rows, 0)], -1)
            return edit.replace(index=jax.numpy.asarray(chosen, np.int32))  # pyright: ignore

        return Interventions(tuple(pick(edit) for edit in self.edits))

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
            if edit.direction.shape[-1] != width:
                raise ValueError(
                    f"a direction has width {edit.direction.shape[-1]}; the model's residual "
                    f"stream has {width}: it was made for another model"
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


def chain(*parts: Interventions | None) -> Interventions:
    """Apply interventions one after another, in the listed order. None is no intervention."""
    return Interventions(tuple(edit for part in parts if part is not None for edit in part.edits))


def stack_rows(parts: Sequence[Interventions | None]) -> Interventions:
    """Give every row its own interventions in one program: part b acts on row b alone.

    Tables of one site are merged slot by slot, so the cost is that of the longest chain, however
    many rows differ. A layer that a row does not name gets an identity there.

    Args:
      parts: for each row interventions that treat all rows alike (no `rows=`), or None.

    Raises:
      ValueError: no rows, or a part that has rows of its own.
    """
    if not parts:
        raise ValueError("stack_rows needs at least one row")
    for row, part in enumerate(parts):
        if part is not None and part.rows is not None:
            raise ValueError(f"row {row} already has rows of its own; stack rows that have none")
    slots: list[tuple[tuple, dict[int, Edit]]] = []  # a common supersequence of all rows' chains
    for row, part in enumerate(parts):
        cursor = 0
        for edit in part.edits if part is not None else ():
            while cursor < len(slots) and slots[cursor][0] != edit.key:
                cursor += 1
            if cursor == len(slots):
                slots.append((edit.key, {}))
            slots[cursor][1][row] = edit
            cursor += 1
    return Interventions(tuple(_merge(members, len(parts)) for _, members in slots))


def _merge(members: dict[int, Edit], rows: int) -> Edit:
    """Put the shared entries of several tables into one, with an index a row."""
    layers = tuple(sorted({layer for edit in members.values() for layer in edit.layers}))
    entries: dict[int, int] = {}
    unique: list[Edit] = []
    index = np.full(rows, -1, np.int32)
    for row, edit in members.items():
        if id(edit) not in entries:
            entries[id(edit)] = len(unique)
            unique.append(edit)
        index[row] = entries[id(edit)]
    width = unique[0].direction.shape[-1]
    if any(edit.direction.shape[-1] != width for edit in unique):
        raise ValueError("the rows' directions have different widths: they are for one model each")
    direction = np.zeros((len(layers), len(unique), width), np.float32)
    direction[..., 0] = 1.0
    coefficients = np.broadcast_to(np.array(IDENTITY), (len(layers), len(unique), 4)).copy()
    for entry, edit in enumerate(unique):
        at = [layers.index(layer) for layer in edit.layers]
        direction[at, entry] = np.asarray(edit.direction)[:, 0]
        coefficients[at, entry] = np.asarray(edit.coefficients)[:, 0]
    push = None if unique[0].push is None else direction.copy()
    if push is not None:
        for entry, edit in enumerate(unique):
            at = [layers.index(layer) for layer in edit.layers]
            push[at, entry] = np.asarray(edit.push)[:, 0]
    where = np.stack([np.asarray(edit.where)[0] for edit in unique])
    origin = np.array([np.asarray(edit.origin)[0] for edit in unique], np.uint32)
    return table(direction, coefficients, where, origin, layers, unique[0].site, index,
                 push)
