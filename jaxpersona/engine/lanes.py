"""Lanes for continuous batching: B rows of one cache size that are decoded by one program.

A lane prefills up to R prompts in one batch of R rows, writes the results to free rows and copies
finished rows out. Row indices are array arguments of the programs, so a lane needs few programs.
Each row of the cache has its own next slot, so rows with different numbers of tokens decode
together. The shapes for a prompt depend only on that prompt, its reply's length limit and B. The
results are therefore bit-identical in any row, at any time and with any other prompts.

If prompts are prefilled in pieces (chunks of consecutive tokens, see `tasks.piece_of`), a lane has
R staging rows in addition to its B rows. One call prefills the next piece of up to R prompts, which
may have different lengths. A fully prefilled prompt stays in its staging row until one of the B
rows is free.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed import processes
from jaxpersona.engine.compiled import program
from jaxpersona.engine.pieces import light, may_hide_nonfinite, zero_keys
from jaxpersona.engine.programs import (
    State,
    decode,
    free_rows,
    prefill,
    prefill_piece,
    prefill_prefix,
    without_keys,
)
from jaxpersona.engine.rows import axis_of_rows, put_rows, side_by_side, take_rows
from jaxpersona.engine.sampling import Sampling
from jaxpersona.engine.stats import Stats
from jaxpersona.engine.tasks import Edits, Setting, Shape, Task, cut, prefix_key, prefix_length
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Params

CHUNK = 64  # the maximum number of decode steps between two transfers to the host


class Lane:
    """B rows of one cache size that share compiled programs.

    A row is either free or active. An active row is assigned to a task.

    Attributes:
      rows: the number of rows B.
      together: R, the number of rows that one call prefills or copies out.
      piece: the number of tokens in a piece; None if a prompt runs in one call.
      tasks: the task of each row; None if the row is free.
      filling: whether rows have been assigned since the last call of `decode`.
      state: the state of the B rows; None before the first prefill if R = B.
      axes: a `State` with the index of each leaf's batch axis, −1 for a leaf without one.
      prefixes: the carries, of one row each, after the R most recently prefilled shared prefixes,
        by a key of the prefix and its interventions.
      staged: the task of each staging row; None if the row is free. Empty without pieces.
      ran: the number of prompt tokens prefilled so far in each staging row.
      staging: the state of the R staging rows; None without pieces.
    """

    def __init__(self, config: ModelConfig, params: Params, setting: Setting, edits: Edits,
                 rows: int, together: int, piece: int | None = None,
                 stats: Stats | None = None) -> None:
        """Allocate the lane with all rows free.

        Args:
          config: the model's configuration.
          params: the model's parameters in the layout of `prepared.fast_params`.
          setting: the settings that all rows share.
          edits: the interventions on the rows.
          rows, together, piece: see the attributes; with pieces, `together` must be less than
            `rows`.
          stats: the counters to update; None: new counters.
        """
        self.config, self.params, self.setting, self.edits = config, params, setting, edits
        self.rows, self.together = rows, together
        self.piece = None if piece is None else min(piece, setting.slots)
        self.stats = Stats() if stats is None else stats
        self.tasks: list[Task | None] = [None] * rows
        self.staged: list[Task | None] = [None] * (0 if piece is None else together)
        self.ran = [0] * len(self.staged)
        self.filling = False
        self.prefixes: OrderedDict[tuple, Carry] = OrderedDict()
        one, two = (jax.eval_shape(functools.partial(self._blank, n)) for n in (1, 2))
        self.axes: State = jax.tree.map(axis_of_rows, one, two)
        self.state: Any = self._blank(rows) if together < rows else None
        self.staging: Any = None if piece is None else self._blank(together)

    @property
    def free(self) -> int:
        """The number of free rows."""
        return self.tasks.count(None)

    @property
    def active(self) -> list[Task]:
        """The tasks of all rows, including staging rows."""
        return [task for task in (*self.tasks, *self.staged) if task is not None]

    def compile(self, shape: Shape) -> None:
        """Compile the lane's programs for a shape by running them without an active row."""
        if self.piece is None:
            self.admit([], shape)
        else:
            self._run_piece()
            nothing = np.zeros(self.together, bool)
            self.staging = self.staging.replace(carry=zero_keys(self.staging.carry, nothing))
            self._place([])
        self.decode(self.rows, 0)
        self.take_out(np.zeros(0, np.int32))

    def admit(self, chosen: list[Task], shape: Shape) -> None:
        """Prefill at most `together` prompts of one shape and assign each to a free row.

        If `chosen` is empty, the programs run on empty rows and are thereby compiled.
        """
        edits = self.edits.of(chosen, self.together)
        fresh = self._prefill(chosen, shape, edits)
        self._assign(chosen, range(len(chosen)), fresh, edits)

    def stage(self, task: Task) -> None:
        """Assign a task to a free staging row, in which its prompt is prefilled in pieces.

        If the task's shape has a shared prefix, the carry after the prefix is written to the row.
        """
        row = self.staged.index(None)
        self.staged[row], self.ran[row] = task, 0
        if task.shape.prefix:
            self._put_prefix(task, row)

    def advance(self) -> list[Task]:
        """Move fully prefilled prompts to free rows, or run the next piece of all staged prompts.

        A piece runs only if no prompt is fully prefilled.

        Returns:
          The tasks of the moved prompts; [] if a piece was prefilled or no row is free.
        """
        complete = sorted((task.number, row) for row, task in enumerate(self.staged)
                          if task is not None and 0 < self.ran[row] == task.row.tokens.size)
        if complete:
            return self._place([row for _, row in complete[: self.free]])
        self._run_piece()
        return []

    def unstage(self) -> None:
        """Free the staging rows of cancelled requests."""
        for row, task in enumerate(self.staged):
            if task is not None and task.cancelled:
                self.staged[row], self.ran[row] = None, 0

    def decode(self, most_done: int, steps: int) -> np.ndarray:
        """Decode until `steps` steps have run or `most_done` rows are done.

        Free rows count as done.

        Returns:
          [n] int, the indices of the active rows that are done.
        """
        setting = self.setting
        sampling = _sampling(self.tasks)
        begun, before = processes.fetch((self.state.step, self.state.carry.cache.next))
        self.state = decode(
            self.params, self.config, self.state, self.edits.of_rows(self.tasks), setting.capture,
            sampling, setting.stops, jnp.asarray(int(begun) + steps, jnp.int32),
            jnp.asarray(most_done, jnp.int32), greedy=setting.greedy)
        done, ended, after = processes.fetch(
            (self.state.done, self.state.step, self.state.carry.cache.next))
        # each step appends one token per live row to the cache, so its growth counts the live rows
        self.stats.decoded(int(ended) - int(begun), self.rows,
                           int(after.sum(dtype=np.int64) - before.sum(dtype=np.int64)))
        active = np.array([task is not None for task in self.tasks])
        return np.flatnonzero(done & active)

    def take_out(self, done: np.ndarray) -> list[tuple[list[Task], np.ndarray, State]]:
        """Free finished rows and return their tasks and states.

        Args:
          done: [n] int, the indices of the finished rows.

        Returns:
          Tuples (tasks, rows, state): at most `together` tasks, and the index of each task's row in
          `state`. If `together` < B, each state has `together` rows and omits the cached keys and
          values. Without finished rows, [].
        """
        out = []
        for begin in range(0, max(done.size, 1), self.together):
            rows = places = done[begin : begin + self.together]
            state = self.state
            if self.together < self.rows:
                at, places = np.zeros(self.together, np.int32), np.arange(rows.size)
                at[: rows.size] = rows
                state = take_rows(without_keys(self.state), at,
                                  axes=_static(without_keys(self.axes)))
            tasks = [task for i in rows if (task := self.tasks[i]) is not None]
            out.append((tasks, places, state))
        for i in done:
            self.tasks[i] = None
        return out if done.size else []

    def end(self, rows: Sequence[int]) -> None:
        """Free the rows with the indices `rows`, whose requests were cancelled."""
        removed = np.zeros(self.rows, bool)
        for i in rows:
            removed[i], self.tasks[i] = True, None
        self.state = _mark_done(self.state, removed)

    def _assign(self, chosen: Sequence[Task], source: Sequence[int], state: State,
                edits: Interventions) -> None:
        """Assign tasks to free rows.

        Args:
          chosen: n tasks.
          source: n indices, the row of each task in `state` and `edits`.
          state: the state of R rows after prefill.
          edits: the interventions on the R rows.
        """
        free = [i for i, task in enumerate(self.tasks) if task is None][: len(chosen)]
        at = np.full(self.together, self.rows, np.int32)  # out-of-range row indices are ignored
        at[list(source)] = free
        if self.together == self.rows:
            self.state = state
        else:
            self.state = put_rows(self.state, state, at, axes=_static(self.axes))
        self.edits.assign(edits, at)
        for i, task in zip(free, chosen, strict=True):
            self.tasks[i] = task

    def _prefill(self, chosen: list[Task], shape: Shape, edits: Interventions) -> State:
        """Prefill prompts and return the state of R rows; rows without a prompt are free."""
        setting, count = self.setting, self.together
        shared = [prefix_length(task.row) if shape.prefix else 0 for task in chosen]
        prefix = None
        if shape.prefix:
            carries = [self._prefix(task, shared[i], shape) for i, task in enumerate(chosen)]
            carries += carries[:1] * (count - len(chosen))  # padding
            prefix = side_by_side(tuple(carries), axes=_static(self.axes.carry))
        batch = cut(chosen, shared, [task.row.tokens.size for task in chosen], shape.width, count,
                    shape.prefix > 0)
        every: list[Task | None] = [*chosen, *[None] * (count - len(chosen))]
        limit = np.array([0 if task is None else task.limit for task in every], np.int32)
        self.stats.prefilled(sum(task.row.tokens.size for task in chosen) - sum(shared),
                             count * shape.width)
        return prefill(self.params, self.config, batch, edits, setting.capture, _sampling(every),
                       setting.stops, jnp.asarray(limit), slots=setting.slots,
                       max_new=setting.max_new, greedy=setting.greedy, prefix=prefix)

    def _run_piece(self) -> None:
        """Prefill the next piece of every staged prompt.

        No staged prompt may already be fully prefilled.
        """
        assert self.piece is not None
        setting, tasks = self.setting, self.staged
        size = [0 if task is None else task.row.tokens.size for task in tasks]
        stop = [min(ran + self.piece, n) for ran, n in zip(self.ran, size, strict=True)]
        begins = np.array([task is not None and not ran
                           for task, ran in zip(tasks, self.ran, strict=True)])
        ends = np.array([task is not None and end == n
                         for task, end, n in zip(tasks, stop, size, strict=True)])
        self._clear(begins)
        self.stats.prefilled(sum(stop) - sum(self.ran), self.together * self.piece)
        self.staging = prefill_piece(
            self.params, self.config, self.staging,
            cut(tasks, self.ran, stop, self.piece, self.together, True),
            self.edits.of(tasks, self.together), setting.capture, _sampling(tasks), setting.stops,
            jnp.asarray([0 if task is None else task.limit for task in tasks], jnp.int32),
            jnp.asarray(begins), jnp.asarray(ends),
            axes=_static(light(self.axes.carry)), greedy=setting.greedy)
        self.ran = stop

    def _clear(self, begins: np.ndarray) -> None:
        """Set the keys and values of earlier prompts to zero if they may be non-finite.

        Their slots are masked, but attention multiplies masked values by zero, and 0 · NaN is NaN.

        Args:
          begins: [R] bool, the staging rows in which a prompt begins.
        """
        if not begins.any():
            return
        carry = self.staging.carry
        if (may_hide_nonfinite(self.edits.structure(1))
                or not processes.fetch(carry.finite)[begins].all()):
            self.staging = self.staging.replace(carry=zero_keys(carry, begins))

    def _place(self, complete: list[int]) -> list[Task]:
        """Move the prompts of the staging rows `complete` to free rows; return their tasks."""
        edits = self.edits.of(self.staged, self.together)
        chosen = [task for row in complete if (task := self.staged[row]) is not None]
        self._assign(chosen, complete, self.staging, edits)
        for row in complete:
            self.staged[row], self.ran[row] = None, 0
        return chosen

    def _put_prefix(self, task: Task, row: int) -> None:
        """Write the carry after a task's shared prefix to a staging row and update `ran`."""
        shared = prefix_length(task.row)
        carry = self._prefix(task, shared, task.shape)
        carry = put_rows(self.staging.carry, carry, np.array([row], np.int32),
                         axes=_static(self.axes.carry))
        self.staging, self.ran[row] = self.staging.replace(carry=carry), shared

    def _prefix(self, task: Task, shared: int, shape: Shape) -> Carry:
        """Return the carry after a task's shared prefix; compute it if it is not in `prefixes`."""
        key = (*prefix_key(task), *self.edits.key(task))
        if key not in self.prefixes:
            batch = cut([task], [0], [shared], shape.prefix, 1, True)
            self.stats.prefilled(shared, shape.prefix)
            self.prefixes[key] = prefill_prefix(
                self.params, self.config, batch, self.edits.of([task], 1), self.setting.capture,
                slots=self.setting.slots)
            if len(self.prefixes) > self.together:
                self.prefixes.popitem(last=False)
        return self.prefixes[key]

    def _blank(self, rows: int) -> State:
        """Return a state in which all rows are free."""
        setting = self.setting
        return free_rows(self.config, self.params, self.edits.structure(rows), setting.capture,
                         setting.stops, rows=rows, slots=setting.slots, max_new=setting.max_new)


_FREE = Sampling(*(np.array([value], kind) for value, kind in (
    (0, np.float32), (1, np.float32), (0, np.int32), (0, np.uint32))))


def _sampling(tasks: Sequence[Task | None]) -> Sampling:
    """Return the sampling settings of the tasks, one row each; None marks a free row."""
    return jax.tree.map(lambda *x: np.concatenate(x), *(
        _FREE if task is None else task.sampling for task in tasks))


def _static(axes: Any) -> tuple[int, ...]:
    """Return the axes of all leaves as a hashable tuple, for use as a static argument."""
    return tuple(jax.tree.leaves(axes))


@program(donate=("state",), result=lambda state, **_: state)
def _mark_done(state: State, rows: jax.Array) -> State:
    """Mark rows as done where the mask `rows` [B] is True."""
    return state.replace(done=state.done | rows)
