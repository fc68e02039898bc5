"""Judge rollouts, in a separate thread during generation or in the caller's thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Judge, check_verdict

Found = tuple[str, str, dict[str, Any], float]


class Judging:
    """Runs a judge on the rollouts of a run.

    The judge scores one role at a time in the caller's thread if its attribute `together` is True
    (it runs a model on the devices of the run), if its attribute `after` is True, or if the run has
    several processes. Otherwise the judge scores in its own thread while the caller generates.

    Attributes:
      judge: the judge.
      whole: whether the judge scores in the caller's thread, one role at a time (`now`).
      after: whether judging starts only after all rollouts are generated (see `Judge`).
    """

    def __init__(self, judge: Judge, *, alone: bool) -> None:
        """Start the judge's thread, unless the judge scores in the caller's thread.

        Args:
          judge: the judge.
          alone: whether the run has only this process.

        Raises:
          UserError: the judge cannot begin (`Judge`).
        """
        if (begin := getattr(judge, "begin", None)) is not None:
            begin()
        self.judge = judge
        self.after = bool(getattr(judge, "after", False))
        self.whole = not alone or self.after or bool(getattr(judge, "together", False))
        self._waiting: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Found | BaseException] = queue.SimpleQueue()
        self._left, self._stopped = 0, threading.Event()
        if not self.whole:
            threading.Thread(target=self._run, name="judge", daemon=True).start()

    @property
    def left(self) -> int:
        """The number of items sent with `put` whose verdicts `take` has not returned yet."""
        return self._left

    def prepare(self, items: Callable[[], Iterable[Item]], tick: Callable[[], None]) -> None:
        """Call the judge's method `prepare`, if it has one, with the items of all roles.

        Args:
          items: a function that returns the items.
          tick: a function that the judge calls at least once per second.
        """
        if (prepare := getattr(self.judge, "prepare", None)) is not None:
            prepare(items, tick)

    def put(self, items: Sequence[Item]) -> None:
        """Send items of one role to the judge's thread."""
        if items:
            self._left += len(items)
            self._waiting.put(list(items))

    def take(self, seconds: float = 0.0) -> list[Found]:
        """Return a list of the new verdicts of the judge's thread, in the form that `now` yields.

        Args:
          seconds: the maximum time in seconds to wait for the first verdict; 0: do not wait.

        Raises:
          UserError: the judge cannot continue, or gave an invalid verdict. If there are earlier
            verdicts, they are returned, and the next call raises the error.
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
                    self._done.put(one)  # the next call of `take` raises the error
                    return found
                raise one
            self._left -= 1
            found.append(one)

    def now(self, items: Sequence[Item]) -> Iterator[Found]:
        """Score items of one role in the caller's thread, and yield (role, key, verdict, cost).

        `role` is the role's name, `key` the rollout's key, `verdict` a dict of the other fields of
        `Verdict`, and `cost` the cost in USD.

        Raises:
          UserError: the judge cannot continue, gave a score outside its scale, or did not give
            exactly one verdict per item.
        """
        left = {item.key: item for item in items}
        for verdict in self.judge.score(list(items)) if items else ():
            check_verdict(self.judge, verdict)
            item = left.pop(verdict.key, None)
            if item is None:
                raise UserError(f"the judge {self.judge.name!r} gave a verdict on "
                                f"{verdict.key!r:.80}, which is unknown or already has a verdict; "
                                "it must give one verdict per item")
            value = dataclasses.asdict(verdict)
            cost = value.pop("cost") or 0.0
            yield item.role.name, value.pop("key"), value, cost
        if left:
            raise UserError(f"the judge {self.judge.name!r} gave no verdict on {len(left)} of "
                            f"{len(items)} replies of role {items[0].role.name!r}; it must give "
                            "one verdict per item")

    def close(self) -> None:
        """Stop the judge's thread after its current verdict, without waiting for the thread."""
        self._stopped.set()
        self._waiting.put([])

    def _run(self) -> None:
        """Score the items sent with `put` until `close` is called or the judge fails."""
        try:
            while not self._stopped.is_set():
                for found in self.now(self._waiting.get()):
                    self._done.put(found)
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # `take` raises it in the caller's thread
            self._done.put(error)
