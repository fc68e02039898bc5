"""Rollouts: replies to every pair of prompt and question of a role, and their order and names.

The order of a role's rollouts is that of (question id, prompt, sample). Further questions with
higher ids therefore come after those that a run contains already.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxpersona.captures import capture
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.errors import UserError
from jaxpersona.interventions.where import response
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

MAX_SAMPLES = 100_000  # Lu et al. 2026 use 1; the texts of a role's rollouts are in memory at once
MAX_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of rollouts.

    The defaults of temperature, top_p, max_new_tokens and samples are those of Lu et al. 2026.

    Attributes:
      samples: rollouts per prompt and question.
      batch_size: the number of batch rows B. A run uses one B throughout, as results depend on it.
      share_prefix: whether the tokens of a system prompt are computed once for all its questions.
        Rounding then differs from that of single prompts.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    samples: int = 1
    batch_size: int = 32
    seed: int = 0
    share_prefix: bool = False

    def __post_init__(self) -> None:
        for field in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be positive")
        if self.samples > MAX_SAMPLES:
            raise UserError(f"samples is {self.samples}; the limit is {MAX_SAMPLES} per prompt "
                            "and question: reduce it")
        if self.batch_size > MAX_ROWS:
            raise UserError(f"batch_size is {self.batch_size}; the limit is {MAX_ROWS} rows: "
                            "reduce it")


def generation(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `generate` and of `engine.stream.Stream` that a run uses."""
    return {"capture": capture.mean(response), "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
            "batch_size": settings.batch_size, "share_prefix": settings.share_prefix}


def planned(role: Role, questions: Sequence[Question], settings: Settings,
            ) -> Iterator[dict[str, Any]]:
    """Yield the record of each of a role's rollouts, without its reply, in their order.

    A record has the fields of the published code (system_prompt, prompt_index, question_index,
    question, conversation, label) and sample.
    """
    label = "default" if role.name == DEFAULT else "pos"
    for question in sorted(questions, key=lambda question: question.id):
        for index, prompt in enumerate(role.prompts):
            for sample in range(settings.samples):
                yield {"system_prompt": prompt, "prompt_index": index,
                       "question_index": question.id, "question": question.text,
                       "label": label, "sample": sample,
                       "conversation": opening(prompt, question.text)}


def keys_of(role: Role, questions: Sequence[Question], settings: Settings) -> list[str]:
    """Return the keys of a role's rollouts (`rollout_key`), in their order."""
    return [rollout_key(record) for record in planned(role, questions, settings)]


def rollout_key(record: Mapping[str, Any]) -> str:
    """Return a rollout's key within its role: label, prompt, question and, if not 0, sample."""
    key = f"{record['label']}_p{record['prompt_index']}_q{record['question_index']}"
    return f"{key}_s{record['sample']}" if record.get("sample") else key


def place_of(record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a key that sorts a role's rollouts into their order."""
    return record["question_index"], record["prompt_index"], record.get("sample", 0)


def place_of_key(key: str) -> tuple[int, int, int]:
    """Return `place_of` a rollout from its key."""
    found = re.search(r"_p(\d+)_q(\d+)(?:_s(\d+))?$", key)
    assert found is not None, key
    prompt, question, sample = (int(x or 0) for x in found.groups())
    return question, prompt, sample


def draw_id(model: Model, role: str, record: Mapping[str, Any]) -> int:
    """Return the id of a rollout's random draws, which depends on the model and on the rollout."""
    key = f"{model.fingerprint}/{role}/{record['prompt_index']}/{record['question_index']}"
    return chat.row_id([], record["sample"], key)


def opening(prompt: str, question: str) -> list[dict[str, str]]:
    """Return the conversation before the reply; an empty prompt adds no system message."""
    system = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": question}]
