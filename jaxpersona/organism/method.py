"""The organism's roles, questions and judge as inputs of `extract_axis`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxpersona.brief import line
from jaxpersona.data.texts import Question, Role
from jaxpersona.judges.protocol import ROLE_SCALE, Item, Verdict
from jaxpersona.organism import judge, world


def roles() -> list[Role]:
    """Return all roles of the organism, including the default role, sorted by name."""
    out = [Role("default", world.DEFAULT_PROMPTS, "", "the model as itself")]
    out += [Role(role.name, role.prompts(), "", role.habit) for role in world.roles()]
    return sorted(out, key=lambda role: role.name)


def held_out() -> list[str]:
    """Return the names of the roles that are held out of the axis."""
    return [role.name for role in world.roles(held_out=True)]


def questions(count: int | None = None) -> list[Question]:
    """Return at most `count` evenly spaced questions of the organism; all if `count` is None."""
    texts = world.QUESTIONS
    count = len(texts) if count is None else min(count, len(texts))
    chosen = [i * len(texts) // count for i in range(count)]
    return [Question(i, texts[i]) for i in chosen]


class RuleJudge:
    """A judge that scores answers by rules, which are exact only for the embedded model.

    Examples:
      >>> from jaxpersona.judges.protocol import Item
      >>> from jaxpersona.organism import method
      >>> void = next(role for role in method.roles() if role.name == "void")
      >>> [verdict] = method.RuleJudge().score([Item("a", void, "Who are you?", "Words.")])
      >>> print(verdict.score)
      None
    """

    name, scale = "rules", ROLE_SCALE

    def __repr__(self) -> str:
        return line("RuleJudge")

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item, with the score that `judge.score` returns."""
        for item in items:
            found = judge.score(item.role.name, item.answer)
            yield Verdict(item.key, found, refused=found == 0)
