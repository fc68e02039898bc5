"""Who decodes next: prompts wait in order, get a row of a lane, and leave it when they are done.

It knows nothing of conversations and threads: `generate` drains it, `Engine` steps it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from jaxpersona.engine.lanes import CHUNK, Lane, Task
from jaxpersona.engine.programs import State

Collect = Callable[[list[Task], State], None]
Failed = Callable[[list[Task], BaseException], None]


class Scheduler:
    """Prompts on their way through lanes, the oldest first.

    Only the oldest waiting prompt is admitted. If its lane has no free row, or no lane may be
    opened for it, all others wait behind it, so none waits for ever.

    Attributes:
      waiting: the prompts that have no row yet, in order.
      lanes: the open lanes by what tells them apart (`Task.lane`).
    """

    def __init__(self, open_lane: Callable[[Hashable], Lane], collect: Collect, *,
                 lanes: int = 1, batched: bool = True, refill: bool = True,
                 chunk: int = CHUNK, failed: Failed | None = None) -> None:
        """Begin with nothing.

        Args:
          open_lane: makes the lane of a key.
          collect: called with finished prompts and a state whose first rows are theirs.
          lanes: the most lanes that are open together.
          batched: admit, and take out, as many prompts at a time as one program takes; else each
            as soon as it can be.
          refill: admit prompts while others decode; else only into an empty lane.
          chunk: the most steps between two looks at the device.
          failed: called with prompts whose lane failed, and the error; their lane is dropped.
            Without it the error is raised.
        """
        self.open_lane, self.collect = open_lane, collect
        self.most, self.batched, self.refill, self.chunk = lanes, batched, refill, chunk
        self.failed = failed
        self.waiting: deque[Task] = deque()
        self.lanes: dict[Any, Lane] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nobody has a row."""
        return not self.waiting and not any(_busy(lane) for lane in self.lanes.values())

    def step(self) -> None:
        """Free the rows of cancelled prompts, admit others, and run one chunk of every lane."""
        for lane in self.lanes.values():
            if (gone := [i for i, task in enumerate(lane.tasks)
                         if task is not None and task.cancelled]):
                lane.end(gone)
        while self._admit():
            pass
        for key, lane in list(self.lanes.items()):
            if _busy(lane):
                with self._alone(key, []):
                    self._decode(key, lane)

    def lane_of(self, key: Any) -> Lane | None:
        """Return a key's lane, opened if need be, or None where it must wait for another."""
        if key not in self.lanes:
            for other, lane in list(self.lanes.items()):
                if len(self.lanes) >= self.most and not _busy(lane):
                    del self.lanes[other]  # its memory is freed before the next lane is made
            if len(self.lanes) >= self.most:
                return None
            self.lanes[key] = self.open_lane(key)
        return self.lanes[key]

    def _admit(self) -> bool:
        """Admit the oldest waiting prompts that share a program; tell whether there were any."""
        while self.waiting and self.waiting[0].cancelled:
            self.waiting.popleft()
        if not self.waiting:
            return False
        first = self.waiting[0]
        lane = self.lane_of(first.lane)
        if lane is None or (_busy(lane) and not self.refill and not lane.filling):
            return False
        if lane.together == lane.rows and _busy(lane):  # prefill would replace all rows
            return False
        # the fewest free rows that are worth a prefill
        least = lane.together if self.batched and self.refill else 1
        room = min(lane.together, lane.free)
        if lane.free < least:
            return False
        chosen: list[Task] = []
        while self.waiting and len(chosen) < room:
            task = self.waiting[0]
            if task.cancelled:
                self.waiting.popleft()
            elif (task.lane, task.shape) == (first.lane, first.shape):
                chosen.append(self.waiting.popleft())
            else:
                break
        with self._alone(first.lane, chosen):
            lane.admit(chosen, first.shape)
            lane.filling = True
        return True

    @contextlib.contextmanager
    def _alone(self, key: Any, chosen: list[Task]) -> Iterator[None]:
        """Let an error end a lane and its prompts, not those of others."""
        try:
            yield
        except Exception as error:
            if self.failed is None:
                raise
            lane = self.lanes.pop(key)
            self.failed([*chosen, *(task for task in lane.tasks if task is not None)], error)

    def _decode(self, key: Any, lane: Lane) -> None:
        lane.filling = False
        taken = lane.rows - lane.free
        enough = min(lane.together, taken) if self.batched else 1
        early = self.refill and bool(self.waiting) and self.waiting[0].lane == key
        done = lane.decode(lane.free + enough if early else lane.rows, self.chunk)
        if done.size >= enough:
            for tasks, state in lane.take_out(np.asarray(done)):
                self.collect(tasks, state)


def _busy(lane: Lane) -> bool:
    return lane.free < lane.rows
