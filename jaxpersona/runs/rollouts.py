"""Rollouts: replies to every pair of prompt and question of a role, with their response means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.captures import capture
from jaxpersona.data.texts import Question, Role, all_of
from jaxpersona.engine.generate import generate
from jaxpersona.errors import UserError
from jaxpersona.interventions.where import response
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Progress = Callable[[int, int, int], None]
MAX_SAMPLES = 100_000  # Lu et al. 2026 use 1; all rollouts of a role are in memory at once
MAX_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of rollouts.

    The defaults of temperature, top_p, max_new_tokens and samples are those of Lu et al. 2026.

    Attributes:
      samples: rollouts per prompt and question.
      batch_size: the number of batch rows B. A run uses one B throughout, as results depend on it.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    samples: int = 1
    batch_size: int = 32
    seed: int = 0

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


def play(
    model: Model,
    roles: Sequence[Role],
    questions: Sequence[Question],
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> dict[str, tuple[list[dict[str, Any]], np.ndarray]]:
    """Generate the rollouts of several roles in one `generate` call.

    Grouping roles does not change results: each rollout's random draws depend only on the seed and
    a hash of its model, role, prompt, question and sample.

    Returns:
      role name → (records, response means [n, L, D] float32). A record has the fields
      system_prompt, prompt_index, question_index, question, conversation, label and sample.

    Raises:
      UserError: activations are not finite.
    """
    roles, questions = all_of(Role, roles, "roles"), all_of(Question, questions, "questions")
    records, ids = prompts_of(model, roles, questions, settings)
    out = generate(
        model, [record["conversation"] for _, record in records], ids=ids, progress=progress,
        on_nonfinite="raise", **generation(settings),
    )
    found: dict[str, tuple[list[dict[str, Any]], np.ndarray]] = {}
    for role in roles:
        mine = [i for i, (name, _) in enumerate(records) if name == role.name]
        kept = []
        for i in mine:
            reply = {"role": "assistant", "content": out.text[i]}
            record = records[i][1]
            kept.append(record | {"conversation": [*record["conversation"], reply]})
        found[role.name] = (kept, out.captured["mean"][mine])
    return found


def generation(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `generate` that a run uses."""
    return {"capture": capture.mean(response), "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
            "batch_size": settings.batch_size}


def prompts_of(model: Model, roles: Sequence[Role], questions: Sequence[Question],
               settings: Settings) -> tuple[list[tuple[str, dict[str, Any]]], list[int]]:
    """Return (role name, record without a reply) of every rollout, and the ids of their draws."""
    records: list[tuple[str, dict[str, Any]]] = []
    ids: list[int] = []
    for role in roles:
        label = "default" if role.name == "default" else "pos"
        for prompt_index, prompt in enumerate(role.prompts):
            for question in questions:
                for sample in range(settings.samples):
                    key = f"{model.fingerprint}/{role.name}/{prompt_index}/{question.id}"
                    ids.append(chat.row_id([], sample, key))
                    records.append((role.name, {
                        "system_prompt": prompt, "prompt_index": prompt_index,
                        "question_index": question.id, "question": question.text,
                        "label": label, "sample": sample,
                        "conversation": opening(prompt, question.text),
                    }))
    return records, ids


def opening(prompt: str, question: str) -> list[dict[str, str]]:
    """Return the conversation before the reply; an empty prompt adds no system message."""
    system = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": question}]
