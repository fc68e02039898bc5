"""Interventions on the rows of a lane: indexed in shared tables, or stored separately per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import shown
from jaxpersona.distributed.sharding import off_mesh
from jaxpersona.engine.rows import axis_of_rows, put_rows, side_by_side
from jaxpersona.engine.tasks import Task
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given, reserve, stack_rows
from jaxpersona.interventions.where import NOWHERE


class SharedEdits:
    """Interventions on all prompts of a call; each row of the lane uses its prompt's entries.

    When a prompt is assigned to a row, only indices into the tables change. No entry is copied.
    """

    def __init__(self, edits: Interventions) -> None:
        self.edits = edits
        self.indexed = jax.device_get(edits)  # host copy for `key`

    def structure(self, rows: int) -> Interventions:
        """Return the call's interventions; their structure is the same for any number of rows."""
        return self.edits

    def of(self, tasks: Sequence[Task | None], rows: int) -> Interventions:
        """Return the interventions of `tasks`, padded to `rows` rows.

        In tables with an `index`, a row without a task has index −1, which means no intervention.
        """
        numbers = [-1 if task is None else task.number for task in tasks]
        return self.edits.take(np.array(numbers + [-1] * (rows - len(numbers)), np.int32))

    def assign(self, edits: Interventions, rows: np.ndarray) -> None:
        """Do nothing: `of_rows` looks up the entries of the current tasks in every call."""

    def of_rows(self, tasks: Sequence[Task | None]) -> Interventions:
        """Return the interventions on all rows of the lane."""
        return self.of(tasks, len(tasks))

    def key(self, task: Task) -> tuple:
        """Return the indices of a prompt's entries, one for each table that has an `index`.

        Prompts with equal keys have the same interventions.
        """
        return tuple(int(edit.index[task.number]) for edit in self.indexed.edits
                     if edit.index is not None)


class RowEdits:
    """Interventions stored per row on the device and updated in place."""

    def __init__(self, neutral: Interventions, rows: int) -> None:
        """Initialize every row with neutral interventions.

        Args:
          neutral: interventions on one row that change nothing, with the lane's structure
            (`neutral_row`).
          rows: the number of rows B.
        """
        self.neutral = neutral
        self.axes = tuple(jax.tree.leaves(jax.tree.map(axis_of_rows, *(
            jax.eval_shape(lambda n=n: _repeated(neutral, n)) for n in (1, 2)))))
        self.table = jax.tree.map(jnp.copy, _repeated(neutral, rows))

    def structure(self, rows: int) -> Interventions:
        """Return neutral interventions on `rows` rows."""
        return _repeated(self.neutral, rows)

    def of(self, tasks: Sequence[Task | None], rows: int) -> Interventions:
        """Return the interventions of `tasks`, padded to `rows` rows with neutral interventions."""
        single = [self.neutral if task is None else task.edits for task in tasks]
        single += [self.neutral] * (rows - len(tasks))
        return side_by_side(tuple(single), axes=self.axes) if self.axes else self.neutral

    def assign(self, edits: Interventions, rows: np.ndarray) -> None:
        """Write interventions on n rows to the lane.

        Args:
          edits: the interventions on n rows. If n = B, they replace the interventions of all rows.
          rows: [n] int32, the lane row to write for each row of `edits`; rows with index B are
            skipped. Not used if n = B.
        """
        if not self.axes:
            return
        if row_count(edits, self.axes) == row_count(self.table, self.axes):
            self.table = edits
        else:
            self.table = put_rows(self.table, edits, rows, axes=self.axes)

    def of_rows(self, tasks: Sequence[Task | None]) -> Interventions:
        """Return the interventions on all rows of the lane."""
        return self.table

    def key(self, task: Task) -> tuple:
        """Return the bytes of the task's interventions as a hashable key."""
        return tuple(np.asarray(x).tobytes() for x in jax.tree.leaves(task.edits))


def checked_capacity(capacity: Interventions | None, layers: int,
                     width: int) -> Interventions | None:
    """Check the `capacity` of an engine; return it with arrays on a mesh copied to the host.

    Args:
      capacity: the result of `reserve`, for any number of rows, or None, which is returned as is.
      layers, width: the model's number of layers and its width D.

    Raises:
      UserError: the capacity is not the result of `reserve`, or does not match the model.
    """
    if capacity is None:
        return None
    tables = given(capacity).edits
    if not tables or not all(table.reserved for table in tables):
        raise UserError(f"capacity is {shown(capacity, 60)}; give the result of jp.reserve, and "
                        "the edits in jp.Request(interventions=…)")
    capacity.take(np.array([-1])).check(layers=layers, width=width, rows=1)
    return off_mesh(capacity)


def for_one_row(edits: Interventions | None, capacity: Interventions | None) -> Interventions:
    """Return interventions on one row, with the structure of `capacity` if it is not None.

    Args:
      edits: interventions created without `rows=`; None: no intervention.
      capacity: the result of `reserve`, with any number of rows, or None.

    Raises:
      UserError: the interventions were created with `rows=`, or exceed the capacity.
    """
    if capacity is None and (edits is None or not edits.edits):
        return Interventions()
    into = None
    if capacity is not None:
        into = Interventions(tuple(
            reserve(1, int(table.width or 0), table.layers, site=table.site).edits[0]
            for table in capacity.edits))
    stacked = jax.device_get(stack_rows([edits], into=into))
    return Interventions(tuple(
        _per_row(table) if table.index[0] >= 0 else _neutral(_per_row(table))
        for table in stacked.edits))


def neutral_row(edits: Interventions) -> Interventions:
    """Return interventions on one row that select no token, with the structure of `edits`."""
    return Interventions(tuple(map(_neutral, edits.edits)))


def _per_row(table: Any) -> Any:
    """Remove the index of a table with one entry; without an index, entry b applies to row b."""
    return table.replace(index=None)


def _neutral(table: Any) -> Any:
    return table.replace(where=np.array([NOWHERE], np.int32))


def row_count(edits: Interventions, axes: tuple[int, ...]) -> int:
    """Return the number of rows B of interventions whose leaves have the batch axes `axes`."""
    return next(x.shape[axis] for x, axis in zip(jax.tree.leaves(edits), axes, strict=True)
                if axis >= 0)


def _repeated(edits: Interventions, rows: int) -> Interventions:
    """Return interventions on `rows` rows, each a copy of the row of `edits`."""
    def repeated(table: Any) -> Any:
        axes = {"where": 0, "origin": 0, "gate": 0, **table.PAYLOAD}
        return table.replace(**{
            name: jax.tree.map(lambda x, axis=axis: jnp.repeat(jnp.asarray(x), rows, axis),
                               getattr(table, name))
            for name, axis in axes.items()})

    return Interventions(tuple(repeated(table) for table in edits.edits))
