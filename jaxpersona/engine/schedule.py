"""Many prompts through few rows: finished rows are refilled without another program.

B rows decode together. As soon as some of them are done their results are taken out and as many
waiting prompts, prefilled by themselves, take their seats; which rows these are is data. A cache
has a slot a row, so rows of any age go on side by side. A prompt's shapes are functions of that
prompt and of B alone, so its bits depend on neither its neighbours, nor its row, nor its turn.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.engine.compiled import program
from jaxpersona.engine.programs import Prefix, State, Stops, decode, prefill, prefill_prefix
from jaxpersona.engine.prompts import bucket
from jaxpersona.engine.sampling import Sampling
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.trace import Applied
from jaxpersona.models.batch import LAST, USER, Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.cache import init_cache, kept_dtype
from jaxpersona.models.params import Params, in_out
from jaxpersona.text.chat import Row

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Collect = Callable[[list[int], State], None]
CHUNK = 64  # steps between two looks at the device
_SHORTEST_PREFIX = 16  # tokens that are worth a pass of their own
_LARGEST_COPY = 8e9  # bytes of weights beyond which speed is not worth holding them twice


class Job(NamedTuple):
    """N prompts and all that is known of them, in their order.

    Attributes:
      rows: the encoded prompts.
      names: [N] uint32, what each one is for its random draws.
      limits: [N] int32, the most tokens of each reply.
      how: settings of N rows.
      edits: for all alike or for N rows.
      max_new: the most tokens of any reply.
      share_prefix: compute what stands before the first user message once for all that share it.
    """

    rows: list[Row]
    names: np.ndarray
    limits: np.ndarray
    how: Sampling
    edits: Interventions
    capture: Capture
    max_new: int
    greedy: bool
    share_prefix: bool


class Shape(NamedTuple):
    """The lengths that a prompt's programs are compiled for, functions of the prompt alone.

    Attributes:
      prefix: tokens of the padded prefix, 0 where none is shared.
      width: tokens of the padded prompt, or of what follows the prefix.
      slots: S of the cache.
    """

    prefix: int
    width: int
    slots: int


def run(model: Model, job: Job, batch_size: int, stops: Stops, collect: Collect, *,
        refill: bool = True) -> None:
    """Generate all replies of a job, `batch_size` rows at a time.

    Args:
      collect: called with the numbers of finished prompts and a state whose first rows are theirs.
      refill: seat waiting prompts as soon as some rows are done; else when all are. Prompts are
        prefilled in batches of the same size either way, because the size of a batch decides how
        its results are rounded.
    """
    shapes = [shape_of(row, job.max_new, job.share_prefix) for row in job.rows]
    groups: dict[int, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape.slots, []).append(i)
    # a mesh spreads rows over devices, where exchanging single ones would move all
    together = max(1, batch_size // 4) if model.mesh is None else batch_size
    params = fast_params(model, batch_size)
    for slots, members in groups.items():
        _Group(model, params, job, shapes, slots, batch_size, together, stops, collect,
               refill).run(members)


def fast_params(model: Model, batch_size: int) -> Params:
    """Return the parameters in the order in which their device multiplies many rows fastest.

    On a CPU in float32 that is a copy: twice the weights' memory, as long as the model is held. It
    is made once for each `model.Model`; for other classes that stand for one, at every call.
    """
    embed = model.params.embed_vd
    if (not on_cpu(embed) or embed.dtype != jnp.float32 or batch_size < 8
            or model.mesh is not None or model.config.bytes(4) > _LARGEST_COPY):
        return model.params
    held = getattr(model, "derived", None)
    return in_out(model.params) if held is None else held.get(model.params, in_out)


def shape_of(row: Row, max_new: int, share_prefix: bool) -> Shape:
    """Return the lengths that a prompt is run at."""
    shared = prefix_length(row) if share_prefix else 0
    before = bucket(shared) if shared else 0
    width = bucket(row.tokens.size - shared)
    return Shape(before, width, -(-(before + width + max_new) // 64) * 64)


def prefix_length(row: Row) -> int:
    """Count the tokens before the first user message; 0 where they are few."""
    users = np.flatnonzero(row.kind & USER)
    length = int(users[0]) if users.size else 0
    return length if length >= _SHORTEST_PREFIX else 0


class _Group:
    """Prompts for one size of cache on their way through B rows, `together` seated at a time."""

    def __init__(self, model: Model, params: Params, job: Job, shapes: list[Shape], slots: int,
                 size: int, together: int, stops: Stops, collect: Collect,
                 refill: bool) -> None:
        self.config, self.params = model.config, params
        self.job, self.shapes, self.slots = job, shapes, slots
        self.size, self.together, self.stops, self.collect = size, together, stops, collect
        self.refill = refill
        self.indexed = jax.device_get(job.edits)  # to look at single entries
        self.prefixes: OrderedDict[tuple, Prefix] = OrderedDict()
        one, two = (jax.eval_shape(functools.partial(self._blank, rows)) for rows in (1, 2))
        self.axes: State = jax.tree.map(_differing_axis, one, two)

    def run(self, members: Sequence[int]) -> None:
        """Seat, decode, take out, until nobody waits or sits."""
        # neighbours in the queue share a shape, and a prefix, so that few of these are kept
        waiting = deque(sorted(members, key=lambda i: (self.shapes[i], *self._key(i))))
        seats = np.full(self.size, -1, np.int32)
        state: Any = self._blank(self.size) if self.together < self.size else None
        while waiting or (seats >= 0).any():
            # the fewest free rows that are worth a prefill; without refilling, all must be free
            # before the first is seated, and then all are used
            least = self.together if self.refill else 1 if (seats < 0).all() else self.size + 1
            while waiting and (free := np.flatnonzero(seats < 0)).size >= least:
                shape, chosen = self.shapes[waiting[0]], []
                room = min(self.together, free.size)
                while waiting and len(chosen) < room and self.shapes[waiting[0]] == shape:
                    chosen.append(waiting.popleft())
                fresh = self._prefill(chosen, shape)
                seats[free[: len(chosen)]] = chosen
                if self.together == self.size:
                    state = fresh
                else:
                    at = np.full(self.together, self.size, np.int32)  # beyond the end: dropped
                    at[: len(chosen)] = free[: len(chosen)]
                    state = _seat(state, fresh, at, axes=_static(self.axes))
            seated = int((seats >= 0).sum())
            enough = min(self.together, seated)
            empty = self.size - seated
            early = waiting and self.refill
            state = self._decode(state, seats, empty + enough if early else self.size)
            done = np.flatnonzero(processes.fetch(state.done) & (seats >= 0))
            if done.size >= enough:
                self._take_out(state, seats, done)

    def _decode(self, state: State, seats: np.ndarray, most_done: int) -> State:
        job = self.job
        return decode(self.params, self.config, state, job.edits.take(seats),
                      job.capture, job.how.take(seats), self.stops,
                      jnp.asarray(int(state.step) + CHUNK, jnp.int32),
                      jnp.asarray(most_done, jnp.int32), greedy=job.greedy)

    def _take_out(self, state: State, seats: np.ndarray, done: np.ndarray) -> None:
        """Hand finished rows on, a fixed number at a time, and free their seats."""
        if self.together == self.size:  # all came together, in the first rows
            self.collect(seats[done].tolist(), state)
            seats[done] = -1
            return
        for begin in range(0, done.size, self.together):
            rows = done[begin : begin + self.together]
            at = np.zeros(self.together, np.int32)
            at[: rows.size] = rows
            self.collect(seats[rows].tolist(), _leave(state, at, axes=_static(self.axes)))
        seats[done] = -1

    def _prefill(self, chosen: list[int], shape: Shape) -> State:
        """Run the prompts of some rows and choose their first tokens."""
        job, count = self.job, self.together
        index = np.array(chosen + [-1] * (count - len(chosen)), np.int32)
        shared = [self._shared(i) for i in chosen]
        prefix = None
        if shape.prefix:
            parts = [self._prefix(i) for i in chosen]
            parts += parts[:1] * (count - len(chosen))  # of padding rows, which nobody reads
            axes = self.axes
            prefix = _stack(tuple(parts), axes=_static(
                Prefix(axes.cache, axes.captured, axes.applied, axes.gates, axes.nonfinite)))
        batch = _cut(job, chosen, shared, [job.rows[i].tokens.size for i in chosen],
                     shape.width, count, shape.prefix > 0)
        return prefill(self.params, self.config, batch, job.edits.take(index),
                       job.capture, job.how.take(index), self.stops,
                       jnp.asarray(job.limits[index], jnp.int32), slots=self.slots,
                       max_new=job.max_new, greedy=job.greedy, prefix=prefix)

    def _prefix(self, i: int) -> Prefix:
        """Return what prompt i's prefix leaves behind, computed once for all that share it."""
        job, key = self.job, self._key(i)
        if key not in self.prefixes:
            batch = _cut(job, [i], [0], [self._shared(i)], self.shapes[i].prefix, 1, True)
            self.prefixes[key] = prefill_prefix(
                self.params, self.config, batch, job.edits.take([i]), job.capture,
                slots=self.slots)
            if len(self.prefixes) > self.together:
                self.prefixes.popitem(last=False)
        return self.prefixes[key]

    def _shared(self, i: int) -> int:
        return prefix_length(self.job.rows[i]) if self.shapes[i].prefix else 0

    def _key(self, i: int) -> tuple:
        """What prompts that share a prefix have in common: its tokens and how it is edited."""
        row, n = self.job.rows[i], self._shared(i)
        if not n:
            return ()
        entries = [int(edit.index[i]) for edit in self.indexed.edits if edit.index is not None]
        return (*(x[:n].tobytes() for x in (row.tokens, row.kind, row.turn)), *entries)

    def _blank(self, rows: int) -> State:
        """Make a state in which nobody sits."""
        config, job, slots = self.config, self.job, self.slots
        zeros = jnp.zeros((rows,), jnp.int32)
        blank = State(
            cache=init_cache(config, rows, slots, kept_dtype(self.params.embed_vd)),
            token=zeros, position=zeros, turn=zeros, row_id=zeros.astype(jnp.uint32),
            done=jnp.ones((rows,), bool), thinking=jnp.zeros((rows,), bool), limit=zeros,
            length=zeros, tokens=jnp.full((rows, job.max_new), -1, jnp.int32),
            step=jnp.zeros((), jnp.int32), captured=job.capture.start(config, rows, slots),
            applied=tuple(Applied(zeros, jnp.zeros((len(edit.layers), rows), jnp.int32))
                          for edit in job.edits.edits),
            gates={str(number): edit.gate.start(rows)
                   for number, edit in enumerate(job.edits.edits) if edit.gate is not None},
            nonfinite=jnp.zeros((rows,), bool),
            fence=None if self.stops.fences is None else zeros,
        )
        return jax.tree.map(jnp.copy, blank)  # a buffer of its own each, because they are donated


def _cut(job: Job, chosen: list[int], start: Sequence[int], stop: Sequence[int], width: int,
         size: int, chunk: bool) -> Batch:
    """Make a batch of `size` rows from tokens start…stop of prompts, the missing rows empty."""
    rows = [job.rows[i] for i in chosen]
    whole = make_batch([r.tokens for r in rows], kind=[r.kind & ~LAST for r in rows],
                       turn=[r.turn for r in rows], row_id=job.names[chosen])

    def cut(values: np.ndarray) -> np.ndarray:
        out = np.zeros((size, width), values.dtype)
        for b, (low, high) in enumerate(zip(start, stop, strict=True)):
            out[b, : high - low] = values[b, low:high]
        return out

    fields = (whole.tokens, whole.position, whole.kind, whole.turn)
    names = np.pad(whole.row_id, (0, size - len(chosen)))
    return jax.tree.map(jnp.asarray, Batch(*map(cut, fields), row_id=names, chunk=chunk))


def _differing_axis(one: Any, two: Any) -> int:
    """Return the axis of rows: the one in which states of one row and of two differ, else −1."""
    pairs = enumerate(zip(one.shape, two.shape, strict=True))
    return next((axis for axis, (a, b) in pairs if a != b), -1)


def _static(axes: Any) -> tuple[int, ...]:
    return tuple(jax.tree.leaves(axes))


@program(static=("axes",), donate=("state",))
def _seat(state: State, fresh: State, rows: jax.Array, *, axes: tuple[int, ...]) -> State:
    """Put prefilled rows into the given rows of a state."""

    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return old if axis < 0 else old.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")

    return jax.tree.map(put, state, fresh, jax.tree.unflatten(jax.tree.structure(state), axes))


@program(static=("axes",))
def _leave(state: State, rows: jax.Array, *, axes: tuple[int, ...]) -> State:
    """Copy the given rows out of a state, but for their keys and values."""
    where = jax.tree.unflatten(jax.tree.structure(state), axes)
    state, where = (x.replace(cache=x.cache.replace(k=(), v=()))  # pyright: ignore
                    for x in (state, where))

    def take(value: jax.Array, axis: int) -> jax.Array:
        return value if axis < 0 else jnp.take(value, rows, axis, mode="clip")

    return jax.tree.map(take, state, where)


@program(static=("axes",))
def _stack(parts: tuple[Prefix, ...], *, axes: tuple[int, ...]) -> Prefix:
    """Put prefixes of one row each side by side."""
    where = jax.tree.unflatten(jax.tree.structure(parts[0]), axes)
    return jax.tree.map(lambda axis, *rows: jnp.concatenate(rows, axis), where, *parts)
