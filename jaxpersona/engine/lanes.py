"""Lanes: B rows that decode in one program, with one cache size (continuous batching).

A lane prefills a fixed number of prompts at a time, writes the results to free rows and copies
finished rows out. The row indices are data, so a lane needs few programs. Each row of the cache has
its own next slot, so rows with different numbers of tokens decode together. A prompt's shapes
depend only on that prompt and on B. Its results are therefore bit-identical next to any other rows,
in any row and at any time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import processes
from jaxpersona.engine.compiled import program
from jaxpersona.engine.programs import (
    State,
    Stops,
    decode,
    free_rows,
    prefill,
    prefill_prefix,
)
from jaxpersona.engine.prompts import FEW_ROWS, bucket, padded
from jaxpersona.engine.rows import axis_of_rows, put_rows, side_by_side
from jaxpersona.engine.sampling import Sampling
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import LAST, USER, Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Params
from jaxpersona.text.chat import Row

CHUNK = 64  # the maximum number of decode steps between two transfers to the host
_SHORTEST_PREFIX = 16  # tokens; a shorter common prefix is not prefilled separately


class Edits(Protocol):
    """The interventions on a lane's rows."""

    def structure(self, rows: int) -> Interventions:
        """Return placeholder interventions on `rows` rows with the lane's structure."""
        ...

    def of(self, tasks: Sequence[Task], rows: int) -> Interventions:
        """Return interventions on `rows` rows: first those of `tasks`, then neutral ones."""
        ...

    def assign(self, edits: Interventions, rows: np.ndarray) -> None:
        """Assign interventions on n rows to the rows [n] of the lane; row index B is ignored."""
        ...

    def of_rows(self, tasks: Sequence[Task | None]) -> Interventions:
        """Return the interventions on all rows of the lane; None marks a free row."""
        ...

    def key(self, task: Task) -> tuple:
        """Return a key that is equal for tasks with equal interventions."""
        ...


@dataclasses.dataclass(eq=False)
class Task:
    """A prompt that a lane runs.

    Attributes:
      number: its index among the prompts of a call, or in the order of requests.
      row: the encoded prompt.
      row_id: uint32, seeds its random draws.
      limit: the maximum number of tokens in its reply.
      sampling: its sampling settings, as arrays of one row.
      shape: the static sizes for its prefill.
      lane: the key of its lane.
      edits: its interventions on one row, for `RowEdits`; None for `SharedEdits`.
      cancelled: whether it was cancelled and is removed without a result.
    """

    number: int
    row: Row
    row_id: int
    limit: int
    sampling: Sampling
    shape: Shape
    lane: Hashable
    edits: Interventions | None = None
    cancelled: bool = False


class Setting(NamedTuple):
    """The settings that all rows of a lane share.

    Attributes:
      slots: S of the cache.
      max_new: the maximum number of tokens in a reply.
      greedy: whether every temperature is 0.
      capture: the readings.
      stops: the tokens that end a row.
    """

    slots: int
    max_new: int
    greedy: bool
    capture: Capture
    stops: Stops


class Shape(NamedTuple):
    """The static sizes for a prompt's prefill, which do not depend on other prompts.

    Attributes:
      prefix: the padded length of the shared prefix; 0 if there is none.
      width: the padded length of the prompt without the shared prefix.
      slots: the number of cache slots S.
    """

    prefix: int
    width: int
    slots: int


def shape_of(row: Row, max_new: int, share_prefix: bool, context: int, rows: int) -> Shape:
    """Return the static sizes for a prompt.

    Args:
      row: the prompt.
      max_new: the maximum number of tokens in the reply.
      share_prefix: whether the prefix is computed separately.
      context: the model's context in tokens.
      rows: B of the lane.
    """
    shared = prefix_length(row) if share_prefix else 0
    prefix = padded(shared, rows) if shared else 0
    width = padded(row.tokens.size - shared, rows)
    if rows > FEW_ROWS:
        return Shape(prefix, width, cache_size(prefix + width + max_new, context))
    # padding takes no slots
    needed = max(prefix + width, row.tokens.size + max_new)
    return Shape(prefix, width, cache_size(needed, context, least=256, finer=None))


def shape_within(row: Row, limit: int, sizes: Sequence[int]) -> tuple[Shape, int]:
    """Return the lengths of a prompt's programs for given cache sizes, and its reply's limit.

    Args:
      row: the prompt.
      limit: the maximum number of tokens of the reply.
      sizes: the cache sizes, ascending.

    Raises:
      UserError: the prompt leaves no room in the largest cache.
    """
    width = bucket(row.tokens.size)
    if width >= sizes[-1]:
        raise UserError(f"the conversation has {row.tokens.size} tokens, padded to {width}; "
                        f"the engine's largest cache holds {sizes[-1]}, including the "
                        "reply: shorten it, or create the engine with larger sizes")
    limit = min(limit, sizes[-1] - width)
    return Shape(0, width, next(x for x in sizes if x >= width + limit)), limit


def cache_size(tokens: int, context: int, *, least: int = 64, finer: int | None = 512) -> int:
    """Return the number of cache slots for at most `tokens` tokens.

    This is the smallest of 64, 128, 256, 512, 768, 1,024, 1,536, 2,048, … that is at least
    `tokens`. If that exceeds the model's context, it is `tokens` rounded up to a multiple of 64.
    There are few sizes so that prompts of different lengths share a lane; with more sizes and
    lanes, many rows would be free.

    Args:
      tokens: the number of tokens.
      context: the model's context in tokens.
      least, finer: the list of sizes (`bucket`).
    """
    size = bucket(tokens, least=least, finer=finer)
    return size if size <= context else -(-tokens // 64) * 64


def prefix_length(row: Row) -> int:
    """Return the number of tokens before the first user message; 0 if below the minimum."""
    users = np.flatnonzero(row.kind & USER)
    length = int(users[0]) if users.size else 0
    return length if length >= _SHORTEST_PREFIX else 0


class Lane:
    """B rows that share their programs.

    A row is either free, or active, which means that it is assigned to a task.

    Attributes:
      rows: B.
      together: the number of rows that are prefilled, or copied out, at once.
      tasks: the task of each row; None if the row is free.
      filling: whether rows were assigned since the last decode.
      state: the state of the B rows.
      axes: the row axis of each leaf of the state.
      prefixes: the carries of recent prefixes, one row each.
    """

    def __init__(self, config: ModelConfig, params: Params, setting: Setting, edits: Edits,
                 rows: int, together: int) -> None:
        self.config, self.params, self.setting, self.edits = config, params, setting, edits
        self.rows, self.together = rows, together
        self.tasks: list[Task | None] = [None] * rows
        self.filling = False
        self.prefixes: OrderedDict[tuple, Carry] = OrderedDict()
        one, two = (jax.eval_shape(functools.partial(self._blank, n)) for n in (1, 2))
        self.axes: State = jax.tree.map(axis_of_rows, one, two)
        self.state: Any = self._blank(rows) if together < rows else None

    @property
    def free(self) -> int:
        """The number of free rows."""
        return self.tasks.count(None)

    def compile(self, shape: Shape) -> None:
        """Compile the programs of the lane for a shape by running them without an active row."""
        self.admit([], shape)
        self.decode(self.rows, 0)
        self.take_out(np.zeros(0, np.int32))

    def admit(self, chosen: list[Task], shape: Shape) -> None:
        """Prefill at most `together` prompts of one shape and assign each to a free row.

        The programs also run if there are no prompts, in order to compile them.
        """
        edits = self.edits.of(chosen, self.together)
        fresh = self._prefill(chosen, shape, edits)
        free = [i for i, task in enumerate(self.tasks) if task is None][: len(chosen)]
        at = np.full(self.together, self.rows, np.int32)  # out-of-range rows are ignored
        at[: len(free)] = free
        if self.together == self.rows:
            self.state = fresh
        else:
            self.state = put_rows(self.state, fresh, at, axes=_static(self.axes))
        self.edits.assign(edits, at)
        for i, task in zip(free, chosen, strict=True):
            self.tasks[i] = task

    def decode(self, most_done: int, steps: int) -> np.ndarray:
        """Decode for `steps` steps, or until `most_done` rows, including free ones, are done.

        Returns:
          The indices of active rows that are done, [n] int.
        """
        setting = self.setting
        sampling = jax.tree.map(lambda *x: np.concatenate(x), *(
            _FREE if task is None else task.sampling for task in self.tasks))
        self.state = decode(
            self.params, self.config, self.state, self.edits.of_rows(self.tasks), setting.capture,
            sampling, setting.stops, jnp.asarray(int(self.state.step) + steps, jnp.int32),
            jnp.asarray(most_done, jnp.int32), greedy=setting.greedy)
        active = np.array([task is not None for task in self.tasks])
        return np.flatnonzero(processes.fetch(self.state.done) & active)

    def take_out(self, done: np.ndarray) -> list[tuple[list[Task], State]]:
        """Free finished rows and return their tasks and states.

        Args:
          done: [n] int, the rows that are done.

        Returns:
          Groups of at most `together` tasks, each with a state whose first rows belong to the
          tasks. These states have no keys and values.
        """
        out = []
        for begin in range(0, max(done.size, 1), self.together):
            rows = done[begin : begin + self.together]
            state = self.state
            if self.together < self.rows:
                at = np.zeros(self.together, np.int32)
                at[: rows.size] = rows
                state = _take_rows(self.state, at, axes=_static(self.axes))
            tasks = [task for i in rows if (task := self.tasks[i]) is not None]
            out.append((tasks, state))
        for i in done:
            self.tasks[i] = None
        return out if done.size else []

    def end(self, rows: Sequence[int]) -> None:
        """Free the rows of cancelled requests without collecting results."""
        removed = np.zeros(self.rows, bool)
        for i in rows:
            removed[i], self.tasks[i] = True, None
        self.state = _mark_done(self.state, removed)

    def _prefill(self, chosen: list[Task], shape: Shape, edits: Interventions) -> State:
        """Prefill and return the state of `together` rows; rows without a prompt are free."""
        setting, count = self.setting, self.together
        shared = [prefix_length(task.row) if shape.prefix else 0 for task in chosen]
        prefix = None
        if shape.prefix:
            carries = [self._prefix(task, shared[i], shape) for i, task in enumerate(chosen)]
            carries += carries[:1] * (count - len(chosen))  # padding
            prefix = side_by_side(tuple(carries), axes=_static(self.axes.carry))
        batch = _cut(chosen, shared, [task.row.tokens.size for task in chosen], shape.width, count,
                     shape.prefix > 0)
        sampling = jax.tree.map(lambda *x: np.concatenate(x), *(
            task.sampling for task in chosen), *[_FREE] * (count - len(chosen)))
        limit = np.array([task.limit for task in chosen] + [0] * (count - len(chosen)), np.int32)
        return prefill(self.params, self.config, batch, edits, setting.capture, sampling,
                       setting.stops, jnp.asarray(limit), slots=setting.slots,
                       max_new=setting.max_new, greedy=setting.greedy, prefix=prefix)

    def _prefix(self, task: Task, shared: int, shape: Shape) -> Carry:
        """Return the carry after a task's prefix, computed once for all tasks that share it."""
        key = (*prefix_key(task), *self.edits.key(task))
        if key not in self.prefixes:
            batch = _cut([task], [0], [shared], shape.prefix, 1, True)
            self.prefixes[key] = prefill_prefix(
                self.params, self.config, batch, self.edits.of([task], 1), self.setting.capture,
                slots=self.setting.slots)
            if len(self.prefixes) > self.together:
                self.prefixes.popitem(last=False)
        return self.prefixes[key]

    def _blank(self, rows: int) -> State:
        """Return a state with only free rows."""
        setting = self.setting
        return free_rows(self.config, self.params, self.edits.structure(rows), setting.capture,
                         setting.stops, rows=rows, slots=setting.slots, max_new=setting.max_new)


_FREE = Sampling(*(np.array([value], kind) for value, kind in (
    (0, np.float32), (1, np.float32), (0, np.int32), (0, np.uint32))))


def prefix_key(task: Task) -> tuple:
    """Return a key that is equal for prompts with the same prefix; () without a prefix."""
    n = prefix_length(task.row) if task.shape.prefix else 0
    row = task.row
    return tuple(x[:n].tobytes() for x in (row.tokens, row.kind, row.turn)) if n else ()


def _cut(chosen: Sequence[Task], start: Sequence[int], stop: Sequence[int], width: int, size: int,
         chunk: bool) -> Batch:
    """Return a batch of `size` rows with tokens start…stop−1 of each prompt; added rows are empty.

    Args:
      chosen: n ≤ `size` tasks.
      start, stop: n token indices each.
      width: T of the batch.
      size: B of the batch.
      chunk: whether the tokens are only part of each prompt.
    """
    shape = (size, width)
    tokens, position, turn = (np.zeros(shape, np.int32) for _ in range(3))
    kind = np.zeros(shape, np.uint16)
    row_id = np.zeros(size, np.uint32)
    for b, (task, low, high) in enumerate(zip(chosen, start, stop, strict=True)):
        row = task.row
        whole = make_batch([row.tokens], kind=[row.kind & ~LAST], turn=[row.turn])
        for out, values in ((tokens, whole.tokens), (position, whole.position),
                            (kind, whole.kind), (turn, whole.turn)):
            out[b, : high - low] = values[0, low:high]
        row_id[b] = task.row_id
    return jax.tree.map(jnp.asarray, Batch(tokens, position, kind, turn, row_id=row_id,
                                           chunk=chunk))


def _static(axes: Any) -> tuple[int, ...]:
    """Return the axes of all leaves as a hashable tuple, for use as a static argument."""
    return tuple(jax.tree.leaves(axes))


@program(donate=("state",), result=lambda state, **_: state)
def _mark_done(state: State, rows: jax.Array) -> State:
    """Mark the rows that are True in `rows` [B] as done."""
    return state.replace(done=state.done | rows)


def _without_keys(state: State, **_: Any) -> State:
    assert state.carry.cache is not None
    cache = state.carry.cache.replace(k=(), v=())
    return state.replace(carry=state.carry.replace(cache=cache))


@program(static=("axes",), result=_without_keys)
def _take_rows(state: State, rows: jax.Array, *, axes: tuple[int, ...]) -> State:
    """Copy the rows [n] of a state without their keys and values."""
    def take(value: jax.Array, axis: int) -> jax.Array:
        return value if axis < 0 else jnp.take(value, rows, axis, mode="clip")

    axis_of = jax.tree.unflatten(jax.tree.structure(state), axes)
    return jax.tree.map(take, _without_keys(state), _without_keys(axis_of))
