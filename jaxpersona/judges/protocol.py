"""The interface of judges: a judge scores items (replies) and yields one verdict for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from jaxpersona.brief import brief
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError

ROLE_SCALE = (0, 1, 2, 3)
TRAIT_SCALE = tuple(range(101))


@dataclasses.dataclass(frozen=True)
class Item:
    """A reply to be scored.

    Attributes:
      key: a string that identifies the reply within its role (`runs.rollouts.rollout_key`).
      role: the role that the reply should play; for a trait, the result of `rubric.of_trait`.
      question: the user's message.
      answer: the reply.
      system_prompt: the system prompt of the conversation, which only human judges use.
    """

    key: str
    role: Role
    question: str
    answer: str
    system_prompt: str = ""

    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict of a judge on one item.

    Attributes:
      key: the key of the item.
      score: an integer on the judge's scale; None if the judge could not decide or failed, or if it
        answered with the rubric's refusal word.
      expected: the expected score, for judges that compute probabilities; else None.
      mass: the total probability of all integers on the scale, for judges that compute
        probabilities; else None.
      refused: whether the reply refuses to answer, according to the judge.
      error: the reason why the judge failed on this item; None if it did not fail. Failed items
        are judged again in a later call.
      raw: the text of the judge's answer, or the most probable scores.
      cost: the cost of the verdict in USD; None if the judge is free or its cost is unknown.
    """

    key: str
    score: int | None = None
    expected: float | None = None
    mass: float | None = None
    refused: bool = False
    error: str | None = None
    raw: str = ""
    cost: float | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        """Replace lone surrogates in texts, which files cannot store, with U+FFFD."""
        for field in ("raw", "error"):
            text = getattr(self, field)
            if isinstance(text, str) and not text.isascii():
                valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                object.__setattr__(self, field, valid)


class Judge(Protocol):
    """The interface of a judge.

    A judge may also have the following optional attributes, which are False by default:

    - `reads_eval_prompt`: whether the judge needs the `eval_prompt` of every role.
    - `together`: whether the judge runs a model on the devices of the run. If true, all processes
      must call the judge for every role; if false, only the process that owns the role does.
    - `after`: whether the judge scores only after all rollouts are generated, for example because
      its model does not fit into memory together with the evaluated model.

    A judge may also have a method `prepare(items, tick)`, which is called once before the first
    call of `score` if `after` is true or the replies of an existing run are judged (`judge_run`):
    `items` is a function that returns the unjudged items of all roles of this process, and `tick`
    is a function without arguments that the judge must call at least once per second.

    A judge may have a method `begin()`, which is called before the first rollout is generated and
    raises an error if the judge cannot work, for example because another process uses its files.

    A judge whose verdicts can change, such as a human judge, may have a method
    `outdated(items, scores)`, where `scores` is a dict from key to stored score. It returns the
    keys of the items whose stored score is no longer valid. These items are judged again.

    Attributes:
      name: the identity of the judge in a run. Judges that can give different verdicts on the same
        item must have different names, so include in the name, for example, a digest of the rubric.
      scale: the allowed scores.

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
        """Yield one verdict per item, in any order.

        Raises:
          JudgeStopped: the judge cannot continue; all finished verdicts are yielded first.
        """
        ...


class JudgeStopped(UserError):
    """Raised if a judge cannot continue, for example because its budget is used up."""


def in_order(judge: Judge, items: Sequence[Item]) -> list[Verdict]:
    """Return a judge's verdicts in the order of the items.

    Raises:
      UserError: the judge does not give exactly one verdict per item, or gives a score outside its
        scale.
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
                            "which is unknown or already has a verdict; it must give one verdict "
                            "per item")
        found[place[verdict.key]] = verdict
    if len(found) != len(items) or len(place) != len(items):
        raise UserError(f"the judge {judge.name!r} gave {len(found)} verdicts on {len(items)} "
                        "items; it must give one verdict per item, and the items' keys must differ")
    return [found[i] for i in range(len(items))]


def check_verdict(judge: Judge, verdict: Verdict) -> None:
    """Check that a verdict's score is None or an integer on the judge's scale.

    Raises:
      UserError: the score is neither None nor an integer on the scale.
    """
    score = verdict.score
    if score is not None and (type(score) is not int or score not in judge.scale):
        raise UserError(f"the judge {judge.name!r} gave {verdict.key!r:.80} the score "
                        f"{score!r:.40}; it must be None or an integer from {judge.scale[0]} to "
                        f"{judge.scale[-1]}")
