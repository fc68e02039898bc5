"""Read a run's replies and scores, read scores from a CSV file, and draw samples of replies."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.data.texts import DEFAULT, Role
from jaxpersona.errors import UserError
from jaxpersona.judges.human import read_rows, score_of
from jaxpersona.judges.protocol import ROLE_SCALE, Item
from jaxpersona.runs.closing import Outdated
from jaxpersona.runs.rollouts import rollout_key
from jaxpersona.runs.run import Run


def items_of(role: Role, records: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Return a role's rollouts as items, in the given order.

    Each item contains only the first reply of the conversation, as in Lu et al. 2026.
    """
    found = []
    for record in records:
        reply = next((m["content"] for m in record["conversation"] if m["role"] == "assistant"), "")
        found.append(Item(rollout_key(record), role, record["question"], reply,
                          record["system_prompt"]))
    return found


def outdated_of(judge: object, role: Role) -> Outdated | None:
    """Return the argument `outdated` of `closing.state_of` for a judge and a role."""
    found = getattr(judge, "outdated", None)
    if found is None or role.name == DEFAULT:
        return None
    return lambda records, scores: found(items_of(role, records), scores)


def scores_of(source: str | os.PathLike[str]) -> dict[str, int | None]:
    """Return a dict from "role/key" to score, read from a run folder or a CSV file of `HumanJudge`.

    The score of an undecided reply is None. CSV rows without a score are omitted.

    Raises:
      UserError: the source is neither a run folder nor a CSV file, has no scores, or is damaged.
    """
    path = pathlib.Path(source)
    if path.suffix.lower() == ".csv":
        rows = {name: score_of(row, ROLE_SCALE, path) for name, row in read_rows(path).items()}
        found = {name: score for name, score in rows.items() if not isinstance(score, str)}
        if not found:
            raise UserError(f"{path}: the column 'score' is empty; fill it in")
        return found
    run = Run.read(path)
    scores: dict[str, int | None] = {}
    for role in run.manifest["roles"]:
        if role != DEFAULT:
            scores |= {f"{role}/{key}": score for key, score in (run.scores(role) or {}).items()}
    if not scores:
        raise UserError(f"{path}: contains no scores; judge the run first")
    return scores


def replies_of(run: Run, descriptions: Mapping[str, str] | None = None) -> dict[str, Item]:
    """Return a dict from "role/key" to `Item`, for all replies except the default persona's.

    Args:
      run: the run.
      descriptions: role → description, or None.
    """
    found = {}
    for name in run.manifest["roles"]:
        if name != DEFAULT:
            role = Role(name, (), "", (descriptions or {}).get(name, ""))
            found |= {f"{name}/{item.key}": item
                      for item in items_of(role, run.rollouts(name) or [])}
    return found


def sample(replies: Mapping[str, Item], scores: Mapping[str, int | None], count: int, *,
           seed: int = 0) -> list[tuple[Item, int | None]]:
    """Draw up to `count` replies with each score, from as many roles as possible.

    Args:
      replies: "role/key" → reply (`replies_of`).
      scores: "role/key" → score (`scores_of`). Replies without an entry are not drawn.
      count: the maximum number of replies with each score.
      seed: the seed of the draw.

    Returns:
      A list of (reply, score) in descending order of score; undecided replies come last.
    """
    rng = np.random.default_rng(seed)
    by_score: dict[int | None, list[str]] = {}
    for key in sorted(set(replies) & set(scores)):
        by_score.setdefault(scores[key], []).append(key)
    drawn = []
    for score in sorted(by_score, key=lambda s: (s is None, -(s or 0))):
        keys = by_score[score]
        order = [keys[i] for i in rng.permutation(len(keys))]
        turn: dict[str, int] = {}
        rank = {}
        for key in order:  # the first reply of each role precedes the second reply of any role
            role = replies[key].role.name
            rank[key] = turn[role] = turn.get(role, -1) + 1
        order.sort(key=lambda key: rank[key])
        drawn += [(replies[key], score) for key in order[:count]]
    return drawn


def verdict_counts(verdicts: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the number of replies with each score.

    Args:
      verdicts: the content of a scores file (`Run.verdicts`), or None.

    Returns:
      A dictionary that maps each score, as text, to its number of replies. The key "None" counts
      undecided replies, and "failed" counts replies on which the judge failed.
    """
    out = {str(score): 0 for score in (0, 1, 2, 3, None)}
    for key, score in ({} if verdicts is None else verdicts["scores"]).items():
        failed = "error" in verdicts["details"].get(key, {})  # type: ignore[index]
        name = "failed" if failed else str(score)
        out[name] = out.get(name, 0) + 1
    return out
