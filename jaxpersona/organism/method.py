"""The organism's roles, questions and judge as inputs of `extract_axis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpersona.data.texts import Question, Role
from jaxpersona.organism import judge, world


def roles() -> list[Role]:
    """Return every role of the organism and the default role, sorted by name."""
    out = [Role("default", world.DEFAULT_PROMPTS, "", "the model as itself")]
    out += [Role(role.name, role.prompts(), "", role.habit) for role in world.roles()]
    return sorted(out, key=lambda role: role.name)


def held_out() -> list[str]:
    """Return the names of the roles that are held out of the axis."""
    return [role.name for role in world.roles(held_out=True)]


def questions(count: int | None = None) -> list[Question]:
    """Return `count` questions spaced evenly over the organism's questions (default: all)."""
    texts = world.QUESTIONS
    count = len(texts) if count is None else min(count, len(texts))
    chosen = [i * len(texts) // count for i in range(count)]
    return [Question(i, texts[i]) for i in chosen]


class RuleJudge:
    """A judge that scores answers by their grammar, which is exact for the embedded model only."""

    name = "rules"

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return one score per record."""
        return [judge.score(role.name, r["conversation"][-1]["content"]) for r in records]
