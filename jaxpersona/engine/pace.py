"""Measurement of the speed of `generate` in a sample run of limited duration.

The sample run uses the programs and the scheduler of `generate`, but stops after a given time. Only
a lower bound on the length of an unfinished reply is known (a right-censored observation), so the
mean length is computed from a Kaplan–Meier estimate.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh
from jaxpersona.engine import prompts
from jaxpersona.engine.generate import asks_for_code, queue, stops_of
from jaxpersona.engine.lanes import CHUNK
from jaxpersona.engine.programs import State
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.tasks import Task
from jaxpersona.interventions.compose import given

if TYPE_CHECKING:
    from jaxtyping import Int

    from jaxpersona.models.model import Model


@dataclasses.dataclass(frozen=True)
class Pace:
    """The result of generating replies to n conversations for a limited time.

    Attributes:
      finished: [f] int, the lengths of the finished replies in tokens, including stop tokens.
      unfinished: [u] int, the lengths of the unfinished replies in tokens at the end of the run.
      waiting: the number of conversations whose reply had not started.
      prompts: [n] int, the lengths of the prompts in tokens.
      seconds: the generation time in seconds, excluding compilation.
      compile_seconds: the preparation time before generation in seconds, mostly for compilation.
      limit: the maximum length of a reply in tokens.
      rows: the batch size B.
    """

    __repr__ = brief

    finished: Int[np.ndarray, " f"]
    unfinished: Int[np.ndarray, " u"]
    waiting: int
    prompts: Int[np.ndarray, " n"]
    seconds: float
    compile_seconds: float
    limit: int
    rows: int

    @property
    def tokens(self) -> int:
        """The total number of generated tokens."""
        return int(self.finished.sum() + self.unfinished.sum())

    @property
    def complete(self) -> bool:
        """Whether the replies to all conversations are finished."""
        return not self.waiting and not self.unfinished.size

    def mean_length(self) -> float:
        """Return the expected length of a reply in tokens, estimated with `survival`."""
        at, alive = survival(self.finished, self.unfinished, self.limit)
        return float((np.diff(at) * alive).sum())

    def seconds_for(self, count: int, per_call: int) -> float:
        """Return the expected time in seconds for `count` replies.

        Near the end of a `generate` call, rows become free and remain unused. A complete sample
        includes this idle time. For an incomplete sample, the idle time is estimated by simulating
        a call; the result is infinite if no token was generated.

        Args:
          count: the number of replies.
          per_call: the number of conversations in a call of `generate`.
        """
        if self.complete:
            return self.seconds * count / len(self.finished)
        if not self.tokens:
            return float("inf")
        at, alive = survival(self.finished, self.unfinished, self.limit)
        size = max(1, min(count, per_call))
        # reply lengths at evenly spaced quantiles, in a fixed random order
        share = 1 - (np.arange(size) + 0.5) / size
        lengths = at[1:][np.searchsorted(-alive[1:], -share)]
        busy = occupancy(np.random.default_rng(0).permutation(lengths), self.rows)
        return count * self.mean_length() * self.seconds / self.tokens / busy


def survival(finished: Int[np.ndarray, " f"], unfinished: Int[np.ndarray, " u"],
             limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the Kaplan–Meier estimate of P(length > t) as a step function.

    Args:
      finished: the lengths of finished replies in tokens.
      unfinished: the lengths of unfinished replies in tokens, as lower bounds.
      limit: the maximum length of a reply in tokens.

    Returns:
      A pair: the lengths `at` [k + 1], from 0 to `limit`, and the probabilities `alive` [k], such
      that P(length > t) = alive[i] for at[i] ≤ t < at[i + 1].
    """
    at, alive = [0], [1.0]
    for t in np.unique(finished[finished < limit]):
        at_risk = int((finished >= t).sum() + (unfinished >= t).sum())
        at.append(int(t))
        alive.append(alive[-1] * (1 - int((finished == t).sum()) / at_risk))
    return np.array([*at, limit]), np.array(alive)


def occupancy(lengths: Sequence[int] | np.ndarray, rows: int) -> float:
    """Return the mean fraction of busy rows if each reply starts in the first row that is free.

    Args:
      lengths: the lengths of the replies in tokens, in order.
      rows: the number of rows.
    """
    ends = [0] * rows
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + int(length))
    return float(np.sum(lengths)) / (rows * max(*ends, 1))


@own_context()
def measure(model: Model, conversations: Sequence[Any], *, seconds: float, capture: Capture,
            max_new_tokens: int, temperature: float, top_p: float, seed: int, batch_size: int,
            ids: Sequence[int]) -> Pace:
    """Generate replies for up to about `seconds` seconds and return the measured speed.

    The programs are compiled first. The elapsed time is checked after each chunk of decode steps. A
    chunk has fewer steps on a slow device.

    Args:
      model, conversations, capture, max_new_tokens, temperature, top_p, seed, batch_size, ids: as
        for `generate`.
      seconds: the maximum generation time in seconds, excluding compilation.

    Raises:
      UserError: an argument is invalid, as in `generate`.
    """
    max_new = prompts.reply_limits(max_new_tokens, len(conversations), model.config.max_context)
    edits, capture = off_mesh((given(None), capture))
    rows = [prompts.encode(model, item) for item in conversations]
    lengths: list[int] = []

    def collect(tasks: list[Task], places: np.ndarray, state: State) -> None:
        del tasks
        lengths.extend(processes.fetch(state.length)[places].tolist())

    begun = time.perf_counter()
    scheduler = queue(
        model, rows, prompts.row_ids(rows, ids), prompts.limits(model, rows, max_new),
        sampling(len(rows), temperature=temperature, top_p=top_p, seed=seed), edits, capture,
        stops_of(model, asks_for_code(edits, capture)), collect, max_new=max_new,
        batch_size=batch_size)
    for shape in dict.fromkeys(task.shape for task in scheduler.waiting):
        lane = scheduler.open_lane(shape.slots)
        lane.compile(shape)
        del lane  # frees its memory before the next lane is allocated
    start = last = time.perf_counter()
    scheduler.chunk = 1
    while not scheduler.idle and last - start < seconds:
        scheduler.step()
        now = time.perf_counter()
        # a chunk should take at most about an eighth of `seconds`
        fits = seconds / 8 * scheduler.chunk / max(now - last, 1e-6)
        scheduler.chunk = int(np.clip(fits, 1, min(CHUNK, 2 * scheduler.chunk)))
        last = now
    unfinished: list[int] = []
    waiting = len(scheduler.waiting)
    for lane in scheduler.lanes.values():
        waiting += sum(task is not None for task in lane.staged)
        if lane.state is None:
            continue
        size, done = processes.fetch(lane.state.length), processes.fetch(lane.state.done)
        for i, task in enumerate(lane.tasks):
            if task is not None:
                (lengths if done[i] else unfinished).append(int(size[i]))
    return Pace(np.array(lengths, int), np.array(unfinished, int), waiting,
                np.array([row.tokens.size for row in rows]), last - start, start - begun,
                int(max_new[0]), batch_size)
