"""The organism as the method sees it: roles, questions and a judge in the method's own types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpersona.data.texts import Question, Role
from jaxpersona.organism import judge, world


def roles() -> list[Role]:
    """Return every role of the organism's world and the default, as the method reads them."""
    found = [Role("default", world.DEFAULT_PROMPTS, "", "the model as itself")]
    found += [Role(role.name, role.prompts(), "", role.habit) for role in world.roles()]
    return sorted(found, key=lambda role: role.name)


def held_out() -> list[str]:
    """Return the roles that never enter an axis."""
    return [role.name for role in world.roles(held_out=True)]


def questions(count: int | None = None) -> list[Question]:
    """Return the first `count` questions of an even spread over the world's, all by default."""
    texts = world.QUESTIONS
    count = len(texts) if count is None else min(count, len(texts))
    chosen = [i * len(texts) // count for i in range(count)]
    return [Question(i, texts[i]) for i in chosen]


class RuleJudge:
    """Score answers by the grammar they were made from; exact for this model, for no other."""

    name = "rules"

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return the score of each record's reply."""
        return [judge.score(role.name, r["conversation"][-1]["content"]) for r in records]
