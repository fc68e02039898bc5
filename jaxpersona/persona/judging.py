"""Judging while a run generates: items go to the judge as rollouts finish, verdicts come back."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Judge, check_verdict

Found = tuple[str, str, dict[str, Any], float]


class Judging:
    """A judge's work on a run's rollouts.

    A judge that runs a model on the devices of the run (`together`) scores in the thread of the
    caller, a role at a time; others score in a thread of their own while the caller generates.

    Attributes:
      whole: whether the judge is to get whole roles, with `now`.
      after: whether the judge loads its model at the first use, in place of the run's model.
    """

    def __init__(self, judge: Judge, *, alone: bool) -> None:
        """Start the thread, if the judge gets one.

        Args:
          judge: the judge.
          alone: whether this is the only process of the run.
        """
        self.judge = judge
        self.whole = not alone or bool(getattr(judge, "together", False))
        self.after = bool(getattr(judge, "after", False))
        self._waiting: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Found | BaseException] = queue.SimpleQueue()
        self._left, self._stopped = 0, threading.Event()
        if not self.whole:
            threading.Thread(target=self._run, name="judge", daemon=True).start()

    @property
    def left(self) -> int:
        """The number of items without a verdict so far."""
        return self._left

    def put(self, items: Sequence[Item]) -> None:
        """Give items of one role to the judge's thread."""
        if items:
            self._left += len(items)
            self._waiting.put(list(items))

    def take(self, seconds: float = 0.0) -> list[Found]:
        """Return the verdicts that have arrived: (role, key, verdict, cost).

        Args:
          seconds: how long to wait for the first, if there are items left.

        Raises:
          UserError: the judge cannot go on, or gave a wrong score. Verdicts that arrived before are
            returned first.
        """
        found: list[Found] = []
        while True:
            try:
                wait = seconds and not found and self._left
                one = self._done.get(timeout=seconds) if wait else self._done.get_nowait()
            except queue.Empty:
                return found
            if isinstance(one, BaseException):
                if found:
                    self._done.put(one)  # raised by the next call
                    return found
                raise one
            self._left -= 1
            found.append(one)

    def now(self, items: Sequence[Item]) -> Iterator[Found]:
        """Score items of one role, and yield the verdicts as they arrive.

        Raises:
          UserError: the judge cannot go on, gave a wrong score, or not one verdict per item.
        """
        left = {item.key: item for item in items}
        for verdict in self.judge.score(list(items)) if items else ():
            check_verdict(self.judge, verdict)
            item = left.pop(verdict.key, None)
            if item is None:
                raise UserError(f"the judge {self.judge.name!r} gave a verdict on "
                                f"{verdict.key!r:.80}, which is unknown or has one; it must give "
                                "one per item")
            value = dataclasses.asdict(verdict)
            cost = value.pop("cost") or 0.0
            yield item.role.name, value.pop("key"), value, cost
        if left:
            raise UserError(f"the judge {self.judge.name!r} gave no verdict on {len(left)} of "
                            f"{len(items)} replies of role {items[0].role.name!r}; it must give "
                            "one per item")

    def close(self) -> None:
        """Let the thread end after its current verdict, without waiting for it."""
        self._stopped.set()
        self._waiting.put([])

    def _run(self) -> None:
        """Score what is waiting, until `close`."""
        try:
            while not self._stopped.is_set():
                for found in self.now(self._waiting.get()):
                    self._done.put(found)
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # raised in the caller's thread by `take`
            self._done.put(error)
