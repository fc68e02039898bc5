"""Scheduling of prompts: queued prompts are assigned to free rows of lanes, oldest first.

`generate` runs a scheduler until all prompts are finished; `Engine` and `Stream` run it
step by step.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from jaxpersona.engine.lanes import CHUNK, Lane
from jaxpersona.engine.programs import State
from jaxpersona.engine.tasks import Task

Collect = Callable[[list[Task], np.ndarray, State], None]
Failed = Callable[[list[Task], BaseException], None]


class Scheduler:
    """A scheduler that assigns queued prompts to rows in order and runs the lanes.

    Prompts leave the queue in order. The oldest prompt is admitted together with the prompts
    directly after it that use the same program. If its lane has too few free rows, or cannot be
    opened, the whole queue waits.

    Attributes:
      waiting: the queued prompts, oldest first.
      lanes: the open lanes by key (`Task.lane`).
    """

    def __init__(self, open_lane: Callable[[Hashable], Lane], collect: Collect, *,
                 lanes: int = 1, batched: bool = True, refill: bool = True,
                 chunk: int = CHUNK, failed: Failed | None = None,
                 pause: Callable[[list[Task]], bool] | None = None) -> None:
        """Create a scheduler with an empty queue and no lanes.

        Args:
          open_lane: a function that returns a new lane for a key.
          collect: a function that is called with finished tasks, the indices of their rows in a
            state, and this state.
          lanes: the maximum number of open lanes.
          batched: whether to admit and collect prompts in batches, for high throughput. If False,
            each prompt is admitted and collected as soon as possible, for low latency.
          refill: whether to admit prompts to a lane while its other rows decode. If False, a
            lane is filled only when all its rows are free.
          chunk: the maximum number of decode steps between two transfers to the host.
          failed: a function that is called with the affected tasks and the error if a lane raises
            an error. The lane is then dropped. None: the error is raised.
          pause: a function that is called with the prompts that a step admitted. If it returns
            True, the step ends without decoding, unless the previous step also ended without
            decoding. None: every step decodes.
        """
        self.open_lane, self.collect = open_lane, collect
        self.most, self.batched, self.refill, self.chunk = lanes, batched, refill, chunk
        self.failed, self.pause = failed, pause
        self._paused = False  # whether the last step ended without decoding
        self.waiting: deque[Task] = deque()
        self.lanes: dict[Any, Lane] = {}

    @property
    def idle(self) -> bool:
        """Whether the queue is empty and no row is active."""
        return not self.waiting and not any(_busy(lane) for lane in self.lanes.values())

    def run(self) -> None:
        """Run steps until the scheduler is idle."""
        while not self.idle:
            self.step()

    def step(self) -> None:
        """Remove cancelled prompts, admit queued prompts, and decode one chunk in every lane.

        If `pause` returns True for the admitted prompts, no lane decodes. The next step then
        decodes, so that newly admitted prompts cannot delay the others indefinitely.
        """
        for lane in self.lanes.values():
            if (cancelled := [i for i, task in enumerate(lane.tasks)
                         if task is not None and task.cancelled]):
                lane.end(cancelled)
            lane.unstage()
        admitted: list[Task] = []
        before = None
        while before != (before := (len(admitted), len(self.waiting))):
            admitted += self._admit()
            for key, lane in list(self.lanes.items()):
                admitted += self._admit_pieces(key, lane)
        self._paused = (not self._paused and bool(admitted) and self.pause is not None
                        and self.pause(admitted))
        if self._paused:
            return
        for key, lane in list(self.lanes.items()):
            if _busy(lane):
                with self._contained(key, lane.active):
                    self._decode(key, lane)

    def lane_of(self, key: Any) -> Lane | None:
        """Return the lane for a key, opened on first use; None if no lane can be opened.

        If the maximum number of lanes is already open, one without a task is closed first.
        """
        if key not in self.lanes:
            for other, lane in list(self.lanes.items()):
                if len(self.lanes) >= self.most and not _busy(lane):
                    del self.lanes[other]  # frees its memory before the new lane is allocated
            if len(self.lanes) >= self.most:
                return None
            self.lanes[key] = self.open_lane(key)
        return self.lanes[key]

    def _admit(self) -> list[Task]:
        """Admit the oldest queued prompts that share a program, and return them.

        Prompts of a lane with pieces are admitted by `_admit_pieces`.
        """
        first, lane = None, None
        while first is None or first.cancelled:  # also if opening its lane raised an error
            while self.waiting and self.waiting[0].cancelled:
                self.waiting.popleft()
            if not self.waiting:
                return []
            first = self.waiting[0]
            with self._contained(first.lane, [first]):
                lane = self.lane_of(first.lane)
        if lane is None or lane.piece is not None or self._waits(lane):
            return []
        if lane.together == lane.rows and _busy(lane):  # prefill would replace all rows
            return []
        # the number of free rows that a prefill requires
        least = lane.together if self.batched and self.refill else 1
        capacity = min(lane.together, lane.free)
        if lane.free < least:
            return []
        chosen: list[Task] = []
        while self.waiting and len(chosen) < capacity:
            task = self.waiting[0]
            if task.cancelled:
                self.waiting.popleft()
            elif (task.lane, task.shape) == (first.lane, first.shape):
                chosen.append(self.waiting.popleft())
            else:
                break
        with self._contained(first.lane, [*chosen, *lane.active]):
            lane.admit(chosen, first.shape)
            lane.filling = True
        return chosen

    def _admit_pieces(self, key: Any, lane: Lane) -> list[Task]:
        """Prefill prompts in chunks (pieces) while a lane has a free row; return those admitted.

        A queued prompt is assigned to a staging row as soon as one is free. Fully prefilled prompts
        move to free rows, and their staging rows are refilled, before the next pieces of all staged
        prompts are prefilled in one call, so that few staging rows are empty in a call.
        """
        admitted: list[Task] = []
        while lane.piece is not None and lane.free and not self._waits(lane):
            with self._contained(key, tasks := lane.active):
                while None in lane.staged and self.waiting and (
                        self.waiting[0].cancelled or self.waiting[0].lane == key):
                    if not (task := self.waiting.popleft()).cancelled:
                        tasks.append(task)
                        lane.stage(task)
                if not any(lane.staged):
                    break
                admitted += lane.advance()
                lane.filling |= bool(admitted)
            if key not in self.lanes:  # the lane was dropped after an error
                break
        return admitted

    def _waits(self, lane: Lane) -> bool:
        """Return whether a lane admits no prompt until all its rows are free."""
        return not self.refill and lane.free < lane.rows and not lane.filling

    @contextlib.contextmanager
    def _contained(self, key: Any, tasks: list[Task]) -> Iterator[None]:
        """Confine an error to one lane: the prompts `tasks` fail, and the lane is dropped.

        If `failed` is None, the error is raised instead.
        """
        try:
            yield
        except Exception as error:
            if self.failed is None:
                raise
            self.lanes.pop(key, None)
            self.failed(tasks, error)

    def _decode(self, key: Any, lane: Lane) -> None:
        """Decode one chunk in a lane, and collect its finished prompts if there are enough."""
        lane.filling = False
        # chunked prefill needs no full batch of free rows, so wait for fewer finished rows
        most = lane.together if lane.piece is None else max(1, lane.rows // 8)
        enough = min(most, lane.rows - lane.free) if self.batched else 1
        more = any(lane.staged) or (bool(self.waiting) and self.waiting[0].lane == key)
        early = self.refill and more
        done = lane.decode(lane.free + enough if early else lane.rows, self.chunk)
        if done.size >= enough:
            for tasks, rows, state in lane.take_out(np.asarray(done)):
                self.collect(tasks, rows, state)


def _busy(lane: Lane) -> bool:
    """Return whether a lane has a task."""
    return lane.free < lane.rows or any(lane.staged)
