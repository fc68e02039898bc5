"""Rollouts: a role's replies to every combination of system prompt and question.

The rollouts of a role are sorted by (question id, prompt index, sample). Rollouts of new questions
with higher ids therefore come after the existing rollouts.
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

# maximum number of samples per prompt and question, because all texts of a role must fit in memory
MAX_SAMPLES = 100_000
MAX_ROWS = 65_536
_MAX_INDEX = 1 << 63  # exclusive upper bound of the indices in a stored rollout


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of rollouts.

    The defaults of `temperature`, `top_p`, `max_new_tokens` and `samples` are from Lu et al. 2026.

    Attributes:
      temperature, top_p, max_new_tokens, seed: as for `generate`.
      samples: the number of rollouts per prompt and question.
      batch_size: the number of batch rows. It cannot change within a run, because the rounding of
        results depends on it.
      share_prefix: whether to compute the KV cache of a system prompt once for all questions.
        Sharing changes the rounding of the results.

    Raises:
      UserError: `max_new_tokens`, `samples` or `batch_size` is less than 1, `samples` exceeds
        `MAX_SAMPLES`, or `batch_size` exceeds `MAX_ROWS`.
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
    """Return the keyword arguments with which a run creates its `engine.stream.Stream`."""
    return {"capture": capture.mean(response), "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
            "batch_size": settings.batch_size, "share_prefix": settings.share_prefix}


def planned(role: Role, questions: Sequence[Question], settings: Settings,
            ) -> Iterator[dict[str, Any]]:
    """Yield one record per rollout of a role, without the reply, in the order of the rollouts.

    A record has the field `sample` and the fields that the published code of Lu et al. 2026 writes:
    system_prompt, prompt_index, question_index, question, conversation and label.
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
    """Return the keys (`rollout_key`) of a role's rollouts, in the order of the rollouts."""
    return [rollout_key(record) for record in planned(role, questions, settings)]


def rollout_key(record: Mapping[str, Any]) -> str:
    """Return the key that identifies a rollout within its role.

    The key consists of the label, the prompt and question indices, and the sample if it is not 0.
    """
    key = f"{record['label']}_p{record['prompt_index']}_q{record['question_index']}"
    return f"{key}_s{record['sample']}" if record.get("sample") else key


def place_of(record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the sort key of a rollout: question id, prompt index, sample."""
    return record["question_index"], record["prompt_index"], record.get("sample", 0)


def place_of_key(key: str) -> tuple[int, int, int]:
    """Return `place_of` for the rollout whose `rollout_key` is `key`."""
    found = re.search(r"_p(\d+)_q(\d+)(?:_s(\d+))?$", key)
    assert found is not None, key
    prompt, question, sample = (int(x or 0) for x in found.groups())
    return question, prompt, sample


def is_rollout(value: Any) -> bool:
    """Return whether a JSON value has the form of a stored rollout with its reply.

    `label` must be "default" or "pos", `system_prompt` and `question` strings, the two indices and
    `sample` (optional) nonnegative integers below `_MAX_INDEX`, `reply_ids` (optional) a list of
    token ids, and `conversation` a list of messages that ends with a reply.
    """
    if not isinstance(value, dict) or value.get("label") not in (DEFAULT, "pos"):
        return False
    numbers = [value.get("prompt_index"), value.get("question_index"), value.get("sample", 0)]
    ids, talk = value.get("reply_ids", []), value.get("conversation")
    return (all(isinstance(value.get(field), str) for field in ("system_prompt", "question"))
            and all(type(n) is int and 0 <= n < _MAX_INDEX for n in numbers)
            and isinstance(ids, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in ids)
            and isinstance(talk, list) and len(talk) > 0
            and all(isinstance(m, dict) and set(m) == {"role", "content"}
                    and all(isinstance(x, str) for x in m.values()) for m in talk)
            and talk[-1]["role"] == "assistant")


def draw_id(model: Model, role: str, record: Mapping[str, Any]) -> int:
    """Return the row id that, with the seed, determines the random draws of a rollout."""
    key = f"{model.fingerprint}/{role}/{record['prompt_index']}/{record['question_index']}"
    return chat.row_id([], record["sample"], key)


def opening(prompt: str, question: str) -> list[dict[str, str]]:
    """Return the messages before the reply, without a system message if `prompt` is empty."""
    system = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": question}]
