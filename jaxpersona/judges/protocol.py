"""The protocol of judges: items in, verdicts out, one for each item, in any order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError

ROLE_SCALE = (0, 1, 2, 3)
TRAIT_SCALE = tuple(range(101))


@dataclasses.dataclass(frozen=True)
class Item:
    """A reply to be scored.

    Attributes:
      key: identifies the reply among those of its role (`runs.run.rollout_key`).
      role: the role that the reply should play; for a trait, a role with the trait's name and
        `eval_prompt` (`rubric.of_trait`).
      question: the user's message.
      answer: the reply.
      system_prompt: the system prompt under which the model replied; only people see it.
    """

    key: str
    role: Role
    question: str
    answer: str
    system_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says about one item.

    Attributes:
      key: the key of the item.
      score: an integer of the judge's scale; None if the judge could not decide, or did not score
        the item (`error`).
      expected: the expected score, for judges that read probabilities.
      mass: the total probability of the scale's integers, for judges that read probabilities.
      refused: whether the judge says that the reply refuses to answer.
      error: why the item was not scored; it is to be given to the judge again. None if it was.
      raw: the judge's own words.
      cost: the cost of the verdict in USD; None if the judge costs nothing or has no price.
    """

    key: str
    score: int | None = None
    expected: float | None = None
    mass: float | None = None
    refused: bool = False
    error: str | None = None
    raw: str = ""
    cost: float | None = None


class Judge(Protocol):
    """Interface of a judge.

    Two optional attributes are read with `getattr`: `reads_eval_prompt`, True if every role needs
    an `eval_prompt`, and `together`, True if the judge runs a model that all processes of a run
    share, so that all of them must call it; other judges are called by one process.

    Attributes:
      name: identifies the judge in a run: its kind, its model or fingerprint, and a digest of its
        rubric. Equal names mean that equal items get verdicts of the same judge.
      scale: the integers that `score` may give.

    Examples:
      >>> from jaxpersona.data.texts import Role
      >>> from jaxpersona.judges.judges import NoJudge
      >>> from jaxpersona.judges.protocol import Item
      >>> ghost = Role("ghost", ("You are a ghost.",), "")
      >>> for verdict in NoJudge().score([Item("a", ghost, "Who are you?", "Boo.")]):
      ...     print(verdict.key, verdict.score)
      a 3
    """

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> tuple[int, ...]: ...

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item, as they complete, in any order.

        Raises:
          JudgeStopped: the judge cannot go on; verdicts that were finished were yielded before.
        """
        ...


class JudgeStopped(UserError):
    """Error of a judge that cannot go on, such as at the end of its budget."""


def in_order(judge: Judge, items: Sequence[Item]) -> list[Verdict]:
    """Return a judge's verdicts in the order of the items.

    Raises:
      UserError: the judge does not give exactly one verdict per item, or a score outside its scale.
    """
    return arranged(judge, items, judge.score(items))


def arranged(judge: Judge, items: Sequence[Item], verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return verdicts in the order of their items.

    Raises:
      UserError: there is not exactly one verdict per item, or a score is outside the judge's scale.
    """
    place = {item.key: i for i, item in enumerate(items)}
    found: dict[int, Verdict] = {}
    for verdict in verdicts:
        check_verdict(judge, verdict)
        if verdict.key not in place or place[verdict.key] in found:
            raise UserError(f"the judge {judge.name!r} gave a verdict on {verdict.key!r:.80}, "
                            "which is unknown or has one; it must give one per item")
        found[place[verdict.key]] = verdict
    if len(found) != len(items) or len(place) != len(items):
        raise UserError(f"the judge {judge.name!r} gave {len(found)} verdicts on {len(items)} "
                        "items; it must give one per item, and their keys must differ")
    return [found[i] for i in range(len(items))]


def check_verdict(judge: Judge, verdict: Verdict) -> None:
    """Check that a verdict's score is None or an integer of the judge's scale.

    Raises:
      UserError: it is not.
    """
    score = verdict.score
    if score is not None and (type(score) is not int or score not in judge.scale):
        raise UserError(f"the judge {judge.name!r} gave {verdict.key!r:.80} the score "
                        f"{score!r:.40}; it must be None or an integer of {judge.scale[0]} to "
                        f"{judge.scale[-1]}")
