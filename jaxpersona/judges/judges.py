"""Judges: score how fully each reply plays its role, from 0 to 3, or None if undecidable.

0: refuses. 1: declines the role but helps. 2: identifies as an AI with some attributes of the
role. 3: fully plays the role (Lu et al. 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxpersona.data.reading import fill
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


class Judge(Protocol):
    """Interface of a judge: a callable that scores a role's rollouts.

    Attributes:
      name: recorded in the run's manifest.
      settings: optional dict of JSON values that the scores depend on, also recorded.
      reads_eval_prompt: optional; True if every role needs an `eval_prompt`.
      together: optional; True if the judge runs the model, so that all processes of a run must
        call it. Otherwise only the process that owns the role's files calls it.
    """

    name: str

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return one score per record (see `rollouts.play`)."""
        ...


class NoJudge:
    """A judge that gives every rollout score 3 without reading it."""

    name = "none"

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return 3 for every record."""
        return [3] * len(records)


class SelfJudge:
    """A judge that prompts the evaluated model with a role's `eval_prompt` and decodes greedily."""

    name, together, reads_eval_prompt = "self", True, True

    def __init__(self, model: Model, *, batch_size: int = 32) -> None:
        self.model, self.batch_size = model, batch_size
        self.settings = {"batch_size": batch_size}

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return the first integer 0–3 in each verdict of at most 10 tokens, or None."""
        from jaxpersona.engine.generate import generate

        verdicts = generate(self.model, asked(self, role, records), max_new_tokens=10,
                            batch_size=self.batch_size, on_nonfinite="raise")
        return [read_score(text) for text in verdicts.text]


def asked(judge: Judge, role: Role, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the judge's prompt for each record of a role.

    Raises:
      UserError: the role has no `eval_prompt`.
    """
    if not role.eval_prompt:
        raise UserError(f"role {role.name!r} has no eval_prompt; the judge {judge.name!r} needs "
                        "one")
    return [fill(role.eval_prompt, question=record["question"],
                 answer=record["conversation"][-1]["content"]) for record in records]


def read_score(text: str) -> int | None:
    """Return the first standalone integer 0–3 in a judge's reply, or None."""
    for digits in re.findall(r"(?<![\d.])\d+(?![\d.]*\d)", text):
        if int(digits) <= 3:
            return int(digits)
    return None
