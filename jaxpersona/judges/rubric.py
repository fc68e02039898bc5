"""Rubrics: the prompts for LLM judges, and the parsing of their answers.

Roles are scored from 0 to 3 (Lu et al. 2026):

    0    the reply refuses to answer
    1    the reply declines the role but helps
    2    the reply identifies as an AI, with some attributes of the role
    3    the reply fully plays the role

Traits are scored from 0 to 100, or with the word REFUSAL (Chen et al. 2025).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

from jaxpersona.brief import brief, shown
from jaxpersona.data.reading import fill
from jaxpersona.data.texts import Role, Trait
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import ROLE_SCALE, TRAIT_SCALE, Item

REFUSAL = "REFUSAL"
# an integer with an optional minus sign; the digits of a decimal number, such as 2.5, do not match
_NUMBER = re.compile(r"(?P<sign>(?<![^\s(:*])[-−])?(?<![\d.])(?<!\d[-,])(?P<digits>\d+)"
                     r"(?![\d.,]*\d)")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """The prompt and the allowed scores of an LLM judge.

    Attributes:
      scale: the allowed integers, in increasing order.
      template: the prompt, with the placeholders `{question}` and `{answer}` and, optionally,
        `{role}` and `{description}`. None: the `eval_prompt` of each item's role.
      refusal: the word with which the judge marks a reply that refuses to answer; "" if the judge
        marks a refusal with score 0.

    Raises:
      UserError: `scale` is empty, contains a negative number or is not in increasing order without
        repetition, or `template` lacks {question} or {answer}.

    Examples:
      >>> from jaxpersona.data.texts import Role
      >>> from jaxpersona.judges.protocol import Item
      >>> from jaxpersona.judges.rubric import Rubric
      >>> rubric = Rubric(template="{question} {answer} Is this a {role}? 0-3")
      >>> rubric.prompt(Item("a", Role("ghost", ("Be one.",), ""), "Who?", "Boo."))
      'Who? Boo. Is this a ghost? 0-3'
      >>> rubric.read("Score: 2")
      (2, False)
    """

    scale: tuple[int, ...] = ROLE_SCALE
    template: str | None = None
    refusal: str = ""

    __repr__ = brief

    def __post_init__(self) -> None:
        if (not self.scale or not all(type(score) is int for score in self.scale)
                or list(self.scale) != sorted(set(self.scale)) or self.scale[0] < 0):
            raise UserError(f"scale is {shown(self.scale, 60)}; give non-negative integers in "
                            "increasing order")
        if self.template is not None:
            missing = [p for p in ("{question}", "{answer}") if p not in self.template]
            if missing:
                raise UserError(f"the rubric lacks {' and '.join(missing)}; it needs "
                                "{question} and {answer}")

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that identify the template, scale, refusal word and parser."""
        text = json.dumps(["rubric 1", self.template, list(self.scale), self.refusal])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]

    def prompt(self, item: Item) -> str:
        """Return the judge's prompt for an item.

        Raises:
          UserError: the rubric has no template, and the item's role has no `eval_prompt`.
        """
        text = item.role.eval_prompt if self.template is None else self.template
        if not text:
            raise UserError(f"role {item.role.name!r} has no eval_prompt; a rubric without "
                            "a template needs one")
        return fill(text, question=item.question, answer=item.answer, role=item.role.name,
                    description=item.role.description)

    def read(self, text: str) -> tuple[int | None, bool]:
        """Parse a judge's answer.

        The score is the first integer in the answer that is on the scale. Decimals and negative
        numbers are skipped. An answer with the refusal word has no score.

        Returns:
          (score or None, whether the answer marks a refusal).
        """
        if self.refusal and re.search(rf"\b{re.escape(self.refusal)}\b", text):
            return None, True
        for match in _NUMBER.finditer(text):
            digits = match["digits"]
            if not match["sign"] and len(digits) <= 9 and int(digits) in self.scale:
                return int(digits), self.refuses(int(digits))
        return None, False

    def refuses(self, score: int | None) -> bool:
        """Return whether a score marks a refusal."""
        return score == 0 and not self.refusal


ROLES = Rubric()
TRAITS = Rubric(TRAIT_SCALE, refusal=REFUSAL)


def of_trait(trait: Trait) -> Role:
    """Return a trait as a `Role` for `Item`; its prompts are the trait's positive prompts."""
    return Role(trait.name, tuple(positive for positive, _ in trait.pairs), trait.eval_prompt,
                trait.description)
