"""Judging while a run generates: items go to the judge as rollouts finish, verdicts come back."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item, Verdict
from jaxpersona.runs.seal import digest

Found = tuple[str, str, dict[str, Any], float]
_BATCH = 1024  # items that a judge gets at once at most


def judge_of(judge: Any) -> Any:
    """Return a judge with the protocol of `judges.protocol`, also for a callable of a role."""
    return judge if hasattr(judge, "score") else _Called(judge)


class _Called:
    """A judge that is called with a role and all of its rollouts."""

    scale, whole_roles = (0, 1, 2, 3), True

    def __init__(self, judge: Any) -> None:
        self._judge = judge
        settings = dict(getattr(judge, "settings", {}))
        self.name = f"{judge.name} {digest(settings)}" if settings else judge.name
        self.together = getattr(judge, "together", False)
        self.reads_eval_prompt = getattr(judge, "reads_eval_prompt", False)

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item; all items are of one role."""
        if not items:
            return
        records = [{"question": item.question, "conversation": [
            {"role": "user", "content": item.question},
            {"role": "assistant", "content": item.answer}]} for item in items]
        scores = self._judge(items[0].role, records)
        if len(scores) != len(items):
            raise UserError(f"the judge {self.name!r} returned {len(scores)} scores for "
                            f"{len(items)} rollouts of role {items[0].role.name!r}; it must return "
                            "one per rollout")
        for item, score in zip(items, scores, strict=True):
            yield Verdict(item.key, score)


def items_of(role: Role, records: Mapping[str, Mapping[str, Any]],
             keys: Sequence[str]) -> list[Item]:
    """Return the items of some of a role's rollouts; their keys contain the role's name."""
    found = []
    for key in keys:
        talk = records[key]["conversation"]
        # only the first reply is judged, as in the published code
        answer = next(m["content"] for m in talk if m["role"] == "assistant")
        found.append(Item(f"{role.name}/{key}", role, records[key]["question"], answer,
                          records[key]["system_prompt"]))
    return found


class Judging:
    """A judge's work on a run's rollouts.

    A judge that runs a model on the devices of the run (`together`), or wants whole roles, scores
    in the thread of the caller; others score in a thread of their own while the caller generates.

    Attributes:
      whole: whether the judge is to get the items of whole roles (`now`).
    """

    def __init__(self, judge: Any, *, alone: bool) -> None:
        """Start the thread, if the judge gets one.

        Args:
          judge: the judge, with the protocol of `judges.protocol`.
          alone: whether this is the only process of the run.
        """
        self.judge = judge
        self.whole = not alone or getattr(judge, "together", False) or getattr(
            judge, "whole_roles", False)
        self._waiting: queue.Queue[list[Item] | None] = queue.Queue()
        self._done: queue.Queue[Found | BaseException] = queue.Queue()
        self._left, self._stopped = 0, threading.Event()
        self._thread = None
        if not self.whole:
            self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
            self._thread.start()

    @property
    def left(self) -> int:
        """The number of items without a verdict so far."""
        return self._left

    def put(self, items: Sequence[Item]) -> None:
        """Give items to the judge's thread."""
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
        """Score items in the caller's thread, and yield the verdicts as they arrive.

        Raises:
          UserError: the judge cannot go on, gave a wrong score, or not one verdict per item.
        """
        left = {item.key: item for item in items}
        for verdict in self.judge.score(list(items)) if items else ():
            item = left.pop(verdict.key, None)
            if item is None:
                raise UserError(f"the judge {self.judge.name!r} gave a verdict on "
                                f"{verdict.key!r:.80}, which is unknown or has one; it must give "
                                "one per item")
            yield self._found(item, verdict)
        if left:
            raise UserError(f"the judge {self.judge.name!r} gave no verdict on {len(left)} of "
                            f"{len(items)} rollouts; it must give one per item")

    def close(self) -> None:
        """Let the thread end after its current call, without waiting for it."""
        self._stopped.set()
        self._waiting.put(None)

    def _run(self) -> None:
        """Score what is waiting, in batches, until `close`."""
        while not self._stopped.is_set():
            batch = self._waiting.get() or []
            while batch and len(batch) < _BATCH:
                try:
                    batch += self._waiting.get_nowait() or []
                except queue.Empty:
                    break
            try:
                for found in self.now(batch):
                    self._done.put(found)
                    if self._stopped.is_set():
                        return
            except BaseException as error:  # raised in the caller's thread by `take`
                self._done.put(error)
                return

    def _found(self, item: Item, verdict: Verdict) -> Found:
        score = verdict.score
        if score is not None and (type(score) is not int or score not in self.judge.scale):
            raise UserError(f"the judge {self.judge.name!r} gave a rollout of role "
                            f"{item.role.name!r} the score {score!r:.80}; scores must be "
                            f"{', '.join(map(str, self.judge.scale[:4]))} or None")
        value = dataclasses.asdict(verdict)
        key, cost = value.pop("key"), value.pop("cost") or 0.0
        return item.role.name, key.removeprefix(f"{item.role.name}/"), value, cost
