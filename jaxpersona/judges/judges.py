"""Two simple judges: `NoJudge` gives a fixed score, and `SelfJudge` prompts the evaluated model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxpersona.brief import line, quoted
from jaxpersona.judges.protocol import ROLE_SCALE, Item, Verdict
from jaxpersona.judges.rubric import ROLES, Rubric

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


class NoJudge:
    """A judge that gives every reply score 3 without reading it."""

    name, scale = "none", ROLE_SCALE

    def __repr__(self) -> str:
        return line("NoJudge")

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield a verdict with score 3 for every item."""
        for item in items:
            yield Verdict(item.key, 3)


class SelfJudge:
    """A judge that prompts the evaluated model with the rubric and decodes greedily.

    Args:
      model: the judging model, normally the evaluated model.
      batch_size: the number of replies to score per batch.
      rubric: the prompt and the scale; default: each role's `eval_prompt`, scores 0 to 3.
    """

    together = True

    def __init__(self, model: Model, *, batch_size: int = 32, rubric: Rubric = ROLES) -> None:
        self.model, self.batch_size, self.rubric = model, batch_size, rubric
        self.scale, self.reads_eval_prompt = rubric.scale, rubric.template is None
        self.name = f"self {model.fingerprint} rubric {rubric.digest} rows {batch_size}"

    def __repr__(self) -> str:
        return line("SelfJudge", quoted(self.model.name), f"batch_size={self.batch_size}",
                    f"rubric {self.rubric.digest}")

    def score(self, items: Sequence[Item]) -> Iterator[Verdict]:
        """Yield one verdict per item; `Rubric.read` parses at most 10 generated tokens per item.

        Raises:
          UserError: the rubric has no template and a role has no `eval_prompt`, or activations are
            not finite.
        """
        from jaxpersona.engine.generate import generate

        if not items:
            return
        said = generate(self.model, [self.rubric.prompt(item) for item in items],
                        max_new_tokens=10, batch_size=self.batch_size, on_nonfinite="raise")
        for item, text in zip(items, said.text, strict=True):
            score, refused = self.rubric.read(text)
            yield Verdict(item.key, score, refused=refused, raw=text)
