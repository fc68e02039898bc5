"""Judges: how fully each answer plays its role, 0 to 3, or None where that cannot be said.

0 refuses · 1 says it cannot be the role but helps · 2 identifies as an AI, some attributes of the
role · 3 fully plays the role (Lu et al. 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxpersona.data.reading import fill
from jaxpersona.data.texts import Role

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


class Judge(Protocol):
    """Score a role's rollouts; `name` is kept in the run, as is `settings` where a judge has it.

    `settings` is a table of JSON values on which the scores depend. A judge that runs the model
    itself says so by `together = True`: then all processes of a run call it together, else only the
    one that keeps the role's files.
    """

    name: str

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return one score for each record (`rollouts.play`)."""
        ...


class NoJudge:
    """Take every answer for one that fully plays its role, without looking."""

    name = "none"

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return 3 for every record."""
        return [3] * len(records)


class SelfJudge:
    """Ask the model itself, through each role's own `eval_prompt`, greedily."""

    name, together = "self", True

    def __init__(self, model: Model, *, batch_size: int = 32) -> None:
        self.model, self.batch_size = model, batch_size
        self.settings = {"batch_size": batch_size}

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return the first integer 0–3 of each verdict of at most 10 tokens, else None."""
        from jaxpersona.engine.generate import generate

        if not role.eval_prompt:
            raise ValueError(f"role {role.name!r} has no eval_prompt; the judge 'self' needs one")
        asked = [
            fill(role.eval_prompt, question=record["question"],
                 answer=record["conversation"][-1]["content"])
            for record in records
        ]
        said = generate(self.model, asked, max_new_tokens=10, batch_size=self.batch_size,
                        on_nonfinite="raise")
        return [read_score(text) for text in said.text]


def read_score(text: str) -> int | None:
    """Return the first integer 0–3 that stands alone in a judge's reply, or None."""
    for found in re.findall(r"(?<![\d.])\d+(?![\d.]*\d)", text):
        if int(found) <= 3:
            return int(found)
    return None
