"""Conversations watched turn by turn: project a given one, or let one grow and watch it drift."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.captures import capture
from jaxpersona.distributed.sharding import on_own_mesh
from jaxpersona.engine.extract import extract, width_of
from jaxpersona.engine.generate import generate
from jaxpersona.engine.prompts import encode
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.where import holds, response
from jaxpersona.models.batch import batch
from jaxpersona.persona.check import fit
from jaxpersona.runtime import own_rules
from jaxpersona.text import chat
from jaxpersona.vectors.vector import Vector

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


@dataclasses.dataclass(frozen=True)
class TurnProjection:
    """One assistant message of a conversation.

    Attributes:
      turn: its number among the messages, from 0.
      tokens: how many response tokens it has.
      values: [L, K] float32, their mean projections on K directions at every layer; NaN where a
        direction is zero (an imported one may not know every layer).
    """

    turn: int
    tokens: int
    values: np.ndarray


@on_own_mesh
@own_rules()
def project_conversation(
    model: Model,
    conversation: Sequence[dict[str, str]],
    vectors: Sequence[Vector],
    *,
    interventions: Interventions | None = None,
) -> list[TurnProjection]:
    """Project the assistant messages of a finished conversation on directions.

    Each value is the mean over the message's response tokens of ⟨h, v̂⟩ (Lu et al. 2026, drift).
    The activations are those of `extract`, on one device or on a mesh.

    Raises:
      ValueError: no assistant message, a conversation longer than the context, activations that
        are not finite, or directions or interventions of another model or site.
    """
    vectors = [fit(model, vector) for vector in vectors]
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer; a conversation needs one")
    directions = np.stack([vector.values for vector in vectors], 1)
    known = [i for i, layer in enumerate(directions) if layer.any(1).all()]
    if not known:
        raise ValueError("the directions have no layer in common at which none is zero")
    row = encode(model, conversation, reply=False)
    read = extract(model, [row], interventions=interventions, on_nonfinite="raise",
                   capture=capture.projections(directions[known], response, layers=known),
                   batch_tokens=width_of(row.tokens.size))  # no more rows than there must be
    found_lt = read.captured["projections"][0]
    values = np.full((model.config.n_layers, *found_lt.shape[1:]), np.nan, np.float32)  # [L, T, K]
    values[known] = found_lt
    chosen = np.asarray(holds(jnp.asarray(response.encode()), batch(
        [row.tokens], kind=[row.kind], turn=[row.turn])))[0, : row.tokens.size]
    found = []
    for turn in sorted(set(row.turn[chosen].tolist())):
        here = chosen & (row.turn == turn)
        found.append(TurnProjection(turn, int(here.sum()), values[:, here].mean(1)))
    if not found:
        raise ValueError("the conversation has no assistant message with response tokens")
    return found


@dataclasses.dataclass(frozen=True)
class Talks:
    """N conversations grown over M turns.

    Attributes:
      replies: M lists of N replies.
      projections: [M, N, L] float32, the mean projection of each reply; NaN for an empty one.
    """

    replies: list[list[str]]
    projections: np.ndarray


def grow(
    model: Model,
    openings: Sequence[Sequence[dict[str, str]]],
    messages: Sequence[Sequence[str]],
    vector: Vector,
    *,
    interventions: Interventions | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    report: Callable[[int, int, int], None] | None = None,
    **settings: Any,
) -> Talks:
    """Let the model answer message after message, and project every reply as it is generated.

    A reply's own token ids stay in the conversation; nothing is encoded twice.

    Args:
      openings: [N] system messages (a list of none or one each).
      messages: [N][M] the users' messages.
      vector: what to project on.
      seed, settings: as for `generate`; each turn draws anew.
      ids: [N] what each conversation is for its draws, default its number; rows that share one
        share their draws.
      report: called with (turn, conversations done, tokens of this turn).

    Raises:
      ValueError: `vector` is of another model or site; or as `generate`.
    """
    vector = fit(model, vector)
    openings, messages = _lists("openings", openings), _lists("messages", messages)
    if len(openings) != len(messages) or len({len(said) for said in messages}) > 1 or (
            not all(messages)):
        raise ValueError(f"openings has {len(openings)} entries and messages has rows of "
                         f"{sorted({len(said) for said in messages})} messages for "
                         f"{len(messages)} conversations; give one opening a conversation and "
                         "equally many messages, at least one")
    prompts: list[Any] = [
        [*opening, {"role": "user", "content": said[0]}]
        for opening, said in zip(openings, messages, strict=True)
    ]
    replies, values, unit = [], [], vector.unit
    names = range(len(prompts)) if ids is None else ids
    for turn in range(len(messages[0])):
        out = generate(model, prompts, interventions=interventions, seed=seed,
                       ids=[chat.row_id([], i, f"talk/{turn}") for i in names],
                       capture=capture.mean(response), on_nonfinite="raise",
                       progress=_at_turn(report, turn), **settings)
        replies.append(out.text)
        values.append(np.einsum("nld,ld->nl", out.captured["mean"], unit))
        if turn + 1 < len(messages[0]):
            prompts = [
                chat.continue_row(model.tokenizer, row, reply, said[turn + 1], stopped=bool(stop))
                for row, reply, stop, said in zip(out.rows, out.tokens, out.stopped, messages,
                                                  strict=True)
            ]
    return Talks(replies, np.stack(values))


def _lists(name: str, given: Any) -> list[list[Any]]:
    """Return one list a conversation.

    Raises:
      ValueError: no conversation, or something else in place of a list.
    """
    found = chat.listed(given, name)
    for i, one in enumerate(found):
        if isinstance(one, (str, bytes)) or not isinstance(one, Iterable):
            raise ValueError(f"{name}[{i}] is {one!r:.60}; give a list for each conversation")
    return [list(one) for one in found]


def _at_turn(report: Callable[[int, int, int], None] | None,
             turn: int) -> Callable[[int, int, int], None] | None:
    if report is None:
        return None
    return lambda done, total, tokens: report(turn, done, tokens)
