"""A judge that reads the score from the next-token probabilities of the digits 0 to 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import Role
from jaxpersona.engine.scoring import next_logprobs
from jaxpersona.errors import UserError
from jaxpersona.judges.judges import asked

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

SCORES = (0, 1, 2, 3)
LEAST_MASS = 0.25  # minimum probability of the four digits; below it the score is None
_SPACES = ("", "Ġ", "▁")  # a digit token may begin with a space, encoded as Ġ or ▁


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The judge's probabilities for n replies.

    Attributes:
      probabilities: [n, 4], of the scores 0 to 3, renormalized to a sum of 1.
      mass: [n], the total probability of the four digits as the next token.
    """

    __repr__ = brief

    probabilities: np.ndarray
    mass: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """[n], Σ s·p(s): the expected score."""
        return self.probabilities @ np.arange(len(SCORES))

    @property
    def scores(self) -> list[int | None]:
        """The most probable score of each reply; None where `mass` is below `LEAST_MASS`."""
        best = self.probabilities.argmax(-1)
        return [int(s) if m >= LEAST_MASS else None for s, m in zip(best, self.mass, strict=True)]


class DigitJudge:
    """Score replies with a model's probabilities of "0", "1", "2" and "3" after the judge's prompt.

    Scoring a reply takes one forward pass and generates no tokens (Chen et al. 2025 score traits
    this way). The judge may be the evaluated model or another one.

    Args:
      model: the judging model; it needs a tokenizer.
      batch_tokens: the number of tokens per batch (`engine.scoring.next_logprobs`).

    Raises:
      UserError: the model has no tokenizer, or its tokenizer has no token for a digit.

    Example:
      >>> import jaxpersona as jp
      >>> from jaxpersona.judges.digits import DigitJudge
      >>> DigitJudge(jp.load("mini")).settings["model"]
      'mini'
    """

    name, together, reads_eval_prompt = "digits", True, True

    def __init__(self, model: Model, *, batch_tokens: int | None = None) -> None:
        if model.tokenizer is None:
            raise UserError(f"{model.name} has no tokenizer; a judge needs one")
        self.model, self.batch_tokens = model, batch_tokens
        self.settings = {"model": model.name, "fingerprint": model.fingerprint,
                         "batch_tokens": batch_tokens}
        vocabulary = model.tokenizer.get_vocab()
        self._ids = [[vocabulary[token] for space in _SPACES
                      if (token := f"{space}{score}") in vocabulary] for score in SCORES]
        bare = [score for score, ids in zip(SCORES, self._ids, strict=True) if not ids]
        if bare:
            raise UserError(f"the tokenizer of {model.name} has no token for the digit {bare[0]}; "
                            "use another judge")

    def verdicts(self, role: Role, records: Sequence[Mapping[str, Any]]) -> Verdicts:
        """Return the score probabilities of a role's rollouts (see `rollouts.play`).

        Raises:
          UserError: the role has no `eval_prompt`, or a prompt fills the judge's context.
        """
        prompts = asked(self, role, records)
        if not prompts:
            return Verdicts(np.zeros((0, len(SCORES))), np.zeros(0))
        by_token = np.exp(next_logprobs(self.model, prompts, [i for ids in self._ids for i in ids],
                                        batch_tokens=self.batch_tokens).astype(np.float64))
        ends = np.cumsum([len(ids) for ids in self._ids])[:-1]
        by_digit = np.stack([p.sum(-1) for p in np.split(by_token, ends, axis=-1)], -1)
        mass = by_digit.sum(-1)
        return Verdicts(by_digit / np.maximum(mass, 1e-300)[:, None], mass)

    def __call__(self, role: Role, records: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Return the most probable score of each record, or None (see `Verdicts.scores`)."""
        return self.verdicts(role, records).scores
